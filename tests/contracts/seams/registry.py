"""The registry of systems: one row of the table each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cases import Case


@dataclass(frozen=True)
class System:
    """One row of the table."""

    name: str
    run: Callable[[Case], None]
    applies: Callable[[Case], bool]
    costly: bool  # by default only on the key cases


SYSTEMS: dict[str, System] = {}


def system(name: str, applies: Callable[[Case], bool] = lambda case: True, costly: bool = False) -> Any:
    """Registers a system under the name that the table shows."""

    def register(run):
        SYSTEMS[name] = System(name, run, applies, costly)
        return run

    return register


def exact(case: Case) -> bool:
    """Whether derivatives can be compared to many digits at a bearable cost."""
    return "large" not in case.traits and not case.low_precision

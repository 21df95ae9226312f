"""Sample: a call of an op, as the derivative checks and the fuzzed raw ops take it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One call of an op's public function; each op lists its own in ``samples()``, of its samples.py or its reference.

    The same list feeds gradcheck, gradgradcheck, forward-mode AD and opcheck, in the tests and in the command line.
    """

    name: str
    args: tuple[Any, ...]  # tensors that require grad are the ones that are checked
    kwargs: dict[str, Any] = field(default_factory=dict)

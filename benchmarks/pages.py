"""Runs a provider without transparent huge pages, to show what the advice of csrc/core/checks.h is worth."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .harness import OURS, AutogradRunner, Case, Inputs, Provider

PART, WITHOUT = "pages", f"{OURS} without huge pages"
_DISABLE, _IS_DISABLED = 41, 42  # prctl's PR_SET_THP_DISABLE, PR_GET_THP_DISABLE
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def disable(wanted: bool) -> bool:
    """Whether the system let this process do without huge pages (or have them again), for memory touched from now."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return (
        prctl is not None and prctl(_DISABLE, int(wanted), 0, 0, 0) == 0 and prctl(_IS_DISABLED, 0, 0, 0, 0) == wanted
    )


def missing() -> str:
    """Why there is nothing to compare here; an empty string if there is."""
    try:
        state = _ENABLED.read_text(encoding="ascii")
    except OSError:
        return "this system has no transparent huge pages"
    if "[never]" in state:
        return "transparent huge pages are turned off"
    switched = disable(True)
    disable(False)
    return "" if switched else "this system does not let a process turn huge pages off"


class WithoutHugePages(AutogradRunner):
    """Gets small pages wherever its runs touch new memory, as with ``FUSED_OPS_HUGE_PAGES=0``.

    That variable is read once a process; this switch lets both take turns in one.
    """

    def run(self, direction: str) -> None:
        disable(True)
        try:
            super().run(direction)
        finally:
            disable(False)


def provider(function: Callable[..., Tensor]) -> Provider:
    """Ours with small pages, or the reason why not."""

    def make(case: Case, inputs: Inputs, threads: int) -> WithoutHugePages:
        return WithoutHugePages(function, inputs)

    reason = missing()
    return Provider(WITHOUT, missing=reason) if reason else Provider(WITHOUT, make=make, strict=True)

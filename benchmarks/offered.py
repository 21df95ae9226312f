"""Finds out what the installed fused_ops offers, so that a case it lacks is reported as such."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from .harness import OURS, Provider


def missing_options(function: Callable[..., object], *names: str) -> str:
    """Which of these arguments the function does not have, as a reason; an empty string if it has them all."""
    parameters = inspect.signature(function).parameters
    absent = [name for name in names if name not in parameters]
    return f"not offered: no argument {', '.join(absent)}" if absent else ""


def missing_call(call: Callable[[], object]) -> str:
    """Why a small trial call is refused, as a reason; an empty string if it is not."""
    try:
        call()
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"not offered: {str(error).splitlines()[0]}"
    return ""


def ours(function: Callable[..., Tensor], reason: str, name: str = OURS) -> Provider:
    """Our provider, held to the error rule, or the reason why there is none."""
    return Provider(name, missing=reason) if reason else Provider(name, function, strict=True)

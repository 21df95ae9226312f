"""Integer arguments, taken as PyTorch's argument parser takes an int."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def as_integer(function: str, name: str, value: Any) -> int:
    """The value as an int: whatever Python takes as an index, but no bool and nothing that loses a fraction.

    Args:
        function: Whose argument it is, for the message.
        name: The argument's name.
        value: What the caller gave.

    Raises:
        TypeError: it is no integer.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # a symbol of a graph stays one
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        index: int = operator.index(value)
        return index
    except TypeError:
        raise TypeError(f"{function}(): argument '{name}' must be int, not {type(value).__name__}") from None


def as_int64(function: str, name: str, value: Any) -> int:
    """The same of an argument that goes into an op.

    Raises:
        TypeError: it is no integer.
        ValueError: it does not fit in 64 bits.
    """
    integer = as_integer(function, name, value)
    if type(integer) is int and not torch.compiler.is_compiling() and not -(2**63) <= integer < 2**63:
        raise ValueError(f"{function}(): argument '{name}' must fit in 64 bits, got {integer}")
    return integer

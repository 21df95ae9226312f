"""Checks that every op's arguments share: one device, the strided layout, data behind each shape, integers.

The kernels check it in ``csrc/core/border.h``. This is the same for what Python runs: fake kernels, which must not
answer for tensors of several devices; references; and public functions that combine tensors before a raw op has seen
them. PyTorch's elementwise operations do not check that a tensor's data is there: they crash.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.torch_private import is_batched, transforms_active

_PLAIN = (Tensor, torch.nn.Parameter)
_OF_THE_CPU = ("numbers", "place")


def check_devices(op: str, tensors: Iterable[tuple[str, Any]]) -> None:
    """Raises for a tensor of another device than the first; what is no tensor is passed over."""
    first = None
    for name, t in tensors:
        if not isinstance(t, Tensor):
            continue
        if first is None:
            first = t.device
        elif t.device != first:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {first} and "
                f"{t.device}! (when checking argument for argument {name} in method {op})"
            )


def check_data(op: str, tensors: Iterable[tuple[str, Any]]) -> None:
    """Raises for a tensor that is not strided, or whose storage was freed or made smaller than its shape needs.

    Tensors of a transform, a trace or a subclass have no memory that could be asked for.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return
    for name, t in tensors:
        if type(t) not in _PLAIN or is_batched(t):
            continue
        if t.is_nested or t.is_quantized or t.layout is not torch.strided:
            kind = "a nested tensor" if t.is_nested else "a quantized tensor" if t.is_quantized else t.layout
            raise NotImplementedError(f"{op}: expected {name} to be a tensor of layout torch.strided, got {kind}")
        extent = t.numel()
        if extent and not t.is_contiguous():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        try:
            bytes = t.untyped_storage().nbytes()
        except NotImplementedError:  # a transform's, which has ended: a backward found it among what its forward saved
            continue
        if extent and (t.storage_offset() + extent) * t.itemsize > bytes:
            raise RuntimeError(
                f"{op}: {name}: The tensor has a non-zero number of elements, but its data is not allocated yet; "
                f"shape {list(t.shape)} in a storage of {bytes} bytes"
            )


def check_tensors(op: str, tensors: Sequence[tuple[str, Any]]) -> None:
    """Both of them."""
    check_devices(op, tensors)
    check_data(op, tensors)


def checked(op: str, names: Sequence[str], function: Callable[..., Any], *, reads: bool) -> Callable[..., Any]:
    """A fake kernel or, as it ``reads`` values, a reference of the op whose arguments have these names.

    ``numbers`` and ``place`` are those of an op for graphs: tensors of the CPU, wherever the others are.
    """
    where = f"fused_ops::{op}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*zip(names, args, strict=False), *kwargs.items()]
        check_devices(where, [pair for pair in given if pair[0] not in _OF_THE_CPU])
        for name, value in given:
            if name in _OF_THE_CPU and value is not None and value.device.type != "cpu":
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cpu and "
                    f"{value.device}! (when checking argument for argument {name} in method {where})"
                )
        if reads:
            check_data(op, given)
        return function(*args, **kwargs)

    return call


# ---- integers, taken as PyTorch's argument parser takes an int


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

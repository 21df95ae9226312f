"""The memory format of what the ops return, channels_last for a channels_last input, else contiguous; and what plain
PyTorch works in: the pieces of a tensor, so that what it makes on the way is small, and the dtypes that a device has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.torch_private import transforms_active

# The most elements of a piece: on the CPU what stays in the cache, elsewhere what makes a launch worth its while.
_CPU_PIECE, _PIECE = 1 << 19, 1 << 22
# A piece is no more than this part of what it is of, so that what is made of it takes less memory than the result ...
_PARTS = 8
_CPU_FEWEST, _FEWEST = 1 << 17, 1 << 20  # ... down to so few elements, where calling an op costs more than its work.
# The most values that PyTorch's CPU leaves to one thread; of more, the threads decide which are added first, and which
# are the last of a thread's, whose exp or erf is another function than that of many at once.
_SERIAL = (1 << 15) - 1
# Types of devices that have no float64: what is in float64 elsewhere is in float32 there, and summed in blocks.
_WITHOUT_FLOAT64 = ("mps",)
_BLOCK = 512  # Values of a block: a float32 sum of so few is off by no more than a few roundings.


def is_channels_last(input: Tensor) -> bool:
    """Dense with the channel dimension last in memory, and not also contiguous."""
    if input.dim() < 3 or input.is_contiguous():
        return False
    return input.movedim(1, -1).is_contiguous()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_its_format(input: Tensor) -> Tensor:
    """The input in the memory format that PyTorch's batch norm returns: its own, copied where it has gaps or none."""
    if input.layout is not torch.strided or transforms_active() or input.is_contiguous():
        return input
    last = _has_channels_last(input)
    if last and _lies_the_same(input):
        return input
    return input.contiguous(memory_format=_CHANNELS_LAST[input.dim()] if last else torch.contiguous_format)


def _lies_the_same(input: Tensor) -> bool:
    """Whether contiguous and channels_last are the same order: of one channel, or one position."""
    return input.size(1) == 1 or input.shape[2:].numel() == 1


def _has_channels_last(input: Tensor) -> bool:
    """Whether the strides, with gaps or without, are those of channels_last by PyTorch's rule.

    Source: is_channels_last_strides_2d_s4 of c10/core/MemoryFormat.h.
    """
    if input.dim() not in _CHANNELS_LAST:
        return False
    if input.is_contiguous(memory_format=_CHANNELS_LAST[input.dim()]):
        return True  # strides of dimensions of size 1 are of no matter then
    sizes, strides, least = input.shape, input.stride(), 0
    if strides[1] == 0:
        return False
    for d in (1, *range(input.dim() - 1, 1, -1), 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def empty_output(input: Tensor) -> Tensor:
    """Uninitialised, of the input's shape and dtype: channels_last for a channels_last input, else contiguous."""
    return _empty(input, is_channels_last(input))


def empty_normalised(input: Tensor, alone: bool = False) -> Tensor:
    """``empty_output`` for what batch norm returns, with PyTorch's strides where the data lies the same either way.

    Args:
        input: What the result is of. One without elements that is channels_last has a result that is.
        alone: Of a batch norm without an addition or an activation behind it. Where an input with gaps lies the same
            either way, its result has the strides of channels_last if the input's are in that order.
    """
    if input.is_contiguous():
        last = _is_empty_channels_last(input)
    else:
        last = is_channels_last(input) or (alone and _has_channels_last(input) and _lies_the_same(input))
    return _empty(input, last)


def _is_empty_channels_last(input: Tensor) -> bool:
    """Whether an input that is contiguous is channels_last too, for want of elements."""
    format = _CHANNELS_LAST.get(input.dim())
    return format is not None and input.is_contiguous(memory_format=format) and not _lies_the_same(input)


def _empty(input: Tensor, last: bool) -> Tensor:
    if last and input.dim() in _CHANNELS_LAST:
        return torch.empty_like(input, memory_format=_CHANNELS_LAST[input.dim()])
    return torch.empty_like(input) if last else input.new_empty(input.shape)


class Piece(NamedTuple):
    """Some of the batch, and of the first dimension behind that of the classes or channels."""

    all: tuple[slice, ...]  # of a tensor with the classes or channels
    row: tuple[slice, ...]  # of one without

    def of(self, values: Tensor | None, input: Tensor) -> Tensor | None:
        """The piece's values of those of an input: of its dimensions, or with one value for each row."""
        return None if values is None else values[self.all if values.dim() == input.dim() else self.row]


def piece_elements(input: Tensor) -> int:
    """How many elements a piece should have."""
    most, fewest = (_CPU_PIECE, _CPU_FEWEST) if input.device.type == "cpu" else (_PIECE, _FEWEST)
    return min(most, max(input.numel() // _PARTS, fewest))


def pieces(input: Tensor) -> list[Piece]:
    """An input (batch, classes or channels, ...) in pieces, in order; a single row, (classes,), is one."""
    if input.dim() < 2 or input.numel() <= piece_elements(input):
        return [Piece((), ())]
    batch, one = input.size(0), input.numel() // input.size(0)
    step = max(piece_elements(input) // one, 1)
    rows = [slice(begin, min(begin + step, batch)) for begin in range(0, batch, step)]
    if one <= piece_elements(input) or input.dim() == 2:
        return [Piece((part,), (part,)) for part in rows]
    length = input.size(2)
    step = max(piece_elements(input) // (one // length), 1)
    inner = [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]
    return [Piece((part, slice(None), i), (part, i)) for part in rows for i in inner]


def memory_pieces(input: Tensor, most: int | None = None) -> list[tuple[slice, ...]]:
    """An input (batch, channels, ...) in pieces of one stretch of memory each, in its order."""
    order = [0, *range(2, input.dim()), 1] if is_channels_last(input) else list(range(input.dim()))
    found: list[tuple[slice, ...]] = []
    most = piece_elements(input) if most is None else most

    def cut(index: tuple[slice, ...], left: list[int], elements: int) -> None:
        if elements <= most or not left:
            found.append(index)
            return
        d, size = left[0], input.size(left[0])
        step = max(most * size // elements, 1)
        for begin in range(0, size, step):
            part = slice(begin, min(begin + step, size))
            each = (part.stop - begin) * (elements // size)
            cut((*index[:d], part, *index[d + 1 :]), left[1:] if step == 1 else [], each)

    cut((slice(None),) * input.dim(), order, input.numel())
    return found


def serial_pieces(piece: Tensor) -> list[tuple[slice, ...]]:
    """A piece in parts of which each is one thread's on a CPU."""
    return memory_pieces(piece, _SERIAL if piece.is_cpu else piece.numel())


class Scratch:
    """Memory that the pieces of a call use one after another: fresh memory for each costs more than what fills it."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def like(self, name: str, piece: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What has this name, uninitialised, of the piece's shape."""
        found = self._found.get(name)
        if found is None or found.shape != piece.shape:
            found = self._found[name] = torch.empty_like(piece, dtype=dtype)
        return found

    def copy(self, name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """The piece in that dtype, for reading: itself if it has it."""
        return piece if piece.dtype == dtype else self.like(name, piece, dtype).copy_(piece)

    def fresh(self, name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """The piece in that dtype, for writing over."""
        return self.like(name, piece, dtype).copy_(piece)


# ---- dtypes


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What sums and statistics are in on a tensor's device: float64, or float32 where there is none."""
    return torch.float32 if tensor.device.type in _WITHOUT_FLOAT64 else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """The tensor in ``wide_dtype``."""
    return tensor.to(wide_dtype(tensor))


def wide_sum(values: Tensor, dims: int | list[int], keepdim: bool = False) -> Tensor:
    """The sum of a piece's values in ``wide_dtype``: of a few in their own dtype, of those sums then in that."""
    dims = [dims] if isinstance(dims, int) else dims
    for dim in dims:
        values = _sum_of_blocks(values, dim)
    return values if keepdim else values.squeeze(tuple(dims))


def channel_sums(values: Tensor) -> Tensor:
    """The sum of a piece (batch, channels, ...) over all but its channels, wide, the same on any number of threads.

    What lies in one stretch of memory is summed first. Threads share what is left of the channels: of those side by
    side a channel's neighbours decide in which order it is added, and of a single one the threads share the sum.
    """
    channels = values.size(1)
    if channels > 1 and values.stride(1) > 1 and values.dim() > 2:
        values = wide_sum(values.flatten(2), 2)
    rows = values.movedim(1, -1).reshape(values.numel() // max(channels, 1), channels)
    total, *others = (wide_sum(part, 0) for part in rows.split(max(_SERIAL // max(channels, 1), 1)))
    for part in others:
        total += part
    return total


def row_sums(values: Tensor, dim: int) -> Tensor:
    """The sum over the classes, wide, with ``keepdim``, of each row alike: other rows have no part in its order."""
    if dim == values.dim() - 1 or is_channels_last(values):
        return wide_sum(values, dim, keepdim=True)
    while (n := values.size(dim)) > 1:
        half = n // 2
        sums = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        if n % 2:
            sums.narrow(dim, 0, 1).add_(values.narrow(dim, n - 1, 1))
        values = sums
    return wide(values.sum(dim, keepdim=True))


def _sum_of_blocks(values: Tensor, dim: int) -> Tensor:
    while (n := values.size(dim)) > _BLOCK:
        whole = n - n % _BLOCK
        blocks = wide(values.narrow(dim, 0, whole).unflatten(dim, (-1, _BLOCK)).sum(dim + 1))
        if whole < n:
            blocks = torch.cat((blocks, wide(values.narrow(dim, whole, n - whole).sum(dim, keepdim=True))), dim)
        values = blocks
    return wide(values.sum(dim, keepdim=True))

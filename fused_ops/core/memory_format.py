"""The memory format of what the ops return: channels_last for a channels_last input, else contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.core.torch_private import transforms_active


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


def empty_output(input: Tensor, alone: bool = False) -> Tensor:
    """Uninitialised, of the input's shape and dtype: channels_last for a channels_last input, else contiguous.

    Args:
        input: What the result is of.
        alone: Of a batch norm without an addition or an activation behind it. Where an input with gaps lies the same
            either way, its result has the strides of channels_last if the input's are in that order.
    """
    last = is_channels_last(input)
    if not last and alone and not input.is_contiguous() and _has_channels_last(input):
        last = _lies_the_same(input)
    if last and input.dim() in _CHANNELS_LAST:
        return torch.empty_like(input, memory_format=_CHANNELS_LAST[input.dim()])
    return torch.empty_like(input) if last else input.new_empty(input.shape)

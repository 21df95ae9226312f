"""The memory format of what the ops return: channels_last for a channels_last input, else contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(input: Tensor) -> bool:
    """Dense with the channel dimension last in memory, and not also contiguous."""
    if input.dim() < 3 or input.is_contiguous():
        return False
    return input.movedim(1, -1).is_contiguous()


def empty_output(input: Tensor) -> Tensor:
    """Uninitialised, of the input's shape and dtype: channels_last for a channels_last input, else contiguous."""
    return torch.empty_like(input) if is_channels_last(input) else input.new_empty(input.shape)

"""Plain-PyTorch twins of the kernels: every intermediate, and the closed form. Also what runs where no kernel does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an op's public function; each ``reference/<op>.py`` lists its own in ``samples()``.

    The same list feeds gradcheck, gradgradcheck, forward-mode AD and opcheck, in the tests and in the command line.
    """

    name: str
    args: tuple[Any, ...]  # tensors that require grad are the ones that are checked
    kwargs: dict[str, Any] = field(default_factory=dict)


def is_channels_last(input: Tensor) -> bool:
    """Dense with the channel dimension last in memory, and not also contiguous."""
    if input.dim() < 3 or input.is_contiguous():
        return False
    return input.movedim(1, -1).is_contiguous()


def empty_output(input: Tensor) -> Tensor:
    """Uninitialised, of the input's shape and dtype: channels_last for a channels_last input, else contiguous."""
    return torch.empty_like(input) if is_channels_last(input) else input.new_empty(input.shape)

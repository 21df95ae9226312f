"""Linear cross-entropy of DTensors."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Any, **options: Any
) -> Tensor:
    """``F.cross_entropy`` of ``F.linear``."""
    if linear_weight.dim() != 2 or not isinstance(target, Tensor):
        raise NotImplementedError(
            "linear_cross_entropy: with a DTensor expected linear_weight of shape (classes, in_features) and class "
            f"indices or probabilities, got shape {list(linear_weight.shape)} and {type(target).__name__}"
        )
    logits = F.linear(input, linear_weight, linear_bias)
    if logits.dim() > 2:
        target = target.flatten(0, -2) if target.dim() == logits.dim() else target.flatten()
        logits = logits.flatten(0, -2)
    return F.cross_entropy(logits, target, **options)

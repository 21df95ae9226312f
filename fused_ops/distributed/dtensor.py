"""DTensors: until the ops are distributed themselves, PyTorch's own op takes them, with its own sharding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ORDINARY = (Tensor, torch.nn.Parameter, type(None))


def any_dtensor(*values: Any) -> bool:
    """Whether one is a DTensor; asks for what it has, as importing its class takes a third of a second."""
    for value in values:  # a loop, since any() of a generator takes longer than all of its questions
        kind = type(value)
        if kind not in _ORDINARY and hasattr(kind, "full_tensor"):
            return True
    return False


def refuse(op: Callable[..., Any], own: dict[str, Any]) -> None:
    """Raises NotImplementedError if an option that PyTorch's op does not have differs from its default.

    Args:
        op: The public function.
        own: Those of its options.
    """
    defaults = inspect.signature(op).parameters
    for name, value in own.items():
        default = defaults[name].default
        if value is not default and (isinstance(value, Tensor) or value != default):
            raise NotImplementedError(
                f"{op.__name__}: a DTensor goes to PyTorch's own op, which has no {name}; expected {default!r}, or "
                "ordinary tensors (to_local() or full_tensor())"
            )


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

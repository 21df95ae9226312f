"""The nn.Module of linear cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.graph import fx_leaf, refuse_script
from fused_ops.core.torch_private import WeightedLoss
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy

_MODULE_OPTIONS = {
    "z_loss",
    "logit_scale",
    "softcap",
    "empty",
    "loss_dtype",
    "shift",
    "chunk_rows",
    "max_memory_bytes",
    "return_outputs",
    "class_group",
    "class_start",
    "classes",
    "row_group",
    "sequence_parallel",
}


class LinearCrossEntropyLoss(WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss``: a linear layer and its cross-entropy, with our options.

    Args:
        in_features: Size of each input.
        num_classes: Number of classes; with ``class_group`` those of this rank.
        out_features: Positions with a loss of their own, (d1, ...).
        bias: Whether the layer has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: (classes,), the factor of each class; a buffer; with ``class_group`` of the classes of all ranks.
        ignore_index: Class index whose rows do not count.
        label_smoothing: In [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, accepted and not needed.
        **more: Other keyword arguments of ``linear_cross_entropy`` that are numbers or process groups, the same for
            every call. A module with a group can neither be copied nor pickled.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,) and more.get("class_group") is None:
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        unknown = sorted(set(more) - _MODULE_OPTIONS)
        if unknown:
            raise TypeError(f"LinearCrossEntropyLoss: expected options among {sorted(_MODULE_OPTIONS)}, got {unknown}")
        super().__init__(weight=weight, size_average=None, reduce=None, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing, self.options, self.more = ignore_index, label_smoothing, options, more
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Any, **options: Any) -> Any:
        """The loss.

        Args:
            input: (..., in_features).
            target: As for ``linear_cross_entropy``.
            **options: More of its keyword arguments for this call, such as ``token_weight`` and ``normalizer``.
        """
        if type(input) is not Tensor:
            leaf = fx_leaf(self, input, target, **options)
            if leaf is not None:
                return leaf
        bias, shape = self.linear.bias, (self.num_classes, *self.out_features)
        settled = {
            "reduction": self.reduction,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "options": self.options,
            "linear_bias": None if bias is None else bias.reshape(shape),
        }
        linear_weight = self.linear.weight.reshape(*shape, self.linear.in_features)
        return linear_cross_entropy(input, linear_weight, target, **{**settled, **self.more, **options})

    def __prepare_scriptable__(self) -> None:
        refuse_script(self)

    def extra_repr(self) -> str:
        """The options."""
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            **self.more,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())

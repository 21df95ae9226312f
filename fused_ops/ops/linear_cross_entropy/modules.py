"""The nn.Module of linear cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_ops.core.graph import fx_leaf, refuse_script
from fused_ops.core.torch_private import WeightedLoss
from fused_ops.ops.cross_entropy.arguments import Empty, ReductionName, Target
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy
from fused_ops.ops.linear_cross_entropy.arguments import LinearCallOptions

# The options of a call that a module holds besides PyTorch's, at their defaults.
_ADDED: dict[str, Any] = {
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "softcap": None,
    "empty": "nan",
    "loss_dtype": None,
    "shift": False,
    "chunk_rows": None,
    "max_memory_bytes": None,
    "return_outputs": False,
    "compact": False,
    "class_group": None,
    "class_start": None,
    "classes": None,
    "row_group": None,
    "sequence_parallel": False,
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
        z_loss: As of ``linear_cross_entropy``, in every call, like the others.
        logit_scale: Multiplies the logits.
        softcap: Bounds them.
        empty: ``"nan"``, ``"zero"`` or ``"raise"`` where nothing counts.
        loss_dtype: Of the loss.
        shift: Each position's target is that of the next one.
        chunk_rows: Rows whose logits exist at once.
        max_memory_bytes: What a call may take beyond inputs and gradients.
        return_outputs: Returns a ``CrossEntropyOutput``.
        compact: Leaves ignored rows out of the products on a GPU too.
        class_group: The process group whose ranks have other classes; ``linear_weight`` is this rank's part, ``weight``
            that of all classes. A module with a group can neither be copied nor pickled.
        class_start: This rank's first class.
        classes: Number of classes of all ranks.
        row_group: The process group whose ranks have other rows.
        sequence_parallel: Each rank's input is a part of the rows.
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
        reduction: ReductionName = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        empty: Empty = "nan",
        loss_dtype: torch.dtype | None = None,
        shift: bool = False,
        chunk_rows: int | None = None,
        max_memory_bytes: int | None = None,
        return_outputs: bool = False,
        compact: bool = False,
        class_group: Any = None,
        class_start: int | None = None,
        classes: int | None = None,
        row_group: Any = None,
        sequence_parallel: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,) and class_group is None:
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight=weight, size_average=None, reduce=None, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.z_loss, self.logit_scale, self.softcap = z_loss, logit_scale, softcap
        self.empty, self.loss_dtype, self.shift = empty, loss_dtype, shift
        self.chunk_rows, self.max_memory_bytes = chunk_rows, max_memory_bytes
        self.return_outputs, self.compact = return_outputs, compact
        self.class_group, self.class_start, self.classes = class_group, class_start, classes
        self.row_group, self.sequence_parallel = row_group, sequence_parallel
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Target, **options: Unpack[LinearCallOptions]) -> Any:
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
            **{name: getattr(self, name) for name in _ADDED},
        }
        linear_weight = self.linear.weight.reshape(*shape, self.linear.in_features)
        return linear_cross_entropy(input, linear_weight, target, **{**settled, **options})

    def __prepare_scriptable__(self) -> None:
        refuse_script(self)

    def extra_repr(self) -> str:
        """The sizes, and the options that are not the defaults; the layer shows whether it has a bias."""
        shown = {"out_features": (), "reduction": "mean", "ignore_index": None, "label_smoothing": 0.0, **_ADDED}
        changed = [f"{k}={getattr(self, k)!r}" for k, default in shown.items() if getattr(self, k) != default]
        return ", ".join([f"in_features={self.linear.in_features}", f"num_classes={self.num_classes}", *changed])

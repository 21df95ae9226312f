"""The nn.Module of cross-entropy: PyTorch's own, with the forward and the options of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.core.graph import fx_leaf, refuse_script
from fused_ops.ops.cross_entropy.api import cross_entropy
from fused_ops.ops.cross_entropy.arguments import Empty, ReductionName, Target

_ADDED: dict[str, Any] = {
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "softcap": None,
    "empty": "nan",
    "loss_dtype": None,
    "inplace_backward": False,
    "return_outputs": False,
    "class_group": None,
    "class_start": None,
    "classes": None,
    "row_group": None,
}
_PASSED_ON = ("reduction", *_ADDED)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` with the options of ``fused_ops.cross_entropy``.

    Args:
        weight: (classes,) factor of each class; a buffer.
        size_average: Deprecated, as in PyTorch.
        ignore_index: Class index whose rows do not count.
        reduce: Deprecated, as in PyTorch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: In [0, 1].
        z_loss: Coefficient of lse^2.
        logit_scale: Multiplies the logits.
        softcap: Bound of the logits, or None.
        class_mask: bool, (classes,), the classes that are allowed; a buffer outside the state_dict, whose keys stay
            PyTorch's.
        empty: ``"nan"``, ``"zero"`` or ``"raise"`` where nothing counts.
        loss_dtype: Of the loss.
        inplace_backward: Lets the backward overwrite the logits.
        return_outputs: Returns a ``CrossEntropyOutput``.
        class_group: Process group of ranks that share the classes. A module with a group can neither be copied nor
            pickled.
        class_start: The first class of this rank.
        classes: How many all ranks have.
        row_group: Process group of ranks that share the rows, or a tuple of them.
    """

    class_mask: Tensor | None
    z_loss: float
    logit_scale: float
    softcap: float | None
    empty: str
    loss_dtype: torch.dtype | None
    inplace_backward: bool
    return_outputs: bool
    class_group: Any
    class_start: int | None
    classes: int | None
    row_group: Any

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: ReductionName = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        class_mask: Tensor | None = None,
        empty: Empty = "nan",
        loss_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
        return_outputs: bool = False,
        class_group: Any = None,
        class_start: int | None = None,
        classes: int | None = None,
        row_group: Any = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.logit_scale, self.softcap = z_loss, logit_scale, softcap
        self.empty, self.loss_dtype = empty, loss_dtype
        self.inplace_backward, self.return_outputs = inplace_backward, return_outputs
        self.class_group, self.class_start, self.classes, self.row_group = class_group, class_start, classes, row_group
        self.register_buffer("class_mask", class_mask, persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**_ADDED, **state})  # what a module of PyTorch pickled lacks
        if "class_mask" not in self._buffers:
            self.register_buffer("class_mask", None, persistent=False)

    def __prepare_scriptable__(self) -> None:
        refuse_script(self)

    def extra_repr(self) -> str:
        """The options that are not the defaults."""
        shown = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, **_ADDED}
        return ", ".join(f"{k}={getattr(self, k)!r}" for k, default in shown.items() if getattr(self, k) != default)

    def forward(
        self,
        input: Tensor,
        target: Target,
        *,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Any:
        """The loss; see ``fused_ops.cross_entropy``.

        Args:
            input: Logits, (classes), (rows, classes) or (rows, classes, d1, ...).
            target: Class indices, class probabilities, (indices, probabilities) or (target_a, target_b, lam).
            token_weight: A factor of each row.
            normalizer: Replaces the mean's denominator.
        """
        if type(input) is not Tensor:
            leaf = fx_leaf(self, input, target, token_weight=token_weight, normalizer=normalizer)
            if leaf is not None:
                return leaf
        options = {name: getattr(self, name) for name in _PASSED_ON}
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            token_weight=token_weight,
            normalizer=normalizer,
            class_mask=self.class_mask,
            **options,
        )

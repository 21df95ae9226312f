"""How the rows of a cross-entropy become one loss: which of them count, what the mean divides by, and the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.checks import check_data, check_devices
from fused_ops.core.memory_format import acc_dtype, wide, wide_dtype
from fused_ops.core.torch_private import is_tracing
from fused_ops.ops.cross_entropy import shards
from fused_ops.ops.cross_entropy.arguments import Call, number
from fused_ops.ops.cross_entropy.functions import REDUCTIONS
from fused_ops.ops.cross_entropy.reference import class_dim, counts
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions, rows_shape
from fused_ops.ops.cross_entropy.shards import Place, Ranks

RunRows = Callable[[RowArgs, RowOptions], "tuple[Tensor, ...]"]  # the seven results of cross_entropy_rows_forward
_BLOCK = 4096  # Rows of a partial sum: so few that PyTorch does not split them between threads.
_EMPTY = ("nan", "zero", "raise")


class CrossEntropyOutput(NamedTuple):
    """What ``cross_entropy(..., return_outputs=True)`` gives; per row: of the shape of the loss without reduction.

    lse, target_log_probability and entropy are float32 for 16-bit logits, else of the logits' dtype, and are there for
    ignored rows too (target_log_probability is 0 there). All but prediction and correct are differentiable.
    """

    loss: Tensor  # reduced as asked for, z_loss included
    lse: Tensor  # log-sum-exp of each row's logits, after scale, softcap and mask
    prediction: Tensor  # int64, the class of the largest logit
    correct: (
        Tensor | None
    )  # bool, prediction == target (False where ignored); None for targets other than class indices
    target_log_probability: Tensor | None  # None likewise
    entropy: Tensor  # of softmax(logits), in nats
    z_loss: Tensor  # the part of the loss that z_loss adds

    def __repr__(self) -> str:
        shown = (f"{name}={_shown(value)}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    """A tensor of each row by its dtype and shape, all else as it is."""
    if isinstance(value, Tensor) and value.dim():
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    return repr(value)


class Reduction(NamedTuple):
    """What becomes of the rows' losses, as given."""

    name: str  # "none", "mean" or "sum"
    normalizer: Any  # in the place of the mean's denominator, or None
    empty: str  # the mean where nothing counts: "nan", "zero" or "raise"
    outputs: bool  # whether a CrossEntropyOutput is wanted
    ranks: Ranks | None = None  # the process groups, or None

    def check(self) -> Reduction:
        """Raises for a reduction that is none."""
        if self.name not in REDUCTIONS:
            raise ValueError(f"{self.name} is not a valid value for reduction")
        if self.empty not in _EMPTY:
            raise ValueError(f"cross_entropy: empty must be one of {_EMPTY}, got {self.empty!r}")
        if self.normalizer is not None and self.name != "mean":
            raise ValueError(f"cross_entropy: normalizer is for reduction='mean', got reduction={self.name!r}")
        return self

    def is_ordinary(self) -> bool:
        """Whether the op of class indices alone can do it."""
        return self.normalizer is None and self.empty == "nan" and not self.outputs and self.ranks is None


def _counted(call: Call) -> Tensor | None:
    """The rows that count, or None if all of them do."""
    if call.kind == "dense":
        return None
    assert call.args.indices is not None
    valid = counts(call.args.indices, call.options.ignore_index)
    return valid if call.kind == "index" else valid.any(class_dim(call.args.input))


def fixed_order_sum(rows: Tensor) -> Tensor:
    """The sum in an order that does not depend on the number of threads: blocks, each too small to be split."""
    # on a GPU one order by the size; a number of rows that is traced makes no number of blocks
    if rows.is_cuda or torch.compiler.is_compiling() or is_tracing() or type(rows.numel()) is not int:
        return rows.sum()
    blocks = rows if rows.dim() == 1 else rows.reshape(-1)
    while blocks.numel() > _BLOCK:
        whole = blocks.numel() // _BLOCK * _BLOCK
        blocks = torch.cat((blocks[:whole].view(-1, _BLOCK).sum(1), blocks[whole:].sum().reshape(1)))
    return blocks.sum()


def _denominator(call: Call, target_weight: Tensor) -> Tensor:
    """What the mean divides by."""
    rows = target_weight
    if call.kind == "sparse":
        counted = _counted(call)
        assert counted is not None
        rows = wide(counted)
    elif call.kind == "mixup":  # lam is differentiable, target_weight is not
        indices, probabilities, dim = call.args.indices, call.args.probabilities, class_dim(call.args.input)
        assert indices is not None and probabilities is not None
        valid = counts(indices, call.options.ignore_index)
        shares = wide(probabilities)
        if (weight := call.args.weight) is not None:
            classes = torch.where(valid, indices, 0).long().clamp(0, max(weight.numel() - 1, 0))
            shares = shares * wide(weight)[classes]
        rows = torch.where(valid, shares, 0.0).sum(dim)
    if call.token_weight is not None:
        rows = rows * wide(call.token_weight)
    return fixed_order_sum(rows)


def _row_weights(call: Call) -> Tensor:
    """target_weight of each row as the rows' op gives it, but 1 for targets whose mean does not use it."""
    a = call.args
    if call.kind != "index":
        return torch.ones(rows_shape(a.input), dtype=wide_dtype(a.input), device=a.input.device)
    assert a.indices is not None
    valid = counts(a.indices, call.options.ignore_index)
    if a.weight is None:
        return wide(valid)
    classes = torch.where(valid, a.indices, 0).long().clamp(0, max(a.weight.numel() - 1, 0))
    return torch.where(valid, wide(a.weight)[classes], 0.0)


def row_scale(call: Call, reduction: Reduction) -> Tensor:
    """What each row's loss is multiplied by before the sum, where nothing of it is differentiable: wide."""
    weights = _row_weights(call)
    scale = torch.ones_like(weights) if call.token_weight is None else wide(call.token_weight)
    if reduction.name == "sum":
        return scale
    given = reduction.normalizer
    return _mean(scale, _denominator(call, weights) if given is None else _normalizer(given, call), reduction.empty)


def _mean(total: Tensor, denominator: Tensor | float, empty: str) -> Tensor:
    if empty == "nan" or not isinstance(denominator, Tensor):
        return total / denominator
    nothing = denominator == 0
    if empty == "raise":
        if bool(nothing):
            raise ValueError("cross_entropy: nothing counts in the mean: the batch is empty, or all of it is ignored")
        return total / denominator
    return torch.where(nothing, 0.0, total / torch.where(nothing, 1.0, denominator))


def _normalizer(value: object, call: Call) -> Tensor | float:
    if not isinstance(value, Tensor):
        return number("normalizer", value, -math.inf)
    if value.numel() != 1:
        raise RuntimeError(f"cross_entropy: expected normalizer to have one element, got shape {list(value.shape)}")
    if value.device.type != "cpu":  # a number of the CPU goes with any device, as in PyTorch
        check_devices("cross_entropy", [("input", call.args.input), ("normalizer", value)])
    check_data("cross_entropy", [("normalizer", value)])
    return value.reshape(()).to(wide_dtype(call.args.input))


def denominator_of_ranks(call: Call, reduction: Reduction, place: Place | None) -> Tensor | None:
    """What the mean divides by, with the rows of all ranks; None if it is no mean or has a normalizer.

    Raises:
        IndexError: a rank has a target that is no class.
    """
    assert reduction.ranks is not None
    wanted = reduction.name == "mean" and reduction.normalizer is None
    a = call.args
    mine = _denominator(call, _row_weights(call)) if wanted else a.input.new_zeros((), dtype=wide_dtype(a.input))
    total = shards.sum_over_rows(mine, a, call.options, reduction.ranks.row_group, place)
    return total if wanted else None


def reduced_loss(
    call: Call, reduction: Reduction, run: RunRows, inplace_backward: bool = False
) -> Tensor | CrossEntropyOutput:
    """Runs the rows and reduces them.

    Args:
        call: The checked call.
        reduction: What becomes of the rows' losses.
        run: The rows where all classes are here.
        inplace_backward: Of the rows of which they are not.
    """
    options = call.options._replace(statistics=reduction.outputs)
    denominator = None if reduction.normalizer is None else _normalizer(reduction.normalizer, call)
    if (ranks := reduction.ranks) is not None:
        place = None if ranks.class_group is None else shards.find_place(call.args.input, ranks)
        if isinstance(place, shards.Shard):
            shards.check_place(call.args, place)
        if ranks.row_group is not None:
            found = denominator_of_ranks(call, reduction, place)
            denominator = denominator if found is None else found
        if place is not None:
            run = partial(shards.rows, place=place, ranks=ranks, inplace_backward=inplace_backward)
    nll, lse, _, target_weight, entropy, prediction, log_probability = run(call.args, options)
    if denominator is None and reduction.name == "mean":
        denominator = _denominator(call, target_weight)

    def reduced(rows: Tensor) -> Tensor:
        if call.token_weight is not None:
            rows = rows * wide(call.token_weight)
        if reduction.name == "none":
            return rows
        total = fixed_order_sum(rows)
        return total if denominator is None else _mean(total, denominator, reduction.empty)

    z_rows = None
    if call.z_loss != 0:
        counted = _counted(call) if reduction.outputs else None  # else lse is 0 in rows that do not count
        z_rows = call.z_loss * (lse if counted is None else torch.where(counted, lse, 0.0)).square()
    loss = reduced(nll if z_rows is None else nll + z_rows).to(call.loss_dtype)
    if not reduction.outputs:
        return loss
    z_part = reduced(z_rows if z_rows is not None else torch.zeros_like(nll)).to(call.loss_dtype)
    dtype = acc_dtype(call.args.input.dtype)
    index = call.args.indices if call.kind == "index" else None
    return CrossEntropyOutput(
        loss,
        lse.to(dtype),
        prediction,
        None if index is None else prediction == index,
        None if index is None else log_probability.to(dtype),
        entropy.to(dtype),
        z_part,
    )

"""Cross-entropy row by row, with every option and nothing reduced: raw ops, their fake kernels and the Functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_ops.core.function import FusedFunction, checked_saved, save
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_output
from fused_ops.core.torch_private import transforms_active
from fused_ops.ops.cross_entropy import rows_reference as reference
from fused_ops.ops.cross_entropy.reference import acc_dtype, class_dim
from fused_ops.ops.cross_entropy.rows_reference import RowArgs, RowGrads, RowOptions

_TENSORS = "Tensor? indices, Tensor? probabilities, Tensor? weight, Tensor? class_mask"
_GRADS = "Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_target_log_probability"
_NUMBERS = "int ignore_index, float label_smoothing, float logit_scale, float softcap, bool statistics"
_SAVED = "Tensor lse, Tensor mass, Tensor? entropy"


def _fake_forward(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dim = class_dim(input)
    rows = (*input.shape[:dim], *input.shape[dim + 1 :])
    wanted = rows if rest[-1] else (0,)
    doubles = [input.new_empty(shape, dtype=torch.float64) for shape in (rows, rows, rows, rows, wanted, wanted)]
    return *doubles[:5], input.new_empty(wanted, dtype=torch.int64), doubles[5]


def _fake_backward(*args: Any) -> Tensor:
    return empty_output(args[4])


def _fake_backward_(*_: Any) -> None:
    return None


_forward_op = register(
    f"cross_entropy_rows_forward(Tensor input, {_TENSORS}, {_NUMBERS}) "
    "-> (Tensor nll, Tensor lse, Tensor mass, Tensor target_weight, Tensor entropy, Tensor prediction, "
    "Tensor target_log_probability)",
    reference.forward,
    _fake_forward,
)
_backward_op = register(
    f"cross_entropy_rows_backward({_GRADS}, Tensor input, {_TENSORS}, {_SAVED}, {_NUMBERS}) -> Tensor",
    reference.backward,
    _fake_backward,
)
_backward_inplace_op = register(
    f"cross_entropy_rows_backward_({_GRADS}, Tensor(a!) input, {_TENSORS}, {_SAVED}, {_NUMBERS}) -> ()",
    reference.backward_,
    _fake_backward_,
)


def refuse_inplace_transforms() -> None:
    """Raises where a gradient that overwrites the logits would be wrong."""
    if torch.is_grad_enabled() or transforms_active():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True overwrites the logits, so there is no create_graph and no torch.func "
            "transform; expected inplace_backward=False for those"
        )


def mark_fixed(ctx: Any, statistics: bool, output: Sequence[Tensor]) -> None:
    """Says which of the seven results have no gradient."""
    _, _, mass, target_weight, entropy, prediction, log_probability = output
    fixed = (mass, target_weight, prediction)
    ctx.mark_non_differentiable(*(fixed if statistics else (*fixed, entropy, log_probability)))


def row_grads(statistics: bool, grads: Sequence[Tensor | None]) -> RowGrads:
    """The upstream gradients of the results that are differentiable."""
    return RowGrads(grads[0], grads[1], *((grads[4], grads[6]) if statistics else (None, None)))


class CrossEntropyRowsFunction(FusedFunction):
    """nll, lse, mass, target_weight, entropy, prediction, target_log_probability of each row, float64.

    nll, lse, entropy and target_log_probability are differentiable. The gradient of the gradient, and anything beyond,
    goes through the plain-PyTorch formulas of the reference.
    """

    @staticmethod
    def forward(
        input: Tensor,
        indices: Tensor | None,
        probabilities: Tensor | None,
        weight: Tensor | None,
        class_mask: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        logit_scale: float,
        softcap: float,
        statistics: bool,
        inplace_backward: bool,
    ) -> Any:
        options = (ignore_index, label_smoothing, logit_scale, softcap, statistics)
        return _forward_op(input, indices, probabilities, weight, class_mask, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.options, ctx.inplace_backward = inputs[:5], RowOptions(*inputs[5:10]), inputs[10]
        mark_fixed(ctx, ctx.options.statistics, output)
        save(ctx, *tensors, output[1], output[2], output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g = row_grads(ctx.options.statistics, grads)
        *tensors, lse, mass, entropy = ctx.saved_tensors
        a, o = RowArgs(*tensors), ctx.options
        found: list[Tensor | None] = [None] * 11
        if all(grad is None for grad in g):
            return tuple(found)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3] or torch.is_grad_enabled():
            checked_saved(tensors, *g)
        if g.nll is not None and ctx.needs_input_grad[2]:
            found[2] = reference.grad_probabilities(g, a, o)
        if g.nll is not None and ctx.needs_input_grad[3]:
            found[3] = reference.grad_weight(g, a, o)
        if not ctx.needs_input_grad[0]:
            return tuple(found)
        if ctx.inplace_backward:
            refuse_inplace_transforms()
            found[0] = gradient = a.input.detach()
            _backward_inplace_op(*g, gradient, *a[1:], lse, mass, entropy, *o)
            increment_version(a.input)
        elif torch.is_grad_enabled() or transforms_active():
            found[0] = reference.grad_input(g, a, o, acc_dtype(a.input.dtype)).to(a.input.dtype)
        else:
            gradient = _backward_op(*g, *a, lse, mass, entropy, *o)  # type: ignore[assignment]
            found[0] = gradient
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, _: None, probabilities_t: Any, weight_t: Any, *__: Any) -> Any:
        *tensors, _lse, _mass, _entropy = checked_saved(ctx.saved_tensors, input_t, probabilities_t, weight_t)
        nll_t, lse_t, entropy_t, log_probability_t = reference.jvp(
            RowArgs(*tensors), ctx.options, input_t, probabilities_t, weight_t
        )
        return nll_t, lse_t, None, None, entropy_t, None, log_probability_t


def cross_entropy_rows(inplace_backward: bool, a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
    """The seven results of each row in eager mode."""
    return CrossEntropyRowsFunction.apply(*a, *o, inplace_backward)  # type: ignore[no-any-return]

"""The autograd Functions of linear cross-entropy."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.function import FusedFunction, checked_saved, is_one, is_plain, save
from fused_ops.core.torch_private import forward_ad, transforms_active
from fused_ops.ops.cross_entropy.functions import mark_fixed, row_grads
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.linear_cross_entropy import by_shards, graph, reference
from fused_ops.ops.linear_cross_entropy.arguments import check_main_grad
from fused_ops.ops.linear_cross_entropy.by_rows import rescale_op
from fused_ops.ops.linear_cross_entropy.graph import TENSORS, Settings, split
from fused_ops.ops.linear_cross_entropy.plan import Cut
from fused_ops.ops.linear_cross_entropy.reference import Head

_MOST_LIFTED = 256  # as gradients of a mean are below 1, times an input, they stay far from float16's largest number


class LinearCrossEntropyRowsFunction(FusedFunction):
    """The rows' seven results; the backward computes each chunk's logits again."""

    @staticmethod
    def forward(*args: Any) -> Any:
        o = RowOptions(*args[9:14])
        return graph.rows_op(*args[:TENSORS], *Settings.of(o, 0.0, Cut(*args[14:])), o.statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.o, ctx.cut = RowOptions(*inputs[9:14]), Cut(*inputs[14:])
        mark_fixed(ctx, ctx.o.statistics, output)
        save(ctx, *inputs[:TENSORS], output[1], output[2], output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, lse, mass, entropy = checked_saved(ctx.saved_tensors, *grads)
        (head, a), o, cut = split(tensors), ctx.o, ctx.cut
        g, needs = row_grads(o.statistics, grads), graph.row_needs(ctx.needs_input_grad)
        if not needs or all(grad is None for grad in g):
            return (None,) * 17
        if transforms_active() or forward_ad._current_level >= 0 or graph.is_batched(*g):
            return graph.place(graph.formulas(g, head, a, o, cut.classes(head), needs), needs, 17)
        settings = Settings.of(o, 0.0, cut)
        found = graph.rows_grad_op(*g, *tensors, lse, mass, entropy, *settings, o.statistics, needs)
        return graph.place(found, needs, 17)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *tensors, _lse, _mass, _entropy = checked_saved(ctx.saved_tensors, *tangents)
        head, a = split(tensors)
        nll_t, lse_t, entropy_t, log_probability_t = reference.jvp(
            head, Head(*tangents[:5]), a, ctx.o, ctx.cut.classes(head), tangents[6], tangents[7]
        )
        return nll_t, lse_t, None, None, entropy_t, None, log_probability_t


class LinearCrossEntropySumFunction(FusedFunction):
    """sum_r row_scale_r (nll_r + z_loss lse_r^2), and its gradients, which the forward finds while it has the logits.

    Outputs: the sum, and the head's five gradients for an upstream gradient of 1.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        settings = Settings.of(RowOptions(*args[11:16]), args[10], Cut(*args[16:19]))
        return _sum_op(args[20])(*args[:10], *settings, args[19], False, *args[20])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.z_loss, ctx.o, ctx.cut, ctx.needs = inputs[10], RowOptions(*inputs[11:16]), Cut(*inputs[16:19]), inputs[19]
        ctx.where = inputs[20]
        ctx.mark_non_differentiable(*output[1:])
        ctx.gradients = output[1:]  # to be handed over, not only lent
        save(ctx, *inputs[:10])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        none, need = (None,) * 21, ctx.needs_input_grad[:5]
        if grad_loss is None:
            return none
        *tensors, row_scale = saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses to unpack them again
        if torch.is_grad_enabled():
            checked_saved(saved, grad_loss)
            run = partial(_rows_of, ctx.o, ctx.cut, ctx.where)
            return *graph.differentiable(run, tensors, row_scale, ctx.z_loss, grad_loss, need), *none[5:]
        gradients = ctx.gradients
        if gradients is None:  # a second backward through a graph that was retained
            settings = Settings.of(ctx.o, ctx.z_loss, ctx.cut)
            gradients = _sum_op(ctx.where)(*tensors, row_scale, *settings, ctx.needs, False, *ctx.where)[1:]
        if is_plain(grad_loss):
            ctx.gradients = None  # handed over, scaled where they lie: a new tensor would be as large as the weight
            for g in () if is_one(grad_loss) else (g for g, n in zip(gradients, need, strict=True) if n):
                rescale_op(g, grad_loss)
            return *(g if n else None for g, n in zip(gradients, need, strict=True)), *none[5:]
        return *((g * grad_loss).to(g.dtype) if n else None for g, n in zip(gradients, need, strict=True)), *none[5:]


def _sum_op(where: tuple[Any, ...]) -> Any:
    return by_shards.sum_op if where else graph.sum_op


def _rows_of(o: RowOptions, cut: Cut, where: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...]
    if where:  # an op with its gradient in eager mode too: what watches it there, takes all the logits at once
        found = by_shards.rows_op(*tensors, *Settings.of(o, 0.0, cut), o.statistics, *where)
    elif torch.compiler.is_compiling():
        found = graph.rows_op(*tensors, *Settings.of(o, 0.0, cut), o.statistics)
    else:
        found = LinearCrossEntropyRowsFunction.apply(*tensors, *o, *cut)
    return found[:7]


class MainGradFunction(FusedFunction):
    """The weight, whose gradient is added to a tensor of the caller's instead of ``.grad``."""

    @staticmethod
    def forward(linear_weight: Tensor, main_grad: Tensor) -> Tensor:
        return linear_weight.view_as(linear_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.main_grad = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        if grad is not None:
            if torch.is_grad_enabled() or transforms_active():
                raise RuntimeError("linear_cross_entropy: main_grad is for a plain backward, without create_graph")
            ctx.main_grad.add_(grad)
        return None, None


def with_main_grad(linear_weight: Tensor, main_grad: object) -> Tensor:
    """The weight for a call that adds its gradient to ``main_grad``, which is checked."""
    check_main_grad(main_grad, linear_weight)
    return MainGradFunction.apply(linear_weight, main_grad)  # type: ignore[no-any-return]


def linear_rows(head: Head, cut: Cut, where: tuple[Any, ...], a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
    """The rows' seven results.

    Args:
        head: The matrices.
        cut: How the rows are cut.
        where: ``by_shards.Where`` of classes that are spread over ranks; empty if all are here.
        a: The target.
        o: The options.
    """
    return _rows_of(o, cut, where, *head, *a[1:])


def _lift(row_scale: Tensor) -> Tensor:
    """A power of two for float16, whose small gradients would be lost before a loss scale comes to them."""
    scales = row_scale.detach().abs().flatten()
    largest = torch.cat((scales, scales.new_zeros(1))).amax()  # of no rows at all: 0
    return torch.where(largest > 0, torch.exp2(torch.floor(-torch.log2(largest))), 1.0).clamp(1, _MOST_LIFTED)


def linear_sum(
    head: Head,
    a: RowArgs,
    row_scale: Tensor,
    z_loss: float,
    o: RowOptions,
    cut: Cut,
    needs: int,
    nan_if_empty: bool,
    where: tuple[Any, ...],
) -> Tensor:
    """The weighted sum of the rows' losses.

    Args:
        head: The matrices.
        a: The target.
        row_scale: What each row's loss is multiplied by.
        z_loss: Coefficient of lse^2.
        o: The options.
        cut: How the rows are cut.
        needs: The gradients of the head that the forward finds, as bits.
        nan_if_empty: Whether the sum of no rows is NaN.
        where: As for ``linear_rows``.
    """
    lift = _lift(row_scale) if head.input.dtype == torch.float16 else None
    scale = row_scale if lift is None else row_scale * lift
    tensors = (*head, *a[1:], scale)
    if torch.compiler.is_compiling():
        loss = _sum_op(where)(*tensors, *Settings.of(o, z_loss, cut), needs, nan_if_empty, *where)[0]
    else:
        loss = LinearCrossEntropySumFunction.apply(*tensors, z_loss, *o, *cut, needs, where)[0]
    return loss if lift is None else loss / lift  # type: ignore[no-any-return]

"""The autograd Functions of linear cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.function import FusedFunction, checked_saved, is_differentiated, is_one, is_plain, save
from fused_ops.core.torch_private import dispatch_modes, forward_ad, hide_from_dynamo, is_tracing, transforms_active
from fused_ops.ops.cross_entropy.functions import mark_fixed, row_grads
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.linear_cross_entropy import by_shards, graph, reference
from fused_ops.ops.linear_cross_entropy.arguments import NOT_PLAIN
from fused_ops.ops.linear_cross_entropy.by_rows import WEIGHT, WIDE_WEIGHT, add_scaled_, rescale_op, wanted_main_grad
from fused_ops.ops.linear_cross_entropy.graph import TENSORS, Settings, split
from fused_ops.ops.linear_cross_entropy.plan import Cut, plan, plan_in_rows
from fused_ops.ops.linear_cross_entropy.reference import Head

_MOST_LIFTED = 256  # as gradients of a mean are below 1, times an input, they stay far from float16's largest number


class LinearCrossEntropyRowsFunction(FusedFunction):
    """The rows' seven results; the backward computes each chunk's logits again.

    With a ``main_grad`` each chunk's part of the weight's gradient is added to it.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        o = RowOptions(*args[9:14])
        return graph.rows_op(*args[:TENSORS], *Settings.of(o, 0.0, Cut(*args[14:17])), o.statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.o, ctx.cut, ctx.main_grad = RowOptions(*inputs[9:14]), Cut(*inputs[14:17]), inputs[17]
        mark_fixed(ctx, ctx.o.statistics, output)
        save(ctx, *inputs[:TENSORS], output[1], output[2], output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, lse, mass, entropy = checked_saved(ctx.saved_tensors, *grads)
        (head, a), o, cut = split(tensors), ctx.o, ctx.cut
        g, needs = row_grads(o.statistics, grads), graph.row_needs(ctx.needs_input_grad)
        if not needs or all(grad is None for grad in g):
            return (None,) * 18
        main_grad = wanted_main_grad(ctx, *g)
        if ctx.main_grad is not None and main_grad is None:
            needs &= ~WEIGHT
        if transforms_active() or forward_ad._current_level >= 0 or graph.is_batched(*g):
            return graph.place(graph.formulas(g, head, a, o, cut.classes(head), needs), needs, 18)
        args = *g, *tensors, lse, mass, entropy, *Settings.of(o, 0.0, cut), o.statistics, needs
        if main_grad is None:
            return graph.place(graph.rows_grad_op(*args), needs, 18)
        return graph.place(graph.rows_grad_to_op(*args, main_grad), needs & ~WEIGHT, 18)

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

    Outputs: the sum, and the head's five gradients for an upstream gradient of 1. With a ``main_grad`` the weight's, in
    float32 where it was added up in that, is multiplied and added to it in one pass.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        settings = Settings.of(RowOptions(*args[11:16]), args[10], Cut(*args[16:19]))
        return _sum_op(args[20])(*args[:10], *settings, args[19], False, *args[20])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.z_loss, ctx.o, ctx.cut, ctx.needs = inputs[10], RowOptions(*inputs[11:16]), Cut(*inputs[16:19]), inputs[19]
        ctx.where, ctx.main_grad = inputs[20:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.gradients = output[1:]  # to be handed over, not only lent
        save(ctx, *inputs[:10])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        none, need = (None,) * 22, ctx.needs_input_grad[:5]
        if grad_loss is None:
            return none
        main_grad = wanted_main_grad(ctx, grad_loss)
        *tensors, row_scale = saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses to unpack them again
        if is_differentiated():
            checked_saved(saved, grad_loss)
            run = partial(_rows_of, ctx.o, ctx.cut, ctx.where)
            return *graph.differentiable(run, tensors, row_scale, ctx.z_loss, grad_loss, need), *none[5:]
        gradients = ctx.gradients
        if gradients is None:  # a second backward through a graph that was retained
            settings = Settings.of(ctx.o, ctx.z_loss, ctx.cut)
            gradients = _sum_op(ctx.where)(*tensors, row_scale, *settings, ctx.needs, False, *ctx.where)[1:]
        if main_grad is not None:
            add_scaled_(main_grad, gradients[1], grad_loss)
        if ctx.main_grad is not None:
            need = need[0], False, *need[2:]
        if is_plain(grad_loss):
            ctx.gradients = None  # handed over, scaled where they lie: a new tensor would be as large as the weight
            for g in () if is_one(grad_loss) else (g for g, n in zip(gradients, need, strict=True) if n):
                rescale_op(g, grad_loss)
            return *(g if n else None for g, n in zip(gradients, need, strict=True)), *none[5:]
        return *((g * grad_loss).to(g.dtype) if n else None for g, n in zip(gradients, need, strict=True)), *none[5:]


def _sum_op(where: tuple[Any, ...]) -> Any:
    return by_shards.sum_op if where else graph.sum_op


def _rows_of(
    o: RowOptions, cut: Cut, where: tuple[Any, ...], *tensors: Tensor | None, main_grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...]
    if where:  # an op with its gradient in eager mode too: what watches it there, takes all the logits at once
        found = by_shards.rows_op(*tensors, *Settings.of(o, 0.0, cut), o.statistics, *where, main_grad)
    elif torch.compiler.is_compiling():
        found = graph.rows_op(*tensors, *Settings.of(o, 0.0, cut), o.statistics)
    else:
        found = LinearCrossEntropyRowsFunction.apply(*tensors, *o, *cut, main_grad)
    return found[:7]


def _in_eager_mode(function: Callable[..., Any], *args: Any) -> Any:
    """What adds to a ``main_grad``. Dynamo breaks its graph at the exception, and follows no call of this one."""
    if torch.compiler.is_compiling():
        raise RuntimeError(NOT_PLAIN)
    return function(*args)


hide_from_dynamo(_in_eager_mode)


def linear_rows(
    head: Head, cut: Cut, where: tuple[Any, ...], main_grad: Tensor | None, a: RowArgs, o: RowOptions
) -> tuple[Tensor, ...]:
    """The rows' seven results.

    Args:
        head: The matrices.
        cut: How the rows are cut.
        where: ``by_shards.Where`` of classes that are spread over ranks; empty if all are here.
        main_grad: A matrix like the weight that its gradient is added to, or None.
        a: The target.
        o: The options.
    """
    if cut.max_memory_bytes is not None and not where and head.weight.requires_grad and torch.is_grad_enabled():
        in_graph = torch.compiler.is_compiling() or is_tracing() or dispatch_modes()  # there sizes may be symbols
        if not in_graph:
            plan_in_rows(head, cut, WEIGHT, main_grad)  # what the backward could not keep is refused here
    if main_grad is None:
        return _rows_of(o, cut, where, *head, *a[1:])
    return _in_eager_mode(partial(_rows_of, main_grad=main_grad), o, cut, where, *head, *a[1:])  # type: ignore[no-any-return]


def _lift(row_scale: Tensor) -> Tensor:
    """A power of two for float16, whose small gradients would be lost before a loss scale comes to them."""
    scales = row_scale.detach().abs().flatten()
    largest = torch.cat((scales, scales.new_zeros(1))).amax()  # of no rows at all: 0
    return torch.where(largest > 0, torch.exp2(torch.floor(-torch.log2(largest))), 1.0).clamp(1, _MOST_LIFTED)


def _is_added_up(head: Head, a: RowArgs, o: RowOptions, cut: Cut, needs: int, where: tuple[Any, ...]) -> bool:
    """Whether a 16-bit weight's gradient is found in float32; a CPU's is not that is one product, which it rounds."""
    if head.weight.dtype.itemsize != 2 or not needs & WEIGHT:
        return False
    if where or head.weight.is_cuda:
        return True
    found = plan(head, a, o, cut, needs)
    return not found.tile_classes and found.chunk_rows < head.input.size(0)


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
    main_grad: Tensor | None,
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
        main_grad: Likewise.
    """
    if main_grad is not None and _is_added_up(head, a, o, cut, needs, where):
        needs |= WIDE_WEIGHT
    lift = _lift(row_scale) if head.input.dtype == torch.float16 else None
    scale = row_scale if lift is None else row_scale * lift
    tensors = (*head, *a[1:], scale)
    apply = LinearCrossEntropySumFunction.apply
    if main_grad is not None:
        loss = _in_eager_mode(apply, *tensors, z_loss, *o, *cut, needs, where, main_grad)[0]
    elif torch.compiler.is_compiling():
        loss = _sum_op(where)(*tensors, *Settings.of(o, z_loss, cut), needs, nan_if_empty, *where)[0]
    else:
        loss = apply(*tensors, z_loss, *o, *cut, needs, where, None)[0]
    return loss if lift is None else loss / lift  # type: ignore[no-any-return]

"""The autograd Functions of linear cross-entropy."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_ops import _linear_cross_entropy_graph as graph
from fused_ops._function import FusedFunction, _transforms_active, has_values, save
from fused_ops._linear_cross_entropy_chunks import Plan, cut_args
from fused_ops._linear_cross_entropy_graph import TENSORS, Settings, split
from fused_ops._linear_cross_entropy_plan import Cut, plan
from fused_ops.reference import linear_cross_entropy as reference
from fused_ops.reference._cross_entropy_rows import RowArgs, RowGrads, RowOptions
from fused_ops.reference.linear_cross_entropy import Head

_MOST_LIFTED = 256  # as gradients of a mean are below 1, times an input, they stay far from float16's largest number


def _is_batched(*grads: Tensor | None) -> bool:
    """Whether any comes from ``torch.autograd.grad(is_grads_batched=True)``, which few in-place operations stand."""
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


class _Leaves(NamedTuple):
    """What the head's gradients depend on: (row gradients, head, class probabilities, class weight)."""

    tensors: tuple[Tensor | None, ...]

    def pack(self) -> tuple[RowGrads, Head, Tensor | None, Tensor | None]:
        t = self.tensors
        return RowGrads(*t[:4]), Head(*t[4:9]), t[9], t[10]  # type: ignore[arg-type]


_SHARED = (5, 6, 8, 10)  # of _Leaves, those that all rows have in common: weight, bias, low_weight, class weight


def _gradients(leaves: _Leaves, a: RowArgs, o: RowOptions, classes: int) -> tuple[Tensor | None, ...]:
    g, head, probabilities, weight = leaves.pack()
    return reference.gradients(g, head, a._replace(probabilities=probabilities, weight=weight), o, classes)


def _second(
    outer: tuple[Tensor | None, ...],
    leaves: _Leaves,
    wanted: list[bool],
    a: RowArgs,
    o: RowOptions,
    classes: int,
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of <the head's gradients, outer> with respect to the leaves that are wanted."""
    with torch.enable_grad():
        leaves = _Leaves(graph.cut_off(leaves.tensors))
        values = _gradients(leaves, a, o, classes)
    used = [(v, s.to(v.dtype)) for v, s in zip(values, outer, strict=True) if v is not None and s is not None]
    inputs = [t for t, want in zip(leaves.tensors, wanted, strict=True) if want and t is not None]
    new = iter(
        torch.autograd.grad(
            [v for v, _ in used], inputs, [s for _, s in used], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(new) if want else None for want in wanted]


def _chunked_second(
    outer: tuple[Tensor | None, ...], leaves: _Leaves, wanted: list[bool], a: RowArgs, o: RowOptions, plan: Plan
) -> list[Tensor | None]:
    """``_second``, one chunk of logits at a time."""
    found: list[Tensor | None] = [None] * len(wanted)
    for begin in range(0, a.input.size(0), plan.chunk_rows):
        part = slice(begin, begin + plan.chunk_rows)
        cut = [t if i in _SHARED or t is None else t[part] for i, t in enumerate(leaves.tensors)]
        detached = _Leaves(tuple(None if t is None else t.detach().requires_grad_() for t in cut))
        sides = tuple(t if i + 4 in _SHARED or t is None else t[part] for i, t in enumerate(outer))
        args = cut_args(a, a.input[part], part)
        new = _second(sides, detached, wanted, args, o, plan.classes, create_graph=False)
        for i, value in enumerate(new):
            whole = leaves.tensors[i]
            if value is None or whole is None:
                continue
            before = found[i]
            if i in _SHARED:
                found[i] = value if before is None else before + value
                continue
            if before is None:
                found[i] = before = torch.zeros_like(whole)
            before[part] = value
    return found


class LinearCrossEntropyGradFunction(FusedFunction):
    """The head's gradients as a function of the rows' gradients and the head, to be differentiated once more."""

    @staticmethod
    def forward(*args: Any) -> Any:
        o = RowOptions(*args[16:21])
        settings, needs = Settings.of(o, 0.0, Cut(*args[21:24])), args[24] & graph.OF_HEAD
        return graph.rows_grad_op(*args[:16], *settings, o.statistics, needs)[:5]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.o, ctx.cut, ctx.needs = RowOptions(*inputs[16:21]), Cut(*inputs[21:24]), inputs[24]
        save(ctx, *inputs[:13])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        head, a = split(saved[4:13])
        outer = tuple(v if ctx.needs & (1 << i) else None for i, v in enumerate(outer))
        places = (*range(9), 10, 11)  # of the leaves among the arguments
        wanted = [ctx.needs_input_grad[i] for i in places]
        if all(v is None for v in outer) or not any(wanted):
            return (None,) * 25
        leaves = _Leaves(tuple(saved[i] for i in places))
        if torch.is_grad_enabled() or _is_batched(*outer):  # a third derivative, or several: with all the logits
            new = _second(outer, leaves, wanted, a, ctx.o, ctx.cut.classes(head), create_graph=torch.is_grad_enabled())
        else:
            new = _chunked_second(outer, leaves, wanted, a, ctx.o, plan(head, a, ctx.o, ctx.cut, 0))
        found: list[Tensor | None] = [None] * 25
        for i, value in zip(places, new, strict=True):
            found[i] = value
        return tuple(found)


class LinearCrossEntropyRowsFunction(FusedFunction):
    """The rows' seven results; the backward computes each chunk's logits again."""

    @staticmethod
    def forward(*args: Any) -> Any:
        o = RowOptions(*args[9:14])
        return graph.rows_op(*args[:TENSORS], *Settings.of(o, 0.0, Cut(*args[14:])), o.statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.o, ctx.cut = RowOptions(*inputs[9:14]), Cut(*inputs[14:])
        graph.mark_fixed(ctx, ctx.o.statistics, output)
        save(ctx, *inputs[:TENSORS], output[1], output[2], output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, lse, mass, entropy = ctx.saved_tensors
        (head, a), o, cut = split(tensors), ctx.o, ctx.cut
        g, needs = graph.row_grads(o.statistics, grads), graph.row_needs(ctx.needs_input_grad)
        if not needs or all(grad is None for grad in g):
            return (None,) * 17
        found: tuple[Tensor | None, ...]
        in_formulas = _transforms_active() or forward_ad._current_level >= 0 or _is_batched(*g)
        if not in_formulas and not torch.is_grad_enabled():
            settings = Settings.of(o, 0.0, cut)
            found = graph.rows_grad_op(*g, *tensors, lse, mass, entropy, *settings, o.statistics, needs)
            return graph.place(found, needs, 17)
        classes = cut.classes(head)
        if in_formulas:
            found = reference.gradients(g, head, a, o, classes)
        else:
            found = LinearCrossEntropyGradFunction.apply(*g, *tensors, lse, mass, entropy, *o, *cut, needs)
        return graph.place((*found, *graph.target_gradients(g, head, a, o, classes, needs)), needs, 17)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *tensors, _lse, _mass, _entropy = ctx.saved_tensors
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
        return graph.sum_op(*args[:10], *settings, args[19], False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.z_loss, ctx.o, ctx.cut, ctx.needs = inputs[10], RowOptions(*inputs[11:16]), Cut(*inputs[16:19]), inputs[19]
        ctx.mark_non_differentiable(*output[1:])
        ctx.gradients = output[1:]  # to be handed over, not only lent
        save(ctx, *inputs[:10])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        none, need = (None,) * 20, ctx.needs_input_grad[:5]
        if grad_loss is None:
            return none
        *tensors, row_scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            run = partial(_apply_rows, ctx.o, ctx.cut)
            return *graph.differentiable(run, tensors, row_scale, ctx.z_loss, grad_loss, need), *none[5:]
        gradients = ctx.gradients
        if gradients is None:  # a second backward through a graph that was retained
            settings = Settings.of(ctx.o, ctx.z_loss, ctx.cut)
            gradients = graph.sum_op(*tensors, row_scale, *settings, ctx.needs, False)[1:]
        if has_values(grad_loss) and float(grad_loss) == 1.0:
            ctx.gradients = None
            return *(g if n else None for g, n in zip(gradients, need, strict=True)), *none[5:]
        return *((g * grad_loss).to(g.dtype) if n else None for g, n in zip(gradients, need, strict=True)), *none[5:]


def _apply_rows(o: RowOptions, cut: Cut, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return LinearCrossEntropyRowsFunction.apply(*tensors, *o, *cut)  # type: ignore[no-any-return]


def linear_rows(head: Head, cut: Cut, a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
    """The rows' seven results."""
    if torch.compiler.is_compiling():
        return graph.rows_op(*head, *a[1:], *Settings.of(o, 0.0, cut), o.statistics)  # type: ignore[no-any-return]
    return _apply_rows(o, cut, *head, *a[1:])


def _lift(row_scale: Tensor) -> Tensor:
    """A power of two for float16, whose small gradients would be lost before a loss scale comes to them."""
    scales = row_scale.detach().abs().flatten()
    largest = torch.cat((scales, scales.new_zeros(1))).amax()  # of no rows at all: 0
    return torch.where(largest > 0, torch.exp2(torch.floor(-torch.log2(largest))), 1.0).clamp(1, _MOST_LIFTED)


def linear_sum(
    head: Head, a: RowArgs, row_scale: Tensor, z_loss: float, o: RowOptions, cut: Cut, needs: int, nan_if_empty: bool
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
    """
    lift = _lift(row_scale) if head.input.dtype == torch.float16 else None
    scale = row_scale if lift is None else row_scale * lift
    tensors = (*head, *a[1:], scale)
    if torch.compiler.is_compiling():
        loss = graph.sum_op(*tensors, *Settings.of(o, z_loss, cut), needs, nan_if_empty)[0]
    else:
        loss = LinearCrossEntropySumFunction.apply(*tensors, z_loss, *o, *cut, needs)[0]
    return loss if lift is None else loss / lift  # type: ignore[no-any-return]

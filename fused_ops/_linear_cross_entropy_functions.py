"""The autograd Functions of linear cross-entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_ops import _linear_cross_entropy_chunks as chunks
from fused_ops._cross_entropy_options import fixed_order_sum
from fused_ops._function import FusedFunction, _transforms_active, checked_saved, has_values, save
from fused_ops._linear_cross_entropy_chunks import Plan
from fused_ops.reference import _cross_entropy_rows as rows
from fused_ops.reference import linear_cross_entropy as reference
from fused_ops.reference._cross_entropy_rows import RowArgs, RowGrads, RowOptions
from fused_ops.reference.linear_cross_entropy import Head

# Arguments of the Functions: the 5 tensors of Head, then indices, probabilities, weight, class_mask, then numbers.
_TENSORS = 9

_MOST_LIFTED = 256  # as gradients of a mean are below 1, times an input, they stay far from float16's largest number


def _split(tensors: Any) -> tuple[Head, RowArgs]:
    return Head(*tensors[:5]), RowArgs(tensors[0], *tensors[5:9])


def _is_batched(*grads: Tensor | None) -> bool:
    """Whether any comes from ``torch.autograd.grad(is_grads_batched=True)``, which few in-place operations stand."""
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def _cut_off(tensors: Any) -> tuple[Tensor | None, ...]:
    """Aliases to differentiate with respect to: what one tensor owes to another does not count as theirs twice."""
    return tuple(None if t is None else t.view_as(t) for t in tensors)


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
        leaves = _Leaves(_cut_off(leaves.tensors))
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
        args = chunks._cut_args(a, a.input[part], part)
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
        g, (head, a) = RowGrads(*args[:4]), _split(args[4:13])
        lse, mass, entropy = args[13:16]
        o, plan = RowOptions(*args[16:21]), Plan(*args[21:])
        return chunks.backward(g, head, a, lse, mass, entropy, o, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.o, ctx.plan = RowOptions(*inputs[16:21]), Plan(*inputs[21:])
        save(ctx, *inputs[:13])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:
        tensors = checked_saved(ctx.saved_tensors, *outer)
        _, a = _split(tensors[4:13])
        outer = tuple(v if ctx.plan.needs & (1 << i) else None for i, v in enumerate(outer))
        places = (*range(9), 10, 11)  # of the leaves among the arguments
        wanted = [ctx.needs_input_grad[i] for i in places]
        if all(v is None for v in outer) or not any(wanted):
            return (None,) * 26
        leaves = _Leaves(tuple(tensors[i] for i in places))
        if torch.is_grad_enabled() or _is_batched(*outer):  # a third derivative, or several: with all the logits
            new = _second(outer, leaves, wanted, a, ctx.o, ctx.plan.classes, create_graph=torch.is_grad_enabled())
        else:
            new = _chunked_second(outer, leaves, wanted, a, ctx.o, ctx.plan)
        found: list[Tensor | None] = [None] * 26
        for i, value in zip(places, new, strict=True):
            found[i] = value
        return tuple(found)


class LinearCrossEntropyRowsFunction(FusedFunction):
    """The rows' seven results; the backward computes each chunk's logits again."""

    @staticmethod
    def forward(*args: Any) -> Any:
        o, plan = RowOptions(*args[9:14]), Plan(*args[14:])._replace(needs=0)
        if torch.compiler.is_compiling():
            return chunks.forward_op(*args[:9], None, 0.0, *o, *plan)[:7]  # type: ignore[index]
        head, a = _split(args)
        return chunks.forward(head, a, o, None, 0.0, plan)[:7]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.o, ctx.plan = RowOptions(*inputs[9:14]), Plan(*inputs[14:])
        _, lse, mass, target_weight, entropy, prediction, log_probability = output
        fixed = (mass, target_weight, prediction)
        ctx.mark_non_differentiable(*(fixed if ctx.o.statistics else (*fixed, entropy, log_probability)))
        save(ctx, *inputs[:9], lse, mass, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, lse, mass, entropy = checked_saved(ctx.saved_tensors, *grads)
        (head, a), o = _split(tensors), ctx.o
        g = RowGrads(grads[0], grads[1], *((grads[4], grads[6]) if o.statistics else (None, None)))
        found: list[Tensor | None] = [None] * 19
        if all(grad is None for grad in g):
            return tuple(found)
        if g.nll is not None and (ctx.needs_input_grad[6] or ctx.needs_input_grad[7]):
            full = a._replace(input=reference.logits(head, ctx.plan.classes))
            found[6] = rows.grad_probabilities(g, full, o) if ctx.needs_input_grad[6] else None
            found[7] = rows.grad_weight(g, full, o) if ctx.needs_input_grad[7] else None
        needs = sum(1 << i for i in range(5) if ctx.needs_input_grad[i])
        if not needs:
            return tuple(found)
        plan, rest = ctx.plan._replace(needs=needs), (lse, mass, entropy)
        if _transforms_active() or forward_ad._current_level >= 0 or _is_batched(*g):
            values = reference.gradients(g, head, a, o, plan.classes)
        elif torch.compiler.is_compiling():
            values = chunks.backward_op(*g, *tensors, *rest, *o, *plan)  # type: ignore[assignment]
        elif torch.is_grad_enabled():
            values = LinearCrossEntropyGradFunction.apply(*g, *tensors, *rest, *o, *plan)
        else:
            values = chunks.backward(g, head, a, lse, mass, entropy, o, plan)  # type: ignore[assignment]
        for i in range(5):
            found[i] = values[i] if ctx.needs_input_grad[i] else None
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *tensors, _lse, _mass, _entropy = checked_saved(ctx.saved_tensors, *tangents)
        head, a = _split(tensors)
        nll_t, lse_t, entropy_t, log_probability_t = reference.jvp(
            head, Head(*tangents[:5]), a, ctx.o, ctx.plan.classes, tangents[6], tangents[7]
        )
        return nll_t, lse_t, None, None, entropy_t, None, log_probability_t


class _CompiledRowsFunction(LinearCrossEntropyRowsFunction):
    """For torch.compile, which traces no Function with a ``jvp`` of its own."""

    jvp = torch.autograd.Function.jvp


class LinearCrossEntropySumFunction(FusedFunction):
    """sum_r row_scale_r (nll_r + z_loss lse_r^2), and its gradients, which the forward finds while it has the logits.

    Outputs: the rows' nll and lse, and the head's five gradients for an upstream gradient of 1.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        row_scale, z_loss, o, plan = args[9], args[10], RowOptions(*args[11:16]), Plan(*args[16:])
        if torch.compiler.is_compiling():
            found = chunks.forward_op(*args[:9], row_scale, z_loss, *o, *plan)
        else:
            head, a = _split(args)
            found = chunks.forward(head, a, o, row_scale, z_loss, plan)
        nll, lse = found[:2]  # type: ignore[index]
        terms = nll if z_loss == 0 else nll + z_loss * lse.square()
        return fixed_order_sum(terms * row_scale), *found[7:]  # type: ignore[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.z_loss, ctx.o, ctx.plan = inputs[10], RowOptions(*inputs[11:16]), Plan(*inputs[16:])
        ctx.mark_non_differentiable(*output[1:])
        if torch.compiler.is_compiling():
            save(ctx, *inputs[:10], *output[1:])
        else:  # to be handed over, not only lent
            ctx.gradients = output[1:]
            save(ctx, *inputs[:10])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        found: list[Tensor | None] = [None] * 21
        if grad_loss is None:
            return tuple(found)
        tensors = ctx.saved_tensors
        if torch.compiler.is_compiling():
            gradients = tensors[10:]
        elif torch.is_grad_enabled():
            checked_saved(tensors, grad_loss)
            return *_differentiable(ctx, grad_loss, tensors[:9], tensors[9]), *found[5:]
        else:
            gradients = ctx.gradients
            if gradients is None:  # a second backward through a graph that was retained
                head, a = _split(checked_saved(tensors)[:9])
                gradients = chunks.forward(head, a, ctx.o, tensors[9], ctx.z_loss, ctx.plan)[7:]
            if has_values(grad_loss) and float(grad_loss) == 1.0:
                ctx.gradients = None
                return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)), *found[
                    5:
                ]
        for i in range(5):
            if ctx.needs_input_grad[i]:
                found[i] = (gradients[i] * grad_loss).to(gradients[i].dtype)
        return tuple(found)


def _differentiable(ctx: Any, grad_loss: Tensor, tensors: Any, row_scale: Tensor) -> list[Tensor | None]:
    """The head's gradients with a graph of their own, through the rows."""
    plan, tensors = ctx.plan, _cut_off(tensors)
    nll, lse = LinearCrossEntropyRowsFunction.apply(*tensors, *ctx.o, *plan)[:2]
    terms = nll if ctx.z_loss == 0 else nll + ctx.z_loss * torch.where(row_scale == 0, 0.0, lse).square()
    loss = (terms * row_scale).sum()
    wanted = [t for t, need in zip(tensors[:5], ctx.needs_input_grad, strict=False) if need]
    new = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True))
    return [next(new) if need else None for need in ctx.needs_input_grad[:5]]


def linear_rows(head: Head, a: RowArgs, o: RowOptions, plan: Plan) -> tuple[Tensor, ...]:
    """The Function's outputs."""
    function = _CompiledRowsFunction if torch.compiler.is_compiling() else LinearCrossEntropyRowsFunction
    return function.apply(*head, *a[1:], *o, *plan)  # type: ignore[no-any-return]


def _lift(row_scale: Tensor) -> Tensor:
    """A power of two for float16, whose small gradients would be lost before a loss scale comes to them."""
    largest = row_scale.detach().abs().amax()
    return torch.where(largest > 0, torch.exp2(torch.floor(-torch.log2(largest))), 1.0).clamp(1, _MOST_LIFTED)


def linear_sum(head: Head, a: RowArgs, row_scale: Tensor, z_loss: float, o: RowOptions, plan: Plan) -> Tensor:
    """The weighted sum of the rows' losses."""
    if head.input.dtype == torch.float16:
        lift = _lift(row_scale)
        found = LinearCrossEntropySumFunction.apply(*head, *a[1:], row_scale * lift, z_loss, *o, *plan)
        return found[0] / lift  # type: ignore[no-any-return]
    found = LinearCrossEntropySumFunction.apply(*head, *a[1:], row_scale, z_loss, *o, *plan)
    return found[0]  # type: ignore[no-any-return]

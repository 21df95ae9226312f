"""Cross-entropy in the graphs of torch.compile and torch.export: an op for class indices alone, and one for rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.graph import as_tensor, register_graph_op
from fused_ops.core.memory_format import acc_dtype, empty_output
from fused_ops.ops.cross_entropy import functions
from fused_ops.ops.cross_entropy import rows_reference as reference
from fused_ops.ops.cross_entropy.reference import double_backward
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads

# ---- class indices alone, reduced in the op


def _index_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, target, ctx.ignore_index, ctx.reduction = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, target, *output[1:])


def _index_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    if grad_loss is None:
        return None, None, None, None
    return _index_grad_op(grad_loss, *ctx.saved_tensors, ctx.ignore_index, ctx.reduction), None, None, None


def _index_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_loss, input, target, _, total, ctx.ignore_index, ctx.reduction = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_loss, input, target, total)


def _index_grad_backward(ctx: Any, grad: Tensor | None) -> Any:
    if grad is None:
        return (None,) * 7
    grad_loss, input, target, total = ctx.saved_tensors
    found = double_backward(grad, grad_loss, input, target, total, ctx.ignore_index, ctx.reduction)
    return *found, None, None, None, None, None


_index_op: Any = register_graph_op(
    "cross_entropy(Tensor input, Tensor target, SymInt ignore_index, int reduction) "
    "-> (Tensor loss, Tensor lse, Tensor total)",
    functions.forward_op,
    functions.fake_forward,
    _index_context,
    _index_backward,
)
_index_grad_op = register_graph_op(
    "cross_entropy_grad(Tensor grad_loss, Tensor input, Tensor target, Tensor lse, Tensor total, "
    "SymInt ignore_index, int reduction) -> Tensor",
    functions.backward_op,
    functions.fake_backward,
    _index_grad_context,
    _index_grad_backward,
)


def index_loss(input: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss of checked class indices."""
    loss: Tensor = _index_op(input, target, ignore_index, functions.REDUCTIONS[reduction])[0]
    return loss


# ---- rows with every option

_NUMBERS = "SymInt ignore_index, Tensor? numbers, bool statistics"  # of numbers, see _options
_INPUT, _PROBABILITIES, _WEIGHT = 1, 2, 4  # the gradients that are needed, one bit each


def _options(ignore_index: int, numbers: Tensor | None, statistics: bool) -> RowOptions:
    """The options of a raw op; ``numbers`` are label_smoothing, logit_scale and softcap, None the defaults."""
    smoothing, scale, softcap = (0.0, 1.0, 0.0) if numbers is None else numbers.tolist()
    return RowOptions(ignore_index, smoothing, scale, softcap, statistics)


def _forward(input: Tensor, *args: Any) -> Any:
    return functions.rows_forward_op(input, *args[:4], *_options(*args[4:]))


def _fake_forward(input: Tensor, *args: Any) -> Any:
    return functions.fake_rows_forward(input, args[-1])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index, numbers, ctx.statistics = inputs
    functions.mark_fixed(ctx, ctx.statistics, output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, numbers, output[1], output[2], output[4])


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    *tensors, numbers, lse, mass, entropy = ctx.saved_tensors
    g = functions.row_grads(ctx.statistics, grads)
    need = ctx.needs_input_grad
    needs = need[0] * _INPUT + need[2] * _PROBABILITIES + need[3] * _WEIGHT
    if not needs or all(grad is None for grad in g):
        return (None,) * 8
    options = (ctx.ignore_index, numbers, ctx.statistics)
    if torch.is_grad_enabled():  # to be differentiated again, outside of what was compiled
        found = _formulas(g, RowArgs(*tensors), _options(*options), needs)
    else:
        found = _grad_op(*g, *tensors, lse, mass, entropy, *options, needs)
    grad_input, grad_probabilities, grad_weight = found
    return (
        grad_input if need[0] else None,
        None,
        grad_probabilities if need[2] else None,
        grad_weight if need[3] else None,
        *(None,) * 4,
    )


def _formulas(g: RowGrads, a: RowArgs, o: RowOptions, needs: int) -> tuple[Tensor | None, ...]:
    """The gradients, differentiable."""
    nll = g.nll is not None
    return (
        reference.grad_input(g, a, o, acc_dtype(a.input.dtype)).to(a.input.dtype) if needs & _INPUT else None,
        reference.grad_probabilities(g, a, o) if nll and needs & _PROBABILITIES else None,
        reference.grad_weight(g, a, o) if nll and needs & _WEIGHT else None,
    )


def _grad(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    g, a, (lse, mass, entropy), needs = RowGrads(*args[:4]), RowArgs(*args[4:9]), args[9:12], args[15]
    o = _options(*args[12:15])
    for name, tensor, needed in zip(("input", "probabilities", "weight"), *_wanted(a, needs), strict=True):
        if needed and tensor is None:
            raise RuntimeError(f"cross_entropy_rows_grad: needs asks for the gradient of {name}, which is None")
    grad_input: Any = functions.rows_backward_op(*g, *a, lse, mass, entropy, *o) if needs & _INPUT else None
    found: tuple[Tensor | None, ...] = (grad_input, *_formulas(g, a, o, needs & ~_INPUT)[1:])
    made = [_or_zeros(a, t, like, need) for t, like, need in zip(found, *_wanted(a, needs), strict=True)]
    return made[0], made[1], made[2]


def _wanted(a: RowArgs, needs: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    return (a.input, a.probabilities, a.weight), (needs & _INPUT, needs & _PROBABILITIES, needs & _WEIGHT)


def _or_zeros(a: RowArgs, found: Tensor | None, like: Tensor | None, needed: int) -> Tensor:
    """A gradient that is there; else zeros where it is needed, and an empty tensor where it is not."""
    if found is not None:
        return found
    return torch.zeros_like(like) if needed and like is not None else a.input.new_empty(0)


def _fake_grad(*args: Any) -> tuple[Tensor, ...]:
    a, needs = RowArgs(*args[4:9]), args[15]
    (_, *others), (_, *needed) = _wanted(a, needs)
    grad_input = empty_output(a.input) if needs & _INPUT else a.input.new_empty(0)
    return grad_input, *(_or_zeros(a, None, like, need) for like, need in zip(others, needed, strict=True))


_rows_op: Any = register_graph_op(
    f"cross_entropy_rows(Tensor input, {functions.TENSORS}, {_NUMBERS}) -> ({functions.RESULTS})",
    _forward,
    _fake_forward,
    _context,
    _backward,
)
_grad_op: Any = register_graph_op(
    f"cross_entropy_rows_grad({functions.GRADS}, Tensor input, {functions.TENSORS}, "
    f"Tensor lse, Tensor mass, Tensor entropy, {_NUMBERS}, int needs) "
    "-> (Tensor grad_input, Tensor grad_probabilities, Tensor grad_weight)",
    _grad,
    _fake_grad,
)


def rows(a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
    """The seven results of each row."""
    numbers = o.label_smoothing, o.logit_scale, o.softcap
    packed = None if numbers == (0.0, 1.0, 0.0) else as_tensor(*numbers)
    return _rows_op(*a, o.ignore_index, packed, o.statistics)  # type: ignore[no-any-return]

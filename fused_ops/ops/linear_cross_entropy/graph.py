"""Linear cross-entropy in chunks as opaque ops: one call to every dispatch mode, and one node of a graph.

The chunk code writes over its own matrix products, which nothing that watches PyTorch's ops may see. How the rows are
cut is settled in the op, from sizes that are numbers by then. The autograd Functions call the ops in eager mode, where
grad mode is off; in the graphs of torch.compile and torch.export the ops have gradient formulas of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_ops.core import torch_private
from fused_ops.core.function import is_differentiated
from fused_ops.core.graph import as_tensor, register_graph_op
from fused_ops.core.library import register
from fused_ops.core.memory_format import wide_dtype
from fused_ops.ops.cross_entropy import functions
from fused_ops.ops.cross_entropy import rows_reference as rows
from fused_ops.ops.cross_entropy.reduction import fixed_order_sum
from fused_ops.ops.cross_entropy.reference import counts
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads
from fused_ops.ops.linear_cross_entropy import by_rows as chunks
from fused_ops.ops.linear_cross_entropy import reference
from fused_ops.ops.linear_cross_entropy.arguments import at_least_one
from fused_ops.ops.linear_cross_entropy.plan import Cut, plan, plan_in_rows
from fused_ops.ops.linear_cross_entropy.reference import Head

# Arguments of all ops: the 5 tensors of Head, then indices, probabilities, weight, class_mask.
TENSORS = 9
# Beside the bits of the head's gradients (``chunks.INPUT`` and so on), in the arguments' order:
PROBABILITIES, CLASS_WEIGHT = 32, 64
OF_HEAD = 31

HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? low_input, Tensor? low_weight"
NUMBERS = "SymInt ignore_index, Tensor? numbers"  # of numbers, see Settings
CUT = "SymInt positions, SymInt? chunk_rows, SymInt? max_memory_bytes"
GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_low_input, Tensor grad_low_weight"


class Settings(NamedTuple):
    """What the ops take behind the tensors, apart from what each has alone."""

    ignore_index: int
    numbers: Tensor | None  # label_smoothing, logit_scale, softcap, z_loss; None: the defaults
    positions: int  # with a loss of their own, of each row
    chunk_rows: int | None
    max_memory_bytes: int | None

    @staticmethod
    def of(o: RowOptions, z_loss: float, cut: Cut) -> Settings:
        """The numbers of a call packed."""
        numbers = (o.label_smoothing, o.logit_scale, o.softcap, z_loss)
        packed = None
        if numbers != (0.0, 1.0, 0.0, 0.0):
            in_graph = torch.compiler.is_compiling()
            packed = as_tensor(*numbers) if in_graph else torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return Settings(o.ignore_index, packed, *cut)

    def unpack(self, statistics: bool = False) -> tuple[RowOptions, float]:
        """The options of the rows, and z_loss."""
        numbers = (0.0, 1.0, 0.0, 0.0) if self.numbers is None else self.numbers.tolist()
        smoothing, scale, softcap, z_loss = numbers
        return RowOptions(self.ignore_index, smoothing, scale, softcap, statistics), z_loss

    @property
    def cut(self) -> Cut:
        return Cut(*self[2:])


def split(tensors: Sequence[Any]) -> tuple[Head, RowArgs]:
    """The tensors of an op; the rows' input, the logits, is yet to come."""
    return Head(*tensors[:5]), RowArgs(tensors[0], *tensors[5:TENSORS])


def cut_off(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Aliases to differentiate with respect to: what one tensor owes to another does not count as theirs twice."""
    return tuple(None if t is None else t.view_as(t) for t in tensors)


def flops(tensors: Sequence[Any], ignore_index: int, statistics: bool, products: int) -> int:
    """Multiplications and additions of ``products`` matrix products with each weight."""
    head, a = split(tensors)
    counted = head.input.size(0)
    if (
        a.indices is not None
        and a.indices.dim() == 1
        and not statistics
        and a.indices.is_cpu
        and not torch_private.is_fake(a.indices)
    ):
        counted = int(counts(a.indices, ignore_index).sum())
    low = 0 if head.low_weight is None else head.low_weight.numel()
    return 2 * counted * products * (head.weight.numel() + low)


def check(head: Head, settings: Settings) -> None:
    """Raises for what only a direct call of the op can bring."""
    matrices = [t for t in (head.input, head.weight, head.low_input, head.low_weight) if t is not None]
    if any(t.dim() != 2 for t in matrices) or len(matrices) == 3:
        raise RuntimeError("linear_cross_entropy: expected input and linear_weight to be matrices, and the low ones")
    at_least_one("chunk_rows", settings.chunk_rows)
    at_least_one("max_memory_bytes", settings.max_memory_bytes)


# ---- a weighted sum of rows, whose gradients the forward finds while it has the logits


def _sum(*args: Any) -> tuple[Tensor, ...]:
    (head, a), row_scale, settings = split(args), args[9], Settings(*args[10:15])
    needs, nan_if_empty = args[15:]
    check(head, settings)
    o, z_loss = settings.unpack()
    nll, lse, *others = chunks.forward(head, a, o, row_scale, z_loss, plan(head, a, o, settings.cut, needs))
    return total(nll, lse, row_scale, z_loss, nan_if_empty), *others[5:]


def total(nll: Tensor, lse: Tensor, row_scale: Tensor, z_loss: float, nan_if_empty: bool) -> Tensor:
    """The weighted sum of the rows' losses."""
    terms = nll if z_loss == 0 else nll + z_loss * lse.square()
    loss = fixed_order_sum(terms * row_scale)
    return loss.fill_(torch.nan) if nan_if_empty and not row_scale.numel() else loss


def fake_gradients(head: Head, needs: int) -> tuple[Tensor, ...]:
    x, weight, *rest = (
        head.input.new_empty(t.shape if t is not None and needs & (1 << i) else (0,)) for i, t in enumerate(head)
    )
    if needs & chunks.WIDE_WEIGHT:
        weight = weight.to(chunks.wide_weight_dtype(weight))
    return x, weight, *rest


def fake_sum(*args: Any) -> tuple[Tensor, ...]:
    return args[0].new_empty((), dtype=wide_dtype(args[0])), *fake_gradients(Head(*args[:5]), args[15])


def sum_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of the op, and of the one for classes that are spread over ranks, which has a tensor and more at the end."""
    ctx.ignore_index, numbers, *ctx.cut, ctx.needs, ctx.nan_if_empty = inputs[10:17]
    ctx.where = inputs[18:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], numbers, *output[1:], *inputs[17:18])


def _sum_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    return sum_gradients(ctx, grad_loss, sum_op, rows_op)


def sum_gradients(ctx: Any, grad_loss: Tensor | None, sum_op: Any, rows_op: Any) -> Any:
    """The backward of the sum's op, which runs again what those ops do."""
    none, need = (None,) * len(ctx.needs_input_grad), ctx.needs_input_grad[:5]
    if grad_loss is None:
        return none
    saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses to unpack them again
    *tensors, row_scale, numbers = saved[:11]
    settings, gradients = Settings(ctx.ignore_index, numbers, *ctx.cut), saved[11:16]
    where = *saved[16:], *ctx.where
    needs = sum(1 << i for i in range(5) if need[i])
    if torch.is_grad_enabled():  # to be differentiated again, outside of what was compiled
        run = lambda *t: rows_op(*t, *settings, False, *where)  # noqa: E731
        return *differentiable(run, tensors, row_scale, settings.unpack()[1], grad_loss, need), *none[5:]
    if needs & ~ctx.needs:  # a program that was exported with inputs of which no gradient was wanted
        gradients = sum_op(*tensors, row_scale, *settings, needs, ctx.nan_if_empty, *where)[1:]
    found = _scale_op(grad_loss, tensors[0], tensors[1], *gradients)
    return *(g if n else None for g, n in zip(found, need, strict=True)), *none[5:]


def differentiable(
    run: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    row_scale: Tensor,
    z_loss: float,
    grad_loss: Tensor,
    need: Sequence[bool],
) -> list[Tensor | None]:
    """The head's gradients of the sum with a graph of their own, through the rows that ``run`` finds."""
    again = torch.is_grad_enabled()  # else tangents are all that is wanted of them
    with torch.enable_grad():
        tensors = cut_off(tensors)
        nll, lse = run(*tensors)[:2]
        terms = nll if z_loss == 0 else nll + z_loss * torch.where(row_scale == 0, 0.0, lse).square()
        wanted = [t for t, n in zip(tensors, need, strict=False) if n]
        new = iter(torch.autograd.grad((terms * row_scale).sum(), wanted, grad_loss, create_graph=again))  # type: ignore[arg-type]
    return [next(new) if n else None for n in need]


def _scale(grad_loss: Tensor, input: Tensor, linear_weight: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple((g * grad_loss).to(g.dtype) for g in gradients)


def _fake_scale(grad_loss: Tensor, input: Tensor, linear_weight: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(g) for g in gradients)


# It takes the matrices, which it does not read, so that AOTAutograd sees what the gradients depend on: else it would
# take them for constants, and a second derivative would be wrong without a word instead of refused.
_scale_op: Any = register_graph_op(
    "linear_cross_entropy_scale(Tensor grad_loss, Tensor input, Tensor linear_weight, "
    f"{GRADIENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scale,
    _fake_scale,
)
sum_op: Any = register_graph_op(
    f"linear_cross_entropy({HEAD}, {functions.TENSORS}, Tensor row_scale, {NUMBERS}, {CUT}, int needs, "
    f"bool nan_if_empty) -> (Tensor loss, {GRADIENTS})",
    _sum,
    fake_sum,
    sum_context,
    _sum_backward,
)


# ---- rows that are kept apart; the backward computes each chunk's logits again


def _rows(*args: Any) -> tuple[Tensor, ...]:
    (head, a), settings, statistics = split(args), Settings(*args[9:14]), args[14]
    check(head, settings)
    o, _ = settings.unpack(statistics)
    return chunks.forward(head, a, o, None, 0.0, plan(head, a, o, settings.cut, 0))[:7]


def _fake_rows(*args: Any) -> tuple[Tensor, ...]:
    input, positions, statistics = args[0], args[11], args[14]
    shape = (input.size(0),) if positions == 1 else (input.size(0), positions)
    wanted = shape if statistics else (0,)
    found = [input.new_empty(s, dtype=wide_dtype(input)) for s in (shape, shape, shape, shape, wanted, wanted)]
    return *found[:5], input.new_empty(wanted, dtype=torch.int64), found[5]


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.ignore_index, numbers, *ctx.cut, ctx.statistics = inputs[9:]
    functions.mark_fixed(ctx, ctx.statistics, output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], output[1], output[2], output[4], numbers)


def row_needs(need: Sequence[bool]) -> int:
    """The gradients that are needed of the tensors, as bits."""
    return sum(1 << i for i in range(5) if need[i]) + PROBABILITIES * need[6] + CLASS_WEIGHT * need[7]


def _rows_backward(ctx: Any, *grads: Tensor | None) -> Any:
    *tensors, lse, mass, entropy, numbers = ctx.saved_tensors
    g, needs = functions.row_grads(ctx.statistics, grads), row_needs(ctx.needs_input_grad)
    none = (None,) * 15
    if not needs or all(grad is None for grad in g):
        return none
    settings = Settings(ctx.ignore_index, numbers, *ctx.cut)
    found = rows_grad_op(*g, *tensors, lse, mass, entropy, *settings, ctx.statistics, needs)
    return place(found, needs, 15)


def place(found: Sequence[Tensor | None], needs: int, arguments: int) -> tuple[Tensor | None, ...]:
    """The seven gradients where the arguments of their tensors are."""
    chosen = [value if needs & (1 << i) else None for i, value in enumerate(found)]
    return *chosen[:5], None, *chosen[5:], *(None,) * (arguments - 8)


def formulas(g: RowGrads, head: Head, a: RowArgs, o: RowOptions, classes: int, needs: int) -> tuple[Tensor | None, ...]:
    """The seven gradients from all the logits at once; differentiable."""
    of_head = reference.gradients(g, head, a, o, classes) if needs & OF_HEAD else (None,) * 5
    return *of_head, *_target_gradients(g, head, a, o, classes, needs)


def _target_gradients(
    g: RowGrads, head: Head, a: RowArgs, o: RowOptions, classes: int, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of class probabilities and of class weights."""
    if g.nll is None or not needs & ~OF_HEAD:
        return None, None
    a = a._replace(input=reference.logits(head, classes))
    return (
        rows.grad_probabilities(g, a, o) if needs & PROBABILITIES and a.probabilities is not None else None,
        rows.grad_weight(g, a, o) if needs & CLASS_WEIGHT and a.weight is not None else None,
    )


def _rows_grad(*args: Any, main_grad: Tensor | None = None) -> tuple[Tensor, ...]:
    g, (head, a), (lse, mass, entropy) = RowGrads(*args[:4]), split(args[4:13]), args[13:16]
    settings, statistics, needs = Settings(*args[16:21]), *args[21:]
    check(head, settings)
    o, _ = settings.unpack(statistics)
    found: tuple[Tensor, ...] = tuple(head.input.new_empty(0) for _ in range(5))
    if needs & OF_HEAD:
        in_rows = plan_in_rows(head, settings.cut, needs & OF_HEAD, main_grad)
        found = chunks.backward(g, head, a, lse, mass, entropy, o, in_rows, main_grad)
    others = _target_gradients(g, head, a, o, settings.cut.classes(head), needs)
    empty = fake_others(a, needs)
    return *found, *(e.zero_() if t is None else t for t, e in zip(others, empty, strict=True))


def fake_others(a: RowArgs, needs: int) -> tuple[Tensor, ...]:
    of = (a.probabilities, PROBABILITIES), (a.weight, CLASS_WEIGHT)
    return tuple(a.input.new_empty(0) if t is None or not needs & bit else t.new_empty(t.shape) for t, bit in of)


def _fake_rows_grad(*args: Any) -> tuple[Tensor, ...]:
    head, a = split(args[4:13])
    return *fake_gradients(head, args[22]), *fake_others(a, args[22])


def _rows_grad_to(*args: Any) -> tuple[Tensor, ...]:
    return _rows_grad(*args[:23], main_grad=args[23])


def _fake_rows_grad_to(*args: Any) -> tuple[Tensor, ...]:
    return _fake_rows_grad(*args[:22], args[22] & ~chunks.WEIGHT)


class _Leaves(NamedTuple):
    """What the seven gradients depend on: (row gradients, head, class probabilities, class weight)."""

    tensors: tuple[Tensor | None, ...]

    def gradients(self, a: RowArgs, o: RowOptions, classes: int, needs: int) -> tuple[Tensor | None, ...]:
        t = self.tensors
        a = a._replace(probabilities=t[9], weight=t[10])
        return formulas(RowGrads(*t[:4]), Head(*t[4:9]), a, o, classes, needs)  # type: ignore[arg-type]


_PLACES = (*range(9), 10, 11)  # of the leaves among the arguments of the op
_SHARED = (5, 6, 8, 10)  # of _Leaves, those that all rows have in common: weight, bias, low_weight, class weight


def is_batched(*grads: Tensor | None) -> bool:
    """Whether any comes from ``torch.autograd.grad(is_grads_batched=True)``, which few in-place operations stand."""
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch_private.is_batched(g) for g in grads)


def _second(
    outer: tuple[Tensor | None, ...],
    leaves: _Leaves,
    wanted: list[bool],
    a: RowArgs,
    o: RowOptions,
    classes: int,
    needs: int,
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of <the seven gradients, outer> with respect to the leaves that are wanted."""
    with torch.enable_grad():
        leaves = _Leaves(cut_off(leaves.tensors))
        values = leaves.gradients(a, o, classes, needs)
    used = [(v, s.to(v.dtype)) for v, s in zip(values, outer, strict=True) if v is not None and s is not None]
    inputs = [t for t, want in zip(leaves.tensors, wanted, strict=True) if want and t is not None]
    new = iter(
        torch.autograd.grad(
            [v for v, _ in used], inputs, [s for _, s in used], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(new) if want else None for want in wanted]


def _chunked_second(
    outer: tuple[Tensor | None, ...],
    leaves: _Leaves,
    wanted: list[bool],
    a: RowArgs,
    o: RowOptions,
    in_rows: chunks.Plan,
) -> list[Tensor | None]:
    """``_second``, one chunk of logits at a time."""
    found: list[Tensor | None] = [None] * len(wanted)
    for begin in range(0, a.input.size(0), in_rows.chunk_rows):
        part = slice(begin, begin + in_rows.chunk_rows)
        cut = [t if i in _SHARED or t is None else t[part] for i, t in enumerate(leaves.tensors)]
        detached = _Leaves(tuple(None if t is None else t.detach().requires_grad_() for t in cut))
        sides = tuple(t if i + 4 in _SHARED or t is None else t[part] for i, t in enumerate(outer))
        args = chunks.cut_args(a, a.input[part], part)
        new = _second(sides, detached, wanted, args, o, in_rows.classes, in_rows.needs, create_graph=False)
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


def _rows_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.ignore_index, numbers, *ctx.cut, ctx.statistics, ctx.needs = inputs[16:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13], numbers)


def _rows_grad_backward(ctx: Any, *outer: Tensor | None) -> Any:
    *saved, numbers = ctx.saved_tensors
    (head, a), settings = split(saved[4:13]), Settings(ctx.ignore_index, numbers, *ctx.cut)
    outer = tuple(v if ctx.needs & (1 << i) else None for i, v in enumerate(outer))
    wanted = [ctx.needs_input_grad[i] for i in _PLACES]
    found: list[Tensor | None] = [None] * 23
    if all(v is None for v in outer) or not any(wanted):
        return tuple(found)
    leaves, (o, _) = _Leaves(tuple(saved[i] for i in _PLACES)), settings.unpack(ctx.statistics)
    again = is_differentiated()
    if again or is_batched(*outer):  # a third derivative, or several: with all the logits
        new = _second(outer, leaves, wanted, a, o, settings.cut.classes(head), ctx.needs, create_graph=again)
    else:
        in_rows = plan(head, a, o, settings.cut, 0)._replace(needs=ctx.needs)
        new = _chunked_second(outer, leaves, wanted, a, o, in_rows)
    for i, value in zip(_PLACES, new, strict=True):
        found[i] = value
    return tuple(found)


rows_op: Any = register_graph_op(
    f"linear_cross_entropy_rows({HEAD}, {functions.TENSORS}, {NUMBERS}, {CUT}, bool statistics) "
    f"-> ({functions.RESULTS})",
    _rows,
    _fake_rows,
    _rows_context,
    _rows_backward,
)
rows_grad_op: Any = register_graph_op(
    f"linear_cross_entropy_rows_grad({functions.GRADS}, {HEAD}, {functions.TENSORS}, {functions.SAVED}, {NUMBERS}, "
    f"{CUT}, bool statistics, int needs) -> ({GRADIENTS}, Tensor grad_probabilities, Tensor grad_class_weight)",
    _rows_grad,
    _fake_rows_grad,
    _rows_grad_context,
    _rows_grad_backward,
)
rows_grad_to_op: Any = register(
    f"linear_cross_entropy_rows_grad_to({functions.GRADS}, {HEAD}, {functions.TENSORS}, {functions.SAVED}, {NUMBERS}, "
    f"{CUT}, bool statistics, int needs, Tensor(a!) main_grad) "
    f"-> ({GRADIENTS}, Tensor grad_probabilities, Tensor grad_class_weight)",
    _rows_grad_to,
    _fake_rows_grad_to,
    native=False,
)


# ---- what FlopCounterMode counts


def gradient_products(needs: int) -> int:
    """Products of the head's gradients that are wanted: inputs and weights."""
    return bool(needs & chunks.INPUT) + bool(needs & chunks.WEIGHT)


@register_flop_formula(torch.ops.fused_ops.linear_cross_entropy, get_raw=True)
def sum_flops(*args: Any, **_: Any) -> int:
    return flops(args, args[10], False, 1 + gradient_products(args[15]))


@register_flop_formula(torch.ops.fused_ops.linear_cross_entropy_rows, get_raw=True)
def rows_flops(*args: Any, **_: Any) -> int:
    return flops(args, args[9], args[14], 1)


@register_flop_formula(
    [torch.ops.fused_ops.linear_cross_entropy_rows_grad, torch.ops.fused_ops.linear_cross_entropy_rows_grad_to],
    get_raw=True,
)
def _rows_grad_flops(*args: Any, **_: Any) -> int:
    return flops(args[4:13], args[16], args[21], 1 + gradient_products(args[22]))

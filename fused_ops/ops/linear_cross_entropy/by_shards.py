"""Linear cross-entropy of classes that are spread over ranks, in chunks of rows.

Each rank has some rows of the weight matrix, and so some columns of each chunk of logits. What it finds in them is
gathered and merged as ``cross_entropy.shards`` does, while the product of the next chunk is computed: two chunks exist.
Then each rank knows all that the gradient of its logits needs. Of the input's gradient it has the share of its own
classes; ``spread`` sees to the sum. All ranks cut the rows alike, as each chunk is an exchange between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_ops.core.function import is_differentiated
from fused_ops.core.graph import register_graph_op
from fused_ops.core.library import register
from fused_ops.core.memory_format import wide_dtype
from fused_ops.core.torch_private import forward_ad, transforms_active
from fused_ops.distributed import collectives
from fused_ops.ops.cross_entropy import functions, shards
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads
from fused_ops.ops.cross_entropy.shards import Merged, Place, Ranks, Shard
from fused_ops.ops.linear_cross_entropy import by_classes as tiles
from fused_ops.ops.linear_cross_entropy import by_rows, graph, plan, reference
from fused_ops.ops.linear_cross_entropy.by_rows import Gradients, Plan, cut_rows, wanted_main_grad
from fused_ops.ops.linear_cross_entropy.graph import CLASS_WEIGHT, OF_HEAD, PROBABILITIES, TENSORS, Settings, split
from fused_ops.ops.linear_cross_entropy.plan import Cut
from fused_ops.ops.linear_cross_entropy.reference import Head


class Where(NamedTuple):
    """Which classes are here: the last arguments of the ops."""

    place: Tensor  # the first class here and the number of all, of the CPU
    group: str
    ranks: int


class Spread(NamedTuple):
    """The classes of a call that are spread over ranks."""

    place: Place
    group: Any

    def where(self) -> Where:
        """For the ops."""
        place = self.place if isinstance(self.place, Tensor) else torch.tensor(self.place[1:3], device="cpu")
        return Where(place, collectives.name_of(self.group), collectives.size_of(self.group))

    def at_once(self, head: Head, cut: Cut) -> bool:
        """Whether all the logits exist at once; the same on all ranks."""
        if isinstance(self.place, Tensor):
            return False
        if transforms_active() or forward_ad._current_level >= 0:
            return True
        outputs = -(-self.place.classes // collectives.size_of(self.group)) * cut.positions
        return cut[1:] == (None, None) and head.input.size(0) * outputs * head.input.itemsize <= plan.SMALL_BYTES

    def whole_rows(self, head: Head, cut: Cut, a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
        """The seven results of each row, of logits that exist all at once."""
        ranks = Ranks(self.group, None, None, None)
        return shards.rows(a._replace(input=_logits(head, cut)), o, self.place, ranks, False)


def spread(head: Head, group: Any, rows: int | None) -> Head:
    """The head whose input every rank has alike, and goes on from to the logits of its classes.

    Args:
        head: The matrices of a rank.
        group: The ranks.
        rows: Of all ranks, each of which has some of them; None if each has all.
    """

    def shared(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return collectives.copy_to_shares(x, group) if rows is None else collectives.gather_all_rows(x, rows, group)

    return head._replace(input=shared(head.input), low_input=shared(head.low_input))  # type: ignore[arg-type]


def _logits(head: Head, cut: Cut) -> Tensor:
    logits = reference.logits(head, head.weight.size(0))
    return logits if cut.positions == 1 else logits.view(logits.size(0), cut.classes(head), cut.positions)


def _rows_shape(rows: int, positions: int) -> tuple[int, ...]:
    return (rows,) if positions == 1 else (rows, positions)


# ---- chunks


def plan_of(head: Head, cut: Cut, classes: int, ranks: int, needs: int) -> Plan:
    """How the rows are cut, by what all ranks have alike: not by this rank's classes, gradients or device."""
    x = head.input
    l2_bytes = plan.L2_BYTES if x.is_cuda else 0
    sizes = plan.Sizes(x.size(0), x.size(1), -(-classes // ranks), cut.positions, x.element_size(), l2_bytes)
    rows = plan.choose(sizes, by_rows.WEIGHT, False, cut.chunk_rows, cut.max_memory_bytes).chunk_rows
    if rows < sizes.rows:
        rows = -(-rows // 2)  # two chunks of logits exist
    return Plan(cut.classes(head), rows, needs)


class _Chunk(NamedTuple):
    rows: Tensor | slice
    args: RowArgs  # with the logits
    shard: Shard
    matrix: Tensor  # the logits, (rows, classes * positions)


def _chunks(
    head: Head, a: RowArgs, shard: Shard, in_rows: Plan, positions: int, parts: list[Tensor | slice], buffers: int
) -> Iterator[_Chunk]:
    """Chunks of logits, in as many buffers by turns."""
    memory: list[Tensor] = []
    for i, part in enumerate(parts):
        x = head.input[part]
        if i < buffers:
            memory.append(tiles.logits_buffer(x, x.size(0), head.weight.size(0)))
        matrix = by_rows.product(head, part, x, memory[i % buffers][: x.size(0)])
        logits = matrix if positions == 1 else matrix.view(x.size(0), in_rows.classes, positions)
        allowed = shard.allowed
        assert allowed is not None
        here = shard._replace(allowed=allowed[part] if allowed.dim() else allowed)
        yield _Chunk(part, by_rows.cut_args(a, logits, part), here, matrix)


def _merged(chunks: Iterator[_Chunk], o: RowOptions) -> Iterator[tuple[_Chunk, Merged]]:
    """Each chunk and its rows' results, which travel while the logits of the next one are computed."""
    before: tuple[_Chunk, Tensor, Tensor, Any] | None = None
    for chunk in chunks:
        mine = shards.partial(chunk.args, o, chunk.shard)
        now = chunk, mine, *shards.send(mine, chunk.shard.group)
        if before is not None:
            yield _arrived(*before, o)
        before = now
    if before is not None:
        yield _arrived(*before, o)


def _arrived(chunk: _Chunk, mine: Tensor, arriving: Tensor, work: Any, o: RowOptions) -> tuple[_Chunk, Merged]:
    work.wait()
    return chunk, shards.receive(mine, arriving, chunk.shard.group, chunk.args, o)


def _row_results(x: Tensor, o: RowOptions, positions: int) -> Merged:
    """Zeros for the results of every row."""
    shape = _rows_shape(x.size(0), positions)
    values = {name: x.new_zeros(shape, dtype=wide_dtype(x)) for name in Merged._fields}
    wanted: tuple[int, ...] = shape if o.statistics else (0,)
    values["entropy"] = x.new_zeros(wanted, dtype=wide_dtype(x))
    values["prediction"] = x.new_zeros(wanted, dtype=torch.int64)
    return Merged(**values)


def forward(
    head: Head,
    a: RowArgs,
    o: RowOptions,
    row_scale: Tensor | None,
    z_loss: float,
    shard: Shard,
    in_rows: Plan,
    positions: int,
) -> tuple[Merged, tuple[Tensor, ...]]:
    """The rows' results, and the head's gradients of sum_r row_scale_r (nll_r + z_loss lse_r^2): this rank's share."""
    parts = by_rows.parts_of(head, a, o, in_rows)
    results, gradients = _row_results(head.input, o, positions), Gradients(head, in_rows, len(parts))
    buffers = 1 if row_scale is None else 2
    for chunk, found in _merged(_chunks(head, a, shard, in_rows, positions, parts, buffers), o):
        for whole, values in zip(results, found, strict=True):
            if whole.numel():
                whole[chunk.rows] = values
        if row_scale is None:
            continue
        scale = row_scale[chunk.rows]
        grad_lse = None if z_loss == 0 else torch.where(scale == 0, 0.0, 2 * z_loss * found.lse * scale)
        shards.gradient_(RowGrads(scale, grad_lse, None, None), chunk.args, o, chunk.shard, found)
        gradients.add(chunk.rows, chunk.matrix)
    return results, gradients.all()


def backward(
    g: RowGrads,
    head: Head,
    a: RowArgs,
    o: RowOptions,
    shard: Shard,
    results: Merged,
    in_rows: Plan,
    positions: int,
    main_grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """This rank's share of the head's gradients, from logits that are computed again; ``main_grad`` as in by_rows."""
    parts = by_rows.parts_of(head, a, o, in_rows)
    gradients = Gradients(head, in_rows, len(parts), main_grad)
    for chunk in _chunks(head, a, shard, in_rows, positions, parts, 1):
        grads = RowGrads(*(cut_rows(grad, chunk.rows) for grad in g))
        found = Merged(*(values[chunk.rows] if values.numel() else values for values in results))
        shards.gradient_(grads, chunk.args, o, chunk.shard, found)
        gradients.add(chunk.rows, chunk.matrix)
    return gradients.all()


# ---- the ops, of eager mode and of graphs: arguments as in ``graph``, and ``Where`` at the end

_WHERE = "Tensor place, str group, int ranks"
_MERGED = f"{functions.RESULTS}, Tensor high, Tensor low, Tensor allowed"


def _shard(head: Head, a: RowArgs, o: RowOptions, settings: Settings, where: Where) -> Shard:
    """The place of an op, checked, with the classes that smoothing is spread over."""
    graph.check(head, settings)
    positions, here = settings.positions, settings.cut.classes(head)
    shape = head.input.size(0), here, *(() if positions == 1 else (positions,))
    a = a._replace(input=head.input.new_empty(()).expand(shape))
    shard = Shard(collectives.group_of(where.group), *where.place.tolist())
    shards.check_place(a, shard)
    allowed = shards.allowed_classes(a, o, shard)
    if a.class_mask is not None and a.class_mask.dim() > 1:
        allowed = allowed.expand(_rows_shape(head.input.size(0), positions)).clone()
    return shard._replace(allowed=allowed)


def _sum(*args: Any) -> tuple[Tensor, ...]:
    (head, a), row_scale, settings = split(args), args[9], Settings(*args[10:15])
    needs, nan_if_empty, where = *args[15:17], Where(*args[17:])
    o, z_loss = settings.unpack()
    shard = _shard(head, a, o, settings, where)
    in_rows = plan_of(head, settings.cut, shard.classes, where.ranks, needs)
    found, gradients = forward(head, a, o, row_scale, z_loss, shard, in_rows, settings.positions)
    return graph.total(found.nll, found.lse, row_scale, z_loss, nan_if_empty), *gradients


def _sum_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    return graph.sum_gradients(ctx, grad_loss, sum_op, lambda *args: rows_op(*args, None))


sum_op: Any = register_graph_op(
    f"linear_cross_entropy_shard({graph.HEAD}, {functions.TENSORS}, Tensor row_scale, {graph.NUMBERS}, {graph.CUT}, "
    f"int needs, bool nan_if_empty, {_WHERE}) -> (Tensor loss, {graph.GRADIENTS})",
    _sum,
    graph.fake_sum,
    graph.sum_context,
    _sum_backward,
)


def _rows(*args: Any) -> tuple[Tensor, ...]:
    (head, a), settings, statistics, where = split(args), Settings(*args[9:14]), args[14], Where(*args[15:18])
    o, _ = settings.unpack(statistics)
    shard = _shard(head, a, o, settings, where)
    assert shard.allowed is not None
    in_rows = plan_of(head, settings.cut, shard.classes, where.ranks, 0)
    results, _ = forward(head, a, o, None, 0.0, shard, in_rows, settings.positions)
    return *results, shard.allowed


def _fake_rows(*args: Any) -> tuple[Tensor, ...]:
    input, mask, positions, statistics = args[0], args[8], args[11], args[14]
    shape = _rows_shape(input.size(0), positions)
    found = [input.new_empty(shape, dtype=wide_dtype(input)) for _ in range(10)]
    if not statistics:
        found[4] = input.new_empty(0, dtype=wide_dtype(input))
    found[5] = torch.empty_like(found[4], dtype=torch.int64)
    if mask is None or mask.dim() == 1:
        found[9] = input.new_empty((), dtype=wide_dtype(input))
    return tuple(found)


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.ignore_index, numbers, *ctx.cut, ctx.statistics, place, ctx.group, ctx.ranks, ctx.main_grad = inputs[9:]
    ctx.mark_non_differentiable(*shards.fixed_results(ctx.statistics, Merged(*output[:9])), output[9])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *output, numbers, place)


def _rows_backward(ctx: Any, *grads: Tensor | None) -> Any:
    *saved, numbers, place = ctx.saved_tensors
    g, needs = functions.row_grads(ctx.statistics, grads), graph.row_needs(ctx.needs_input_grad)
    if not needs or all(grad is None for grad in g):
        return (None,) * 19
    main_grad = wanted_main_grad(ctx, *g)
    if ctx.main_grad is not None and main_grad is None:
        needs &= ~by_rows.WEIGHT
    if graph.is_batched(*g):
        raise NotImplementedError(
            "linear_cross_entropy: is_grads_batched=True is not for classes that are spread over class_group; expected "
            "one gradient at a time"
        )
    settings = Settings(ctx.ignore_index, numbers, *ctx.cut)
    args = (*g, *saved, *settings, ctx.statistics, needs, place, ctx.group, ctx.ranks)
    if is_differentiated():
        return graph.place(_formulas(_Saved.of(args)), needs, 19)
    if main_grad is None:
        return graph.place(_rows_grad_op(*args), needs, 19)
    return graph.place(_rows_grad_to_op(*args, main_grad), needs & ~by_rows.WEIGHT, 19)


class _Saved(NamedTuple):
    """The arguments of the gradients' op, unpacked."""

    g: RowGrads
    head: Head
    a: RowArgs
    o: RowOptions
    shard: Shard
    results: Merged
    settings: Settings
    needs: int
    where: Where

    @staticmethod
    def of(args: tuple[Any, ...]) -> _Saved:
        (head, a), settings, statistics, needs = split(args[4:13]), Settings(*args[23:28]), *args[28:30]
        where = Where(*args[30:33])
        shard = Shard(collectives.group_of(where.group), *where.place.tolist())._replace(allowed=args[22])
        o, _ = settings.unpack(statistics)
        return _Saved(RowGrads(*args[:4]), head, a, o, shard, Merged(*args[13:22]), settings, needs, where)


def _formulas(s: _Saved) -> tuple[Tensor | None, ...]:
    """The seven gradients from all the logits at once; differentiable."""
    of_head: tuple[Tensor | None, ...] = (None,) * 5
    a, across = s.a._replace(input=_logits(s.head, s.settings.cut)), shards.across_ranks(s.o, s.shard, s.results.high)
    if s.needs & OF_HEAD:
        of_head = reference.head_gradients(shards.grad_input(s.g, a, s.o, s.shard, across), s.head)
    return *of_head, *_target_gradients(s, a)


def _target_gradients(s: _Saved, a: RowArgs) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of class probabilities and of class weights."""
    if s.g.nll is None:
        return None, None
    across = shards.across_ranks(s.o, s.shard, s.results.high)
    return (
        shards.grad_probabilities(s.g, a, s.o, s.shard, across) if s.needs & PROBABILITIES else None,
        shards.grad_weight(s.g, a, s.o, s.shard, across) if s.needs & CLASS_WEIGHT else None,
    )


def _rows_grad(*args: Any, main_grad: Tensor | None = None) -> tuple[Tensor, ...]:
    s = _Saved.of(args)
    graph.check(s.head, s.settings)
    found: tuple[Tensor, ...] = tuple(s.head.input.new_empty(0) for _ in range(5))
    if s.needs & OF_HEAD:
        in_rows = plan_of(s.head, s.settings.cut, s.shard.classes, s.where.ranks, s.needs & OF_HEAD)
        found = backward(s.g, s.head, s.a, s.o, s.shard, s.results, in_rows, s.settings.positions, main_grad)
    others: tuple[Tensor | None, ...] = None, None
    if s.needs & ~OF_HEAD:
        others = _target_gradients(s, s.a._replace(input=_logits(s.head, s.settings.cut)))
    empty = graph.fake_others(s.a, s.needs)
    return *found, *(e.zero_() if t is None else t for t, e in zip(others, empty, strict=True))


def _fake_rows_grad(*args: Any) -> tuple[Tensor, ...]:
    head, a = split(args[4:13])
    return *graph.fake_gradients(head, args[29]), *graph.fake_others(a, args[29])


def _rows_grad_to(*args: Any) -> tuple[Tensor, ...]:
    return _rows_grad(*args[:33], main_grad=args[33])


def _fake_rows_grad_to(*args: Any) -> tuple[Tensor, ...]:
    return _fake_rows_grad(*args[:29], args[29] & ~by_rows.WEIGHT)


rows_op: Any = register_graph_op(
    f"linear_cross_entropy_shard_rows({graph.HEAD}, {functions.TENSORS}, {graph.NUMBERS}, {graph.CUT}, "
    f"bool statistics, {_WHERE}, Tensor? main_grad) -> ({_MERGED})",
    _rows,
    _fake_rows,
    _rows_context,
    _rows_backward,
)
_rows_grad_op: Any = register_graph_op(
    f"linear_cross_entropy_shard_rows_grad({functions.GRADS}, {graph.HEAD}, {functions.TENSORS}, {_MERGED}, "
    f"{graph.NUMBERS}, {graph.CUT}, bool statistics, int needs, {_WHERE}) "
    f"-> ({graph.GRADIENTS}, Tensor grad_probabilities, Tensor grad_class_weight)",
    _rows_grad,
    _fake_rows_grad,
)
_rows_grad_to_op: Any = register(
    f"linear_cross_entropy_shard_rows_grad_to({functions.GRADS}, {graph.HEAD}, {functions.TENSORS}, {_MERGED}, "
    f"{graph.NUMBERS}, {graph.CUT}, bool statistics, int needs, {_WHERE}, Tensor(a!) main_grad) "
    f"-> ({graph.GRADIENTS}, Tensor grad_probabilities, Tensor grad_class_weight)",
    _rows_grad_to,
    _fake_rows_grad_to,
    native=False,
)

register_flop_formula(torch.ops.fused_ops.linear_cross_entropy_shard, get_raw=True)(graph.sum_flops)
register_flop_formula(torch.ops.fused_ops.linear_cross_entropy_shard_rows, get_raw=True)(graph.rows_flops)


@register_flop_formula(
    [
        torch.ops.fused_ops.linear_cross_entropy_shard_rows_grad,
        torch.ops.fused_ops.linear_cross_entropy_shard_rows_grad_to,
    ],
    get_raw=True,
)
def _rows_grad_flops(*args: Any, **_: Any) -> int:
    return graph.flops(args[4:13], args[23], args[28], 1 + graph.gradient_products(args[29]))

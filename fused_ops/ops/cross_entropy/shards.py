"""Cross-entropy of classes that are spread over ranks: the raw ops, the autograd Function, and the op of graphs.

A rank's part of each row (``partial``), one gather of them (of many ranks: maxima and sums), and a merge that every
rank does alike. The gradient of the logits needs no collective; those of class weights and of (indices, probabilities),
which every rank has alike, are summed over the ranks. ``shards_reference`` has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_ops.core.checks import as_integer
from fused_ops.core.function import FusedFunction, checked_saved, is_differentiated, save
from fused_ops.core.graph import as_tensor, in_graph, needs_formulas, register_graph_op
from fused_ops.core.library import register
from fused_ops.core.memory_format import acc_dtype, empty_output, wide, wide_dtype, wide_sum
from fused_ops.distributed import collectives
from fused_ops.ops.cross_entropy import rows_reference, shards_reference
from fused_ops.ops.cross_entropy.functions import GRADS, RESULTS, TENSORS, overwrites, row_grads
from fused_ops.ops.cross_entropy.reference import class_dim
from fused_ops.ops.cross_entropy.row import Across, RowArgs, RowOptions, rows_shape
from fused_ops.ops.cross_entropy.rows_reference import RowGrads
from fused_ops.ops.cross_entropy.shards_reference import Merged, merge

__all__ = ["Merged", "Shard", "gradient", "gradient_", "merge", "partial", "rows"]


class Ranks(NamedTuple):
    """The process groups of a call."""

    class_group: Any  # the ranks that share the classes, or None
    class_start: int | None  # None with the next: asked for
    classes: int | None
    row_group: Any  # the ranks that share the rows of a mean, or several groups one after the other, or None


class Shard(NamedTuple):
    """Which classes are here."""

    group: Any  # the ranks that have the others; None: none, or ranks that are only simulated
    start: int  # the first class
    classes: int  # of all ranks
    allowed: Tensor | None = None  # how many classes smoothing is spread over, a scalar or one value per row

    def to_save(self) -> Shard:
        """With the group's name in its place: a graph that held it would keep a destroyed group's threads alive."""
        return self._replace(group=None if self.group is None else collectives.name_of(self.group), allowed=None)

    def of_saved(self, allowed: Tensor) -> Shard:
        """What ``to_save`` was taken of."""
        return self._replace(group=None if self.group is None else collectives.group_of(self.group), allowed=allowed)


Place = Shard | Tensor  # in graphs a tensor of start and classes


# ---- the raw ops: arguments with the classes that are here, but for indices

_SHARD = "Tensor allowed"
_NUMBERS = (
    "int first, int classes, int ignore_index, float label_smoothing, float logit_scale, float softcap, bool statistics"
)
_MERGED = "Tensor high, Tensor low, Tensor mass, Tensor target_weight, Tensor? entropy, Tensor target_log_probability"


def _fake_forward(input: Tensor, *rest: Any) -> Tensor:
    o = RowOptions(*rest[-5:])
    return input.new_empty((shards_reference.parts(o), *rows_shape(input)), dtype=wide_dtype(input))


def _fake_gradient(*args: Any) -> Tensor:
    return empty_output(args[4])


def _fake_nothing(*_: Any) -> None:
    return None


_forward_op: Any = register(
    f"cross_entropy_shard_forward(Tensor input, {TENSORS}, {_SHARD}, {_NUMBERS}) -> Tensor",
    shards_reference.forward,
    _fake_forward,
)
_backward_op: Any = register(
    f"cross_entropy_shard_backward({GRADS}, Tensor input, {TENSORS}, {_SHARD}, {_MERGED}, {_NUMBERS}) -> Tensor",
    shards_reference.backward,
    _fake_gradient,
)
_backward_inplace_op: Any = register(
    f"cross_entropy_shard_backward_({GRADS}, Tensor(a!) input, {TENSORS}, {_SHARD}, {_MERGED}, {_NUMBERS}) -> ()",
    shards_reference.backward_,
    _fake_nothing,
)


# ---- what is done with a shard, without derivatives


def _classes_here(values: Tensor, a: RowArgs, start: int) -> Tensor:
    """Of one value per class of all ranks those that are here."""
    return values.narrow(0, start, a.input.size(class_dim(a.input)))


def _local(a: RowArgs, start: int) -> RowArgs:
    """The arguments with weight and mask of the classes here."""
    weight, mask = a.weight, a.class_mask
    return a._replace(
        weight=None if weight is None else _classes_here(weight, a, start),
        class_mask=mask if mask is None or mask.dim() > 1 else _classes_here(mask, a, start),
    )


def allowed_classes(a: RowArgs, o: RowOptions, shard: Shard) -> Tensor:
    """How many classes smoothing is spread over, wide: a scalar, or one value per row with masks of rows."""
    if shard.allowed is not None:
        return shard.allowed
    mask = a.class_mask
    if mask is not None and mask.dim() > 1 and o.label_smoothing != 0:
        count = wide(mask.sum(class_dim(a.input)))
        return count if shard.group is None else collectives.sum_of_ranks(count, shard.group)
    if mask is not None and mask.dim() == 1:
        return wide(mask.sum())
    return torch.full((), shard.classes, dtype=wide_dtype(a.input), device=a.input.device)


def partial(a: RowArgs, o: RowOptions, shard: Shard) -> Tensor:
    """A rank's part of each row, (parts, *rows) wide, to be gathered: (ranks, parts, *rows) for ``merge``.

    Args:
        a: The logits of this rank's classes; class probabilities and a mask of their shape; indices, weight and a mask
            of one dimension of all classes.
        o: The options.
        shard: Which classes these are. Without ``allowed``, masks of rows and smoothing cost one more collective.
    """
    found: Tensor = _forward_op(*_local(a, shard.start), allowed_classes(a, o, shard), shard.start, shard.classes, *o)
    return found


def _gradient_args(g: RowGrads, a: RowArgs, o: RowOptions, shard: Shard, m: Merged) -> tuple[Any, ...]:
    results = m.high, m.low, m.mass, m.target_weight, m.entropy if o.statistics else None, m.target_log_probability
    return (*g, *_local(a, shard.start), allowed_classes(a, o, shard), *results, shard.start, shard.classes, *o)


def gradient(g: RowGrads, a: RowArgs, o: RowOptions, shard: Shard, merged: Merged) -> Tensor:
    """The gradient of this rank's logits, of a loss that every rank computes alike."""
    found: Tensor = _backward_op(*_gradient_args(g, a, o, shard, merged))
    return found


def gradient_(g: RowGrads, a: RowArgs, o: RowOptions, shard: Shard, merged: Merged) -> None:
    """The same, written over the logits."""
    _backward_inplace_op(*_gradient_args(g, a, o, shard, merged))


def check_place(a: RowArgs, shard: Shard) -> None:
    """Raises for classes that are not some of all, and for a weight or mask that is not of all classes."""
    here, classes = a.input.size(class_dim(a.input)), shard.classes
    if shard.start < 0 or shard.start + here > classes:
        raise ValueError(
            f"cross_entropy: expected the {here} classes of this rank to be some of classes={classes}, got "
            f"class_start={shard.start}"
        )
    if a.weight is not None and a.weight.size(0) != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes of the group's ranks or no classes but "
            f"got weight tensor of shape: {list(a.weight.shape)}"
        )
    if a.class_mask is not None and a.class_mask.dim() == 1 and a.class_mask.size(0) != classes:
        raise RuntimeError(
            f"cross_entropy: expected class_mask of shape [{classes}], the classes of the group's ranks, or "
            f"{list(a.input.shape)}, got {list(a.class_mask.shape)}"
        )


# ---- with derivatives: formulas, whose collectives have theirs


def across_ranks(o: RowOptions, shard: Shard, high: Tensor) -> Across:
    """How the formulas meet the other ranks; ``high`` is a number near each row's lse, the same on all ranks."""
    assert shard.allowed is not None

    def total(values: Tensor) -> Tensor:
        return collectives.sum_of_shares(values, shard.group)

    def normalise(u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        top = high.detach().to(u.dtype)
        return top, total(wide_sum((u - top.unsqueeze(dim)).exp(), dim)).log()

    def copy(values: Tensor) -> Tensor:
        return collectives.copy_to_shares(values, shard.group)

    return Across(shard.start, shard.allowed, normalise, total, copy)


def _shared(a: RowArgs, shard: Shard) -> RowArgs:
    """Weight, and probabilities of indices, as what every rank has alike; then what is here of them."""
    weight, probabilities = a.weight, a.probabilities
    if weight is not None:
        weight = collectives.copy_to_shares(weight, shard.group)
    if probabilities is not None and a.indices is not None:
        probabilities = collectives.copy_to_shares(probabilities, shard.group)
    return _local(a._replace(weight=weight, probabilities=probabilities), shard.start)


def grad_weight(g: RowGrads, a: RowArgs, o: RowOptions, shard: Shard, across: Across) -> Tensor:
    here = rows_reference.grad_weight(g, _shared(a, shard), o, across)
    behind = shard.classes - shard.start - here.size(0)
    return across.total(torch.nn.functional.pad(here, (shard.start, behind)))


def grad_probabilities(g: RowGrads, a: RowArgs, o: RowOptions, shard: Shard, across: Across) -> Tensor:
    found = rows_reference.grad_probabilities(g, _shared(a, shard), o, across)
    return found if a.indices is None else across.total(found)


def grad_input(g: RowGrads, a: RowArgs, o: RowOptions, shard: Shard, across: Across) -> Tensor:
    found = rows_reference.grad_input(g, _shared(a, shard), o, acc_dtype(a.input.dtype), across)
    return found.to(a.input.dtype)


# ---- what serves a call in eager mode


def _run(a: RowArgs, o: RowOptions, shard: Shard) -> Merged:
    mine, group = partial(a, o, shard), shard.group
    if collectives.size_of(group) >= collectives.MANY_RANKS:
        return _merge_sums(mine, collectives.maximum(shards_reference.maxima(mine), group), group, a, o)
    return merge(collectives.gather(mine, group), a, o)


def _merge_sums(mine: Tensor, top: Tensor, group: Any, a: RowArgs, o: RowOptions) -> Merged:
    """The rows' results of many ranks, from this rank's part and the largest of the maxima."""
    total = collectives.total(shards_reference.summands(mine, top, a, o), group)
    best = collectives.maximum(shards_reference.best_class(mine, top), group) if o.statistics else None
    return shards_reference.merge_sums(top, total, best, a, o)


def send(mine: Tensor, group: Any) -> tuple[Tensor, Any]:
    """Starts to tell the other ranks of a part; for ``receive``, once ``wait()`` of the second returned."""
    if collectives.size_of(group) >= collectives.MANY_RANKS:
        return collectives.start_maximum(shards_reference.maxima(mine), group)
    return collectives.start_gather(mine, group)


def receive(mine: Tensor, arrived: Tensor, group: Any, a: RowArgs, o: RowOptions) -> Merged:
    """The rows' results, from this rank's part and what came of ``send``."""
    if collectives.size_of(group) >= collectives.MANY_RANKS:
        return _merge_sums(mine, arrived, group, a, o)
    return merge(arrived, a, o)


def fixed_results(statistics: bool, m: Merged) -> tuple[Tensor, ...]:
    """The results that have no gradient."""
    fixed = m.mass, m.target_weight, m.prediction, m.high, m.low
    return fixed if statistics else (*fixed, m.entropy, m.target_log_probability)


class CrossEntropyShardFunction(FusedFunction):
    """The results of ``Merged``, of which nll, lse, entropy and target_log_probability are differentiable."""

    @staticmethod
    def forward(
        input: Tensor,
        indices: Tensor | None,
        probabilities: Tensor | None,
        weight: Tensor | None,
        class_mask: Tensor | None,
        allowed: Tensor,
        group: Any,
        start: int,
        classes: int,
        inplace_backward: bool,
        *options: Any,
    ) -> Any:
        a = RowArgs(input, indices, probabilities, weight, class_mask)
        return tuple(_run(a, RowOptions(*options), Shard(group, start, classes, allowed)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.place = Shard(*inputs[6:9]).to_save()
        ctx.inplace_backward, ctx.options = inputs[9], RowOptions(*inputs[10:])
        ctx.mark_non_differentiable(*fixed_results(ctx.options.statistics, Merged(*output)))
        save(ctx, *inputs[:6], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g, o = row_grads(ctx.options.statistics, grads), ctx.options
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses to unpack them again
        a, merged = RowArgs(*saved[:5]), Merged(*saved[6:])
        shard = ctx.place.of_saved(saved[5])
        found: list[Tensor | None] = [None] * 15
        if all(grad is None for grad in g):
            return tuple(found)
        across = across_ranks(o, shard, merged.high)
        again = is_differentiated()
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3] or again:
            checked_saved(a, *g)
        if g.nll is not None and ctx.needs_input_grad[2]:
            found[2] = grad_probabilities(g, a, o, shard, across)
        if g.nll is not None and ctx.needs_input_grad[3]:
            found[3] = grad_weight(g, a, o, shard, across)
        if not ctx.needs_input_grad[0]:
            return tuple(found)
        if overwrites(ctx.inplace_backward):
            overwritten = a.input.detach()
            gradient_(g, a._replace(input=overwritten), o, shard, merged)
            increment_version(a.input)
            found[0] = overwritten
        elif again:
            found[0] = grad_input(g, a, o, shard, across)
        else:
            found[0] = gradient(g, a, o, shard, merged)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, _: None, probabilities_t: Any, weight_t: Any, *__: Any) -> Any:
        saved, o = checked_saved(ctx.saved_tensors, input_t, probabilities_t, weight_t), ctx.options
        a, merged, shard = RowArgs(*saved[:5]), Merged(*saved[6:]), ctx.place.of_saved(saved[5])
        across = across_ranks(o, shard, merged.high)
        if weight_t is not None:
            weight_t = _classes_here(across.copy(weight_t), a, shard.start)
        if probabilities_t is not None and a.indices is not None:
            probabilities_t = across.copy(probabilities_t)
        nll_t, lse_t, entropy_t, log_probability_t = rows_reference.jvp(
            _shared(a, shard), o, input_t, probabilities_t, weight_t, across
        )
        return nll_t, lse_t, None, None, entropy_t, None, log_probability_t, None, None


# ---- in graphs: the op finds out where its classes are

_BITS = _INPUT, _PROBABILITIES, _WEIGHT = 1, 2, 4  # the gradients that are needed, one bit each


def _options(ignore_index: int, numbers: Tensor | None, statistics: bool) -> RowOptions:
    smoothing, scale, softcap = (0.0, 1.0, 0.0) if numbers is None else numbers.tolist()
    return RowOptions(ignore_index, smoothing, scale, softcap, statistics)


def _in_graph(*args: Any) -> Any:
    a, o = RowArgs(*args[:5]), _options(*args[6:9])
    shard = Shard(collectives.group_of(args[9]), *args[5].tolist())
    check_place(a, shard)
    allowed = allowed_classes(a, o, shard)
    if a.class_mask is not None and a.class_mask.dim() > 1:
        allowed = allowed.expand(rows_shape(a.input)).clone()
    merged = _run(a, o, shard._replace(allowed=allowed))
    return *merged, allowed


def _fake_in_graph(input: Tensor, *args: Any) -> Any:
    rows, mask, statistics = rows_shape(input), args[3], args[7]
    wanted = rows if statistics else (0,)
    allowed = () if mask is None or mask.dim() == 1 else rows
    shapes = rows, rows, rows, rows, wanted, wanted, rows, rows, rows, allowed
    dtypes = [torch.int64 if i == 5 else wide_dtype(input) for i in range(len(shapes))]
    return tuple(input.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _graph_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index, numbers, ctx.statistics, ctx.group, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*fixed_results(ctx.statistics, Merged(*output[:9])), *output[9:])
    ctx.save_for_backward(*tensors, *output, numbers)


def _graph_backward(ctx: Any, *grads: Tensor | None) -> Any:
    need = ctx.needs_input_grad
    needs = need[0] * _INPUT + need[2] * _PROBABILITIES + need[3] * _WEIGHT
    g = row_grads(ctx.statistics, grads)
    if not needs or all(grad is None for grad in g):
        return (None,) * 11
    *saved, numbers = ctx.saved_tensors
    args = (*g, *saved, ctx.ignore_index, numbers, ctx.statistics, ctx.group, needs)
    # to be differentiated again, outside of what was compiled
    found = (_gradients if torch.is_grad_enabled() else _grad_op)(*args)
    wanted = [grad if needs & bit else None for grad, bit in zip(found, _BITS, strict=True)]
    return wanted[0], None, wanted[1], wanted[2], *(None,) * 7


def _gradients(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    g, a, merged, needs = RowGrads(*args[:4]), RowArgs(*args[4:9]), Merged(*args[10:19]), args[-1]
    o = _options(*args[20:23])
    shard = Shard(collectives.group_of(args[23]), *args[9].tolist())._replace(allowed=args[19])
    across = across_ranks(o, shard, merged.high)
    run = grad_input if torch.is_grad_enabled() else lambda g, a, o, shard, _: gradient(g, a, o, shard, merged)
    nll = g.nll is not None
    return (
        run(g, a, o, shard, across) if needs & _INPUT else None,
        grad_probabilities(g, a, o, shard, across) if nll and needs & _PROBABILITIES else None,
        grad_weight(g, a, o, shard, across) if nll and needs & _WEIGHT else None,
    )


def _made(
    args: tuple[Any, ...], found: Sequence[Tensor | None], make: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """The gradients; where there is none an empty tensor, or where it is needed what ``make`` makes like its tensor."""
    a, needs = RowArgs(*args[4:9]), args[-1]
    of: tuple[Any, ...] = a.input, a.probabilities, a.weight
    pairs = zip(found, of, _BITS, strict=True)
    return tuple(a.input.new_empty(0) if not needs & b else make(like) if t is None else t for t, like, b in pairs)


def _grad_in_graph(*args: Any) -> tuple[Tensor, ...]:
    return _made(args, _gradients(*args), torch.zeros_like)


def _fake_grad_in_graph(*args: Any) -> tuple[Tensor, ...]:
    return _made(args, (empty_output(args[4]) if args[-1] & _INPUT else None, None, None), torch.empty_like)


_graph_op: Any = register_graph_op(
    f"cross_entropy_shard(Tensor input, {TENSORS}, Tensor place, SymInt ignore_index, Tensor? numbers, "
    f"bool statistics, str group, int ranks) -> ({RESULTS}, Tensor high, Tensor low, Tensor allowed)",
    _in_graph,
    _fake_in_graph,
    _graph_context,
    _graph_backward,
)
_grad_op: Any = register_graph_op(
    f"cross_entropy_shard_grad({GRADS}, Tensor input, {TENSORS}, Tensor place, "
    f"{RESULTS}, Tensor high, Tensor low, Tensor allowed, "
    "SymInt ignore_index, Tensor? numbers, bool statistics, str group, int needs) "
    "-> (Tensor grad_input, Tensor grad_probabilities, Tensor grad_weight)",
    _grad_in_graph,
    _fake_grad_in_graph,
)


def find_place(input: Tensor, ranks: Ranks) -> Place:
    """Where this rank's classes are; asks the other ranks how many they have where it is not said."""
    _, start, classes, _ = ranks
    here, group = input.size(class_dim(input)), ranks.class_group
    before = collectives.rank_in(group)
    if in_graph():
        if start is not None and classes is not None:
            return as_tensor(start, classes).long()
        counts = collectives.gather(as_tensor(here).long().to(input.device), group).flatten().cpu()
        return torch.stack([counts[:before].sum(), counts.sum()])
    if start is None or classes is None:
        sizes = collectives.gather_sizes(here, group)
        start, classes = sum(sizes[:before]), sum(sizes)
    return Shard(group, start, classes)


def rows(a: RowArgs, o: RowOptions, place: Place, ranks: Ranks, inplace_backward: bool) -> tuple[Tensor, ...]:
    """The seven results of each row, over the classes of all ranks."""
    if isinstance(place, Tensor):
        numbers = o.label_smoothing, o.logit_scale, o.softcap
        packed = None if numbers == (0.0, 1.0, 0.0) else as_tensor(*numbers)
        where = collectives.name_of(ranks.class_group), collectives.size_of(ranks.class_group)
        found: tuple[Tensor, ...] = _graph_op(*a, place, o.ignore_index, packed, o.statistics, *where)
        return found[:7]
    check_place(a, place)
    allowed = allowed_classes(a, o, place)
    found = CrossEntropyShardFunction.apply(*a, allowed, *place[:3], inplace_backward, *o)
    return found[:7]


# ---- the mean's denominator over the rows of all ranks


def _checked_sum(input: Tensor, bad_target: Tensor, groups: list[str], ranks: list[int]) -> Tensor:
    # All ranks of all groups must have heard of a bad target before one of them raises.
    for name in groups:
        found = collectives.gather(torch.stack([input, bad_target]), collectives.group_of(name))
        input, bad_target = found[:, 0].sum(), shards_reference.one_of(found[:, 1])
    shards_reference.raise_for_bad_targets(bad_target)
    return input


def _fake_checked_sum(input: Tensor, bad_target: Tensor, groups: list[str], ranks: list[int]) -> Tensor:
    return input.new_empty(())


def _sum_over(values: Tensor, groups: list[str]) -> Tensor:
    for name in groups:
        values = collectives.sum_of_ranks(values, collectives.group_of(name))
    return values


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.groups = inputs[2]


def _sum_backward(ctx: Any, grad: Tensor) -> Any:
    return _sum_over(grad, ctx.groups), None, None, None


class _CheckedSumFunction(FusedFunction):
    forward = staticmethod(_checked_sum)
    setup_context = staticmethod(_sum_context)
    backward = staticmethod(_sum_backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return _sum_over(tangent, ctx.groups)


_checked_sum_op: Any = register_graph_op(
    "cross_entropy_rows_of_ranks(Tensor input, Tensor bad_target, str[] groups, int[] ranks) -> Tensor",
    _checked_sum,
    _fake_checked_sum,
    _sum_context,
    _sum_backward,
)


def sum_over_rows(values: Tensor, a: RowArgs, o: RowOptions, group: Any, place: Place | None) -> Tensor:
    """The sum of a scalar of each rank, for losses that add up; raises on all ranks for a bad target of one.

    Args:
        values: The scalar, wide.
        a: This rank's targets.
        o: The options.
        group: The ranks, or several groups: the sum of their sums, as over dimensions of a mesh.
        place: Of this rank's classes; None: all of them are here.
    """
    classes: int | Tensor = a.input.size(class_dim(a.input))
    if place is not None:
        classes = place[1].to(a.input.device) if isinstance(place, Tensor) else place.classes
    bad = shards_reference.one_of(shards_reference.bad_targets(a, o, classes).flatten())
    groups = group if isinstance(group, tuple) else (group,)
    where = [collectives.name_of(g) for g in groups], [collectives.size_of(g) for g in groups]
    total: Tensor = (_checked_sum_op if in_graph() else _CheckedSumFunction.apply)(values, bad, *where)
    return total


def check_ranks(ranks: Ranks, op: str = "cross_entropy") -> Ranks:
    """The groups of a call with integers; raises for arguments that are wrong or cannot work, without a collective."""
    collectives.check_group(op, "class_group", ranks.class_group)
    for group in ranks.row_group if isinstance(ranks.row_group, tuple) else (ranks.row_group,):
        collectives.check_group(op, "row_group", group)
    given = [name for name, value in zip(("class_start", "classes"), ranks[1:3], strict=True) if value is not None]
    if given and (len(given) == 1 or ranks.class_group is None):
        raise ValueError(
            f"{op}: expected class_group, class_start and classes together, got only {' and '.join(given)}"
        )
    if needs_formulas():
        raise NotImplementedError(
            f"{op}: class_group and row_group are for eager mode, for torch.func with one level of forward-mode AD at "
            "most, and for torch.compile; not for torch.jit.trace, nor for torch.func inside of torch.compile"
        )
    if not given:
        return ranks
    start, classes = (
        as_integer(op, name, value) for name, value in zip(("class_start", "classes"), ranks[1:3], strict=True)
    )
    return ranks._replace(class_start=start, classes=classes)

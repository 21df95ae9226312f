"""Cross-entropy of classes that are spread over ranks, in plain PyTorch: a rank's part of each row, and their merge.

Rank k has lse_k, the log-sum-exp of the logits that it holds, in a high and a low part, and what the coefficients q of
those classes add. With lse over all ranks and ``behind_k = lse - lse_k``, which is no difference of large numbers but
``log1p(sum_{j != k} exp(lse_j - lse_k))``::

    nll     = sum_k [sum_{j in k} q_j (lse_k - u_j) + (sum_{j in k} q_j) behind_k]
    log p_t = log p_t,k - behind_k, of the rank k that has the target
    entropy = sum_k exp(-behind_k) (entropy_k + behind_k)

Nothing cancels, as the terms of a sum have one sign. The gradient of a rank's logits needs no more than the merged
results. See docs/cross_entropy.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Scratch, acc_dtype, empty_output, pieces, wide, wide_dtype, wide_sum
from fused_ops.core.torch_private import assert_async
from fused_ops.ops.cross_entropy.reference import class_dim, counts
from fused_ops.ops.cross_entropy.row import (
    Across,
    Row,
    RowArgs,
    RowOptions,
    counted_rows,
    rows_shape,
)
from fused_ops.ops.cross_entropy.rows_reference import RowGrads, grad_input, over_logits, piece_of


class Part(NamedTuple):
    """What a rank has of each row, in the order in which ranks exchange it: wide, one value per row each."""

    high: Tensor  # the maximum of u; -inf where no class is left
    low: Tensor  # lse of the classes here is high + low; NaN beside NaN and +inf, 0 where no class is left
    nll: Tensor  # sum of q_j (lse - u_j) of the classes here, without a class index' own
    mass: Tensor  # sum of q_j likewise
    target_weight: Tensor  # of the indices that are here
    target_log_probability: Tensor  # relative to the classes here; 1 where the target is not
    bad_target: Tensor  # a target that is no class of any rank, else NaN
    entropy: Tensor  # of the softmax over the classes here; this and the next only with statistics
    prediction: Tensor  # class of the maximum; +inf where there is none. With a NaN high is NaN, and this its class


PARTS = len(Part._fields)
_ALWAYS = PARTS - 2


def parts(o: RowOptions) -> int:
    """How many values of each row ranks exchange."""
    return PARTS if o.statistics else _ALWAYS


class Merged(NamedTuple):
    """The results of each row, wide but for the prediction: those of the rows' op, and lse in two parts."""

    nll: Tensor
    lse: Tensor
    mass: Tensor
    target_weight: Tensor
    entropy: Tensor  # empty without statistics, like the next
    prediction: Tensor
    target_log_probability: Tensor
    high: Tensor
    low: Tensor


def _lse_of_part(u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """lse in two parts; (0, 0) where no class is left, so that log p is u there."""
    if u.size(dim) == 0:
        zero = u.new_zeros((*u.shape[:dim], *u.shape[dim + 1 :]))
        return zero, zero
    top = u.amax(dim)
    gone = top == -math.inf
    top = torch.where(gone, 0.0, top)
    others = (u - top.unsqueeze(dim)).exp().scatter(dim, u.argmax(dim, keepdim=True), 0.0)
    low = wide_sum(others, dim).log1p() + (top - top)  # NaN beside NaN and +inf
    return top, torch.where(gone, 0.0, low)


def bad_targets(a: RowArgs, o: RowOptions, classes: int | Tensor) -> Tensor:
    """A target of each row that is no class, wide; NaN where there is none."""
    none = torch.full((), math.nan, dtype=wide_dtype(a.input), device=a.input.device)
    if a.indices is None:
        return none.expand(rows_shape(a.input))
    index, dim = a.indices.long(), class_dim(a.input)  # a narrow dtype would wrap the number of classes
    bad = counts(a.indices, o.ignore_index) & ((index < 0) | (index >= classes))
    values = torch.where(bad, wide(index), none)
    if a.probabilities is None:
        return values
    if not values.size(dim):
        return none.expand(rows_shape(a.input))
    return values.gather(dim, bad.byte().argmax(dim, keepdim=True)).squeeze(dim)


def forward(
    input: Tensor,
    indices: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    class_mask: Tensor | None,
    allowed: Tensor,
    first: int,
    classes: int,
    *options: float,
) -> Tensor:
    """A rank's part of each row, (parts, *rows). Input, weight and class_mask hold the classes from ``first`` on."""
    a, o = RowArgs(input, indices, probabilities, weight, class_mask), RowOptions(*options)  # type: ignore[arg-type]
    found = wide(input.new_empty(0)).new_empty((parts(o), *rows_shape(input)))
    for piece in pieces(input):
        each = allowed[piece.row] if allowed.dim() else allowed
        row = Row(piece_of(a, piece), o, acc_dtype(input.dtype), across=Across(first, each, _lse_of_part))
        here = (slice(None), *piece.row)
        found[here] = _part(row, first, classes)
    return found


def _part(row: Row, first: int, classes: int) -> Tensor:
    a, o, dim = row.a, row.o, row.dim
    n, one = row.u.size(dim), a.indices is not None and a.probabilities is None
    zero = wide(row.u.new_zeros(rows_shape(a.input)))
    target_weight, log_probability = zero, zero + 1
    if a.indices is not None:
        target_weight = row.target_weight()
    if one:
        log_probability = torch.where(row.here[0], wide(row.at_indices(row.log_p)), 1.0)
        nll = mass = zero
        if o.label_smoothing != 0:
            nll = torch.where(row.valid, -row.smoothed(row.log_p_allowed, a.weight), 0.0)
            mass = torch.where(row.valid, row.mass_of_smoothing(), 0.0)
    else:
        nll, mass = -row.dot(row.log_p, a.probabilities, a.weight), row.sum_of_q()
    gone = torch.ones_like(row.valid).expand_as(zero) if n == 0 else row.u.amax(dim) == -math.inf
    high = torch.where(gone, -math.inf, row.high)
    found = [high, row.low, nll, mass, target_weight, log_probability, bad_targets(a, o, classes)]
    if o.statistics:
        p, log_p = row.neg_entropy_terms()
        best = row.u.argmax(dim) + first if n else torch.full_like(zero, math.inf)
        found += [torch.where(gone, 0.0, -row.sum(p * log_p)), best]
    return torch.stack([wide(part).expand_as(zero) for part in found])


def one_of(bad: Tensor) -> Tensor:
    """A scalar: one of some targets that are no class, (targets,); NaN where there is none."""
    none = bad.new_full((1,), -math.inf)
    found = torch.cat([none, torch.where(bad.isnan(), none, bad)]).amax()
    return torch.where(found == -math.inf, math.nan, found)


def raise_for_bad_targets(bad: Tensor) -> None:
    """Raises IndexError for what is not NaN."""
    ok = bad.isnan()
    if bad.device.type == "cpu":
        if not bool(ok.all()):
            raise IndexError(f"Target {int(bad[~ok][0])} is out of bounds.")
    elif bad.device.type != "meta":
        assert_async(ok.all(), "cross_entropy: a target is out of bounds")


def merge(gathered: Tensor, a: RowArgs, o: RowOptions) -> Merged:
    """The results of each row, from the parts of all ranks, (ranks, parts, *rows).

    The same on every rank, bit for bit.

    Raises:
        IndexError: a target of some rank is no class (on a GPU an error of the device).
    """
    part = _named(gathered.unbind(1))
    raise_for_bad_targets(part.bad_target)
    spread = a.indices is None or o.label_smoothing != 0
    most = (part.high + part.low).argmax(0, keepdim=True)
    high, low = part.high.gather(0, most), part.low.gather(0, most)
    below = (high - part.high) + (low - part.low)  # the largest shard's lse over each
    rest = (-below).exp().scatter(0, most, 0.0).sum(0)
    rest = torch.where((high[0] - high[0]).isnan(), math.nan, rest)  # +inf, and no class left anywhere
    more = rest.log1p()
    behind = more + below
    gone = part.high == -math.inf
    without = gone if spread else gone | (part.mass == 0)
    nll = (part.nll + torch.where(without, 0.0, part.mass * behind)).sum(0)
    mine = torch.where(gone, -math.inf, part.target_log_probability - behind)
    log_probability = torch.where(part.target_log_probability > 0, 0.0, mine).sum(0)
    entropy = prediction = None
    if o.statistics:
        share = (-behind).exp()
        entropy = torch.where(share == 0, 0.0, share * (part.entropy + behind)).sum(0)
        best = part.high.amax(0)
        is_best = (part.high == best) | (part.high.isnan() & best.isnan())
        prediction = torch.where(is_best, part.prediction, math.inf).amin(0)
    sums = nll, part.mass.sum(0), part.target_weight.sum(0), log_probability
    return _finished(sums, high[0], low[0] + more, entropy, prediction, a, o)


def _named(parts: Sequence[Tensor]) -> Part:
    missing = (parts[0],) * (PARTS - len(parts))  # which nobody reads
    return Part(*parts, *missing)


def _finished(
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    high: Tensor,
    low: Tensor,
    entropy: Tensor | None,
    prediction: Tensor | None,
    a: RowArgs,
    o: RowOptions,
) -> Merged:
    """The results from what is known of all classes of a row: lse in two parts, and the other fields of ``Part``."""
    nll, mass, target_weight, log_probability = sums
    valid, lse = counted_rows(a, o.ignore_index), high + low
    if a.indices is None or o.label_smoothing != 0:
        nll = torch.where(lse.isnan(), math.nan, nll)
    else:
        nll = torch.where(lse.isnan() & (nll != 0), math.nan, nll)
    if a.indices is None:
        target_weight = wide(valid)
    if a.indices is not None and a.probabilities is None:
        log_probability = torch.where(lse.isnan(), math.nan, log_probability)
        nll = nll - (1 - o.label_smoothing) * target_weight * log_probability
    else:
        log_probability = torch.zeros_like(nll)
    nll, mass, target_weight, log_probability = (
        torch.where(valid, values, 0.0) for values in (nll, mass, target_weight, log_probability)
    )
    if entropy is None or prediction is None:
        none, index = nll.new_empty(0), torch.empty(0, dtype=torch.int64, device=nll.device)
        lse, high, low = (torch.where(valid, values, 0.0) for values in (lse, high, low))
        return Merged(nll, lse, mass, target_weight, none, index, log_probability, high, low)
    prediction = torch.where(prediction == math.inf, 0.0, prediction).long()
    return Merged(nll, lse, mass, target_weight, entropy, prediction, log_probability, high, low)


# ---- the same of many ranks: from maxima and sums over them, and not from the parts of each


def maxima(part: Tensor) -> Tensor:
    """Of a rank's part that of which the largest of all ranks is wanted, (3, *rows).

    The maximum (+inf for NaN), a target that is no class (-inf for none), and whether there is a NaN.
    """
    p = _named(part.unbind(0))
    nan = p.high.isnan()
    bad = torch.where(p.bad_target.isnan(), -math.inf, p.bad_target)
    return torch.stack([torch.where(nan, math.inf, p.high), bad, nan.to(p.high.dtype)])


def best_class(part: Tensor, top: Tensor) -> Tensor:
    """Minus the class of the maximum over all ranks, ``top``, if it is here; the largest of all ranks is wanted."""
    p = _named(part.unbind(0))
    is_best = torch.where(top[2] > 0, p.high.isnan(), p.high == top[0])
    return torch.where(is_best, -p.prediction, -math.inf)


def summands(part: Tensor, top: Tensor, a: RowArgs, o: RowOptions) -> Tensor:
    """Of a rank's part that of which the sum over all ranks is wanted, (9, *rows).

    With H the maximum over all ranks and ``over = lse_k - H``: exp(over), less 1 if H is of this rank, which would hide
    the rest; whether it is; exp(over) if the target is not of this rank, log p_t,k and ``over`` if it is; nll as if H
    were lse; mass; the target's weight; and exp(over) (entropy_k - over).
    """
    p = _named(part.unbind(0))
    over, is_top = (p.high - top[0]) + p.low, p.high == top[0]
    size = over.exp()
    has_target = torch.zeros_like(is_top)
    if a.indices is not None and a.probabilities is None:
        has_target = counted_rows(a, o.ignore_index) & ~(p.target_log_probability > 0)
    gone = p.high == -math.inf
    log_probability = torch.where(gone, -math.inf, p.target_log_probability)
    of_target = (torch.where(has_target, values, 0.0) for values in (log_probability, over))
    nll = p.nll - torch.where(gone | (p.mass == 0), 0.0, p.mass * over)
    entropy = torch.where(size == 0, 0.0, size * (p.entropy - over)) if o.statistics else torch.zeros_like(size)
    excess, others = torch.where(is_top, over.expm1(), size), torch.where(has_target, 0.0, size)
    return torch.stack([excess, wide(is_top), others, *of_target, nll, p.mass, p.target_weight, entropy])


def merge_sums(top: Tensor, total: Tensor, best: Tensor | None, a: RowArgs, o: RowOptions) -> Merged:
    """The results of each row, as ``merge`` finds them, from the ranks' maxima and sums.

    Args:
        top: The largest of ``maxima``.
        total: The sum of ``summands``.
        best: The largest of ``best_class``, with statistics.
        a: The target, as for ``merge``.
        o: The options.

    Raises:
        IndexError: as ``merge``.
    """
    raise_for_bad_targets(torch.where(top[1] == -math.inf, math.nan, top[1]))
    excess, tops, others, log_probability, over, nll, mass, target_weight, entropy = total
    excess = excess + (tops - 1)
    low = excess.log1p()
    own = over.exp()  # of the target's rank: which of the two differs from lse_t more is no difference of large numbers
    log_probability = log_probability - torch.where(others <= own, (others / own).log1p(), low - over)
    nll = nll + torch.where(mass == 0, 0.0, mass * low)
    prediction = None
    if best is not None:
        entropy, prediction = entropy / (1 + excess) + low, -best
    sums = nll, mass, target_weight, log_probability
    return _finished(sums, top[0], low, None if best is None else entropy, prediction, a, o)


def backward(
    grad_nll: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_target_log_probability: Tensor | None,
    input: Tensor,
    indices: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    class_mask: Tensor | None,
    allowed: Tensor,
    high: Tensor,
    low: Tensor,
    mass: Tensor,
    target_weight: Tensor,
    entropy: Tensor | None,
    target_log_probability: Tensor,
    first: int,
    classes: int,
    *options: float,
) -> Tensor:
    """The gradient with respect to a rank's logits, in their dtype, from the merged results."""
    a = RowArgs(input, indices, probabilities, weight, class_mask)
    o = RowOptions(*options)  # type: ignore[arg-type]
    g = RowGrads(grad_nll, grad_lse, grad_entropy, grad_target_log_probability)
    if indices is not None and probabilities is None:
        mass = mass + (1 - o.label_smoothing) * target_weight
    grad, scratch = empty_output(input), Scratch()
    for piece in pieces(input):
        g_piece = RowGrads(*(piece.of(t, input) for t in g))
        top, rest, each, total, known = (
            t if t is None or not t.dim() else t[piece.row] for t in (high, low, allowed, mass, entropy)
        )
        assert top is not None and rest is not None and each is not None
        across = Across(first, each, _found(top, rest), mass=total, entropy=known)
        found = grad_input(g_piece, piece_of(a, piece), o, acc_dtype(input.dtype), across, scratch)
        grad[piece.all] = found
    return grad


def _found(high: Tensor, low: Tensor) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """What a formula asks for lse with, where it is known."""
    return lambda u, dim: (high, low)


backward_ = over_logits(backward)

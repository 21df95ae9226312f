"""Cross-entropy's options in plain PyTorch, row by row: the reference of the kernels, and every higher derivative.

For one row of logits x with u = softcap * tanh(logit_scale * x / softcap), its target distribution t over the allowed
classes (a class index is a t of one 1) and class weights w::

    q_j  = w_j * ((1 - label_smoothing) * t_j + label_smoothing / allowed)
    lse  = log sum_j exp(u_j)      p_j = exp(u_j - lse)      entropy = lse - sum_j p_j u_j
    nll  = sum_j q_j (lse - u_j)

and for upstream gradients g of nll, l of lse, h of entropy and r of the target's log-probability u_t - lse::

    grad_u_j = p_j * (g * sum_k q_k + l - r - h * (log p_j + entropy)) - g * q_j + r * [j == t]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Piece, Scratch, acc_dtype, empty_output, pieces, wide, wide_dtype, wide_sum
from fused_ops.ops.cross_entropy.reference import class_dim, counts, less_one_, log_sum_exp


class RowOptions(NamedTuple):
    """The numbers behind the tensors of a raw op's arguments, in their order."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    statistics: bool = False  # lse of ignored rows too; entropy, prediction and target log-probability


class RowArgs(NamedTuple):
    """The tensors that say what the loss of each row is."""

    input: Tensor
    indices: Tensor | None  # class indices, one a row; with probabilities several, in the dimension of the classes
    probabilities: Tensor | None  # of the indices, or of all classes
    weight: Tensor | None
    class_mask: Tensor | None  # (classes,) or of the input's shape


def _same(values: Tensor) -> Tensor:
    return values


class Across(NamedTuple):
    """What a row's formulas need to know where its classes are spread over ranks; input and weight hold those here."""

    first: int  # class here
    allowed: Tensor  # how many classes smoothing is spread over, a scalar or one value per row
    normalise: Callable[[Tensor, int], tuple[Tensor, Tensor]]  # of u and its dimension: lse's high and low part
    total: Callable[[Tensor], Tensor] = _same  # the sum over ranks of what each has of a row
    copy: Callable[[Tensor], Tensor] = _same  # what is alike on all ranks, where a rank goes on to its own part
    mass: Tensor | None = None  # the sum of q, where it is known
    entropy: Tensor | None = None  # likewise


def rows_shape(input: Tensor) -> tuple[int, ...]:
    """The shape of one value per row."""
    dim = class_dim(input)
    return (*input.shape[:dim], *input.shape[dim + 1 :])


def is_index_alone(a: RowArgs, o: RowOptions) -> bool:
    """Whether the rows are class indices with no option."""
    tensors = a.indices is not None and a.probabilities is None and a.weight is None and a.class_mask is None
    return tensors and o[1:] == (0.0, 1.0, 0.0, False)


def along_classes(values: Tensor, input: Tensor) -> Tensor:
    """(classes,) values, broadcastable to the input; what has the input's shape stays."""
    if input.dim() < 2 or values.dim() > 1:
        return values
    return values.reshape(-1, *(1,) * (input.dim() - 2))


def counted_rows(a: RowArgs, ignore_index: int) -> Tensor:
    """Which rows have a target that is not ignored."""
    dim = class_dim(a.input)
    if a.indices is None:
        return torch.ones((), dtype=torch.bool, device=a.input.device).expand(rows_shape(a.input))
    valid = counts(a.indices, ignore_index)
    return valid if a.probabilities is None else valid.any(dim)


class _Row:
    """What every formula starts from: u and its slope, p, log p and sums over q.

    Differentiable in all the floating-point tensors, but with ``scratch``: then results are in its memory.
    """

    def __init__(
        self,
        a: RowArgs,
        o: RowOptions,
        dtype: torch.dtype,
        quiet: Tensor | None = None,
        across: Across | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.a, self.o, self.dim, self.across, self.scratch = a, o, class_dim(a.input), across, scratch
        u = a.input.to(dtype) if scratch is None else scratch.copy("u", a.input, dtype)
        if quiet is not None and not (scratch is not None and u.is_cpu and not quiet.any()):
            u = torch.where(quiet.unsqueeze(self.dim), 0.0, u)  # rows whose gradient is zero whatever they hold
        self.slope: Tensor | float = o.logit_scale
        if not (type(o.logit_scale) is float and o.logit_scale == 1):
            u = u * o.logit_scale
        if o.softcap != 0:
            t = torch.tanh(u / o.softcap)
            u, self.slope = o.softcap * t, o.logit_scale * (1 - t * t)
        self.allowed = None if a.class_mask is None else along_classes(a.class_mask, a.input).expand_as(u)
        self.u = u if self.allowed is None else torch.where(self.allowed, u, -math.inf)
        self.high = self.low = u.new_empty(0)
        if across is not None:
            found = (part.to(dtype) for part in across.normalise(self.u, self.dim))
            self.high, self.low = (t if quiet is None else torch.where(quiet, 0.0, t) for t in found)
        self.valid = counted_rows(a, o.ignore_index)

    @functools.cached_property
    def log_p(self) -> Tensor:
        """The logarithm of the softmax."""
        if self.across is not None:
            return (self.u - self.high.unsqueeze(self.dim)) - self.copy(self.low).unsqueeze(self.dim)
        if self.scratch is None:
            return self.u.log_softmax(self.dim)
        return torch.log_softmax(self.u, self.dim, out=self.scratch.like("log_p", self.u))

    @functools.cached_property
    def log_p_allowed(self) -> Tensor:
        """log p where it is a factor: a masked class, whose log p is -inf for good, has the derivative 0."""
        return self.log_p if self.allowed is None else torch.where(self.allowed, self.log_p, 0.0)

    def p(self) -> Tensor:
        """The softmax."""
        if self.across is not None:
            return self.log_p.exp()
        if self.scratch is None:
            return self.u.softmax(self.dim)
        return torch.softmax(self.u, self.dim, out=self.scratch.like("p", self.u))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each row's values over all classes, wide."""
        return self.total(wide_sum(values, self.dim))

    def total(self, rows: Tensor) -> Tensor:
        """The sum over ranks of what each has of a row."""
        return rows if self.across is None else self.across.total(rows)

    def copy(self, values: Tensor) -> Tensor:
        """What all ranks have alike, to go on to what each has of a row."""
        return values if self.across is None else self.across.copy(values)

    def along(self, rows: Tensor) -> Tensor:
        """One value per row in the dtype of the computation, to be broadcast along the classes."""
        return rows.to(self.u.dtype).unsqueeze(self.dim)

    # ---- the target's indices

    @functools.cached_property
    def here(self) -> tuple[Tensor, Tensor]:
        """Which of the indices are of classes that are here, and the indices among those, 0 for the others."""
        indices = self.a.indices
        assert indices is not None
        valid = counts(indices, self.o.ignore_index)
        if self.across is not None:
            indices = indices.long() - self.across.first
            valid = valid & (indices >= 0) & (indices < self.u.size(self.dim))
        return valid, torch.where(valid, indices, 0).long()

    def at_indices(self, values: Tensor) -> Tensor:
        """The values of the indices' classes, of the indices' shape; 0 where ignored or not here."""
        here, safe = self.here
        if values.size(self.dim) == 0:
            return torch.zeros_like(safe, dtype=values.dtype)
        one = self.a.probabilities is None
        found = values.gather(self.dim, safe.unsqueeze(self.dim) if one else safe)
        return torch.where(here, found.squeeze(self.dim) if one else found, 0.0)

    def shares(self, probabilities: Tensor | None, weight: Tensor | None) -> Tensor:
        """t_j w_j of the indices, of their shape; 0 where ignored or not here."""
        here, safe = self.here
        found = torch.ones_like(here, dtype=self.u.dtype) if probabilities is None else probabilities.to(self.u.dtype)
        if weight is not None and weight.numel():
            found = found * weight.to(found.dtype)[safe]
        return torch.where(here, found, 0.0)

    def scatter_add(self, to: Tensor, values: Tensor) -> Tensor:
        """Adds what is of the indices, with 0 for those that are not here, to the values of their classes."""
        if to.size(self.dim) == 0:
            return to
        safe = self.here[1]
        if self.a.probabilities is None:
            safe, values = safe.unsqueeze(self.dim), values.unsqueeze(self.dim)
        values = values.to(to.dtype)
        return (
            to.scatter_add(self.dim, safe, values) if self.scratch is None else to.scatter_add_(self.dim, safe, values)
        )

    def with_expm1(self, p: Tensor) -> Tensor:
        """p, less 1 for each row's class index, if that is here, of which all but nothing may be left."""
        here, safe = self.here
        if p.size(self.dim) == 0:
            return p
        safe = safe.unsqueeze(self.dim)
        less = torch.where(
            here.unsqueeze(self.dim), self.log_p.gather(self.dim, safe).expm1(), p.gather(self.dim, safe)
        )
        return p.scatter(self.dim, safe, less)

    def on_target(self, values: Tensor, probabilities: Tensor | None, weight: Tensor | None) -> Tensor:
        """sum_j t_j w_j values_j over the indices, wide; a share of 0 among several adds nothing."""
        shares, values = self.shares(probabilities, weight), self.at_indices(values)
        if self.a.probabilities is None:
            return self.total(wide(shares) * wide(values))
        off = shares == 0  # inside too: the derivative of 0 * inf is no 0 that the outer choice would leave out
        return self.sum(torch.where(off, 0.0, shares * torch.where(off, 0.0, values)))

    # ---- q

    def smoothing(self) -> Tensor:
        """Smoothing's mass of each class that is allowed, wide: a scalar, or one value per row."""
        if self.across is not None:
            count = wide(self.across.allowed)
        elif self.a.class_mask is None:
            count = wide(self.valid.new_full((), self.u.size(self.dim), dtype=torch.int64))
        else:
            mask = self.a.class_mask
            count = wide(mask.sum() if mask.dim() == 1 else mask.sum(self.dim))
        return self.o.label_smoothing / count.clamp(min=1)

    def weighted(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """The values times the class weights."""
        return values if weight is None else values * along_classes(weight.to(values.dtype), self.a.input)

    def smoothed(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """The smoothing's part of sum_j q_j values_j, wide. The values of masked classes are 0."""
        return self.smoothing() * self.sum(self.weighted(values, weight))

    def mass_of_smoothing(self) -> Tensor:
        """The smoothing's part of the sum of q, wide: a scalar, or one value per row."""
        mask, weight = self.a.class_mask, self.a.weight
        each = self.u.new_ones(self.u.size(self.dim)) if weight is None else weight.to(self.u.dtype)
        if mask is not None and mask.dim() > 1:
            return self.smoothing() * self.sum(along_classes(each, self.a.input) * mask)
        return self.smoothing() * self.total(wide_sum(each if mask is None else each * mask, 0))

    def q(self, probabilities: Tensor | None, weight: Tensor | None, share: bool = True) -> Tensor:
        """q on all classes; without smoothing's share of it for the tangents of the probabilities."""
        valid = self.valid.unsqueeze(self.dim)
        if self.a.indices is None:
            assert probabilities is not None
            dense = probabilities.to(self.u.dtype)
        else:
            dense = torch.zeros_like(self.u)
            dense = self.scatter_add(dense, self.shares(probabilities, None))
        if self.o.label_smoothing != 0:
            dense = dense * (1 - self.o.label_smoothing)
            if share:
                spread = self.smoothing()
                spread = self.along(spread) if spread.dim() else spread.to(dense.dtype)
                dense = dense + (spread if self.allowed is None else spread * self.allowed)
        dense = self.weighted(dense, weight)
        return dense if self.a.indices is None else torch.where(valid, dense, 0.0)

    def dot(self, values: Tensor, probabilities: Tensor | None, weight: Tensor | None, share: bool = True) -> Tensor:
        """sum_j q_j values_j, wide; a class that is off the target for good (masked, or no index) adds nothing."""
        if self.a.indices is None:
            q = self.q(probabilities, weight, share)
            if self.allowed is None:
                return self.sum(q * values)
            off = (q == 0) & ~self.allowed
            return self.sum(torch.where(off, 0.0, q * torch.where(off, 0.0, values)))
        found = (1 - self.o.label_smoothing) * self.on_target(values, probabilities, weight)
        if share and self.o.label_smoothing != 0:
            values = values if self.allowed is None else torch.where(self.allowed, values, 0.0)
            found = found + self.smoothed(values, weight)
        return torch.where(self.valid, found, 0.0)

    def mass(self) -> Tensor | None:
        """The sum of q, wide, to go on to what each rank has of a row; None where it is 1 for certain."""
        a, known = self.a, None if self.across is None else self.across.mass
        if a.indices is not None and a.probabilities is None and a.weight is None:
            return None
        return self.copy(self.sum_of_q()) if known is None else known

    def sum_of_q(self) -> Tensor:
        """The sum of q, wide; 0 in ignored rows."""
        if self.a.indices is None:
            return self.sum(self.q(self.a.probabilities, self.a.weight))
        found = (1 - self.o.label_smoothing) * self.target_weight()
        found = found if self.o.label_smoothing == 0 else found + self.mass_of_smoothing()
        return torch.where(self.valid, found, 0.0)

    def target_weight(self) -> Tensor:
        """The sum of t_j w_j over the indices, wide; 0 in ignored rows."""
        shares = self.shares(self.a.probabilities, self.a.weight)
        return self.total(wide(shares)) if self.a.probabilities is None else self.sum(shares)

    def smoothed_target(self, p: Tensor, sum: Tensor) -> Tensor:
        """Of each row's class index, wide: p times the sum of q, less q times ``sum``, from differences that are 0 in
        one class alone."""
        weight, at = wide(self.shares(None, self.a.weight)), wide(self.at_indices(p))
        spread = self.smoothing() * weight
        return (1 - self.o.label_smoothing) * weight * (at - sum) + (at * self.mass_of_smoothing() - spread * sum)

    def entropy(self, p: Tensor, log_p: Tensor) -> Tensor:
        """The entropy, to be broadcast along the classes, of ``neg_entropy_terms``."""
        known = None if self.across is None else self.across.entropy
        return self.along(self.copy(-self.sum(p * log_p)) if known is None else known)

    def neg_entropy_terms(self) -> tuple[Tensor, Tensor]:
        """p and log p, with 0 for the logarithm of 0."""
        return self.log_p.exp(), torch.where(self.log_p == -math.inf, 0.0, self.log_p)


def _check_range(a: RowArgs, ignore_index: int) -> None:
    if a.indices is None or a.indices.device.type != "cpu":
        return
    wide = a.indices.long()  # a narrow dtype would wrap the number of classes
    outside = counts(a.indices, ignore_index) & ((wide < 0) | (wide >= a.input.size(class_dim(a.input))))
    if bool(outside.any()):
        raise IndexError(f"Target {a.indices[outside].flatten()[0].item()} is out of bounds.")


def forward(
    input: Tensor,
    indices: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    class_mask: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, mass, the target's weight, entropy, prediction and target log-probability of each row.

    The mass is the sum of q, without a class index' own (1 - label_smoothing) * weight.
    """
    a, o = RowArgs(input, indices, probabilities, weight, class_mask), RowOptions(*options)  # type: ignore[arg-type]
    _check_range(a, o.ignore_index)
    found: tuple[Tensor, ...] = ()
    scratch = Scratch()
    for piece in (cut := pieces(input)):
        results = _results(_Row(_piece_of(a, piece), o, acc_dtype(input.dtype), scratch=scratch))
        if len(cut) == 1:
            return results
        found = found or tuple(r.new_empty(rows_shape(input) if r.numel() else (0,)) for r in results)
        for whole, part in zip(found, results, strict=True):
            if part.numel():
                whole[piece.row] = part
    return found  # type: ignore[return-value]


def _piece_of(a: RowArgs, piece: Piece) -> RowArgs:
    mask = a.class_mask if a.class_mask is None or a.class_mask.dim() == 1 else piece.of(a.class_mask, a.input)
    indices, probabilities = (piece.of(t, a.input) for t in (a.indices, a.probabilities))
    return RowArgs(a.input[piece.all], indices, probabilities, a.weight, mask)


def formulas(a: RowArgs, o: RowOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``forward`` as a differentiable function of every floating-point tensor, any number of times, in both modes."""
    quiet = None if o.statistics else ~counted_rows(a, o.ignore_index)
    return _results(_Row(a, o, acc_dtype(a.input.dtype), quiet))


def _results(row: _Row) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, o, dim = row.a, row.o, row.dim
    input, indices, probabilities, weight, _ = a
    count = wide(row.valid)
    lse = log_sum_exp(row.u, row.log_p, dim, row.scratch is None) if input.size(dim) else count * 0
    nll = -row.dot(row.log_p, probabilities, weight)
    log_probability = torch.zeros_like(nll)
    if indices is None:
        target_weight, mass = count, row.sum_of_q()
    else:
        target_weight, mass = row.target_weight(), row.sum_of_q()
        if probabilities is None:
            log_probability = row.total(wide(row.at_indices(row.log_p)))
            mass = torch.zeros_like(nll)
            if o.label_smoothing != 0:
                mass = torch.where(row.valid, row.mass_of_smoothing(), 0.0)
    empty, no_index = count.new_empty(0), input.new_empty(0, dtype=torch.int64)
    if not o.statistics:
        return nll, torch.where(row.valid, lse, 0.0), mass, target_weight, empty, no_index, empty.clone()
    p, log_p = row.neg_entropy_terms()
    prediction = row.u.argmax(dim) if input.size(dim) else torch.zeros_like(nll, dtype=torch.int64)
    return nll, lse, mass, target_weight, -row.sum(p * log_p), prediction, log_probability


class RowGrads(NamedTuple):
    """Upstream gradients, one value per row each; None is zero."""

    nll: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    target_log_probability: Tensor | None


def _quiet(g: RowGrads, valid: Tensor, statistics: bool) -> Tensor:
    """Rows that are ignored and that nobody asks anything of."""
    quiet = ~valid
    for grad in (g.lse, g.entropy) if statistics else ():
        if grad is not None:
            quiet = quiet & (grad == 0)
    return quiet


def grad_input(
    g: RowGrads,
    a: RowArgs,
    o: RowOptions,
    dtype: torch.dtype,
    across: Across | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """The gradient with respect to the logits; differentiable in every tensor, but with ``scratch``."""
    if a.input.numel() == 0 and across is None:
        return a.input.to(dtype) * 0
    row = _Row(a, o, dtype, _quiet(g, counted_rows(a, o.ignore_index), o.statistics), across, scratch)

    def each(grad: Tensor, counted: bool = True) -> Tensor:
        grad = row.copy(grad.to(dtype))
        return (torch.where(row.valid, grad, 0.0) if counted else grad).unsqueeze(row.dim)

    p = row.p()
    more = torch.zeros_like(p[:0])
    if g.lse is not None:
        more = each(g.lse, not o.statistics) * p
    if g.entropy is not None:
        log_p = torch.where(row.log_p == -math.inf, 0.0, row.log_p)
        entropy, grad = row.entropy(p, log_p), each(g.entropy, not o.statistics)
        if scratch is not None and across is None:  # as p does not quite add up to 1
            sum = row.along(wide_sum(p, row.dim))
            entropy, grad = entropy / sum, grad / sum
        entropy_grad = grad * p * (log_p + entropy)
        more = more - entropy_grad if more.numel() else -entropy_grad
    if g.target_log_probability is not None and a.probabilities is None:
        grad = each(g.target_log_probability)
        less = row.scatter_add(-grad * p, torch.where(row.here[0], grad.squeeze(row.dim), 0.0))
        more = more + less if more.numel() else less
    if g.nll is None:
        grad_u = more if more.numel() else torch.zeros_like(p)
    else:
        grad_u = _of_nll(row, p, row.copy(g.nll))
        grad_u = grad_u + more if more.numel() else grad_u
    if not (type(row.slope) is float and row.slope == 1):
        grad_u = _times(grad_u, row.slope, scratch)
    return grad_u if row.allowed is None else torch.where(row.allowed, grad_u, 0.0)


def _times(values: Tensor, factor: Tensor | float, scratch: Scratch | None) -> Tensor:
    return values * factor if scratch is None else values.mul_(factor)


def _of_nll(row: _Row, p: Tensor, grad: Tensor) -> Tensor:
    """grad times p times the sum of q, less q; with scratch, written over p, whose sum then divides the row.

    That sum is 1 but for the rounding of softmax's own, which many classes add to.
    """
    a, dim, mass, fast = row.a, row.dim, row.mass(), row.scratch is not None and row.across is None
    grad = torch.where(row.valid, grad, 0.0)
    one = a.indices is not None and a.probabilities is None
    if one and row.o.label_smoothing == 0:  # (p - 1) of one class
        grad = grad if mass is None else grad * mass
        if row.across is not None:
            return _times(row.with_expm1(p), row.along(grad), row.scratch)
        if fast:
            return p.mul_(row.along(grad / less_one_(p, row.here[1].unsqueeze(dim), dim).squeeze(dim)))
        return row.scatter_add(p, -row.here[0].to(p.dtype)) * row.along(grad)
    sum = wide_sum(p, dim) if fast else torch.ones((), dtype=wide_dtype(p), device=p.device)
    at_target = row.smoothed_target(p, sum) if fast and one else None
    values = p if mass is None else _times(p, row.along(mass), row.scratch)
    if a.indices is None:
        q = row.q(a.probabilities, a.weight)
        values = values - (q * row.along(sum) if fast else q)
    else:
        if row.o.label_smoothing != 0:  # of masked classes too, whose gradient is left out later
            spread = row.smoothing() * sum
            spread = row.weighted(row.along(spread) if spread.dim() else spread.to(p.dtype), a.weight)
            values = values - spread if row.scratch is None else values.sub_(spread)
        if at_target is not None:
            values.scatter_(dim, row.here[1].unsqueeze(dim), row.along(at_target))
        else:
            each = sum.unsqueeze(dim) if sum.dim() else sum
            values = row.scatter_add(values, (row.o.label_smoothing - 1) * row.shares(a.probabilities, a.weight) * each)
    return _times(values, row.along(grad / sum), row.scratch)


def grad_probabilities(g: RowGrads, a: RowArgs, o: RowOptions, across: Across | None = None) -> Tensor:
    """The gradient with respect to the probabilities: -(1 - label_smoothing) * g * w_j * log p_j.

    Of (indices, probabilities) each rank has what its classes add to it.
    """
    assert g.nll is not None and a.probabilities is not None
    row, dim = _Row(a, o, acc_dtype(a.input.dtype), across=across), class_dim(a.input)
    each = torch.where(row.valid, row.copy(g.nll.to(row.u.dtype)), 0.0).unsqueeze(dim)
    values = -(1 - o.label_smoothing) * row.log_p_allowed * each
    if a.weight is not None:
        values = values * along_classes(a.weight.to(values.dtype), a.input)
    if a.indices is not None:
        here, safe = row.here
        if values.size(dim) == 0:
            return torch.zeros_like(a.probabilities)
        values = torch.where(here, values.gather(dim, safe), 0.0)
    return values.to(a.probabilities.dtype)


def grad_weight(g: RowGrads, a: RowArgs, o: RowOptions, across: Across | None = None) -> Tensor:
    """The gradient with respect to the weights of the classes here: the sum over rows of -g * t_j * log p_j."""
    assert g.nll is not None and a.weight is not None
    row, dim = _Row(a, o, acc_dtype(a.input.dtype), across=across), class_dim(a.input)
    t = row.q(a.probabilities, None)
    each = torch.where(row.valid, row.copy(g.nll.to(t.dtype)), 0.0).unsqueeze(dim)
    values = -t * row.log_p_allowed * each
    n = values.size(dim)
    return values.movedim(dim, 0).reshape(n, values.numel() // max(n, 1)).sum(1).to(a.weight.dtype)


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
    lse: Tensor,
    mass: Tensor,
    entropy: Tensor | None,
    *options: float,
) -> Tensor:
    """The gradient with respect to the logits, in their dtype."""
    a = RowArgs(input, indices, probabilities, weight, class_mask)
    o = RowOptions(*options)  # type: ignore[arg-type]
    _check_range(a, o.ignore_index)
    g = RowGrads(grad_nll, grad_lse, grad_entropy, grad_target_log_probability)
    return backward_to(empty_output(input), g, a, o)


def backward_to(grad: Tensor, g: RowGrads, a: RowArgs, o: RowOptions) -> Tensor:
    """The gradient with respect to the logits, written to ``grad``, which may be the logits."""
    scratch = Scratch()
    for piece in pieces(a.input):
        g_piece = RowGrads(*(piece.of(t, a.input) for t in g))
        grad[piece.all] = grad_input(g_piece, _piece_of(a, piece), o, acc_dtype(a.input.dtype), scratch=scratch)
    return grad


def over_logits(backward: Callable[..., Tensor]) -> Callable[..., None]:
    """A backward, of four gradients and then the logits, written over these."""

    def backward_(*args: Any) -> None:
        args[4].copy_(backward(*args))

    return backward_


backward_ = over_logits(backward)


def jvp(
    a: RowArgs,
    o: RowOptions,
    input_t: Tensor | None,
    probabilities_t: Tensor | None,
    weight_t: Tensor | None,
    across: Across | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tangents of nll, lse, entropy and target log-probability."""
    quiet = None if o.statistics else ~counted_rows(a, o.ignore_index)
    row = _Row(a, o, acc_dtype(a.input.dtype), quiet, across)
    p, log_p = row.neg_entropy_terms()
    u_t = torch.zeros_like(p) if input_t is None else row.slope * input_t.to(p.dtype)
    u_t = u_t if row.allowed is None else torch.where(row.allowed, u_t, 0.0)
    lse_t = row.sum(p * u_t)
    log_p_t = u_t - row.along(row.copy(lse_t))
    nll_t = -row.dot(log_p_t, a.probabilities, a.weight)
    if probabilities_t is not None:
        nll_t = nll_t - row.dot(row.log_p_allowed, probabilities_t, a.weight, share=False)
    if weight_t is not None:
        nll_t = nll_t - row.dot(row.log_p_allowed, a.probabilities, weight_t)
    if not o.statistics:
        return nll_t, torch.where(row.valid, lse_t, 0.0), None, None
    entropy_t = -row.sum(p * (log_p + row.entropy(p, log_p)) * u_t)
    one = a.probabilities is None and a.indices is not None
    target_t = row.total(wide(row.at_indices(log_p_t))) if one else torch.zeros_like(lse_t)
    return nll_t, lse_t, entropy_t, target_t

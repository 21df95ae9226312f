"""A row of cross-entropy with options in plain PyTorch: its logits as they count, softmax, sums over its target.

``rows_reference`` says what these are; the formulas there and in ``shards_reference`` are made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Scratch, row_sums, wide, wide_sum
from fused_ops.ops.cross_entropy.reference import class_dim, counts

_FEW_CLASSES = 32  # PyTorch's softmax of a row of up to so many costs several times its exponentials.


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


class Row:
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
        self._log_p: Tensor | None = None

    @property
    def log_p(self) -> Tensor:
        """The logarithm of the softmax, found when it is first asked for; functools' way of that stops Dynamo."""
        if self._log_p is None:
            self._log_p = self._find_log_p()
        return self._log_p

    def _find_log_p(self) -> Tensor:
        if self.across is not None:
            return (self.u - self.high.unsqueeze(self.dim)) - self.copy(self.low).unsqueeze(self.dim)
        if self.scratch is None:
            return self.u.log_softmax(self.dim)
        return torch.log_softmax(self.u, self.dim, out=self.scratch.like("log_p", self.u))

    @property
    def log_p_allowed(self) -> Tensor:
        """log p where it is a factor: a masked class, whose log p is -inf for good, has the derivative 0."""
        return self.log_p if self.allowed is None else torch.where(self.allowed, self.log_p, 0.0)

    def p(self, whole: bool = True) -> Tensor:
        """The softmax; with scratch, if not ``whole``, but for a factor of each row, which its sum is to divide."""
        if self.across is not None:
            return self.log_p.exp()
        if self.scratch is None:
            return self.u.softmax(self.dim)
        p = self.scratch.like("p", self.u)
        if self.u.dim() <= 2 and self.u.size(self.dim) > _FEW_CLASSES:
            return torch.softmax(self.u, self.dim, out=p)
        # of rows side by side a thread's last have another softmax than the others
        torch.sub(self.u, self.u.amax(self.dim, keepdim=True), out=p).exp_()
        return p.div_(row_sums(p, self.dim)) if whole else p

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each row's values over all classes, wide."""
        if self.scratch is None:
            return self.total(wide_sum(values, self.dim))
        return self.total(row_sums(values, self.dim).squeeze(self.dim))

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

    @property
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
        one = self.a.probabilities is None
        if values.size(self.dim) == 0:  # zeros that depend on the values: on all ranks the same collectives follow
            return values.sum(self.dim, keepdim=not one).expand(safe.shape)
        found = values.gather(self.dim, safe.unsqueeze(self.dim) if one else safe)
        return torch.where(here, found.squeeze(self.dim) if one else found, 0.0)

    def shares(self, probabilities: Tensor | None, weight: Tensor | None) -> Tensor:
        """t_j w_j of the indices, of their shape; 0 where ignored or not here."""
        here, safe = self.here
        found = torch.ones_like(here, dtype=self.u.dtype) if probabilities is None else probabilities.to(self.u.dtype)
        if weight is not None:
            weight = weight.to(found.dtype)
            found = found * (weight[safe] if weight.numel() else weight.sum())
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

    def smoothed_target(self, at: Tensor, others: Tensor) -> Tensor:
        """Of each row's class index, wide: p, ``at``, times the sum of q, less q times the sum of p, from differences
        that are 0 in one class alone.
        """
        weight = wide(self.shares(None, self.a.weight))
        spread = self.smoothing() * weight
        return (at * self.mass_of_smoothing() - spread * (at + others)) - (1 - self.o.label_smoothing) * weight * others

    def entropy(self, p: Tensor, log_p: Tensor) -> Tensor:
        """The entropy, to be broadcast along the classes, of ``neg_entropy_terms``."""
        known = None if self.across is None else self.across.entropy
        return self.along(self.copy(-self.sum(p * log_p)) if known is None else known)

    def neg_entropy_terms(self) -> tuple[Tensor, Tensor]:
        """p and log p, with 0 for the logarithm of 0."""
        return self.log_p.exp(), torch.where(self.log_p == -math.inf, 0.0, self.log_p)

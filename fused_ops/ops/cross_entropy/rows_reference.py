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

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Piece, empty_output, pieces
from fused_ops.ops.cross_entropy.reference import acc_dtype, class_dim, counts, log_sum_exp


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
    """What every formula starts from: u and its slope, log p, q. Differentiable in all the floating-point tensors."""

    def __init__(
        self,
        a: RowArgs,
        o: RowOptions,
        dtype: torch.dtype,
        quiet: Tensor | None = None,
        across: Across | None = None,
    ) -> None:
        self.a, self.o, self.dim, self.across = a, o, class_dim(a.input), across
        x = a.input.to(dtype)
        if quiet is not None:
            x = torch.where(quiet.unsqueeze(self.dim), 0.0, x)  # rows whose gradient is zero whatever they hold
        scaled = x * o.logit_scale
        self.slope = torch.full_like(scaled, o.logit_scale)
        if o.softcap != 0:
            t = torch.tanh(scaled / o.softcap)
            scaled, self.slope = o.softcap * t, o.logit_scale * (1 - t * t)
        self.allowed = None if a.class_mask is None else along_classes(a.class_mask, a.input).expand_as(x)
        if self.allowed is not None:
            scaled = torch.where(self.allowed, scaled, -math.inf)
            self.slope = torch.where(self.allowed, self.slope, 0.0)
        self.u = scaled
        if across is None:
            self.log_p = scaled.log_softmax(self.dim)
        else:
            high, low = (part.to(dtype) for part in across.normalise(scaled, self.dim))
            self.high, self.low = (t if quiet is None else torch.where(quiet, 0.0, t) for t in (high, low))
            self.log_p = (scaled - self.high.unsqueeze(self.dim)) - self.copy(self.low).unsqueeze(self.dim)
        # where it is a factor: a masked class, whose log p is -inf for good, has the derivative 0
        self.log_p_allowed = self.log_p if self.allowed is None else torch.where(self.allowed, self.log_p, 0.0)
        self.valid = counted_rows(a, o.ignore_index)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each row's values, over all classes."""
        values = values.sum(self.dim, dtype=torch.float64).to(values.dtype)
        return values if self.across is None else self.across.total(values)

    def copy(self, values: Tensor) -> Tensor:
        """What all ranks have alike, to go on to what each has of a row."""
        return values if self.across is None else self.across.copy(values)

    def here(self) -> tuple[Tensor, Tensor]:
        """Which of the indices are of classes that are here, and the indices among those, 0 for the others."""
        indices = self.a.indices
        assert indices is not None
        valid = counts(indices, self.o.ignore_index)
        if self.across is not None:
            indices = indices.long() - self.across.first
            valid = valid & (indices >= 0) & (indices < self.u.size(self.dim))
        return valid, torch.where(valid, indices, 0).long()

    def scatter(self, values: Tensor | None) -> Tensor:
        """Values of the indices (1 for None, 0 where ignored), on all classes."""
        valid, safe = self.here()
        if self.u.size(self.dim) == 0:
            return torch.zeros_like(self.u)
        if self.a.probabilities is None:
            valid, safe = valid.unsqueeze(self.dim), safe.unsqueeze(self.dim)
        one = torch.ones((), dtype=self.u.dtype, device=self.u.device)
        source = torch.where(valid, one if values is None else values.to(self.u.dtype), 0.0)
        return torch.zeros_like(self.u).scatter_add(self.dim, safe, source)

    def distribution(self, values: Tensor | None, share: float) -> Tensor:
        """(1 - label_smoothing) * values on all classes, plus ``share`` of the smoothing's mass."""
        dense = self.scatter(values) if self.a.indices is not None else values.to(self.u.dtype)  # type: ignore[union-attr]
        if self.o.label_smoothing == 0:
            return dense
        dense = dense * (1 - self.o.label_smoothing)
        if not share:
            return dense
        if self.across is not None:
            spread = 1 / self.across.allowed.to(dense.dtype).clamp(min=1)
            spread = spread.unsqueeze(self.dim) if spread.dim() else spread
            spread = spread if self.allowed is None else spread * self.allowed
        elif self.allowed is None:
            spread = torch.full((), 1 / max(self.u.size(self.dim), 1), dtype=dense.dtype, device=dense.device)
        else:
            spread = self.allowed.to(dense.dtype) / self.allowed.sum(self.dim, keepdim=True).clamp(min=1)
        return dense + share * spread

    def weighted(self, distribution: Tensor, weight: Tensor | None) -> Tensor:
        """The distribution times the class weights, 0 in ignored rows."""
        if weight is not None:
            distribution = distribution * along_classes(weight.to(distribution.dtype), self.a.input)
        return torch.where(self.valid.unsqueeze(self.dim), distribution, 0.0)

    def q(self) -> Tensor:
        """The coefficients of -log p in nll."""
        return self.weighted(self.distribution(self.a.probabilities, self.o.label_smoothing), self.a.weight)

    def dot(self, q: Tensor, values: Tensor) -> Tensor:
        """sum_j q_j values_j; a class that is off the target for good (masked, or not the index) adds nothing."""
        off = q == 0
        if self.a.indices is None or self.o.label_smoothing != 0:
            off = off & (~self.allowed if self.allowed is not None else torch.zeros_like(off))
        off = off | ~self.valid.unsqueeze(self.dim)
        # inside too: the derivative of q * inf with respect to q is no 0 that the outer choice would leave out
        return self.sum(torch.where(off, 0.0, q * torch.where(off, 0.0, values)))

    def of_index(self, values: Tensor) -> Tensor:
        """The values of each row's one class index; 0 in ignored rows."""
        return self.sum(torch.where(self.scatter(None) != 0, values, 0.0))

    def mass(self, q: Tensor) -> Tensor:
        """The sum of q, to go on to what each rank has of a row."""
        known = None if self.across is None else self.across.mass
        return self.copy(self.sum(q)) if known is None else known.to(q.dtype)

    def entropy(self, p: Tensor, log_p: Tensor) -> Tensor:
        """Likewise the entropy, of ``neg_entropy_terms``."""
        known = None if self.across is None else self.across.entropy
        return self.copy(-self.sum(p * log_p)) if known is None else known.to(p.dtype)

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
    for piece in (cut := pieces(input)):
        results = _results(_Row(_piece_of(a, piece), o, acc_dtype(input.dtype)))
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
    return _results(_Row(a, o, torch.float64, quiet))


def _results(row: _Row) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, o, dim = row.a, row.o, row.dim
    input, indices, probabilities, weight, _ = a
    q, count = row.q(), row.valid.double()
    lse = count * 0
    if input.size(dim):  # NaN where no class is left, and beside an infinite logit
        lse = log_sum_exp(row.u, row.log_p, dim)
        if row.u.requires_grad or row.u.dtype == torch.float64:  # an even derivative where several are largest
            lse = torch.where(row.log_p.amax(dim).isnan(), math.nan, row.u.logsumexp(dim).double())
    nll = row.dot(q, -row.log_p)
    one = indices is not None and probabilities is None
    log_probability = row.of_index(row.log_p) if one else torch.zeros_like(nll)
    mass = row.sum(q)
    if indices is None:
        target_weight = count
    else:
        target_weight = row.sum(row.weighted(row.scatter(probabilities), weight))
        share = (1 - o.label_smoothing) * target_weight
        mass = mass - share if one else mass
        # 0 * inf of a class index is NaN, as in PyTorch
        nll = torch.where((share == 0) & ~(log_probability > -math.inf), math.nan, nll) if one else nll
    empty, no_index = input.new_empty(0, dtype=torch.float64), input.new_empty(0, dtype=torch.int64)
    nll, mass, target_weight = nll.double(), mass.double(), target_weight.double()
    if not o.statistics:
        return nll, torch.where(row.valid, lse, 0.0), mass, target_weight, empty, no_index, empty.clone()
    p, log_p = row.neg_entropy_terms()
    entropy, log_probability = -row.sum(p * log_p).double(), log_probability.double()
    prediction = row.u.argmax(dim) if input.size(dim) else torch.zeros_like(nll, dtype=torch.int64)
    return nll, lse, mass, target_weight, entropy, prediction, log_probability


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


def grad_input(g: RowGrads, a: RowArgs, o: RowOptions, dtype: torch.dtype, across: Across | None = None) -> Tensor:
    """The gradient with respect to the logits; differentiable in every tensor."""
    dim = class_dim(a.input)
    if a.input.numel() == 0 and across is None:
        return a.input.to(dtype) * 0
    row = _Row(a, o, dtype, _quiet(g, counted_rows(a, o.ignore_index), o.statistics), across)
    p, log_p = row.neg_entropy_terms()

    def each(grad: Tensor, counted: bool = True) -> Tensor:
        grad = row.copy(grad.to(dtype))
        return (torch.where(row.valid, grad, 0.0) if counted else grad).unsqueeze(dim)

    grad_u = torch.zeros_like(p)
    if g.nll is not None:
        q = row.q()
        grad_u = grad_u + each(g.nll) * (p * row.mass(q).unsqueeze(dim) - q)
    if g.lse is not None:
        grad_u = grad_u + each(g.lse, not o.statistics) * p
    if g.entropy is not None:
        entropy = row.entropy(p, log_p).unsqueeze(dim)
        grad_u = grad_u - each(g.entropy, not o.statistics) * p * (log_p + entropy)
    if g.target_log_probability is not None and a.probabilities is None:
        grad_u = grad_u + each(g.target_log_probability) * (row.scatter(None) - p)
    grad = grad_u * row.slope
    return grad if row.allowed is None else torch.where(row.allowed, grad, 0.0)


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
        here, safe = row.here()
        if values.size(dim) == 0:
            return torch.zeros_like(a.probabilities)
        values = torch.where(here, values.gather(dim, safe), 0.0)
    return values.to(a.probabilities.dtype)


def grad_weight(g: RowGrads, a: RowArgs, o: RowOptions, across: Across | None = None) -> Tensor:
    """The gradient with respect to the weights of the classes here: the sum over rows of -g * t_j * log p_j."""
    assert g.nll is not None and a.weight is not None
    row, dim = _Row(a, o, acc_dtype(a.input.dtype), across=across), class_dim(a.input)
    t = row.weighted(row.distribution(a.probabilities, o.label_smoothing), None)
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
    for piece in pieces(a.input):
        g_piece = RowGrads(*(piece.of(t, a.input) for t in g))
        grad[piece.all] = grad_input(g_piece, _piece_of(a, piece), o, acc_dtype(a.input.dtype)).to(grad.dtype)
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
    row, dim = _Row(a, o, acc_dtype(a.input.dtype), quiet, across), class_dim(a.input)
    p, log_p = row.neg_entropy_terms()
    u_t = torch.zeros_like(p) if input_t is None else row.slope * input_t.to(p.dtype)
    lse_t = row.sum(p * u_t)
    log_p_t = u_t - row.copy(lse_t).unsqueeze(dim)
    nll_t = -row.dot(row.q(), log_p_t)
    if probabilities_t is not None:
        q_t = row.weighted(row.distribution(probabilities_t, 0.0), a.weight)
        nll_t = nll_t - row.sum(q_t * row.log_p_allowed)
    if weight_t is not None:
        q_t = row.weighted(row.distribution(a.probabilities, o.label_smoothing), weight_t)
        nll_t = nll_t - row.sum(q_t * row.log_p_allowed)
    if not o.statistics:
        return nll_t.double(), torch.where(row.valid, lse_t, 0.0).double(), None, None
    entropy = row.entropy(p, log_p).unsqueeze(dim)
    entropy_t = -row.sum(p * (log_p + entropy) * u_t)
    one = a.probabilities is None
    target_t = row.of_index(log_p_t) if one else torch.zeros_like(lse_t)
    return nll_t.double(), lse_t.double(), entropy_t.double(), target_t.double()

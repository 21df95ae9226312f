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

from fused_ops.core.memory_format import Piece, Scratch, acc_dtype, empty_output, pieces, row_sums, wide, wide_dtype
from fused_ops.ops.cross_entropy.reference import class_dim, counts, less_one_, log_sum_exp, take_
from fused_ops.ops.cross_entropy.row import Across, Row, RowArgs, RowOptions, along_classes, counted_rows, rows_shape


def _check(a: RowArgs, ignore_index: int) -> None:
    if a.indices is None and a.probabilities is None:
        raise RuntimeError("cross_entropy: expected indices or probabilities, got neither")
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
    _check(a, o.ignore_index)
    found: tuple[Tensor, ...] = ()
    scratch = Scratch()
    for piece in (cut := pieces(input)):
        results = _results(Row(piece_of(a, piece), o, acc_dtype(input.dtype), scratch=scratch))
        if len(cut) == 1:
            return results
        found = found or tuple(r.new_empty(rows_shape(input) if r.numel() else (0,)) for r in results)
        for whole, part in zip(found, results, strict=True):
            if part.numel():
                whole[piece.row] = part
    return found  # type: ignore[return-value]


def piece_of(a: RowArgs, piece: Piece) -> RowArgs:
    mask = a.class_mask if a.class_mask is None or a.class_mask.dim() == 1 else piece.of(a.class_mask, a.input)
    indices, probabilities = (piece.of(t, a.input) for t in (a.indices, a.probabilities))
    return RowArgs(a.input[piece.all], indices, probabilities, a.weight, mask)


def formulas(a: RowArgs, o: RowOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``forward`` as a differentiable function of every floating-point tensor, any number of times, in both modes."""
    quiet = None if o.statistics else ~counted_rows(a, o.ignore_index)
    return _results(Row(a, o, acc_dtype(a.input.dtype), quiet))


def _results(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    row = Row(a, o, dtype, _quiet(g, counted_rows(a, o.ignore_index), o.statistics), across, scratch)

    def each(grad: Tensor, counted: bool = True) -> Tensor:
        grad = row.copy(grad.to(dtype))
        return (torch.where(row.valid, grad, 0.0) if counted else grad).unsqueeze(row.dim)

    fast = scratch is not None and across is None
    p = row.p(whole=g.entropy is not None or g.target_log_probability is not None)
    # p does not quite add up to 1
    sum = row_sums(p, row.dim) if fast and not (g.lse is None and g.entropy is None) else None
    more: Tensor | None = None  # not by its size: on a rank without classes all of it is empty
    if g.lse is not None:
        more = each(g.lse if sum is None else g.lse / sum.squeeze(row.dim), not o.statistics) * p
    if g.entropy is not None:
        log_p = torch.where(row.log_p == -math.inf, 0.0, row.log_p)
        entropy, grad = row.entropy(p, log_p), each(g.entropy, not o.statistics)
        if sum is not None:
            entropy, grad = (t / sum.to(p.dtype) for t in (entropy, grad))
        entropy_grad = grad * p * (log_p + entropy)
        more = -entropy_grad if more is None else more - entropy_grad
    if g.target_log_probability is not None and a.probabilities is None:
        grad = each(g.target_log_probability)
        less = row.scatter_add(-grad * p, torch.where(row.here[0], grad.squeeze(row.dim), 0.0))
        more = less if more is None else more + less
    if g.nll is None:
        grad_u = torch.zeros_like(p) if more is None else more
    else:
        grad_u = _of_nll(row, p, row.copy(g.nll))
        if more is not None:
            grad_u = grad_u.add_(more) if fast else grad_u + more
    if not (type(row.slope) is float and row.slope == 1):
        grad_u = _times(grad_u, row.slope, scratch)
    return grad_u if row.allowed is None else torch.where(row.allowed, grad_u, 0.0)


def _times(values: Tensor, factor: Tensor | float, scratch: Scratch | None) -> Tensor:
    return values * factor if scratch is None else values.mul_(factor)


def _less(values: Tensor, less: Tensor, scratch: Scratch | None) -> Tensor:
    return values - less if scratch is None else values.sub_(less)


def _of_nll(row: Row, p: Tensor, grad: Tensor) -> Tensor:
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
    index, at_target = row.here[1].unsqueeze(dim) if one else None, None
    if fast and index is not None:
        at, others = (t.squeeze(dim) for t in take_(p, index, dim))
        sum, at_target = at + others, row.smoothed_target(at, others)
    else:
        sum = row_sums(p, dim).squeeze(dim) if fast else torch.ones((), dtype=wide_dtype(p), device=p.device)
    each = grad / sum
    values = _times(p, row.along(each if mass is None else each * mass), row.scratch)
    if a.indices is None:
        return _less(values, row.q(a.probabilities, a.weight) * row.along(grad), row.scratch)
    if row.o.label_smoothing != 0:  # of masked classes too, whose gradient is left out later
        values = _less(values, row.weighted(row.along(row.smoothing() * grad), a.weight), row.scratch)
    if index is not None and at_target is not None:
        return values.scatter_(dim, index, row.along(at_target * each))
    shares = row.shares(a.probabilities, a.weight) * (grad if one else grad.unsqueeze(dim))
    return row.scatter_add(values, (row.o.label_smoothing - 1) * shares)


def grad_probabilities(g: RowGrads, a: RowArgs, o: RowOptions, across: Across | None = None) -> Tensor:
    """The gradient with respect to the probabilities: -(1 - label_smoothing) * g * w_j * log p_j.

    Of (indices, probabilities) each rank has what its classes add to it.
    """
    assert g.nll is not None and a.probabilities is not None
    row, dim = Row(a, o, acc_dtype(a.input.dtype), across=across), class_dim(a.input)
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
    row, dim = Row(a, o, acc_dtype(a.input.dtype), across=across), class_dim(a.input)
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
    _check(a, o.ignore_index)
    g = RowGrads(grad_nll, grad_lse, grad_entropy, grad_target_log_probability)
    return backward_to(empty_output(input), g, a, o)


def backward_to(grad: Tensor, g: RowGrads, a: RowArgs, o: RowOptions) -> Tensor:
    """The gradient with respect to the logits, written to ``grad``, which may be the logits."""
    scratch = Scratch()
    for piece in pieces(a.input):
        g_piece = RowGrads(*(piece.of(t, a.input) for t in g))
        grad[piece.all] = grad_input(g_piece, piece_of(a, piece), o, acc_dtype(a.input.dtype), scratch=scratch)
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
    row = Row(a, o, acc_dtype(a.input.dtype), quiet, across)
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

"""Cross-entropy in plain PyTorch: the reference of the kernels, and the fallback where there is none.

For one row of logits x and its target t::

    lse  = log sum_j exp(x_j)         loss = lse - x_t
    p_j  = exp(x_j - lse)             grad_x_j = (p_j - [j == t]) * grad_loss

Logits of 16 and 32 bits are computed in float32, piece by piece, so that a device without kernels needs little more
memory than the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.core.memory_format import Scratch, acc_dtype, empty_output, pieces, row_sums, wide, wide_dtype

NONE, MEAN, SUM = 0, 1, 2


def counts(indices: Tensor, ignore_index: int) -> Tensor:
    """``indices != ignore_index``, where an ``ignore_index`` beyond the dtype's range is not wrapped into it."""
    limits = torch.iinfo(indices.dtype)
    if limits.min <= ignore_index <= limits.max:
        return indices != ignore_index
    return torch.ones_like(indices, dtype=torch.bool)


def split_targets(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The mask of rows that count, and a target that is in range for the others too."""
    valid = counts(target, ignore_index)
    safe = torch.where(valid, target, 0).long()
    return valid, safe


def class_dim(input: Tensor) -> int:
    """The dimension of the classes: 0 of a single example, else 1."""
    return 0 if input.dim() == 1 else 1


def _check_range(target: Tensor, valid: Tensor, classes: int) -> None:
    wide = target.long()  # a narrow dtype would wrap the number of classes
    outside = valid & ((wide < 0) | (wide >= classes))
    if target.device.type == "cpu" and bool(outside.any()):
        raise IndexError(f"Target {target[outside].flatten()[0].item()} is out of bounds.")


def forward(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the log-sum-exp of each row and the number of rows that count; the last two wide."""
    dim, dtype, scratch = class_dim(input), acc_dtype(input.dtype), Scratch()
    valid, safe = split_targets(input, target, ignore_index)
    _check_range(target, valid, input.size(dim))
    total = wide(valid.sum())
    lse, rows = (torch.zeros_like(target, dtype=wide_dtype(input)) for _ in range(2))
    for piece in pieces(input) if input.numel() else ():
        x = scratch.copy("x", input[piece.all], dtype)
        log_p = torch.log_softmax(x, dim, out=scratch.like("log_p", x))
        lse[piece.row] = log_sum_exp(x, log_p, dim)
        rows[piece.row] = -log_p.gather(dim, safe[piece.row].unsqueeze(dim)).squeeze(dim)
    rows, lse = (torch.where(valid, t, 0.0) for t in (rows, lse))
    loss = rows if reduction == NONE else rows.sum()
    if reduction == MEAN:
        loss = loss / total
    return loss.to(input.dtype), lse, total


def log_sum_exp(x: Tensor, log_p: Tensor, dim: int, differentiable: bool = False) -> Tensor:
    """Wide, from the log-softmax, of which the largest is minus the logarithm of a sum between 1 and classes.

    The derivative of the difference is right for any class, but of maxima only where they are of the same classes.
    """
    if not differentiable:
        return wide(x.amax(dim)) - wide(log_p.amax(dim))
    best = x.argmax(dim, keepdim=True)
    return (wide(x.gather(dim, best)) - wide(log_p.gather(dim, best))).squeeze(dim)


def row_scale(grad_loss: Tensor, total: Tensor, valid: Tensor, reduction: int) -> Tensor:
    """What multiplies each row's (p - one_hot): the upstream gradient, over the count for a mean, 0 if ignored."""
    scale = grad_loss / total.to(grad_loss.dtype) if reduction == MEAN else grad_loss
    return torch.where(valid, scale, torch.zeros((), dtype=scale.dtype, device=scale.device))


def backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> Tensor:
    """The gradient with respect to the logits."""
    return _backward_to(empty_output(input), grad_loss, input, target, lse, total, ignore_index, reduction)


def _backward_to(
    grad: Tensor,
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    total: Tensor,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """``backward``, written to ``grad``, which may be the logits. p is found from lse, as near as its dtype has it."""
    dim, dtype, scratch = class_dim(input), acc_dtype(input.dtype), Scratch()
    valid, safe = split_targets(input, target, ignore_index)
    _check_range(target, valid, input.size(dim))
    scale, near = row_scale(wide(grad_loss), total, valid, reduction), lse.to(dtype)
    for piece in pieces(input) if input.numel() else ():
        here, keep, each, high = (t[piece.row].unsqueeze(dim) for t in (safe, valid, scale, near))
        x, to = scratch.copy("x", input[piece.all], dtype), grad[piece.all]
        p = to if to.dtype == dtype else scratch.like("x", x, dtype)
        torch.sub(x, high, out=p).exp_()
        p.mul_((each / less_one_(p, here, dim)).to(dtype))
        if not (keep.is_cpu and keep.all()):
            p.masked_fill_(~keep, 0.0)
        if p is not to:
            to.copy_(p)
    return grad


def take_(p: Tensor, here: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sets p of one class a row to 0; returns what it was and what the others add up to, wide.

    Together they are 1 but for the rounding of what p was divided by, or of softmax's own sum, which many classes add
    to: their sum is to divide the row. Of a class that has all but nothing it is the others' sum that is left.
    """
    at = wide(p.gather(dim, here))
    return at, row_sums(p.scatter_(dim, here, 0.0), dim)


def less_one_(p: Tensor, here: Tensor, dim: int) -> Tensor:
    """Takes from p of one class a row what the row's p add up to; returns that sum, wide."""
    at, others = take_(p, here, dim)
    p.scatter_(dim, here, -others.to(p.dtype))
    return others + at


def backward_(
    grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> None:
    """``backward``, written over the logits."""
    _backward_to(input, grad_loss, input, target, lse, total, ignore_index, reduction)


def with_gradient(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, int]:
    """A mean or sum, its gradient for an upstream gradient of 1, and the number of ignored rows: -1 if not on the CPU,
    where reading it would wait for the device.
    """
    if reduction == NONE:
        raise RuntimeError("cross_entropy: reduction must be 1 (mean) or 2 (sum) to have one gradient, got 0")
    loss, lse, total = forward(input, target, ignore_index, reduction)
    gradient = backward(torch.ones_like(loss), input, target, lse, total, ignore_index, reduction)
    return loss, gradient, target.numel() - int(total) if target.is_cpu else -1


def scale_gradient(gradient: Tensor, grad_loss: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """``gradient * grad_loss``, dense; an ignored row stays 0 even for an upstream gradient that is not finite."""
    keep = counts(target, ignore_index).unsqueeze(class_dim(gradient))
    return torch.where(keep, gradient * grad_loss.reshape(()), gradient).contiguous()


def _residual(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """p, p - one_hot (zero in ignored rows) and the mask of rows that count, differentiable in ``input``."""
    dim = class_dim(input)
    valid, safe = split_targets(input, target, ignore_index)
    keep = valid.unsqueeze(dim)
    x = input.to(acc_dtype(input.dtype))
    p = torch.where(keep, x, 0.0).softmax(dim)
    one_hot = torch.zeros_like(p).scatter(dim, safe.unsqueeze(dim), 1.0)
    return p, torch.where(keep, p - one_hot, 0.0), valid


def _reduce(rows: Tensor, total: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return rows
    return rows.sum() / total.to(rows.dtype) if reduction == MEAN else rows.sum()


def jvp(input: Tensor, input_t: Tensor, target: Tensor, total: Tensor, ignore_index: int, reduction: int) -> Tensor:
    """The tangent of the loss: (p - one_hot) . x_t in each row, reduced."""
    _, residual, _ = _residual(input, target, ignore_index)
    rows = (residual * input_t.to(residual.dtype)).sum(class_dim(input))
    return _reduce(rows, total, reduction).to(input.dtype)


def gradient(
    grad_loss: Tensor, input: Tensor, target: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> Tensor:
    """``backward`` as a formula, differentiable in grad_loss and input."""
    _, residual, valid = _residual(input, target, ignore_index)
    scale = row_scale(grad_loss.to(residual.dtype), total, valid, reduction).unsqueeze(class_dim(input))
    return (scale * residual).to(input.dtype)


def _softmax_jvp(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """The softmax's Jacobian (symmetric) times v: p * (v - p . v)."""
    return p * (v - (p * v).sum(dim, keepdim=True))


def double_backward(
    grad_grad: Tensor,
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    total: Tensor,
    ignore_index: int,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of <backward(grad_loss, input), grad_grad> with respect to grad_loss and input."""
    dim = class_dim(input)
    p, residual, valid = _residual(input, target, ignore_index)
    v = grad_grad.to(p.dtype)
    scale = row_scale(grad_loss.to(p.dtype), total, valid, reduction).unsqueeze(dim)
    grad_grad_loss = _reduce((residual * v).sum(dim), total, reduction)
    return grad_grad_loss.to(grad_loss.dtype), (scale * _softmax_jvp(p, v, dim)).to(input.dtype)


def backward_jvp(
    grad_loss: Tensor,
    input: Tensor,
    grad_loss_t: Tensor,
    input_t: Tensor,
    target: Tensor,
    total: Tensor,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """The tangent of ``backward`` for the tangents of grad_loss and input."""
    dim = class_dim(input)
    p, residual, valid = _residual(input, target, ignore_index)
    scale = row_scale(grad_loss.to(p.dtype), total, valid, reduction).unsqueeze(dim)
    scale_t = row_scale(grad_loss_t.to(p.dtype), total, valid, reduction).unsqueeze(dim)
    return (scale_t * residual + scale * _softmax_jvp(p, input_t.to(p.dtype), dim)).to(input.dtype)


def staged(input: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Every intermediate of the mean loss of (rows, classes) logits, each one elementary step."""
    rows = torch.arange(input.size(0))
    logit_maxes = input.max(1, keepdim=True).values
    norm_logits = input - logit_maxes
    counts = norm_logits.exp()
    counts_sum = counts.sum(1, keepdim=True)
    counts_sum_inv = counts_sum**-1
    probs = counts * counts_sum_inv
    logprobs = probs.log()
    loss = -logprobs[rows, target].mean()
    names = ("logit_maxes", "norm_logits", "counts", "counts_sum", "counts_sum_inv", "probs", "logprobs", "loss")
    values = (logit_maxes, norm_logits, counts, counts_sum, counts_sum_inv, probs, logprobs, loss)
    return dict(zip(names, values, strict=True))

"""Batch norm's gradients in plain PyTorch; ``reference`` has their equations and the forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.memory_format import Piece, Scratch, acc_dtype, empty_output, pieces, wide, wide_sum
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.reference import (
    Affine,
    BackwardArguments,
    all_but_channels,
    counted,
    group_size,
    param_dtype,
    per_channel,
    sums_exactly,
    unpack,
)


def backward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, empty where not needed, in one step; writes ``grad_residual``."""
    a = BackwardArguments(*arguments, **named)
    input = a.input
    groups = a.groups if a.training else 1
    positive = None if a.mask is None or not a.mask.numel() else unpack(a.mask, input)
    size, channels = group_size(input.size(0), groups), input.size(1)
    grad_input, sums, dots = empty_output(input) if a.need_input else None, [], []
    for i, begin in enumerate(range(0, max(input.size(0), 1), size)):
        rows, here = slice(begin, begin + size), slice(i * channels, (i + 1) * channels)
        part = _batch_entries(a, rows)
        signs = None if positive is None else positive[rows]
        to = None if grad_input is None else grad_input[rows]
        total, dot = _backward_of_group(part, signs, a.statistics[0, here], a.statistics[1, here], to)
        sums.append(total)
        dots.append(dot)
    kind, none = param_dtype(input, a.weight, a.bias), input.new_empty(0)
    return (
        none if grad_input is None else grad_input,
        torch.stack(dots).sum(0).to(kind) if a.need_params else none.to(kind, copy=True),
        torch.stack(sums).sum(0).to(kind) if a.need_params else none.to(kind, copy=True),
    )


def _batch_entries(a: BackwardArguments, rows: slice) -> BackwardArguments:
    residual, valid, grad_residual = (None if t is None else t[rows] for t in (a.residual, a.valid, a.grad_residual))
    a = a._replace(grad_output=a.grad_output[rows], input=a.input[rows])
    return a._replace(residual=residual, valid=valid, grad_residual=grad_residual)


def _backward_of_group(
    a: BackwardArguments, positive: Tensor | None, mean: Tensor, invstd: Tensor, grad_input: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of bias and weight of one group, wide; writes those of the input and the residual."""
    n = a.input.numel() // max(a.input.size(1), 1) if a.valid is None else int(a.valid.bool().sum())
    affine = affine_of(a, mean, invstd)
    total, dot = invstd.new_zeros(invstd.shape), invstd.new_zeros(invstd.shape)
    if a.need_params or (a.training and grad_input is not None):
        total, dot = sums(a, affine, positive)
    means = (total / n, dot * invstd.square() / (n - a.correction)) if n and a.training else None
    write_gradients(a, affine, positive, means, grad_input)
    return total, dot * invstd if n else dot


def affine_of(a: BackwardArguments, mean: Tensor, invstd: Tensor) -> Affine:
    """Of one group, from its (channels,) statistics."""
    return Affine.of(per_channel(mean, a.input), per_channel(invstd, a.input), a.weight, a.bias, a.input)


def sums(a: BackwardArguments, affine: Affine, positive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per channel the sums of h and of h * (x - mean), wide."""
    dims, scratch = all_but_channels(a.input), Scratch()
    exact = scratch if sums_exactly(a.input) else None
    total = dot = wide(a.input.new_zeros(a.input.size(1)))
    for piece in pieces(a.input):
        h, centered, _ = _before_activation(a, affine, piece, positive, scratch)
        total, dot = total + wide_sum(h, dims, exact=exact), dot + wide_sum(centered.mul_(h), dims, exact=exact)
    rest = affine.rest.flatten()
    return total, dot - torch.where(rest == 0, 0.0, rest * total)


def write_gradients(
    a: BackwardArguments,
    affine: Affine,
    positive: Tensor | None,
    means: tuple[Tensor, Tensor] | None,
    grad_input: Tensor | None,
) -> None:
    """Writes the gradients of input and residual; ``means`` are grad_mean and grad_slope of a training batch."""
    if grad_input is None and a.grad_residual is None:
        return
    dtype, x = acc_dtype(a.input.dtype), a.input
    if means is not None:
        grad_mean, grad_slope = (per_channel(m, x) for m in means)
        grad_mean = grad_mean - torch.where(affine.rest == 0, 0.0, affine.rest * grad_slope)
        grad_mean, grad_slope = grad_mean.to(dtype), grad_slope.to(dtype)
    scratch = Scratch()
    for piece in pieces(x):
        h, centered, keep = _before_activation(a, affine, piece, positive, scratch)
        if a.grad_residual is not None:
            a.grad_residual[piece.all] = h
        if grad_input is None:
            continue
        to = grad_input[piece.all]
        grad = to if to.dtype == dtype else centered
        if means is not None:
            torch.sub(h, centered.mul_(grad_slope).add_(grad_mean), out=grad).mul_(affine.scale)
        else:
            torch.mul(h, affine.scale, out=grad)
        if keep is not None:
            grad.masked_fill_(~keep, 0.0)
        if grad is not to:
            to.copy_(grad)


def _before_activation(
    a: BackwardArguments, affine: Affine, piece: Piece, positive: Tensor | None, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, x - near (to be written over) and which positions count, of a piece."""
    x, dtype = a.input[piece.all], affine.near.dtype
    centered, h = scratch.like("x", x, dtype), scratch.copy("h", a.grad_output[piece.all], dtype)
    torch.sub(scratch.copy("x", x, dtype), affine.near, out=centered)
    if positive is not None:
        h = h * activations.sign_derivative(a.activation, positive[piece.all], a.slope, dtype)
    elif a.activation != activations.NONE:
        z = torch.mul(centered, affine.scale, out=scratch.like("z", x, dtype)).add_(affine.shift)
        z = z if a.residual is None else z.add_(a.residual[piece.all])
        h = activations.backward(a.activation, h, z, a.slope)
    if a.valid is None:
        return h, centered, None
    keep = counted(a.valid, a.input)[piece.all].bool()
    return torch.where(keep, h, 0.0), centered.masked_fill_(~keep, 0.0), keep

"""Batch norm's gradients in plain PyTorch; ``reference`` has their equations and the forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Scratch, acc_dtype, channel_sums, empty_normalised, memory_pieces, wide
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.reference import (
    Affine,
    BackwardArguments,
    counted_of,
    entries,
    group_slices,
    mask_of,
    of_group,
    param_dtype,
    per_channel,
    rounded_off,
    sum_dtype,
    unpack,
    within,
)


class Part(NamedTuple):
    """What the gradients of a piece are made of; both tensors may be written over, unless they are an argument's."""

    place: tuple[slice, ...]
    h: Tensor  # in the dtype of the computation
    centered: Callable[[Tensor], Tensor]  # writes x - mean, in the dtype of what it is given
    keep: Tensor | None  # which positions count


Parts = Callable[[], Iterator[Part]]  # of one group, each time it is asked for


def backward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, empty where not needed, in one step; writes ``grad_residual``."""
    a = BackwardArguments(*arguments, **named)
    return gradients(a._replace(mask=real_mask(a.mask)), parts_of_input)


def real_mask(mask: Tensor | None) -> Tensor | None:
    """The mask, unless it is an empty one, which stands for none."""
    return None if mask is None or not mask.numel() else mask


def gradients(
    a: BackwardArguments, parts_of: Callable[[BackwardArguments, Affine, int], Iterator[Part]]
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward``, from h and x - mean of the pieces of each group, by its number."""
    input, sums_, dots = a.input, [], []
    grad_input = empty_normalised(input) if a.need_input else None
    for i, rows in enumerate(group_slices(input.size(0), a.groups if a.training else 1)):
        affine = Affine.of(*of_group(a.statistics, i, input.size(1)), a.weight, a.bias, input)
        to = None if grad_input is None else grad_input[rows]
        part = entries(a, rows)
        total, dot = _backward_of_group(part, affine, partial(parts_of, part, affine, i), to)
        sums_.append(total)
        dots.append(dot)
    kind, none = param_dtype(input, a.weight, a.bias), input.new_empty(0)
    return (
        none if grad_input is None else grad_input,
        channel_sums(torch.stack(dots)).to(kind) if a.need_params else none.to(kind, copy=True),
        channel_sums(torch.stack(sums_)).to(kind) if a.need_params else none.to(kind, copy=True),
    )


def _backward_of_group(
    a: BackwardArguments, affine: Affine, parts: Parts, grad_input: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of bias and weight of one group, wide; writes those of the input and the residual."""
    n = a.input.numel() // max(a.input.size(1), 1) if a.valid is None else int(a.valid.bool().sum())
    invstd = affine.invstd.flatten()
    total = dot = torch.zeros_like(invstd)
    if a.need_params or (a.training and grad_input is not None):
        total, dot = sums(a, affine, parts)
    means = (total / n, dot * invstd.square() / (n - a.correction)) if n and a.training else None
    write_gradients(a, affine, parts, means, grad_input)
    return total, dot * invstd if n else dot


def sums(a: BackwardArguments, affine: Affine, parts: Parts) -> tuple[Tensor, Tensor]:
    """Per channel the sums of h and of h * (x - mean), wide."""
    total, dot = (wide(a.input.new_zeros(a.input.size(1))) for _ in range(2))
    scratch = Scratch()
    dtype = sum_dtype(a.input)
    for index, h, centered, keep in parts():
        h = scratch.copy("h", h, dtype)
        total[index[1]] += channel_sums(h)
        terms = centered(scratch.like("terms", h, dtype))
        terms = terms if keep is None else terms.masked_fill_(~keep, 0.0)
        dot[index[1]] += channel_sums(terms.mul_(h))
    if dtype != total.dtype:  # of x - near, then
        dot += rounded_off(affine.mean, affine.near, -total.reshape(affine.mean.shape)).flatten()
    return total, dot


def write_gradients(
    a: BackwardArguments,
    affine: Affine,
    parts: Parts,
    means: tuple[Tensor, Tensor] | None,
    grad_input: Tensor | None,
) -> None:
    """Writes the gradients of input and residual; ``means`` are grad_mean and grad_slope of a training batch."""
    if grad_input is None and a.grad_residual is None:
        return
    dtype, scratch = acc_dtype(a.input.dtype), Scratch()
    if means is not None:
        mean, slope = (per_channel(m, a.input) for m in means)
        mean, slope = (mean + rounded_off(affine.mean, affine.near, -slope)).to(dtype), slope.to(dtype)
    for index, h, centered, keep in parts():
        if a.grad_residual is not None:
            a.grad_residual[index] = h
        if grad_input is None:
            continue
        to, scale = grad_input[index], affine.scale[:, index[1]]
        grad = to if to.dtype == dtype else scratch.like("grad", to, dtype)
        if means is not None:
            grad = centered(grad).mul_(slope[:, index[1]]).add_(mean[:, index[1]])
            torch.sub(h, grad, out=grad).mul_(scale)
        else:
            torch.mul(h, scale, out=grad)
        if keep is not None:
            grad.masked_fill_(~keep, 0.0)
        if grad is not to:
            to.copy_(grad)


def parts_of_input(a: BackwardArguments, affine: Affine, group: int) -> Iterator[Part]:
    """h and x - mean of each piece of a group, from the input."""
    scratch = Scratch()
    for rows, indices in groupby(memory_pieces(a.input) if a.input.numel() else (), itemgetter(0)):
        signs = None if a.mask is None else unpack(mask_of(a.mask, a.input, rows), a.input[rows])
        for index in indices:
            x, each = a.input[index], affine.at(index)
            h = _h(a, each, index, None if signs is None else signs[within(index)], scratch)
            keep = None if a.valid is None else counted_of(index, a.valid, a.input)
            h = h if keep is None else torch.where(keep, h, 0.0)
            yield Part(index, h, lambda out, x=x, each=each: each.center(x, out), keep)  # type: ignore[misc]


def _h(
    a: BackwardArguments, affine: Affine, index: tuple[slice, ...], signs: Tensor | None, scratch: Scratch
) -> Tensor:
    """The gradient of what the activation is of, whether a position counts or not."""
    dtype, x = affine.near.dtype, a.input[index]
    h = scratch.copy("h", a.grad_output[index], dtype)
    if a.activation == activations.NONE:
        return h
    if signs is not None:  # any z of those signs has its derivative
        z = scratch.fresh("z", signs, dtype)
    else:
        z = affine.apply(scratch.copy("z", x, dtype), scratch.like("z", x, dtype))
        z = z if a.residual is None else z.add_(a.residual[index])
    return activations.backward(a.activation, h, z, a.slope)

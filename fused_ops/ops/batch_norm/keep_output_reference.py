"""Batch norm that keeps its output instead of its input, in plain PyTorch: the reference of the kernels.

From y = activation(z), z = xhat * weight + bias, follows xhat = (activation^-1(y) - bias) / weight. The rounding of y
reaches xhat amplified by up to |bias / weight| and, where y is that of elu below zero, by (exp(-z) - 1) / |weight|:
where that is more than MAX_AMPLIFICATION, x itself is stored, in the order of memory. docs/batch_norm.md derives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import acc_dtype, is_channels_last, memory_pieces, wide, wide_dtype
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.backward_reference import Part, gradients
from fused_ops.ops.batch_norm.reference import (
    Affine,
    BackwardArguments,
    counted_of,
    entries,
    group_slices,
    of_group,
    per_channel,
)

INVERTIBLE = (activations.NONE, activations.LEAKY_RELU, activations.ELU)
MAX_AMPLIFICATION = 4.0  # kMaxAmplification of csrc/batch_norm/kernels.h


def _in_memory_order(values: Tensor, channels_last: bool) -> Tensor:
    """A piece's values, flat, in the order in which the output lies in memory."""
    return (values.movedim(1, -1) if channels_last else values).reshape(-1)


def _from_memory_order(flat: Tensor, piece: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return flat.reshape(piece.shape)
    return flat.reshape(piece.size(0), *piece.shape[2:], piece.size(1)).movedim(-1, 1)


def stored_mask(output: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, slope: float) -> Tensor:
    """Where x is stored beside the output."""
    channels = output.size(1)
    none = output.new_zeros(channels, dtype=wide_dtype(output))
    size = none + 1 if weight is None else wide(weight).abs()
    shift = none if bias is None else wide(bias).abs()
    flat = min(1.0, slope) if activation == activations.LEAKY_RELU else 1.0
    reach = MAX_AMPLIFICATION * size
    smallest = torch.finfo(output.dtype).smallest_normal / flat if flat else torch.inf
    mask = per_channel(~(shift + smallest <= reach), output)
    mask = mask.expand(output.shape)
    if activation == activations.ELU:
        y = output.to(acc_dtype(output.dtype))
        limit = (-slope * reach / (1 + reach)).to(y.dtype)
        mask = mask | ~(y >= per_channel(limit, y))
    return mask


def keep(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    activation: int,
    slope: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The x that are stored, in the order of memory; where each part of them begins is for kernels to know."""
    last, found = is_channels_last(output), [input.new_empty(0)]
    for index in memory_pieces(output):
        w, b = (None if t is None else t[index[1]] for t in (weight, bias))
        mask = stored_mask(output[index], w, b, activation, slope)
        found.append(_in_memory_order(input[index], last)[_in_memory_order(mask, last)])
    return torch.cat(found), output.new_empty(0, dtype=torch.int64)


class _Stored:
    """The stored x, in the order of memory."""

    def __init__(self, stored: Tensor, output: Tensor) -> None:
        self.values, self._last = stored, is_channels_last(output)
        self.begins = {0: torch.zeros((), dtype=torch.int64, device=stored.device)}  # where each group's begin

    def take(self, mask: Tensor, begin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of a piece in their places, 0 elsewhere, and where the next piece's begin.

        This waits for no device, and more may be stored than is taken, as by a captured graph.
        """
        flat = _in_memory_order(mask, self._last)
        places = flat.cumsum(0).add_(begin)
        end = places[-1].clone()
        if flat.is_cpu and int(end) > self.values.numel():
            raise RuntimeError(f"batch_norm: stored: expected {int(end)} values or more, got {self.values.numel()}")
        values = self.values[places.sub_(1).clamp_(0, self.values.numel() - 1)].to(dtype)
        return _from_memory_order(torch.where(flat, values, 0.0), mask, self._last), end


class _Rebuilt(NamedTuple):
    """Of a piece where x is stored, that x, 0 elsewhere, and x - mean of all; None, None if none is stored."""

    place: tuple[slice, ...]
    affine: Affine
    mask: Tensor | None
    kept: Tensor | None
    centered: Tensor


def _rebuilt(a: BackwardArguments, affine: Affine, group: int, source: _Stored) -> Iterator[_Rebuilt]:
    """The pieces of a group's input: what is not stored is (activation^-1(y) - bias) / (weight * invstd) + mean."""
    begin = source.begins[group]
    for index in memory_pieces(a.input) if a.input.numel() else ():
        y, each = a.input[index], affine.at(index)
        weight, bias = (None if t is None else t[index[1]] for t in (a.weight, a.bias))
        z = _before_activation(y.to(each.near.dtype), a.activation, a.slope)
        centered = (z if bias is None else z - per_channel(bias.to(z.dtype), z)) / each.scale
        mask = kept = None
        if source.values.numel():
            mask = stored_mask(y, weight, bias, a.activation, a.slope)
            kept, begin = source.take(mask, begin, z.dtype)
            centered = torch.where(mask, (kept - each.near) - (each.mean - each.near).to(z.dtype), centered)
        yield _Rebuilt(index, each, mask, kept, centered)
    source.begins[group + 1] = begin


def _before_activation(y: Tensor, activation: int, slope: float) -> Tensor:
    if activation == activations.NONE:
        return y
    below = y.clamp(max=0).div_(slope)
    below = below.log1p_() if activation == activations.ELU else below
    return below.add_(y.clamp(min=0))  # one of the two is 0; a choice by sign is slower than the sum


def rebuild(
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    stored: Tensor,
    activation: int,
    slope: float,
    groups: int,
) -> Tensor:
    """x, in the dtype of the computation."""
    x, source = torch.empty_like(output, dtype=acc_dtype(output.dtype)), _Stored(stored, output)
    a = BackwardArguments(output, output, weight, bias, statistics, activation=activation, slope=slope)
    for i, rows in enumerate(group_slices(output.size(0), groups)):
        affine = Affine.of(*of_group(statistics, i, output.size(1)), weight, bias, output)
        for index, each, mask, kept, centered in _rebuilt(entries(a, rows), affine, i, source):
            found = (centered + each.mean).to(x.dtype)
            x[rows][index] = found if mask is None or kept is None else torch.where(mask, kept, found)
    return x


def before(
    grad_output: Tensor, output: Tensor, z: Tensor, stored: Tensor | None, activation: int, slope: float
) -> Tensor:
    """grad_output times activation': from the output, or from z, which is written over, where x was stored."""
    y, grad = output.to(z.dtype), grad_output.to(z.dtype)
    if activation == activations.LEAKY_RELU:
        return activations.backward(activation, grad, y.clone(), slope)
    if activation == activations.ELU:
        of_y = torch.ops.aten.elu_backward(grad, slope, 1.0, 1.0, True, y)
        return of_y if stored is None else torch.where(stored, activations.backward(activation, grad, z, slope), of_y)
    return grad


def keep_backward(
    grad_output: Tensor,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    stored: Tensor,
    offsets: Tensor,
    training: bool,
    need_input: bool,
    need_params: bool,
    correction: int,
    activation: int,
    slope: float,
    valid: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward`` from the forward's output, from which x - mean is rebuilt."""
    centered = torch.stack((torch.zeros_like(statistics[0]), statistics[1]))  # what is rebuilt has a mean of 0
    numbers = training, need_input, need_params, correction, activation, slope
    a = BackwardArguments(grad_output, output, weight, bias, centered, *numbers, valid=valid, groups=groups)
    return gradients(a, partial(_parts_of_output, statistics, _Stored(stored, output)))


def _parts_of_output(
    statistics: Tensor, source: _Stored, a: BackwardArguments, centered: Affine, group: int
) -> Iterator[Part]:
    """h and x - mean of each piece of a group, from the output."""
    affine = Affine.of(*of_group(statistics, group, a.input.size(1)), a.weight, a.bias, a.input)
    for index, each, mask, _, x in _rebuilt(a, affine, group, source):
        z = x
        if mask is not None and a.activation == activations.ELU:
            z = x * each.scale if a.bias is None else x * each.scale + per_channel(a.bias[index[1]].to(x.dtype), x)
        h = before(a.grad_output[index], a.input[index], z, mask, a.activation, a.slope)
        keep = None if a.valid is None else counted_of(index, a.valid, a.input)
        h = h if keep is None else torch.where(keep, h, 0.0)
        yield Part(index, h, lambda out, x=x: out.copy_(x), keep)  # type: ignore[misc]

"""Batch norm in parts in plain PyTorch: the reference of the kernels for a batch that is spread over processes.

What of ``reference`` is computed on each process, and from what all of them have found::

    n, mean, M2    of this part of the batch; merged:  mean = sum(n_r mean_r) / N
                                                       M2   = sum(M2_r + n_r (mean_r - mean) ** 2)
    y              from the merged mean and invstd
    sum(h), sum(h * (x - mean))  of this part; added over the parts, they give grad_mean and grad_slope
    grad_x = weight * invstd * (h - grad_mean - (x - mean) * grad_slope)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import channel_sums, empty_normalised, wide_dtype
from fused_ops.ops.batch_norm import backward_reference, reference
from fused_ops.ops.batch_norm.backward_reference import Parts
from fused_ops.ops.batch_norm.reference import Affine, BackwardArguments, ForwardArguments, normalised


class Merged(NamedTuple):
    """The statistics of a batch, wide: the first two (channels,)."""

    mean: Tensor
    m2: Tensor
    values: Tensor  # how many count, a scalar
    positions: Tensor  # likewise, those that do not count included


def moments(input: Tensor, valid: Tensor | None = None) -> Tensor:
    """(2 + 2 * channels,) wide: how many values of a channel count, how many there are, the means, and M2."""
    positions = input.size(0) * math.prod(input.shape[2:])
    n, mean, m2 = reference.moments(input, valid)
    counts = torch.tensor([n, positions], dtype=wide_dtype(input), device=input.device)
    return torch.cat([counts, mean if n else m2, m2])  # means of 0 where nothing counts


def merge(parts: Tensor) -> Merged:
    """The statistics of a batch from the ``moments`` of its parts, (parts, 2 + 2 * channels), in their order.

    The means are taken as deviations from the first part's that has values, so that parts of one mean have exactly
    that; where one is infinite, so is theirs.
    """
    counts, means, m2s = parts[:, :1], *parts[:, 2:].chunk(2, 1)
    count = counts.sum()
    share = counts / count
    first = means.index_select(0, (counts > 0).to(torch.uint8).argmax(0))[0]
    mean = first + channel_sums(share * (means - first))
    mean = torch.where(mean.isfinite(), mean, channel_sums(share * means))
    m2 = channel_sums(m2s + counts * (means - mean).square())
    return Merged(mean, m2, count, parts[:, 1].sum())


def normalise(statistics: Tensor, input: Tensor, *options: Any) -> Tensor:
    """The output; ``options`` are weight, bias, activation, slope, residual, mask, valid. Writes ``mask``."""
    weight, bias, activation, slope, *more = options
    a = ForwardArguments(input, None, None, weight, bias, False, 0.0, 0.0, 0, activation, slope, *more)
    return normalised(a, statistics, 1)


def _backward_of(*arguments: Any) -> tuple[BackwardArguments, Affine, Parts]:
    grad_output, input, weight, bias, statistics, activation, slope, *more = arguments
    a = BackwardArguments(grad_output, input, weight, bias, statistics, True, True, True, 0, activation, slope, *more)
    affine = Affine.of(statistics[0], statistics[1], weight, bias, input)
    a = a._replace(mask=backward_reference.real_mask(a.mask))
    return a, affine, partial(backward_reference.parts_of_input, a, affine, 0)


def grad_sums(*arguments: Any) -> Tensor:
    """(2, channels) wide: the sums of h and of h * (x - mean).

    Args:
        *arguments: grad_output, input, weight, bias, statistics, activation, slope, residual, mask, valid.
    """
    return torch.stack(backward_reference.sums(*_backward_of(*arguments)))


def gradient(means: Tensor | None, grad_residual: Tensor | None, *arguments: Any) -> Tensor:
    """grad_input, empty without ``means``, which are grad_mean and grad_slope; writes ``grad_residual``."""
    a, affine, parts = _backward_of(*arguments)
    grad_input = None if means is None else empty_normalised(a.input)
    pair = None if means is None else (means[0], means[1])
    backward_reference.write_gradients(a._replace(grad_residual=grad_residual), affine, parts, pair, grad_input)
    return a.input.new_empty(0) if grad_input is None else grad_input

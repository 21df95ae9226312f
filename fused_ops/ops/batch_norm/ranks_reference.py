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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Piece, empty_output
from fused_ops.ops.batch_norm.reference import (
    BackwardArguments,
    ForwardArguments,
    before_activation,
    normalised,
    per_channel,
    unpack,
)


class Merged(NamedTuple):
    """The statistics of a batch: the first two (channels,), each float64."""

    mean: Tensor
    m2: Tensor
    values: Tensor  # how many count, a scalar
    positions: Tensor  # likewise, those that do not count included


def moments(input: Tensor, valid: Tensor | None = None) -> Tensor:
    """(2 + 2 * channels,) float64: how many values of a channel count, how many there are, the means, and M2."""
    channels, positions = input.size(1), input.size(0) * math.prod(input.shape[2:])
    x = input.double().movedim(1, 0).reshape(channels, positions)
    if valid is not None:
        x = x[:, valid.reshape(-1).bool()]
    mean = x.mean(1) if x.size(1) else x.new_zeros(channels)
    m2 = (x - mean.unsqueeze(1)).square().sum(1)
    return torch.cat([x.new_tensor([x.size(1) if channels else 0, positions]), mean, m2])


def merge(parts: Tensor) -> Merged:
    """The statistics of a batch from the ``moments`` of its parts, (parts, 2 + 2 * channels), in their order.

    The means are taken as deviations from the first part's that has values, so that parts of one mean have exactly
    that; where one is infinite, so is theirs.
    """
    counts, means, m2s = parts[:, :1], *parts[:, 2:].chunk(2, 1)
    count = counts.sum()
    share = counts / count
    first = means.index_select(0, (counts > 0).to(torch.uint8).argmax(0))[0]
    mean = first + (share * (means - first)).sum(0)
    mean = torch.where(mean.isfinite(), mean, (share * means).sum(0))
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return Merged(mean, m2, count, parts[:, 1].sum())


def normalise(statistics: Tensor, input: Tensor, *options: Any) -> Tensor:
    """The output; ``options`` are weight, bias, activation, slope, residual, mask, valid. Writes ``mask``."""
    weight, bias, activation, slope, *more = options
    a = ForwardArguments(input, None, None, weight, bias, False, 0.0, 0.0, 0, activation, slope, *more)
    return normalised(a, statistics, 1)


def _before(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_output, input, weight, bias, statistics, activation, slope, *more = arguments
    a = BackwardArguments(grad_output, input, weight, bias, statistics, False, True, True, 0, activation, slope, *more)
    positive = None if a.mask is None or not a.mask.numel() else unpack(a.mask, input)
    mean, invstd = statistics.unbind(0)
    return before_activation(a, Piece((), ()), mean, per_channel(invstd, input), positive)


def grad_sums(*arguments: Any) -> Tensor:
    """(2, channels) float64: the sums of h and of h * (x - mean).

    Args:
        *arguments: grad_output, input, weight, bias, statistics, activation, slope, residual, mask, valid.
    """
    h, centered, _, _ = _before(*arguments)
    dims = [d for d in range(h.dim()) if d != 1]
    return torch.stack([t.sum(dims, dtype=torch.float64) for t in (h, h * centered)])


def gradient(means: Tensor | None, grad_residual: Tensor | None, *arguments: Any) -> Tensor:
    """grad_input, empty without ``means``, which are grad_mean and grad_slope; writes ``grad_residual``."""
    h, centered, scale, keep = _before(*arguments)
    input: Tensor = arguments[1]
    if grad_residual is not None:
        grad_residual.copy_(h)
    if means is None:
        return input.new_empty(0)
    grad_mean, grad_slope = (per_channel(m, h) for m in means)
    return empty_output(input).copy_(torch.where(keep, (h - grad_mean - centered * grad_slope) * scale, 0.0))

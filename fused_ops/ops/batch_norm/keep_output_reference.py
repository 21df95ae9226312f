"""Batch norm that keeps its output instead of its input, in plain PyTorch: the reference of the kernels.

From y = activation(z), z = xhat * weight + bias, follows xhat = (activation^-1(y) - bias) / weight. The rounding of y
reaches xhat amplified by up to |bias / weight| and, where y is that of elu below zero, by (exp(-z) - 1) / |weight|:
where that is more than MAX_AMPLIFICATION, x itself is stored, in the order of memory. docs/batch_norm.md derives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.core.memory_format import acc_dtype, empty_output, is_channels_last, wide, wide_dtype
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.backward_reference import backward
from fused_ops.ops.batch_norm.reference import by_row, param_dtype, per_channel

INVERTIBLE = (activations.NONE, activations.LEAKY_RELU, activations.ELU)
MAX_AMPLIFICATION = 4.0  # kMaxAmplification of csrc/batch_norm/kernels.h


def in_memory_order(values: Tensor, output: Tensor) -> Tensor:
    """The values, flat, in the order in which ``output`` lies in memory."""
    return (values.movedim(1, -1) if is_channels_last(output) else values).reshape(-1)


def _from_memory_order(flat: Tensor, output: Tensor) -> Tensor:
    if not is_channels_last(output):
        return flat.reshape(output.shape)
    return flat.reshape(output.size(0), *output.shape[2:], output.size(1)).movedim(-1, 1)


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
    mask = in_memory_order(stored_mask(output, weight, bias, activation, slope), output)
    return in_memory_order(input, output)[mask], output.new_empty(0, dtype=torch.int64)


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
    mask, kept, centered = _centered(output, weight, bias, statistics, stored, activation, slope, groups)
    return torch.where(mask, kept, (centered + by_row(statistics, output, groups)[0]).to(centered.dtype))


def _centered(
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    stored: Tensor,
    activation: int,
    slope: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where x is stored, that x, 0 elsewhere, and x - mean of all.

    Of the others it is (activation^-1(y) - bias) / (weight * invstd).
    """
    dtype, mask = acc_dtype(output.dtype), stored_mask(output, weight, bias, activation, slope)
    z = y = output.to(dtype)
    if activation == activations.LEAKY_RELU:
        z = torch.where(y > 0, y, y / slope)
    elif activation == activations.ELU:
        z = torch.where(y > 0, y, (y.clamp(max=0) / slope).log1p())
    mean, scale = by_row(statistics, output, groups)
    scale = scale if weight is None else scale * wide(per_channel(weight, y))
    z = z if bias is None else z - per_channel(bias.to(dtype), y)
    # a masked scatter waits for no device, and takes what has room for more than is stored, as a captured graph's
    flat = y.new_zeros(y.numel()).masked_scatter_(in_memory_order(mask, output), stored.to(dtype))
    kept, near = _from_memory_order(flat, output), mean.to(dtype)
    return mask, kept, torch.where(mask, (kept - near) - (mean - near).to(dtype), z / scale.to(dtype))


def before(grad_output: Tensor, output: Tensor, z: Tensor, stored: Tensor, activation: int, slope: float) -> Tensor:
    """grad_output times activation': from the output, or from z where x was stored."""
    y = output.to(z.dtype)
    grad = grad_output.to(z.dtype)
    if activation == activations.LEAKY_RELU:
        return torch.where(y > 0, grad, grad * slope)
    if activation == activations.ELU:
        below = torch.where(stored, slope * z.clamp(max=0).exp(), y + slope)
        return torch.where(torch.where(stored, z, y) > 0, grad, grad * below)
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
    y = output
    mask, _, centered = _centered(y, weight, bias, statistics, stored, activation, slope, groups)
    invstd = by_row(statistics, y, groups)[1]
    scale = invstd if weight is None else invstd * wide(per_channel(weight, y))
    z = centered * scale.to(centered.dtype)
    z = z if bias is None else z + per_channel(bias.to(z.dtype), z)
    h = before(grad_output, y, z, mask, activation, slope)
    tensors = h, centered, weight, bias, torch.stack((torch.zeros_like(statistics[0]), statistics[1]))
    grad_input, *grads = backward(*tensors, training, need_input, need_params, correction, valid=valid, groups=groups)
    kind = param_dtype(y, weight, bias)
    to = empty_output(y).copy_(grad_input) if need_input else y.new_empty(0)
    return to, grads[0].to(kind), grads[1].to(kind)

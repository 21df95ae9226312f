"""Batch norm that keeps its output instead of its input, in plain PyTorch.

From y = activation(z), z = xhat * weight + bias, follows xhat = (activation^-1(y) - bias) / weight. The rounding of y
reaches xhat amplified by up to |bias / weight| and, where y is that of elu below zero, by (exp(-z) - 1) / |weight|:
where that is more than MAX_AMPLIFICATION, x itself is kept, in the order of memory. docs/batch_norm.md derives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.core.memory_format import empty_output, is_channels_last
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.reference import acc_dtype, act_backward, group_count, group_size, per_channel

INVERTIBLE = (activations.NONE, activations.LEAKY_RELU, activations.ELU)
MAX_AMPLIFICATION = 4.0  # kMaxAmplification of csrc/batch_norm/keep_output_kernels.h


def in_memory_order(values: Tensor, output: Tensor) -> Tensor:
    """The values, flat, in the order in which ``output`` lies in memory."""
    return (values.movedim(1, -1) if is_channels_last(output) else values).reshape(-1)


def _from_memory_order(flat: Tensor, output: Tensor) -> Tensor:
    if not is_channels_last(output):
        return flat.reshape(output.shape)
    return flat.reshape(output.size(0), *output.shape[2:], output.size(1)).movedim(-1, 1)


def kept_mask(output: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, slope: float) -> Tensor:
    """Where x is kept."""
    channels = output.size(1)
    none = output.new_zeros(channels, dtype=torch.float64)
    size = none + 1 if weight is None else weight.double().abs()
    shift = none if bias is None else bias.double().abs()
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
    """The x that are kept, in the order of memory; where each part of them begins is for kernels to know."""
    mask = in_memory_order(kept_mask(output, weight, bias, activation, slope), output)
    return in_memory_order(input, output)[mask], output.new_empty(0, dtype=torch.int64)


def rebuild(
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    kept: Tensor,
    activation: int,
    slope: float,
    groups: int,
) -> Tensor:
    """x in float64."""
    y = output.double()
    z = y
    if activation == activations.LEAKY_RELU:
        z = torch.where(y > 0, y, y / slope)
    elif activation == activations.ELU:
        z = torch.where(y > 0, y, (y.clamp(max=0) / slope).log1p())
    if bias is not None:
        z = z - per_channel(bias.double(), z)
    if weight is not None:
        z = z / per_channel(weight.double(), z)
    which = torch.arange(y.size(0), device=y.device) // group_size(y.size(0), groups)
    by_group = (group_count(y.size(0), groups), y.size(1), *[1] * (y.dim() - 2))
    x = mean.reshape(by_group)[which] + z / invstd.reshape(by_group)[which]
    flat = in_memory_order(x, output).clone()
    flat[in_memory_order(kept_mask(output, weight, bias, activation, slope), output)] = kept.double()
    return _from_memory_order(flat, output)


def before(grad_output: Tensor, output: Tensor, z: Tensor, kept: Tensor, activation: int, slope: float) -> Tensor:
    """grad_output times activation': from the output, or from z where x was kept."""
    grad = grad_output.double()
    if activation == activations.LEAKY_RELU:
        return torch.where(output > 0, grad, grad * slope)
    if activation == activations.ELU:
        y = output.double()
        below = torch.where(kept, slope * z.clamp(max=0).exp(), y + slope)
        return torch.where(torch.where(kept, z, y) > 0, grad, grad * below)
    return grad


def inplace_backward(
    grad_output: Tensor,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    kept: Tensor,
    begins: Tensor,
    valid: Tensor | None,
    training: bool,
    correction: int,
    activation: int,
    slope: float,
    groups: int,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias; empty where not needed."""
    x = rebuild(output, weight, bias, mean, invstd, kept, activation, slope, groups)
    which = torch.arange(x.size(0), device=x.device) // group_size(x.size(0), groups)
    by_group = (group_count(x.size(0), groups), x.size(1), *[1] * (x.dim() - 2))
    z = (x - mean.reshape(by_group)[which]) * invstd.reshape(by_group)[which]
    z = z if weight is None else z * per_channel(weight.double(), z)
    z = z if bias is None else z + per_channel(bias.double(), z)
    h = before(grad_output, output, z, kept_mask(output, weight, bias, activation, slope), activation, slope)
    options = (training, correction, activations.NONE, 0.0, groups, need_input, need_params, False)
    grad_input, _, grad_weight, grad_bias = act_backward(h, x, None, weight, bias, mean, invstd, None, valid, *options)
    kind = weight.dtype if weight is not None else bias.dtype if bias is not None else output.dtype
    to = empty_output(output).copy_(grad_input) if need_input else output.new_empty(0)
    return to, grad_weight.to(kind), grad_bias.to(kind)

"""Batch normalisation in plain PyTorch: the reference of the kernels, and the fallback where there is none.

Per channel, over its n values x::

    mean   = sum(x) / n                    invstd = (M2 / (n - correction) + eps) ** -0.5,  M2 = sum((x - mean) ** 2)
    y      = (x - mean) * invstd * weight + bias
    grad_x = weight * invstd * (g - mean(g) - (x - mean) * invstd**2 * sum(g * (x - mean)) / (n - correction))

``correction`` is 0 for PyTorch's batch norm and 1 for the unbiased variance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def per_channel(values: Tensor, input: Tensor) -> Tensor:
    """(channels,) reshaped so that it broadcasts against (batch, channels, ...)."""
    return values.reshape(1, -1, *[1] * (input.dim() - 2))


def _dims(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def _count(input: Tensor) -> int:
    return input.numel() // max(input.size(1), 1) if input.size(1) else 0


def forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the float64 mean and invstd of each channel, and the new running statistics (empty if none)."""
    x = input.double()
    dims, n, channels = _dims(input), _count(input), input.size(1)
    new_mean = new_var = x.new_empty(0)
    if training:
        mean = x.mean(dims) if n else x.new_full((channels,), float("nan"))
        m2 = (x - per_channel(mean, x)).square().sum(dims)
        invstd = (m2 / (n - correction) + eps).rsqrt() if n != correction else m2 / 0
        if running_mean is not None and running_var is not None:
            unbiased = m2 / (n - 1) if n != 1 else m2 / 0
            new_mean = running_mean.clone() if not n else _blend(running_mean, mean, momentum)
            new_var = running_var.clone() if not n else _blend(running_var, unbiased, momentum)
    else:
        if running_mean is None or running_var is None:
            raise RuntimeError("running_mean must be defined in evaluation mode")
        mean, invstd = running_mean.double().clone(), (running_var.double() + eps).rsqrt()
    y = (x - per_channel(mean, x)) * per_channel(invstd, x)
    if weight is not None:
        y = y * per_channel(weight.double(), x)
    if bias is not None:
        y = y + per_channel(bias.double(), x)
    return torch.empty_like(input).copy_(y), mean, invstd, new_mean, new_var


def _blend(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    return (momentum * batch + (1 - momentum) * running.double()).to(running.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    correction: int,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, in one step from the saved statistics; empty where not needed."""
    g, x = grad_output.double(), input.double()
    dims, n = _dims(input), _count(input)
    centered = x - per_channel(mean, x)
    grad_sum, dot = g.sum(dims), (g * centered).sum(dims)
    like = input if weight is None else weight
    grad_weight = (dot * invstd).to(like.dtype) if need_params else like.new_empty(0)
    grad_bias = grad_sum.to(like.dtype) if need_params else like.new_empty(0)
    if not need_input:
        return input.new_empty(0), grad_weight, grad_bias
    scale = invstd if weight is None else invstd * weight.double()
    grad = g
    if training and n:
        slope = dot * invstd.square() / (n - correction)
        grad = g - per_channel(grad_sum / n, x) - centered * per_channel(slope, x)
    return torch.empty_like(input).copy_(grad * per_channel(scale, x)), grad_weight, grad_bias


def backward_differentiable(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward`` as a differentiable function of grad_output, input and weight: statistics come from ``input``."""
    x, g = input.to(acc_dtype(input.dtype)), grad_output.to(acc_dtype(input.dtype))
    dims, n = _dims(input), _count(input)
    if training:
        centered = x - x.mean(dims, keepdim=True)
        inv = (centered.square().sum(dims, keepdim=True) / (n - correction) + eps).rsqrt()
    else:
        centered = x - per_channel(mean, x).to(x.dtype)
        inv = per_channel(invstd, x).to(x.dtype)
    xhat = centered * inv
    dot = (g * xhat).sum(dims, keepdim=True)
    grad = g
    if training:
        grad = g - g.mean(dims, keepdim=True) - xhat * dot / (n - correction)
    grad = grad * inv
    if weight is not None:
        grad = grad * per_channel(weight.to(x.dtype), x)
    dtype = input.dtype if weight is None else weight.dtype
    return grad.to(input.dtype), dot.flatten().to(dtype), g.sum(dims).to(dtype)

"""The activations that batch norm carries: their codes in the raw ops, and their first two derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.memory_format import serial_pieces

ActivationName = Literal["relu", "leaky_relu", "elu", "silu", "gelu", "tanh", "sigmoid", "hardswish"]
NONE, RELU, LEAKY_RELU, ELU, SILU, GELU, TANH, SIGMOID, HARDSWISH = range(9)
CODES: dict[str | None, int] = {
    None: NONE,
    "relu": RELU,
    "leaky_relu": LEAKY_RELU,
    "elu": ELU,
    "silu": SILU,
    "gelu": GELU,
    "tanh": TANH,
    "sigmoid": SIGMOID,
    "hardswish": HARDSWISH,
}
SIGN_ONLY = (RELU, LEAKY_RELU)  # the derivative needs no more of z than whether it is positive


def slope_of(code: int, negative_slope: float, alpha: float) -> float:
    """What the raw ops take as ``slope``: leaky_relu's negative slope, elu's alpha, 0 for the others."""
    return alpha if code == ELU else negative_slope if code == LEAKY_RELU else 0.0


def function_of(code: int, negative_slope: float, alpha: float) -> Callable[[Tensor], Tensor]:
    """PyTorch's own function of the activation, for graphs that are to hold nothing else."""
    if code == LEAKY_RELU:
        return partial(F.leaky_relu, negative_slope=negative_slope)
    if code == ELU:
        return partial(F.elu, alpha=alpha)
    plain: dict[int, Callable[[Tensor], Tensor]] = {
        RELU: F.relu,
        SILU: F.silu,
        GELU: F.gelu,
        TANH: torch.tanh,
        SIGMOID: torch.sigmoid,
        HARDSWISH: F.hardswish,
    }
    return plain.get(code, lambda z: z)


def apply(code: int, z: Tensor, slope: float) -> Tensor:
    """The activation of z; ``slope`` is leaky_relu's negative slope or elu's alpha.

    Of ops that can be differentiated any number of times, and by a slope that may be a symbol.
    """
    if code == RELU:
        return torch.where(z <= 0, 0.0, z)
    if code == LEAKY_RELU:
        return torch.where(z > 0, z, slope * z)
    if code == ELU:
        return torch.where(z > 0, z, slope * torch.where(z > 0, 0.0, z).expm1())
    if code == SILU:
        return z * z.sigmoid()
    if code == GELU:
        return 0.5 * z * (1 + (z * math.sqrt(0.5)).erf())
    if code == TANH:
        return z.tanh()
    if code == SIGMOID:
        return z.sigmoid()
    if code == HARDSWISH:
        return torch.where(z <= -3, 0.0, torch.where(z < 3, z * (z + 3) / 6, z))
    return z


def apply_(code: int, z: Tensor, slope: float) -> Tensor:
    """``apply``, written over z, by PyTorch's own functions: one pass, and no derivatives.

    But for gelu, whose infinity is NaN in PyTorch's own function on some processors.
    """
    in_place: dict[int, Callable[[Tensor], Tensor]] = {
        RELU: torch.relu_,
        LEAKY_RELU: lambda z: F.leaky_relu(z, slope, inplace=True),
        ELU: lambda z: F.elu(z, slope, inplace=True),
        SILU: lambda z: F.silu(z, inplace=True),
        GELU: lambda z: z.copy_(apply(GELU, z, slope)),
        TANH: torch.tanh_,
        SIGMOID: torch.sigmoid_,
        HARDSWISH: lambda z: F.hardswish(z, inplace=True),
    }
    for part in serial_pieces(z) if code in in_place else ():
        in_place[code](z[part])
    return z


def backward(code: int, grad: Tensor, z: Tensor, slope: float) -> Tensor:
    """grad * ``first_derivative`` at z, which is written over, by PyTorch's own functions in one pass."""
    aten = torch.ops.aten
    one_pass: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
        RELU: lambda grad, z: aten.threshold_backward.grad_input(grad, z, 0.0, grad_input=z),
        LEAKY_RELU: lambda grad, z: aten.leaky_relu_backward.grad_input(grad, z, slope, False, grad_input=z),
        ELU: lambda grad, z: z.copy_(aten.elu_backward(grad, slope, 1.0, 1.0, False, z)),
        SILU: lambda grad, z: aten.silu_backward.grad_input(grad, z, grad_input=z),
        GELU: lambda grad, z: z.copy_(grad * first_derivative(GELU, z, slope)),
        TANH: lambda grad, z: z.copy_(aten.tanh_backward(grad, z.tanh_())),
        SIGMOID: lambda grad, z: z.copy_(aten.sigmoid_backward(grad, z.sigmoid_())),
        HARDSWISH: lambda grad, z: z.copy_(aten.hardswish_backward(grad, z)),
    }
    if code not in one_pass:
        return grad
    for part in serial_pieces(z):
        one_pass[code](grad[part], z[part])
    return z


def sign_derivative(code: int, positive: Tensor, slope: float, dtype: torch.dtype) -> Tensor:
    """The derivative of relu or leaky_relu, from where its input is positive."""
    one = torch.ones((), dtype=dtype, device=positive.device)
    return torch.where(positive, one, one * (slope if code == LEAKY_RELU else 0.0))


def first_derivative(code: int, z: Tensor, slope: float) -> Tensor:
    """The activation's derivative at z, PyTorch's choice at the kinks."""
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    if code == RELU:
        return torch.where(z <= 0, zero, one)
    if code == LEAKY_RELU:
        return torch.where(z > 0, one, slope * one)
    if code == ELU:
        return torch.where(z > 0, one, slope * torch.where(z > 0, zero, z).exp())
    if code == SILU:
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    if code == GELU:
        return 0.5 * (1 + (z * math.sqrt(0.5)).erf()) + z * _normal_density(z)
    if code == TANH:
        return 1 - z.tanh().square()
    if code == SIGMOID:
        s = z.sigmoid()
        return s * (1 - s)
    if code == HARDSWISH:
        return torch.where(z <= -3, zero, torch.where(z < 3, z / 3 + 0.5, one))
    return one


def second_derivative(code: int, z: Tensor, slope: float) -> Tensor:
    """The derivative of ``first_derivative``; 0 at the kinks."""
    zero = torch.zeros_like(z)
    if code == ELU:
        return torch.where(z < 0, slope * torch.where(z < 0, z, zero).exp(), zero)
    if code == SILU:
        s = z.sigmoid()
        return s * (1 - s) * (2 + z * (1 - 2 * s))
    if code == GELU:
        return _normal_density(z) * (2 - z.square())
    if code == TANH:
        t = z.tanh()
        return -2 * t * (1 - t.square())
    if code == SIGMOID:
        s = z.sigmoid()
        return s * (1 - s) * (1 - 2 * s)
    if code == HARDSWISH:
        return torch.where((z > -3) & (z < 3), zero + 1 / 3, zero)
    return zero


def _normal_density(z: Tensor) -> Tensor:
    return (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)

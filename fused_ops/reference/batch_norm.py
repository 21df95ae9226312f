"""Batch normalisation in plain PyTorch: the reference of the kernels, and the fallback where there is none.

Per channel, over its n values x::

    mean   = sum(x) / n                    invstd = (M2 / (n - correction) + eps) ** -0.5,  M2 = sum((x - mean) ** 2)
    y      = (x - mean) * invstd * weight + bias
    grad_x = weight * invstd * (g - mean(g) - (x - mean) * invstd**2 * sum(g * (x - mean)) / (n - correction))

``correction`` is 0 for PyTorch's batch norm and 1 for the unbiased variance.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from fused_ops.reference import Sample


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


class Normalised:
    """(x - mean) * invstd as a differentiable function of x, with the two maps every derivative is made of.

    With m = n - correction, <u, v> the sum over a channel, and xhat the normalised values, xhat is the gradient of
    phi(x) = m / invstd(x). So ``linear``, the derivative of xhat, is symmetric (one map serves tangents and
    gradients), and so is ``quadratic``, its derivative in turn. In evaluation mode the statistics are constants.
    """

    def __init__(self, input: Tensor, mean: Tensor, invstd: Tensor, training: bool, eps: float, correction: int):
        self.x = input.to(acc_dtype(input.dtype))
        self.training, self.dims = training, _dims(input)
        self.degrees = _count(input) - correction
        if training:
            centered = self.x - self.x.mean(self.dims, keepdim=True)
            self.invstd = (self.sum(centered.square()) / self.degrees + eps).rsqrt()
        else:
            centered = self.x - self.spread(mean)
            self.invstd = self.spread(invstd)
        self.xhat = centered * self.invstd

    def spread(self, values: Tensor) -> Tensor:
        """(channels,) in the dtype of the computation, broadcastable against x."""
        return per_channel(values, self.x).to(self.x.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Per channel, keeping the dimensions."""
        return values.sum(self.dims, keepdim=True)

    def linear(self, u: Tensor) -> Tensor:
        """invstd * (u - mean(u) - xhat <xhat, u> / m)."""
        if self.training:
            u = u - u.mean(self.dims, keepdim=True) - self.xhat * (self.sum(self.xhat * u) / self.degrees)
        return self.invstd * u

    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """-invstd / m * (<xhat, v> linear(u) + <xhat, u> linear(v) + <u, linear(v)> xhat)."""
        if not self.training:
            return torch.zeros_like(u)
        along_u, along_v = self.linear(u), self.linear(v)
        total = self.sum(self.xhat * v) * along_u + self.sum(self.xhat * u) * along_v
        return (total + self.sum(u * along_v) * self.xhat) * (-self.invstd / self.degrees)


def jvp(
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    eps: float,
    correction: int,
) -> Tensor:
    """The tangent of the output for the tangents of input, weight and bias."""
    state = Normalised(input, mean, invstd, training, eps, correction)
    return _output_tangent(state, weight, *tangents).to(input.dtype)


def _output_tangent(
    state: Normalised, weight: Tensor | None, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None
) -> Tensor:
    total = torch.zeros_like(state.x)
    if input_t is not None:
        along = state.linear(input_t.to(state.x.dtype))
        total = total + (along if weight is None else along * state.spread(weight))
    if weight_t is not None:
        total = total + state.xhat * state.spread(weight_t)
    if bias_t is not None:
        total = total + state.spread(bias_t)
    return total


def backward_jvp(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    eps: float,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of ``backward`` for the tangents of grad_output, input and weight."""
    state = Normalised(input, mean, invstd, training, eps, correction)
    g, zero = grad_output.to(state.x.dtype), torch.zeros_like(state.x)
    grad_t, input_t, weight_t = tangents
    g_t = zero if grad_t is None else grad_t.to(g.dtype)
    x_t = zero if input_t is None else input_t.to(g.dtype)
    grad_input = state.linear(g_t) + state.quadratic(g, x_t)
    if weight is not None:
        grad_input = grad_input * state.spread(weight)
    if weight_t is not None:
        grad_input = grad_input + state.linear(g) * state.spread(weight_t)
    grad_weight = state.sum(g_t * state.xhat + g * state.linear(x_t)).flatten()
    like = input if weight is None else weight
    return grad_input.to(input.dtype), grad_weight.to(like.dtype), state.sum(g_t).flatten().to(like.dtype)


def double_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of <backward(grad_output, input, weight), grads> with respect to its three arguments.

    That sum is <grad_output, h>, where h is the tangent of the output for tangents ``grads`` of input, weight and bias.
    """
    state = Normalised(input, mean, invstd, training, eps, correction)
    g = grad_output.to(state.x.dtype)
    grad_grad_input, grad_grad_weight, _ = grads
    tangent = _output_tangent(state, weight, *grads)
    grad_input, grad_weight = torch.zeros_like(state.x), None
    if grad_grad_input is not None:
        v = grad_grad_input.to(g.dtype)
        grad_input = state.quadratic(g, v)
        if weight is not None:
            grad_input = grad_input * state.spread(weight)
            grad_weight = state.sum(g * state.linear(v)).flatten().to(weight.dtype)
    if grad_grad_weight is not None:
        grad_input = grad_input + state.linear(g * state.spread(grad_grad_weight))
    return tangent.to(grad_output.dtype), grad_input.to(input.dtype), grad_weight


def samples() -> list[Sample]:
    """Small float64 calls over the option grid."""
    found: list[Sample] = []
    shapes = {"rows": (5, 3), "length": (3, 2, 4), "image": (2, 2, 2, 3), "channels last": (2, 3, 2, 2)}
    for (name, shape), training, correction in itertools.product(shapes.items(), (True, False), (0, 1)):
        generator = torch.Generator().manual_seed(len(found))
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        x, w, b = draw(shape), draw(shape[1]), draw(shape[1])
        if name == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        args = (x.requires_grad_(), draw(shape[1]), draw(shape[1]).exp(), w.requires_grad_(), b.requires_grad_())
        mode = "training" if training else "evaluation"
        label = f"{name}, {mode}, correction {correction}"
        found.append(Sample(label, (*args, training), {"correction": correction}))
        if correction == 0:
            found.append(Sample(f"{name}, {mode}, no weight", (*args[:3], None, None, training)))
    return found

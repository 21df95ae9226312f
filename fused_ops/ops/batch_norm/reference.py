"""Batch normalisation in plain PyTorch: the reference of the kernels, and the fallback where there is none.

Per channel (and ghost batch), over its n values x that count::

    mean = sum(x) / n                      invstd = (M2 / (n - correction) + eps) ** -0.5,  M2 = sum((x - mean) ** 2)
    z    = (x - mean) * invstd * weight + bias + residual             y = activation(z)
    h    = grad_y * activation'(z)         (the gradient of residual)
    grad_x = weight * invstd * (h - mean(h) - (x - mean) * invstd**2 * sum(h * (x - mean)) / (n - correction))

``correction`` is 0 for PyTorch's batch norm and 1 for the unbiased variance. Where a position does not count, y and all
gradients are 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import empty_output, is_channels_last
from fused_ops.core.sample import Sample
from fused_ops.ops.batch_norm import activations

SMALL_PLANE = 32  # planes up to this many values are walked, and masked, as columns


class Saved(NamedTuple):
    """What the forward keeps for the backward; ``mask`` stands in for ``residual`` where the sign of z is enough."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    mask: Tensor | None
    valid: Tensor | None


class Options(NamedTuple):
    """The numbers that the derivatives depend on."""

    training: bool
    eps: float
    correction: int
    activation: int = activations.NONE
    slope: float = 0.0
    groups: int = 1


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def per_channel(values: Tensor, input: Tensor) -> Tensor:
    """(channels,) reshaped so that it broadcasts against (batch, channels, ...)."""
    return values.reshape(1, -1, *[1] * (input.dim() - 2))


def group_size(batch: int, groups: int) -> int:
    """Batch entries in each ghost batch but the last, which has what is left."""
    if groups < 1:
        raise ValueError(f"batch_norm: expected groups to be at least 1, got {groups}")
    return torch.sym_max(1, -(-batch // groups))  # type: ignore[no-any-return]


def group_count(batch: int, groups: int) -> int:
    """Ghost batches that a batch is cut into: ``groups``, or fewer if the batch is small."""
    return torch.sym_max(1, -(-batch // group_size(batch, groups)))  # type: ignore[no-any-return]


def _mask_rows(input: Tensor) -> tuple[int, int]:
    spatial = math.prod(input.shape[2:]) if input.size(0) and input.size(1) else 0
    batch, channels = input.size(0), input.size(1)
    if is_channels_last(input):
        return batch * spatial, channels
    return (batch, channels * spatial) if spatial <= SMALL_PLANE else (batch * channels, spatial)


def has_mask(residual: Tensor | None, valid: Tensor | None, activation: int) -> bool:
    """Whether the forward returns the signs of z: the backward then needs no residual."""
    return residual is not None and valid is None and activation in activations.SIGN_ONLY


def mask_bytes(input: Tensor) -> int:
    """Size of the mask: a bit per value, each row (a plane, or a row of columns) starting a byte."""
    rows, length = _mask_rows(input)
    return rows * ((length + 7) // 8)


def pack(positive: Tensor, input: Tensor) -> Tensor:
    """The mask from a bool tensor of the input's shape."""
    rows, length = _mask_rows(input)
    ordered = positive.movedim(1, -1) if is_channels_last(input) else positive
    bits = torch.nn.functional.pad(ordered.reshape(rows, length).to(torch.uint8), (0, -length % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=input.device)
    return (bits.reshape(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as a bool tensor of the input's shape."""
    rows, length = _mask_rows(input)
    bits = mask.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    flat = bits.reshape(rows, -1)[:, :length].bool()
    if is_channels_last(input):
        return flat.reshape(input.size(0), *input.shape[2:], input.size(1)).movedim(-1, 1)
    return flat.reshape(input.shape)


class Normalised:
    """(x - mean) * invstd as a differentiable function of x, with the two maps every derivative is made of.

    With m = n - correction, <u, v> the sum over a channel, and xhat the normalised values, xhat is the gradient of
    phi(x) = m / invstd(x). So ``linear``, the derivative of xhat, is symmetric (one map serves tangents and
    gradients), and so is ``quadratic``, its derivative in turn. In evaluation mode the statistics are constants.
    """

    def __init__(self, saved: Saved, options: Options, positive: Tensor | None):
        input, self.options = saved.input, options
        self.x = input.to(acc_dtype(input.dtype))
        self.dims = [d for d in range(input.dim()) if d != 1]
        self.keep = None if saved.valid is None else _keep(saved.valid, input).to(self.x.dtype)
        count: Any = input.numel() // max(input.size(1), 1) if self.keep is None else self.keep.sum()
        self.count, self.degrees = count, count - options.correction
        if options.training:
            centered = self.x - self.sum(self.x) / count
            self.invstd = (self.sum(centered.square()) / self.degrees + options.eps).rsqrt()
        else:
            centered = self.x - self.spread(saved.mean)
            self.invstd = self.spread(saved.invstd)
        self.xhat = self.kept(centered * self.invstd)
        self.weight = None if saved.weight is None else self.spread(saved.weight)
        self._set_derivatives(saved, positive)

    def _set_derivatives(self, saved: Saved, positive: Tensor | None) -> None:
        code, slope = self.options.activation, self.options.slope
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        if positive is not None:
            self.first = activations.sign_derivative(code, positive, slope, self.x.dtype)
        elif code != activations.NONE:
            z = self.scaled(self.xhat)
            if saved.bias is not None:
                z = z + self.spread(saved.bias)
            if saved.residual is not None:
                z = z + saved.residual.to(z.dtype)
            self.first = activations.first_derivative(code, z, slope)
            if code not in activations.SIGN_ONLY:
                self.second = activations.second_derivative(code, z, slope)

    def kept(self, values: Tensor) -> Tensor:
        """0 where a position does not count."""
        return values if self.keep is None else values * self.keep

    def spread(self, values: Tensor) -> Tensor:
        """(channels,) in the dtype of the computation, broadcastable against x."""
        return per_channel(values, self.x).to(self.x.dtype)

    def scaled(self, values: Tensor) -> Tensor:
        """Times the weight."""
        return values if self.weight is None else values * self.weight

    def sum(self, values: Tensor) -> Tensor:
        """Per channel over the positions that count, keeping the dimensions."""
        return self.kept(values).sum(self.dims, keepdim=True)

    def linear(self, u: Tensor) -> Tensor:
        """invstd * (u - mean(u) - xhat <xhat, u> / m)."""
        if self.options.training:
            u = u - self.sum(u) / self.count - self.xhat * (self.sum(self.xhat * u) / self.degrees)
        result: Tensor = self.invstd * u
        return self.kept(result)

    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """-invstd / m * (<xhat, v> linear(u) + <xhat, u> linear(v) + <u, linear(v)> xhat)."""
        if not self.options.training:
            return torch.zeros_like(u)
        along_u, along_v = self.linear(u), self.linear(v)
        total = self.sum(self.xhat * v) * along_u + self.sum(self.xhat * u) * along_v
        result: Tensor = (total + self.sum(u * along_v) * self.xhat) * (-self.invstd / self.degrees)
        return result

    def tangent(self, input_t: Tensor, residual_t: Tensor, weight_t: Tensor, bias_t: Tensor) -> Tensor:
        """The tangent of z."""
        total = self.scaled(self.linear(input_t)) + self.xhat * self.spread(weight_t) + self.spread(bias_t)
        return self.kept(total + residual_t)

    def before(self, grad: Tensor) -> Tensor:
        """Times activation'(z): from the gradient of y to that of z."""
        return self.kept(grad if self.first is None else grad * self.first)

    def bend(self, grad: Tensor, tangent: Tensor) -> Tensor:
        """grad * activation''(z) * tangent."""
        return torch.zeros_like(grad) if self.second is None else self.kept(grad * self.second * tangent)


def _keep(valid: Tensor, input: Tensor) -> Tensor:
    return valid.reshape(input.size(0), 1, *input.shape[2:])


def _fill(saved: Saved, elementwise: tuple[Tensor | None, ...], params: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The tensors in the dtype of the computation, zeros for those that are None."""
    x = saved.input
    dtype = acc_dtype(x.dtype)
    filled = [torch.zeros_like(x, dtype=dtype) if t is None else t.to(dtype) for t in elementwise]
    return filled + [x.new_zeros(x.size(1), dtype=dtype) if t is None else t.to(dtype) for t in params]


def _by_group(
    rule: Callable[..., tuple[Tensor, ...]], saved: Saved, options: Options, *elementwise: Tensor
) -> list[Tensor]:
    """``rule(state, *elementwise)`` for each ghost batch: whole tensors joined, (channels,) ones added."""
    positive = None if saved.mask is None else unpack(saved.mask, saved.input)
    groups = options.groups if options.training else 1
    if groups == 1:
        return list(rule(Normalised(saved, options, positive), *elementwise))
    size = group_size(saved.input.size(0), groups)
    channels = saved.input.size(1)
    results = []
    for i, begin in enumerate(range(0, saved.input.size(0), size)):
        cut = [None if t is None else t[begin : begin + size] for t in (saved.residual, saved.valid)]
        here = slice(i * channels, (i + 1) * channels)
        part = saved._replace(
            input=saved.input[begin : begin + size],
            residual=cut[0],
            valid=cut[1],
            mean=saved.mean[here],
            invstd=saved.invstd[here],
            mask=None,
        )
        signs = None if positive is None else positive[begin : begin + size]
        results.append(rule(Normalised(part, options, signs), *(t[begin : begin + size] for t in elementwise)))
    dim = saved.input.dim()
    return [torch.cat(r) if r[0].dim() == dim else torch.stack(r).sum(0) for r in zip(*results, strict=True)]


def jvp(saved: Saved, tangents: tuple[Tensor | None, ...], options: Options) -> Tensor:
    """The tangent of the output for the tangents of input, residual, weight and bias."""
    input_t, residual_t, weight_t, bias_t = _fill(saved, tangents[:2], tangents[2:])

    def rule(state: Normalised, x_t: Tensor, r_t: Tensor) -> tuple[Tensor, ...]:
        return (state.before(state.tangent(x_t, r_t, weight_t, bias_t)),)

    return _by_group(rule, saved, options, input_t, residual_t)[0].to(saved.input.dtype)


def backward_jvp(
    grad_output: Tensor, saved: Saved, tangents: tuple[Tensor | None, ...], options: Options
) -> tuple[Tensor, ...]:
    """The tangents of the gradients of input, residual, weight, bias.

    Args:
        grad_output: The gradient of the output.
        saved: What the forward kept.
        tangents: Those of grad_output, input, residual, weight and bias.
        options: As the forward's.
    """
    grad_t, input_t, residual_t, weight_t, bias_t = _fill(saved, tangents[:3], tangents[3:])
    grad = grad_output.to(grad_t.dtype)

    def rule(state: Normalised, g: Tensor, g_t: Tensor, x_t: Tensor, r_t: Tensor) -> tuple[Tensor, ...]:
        h = state.before(g)
        h_t = state.before(g_t) + state.bend(g, state.tangent(x_t, r_t, weight_t, bias_t))
        grad_input_t = state.scaled(state.linear(h_t) + state.quadratic(h, x_t))
        grad_input_t = grad_input_t + state.linear(h) * state.spread(weight_t)
        grad_weight_t = state.sum(h_t * state.xhat + h * state.linear(x_t))
        return grad_input_t, h_t, grad_weight_t.reshape(-1), state.sum(h_t).reshape(-1)

    found = _by_group(rule, saved, options, grad, grad_t, input_t, residual_t)
    return _rounded(found, saved)


def _rounded(found: list[Tensor], saved: Saved) -> tuple[Tensor, ...]:
    kind = param_dtype(saved.input, saved.weight, saved.bias)
    return tuple(t.to(saved.input.dtype if t.dim() == saved.input.dim() else kind) for t in found)


def param_dtype(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of the gradients of weight and bias."""
    return weight.dtype if weight is not None else bias.dtype if bias is not None else input.dtype


def double_backward(
    grads: tuple[Tensor | None, ...], grad_output: Tensor, saved: Saved, options: Options
) -> tuple[Tensor, ...]:
    """The gradients of <grads, backward> with respect to grad_output, input, residual, weight and bias.

    That sum is <h, t>, where h is the gradient of z, and t the tangent of z for tangents ``grads`` of input, residual,
    weight and bias.
    """
    input_t, residual_t, weight_t, bias_t = _fill(saved, grads[:2], grads[2:])
    grad = grad_output.to(input_t.dtype)

    def rule(state: Normalised, g: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        h, tangent = state.before(g), state.tangent(v, r, weight_t, bias_t)
        bend = state.bend(g, tangent)
        grad_input = state.scaled(state.quadratic(h, v) + state.linear(bend))
        grad_input = grad_input + state.linear(h * state.spread(weight_t))
        grad_weight = state.sum(h * state.linear(v) + bend * state.xhat)
        return state.before(tangent), grad_input, bend, grad_weight.reshape(-1), state.sum(bend).reshape(-1)

    return _rounded(_by_group(rule, saved, options, grad, input_t, residual_t), saved)


def act_forward(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: int,
    activation: int,
    slope: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the float64 mean and invstd of each (group and) channel, new running statistics, and the mask."""
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("running_mean must be defined in evaluation mode")
        mean, invstd = running_mean.double().clone(), (running_var.double() + eps).rsqrt()
        new_mean = new_var = mean.new_empty(0)
        size = max(1, input.size(0))
    else:
        mean, invstd, new_mean, new_var = _statistics(
            input, running_mean, running_var, valid, momentum, eps, correction, groups
        )
        size = group_size(input.size(0), groups)
    which = torch.arange(input.size(0), device=input.device) // size
    count = group_count(input.size(0), groups) if training else 1
    per_group = (count, input.size(1), *[1] * (input.dim() - 2))
    z = (input.double() - mean.reshape(per_group)[which]) * invstd.reshape(per_group)[which]
    if weight is not None:
        z = z * per_channel(weight.double(), z)
    if bias is not None:
        z = z + per_channel(bias.double(), z)
    if residual is not None:
        z = z + residual.double()
    mask = pack(~(z <= 0), input) if has_mask(residual, valid, activation) else z.new_empty(0, dtype=torch.uint8)
    y = activations.apply(activation, z, slope)
    if valid is not None:
        y = torch.where(_keep(valid, input).bool(), y, 0.0)
    return empty_output(input).copy_(y), mean, invstd, new_mean, new_var, mask


def _statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    valid: Tensor | None,
    momentum: float,
    eps: float,
    correction: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    means, invstds = [], []
    new = [None if r is None else r.double() for r in (running_mean, running_var)]
    size, channels = group_size(input.size(0), groups), input.size(1)
    for begin in range(0, max(input.size(0), 1), size):
        x = input[begin : begin + size].double().movedim(1, 0).reshape(channels, -1 if channels else 0)
        if valid is not None:
            x = x[:, valid[begin : begin + size].reshape(-1).bool()]
        n = x.size(1)
        mean = x.mean(1) if n else x.new_full((channels,), float("nan"))
        m2 = (x - mean.unsqueeze(1)).square().sum(1)
        invstds.append((m2 / (n - correction) + eps).rsqrt() if n > correction else m2 / 0 if n else mean)
        means.append(mean)
        if n and new[0] is not None and new[1] is not None:
            new[0] = momentum * mean + (1 - momentum) * new[0]
            new[1] = momentum * (m2 / (n - 1) if n > 1 else m2 / 0) + (1 - momentum) * new[1]
    mean, invstd = torch.cat(means), torch.cat(invstds)
    if running_mean is None or running_var is None or new[0] is None or new[1] is None:
        return mean, invstd, mean.new_empty(0), mean.new_empty(0)
    return mean, invstd, new[0].to(running_mean.dtype), new[1].to(running_var.dtype)


def act_backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    training: bool,
    correction: int,
    activation: int,
    slope: float,
    groups: int,
    need_input: bool,
    need_params: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, residual, weight and bias, in one step from what was saved; empty where not needed."""
    groups = groups if training else 1
    positive = None if mask is None or not mask.numel() else unpack(mask, input)
    size, channels = group_size(input.size(0), groups), input.size(1)
    inputs, befores, sums, dots = [], [], [], []
    for i, begin in enumerate(range(0, max(input.size(0), 1), size)):
        rows, here = slice(begin, begin + size), slice(i * channels, (i + 1) * channels)
        x, h = input[rows].double(), grad_output[rows].double()
        centered, inv = x - per_channel(mean[here], x), per_channel(invstd[here], x)
        scale = inv if weight is None else inv * per_channel(weight.double(), x)
        if positive is not None:
            h = h * activations.sign_derivative(activation, positive[rows], slope, h.dtype)
        elif activation != activations.NONE:
            z = centered * scale if bias is None else centered * scale + per_channel(bias.double(), x)
            z = z if residual is None else z + residual[rows].double()
            h = h * activations.first_derivative(activation, z, slope)
        keep = torch.ones((), dtype=torch.bool, device=x.device)
        if valid is not None:
            keep = _keep(valid[rows], x).bool()
            h, centered = torch.where(keep, h, 0.0), torch.where(keep, centered, 0.0)
        n = int(keep.sum()) if valid is not None else x.numel() // max(channels, 1)
        dims = [d for d in range(x.dim()) if d != 1]
        total, dot = h.sum(dims, keepdim=True), (h * centered).sum(dims, keepdim=True)
        grad = h
        if training and n:
            grad = torch.where(keep, h - total / n - centered * (dot * inv.square() / (n - correction)), 0.0)
        inputs.append(grad * scale)
        befores.append(h)
        sums.append(total.flatten())
        dots.append((dot * inv if n else dot).flatten())
    kind, none = param_dtype(input, weight, bias), input.new_empty(0)
    return (
        empty_output(input).copy_(torch.cat(inputs)) if need_input else none,
        empty_output(input).copy_(torch.cat(befores)) if need_residual else none.clone(),
        torch.stack(dots).sum(0).to(kind) if need_params else none.to(kind, copy=True),
        torch.stack(sums).sum(0).to(kind) if need_params else none.to(kind, copy=True),
    )


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
    """``act_forward`` without a residual, an activation, a valid mask or ghost batches."""
    options = (training, momentum, eps, correction, activations.NONE, 0.0, 1)
    return act_forward(input, None, running_mean, running_var, weight, bias, None, *options)[:5]


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
    """``act_backward`` of ``forward``."""
    options = (training, correction, activations.NONE, 0.0, 1, need_input, need_params, False)
    found = act_backward(grad_output, input, None, weight, None, mean, invstd, None, None, *options)
    return found[0], found[2], found[3]


def check_written(*statistics: Tensor | None) -> None:
    """Raises for running statistics of which several are one in memory, which training would write."""
    if any(t is not None and t.dim() == 1 and t.size(0) > 1 and t.stride(0) == 0 for t in statistics):
        raise RuntimeError(
            "batch_norm: running statistics: unsupported operation: more than one element of the written-to tensor "
            "refers to a single memory location. Please clone() the tensor before performing the operation."
        )


def packed_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 0,
    activation: int = activations.NONE,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``act_forward`` without a residual, valid mask or ghost batches; the running statistics are written in place."""
    if training and input.size(1) and input.numel() == input.size(1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    if training:
        check_written(running_mean, running_var)
    options = (training, momentum, eps, correction, activation, slope, 1)
    output, mean, invstd, *new, _ = act_forward(input, None, running_mean, running_var, weight, bias, None, *options)
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(new[0])
        running_var.copy_(new[1])
    return output, torch.stack((mean, invstd))


def packed_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    training: bool = True,
    need_input: bool = True,
    need_params: bool = True,
    correction: int = 0,
    activation: int = activations.NONE,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act_backward`` of ``packed_forward``."""
    options = (training, correction, activation, slope, 1, need_input, need_params, False)
    mean, invstd = statistics.unbind(0)
    found = act_backward(grad_output, input, None, weight, bias, mean, invstd, None, None, *options)
    return found[0], found[2], found[3]


def samples() -> list[Sample]:
    """Small float64 calls over the option grid."""
    found: list[Sample] = []

    def add(name: str, shape: tuple[int, ...], training: bool, affine: bool = True, **options: Any) -> None:
        generator = torch.Generator().manual_seed(len(found))
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        x, w, b, r = draw(shape), draw(shape[1]), draw(shape[1]), draw(shape)
        if "channels last" in name:
            x = x.contiguous(memory_format=torch.channels_last)
        if options.pop("residual", False):
            options["residual"] = r.requires_grad_()
        stats = (draw(shape[1]), draw(shape[1]).exp())
        params = (w.requires_grad_(), b.requires_grad_()) if affine else (None, None)
        label = f"{name}, {'training' if training else 'evaluation'}"
        found.append(Sample(label, (x.requires_grad_(), *stats, *params, training), options))

    shapes = {"rows": (5, 3), "length": (3, 2, 4), "image": (2, 2, 2, 3), "channels last": (2, 3, 2, 2)}
    for (name, shape), training in itertools.product(shapes.items(), (True, False)):
        add(name, shape, training)
        add(f"{name}, correction 1", shape, training, correction=1)
        add(f"{name}, no weight", shape, training, affine=False)
        add(f"{name}, relu after residual", shape, training, activation="relu", residual=True)
    for activation, training in itertools.product(activations.CODES, (True, False)):
        if activation is not None:
            add(activation, (4, 3), training, activation=activation)
            add(f"{activation}, residual", (2, 2, 3), training, activation=activation, residual=True)
    lengths, rows = torch.tensor([4, 2, 3]), torch.tensor([True, False, True, True, True])
    for training in (True, False):
        add("lengths, silu after residual", (3, 2, 4), training, valid=lengths, activation="silu", residual=True)
        add("valid rows", (5, 2), training, valid=rows, activation="relu", residual=True)
    add("ghost batches", (7, 2), True, groups=2)
    add("ragged ghost batches, gelu after residual", (5, 2, 2), True, groups=2, activation="gelu", residual=True)
    kinds = itertools.product((None, "leaky_relu", "elu"), ("rows", "image", "channels last"), (True, False))
    for activation, name, training in kinds:
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": 0.2,
            "alpha": 1.3,
            "inplace_activated": True,
        }
        add(f"{name}, output of {activation} kept", shapes[name], training, **options)
    add("ghost batches, output kept", (5, 2, 2), True, groups=2, activation="elu", inplace_activated=True)
    add("lengths, output kept", (3, 2, 4), True, valid=lengths, activation="leaky_relu", inplace_activated=True)
    return found

"""The derivatives of batch norm's derivatives in plain PyTorch, and batch norm as PyTorch's own differentiable ops.

``jvp``, ``backward_jvp`` and ``double_backward`` are closed forms of the Functions' rules. ``formulas`` is right under
every transform, any number of times; nothing in it depends on a value or, but for the number of dimensions, on a size:
a trace serves every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.memory_format import acc_dtype, wide
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.reference import (
    Call,
    Options,
    Saved,
    counted,
    group_size,
    param_dtype,
    per_channel,
    unpack,
)

_Sum = Callable[[Tensor], Tensor]


class Normalised:
    """(x - mean) * invstd as a differentiable function of x, with the two maps every derivative is made of.

    With m = n - correction, <u, v> the sum over a channel, and xhat the normalised values, xhat is the gradient of
    phi(x) = m / invstd(x). So ``linear``, the derivative of xhat, is symmetric (one map serves tangents and
    gradients), and so is ``quadratic``, its derivative in turn. In evaluation mode the statistics are constants.
    """

    def __init__(self, saved: Saved, options: Options, positive: Tensor | None, over_ranks: _Sum | None = None):
        input, self.options, self.over_ranks = saved.input, options, over_ranks
        self.x = input.to(acc_dtype(input.dtype))
        self.dims = [d for d in range(input.dim()) if d != 1]
        self.keep = None if saved.valid is None else counted(saved.valid, input).to(self.x.dtype)
        count: Any = input.numel() // max(input.size(1), 1) if self.keep is None else self.keep.sum()
        if over_ranks is not None:
            count = self.spread(saved.statistics[2])
        self.count, self.degrees = count, count - options.correction
        if options.training:
            centered = self.x - self.total(self.x) / count
            self.invstd = (self.total(centered.square()) / self.degrees + options.eps).rsqrt()
        else:
            centered = self.x - self.spread(saved.statistics[0])
            self.invstd = self.spread(saved.statistics[1])
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

    def total(self, values: Tensor) -> Tensor:
        """``sum`` over all ranks of a batch that is spread over them."""
        sums = self.sum(values)
        return sums if self.over_ranks is None else self.over_ranks(sums)

    def linear(self, u: Tensor) -> Tensor:
        """invstd * (u - mean(u) - xhat <xhat, u> / m)."""
        if self.options.training:
            u = u - self.total(u) / self.count - self.xhat * (self.total(self.xhat * u) / self.degrees)
        result: Tensor = self.invstd * u
        return self.kept(result)

    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """-invstd / m * (<xhat, v> linear(u) + <xhat, u> linear(v) + <u, linear(v)> xhat)."""
        if not self.options.training:
            return torch.zeros_like(u)
        along_u, along_v = self.linear(u), self.linear(v)
        total = self.total(self.xhat * v) * along_u + self.total(self.xhat * u) * along_v
        result: Tensor = (total + self.total(u * along_v) * self.xhat) * (-self.invstd / self.degrees)
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


def _fill(saved: Saved, elementwise: tuple[Tensor | None, ...], params: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The tensors in the dtype of the computation, zeros for those that are None."""
    x = saved.input
    dtype = acc_dtype(x.dtype)
    filled = [torch.zeros_like(x, dtype=dtype) if t is None else t.to(dtype) for t in elementwise]
    return filled + [x.new_zeros(x.size(1), dtype=dtype) if t is None else t.to(dtype) for t in params]


def _by_group(
    rule: Callable[..., tuple[Tensor, ...]],
    saved: Saved,
    options: Options,
    over_ranks: _Sum | None,
    *elementwise: Tensor,
) -> list[Tensor]:
    """``rule(state, *elementwise)`` for each ghost batch: whole tensors joined, (channels,) ones added."""
    positive = None if saved.mask is None else unpack(saved.mask, saved.input)
    groups = options.groups if options.training else 1
    if groups == 1:
        return list(rule(Normalised(saved, options, positive, over_ranks), *elementwise))
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
            statistics=saved.statistics[:, here],
            mask=None,
        )
        signs = None if positive is None else positive[begin : begin + size]
        results.append(rule(Normalised(part, options, signs), *(t[begin : begin + size] for t in elementwise)))
    dim = saved.input.dim()
    return [torch.cat(r) if r[0].dim() == dim else torch.stack(r).sum(0) for r in zip(*results, strict=True)]


def jvp(saved: Saved, tangents: tuple[Tensor | None, ...], options: Options, over_ranks: _Sum | None = None) -> Tensor:
    """The tangent of the output for the tangents of input, residual, weight and bias."""
    input_t, residual_t, weight_t, bias_t = _fill(saved, tangents[:2], tangents[2:])

    def rule(state: Normalised, x_t: Tensor, r_t: Tensor) -> tuple[Tensor, ...]:
        return (state.before(state.tangent(x_t, r_t, weight_t, bias_t)),)

    return _by_group(rule, saved, options, over_ranks, input_t, residual_t)[0].to(saved.input.dtype)


def backward_jvp(
    grad_output: Tensor,
    saved: Saved,
    tangents: tuple[Tensor | None, ...],
    options: Options,
    over_ranks: _Sum | None = None,
) -> tuple[Tensor, ...]:
    """The tangents of the gradients of input, residual, weight, bias.

    Args:
        grad_output: The gradient of the output.
        saved: What the forward kept.
        tangents: Those of grad_output, input, residual, weight and bias.
        options: As the forward's.
        over_ranks: The sum over the ranks that the batch is spread over, where it is.
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

    found = _by_group(rule, saved, options, over_ranks, grad, grad_t, input_t, residual_t)
    return _rounded(found, saved)


def _rounded(found: list[Tensor], saved: Saved) -> tuple[Tensor, ...]:
    kind = param_dtype(saved.input, saved.weight, saved.bias)
    return tuple(t.to(saved.input.dtype if t.dim() == saved.input.dim() else kind) for t in found)


def double_backward(
    grads: tuple[Tensor | None, ...],
    grad_output: Tensor,
    saved: Saved,
    options: Options,
    over_ranks: _Sum | None = None,
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

    return _rounded(_by_group(rule, saved, options, over_ranks, grad, input_t, residual_t), saved)


# ---- PyTorch's own ops


class _Parts:
    """The parts of a batch that have statistics of their own: all of it, or ghost batches.

    Sums over a part are (groups, channels); ``spread`` brings such values back to (batch, channels, 1, ...).
    """

    def __init__(self, x: Tensor, keep: Tensor | None, groups: int):
        self.x, self.keep, self.groups = x, keep, groups
        rows = x.size(0)
        self.part = torch.arange(rows, device=x.device) // ((rows + groups - 1) // groups)
        counted = torch.ones_like(x[:, :1]) if keep is None else keep.to(x.dtype)
        self.count = self.sum(counted)

    def kept(self, values: Tensor) -> Tensor:
        """0 where a position does not count, whatever is there."""
        return values if self.keep is None else torch.where(self.keep, values, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """Over the positions of each part."""
        by_row = values.flatten(2).sum(2) if values.dim() > 2 else values
        return by_row.new_zeros(self.groups, by_row.size(1)).index_add(0, self.part, by_row)

    def spread(self, values: Tensor) -> Tensor:
        """What each row's part has, to be broadcast against x."""
        by_row = values.index_select(0, self.part)
        return by_row.reshape(*by_row.shape, *[1] * (self.x.dim() - 2))

    def divided(self, sums: Tensor, subtracted: int = 0) -> Tensor:
        """sums / (count - subtracted); a part without values gives 0, which nobody reads."""
        return sums / torch.where(self.count > 0, self.count - subtracted, 1.0)


def formulas(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output, differentiable in input, residual, weight and bias, and the new running statistics (else empty)."""
    input, running_mean, running_var, weight, bias, residual, valid, options = call
    x = input.to(acc_dtype(input.dtype))
    keep = None if valid is None else counted(valid, input).bool()
    new: tuple[Tensor, Tensor] = x.new_empty(0), x.new_empty(0)
    if options.training:
        parts = _Parts(x, keep, options.groups)
        mean = parts.divided(parts.sum(parts.kept(x)))
        centered = parts.kept(x - parts.spread(mean))
        rest = parts.divided(parts.sum(centered))  # what rounding the mean left
        mean, centered = mean + rest, parts.kept(centered - parts.spread(rest))
        squares = parts.sum(centered.square())
        invstd = parts.spread((parts.divided(squares, options.correction) + options.eps).rsqrt())
        if running_mean is not None and running_var is not None:
            new = (
                _updated(running_mean, mean, parts, options.momentum),
                _updated(running_var, parts.divided(squares, 1), parts, options.momentum),
            )
    else:
        assert running_mean is not None and running_var is not None
        centered = x - per_channel(running_mean.to(x.dtype), x)
        centered = centered if keep is None else torch.where(keep, centered, 0.0)
        invstd = per_channel((running_var.to(x.dtype) + options.eps).rsqrt(), x)
    z = centered * invstd
    if weight is not None:
        z = z * per_channel(weight.to(x.dtype), x)
    if bias is not None:
        z = z + per_channel(bias.to(x.dtype), x)
    if residual is not None:
        residual = residual.to(x.dtype)
        z = z + (residual if keep is None else torch.where(keep, residual, 0.0))
    y = activations.apply(options.activation, z, options.slope)
    y = y if keep is None else torch.where(keep, y, 0.0)
    return y.to(input.dtype), *new


def _updated(running: Tensor, values: Tensor, parts: _Parts, momentum: float) -> Tensor:
    """The running statistic after each part in turn; one without values leaves it as it is. No derivatives."""
    new = wide(running)
    for i in range(parts.groups):
        new = torch.where(parts.count[i] > 0, momentum * values[i].detach() + (1 - momentum) * new, new)
    return new.detach().to(running.dtype)

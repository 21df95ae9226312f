"""The raw ops of batch norm and their autograd Functions; the public function is in ``api.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.function import FusedFunction, checked_saved, save
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_output
from fused_ops.core.torch_private import transforms_active
from fused_ops.ops.batch_norm import activations, reference
from fused_ops.ops.batch_norm.reference import Options, Saved


def _fake_act_forward(
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
    channels = input.size(1)
    count = channels * (reference.group_count(input.size(0), groups) if training else 1)
    mean, invstd = (input.new_empty((count,), dtype=torch.float64) for _ in range(2))
    new_mean, new_var = (
        input.new_empty((0,), dtype=torch.float64) if r is None or not training else r.new_empty((channels,))
        for r in (running_mean, running_var)
    )
    bits = reference.mask_bytes(input) if reference.has_mask(residual, valid, activation) else 0
    return empty_output(input), mean, invstd, new_mean, new_var, input.new_empty((bits,), dtype=torch.uint8)


def _fake_act_backward(
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
    kind = reference.param_dtype(input, weight, bias)
    grad_weight, grad_bias = (input.new_empty((input.size(1) if need_params else 0,), dtype=kind) for _ in range(2))
    grad_input, grad_residual = (
        empty_output(input) if need else input.new_empty(0) for need in (need_input, need_residual)
    )
    return grad_input, grad_residual, grad_weight, grad_bias


def _fake_forward(
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
    options = (training, momentum, eps, correction, activations.NONE, 0.0, 1)
    return _fake_act_forward(input, None, running_mean, running_var, weight, bias, None, *options)[:5]


def _fake_backward(
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
    options = (training, correction, activations.NONE, 0.0, 1, need_input, need_params, False)
    found = _fake_act_backward(grad_output, input, None, weight, None, mean, invstd, None, None, *options)
    return found[0], found[2], found[3]


_forward_op: Any = register(
    "batch_norm_forward(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
    "bool training, float momentum, float eps, int correction) "
    "-> (Tensor output, Tensor mean, Tensor invstd, Tensor new_running_mean, Tensor new_running_var)",
    reference.forward,
    _fake_forward,
)
_backward_op: Any = register(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, bool training, "
    "int correction, bool need_input, bool need_params) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference.backward,
    _fake_backward,
)
_act_forward_op: Any = register(
    "batch_norm_act_forward(Tensor input, Tensor? residual, Tensor? running_mean, Tensor? running_var, "
    "Tensor? weight, Tensor? bias, Tensor? valid, bool training, float momentum, float eps, int correction, "
    "int activation, float slope, int groups) -> (Tensor output, Tensor mean, Tensor invstd, "
    "Tensor new_running_mean, Tensor new_running_var, Tensor mask)",
    reference.act_forward,
    _fake_act_forward,
)
_act_backward_op: Any = register(
    "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor invstd, Tensor? mask, Tensor? valid, bool training, int correction, int activation, "
    "float slope, int groups, bool need_input, bool need_params, bool need_residual) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    reference.act_backward,
    _fake_act_backward,
)


class _Fold:
    """Maps a dimension of examples into the channels and back: each example has statistics of its own.

    Args:
        size: Number of examples.
        channels: Of one example.
    """

    def __init__(self, size: int, channels: int):
        self.size, self.channels = size, channels

    def image(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """(batch, channels, ...) of each example -> (batch, size * channels, ...)."""
        if t is None:
            return None
        t = t.unsqueeze(1).expand(-1, self.size, *t.shape[1:]) if dim is None else t.movedim(dim, 1)
        return t.reshape(t.size(0), self.size * self.channels, *t.shape[3:])

    def values(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """(groups * channels) of each example -> (groups * size * channels)."""
        if t is None:
            return None
        t = t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.reshape(self.size, -1, self.channels).movedim(0, 1).reshape(-1)

    def unfold(self, t: Tensor) -> Tensor:
        """Either of them back, with the examples first; an empty tensor is repeated."""
        if t.dim() > 1:
            return t.reshape(t.size(0), self.size, self.channels, *t.shape[2:]).movedim(1, 0)
        if t.numel() == 0:
            return t.expand(self.size, 0)
        return t.reshape(-1, self.size, self.channels).movedim(1, 0).reshape(self.size, -1)


def _example_channels(input: Tensor, dim: int | None) -> int:
    return (input if dim is None else input.select(dim, 0)).size(1)


class BatchNormBackwardFunction(FusedFunction):
    """The gradients of input, residual, weight and bias as functions of grad_output and those four."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        *options: Any,
    ) -> Any:
        training, _, correction, activation, slope, groups = options
        numbers = (training, correction, activation, slope, groups)
        tensors = (input, residual, weight, bias, mean, invstd, mask, valid)
        return _act_backward_op(grad_output, *tensors, *numbers, True, True, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, *inputs[:9])
        ctx.options = Options(*inputs[9:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_output, *tensors = checked_saved(ctx.saved_tensors, *grads)
        found = reference.double_backward(grads, grad_output, Saved(*tensors), ctx.options)
        present = [grad_output, *tensors[:4]]
        return *(g if t is not None else None for g, t in zip(found, present, strict=True)), *(None,) * 10

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        grad_output, *tensors = checked_saved(ctx.saved_tensors, *tangents[:5])
        return reference.backward_jvp(grad_output, Saved(*tensors), tangents[:5], ctx.options)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Folds the examples into the channels."""
        mask, valid, *options = args[7:]
        if mask is not None or in_dims[8] is not None:
            return super().vmap(info, in_dims, *args)
        fold = _Fold(info.batch_size, _example_channels(args[1], in_dims[1]))
        images = [fold.image(t, d) for t, d in zip(args[:3], in_dims[:3], strict=True)]
        values = [fold.values(t, d) for t, d in zip(args[3:7], in_dims[3:7], strict=True)]
        outputs = cls.apply(*images, *values, None, valid, *options)
        return tuple(fold.unfold(t) for t in outputs), (0,) * 4


def _grads(ctx: Any, grad_output: Tensor, saved: Saved, needs: tuple[bool, bool, bool, bool]) -> list[Tensor | None]:
    """The gradients of input, residual, weight and bias, by the raw op or, to be differentiated, by its Function."""
    options: Options = ctx.options
    need_input, need_residual, need_weight, need_bias = needs
    given = need_residual and options.activation == activations.NONE and saved.valid is None
    if torch.is_grad_enabled() or transforms_active():
        found: list[Tensor | None] = [*BatchNormBackwardFunction.apply(grad_output, *saved, *options)]
    else:
        numbers = (options.training, options.correction, options.activation, options.slope, options.groups)
        need_params = need_weight or need_bias
        needs_op = (need_input, need_params, need_residual and not given)
        found = [*_act_backward_op(grad_output, *saved, *numbers, *needs_op)]
    if given:
        found[1] = grad_output
    return [g if need else None for g, need in zip(found, needs, strict=True)]


class BatchNormFunction(FusedFunction):
    """(output, mean, invstd, new running statistics); only the output is differentiable."""

    only_first_output = True

    @staticmethod
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
    ) -> Any:
        return _forward_op(input, running_mean, running_var, weight, bias, training, momentum, eps, correction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, _, _, weight, _, training, _, eps, correction = inputs
        _, mean, invstd, new_mean, new_var = output
        ctx.mark_non_differentiable(mean, invstd, new_mean, new_var)
        ctx.options = Options(training, eps, correction)
        save(ctx, input, weight, mean, invstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 9
        input, weight, mean, invstd = ctx.saved_tensors
        need_input, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or transforms_active():
            tensors = Saved(input, None, weight, None, mean, invstd, None, None)
            found = _grads(ctx, grad_output, tensors, (need_input, False, need_weight, need_bias))
            return found[0], None, None, found[2], found[3], None, None, None, None
        args = (ctx.options.training, ctx.options.correction, need_input, need_weight or need_bias)
        grad_input, grad_weight, grad_bias = _backward_op(grad_output, input, weight, mean, invstd, *args)
        return (
            grad_input if need_input else None,
            None,
            None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        input, weight, mean, invstd = checked_saved(ctx.saved_tensors, *tangents[:5])
        tensors = Saved(input, None, weight, None, mean, invstd, None, None)
        output_t = reference.jvp(tensors, (tangents[0], None, *tangents[3:5]), ctx.options)
        return output_t, None, None, None, None

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Folds the examples into the channels."""
        fold = _Fold(info.batch_size, _example_channels(args[0], in_dims[0]))
        values = [fold.values(t, d) for t, d in zip(args[1:5], in_dims[1:5], strict=True)]
        outputs = cls.apply(fold.image(args[0], in_dims[0]), *values, *args[5:])
        return tuple(fold.unfold(t) for t in outputs), (0,) * 5


class BatchNormActFunction(FusedFunction):
    """(output, mean, invstd, new running statistics, mask); only the output is differentiable."""

    only_first_output = True

    @staticmethod
    def forward(
        input: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        valid: Tensor | None,
        momentum: float,
        *options: Any,
    ) -> Any:
        training, eps, correction, *shape = options
        statistics = (training, momentum, eps, correction)
        return _act_forward_op(input, residual, running_mean, running_var, weight, bias, valid, *statistics, *shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, residual, _, _, weight, bias, valid, _, *numbers = inputs
        options = Options(*numbers)
        _, mean, invstd, new_mean, new_var, mask = output
        ctx.mark_non_differentiable(mean, invstd, new_mean, new_var, mask)
        ctx.options = options
        if reference.has_mask(residual, valid, options.activation):
            residual = bias = None
        else:
            mask = None
        if options.activation == activations.NONE:
            residual = bias = None
        save(ctx, input, residual, weight, bias, mean, invstd, mask, valid)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 14
        need = ctx.needs_input_grad
        found = _grads(ctx, grad_output, Saved(*ctx.saved_tensors), (need[0], need[1], need[4], need[5]))
        return found[0], found[1], None, None, found[2], found[3], *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        wanted = (tangents[0], tangents[1], tangents[4], tangents[5])
        return reference.jvp(Saved(*checked_saved(ctx.saved_tensors, *wanted)), wanted, ctx.options), *(None,) * 5

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Folds the examples into the channels."""
        valid, options = args[6], Options(*args[8:])
        if reference.has_mask(args[1], valid, options.activation) or in_dims[6] is not None:
            return super().vmap(info, in_dims, *args)
        fold = _Fold(info.batch_size, _example_channels(args[0], in_dims[0]))
        images = [fold.image(t, d) for t, d in zip(args[:2], in_dims[:2], strict=True)]
        values = [fold.values(t, d) for t, d in zip(args[2:6], in_dims[2:6], strict=True)]
        outputs = cls.apply(*images, *values, valid, *args[7:])
        return tuple(fold.unfold(t) for t in outputs), (0,) * 6

"""Batch normalisation: public function, autograd Functions, fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops._function import FusedFunction, _transforms_active
from fused_ops._library import register
from fused_ops.reference import batch_norm as reference

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    channels = input.size(1)
    statistics = [input.new_empty((channels,), dtype=torch.float64) for _ in range(2)]
    running = [
        input.new_empty((0,), dtype=torch.float64) if r is None or not training else r.new_empty((channels,))
        for r in (running_mean, running_var)
    ]
    return torch.empty_like(input), statistics[0], statistics[1], running[0], running[1]


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
    like = input if weight is None else weight
    params = [like.new_empty((input.size(1) if need_params else 0,)) for _ in range(2)]
    return torch.empty_like(input) if need_input else input.new_empty(0), params[0], params[1]


_forward_op = register(
    "batch_norm_forward(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
    "bool training, float momentum, float eps, int correction) "
    "-> (Tensor output, Tensor mean, Tensor invstd, Tensor new_running_mean, Tensor new_running_var)",
    reference.forward,
    _fake_forward,
)
_backward_op = register(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, bool training, "
    "int correction, bool need_input, bool need_params) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference.backward,
    _fake_backward,
)


class BatchNormBackwardFunction(FusedFunction):
    """The gradients of input, weight and bias as functions of grad_output, input and weight."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool,
        eps: float,
        correction: int,
    ) -> Any:
        return _backward_op(grad_output, input, weight, mean, invstd, training, correction, True, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = reference.double_backward(grads, *ctx.saved_tensors, *ctx.options)  # type: ignore[arg-type]
        return *found, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_output_t: Tensor | None, input_t: Tensor | None, weight_t: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        tangents = (grad_output_t, input_t, weight_t)
        grad_output, input, weight, mean, invstd = ctx.saved_tensors
        return reference.backward_jvp(grad_output, input, weight, mean, invstd, tangents, *ctx.options)


class BatchNormFunction(FusedFunction):
    """(output, mean, invstd, new running statistics); only the output is differentiable."""

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
        input, _, _, weight, _, ctx.training, _, ctx.eps, ctx.correction = inputs
        _, mean, invstd, new_mean, new_var = output
        ctx.mark_non_differentiable(mean, invstd, new_mean, new_var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.save_for_forward(input, weight, mean, invstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 9
        input, weight, mean, invstd = ctx.saved_tensors
        need_input, need_weight, need_bias = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        if torch.is_grad_enabled() or _transforms_active():
            grads = BatchNormBackwardFunction.apply(
                grad_output, input, weight, mean, invstd, ctx.training, ctx.eps, ctx.correction
            )
        else:
            need_params = need_weight or need_bias
            args = (ctx.training, ctx.correction, need_input, need_params)
            grads = _backward_op(grad_output, input, weight, mean, invstd, *args)
        grad_input, grad_weight, grad_bias = (
            g if need else None for g, need in zip(grads, (need_input, need_weight, need_bias), strict=True)
        )
        return grad_input, None, None, grad_weight, grad_bias, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        input_t: Tensor | None,
        mean_t: None,
        var_t: None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
        *_: Any,
    ) -> Any:
        input, weight, mean, invstd = ctx.saved_tensors
        options = (ctx.training, ctx.eps, ctx.correction)
        output_t = reference.jvp(input, weight, mean, invstd, (input_t, weight_t, bias_t), *options)
        return output_t, None, None, None, None


def _check(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.dim() < 2:
        raise IndexError(f"batch_norm: input must be (batch, channels, ...), got shape {list(input.shape)}")
    if input.dtype not in _INPUT_DTYPES:
        raise NotImplementedError(f"batch_norm: input must be a floating-point tensor, got {input.dtype}")
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if input.size(1) and input.numel() == input.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            if not training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif value.requires_grad:
            raise RuntimeError(f"batch_norm is not differentiable with respect to argument '{name}'.")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    correction: int = 0,
) -> Tensor:
    """Batch normalisation, as ``torch.nn.functional.batch_norm``.

    Args:
        input: (batch, channels) or (batch, channels, ...); float32, float64, bfloat16 or float16.
        running_mean: (channels) or None; updated in place in training, used in evaluation.
        running_var: (channels) or None; updated with the unbiased variance.
        weight: (channels) or None, the scale.
        bias: (channels) or None, the shift.
        training: Whether to normalise with the statistics of this batch.
        momentum: Weight of this batch in the running statistics.
        eps: Added to the variance.
        correction: Subtracted from the number of values in the variance that normalises: 0 as PyTorch, 1 unbiased.

    Returns:
        The normalised tensor, shape and dtype of ``input``.

    Raises:
        ValueError: one value per channel in training, ``eps`` not positive in training, or one of the running
            statistics without the other.
        RuntimeError: no running statistics in evaluation, parameters of a wrong size, or running statistics that
            require grad.
        IndexError: ``input`` has fewer than two dimensions.
        NotImplementedError: ``input`` is not of one of the four floating-point dtypes.
        TypeError: ``input`` is not a tensor.

    Note:
        Statistics are accumulated blockwise and merged in float64, in an order that does not depend on the number of
        threads. Twice differentiable.

    Source: Ioffe and Szegedy, 2015; the one-step backward is derived in docs/batch_norm.md.
    """
    _check(input, running_mean, running_var, training, eps)
    output, _, _, new_mean, new_var = BatchNormFunction.apply(
        input, running_mean, running_var, weight, bias, training, momentum, eps, correction
    )
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
    result: Tensor = output
    return result

"""Batch norm in plain eager mode: raw ops of few tensors, as each one costs a small call a share of its time.

What these ops do is what those of ``fused_ops.batch_norm`` do, which serve everything else. Here mean and invstd are
one tensor, and the running statistics are written in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_ops._function import _transforms_active
from fused_ops._library import register
from fused_ops.reference import _activation, empty_output
from fused_ops.reference import batch_norm as reference
from fused_ops.reference.batch_norm import Options, Saved


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
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    return empty_output(input), input.new_empty((2, input.size(1)), dtype=torch.float64)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    training: bool,
    correction: int,
    activation: int,
    slope: float,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = reference.param_dtype(input, weight, bias)
    grad_weight, grad_bias = (input.new_empty((input.size(1) if need_params else 0,), dtype=kind) for _ in range(2))
    return empty_output(input) if need_input else input.new_empty(0), grad_weight, grad_bias


_forward_op: Any = register(
    "batch_norm_packed_forward(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
    "Tensor? bias, bool training, float momentum, float eps, int correction, int activation, float slope) "
    "-> (Tensor output, Tensor statistics)",
    reference.packed_forward,
    _fake_forward,
)
_backward_op: Any = register(
    "batch_norm_packed_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, "
    "bool training, int correction, int activation, float slope, bool need_input, bool need_params) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference.packed_backward,
    _fake_backward,
)


class BatchNormPackedFunction(Function):
    """The output alone. ``call``, the last argument, holds what is not differentiated: each argument costs something.

    It is for plain eager mode only, so it has neither ``setup_context`` nor ``jvp`` nor ``vmap``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, call: tuple[Any, ...]) -> Tensor:
        running_mean, running_var, training, momentum, eps, correction, activation, slope = call
        output, statistics = _forward_op(
            input, running_mean, running_var, weight, bias, training, momentum, eps, correction, activation, slope
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, None if activation == _activation.NONE else bias, statistics)
        ctx.numbers = call[2:]
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        input, weight, bias, statistics = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        training, _, eps, correction, activation, slope = ctx.numbers
        if torch.is_grad_enabled() or _transforms_active():
            from fused_ops.batch_norm import _grads  # that module needs this one

            ctx.options = Options(training, eps, correction, activation, slope)
            saved = Saved(input, None, weight, bias, *statistics.unbind(0), None, None)
            found = _grads(ctx, grad_output, saved, (need_input, False, need_weight, need_bias))
            return found[0], found[2], found[3], None
        grad_input, grad_weight, grad_bias = _backward_op(
            *(grad_output, input, weight, bias, statistics, training, correction, activation, slope),
            need_input,
            need_weight or need_bias,
        )
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
        )


_apply: Any = super(Function, BatchNormPackedFunction).apply  # without inspect.signature, see FusedFunction


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: int,
    activation: str | None,
    negative_slope: float,
    alpha: float,
) -> Tensor:
    """``fused_ops.batch_norm`` of a tensor of the CPU, in plain eager mode; the errors may be others than its own."""
    code = slope = 0
    if activation is not None:
        code = _activation.CODES[activation]
        slope = alpha if code == _activation.ELU else negative_slope if code == _activation.LEAKY_RELU else 0.0
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        raise RuntimeError("batch_norm is not differentiable with respect to its running statistics")
    update = training and running_mean is not None
    if update and torch._C._current_graph_task_id() != -1:  # see recomputing
        update, running_mean, running_var = False, None, None
    if torch.is_grad_enabled() and (
        input.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        call = (running_mean, running_var, training, momentum, eps, correction, code, slope)
        output = _apply(input, weight, bias, call)
    else:
        output = _forward_op(
            input, running_mean, running_var, weight, bias, training, momentum, eps, correction, code, slope
        )[0]
    if update:
        torch.autograd.graph.increment_version((running_mean, running_var))
    return output

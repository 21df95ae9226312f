"""Batch norm in plain eager mode: raw ops of few tensors, as each one costs a small call a share of its time.

What these ops do is what those of ``functions.py`` do, which serve everything else. Here mean and invstd are
one tensor, and the running statistics are written in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fused_ops.core.graph import in_graph
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_output, in_its_format
from fused_ops.core.torch_private import (
    call_backward_directly,
    dispatch_modes,
    forward_ad,
    graph_task_id,
    has_torch_function,
    increment_version,
    is_tracing,
    transforms_active,
    without_overrides,
)
from fused_ops.ops.batch_norm import activations, reference
from fused_ops.ops.batch_norm.functions import _fake_act_backward, _grads
from fused_ops.ops.batch_norm.reference import Options, Saved


def _fake_forward(
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
    return empty_output(input), input.new_empty((2, input.size(1)), dtype=torch.float64)


def _fake_backward(
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
    options = (training, correction, activation, slope, 1, need_input, need_params, False)
    found = _fake_act_backward(grad_output, input, None, weight, bias, statistics, statistics, None, None, *options)
    return found[0], found[2], found[3]


_forward_op: Any = register(
    "batch_norm_packed_forward(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
    "Tensor? bias, bool training=True, float momentum=0.1, float eps=1e-5, int correction=0, int activation=0, "
    "float slope=0.0) -> (Tensor output, Tensor statistics)",
    reference.packed_forward,
    _fake_forward,
)
_backward_op: Any = register(
    "batch_norm_packed_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, "
    "bool training=True, bool need_input=True, bool need_params=True, int correction=0, int activation=0, "
    "float slope=0.0) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference.packed_backward,
    _fake_backward,
)
_forward, _backward = without_overrides(_forward_op), without_overrides(_backward_op)
_is_grad_enabled = torch.is_grad_enabled
_DEFAULTS = (0.1, 1e-5, 0, activations.NONE, 0.0)  # momentum, eps, correction, activation and slope of the schema


def _call_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    numbers: tuple[float, ...],
) -> Any:
    """The forward op. It takes nearly a tenth of a microsecond to hand over a number that is no default."""
    if numbers != _DEFAULTS:
        return _forward(input, running_mean, running_var, weight, bias, training, *numbers)
    if training:
        return _forward(input, running_mean, running_var, weight, bias)
    return _forward(input, running_mean, running_var, weight, bias, training)


class BatchNormPackedFunction(Function):
    """The output alone. What is not differentiated comes as one tuple, as each argument costs something.

    It is for plain eager mode only, so it has neither ``setup_context`` nor ``jvp`` nor ``vmap``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
        running_mean, running_var, training, numbers = rest
        output: Tensor
        output, statistics = _call_forward(input, running_mean, running_var, weight, bias, training, numbers)
        ctx.numbers = training, *numbers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias if numbers[3] else None, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        input, weight, bias, statistics = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        training, _, eps, correction, code, slope = ctx.numbers
        grad_input: Tensor | None
        if _is_grad_enabled() or transforms_active():
            ctx.options = Options(training, eps, correction, code, slope)
            mean, invstd = statistics.unbind(0)
            saved = Saved(input, None, weight, bias, mean, invstd, None, None)
            grad_input, _, grad_weight, grad_bias = _grads(
                ctx, grad_output, saved, (need_input, False, need_weight, need_bias)
            )
            return grad_input, grad_weight, grad_bias, None
        op = _backward_op if has_torch_function(grad_output) else _backward
        if training and need_input and need_weight and need_bias and not (code or correction):
            return *op(grad_output, input, weight, bias, statistics), None
        needs = need_input, need_weight or need_bias
        grad_input, grad_weight, grad_bias = op(
            grad_output, input, weight, bias, statistics, training, *needs, correction, code, slope
        )
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
        )


_apply: Any = super(Function, BatchNormPackedFunction).apply  # without inspect.signature, see FusedFunction
call_backward_directly(BatchNormPackedFunction)


def serves(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Whether the input is a tensor of the CPU, nothing is traced or transformed and nothing has a tangent."""
    return (
        not is_compiling()
        and type(input) is Tensor
        and input.is_cpu
        and not transforms_active()
        and forward_ad._current_level < 0
        and not has_torch_function(input, running_mean, running_var, weight, bias)
        and not is_tracing()
        and not (dispatch_modes() and in_graph())
    )


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
    """``fused_ops.batch_norm`` where ``serves`` says so; what it raises may be another error than that function's."""
    code, slope = 0, 0.0
    if activation is not None:
        code = activations.CODES[activation]
        slope = activations.slope_of(code, negative_slope, alpha)
    numbers = momentum, eps, correction, code, slope
    if not input.is_contiguous():
        input = in_its_format(input)
    update = False
    if running_mean is not None and running_var is not None:
        if running_mean.requires_grad or running_var.requires_grad:
            raise RuntimeError("batch_norm is not differentiable with respect to its running statistics")
        update = training and graph_task_id() == -1
        if training and not update:  # see fused_ops.batch_norm.recomputing
            running_mean = running_var = None
    output: Tensor
    if _is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        output = _apply(input, weight, bias, (running_mean, running_var, training, numbers))
    else:
        output = _call_forward(input, running_mean, running_var, weight, bias, training, numbers)[0]
    if update:
        increment_version([running_mean, running_var])
    return output

"""``batch_norm(..., inplace_activated=True)``: the backward works from the output, so that the input can be freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.checks import check_data
from fused_ops.core.function import FusedFunction, checked_saved, is_differentiated
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_normalised
from fused_ops.ops.batch_norm import activations, functions, keep_output_reference, reference
from fused_ops.ops.batch_norm.reference import Call, Options, Saved, as_call


def _fake_keep(output: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    return (
        output.new_empty(context.new_dynamic_size()),
        output.new_empty(context.new_dynamic_size(), dtype=torch.int64),
    )


_keep_op: Any = register(
    "batch_norm_keep(Tensor output, Tensor input, Tensor? weight, Tensor? bias, Tensor? valid, int activation, "
    "float slope, int groups) -> (Tensor stored, Tensor offsets)",
    keep_output_reference.keep,
    _fake_keep,
)


def _fake_backward(
    grad_output: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return functions._fake_backward(grad_output, output, weight, bias, statistics, *rest[2:8])


_keep_backward_op: Any = register(
    "batch_norm_keep_backward(Tensor grad_output, Tensor output, Tensor? weight, Tensor? bias, Tensor statistics, "
    "Tensor stored, Tensor offsets, bool training, bool need_input, bool need_params, int correction, int activation, "
    "float slope, Tensor? valid, int groups) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    keep_output_reference.keep_backward,
    _fake_backward,
)


class _StandIn(FusedFunction):
    """A tensor of one value, expanded to the input's shape, with the input's place in the graph but not its memory."""

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return input.new_zeros(()).expand(input.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # else a first backward would add zeros of the input's size to its gradient
        ctx.like = output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is None and torch.compiler.is_compiling():  # compiled autograd adds what it gets
            zeros: Tensor = ctx.like.detach()
            return zeros
        return grad


class _Rebuilt(FusedFunction):
    """x from the output, as a function of its stand-in: what is differentiated again goes where x came from."""

    @staticmethod
    def forward(stand_in: Tensor, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


class BatchNormKeptOutputFunction(FusedFunction):
    """(output, statistics, new running statistics, stored, offsets); only the output is differentiable."""

    @staticmethod
    def forward(input: Tensor, stand_in: Tensor, *call: Any) -> Any:
        c = as_call((input, *call))
        o = c.options
        found = functions.forward(c)
        groups = o.groups if o.training else 1
        return *found[:4], *_keep_op(found[0], input, c.weight, c.bias, c.valid, o.activation, o.slope, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, stand_in, _, _, weight, bias, _, valid, *numbers = inputs
        y, statistics, _, _, stored, offsets = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        options = Options(*numbers)
        ctx.options = options if options.training else options._replace(groups=1)
        ctx.stand_in = stand_in  # holds no memory, and saved-tensor hooks would copy its shape
        ctx.save_for_backward(y, weight, bias, statistics, stored, offsets, valid)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 15
        o: Options = ctx.options
        need_input, _, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        output, weight, bias, statistics, stored, offsets, valid = ctx.saved_tensors
        if is_differentiated():
            saved = _rebuilt(ctx, output, weight, bias, statistics, stored, valid, grad_output)
            needs = need_input, False, need_weight, need_bias
            grad_input, _none, grad_weight, grad_bias = functions.gradients(grad_output, saved, o, needs)
            return grad_input, None, None, None, grad_weight, grad_bias, *(None,) * 9
        numbers = o.training, need_input, need_weight or need_bias, o.correction, o.activation, o.slope
        tensors = output, weight, bias, statistics, stored, offsets
        found = _keep_backward_op(grad_output, *tensors, *numbers, valid, o.groups)
        wanted = [g if n else None for g, n in zip(found, (need_input, need_weight, need_bias), strict=True)]
        return wanted[0], None, None, None, *wanted[1:], *(None,) * 9


def _rebuilt(
    ctx: Any,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    stored: Tensor,
    valid: Tensor | None,
    grad_output: Tensor,
) -> Saved:
    """What the ordinary op would have saved, with x rebuilt from the output as a function of its stand-in."""
    o: Options = ctx.options
    checked_saved((output, weight, bias, statistics, stored), grad_output)
    y: Tensor = output.detach()
    w, b = (None if t is None else t.detach() for t in (weight, bias))
    x: Tensor = keep_output_reference.rebuild(y, w, b, statistics, stored, o.activation, o.slope, o.groups)
    rebuilt: Any = _Rebuilt.apply(ctx.stand_in, empty_normalised(y).copy_(x))
    signs = o.activation == activations.LEAKY_RELU and valid is None
    mask = reference.pack(y > 0, y) if signs else None  # the rebuilt x may be off across the kink
    return Saved(rebuilt, None, weight, bias, statistics, mask, valid)


def batch_norm(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the new running statistics of a call, which changes nothing."""
    check_data("batch_norm", [("input", call.input)])
    stand_in = _StandIn.apply(call.input)
    found = BatchNormKeptOutputFunction.apply(call.input, stand_in, *call[1:7], *call.options[:-2])  # no group
    return found[0], found[2], found[3]

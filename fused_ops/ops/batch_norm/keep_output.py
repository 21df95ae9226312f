"""``batch_norm(..., inplace_activated=True)``: the backward works from the output, so that the input can be freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.checks import check_data
from fused_ops.core.function import FusedFunction, checked_saved
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_output
from fused_ops.core.torch_private import forward_ad, is_fake, is_tracing, transforms_active
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm import keep_output_reference as reference
from fused_ops.ops.batch_norm import reference as batch_norm_reference
from fused_ops.ops.batch_norm.functions import _act_forward_op, _grads
from fused_ops.ops.batch_norm.reference import Options, Saved


def _fake_keep(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    activation: int,
    slope: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    return (
        output.new_empty(context.new_dynamic_size()),
        output.new_empty(context.new_dynamic_size(), dtype=torch.int64),
    )


def _fake_backward(
    grad_output: Tensor,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    kept: Tensor,
    begins: Tensor,
    valid: Tensor | None,
    training: bool,
    correction: int,
    activation: int,
    slope: float,
    groups: int,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = batch_norm_reference.param_dtype(output, weight, bias)
    grad_weight, grad_bias = (output.new_empty((output.size(1) if need_params else 0,), dtype=kind) for _ in range(2))
    return empty_output(output) if need_input else output.new_empty(0), grad_weight, grad_bias


_keep_op: Any = register(
    "batch_norm_keep(Tensor output, Tensor input, Tensor? weight, Tensor? bias, Tensor? valid, int activation, "
    "float slope, int groups) -> (Tensor kept, Tensor begins)",
    reference.keep,
    _fake_keep,
)
_backward_op: Any = register(
    "batch_norm_inplace_backward(Tensor grad_output, Tensor output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, Tensor kept, Tensor begins, Tensor? valid, bool training, int correction, int activation, "
    "float slope, int groups, bool need_input, bool need_params) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference.inplace_backward,
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


class BatchNormInplaceFunction(FusedFunction):
    """(output, mean, invstd, new running statistics, kept, begins); only the output is differentiable."""

    @staticmethod
    def forward(
        input: Tensor,
        stand_in: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        valid: Tensor | None,
        momentum: float,
        *numbers: Any,
    ) -> Any:
        o = Options(*numbers)
        statistics = (o.training, momentum, o.eps, o.correction)
        shape = (o.activation, o.slope, o.groups)
        found = _act_forward_op(input, None, running_mean, running_var, weight, bias, valid, *statistics, *shape)
        kept = _keep_op(found[0], input, weight, bias, valid, o.activation, o.slope, o.groups if o.training else 1)
        return *found[:5], *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, stand_in, _, _, weight, bias, valid, _, *numbers = inputs
        y, mean, invstd, new_mean, new_var, kept, begins = output
        ctx.mark_non_differentiable(mean, invstd, new_mean, new_var, kept, begins)
        ctx.set_materialize_grads(False)
        options = Options(*numbers)
        ctx.options = options if options.training else options._replace(groups=1)
        ctx.stand_in = stand_in  # holds no memory, and saved-tensor hooks would copy its shape
        ctx.save_for_backward(y, weight, bias, mean, invstd, kept, begins, valid)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 14
        o: Options = ctx.options
        need = ctx.needs_input_grad
        output, weight, bias, mean, invstd, kept, begins, valid = ctx.saved_tensors
        if torch.is_grad_enabled() or transforms_active():
            checked_saved((output, weight, bias, mean, invstd, kept), grad_output)
            y, w, b = output.detach(), *(None if t is None else t.detach() for t in (weight, bias))
            x = reference.rebuild(y, w, b, mean, invstd, kept, o.activation, o.slope, o.groups)
            x = _Rebuilt.apply(ctx.stand_in, empty_output(y).copy_(x))
            signs = o.activation == activations.LEAKY_RELU and valid is None
            mask = batch_norm_reference.pack(y > 0, y) if signs else None  # the rebuilt x may be off across the kink
            tensors = Saved(x, None, weight, bias, mean, invstd, mask, valid)
            found = _grads(ctx, grad_output, tensors, (need[0], False, need[4], need[5]))
            return found[0], None, None, None, found[2], found[3], *(None,) * 8
        numbers = (o.training, o.correction, o.activation, o.slope, o.groups, need[0], need[4] or need[5])
        saved_tensors = (output, weight, bias, mean, invstd, kept, begins, valid)
        grads = _backward_op(grad_output, *saved_tensors, *numbers)
        wanted = [g if n else None for g, n in zip(grads, (need[0], need[4], need[5]), strict=True)]
        return wanted[0], None, None, None, *wanted[1:], *(None,) * 8


def check(activation: str | None, code: int, slope: float, residual: Tensor | None) -> None:
    """Raises ValueError where the output does not tell what the backward needs."""
    if code not in reference.INVERTIBLE:
        raise ValueError(
            "batch_norm: inplace_activated=True needs an activation that can be inverted, None, 'leaky_relu' or 'elu', "
            f"got {activation!r}"
        )
    if residual is not None:
        raise ValueError(
            "batch_norm: inplace_activated=True keeps the output alone, in which a residual cannot be told from the "
            "input; add the residual after the op"
        )
    if code != activations.NONE and not slope > 0:
        name = "alpha" if code == activations.ELU else "negative_slope"
        raise ValueError(f"batch_norm: inplace_activated=True needs {name} above 0, got {slope}")


def available(*tensors: Tensor | None) -> bool:
    """Whether a backward from the output can serve; transforms, graphs and what has no values keep the input."""
    first = tensors[0]
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and first is not None
        and not (first.is_meta or is_fake(first))
        and any(t is not None and t.requires_grad for t in tensors)
        and not transforms_active()
        and forward_ad._current_level < 0
        and not is_tracing()
    )


def apply(
    input: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    params: tuple[Tensor | None, Tensor | None],
    valid: Tensor | None,
    momentum: float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, new_running_mean, new_running_var)."""
    check_data("batch_norm", [("input", input)])
    stand_in = _StandIn.apply(input)
    found = BatchNormInplaceFunction.apply(input, stand_in, *running, *params, valid, momentum, *options)
    return found[0], found[3], found[4]

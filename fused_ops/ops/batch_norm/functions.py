"""The raw ops of batch norm and their autograd Functions; the public function is in ``api.py``.

There is one pair of ops. The forward writes the running statistics that it is given, and the signs of z where it is
given room for them. Both have as few results as they can: each tensor that crosses the border of an op costs up to half
a microsecond, which for 32x64 values is as much as the arithmetic. The pair has a short form for plain calls: PyTorch
looks for each argument that is not given, by its name, in what is, which for the eleven of options that a plain call
has not took 3 % of the instructions of a forward and backward of 32x64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_ops.core.checks import check_data
from fused_ops.core.function import FusedFunction, checked_saved, is_differentiated, save
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_normalised, in_its_format, wide_dtype
from fused_ops.core.torch_private import (
    call_backward_directly,
    graph_task_id,
    has_torch_function,
    is_batched,
    without_overrides,
)
from fused_ops.ops.batch_norm import activations, backward_reference, derivatives, ranks, reference
from fused_ops.ops.batch_norm.reference import BackwardArguments, Call, ForwardArguments, Options, Saved, as_call

_STRIDED = torch.strided


def _fake_forward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    a = ForwardArguments(*arguments, **named)
    count = a.input.size(1) * (reference.group_count(a.input.size(0), a.groups) if a.training else 1)
    return reference.empty_forward_output(a), a.input.new_empty((2, count), dtype=wide_dtype(a.input))


def _fake_backward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = BackwardArguments(*arguments, **named)
    kind = reference.param_dtype(a.input, a.weight, a.bias)
    count = a.input.size(1) if a.need_params else 0
    grad_weight, grad_bias = (a.input.new_empty((count,), dtype=kind) for _ in range(2))
    return empty_normalised(a.input) if a.need_input else a.input.new_empty(0), grad_weight, grad_bias


_FORWARD = (
    "Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "bool training=True, float momentum=0.1, float eps=1e-5, int correction=0, int activation=0, float slope=0.0"
)
_OPTIONS = "Tensor? residual=None, Tensor(c!)? mask=None, Tensor? valid=None, int groups=1"
_OUTPUTS = "(Tensor output, Tensor statistics)"
_BACKWARD = (
    "Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, bool training=True, "
    "bool need_input=True, bool need_params=True, int correction=0, int activation=0, float slope=0.0"
)
_BACKWARD_OPTIONS = (
    "Tensor? residual=None, Tensor? mask=None, Tensor? valid=None, int groups=1, Tensor(a!)? grad_residual=None"
)
_GRADS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
_forward_op: Any = register(
    f"batch_norm_forward({_FORWARD}, {_OPTIONS}) -> {_OUTPUTS}", reference.forward, _fake_forward
)
_plain_forward_op: Any = register(
    f"batch_norm_plain_forward({_FORWARD}) -> {_OUTPUTS}", reference.forward, _fake_forward
)
_backward_op: Any = register(
    f"batch_norm_backward({_BACKWARD}, {_BACKWARD_OPTIONS}) -> {_GRADS}", backward_reference.backward, _fake_backward
)
_plain_backward_op: Any = register(
    f"batch_norm_plain_backward({_BACKWARD}) -> {_GRADS}", backward_reference.backward, _fake_backward
)


def _new_mask(input: Tensor, residual: Tensor | None, valid: Tensor | None, activation: int) -> Tensor | None:
    """What the forward writes a bit a value into, where it does."""
    if not reference.has_mask(residual, valid, activation):
        return None
    return torch.empty(reference.mask_bytes(input), dtype=torch.uint8, device=input.device)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(output, statistics, new running statistics, mask) of a call, which changes nothing; empty where it has none."""
    input, running_mean, running_var, weight, bias, residual, valid, o = call
    none = input.new_empty(0, dtype=wide_dtype(input))
    found: Any
    new_mean, new_var = running_mean, running_var
    mask = _new_mask(input, residual, valid, o.activation)
    if o.training:
        check_data("batch_norm", [("running_mean", running_mean), ("running_var", running_var)])  # before the copies
    if o.group is not None:
        *found, new_mean, new_var = ranks.forward(call, mask)
    elif o.training:
        new_mean, new_var = (None if r is None else r.clone() for r in (running_mean, running_var))
    if o.group is None:
        found = _forward_op(input, new_mean, new_var, weight, bias, *o[:-3], residual, mask, valid, o.groups)
    updated = o.training and running_mean is not None
    return (
        *found,
        new_mean if updated and new_mean is not None else none,
        new_var if updated and new_var is not None else none.clone(),
        input.new_empty(0, dtype=torch.uint8) if mask is None else mask,
    )


def backward(
    grad_output: Tensor, saved: Saved, options: Options, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, residual, weight and bias, empty where not needed (input, residual, weight and bias)."""
    if options.group is not None:
        return ranks.backward(grad_output, saved, options, needs)
    need_input, need_residual, need_params = needs
    input, residual, weight, bias, statistics, mask, valid = saved
    grad_residual = empty_normalised(input) if need_residual else None
    o = options
    numbers = o.training, need_input, need_params, o.correction, o.activation, o.slope
    rest = residual, mask, valid, o.groups, grad_residual
    grad_input, *grads = _backward_op(grad_output, input, weight, bias, statistics, *numbers, *rest)
    return grad_input, input.new_empty(0) if grad_residual is None else grad_residual, *grads


def saved_for(call: Call, statistics: Tensor, mask: Tensor) -> Saved:
    """What the backward needs of a call and of its forward's results."""
    input, _, _, weight, bias, residual, valid, o = call
    masked = reference.has_mask(residual, valid, o.activation)
    if masked or o.activation == activations.NONE:
        residual = bias = None
    return Saved(input, residual, weight, bias, statistics, mask if masked else None, valid)


def gradients(
    grad_output: Tensor, saved: Saved, options: Options, needs: tuple[bool, bool, bool, bool]
) -> list[Tensor | None]:
    """The gradients of input, residual, weight and bias, by the raw op or, to be differentiated, by its Function."""
    need_input, need_residual, need_weight, need_bias = needs
    given = need_residual and options.activation == activations.NONE and saved.valid is None
    found: list[Tensor | None]
    if is_batched(grad_output) and options.group is None:
        # No raw op that writes takes a batch of gradients, and a Function would lose its graph. Gradients are linear in
        # grad_output, so that they are their own tangents.
        found = [*derivatives.backward_jvp(grad_output, saved, (grad_output, *(None,) * 4), options)]
    elif is_differentiated():
        found = [*BatchNormBackwardFunction.apply(grad_output, *saved, *options)]
    else:
        found = [
            *backward(grad_output, saved, options, (need_input, need_residual and not given, need_weight or need_bias))
        ]
    if given:
        found[1] = grad_output
    return [g if need else None for g, need in zip(found, needs, strict=True)]


# ---- under torch.func, and wherever else nothing may be written: functions of every tensor, with jvp and vmap


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

    def statistics(self, t: Tensor, dim: int | None) -> Tensor:
        """(2, groups * channels) of each example -> (2, groups * size * channels)."""
        rows = [t.select(0, i) if dim is None else t.movedim(dim, 0).select(1, i) for i in range(2)]
        folded: list[Any] = [self.values(row, None if dim is None else 0) for row in rows]
        return torch.stack(folded)

    def unfold(self, t: Tensor) -> Tensor:
        """Either of them back, with the examples first; an empty tensor is repeated."""
        if t.dim() > 1:
            return t.reshape(t.size(0), self.size, self.channels, *t.shape[2:]).movedim(1, 0)
        if t.numel() == 0:
            return t.expand(self.size, 0)
        return t.reshape(-1, self.size, self.channels).movedim(1, 0).reshape(self.size, -1)


def _refuse_vmap(options: Options) -> None:
    if options.group is not None:
        raise NotImplementedError("batch_norm: vmap with a group is not supported: map the call without one")


def _example_channels(input: Tensor, dim: int | None) -> int:
    return (input if dim is None else input.select(dim, 0)).size(1)


class BatchNormBackwardFunction(FusedFunction):
    """The gradients of input, residual, weight and bias as functions of grad_output and those four."""

    @staticmethod
    def forward(grad_output: Tensor, *saved_and_options: Any) -> Any:
        saved, options = Saved(*saved_and_options[:7]), Options(*saved_and_options[7:])
        return backward(grad_output, saved, options, (True, True, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, *inputs[:8])
        ctx.options = Options(*inputs[8:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_output, *tensors = checked_saved(ctx.saved_tensors, *grads)
        o = ctx.options
        found = derivatives.double_backward(grads, grad_output, Saved(*tensors), o, ranks.over_ranks(o))
        present = [grad_output, *tensors[:4]]
        return *(g if t is not None else None for g, t in zip(found, present, strict=True)), *(None,) * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        grad_output, *tensors = checked_saved(ctx.saved_tensors, *tangents[:5])
        o = ctx.options
        return derivatives.backward_jvp(grad_output, Saved(*tensors), tangents[:5], o, ranks.over_ranks(o))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Folds the examples into the channels."""
        _refuse_vmap(Options(*args[8:]))
        mask, valid, *options = args[6:]
        if mask is not None or in_dims[7] is not None:
            return super().vmap(info, in_dims, *args)
        fold = _Fold(info.batch_size, _example_channels(args[1], in_dims[1]))
        images = [fold.image(t, d) for t, d in zip(args[:3], in_dims[:3], strict=True)]
        values = [fold.values(t, d) for t, d in zip(args[3:5], in_dims[3:5], strict=True)]
        outputs = cls.apply(*images, *values, fold.statistics(args[5], in_dims[5]), None, valid, *options)
        return tuple(fold.unfold(t) for t in outputs), (0,) * 4


class BatchNormFunction(FusedFunction):
    """(output, statistics, new running statistics, mask) of a call; only the output is differentiable."""

    only_first_output = True

    @staticmethod
    def forward(*call: Any) -> Any:
        return forward(as_call(call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call = as_call(inputs)
        _, statistics, _, _, mask = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.options = call.options
        save(ctx, *saved_for(call, statistics, mask))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 16
        need = ctx.needs_input_grad
        needs = need[0], need[5], need[3], need[4]
        grad_input, grad_residual, *grads = gradients(grad_output, Saved(*ctx.saved_tensors), ctx.options, needs)
        return grad_input, None, None, *grads, grad_residual, *(None,) * 10

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        wanted = (tangents[0], tangents[5], tangents[3], tangents[4])
        saved, o = Saved(*checked_saved(ctx.saved_tensors, *wanted)), ctx.options
        return derivatives.jvp(saved, wanted, o, ranks.over_ranks(o)), *(None,) * 4

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Folds the examples into the channels."""
        call = as_call(args)
        _refuse_vmap(call.options)
        if reference.has_mask(call.residual, call.valid, call.options.activation) or in_dims[6] is not None:
            return super().vmap(info, in_dims, *args)
        fold = _Fold(info.batch_size, _example_channels(args[0], in_dims[0]))
        input, residual = (fold.image(args[i], in_dims[i]) for i in (0, 5))
        values = [fold.values(t, d) for t, d in zip(args[1:5], in_dims[1:5], strict=True)]
        output, statistics, *rest = cls.apply(input, *values, residual, call.valid, *call.options)
        statistics = torch.stack([fold.unfold(row) for row in statistics.unbind(0)], 1)
        return (fold.unfold(output), statistics, *(fold.unfold(t) for t in rest)), (0,) * 5


def batch_norm(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the new running statistics of a call, which changes nothing."""
    found = BatchNormFunction.apply(*call[:7], *call.options)
    return found[0], found[2], found[3]


# ---- plain eager mode: the running statistics are written in place, and nothing is transformed

_forward = without_overrides(_forward_op)
_plain_forward, _plain_backward = without_overrides(_plain_forward_op), without_overrides(_plain_backward_op)
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
        return _plain_forward(input, running_mean, running_var, weight, bias, training, *numbers)
    if training:
        return _plain_forward(input, running_mean, running_var, weight, bias)
    return _plain_forward(input, running_mean, running_var, weight, bias, training)


def _forward_with_options(
    tensors: tuple[Any, ...], training: bool, numbers: tuple[Any, ...], more: tuple[Any, ...], masked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, statistics, mask) with ``more``, the residual, ``valid`` and ghost batches; a mask is for a backward."""
    residual, valid, groups = more
    mask = _new_mask(tensors[0], residual, valid, numbers[3]) if masked else None
    return *_forward(*tensors, training, *numbers, residual, mask, valid, groups), mask


class BatchNormEagerFunction(Function):
    """The output alone. What is not differentiated comes as one tuple, as each argument costs something.

    It is for plain eager mode only, so it has neither ``setup_context`` nor ``jvp`` nor ``vmap``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        residual: Tensor | None = None,
    ) -> Tensor:
        running_mean, running_var, training, numbers, more = rest
        ctx.set_materialize_grads(False)
        output: Tensor
        if not more:
            output, statistics = _call_forward(input, running_mean, running_var, weight, bias, training, numbers)
            ctx.numbers = training, *numbers
            ctx.save_for_backward(input, weight, bias if numbers[3] else None, statistics)
            return output
        tensors = input, running_mean, running_var, weight, bias
        output, statistics, mask = _forward_with_options(tensors, training, numbers, more, True)
        _, valid, groups = more
        ctx.numbers = training, *numbers, groups
        if mask is not None or numbers[3] == activations.NONE:
            residual = bias = None
        ctx.save_for_backward(input, weight, bias, statistics, residual, mask, valid)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        numbers = ctx.numbers
        if len(numbers) == 7 or is_differentiated():
            return _all_gradients(ctx, grad_output)
        input, weight, bias, statistics = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        training, _, _, correction, code, slope = numbers
        op = _plain_backward_op if has_torch_function(grad_output) else _plain_backward
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


def _all_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The eager Function's backward where there is a residual, ``valid`` or a ghost batch, or a second derivative."""
    input, weight, bias, statistics, *rest = ctx.saved_tensors
    residual, mask, valid = rest or (None, None, None)
    need_input, need_weight, need_bias, _, *need_residual = ctx.needs_input_grad
    saved = Saved(input, residual, weight, bias, statistics, mask, valid)
    needs = need_input, any(need_residual), need_weight, need_bias
    grad_input, grad_residual, *grads = gradients(grad_output, saved, Options(*ctx.numbers), needs)
    return grad_input, *grads, None, *(grad_residual for _ in need_residual)


_apply: Any = super(Function, BatchNormEagerFunction).apply  # without inspect.signature, see FusedFunction
call_backward_directly(BatchNormEagerFunction)


def eager(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    numbers: tuple[float, ...],
    more: tuple[Any, ...],
) -> Tensor:
    """``fused_ops.batch_norm`` in plain eager mode; what it raises may be another error than that function's.

    Args:
        input: As of ``fused_ops.batch_norm``, like the next five.
        running_mean: Written in place.
        running_var: Written in place.
        weight: The scale.
        bias: The shift.
        training: Whether the statistics are this batch's.
        numbers: momentum, eps, correction, and the activation's code and slope.
        more: (residual, valid, groups), or empty where there is none of them.
    """
    if input.layout is _STRIDED and not input.is_contiguous():
        input = in_its_format(input)
    if running_mean is not None and running_var is not None:
        if running_mean.requires_grad or running_var.requires_grad:
            raise RuntimeError("batch_norm is not differentiable with respect to its running statistics")
        if training and graph_task_id() != -1:  # see fused_ops.ops.batch_norm.api.recomputing
            running_mean = running_var = None
    residual = more[0] if more else None
    output: Tensor
    if _is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        rest = running_mean, running_var, training, numbers, more
        output = _apply(input, weight, bias, rest) if residual is None else _apply(input, weight, bias, rest, residual)
    elif more:
        tensors = input, running_mean, running_var, weight, bias
        output = _forward_with_options(tensors, training, numbers, more, False)[0]
    else:
        output = _call_forward(input, running_mean, running_var, weight, bias, training, numbers)[0]
    return output

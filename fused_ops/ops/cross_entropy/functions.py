"""Cross-entropy of class indices alone, reduced in the op: raw ops, their fake kernels and the Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from fused_ops.core.function import FusedFunction, checked_saved, is_one, save
from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_output
from fused_ops.core.torch_private import (
    call_backward_directly,
    dispatch_modes,
    forward_ad,
    has_torch_function,
    is_tracing,
    transforms_active,
    without_overrides,
)
from fused_ops.ops.cross_entropy import reference
from fused_ops.ops.cross_entropy.rows import refuse_inplace_transforms

_SMALL = 32768  # logits: one task of the kernels, so that nothing is lost by one thread
_SMALL_DTYPES = (torch.float32, torch.float64)  # a 16-bit gradient would be rounded before the upstream one scales it

_grad_enabled = torch.is_grad_enabled

REDUCTIONS = {"none": reference.NONE, "mean": reference.MEAN, "sum": reference.SUM}


def _fake_forward(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = target.shape if reduction == reference.NONE else ()
    lse = input.new_empty(target.shape, dtype=torch.float64)
    return input.new_empty(shape), lse, input.new_empty((), dtype=torch.float64)


def _fake_with_gradient(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, int]:
    return input.new_empty(()), empty_output(input), 0


def _fake_backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> Tensor:
    return empty_output(input)


def _fake_backward_(*_: Any) -> None:
    return None


_forward_op: Any = register(
    "cross_entropy_forward(Tensor input, Tensor target, int ignore_index, int reduction) "
    "-> (Tensor loss, Tensor lse, Tensor total)",
    reference.forward,
    _fake_forward,
)
_with_gradient_op: Any = register(
    "cross_entropy_with_gradient(Tensor input, Tensor target, int ignore_index, int reduction) "
    "-> (Tensor loss, Tensor gradient, int ignored)",
    reference.with_gradient,
    _fake_with_gradient,
)
_with_gradient = without_overrides(_with_gradient_op)
_backward_op = register(
    "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor lse, Tensor total, "
    "int ignore_index, int reduction) -> Tensor",
    reference.backward,
    _fake_backward,
)
_backward_inplace_op = register(
    "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor lse, Tensor total, "
    "int ignore_index, int reduction) -> ()",
    reference.backward_,
    _fake_backward_,
)


class CrossEntropyBackwardFunction(FusedFunction):
    """grad_input as a function of grad_loss and input, so that it can be differentiated again."""

    @staticmethod
    def forward(
        grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
    ) -> Any:
        return _backward_op(grad_loss, input, target, lse, total, ignore_index, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_loss, input, target, _, total, ctx.ignore_index, ctx.reduction = inputs
        save(ctx, grad_loss, input, target, total)

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor | None) -> Any:
        if grad_grad_input is None:
            return (None,) * 7
        grad_loss, input, target, total = checked_saved(ctx.saved_tensors, grad_grad_input)
        options = (ctx.ignore_index, ctx.reduction)
        grads = reference.double_backward(grad_grad_input, grad_loss, input, target, total, *options)
        return *grads, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_loss_t: Tensor | None, input_t: Tensor | None, *_: Any) -> Any:
        grad_loss, input, target, total = checked_saved(ctx.saved_tensors, grad_loss_t, input_t)
        grad_loss_t = torch.zeros_like(grad_loss) if grad_loss_t is None else grad_loss_t
        input_t = torch.zeros_like(input) if input_t is None else input_t
        return reference.backward_jvp(
            grad_loss, input, grad_loss_t, input_t, target, total, ctx.ignore_index, ctx.reduction
        )


def _inplace_gradient(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    """The gradient in the memory of the logits, whose version counter tells every other user that they are gone."""
    refuse_inplace_transforms()
    gradient = input.detach()
    _backward_inplace_op(grad_loss, gradient, *rest)
    increment_version(input)
    return gradient


class CrossEntropyFunction(FusedFunction):
    """(loss, lse, total); only the loss is differentiable."""

    only_first_output = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, ignore_index: int, reduction: int, inplace_backward: bool) -> Any:
        return _forward_op(input, target, ignore_index, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, target, ctx.ignore_index, ctx.reduction, ctx.inplace_backward = inputs
        _, lse, total = output
        ctx.mark_non_differentiable(lse, total)
        save(ctx, input, target, lse, total)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        args = (grad_loss, *ctx.saved_tensors, ctx.ignore_index, ctx.reduction)
        if ctx.inplace_backward:
            return _inplace_gradient(*args), None, None, None, None
        if torch.is_grad_enabled() or transforms_active():
            return CrossEntropyBackwardFunction.apply(*args), None, None, None, None
        return _backward_op(*args), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, *_: Any) -> Any:
        input, target, _lse, total = checked_saved(ctx.saved_tensors, input_t)
        if input_t is None:
            return None, None, None
        return reference.jvp(input, input_t, target, total, ctx.ignore_index, ctx.reduction), None, None


class _SmallFunction(Function):
    """The loss of few logits, whose gradient comes with it: half the calls, a third of the outputs.

    At this size a call costs more than its arithmetic, and so does every output, argument and saved tensor of a
    Function. Not for torch.func, forward-mode AD and torch.compile, which need what ``CrossEntropyFunction`` has.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, options: tuple[int, int]) -> Tensor:
        loss: Tensor
        op = _with_gradient_op if has_torch_function(input, target) else _with_gradient
        loss, gradient, ignored = op(input, target, *options)
        ctx.found = gradient, ignored, options
        ctx.save_for_backward(input, target)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        input, target = ctx.saved_tensors
        gradient, ignored, options = ctx.found
        if gradient is None:  # a second backward through a graph that was retained
            gradient = _with_gradient_op(input.detach(), target, *options)[1]
        # An ignored row's gradient is 0 even for an upstream gradient that is not finite.
        if not ignored and not torch.is_grad_enabled():
            if is_one(grad_loss):
                ctx.found = None, ignored, options  # it is handed over, not only lent
                return gradient, None, None
            return gradient.mul(grad_loss), None, None
        _, lse, total = _forward_op(input.detach(), target, *options)
        return CrossEntropyBackwardFunction.apply(grad_loss, input, target, lse, total, *options), None, None


_small_apply = super(Function, _SmallFunction).apply  # Function.apply asks what _brings_gradient has asked already
call_backward_directly(_SmallFunction)


def _brings_gradient(input: Tensor) -> bool:
    """Whether the gradient may come with the loss: plain reverse-mode autograd of few logits on the CPU."""
    return (
        input.requires_grad
        and input.numel() <= _SMALL
        and input.is_cpu
        and _grad_enabled()
        and not transforms_active()
        and forward_ad._current_level < 0
        and not is_tracing()
        and not dispatch_modes()  # what traces would take the number of ignored rows for a constant
    )


def small_loss(input: Any, target: Any, ignore_index: Any, reduction: Any) -> Tensor | None:
    """The loss of the commonest call of few logits, right in every respect; None for any other call.

    Such a call takes microseconds, a third of which go into the questions of the general path.
    """
    if (
        type(input) is Tensor
        and type(target) is Tensor
        and input.dtype is torch.float32
        and target.dtype is torch.int64
        and input.dim() == 2
        and target.dim() == 1
        and input.size(0) == target.size(0)
        and type(ignore_index) is int
        and (reduction == "mean" or reduction == "sum")
        and _brings_gradient(input)
    ):
        return _small_apply(input, target, (ignore_index, REDUCTIONS[reduction]))  # type: ignore[no-any-return]
    return None


def index_loss(input: Tensor, target: Tensor, ignore_index: int, reduction: str, inplace_backward: bool) -> Tensor:
    """The loss of checked class indices in eager mode."""
    if reduction != "none" and not inplace_backward and input.dtype in _SMALL_DTYPES and _brings_gradient(input):
        loss: Tensor = _small_apply(input, target, (ignore_index, REDUCTIONS[reduction]))
        return loss
    loss = CrossEntropyFunction.apply(input, target, ignore_index, REDUCTIONS[reduction], inplace_backward)[0]
    return loss

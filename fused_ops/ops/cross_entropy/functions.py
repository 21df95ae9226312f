"""The raw ops of cross-entropy, their fake kernels and the autograd Functions.

Two pairs of ops: class indices alone, reduced in the op, and every option, row by row and nothing reduced. The kernels
below are one family; the first pair spares a plain call five outputs, at up to half a microsecond each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from fused_ops.core.function import FusedFunction, checked_saved, is_differentiated, is_one, is_plain, save
from fused_ops.core.library import cuda_missing_reason, register
from fused_ops.core.memory_format import acc_dtype, empty_output, wide_dtype
from fused_ops.core.torch_private import (
    call_backward_directly,
    dispatch_modes,
    forward_ad,
    has_torch_function,
    is_batched,
    is_tracing,
    transforms_active,
    without_overrides,
)
from fused_ops.ops.cross_entropy import reference, rows_reference
from fused_ops.ops.cross_entropy.reference import class_dim
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads

# Logits of a call whose gradient may come with its loss: one task of the CPU's kernels, so that one thread loses
# nothing, and so few on a GPU that the launches of its kernels take longer than they do.
_SMALL = 32768
_SMALL_DTYPES = (torch.float32, torch.float64)  # a 16-bit gradient would be rounded before the upstream one scales it
# A head's is rounded once more on its way into products that are rounded too; float16 has no range to spare.
_SMALL_HEAD_DTYPES = (*_SMALL_DTYPES, torch.bfloat16)
_CUDA_KERNELS = cuda_missing_reason is None

_grad_enabled = torch.is_grad_enabled

REDUCTIONS = {"none": reference.NONE, "mean": reference.MEAN, "sum": reference.SUM}


# ---- class indices alone


def fake_forward(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = target.shape if reduction == reference.NONE else ()
    lse = input.new_empty(target.shape, dtype=wide_dtype(input))
    return input.new_empty(shape), lse, lse.new_empty(())


def _fake_with_gradient(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, int]:
    return input.new_empty(()), empty_output(input), 0


def _fake_scale_gradient(gradient: Tensor, grad_loss: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def fake_backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> Tensor:
    return empty_output(input)


def _fake_backward_(*_: Any) -> None:
    return None


forward_op: Any = register(
    "cross_entropy_forward(Tensor input, Tensor target, int ignore_index, int reduction) "
    "-> (Tensor loss, Tensor lse, Tensor total)",
    reference.forward,
    fake_forward,
)
_with_gradient_op: Any = register(
    "cross_entropy_with_gradient(Tensor input, Tensor target, int ignore_index, int reduction) "
    "-> (Tensor loss, Tensor gradient, int ignored)",
    reference.with_gradient,
    _fake_with_gradient,
)
_with_gradient = without_overrides(_with_gradient_op)
# What a GPU has left to do in the backward; the CPU, which knows of ignored rows, multiplies.
_scale_gradient_op: Any = register(
    "cross_entropy_scale_gradient(Tensor gradient, Tensor grad_loss, Tensor target, int ignore_index) -> Tensor",
    reference.scale_gradient,
    _fake_scale_gradient,
    native=False,
)
backward_op = register(
    "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor lse, Tensor total, "
    "int ignore_index, int reduction) -> Tensor",
    reference.backward,
    fake_backward,
)
backward_inplace_op = register(
    "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor lse, Tensor total, "
    "int ignore_index, int reduction) -> ()",
    reference.backward_,
    _fake_backward_,
)


def overwrites(inplace_backward: bool, *grads: Tensor | None) -> bool:
    """Whether a backward that runs overwrites the logits; raises where that would be wrong.

    Under forward-mode AD it does not: the gradient has a tangent, which is found from the logits.
    """
    if not inplace_backward:
        return False
    if torch.is_grad_enabled() or transforms_active() or any(g is not None and is_batched(g) for g in grads):
        raise RuntimeError(
            "cross_entropy: inplace_backward=True overwrites the logits, so there is no create_graph, no "
            "is_grads_batched and no torch.func transform; expected inplace_backward=False for those"
        )
    return bool(forward_ad._current_level < 0)


class CrossEntropyBackwardFunction(FusedFunction):
    """grad_input as a function of grad_loss and input, so that it can be differentiated again."""

    @staticmethod
    def forward(
        grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
    ) -> Any:
        return backward_op(grad_loss, input, target, lse, total, ignore_index, reduction)

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


def _gradient(
    grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> Tensor:
    """The gradient, to be differentiated. Of a batch of upstream gradients a Function would lose the graph."""
    if is_batched(grad_loss):
        return reference.gradient(grad_loss, input, target, total, ignore_index, reduction)
    args = (grad_loss, input, target, lse, total, ignore_index, reduction)
    return CrossEntropyBackwardFunction.apply(*args)  # type: ignore[no-any-return]


def _inplace_gradient(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    """The gradient in the memory of the logits, whose version counter tells every other user that they are gone."""
    gradient = input.detach()
    backward_inplace_op(grad_loss, gradient, *rest)
    increment_version(input)
    return gradient


class CrossEntropyFunction(FusedFunction):
    """(loss, lse, total); only the loss is differentiable."""

    only_first_output = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, ignore_index: int, reduction: int, inplace_backward: bool) -> Any:
        return forward_op(input, target, ignore_index, reduction)

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
        if overwrites(ctx.inplace_backward, grad_loss):
            return _inplace_gradient(*args), None, None, None, None
        if is_differentiated():
            return _gradient(*args), None, None, None, None
        return backward_op(*args), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, *_: Any) -> Any:
        input, target, _lse, total = checked_saved(ctx.saved_tensors, input_t)
        if input_t is None:
            return None, None, None
        return reference.jvp(input, input_t, target, total, ctx.ignore_index, ctx.reduction), None, None


def _differentiable(grad_loss: Tensor, input: Tensor, target: Tensor, options: tuple[int, int]) -> tuple[Any, ...]:
    """The gradient with a graph of its own, and right for any upstream gradient."""
    _, lse, total = forward_op(input.detach(), target, *options)
    return _gradient(grad_loss, input, target, lse, total, *options), None, None


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
        if not ignored and not torch.is_grad_enabled() and forward_ad._current_level < 0:
            if is_one(grad_loss):
                ctx.found = None, ignored, options  # it is handed over, not only lent
                return gradient, None, None
            return gradient.mul(grad_loss), None, None
        return _differentiable(grad_loss, input, target, options)


class _SmallOnDeviceFunction(Function):
    """The same on a GPU, where neither the number of ignored rows nor the upstream gradient is read: nothing waits.

    The gradient is scaled to a new tensor, never where it lies: the backward may run again, also as a CUDA graph of
    its own, which knows nothing of what it did before.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, options: tuple[int, int]) -> Tensor:
        loss: Tensor
        op = _with_gradient_op if has_torch_function(input, target) else _with_gradient
        loss, gradient, _ = op(input, target, *options)
        ctx.options = options
        ctx.save_for_backward(input, target, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        input, target, gradient = ctx.saved_tensors
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or not is_plain(grad_loss):
            return _differentiable(grad_loss, input, target, ctx.options)
        return _scale_gradient_op(gradient, grad_loss, target, ctx.options[0]), None, None


# Function.apply asks what _brings_gradient has asked already
_on_cpu = super(Function, _SmallFunction).apply
_on_device = super(Function, _SmallOnDeviceFunction).apply
call_backward_directly(_SmallFunction)
call_backward_directly(_SmallOnDeviceFunction)


# ---- every option, row by row

# The parts of the schemas: what the loss of a row is, the upstream gradients, the options, and what is saved.
TENSORS = "Tensor? indices, Tensor? probabilities, Tensor? weight, Tensor? class_mask"
GRADS = "Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_target_log_probability"
NUMBERS = "int ignore_index, float label_smoothing, float logit_scale, float softcap, bool statistics"
SAVED = "Tensor lse, Tensor mass, Tensor? entropy"
RESULTS = (
    "Tensor nll, Tensor lse, Tensor mass, Tensor target_weight, Tensor entropy, Tensor prediction, "
    "Tensor target_log_probability"
)


def fake_rows_forward(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dim = class_dim(input)
    rows = (*input.shape[:dim], *input.shape[dim + 1 :])
    wanted = rows if rest[-1] else (0,)
    doubles = [input.new_empty(shape, dtype=wide_dtype(input)) for shape in (rows, rows, rows, rows, wanted, wanted)]
    return *doubles[:5], input.new_empty(wanted, dtype=torch.int64), doubles[5]


def fake_rows_gradient(*args: Any) -> Tensor:
    return empty_output(args[4])


rows_forward_op = register(
    f"cross_entropy_rows_forward(Tensor input, {TENSORS}, {NUMBERS}) -> ({RESULTS})",
    rows_reference.forward,
    fake_rows_forward,
)
rows_backward_op = register(
    f"cross_entropy_rows_backward({GRADS}, Tensor input, {TENSORS}, {SAVED}, {NUMBERS}) -> Tensor",
    rows_reference.backward,
    fake_rows_gradient,
)
rows_backward_inplace_op = register(
    f"cross_entropy_rows_backward_({GRADS}, Tensor(a!) input, {TENSORS}, {SAVED}, {NUMBERS}) -> ()",
    rows_reference.backward_,
    _fake_backward_,
)


def mark_fixed(ctx: Any, statistics: bool, output: Sequence[Tensor]) -> None:
    """Says which of the seven results have no gradient."""
    _, _, mass, target_weight, entropy, prediction, log_probability = output
    fixed = (mass, target_weight, prediction)
    ctx.mark_non_differentiable(*(fixed if statistics else (*fixed, entropy, log_probability)))


def row_grads(statistics: bool, grads: Sequence[Tensor | None]) -> RowGrads:
    """The upstream gradients of the results that are differentiable."""
    return RowGrads(grads[0], grads[1], *((grads[4], grads[6]) if statistics else (None, None)))


class CrossEntropyRowsFunction(FusedFunction):
    """nll, lse, mass, target_weight, entropy, prediction, target_log_probability of each row, wide.

    nll, lse, entropy and target_log_probability are differentiable. The gradient of the gradient, and anything beyond,
    goes through the plain-PyTorch formulas of the reference.
    """

    @staticmethod
    def forward(
        input: Tensor,
        indices: Tensor | None,
        probabilities: Tensor | None,
        weight: Tensor | None,
        class_mask: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        logit_scale: float,
        softcap: float,
        statistics: bool,
        inplace_backward: bool,
    ) -> Any:
        options = (ignore_index, label_smoothing, logit_scale, softcap, statistics)
        return rows_forward_op(input, indices, probabilities, weight, class_mask, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.options, ctx.inplace_backward = inputs[:5], RowOptions(*inputs[5:10]), inputs[10]
        mark_fixed(ctx, ctx.options.statistics, output)
        save(ctx, *tensors, output[1], output[2], output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g = row_grads(ctx.options.statistics, grads)
        *tensors, lse, mass, entropy = ctx.saved_tensors
        a, o = RowArgs(*tensors), ctx.options
        found: list[Tensor | None] = [None] * 11
        if all(grad is None for grad in g):
            return tuple(found)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3] or is_differentiated():
            checked_saved(tensors, *g)
        if g.nll is not None and ctx.needs_input_grad[2]:
            found[2] = rows_reference.grad_probabilities(g, a, o)
        if g.nll is not None and ctx.needs_input_grad[3]:
            found[3] = rows_reference.grad_weight(g, a, o)
        if not ctx.needs_input_grad[0]:
            return tuple(found)
        if overwrites(ctx.inplace_backward, *g):
            found[0] = gradient = a.input.detach()
            rows_backward_inplace_op(*g, gradient, *a[1:], lse, mass, entropy, *o)
            increment_version(a.input)
        elif is_differentiated():
            found[0] = rows_reference.grad_input(g, a, o, acc_dtype(a.input.dtype)).to(a.input.dtype)
        else:
            gradient = rows_backward_op(*g, *a, lse, mass, entropy, *o)  # type: ignore[assignment]
            found[0] = gradient
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, _: None, probabilities_t: Any, weight_t: Any, *__: Any) -> Any:
        *tensors, _lse, _mass, _entropy = checked_saved(ctx.saved_tensors, input_t, probabilities_t, weight_t)
        nll_t, lse_t, entropy_t, log_probability_t = rows_reference.jvp(
            RowArgs(*tensors), ctx.options, input_t, probabilities_t, weight_t
        )
        return nll_t, lse_t, None, None, entropy_t, None, log_probability_t


# ---- what serves a call in eager mode


def rows(a: RowArgs, o: RowOptions, inplace_backward: bool) -> tuple[Tensor, ...]:
    """The seven results of each row."""
    return CrossEntropyRowsFunction.apply(*a, *o, inplace_backward)  # type: ignore[no-any-return]


def _brings_gradient(input: Tensor) -> bool:
    """Whether the gradient may come with the loss: plain reverse-mode autograd of few logits, where a kernel is."""
    return (
        input.requires_grad
        and input.numel() <= _SMALL
        and (input.is_cpu or (_CUDA_KERNELS and input.is_cuda and input.dim() <= 2 and input.is_contiguous()))
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
        apply = _on_cpu if input.is_cpu else _on_device
        return apply(input, target, (ignore_index, REDUCTIONS[reduction]))  # type: ignore[no-any-return]
    return None


def index_loss(
    input: Tensor, target: Tensor, ignore_index: int, reduction: str, inplace_backward: bool, of_head: bool
) -> Tensor:
    """The loss of checked class indices in eager mode; ``of_head`` where the logits are a head's product."""
    dtypes = _SMALL_HEAD_DTYPES if of_head else _SMALL_DTYPES
    if reduction != "none" and not inplace_backward and input.dtype in dtypes and _brings_gradient(input):
        apply = _on_cpu if input.is_cpu else _on_device
        return apply(input, target, (ignore_index, REDUCTIONS[reduction]))  # type: ignore[no-any-return]
    args = (input, target, ignore_index, REDUCTIONS[reduction], inplace_backward)
    return CrossEntropyFunction.apply(*args)[0]  # type: ignore[no-any-return]

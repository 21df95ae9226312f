"""Cross-entropy of logits against class indices: public function, autograd Functions, fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_ops._function import FusedFunction, _transforms_active, save
from fused_ops._library import register
from fused_ops.reference import cross_entropy as reference
from fused_ops.reference import empty_output

_REDUCTIONS = {"none": reference.NONE, "mean": reference.MEAN, "sum": reference.SUM}
_TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fake_forward(input: Tensor, target: Tensor, ignore_index: int, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = target.shape if reduction == reference.NONE else ()
    lse = input.new_empty(target.shape, dtype=torch.float64)
    return input.new_empty(shape), lse, input.new_empty((), dtype=torch.float64)


def _fake_backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, lse: Tensor, total: Tensor, ignore_index: int, reduction: int
) -> Tensor:
    return empty_output(input)


def _fake_backward_(*_: Any) -> None:
    return None


_forward_op = register(
    "cross_entropy_forward(Tensor input, Tensor target, int ignore_index, int reduction) "
    "-> (Tensor loss, Tensor lse, Tensor total)",
    reference.forward,
    _fake_forward,
)
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
        grad_loss, input, target, total = ctx.saved_tensors
        options = (ctx.ignore_index, ctx.reduction)
        grads = reference.double_backward(grad_grad_input, grad_loss, input, target, total, *options)
        return *grads, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_loss_t: Tensor | None, input_t: Tensor | None, *_: Any) -> Any:
        grad_loss, input, target, total = ctx.saved_tensors
        grad_loss_t = torch.zeros_like(grad_loss) if grad_loss_t is None else grad_loss_t
        input_t = torch.zeros_like(input) if input_t is None else input_t
        return reference.backward_jvp(
            grad_loss, input, grad_loss_t, input_t, target, total, ctx.ignore_index, ctx.reduction
        )


def _inplace_gradient(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    """The gradient in the memory of the logits, whose version counter tells every other user that they are gone."""
    if torch.is_grad_enabled() or _transforms_active():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True overwrites the logits, so there is no create_graph and no torch.func "
            "transform; expected inplace_backward=False for those"
        )
    gradient = input.detach()
    _backward_inplace_op(grad_loss, gradient, *rest)
    increment_version(input)
    return gradient


class CrossEntropyFunction(FusedFunction):
    """(loss, lse, total); only the loss is differentiable."""

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
        if torch.is_grad_enabled() or _transforms_active():
            return CrossEntropyBackwardFunction.apply(*args), None, None, None, None
        return _backward_op(*args), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, *_: Any) -> Any:
        input, target, _lse, total = ctx.saved_tensors
        if input_t is None:
            return None, None, None
        return reference.jvp(input, input_t, target, total, ctx.ignore_index, ctx.reduction), None, None


class _CompiledFunction(CrossEntropyFunction):
    """For torch.compile, which traces no Function with a ``jvp`` of its own."""

    jvp = torch.autograd.Function.jvp  # type: ignore[assignment]


def _check(input: Tensor, target: Tensor, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"cross_entropy(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input must have at least one dimension (classes), got a scalar")
    if input.dtype not in _INPUT_DTYPES:
        raise NotImplementedError(f"cross_entropy: input must be a floating-point tensor, got {input.dtype}")
    if target.dtype not in _TARGET_DTYPES:
        raise RuntimeError(f"cross_entropy: expected class indices of an integer dtype for target, got {target.dtype}")
    if input.dim() == 1 and target.shape == (1,):
        return
    want = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size([])
    if target.shape == want:
        return
    if input.dim() > 1 and target.dim() >= 1 and input.size(0) != target.size(0):
        raise ValueError(f"Expected input batch_size ({input.size(0)}) to match target batch_size ({target.size(0)}).")
    raise RuntimeError(f"cross_entropy: expected target of shape {list(want)}, got {list(target.shape)}")


def _check_inplace(input: Tensor) -> None:
    if torch.compiler.is_compiling() or _transforms_active():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True is for eager autograd, not for torch.compile or torch.func"
        )
    if input.is_leaf and input.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True overwrites input, which must not be a leaf that requires grad"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy between logits and class indices, as ``torch.nn.functional.cross_entropy``.

    Args:
        input: Logits, (classes), (rows, classes) or (rows, classes, d1, ...); float32, float64, bfloat16 or float16.
        target: Class indices in [0, classes), the shape of ``input`` without its class dimension; int64, int32, int16,
            int8 or uint8.
        ignore_index: Target value whose rows count neither in the loss nor in the gradient.
        reduction: ``"none"``, ``"mean"`` (over the rows that count) or ``"sum"``.
        inplace_backward: Lets the backward write the gradient over ``input``, so that it needs no memory of its own.
            Whatever else uses the logits after that backward raises, as does a second backward.

    Returns:
        The loss, in the dtype of ``input``: a scalar, or the shape of ``target`` for ``"none"``. The mean is NaN if no
        row counts.

    Raises:
        ValueError: unknown ``reduction``, or batch sizes of input and target that differ.
        RuntimeError: ``target`` of another dtype or shape; ``inplace_backward`` with a leaf, with elements that share
            memory, with ``create_graph``, or under torch.compile and torch.func.
        IndexError: a target outside [0, classes) that is not ``ignore_index``.
        NotImplementedError: ``input`` is not of one of the four floating-point dtypes.
        TypeError: ``input`` or ``target`` is not a tensor.

    Note:
        16-bit logits are computed in float32 and rounded once. Each row's loss and gradient depend on that row alone,
        whatever the number of threads. Twice differentiable; the gradient of ignored rows is zero even where their
        logits are not finite.

    Source: the one-step backward is derived in docs/cross_entropy.md.
    """
    _check(input, target, reduction)
    if input.dim() == 1 and target.dim() == 1:
        target = target.reshape(())
    function = _CompiledFunction if torch.compiler.is_compiling() else CrossEntropyFunction
    if inplace_backward:
        _check_inplace(input)
    loss: Tensor = function.apply(input, target, ignore_index, _REDUCTIONS[reduction], inplace_backward)[0]
    return loss

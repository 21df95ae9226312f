"""A small head: product, loss and gradients in one raw op, as calls are what it costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_ops.core.checks import check_tensors
from fused_ops.core.function import is_differentiated, is_one
from fused_ops.core.graph import needs_formulas
from fused_ops.core.library import register
from fused_ops.core.torch_private import forward_ad, is_tracing, transforms_active
from fused_ops.ops.cross_entropy.api import index_loss
from fused_ops.ops.cross_entropy.arguments import INDEX_DTYPES, INPUT_DTYPES
from fused_ops.ops.cross_entropy.functions import REDUCTIONS
from fused_ops.ops.linear_cross_entropy import reference
from fused_ops.ops.linear_cross_entropy.plan import SMALL_BYTES

_ORDINARY = (Tensor, torch.nn.Parameter)
INPUT, WEIGHT, BIAS = 1, 2, 4
# float16's gradients have no range to spare: they are found with the upstream gradient that there is
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = [
        input.new_empty(t.shape if t is not None and needs & bit else (0,))
        for t, bit in ((input, INPUT), (linear_weight, WEIGHT), (linear_bias, BIAS))
    ]
    return input.new_empty(()), *found  # type: ignore[return-value]


_small_op = register(
    "linear_cross_entropy_small(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "int ignore_index, int reduction, int needs) -> (Tensor loss, Tensor grad_input, Tensor grad_weight, "
    "Tensor grad_bias)",
    reference.small,
    _fake,
)


class SmallLinearCrossEntropyFunction(Function):
    """The loss of a head whose gradients for an upstream gradient of 1 the forward finds.

    Only for plain reverse-mode autograd: transforms and forward-mode AD have ``_in_two``. Its one output
    and the ``forward`` with a context are what make it cheap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        rest: tuple[int, int, int],
    ) -> Any:
        found: tuple[Tensor, ...]
        found = _small_op(input, linear_weight, linear_bias, target, *rest)  # type: ignore[assignment]
        ctx.rest, ctx.gradients = rest, found[1:]
        ctx.save_for_backward(input, linear_weight, linear_bias, target)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        tensors, needs, gradients = ctx.saved_tensors, ctx.rest[2], ctx.gradients
        if is_differentiated():
            return *_differentiable(ctx, grad_loss, *tensors), None, None
        if gradients is None:  # a second backward through a graph that was retained
            gradients = _small_op(*tensors, *ctx.rest)[1:]  # type: ignore[index]
        if is_one(grad_loss):
            ctx.gradients = None  # they are handed over, not only lent
        else:
            gradients = [g * grad_loss for g in gradients]
        x, weight, bias = gradients
        found = (x if needs & INPUT else None, weight if needs & WEIGHT else None, bias if needs & BIAS else None)
        return *found, None, None


# Function.apply itself looks for a setup_context and for transforms on each call
_apply = super(Function, SmallLinearCrossEntropyFunction).apply


def _differentiable(ctx: Any, grad_loss: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The gradients with a graph of their own, through cross-entropy's Function."""
    ignore_index, reduction, needs = ctx.rest
    again = torch.is_grad_enabled()  # else tangents are all that is wanted of them
    with torch.enable_grad():
        x, weight, bias = (None if t is None else t.view_as(t) for t in tensors[:3])  # one tensor may be two of them
        assert x is not None and weight is not None and tensors[3] is not None
        name = next(name for name, code in REDUCTIONS.items() if code == reduction)
        loss = _in_two(x, weight, bias, tensors[3], ignore_index, name)
        wanted = [t for i, t in enumerate((x, weight, bias)) if needs & (1 << i) and t is not None]
        new = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=again))
    return [next(new) if needs & (1 << i) else None for i in range(3)]


def small_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> Tensor:
    """The logits of a call that ``is_small``, as one product."""
    tensors = [("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias), ("target", target)]
    check_tensors("linear_cross_entropy", tensors)  # F.linear takes a meta matrix for one of the CPU
    return torch.nn.functional.linear(input, linear_weight, linear_bias)


def _in_two(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """The product, then the loss."""
    return index_loss(small_logits(input, linear_weight, linear_bias, target), target, ignore_index, reduction)


def is_small(input: Any, linear_weight: Any, linear_bias: Any, target: Any) -> bool:
    """Whether this is a call on the CPU, right in every respect, of logits that are not worth cutting."""
    if type(input) not in _ORDINARY or type(linear_weight) not in _ORDINARY or type(target) is not Tensor:
        return False
    shape, weight_shape, dtype = input.shape, linear_weight.shape, input.dtype
    if len(shape) != 2 or len(weight_shape) != 2 or shape[1] != weight_shape[1] or target.shape != shape[:1]:
        return False
    if (
        not 0 < shape[0] * weight_shape[0] * dtype.itemsize <= SMALL_BYTES
        or not shape[1]
        or target.dtype not in INDEX_DTYPES
    ):
        return False
    if linear_weight.dtype != dtype or dtype not in INPUT_DTYPES or not input.is_cpu:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return linear_bias is None or (
        type(linear_bias) in _ORDINARY and linear_bias.shape == weight_shape[:1] and linear_bias.dtype == dtype
    )


def are_plain(*options: Any) -> bool:
    """Whether the tensors among the options are of no subclass and on the CPU."""
    return all(not isinstance(t, Tensor) or (type(t) in _ORDINARY and t.is_cpu) for t in options)


def small_loss(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor | None:
    """The loss of a call that ``is_small``; None where it takes plain formulas."""
    if (
        reduction == "none"
        or input.dtype not in _DTYPES
        or is_tracing()
        or transforms_active()
        or forward_ad._current_level >= 0
    ):
        if needs_formulas():
            return None
        return _in_two(input, linear_weight, linear_bias, target, ignore_index, reduction)
    needs = 0
    if torch.is_grad_enabled():
        bias = 0 if linear_bias is None or not linear_bias.requires_grad else BIAS
        needs = input.requires_grad * INPUT + linear_weight.requires_grad * WEIGHT + bias
    rest = (ignore_index, REDUCTIONS[reduction], needs)
    if not needs:
        return _small_op(input, linear_weight, linear_bias, target, *rest)[0]  # type: ignore[index,no-any-return]
    return _apply(input, linear_weight, linear_bias, target, rest)  # type: ignore[no-any-return]

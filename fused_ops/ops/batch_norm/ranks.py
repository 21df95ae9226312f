"""Batch norm of a batch that is spread over the ranks of a process group: a part on each rank, one gather a direction.

Forward: each rank gathers what it has found of its part (how many values, mean and M2 of each channel, in float64 where
the device has it) and merges all of it alike, so statistics and running statistics have the same bits on all ranks.
Backward: likewise the two sums that the gradient needs. What is gathered is 16 bytes a channel and rank each time.
docs/batch_norm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.library import register
from fused_ops.core.memory_format import empty_normalised, wide_dtype
from fused_ops.core.torch_private import is_fake
from fused_ops.distributed.collectives import gather_op, group_of, sum_of_ranks
from fused_ops.ops.batch_norm import ranks_reference, reference
from fused_ops.ops.batch_norm.activations import NONE
from fused_ops.ops.batch_norm.ranks_reference import Merged
from fused_ops.ops.batch_norm.reference import Call, Options, Saved


def _fake_moments(input: Tensor, valid: Tensor | None = None) -> Tensor:
    return input.new_empty(2 + 2 * input.size(1), dtype=wide_dtype(input))


def _fake_normalise(
    statistics: Tensor, input: Tensor, weight: Any, bias: Any, activation: int, slope: float, residual: Any, *_: Any
) -> Tensor:
    return empty_normalised(input, alone=residual is None and activation == NONE)


def _fake_sums(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((2, input.size(1)), dtype=wide_dtype(input))


def _fake_gradient(
    means: Tensor | None, grad_residual: Tensor | None, grad_output: Tensor, input: Tensor, *_: Any
) -> Tensor:
    return input.new_empty(0) if means is None else empty_normalised(input)


_OPTIONS = "int activation, float slope, Tensor? residual, Tensor{}? mask, Tensor? valid"
_FORWARD = "Tensor input, Tensor? weight, Tensor? bias, " + _OPTIONS.format("(a!)")
_BACKWARD = "Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, " + _OPTIONS.format("")
_moments_op: Any = register(
    "batch_norm_moments(Tensor input, Tensor? valid) -> Tensor", ranks_reference.moments, _fake_moments
)
_normalise_op: Any = register(
    f"batch_norm_normalise(Tensor statistics, {_FORWARD}) -> Tensor", ranks_reference.normalise, _fake_normalise
)
_sums_op: Any = register(f"batch_norm_grad_sums({_BACKWARD}) -> Tensor", ranks_reference.grad_sums, _fake_sums)
_gradient_op: Any = register(
    f"batch_norm_gradient(Tensor? means, Tensor(a!)? grad_residual, {_BACKWARD}) -> Tensor",
    ranks_reference.gradient,
    _fake_gradient,
)


def over_ranks(options: Options) -> Callable[[Tensor], Tensor] | None:
    """The differentiable sum over the ranks of a call; None for a call of one process."""
    return None if options.group is None else partial(sum_of_ranks, group=group_of(options.group))


def _gathered(input: Tensor, options: Options) -> Tensor:
    result: Tensor = gather_op(input, options.group, options.ranks)
    return result


def forward(call: Call, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(output, statistics, new running statistics), the statistics wide: mean, invstd and count, (3, channels)."""
    input, running_mean, running_var, weight, bias, residual, valid, o = call
    mine = _moments_op(input, valid)
    found = ranks_reference.merge(_gathered(mine, o))
    _check_positions(input, found)
    invstd = (found.m2 / (found.values - o.correction) + o.eps).rsqrt()
    statistics = torch.stack((found.mean, invstd, found.values.expand_as(invstd)))
    output = _normalise_op(statistics[:2], input, weight, bias, o.activation, o.slope, residual, mask, valid)
    new = ((running_mean, found.mean), (running_var, found.m2 / (found.values - 1)))
    return output, statistics, *(None if r is None else _updated(r, v, found.values, o.momentum) for r, v in new)


def _check_positions(input: Tensor, found: Merged) -> None:
    """Raises, on all ranks, for one value a channel. A rank with two of its own need not read how many there are."""
    few = input.size(1) and input.numel() <= input.size(1)
    if few and not (input.is_meta or is_fake(input)) and found.positions == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all ranks together, here input size "
            f"{input.shape}"
        )


def _updated(running: Tensor, values: Tensor, count: Tensor, momentum: float) -> Tensor:
    """The running statistic after this batch; one without values leaves it as it is."""
    new = momentum * values + (1 - momentum) * running
    return torch.where(count > 0, new, running).to(running.dtype)


def backward(
    grad_output: Tensor, saved: Saved, options: Options, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``functions.backward``; the gradients of weight and bias are this rank's part."""
    need_input, need_residual, need_params = needs
    input, residual, weight, bias, statistics, mask, valid = saved
    _, invstd, count = statistics
    rest = weight, bias, statistics[:2], options.activation, options.slope, residual, mask, valid
    means = grad_residual = None
    kind = reference.param_dtype(input, weight, bias)
    grad_weight = grad_bias = input.new_empty(0, dtype=kind)
    if need_input or need_params:
        sum, dot = mine = _sums_op(grad_output, input, *rest)
        if need_input:
            total, along = _gathered(mine, options).sum(0)
            means = torch.stack((total / count, along * invstd.square() / (count - options.correction)))
        grad_weight, grad_bias = torch.where(count > 0, dot * invstd, 0.0).to(kind), sum.to(kind, copy=True)
    if need_residual:
        grad_residual = empty_normalised(input)
    grad_input = input.new_empty(0)
    if need_input or need_residual:
        grad_input = _gradient_op(means, grad_residual, grad_output, input, *rest)
    return grad_input, input.new_empty(0) if grad_residual is None else grad_residual, grad_weight, grad_bias

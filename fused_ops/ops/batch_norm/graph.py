"""Batch norm in the graphs of torch.compile and torch.export: one op with every option, and its gradients.

Also the op that writes the running statistics under torch.func.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.graph import as_tensor, functionalizing, register_graph_op
from fused_ops.core.library import _fragment
from fused_ops.core.memory_format import empty_normalised, is_channels_last, wide_dtype
from fused_ops.ops.batch_norm import activations, derivatives, functions, reference
from fused_ops.ops.batch_norm.ranks import over_ranks
from fused_ops.ops.batch_norm.reference import Call, Options, Saved, as_call

# The numbers are momentum, eps and slope; None: _default.
_OPTIONS = "bool training, Tensor? numbers, SymInt correction, int activation, SymInt groups"
_RANKS = "str? group=None, int ranks=1"
_INPUT, _RESIDUAL, _PARAMS = 1, 2, 4  # the gradients that are needed, one bit each


def _default(activation: int) -> tuple[float, float, float]:
    """momentum, eps and slope where ``numbers`` is None."""
    return 0.1, 1e-5, activations.slope_of(activation, 0.01, 1.0)


def _numbers(numbers: Tensor | None, activation: int) -> tuple[float, float, float]:
    momentum, eps, slope = _default(activation) if numbers is None else numbers.tolist()
    return momentum, eps, slope


def _mask_bytes(input: Tensor) -> Any:
    """Room for the mask of any size: of its two orders for small images, the longer one, so that no size is a guard."""
    batch, channels = input.size(0), input.size(1)
    spatial = math.prod(input.shape[2:])
    if input.dim() == 2:
        return batch * ((channels + 7) // 8)
    if is_channels_last(input):
        return batch * spatial * ((channels + 7) // 8)
    return batch * channels * ((spatial + 7) // 8)


def _call_of(args: tuple[Any, ...], momentum: float, eps: float, slope: float) -> Call:
    *tensors, training, _, correction, activation, groups, group, ranks = _all(args, 14)
    return as_call((*tensors, training, momentum, eps, correction, activation, slope, groups, group, ranks))


def _all(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The arguments with the group's, which the dispatcher leaves out where they are the defaults."""
    return (*args, *(None, 1)[len(args) - count :]) if len(args) < count else args


def _forward(*args: Any) -> Any:
    call = _call_of(args, *_numbers(args[8], args[10]))
    *found, mask = functions.forward(call)
    if mask.numel():
        mask = torch.nn.functional.pad(mask, (0, _mask_bytes(call.input) - mask.numel()))
    return *found, mask


def _fake_forward(*args: Any) -> Any:
    call = _call_of(args, 0.1, 1e-5, 0.0)
    input, training = call.input, call.options.training
    options = {"activation": call.options.activation, "residual": call.residual, "groups": call.options.groups}
    output, statistics = functions._fake_forward(input, *call[1:5], training, **options)
    if call.options.group is not None:
        statistics = statistics.new_empty((3, input.size(1)))
    new_mean, new_var = (
        input.new_empty((0,), dtype=wide_dtype(input)) if r is None or not training else torch.empty_like(r)
        for r in (call.running_mean, call.running_var)
    )
    has_mask = reference.has_mask(call.residual, call.valid, call.options.activation)
    mask = input.new_empty((_mask_bytes(input) if has_mask else 0,), dtype=torch.uint8)
    return output, statistics, new_mean, new_var, mask


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = _call_of(inputs, 0.1, 1e-5, 0.0)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    training, numbers, correction, activation, groups, *ranks = _all(inputs, 14)[7:]
    ctx.options = training, correction, activation, groups, ranks
    ctx.save_for_backward(*functions.saved_for(call, output[1], output[4]), numbers)


def _backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
    need = ctx.needs_input_grad
    needs = need[0] * _INPUT + need[5] * _RESIDUAL + (need[3] or need[4]) * _PARAMS
    if grad_output is None or not needs:
        return (None,) * 14
    *saved, numbers = ctx.saved_tensors
    training, correction, activation, groups, ranks = ctx.options
    given = need[5] and activation == activations.NONE and Saved(*saved).valid is None
    needs = needs & ~_RESIDUAL if given else needs
    found = [*_grad_op(grad_output, *saved, training, numbers, correction, activation, groups, needs, *ranks)]
    if given:
        found[1] = grad_output
    grad_input, grad_residual, grad_weight, grad_bias = (
        g if n else None for g, n in zip(found, (need[0], need[5], need[3], need[4]), strict=True)
    )
    return grad_input, None, None, grad_weight, grad_bias, grad_residual, *(None,) * 8


def _grad(*args: Any) -> Any:
    grad_output, *tensors, training, numbers, correction, activation, groups, needs, group, ranks = _all(args, 16)
    momentum, eps, slope = _numbers(numbers, activation)
    options = Options(training, momentum, eps, correction, activation, slope, groups, group, ranks)
    wanted = bool(needs & _INPUT), bool(needs & _RESIDUAL), bool(needs & _PARAMS)
    return functions.backward(grad_output, _exact_mask(Saved(*tensors)), options, wanted)


def _exact_mask(saved: Saved) -> Saved:
    if saved.mask is None:
        return saved
    return saved._replace(mask=saved.mask[: reference.mask_bytes(saved.input)])


def _fake_grad(*args: Any) -> Any:
    grad_output, *tensors, needs = args[0], *args[1:8], args[13]
    input, _, weight, bias, statistics, _, _ = tensors
    wanted = True, bool(needs & _INPUT), bool(needs & _PARAMS)
    grad_input, *grads = functions._fake_backward(grad_output, input, weight, bias, statistics, *wanted)
    return grad_input, empty_normalised(input) if needs & _RESIDUAL else input.new_empty(0), *grads


def _grad_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, training, numbers, correction, activation, groups, _, group, ranks = _all(inputs, 16)
    ctx.options = training, correction, activation, groups, group, ranks
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, numbers)


def _grad_backward(ctx: Any, *grads: Tensor | None) -> Any:
    grad_output, *tensors, numbers = ctx.saved_tensors
    training, correction, activation, groups, group, ranks = ctx.options
    momentum, eps, slope = _default(activation) if numbers is None else numbers.unbind()
    saved = _exact_mask(Saved(*tensors))
    options = Options(training, momentum, eps, correction, activation, slope, groups, group, ranks)
    found = derivatives.double_backward(grads, grad_output, saved, options, over_ranks(options))
    present = (grad_output, *saved[:4])
    return *(g if t is not None else None for g, t in zip(found, present, strict=True)), *(None,) * 11


_op: Any = register_graph_op(
    "batch_norm(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
    f"Tensor? residual, Tensor? valid, {_OPTIONS}, {_RANKS}) -> (Tensor output, Tensor statistics, "
    "Tensor new_running_mean, Tensor new_running_var, Tensor mask)",
    _forward,
    _fake_forward,
    _context,
    _backward,
)
_grad_op: Any = register_graph_op(
    "batch_norm_grad(Tensor grad_output, Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    f"Tensor statistics, Tensor? mask, Tensor? valid, {_OPTIONS}, int needs, {_RANKS}) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _grad,
    _fake_grad,
    _grad_context,
    _grad_backward,
)


def batch_norm(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the new running statistics of a call."""
    o = call.options
    numbers = o.momentum, o.eps, o.slope
    packed = None if numbers == _default(o.activation) else as_tensor(*numbers)
    found = _op(*call[:7], o.training, packed, o.correction, o.activation, o.groups, o.group, o.ranks)
    return found[0], found[2], found[3]


# ---- running statistics under torch.func


def _write(new_mean: Tensor, new_var: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    running_mean.data.copy_(new_mean)
    running_var.data.copy_(new_var)


# The running statistics come last: an op that returns its first argument, written to, is what torch.func refuses for
# tensors from outside of the transform. PyTorch's batch norm is none either.
_write_op: Any = register_graph_op(
    "batch_norm_write_statistics(Tensor new_mean, Tensor new_var, Tensor(a!) running_mean, Tensor(b!) running_var) "
    "-> ()",
    _write,
    lambda *_: None,
)
# torch.func.functionalize refuses an op that says what it writes; PyTorch's batch norm does not say it.
_write_silently_op: Any = register_graph_op(
    "batch_norm_write_statistics_silently(Tensor new_mean, Tensor new_var, Tensor running_mean, Tensor running_var) "
    "-> ()",
    _write,
    lambda *_: None,
)


def write_statistics(new_mean: Tensor, new_var: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Writes running statistics that may be from outside of the active transforms."""
    (_write_silently_op if functionalizing() else _write_op)(new_mean, new_var, running_mean, running_var)


def _write_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[None, None]:
    for new, running in ((0, 2), (1, 3)):
        if in_dims[running] is None and in_dims[new] is not None:
            raise RuntimeError(
                "Batch norm got a batched tensor as input while the running_mean or running_var, which will be updated "
                "in place, were not batched. If you are using a module and do not need eval mode, please set "
                "`track_running_stats` to be False."
            )
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(args, in_dims, strict=True)]
    write_statistics(*moved)
    return None, None


for _name in ("batch_norm_write_statistics", "batch_norm_write_statistics_silently"):
    torch.library.register_vmap(f"fused_ops::{_name}", _write_vmap, lib=_fragment)

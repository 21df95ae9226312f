"""Batch normalisation: the public function, and what becomes of its running statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fused_ops.core.checks import as_int64
from fused_ops.core.graph import in_graph, left_to_pytorch, no_script
from fused_ops.core.torch_private import graph_task_id, is_tracing, transforms_active
from fused_ops.ops.batch_norm import activations, arguments, dtensors, functions, graph, keep_output
from fused_ops.ops.batch_norm.activations import ActivationName
from fused_ops.ops.batch_norm.arguments import (
    Way,
    check_kinds,
    check_values,
    checked_call,
    code_of,
    is_empty_1d,
    several_ranks,
)
from fused_ops.ops.batch_norm.derivatives import formulas
from fused_ops.ops.batch_norm.reference import Call

_EAGER = Way.EAGER
_NONE = activations.NONE


def recomputing() -> bool:
    """Whether a backward pass is running: a forward inside it is activation checkpointing's second."""
    return not torch.compiler.is_compiling() and graph_task_id() != -1


@no_script
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    correction: int = 0,
    activation: ActivationName | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    valid: Tensor | None = None,
    groups: int = 1,
    inplace_activated: bool = False,
    group: Any = None,
) -> Tensor:
    """Batch normalisation, as ``torch.nn.functional.batch_norm``, with what usually follows it in the same op.

    Args:
        input: (batch, channels) or (batch, channels, ...); float32, float64, bfloat16 or float16.
        running_mean: (channels) or None; updated in place in training, used in evaluation.
        running_var: (channels) or None; updated with the unbiased variance.
        weight: (channels) or None, the scale.
        bias: (channels) or None, the shift.
        training: Whether to normalise with the statistics of this batch. Without, the running statistics are
            constants (frozen batch norm); gradients still reach input, weight and bias.
        momentum: Weight of this batch in the running statistics.
        eps: Added to the variance.
        correction: Subtracted from the number of values in the variance that normalises: 0 as PyTorch, 1 unbiased.
        activation: What is applied last: None, ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"`` (the
            exact one), ``"tanh"``, ``"sigmoid"`` or ``"hardswish"``.
        residual: Added before the activation; shape and dtype of ``input``.
        negative_slope: Of leaky_relu.
        alpha: Of elu.
        valid: The positions that count, a bool mask (batch, ...) of the input's shape without its channels, or
            lengths (batch) of an integer dtype for a (batch, channels, length) input. Others count neither in the
            statistics nor in any gradient, and the result there is 0.
        groups: Ghost batches: the batch is cut into this many parts of equal size (the last may be smaller, a small
            batch gives fewer), each normalised by its own statistics; the running statistics take them in turn.
        inplace_activated: Keep the output for the backward instead of the input, whose memory is then free once
            nobody else holds it; for activation None, ``"leaky_relu"`` or ``"elu"`` (with a positive slope), without a
            residual. The output is a new tensor all the same. Changes nothing with ``group``.
        group: A process group of torch.distributed, each of whose ranks calls this with its part of the batch, of any
            size, none included: in training the statistics are those of all parts. See the note.

    Returns:
        The normalised tensor, shape and dtype of ``input``.

    Raises:
        ValueError: one value per channel in training, ``eps`` not positive in training, one of the running statistics
            without the other, an unknown ``activation``, ``groups`` below 1 or, with ``group``, above 1, or
            ``inplace_activated`` where the output does not tell the input. One value per channel on all ranks together
            raises on all of them.
        RuntimeError: no running statistics in evaluation, parameters of a wrong size or of mixed dtypes, a
            ``residual`` or ``valid`` of a wrong shape, running statistics that require grad, or an ordinary ``input``
            beside DTensors.
        IndexError: ``input`` has fewer than two dimensions.
        NotImplementedError: ``input`` is not of one of the four floating-point dtypes, or, with ``group``,
            where only formulas serve: vmap, torch.func.functionalize, nested forward mode, torch.jit.trace.
        TypeError: ``input`` is not a tensor, ``momentum`` is None, or ``valid`` is not of a bool or integer dtype.

    Note:
        Statistics are accumulated blockwise and merged in float64, in an order that does not depend on the number of
        threads. Differentiable any number of times, in both modes. Running statistics are not updated by a forward
        that runs inside a backward pass, so that activation checkpointing counts each batch once. With
        ``inplace_activated`` a channel of small weight keeps its input besides, so that gradients stay as exact; under
        torch.func, forward-mode AD and torch.compile the option changes nothing. On CUDA such a forward reads from the
        device how much that is (not without weight and bias, but for elu; and not while a graph is captured, where room
        is made for all of the input).

        DTensors need no ``group``: the statistics are those of the whole DTensor, along whichever dimensions its
        placements divide it. All else may be a DTensor or a tensor that every rank has whole, running statistics
        too. A batch that several dimensions of the mesh divide is gathered along all but the first.

        With ``group`` each rank's loss is a part of the sum that is differentiated: grad_input is of the sum, the
        gradients of weight and bias are this rank's share, for DistributedDataParallel or the caller to add. Statistics
        and running statistics have the same bits on all ranks. One gather in the forward, and one in the backward where
        ``input`` requires grad, which must be so on all ranks or on none; the same holds for what is differentiated
        again, and for being in training. weight and bias are to be the same on all ranks.

    Source: Ioffe and Szegedy, 2015; the one-step backward is derived in docs/batch_norm.md.
    """
    if correction:
        correction = as_int64("batch_norm", "correction", correction)
    way = arguments.way_of(input, running_mean, running_var, weight, bias, residual, valid)
    if group is not None:
        group = several_ranks(group, training, groups)
        way = Way.FUNCTION if group is not None and way is _EAGER else way
    if way is _EAGER and not inplace_activated and (training is True or training is False):
        try:
            code, slope = _NONE, 0.0
            more: tuple[Any, ...] = ()
            if activation is not None:
                code = activations.CODES[activation]
                slope = activations.slope_of(code, negative_slope, alpha)
            if residual is not None or valid is not None or groups != 1:
                more = residual, arguments.checked_options(input, residual, valid, groups), groups
            numbers = momentum, eps, correction, code, slope
            return functions.eager(input, running_mean, running_var, weight, bias, training, numbers, more)
        except Exception:  # an argument that the checks below know, or else as it is
            plain = activation is None and correction == 0 and residual is None and valid is None and groups == 1
            if plain and isinstance(input, Tensor) and input.is_mkldnn:
                statistics = (running_mean, running_var)
                return torch.nn.functional.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
            check_kinds(input, running_mean, running_var, weight, bias, training, momentum, eps, correction)
            if not is_empty_1d(input, running_mean):
                check_values(input, running_mean, running_var, training, eps)
                code_of(activation)
                raise
    args = (input, running_mean, running_var, weight, bias, training, momentum, eps)
    if group is not None and way is Way.FORMULAS:
        raise NotImplementedError(
            "batch_norm: group is not supported with torch.jit.trace, functionalize, nested forward mode or a "
            "transform of torch.func inside of torch.compile"
        )
    whole = valid is None and groups == 1 and not correction and group is None and way is not Way.DTENSORS
    if whole and isinstance(input, Tensor) and left_to_pytorch(input):
        function = activations.function_of(code_of(activation), negative_slope, alpha)
        arguments.checked_options(input, residual, None, 1)
        output = torch.nn.functional.batch_norm(*args)
        return function(output if residual is None else output + residual)
    if way is Way.OVERRIDES or way is Way.DTENSORS:
        own: dict[str, Any] = {
            "correction": correction,
            "activation": activation,
            "residual": residual,
            "negative_slope": negative_slope,
            "alpha": alpha,
            "valid": valid,
            "groups": groups,
            "inplace_activated": inplace_activated,
            "group": group,
        }
        if way is Way.OVERRIDES:
            return handle_torch_function(batch_norm, (*args[:5], residual, valid), *args, **own)
        return _of_dtensors(*args, own)
    check_kinds(*args, correction)
    if group is None and is_empty_1d(input, running_mean):
        return input.clone()
    call = checked_call(
        *args,
        *(correction, activation, residual, negative_slope, alpha, valid, groups, inplace_activated),
        group=group,
    )
    output, new_mean, new_var = _run(call, way, inplace_activated)
    if training and running_mean is not None and running_var is not None and not recomputing():
        write_running(new_mean, new_var, running_mean, running_var)
    return output


def _of_dtensors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    own: dict[str, Any],
) -> Tensor:
    """The call of what this rank holds, and the DTensor of that."""
    tensors = {"input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    named = [*tensors.items(), ("residual", own["residual"]), ("valid", own["valid"])]
    where = dtensors.spread(named, own["group"], training, own["groups"])
    residual, valid = own["residual"], dtensors.mask_of(own["valid"], input)
    mine = {
        **own,
        "residual": None if residual is None else where.input.local(residual),
        "valid": None if valid is None else where.input.without(1).local(valid),
        "group": where.group() if training else None,
    }
    statistics = where.statistic(running_mean), where.statistic(running_var)
    parameters = where.parameter(weight), where.parameter(bias)
    output = batch_norm(where.input.local(input), *statistics, *parameters, training, momentum, eps, **mine)
    if training and not recomputing():
        where.write(statistics[0], running_mean)
        where.write(statistics[1], running_var)
    return where.input.whole(output, tuple(input.shape))


def write_running(new_mean: Tensor, new_var: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """New running statistics into the old ones, which a transform of torch.func may have captured.

    As PyTorch's batch norm writes them: autograd takes no notice, so that what saved them before can go on.
    """
    if transforms_active():
        graph.write_statistics(new_mean, new_var, running_mean, running_var)
    elif torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and (is_tracing() or in_graph())):
        running_mean.copy_(new_mean)  # jit.trace, export and make_fx follow no `.data`
        running_var.copy_(new_var)
    else:
        running_mean.data.copy_(new_mean)
        running_var.data.copy_(new_var)


def _run(call: Call, way: Way, inplace_activated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(output, new_running_mean, new_running_var) of a call, which changes nothing."""
    if (
        inplace_activated
        and call.options.group is None
        and arguments.may_keep_output(way, call.input, call.weight, call.bias)
    ):
        return keep_output.batch_norm(call)
    if way is Way.FORMULAS:
        return formulas(call)
    return graph.batch_norm(call) if way is Way.GRAPH else functions.batch_norm(call)


def _with_statistics(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_norm`` that changes nothing: all its arguments -> (output, new_running_mean, new_running_var).

    The last is what ``several_ranks`` returned.
    """
    call = checked_call(*args)
    inplace_activated = args[15]
    tensors = (call.input, call.running_mean, call.running_var, call.weight, call.bias, call.residual, call.valid)
    return _run(call, arguments.way_of(*tensors), inplace_activated)

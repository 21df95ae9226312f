"""Batch normalisation: the public function, its checks and its running statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fused_ops.core.checks import as_int64, check_tensors
from fused_ops.core.graph import in_graph, needs_formulas, no_script
from fused_ops.core.torch_private import graph_task_id, has_torch_function, transforms_active
from fused_ops.distributed.dtensor import any_dtensor, refuse
from fused_ops.ops.batch_norm import activations, graph
from fused_ops.ops.batch_norm import eager as packed
from fused_ops.ops.batch_norm.formulas import formulas
from fused_ops.ops.batch_norm.functions import BatchNormActFunction, BatchNormFunction
from fused_ops.ops.batch_norm.reference import Options, check_written

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_kinds(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: object,
) -> None:
    """Raises for an argument that is no tensor, number or bool, as PyTorch's argument parser does."""
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm(): argument 'input' must be Tensor, not {type(input).__name__}")
    tensors = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    for name, value in tensors:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"batch_norm(): argument '{name}' must be Tensor, not {type(value).__name__}")
        if value.dim() != 1 and name.startswith("running"):
            raise RuntimeError(f"batch_norm: expected {name} to have one dimension, got shape {list(value.shape)}")
    if isinstance(training, str) or training is None:
        raise TypeError(f"batch_norm(): argument 'training' (position 6) must be bool, not {type(training).__name__}")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if not isinstance(number, (float, int)) and not hasattr(number, "__float__"):
            raise TypeError(f"batch_norm(): argument '{name}' must be float, not {type(number).__name__}")
    as_int64("batch_norm", "correction", correction)
    if eps < 0 and not training:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def _check(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float) -> None:
    if input.dim() < 2:
        raise IndexError(f"batch_norm: input must be (batch, channels, ...), got shape {list(input.shape)}")
    if input.dtype not in _INPUT_DTYPES:
        raise NotImplementedError(f"batch_norm: input must be a floating-point tensor, got {input.dtype}")
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if input.size(1) and input.numel() == input.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        check_written(running_mean, running_var)
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            if not training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif value.requires_grad:
            raise RuntimeError(f"batch_norm is not differentiable with respect to argument '{name}'.")


def _code(activation: str | None) -> int:
    if activation not in activations.CODES:
        names = [name for name in activations.CODES if name is not None]
        raise ValueError(f"batch_norm: expected activation to be None or one of {names}, got {activation!r}")
    return activations.CODES[activation]


def _positions(valid: Tensor, input: Tensor) -> Tensor:
    """The mask of positions that count, (batch, ...), from such a mask or from lengths."""
    batch, spatial = input.size(0), input.shape[2:]
    if valid.dtype == torch.bool:
        if valid.shape != (batch, *spatial):
            raise RuntimeError(f"batch_norm: expected valid of shape {[batch, *spatial]}, got {list(valid.shape)}")
        return valid
    if valid.is_floating_point() or valid.is_complex():
        raise TypeError(f"batch_norm: expected valid to be bool, or lengths of an integer dtype, got {valid.dtype}")
    if valid.shape != (batch,) or len(spatial) != 1:
        expected = f"lengths of shape {[batch]} with a 3-d input"
        raise RuntimeError(f"batch_norm: expected valid to be {expected}, got {list(valid.shape)} with {input.dim()}-d")
    check_tensors("batch_norm", [("input", input), ("valid", valid)])
    return torch.arange(spatial[0], device=input.device) < valid.unsqueeze(1)


def _checked(input: Tensor, valid: Tensor | None, options: Options) -> Tensor | None:
    if as_int64("batch_norm", "groups", options.groups) < 1:
        raise ValueError(f"batch_norm: expected groups to be at least 1, got {options.groups}")
    return None if valid is None else _positions(valid, input)


def _check_residual(input: Tensor, residual: Tensor | None) -> None:
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        expected = f"{list(input.shape)} and {input.dtype}"
        raise RuntimeError(
            f"batch_norm: expected residual of input's shape and dtype, {expected}, got {list(residual.shape)} and "
            f"{residual.dtype}"
        )


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
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    valid: Tensor | None = None,
    groups: int = 1,
    inplace_activated: bool = False,
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
            residual. The output is a new tensor all the same.

    Returns:
        The normalised tensor, shape and dtype of ``input``.

    Raises:
        ValueError: one value per channel in training, ``eps`` not positive in training, one of the running statistics
            without the other, an unknown ``activation``, ``groups`` below 1, or ``inplace_activated`` where the output
            does not tell the input.
        RuntimeError: no running statistics in evaluation, parameters of a wrong size or of mixed dtypes, a
            ``residual`` or ``valid`` of a wrong shape, or running statistics that require grad.
        IndexError: ``input`` has fewer than two dimensions.
        NotImplementedError: ``input`` is not of one of the four floating-point dtypes.
        TypeError: ``input`` is not a tensor, ``momentum`` is None, or ``valid`` is not of a bool or integer dtype.

    Note:
        Statistics are accumulated blockwise and merged in float64, in an order that does not depend on the number of
        threads. Differentiable any number of times, in both modes. Running statistics are not updated by a forward
        that runs inside a backward pass, so that activation checkpointing counts each batch once. With
        ``inplace_activated`` a channel of small weight keeps its input besides, so that gradients stay as exact; under
        torch.func, forward-mode AD and torch.compile the option changes nothing.

    Source: Ioffe and Szegedy, 2015; the one-step backward is derived in docs/batch_norm.md.
    """
    if correction:
        correction = as_int64("batch_norm", "correction", correction)
    if (
        (residual is None and valid is None and groups == 1 and not inplace_activated)
        and (training is True or training is False)
        and packed.serves(input, running_mean, running_var, weight, bias)
    ):
        try:
            return packed.batch_norm(
                input,
                running_mean,
                running_var,
                weight,
                bias,
                training,
                momentum,
                eps,
                correction,
                activation,
                negative_slope,
                alpha,
            )
        except Exception:  # an argument that the checks below know, or else as it is
            if isinstance(input, Tensor) and input.is_mkldnn and activation is None and correction == 0:
                statistics = (running_mean, running_var)
                return torch.nn.functional.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
            _check_kinds(input, running_mean, running_var, weight, bias, training, momentum, eps, correction)
            if not (input.shape == (0,) and (running_mean is None or running_mean.numel() == 0)):
                _check(input, running_mean, running_var, training, eps)
                _code(activation)
                raise
    tensors = (input, running_mean, running_var, weight, bias, residual, valid)
    overridden = not torch.compiler.is_compiling() and has_torch_function(*tensors)
    if overridden or any_dtensor(*tensors):
        args = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        own: dict[str, Any] = {
            "correction": correction,
            "activation": activation,
            "residual": residual,
            "negative_slope": negative_slope,
            "alpha": alpha,
            "valid": valid,
            "groups": groups,
            "inplace_activated": inplace_activated,
        }
        if overridden:
            return handle_torch_function(batch_norm, tensors, *args, **own)
        refuse(batch_norm, own)
        return torch.nn.functional.batch_norm(*args)
    _check_kinds(input, running_mean, running_var, weight, bias, training, momentum, eps, correction)
    if input.shape == (0,) and (running_mean is None or running_mean.numel() == 0):
        return input.clone()  # one dimension of no values: PyTorch lets it through
    output, new_mean, new_var = _with_statistics(
        *(input, running_mean, running_var, weight, bias, training, momentum, eps, correction),
        *(activation, residual, negative_slope, alpha, valid, groups, inplace_activated),
    )
    if training and running_mean is not None and running_var is not None and not recomputing():
        write_running(new_mean, new_var, running_mean, running_var)
    return output


def write_running(new_mean: Tensor, new_var: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """New running statistics into the old ones, which a transform of torch.func may have captured."""
    if transforms_active():
        graph.write_statistics(new_mean, new_var, running_mean, running_var)
    else:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)


def _with_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: int,
    activation: str | None,
    residual: Tensor | None,
    negative_slope: float,
    alpha: float,
    valid: Tensor | None,
    groups: int,
    inplace_activated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_norm`` that changes nothing: (output, new_running_mean, new_running_var)."""
    _check(input, running_mean, running_var, training, eps)
    code = _code(activation)
    slope = activations.slope_of(code, negative_slope, alpha)
    options = Options(training, eps, correction, code, slope, groups)
    running, params = (running_mean, running_var), (weight, bias)
    if inplace_activated:
        import fused_ops.ops.batch_norm.keep_output as inplace  # it needs this module

        inplace.check(activation, code, slope, residual)
        if inplace.available(input, weight, bias):
            return inplace.apply(input, running, params, _checked(input, valid, options), momentum, options)
    _check_residual(input, residual)
    args = input, residual, running, params, _checked(input, valid, options), momentum, options
    if needs_formulas():
        return formulas(*args)
    return graph.batch_norm(*args) if in_graph() else _apply(*args)


def _apply(
    input: Tensor,
    residual: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    params: tuple[Tensor | None, Tensor | None],
    valid: Tensor | None,
    momentum: float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """By a Function: eager mode."""
    if residual is None and valid is None and options.activation == activations.NONE and options.groups == 1:
        statistics = (options.training, momentum, options.eps, options.correction)
        found = BatchNormFunction.apply(input, *running, *params, *statistics)
    else:
        found = BatchNormActFunction.apply(input, residual, *running, *params, valid, momentum, *options)
    return found[0], found[3], found[4]

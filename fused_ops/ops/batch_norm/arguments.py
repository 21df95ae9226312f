"""What the arguments of ``batch_norm`` mean: which way a call goes, and its checks."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_ops.core.checks import as_int64, check_tensors
from fused_ops.core.graph import in_graph, linearizing, needs_formulas
from fused_ops.core.memory_format import in_its_format
from fused_ops.core.torch_private import (
    dispatch_modes,
    forward_ad,
    has_torch_function,
    is_fake,
    is_tracing,
    transforms_active,
)
from fused_ops.distributed.collectives import check_group, name_of, size_of
from fused_ops.distributed.dtensor import any_dtensor
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.keep_output_reference import INVERTIBLE
from fused_ops.ops.batch_norm.reference import PARAMETERS, Call, Options, check_parameters, check_written

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Way(enum.Enum):
    """What serves a call."""

    EAGER = enum.auto()  # the Function of plain eager mode, which writes the running statistics in place
    FUNCTION = enum.auto()  # the Function with jvp and vmap, whose new running statistics are results
    GRAPH = enum.auto()  # the op that graphs hold
    FORMULAS = enum.auto()  # PyTorch's own differentiable ops
    OVERRIDES = enum.auto()  # __torch_function__
    DTENSORS = enum.auto()  # what this rank holds of DTensors, on one of the other ways


_EAGER = Way.EAGER


def way_of(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
) -> Way:
    """Which way a call goes, by what its tensors are and what is active around it."""
    if (
        not is_compiling()
        and type(input) is Tensor
        and not transforms_active()
        and forward_ad._current_level < 0
        and not has_torch_function(input, running_mean, running_var, weight, bias, residual, valid)
        and not is_tracing()
        and not (dispatch_modes() and in_graph())
    ):
        return _EAGER
    tensors = (input, running_mean, running_var, weight, bias, residual, valid)
    if not torch.compiler.is_compiling() and has_torch_function(*tensors):
        return Way.OVERRIDES
    if any_dtensor(*tensors):
        return Way.DTENSORS
    if needs_formulas() or linearizing():
        return Way.FORMULAS
    return Way.GRAPH if in_graph() else Way.FUNCTION


def may_keep_output(way: Way, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a backward from the output can serve; transforms, graphs and what has no values keep the input."""
    return (
        (way is Way.EAGER or (way is Way.FUNCTION and not transforms_active() and forward_ad._current_level < 0))
        and torch.is_grad_enabled()
        and not (input.is_meta or is_fake(input))
        and any(t is not None and t.requires_grad for t in (input, weight, bias))
    )


def is_empty_1d(input: Tensor, running_mean: Tensor | None) -> bool:
    """One dimension of no values, which PyTorch lets through."""
    return input.shape == (0,) and (running_mean is None or running_mean.numel() == 0)


def check_kinds(
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


def check_values(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    whole: bool = True,
) -> None:
    """Raises for a shape, a dtype or a number that batch norm does not take, as PyTorch does.

    Args:
        input: As of ``batch_norm``, like the next four.
        running_mean: Likewise.
        running_var: Likewise.
        training: Likewise.
        eps: Likewise.
        whole: Whether the input is all of the batch, not a part that is on this rank.
    """
    if input.dim() < 2:
        raise IndexError(f"batch_norm: input must be (batch, channels, ...), got shape {list(input.shape)}")
    if input.dtype not in _INPUT_DTYPES:
        raise NotImplementedError(f"batch_norm: input must be a floating-point tensor, got {input.dtype}")
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if whole and input.size(1) and input.numel() == input.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        check_written(running_mean, running_var)
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            if not training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif value.requires_grad:
            raise RuntimeError(f"batch_norm is not differentiable with respect to argument '{name}'.")


def code_of(activation: str | None) -> int:
    """The activation's code in the raw ops."""
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


def checked_options(input: Tensor, residual: Tensor | None, valid: Tensor | None, groups: int) -> Tensor | None:
    """Raises for a residual, ``valid`` or ``groups`` that does not fit; returns the mask of positions that count."""
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        expected = f"{list(input.shape)} and {input.dtype}"
        raise RuntimeError(
            f"batch_norm: expected residual of input's shape and dtype, {expected}, got {list(residual.shape)} and "
            f"{residual.dtype}"
        )
    if as_int64("batch_norm", "groups", groups) < 1:
        raise ValueError(f"batch_norm: expected groups to be at least 1, got {groups}")
    return None if valid is None else _positions(valid, input)


def several_ranks(group: Any, training: bool, groups: int) -> Any:
    """The process group of a call whose statistics are taken over several ranks; None for any other call.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this rank is not in it, or ``groups`` is not 1.
    """
    check_group("batch_norm", "group", group)
    if groups != 1:
        raise ValueError(
            f"batch_norm: expected groups to be 1 with group, whose statistics are of the batches of all ranks, got "
            f"{groups}"
        )
    return group if training and size_of(group) > 1 else None


def check_keeps_output(activation: str | None, code: int, slope: float, residual: Tensor | None) -> None:
    """Raises ValueError where the output does not tell what the backward needs."""
    if code not in INVERTIBLE:
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


def checked_call(
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
    group: Any = None,
) -> Call:
    """The call, once its arguments are known to be right; ``group``: what ``several_ranks`` returns."""
    check_values(input, running_mean, running_var, training, eps, whole=group is None)
    input = in_its_format(input)
    code = code_of(activation)
    slope = activations.slope_of(code, negative_slope, alpha)
    if inplace_activated:
        check_keeps_output(activation, code, slope, residual)
    positions = checked_options(input, residual, valid, groups)
    options = Options(training, momentum, eps, correction, code, slope, groups)
    if group is not None:
        options = options._replace(group=name_of(group), ranks=size_of(group))
        parameters = running_mean, running_var, weight, bias
        tensors = [("input", input), *zip(PARAMETERS, parameters, strict=True)]
        check_tensors("batch_norm", [*tensors, ("residual", residual), ("valid", positions)])
        check_parameters(input, *parameters)  # as the ops do, but before anything is sent
    return Call(input, running_mean, running_var, weight, bias, residual, positions, options)

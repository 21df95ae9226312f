"""What the arguments of cross-entropy mean, checked: which kind of target, in which dtype, and which door a call takes.

The doors: ``functions.small_loss`` (few logits, plain eager mode), class indices alone (``index_door``), and the rows
with every option (``prepare``). What serves the last two, a Function, an op of a graph or formulas, is in ``api.py``.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, TypedDict

import torch
from torch import Tensor

from fused_ops.core.checks import as_int64, check_data, check_devices
from fused_ops.core.function import autocast_enabled
from fused_ops.core.graph import needs_formulas
from fused_ops.core.memory_format import acc_dtype
from fused_ops.ops.cross_entropy.functions import REDUCTIONS
from fused_ops.ops.cross_entropy.reference import class_dim
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions, is_index_alone

_REAL: Any = (numbers.Real, torch.SymFloat, torch.SymInt)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Target: TypeAlias = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | float]
ReductionName = Literal["none", "mean", "sum"]
Empty = Literal["nan", "zero", "raise"]


class LossOptions(TypedDict, total=False):
    """What both losses take by keyword alone, for the overloads of type checkers."""

    z_loss: float
    logit_scale: float
    softcap: float | None
    token_weight: Tensor | None
    normalizer: Tensor | float | None
    class_mask: Tensor | None
    empty: Empty
    loss_dtype: torch.dtype | None
    class_group: Any
    class_start: int | None
    classes: int | None
    row_group: Any


class CrossEntropyOptions(LossOptions, total=False):
    """What cross_entropy takes besides; ``return_outputs`` is apart, as it says what is returned."""

    inplace_backward: bool


class Numbers(NamedTuple):
    """The options of ``cross_entropy`` that are numbers, as given."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None


class Call(NamedTuple):
    """A checked call."""

    args: RowArgs
    options: RowOptions
    kind: str  # "index", "dense", "sparse" or "mixup"
    z_loss: float
    token_weight: Tensor | None
    loss_dtype: torch.dtype

    def is_index_alone(self) -> bool:
        """Whether the op of class indices alone gives its rows, and in the dtype that is wanted."""
        alone = is_index_alone(self.args, self.options) and self.token_weight is None and not self.z_loss
        return alone and self.loss_dtype == self.args.input.dtype


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"cross_entropy(): argument '{name}' must be Tensor, not {type(value).__name__}")
    return value


def number(name: str, value: Any, low: float, strict: bool = False) -> float:
    if isinstance(value, Tensor) or not isinstance(value, _REAL):
        raise TypeError(f"cross_entropy(): argument '{name}' must be a number, not {type(value).__name__}")
    # Comparisons alone: of a number that is a symbol of a graph they are guards, and nothing else can be asked of it.
    if not -math.inf < value < math.inf or value < low or (strict and value == low):
        raise ValueError(
            f"cross_entropy: {name} must be finite and {'above' if strict else 'at least'} {low}, got {value}"
        )
    return _as_float(value)


def _as_float(number: Any) -> float:
    """The number as a float; one that is a symbol as it is, since PyTorch may take a product of it for a constant."""
    result: float = number if isinstance(number, float) else number * 1.0
    return result


def check_logits(input: Tensor) -> None:
    """Raises for a tensor that cannot be logits."""
    if input.dim() == 0:
        raise IndexError("cross_entropy: input must have at least one dimension (classes), got a scalar")
    if input.dtype not in INPUT_DTYPES:
        raise NotImplementedError(f"cross_entropy: input must be a floating-point tensor, got {input.dtype}")


def class_indices(name: str, target: Tensor, input: Tensor) -> Tensor:
    """The class indices of each row, checked; a 1-element target of a single example becomes a scalar."""
    want = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size([])
    if target.shape != want:
        if input.dim() == 1 and target.shape == (1,):
            target = target.reshape(())
        else:
            _refuse_shape(name, target, input, want)
    if target.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"cross_entropy: expected class indices of an integer dtype for {name}, got {target.dtype}")
    return target


def _refuse_shape(name: str, target: Tensor, input: Tensor, want: torch.Size) -> NoReturn:
    """Raises for class indices of a wrong shape."""
    if input.dim() == 1 and target.dim() == 1:
        raise ValueError(f"For 1D input, 1D {name} must have size 1, but got {name} size: {target.size(0)}")
    entries = target.size(0) if target.dim() else 0
    if input.dim() > 1 and input.size(0) != entries:
        raise ValueError(f"Expected input batch_size ({input.size(0)}) to match target batch_size ({entries}).")
    raise RuntimeError(f"cross_entropy: expected {name} of shape {list(want)}, got {list(target.shape)}")


def target_tensors(target: object) -> list[tuple[str, Any]]:
    """What a target consists of, with the names of its parts."""
    if not isinstance(target, (tuple, list)):
        return [("target", target)]
    names = ("target_a", "target_b", "lam") if len(target) == 3 else ("indices", "probabilities")
    return [*zip(names, target, strict=False)]


def check_ignore_index(value: object) -> int:
    """The value as an int; raises for what is no integer of 64 bits."""
    return as_int64("cross_entropy", "ignore_index", value)


def share_of_rows(lam: Tensor, first: Tensor) -> Tensor:
    """Mixup's share of each row, from a tensor of the shape of the class indices or of their first dimension."""
    if not lam.is_floating_point():
        raise RuntimeError(f"cross_entropy: expected lam of a floating-point dtype, got {lam.dtype}")
    if lam.dim() == 1 and first.dim() > 1:
        lam = lam.reshape(-1, *(1,) * (first.dim() - 1))
    try:
        return lam.expand(first.shape)
    except RuntimeError:
        raise RuntimeError(
            f"cross_entropy: expected lam to be a number, of shape {list(first.shape[:1])} or of target_a's "
            f"{list(first.shape)}, got shape {list(lam.shape)}"
        ) from None


def _mixup(target: tuple[Any, ...], input: Tensor) -> tuple[Tensor, Tensor]:
    """(target_a, target_b, lam) as indices and probabilities, two a row."""
    first, second = (
        class_indices(f"target_{n}", _tensor(f"target_{n}", t), input) for n, t in zip("ab", target, strict=False)
    )
    check_data("cross_entropy", target_tensors(target))
    dim, lam = class_dim(input), target[2]
    if not isinstance(lam, Tensor):
        lam = torch.ones((), dtype=acc_dtype(input.dtype), device=input.device) * number("lam", lam, 0.0)
    lam = share_of_rows(lam, first)
    if first.dtype != second.dtype:
        first, second = first.long(), second.long()
    return torch.stack((first, second), dim), torch.stack((lam, 1 - lam), dim)


def _sparse(target: tuple[Any, ...], input: Tensor) -> tuple[Tensor, Tensor]:
    indices, probabilities = _tensor("indices", target[0]), _tensor("probabilities", target[1])
    if indices.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"cross_entropy: expected indices of an integer dtype, got {indices.dtype}")
    if not probabilities.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {probabilities.dtype}"
        )
    dim = class_dim(input)
    shape = list(input.shape)
    if indices.dim() != input.dim() or [*shape[:dim], indices.size(dim), *shape[dim + 1 :]] != list(indices.shape):
        shape[dim] = -1
        raise RuntimeError(f"cross_entropy: expected indices of shape {shape}, got {list(indices.shape)}")
    if probabilities.shape != indices.shape:
        raise RuntimeError(
            f"cross_entropy: expected probabilities of the indices' shape {list(indices.shape)}, "
            f"got {list(probabilities.shape)}"
        )
    return indices, probabilities


def _target(
    target: object, input: Tensor, ignore_index: int, some_classes: bool
) -> tuple[str, Tensor | None, Tensor | None]:
    """What kind of target it is, its indices and its probabilities."""
    if isinstance(target, (tuple, list)):
        if len(target) not in (2, 3):
            raise TypeError(f"cross_entropy: expected target to have 2 or 3 entries, got {len(target)}")
        made = _mixup(tuple(target), input) if len(target) == 3 else _sparse(tuple(target), input)
        return ("mixup" if len(target) == 3 else "sparse"), *made
    target = _tensor("target", target)
    # of some classes there may be as many as of what a class index of one row may be in
    if target.shape != input.shape or (some_classes and not target.is_floating_point()):
        return "index", class_indices("target", target, input), None
    if not target.is_floating_point():
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    return "dense", None, target


def _check_weight(weight: Tensor, input: Tensor, kind: str, autocast: bool, some_classes: bool) -> None:
    _tensor("weight", weight)
    classes = input.size(class_dim(input))
    if weight.dim() != 1 or not (some_classes or weight.size(0) == classes):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise RuntimeError(f"cross_entropy: expected weight of a floating-point dtype, got {weight.dtype}")
    if kind != "index":
        return
    if weight.dtype != input.dtype and not autocast:
        raise RuntimeError(f"cross_entropy: expected weight of the dtype of input, {input.dtype}, got {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy: the loss of class indices is not differentiable with respect to argument 'weight'. "
            "This input cannot have requires_grad True."
        )


def _check_rows(name: str, value: Tensor, input: Tensor) -> None:
    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size([])
    if value.shape != rows:
        raise RuntimeError(f"cross_entropy: expected {name} of shape {list(rows)}, got {list(value.shape)}")


def _check_mask(mask: Tensor, input: Tensor, some_classes: bool) -> None:
    _tensor("class_mask", mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"cross_entropy: expected class_mask of dtype torch.bool, got {mask.dtype}")
    if some_classes and mask.dim() == 1:
        return
    classes = input.size(class_dim(input))
    # one of them alone: a symbolic number of rows that is compared with the classes becomes a guard
    if mask.shape != ((classes,) if mask.dim() == 1 else input.shape):
        raise RuntimeError(
            f"cross_entropy: expected class_mask of shape [{classes}] or {list(input.shape)}, got {list(mask.shape)}"
        )


def check_shapes(
    input: Tensor,
    target: object,
    weight: Tensor | None,
    class_mask: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
) -> str:
    """Which kind of target it is; raises for shapes and dtypes that do not fit, without a look at any value."""
    check_logits(input)
    if isinstance(target, (tuple, list)) and len(target) == 3:
        kind = "mixup"
        named = zip(("target_a", "target_b"), target[:2], strict=True)
        first, _ = (class_indices(name, _tensor(name, t), input) for name, t in named)
        if isinstance(target[2], Tensor):
            share_of_rows(target[2], first)
    else:
        kind = _target(target, input, check_ignore_index(ignore_index), False)[0]
    if weight is not None:
        _check_weight(weight, input, kind, autocast_enabled(input), False)
    if class_mask is not None:
        _check_mask(class_mask, input, False)
    if token_weight is not None:
        _check_rows("token_weight", _tensor("token_weight", token_weight), input)
    return kind


def check_places(
    input: Tensor, target: object, weight: Tensor | None, class_mask: Tensor | None, token_weight: Tensor | None
) -> None:
    """Raises for tensors of several devices, and for a token_weight without data: the ops check that of the others."""
    check_logits(_tensor("input", input))
    beside = [("input", input), *target_tensors(target), ("weight", weight), ("class_mask", class_mask)]
    check_devices("cross_entropy", [*beside, ("token_weight", token_weight)])
    if token_weight is not None:
        check_data("cross_entropy", [("token_weight", token_weight)])


def index_door(input: Any, target: Any, ignore_index: int, reduction: str) -> Tensor | None:
    """The class indices of a call without options, checked, one per row; None of a call that is another.

    Class probabilities and 16-bit logits under autocast, whose loss is float32, are rows; and so are formulas.
    """
    if isinstance(input, Tensor) and isinstance(target, Tensor):
        if target.shape == input.shape and input.dim():
            return None
        if input.dtype.itemsize == 2 and autocast_enabled(input):
            return None
    elif isinstance(target, (tuple, list)):
        return None
    if needs_formulas():
        return None
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    check_logits(_tensor("input", input))
    _tensor("target", target)
    check_ignore_index(ignore_index)
    return class_indices("target", target, input)


def prepare(
    input: Tensor,
    target: object,
    weight: Tensor | None,
    class_mask: Tensor | None,
    token_weight: Tensor | None,
    given: Numbers,
    loss_dtype: torch.dtype | None,
    some_classes: bool = False,
) -> Call:
    """Checks every argument but the reduction's, and settles kind and dtypes; the tensors are in one place already.

    With ``some_classes`` input has not all of those that weight and a mask of one dimension are for: how many there
    are is not known here.
    """
    check_logits(_tensor("input", input))
    given = given._replace(ignore_index=check_ignore_index(given.ignore_index))
    if given.label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {given.label_smoothing}")
    smoothing = _as_float(given.label_smoothing) if given.label_smoothing > 0 else 0.0  # NaN and less: none, as PyTorch
    autocast = autocast_enabled(input)
    kind, indices, probabilities = _target(target, input, given.ignore_index, some_classes)
    if weight is not None:
        _check_weight(weight, input, kind, autocast, some_classes)
    if class_mask is not None:
        _check_mask(class_mask, input, some_classes)
    if token_weight is not None:
        _check_rows("token_weight", _tensor("token_weight", token_weight), input)
    z_loss, scale = number("z_loss", given.z_loss, -math.inf), number("logit_scale", given.logit_scale, -math.inf)
    softcap = 0.0 if given.softcap is None else number("softcap", given.softcap, 0.0, strict=True)
    dtype = input.dtype
    for other in (probabilities if kind in ("dense", "sparse") else None, weight):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    if dtype == torch.float64 and input.dtype != dtype:
        check_data("cross_entropy", [("input", input)])
        input = input.to(dtype)
    if autocast and dtype.itemsize == 2:
        dtype = torch.float32
    if loss_dtype is not None and loss_dtype not in INPUT_DTYPES:
        raise TypeError(f"cross_entropy: expected loss_dtype to be one of {INPUT_DTYPES}, got {loss_dtype}")
    args = RowArgs(input, indices, probabilities, weight, class_mask)
    options = RowOptions(given.ignore_index, smoothing, scale, softcap, False)
    return Call(args, options, kind, z_loss, token_weight, loss_dtype or dtype)

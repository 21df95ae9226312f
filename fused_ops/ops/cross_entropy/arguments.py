"""What cross-entropy's options mean: which target a call has, in which dtype, and how its rows become one loss."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fused_ops.core.argument_checks import check_data, check_devices
from fused_ops.core.function import autocast_enabled
from fused_ops.core.integers import as_int64
from fused_ops.core.torch_private import is_tracing
from fused_ops.ops.cross_entropy.functions import REDUCTIONS
from fused_ops.ops.cross_entropy.reference import acc_dtype, class_dim, counts
from fused_ops.ops.cross_entropy.rows_reference import RowArgs, RowOptions

RunRows = Callable[[RowArgs, RowOptions], "tuple[Tensor, ...]"]  # the seven results of cross_entropy_rows_forward
_BLOCK = 4096
_REAL: Any = (numbers.Real, torch.SymFloat, torch.SymInt)
_EMPTY = ("nan", "zero", "raise")
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CrossEntropyOutput(NamedTuple):
    """What ``cross_entropy(..., return_outputs=True)`` gives; per row: of the shape of the loss without reduction.

    lse, target_log_probability and entropy are float32 for 16-bit logits, else of the logits' dtype, and are there for
    ignored rows too (target_log_probability is 0 there). All but prediction and correct are differentiable.
    """

    loss: Tensor  # reduced as asked for, z_loss included
    lse: Tensor  # log-sum-exp of each row's logits, after scale, softcap and mask
    prediction: Tensor  # int64, the class of the largest logit
    correct: (
        Tensor | None
    )  # bool, prediction == target (False where ignored); None for targets other than class indices
    target_log_probability: Tensor | None  # None likewise
    entropy: Tensor  # of softmax(logits), in nats
    z_loss: Tensor  # the part of the loss that z_loss adds


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


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"cross_entropy(): argument '{name}' must be Tensor, not {type(value).__name__}")
    return value


def _number(name: str, value: Any, low: float, strict: bool = False) -> float:
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
    if input.dtype not in _INPUT_DTYPES:
        raise NotImplementedError(f"cross_entropy: input must be a floating-point tensor, got {input.dtype}")


def class_indices(name: str, target: Tensor, input: Tensor) -> Tensor:
    """The class indices of each row, checked; a 1-element target of a single example becomes a scalar."""
    want = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size([])
    if target.shape != want:
        if input.dim() == 1 and target.shape == (1,):
            target = target.reshape(())
        else:
            _refuse_shape(name, target, input, want)
    if target.dtype not in _INDEX_DTYPES:
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


def _mixup(target: tuple[Any, ...], input: Tensor) -> tuple[Tensor, Tensor]:
    """(target_a, target_b, lam) as indices and probabilities, two a row."""
    first, second = (
        class_indices(f"target_{n}", _tensor(f"target_{n}", t), input) for n, t in zip("ab", target, strict=False)
    )
    check_data("cross_entropy", target_tensors(target))
    dim, lam = class_dim(input), target[2]
    if not isinstance(lam, Tensor):
        lam = torch.ones((), dtype=acc_dtype(input.dtype), device=input.device) * _number("lam", lam, 0.0)
    if not lam.is_floating_point():
        raise RuntimeError(f"cross_entropy: expected lam of a floating-point dtype, got {lam.dtype}")
    if lam.dim() == 1 and first.dim() > 1:
        lam = lam.reshape(-1, *(1,) * (first.dim() - 1))
    try:
        lam = lam.expand(first.shape)
    except RuntimeError:
        raise RuntimeError(
            f"cross_entropy: expected lam to be a number, of shape {list(first.shape[:1])} or of target_a's "
            f"{list(first.shape)}, got shape {list(lam.shape)}"
        ) from None
    if first.dtype != second.dtype:
        first, second = first.long(), second.long()
    return torch.stack((first, second), dim), torch.stack((lam, 1 - lam), dim)


def _sparse(target: tuple[Any, ...], input: Tensor) -> tuple[Tensor, Tensor]:
    indices, probabilities = _tensor("indices", target[0]), _tensor("probabilities", target[1])
    if indices.dtype not in _INDEX_DTYPES:
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


def _target(target: object, input: Tensor, ignore_index: int) -> tuple[str, Tensor | None, Tensor | None]:
    """What kind of target it is, its indices and its probabilities."""
    if isinstance(target, (tuple, list)):
        if len(target) not in (2, 3):
            raise TypeError(f"cross_entropy: expected target to have 2 or 3 entries, got {len(target)}")
        made = _mixup(tuple(target), input) if len(target) == 3 else _sparse(tuple(target), input)
        return ("mixup" if len(target) == 3 else "sparse"), *made
    target = _tensor("target", target)
    if target.shape != input.shape:
        return "index", class_indices("target", target, input), None
    if not target.is_floating_point():
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    return "dense", None, target


def _check_weight(weight: Tensor, input: Tensor, kind: str, autocast: bool) -> None:
    _tensor("weight", weight)
    classes = input.size(class_dim(input))
    if weight.shape != (classes,):
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


def _check_mask(mask: Tensor, input: Tensor) -> None:
    _tensor("class_mask", mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"cross_entropy: expected class_mask of dtype torch.bool, got {mask.dtype}")
    classes = input.size(class_dim(input))
    # one of them alone: a symbolic number of rows that is compared with the classes becomes a guard
    if mask.shape != ((classes,) if mask.dim() == 1 else input.shape):
        raise RuntimeError(
            f"cross_entropy: expected class_mask of shape [{classes}] or {list(input.shape)}, got {list(mask.shape)}"
        )


def prepare(
    input: Tensor,
    target: object,
    weight: Tensor | None,
    class_mask: Tensor | None,
    token_weight: Tensor | None,
    given: Numbers,
    loss_dtype: torch.dtype | None,
) -> Call:
    """Checks every argument but the reduction's, and settles kind and dtypes."""
    check_logits(_tensor("input", input))
    beside = [("input", input), *target_tensors(target), ("weight", weight), ("class_mask", class_mask)]
    check_devices("cross_entropy", [*beside, ("token_weight", token_weight)])
    # The op of the rows checks the data of the others.
    check_data("cross_entropy", [("token_weight", token_weight)] if token_weight is not None else [])
    given = given._replace(ignore_index=check_ignore_index(given.ignore_index))
    if given.label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {given.label_smoothing}")
    smoothing = _as_float(given.label_smoothing) if given.label_smoothing > 0 else 0.0  # NaN and less: none, as PyTorch
    autocast = autocast_enabled(input)
    kind, indices, probabilities = _target(target, input, given.ignore_index)
    if weight is not None:
        _check_weight(weight, input, kind, autocast)
    if class_mask is not None:
        _check_mask(class_mask, input)
    if token_weight is not None:
        _check_rows("token_weight", _tensor("token_weight", token_weight), input)
    z_loss, scale = _number("z_loss", given.z_loss, -math.inf), _number("logit_scale", given.logit_scale, -math.inf)
    softcap = 0.0 if given.softcap is None else _number("softcap", given.softcap, 0.0, strict=True)
    dtype = input.dtype
    for other in (probabilities if kind in ("dense", "sparse") else None, weight):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    if dtype == torch.float64 and input.dtype != dtype:
        check_data("cross_entropy", [("input", input)])
        input = input.to(dtype)
    if autocast and dtype.itemsize == 2:
        dtype = torch.float32
    if loss_dtype is not None and loss_dtype not in _INPUT_DTYPES:
        raise TypeError(f"cross_entropy: expected loss_dtype to be one of {_INPUT_DTYPES}, got {loss_dtype}")
    args = RowArgs(input, indices, probabilities, weight, class_mask)
    options = RowOptions(given.ignore_index, smoothing, scale, softcap, False)
    return Call(args, options, kind, z_loss, token_weight, loss_dtype or dtype)


def _counted(call: Call) -> Tensor | None:
    """The rows that count, or None if all of them do."""
    if call.kind == "dense":
        return None
    assert call.args.indices is not None
    valid = counts(call.args.indices, call.options.ignore_index)
    return valid if call.kind == "index" else valid.any(class_dim(call.args.input))


def fixed_order_sum(rows: Tensor) -> Tensor:
    """The sum in an order that does not depend on the number of threads: blocks, each too small to be split."""
    # on a GPU one order by the size; a number of rows that is traced makes no number of blocks
    if rows.is_cuda or torch.compiler.is_compiling() or is_tracing() or type(rows.numel()) is not int:
        return rows.sum()
    blocks = rows.reshape(-1)
    while blocks.numel() > _BLOCK:
        whole = blocks.numel() // _BLOCK * _BLOCK
        blocks = torch.cat((blocks[:whole].view(-1, _BLOCK).sum(1), blocks[whole:].sum().reshape(1)))
    return blocks.sum()


def _denominator(call: Call, target_weight: Tensor) -> Tensor:
    """What the mean divides by."""
    rows = target_weight
    if call.kind == "sparse":
        counted = _counted(call)
        assert counted is not None
        rows = counted.double()
    elif call.kind == "mixup":  # lam is differentiable, target_weight is not
        indices, probabilities, dim = call.args.indices, call.args.probabilities, class_dim(call.args.input)
        assert indices is not None and probabilities is not None
        valid = counts(indices, call.options.ignore_index)
        shares = probabilities.double()
        if call.args.weight is not None:
            shares = shares * call.args.weight.double()[torch.where(valid, indices, 0).long()]
        rows = torch.where(valid, shares, 0.0).sum(dim)
    if call.token_weight is not None:
        rows = rows * call.token_weight.double()
    return fixed_order_sum(rows)


def row_scale(call: Call, reduction: str, normalizer: object, empty: str) -> Tensor:
    """What each row's loss is multiplied by before the sum, where nothing of it is differentiable: float64."""
    check_reduction(reduction, normalizer, empty)
    a, dim = call.args, class_dim(call.args.input)
    if call.kind == "index":
        assert a.indices is not None
        valid = counts(a.indices, call.options.ignore_index)
        weights = valid.double()
        if a.weight is not None:
            classes = torch.where(valid, a.indices, 0).long().clamp(0, max(a.weight.numel() - 1, 0))
            weights = torch.where(valid, a.weight.double()[classes], 0.0)
    else:
        weights = torch.ones(a.input.select(dim, 0).shape, dtype=torch.float64, device=a.input.device)
    scale = torch.ones_like(weights) if call.token_weight is None else call.token_weight.double()
    if reduction == "sum":
        return scale
    denominator = _denominator(call, weights) if normalizer is None else _normalizer(normalizer, call)
    return _mean(scale, denominator, empty) if isinstance(denominator, Tensor) else scale / denominator


def _mean(total: Tensor, denominator: Tensor, empty: str) -> Tensor:
    if empty == "nan":
        return total / denominator
    nothing = denominator == 0
    if empty == "raise":
        if bool(nothing):
            raise ValueError("cross_entropy: nothing counts in the mean: the batch is empty, or all of it is ignored")
        return total / denominator
    return torch.where(nothing, 0.0, total / torch.where(nothing, 1.0, denominator))


def _normalizer(value: object, call: Call) -> Tensor | float:
    if not isinstance(value, Tensor):
        return _number("normalizer", value, -math.inf)
    if value.numel() != 1:
        raise RuntimeError(f"cross_entropy: expected normalizer to have one element, got shape {list(value.shape)}")
    if value.device.type != "cpu":  # a number of the CPU goes with any device, as in PyTorch
        check_devices("cross_entropy", [("input", call.args.input), ("normalizer", value)])
    check_data("cross_entropy", [("normalizer", value)])
    return value.reshape(()).double()


def check_reduction(reduction: str, normalizer: object, empty: str) -> None:
    """Raises for a reduction that is none."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if empty not in _EMPTY:
        raise ValueError(f"cross_entropy: empty must be one of {_EMPTY}, got {empty!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"cross_entropy: normalizer is for reduction='mean', got reduction={reduction!r}")


def reduced_loss(
    call: Call, reduction: str, normalizer: object, empty: str, return_outputs: bool, run: RunRows
) -> Tensor | CrossEntropyOutput:
    """Runs the rows and reduces them."""
    check_reduction(reduction, normalizer, empty)
    options = call.options._replace(statistics=return_outputs)
    denominator = None if normalizer is None else _normalizer(normalizer, call)
    nll, lse, _, target_weight, entropy, prediction, log_probability = run(call.args, options)
    if normalizer is None and reduction == "mean":
        denominator = _denominator(call, target_weight)

    def reduced(rows: Tensor) -> Tensor:
        if call.token_weight is not None:
            rows = rows * call.token_weight.double()
        if reduction == "none":
            return rows
        total = fixed_order_sum(rows)
        if denominator is None:
            return total
        return _mean(total, denominator, empty) if isinstance(denominator, Tensor) else total / denominator

    z_rows = None
    if call.z_loss != 0:
        counted = _counted(call) if return_outputs else None  # without statistics lse is 0 in rows that do not count
        z_rows = call.z_loss * (lse if counted is None else torch.where(counted, lse, 0.0)).square()
    loss = reduced(nll if z_rows is None else nll + z_rows).to(call.loss_dtype)
    if not return_outputs:
        return loss
    z_part = reduced(z_rows if z_rows is not None else torch.zeros_like(nll)).to(call.loss_dtype)
    dtype = acc_dtype(call.args.input.dtype)
    index = call.args.indices if call.kind == "index" else None
    return CrossEntropyOutput(
        loss,
        lse.to(dtype),
        prediction,
        None if index is None else prediction == index,
        None if index is None else log_probability.to(dtype),
        entropy.to(dtype),
        z_part,
    )

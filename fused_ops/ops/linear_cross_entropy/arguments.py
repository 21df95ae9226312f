"""The arguments of linear cross-entropy: checked, and with the leading dimensions as one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.checks import as_int64, as_integer
from fused_ops.core.function import autocast_enabled, is_plain
from fused_ops.core.torch_private import forward_ad, is_tracing, transforms_active
from fused_ops.distributed import collectives
from fused_ops.ops.cross_entropy.arguments import INDEX_DTYPES, LossOptions, ReductionName
from fused_ops.ops.cross_entropy.reference import counts
from fused_ops.ops.linear_cross_entropy.reference import Head

NOT_PLAIN = (
    "linear_cross_entropy: main_grad is for a plain backward in eager mode, without create_graph, is_grads_batched, "
    "torch.func, forward-mode AD, tracing, torch.export and torch.compile(fullgraph=True)"
)


class LinearCallOptions(LossOptions, total=False):
    """What linear_cross_entropy takes by keyword, for the overloads of type checkers; ``return_outputs`` is apart."""

    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: ReductionName
    ignore_index: int | None
    label_smoothing: float
    options: Any
    shift: bool
    lora: tuple[Tensor, Tensor, float] | None
    chunk_rows: int | None
    max_memory_bytes: int | None
    sequence_parallel: bool
    compact: bool
    main_grad: Tensor | None


class LowRank(NamedTuple):
    """In the place of lora's (A, B, scale): what has been made of the input already, for the conversion of models."""

    input: Tensor  # (..., rank)
    weight: Tensor  # (classes, rank)


class Shape(NamedTuple):
    lead: tuple[int, ...]  # of input without in_features
    classes: int
    outputs: tuple[int, ...]  # of linear_weight between classes and in_features

    def rows(self, flat: bool) -> tuple[int, ...]:
        """The shape of one value per row: as the caller sees it, or (rows,) or (rows, positions)."""
        if not flat:
            return (*self.lead, *self.outputs)
        positions = math.prod(self.outputs)
        return (math.prod(self.lead),) if positions == 1 else (math.prod(self.lead), positions)

    def with_classes(self, k: int, flat: bool) -> tuple[int, ...]:
        """The same with k values in the place of the classes."""
        rows = self.rows(flat)
        at = 1 if flat else len(self.lead)
        return (*rows[:at], k, *rows[at:])


def shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Shape:
    for name, value in (("input", input), ("linear_weight", linear_weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"linear_cross_entropy(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality at least 1, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.size(-1) != linear_weight.size(-1):
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.size(-1)} and {linear_weight.size(-1)}, respectively"
        )
    shape = Shape(tuple(input.shape[:-1]), linear_weight.size(0), tuple(linear_weight.shape[1:-1]))
    if linear_bias is not None and tuple(linear_bias.shape) != (shape.classes, *shape.outputs):
        raise RuntimeError(
            f"expected linear_bias shape {(shape.classes, *shape.outputs)}, got {tuple(linear_bias.shape)}"
        )
    if shape.outputs and not shape.lead:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.size(-1)}), got unbatched input with shape {tuple(input.shape)}"
        )
    for name, matrix in {"linear_weight": linear_weight, "linear_bias": linear_bias}.items():
        if matrix is not None and matrix.dtype != input.dtype and not autocast_enabled(input):
            raise RuntimeError(f"linear_cross_entropy: expected {name} of dtype {input.dtype}, got {matrix.dtype}")
    return shape


def with_all_rows(shape: Shape, input: Tensor, target: Any) -> Shape:
    """The shape of a call whose input has some of the first dimension's entries, and whose target has all of them."""
    first = target[0] if isinstance(target, (tuple, list)) and target else target
    if input.dim() < 2 or not isinstance(first, Tensor) or first.dim() < 1:
        raise ValueError(
            "linear_cross_entropy: sequence_parallel=True takes input (rows of this rank, ..., in_features) and a "
            f"target of the rows of all ranks, got input of shape {list(input.shape)}"
        )
    return shape._replace(lead=(first.size(0), *shape.lead[1:]))


def low_rank(lora: Any, shape: Shape, in_features: int) -> tuple[Tensor, Tensor, float]:
    """lora's (A, B, scale), checked."""
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError("linear_cross_entropy: expected lora to be (A, B, scale)")
    a, b, scale = lora
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise TypeError("linear_cross_entropy: expected lora's A and B to be tensors")
    outputs = shape.classes * math.prod(shape.outputs)
    if a.dim() != 2 or a.size(1) != in_features or b.shape != (outputs, a.size(0)):
        raise RuntimeError(
            f"linear_cross_entropy: expected lora's A of shape [rank, {in_features}] and B of [{outputs}, rank], "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    return a, b, scale


def head_of(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, lora: Any, shape: Shape, rows_group: Any = None
) -> Head:
    """The matrices, in autocast's dtype where it is on.

    Args:
        input: (..., in_features).
        linear_weight: Of the call.
        linear_bias: Likewise.
        lora: Likewise.
        shape: Of these.
        rows_group: The ranks, if each has some rows of ``input``: lora's A, which all have, gets their gradients' sum.
    """
    in_features = input.size(-1)
    rows = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), in_features)
    tensors = [rows, linear_weight.flatten(0, -2)]
    tensors += [] if linear_bias is None else [linear_bias.reshape(-1)]
    if isinstance(lora, LowRank):
        low = lora.input.reshape(rows.size(0), -1)
        return Head(rows, tensors[1], tensors[2] if linear_bias is not None else None, low, lora.weight)
    scale = 1.0
    if lora is not None:
        a, b, scale = low_rank(lora, shape, in_features)
        a = a if rows_group is None else collectives.copy_to_shares(a, rows_group)
        tensors += [a, b]
    device = input.device.type
    if autocast_enabled(input) and input.dtype != torch.float64:
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    bias = tensors.pop(2) if linear_bias is not None else None
    if lora is None:
        return Head(tensors[0], tensors[1], bias, None, None)
    return Head(tensors[0], tensors[1], bias, (tensors[0] @ tensors[2].t()) * scale, tensors[3])


def flat(name: str, value: Any, shape: Shape, k: int | None) -> Any:
    """A tensor per row (k None) or with k values in the place of the classes, with the leading dimensions as one."""
    if not isinstance(value, Tensor):
        return value
    wanted = shape.rows(False) if k is None else shape.with_classes(k, False)
    if tuple(value.shape) == wanted:
        return value.reshape(shape.rows(True) if k is None else shape.with_classes(k, True))
    if not shape.lead and k is None and value.shape == (1,):
        return value
    entries = value.size(0) if value.dim() else 0
    if len(shape.lead) == 1 and entries != shape.lead[0]:
        raise ValueError(f"Expected input batch_size ({shape.lead[0]}) to match target batch_size ({entries}).")
    raise RuntimeError(f"linear_cross_entropy: expected {name} of shape {list(wanted)}, got {list(value.shape)}")


def flat_target(target: Any, shape: Shape, ignore_index: int | None, some_classes: bool) -> Any:
    if isinstance(target, (tuple, list)):
        if len(target) == 3:
            lam = target[2]
            per_row = isinstance(lam, Tensor) and tuple(lam.shape) == shape.rows(False)
            entries = [flat(f"target_{n}", t, shape, None) for n, t in zip("ab", target, strict=False)]
            return *entries, flat("lam", lam, shape, None) if per_row else lam
        at = len(shape.lead)
        k = target[0].size(at) if target and isinstance(target[0], Tensor) and target[0].dim() > at else 1
        return tuple(flat(n, t, shape, k) for n, t in zip(("indices", "probabilities"), target, strict=False))
    if not isinstance(target, Tensor):
        raise TypeError(f"linear_cross_entropy(): argument 'target' must be Tensor, not {type(target).__name__}")
    # of some classes there may be as many as of what a class index of one row may be in
    index = some_classes and not target.is_floating_point()
    if index or tuple(target.shape) != shape.with_classes(shape.classes, False):
        return flat("target", target, shape, None)
    if ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    return flat("target", target, shape, shape.classes)


def checked_ignore_index(value: object) -> int:
    """Its default is -100."""
    return -100 if value is None else as_int64("linear_cross_entropy", "ignore_index", value)


def shifted(input: Tensor, target: Any, ignore_index: int | None) -> tuple[Tensor, int]:
    """Each position's target is the next one's; the last has none."""
    if not isinstance(target, Tensor) or target.dtype not in INDEX_DTYPES or target.dim() < 1 or input.dim() < 2:
        raise RuntimeError(
            "linear_cross_entropy: shift=True takes input (..., positions, in_features) and class indices of shape "
            "(..., positions)"
        )
    ignored = checked_ignore_index(ignore_index)
    wide = target if target.dtype == torch.int64 or _holds(target.dtype, ignored) else target.long()
    return torch.cat((wide[..., 1:], torch.full_like(wide[..., :1], ignored)), -1), ignored


def _holds(dtype: torch.dtype, value: int) -> bool:
    limits = torch.iinfo(dtype)
    return limits.min <= value <= limits.max


def check_main_grad(main_grad: object, linear_weight: Tensor) -> None:
    """Raises unless a weight's gradient can be added to it: in float32 at least, of the weight's shape and device."""
    if not isinstance(main_grad, Tensor):
        raise TypeError(f"linear_cross_entropy(): argument 'main_grad' must be Tensor, not {type(main_grad).__name__}")
    wanted = torch.float64 if linear_weight.dtype == torch.float64 else torch.float32
    if main_grad.dtype != wanted or main_grad.shape != linear_weight.shape or main_grad.device != linear_weight.device:
        raise RuntimeError(
            f"linear_cross_entropy: expected main_grad of shape {list(linear_weight.shape)}, dtype {wanted} and on "
            f"{linear_weight.device}, got {list(main_grad.shape)}, {main_grad.dtype} and {main_grad.device}"
        )
    if main_grad.requires_grad:
        raise RuntimeError("linear_cross_entropy: expected main_grad not to require grad, as the backward writes it")


def main_grad_matrix(main_grad: Tensor, linear_weight: Tensor) -> Tensor | None:
    """What the weight's gradient is added to, checked, as a matrix; None where there will be no gradient."""
    check_main_grad(main_grad, linear_weight)
    if not main_grad.is_contiguous():
        raise RuntimeError(
            f"linear_cross_entropy: expected main_grad to be contiguous, got strides {list(main_grad.stride())} for "
            f"shape {list(main_grad.shape)}"
        )
    if torch.compiler.is_compiling() or transforms_active() or forward_ad._current_level >= 0 or is_tracing():
        raise RuntimeError(NOT_PLAIN)
    if not linear_weight.requires_grad or not torch.is_grad_enabled():
        return None
    return main_grad.flatten(0, -2)


class PerRow(NamedTuple):
    """What of a call has a value, or a row of a matrix, for each row."""

    head: Head
    target: Any
    token_weight: Any
    class_mask: Any  # that of all rows has one dimension

    def without_ignored(self, ignore_index: int) -> PerRow:
        """The rows that count. Waits for a GPU, which has to say how many they are."""
        target, head, mask = self.target, self.head, self.class_mask
        if not isinstance(target, Tensor) or target.dtype not in INDEX_DTYPES:
            raise ValueError(
                "linear_cross_entropy: compact=True is for class indices, expected target to be a tensor of them"
            )
        if not is_plain(target):
            return self
        counted = counts(target, ignore_index)
        kept = (counted if counted.dim() == 1 else counted.any(1)).nonzero().squeeze(1)
        low = None if head.low_input is None else head.low_input[kept]
        weights = self.token_weight[kept] if isinstance(self.token_weight, Tensor) else self.token_weight
        mask = mask[kept] if isinstance(mask, Tensor) and mask.dim() > 1 else mask
        return PerRow(head._replace(input=head.input[kept], low_input=low), target[kept], weights, mask)


def at_least_one(name: str, value: object) -> int | None:
    """An integer that may be left out, checked."""
    if value is None:
        return None
    number = as_integer("linear_cross_entropy", name, value)
    if number < 1:
        raise ValueError(f"linear_cross_entropy: {name} must be an integer above 0, got {value!r}")
    return number

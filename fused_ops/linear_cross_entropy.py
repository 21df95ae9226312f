"""Linear cross-entropy: the public function and its Module."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_ops._cross_entropy_options import (
    _INDEX_DTYPES,
    _INPUT_DTYPES,
    Call,
    CrossEntropyOutput,
    Numbers,
    check_reduction,
    prepare,
    reduced_loss,
    row_scale,
)
from fused_ops._cross_entropy_plain import REDUCTIONS, index_loss
from fused_ops._cross_entropy_rows import cross_entropy_rows
from fused_ops._function import _transforms_active, autocast_enabled
from fused_ops._linear_cross_entropy_chunks import Plan
from fused_ops._linear_cross_entropy_functions import linear_rows, linear_sum
from fused_ops._linear_cross_entropy_gpu import gpu_rows
from fused_ops._linear_cross_entropy_plan import SMALL_BYTES, Sizes, choose
from fused_ops._linear_cross_entropy_tiles import suits
from fused_ops.reference import linear_cross_entropy as reference
from fused_ops.reference._cross_entropy_rows import RowArgs, RowOptions
from fused_ops.reference.linear_cross_entropy import Head

_NUMBERS = (float, int)


class _Shape(NamedTuple):
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


def _shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> _Shape:
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
    shape = _Shape(tuple(input.shape[:-1]), linear_weight.size(0), tuple(linear_weight.shape[1:-1]))
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


def _low_rank(lora: Any, shape: _Shape, in_features: int) -> tuple[Tensor, Tensor, float]:
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


def _head(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, lora: Any, shape: _Shape) -> Head:
    """The matrices, in autocast's dtype where it is on."""
    in_features = input.size(-1)
    tensors = [input.reshape(math.prod(shape.lead), in_features), linear_weight.flatten(0, -2)]
    tensors += [] if linear_bias is None else [linear_bias.reshape(-1)]
    scale = 1.0
    if lora is not None:
        a, b, scale = _low_rank(lora, shape, in_features)
        tensors += [a, b]
    device = input.device.type
    if autocast_enabled(input) and input.dtype != torch.float64:
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    bias = tensors.pop(2) if linear_bias is not None else None
    if lora is None:
        return Head(tensors[0], tensors[1], bias, None, None)
    return Head(tensors[0], tensors[1], bias, (tensors[0] @ tensors[2].t()) * scale, tensors[3])


def _flat(name: str, value: Any, shape: _Shape, k: int | None) -> Any:
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


def _flat_target(target: Any, shape: _Shape, ignore_index: int | None) -> Any:
    if isinstance(target, (tuple, list)):
        if len(target) == 3:
            lam = target[2]
            per_row = isinstance(lam, Tensor) and tuple(lam.shape) == shape.rows(False)
            entries = [_flat(f"target_{n}", t, shape, None) for n, t in zip("ab", target, strict=False)]
            return *entries, _flat("lam", lam, shape, None) if per_row else lam
        at = len(shape.lead)
        k = target[0].size(at) if target and isinstance(target[0], Tensor) and target[0].dim() > at else 1
        return tuple(_flat(n, t, shape, k) for n, t in zip(("indices", "probabilities"), target, strict=False))
    if not isinstance(target, Tensor):
        raise TypeError(f"linear_cross_entropy(): argument 'target' must be Tensor, not {type(target).__name__}")
    if tuple(target.shape) != shape.with_classes(shape.classes, False):
        return _flat("target", target, shape, None)
    if ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    return _flat("target", target, shape, shape.classes)


def _shifted(input: Tensor, target: Any, ignore_index: int | None) -> tuple[Tensor, int]:
    """Each position's target is the next one's; the last has none."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() < 1 or input.dim() < 2:
        raise RuntimeError(
            "linear_cross_entropy: shift=True takes input (..., positions, in_features) and class indices of shape "
            "(..., positions)"
        )
    ignored = -100 if ignore_index is None else ignore_index
    wide = target if target.dtype != torch.uint8 or 0 <= ignored < 256 else target.short()
    return torch.cat((wide[..., 1:], torch.full_like(wide[..., :1], ignored)), -1), ignored


def _check_memory(chunk_rows: object, max_memory_bytes: object) -> None:
    for name, value in (("chunk_rows", chunk_rows), ("max_memory_bytes", max_memory_bytes)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"linear_cross_entropy: {name} must be an integer above 0, got {value!r}")


class _Memory(NamedTuple):
    """What the caller allows."""

    chunk_rows: int | None
    max_memory_bytes: int | None

    def plan(self, call: Call, head: Head, classes: int, needs: int) -> Plan:
        x, outputs = head.input, head.weight.size(0)
        sizes = Sizes(x.size(0), x.size(1), classes, outputs // max(classes, 1), x.element_size())
        if self == (None, None) and x.is_cuda:
            return Plan(classes, gpu_rows(x, sizes.row_bytes), needs)
        in_tiles = outputs == classes and suits(head, call.args, call.options)
        return choose(sizes, needs, in_tiles, *self)

    def is_small(self, head: Head) -> bool:
        """Whether all the logits may exist at once."""
        x = head.input
        return self == (None, None) and x.size(0) * head.weight.size(0) * x.element_size() <= SMALL_BYTES


def _whole_rows(head: Head, classes: int, a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
    """The rows of logits that exist all at once."""
    return cross_entropy_rows(False, a._replace(input=reference.logits(head, classes)), o)


def _is_sum(call: Call, head: Head, reduction: str, normalizer: object, return_outputs: bool) -> int:
    """Which of the head's gradients the forward may find at once, as bits; 0 if the rows must be kept apart."""
    if reduction == "none" or return_outputs or not torch.is_grad_enabled() or _transforms_active():
        return 0
    if call.args.input.numel() == 0:
        return 0
    others = (call.args.probabilities, call.args.weight, call.token_weight, normalizer)
    if forward_ad._current_level >= 0 or any(isinstance(t, Tensor) and t.requires_grad for t in others):
        return 0
    return sum(1 << i for i, t in enumerate(head) if t is not None and t.requires_grad)


def _is_small_matrix(input: Any, linear_weight: Any, linear_bias: Any, target: Any) -> bool:
    """Whether this is a call, right in every respect, of (rows, classes) logits that are not worth cutting."""
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor) and isinstance(target, Tensor)):
        return False
    if input.dim() != 2 or linear_weight.dim() != 2 or target.dim() != 1 or target.dtype not in _INDEX_DTYPES:
        return False
    (rows, features), classes, dtype = input.shape, linear_weight.size(0), input.dtype
    if rows * classes * dtype.itemsize > SMALL_BYTES or dtype not in _INPUT_DTYPES or target.size(0) != rows:
        return False
    if linear_weight.dtype != dtype or linear_weight.size(1) != features or autocast_enabled(input):
        return False
    return linear_bias is None or (
        isinstance(linear_bias, Tensor) and linear_bias.shape == (classes,) and linear_bias.dtype == dtype
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Any,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_mask: Tensor | None = None,
    empty: str = "nan",
    loss_dtype: torch.dtype | None = None,
    shift: bool = False,
    lora: tuple[Tensor, Tensor, float] | None = None,
    chunk_rows: int | None = None,
    max_memory_bytes: int | None = None,
    return_outputs: bool = False,
) -> Any:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without the logits.

    A drop-in for ``torch.nn.functional.linear_cross_entropy``. Of the logits one chunk of rows exists at a time.

    Args:
        input: (..., in_features); float32, float64, bfloat16 or float16.
        linear_weight: (classes, in_features), or (classes, d1, ..., in_features) for a loss at several positions; the
            dtype of ``input``.
        target: As for ``cross_entropy`` of logits (..., classes, d1, ...): class indices of shape (..., d1, ...), class
            probabilities, (indices, probabilities), or (target_a, target_b, lam).
        linear_bias: (classes,) or (classes, d1, ...).
        weight: (classes,), the factor of each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class index whose rows count for nothing; they are left out of the matrix products (on the CPU).
            Default: -100.
        label_smoothing: In [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, accepted and not needed.
        z_loss: As in ``cross_entropy``, like the next seven.
        logit_scale: Multiplies the logits.
        softcap: Bounds them.
        token_weight: A factor of each row, of the shape of the loss without reduction.
        normalizer: Replaces the mean's denominator.
        class_mask: bool, (classes,) or the shape of the logits.
        empty: ``"nan"``, ``"zero"`` or ``"raise"``.
        loss_dtype: Of the loss.
        shift: Each position's target is that of the next one, as in a language model: input (..., positions,
            in_features), target (..., positions); the last position counts for nothing. With ``"none"`` and in the
            outputs it is there with a loss of 0.
        lora: (A, B, scale) of shapes (rank, in_features) and (classes, rank): adds ``scale * input @ A.T @ B.T`` to the
            logits.
        chunk_rows: Rows whose logits exist at once. Default: chosen with the memory, see ``max_memory_bytes``.
        max_memory_bytes: What the call may take beyond inputs and gradients. Default: 3 % of the logits, or 32 to 36 MB
            where that makes it faster; all the logits if they are at most 1 MiB. With less memory than keeps every row,
            some logits are computed twice.
        return_outputs: Returns a ``CrossEntropyOutput``.

    Returns:
        The loss, as ``cross_entropy`` of the logits.

    Raises:
        ValueError: as ``cross_entropy``; ``chunk_rows`` or ``max_memory_bytes`` below 1.
        RuntimeError: as ``cross_entropy``; shapes or dtypes of the matrices that do not fit; ``ignore_index`` given
            with class probabilities; ``shift`` with another target than class indices.
        IndexError: a class index outside [0, classes).
        NotImplementedError: ``input`` is not floating-point.
        TypeError: something that must be a tensor or a number is none.

    Note:
        With a scalar loss the forward computes the gradients too, while it has the logits, so that training takes the
        three matrix products that it must; weights' gradients are rounded once, or added up in float32 at least.
        Without reduction, and with ``return_outputs``, the backward computes the logits again, in chunks as well. The
        second derivative is computed in chunks; forward-mode AD, torch.func and derivatives beyond take the logits at
        once.

    Source: chunked gradients in the forward as in Liger Kernel (arXiv:2410.10989); the memory question as in Cut
    Cross-Entropy (arXiv:2411.09009). The derivation is in docs/linear_cross_entropy.md.
    """
    if (
        weight is None
        and lora is None
        and not shift
        and label_smoothing == 0
        and not return_outputs
        and token_weight is None
        and class_mask is None
        and softcap is None
        and normalizer is None
        and loss_dtype is None
        and chunk_rows is None
        and max_memory_bytes is None
        and type(z_loss) in _NUMBERS
        and not z_loss
        and type(logit_scale) in _NUMBERS
        and logit_scale == 1
        and empty == "nan"
        and reduction in REDUCTIONS
        and (ignore_index is None or isinstance(ignore_index, int))
        and _is_small_matrix(input, linear_weight, linear_bias, target)
    ):
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        return index_loss(logits, target, -100 if ignore_index is None else ignore_index, reduction, False)
    if shift:
        target, ignore_index = _shifted(input, target, ignore_index)
    check_reduction(reduction, normalizer, empty)
    shape = _shapes(input, linear_weight, linear_bias)
    head = _head(input, linear_weight, linear_bias, lora, shape)
    flat = _flat_target(target, shape, ignore_index)
    _check_memory(chunk_rows, max_memory_bytes)
    memory = _Memory(chunk_rows, max_memory_bytes)
    stand_in = head.input.new_empty(()).expand(shape.with_classes(shape.classes, True))  # the logits' shape and dtype
    if class_mask is not None and isinstance(class_mask, Tensor) and class_mask.dim() > 1:
        class_mask = _flat("class_mask", class_mask, shape, shape.classes)
    if token_weight is not None:
        token_weight = _flat("token_weight", token_weight, shape, None)
    ignored = -100 if ignore_index is None else ignore_index
    given = Numbers(ignored, label_smoothing, z_loss, logit_scale, softcap)
    call = prepare(stand_in, flat, weight, class_mask, token_weight, given, loss_dtype)
    if call.args.input.dtype != head.input.dtype:  # float64 class probabilities or weights
        head = Head(*(None if t is None else t.to(call.args.input.dtype) for t in head))  # type: ignore[arg-type]
    result = _run(call, head, shape.classes, memory, reduction, normalizer, empty, return_outputs)
    if reduction != "none" and not return_outputs:
        return result
    rows = shape.rows(False)
    if not return_outputs:
        return result.reshape(rows)
    return CrossEntropyOutput(*(t if t is None or t.dim() == 0 else t.reshape(rows) for t in result))


def _run(
    call: Call,
    head: Head,
    classes: int,
    memory: _Memory,
    reduction: str,
    normalizer: object,
    empty: str,
    return_outputs: bool,
) -> Any:
    """The loss of a prepared call, in the way that suits it."""
    if memory.is_small(head):
        if _is_plain(call, normalizer, empty, return_outputs):
            indices = call.args.indices
            assert indices is not None
            return index_loss(reference.logits(head, classes), indices, call.options.ignore_index, reduction, False)
        run = partial(_whole_rows, head, classes)
        return reduced_loss(call, reduction, normalizer, empty, return_outputs, run)
    needs = _is_sum(call, head, reduction, normalizer, return_outputs)
    if needs:
        scale = row_scale(call, reduction, normalizer, empty)
        loss = linear_sum(head, call.args, scale, call.z_loss, call.options, memory.plan(call, head, classes, needs))
        return loss.to(call.loss_dtype)
    plan = memory.plan(call, head, classes, 0)
    return reduced_loss(call, reduction, normalizer, empty, return_outputs, lambda a, o: linear_rows(head, a, o, plan))


def _is_plain(call: Call, normalizer: object, empty: str, return_outputs: bool) -> bool:
    """Whether the fused op of class indices alone will do."""
    return (
        call.kind == "index"
        and call.args.weight is None
        and call.args.class_mask is None
        and call.token_weight is None
        and normalizer is None
        and empty == "nan"
        and not call.z_loss
        and not return_outputs
        and call.options[1:] == (0.0, 1.0, 0.0, False)
        and call.loss_dtype == call.args.input.dtype
    )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss``: a linear layer and its cross-entropy, with our options.

    Args:
        in_features: Size of each input.
        num_classes: Number of classes.
        out_features: Positions with a loss of their own, (d1, ...).
        bias: Whether the layer has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: (classes,), the factor of each class; a buffer.
        ignore_index: Class index whose rows do not count.
        label_smoothing: In [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, accepted and not needed.
        **more: Other keyword arguments of ``linear_cross_entropy`` that are numbers, the same for every call.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        unknown = sorted(set(more) - _MODULE_OPTIONS)
        if unknown:
            raise TypeError(f"LinearCrossEntropyLoss: expected options among {sorted(_MODULE_OPTIONS)}, got {unknown}")
        super().__init__(weight=weight, size_average=None, reduce=None, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing, self.options, self.more = ignore_index, label_smoothing, options, more
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Any, **options: Any) -> Any:
        """The loss.

        Args:
            input: (..., in_features).
            target: As for ``linear_cross_entropy``.
            **options: More of its keyword arguments for this call, such as ``token_weight`` and ``normalizer``.
        """
        bias, shape = self.linear.bias, (self.num_classes, *self.out_features)
        settled = {
            "reduction": self.reduction,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "options": self.options,
            "linear_bias": None if bias is None else bias.reshape(shape),
        }
        linear_weight = self.linear.weight.reshape(*shape, self.linear.in_features)
        return linear_cross_entropy(input, linear_weight, target, **{**settled, **self.more, **options})

    def extra_repr(self) -> str:
        """The options."""
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            **self.more,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())


_MODULE_OPTIONS = {
    "z_loss",
    "logit_scale",
    "softcap",
    "empty",
    "loss_dtype",
    "shift",
    "chunk_rows",
    "max_memory_bytes",
    "return_outputs",
}

"""Linear cross-entropy in chunks of rows: PyTorch's matrix products, and the in-between op on one reused buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_ops.core.function import has_values, is_differentiated
from fused_ops.core.library import register
from fused_ops.core.memory_format import wide, wide_dtype
from fused_ops.core.torch_private import is_batched, runs_node
from fused_ops.ops.cross_entropy import functions
from fused_ops.ops.cross_entropy.reference import counts
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads
from fused_ops.ops.linear_cross_entropy import by_classes as tiles
from fused_ops.ops.linear_cross_entropy import reference
from fused_ops.ops.linear_cross_entropy.arguments import NOT_PLAIN
from fused_ops.ops.linear_cross_entropy.reference import Head

# which of the head's gradients are wanted, one bit each, in the order of Head
INPUT, WEIGHT, BIAS, LOW_INPUT, LOW_WEIGHT = 1, 2, 4, 8, 16
WIDE_WEIGHT = 128  # with WEIGHT, and not in tiles: the gradient of a 16-bit weight stays the float32 sum that it is
ADDED_WEIGHT = 256  # with WEIGHT: its gradient is added to the caller's main_grad, no sum is made beside it

WIDENED = 1024  # classes of a 16-bit weight's gradient that are added at a time: they stay in the cache


def _fake_chunk_(logits: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return functions.fake_rows_forward(logits, rest[-1])


_chunk_op = register(
    f"linear_cross_entropy_chunk_(Tensor(a!) logits, {functions.TENSORS}, Tensor? row_scale, float z_loss, "
    f"{functions.NUMBERS}) -> ({functions.RESULTS})",
    reference.chunk_,
    _fake_chunk_,
)


def _fake_rescale_(*_: object) -> None:
    return None


# On a GPU its kernel finds out whether the scale is 1; the CPU, which can tell beforehand, needs none.
rescale_op = register(
    "linear_cross_entropy_rescale_(Tensor(a!) grad, Tensor scale) -> ()",
    reference.rescale_,
    _fake_rescale_,
    native=False,
)


class Plan(NamedTuple):
    """How the rows are cut, and which gradients are wanted."""

    classes: int
    chunk_rows: int
    needs: int
    # with tile_classes: rows whose logits are kept beside those that grad_weight has room for; -1: none, and the first
    # pass over the others goes in chunks of rows
    kept_rows: int = 0
    tile_classes: int = 0  # 0: in chunks of rows


def wide_weight_dtype(weight: Tensor) -> torch.dtype:
    """In which a weight's gradients are added up."""
    return torch.float32 if weight.dtype.itemsize == 2 else weight.dtype


class Gradients:
    """The head's gradients as chunks add to them: weights in float32 at least, or the large one to ``main_grad``."""

    def __init__(self, head: Head, plan: Plan, chunks: int, main_grad: Tensor | None = None) -> None:
        self.head, self.plan, self.several, self.main_grad = head, plan, chunks > 1, main_grad
        self.accumulated: dict[int, Tensor] = {}
        if main_grad is not None:
            self.accumulated[WEIGHT] = main_grad
            increment_version(main_grad)  # what writes to it here does so below autograd
        self.input = self._rows(head.input, INPUT)
        self.low_input = self._rows(head.low_input, LOW_INPUT)

    def _rows(self, like: Tensor | None, bit: int) -> Tensor | None:
        if like is None or not self.plan.needs & bit:
            return None
        return torch.zeros_like(like, memory_format=torch.contiguous_format)  # ignored rows stay zero

    def add(self, part: Tensor | slice, grad_z: Tensor) -> None:
        """Takes the gradient of one chunk of logits, (rows, classes * positions)."""
        for grads, weight in ((self.input, self.head.weight), (self.low_input, self.head.low_weight)):
            if grads is None or weight is None:
                continue
            if isinstance(part, slice):
                torch.mm(grad_z, weight, out=grads[part])
            else:
                grads[part] = grad_z @ weight
        for bit, x in ((WEIGHT, self.head.input), (LOW_WEIGHT, self.head.low_input)):
            if self.plan.needs & bit and x is not None:
                self._add(bit, grad_z.t(), x[part])
        if self.plan.needs & BIAS:
            sums = tiles.class_sums(grad_z, 0)
            self.accumulated[BIAS] = self.accumulated[BIAS] + sums if BIAS in self.accumulated else sums

    def _add(self, bit: int, left: Tensor, right: Tensor) -> None:
        first, narrow = bit not in self.accumulated, left.dtype.itemsize == 2
        if first:
            wide = narrow and (self.several or self._is_wide(bit))
            like = right.new_empty(0, dtype=torch.float32) if wide else right
            self.accumulated[bit] = tiles.buffer(like, left.size(0), right.size(1))
        total = self.accumulated[bit]
        if total.dtype == left.dtype:
            torch.mm(left, right, out=total) if first else total.addmm_(left, right)
            return
        # cuBLAS adds to a float32 matrix itself; ROCm's does not
        if narrow and total.is_cuda and torch.version.hip is None:
            if first:
                torch.mm(left, right, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
            return
        if first:
            total.zero_()
        product = right.new_empty(min(WIDENED, left.size(0)), right.size(1))
        for part in (slice(c, c + WIDENED) for c in range(0, left.size(0), WIDENED)):
            rows = product[: total[part].size(0)]
            torch.mm(left[part], right, out=rows)
            if narrow:
                tiles.add_op(total[part], rows)
            else:  # float64, of a float32 weight beside class probabilities of float64
                total[part].add_(rows)

    def _is_wide(self, bit: int) -> bool:
        return bit == WEIGHT and bool(self.plan.needs & WIDE_WEIGHT)

    def of(self, bit: int, like: Tensor | None) -> Tensor:
        """One gradient, or an empty tensor if it is not wanted."""
        if like is None or not self.plan.needs & bit or (bit == WEIGHT and self.main_grad is not None):
            return self.head.input.new_empty(0)
        if bit in (INPUT, LOW_INPUT):
            found = self.input if bit == INPUT else self.low_input
            assert found is not None
            return found
        dtype = wide_weight_dtype(like) if self._is_wide(bit) else like.dtype
        if bit not in self.accumulated:  # no row counted
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        return self.accumulated[bit].to(dtype)

    def all(self) -> tuple[Tensor, ...]:
        """In the order of Head."""
        return tuple(self.of(1 << i, tensor) for i, tensor in enumerate(self.head))


def wanted_main_grad(ctx: Any, *grads: Tensor | None) -> Tensor | None:
    """What a Function's backward adds the gradient of its second input to; None where it is to find none.

    Raises:
        RuntimeError: The backward has to be differentiable, or is of several gradients.
    """
    if ctx.main_grad is None:
        return None
    if is_differentiated() or any(g is not None and is_batched(g) for g in grads):
        raise RuntimeError(NOT_PLAIN)
    # torch.autograd.grad of other inputs alone says nothing of it in needs_input_grad
    wanted = ctx.needs_input_grad[1] and runs_node(ctx.next_functions[1][0])
    return ctx.main_grad if wanted else None


def add_scaled_(total: Tensor, grad: Tensor, scale: Tensor) -> None:
    """total += scale * grad in one pass, without a temporary of their size."""
    scale = scale.to(total.dtype)
    if grad.dtype == total.dtype:
        total.addcmul_(grad, scale)
        return
    for begin in range(0, total.size(0), WIDENED):  # PyTorch makes a copy of what it widens
        part = slice(begin, begin + WIDENED)
        total[part].addcmul_(grad[part], scale)


def parts_of(head: Head, a: RowArgs, o: RowOptions, plan: Plan) -> list[Tensor | slice]:
    """The rows of each chunk. Ignored rows are left out, on the CPU, where finding them costs no synchronisation."""
    rows, step = head.input.size(0), plan.chunk_rows
    if a.indices is not None and a.indices.dim() == 1 and not o.statistics and has_values(a.indices):
        counted = counts(a.indices, o.ignore_index)
        if not bool(counted.all()):
            found = counted.nonzero().squeeze(1)
            return list(found.split(step)) if found.numel() else []
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def product(head: Head, part: Tensor | slice, x: Tensor, out: Tensor) -> Tensor:
    """The logits of the rows ``x = head.input[part]``, (rows, classes * positions), written to ``out``."""
    if head.bias is None:
        torch.mm(x, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, x, head.weight.t(), out=out)
    if head.low_input is not None and head.low_weight is not None:
        out.addmm_(head.low_input[part], head.low_weight.t())
    return out


def _chunks(head: Head, plan: Plan, parts: list[Tensor | slice]) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Each chunk's rows, its logits, (rows, classes[, positions]), and the same memory as a matrix."""
    outputs = head.weight.size(0)
    buffer = None
    for part in parts:
        x = head.input[part]
        if buffer is None:
            buffer = tiles.logits_buffer(x, x.size(0), outputs)  # the first chunk is the largest
        flat = product(head, part, x, buffer[: x.size(0)])
        yield part, flat if outputs == plan.classes else flat.view(x.size(0), plan.classes, -1), flat


def cut_rows(value: Tensor | None, part: Tensor | slice) -> Tensor | None:
    return None if value is None else value[part]


def cut_args(a: RowArgs, logits: Tensor, part: Tensor | slice) -> RowArgs:
    mask = a.class_mask if a.class_mask is None or a.class_mask.dim() == 1 else a.class_mask[part]
    return RowArgs(logits, cut_rows(a.indices, part), cut_rows(a.probabilities, part), a.weight, mask)


def _row_results(head: Head, o: RowOptions, plan: Plan) -> list[Tensor]:
    """Zeros for the seven results of every row."""
    positions = head.weight.size(0) // max(plan.classes, 1)
    shape = (head.input.size(0), positions) if positions != 1 else (head.input.size(0),)
    wanted: tuple[int, ...] = shape if o.statistics else (0,)
    found = [
        head.input.new_zeros(s, dtype=wide_dtype(head.input)) for s in (shape, shape, shape, shape, wanted, wanted)
    ]
    return [*found[:5], head.input.new_zeros(wanted, dtype=torch.int64), found[5]]


def forward(
    head: Head, a: RowArgs, o: RowOptions, row_scale: Tensor | None, z_loss: float, plan: Plan
) -> tuple[Tensor, ...]:
    """The rows' seven results, then the head's five gradients of sum_r row_scale_r (nll_r + z_loss lse_r^2)."""
    if plan.tile_classes and row_scale is not None:
        return _forward_in_tiles(head, a, o, row_scale, z_loss, plan)
    parts = parts_of(head, a, o, plan)
    results, gradients = _row_results(head, o, plan), Gradients(head, plan, len(parts))
    for part, logits, flat in _chunks(head, plan, parts):
        cut = cut_args(a, logits, part)
        found = _chunk_op(logits, *cut[1:], cut_rows(row_scale, part), z_loss, *o)
        for whole, chunk in zip(results, found, strict=True):  # type: ignore[call-overload]
            if whole.numel():
                whole[part] = chunk
        if row_scale is not None:
            gradients.add(part, flat)
    return *results, *gradients.all()


def _forward_in_tiles(
    head: Head, a: RowArgs, o: RowOptions, row_scale: Tensor, z_loss: float, plan: Plan
) -> tuple[Tensor, ...]:
    wanted = bool(plan.needs & INPUT), bool(plan.needs & BIAS)
    nll, lse, counted, grad_weight, grad_input, grad_bias = tiles.forward(
        head, a, o, row_scale, z_loss, wanted, plan.chunk_rows, plan.kept_rows, plan.tile_classes
    )
    none = head.input.new_empty(0)
    mass, empty = wide(counted), wide(none)
    results = (nll, lse, mass, mass.clone(), empty, none.long(), empty.clone())
    found = (grad_input, grad_weight, grad_bias, None, None)
    return *results, *(none.clone() if t is None else t for t in found)


def backward(
    g: RowGrads,
    head: Head,
    a: RowArgs,
    lse: Tensor,
    mass: Tensor,
    entropy: Tensor,
    o: RowOptions,
    plan: Plan,
    main_grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """The head's five gradients, from logits that are computed again; the weight's is added to a ``main_grad``."""
    parts = parts_of(head, a, o, plan)
    gradients = Gradients(head, plan, len(parts), main_grad)
    for part, logits, flat in _chunks(head, plan, parts):
        cut = cut_args(a, logits, part)
        grads = (cut_rows(grad, part) for grad in g)
        saved = (lse[part], mass[part], entropy[part] if o.statistics else entropy)
        functions.rows_backward_inplace_op(*grads, *cut, *saved, *o)
        gradients.add(part, flat)
    return gradients.all()

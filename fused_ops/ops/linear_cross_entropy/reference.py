"""Linear cross-entropy in plain PyTorch: the in-between op's reference, and the formulas of every derivative.

With logits z = x W^T + b (+ x' W'^T, a low-rank term) and cross-entropy's rows of them, the gradient of the rows with
respect to z is cross-entropy's grad_z, and::

    grad_x = grad_z W      grad_W = grad_z^T x      grad_b = sum over rows of grad_z
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import acc_dtype, piece_elements, row_sums
from fused_ops.ops.cross_entropy import reference as cross_entropy
from fused_ops.ops.cross_entropy import rows_reference as rows
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads

_FEWEST_COLUMNS = 64  # in memory a row's logits lie apart, those of one class side by side


class Head(NamedTuple):
    """What makes the logits: (rows, in_features) inputs and (classes * positions, in_features) weights."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    low_input: Tensor | None  # (rows, rank)
    low_weight: Tensor | None  # (classes * positions, rank)


def logits(head: Head, classes: int) -> Tensor:
    """(rows, classes), or (rows, classes, positions) if there are several positions."""
    z = torch.nn.functional.linear(head.input, head.weight, head.bias)
    if head.low_input is not None:
        assert head.low_weight is not None
        z = z + head.low_input @ head.low_weight.t()
    return z if z.size(1) == classes else z.view(z.size(0), classes, z.size(1) // classes)


def rescale_(grad: Tensor, scale: Tensor) -> None:
    """Multiplies a gradient by the upstream one."""
    grad.mul_(scale)


def chunk_(
    logits: Tensor,
    indices: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    class_mask: Tensor | None,
    row_scale: Tensor | None,
    z_loss: float,
    *options: float,
) -> tuple[Tensor, ...]:
    """The rows of a chunk of logits; with ``row_scale`` the logits become the gradient of its weighted sum."""
    results = rows.forward(logits, indices, probabilities, weight, class_mask, *options)
    if row_scale is not None:
        grad_lse = None if z_loss == 0 else torch.where(row_scale == 0, 0.0, 2 * z_loss * results[1] * row_scale)
        a = RowArgs(logits, indices, probabilities, weight, class_mask)
        g = RowGrads(row_scale, grad_lse, None, None)
        rows.backward_to(logits, g, a, RowOptions(*options))  # type: ignore[arg-type]
    return results


def small(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of input, weight and bias that ``needs`` asks for, one bit each; else empty."""
    z = torch.nn.functional.linear(input, linear_weight, linear_bias)
    loss, lse, total = cross_entropy.forward(z, target, ignore_index, reduction)
    found = [z.new_empty(0)] * 3
    if needs:
        grad_z = cross_entropy.backward(torch.ones_like(loss), z, target, lse, total, ignore_index, reduction)
        found = [grad_z @ linear_weight, grad_z.t() @ input, grad_z.sum(0)]
    wanted = [needs & 1, needs & 2, needs & 4 and linear_bias is not None]
    return loss, *(g if want else z.new_empty(0) for g, want in zip(found, wanted, strict=True))


def buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised memory."""
    return like.new_empty(rows, columns)


def tile_sums_(
    logits: Tensor, target: Tensor, first_class: int, classes: int, max: Tensor, others: Tensor, target_logit: Tensor
) -> None:
    """Adds a tile of transposed logits, (classes of the tile, rows), to what is known of each row."""
    if target.dtype != torch.int64:
        raise RuntimeError(f"linear_cross_entropy: target must be int64, got {target.dtype}")
    bad = ((target < 0) | (target >= classes)).nonzero()
    if bad.numel():
        raise IndexError(f"Target {int(target[bad[0, 0]])} is out of bounds.")
    for part in _columns(logits):
        _tile_sums_of(logits[:, part], target[part] - first_class, max[part], others[part], target_logit[part])


def _columns(logits: Tensor) -> list[slice]:
    """Some rows' logits each, of a transposed tile: few enough for what is made of them to be small."""
    rows, step = logits.size(1), max(piece_elements(logits) // max(logits.size(0), 1), _FEWEST_COLUMNS)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _tile_sums_of(logits: Tensor, at: Tensor, max: Tensor, others: Tensor, target_logit: Tensor) -> None:
    z = logits.to(max.dtype)
    here = (at >= 0) & (at < z.size(0))
    now = torch.maximum(max, z.amax(0)) if z.size(0) else max
    shift = torch.where(now == -torch.inf, 0.0, now)
    terms, rows = (z - shift).exp_(), here.nonzero().squeeze(1)
    terms[at[rows], rows] = 0.0
    others.mul_((max - shift).exp()).add_(row_sums(terms, 0).squeeze(0))
    max.copy_(now)
    target_logit[rows] = z[at[rows], rows]


def tile_grads_(
    logits: Tensor, target: Tensor, first_class: int, classes: int, max: Tensor, factor: Tensor, target_grad: Tensor
) -> None:
    """The tile becomes its gradient: exp(logit - max) factor, and target_grad at each row's target."""
    at = target - first_class
    rows = ((at >= 0) & (at < logits.size(0))).nonzero().squeeze(1)
    for part in _columns(logits):
        logits[:, part] = (logits[:, part].to(max.dtype) - max[part]).exp_().mul_(factor[part])
    logits[at[rows], rows] = target_grad[rows].to(logits.dtype)


def add_(sum: Tensor, part: Tensor) -> None:
    """sum += part, of fewer bits."""
    sum.add_(part)


def head_gradients(grad_z: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the head's tensors from that of the logits."""
    flat = grad_z.reshape(head.input.size(0), head.weight.size(0)).to(head.input.dtype)
    bias = None if head.bias is None else flat.sum(0)
    low = (None, None)
    if head.low_input is not None and head.low_weight is not None:
        low = (flat @ head.low_weight, flat.t() @ head.low_input)  # type: ignore[assignment]
    return flat @ head.weight, flat.t() @ head.input, bias, *low


def gradients(
    g: RowGrads, head: Head, a: RowArgs, o: RowOptions, classes: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the head's tensors from those of the rows' results; differentiable in every tensor."""
    z = logits(head, classes)
    return head_gradients(rows.grad_input(g, a._replace(input=z), o, acc_dtype(z.dtype)), head)


def jvp(
    head: Head,
    tangents: Head,
    a: RowArgs,
    o: RowOptions,
    classes: int,
    probabilities_t: Tensor | None,
    weight_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tangents of nll, lse, entropy and target log-probability."""
    z = logits(head, classes)
    z_t = torch.zeros_like(z).flatten(1)
    for x, x_t, w, w_t in (
        (head.input, tangents.input, head.weight, tangents.weight),
        (head.low_input, tangents.low_input, head.low_weight, tangents.low_weight),
    ):
        if x_t is not None and w is not None:
            z_t = z_t + x_t @ w.t()
        if w_t is not None and x is not None:
            z_t = z_t + x @ w_t.t()
    if tangents.bias is not None:
        z_t = z_t + tangents.bias
    return rows.jvp(a._replace(input=z), o, z_t.reshape(z.shape), probabilities_t, weight_t)

"""Linear cross-entropy whose logits live in the memory of the weight's gradient.

The transposed logits of the first in_features rows have as many elements as grad_weight, and grad_weight is not needed
before they are done with: they cost no memory. Of the rows beyond, some are kept in a buffer and the others' logits are
computed twice, a tile of classes at a time: once for lse, once for the gradient. grad_weight is then one product a
tile, over all rows, rounded once. On a GPU every class of logits begins at a multiple of 64 rows where there is room.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.library import cuda_missing_reason, register
from fused_ops.core.memory_format import wide, wide_dtype
from fused_ops.ops.cross_entropy.reference import counts
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions, is_index_alone
from fused_ops.ops.linear_cross_entropy import reference
from fused_ops.ops.linear_cross_entropy.reference import Head

_ALIGNED = 64  # logits, 128 bytes of 16 bits: what odd vocabularies, or numbers of rows, are rounded up to in memory
_WIDENED = 1 << 20  # values of 16 bits, and an eighth of all, that a CPU sums at a time: PyTorch copies them in float32
_NO_TARGET = torch.iinfo(torch.int64).min  # of a row that does not count, where such rows are not left out


def _fake_nothing(*_: object) -> None:
    return None


_buffer_op = register(
    "linear_cross_entropy_buffer(Tensor like, SymInt rows, SymInt columns) -> Tensor",
    reference.buffer,
    reference.buffer,
)
_sums_op = register(
    "linear_cross_entropy_tile_sums_(Tensor logits, Tensor target, int first_class, int classes, Tensor(a!) max, "
    "Tensor(b!) others, Tensor(c!) target_logit) -> ()",
    reference.tile_sums_,
    _fake_nothing,
)
_grads_op = register(
    "linear_cross_entropy_tile_grads_(Tensor(a!) logits, Tensor target, int first_class, int classes, Tensor max, "
    "Tensor factor, Tensor target_grad) -> ()",
    reference.tile_grads_,
    _fake_nothing,
)

add_op = register(
    "linear_cross_entropy_add_(Tensor(a!) sum, Tensor part) -> ()",
    reference.add_,
    _fake_nothing,
)


def buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised memory, in huge pages where it is large."""
    return _buffer_op(like, rows, columns)  # type: ignore[return-value]


def class_sums(grads: Tensor, dim: int) -> Tensor:
    """The sums of a matrix over its rows, which are its dimension ``dim``; of 16 bits in float32."""
    if grads.itemsize > 2:
        return grads.sum(dim)
    values = grads.numel() if grads.is_cuda else min(_WIDENED, grads.numel() // 8)
    step = max(values // max(grads.size(dim), 1), 1)
    return torch.cat([part.sum(dim, dtype=torch.float32) for part in grads.split(step, 1 - dim)])


def is_padded(like: Tensor) -> bool:
    """Whether lines of logits begin at multiples of _ALIGNED: cuBLAS loads and stores others piecemeal."""
    return like.is_cuda


def logits_buffer(like: Tensor, lines: int, length: int) -> Tensor:
    """Uninitialised (lines, length)."""
    wide = -(-length // _ALIGNED) * _ALIGNED if is_padded(like) else length
    return buffer(like, lines, wide)[:, :length]


def skips_ignored(indices: Tensor) -> bool:
    """Whether ignored rows are left out: only a GPU knows how many it has, and would have to be waited for."""
    return indices.is_cpu


def suits(head: Head, a: RowArgs, o: RowOptions) -> bool:
    """Whether a call is of the kind that the tiles know: class indices, no option that changes the logits."""
    x = head.input
    if not is_index_alone(a, o) or a.indices is None or a.indices.dim() != 1 or head.low_input is not None:
        return False
    has_kernels = x.is_cpu or (x.is_cuda and cuda_missing_reason is None and x.size(1) * x.itemsize % 16 == 0)
    return has_kernels and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.size(1) > 0


class _Rows(NamedTuple):
    """Some of the rows that count, and what is known of them."""

    input: Tensor
    target: Tensor
    scale: Tensor
    max: Tensor
    others: Tensor
    target_logit: Tensor

    @staticmethod
    def of(input: Tensor, target: Tensor, scale: Tensor) -> _Rows:
        new = input.new_empty
        rows = target.size(0)
        maxima = new(rows, dtype=torch.float32).fill_(-torch.inf)
        return _Rows(
            input,
            target,
            scale,
            maxima,
            new(rows, dtype=wide_dtype(input)).zero_(),
            new(rows, dtype=torch.float32).fill_(-torch.inf),
        )

    def cut(self, begin: int, end: int) -> _Rows:
        return _Rows(*(t[begin:end] for t in self))

    def see(self, logits: Tensor, first: int, classes: int) -> None:
        _sums_op(logits, self.target, first, classes, self.max, self.others, self.target_logit)

    def finish(self, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """nll and lse; the factor of exp(logit - max) and the target's gradient, as the kernel takes them."""
        highest = wide(self.max)
        below = wide(self.target_logit) - highest
        at_target = below.exp()
        total = self.others + at_target
        log_total = total.log()
        lse = highest + log_total
        # log(1 + others / at_target), exact for a confident row
        nll = torch.where(below > -30, torch.log1p(self.others * (-below).exp()), log_total - below)
        p = at_target / total
        residual = torch.where(p < 0.5, p - 1, -self.others / total)
        factor, target_grad = self.scale / total, self.scale * residual
        if z_loss:
            more = torch.where(self.scale == 0, 0.0, 2 * z_loss * self.scale * lse)
            factor, target_grad = factor + more / total, target_grad + more * p
        return nll, lse, factor.float(), target_grad.float()


class _Job(NamedTuple):
    """One call: the matrices, the rows that count, the tiles."""

    weight: Tensor
    bias: Tensor | None
    rows: _Rows
    kept: list[tuple[int, int, Tensor]]  # begin, end, and the transposed logits of these rows
    done: int  # rows that are kept
    tile: int

    def logits(self, first: int, last: int, rows: _Rows, out: Tensor) -> None:
        weight, x = self.weight[first:last], rows.input.t()
        if self.bias is None:
            torch.mm(weight, x, out=out)
        else:
            torch.addmm(self.bias[first:last].unsqueeze(1), weight, x, out=out)

    def buffer(self) -> Tensor:
        """For a tile of the logits of all rows."""
        return logits_buffer(self.weight, min(self.tile, self.weight.size(0)), self.rows.target.size(0))

    def tiles(self) -> list[tuple[int, int, bool]]:
        """As ``tiles_of``; if rows beyond are kept, or computed twice, they share tiles with the others' copies."""
        (_, end, z), *others = self.kept
        classes, features = self.weight.shape
        pitch = features if others or end < self.rows.target.size(0) else z.stride(0)
        return tiles_of(classes, features, pitch, self.tile)


def tiles_of(classes: int, features: int, pitch: int, tile: int) -> list[tuple[int, int, bool]]:
    """(first class, behind the last, whether the logits are copied) of each tile, in the order of their products.

    They go from the last, so that no tile's gradient lands on logits that are still wanted, and a copy gives its own
    logits' memory free for it. With fewer rows than features a class's logits lie before its gradient, the further the
    later the class: there a tile is of all the classes whose logits lie before the gradient of the first of them.

    Args:
        classes: Of all tiles.
        features: Elements from one class's gradient to the next.
        pitch: Elements from one class's logits to the next, no more than ``features``.
        tile: The most classes whose logits are copied at once.
    """
    found, last = [], classes
    while last > 0:
        first = -(-last * pitch // features)
        copied = last - first < min(tile, last)
        first = max(last - tile, 0) if copied else first
        found.append((first, last, copied))
        last = first
    return found


def _job(head: Head, rows: _Rows, grad_weight: Tensor, kept_rows: int, tile: int) -> _Job:
    classes, features = head.weight.shape
    count = rows.target.size(0)
    free = min(count, features)
    pitch = min(features, -(-free // _ALIGNED) * _ALIGNED) if is_padded(head.input) else free
    kept = [(0, free, grad_weight.view(-1)[: classes * pitch].view(classes, pitch)[:, :free])]
    done = min(count, free + kept_rows)
    if done > free:
        kept.append((free, done, logits_buffer(head.input, classes, done - free)))
    return _Job(head.weight, head.bias, rows, kept, done, tile)


def _first_pass_by_rows(job: _Job, z_loss: float, chunk_rows: int, grad_input: Tensor | None) -> None:
    """Of the rows that are not kept: a chunk's logits give its grad_input too, as one product rounded once."""
    classes, rows = job.weight.size(0), job.rows.target.size(0)
    z = logits_buffer(job.weight, classes, min(chunk_rows, max(rows - job.done, 0)))
    for begin in range(job.done, rows, chunk_rows):
        end = min(begin + chunk_rows, rows)
        part, logits = job.rows.cut(begin, end), z[:, : end - begin]
        job.logits(0, classes, part, logits)
        part.see(logits, 0, classes)
        if grad_input is not None:
            _, _, factor, target_grad = part.finish(z_loss)
            _grads_op(logits, part.target, 0, classes, part.max, factor, target_grad)
            torch.mm(logits.t(), job.weight, out=grad_input[begin:end])


def _first_pass(job: _Job, by_rows: bool) -> None:
    classes = job.weight.size(0)
    for begin, end, z in job.kept:
        part = job.rows.cut(begin, end)
        job.logits(0, classes, part, z)
        part.see(z, 0, classes)
    rest = job.rows.cut(job.done, job.rows.target.size(0))
    if by_rows or not rest.target.numel():
        return
    d = job.buffer()
    for first, last, _ in job.tiles():
        z = d[: last - first, job.done :]
        job.logits(first, last, rest, z)
        rest.see(z, first, classes)


class _RestInput:
    """grad_input of the rows whose logits exist a tile at a time: a sum of products, in float32 at least."""

    def __init__(self, grad_input: Tensor) -> None:
        self.grad_input = grad_input
        wide = grad_input.dtype.itemsize == 2
        self.sum = torch.zeros_like(grad_input, dtype=torch.float32) if wide else grad_input.zero_()
        self.part = torch.empty_like(grad_input) if wide and not grad_input.is_cuda else grad_input

    def add(self, d: Tensor, weight: Tensor) -> None:
        if self.sum is self.grad_input:
            self.sum.addmm_(d.t(), weight)
        elif self.sum.is_cuda:
            torch.addmm(self.sum, d.t(), weight, out_dtype=torch.float32, out=self.sum)
        else:
            torch.mm(d.t(), weight, out=self.part)
            add_op(self.sum, self.part)

    def finish(self) -> None:
        if self.sum is not self.grad_input:
            self.grad_input.copy_(self.sum)


def _gradients(
    job: _Job,
    z_loss: float,
    grad_weight: Tensor,
    grad_input: Tensor | None,
    grad_bias: Tensor | None,
    by_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Fills the gradients; returns nll and lse."""
    nll, lse, factor, target_grad = job.rows.finish(z_loss)
    classes, target = job.weight.size(0), job.rows.target
    d = job.buffer()
    for begin, end, z in job.kept:
        part = slice(begin, end)
        _grads_op(z, target[part], 0, classes, job.rows.max[part], factor[part], target_grad[part])
        if grad_input is not None:
            torch.mm(z.t(), job.weight, out=grad_input[part])
    part = slice(job.done, target.size(0))
    rest = job.rows.cut(job.done, target.size(0))
    some = rest.target.numel() > 0
    rest_input = _RestInput(grad_input[part]) if grad_input is not None and some and not by_rows else None
    for first, last, copied in job.tiles():
        tile = d[: last - first] if copied else job.kept[0][2][first:last]
        for begin, end, z in job.kept if copied else ():
            tile[:, begin:end] = z[first:last]
        if some:
            z = tile[:, job.done :]
            job.logits(first, last, rest, z)
            _grads_op(z, rest.target, first, classes, rest.max, factor[part], target_grad[part])
            if rest_input is not None:
                rest_input.add(z, job.weight[first:last])
        torch.mm(tile, job.rows.input, out=grad_weight[first:last])
        if grad_bias is not None:
            grad_bias[first:last] = class_sums(tile, 1)
    if rest_input is not None:
        rest_input.finish()
    return nll, lse


def forward(
    head: Head,
    a: RowArgs,
    o: RowOptions,
    row_scale: Tensor,
    z_loss: float,
    wanted: tuple[bool, bool],
    chunk_rows: int,
    kept_rows: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(nll, lse, counted) of every row, then grad_weight, grad_input and grad_bias; ``wanted`` is of the last two."""
    assert a.indices is not None
    classes, features = head.weight.shape
    counted = counts(a.indices, o.ignore_index)
    skips = skips_ignored(a.indices)
    chosen = counted.nonzero().squeeze(1) if skips and not bool(counted.all()) else None
    cut = (t.detach() if chosen is None else t.detach()[chosen] for t in (head.input, a.indices, row_scale))
    x, target, scale = (t.contiguous() for t in cut)
    rows = _Rows.of(x, target.long() if skips else torch.where(counted, target.long(), _NO_TARGET), scale)
    grad_weight = buffer(head.input, classes, features)
    grad_input = x.new_empty(x.shape) if wanted[0] else None
    grad_bias = x.new_empty(classes) if wanted[1] else None
    if target.numel():
        job, by_rows = _job(head, rows, grad_weight, max(kept_rows, 0), tile), kept_rows < 0
        if by_rows:
            _first_pass_by_rows(job, z_loss, chunk_rows, grad_input)
        _first_pass(job, by_rows)
        nll, lse = _gradients(job, z_loss, grad_weight, grad_input, grad_bias, by_rows)
    else:
        nll, lse = rows.others, rows.others.clone()
        for gradient in (grad_weight, grad_input, grad_bias):
            if gradient is not None:
                gradient.zero_()
    if not skips:
        nll, lse = (torch.where(counted, t, 0.0) for t in (nll, lse))
    if chosen is not None:
        nll, lse = (t.new_zeros(counted.shape).index_put_((chosen,), t) for t in (nll, lse))
        if grad_input is not None:
            whole = torch.zeros_like(head.input, memory_format=torch.contiguous_format)
            grad_input = whole.index_put_((chosen,), grad_input)
    return nll, lse, counted, grad_weight, grad_input, grad_bias

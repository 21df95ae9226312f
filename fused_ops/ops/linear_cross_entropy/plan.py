"""How much of the logits exists at a time, and where: from the sizes, and from what the caller allows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.linear_cross_entropy.by_classes import suits
from fused_ops.ops.linear_cross_entropy.by_rows import ADDED_WEIGHT, WEIGHT, WIDE_WEIGHT, Plan
from fused_ops.ops.linear_cross_entropy.reference import Head

SMALL_BYTES = 1 << 20  # logits that are not worth cutting
_SHARE = 0.03  # of the logits, which a call may take by default; more where fast products need more
# What fast products may lose, of the time of those in one piece: so little that heads are about as fast as under
# torch.compile, which has all the logits, and loses more of 16 bits. On two cores with AVX-512 its time over ours at
# 2048x768x50257 in float32 was 0.91 to 0.98 with 3/32 (256 rows), 0.98 to 1.05 with this, and no more with 3/128.
_NEAR, _NEAR_OF_16_BITS = 3 / 64, 3 / 32
_HALVED_ROWS = 256  # of more than these no more than half have their logits at once, though products lose more then
_AGAIN = 0.1  # what computing any rows again costs besides: 33 rows of 1024x512x32000 took 0.16 of the products' time
_TILE_CLASSES = 1024  # on the CPU
_FEWEST_CLASSES = 128  # of a tile: with fewer the products are slow
_FEWEST_ROWS = 128  # of a chunk

# On a GPU: what the estimates are made of, those of an H200
L2_BYTES = 50 << 20  # of its second-level cache, where torch does not say
_GPU_TILE_BYTES = 32 << 20  # which stay in that cache
_GPU_ROWS = 1024  # of a chunk: with fewer, reading the weights again takes longer than its products
_GPU_SUMMED_ROWS = 2048  # the same where a chunk reads and writes a sum in float32 besides
_GPU_BYTES_PER_S = 4.5e12
_GPU_OPERATIONS_PER_S = {2: 5e14, 4: 5e13, 8: 5e13}  # in products of matrices, by the bytes of their elements


class Cut(NamedTuple):
    """What settles, beside the sizes, how a call is cut."""

    positions: int  # with a loss of their own, of each row
    chunk_rows: int | None  # what the caller wants
    max_memory_bytes: int | None  # what the caller allows

    def classes(self, head: Head) -> int:
        return head.weight.size(0) // self.positions if self.positions else 0

    def is_small(self, head: Head) -> bool:
        """Whether all the logits may exist at once."""
        x = head.input
        return self[1:] == (None, None) and x.size(0) * head.weight.size(0) * x.element_size() <= SMALL_BYTES


class Sizes(NamedTuple):
    """Of one call."""

    rows: int
    features: int
    classes: int
    positions: int
    itemsize: int
    l2_bytes: int = 0  # of the second-level cache of the GPU that it is on; 0 on the CPU

    @property
    def row_bytes(self) -> int:
        """Of one row's logits."""
        return max(self.classes * self.positions * self.itemsize, 1)

    @property
    def logits_bytes(self) -> int:
        """Of all."""
        return self.rows * self.row_bytes

    @property
    def beyond(self) -> int:
        """Rows whose logits do not fit into grad_weight's memory."""
        return max(self.rows - self.features, 0)

    @property
    def class_bytes(self) -> int:
        """Of one class's logits, in a tile."""
        return max(self.rows * self.itemsize, 1)

    @property
    def tile_classes(self) -> int:
        """Of a tile that need not be smaller."""
        if not self.l2_bytes:
            return _TILE_CLASSES
        return max(_GPU_TILE_BYTES // self.class_bytes // 64 * 64, _FEWEST_CLASSES)

    def sum_bytes(self, needs: int) -> int:
        """Of the sum in float32 that a 16-bit weight's gradient needs, if it comes in chunks of rows."""
        summed = self.itemsize == 2 and needs & WEIGHT and not needs & ADDED_WEIGHT
        return 2 * self.row_bytes * self.features if summed else 0

    @property
    def near(self) -> float:
        """What products may lose, of the time of those in one piece."""
        return _NEAR_OF_16_BITS if self.itemsize == 2 else _NEAR

    def lost_rows(self, needs: int) -> float:
        """Rows whose products take the time that each chunk of rows costs besides its own.

        On a GPU a chunk reads the weights twice, and reads and writes what their gradient is added up in.
        """
        if self.l2_bytes:
            return self._rows_of_bytes(2 * self.itemsize + (8 if needs & WEIGHT else 0))
        if self.itemsize > 2:
            return 24
        return 44 if needs & WEIGHT else 11

    @property
    def copied(self) -> float:
        """What copying all logits into tiles costs on a GPU, of the products' time."""
        return self._rows_of_bytes(2 * self.itemsize) / max(self.features, 1) if self.l2_bytes else 0.0

    def _rows_of_bytes(self, count: int) -> float:
        """Rows whose 6 features classes operations take the time of so many bytes for each feature of each class."""
        return count / _GPU_BYTES_PER_S * _GPU_OPERATIONS_PER_S[self.itemsize] / 6


class _Choice(NamedTuple):
    cost: float  # estimated time over that of the three products in one piece
    plan: Plan


def _in_rows(sizes: Sizes, needs: int, memory: int) -> _Choice | None:
    """Chunks of rows. Small ones make slow products; 16-bit weights' gradients need a sum in float32 beside them."""
    whole, sums = memory >= sizes.logits_bytes, sizes.sum_bytes(needs)
    rows = sizes.rows if whole else (memory - sums) // sizes.row_bytes
    if rows < 1 or (sums and rows < min(_FEWEST_ROWS, sizes.rows)):
        return None
    rows = -(-sizes.rows // -(-sizes.rows // rows)) or 1  # chunks of one size
    lost = 0 if whole and sizes.l2_bytes else sizes.lost_rows(needs) / rows
    return _Choice(1 + lost, Plan(sizes.classes, rows, needs))


def _rest_bytes(sizes: Sizes) -> int:
    """Of a row whose logits are computed twice: its grad_input is a sum over tiles, which of 16 bit is apart."""
    return 6 * sizes.features if sizes.itemsize == 2 else 0


def _kept_rows(sizes: Sizes, memory: int, tile: int) -> int | None:
    """How many of the rows beyond are kept, beside a tile of so many classes; None if there is too little memory."""
    left, rest = memory - tile * sizes.class_bytes, _rest_bytes(sizes)
    if left >= sizes.beyond * sizes.row_bytes:
        return sizes.beyond
    if left < sizes.beyond * rest:
        return None
    kept = min(sizes.beyond, (left - sizes.beyond * rest) // max(sizes.row_bytes - rest, 1))
    return kept // 64 * 64 if sizes.l2_bytes else kept  # so that on a GPU the others' logits begin at 64 rows


def _in_tiles(sizes: Sizes, needs: int, memory: int) -> _Choice | None:
    """Tiles of classes; rows that are not kept have their logits computed twice."""
    beyond = sizes.beyond

    def tile_in(count: int) -> int:
        return min(sizes.tile_classes, max(count // sizes.class_bytes // 32 * 32, _FEWEST_CLASSES), sizes.classes)

    tile = tile_in(memory // 2 if beyond else memory)
    kept = _kept_rows(sizes, memory, tile)
    if kept is None:
        tile = tile_in(0)
        kept = _kept_rows(sizes, memory, tile)
    chunk = max(1, memory // sizes.row_bytes)
    much = kept is None or 2 * beyond * _rest_bytes(sizes) > memory - tile * sizes.class_bytes
    if kept != beyond and much and chunk >= _FEWEST_ROWS and memory >= tile_in(0) * sizes.class_bytes:
        tile, kept = tile_in(memory), -1  # grad_input of the rest is found in a first pass by rows
    if kept is None and sizes.logits_bytes > SMALL_BYTES:
        return None
    kept = kept or 0
    again = beyond - max(kept, 0)
    cost = 1 + sizes.copied + (_AGAIN + again / (3 * sizes.rows) if again else 0)
    return _Choice(cost, Plan(sizes.classes, chunk, needs, kept, tile))


def default_bytes(sizes: Sizes, needs: int, in_tiles: bool) -> int:
    """The least memory with which the products lose no more than they may, but the share in any case."""
    tiles = sizes.beyond * sizes.row_bytes + sizes.tile_classes * sizes.class_bytes  # all rows kept, and a tile
    if sizes.l2_bytes:
        summed = sizes.features if sizes.sum_bytes(needs) else 0
        rows = chosen_rows(sizes.rows, sizes.row_bytes, sizes.l2_bytes, summed)
        least = rows * sizes.row_bytes + (sizes.sum_bytes(needs) if rows < sizes.rows else 0)
        return least if not in_tiles or sizes.beyond else min(least, tiles)
    logits, enough = sizes.logits_bytes, math.ceil(sizes.lost_rows(needs) / sizes.near)
    if not sizes.sum_bytes(needs):
        enough = min(enough, max(_HALVED_ROWS, math.ceil(sizes.rows / 2)))
    least = min(logits, enough * sizes.row_bytes + sizes.sum_bytes(needs))
    return max(int(_SHARE * logits), min(least, tiles) if in_tiles else least)


def chosen_rows(rows: int, row_bytes: int, l2_bytes: int, summed_features: int = 0) -> int:
    """Rows of a chunk on a GPU: as many as its second-level cache holds, but no fewer than the products need.

    A chunk of r rows computes 6 r features classes operations. It reads the weights twice and, where it is one of
    several and they have 16 bits, reads and writes the float32 sum of their gradient, 8 bytes a weight: on an H200
    222 / r of the products' time. Measured there at 8192 rows, 4096 features and 128256 classes:
    `python -m benchmarks --device cuda --suite full --op linear_cross_entropy --part sweep`.

    Args:
        rows: Of the call.
        row_bytes: Of one row's logits.
        l2_bytes: Of the GPU's second-level cache.
        summed_features: Features of 16-bit weights whose gradient is wanted; 0 if there are none. Their logits may take
            half as much memory as that sum; all of them at once, where they take no more than it and a chunk do.
    """
    wanted = max(l2_bytes // max(row_bytes, 1) // 256 * 256, _GPU_ROWS)
    if summed_features:
        wanted = max(wanted, _GPU_SUMMED_ROWS, summed_features)
    chunk = -(-rows // -(-rows // wanted)) if rows else 1
    return max(rows, 1) if rows <= chunk + 2 * summed_features else chunk


def least_bytes(sizes: Sizes, needs: int, in_tiles: bool) -> tuple[int, str]:
    """The least memory that a call can be done in, and what that is.

    In chunks of rows it is a row of logits; beside a float32 sum of a 16-bit weight's gradient _FEWEST_ROWS, as each
    chunk reads and writes that sum.
    """
    found = [(sizes.row_bytes, "a row of logits")]
    if sums := sizes.sum_bytes(needs):
        some = min(sizes.rows, _FEWEST_ROWS) * sizes.row_bytes + sums
        found = [(some, f"{_FEWEST_ROWS} rows of logits and a float32 sum of linear_weight's gradient")]
        found.append((sizes.logits_bytes, "all logits"))
    if in_tiles:
        tile = min(_FEWEST_CLASSES, sizes.classes) * sizes.class_bytes
        rest = sizes.beyond * min(_rest_bytes(sizes), sizes.row_bytes)
        found.append(
            (tile + rest, f"{_FEWEST_CLASSES} classes of logits" + f" and {sizes.beyond} rows' sums" * bool(rest))
        )
        if rest:
            found.append((max(tile, _FEWEST_ROWS * sizes.row_bytes), f"{_FEWEST_ROWS} rows or classes of logits"))
    return min(found)


def choose(sizes: Sizes, needs: int, in_tiles: bool, chunk_rows: int | None, max_memory_bytes: int | None) -> Plan:
    """The plan of a call: the fastest, by estimate, within the memory that is allowed.

    Args:
        sizes: Of the call.
        needs: Which gradients the forward computes, as bits.
        in_tiles: Whether the call is one that tiles serve.
        chunk_rows: What the caller wants, or None.
        max_memory_bytes: What the caller allows, or None.

    Raises:
        ValueError: What the caller allows is less than ``least_bytes``. Logits that are not worth cutting are cut as
            small as may be instead.
    """
    if chunk_rows is not None:
        return Plan(sizes.classes, chunk_rows, needs)
    in_tiles = in_tiles and bool(needs & WEIGHT)
    memory = max_memory_bytes or default_bytes(sizes, needs, in_tiles)
    ways = (_in_tiles(sizes, needs, memory) if in_tiles else None, _in_rows(sizes, needs, memory))
    possible = [way for way in ways if way is not None]
    if possible:
        return min(possible, key=lambda way: way.cost).plan
    if sizes.logits_bytes > SMALL_BYTES:
        least, what = least_bytes(sizes, needs, in_tiles)
        expected = f"expected max_memory_bytes to be at least {least}, for {what}"
        raise ValueError(f"linear_cross_entropy: {expected}, got {max_memory_bytes}")
    return Plan(sizes.classes, 1, needs)


# ---- a call


def l2_bytes(x: Tensor) -> int:
    """Of the second-level cache of the GPU where x is; 0 on the CPU."""
    if not x.is_cuda:
        return 0
    return getattr(torch.cuda.get_device_properties(x.device), "L2_cache_size", 0) or L2_BYTES


def _sizes(head: Head, cut: Cut) -> Sizes:
    x = head.input
    return Sizes(x.size(0), x.size(1), cut.classes(head), cut.positions, x.element_size(), l2_bytes(x))


def plan(head: Head, a: RowArgs, o: RowOptions, cut: Cut, needs: int) -> Plan:
    """The plan of a call whose sizes are known."""
    in_tiles = cut.positions == 1 and suits(head, a, o) and not needs & WIDE_WEIGHT
    return choose(_sizes(head, cut), needs, in_tiles, cut.chunk_rows, cut.max_memory_bytes)


def plan_in_rows(head: Head, cut: Cut, needs: int, main_grad: Tensor | None) -> Plan:
    """The plan of a backward that computes the rows' logits again."""
    needs |= 0 if main_grad is None else ADDED_WEIGHT
    return choose(_sizes(head, cut), needs, False, cut.chunk_rows, cut.max_memory_bytes)

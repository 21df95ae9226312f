"""How much of the logits exists at a time, and where: from the sizes, and from what the caller allows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.linear_cross_entropy.by_classes import suits
from fused_ops.ops.linear_cross_entropy.by_rows import WEIGHT, WIDE_WEIGHT, Plan
from fused_ops.ops.linear_cross_entropy.reference import Head

SMALL_BYTES = 1 << 20  # logits that are not worth cutting
_SHARE = 0.03  # of the logits, which a call may take by default; more where fast products need more
# What fast products may lose, of the time of those in one piece: so little that heads are about as fast as under
# torch.compile, which has all the logits, and loses more of 16 bits. On two cores with AVX-512 its time over ours at
# 2048x768x50257 in float32 was 0.91 to 0.98 with 3/32 (256 rows), 0.98 to 1.05 with this, and no more with 3/128.
_NEAR, _NEAR_OF_16_BITS = 3 / 64, 3 / 32
_HALVED_ROWS = 256  # of more than these no more than half have their logits at once, though products lose more then
_AGAIN = 0.1  # what computing any rows again costs besides: 33 rows of 1024x512x32000 took 0.16 of the products' time
_TILE_CLASSES = 1024
_FEWEST_CLASSES = 128  # of a tile: with fewer the products are slow
_FEWEST_ROWS = 128  # of a chunk


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

    @property
    def row_bytes(self) -> int:
        """Of one row's logits."""
        return max(self.classes * self.positions * self.itemsize, 1)

    @property
    def beyond(self) -> int:
        """Rows whose logits do not fit into grad_weight's memory."""
        return max(self.rows - self.features, 0)

    def sum_bytes(self, needs: int) -> int:
        """Of the sum in float32 that a 16-bit weight's gradient needs, if it comes in chunks of rows."""
        return 2 * self.row_bytes * self.features if self.itemsize == 2 and needs & WEIGHT else 0

    @property
    def near(self) -> float:
        """What products may lose, of the time of those in one piece."""
        return _NEAR_OF_16_BITS if self.itemsize == 2 else _NEAR

    def lost_rows(self, needs: int) -> int:
        """Rows whose products take the time that each chunk of rows costs besides its own."""
        if self.itemsize > 2:
            return 24
        return 44 if needs & WEIGHT else 11


class _Choice(NamedTuple):
    cost: float  # estimated time over that of the three products in one piece
    plan: Plan


def _in_rows(sizes: Sizes, needs: int, memory: int) -> _Choice | None:
    """Chunks of rows. Small ones make slow products; 16-bit weights' gradients need a sum in float32 beside them."""
    whole = memory >= sizes.rows * sizes.row_bytes
    rows = sizes.rows if whole else (memory - sizes.sum_bytes(needs)) // sizes.row_bytes
    if rows < 1:
        return None
    rows = -(-sizes.rows // -(-sizes.rows // rows)) or 1  # chunks of one size
    return _Choice(1 + sizes.lost_rows(needs) / rows, Plan(sizes.classes, rows, needs))


def _in_tiles(sizes: Sizes, needs: int, memory: int) -> _Choice:
    """Tiles of classes; rows that are not kept have their logits computed twice."""
    beyond = sizes.beyond
    tile_row = max(sizes.rows * sizes.itemsize, 1)
    tile = min(_TILE_CLASSES, max(memory // 2 // tile_row // 32 * 32, _FEWEST_CLASSES), sizes.classes)
    left = max(memory - tile * tile_row, 0)
    kept = min(beyond, left // sizes.row_bytes)
    chunk = max(1, memory // sizes.row_bytes)
    if kept < beyond and sizes.itemsize == 2:  # grad_input of the others is a sum over tiles
        sums = 6 * sizes.features
        kept = min(beyond, max(left - beyond * sums, 0) // max(sizes.row_bytes - sums, 1))
        if 2 * beyond * sums > left and chunk >= _FEWEST_ROWS:  # or found in a first pass by rows
            tile = min(_TILE_CLASSES, max(memory // tile_row // 32 * 32, _FEWEST_CLASSES), sizes.classes)
            kept = -1
    again = beyond - max(kept, 0)
    cost = 1 + _AGAIN + again / (3 * sizes.rows) if again else 1
    return _Choice(cost, Plan(sizes.classes, chunk, needs, kept, tile))


def default_bytes(sizes: Sizes, needs: int, in_tiles: bool) -> int:
    """The least memory with which the products lose no more than they may, but the share in any case."""
    logits, enough = sizes.rows * sizes.row_bytes, math.ceil(sizes.lost_rows(needs) / sizes.near)
    if not sizes.sum_bytes(needs):
        enough = min(enough, max(_HALVED_ROWS, math.ceil(sizes.rows / 2)))
    least = min(logits, enough * sizes.row_bytes + sizes.sum_bytes(needs))
    if in_tiles:  # all rows kept, and a tile
        least = min(least, sizes.beyond * sizes.row_bytes + _TILE_CLASSES * sizes.rows * sizes.itemsize)
    return max(int(_SHARE * logits), least)


def least_bytes(sizes: Sizes, needs: int) -> int:
    """The least memory of a call in chunks of rows: a row of logits.

    Beside a float32 sum of a 16-bit weight's gradient it is _FEWEST_ROWS, as each chunk reads and writes that sum.
    """
    sums = sizes.sum_bytes(needs)
    if not sums:
        return sizes.row_bytes
    return min(sizes.rows * sizes.row_bytes, min(sizes.rows, _FEWEST_ROWS) * sizes.row_bytes + sums)


def check_limit(sizes: Sizes, needs: int, max_memory_bytes: int | None) -> None:
    """Raises for a limit that no chunks of rows keep; logits that are not worth cutting are cut as small as may be."""
    if max_memory_bytes is None or sizes.rows * sizes.row_bytes <= SMALL_BYTES:
        return
    if max_memory_bytes < (least := least_bytes(sizes, needs)):
        what = f"{_FEWEST_ROWS} rows of logits and a float32 sum of linear_weight's gradient"
        what = {sizes.row_bytes: "a row of logits", sizes.rows * sizes.row_bytes: "all logits"}.get(least, what)
        expected = f"expected max_memory_bytes to be at least {least}, for {what}"
        raise ValueError(f"linear_cross_entropy: {expected}, got {max_memory_bytes}")


def choose(sizes: Sizes, needs: int, in_tiles: bool, chunk_rows: int | None, max_memory_bytes: int | None) -> Plan:
    """The plan of a call: the fastest, by estimate, within the memory that is allowed.

    Args:
        sizes: Of the call.
        needs: Which gradients the forward computes, as bits.
        in_tiles: Whether the call is one that tiles serve.
        chunk_rows: What the caller wants, or None.
        max_memory_bytes: What the caller allows, or None.

    Raises:
        ValueError: What the caller allows is less than ``least_bytes``.
    """
    if chunk_rows is not None:
        return Plan(sizes.classes, chunk_rows, needs)
    in_tiles = in_tiles and bool(needs & WEIGHT)
    if not in_tiles:  # tiles are of any height
        check_limit(sizes, needs, max_memory_bytes)
    memory = max_memory_bytes or default_bytes(sizes, needs, in_tiles)
    rows = _in_rows(sizes, needs, memory)
    if not in_tiles:
        return rows.plan if rows is not None else Plan(sizes.classes, 1, needs)  # as few bytes as may be
    tiles = _in_tiles(sizes, needs, memory)
    return rows.plan if rows is not None and rows.cost < tiles.cost else tiles.plan


# ---- on a GPU, in chunks of rows

_GPU_ROWS = 1024  # with fewer, reading the weights again for each chunk takes longer than its products
_GPU_SUMMED_ROWS = 2048  # the same where a chunk reads and writes a sum in float32 besides
L2_BYTES = 50 << 20  # where torch does not say


def chosen_rows(rows: int, row_bytes: int, l2_bytes: int, summed_features: int = 0) -> int:
    """Rows of a chunk: as many as the second-level cache holds, but no fewer than the products need.

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


def gpu_rows(input: Tensor, row_bytes: int, wants_weight: bool) -> int:
    """``chosen_rows`` for inputs (rows, features) on the GPU where they are."""
    properties = torch.cuda.get_device_properties(input.device)
    summed = input.size(1) if wants_weight and input.dtype.itemsize == 2 else 0
    return chosen_rows(input.size(0), row_bytes, getattr(properties, "L2_cache_size", 0) or L2_BYTES, summed)


# ---- a call


def plan(head: Head, a: RowArgs, o: RowOptions, cut: Cut, needs: int) -> Plan:
    """The plan of a call whose sizes are known."""
    x, classes = head.input, cut.classes(head)
    sizes = Sizes(x.size(0), x.size(1), classes, cut.positions, x.element_size())
    if cut[1:] == (None, None) and x.is_cuda:
        return Plan(classes, gpu_rows(x, sizes.row_bytes, bool(needs & WEIGHT)), needs)
    in_tiles = cut.positions == 1 and suits(head, a, o) and not needs & WIDE_WEIGHT
    return choose(sizes, needs, in_tiles, cut.chunk_rows, cut.max_memory_bytes)

"""What linear cross-entropy's plans take, of the heads of well-known models: counted, not measured.

``python -m benchmarks.plans`` writes the table between the markers of docs/linear_cross_entropy.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from fused_ops.ops.linear_cross_entropy import plan
from fused_ops.ops.linear_cross_entropy.by_classes import tiles_of
from fused_ops.ops.linear_cross_entropy.by_rows import INPUT, WEIGHT, Plan
from fused_ops.ops.linear_cross_entropy.plan import Sizes

from .machine import ROOT

PAGE = ROOT / "docs" / "linear_cross_entropy.md"
MARKER = re.compile(r"(<!-- plans -->\n).*?(<!-- /plans -->)", re.DOTALL)
HEADS = {  # features, classes
    "GPT-2": (768, 50257),
    "Llama 3 8B": (4096, 128256),
    "Qwen 2.5 7B": (3584, 152064),
    "Gemma 2 9B": (3584, 256000),
}
ROWS = (2048, 8192, 32768, 65536)
NEEDS = INPUT | WEIGHT
COLUMNS = ("head", "rows", "device", "plan", "beyond gradients, MB", "of the logits", "moved, GB", "products")


class Count(NamedTuple):
    """Of one training call of 16-bit logits, forward and gradients."""

    extra_bytes: int  # beyond inputs and gradients
    moved_bytes: int  # in matrices, each product reading its factors once and writing its result once
    products: float  # over the one of rows features classes


def default_plan(sizes: Sizes, device: str) -> Plan:
    """What a call of class indices alone gets."""
    return plan.choose(sizes._replace(l2_bytes=plan.L2_BYTES if device == "cuda" else 0), NEEDS, True, None, None)


def count(sizes: Sizes, p: Plan) -> Count:
    """The bytes and products of a plan."""
    return _in_tiles(sizes, p) if p.tile_classes else _in_rows(sizes, p)


def _in_rows(sizes: Sizes, p: Plan) -> Count:
    """A chunk's logits are written by one product, read and written by the op, and read by two products."""
    rows, features, classes, chunks = sizes.rows, sizes.features, sizes.classes, -(-sizes.rows // p.chunk_rows)
    sum_bytes = 4 * features * classes if chunks > 1 and sizes.itemsize == 2 else 0
    weights, inputs = (sizes.itemsize * features * n for n in (classes, rows))
    moved = 5 * rows * sizes.row_bytes + 3 * inputs + 2 * chunks * weights
    moved += (2 * chunks - 1) * (sum_bytes or weights)  # the first chunk's is not read
    moved += sum_bytes + weights if sum_bytes else 0  # rounded once
    return Count(p.chunk_rows * sizes.row_bytes + sum_bytes, moved, 3.0)


def _in_tiles(sizes: Sizes, p: Plan) -> Count:
    """Kept logits are copied into tiles besides, if need be; those of the other rows are written and read twice."""
    rows, features = sizes.rows, sizes.features
    cut = tiles_of(sizes.classes, features, min(rows, features), p.tile_classes)
    copied, tiles = sum(last - first for first, last, copied in cut if copied), len(cut)
    beyond, kept, first_by_rows = max(rows - features, 0), max(p.kept_rows, 0), p.kept_rows < 0
    twice = beyond - kept
    input_sums = 0 if first_by_rows or sizes.itemsize != 2 else 6 * features * twice
    tile_bytes = p.tile_classes * rows * sizes.itemsize
    extra = tile_bytes + kept * sizes.row_bytes + input_sums
    extra = max(p.chunk_rows * sizes.row_bytes, tile_bytes) if first_by_rows else extra
    weights, inputs, others = (sizes.itemsize * features * n for n in (sizes.classes, rows, twice))
    moved = (6 * (rows - twice) + (9 if first_by_rows else 7) * twice) * sizes.row_bytes
    moved += 2 * (rows - twice) * copied * sizes.itemsize
    first = -(-twice // p.chunk_rows) * 2 if first_by_rows else 1  # how often the first pass reads the weights
    moved += weights * (2 * (1 + (kept > 0)) + (1 + first + (not first_by_rows) if twice else 0) + 1)
    moved += 2 * inputs + tiles * (inputs + 2 * others) + tiles * 2 * input_sums
    return Count(extra, moved, 3 + twice / rows)


def described(p: Plan, sizes: Sizes) -> str:
    """The plan in words."""
    if not p.tile_classes:
        return "all rows" if p.chunk_rows >= sizes.rows else f"{p.chunk_rows} rows a chunk"
    kept = "" if p.kept_rows <= 0 else f", {p.kept_rows} rows kept"
    return f"{p.tile_classes} classes a tile{kept}"


def lines() -> Iterator[list[str]]:
    """The table's rows."""
    for head, (features, classes) in HEADS.items():
        for rows in ROWS:
            sizes = Sizes(rows, features, classes, 1, 2)
            for device in ("cpu", "cuda"):
                p = default_plan(sizes, device)
                c = count(sizes, p)
                share = f"{100 * c.extra_bytes / (rows * sizes.row_bytes):.0f} %"
                cells = [f"{c.extra_bytes / 1e6:.0f}", share, f"{c.moved_bytes / 1e9:.1f}", f"{c.products:.2f}"]
                yield [f"{head}, {features} x {classes}", str(rows), device, described(p, sizes), *cells]


def render(page: str) -> str:
    """The page with the table made anew."""
    rule = "|---|---:|---|---|" + "---:|" * 4
    table = [f"| {' | '.join(COLUMNS)} |", rule, *(f"| {' | '.join(line)} |" for line in lines())]
    text = "\n".join(table)
    return MARKER.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

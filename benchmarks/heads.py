"""Linear cross-entropy's own table and plot: time and memory of every way to compute one head's loss."""

from __future__ import annotations

import re

from . import results
from .harness import COPY, TRUTH
from .results import Row

COLUMNS = ("head", "provider", "forward + backward", "vs eager", "of three products", "memory, % of the logits")
_SHAPE = re.compile(r"(\d+)x(\d+) x (\d+)")
_PRODUCTS = "three products"


def of_logits(row: Row) -> float | None:
    """Peak memory beyond inputs and gradients over the bytes of the logits; None where it was not measured."""
    found = _SHAPE.match(str(row["case"]))
    sweep = (1024, 512, 32000)  # the shape of the sweeps
    rows, features, classes = map(int, found.groups()) if found else sweep
    if row.get("extra_bytes") is None:
        return None
    size = int(row["input_bytes"]) // (rows * features)
    gradients = size * features * (rows + classes)
    return max(0.0, (int(row["extra_bytes"]) - gradients) / (size * rows * classes))


def lines(timings: list[Row]) -> list[list[str]]:
    """One line per case and provider; the rows are those with the most threads."""
    mine = [r for r in timings if r["op"] == "linear_cross_entropy" and r["part"] == "micro"]
    found = []
    for case in dict.fromkeys(r["case"] for r in mine):
        group = {r["provider"]: r for r in mine if r["case"] == case and r["direction"] == "both"}
        for name, row in group.items():
            if name == COPY:
                continue
            if row["status"] != "ok":
                found.append([case, name, str(row["status"]).split(":")[0], "", "", ""])
                continue
            floor, eager = group.get(_PRODUCTS), group.get(TRUTH)
            share = of_logits(row)
            found.append(
                [
                    case,
                    name,
                    f"{row['ms']:.4g} ms",
                    f"{results.speedup(row, eager):.2f}x" if eager and eager["status"] == "ok" else "",
                    f"{1 / results.speedup(row, floor):.2f}" if floor and floor["status"] == "ok" else "",
                    "" if share is None else f"{100 * share:.1f}",
                ]
            )
    return found

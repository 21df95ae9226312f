"""The results of a run as rows: kept as CSV to read and JSON to work with, one row per case, direction and provider."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
# What makes a row of each table one row: a new figure replaces the one with the same key.
KEYS = {
    "timings": ("op", "case", "direction", "provider", "threads", "isa", "allocator", "device"),
    "accuracy": ("op", "case", "layout", "dtype", "quantity", "provider", "isa", "device"),
    "install": ("quantity",),
    "rivals": ("rival", "device"),
}
Tables = dict[str, list[Row]]


def merge(old: list[Row], new: list[Row], key: tuple[str, ...]) -> list[Row]:
    """The old rows with the new ones in place of those of the same key, the others kept.

    A run that did not weigh (``--no-memory``) keeps what was weighed before, and the commit that was.
    """
    merged = {tuple(row[k] for k in key): row for row in old}
    for row in new:
        place = tuple(row[k] for k in key)
        before = merged.get(place, {})
        if row.get("extra_bytes") is None and before.get("extra_bytes") is not None and row.get("status") == "ok":
            at = before.get("weighed_at", before.get("commit"))
            row = {**row, "extra_bytes": before["extra_bytes"], "weighed_at": at}
        merged[place] = row
    return list(merged.values())


def load(path: Path) -> Tables:
    """The tables of one JSON file; empty ones where there is no such file."""
    empty: Tables = {name: [] for name in KEYS}
    if not path.exists():
        return empty
    return {**empty, **json.loads(path.read_text(encoding="utf-8"))}


def save(folder: Path, suite: str, tables: Tables) -> list[Path]:
    """Merges the tables into <folder>/<suite>.json and writes each also as <suite>-<table>.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    kept = load(path)
    if tables.get("install"):
        kept["install"] = []  # one measurement of one build: a failure of an earlier one is no part of it
    merged = {name: merge(kept[name], tables.get(name, []), key) for name, key in KEYS.items()}
    path.write_text(_dump(merged), encoding="utf-8")
    written = [path]
    for name, rows in merged.items():
        if rows:
            written.append(folder / f"{suite}-{name}.csv")
            _write_csv(written[-1], rows)
    return written


def _dump(tables: Tables) -> str:
    """JSON with one row a line, so that a diff shows which figures changed."""
    parts = []
    for name, rows in tables.items():
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        parts.append(f' "{name}": [\n  {lines}\n ]' if rows else f' "{name}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _write_csv(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "samples_ms"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def speedup(ours: Row, rival: Row) -> float:
    """Median over the rounds of rival / ours; of the medians where the two were not measured in the same rounds."""
    a, b = ours.get("samples_ms") or [], rival.get("samples_ms") or []
    if a and len(a) == len(b) and ours.get("run") == rival.get("run"):
        return statistics.median(theirs / mine for mine, theirs in zip(a, b, strict=True))
    return float(rival["ms"]) / float(ours["ms"])


def best(folder: Path) -> tuple[str, Tables] | None:
    """What is known of a machine: the full suite's rows, and the quick one's for what the full one has not run."""
    found = {
        suite: load(folder / f"{suite}.json") for suite in ("full", "quick") if (folder / f"{suite}.json").exists()
    }
    if len(found) < 2:
        return next(iter(found.items()), None)
    return "quick and full", _merged(found["full"], found["quick"])


def _merged(full: Tables, quick: Tables) -> Tables:
    """``full``, with the rows of ``quick`` for each case and sweep that it has not, and for rivals that did not run."""

    def what(row: Row) -> tuple[object, ...]:
        return row["op"], row["part"], row["allocator"], None if row["part"] == "sweep" else row["case"]

    done = {what(r) for r in full["timings"]}
    merged = {name: rows or quick.get(name, []) for name, rows in {**quick, **full}.items()}
    merged["timings"] = full["timings"] + [r for r in quick["timings"] if what(r) not in done]
    ran = {r["rival"]: r for r in full["rivals"] + [r for r in quick["rivals"] if r["status"] == "ran"]}
    merged["rivals"] = list(ran.values())
    return merged


def machines(root: Path = RESULTS) -> list[Path]:
    """The folders that hold results."""
    return sorted(p for p in root.iterdir() if best(p) is not None) if root.exists() else []

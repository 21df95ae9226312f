"""The results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import targets
from .results import Row
from .tables import TARGET_FIGURES, accuracy_pairs, count_targets, mebibytes, milliseconds, target_figures


def print_timings(rows: list[Row], console: Console) -> None:
    """One table per op."""
    for op in dict.fromkeys(row["op"] for row in rows):
        table = Table(title=str(op), title_justify="left")
        for column in ("case", "direction", "threads", "provider"):
            table.add_column(column)
        for column in ("median", "p20", "p80", "vs eager", "GB/s", "of copy", "extra MiB"):
            table.add_column(column, justify="right")
        last: tuple[object, ...] = ()
        for row in (r for r in rows if r["op"] == op):
            key = (row["case"], row["direction"], row["threads"])
            if last and key != last:
                table.add_section()
            head = [str(k) for k in key] if key != last else ["", "", ""]
            last = key
            table.add_row(*head, row["provider"], *_timing_cells(row))
        console.print(table)


def _timing_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [f"[yellow]{escape(row['status'])}", "", "", "", "", "", ""]
    gb, part = row.get("gb_per_s"), row.get("copy_fraction")
    return [
        milliseconds(row["ms"]),
        milliseconds(row["p20_ms"]),
        milliseconds(row["p80_ms"]),
        f"{row['speedup_vs_eager']:.2f}x" if "speedup_vs_eager" in row else "",
        f"{gb:.1f}" if gb else "",
        f"{part:.0%}" if part else "",
        mebibytes(row.get("extra_bytes")),
    ]


def print_accuracy(rows: list[Row], console: Console) -> None:
    """Ours beside eager's."""
    if rows:
        columns = ("op", "case", "layout", "dtype", "quantity", "eager max ulp", "ours", "eager rel. error", "ours ")
        print_plain("Accuracy", [dict(zip(columns, r, strict=True)) for r in accuracy_pairs(rows)], columns, console)


def print_plain(title: str, rows: list[Row], columns: Sequence[str], console: Console) -> None:
    """Rows as they are."""
    if not rows:
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(str(row.get(column, ""))) for column in columns))
    console.print(table)


def print_targets(found: list[targets.Verdict], console: Console) -> None:
    """Every target: reached, missed or why there is no figure."""
    colours = {"reached": "green", "missed": "red"}
    columns = ("op", "case", "direction", "what", *TARGET_FIGURES, "wanted", "status")
    table = Table(*columns, title="Targets", title_justify="left")
    for v in found:
        colour = colours.get(v.status, "yellow")
        table.add_row(v.op, v.case, v.direction, v.what, *target_figures(v), v.wanted, f"[{colour}]{escape(v.status)}")
    console.print(table)
    console.print(count_targets(found))

"""Tables of what was measured on a GPU: every provider's time, and how near ours is to a copy's rate."""

from __future__ import annotations

from . import results
from .harness import COPY, OURS
from .results import Row, Tables

Line = list[object]


def is_gpu(tables: Tables) -> bool:
    """Whether the rows were measured on one."""
    return any(row["device"] == "cuda" for row in tables["timings"])


def speed(tables: Tables, op: str) -> tuple[list[str], list[Line]]:
    """Columns and lines: milliseconds of each provider, ours against the fastest other one, and of a copy's rate."""
    rows = [r for r in tables["timings"] if r["op"] == op and r["part"] == "micro"]
    names = [n for n in dict.fromkeys(r["provider"] for r in rows if r["status"] == "ok") if n != COPY]
    others = [n for n in names if not n.startswith(OURS) and n != "three products"]
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["direction"]), {})[row["provider"]] = row
    lines = []
    for (case, direction), group in groups.items():
        done = {name: row for name, row in group.items() if row["status"] == "ok"}
        line: Line = [case, direction, *(f"{done[n]['ms']:.4g}" if n in done else "" for n in names)]
        ours = done.get(OURS)
        ratios = [results.speedup(ours, done[n]) for n in others if n in done] if ours else []
        fraction = ours.get("copy_fraction") if ours else None
        line += [f"{min(ratios):.2f}x" if ratios else "", f"{fraction:.0%}" if fraction else ""]
        lines.append(line)
    return ["case", "direction", *(f"{n}, ms" for n in names), "vs the fastest rival", "of a copy's rate"], lines


SUMMARY = (
    ("cross_entropy", "16384x4096 bfloat16"),
    ("cross_entropy", "8192x32000 bfloat16"),
    ("cross_entropy", "4096x128256 bfloat16"),
    ("batch_norm", "128x64x56x56 bfloat16"),
    ("batch_norm", "128x64x56x56 bfloat16 channels_last"),
    ("batch_norm", "128x64x56x56 bfloat16 channels_last + add + relu"),
)


def summary(tables: Tables) -> tuple[list[str], list[Line]]:
    """Columns and lines of the README: forward and backward together, with the fastest other provider named."""
    rows = [r for r in tables["timings"] if r["direction"] == "both" and r["status"] == "ok"]
    index = {(r["op"], r["case"], r["provider"]): r for r in rows}
    lines: list[Line] = []
    for op, case in SUMMARY:
        eager, ours = index.get((op, case, "eager")), index.get((op, case, OURS))
        others = [r for (o, c, p), r in index.items() if (o, c) == (op, case) and not p.startswith(OURS) and p != COPY]
        if eager is None or ours is None:
            continue
        best = min(others, key=lambda r: float(r["ms"]))
        line: Line = [f"{op} {case}", f"{eager['ms']:.3g} ms", f"{best['ms']:.3g} ms ({best['provider']})"]
        line += [f"{ours['ms']:.3g} ms", f"{results.speedup(ours, eager):.2f}x", f"{results.speedup(ours, best):.2f}x"]
        lines.append(line)
    columns = ["forward + backward", "eager", "the fastest other", "fused_ops", "vs eager", "vs the fastest other"]
    return columns, lines


def memory(tables: Tables) -> tuple[list[str], list[Line]]:
    """Columns and lines: peak memory beyond the inputs in MiB, forward and backward together."""
    rows = [r for r in tables["timings"] if r.get("extra_bytes") is not None and r["direction"] == "both"]
    names = list(dict.fromkeys(r["provider"] for r in rows))
    cells = {(f"{r['op']}, {r['case']}", r["provider"]): f"{r['extra_bytes'] / 2**20:.0f}" for r in rows}
    cases = dict.fromkeys(case for case, _ in cells)
    return ["case", *names], [[case, *(cells.get((case, n), "") for n in names)] for case in cases]

"""Tables of the results in the docs, between markers; a test fails when those are stale."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import gpu_tables, heads, pages, results, rivals, targets
from .harness import COMPILE, OURS, TRUTH
from .machine import ALLOCATORS, ROOT
from .results import Row, Tables

IN_PLACE = f"{OURS} in place"
NO_FIGURES = "No figures yet.\n"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{n}.md" for n in ("performance", "linear_cross_entropy", "cuda")))
_MARKER = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks:\2 -->)", re.DOTALL)


def milliseconds(value: object) -> str:
    """Three significant digits; microseconds below a tenth of a millisecond."""
    ms = float(str(value))
    return f"{ms * 1e3:.3g} us" if ms < 0.1 else f"{ms:.4g} ms" if ms >= 100 else f"{ms:.3g} ms"


def mebibytes(value: object) -> str:
    return "" if value is None else f"{float(str(value)) / 2**20:.1f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    if not rows:
        return NO_FIGURES
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def by_default(rows: list[Row]) -> list[Row]:
    """The rows measured with the C library's own choice of memory, which all tables but one are about."""
    return [row for row in rows if row["allocator"] == "default"]


def recycled(rows: list[Row]) -> list[Row]:
    """Those with recycled memory: no page is touched for the first time, of which eager's many tensors gain most."""
    return [row for row in rows if row["allocator"] == "recycled"]


def most_threads(rows: list[Row]) -> list[Row]:
    """Rows with the most threads; of tiny calls those with one, where waking a second is not most of the time."""
    most = max((int(row["threads"]) for row in rows), default=1)
    return [row for row in rows if row["threads"] == (1 if row["tiny"] else most)]


def _grouped(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, direction) -> provider -> row."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["direction"]), {})[row["provider"]] = row
    return groups


def _ratio(group: dict[str, Row], provider: str, rival: str) -> str:
    row, other = group.get(provider), group.get(rival)
    if row is None or other is None:
        return ""
    if row["status"] != "ok" or other["status"] != "ok":
        reason = row["status"] if row["status"] != "ok" else other["status"]
        return str(reason).split(":")[0]
    return f"{results.speedup(row, other):.2f}x"


def _ms(group: dict[str, Row], provider: str) -> str:
    row = group.get(provider)
    return milliseconds(row["ms"]) if row and row["status"] == "ok" else ""


def speed_table(tables: Tables, op: str, part: str, directions: Sequence[str]) -> str:
    """Times of eager and ours and the ratios, at the most threads."""
    rows = [r for r in tables["timings"] if r["op"] == op and r["part"] == part and r["direction"] in directions]
    groups, again = _grouped(most_threads(by_default(rows))), _grouped(most_threads(recycled(rows)))
    extra = [p for p in (IN_PLACE, f"{OURS} + compile", "jax") if any(p in g for g in groups.values())]
    columns = ["case", "direction", "eager", "fused_ops", "spread p20..p80", "vs eager", "vs torch.compile"]
    columns += [f"{p} vs eager" for p in extra] + ["recycled: vs eager"] * bool(again) + ["GB/s", "of copy"]
    lines = []
    for (case, direction), group in groups.items():
        ours = group.get(OURS)
        good = ours if ours and ours["status"] == "ok" else None
        spread = f"{milliseconds(good['p20_ms'])} .. {milliseconds(good['p80_ms'])}" if good else ""
        line = [case, direction, _ms(group, TRUTH), _ms(group, OURS), spread]
        line += [_ratio(group, OURS, TRUTH), _ratio(group, OURS, COMPILE)]
        line += [_ratio(group, p, TRUTH) for p in extra]
        line += [_ratio(again.get((case, direction), {}), OURS, TRUTH)] * bool(again)
        gb, fraction = (good.get("gb_per_s"), good.get("copy_fraction")) if good else (None, None)
        lines.append([*line, f"{gb:.1f}" if gb else "", f"{fraction:.0%}" if fraction else ""])
    return markdown(columns, lines)


def memory_table(tables: Tables) -> str:
    """Peak extra memory in MiB, every provider that was weighed."""
    rows = [r for r in tables["timings"] if r.get("extra_bytes") is not None and r["part"] != "sweep"]
    providers = [p for p in (TRUTH, COMPILE, OURS, IN_PLACE) if any(r["provider"] == p for r in rows)]
    lines = []
    for op in dict.fromkeys(r["op"] for r in rows):
        for (case, direction), group in _grouped([r for r in rows if r["op"] == op]).items():
            size = next(iter(group.values()))["input_bytes"]
            cells = [mebibytes(group[p]["extra_bytes"]) if p in group else "" for p in providers]
            lines.append([f"{op}, {case}", direction, mebibytes(size), *cells])
    return markdown(["case", "direction", "input MiB", *providers], lines)


def accuracy_pairs(rows: list[Row]) -> list[list[object]]:
    """The errors of eager and ours, one line a quantity."""
    pairs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], row["case"], row["layout"], row["dtype"], row["quantity"])
        pairs.setdefault(key, {})[row["provider"]] = row
    return [
        [
            *key,
            *(f"{p[provider][figure]:.3g}" for figure in ("max_ulp", "relative_error") for provider in (TRUTH, OURS)),
        ]
        for key, p in pairs.items()
    ]


def accuracy_table(tables: Tables) -> str:
    """Errors of eager and ours."""
    columns = ["op", "input", "layout", "dtype", "quantity", "eager max ulp", "ours max ulp", "eager rel.", "ours rel."]
    return markdown(columns, accuracy_pairs(tables["accuracy"]))


def threads_table(tables: Tables) -> str:
    """Time with one thread over the time with n, ours and eager's."""
    rows = [r for r in tables["timings"] if r["status"] == "ok" and r["direction"] == "both"]
    index = {(r["op"], r["case"], r["provider"], r["threads"]): r["ms"] for r in rows}
    lines = []
    for op, case, provider, threads in index:
        if provider != OURS or threads == 1 or (op, case, OURS, 1) not in index:
            continue
        gains = [index[op, case, p, 1] / index[op, case, p, threads] for p in (OURS, TRUTH)]
        one = milliseconds(index[op, case, OURS, 1])
        lines.append([f"{op}, {case}", threads, one, *(f"{gain:.2f}x" for gain in gains)])
    return markdown(["case", "threads", "fused_ops, 1 thread", "gain of fused_ops", "gain of eager"], lines)


def allocator_table(tables: Tables) -> str:
    """The same cases with newly mapped and with recycled memory."""
    rows = most_threads([r for r in tables["timings"] if r["direction"] == "both"])
    index = {(r["op"], r["case"], r["allocator"], r["provider"]): r for r in rows if r["status"] == "ok"}
    lines = []
    for op, case in dict.fromkeys((r["op"], r["case"]) for r in rows if r["allocator"] != "default"):
        line = [f"{op}, {case}"]
        for allocator in ALLOCATORS:
            eager, ours = (index.get((op, case, allocator, p)) for p in (TRUTH, OURS))
            line += [milliseconds(eager["ms"]) if eager else "", milliseconds(ours["ms"]) if ours else ""]
            line.append(f"{results.speedup(ours, eager):.2f}x" if ours and eager else "")
        lines.append(line)
    columns = [f"{allocator}: {word}" for allocator in ALLOCATORS for word in ("eager", "fused_ops", "ratio")]
    return markdown(["case", *columns], lines)


def pages_table(tables: Tables) -> str:
    """The same runs with and without huge pages."""
    rows = most_threads([r for r in tables["timings"] if r["part"] == pages.PART])
    columns = ["case", "direction", "eager", "small pages", "huge pages", "gain", "small vs eager", "huge vs eager"]
    lines = []
    for (case, direction), group in _grouped(rows).items():
        line = [case.removesuffix(" pages"), direction, *(_ms(group, p) for p in (TRUTH, pages.WITHOUT, OURS))]
        pairs = ((OURS, pages.WITHOUT), (pages.WITHOUT, TRUTH), (OURS, TRUTH))
        lines.append([*line, *(_ratio(group, *pair) for pair in pairs)])
    return markdown(columns, lines)


def record(tables: Tables) -> str:
    """How often ours is faster, and every case where a rival is."""
    timed = [r for r in tables["timings"] if r["part"] not in ("sweep", pages.PART)]
    rows = most_threads([r for r in timed if r["direction"] in ("both", "step")])
    rows += most_threads([r for r in tables["timings"] if r["case"].endswith(" eval")])
    text, lost = [], []
    for op in dict.fromkeys(r["op"] for r in rows):
        groups = _grouped([r for r in rows if r["op"] == op])
        for rival in (TRUTH, COMPILE, "F.linear_cross_entropy", *rivals.OPTIONAL):
            ratios = []
            for (case, direction), group in groups.items():
                ours, other = group.get(OURS), group.get(rival)
                if ours and other and ours["status"] == other["status"] == "ok":
                    ratios.append(results.speedup(ours, other))
                    if ratios[-1] < 1:
                        figures = (milliseconds(other["ms"]), milliseconds(ours["ms"]), f"{ratios[-1]:.2f}x")
                        lost.append((ratios[-1], [f"{op}, {case}", direction, rival, *figures]))
            if ratios:
                won, middle = sum(r >= 1 for r in ratios), statistics.median(ratios)
                text.append(f"- {op} vs {rival}: faster in {won} of {len(ratios)} cases, median {middle:.2f}x")
    lines = [line for _, line in sorted(lost, key=lambda pair: pair[0])]
    table = markdown(["where a rival is faster", "direction", "rival", "rival's time", "fused_ops", "ratio"], lines)
    return "\n".join(text) + "\n\n" + (table if lines else "No rival is faster in any case.\n")


TARGET_FIGURES = ("found", *ALLOCATORS[1:], "bytes allow", "arithmetic allows")


def target_figures(v: targets.Verdict) -> list[str]:
    """Two digits each, nothing where there is no figure."""
    found = [v.found, *(v.elsewhere.get(a) for a in ALLOCATORS[1:]), v.by_bytes, v.in_cache]
    return ["" if figure is None else f"{figure:.2f}" for figure in found]


def count_targets(found: list[targets.Verdict]) -> str:
    """How many are reached."""
    reached = sum(v.status == "reached" for v in found)
    missed = sum(v.status == "missed" for v in found)
    return f"{len(found)} targets: {reached} reached, {missed} missed, {len(found) - reached - missed} without a figure"


def targets_table(tables: Tables) -> str:
    """Every target, then the count."""
    found = targets.verdicts(tables["timings"])
    columns = ["case", "direction", "what", *TARGET_FIGURES, "wanted", "status"]
    lines = [[f"{v.op}, {v.case}", v.direction, v.what, *target_figures(v), v.wanted, v.status] for v in found]
    return markdown(columns, lines) + f"\n{count_targets(found)}.\n"


def conditions_table(tables: Tables) -> str:
    """What the figures were measured with."""
    rows = tables["timings"] + tables["accuracy"]
    columns = ("machine", "isa", "torch", "python", "omp_wait_policy", "commit", "load_before")
    lines = [(c, ", ".join(sorted({str(r[c]) for r in rows}))) for c in columns]
    busy = [float(r["busy_others"]) for r in tables["timings"] if r.get("busy_others") is not None]
    if busy:
        lines.append(
            ("cores busy with other processes, mean and worst", f"{sum(busy) / len(busy):.2f}, {max(busy):.2f}")
        )
    return markdown(["", "value"], lines)


def plots(tables: Tables, folder: Path) -> str:
    """The PNGs of the machine."""
    found = sorted((folder / "plots").glob("*.png"))
    lines = [f"![{p.stem.replace('_', ' ')}](../{p.relative_to(ROOT).as_posix()})\n" for p in found]
    return "\n".join(lines) or NO_FIGURES


def _with_recycled(rows: list[Row]) -> Iterator[tuple[str, dict[str, Row], dict[str, Row]]]:
    """ "op case" of each, its providers with the C library's own choice of memory, and those with recycled memory."""
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        again = _grouped(most_threads(recycled(mine)))
        for key, group in _grouped(most_threads(by_default(mine))).items():
            yield f"{op} {key[0]}", group, again.get(key, {})


def summary(tables: Tables) -> str:
    """The few lines for the README: ratios of the quick cases."""
    rows = [r for r in _summarised(tables) if r["part"] in ("micro", "overhead")]
    lines = []
    for case, group, again in _with_recycled(rows):
        if OURS in group and group[OURS]["status"] == "ok":
            line = [case, _ms(group, TRUTH), _ms(group, OURS)]
            lines.append([*line, *(_ratio(g, OURS, rival) for g in (group, again) for rival in (TRUTH, COMPILE))])
    columns = ["forward + backward", "eager", "fused_ops", "vs eager", "vs torch.compile"]
    return markdown([*columns, "recycled memory: vs eager", "vs torch.compile "], lines)


def _summarised(tables: Tables) -> list[Row]:
    return [r for r in tables["timings"] if r["direction"] == "both" and r["case"] in SUMMARY]


def instruction_sets(machines: Sequence[Tables]) -> str:
    """The same cases against eager on each machine, with the C library's own choice of memory and with recycled one."""
    columns, found = ["forward + backward, eager / fused_ops"], {}
    for known in machines:
        rows = [r for r in _summarised(known) if r["part"] == "micro"]
        if not recycled(rows):
            continue
        columns += [f"{rows[0]['isa']}", f"{rows[0]['isa']}, recycled memory"]
        for case, *groups in _with_recycled(rows):
            found.setdefault(case, []).extend(_ratio(g, OURS, TRUTH) for g in groups)
    return markdown(columns, [[case, *ratios] for case, ratios in found.items() if len(ratios) == len(columns) - 1])


def models_table(tables: Tables) -> str:
    """Time and peak memory of a training step, before and after convert."""
    groups = _grouped(most_threads([r for r in tables["timings"] if r["op"] == "models"]))
    columns = ["model", "batch", "step, before", "after", "ratio", "peak MiB, before", "after"]
    lines = []
    for (case, _), group in groups.items():
        before, after = group.get(TRUTH), group.get(OURS)
        if before and after:
            weighed = [mebibytes(row.get("extra_bytes")) for row in (before, after)]
            line = [case, before["shape"], _ms(group, TRUTH), _ms(group, OURS), _ratio(group, OURS, TRUTH)]
            lines.append([*line, *weighed])
    return markdown(columns, lines)


SUMMARY = (
    "1024x32000 float32",
    "1024x32000 bfloat16",
    "8192x1000 float32",
    "65536x27 float32",
    "16x21x256x256 float32",
    "32x27 float32",
    "32x64x56x56 float32",
    "32x64x56x56 float32 channels_last",
    "65536x256 float32",
    "32x64 float32",
)

SECTIONS: dict[str, Callable[[Tables, Path], str]] = {
    "summary": lambda t, f: summary(t),
    "conditions": lambda t, f: conditions_table(t),
    "cross_entropy": lambda t, f: speed_table(t, "cross_entropy", "micro", ("forward", "backward", "both")),
    "batch_norm": lambda t, f: speed_table(t, "batch_norm", "micro", ("forward", "backward", "both")),
    "cross_entropy_overhead": lambda t, f: speed_table(t, "cross_entropy", "overhead", ("forward", "both")),
    "batch_norm_overhead": lambda t, f: speed_table(t, "batch_norm", "overhead", ("forward", "both")),
    "heads": lambda t, f: markdown(heads.COLUMNS, heads.lines(most_threads(t["timings"]))),
    "training": lambda t, f: speed_table(t, "training", "training", ("step",)),
    "models": lambda t, f: models_table(t),
    "threads": lambda t, f: threads_table(t),
    "memory": lambda t, f: memory_table(t),
    "accuracy": lambda t, f: accuracy_table(t),
    "install": lambda t, f: markdown(("what", "value", "unit"), _cells(t, "install", ("quantity", "value", "unit"))),
    "rivals": lambda t, f: markdown(
        ("rival", "version", "status"), _cells(t, "rivals", ("rival", "version", "status"))
    ),
    "targets": lambda t, f: targets_table(t),
    "allocator": lambda t, f: allocator_table(t),
    "huge_pages": lambda t, f: pages_table(t),
    "record": lambda t, f: record(t),
    "plots": plots,
}
GPU_SECTIONS: dict[str, Callable[[Tables, Path], str]] = {
    "gpu_summary": lambda t, f: markdown(*gpu_tables.summary(t)),
    "gpu_conditions": SECTIONS["conditions"],
    "gpu_cross_entropy": lambda t, f: markdown(*gpu_tables.speed(t, "cross_entropy")),
    "gpu_linear_cross_entropy": lambda t, f: markdown(*gpu_tables.speed(t, "linear_cross_entropy")),
    "gpu_batch_norm": lambda t, f: markdown(*gpu_tables.speed(t, "batch_norm")),
    "gpu_memory": lambda t, f: markdown(*gpu_tables.memory(t)),
    "gpu_targets": SECTIONS["targets"],
    "gpu_rivals": SECTIONS["rivals"],
}
OF_ALLOCATORS = ("allocator", "targets", "summary", "cross_entropy", "batch_norm")  # the others take the default's rows
ALL_SECTIONS = {**SECTIONS, **GPU_SECTIONS}


def _cells(tables: Tables, name: str, columns: Sequence[str]) -> list[list[object]]:
    return [[row[c] for c in columns] for row in tables[name]]


def render(page: str, folders: Sequence[Path]) -> str:
    """The page with what stands between each pair of markers made anew, from the results of every machine."""

    def section(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        on_gpu = name in GPU_SECTIONS
        if name == "instruction_sets":
            everywhere = [best[1] for best in map(results.best, folders) if best and not gpu_tables.is_gpu(best[1])]
            return f"{opening}\n{instruction_sets(everywhere)}\n{closing}"
        make = ALL_SECTIONS.get(name)
        if make is None:
            raise KeyError(f"unknown section benchmarks:{name}, expected one of {', '.join(ALL_SECTIONS)}")
        known = [(folder, results.best(folder)) for folder in folders]
        mine = [(folder, *best) for folder, best in known if best is not None and gpu_tables.is_gpu(best[1]) == on_gpu]
        parts: list[tuple[str, str]] = []
        for folder, suite, found in mine:
            if name not in OF_ALLOCATORS:
                found = {**found, "timings": by_default(found["timings"])}
            title = f"*{folder.name}, {suite} suite*\n\n" if len(mine) > 1 or "conditions" in name else ""
            parts.append((title, make(found, folder)))
        known_parts = [part for part in parts if part[1] != NO_FIGURES] or parts[:1]
        return f"{opening}\n" + "\n".join(title + table for title, table in known_parts) + f"\n{closing}"

    return _MARKER.sub(section, page)


def write_all() -> None:
    """Brings every page up to date."""
    for page in PAGES:
        if page.exists():
            page.write_text(render(page.read_text(encoding="utf-8"), results.machines()), encoding="utf-8")

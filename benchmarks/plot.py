"""The plots of one machine's results, as PNG files in <folder>/plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from . import heads, pages, results
from .harness import COMPILE, COPY, OURS, TRUTH
from .results import Row, Tables
from .tables import IN_PLACE, by_default, most_threads

# Colours that colour-blind readers tell apart (Okabe and Ito's), for what is in one figure together.
COLOURS = {
    TRUTH: "#999999",
    COMPILE: "#e69f00",
    "jax": "#882255",
    OURS: "#0072b2",
    IN_PLACE: "#009e73",
    f"{OURS} in 3 %": "#56b4e9",
    f"{OURS} + compile": "#123f66",
    "F.linear_cross_entropy": "#d55e00",
    "cut-cross-entropy": "#f0e442",
    "liger-kernel": "#cc79a7",
    "flash-attn": "#882255",
    "quack-kernels": "#117733",
    "apex": "#8c7a5b",
    COPY: "#000000",
}
_LINE = "#444444"  # of what bars are compared with
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 140,
}


def draw_all(folder: Path) -> list[Path]:
    """Draws what the results of the folder allow; returns the files."""
    best = results.best(folder)
    if best is None:
        return []
    tables = best[1]
    (folder / "plots").mkdir(exist_ok=True)
    drawn = []
    with plt.rc_context(_STYLE):
        for name, draw in _plots(tables).items():
            figure = draw()
            if figure is None:
                continue
            drawn.append(folder / "plots" / f"{name}.png")
            # Without the version in the file, equal figures are equal files.
            figure.savefig(drawn[-1], bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
    return drawn


def _plots(tables: Tables) -> dict[str, Callable[[], Figure | None]]:
    timings = by_default(tables["timings"])
    found: dict[str, Callable[[], Figure | None]] = {}
    for op in ("cross_entropy", "linear_cross_entropy", "batch_norm", "training"):
        found[f"speedup_{op}"] = lambda op=op: speedup_bars(timings, op)
    for op, sweep in dict.fromkeys((r["op"], r["sweep"]) for r in timings if r["sweep"]):
        found[f"sweep_{op}_{sweep.replace(' ', '_')}"] = lambda op=op, sweep=sweep: sweep_lines(timings, op, sweep)
    found["models"] = lambda: model_bars(timings)
    found["memory"] = lambda: memory_bars(timings)
    found["memory_linear_cross_entropy"] = lambda: head_memory(timings)
    found["accuracy"] = lambda: error_chart(tables["accuracy"])
    return found


# ---- speed-up bars ----


def speedup_bars(timings: list[Row], op: str) -> Figure | None:
    """Horizontal bars of the speed-up over eager, the largest of ours first."""
    mine = [r for r in timings if r["op"] == op and r["part"] != pages.PART]
    rows = [r for r in mine if not r["sweep"] and r["direction"] in ("both", "step")]
    rows += [r for r in mine if r["case"].endswith(" eval")]
    most = max((r["threads"] for r in rows), default=1)
    rows = [r for r in most_threads(rows) if r["provider"] != COPY]
    index = {(r["case"], r["provider"]): r for r in rows}
    names = sorted({r["case"]: 0 for r in rows}, key=lambda name: -index.get((name, OURS), {}).get(_RATIO, 0))
    providers = [p for p in COLOURS if p != TRUTH and any(r["provider"] == p and r["status"] == "ok" for r in rows)]
    if not names or not providers:
        return None
    step = len(providers) + 0.8
    figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.165 * step * len(names)))
    for i, name in enumerate(names):
        for j, provider in enumerate(providers):
            _bar(axes, i * step + j, index.get((name, provider)), provider)
    axes.axvline(1, color=_LINE, lw=1.2, zorder=2)
    axes.set_yticks([i * step + (len(providers) - 1) / 2 for i in range(len(names))], names, fontsize=8)
    axes.set_ylim(len(names) * step - 0.6, -0.9)
    _speed_axis(axes, [r[_RATIO] for r in rows if _RATIO in r])
    axes.grid(axis="y", visible=False)
    what = "one training step" if op == "training" else "forward + backward (eval: forward)"
    where = f"{what}, {most} threads (1 where it takes microseconds)"
    axes.set_title(f"{op.replace('_', ' ')}: how many times faster than eager\n{where}")
    _legend(figure, {p: COLOURS[p] for p in providers})
    return figure


_RATIO = "speedup_vs_eager"


def _bar(axes: Axes, y: float, row: Row | None, provider: str) -> None:
    if row is None:
        return
    if row["status"] != "ok" or _RATIO not in row:
        text = f" {provider}: {str(row['status']).split(':')[0]}"
        axes.text(1, y, text, va="center", fontsize=6.5, color="#777777")
        return
    value = row[_RATIO]
    axes.barh(y, value - 1, left=1, height=0.86, color=COLOURS[provider])
    text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    axes.text(value, y, f" {text} ", va="center", fontsize=6.5, ha="left" if value >= 1 else "right")


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    """Under the figure, what its colours are."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncol=4)


def _speed_axis(axes: Axes, values: list[float]) -> None:
    axes.set_xscale("log")
    low, high = min([*values, 0.8]) / 1.35, max([*values, 2.0]) * 1.25
    axes.set_xlim(low, high)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50) if low <= t <= high]
    axes.set_xticks(ticks, ["eager" if t == 1 else f"{t:g}x" for t in ticks])
    axes.minorticks_off()


# ---- sweeps ----


def sweep_lines(timings: list[Row], op: str, sweep: str) -> Figure | None:
    """Time per element and peak memory against size, with the copy's line where moving bytes is most of the work."""
    rows = [r for r in timings if (r["op"], r["sweep"], r["status"]) == (op, sweep, "ok")]
    if op == "linear_cross_entropy":  # its products are: a copy's line far below would squeeze all others into one
        rows = [r for r in rows if r["provider"] != COPY]
    if len({r["size"] for r in rows}) < 2:
        return None
    heavy = any(r.get("extra_bytes") is not None for r in rows)
    figure, columns = plt.subplots(1, 2 if heavy else 1, figsize=(10.5 if heavy else 6.4, 3.8), squeeze=False)
    left = columns[0][0]
    for provider in _order(rows):
        mine = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["size"])
        sizes = [r["size"] for r in mine]
        elements = [math.prod(int(n) for n in r["shape"].split("x")) for r in mine]

        def per_element(key: str, mine: list[Row] = mine, elements: list[int] = elements) -> list[float]:
            return [r[key] * 1e6 / n for r, n in zip(mine, elements, strict=True)]

        style = "--" if provider == COPY else "-"
        left.plot(sizes, per_element("ms"), style, marker="o", ms=3.5, color=COLOURS[provider], label=provider)
        left.fill_between(
            sizes, per_element("p20_ms"), per_element("p80_ms"), color=COLOURS[provider], alpha=0.15, lw=0
        )
    word, dtype = re.fullmatch(r"(.*?)((?: b?float\d+)?)", sweep).groups()
    _log_log(left, word, "ns per element (median, band p20 to p80)")
    left.set_title(f"{op.replace('_', ' ')}{dtype}: time of forward + backward")
    if heavy:
        _memory_lines(columns[0][1], rows, word)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure


def _memory_lines(axes: Axes, rows: list[Row], word: str) -> None:
    for provider in _order(rows):
        mine = [r for r in rows if r["provider"] == provider and r.get("extra_bytes") is not None]
        mine.sort(key=lambda r: r["size"])
        if mine:
            ratios = [r["extra_bytes"] / r["input_bytes"] for r in mine]
            axes.plot([r["size"] for r in mine], ratios, "-o", ms=3.5, color=COLOURS[provider], label=provider)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(word)
    axes.set_ylabel("peak extra memory / input")
    axes.set_title("memory")


def _log_log(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.9g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _order(rows: list[Row]) -> list[str]:
    return [p for p in COLOURS if any(r["provider"] == p for r in rows)]


# ---- models ----


def model_bars(timings: list[Row]) -> Figure | None:
    """A training step of each model before and after ``convert``: its peak memory, and its time."""
    rows = most_threads([r for r in timings if r["op"] == "models" and r["provider"] in (TRUTH, OURS)])
    names = list(dict.fromkeys(r["case"] for r in rows if r["status"] == "ok" and r["provider"] == OURS))
    if not names:
        return None
    index = {(r["case"], r["provider"]): r for r in rows}
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 1.1 + 0.5 * len(names)), sharey=True)
    for axes, key, scale, title in zip(panels, ("extra_bytes", "ms"), (2**20, 1), _MODEL_TITLES, strict=True):
        for i, name in enumerate(names):
            before, after = (index[name, provider][key] / scale for provider in (TRUTH, OURS))
            axes.barh(i - 0.2, before, 0.38, color="#b9bec4")
            axes.barh(i + 0.2, after, 0.38, color=COLOURS[OURS])
            axes.text(before, i - 0.2, f" {before:.0f}", va="center", fontsize=8, color="#555555")
            axes.text(after, i + 0.2, f" {after:.0f}", va="center", fontsize=8, color=COLOURS[OURS], weight="bold")
        axes.set_title(title)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.12)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    _legend(figure, {"PyTorch": "#b9bec4", "after fused_ops.convert(model, loss=criterion)": COLOURS[OURS]})
    return figure


_MODEL_TITLES = ("peak memory of a training step, MiB", "time of a training step, ms")

# ---- memory and errors ----


def memory_bars(timings: list[Row]) -> Figure | None:
    """Peak extra memory over the size of the input, forward + backward (or one step)."""
    rows = [r for r in timings if r.get("extra_bytes") is not None and r["direction"] != "forward" and not r["sweep"]]
    rows = [
        r for r in rows if r["op"] not in ("training", "models", "linear_cross_entropy")
    ]  # not in their inputs' sizes
    names = list(dict.fromkeys((r["op"], r["case"]) for r in rows))
    providers = [p for p in _order(rows) if p != COPY]
    if not names:
        return None
    index = {(r["op"], r["case"], r["provider"]): r for r in rows}
    step = len(providers) + 0.8
    figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.165 * step * len(names)))
    for i, name in enumerate(names):
        for j, provider in enumerate(providers):
            row = index.get((*name, provider))
            if row is not None:
                value = row["extra_bytes"] / row["input_bytes"]
                axes.barh(i * step + j, value, height=0.86, color=COLOURS[provider])
                axes.text(value + 0.03, i * step + j, f"{value:.2f}", va="center", fontsize=6.5)
    axes.set_yticks([i * step + (len(providers) - 1) / 2 for i in range(len(names))])
    axes.set_yticklabels([f"{op}\n{case}" for op, case in names], fontsize=8)
    axes.set_ylim(len(names) * step - 0.6, -0.9)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("tensors of the input's size")
    axes.set_title("peak memory of forward + backward, beyond the inputs")
    _legend(figure, {p: COLOURS[p] for p in providers})
    return figure


def head_memory(timings: list[Row]) -> Figure | None:
    """Memory of linear cross-entropy beyond inputs and gradients, in percent of the logits."""
    mine = [r for r in timings if r["op"] == "linear_cross_entropy" and not r["sweep"] and r["direction"] == "both"]
    shares = {(r["case"], r["provider"]): heads.of_logits(r) for r in mine}
    known = {key: 100 * share for key, share in shares.items() if share is not None and key[1] in COLOURS}
    shown = {provider for _, provider in known}
    names, providers = list(dict.fromkeys(case for case, _ in known)), [p for p in _order(mine) if p in shown - {COPY}]
    if not names:
        return None
    step = len(providers) + 0.8
    figure, axes = plt.subplots(figsize=(8.4, 1.3 + 0.165 * step * len(names)))
    for (case, provider), share in known.items():
        y = names.index(case) * step + providers.index(provider)
        axes.barh(y, share, height=0.86, color=COLOURS[provider])
        axes.text(max(share, 1) * 1.03, y, f"{share:.1f}", va="center", fontsize=6.5)
    axes.set_xscale("log")
    axes.set_xlim(1, 1.3 * max(known.values()))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g} %"))
    axes.set_yticks([i * step + (len(providers) - 1) / 2 for i in range(len(names))], names)
    axes.set_ylim(len(names) * step - 0.6, -0.9)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("of the logits' bytes")
    axes.set_title("linear cross entropy: peak memory of forward + backward, beyond inputs and gradients")
    _legend(figure, {p: COLOURS[p] for p in providers})
    return figure


def error_chart(rows: list[Row]) -> Figure | None:
    """Relative error of eager and ours beside each other, one panel per dtype."""
    dtypes = [d for d in ("float64", "float32", "bfloat16", "float16") if any(r["dtype"] == d for r in rows)]
    if not dtypes:
        return None
    quantities = list(dict.fromkeys((r["op"], r["case"], r["quantity"]) for r in rows))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(2.6 + 2.1 * len(dtypes), 1.2 + 0.17 * len(quantities)), sharey=True, squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for y, key in enumerate(quantities):
            _error_dots(axes, y, [r for r in rows if (r["op"], r["case"], r["quantity"], r["dtype"]) == (*key, dtype)])
        axes.axvline(_EPS[dtype] / 2, color=_LINE, lw=1, ls=":")
        axes.set_xscale("log")
        axes.set_title(dtype)
        axes.set_xlabel("||error|| / ||truth||", fontsize=8)
    first = panels[0][0]
    first.set_yticks(range(len(quantities)), [f"{op}, {case}: {q}" for op, case, q in quantities], fontsize=7.5)
    first.set_ylim(len(quantities) - 0.4, -0.6)
    handles = [
        first.plot([], [], "o", color=COLOURS[TRUTH], ms=6, label="eager")[0],
        first.plot([], [], "o", color=COLOURS[OURS], ms=4, label="fused_ops")[0],
        first.plot([], [], ":", color=_LINE, lw=1, label="half a unit in the last place of 1")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=3)
    figure.suptitle(
        "error against the truth (several dots: memory layouts; an error of zero has none)",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _error_dots(axes: Axes, y: int, rows: list[Row]) -> None:
    for provider, size, depth in ((TRUTH, 6, 2), (OURS, 4, 3)):
        values = [r["relative_error"] for r in rows if r["provider"] == provider and r["relative_error"] > 0]
        axes.plot(values, [y] * len(values), "o", color=COLOURS[provider], ms=size, zorder=depth)
    found = [r["relative_error"] for r in rows if r["relative_error"] > 0]
    if found:
        axes.plot([min(found), max(found)], [y, y], color="#bbbbbb", lw=1, zorder=1)

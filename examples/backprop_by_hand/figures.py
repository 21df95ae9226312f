"""The walk-through's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fused_ops.testing import GradientComparison

from .side_by_side import Comparison

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, EAGER = "#1b6ca8", "#b0b7bf"


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def loss_curve(path: Path, runs: Mapping[str, Sequence[Tensor]], points: int = 100) -> Path:
    """The minibatch losses averaged over 1/``points`` of the run, one line a run."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for (label, losses), style in zip(runs.items(), ("-", "--", ":"), strict=False):
        values = torch.stack(list(losses))
        window = max(1, len(values) // points)
        means = values[: len(values) // window * window].view(-1, window).mean(1)
        steps = (torch.arange(len(means)) + 0.5) * window
        axes.plot(steps, means, style, label=label, linewidth=1.8)
    axes.set(xlabel="step", ylabel="minibatch loss (nats per character)", title=f"Training, means of {window} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def gradient_differences(path: Path, comparisons: Mapping[str, GradientComparison]) -> Path:
    """max |ours - autograd| of every gradient, on a logarithmic axis; "exact" where it is zero."""
    floor = 1e-11
    count = max(len(c.rows) for c in comparisons.values())
    figure, axes = plt.subplots(figsize=(7.5, 0.27 * count + 1.6))
    height = 0.8 / len(comparisons)
    for k, ((label, comparison), colour) in enumerate(zip(comparisons.items(), (EAGER, OURS), strict=False)):
        for i, row in enumerate(comparison.rows):
            y = i + (k - (len(comparisons) - 1) / 2) * height
            shown = label if i == 0 else None
            axes.barh(y, max(row.max_difference, floor) - floor, height, left=floor, color=colour, label=shown)
            if row.max_difference == 0:
                axes.text(floor * 1.15, y, "exact", va="center", fontsize=6, color=colour if colour == OURS else "#555")
    axes.set_yticks(range(count), [row.name for row in next(iter(comparisons.values())).rows])
    axes.set_xscale("log")
    axes.set(xlabel="max |by hand - autograd|, float32", xlim=(floor, None), title="26 gradients by hand")
    axes.grid(axis="x", alpha=0.3)
    axes.set_ylim(count - 0.3, -0.7)
    axes.legend(loc="upper right")
    return _save(figure, path)


def side_by_side(path: Path, comparisons: Sequence[Comparison], steps_us: Mapping[str, float]) -> Path:
    """Bars of time and peak memory, ours as a fraction of eager's, and the microseconds of a training step."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4), width_ratios=(5, 5, 3))
    panels[0].set(title="Time, forward + backward", ylabel="relative to eager (labels: ms)")
    _bars(panels[0], [(c.name, c.ours_ms, c.eager_ms) for c in comparisons], relative=True)
    panels[1].set(title="Peak memory beyond the inputs", ylabel="MiB")
    memory = [
        (c.name, c.ours_bytes / 2**20, c.eager_bytes / 2**20)
        for c in comparisons
        if c.ours_bytes is not None and c.eager_bytes is not None
    ]
    _bars(panels[1], memory, relative=False)
    panels[2].set_title("Training step of the names MLP")
    panels[2].barh(list(steps_us), list(steps_us.values()), color=[OURS, OURS, EAGER][: len(steps_us)])
    for i, value in enumerate(steps_us.values()):
        panels[2].text(value, i, f" {value:.0f} µs", va="center", fontsize=9)
    panels[2].set_yticks(range(len(steps_us)), [name.replace(", ", ",\n").replace(" + ", "\n+ ") for name in steps_us])
    panels[2].invert_yaxis()
    panels[2].set_xlim(0, max(steps_us.values()) * 1.25)
    figure.tight_layout()
    return _save(figure, path)


def _bars(axes: plt.Axes, rows: Sequence[tuple[str, float, float]], relative: bool) -> None:
    for k, (label, colour) in enumerate((("fused_ops", OURS), ("PyTorch eager", EAGER))):
        values = [row[1 + k] for row in rows]
        heights = [value / row[2] if relative else value for value, row in zip(values, rows, strict=True)]
        bars = axes.bar([i - 0.2 + 0.4 * k for i in range(len(rows))], heights, 0.4, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8)
    if relative:
        axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axes.legend(fontsize=8)

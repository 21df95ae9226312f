"""What convert and the backend fuse in models that nobody here wrote, and what a training step costs before and after.

``python -m benchmarks.supported_models --write docs/supported_models.md`` measures each family in a process of its own
(``--only TEXT``: those whose library and name contain it; figures of the others stay), keeps the figures in
``benchmarks/results/<machine>/models.json`` and writes the page from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in benchmarks/__main__.py

import torch
from torch import nn

import fused_ops
from fused_ops.conversion import records

from . import machine, memory, tables
from .families import FAMILIES, Batch, Family

RESULTS = Path(__file__).parent / "results"
WAYS = ("eager", "convert", "backend")
ROUNDS = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supported_models", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page there")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure families whose 'library name' contains it")
    parser.add_argument("--no-run", action="store_true", help="write the page from the figures that there are")
    parser.add_argument("--small", action="store_true", help="the small models of the tests, to try this out")
    parser.add_argument("--family", type=int, help=argparse.SUPPRESS)  # in the process of its own
    options = parser.parse_args(arguments)
    if options.family is not None:
        print(json.dumps(measure(FAMILIES[options.family], options.small)))
        return 0
    file = RESULTS / machine.directory_name(machine.machine_name()) / "models.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for index, family in enumerate(FAMILIES if not options.no_run else ()):
        key = f"{family.library} {family.name}"
        if options.only.lower() not in key.lower():
            continue
        kept[key] = in_a_process(index, options.small)
        print(f"{key}: {kept[key].get('missing') or kept[key]['step_ms']}", flush=True)
        if not options.small:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        options.write.write_text(page(kept), encoding="utf-8")
    return 0


def in_a_process(index: int, small: bool) -> dict[str, Any]:
    """What is measured of one family; ``missing`` and the reason where it does not run."""
    command = [sys.executable, "-m", "benchmarks.supported_models", "--family", str(index), *["--small"] * small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(family: Family, small: bool) -> dict[str, Any]:
    """Steps of the untouched model, of a converted copy and of a compiled copy, in turn."""
    if family.missing:
        return {"missing": family.missing}
    torch.manual_seed(0)
    model = family.build(small).train()
    batch = family.batch(small)
    converted, compiled = copy.deepcopy(model), copy.deepcopy(model)
    fused_ops.convert(converted, loss=getattr(converted, "loss_function", None) if family.heads else None)
    calls: dict[str, Callable[..., Any]] = {
        "eager": model, "convert": converted, "backend": torch.compile(compiled, backend="fused_ops")
    }  # fmt: skip
    models = dict(zip(WAYS, (model, converted, compiled), strict=True))
    steps = {way: step(family, small, models[way], calls[way], batch) for way in WAYS}
    for run in steps.values():  # compiles, loads and initialises
        run()
    others, load = machine.OtherProcesses(), machine.load_average()
    times = interleaved(steps, 2 if small else ROUNDS)
    return {
        "norms": sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()),
        "heads": int(family.heads),
        "fused": {"convert": fused_by_convert(converted), "backend": fused_by_backend()},
        "step_ms": {way: round(1e3 * statistics.median(found), 2) for way, found in times.items()},
        "peak_bytes": {way: memory.peak_extra_bytes(run) for way, run in steps.items()},
        "busy_cores": others.busy_cores(),
        "load": load,
        "threads": torch.get_num_threads(),
        "environment": machine.environment("cpu"),
    }


def step(family: Family, small: bool, model: nn.Module, call: Callable[..., Any], batch: Batch) -> Callable[[], None]:
    """Forward, loss and backward."""

    def run() -> None:
        model.zero_grad()
        family.loss(call(**batch), small).backward()

    return run


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds whose order turns."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(rounds):
        order = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
        for way in order:
            start = time.perf_counter()
            steps[way]()
            times[way].append(time.perf_counter() - start)
    return times


def fused_by_convert(model: nn.Module) -> dict[str, int]:
    """What ran in one op, by what it was, of the counts that the report shows."""
    return dict(Counter(entry.what for entry in fused_ops.report(model).fused))


def fused_by_backend() -> dict[str, int]:
    """The same of the graphs that have run."""
    found: Counter[str] = Counter()
    for graph in records.GRAPHS:
        if graph.calls:
            found.update(graph.fused)
    return dict(found)


# --- The page --------------------------------------------------------------------------------------------------------

COLUMNS = (
    "model", "batch norms", "convert fuses", "the backend fuses", "step: eager", "convert", "backend",
    "peak memory: eager", "convert", "backend",
)  # fmt: skip


def page(kept: dict[str, dict[str, Any]]) -> str:
    """The whole page, from the figures."""
    parts = [
        "# Supported models",
        "",
        "Every line is one model that nobody here wrote, with random weights, run by",
        "`python -m benchmarks.supported_models --write docs/supported_models.md`, which writes this page.",
        "`tests/conversion/test_families.py` holds outputs, gradients and buffers of each to the untouched model.",
        "",
        "*convert* is `fused_ops.convert(model)`, with `loss=model.loss_function` where there is a head over a",
        'vocabulary; *backend* is `torch.compile(model, backend="fused_ops")`. What they fuse is what their reports',
        "counted while it ran. A step is forward, loss and backward: the median of interleaved rounds. Memory is how",
        "far the resident set rises in a step.",
    ]
    conditions = sorted({describe(entry) for entry in kept.values() if "missing" not in entry})
    parts += ["", *(f"Measured on {line}." for line in conditions)]
    for library in dict.fromkeys(family.library for family in FAMILIES):
        rows = [
            row(f.name, kept[f"{library} {f.name}"])
            for f in FAMILIES
            if f"{library} {f.name}" in kept and f.library == library
        ]
        if rows:
            parts += ["", f"## {library}", "", tables.markdown(COLUMNS, rows).strip()]
    return "\n".join(parts) + "\n"


def describe(entry: dict[str, Any]) -> str:
    where = entry["environment"]
    return f"{where['machine']}, {entry['threads']} threads, torch {where['torch']}"


def row(name: str, entry: dict[str, Any]) -> list[object]:
    if "missing" in entry:
        return [name, *[""] * (len(COLUMNS) - 2), f"not run: {entry['missing']}"]
    times, peaks = entry["step_ms"], entry["peak_bytes"]
    return [
        name,
        entry["norms"] or "",
        *(in_words(entry["fused"][way]) for way in WAYS[1:]),
        f"{times['eager']:.1f} ms",
        *(ratio(times["eager"], times[way]) for way in WAYS[1:]),
        tables.mebibytes(peaks["eager"]),
        *(ratio(peaks["eager"], peaks[way]) for way in WAYS[1:]),
    ]


def in_words(fused: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(fused.items(), key=lambda item: -item[1])) or "-"


def ratio(before: float | None, after: float | None) -> str:
    """As a factor of what it was."""
    return f"{after / before:.2f}x" if before and after is not None else ""


if __name__ == "__main__":
    sys.exit(main())

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
from torch import Tensor, nn

import fused_ops
from fused_ops.conversion import records

from . import machine, memory, tables
from .families import FAMILIES, Batch, Family

RESULTS = Path(__file__).parent / "results"
WAYS = ("eager", "convert", "backend")
ROUNDS = 9


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
    steps, models = ways(family, small, torch.float32)
    warm_up(steps)
    others, load = machine.OtherProcesses(), machine.load_average()
    times = interleaved(steps, 2 if small else ROUNDS)
    busy = others.busy_cores()
    fused = {"convert": fused_by_convert(models["convert"]), "backend": fused_by_backend(steps["backend"])}
    return {
        "norms": sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in models["eager"].modules()),
        "heads": int(family.heads),
        "fused": fused,
        "step_ms": {way: round(1e3 * statistics.median(found), 2) for way, found in times.items()},
        "step_ratio": {way: round(median_ratio(found, times["eager"]), 3) for way, found in times.items()},
        "peak_bytes": peaks(steps),
        "difference": differences(family, small),
        "busy_cores": busy,
        "load": load,
        "threads": torch.get_num_threads(),
        "environment": machine.environment("cpu"),
    }


def ways(family: Family, small: bool, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Any]], dict[str, nn.Module]]:
    """(a training step, the model) of each way, of the same weights and batch."""
    torch.manual_seed(0)
    model = family.build(small).train().to(dtype)
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in family.batch(small).items()}
    models = {way: copy.deepcopy(model) for way in WAYS}
    own = getattr(models["convert"], "loss_function", None) if family.heads else None
    fused_ops.convert(models["convert"], loss=own)
    calls: dict[str, Callable[..., Any]] = {**models, "backend": torch.compile(models["backend"], backend="fused_ops")}
    return {way: step(family, small, models[way], calls[way], batch) for way in WAYS}, models


def step(family: Family, small: bool, model: nn.Module, call: Callable[..., Any], batch: Batch) -> Callable[[], Any]:
    """Forward, loss and backward; returns the loss."""

    def run() -> Any:
        model.zero_grad()
        loss = family.loss(call(**batch), small)
        loss.backward()
        return loss.detach()

    return run


def warm_up(steps: dict[str, Callable[[], Any]]) -> None:
    """Runs each until it compiles nothing more: some models set what they are guarded by in their first step."""
    for run in steps.values():
        run()
        for _ in range(5):
            before = len(records.GRAPHS)
            run()
            if len(records.GRAPHS) == before:
                break


def interleaved(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds whose order turns."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(rounds):
        order = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
        for way in order:
            start = time.perf_counter()
            steps[way]()
            times[way].append(time.perf_counter() - start)
    return times


def median_ratio(times: list[float], eager: list[float]) -> float:
    """The median over the rounds, in each of which the two ran beside each other."""
    return statistics.median(own / other for own, other in zip(times, eager, strict=True))


def peaks(steps: dict[str, Callable[[], Any]]) -> dict[str, int | None]:
    """How far the resident set rises in a step of each.

    Large blocks come straight from the system: else holes in malloc's heap decide, by a fifth and more.
    """
    machine.set_allocator("fresh")
    found: dict[str, int | None] = {}
    for way, run in steps.items():
        run()
        tries = [memory.peak_extra_bytes(run) for _ in range(3)]
        known = [peak for peak in tries if peak is not None]
        found[way] = int(statistics.median(known)) if known else None
    return found


def differences(family: Family, small: bool) -> dict[str, float]:
    """How far loss, gradients and buffers are from eager's after a step in float64, by the largest value of each.

    The gradients are taken together: that of a bias before a batch norm is nothing but rounding.
    """
    steps, models = ways(family, small, torch.float64)
    found: dict[str, dict[str, Tensor]] = {}
    names: Any = None
    for way, run in steps.items():
        torch.manual_seed(1)  # of dropout
        loss = run()
        gradients = {name: p.grad for name, p in models[way].named_parameters() if p.grad is not None}
        names = names or gradients.keys()
        if gradients.keys() != names:
            raise RuntimeError(f"{family.name}, {way}: other gradients than eager's")
        together = torch.cat([g.flatten() for g in gradients.values()])
        found[way] = {"loss": loss, "gradients": together, **dict(models[way].named_buffers())}
    expected = found["eager"]
    return {way: max(relative(name, found[way], expected) for name in expected) for way in WAYS[1:]}


def relative(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, by the largest value.

    That of a running mean is by the largest standard deviation: the mean of what a batch norm without activation gave
    to a convolution is nothing but rounding.
    """
    if not expected[name].numel():
        return 0.0
    scale = float(expected[name].double().abs().max())
    if name.endswith("running_mean"):
        scale = max(scale, float(expected[name.replace("running_mean", "running_var")].max()) ** 0.5)
    return float((found[name].double() - expected[name].double()).abs().max()) / (scale or 1.0)


def fused_by_convert(model: nn.Module) -> dict[str, int]:
    """What ran in one op, by what it was, of the counts that the report shows."""
    return dict(Counter(entry.what for entry in fused_ops.report(model).fused))


def fused_by_backend(run: Callable[[], Any]) -> dict[str, int]:
    """The same of the graphs that a step runs: of what was compiled again, the last one alone."""
    before = [graph.calls for graph in records.GRAPHS]
    run()
    found: Counter[str] = Counter()
    for graph, calls in zip(records.GRAPHS, before, strict=True):
        if graph.calls > calls:
            found.update(graph.fused)
    return dict(found)


# --- The page --------------------------------------------------------------------------------------------------------

COLUMNS = (
    "model", "batch norms", "convert fuses", "the backend fuses", "step: eager", "convert", "backend",
    "peak memory: eager", "convert", "backend", "differ by",
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
        "counted in one step. A step is forward, loss and backward in float32: the median of interleaved rounds, and",
        "of the ratio in each. Memory is how far the resident set rises in a step. The last column is how far loss,",
        "gradients and buffers of the two are from the untouched model's after a step in float64, by the largest value",
        "of each, running means by the largest deviation (losses that turn their logits to float32 bring its rounding",
        "in).",
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
        *(f"{entry['step_ratio'][way]:.2f}x" for way in WAYS[1:]),
        tables.mebibytes(peaks["eager"]),
        *(ratio(peaks["eager"], peaks[way]) for way in WAYS[1:]),
        f"{max(entry['difference'].values()):.0e}",
    ]


def in_words(fused: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(fused.items(), key=lambda item: -item[1])) or "-"


def ratio(before: float | None, after: float | None) -> str:
    """As a factor of what it was."""
    return f"{after / before:.2f}x" if before and after is not None else ""


if __name__ == "__main__":
    sys.exit(main())

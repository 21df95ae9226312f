"""Runs the chosen cases: check, then time, then weigh, and turn all of it into rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from tqdm import tqdm

from . import accuracy, cases, events, harness, install, limits, machine, memory, pages, rivals
from .harness import COPY, Case, Check, Provider, Runner, Timing
from .results import Row, Tables, speedup

PARTS = ("micro", "sweep", "overhead", "training", pages.PART, "accuracy", "install")
BUDGET_S = {"quick": 0.6, "full": 3.0}
GPU_BUDGET_S = {"quick": 0.1, "full": 0.3}
ROUNDS = {"quick": (5, 15), "full": (7, 31)}


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    ops: tuple[str, ...]
    parts: tuple[str, ...]
    suite: str
    rivals: tuple[str, ...]  # empty: all
    threads: tuple[int, ...]
    device: str
    pattern: str = ""  # cases whose "op name" contains it
    memory: bool = True
    allocator: str = "default"
    ran_before: frozenset[str] = frozenset()  # rivals of which figures are kept from earlier runs

    def wants(self, case: Case) -> bool:
        chosen = case.part in self.parts and self.pattern in f"{case.op} {case.name}"
        return chosen and (self.suite == "full" or case.quick)


def run(options: Options, console: Console, keep: Callable[[Tables], object] = lambda tables: None) -> Tables:
    """All tables of one run; `keep` gets each case's rows as soon as they are there. Warns on a busy machine."""
    shared = machine.environment(options.device, options.allocator)
    load = float(str(shared["load_before"]))
    if load > machine.LOAD_LIMIT:
        console.print(f"[yellow]warning: load average {load} before the start; figures of a busy machine mislead")
    chosen = [case for case in cases.all_cases(options.device, options.ops) if options.wants(case)]
    jobs = [(case, threads) for case in chosen for threads in thread_counts(case, options)]
    tables: Tables = {"timings": [], "accuracy": [], "install": [], "rivals": []}
    for case, threads in tqdm(jobs, desc="cases", unit="case", disable=not jobs):
        rows = [{**row, **shared} for row in run_case(case, threads, options)]
        tables["timings"] += rows
        keep({"timings": rows})
    if "accuracy" in options.parts:
        torch.set_num_threads(1)
        found = [c for op in options.ops for c in getattr(cases.modules()[op], "accuracy_cases", list)()]
        chosen_accuracy = [c for c in found if options.pattern in f"{c.op} {c.name}"]
        for accuracy_case in tqdm(chosen_accuracy, desc="accuracy", unit="case", disable=not chosen_accuracy):
            tables["accuracy"] += [{**row, **shared} for row in accuracy.measure(accuracy_case)]
    if "install" in options.parts:
        tables["install"] = [{**row, **shared} for row in install.measure()]
    ran = {row["provider"] for row in tables["timings"] if row["status"] == "ok"}
    if jobs:
        tables["rivals"] = [{**row, **shared} for row in rivals.report(options.device, ran, options.ran_before)]
    return tables


def thread_counts(case: Case, options: Options) -> Iterable[int]:
    """Sweeps and training steps with the most threads, tiny calls with one (and each), other cases with each."""
    if case.tiny:
        return sorted({1, *(options.threads if options.suite == "full" else ())})
    return (max(options.threads),) if case.part in ("sweep", "training") else options.threads


def run_case(case: Case, threads: int, options: Options) -> list[Row]:
    """The rows of one case: one per provider and direction."""
    torch.set_num_threads(threads)
    harness.collect()
    inputs = case.inputs(options.device)
    wanted = [p for p in case.providers if not options.rivals or p.name in options.rivals or p.strict or _ours(p)]
    reasons, runners = _runners(case, wanted, inputs, threads)
    checks = harness.verify(case, runners, inputs, threads) if runners else {}
    for name, check in checks.items():
        if not check.ok:
            reasons[name] = check.note
            del runners[name]
    rows = []
    every = options.suite == "full" or options.device == "cuda"  # where a direction takes a second
    for direction in case.directions if every else case.directions[-1:]:
        able = {p.name: runners[p.name] for p in wanted if p.name in runners and direction in p.directions}
        rows += _rows(case, wanted, able, reasons, checks, direction, threads, options)
    return rows


def _ours(provider: Provider) -> bool:
    return provider.name.startswith(harness.OURS)


def _runners(
    case: Case, wanted: list[Provider], inputs: harness.Inputs, threads: int
) -> tuple[dict[str, str], dict[str, Runner]]:
    """What runs, and why the rest does not."""
    reasons, runners = {}, {}
    for provider in wanted:
        if provider.missing:
            reasons[provider.name] = provider.missing
            continue
        try:
            runners[provider.name] = harness.make_runner(case, provider, inputs, threads)
        except Exception as error:  # as in harness.verify
            reasons[provider.name] = harness.failure(error)
    return reasons, runners


def _rows(
    case: Case,
    wanted: list[Provider],
    able: dict[str, Runner],
    reasons: dict[str, str],
    checks: dict[str, Check],
    direction: str,
    threads: int,
    options: Options,
) -> list[Row]:
    others = machine.OtherProcesses()
    yardstick = case.moved_bytes.get(direction) is not None
    timed = {**able, COPY: harness.CopyRunner(case, options.device)} if yardstick else able
    rounds = case.rounds or ROUNDS[options.suite]
    if options.device == "cuda" and not case.tiny:
        budget = GPU_BUDGET_S[options.suite] * len(timed)
        timings = events.time_interleaved(timed, direction, budget_s=budget, rounds=rounds)
    else:  # a tiny call's time is the host's
        budget = BUDGET_S[options.suite] * len(timed)
        timings = harness.time_interleaved(
            timed, direction, threads=threads, device=options.device, budget_s=budget, rounds=rounds
        )
    busy = others.busy_cores()
    run_id = f"{time.time():.0f}"
    rows = []
    for name in [*(p.name for p in wanted), *([COPY] if yardstick else [])]:
        row = _describe(case, name, direction, threads)
        if name in timings:
            row |= _figures(case, timed[name], timings[name], direction)
            row |= {"run": run_id, "busy_others": None if busy is None else round(busy, 2)}
            row["relative_error"] = checks[name].relative_error if name in checks else None
            row["extra_bytes"] = _weigh(case, name, timed[name], direction, threads, options)
            row["in_cache_ms"] = _limit(case, name, direction, threads, options)
        else:
            row["status"] = reasons.get(name, "has no such direction")
        rows.append(row)
    _compare(rows)
    return rows


def _describe(case: Case, provider: str, direction: str, threads: int) -> Row:
    return {
        "op": case.op,
        "part": case.part,
        "tiny": case.tiny,
        "case": case.name,
        "sweep": case.sweep,
        "size": case.size,
        "direction": direction,
        "provider": provider,
        "shape": "x".join(map(str, case.shape)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "threads": threads,
        "input_bytes": case.copied * case.dtype.itemsize,
        "status": "ok",
    }


def _figures(case: Case, runner: Runner, timing: Timing, direction: str) -> Row:
    count = harness.moved(case, direction, runner)
    return {
        "ms": _round(timing.median_ms),
        "p20_ms": _round(timing.quantile(0.2)),
        "p80_ms": _round(timing.quantile(0.8)),
        "bytes": count,
        "gb_per_s": _round(count / timing.median_ms / 1e6) if count else None,
        "samples_ms": [_round(s) for s in timing.samples_ms],
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _compare(rows: list[Row]) -> None:
    """Adds the fraction of the copy's bandwidth and the speed-up over eager, both of the same rounds."""
    by_name = {row["provider"]: row for row in rows if row["status"] == "ok"}
    copy, eager = by_name.get(COPY), by_name.get(harness.TRUTH)
    for row in by_name.values():
        if copy and row["gb_per_s"]:
            row["copy_fraction"] = _round(row["gb_per_s"] / copy["gb_per_s"])
        if eager:
            row["speedup_vs_eager"] = _round(speedup(row, eager))


def _weigh(case: Case, provider: str, runner: Runner, direction: str, threads: int, options: Options) -> int | None:
    """Peak extra memory, at the machine's most threads and where the case asks for it."""
    if not options.memory or options.suite not in case.memory or provider == COPY or threads != max(options.threads):
        return None
    if direction == "backward":
        return None
    if options.device == "cuda":  # the allocator counts this run alone
        runner.prepare(direction)
        return memory.peak_extra_bytes_cuda(partial(runner.run, direction))
    return memory.in_subprocess(case, provider, direction, threads, options.device)


def _limit(case: Case, name: str, direction: str, threads: int, options: Options) -> float | None:
    """What our arithmetic alone would take, of the direction that is judged."""
    provider = next((p for p in case.providers if p.name == name and p.strict), None)
    if provider is None or options.device != "cpu" or direction != case.directions[-1]:
        return None
    found = limits.in_cache_ms(case, provider, direction, threads)
    return None if found is None else _round(found)


def default_threads() -> tuple[int, ...]:
    """All the cores."""
    return (os.cpu_count() or 1,)

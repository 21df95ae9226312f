"""Rows of figures on one GPU: what is measured, and a file to which each row goes as soon as it is known."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

Run = Callable[[], object]
# (what it is about, what makes the run): making it is where a rival, or the memory for it, may be missing
Row = tuple[dict[str, Any], Callable[[], Run]]
Questions = Callable[[bool, str], Iterator[Row]]  # of whether the sizes are tiny, and of the device


def wait(device: str) -> None:
    """For all that the device has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Run, device: str, rounds: int = 7, limit_s: float = 4.0) -> list[float]:
    """Milliseconds, after one run that is not counted; fewer rounds where they would take longer than the limit."""
    found: list[float] = []
    run()
    began = time.perf_counter()
    while len(found) < rounds and (len(found) < 2 or time.perf_counter() - began < limit_s):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def peak_mib(run: Run, device: str) -> float | None:
    """Of one run, beyond what is there before it."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def figures(make: Callable[[], Run], device: str) -> dict[str, Any]:
    """Times and peak, or why there are none."""
    try:
        run = make()
        times = timed(run, device)
        return {"ms": median(times), "least_ms": min(times), "rounds": len(times), "peak_mib": peak_mib(run, device)}
    except Exception as error:  # a rival's, or too little memory: the next row is worth having
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def small_figures(make: Callable[[], Run], device: str, runs: int = 50, blocks: int = 9) -> dict[str, Any]:
    """Microseconds of a run of few values: of the host that queues it, and of the device that replays it as a graph."""
    try:
        run = make()
        found = []
        for _ in range(blocks):
            wait(device)
            start = time.perf_counter()
            for _ in range(runs):
                run()
            found.append(1e6 * (time.perf_counter() - start) / runs)
        return {"host_us": median(found), "device_us": _replayed_us(run, runs, blocks) if device == "cuda" else None}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _replayed_us(run: Run, runs: int, blocks: int) -> float:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(runs):
            run()
    found = []
    for _ in range(blocks):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / runs)
    return median(found)


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Prints each row and writes all that there are, as soon as it is known."""
    known = []
    for row in rows:
        known.append(row)
        print(json.dumps(row), flush=True)
        file.write_text(json.dumps(known, indent=1))


def main(about: str | None, parts: dict[str, Questions], argv: list[str] | None = None) -> None:
    """Answers the questions of some parts. A row whose part is called small has the figures of a small call."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("file", type=Path)
    parser.add_argument("--part", choices=parts, action="append", help="default: all")
    parser.add_argument("--tiny", action="store_true", help="small sizes, which run anywhere")
    given = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rows() -> Iterator[dict[str, Any]]:
        for part in given.part or parts:
            measure = small_figures if part == "small" else figures
            for fields, make in parts[part](given.tiny, device):
                yield {"part": part, **fields, **measure(make, device)}

    write(given.file, rows())

"""Our ops against PyTorch eager on this machine: the time of a forward and backward pass, and its peak memory."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import fused_ops

from .data import Split
from .network import Parameters
from .training import ByHand, Step, minibatches, with_eager, with_functions

ROUNDS = 5  # each provider is timed this often, in turn


@dataclass(frozen=True)
class Comparison:
    """Medians of interleaved rounds, forward and backward together."""

    name: str
    ours_ms: float
    eager_ms: float
    ours_bytes: int | None  # peak memory beyond the inputs; None where the system does not tell
    eager_bytes: int | None


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """By how much the resident memory of the process rises at most while ``run`` runs; None if not on glibc Linux."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator kept for reuse would hide a rise
        clear.write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _kilobytes(status, "VmRSS")
    run()
    return max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def _compare(name: str, ours: Callable[[], None], eager: Callable[[], None], leaves: list[Tensor]) -> Comparison:
    timers = [Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for run in (ours, eager)]
    times: list[list[float]] = [[], []]
    for timer in timers:
        timer.timeit(2)
    for _ in range(ROUNDS):
        for which, timer in enumerate(timers):
            times[which].append(timer.timeit(2).mean * 1e3)
    memory = []
    for run in (ours, eager):
        for leaf in leaves:
            leaf.grad = None
        memory.append(peak_extra_bytes(run))
    return Comparison(name, statistics.median(times[0]), statistics.median(times[1]), memory[0], memory[1])


def _backward_of(function: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor | None) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().backward(upstream)

    return run


def compare_cross_entropy(rows: int, classes: int) -> Comparison:
    """Mean loss of (rows, classes) float32 logits."""
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    ours, eager = (
        _backward_of(lambda f=f: f(logits, target), [logits], None)  # type: ignore[misc]
        for f in (fused_ops.cross_entropy, F.cross_entropy)
    )
    return _compare(f"cross-entropy\n({rows}, {classes})", ours, eager, [logits])


def compare_batch_norm(*shape: int) -> Comparison:
    """A training step of float32 batch norm with scale and shift."""
    channels = shape[1]
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    upstream = torch.randn(shape)
    leaves = [x, weight, bias]
    ours, eager = (
        _backward_of(lambda f=f: f(x, None, None, weight, bias, True), leaves, upstream)  # type: ignore[misc]
        for f in (fused_ops.batch_norm, F.batch_norm)
    )
    return _compare(f"batch norm\n{shape}", ours, eager, leaves)


def compare_all() -> list[Comparison]:
    """A few seconds' worth of shapes from real use."""
    return [
        compare_cross_entropy(2048, 8192),
        compare_cross_entropy(8192, 1000),
        compare_batch_norm(32, 64, 56, 56),
        compare_batch_norm(4096, 1024),
    ]


def step_microseconds(
    split: Split, vocabulary: int, hidden: int, steps: int = 200, rounds: int = 7
) -> dict[str, float]:
    """Microseconds of one training step of the network, three ways, interleaved: the median of ``rounds`` runs each."""
    ways: dict[str, Step] = {}
    makers: dict[str, Callable[[Parameters], Step]] = {
        "by hand, our kernels": ByHand,
        "our Functions, backward()": with_functions,
        "nn.BatchNorm1d + F.cross_entropy": with_eager,
    }
    for name, make in makers.items():
        ways[name] = make(Parameters.draw(vocabulary, hidden)[0])
    batches = list(minibatches(split, torch.Generator().manual_seed(0), steps))

    def run(step: Step) -> None:
        for x, y in batches:
            step(x, y, 0.01)

    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            timer = Timer("run(step)", globals={"run": run, "step": step}, num_threads=torch.get_num_threads())
            times[name].append(timer.timeit(1).mean / steps * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}

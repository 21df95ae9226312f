"""Times on a GPU's own clock, so that what the host does meanwhile, and waiting for the device, are not in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from .harness import Runner, Timing

FLUSH_BYTES = 256 << 20  # more than any second-level cache: once read, what was there before is gone
HEAD_START = 1.5  # the device is kept busy for this many times what the host needs to queue the run
CYCLES_PER_S = 2.0e9  # at least as fast as the device's clock, so that the start is no shorter than asked for
RUNS = (3, 20)  # fewest and most runs of one sample
BLOCK_S = 0.02  # a sample's runs take about this long


def time_interleaved(
    runners: Mapping[str, Runner], direction: str, *, budget_s: float = 2.0, rounds: tuple[int, int] = (5, 25)
) -> dict[str, Timing]:
    """Times the runners in turn on the current GPU, as `harness.time_interleaved` does on the CPU.

    Before each run the cache is filled with other, unchanged data, and the device is kept waiting until the host has
    queued all of the run: what lies between the two events is the device's work, without gaps that a slow host would
    make.

    Args:
        runners: By provider name.
        direction: What to run.
        budget_s: Aim for all rounds together, preparations included.
        rounds: Fewest and most rounds, whatever the budget.

    Returns:
        One sample (the median ms of a block of runs) per round and runner.
    """
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device="cuda").view(torch.float32)

    def sample(runner: Runner, host_s: float, count: int) -> float:
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for begin, end in events:
            runner.prepare(direction)
            flush.sum()
            torch.cuda._sleep(int(HEAD_START * host_s * CYCLES_PER_S))
            begin.record()
            runner.run(direction)
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    plans, cost = {}, 0.0
    for name, runner in runners.items():
        for _ in range(2):  # the first warms up
            runner.prepare(direction)
            torch.cuda.synchronize()
            start = time.perf_counter()
            runner.run(direction)
            host = time.perf_counter() - start
            torch.cuda.synchronize()
        start = time.perf_counter()
        sample(runner, host, 1)
        each = time.perf_counter() - start
        count = max(RUNS[0], min(RUNS[1], int(BLOCK_S / each)))
        plans[name] = (host, count)
        cost += each * count
    timings = {name: Timing() for name in runners}
    names = list(runners)
    for i in range(max(rounds[0], min(rounds[1], int(budget_s / max(cost, 1e-9))))):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            timings[name].samples_ms.append(sample(runners[name], *plans[name]))
    return timings

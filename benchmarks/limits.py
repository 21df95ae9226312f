"""What bounds a case besides its bytes: the arithmetic of our kernels when no byte has to come from memory.

A case is cut into pieces of the same rows and layout, of which two stay in the caches with all that a call reads and
writes. The time of two pieces less that of one is what a piece costs without the call around it, so the limit
of the whole case is that times the number of pieces.
"""

from __future__ import annotations

import statistics

from . import harness
from .harness import Case, Inputs, Provider

BUDGET_S = 0.5
ROUNDS = (15, 61)


def in_cache_ms(case: Case, provider: Provider, direction: str, threads: int) -> float | None:
    """Milliseconds of the whole case's arithmetic on so many cores, or None where no pieces are stated."""
    if case.pieces is None or case.tiny:
        return None
    inputs = [case.pieces(count, "cpu") for count in (1, 2)]
    runners = {str(values(i)): harness.make_runner(case, provider, i, 1) for i in inputs}
    timings = harness.time_interleaved(runners, direction, threads=1, budget_s=BUDGET_S, block_s=0.002, rounds=ROUNDS)
    one, two = (timings[name].samples_ms for name in runners)
    piece_ms = statistics.median(b - a for a, b in zip(one, two, strict=True))
    return piece_ms * case.copied / (values(inputs[1]) - values(inputs[0])) / threads


def values(inputs: Inputs) -> int:
    """How many the largest input has."""
    return max(t.numel() for t in inputs.tensors.values())

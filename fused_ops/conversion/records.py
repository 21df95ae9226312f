"""What really ran, counted where it ran; ``fused_ops.report`` shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class HeadRecord:
    """The losses of one head: those that never saw its logits, and why the others did."""

    fused: int = 0
    computed: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass
class GraphRecord:
    """One graph that the backend was given: what it fused in it, what it left and why, and how often it ran."""

    fused: Counter[str] = field(default_factory=Counter)  # e.g. "batch_norm + add + relu"
    left: Counter[str] = field(default_factory=Counter)  # e.g. "batch_norm: its result is used twice"
    calls: int = 0


GRAPHS: list[GraphRecord] = []

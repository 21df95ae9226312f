"""What the ops are meant to reach, and whether the results say that they do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import cases, machine, results
from .results import Row


@dataclass(frozen=True)
class SpeedTarget:
    """``provider`` at least ``minimum`` times as fast as ``rival``."""

    op: str
    case: str
    provider: str
    rival: str
    minimum: float
    direction: str = "both"
    threads: int | None = None  # the most that were measured, unless a number is given
    isa: str | None = None  # stated for this instruction set alone


@dataclass(frozen=True)
class MemoryTarget:
    """Peak extra memory of ``provider`` at most ``maximum`` times the bytes of the case's input."""

    op: str
    case: str
    provider: str
    direction: str
    maximum: float


@dataclass(frozen=True)
class BandwidthTarget:
    """``provider`` moves its bytes at no less than ``minimum`` times the rate of a copy."""

    op: str
    case: str
    provider: str
    direction: str
    minimum: float


Target = SpeedTarget | MemoryTarget | BandwidthTarget


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    op: str
    case: str
    direction: str
    what: str
    found: float | None
    wanted: str
    elsewhere: dict[str, float]  # allocator other than the default -> what is found with it
    status: str  # reached | missed | not offered | not measured | the reason a provider has no figure
    by_bytes: float | None = None  # the ratio if the case moved its bytes at the rate of a copy
    in_cache: float | None = None  # the ratio if no byte came from memory: what our instructions allow


def all_targets(device: str = "cpu") -> list[Target]:
    """The targets that the bench modules state for a device."""
    function = "gpu_targets" if device == "cuda" else "targets"
    stated = [getattr(module, function)() for module in cases.modules().values() if hasattr(module, function)]
    return [target for targets in stated for target in targets]


def verdicts(rows: list[Row], threads: int | None = None) -> list[Verdict]:
    """Every target of every op against the rows (those with the most threads, unless told otherwise).

    The status is about the C library's own choice of memory; what other allocators give stands beside it.
    """
    known = [int(row["threads"]) for row in rows]
    threads = threads or (max(known) if known else 1)
    found = _judge(rows, "default", threads)
    for allocator in machine.ALLOCATORS[1:]:
        other = _judge(rows, allocator, threads)
        pairs = zip(found, other, strict=True)
        found = [v if o.found is None else _beside(v, o, allocator) for v, o in pairs]
    return found


def _beside(verdict: Verdict, other: Verdict, allocator: str) -> Verdict:
    """The verdict with what another allocator gives; the limits are those of recycled memory, without faults."""
    assert other.found is not None
    elsewhere = {**verdict.elsewhere, allocator: other.found}
    if allocator != "recycled":
        return replace(verdict, elsewhere=elsewhere)
    return replace(verdict, elsewhere=elsewhere, by_bytes=other.by_bytes, in_cache=other.in_cache)


def _judge(rows: list[Row], allocator: str, threads: int) -> list[Verdict]:
    index = {
        (row["op"], row["case"], row["direction"], row["provider"], int(row["threads"])): row
        for row in rows
        if row["allocator"] == allocator
    }
    device, isa = (str(rows[0]["device"]), rows[0]["isa"]) if rows else ("cpu", None)
    stated = [t for t in all_targets(device) if getattr(t, "isa", None) in (None, isa)]
    return [_judge_one(target, index, threads) for target in stated]


Index = dict[tuple[object, ...], Row]


def _judge_one(target: Target, index: Index, threads: int) -> Verdict:
    if isinstance(target, SpeedTarget):
        return _speed(target, index, target.threads or threads)
    if isinstance(target, MemoryTarget):
        return _memory(target, index, threads)
    return _bandwidth(target, index, threads)


def _bandwidth(target: BandwidthTarget, index: Index, threads: int) -> Verdict:
    row = index.get((target.op, target.case, target.direction, target.provider, threads))
    what, wanted = f"{target.provider}: rate / copy's", f">= {target.minimum:.2f}"
    reason = _absent(row) or ("" if row is not None and row.get("copy_fraction") else "not measured")
    if reason or row is None:
        return Verdict(target.op, target.case, target.direction, what, None, wanted, {}, reason)
    found = float(row["copy_fraction"])
    status = "reached" if found >= target.minimum else "missed"
    return Verdict(target.op, target.case, target.direction, what, found, wanted, {}, status)


def _absent(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return str(row["status"]) if row["status"] != "ok" else ""


def _speed(target: SpeedTarget, index: Index, threads: int) -> Verdict:
    ours = index.get((target.op, target.case, target.direction, target.provider, threads))
    rival = index.get((target.op, target.case, target.direction, target.rival, threads))
    if target.rival == "copy":
        what, wanted = f"{target.provider}: time / copy", f"<= {1 / target.minimum:.2f}"
    else:
        what, wanted = f"{target.provider} vs {target.rival}", f">= {target.minimum:.1f}x"
    reason = _absent(ours) or _absent(rival)
    if reason or ours is None or rival is None:
        return Verdict(target.op, target.case, target.direction, what, None, wanted, {}, reason)
    ratio = results.speedup(ours, rival)
    found = 1 / ratio if target.rival == "copy" else ratio
    status = "reached" if ratio >= target.minimum else "missed"
    if target.rival == "copy":
        return Verdict(target.op, target.case, target.direction, what, found, wanted, {}, status)
    part, cached_ms = ours.get("copy_fraction"), ours.get("in_cache_ms")
    by_bytes = ratio / float(part) if part and not ours["tiny"] else None
    in_cache = ratio * float(ours["ms"]) / float(cached_ms) if cached_ms else None
    return Verdict(target.op, target.case, target.direction, what, found, wanted, {}, status, by_bytes, in_cache)


def _memory(target: MemoryTarget, index: Index, threads: int) -> Verdict:
    row = index.get((target.op, target.case, target.direction, target.provider, threads))
    what, wanted = f"{target.provider}: peak extra memory / input", f"<= {target.maximum:.2f}"
    reason = _absent(row)
    if not reason and row is not None and row.get("extra_bytes") is None:
        reason = "not measured"
    if reason or row is None:
        return Verdict(target.op, target.case, target.direction, what, None, wanted, {}, reason)
    found = int(row["extra_bytes"]) / int(row["input_bytes"])
    status = "reached" if found <= target.maximum else "missed"
    return Verdict(target.op, target.case, target.direction, what, found, wanted, {}, status)

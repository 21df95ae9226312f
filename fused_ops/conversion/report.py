"""What a conversion did, and how it is shown."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

SMALL_BYTES = 1 << 20  # logits that are no burden; as in linear_cross_entropy
HEAD = "cross-entropy"  # what a linear head is fused with

if TYPE_CHECKING:  # rich is loaded where a report is shown, not by import fused_ops
    from rich.console import RenderableType
    from rich.table import Table


@dataclass
class Entry:
    """One module."""

    path: str
    what: str  # its class, or what was fused into it
    reason: str = ""  # why it was left alone
    residual: bool = False
    activation: bool = False
    saved_bytes: int | None = None  # a training step, predicted; None without a sample


@dataclass(frozen=True)
class Check:
    """The relative errors of one result before and after, against the same model in float64."""

    name: str
    before: float
    after: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the conversion made it no worse than rounding explains."""
        return self.after <= self.allowed


@dataclass
class Report:
    """What ``convert`` did."""

    replaced: list[Entry] = field(default_factory=list)
    fused: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that a training step reads and writes less, predicted; None without a sample."""
        known = [entry.saved_bytes for entry in self.fused if entry.saved_bytes is not None]
        return sum(known) if known or (not self.fused and self.checks) else None

    @property
    def ok(self) -> bool:
        """Whether every check of the sample passed (also if there was none)."""
        return all(check.ok for check in self.checks)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self._tables())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]

    def _tables(self) -> list[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        fused = {entry.path: entry for entry in self.fused}
        table = Table("module", "was", "now", "bytes saved a step", title="convert", header_style="bold")
        for entry in self.replaced:
            joined = fused.get(entry.path)
            now = "fused" if joined is None else f"fused with {joined.what}"
            saved = "" if joined is None or joined.saved_bytes is None else f"{joined.saved_bytes:,}"
            table.add_row(entry.path or "(the model)", entry.what, now, saved)
        for entry in self.left:
            table.add_row(entry.path or "(the model)", entry.what, f"left alone: {entry.reason}", "")
        shown: list[RenderableType] = [table]
        shown.append(Text(f"{len(self.replaced)} replaced, {len(fused)} of them fused, {len(self.left)} left alone"))
        if self.saved_bytes is not None:
            shown.append(Text(f"predicted: {self.saved_bytes / 1e6:.1f} MB a training step not read or written"))
        shown += [Text(note, style="yellow") for note in self._grouped_notes()]
        if self.checks:
            shown.append(self._check_table())
        return shown

    def _grouped_notes(self) -> list[str]:
        """One line a reason, with the first module that has it."""
        groups: dict[str, list[str]] = {}
        for note in self.notes:
            path, _, reason = note.partition(": ")
            groups.setdefault(reason, []).append(path)
        return [
            f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
            for reason, paths in groups.items()
        ]

    def _check_table(self) -> Table:
        from rich.table import Table

        table = Table("on the sample", "error before", "error after", "", title="against float64", header_style="bold")
        worst = sorted(self.checks, key=lambda check: check.after / (check.allowed or 1.0), reverse=True)
        for check in [c for c in worst if not c.ok] or worst[:5]:
            verdict = "agrees" if check.ok else "DIFFERS"
            table.add_row(check.name, f"{check.before:.1e}", f"{check.after:.1e}", verdict)
        left_out = len(worst) - table.row_count
        if left_out:
            table.caption = f"and {left_out} more that agree better"
        return table


def predict_bytes(report: Report, sizes: Mapping[str, int]) -> None:
    """Fills in what each fusion saves, from the bytes of the batch norm's input.

    Alone, the activation reads and writes its tensor in the forward, reads two and writes one in the backward: five.
    The addition alone reads two and writes one where the fused op reads one: two more; its gradient, which costs
    nothing alone, is then written for the residual: one less where there is an activation.

    A head's logits are written once, read once and written once by log_softmax, whose backward is given a gradient
    that was written, reads that and its output and writes one, which two products read: nine. In chunks: written,
    turned into their gradient (read and written) and read by two products: five.
    """
    for entry in report.fused:
        size = sizes.get(entry.path)
        if size is not None and entry.what == HEAD:
            entry.saved_bytes = 4 * size if size > SMALL_BYTES else 0
        elif size is not None:
            entry.saved_bytes = size * (
                5 * entry.activation + 2 * entry.residual - (entry.activation and entry.residual)
            )

"""What a conversion did and what has run since, as it was counted; and how that is shown."""

from __future__ import annotations

import io
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from torch import jit, nn

from fused_ops.conversion import records
from fused_ops.conversion.neighbours import NORMS, RUNS, activation_of, passed
from fused_ops.conversion.records import HeadRecord
from fused_ops.conversion.rules import Converted
from fused_ops.core import library
from fused_ops.core.hooks import hooked

MARK = "_fused_ops_converted"  # in the __dict__ of what convert has turned over: a user's own fused modules lack it
RECORD = "_fused_ops_record"  # in that of a head: its HeadRecord

if TYPE_CHECKING:  # rich is loaded where a report is shown, not by import fused_ops
    from rich.console import RenderableType
    from rich.table import Table


@dataclass
class Entry:
    """One module."""

    path: str
    what: str  # its class, or what ran in its op
    reason: str = ""  # why it was left alone
    now: str = ""  # what became of it, where its new class does not tell
    times: int = 0  # how often it ran


NOW = {  # by the kind of the rule
    "sequential": "its batch norms with the activations behind them",
    "block": "by its rule",
    "shortcut": "by its rule",
    "norm": "by its rule",
    "loss": "by its rule",
    "head": "leaves its logits to the loss",
}


def _name(module: nn.Module) -> str:
    return "Linear" if RECORD in module.__dict__ else type(module).__name__


def _now(module: nn.Module) -> str:
    if RECORD in module.__dict__:
        return NOW["head"]
    rule = getattr(type(module), "_fused_ops_rule", None)
    now = "" if rule is None else NOW[rule.kind]
    return synchronised(now, module) if module.__dict__.get("synchronised") else now


def synchronised(now: str, norm: nn.Module) -> str:
    """What became of a batch norm, as ``Entry.now``, where it is synchronised besides."""
    now = now or f"fused_ops' {type(norm).__name__}"
    return f"{now}, synchronised"


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first path; without calling anything that a class may have overridden."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if not isinstance(module, jit.ScriptModule):
            children = [(f"{path}.{name}" if path else name, m) for name, m in module._modules.items() if m is not None]
            todo += reversed(children)


class Report:
    """What ``convert`` did with a model, and what of it has run: counted where it runs, whenever it is asked.

    Attributes:
        replaced: The modules that were replaced.
        left: Those that look like it and were left alone, with the reason.
        notes: Remarks.
    """

    def __init__(self, model: nn.Module, loss: Any = None) -> None:
        self.replaced: list[Entry] = []
        self.left: list[Entry] = []
        self.notes: list[str] = _backend_notes(model)
        self._model = weakref.ref(model)

    @property
    def fused(self) -> list[Entry]:
        """The batch norms that ran with what follows them in their op, and heads whose losses never saw the logits."""
        model = self._model()
        found: list[Entry] = []
        for path, module in modules_of(model) if model is not None else ():
            state = module.__dict__
            if runs := state.get(RUNS):
                times = sum(runs.values())
                found.append(Entry(path, " or ".join(runs), times=times))
            record = state.get(RECORD)
            if isinstance(record, HeadRecord) and record.fused:
                found.append(Entry(path, "cross-entropy", times=record.fused))
        return found

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self._parts())

    def __str__(self) -> str:
        return _as_text(self)

    def __repr__(self) -> str:
        return f"<Report: {len(self.replaced)} replaced, {len(self.left)} left alone, {len(self.fused)} ran fused>"

    def _parts(self) -> list[RenderableType]:
        from rich.text import Text

        parts: list[RenderableType] = []
        if self.replaced:
            parts.append(_table("convert", ("was", "now", "modules"), _by_kind(self.replaced)))
        if self.left:
            parts.append(_table("left alone", ("module", "why", "modules", "first"), _by_reason(self.left)))
        if not parts:
            parts.append(Text("convert: nothing to replace"))
        parts += [Text(line) for line in self._ran()]
        parts += [Text(note, style="yellow") for note in _grouped(self.notes)]
        return parts

    def _ran(self) -> list[str]:
        """What has run, in sentences."""
        model = self._model()
        if model is None:
            return ["the model is gone, and what ran with it"]
        lines = _norm_lines(model) + _head_lines(model)
        return lines or ["ran: nothing that is counted yet"]


@overload
def report(model: nn.Module) -> Report: ...
@overload
def report(model: None = None) -> GraphReport: ...
def report(model: nn.Module | None = None) -> Report | GraphReport:
    """What has been converted in a model and what of it has run so far, or what the Dynamo backend has fused.

    Args:
        model: A converted model, or a part or a copy of one. None: the graphs that
            ``torch.compile(backend="fused_ops")`` has made in this process.

    Returns:
        What ``str()`` and ``rich.print()`` show as a table.

    Raises:
        TypeError: ``model`` is no module.
    """
    if model is None:
        return GraphReport()
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: expected model to be a torch.nn.Module, got {type(model).__name__}")
    made = Report(model)
    for path, module in modules_of(model):
        if MARK in module.__dict__:
            made.replaced.append(Entry(path, _name(module), now=_now(module)))
        elif reason := look_at(module):
            made.left.append(Entry(path, type(module).__name__, reason))
    return made


class GraphReport:
    """The graphs that the backend was given, as they are when this is shown."""

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if not records.GRAPHS:
            return Text("no graph yet: torch.compile(model, backend='fused_ops')")
        return Group(*(part for i, graph in enumerate(records.GRAPHS) for part in _graph_parts(i, graph)))

    def __str__(self) -> str:
        return _as_text(self)

    def __repr__(self) -> str:
        return f"<GraphReport: {len(records.GRAPHS)} graphs>"


def _graph_parts(index: int, graph: records.GraphRecord) -> list[RenderableType]:
    from rich.text import Text

    rows = [(what, "fused", str(count)) for what, count in graph.fused.items()]
    rows += [(what, "left", str(count)) for what, count in graph.left.items()]
    title = f"graph {index}, run {graph.calls} times"
    return [_table(title, ("what", "", "in the graph"), rows) if rows else Text(f"{title}: nothing of ours in it")]


# --- What is looked at ----------------------------------------------------------------------------------------------


def look_at(module: nn.Module) -> str:
    """Why a module that looks like one of those convert knows is none of them; empty for any other."""
    if isinstance(module, jit.ScriptModule):
        return "scripted or traced: whatever is in it stays"
    if MARK in module.__dict__ or isinstance(module, (*NORMS, Converted)):
        return ""
    if isinstance(module, nn.SyncBatchNorm):
        return "synchronised over processes: give sync_batch_norm=True"
    kinds = (nn.modules.batchnorm._BatchNorm, nn.CrossEntropyLoss)
    if isinstance(module, kinds) and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "not converted" if type(module).__module__.startswith("torch.nn") else "a subclass without a rule"
    return ""


def take_counts(module: nn.Module, copied: nn.Module) -> None:
    """Adds what was counted on a copy of a module."""
    state, other = module.__dict__, copied.__dict__
    if runs := other.get(RUNS):
        state[RUNS] = dict(Counter(state.get(RUNS, {})) + Counter(runs))
    record = other.get(RECORD)
    if isinstance(record, HeadRecord):
        mine = state.setdefault(RECORD, HeadRecord())
        mine.fused += record.fused
        mine.computed += record.computed


_OF_ITS_OWN = "not run yet, or with an activation of its own that batch_norm does not do"


def _norm_lines(model: nn.Module) -> list[str]:
    """How many batch norms ran with what, and where the others stand."""
    norms: dict[int, nn.Module] = {}
    reasons: Counter[str] = Counter()
    places = _places(model)
    ran: Counter[str] = Counter()
    for _, module in modules_of(model):
        if type(module) not in NORMS and not (isinstance(module, Converted) and isinstance(module, nn.BatchNorm2d)):
            continue
        norms[id(module)] = module
        runs = module.__dict__.get(RUNS)
        if runs:
            ran.update(runs.keys())
        else:
            reasons[
                places.get(id(module), "not run yet, or with an activation of its own that batch_norm does not do")
            ] += 1
    if not norms:
        return []
    fused = len(norms) - sum(reasons.values())
    with_what = ", ".join(f"{count} with {what}" for what, count in ran.most_common())
    lines = [
        f"ran: {fused} of {len(norms)} batch norms with what follows them in one op" + f" ({with_what})" * bool(ran)
    ]
    return lines + [f"  {count} on their own: {reason}" for reason, count in reasons.most_common()]


def _places(model: nn.Module) -> dict[int, str]:
    """By the id of a batch norm, what stands behind it as far as containers tell."""
    found: dict[int, str] = {}
    for _, parent in modules_of(model):
        if isinstance(parent, jit.ScriptModule):
            continue
        children: list[Any] = [child for child in parent._modules.values() if child is not None]
        for i, child in enumerate(children):
            if type(child) in NORMS and id(child) not in found:
                found[id(child)] = _place(parent, child, children[i + 1 :])
    return found


def _place(parent: nn.Module, norm: nn.Module, behind: list[nn.Module]) -> str:
    if hooked(norm):
        return "it has hooks"
    if isinstance(parent, nn.Sequential):
        rest = [module for module in behind if not passed(module)]
        if not rest:
            return f"last in its {type(parent).__name__}"
        if activation_of(rest[0]) is None:
            return f"before {type(rest[0]).__name__}, which batch_norm does not do"
        return "not run yet, or with inputs or modules that take the separate steps"
    if isinstance(parent, Converted):
        return f"in {type(parent).__name__}: not run yet, or before something that batch_norm does not do"
    return (
        f"in {type(parent).__name__}, whose forward only Dynamo can follow: "
        "torch.compile(model, backend='fused_ops') fuses there"
    )


def _head_lines(model: nn.Module) -> list[str]:
    lines = []
    for path, module in modules_of(model):
        record = module.__dict__.get(RECORD)
        if not isinstance(record, HeadRecord):
            continue
        path = path or "(the model)"
        if record.fused:
            lines.append(f"ran: head {path}: logits never computed for {record.fused} losses")
        lines += [
            f"ran: head {path}: logits computed {count} times because {reason}"
            for reason, count in record.computed.most_common()
        ]
    return lines


def _backend_notes(model: nn.Module) -> list[str]:
    """That a device has no kernels here."""
    notes = []
    devices = {p.device.type for p in model.parameters()} or {"cpu"}
    for device in sorted(devices & {"cpu", "cuda"}):
        served = {what for _, kind, what, _ in library.backends() if kind == device}
        if "plain PyTorch" in served:
            why = (
                library.missing_reason
                or (device == "cuda" and library.cuda_missing_reason)
                or "some have no kernel there"
            )
            notes.append(f"on {device} the ops run as plain PyTorch, slower than fused: {why}")
    return notes


# --- How it is shown ------------------------------------------------------------------------------------------------


def _by_kind(entries: list[Entry]) -> list[tuple[str, str, str]]:
    groups = Counter((entry.what, entry.now or f"fused_ops' {entry.what}") for entry in entries)
    return [(was, now, str(count)) for (was, now), count in groups.items()]


def _by_reason(entries: list[Entry]) -> list[tuple[str, str, str, str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.what, entry.reason), []).append(entry.path or "(the model)")
    return [(what, reason, str(len(paths)), paths[0]) for (what, reason), paths in groups.items()]


def _grouped(notes: list[str]) -> list[str]:
    """Each note once."""
    return list(dict.fromkeys(notes))


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title, header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def _as_text(shown: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(shown)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]

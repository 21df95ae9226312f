"""Which cells run when, and the table of docs/reliability.md, which the expectations make and the tests prove."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from . import compiled, distributed, exported, without_data
from .cases import CASES, Case
from .expectations import REFUSALS, refusal
from .registry import System
from .systems import SYSTEMS

PAGE = Path(__file__).parents[3] / "docs" / "reliability.md"
START, END = "<!-- seams -->", "<!-- /seams -->"
COLUMNS = {"ce": "cross_entropy", "lce": "linear_cross_entropy", "bn": "batch_norm"}
# Of the systems that compile these run by default, under each system every third one in turn:
# one case for each way through the package ...
BY_DEFAULT = ("ce-mean", "ce-z_loss", "lce-small, bias", "lce-chunks", "bn-training, statistics", "bn-residual, relu")
# ... and of these systems others.
INSTEAD = {
    "compile, changing numbers": ("ce-normalizer",),
    "compile, fullgraph, changing numbers": ("ce-smoothing", "ce-normalizer", "ce-mixup", "lce-chunks, z_loss"),
    "inductor": ("ce-mean",),
    "linearize": ("ce-mean", "lce-chunks", "bn-residual, relu"),
    "inductor, changing numbers": (),  # test_a_normalizer_that_changes_with_the_input is one
    "AOTInductor package": (),
    "multiprocessing, spawn": ("lce-chunks",),
    "freed storage": (
        *BY_DEFAULT,
        "ce-weight",
        "ce-soft target",
        "ce-class_mask",
        "ce-large",
        "lce-small",
        "lce-1 MiB of logits",
        "bn-evaluation",
        "bn-valid",
        "bn-inplace_activated",
    ),
}
_COSTLY = [s.name for s in SYSTEMS.values() if s.costly]


def is_slow(system: System, case: Case) -> bool:
    """Whether the cell is left to ``make test-all``."""
    if not system.costly:
        return False
    place = _COSTLY.index(system.name)
    return repr(case) not in INSTEAD.get(system.name, BY_DEFAULT[place % 3 :: 3])


def unavailable(system: System) -> str | None:
    """Why the system cannot run here, if it cannot."""
    if "ductor" in system.name:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:
            return "no C++ compiler for inductor"
    if system.name == "AOTInductor package" and find_spec("torch._inductor.package") is None:
        return "this torch has no AOTInductor packages"
    return None


def named_cases() -> list[str]:
    """Every case that a list names."""
    lists = (BY_DEFAULT, *INSTEAD.values(), compiled.INDUCTOR, exported.AOTI, without_data.DIRECT)
    return [*(n for names in lists for n in names), *distributed.PARALLEL, *distributed.DTENSOR]


def _cell(system: System, op: str) -> str:
    found = Counter(refusal(system, case) for case in CASES if case.op == op and system.applies(case))
    parts = [f"{found[None]} right"] if found[None] else []
    parts += [f"{found[r]} refused [{i}]" for i, r in enumerate(REFUSALS, 1) if found[r]]
    return ", ".join(parts) or "-"


def lines() -> list[str]:
    """The table, its notes and its counts."""
    rows = [f"| system | {' | '.join(COLUMNS.values())} |", "|---|---|---|---|"]
    rows += [f"| {s.name} | {' | '.join(_cell(s, op) for op in COLUMNS)} |" for s in SYSTEMS.values()]
    for name in dict.fromkeys(check.partition("|")[0] for check in distributed.CHECKS):
        counts = Counter(c.partition("|")[2].partition("-")[0] for c in distributed.CHECKS if c.startswith(f"{name}|"))
        rows.append(f"| {name} | {' | '.join(f'{counts[op]} right' if counts[op] else '-' for op in COLUMNS)} |")
    cells = [refusal(s, c) for s in SYSTEMS.values() for c in CASES if s.applies(c)]
    right = cells.count(None) + len(distributed.CHECKS)
    total = len(cells) + len(distributed.CHECKS)
    notes = [f"{i}. {r.because}" for i, r in enumerate(REFUSALS, 1)]
    kinds = len(SYSTEMS) + len({c.partition("|")[0] for c in distributed.CHECKS})
    said = f"{len(CASES)} calls and {kinds} systems, {total} cells: {right} right, {total - right} refused."
    return [said, "", *rows, "", *notes]


def read() -> list[str]:
    """What the page says."""
    text = PAGE.read_text()
    return text[text.index(START) + len(START) : text.index(END)].strip("\n").split("\n")


def write() -> None:
    """Puts the table into the page."""
    text = PAGE.read_text()
    before, after = text[: text.index(START)], text[text.index(END) :]
    PAGE.write_text(f"{before}{START}\n" + "\n".join(lines()) + f"\n{after}")

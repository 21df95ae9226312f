"""The cases of every bench_<op>.py, found by that name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from types import ModuleType

from .harness import Case


@cache
def modules() -> dict[str, ModuleType]:
    """Op name -> its bench module. One of an op that the package does not have (yet) says so with AVAILABLE = False."""
    package = importlib.import_module("benchmarks")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("bench_"))
    found = {name.removeprefix("bench_"): importlib.import_module(f"benchmarks.{name}") for name in names}
    return {op: module for op, module in found.items() if getattr(module, "AVAILABLE", True)}


def all_cases(device: str, ops: Iterable[str] | None = None) -> list[Case]:
    """Every case of the given ops (all by default)."""
    wanted = list(modules()) if ops is None else list(ops)
    cases = [case for op in wanted for case in modules()[op].cases(device)]
    names = [(case.op, case.name) for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"case names must be unique within an op, got twice: {sorted(twice)}")
    return cases


def find(op: str, name: str, device: str) -> Case:
    """The case of that name."""
    return next(case for case in all_cases(device, [op]) if case.name == name)

"""The command line: ``python -m fused_ops demo | info | check``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from rich.console import Console

import fused_ops
from fused_ops.core import library

DEMO_NEEDS = ("tqdm", "matplotlib")
DEMO = "fused_ops.examples.backprop_by_hand"
BAD_INPUT = 2  # the exit status


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = _Parser(prog="python -m fused_ops", description=(fused_ops.__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the walk-through: every gradient by hand, checked, fused, trained")
    about = commands.add_parser("info", help="versions, the library, and what serves each op on each device")
    about.add_argument("-v", "--verbose", action="store_true", help="every raw op, and every device")
    proof = commands.add_parser("check", help="gradcheck, gradgradcheck, forward-mode AD and opcheck of every op")
    proof.add_argument("-v", "--verbose", action="store_true", help="every sample")
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["demo"]:
        importlib.import_module(f"{DEMO}.arguments").add_arguments(demo)
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        return info(verbose=parsed.verbose)
    if parsed.command == "check":
        return check(verbose=parsed.verbose)
    missing = _missing(DEMO_NEEDS)
    if missing:
        print(f"error: the demo needs {missing}: pip install '.[demo]' in the checkout", file=sys.stderr)
        return BAD_INPUT
    return int(importlib.import_module(f"{DEMO}.walkthrough").main(parsed))


def _missing(names: Iterable[str]) -> str:
    return " and ".join(name for name in names if importlib.util.find_spec(name) is None)


def _print_table(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest entry; the first row is the heading. Nothing is wrapped."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        line = "  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip()
        console.print(line, style="bold" if i == 0 else None, markup=False, soft_wrap=True)


def info(console: Console | None = None, *, verbose: bool = False) -> int:
    """Prints what is installed here and what serves each op on each device.

    Args:
        console: Where to print; standard output by default.
        verbose: Every raw op, and also the devices that this torch is not built for.
    """
    console = console or Console(highlight=False)
    for name, value in (
        ("fused_ops", fused_ops.__version__),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("library", str(library.LIBRARY_PATH) if library.missing_reason is None else library.missing_reason),
        ("ISA", library.isa() or "none (no native library)"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", _cuda_state()),
        ("dtypes", ", ".join(str(dtype).removeprefix("torch.") for dtype in library.DTYPES)),
    ):
        console.print(f"[bold]{name:<10}[/]", end="")
        console.print(value, markup=False, soft_wrap=True)
    console.print()
    rows = [row for row in library.backends() if verbose or row[1] == "cpu" or torch.version.cuda is not None]
    devices = list(dict.fromkeys(device for _, device, _, _ in rows))
    served: dict[str, dict[str, Counter[str]]] = {}  # by name and device: how many raw ops by what
    for raw, device, what, _ in rows:
        name = raw if verbose else _op_of(raw)
        served.setdefault(name, {d: Counter() for d in devices})[device][what] += 1
    heading = ["raw op" if verbose else "op", *devices]
    _print_table(console, [heading, *([name, *map(_shares, by.values())] for name, by in served.items())])
    for device, why in dict.fromkeys((device, why) for _, device, _, why in rows if why):
        console.print(f"plain PyTorch on {device}: {why}", markup=False, soft_wrap=True)
    return 0


def _op_of(raw: str) -> str:
    """The op that a raw op belongs to: the longest of their names that it begins with."""
    from fused_ops.testing import op_names

    return max((op for op in op_names() if raw.startswith(op)), key=len, default=raw)


def _shares(by: Counter[str]) -> str:
    """What serves the raw ops of an op, with their number where it is not the same for all."""
    return next(iter(by)) if len(by) == 1 else ", ".join(f"{n} of {by.total()}: {what}" for what, n in by.items())


def _cuda_state() -> str:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch was built with CUDA {torch.version.cuda}, but no device is available"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def check(console: Console | None = None, *, verbose: bool = False) -> int:
    """Checks every op on this machine and prints a line an op, and what failed.

    Args:
        console: Where to print; standard output by default.
        verbose: A line a sample besides.

    Returns:
        The exit status: 1 if anything failed.
    """
    from fused_ops.testing import CHECKS, check_all

    console = console or Console(highlight=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # gradcheck is thousands of tiny calls
    try:
        results = check_all()
    finally:
        torch.set_num_threads(threads)
    if verbose:
        for result in results:
            mark = "[red]FAILED[/]" if result.failed else "[green]passed[/]"
            console.print(f"{mark}  {result.op}: ", end="")
            console.print(result.sample, markup=False, soft_wrap=True)
        console.print()
    rows = [["op", "samples", *CHECKS]]
    for op in dict.fromkeys(result.op for result in results):
        outcomes = [result.outcomes for result in results if result.op == op]
        counts = [Counter(outcome[name] for outcome in outcomes) for name in CHECKS]
        rows.append([op, str(len(outcomes)), *map(_verdict, counts)])
    _print_table(console, rows)
    failed = [result for result in results if result.failed]
    for result in failed:
        for detail in result.details:
            console.print(f"[red]{result.op} / [/]", end="")
            console.print(f"{result.sample}: {detail}", markup=False, soft_wrap=True)
    if any("not run" in result.outcomes.values() for result in results):
        console.print("opcheck needs expecttest and numpy: pip install '.\\[check]' in the checkout")
    console.print(f"{len(results) - len(failed)} of {len(results)} samples passed")
    return 1 if failed or not results else 0


def _verdict(outcomes: Counter[str]) -> str:
    return f"{outcomes['failed']} FAILED" if outcomes["failed"] else "not run" if outcomes["not run"] else "passed"


if __name__ == "__main__":
    raise SystemExit(main())

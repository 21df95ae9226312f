"""The command line: ``python -m fused_ops demo | info | check``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

import fused_ops
from fused_ops import _library

DEMO_NEEDS = ("tqdm", "matplotlib")
WALKTHROUGH = "fused_ops.examples.backprop_by_hand.walkthrough"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fused-ops", description=fused_ops.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the walk-through: every gradient by hand, checked, fused, trained")
    commands.add_parser("info", help="versions, the library found, and which backend serves which device and dtype")
    commands.add_parser("check", help="gradcheck, gradgradcheck, forward-mode AD and opcheck of every op")
    arguments = sys.argv[1:] if argv is None else list(argv)
    walkthrough = None
    if arguments[:1] == ["demo"]:
        missing = [name for name in DEMO_NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            print(f"error: the demo needs {', '.join(missing)}: pip install 'fused_ops[demo]'", file=sys.stderr)
            return 2
        walkthrough = importlib.import_module(WALKTHROUGH)
        walkthrough.add_arguments(demo)
    parsed = parser.parse_args(arguments)
    if walkthrough is not None:
        return int(walkthrough.main(parsed))
    return info() if parsed.command == "info" else check()


def info(console: Console | None = None) -> int:
    """Prints what is installed here and what serves each device and dtype."""
    console = console or Console(highlight=False)
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("fused_ops", fused_ops.__version__),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("library", str(_library.LIBRARY_PATH) if _library.missing_reason is None else _library.missing_reason),
        ("ISA", _library.isa() or "none (no native library)"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", _cuda_state()),
    ):
        facts.add_row(f"[bold]{name}", value)
    console.print(facts)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _library.DTYPES)
    table = Table("raw op", "device", "served by", "why", header_style="bold", title=f"dtypes {dtypes}, all alike:")
    table.columns[0].no_wrap = True
    for row in _library.backends():
        table.add_row(*row)
    console.print(table)
    return 0


def _cuda_state() -> str:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch was built with CUDA {torch.version.cuda}, but no device is available"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def check(console: Console | None = None) -> int:
    """Checks every op on this machine and prints a table; returns 1 if anything failed."""
    from fused_ops.testing import CHECKS, check_all

    console = console or Console(highlight=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # gradcheck is thousands of tiny calls
    try:
        results = check_all()
    finally:
        torch.set_num_threads(threads)
    table = Table("op", "sample", *CHECKS, header_style="bold")
    marks = {"passed": "[green]passed[/]", "failed": "[red]FAILED[/]", "not run": "[yellow]not run[/]"}
    for result in results:
        table.add_row(result.op, result.sample, *(marks[result.outcomes[name]] for name in CHECKS))
    console.print(table)
    failed = [result for result in results if result.failed]
    for result in failed:
        for detail in result.details:
            console.print(f"[red]{result.op} / {result.sample}:[/] ", end="")
            console.print(detail, markup=False)
    if any("not run" in result.outcomes.values() for result in results):
        console.print("[yellow]opcheck was not run: it needs expecttest and numpy: pip install 'fused_ops\\[check]'")
    console.print(f"{len(results) - len(failed)} of {len(results)} samples passed")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    raise SystemExit(main())

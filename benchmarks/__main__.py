"""Command line of the benchmarks: measure, judge against the targets, draw, and write the tables of the docs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Read by the OpenMP runtime when torch loads it: spinning threads on few cores make times jump in 8 ms steps.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console

from . import cases, machine, results, rivals, run, tables, targets, terminal


def _list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _threads(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(word) for word in _list(text))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers separated by commas, got {text!r}")
    return counts


def _chosen(allowed: tuple[str, ...]) -> argparse._ActionType:  # type: ignore[name-defined]
    def parse(text: str) -> tuple[str, ...]:
        words = _list(text)
        unknown = [word for word in words if word not in allowed]
        if unknown or not words:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, got {text!r}")
        return words

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    ops = tuple(cases.modules())
    known_rivals = (*rivals.ALWAYS, *rivals.OPTIONAL)
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    top.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "targets", "report", "instructions"),
        help="run (default): measure; targets: judge the results; report: plots and tables; "
        "instructions: count the kernels' instructions anew",
    )
    top.add_argument("--op", type=_chosen(ops), default=ops, help=f"of {', '.join(ops)} (default: all)")
    top.add_argument("--part", type=_chosen(run.PARTS), help=f"of {', '.join(run.PARTS)}")
    top.add_argument("--suite", choices=("quick", "full"), default="quick")
    top.add_argument("--rivals", type=_chosen(known_rivals), default=(), help=f"of {', '.join(known_rivals)}")
    top.add_argument("--case", default="", help="only cases whose 'op name' contains this text")
    top.add_argument("--threads", type=_threads, default=run.default_threads(), help="e.g. 1,2 (default: all cores)")
    top.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    top.add_argument(
        "--allocator",
        choices=machine.ALLOCATORS,
        default="default",
        help="where large tensors come from: the C library's own choice, always newly mapped, or never",
    )
    top.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    top.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<machine>)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a provider of ours broke the error rule or failed."""
    args = parser().parse_args(argv)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("--device cuda: this torch sees no CUDA device", file=sys.stderr)
            return 2
    folder = args.out or results.RESULTS / machine.directory_name(machine.machine_name(args.device))
    if args.command == "instructions":
        from . import instructions

        return instructions.update(console)
    if args.command == "report":
        from . import plot

        for place in [args.out] if args.out else results.machines():
            plot.draw_all(place)
        tables.write_all()
        return 0
    if args.command == "run":
        return _run(args, folder, console)
    terminal.print_targets(targets.verdicts(_best(folder)), console)
    return 0


def _best(folder: Path) -> list[results.Row]:
    found = results.best(folder)
    return found[1]["timings"] if found else []


def _run(args: argparse.Namespace, folder: Path, console: Console) -> int:
    machine.set_allocator(args.allocator)
    kept = results.load(folder / f"{args.suite}.json")["timings"]
    options = run.Options(
        ops=args.op,
        parts=args.part or (run.PARTS if not args.case else run.PARTS[:-1]),
        suite=args.suite,
        rivals=args.rivals,
        threads=args.threads,
        device=args.device,
        pattern=args.case,
        memory=not args.no_memory and args.allocator == "default",
        allocator=args.allocator,
        ran_before=frozenset(r["provider"] for r in kept if r["status"] == "ok"),
    )
    found = run.run(options, console, lambda rows: results.save(folder, args.suite, rows))
    terminal.print_timings(found["timings"], console)
    terminal.print_accuracy(found["accuracy"], console)
    terminal.print_plain("Install", found["install"], ("quantity", "value", "unit"), console)
    terminal.print_plain("Rivals", found["rivals"], ("rival", "version", "status"), console)
    for path in results.save(folder, args.suite, found):
        shown = path.relative_to(machine.ROOT) if path.is_relative_to(machine.ROOT) else path
        console.print(f"wrote {shown}", style="dim")
    broken = [r for r in found["timings"] if r["provider"].startswith("fused_ops") and _is_broken(r["status"])]
    for row in broken:
        console.print(f"[red]{row['op']} {row['case']} {row['provider']}: {row['status']}")
    return 1 if broken else 0


def _is_broken(status: str) -> bool:
    return status.startswith(("breaks the error rule", "wrong", "failed"))


if __name__ == "__main__":
    sys.exit(main())

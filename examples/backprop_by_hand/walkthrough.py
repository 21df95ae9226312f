"""The walk-through from end to end: data, gradients by hand, one-step backwards, training, comparison, pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fused_ops.testing import GradientComparison, compare_gradients

from . import data as names_data
from . import figures, side_by_side
from .arguments import add_arguments
from .by_hand import tanh_two_roundings
from .data import Data, DataError
from .gradients import fused_pairs, staged_pairs
from .network import BATCH, SEED, Parameters, staged_forward
from .training import ByHand, Trained, Training, calibrate, train, with_functions

SAMPLES = 20
INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C


def main(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """Runs the walk-through; returns the exit status."""
    console = console or Console(highlight=False)
    try:
        names = names_data.us_first_names() if arguments.names is None else names_data.read_names(arguments.names)
        data = names_data.build(names)
        data.vocabulary.encode(arguments.start)  # said now rather than after the training
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
    except DataError as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 2
    except OSError as error:
        console.print(f"[red]error:[/] --out: cannot make {arguments.out}: {error.strerror}", soft_wrap=True)
        return 2
    try:
        return _run(arguments, data, len(names), out, console)
    except KeyboardInterrupt:  # outside the training, where there is nothing to keep
        console.print("\ninterrupted")
        return INTERRUPTED


def _run(arguments: argparse.Namespace, data: Data, names: int, out: Path, console: Console) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is tiny: a second thread only waits
    try:
        _show_data(console, data, names)
        comparisons = _show_gradients(console, data, arguments.hidden)
        trained, losses, interrupted = _show_training(console, data, arguments)
        _show_result(console, data, trained, arguments.start)
        console.print(f"figures: {figures.gradient_differences(out / 'gradient_differences.png', comparisons)}")
        console.print(f"         {figures.loss_curve(out / 'loss.png', losses)}")
        if interrupted:
            return INTERRUPTED
        steps_us = side_by_side.step_microseconds(data.train, len(data.vocabulary), arguments.hidden)
    finally:
        torch.set_num_threads(threads)
    _show_side_by_side(console, steps_us, out)
    return 0


def _show_data(console: Console, data: Data, names: int) -> None:
    console.rule("[bold]The data")
    shapes = ", ".join(f"{name} {tuple(getattr(data, name).contexts.shape)}" for name in ("train", "dev", "test"))
    console.print(f"{names} names, vocabulary {len(data.vocabulary)}: {data.vocabulary.characters}", markup=False)
    console.print(f"contexts and the character that follows: {shapes}")


def _show_gradients(console: Console, data: Data, hidden: int) -> dict[str, GradientComparison]:
    p, generator = Parameters.draw(len(data.vocabulary), hidden)
    ix = torch.randint(0, len(data.train), (BATCH,), generator=generator)
    x, y = data.train.contexts[ix], data.train.targets[ix]
    console.print(f"network: {p.count()} parameters, generator seed {SEED}")
    console.print(f"first minibatch: {ix[:4].tolist()} ..., loss {staged_forward(p, x, y)['loss'].item():.7f}")

    console.rule("[bold]Step 1: every gradient by hand, against autograd")
    two = compare_gradients(staged_pairs(p, x, y, tanh_two_roundings), quiet=True)
    one = compare_gradients(staged_pairs(p, x, y), file=console.file)
    console.print(
        "(that is with tanh' = 1 - h^2 rounded once, as PyTorch does; written as (1 - h**2) * grad it is rounded"
        f" twice: {two.exact} exact, {two.approximate} approximate)"
    )
    cross_entropy, batch_norm = fused_pairs(p, x, y)
    console.rule("[bold]Step 2: the cross-entropy's backward in one step")
    console.print("d logits = (softmax(logits) - one_hot(y)) / n")
    compare_gradients(cross_entropy, file=console.file)
    console.rule("[bold]Step 3: the batch norm's backward in one step, unbiased variance")
    console.print(
        "d hprebn = gain * invstd / n * (n g - sum(g) - n/(n-1) * xhat * sum(g * xhat)),  g = d hpreact", markup=False
    )
    compare_gradients(batch_norm, file=console.file)
    return {"(1 - h**2) * grad": two, "1 - h^2 rounded once": one}


def _show_training(
    console: Console, data: Data, arguments: argparse.Namespace
) -> tuple[Trained, dict[str, list[torch.Tensor]], bool]:
    console.rule("[bold]Step 4: training with these gradients")
    steps = arguments.steps
    p, generator = Parameters.draw(len(data.vocabulary), arguments.hidden)
    run = train(ByHand(p), data.train, generator, steps, "by hand, no autograd  ")
    losses = {"by hand, no autograd": run.losses}
    if run.interrupted:
        console.print(f"interrupted: kept the {len(run.losses)} of {steps} steps that were done")
        return calibrate(p, data.train), losses, True
    other, generator = Parameters.draw(len(data.vocabulary), arguments.hidden)
    again = train(with_functions(other), data.train, generator, steps, "Functions, backward() ")
    losses["our Functions, backward()"] = again.losses
    _show_agreement(console, p, other, run, again)
    return calibrate(p, data.train), losses, again.interrupted


def _show_agreement(console: Console, p: Parameters, other: Parameters, run: Training, again: Training) -> None:
    if again.interrupted:
        console.print(f"interrupted: the run by hand is complete, of this one {len(again.losses)} steps were done")
        return
    with torch.no_grad():
        apart = max(float((a - b).abs().max()) for a, b in zip(p.tensors(), other.tensors(), strict=True))
    console.print(f"after {len(run.losses)} steps the parameters of the two runs differ by at most {apart:.1e}")


def _show_result(console: Console, data: Data, trained: Trained, start: str) -> None:
    for name in ("train", "dev", "test"):
        console.print(f"{name:<5} loss {trained.loss(getattr(data, name)):.4f}")
    generator = torch.Generator().manual_seed(SEED + 10)
    sampled = [trained.sample(data.vocabulary, start, generator) for _ in range(SAMPLES)]
    console.print("sampled names: " + ", ".join(sampled), markup=False)


def _show_side_by_side(console: Console, steps_us: dict[str, float], out: Path) -> None:
    console.rule("[bold]On this machine")
    table = Table("training step of this network (batch 32)", "microseconds", box=None, header_style="bold")
    for name, value in steps_us.items():
        table.add_row(name, f"{value:.0f}")
    console.print(table)
    comparisons = side_by_side.compare_all()
    table = Table("forward + backward, float32", "ours ms", "eager ms", "ours MiB", "eager MiB", header_style="bold")
    for c in comparisons:
        memory = ("?" if b is None else f"{b / 2**20:.0f}" for b in (c.ours_bytes, c.eager_bytes))
        table.add_row(c.name.replace("\n", " "), f"{c.ours_ms:.2f}", f"{c.eager_ms:.2f}", *memory)
    console.print(table)
    console.print(f"figures: {figures.side_by_side(out / 'side_by_side.png', comparisons, steps_us)}")


def run_from_command_line(argv: Sequence[str] | None = None) -> int:
    """``python -m fused_ops.examples.backprop_by_hand.walkthrough``."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return main(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(run_from_command_line())

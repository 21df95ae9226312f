"""The ops on two processes beside PyTorch's: collectives and bytes of a call, time of a step, memory of the head.

``python -m benchmarks.distributed --write docs/distributed.md`` runs them on gloo, keeps the figures in
``benchmarks/results/<machine>/distributed.json`` and writes the tables of the page between its markers.

A call's traffic is what one rank receives: of a gather of n bytes from each of R ranks (R - 1) n, of an all-reduce of n
bytes 2 (R - 1) / R n, as by rings. Times are medians of steps of both in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops.distributed import collectives

from . import machine, memory, tables

RANKS = 2
ROUNDS = 9
RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]


class Traffic(TorchDispatchMode):
    """Counts the collectives of what runs inside, and the bytes that one of ``ranks`` receives of them.

    DTensor's are seen as ops; those of this package run below every mode, and are counted where they are called.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.collectives, self.received = ranks, 0, 0.0
        self.patched = ExitStack()

    def __enter__(self) -> Any:
        for place, name, argument in ((collectives, "_all_gather", 1), (dist, "all_reduce", 0)):
            wrapped = self.counted(getattr(place, name), argument, "gather" in name)
            self.patched.enter_context(mock.patch.object(place, name, wrapped))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patched.close()
        super().__exit__(*error)

    def counted(self, function: Callable[..., Any], argument: int, gathers: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(args[argument].nbytes, gathers)
            return function(*args, **kwargs)

        return call

    def count(self, size: int, gathers: bool) -> None:
        self.collectives += 1
        self.received += (self.ranks - 1) * size * (1 if gathers else 2 / self.ranks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor says what it is made of, and comes back
        name = str(func)
        if name.startswith("_c10d_functional.") and "wait" not in name:
            self.count(args[0].nbytes, "gather" in name)
        return func(*args, **(kwargs or {}))


# ---- cases: name, sizes, and steps by provider; each leaves its gradients


def head_case(rows: int, features: int, classes: int, dtype: torch.dtype, rank: int) -> dict[str, Step]:
    """A vocabulary in two parts: the head with its loss, and the loss of logits that are there."""
    here = classes // RANKS
    mesh = init_device_mesh("cpu", (RANKS,))
    x = torch.randn(rows, features, dtype=dtype).requires_grad_()
    weight = (torch.randn(here, features) * features**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    place = {"class_group": dist.group.WORLD, "class_start": rank * here, "classes": classes}

    def ours() -> None:
        fused_ops.linear_cross_entropy(x, weight, target, **place).backward()
        x.grad = weight.grad = None

    def theirs() -> None:
        logits = DTensor.from_local(F.linear(_copied(x), weight), mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            F.cross_entropy(logits, target).backward()
        x.grad = weight.grad = None

    return {"linear_cross_entropy(class_group=)": ours, "F.linear and loss_parallel": theirs}


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def _copied(x: Tensor) -> Tensor:
    """What a column-parallel layer does to its input: the gradient is the sum over the ranks."""
    copied: Tensor = _Copied.apply(x)
    return copied


def logits_case(rows: int, classes: int, dtype: torch.dtype, rank: int) -> dict[str, Step]:
    here = classes // RANKS
    mesh = init_device_mesh("cpu", (RANKS,))
    logits = torch.randn(rows, here).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    place = {"class_group": dist.group.WORLD, "class_start": rank * here, "classes": classes}

    def ours() -> None:
        fused_ops.cross_entropy(logits, target, **place).backward()
        logits.grad = None

    def theirs() -> None:
        whole = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            F.cross_entropy(whole, target).backward()
        logits.grad = None

    return {"cross_entropy(class_group=)": ours, "loss_parallel": theirs}


def norm_case(shape: tuple[int, ...], rank: int) -> dict[str, Step]:
    """nn.SyncBatchNorm has no CPU: beside it stands what it would send, and the batch norm of one process in time."""
    x = torch.randn(shape).requires_grad_()
    synchronised, alone = fused_ops.SyncBatchNorm(shape[1]), nn.BatchNorm2d(shape[1])

    def step(module: nn.Module) -> Step:
        def run() -> None:
            module(x).sum().backward()
            x.grad = None

        return run

    return {"SyncBatchNorm": step(synchronised), "nn.BatchNorm2d of one process": step(alone)}


CASES: dict[str, Callable[[int], dict[str, Step]]] = {
    "head 1024 x 512 x 32000, float32": lambda rank: head_case(1024, 512, 32000, torch.float32, rank),
    "head 1024 x 512 x 32000, bfloat16": lambda rank: head_case(1024, 512, 32000, torch.bfloat16, rank),
    "logits 1024 x 32000, float32": lambda rank: logits_case(1024, 32000, torch.float32, rank),
    "logits 1024 x 32000, bfloat16": lambda rank: logits_case(1024, 32000, torch.bfloat16, rank),
    "batch norm (16, 64, 56, 56) each": lambda rank: norm_case((16, 64, 56, 56), rank),
}


def measure(rank: int, port: int, only: str, file: str) -> None:
    """What a process does: all cases, in step with the others."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        steps = make(rank)
        times: dict[str, list[float]] = {provider: [] for provider in steps}
        entry: dict[str, Any] = {}
        for provider, run in steps.items():
            run()
            with Traffic(RANKS) as traffic:
                run()
            dist.barrier()
            entry[provider] = {"collectives": traffic.collectives, "bytes": traffic.received}
            entry[provider]["peak_bytes"] = memory.peak_extra_bytes(run)
        for turn in range(ROUNDS):
            for provider in list(steps)[:: 1 if turn % 2 else -1]:
                dist.barrier()
                start = time.perf_counter()
                steps[provider]()
                times[provider].append(time.perf_counter() - start)
        for provider, seconds in times.items():
            entry[provider]["ms"] = 1e3 * statistics.median(seconds)
        found[name] = entry
        if rank == 0:
            print(name, entry, flush=True)
    if rank == 0:
        found["environment"] = {**machine.environment("cpu"), "load": machine.load_average()}
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    dist.barrier()
    os._exit(0)


# ---- the page


def table(found: dict[str, Any]) -> str:
    """Of one machine's figures."""
    rows = []
    for name in CASES:
        if name not in found:
            continue
        first, *_ = found[name].values()
        for provider, entry in found[name].items():
            rows.append(
                (
                    name if entry is first else "",
                    f"`{provider}`",
                    entry["collectives"],
                    f"{entry['bytes'] / 1024:.0f} KiB",
                    f"{entry['ms']:.1f} ms",
                    "" if entry["peak_bytes"] is None else f"{tables.mebibytes(entry['peak_bytes'])} MiB",
                )
            )
    where = found["environment"]
    said = f"Two processes of one thread on {where['machine']} ({where['isa']}), torch {where['torch']}, gloo; "
    columns = "case", "", "collectives", "received", "step", "memory above inputs"
    return f"{said}forward and backward.\n\n{tables.markdown(columns, rows)}"


ALPHA_S, BETA_S = 10e-6, 1e-11  # of a message, and of a byte: what the model of the page assumes


def gather_s(ranks: int, size: float) -> float:
    return ALPHA_S * math.ceil(math.log2(ranks)) + BETA_S * (ranks - 1) * size


def all_reduce_s(ranks: int, size: float) -> float:
    return 2 * ALPHA_S * math.ceil(math.log2(ranks)) + BETA_S * 2 * (ranks - 1) / ranks * size


def model(rows: int = 8192, part: int = 7 * 8, maxima: int = 3 * 8, sums: int = 9 * 8) -> str:
    """The alpha-beta model of a loss: what each form sends of a row in bytes, beside three all-reduces of 4."""
    found = []
    for ranks in (2, 4, 8, 16, 32, 64, 256, 1024):
        times = gather_s(ranks, part * rows), sum(all_reduce_s(ranks, size * rows) for size in (maxima, sums))
        times = *times, 3 * all_reduce_s(ranks, 4 * rows)
        received = part * (ranks - 1), *((size * 2 * (ranks - 1) / ranks) for size in (maxima + sums, 3 * 4))
        shown = [f"{size:.0f} B, {1e6 * time:.0f} us" for size, time in zip(received, times, strict=True)]
        ours = int(ranks >= collectives.MANY_RANKS)
        shown[ours] = f"**{shown[ours]}**"
        found.append((ranks, *shown))
    return tables.markdown(("ranks", "one gather", "maxima and sums", "three all-reduces of 4 bytes"), found)


def write(page: Path, found: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    for marker, content in (("distributed", table(found)), ("model", model())):
        between = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        text = between.sub(lambda m, content=content: m[1] + content + m[2], text)
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it; nothing is kept")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables there")
    parser.add_argument("--no-run", action="store_true", help="from the figures that there are")
    given = parser.parse_args(arguments)
    file = RESULTS / machine.directory_name(machine.machine_name()) / "distributed.json"
    if not given.no_run:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        to = os.devnull if given.only else str(file)
        torch.multiprocessing.spawn(measure, (port, given.only, to), nprocs=RANKS)
    if given.write is not None:
        write(given.write, json.loads(file.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

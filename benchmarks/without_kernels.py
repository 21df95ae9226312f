"""What the ops cost where there are no kernels: plain PyTorch against eager, on this CPU with the library left out.

``python -m benchmarks.without_kernels`` writes the table between the markers of docs/cuda.md; with a pattern it prints
the rows of the cases whose names match. Times are of a forward and backward, the two in turns in one process; peaks are
of a process each, beyond inputs. ``kept`` is ``inplace_activated``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .machine import ROOT, set_allocator
from .memory import peak_extra_bytes

PAGE = ROOT / "docs" / "cuda.md"
MARKER = re.compile(r"(<!-- without_kernels -->\n).*?(<!-- /without_kernels -->)", re.DOTALL)
COLUMNS = ("case", "eager, ms", "plain PyTorch / eager", "eager's peak, MiB", "plain PyTorch / eager")
WAYS = ("eager", "plain")
SECONDS = 0.5  # of timing a case
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Run = Callable[[], object]
Case = Callable[[], dict[str, Run]]


def cases() -> Iterator[tuple[str, Case]]:
    """By name what makes, of its inputs, a forward and backward in both ways."""
    rows, image, planes = (1024, 16000), (4, 21, 128, 128), (16, 64, 56, 56)
    for kind, dtype in DTYPES.items():
        for shape in (rows, (8192, 1000), (65536, 10), image):
            yield _named("cross_entropy", shape, kind), functools.partial(_cross_entropy, shape, dtype)
        yield _named("linear_cross_entropy", (1024, 256, 16000), kind), functools.partial(_linear, dtype, "")
        for shape in (planes, (16, 512, 7, 7), (4096, 512)):
            yield _named("batch_norm", shape, kind), functools.partial(_batch_norm, shape, dtype)
        if kind == "float16":
            continue
        for shape, option in itertools.product((rows, image), ("smoothing", "weights", "z_loss", "softcap")):
            yield _named("cross_entropy", shape, kind, option), functools.partial(_cross_entropy, shape, dtype, option)
        last = functools.partial(_cross_entropy, image, dtype, last=True)
        yield _named("cross_entropy", image, kind, "channels_last"), last
        for option in ("smoothing", "softcap"):
            named = _named("linear_cross_entropy", (1024, 256, 16000), kind, option)
            yield named, functools.partial(_linear, dtype, option)
        for option in ("channels_last", "relu", "gelu", "elu", "residual relu", "evaluation", "kept elu"):
            yield _named("batch_norm", planes, kind, option), functools.partial(_batch_norm, planes, dtype, option)


def _named(op: str, shape: tuple[int, ...], kind: str, option: str = "") -> str:
    return f"{op} {'x'.join(map(str, shape))} {kind}{', ' if option else ''}{option}"


def _runs(eager: Callable[[], Tensor], plain: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, Run]:
    grad = torch.randn_like(result) if (result := eager().detach()).dim() else torch.ones_like(result)
    del result
    return {w: lambda f=f: torch.autograd.grad(f(), leaves, grad) for w, f in zip(WAYS, (eager, plain), strict=True)}


def _composed(z: Tensor, target: Tensor, option: str, weight: Tensor) -> Tensor:
    """An option of the loss in eager PyTorch."""
    if option == "z_loss":
        return F.cross_entropy(z, target) + 1e-4 * z.logsumexp(1).square().mean()
    z = 30 * torch.tanh(z / 30) if option == "softcap" else z
    return F.cross_entropy(z, target, **({} if option in ("softcap",) else _options(option, weight)))


def _options(option: str, weight: Tensor) -> dict[str, Any]:
    found = {"smoothing": {"label_smoothing": 0.1}, "weights": {"weight": weight}, "z_loss": {"z_loss": 1e-4}}
    return {**found, "softcap": {"softcap": 30.0}}.get(option, {})


def _cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, option: str = "", last: bool = False) -> dict[str, Run]:
    import fused_ops

    x = torch.randn(shape).to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    target, weight = torch.randint(0, shape[1], (shape[0], *shape[2:])), torch.rand(shape[1]).to(dtype)
    if option == "probabilities":
        target = torch.randn(shape).softmax(1).to(dtype)
    plain = lambda: fused_ops.cross_entropy(x, target, **_options(option, weight))  # noqa: E731
    return _runs(lambda: _composed(x, target, option, weight), plain, [x])


def _linear(dtype: torch.dtype, option: str) -> dict[str, Run]:
    import fused_ops

    x, w = ((torch.randn(n, 256) / 16).to(dtype).requires_grad_() for n in (1024, 16000))
    target = torch.randint(0, 16000, (1024,))
    plain = lambda: fused_ops.linear_cross_entropy(x, w, target, **_options(option, x))  # noqa: E731
    return _runs(lambda: _composed(F.linear(x, w), target, option, x), plain, [x, w])


def _batch_norm(shape: tuple[int, ...], dtype: torch.dtype, option: str = "") -> dict[str, Run]:
    import fused_ops

    x = torch.randn(shape).to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if option == "channels_last" else x).requires_grad_()
    w, b, mean, var = (torch.rand(shape[1]) for _ in range(4))
    residual = torch.randn_like(x).requires_grad_() if "residual" in option else None
    training, kept = option != "evaluation", "kept" in option
    activation = next((name for name in ("relu", "gelu", "elu") if name in option.split()), None)
    of = getattr(F, activation) if activation else lambda z: z

    def eager() -> Tensor:
        z = F.batch_norm(x * 1 if kept else x, mean, var, w, b, training)
        return of(z if residual is None else z + residual)  # type: ignore[no-any-return]

    def plain() -> Tensor:
        options = {"activation": activation, "residual": residual, "inplace_activated": kept}
        return fused_ops.batch_norm(x * 1 if kept else x, mean, var, w, b, training, **options)

    leaves = [x, w.requires_grad_(), b.requires_grad_(), *(() if residual is None else (residual,))]
    return _runs(eager, plain, leaves)


# ---- in a process of its own, beside a copy of the package without its library


def in_fork(measure: Callable[[], object]) -> Any:
    """What ``measure`` finds in a copy of this process, which has done nothing yet."""
    read, write = os.pipe()
    if not (child := os.fork()):
        with os.fdopen(write, "w") as pipe:
            json.dump(measure(), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def times(case: Case) -> list[float]:
    """Milliseconds of each way, in memory that is used again: page faults are luck, and the peaks tell of memory."""
    set_allocator("recycled")
    torch.set_num_threads(1)
    runs, found, end = case(), [], time.perf_counter() + SECONDS
    while len(found) < 4 or (time.perf_counter() < end and len(found) < 100):
        row = []
        for way in WAYS:
            start = time.perf_counter()
            runs[way]()
            row.append(1e3 * (time.perf_counter() - start))
        found.append(row)
    return [median(row[i] for row in found[1:]) for i in range(len(WAYS))]


def peak(case: Case, way: str) -> int | None:
    """Bytes, of the second run: the first one loads what it needs."""
    set_allocator("fresh")
    torch.set_num_threads(1)
    run = case()[way]
    run()
    return peak_extra_bytes(lambda: run() and None)


def measure(pattern: str) -> None:
    """Prints a case and its figures a line."""
    import fused_ops  # noqa: F401

    for name, case in cases():
        if re.search(pattern, name):
            eager, plain = in_fork(lambda case=case: times(case))
            peaks = [in_fork(lambda case=case, way=way: peak(case, way)) for way in WAYS]
            print(json.dumps((name, eager, plain / eager, peaks[0] / 2**20, peaks[1] / peaks[0])), flush=True)


def main(pattern: str | None) -> None:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "fused_ops", Path(folder) / "fused_ops", ignore=ignored)
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "benchmarks.without_kernels", "--measure", pattern or ""]
        with subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                name, *figures = json.loads(line)
                lines.append([name, *(f"{figure:.3g}" for figure in figures)])
                print(*lines[-1], sep=" | ", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)
    if pattern is None:
        write(lines)


def write(lines: list[list[str]]) -> None:
    """The table."""
    table = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * 4, *(f"| {' | '.join(cells)} |" for cells in lines)]
    text, page = "\n".join(table), PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKER.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        main(sys.argv[1] if sys.argv[1:] else None)

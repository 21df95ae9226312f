"""What the ops cost where there are no kernels: plain PyTorch against eager, on this CPU with the library left out.

``python -m benchmarks.without_kernels`` writes the table between the markers of docs/cuda.md. Times are of a forward
and backward, the two in turns in one process; peaks are of a process each, beyond inputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from .machine import ROOT

PAGE = ROOT / "docs" / "cuda.md"
MARKER = re.compile(r"(<!-- without_kernels -->\n).*?(<!-- /without_kernels -->)", re.DOTALL)
COLUMNS = ("case", "eager, ms", "plain PyTorch / eager", "eager's peak, MiB", "plain PyTorch's")
WAYS = ("eager", "plain")
Call = Callable[[], Tensor]


def cases() -> dict[str, Callable[[], dict[str, Call]]]:
    """By name what makes, of its inputs, the same loss in both ways."""
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "cross_entropy 1024x16000 float32": lambda: _cross_entropy((1024, 16000), f32),
        "cross_entropy 1024x16000 bfloat16": lambda: _cross_entropy((1024, 16000), bf16),
        "cross_entropy 1024x16000 float32, smoothing": lambda: _cross_entropy((1024, 16000), f32, 0.1),
        "cross_entropy 4x21x128x128 float32": lambda: _cross_entropy((4, 21, 128, 128), f32),
        "linear_cross_entropy 1024x256 x 16000 float32": lambda: _linear(1024, 256, 16000, f32),
        "linear_cross_entropy 1024x256 x 16000 bfloat16": lambda: _linear(1024, 256, 16000, bf16),
        "batch_norm 16x64x56x56 float32": lambda: _batch_norm((16, 64, 56, 56), f32),
        "batch_norm 16x64x56x56 bfloat16 + relu": lambda: _batch_norm((16, 64, 56, 56), bf16, "relu"),
    }


def _cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, smoothing: float = 0.0) -> dict[str, Call]:
    import fused_ops

    x = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    both = (F.cross_entropy, fused_ops.cross_entropy)
    return {way: lambda f=f: f(x, target, label_smoothing=smoothing) for way, f in zip(WAYS, both, strict=True)}


def _linear(rows: int, features: int, classes: int, dtype: torch.dtype) -> dict[str, Call]:
    import fused_ops

    x, w = ((torch.randn(n, features) / 16).to(dtype).requires_grad_() for n in (rows, classes))
    target = torch.randint(0, classes, (rows,))
    return {
        "eager": lambda: F.cross_entropy(F.linear(x, w), target),
        "plain": lambda: fused_ops.linear_cross_entropy(x, w, target),
    }


def _batch_norm(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None = None) -> dict[str, Call]:
    import fused_ops

    x = torch.randn(shape).to(dtype).requires_grad_()
    w, b = (torch.randn(shape[1]).requires_grad_() for _ in range(2))

    def eager() -> Tensor:
        y = F.batch_norm(x, None, None, w, b, True)
        return (F.relu(y) if activation else y).sum()

    plain = lambda: fused_ops.batch_norm(x, None, None, w, b, True, activation=activation).sum()  # noqa: E731
    return {"eager": eager, "plain": plain}


# ---- in a process of its own, beside a copy of the package without its library


def measure(name: str, way: str) -> object:
    """The milliseconds of each way, or the peak of one in bytes."""
    calls = cases()[name]()
    if way == "times":
        times: dict[str, list[float]] = {w: [] for w in WAYS}
        for _ in range(6):
            for w in WAYS:
                start = time.perf_counter()
                calls[w]().backward()
                times[w].append(1e3 * (time.perf_counter() - start))
        return {w: median(t[1:]) for w, t in times.items()}
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the inputs
    before = _memory("VmRSS")
    calls[way]().backward()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """Bytes, of what Linux says of this process."""
    said = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert said is not None
    return 1024 * int(said[1])


def line(name: str, folder: str) -> list[str]:
    """A case's row of the table."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONWARNINGS": "ignore"}
    found = []
    for way in ("times", *WAYS):
        command = [sys.executable, "-m", "benchmarks.without_kernels", name, way]
        done = subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    times, *peaks = found
    return [
        name,
        f"{times['eager']:.3g}",
        f"{times['plain'] / times['eager']:.2f}",
        *(f"{p / 2**20:.0f}" for p in peaks),
    ]


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "fused_ops", Path(folder) / "fused_ops", ignore=ignored)
        for name in cases():
            lines.append(line(name, folder))
            print(*lines[-1], sep=" | ", flush=True)
            write(lines)


def write(lines: list[list[str]]) -> None:
    """The table, as far as it is known."""
    table = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * 4, *(f"| {' | '.join(cells)} |" for cells in lines)]
    text, page = "\n".join(table), PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKER.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()

"""``python -m benchmarks.batch_norm_accuracy``: writes batch norm's table of errors into docs/batch_norm.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops

from .machine import ROOT

PAGE = ROOT / "docs" / "batch_norm.md"
MARKER = re.compile(r"(<!-- batch_norm_accuracy -->\n).*?(<!-- /batch_norm_accuracy -->)", re.DOTALL)
SHAPES = ((4096, 32), (4, 16, 12, 12), (32, 16, 28, 28))
RATIOS = (0.0, 10.0, 1e3, 1e5)
STD = 0.01
QUANTITIES = ("output", "eval output", "grad_input", "grad_weight", "running_mean", "running_var")


def _results(function: Callable[..., Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaf, weight = x.clone().requires_grad_(), torch.ones(x.size(1), dtype=wide, requires_grad=True)
    mean, var = (torch.zeros(x.size(1), dtype=wide) for _ in range(2))
    y = function(leaf, mean, var, weight, None, True, 1.0, 1e-12)
    grads = torch.autograd.grad(y, (leaf, weight), g.to(y.dtype))
    with torch.no_grad():
        still = function(x, *(t.clone() for t in (mean, var)), weight, None, False, 0.0, 1e-12)
    return y.detach(), still, *grads, mean, var


def _error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


def rows() -> Iterator[tuple[tuple[str, ...], list[tuple[float, float]]]]:
    """What is measured, and the largest error over the largest value, ours and PyTorch's, of each of QUANTITIES."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            for layout in ("contiguous", "channels_last")[: len(shape) // 2]:
                for ratio in RATIOS if dtype == torch.float32 else RATIOS[:2]:
                    g = torch.Generator().manual_seed(0)
                    x, upstream = (torch.randn(shape, generator=g) for _ in range(2))
                    x = ((x + ratio) * STD).to(dtype)
                    if layout == "channels_last":
                        x = x.contiguous(memory_format=torch.channels_last)
                    upstream = upstream.to(dtype)
                    truth = _results(F.batch_norm, x.double(), upstream.double())
                    found = (_results(f, x, upstream) for f in (fused_ops.batch_norm, F.batch_norm))
                    errors = [[_error(*pair) for pair in zip(values, truth, strict=True)] for values in found]
                    name = ("x".join(map(str, shape)), layout, str(dtype).removeprefix("torch."), f"{ratio:g}")
                    yield name, list(zip(*errors, strict=True))


def table() -> str:
    """The table in Markdown."""
    columns = ["shape", "layout", "dtype", "mean / std", *QUANTITIES]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for name, pairs in rows():
        cells = [f"{ours:.0e} / {theirs:.0e}" for ours, theirs in pairs]
        lines.append("| " + " | ".join([*name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Brings the page up to date."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKER.sub(lambda m: m[1] + table() + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()

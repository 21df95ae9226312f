"""Linear cross-entropy: heads of language models, and a small one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops

from .harness import COMPILE, OURS, TRUTH, Case, Inputs, Provider
from .targets import SpeedTarget

OP = "linear_cross_entropy"
NATIVE, PRODUCTS = "F.linear_cross_entropy", "three products"
FORMULA = (
    "input, linear_weight and the targets are read once per direction, their gradients written once; the logits are "
    "not counted: they need not exist"
)


def draw(rows: int, features: int, classes: int, dtype: torch.dtype, device: str) -> Inputs:
    """Hidden states, weights and targets, the same ones each time."""
    g = torch.Generator().manual_seed(rows + classes)
    tensors = {
        "input": torch.randn(rows, features, generator=g).to(dtype).to(device),
        "linear_weight": (torch.randn(classes, features, generator=g) * features**-0.5).to(dtype).to(device),
        "target": torch.randint(0, classes, (rows,), generator=g).to(device),
    }
    return Inputs(tensors, leaves=("input", "linear_weight"))


def _eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def _ours(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fused_ops.linear_cross_entropy(input, linear_weight, target, **options)
    return loss


def _native(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(input, linear_weight, target, options=torch.nn.LinearCrossEntropyOptions())


class _Products(torch.autograd.Function):
    """The three matrix products and nothing between them: the floor."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear_weight: Tensor) -> Tensor:
        logits = F.linear(input, linear_weight)
        ctx.save_for_backward(input, linear_weight, logits)
        return logits[0, 0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, linear_weight, logits = ctx.saved_tensors
        return logits @ linear_weight, logits.t() @ input


class ProductsRunner:
    """Runs the floor; its results are not those of a loss and are not compared."""

    def __init__(self, inputs: Inputs) -> None:
        self._tensors = [inputs.tensors[name].clone().requires_grad_() for name in inputs.leaves]
        self._output: Tensor | None = None

    def prepare(self, direction: str) -> None:
        for tensor in self._tensors:
            tensor.grad = None

    def run(self, direction: str) -> None:
        output = _Products.apply(*self._tensors)
        if direction == "both":
            output.backward()

    def results(self) -> dict[str, Tensor]:
        return {}


def _products(case: Case, inputs: Inputs, threads: int) -> ProductsRunner:
    return ProductsRunner(inputs)


def providers(small: bool) -> tuple[Provider, ...]:
    """Eager, compiled, PyTorch's own chunked op, ours, and the products alone."""
    both = ("forward", "both")
    found = [Provider(TRUTH, _eager, directions=both), Provider(COMPILE, _eager, compiled=True, directions=both)]
    if not small:
        absent = "" if hasattr(F, "linear_cross_entropy") else "this torch has no F.linear_cross_entropy"
        found.append(Provider(NATIVE, missing=absent) if absent else Provider(NATIVE, _native, directions=both))
    # not held to the error rule here, where sums of products have another order; tests/ hold it to a bound
    found.append(Provider(OURS, _ours, directions=both))
    found.append(Provider(PRODUCTS, make=_products, directions=both))
    return tuple(found)


def case(rows: int, features: int, classes: int, dtype: torch.dtype, name: str = "", **fields: Any) -> Case:
    """One case, named after (rows, features) x classes."""
    size = dtype.itemsize
    moved = size * features * (rows + classes) + 8 * rows
    return Case(
        op=OP,
        name=name or f"{rows}x{features} x {classes} {str(dtype).removeprefix('torch.')}",
        shape=(rows, features),
        dtype=dtype,
        inputs=partial(draw, rows, features, classes, dtype),
        providers=providers(rows < 100),
        moved_bytes={"forward": moved, "backward": 2 * moved, "both": 3 * moved},
        formula=FORMULA,
        **fields,
    )


def cases(device: str) -> list[Case]:
    """The shapes of the targets, then the sweep over chunk sizes."""
    f32, bf16 = torch.float32, torch.bfloat16
    found = [
        case(1024, 512, 32000, f32, quick=True, memory=("quick", "full")),
        case(1024, 512, 32000, bf16, quick=True, memory=("full",)),
        case(2048, 768, 50257, f32),
        case(2048, 768, 50257, bf16),
        case(1024, 2048, 128256, bf16),
        case(32, 64, 27, f32, quick=True, part="overhead", tiny=True),
    ]
    for chunk in (16, 32, 64, 128, 256, 512, 1024):
        one = case(1024, 512, 32000, f32, f"chunk_rows={chunk}", part="sweep", sweep="chunk_rows", size=chunk)
        chunked: Callable[..., Tensor] = partial(_ours, chunk_rows=chunk)
        chosen = [Provider(OURS, chunked, directions=("both",)) if p.name == OURS else p for p in one.providers]
        kept = tuple(p for p in chosen if p.name in (TRUTH, OURS))
        found.append(Case(**{**one.__dict__, "providers": kept}))
    return found


def targets() -> list[SpeedTarget]:
    """The figures to reach: ratios of medians within one run, forward and backward together."""
    wanted = []
    for shape in ("1024x512 x 32000", "2048x768 x 50257", "1024x2048 x 128256"):
        for dtype in ("float32", "bfloat16") if shape[-1] != "6" else ("bfloat16",):
            name = f"{shape} {dtype}"
            wanted.append(SpeedTarget(OP, name, OURS, TRUTH, 1 / 0.85))
            wanted.append(SpeedTarget(OP, name, OURS, NATIVE, 1 / 0.75))
            wanted.append(SpeedTarget(OP, name, OURS, PRODUCTS, 1 / 1.15))
    wanted.append(SpeedTarget(OP, "32x64 x 27 float32", OURS, TRUTH, 1.0, threads=1))
    return wanted

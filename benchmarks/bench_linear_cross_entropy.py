"""Linear cross-entropy: heads of language models, and a small one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops
from fused_ops.ops.linear_cross_entropy.by_rows import INPUT, WEIGHT
from fused_ops.ops.linear_cross_entropy.plan import Sizes, default_bytes

from . import rivals
from .harness import COMPILE, OURS, TRUTH, Case, Inputs, Provider
from .targets import MemoryTarget, SpeedTarget, Target

OP = "linear_cross_entropy"
NATIVE, PRODUCTS, CUT = "F.linear_cross_entropy", "three products", "cut-cross-entropy"
LEAST = f"{OURS} in 3 %"
FULL = ("full",)
FEW = (3, 5)  # rounds of runs of seconds
SWEPT, SWEPT_GPU = (1024, 512, 32000), (8192, 4096, 128256)  # rows, features, classes of the sweeps
FORMULA = (
    "input, linear_weight and the targets are read once per direction, their gradients written once; the logits are "
    "not counted: they need not exist"
)


def draw(rows: int, features: int, classes: int, dtype: torch.dtype, ignored: float, device: str) -> Inputs:
    """Hidden states, weights and targets, the same ones each time; ``ignored`` of the targets count for nothing."""
    g = torch.Generator(device).manual_seed(rows + classes)
    tensors = {
        "input": torch.randn(rows, features, generator=g, device=device).to(dtype),
        "linear_weight": (torch.randn(classes, features, generator=g, device=device) * features**-0.5).to(dtype),
        "target": torch.randint(0, classes, (rows,), generator=g, device=device),
    }
    tensors["target"][torch.rand(rows, generator=g, device=device) < ignored] = -100
    return Inputs(tensors, leaves=("input", "linear_weight"), shared=True)


def _eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def _ours(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fused_ops.linear_cross_entropy(input, linear_weight, target, **options)
    return loss


def _native(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(input, linear_weight, target, options=torch.nn.LinearCrossEntropyOptions())


def _cut(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if input.is_cuda else "torch_compile"
    loss: Tensor = linear_cross_entropy(input, linear_weight, target, impl=impl)
    return loss


def _liger(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def loss(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        found: Tensor = function(input, linear_weight, target)
        return found

    return loss


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
        self._tensors = [inputs.tensors[name].detach().requires_grad_() for name in inputs.leaves]
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


def providers(small: bool, least: int, device: str) -> tuple[Provider, ...]:
    """Eager, compiled, PyTorch's own chunked op, ours (also in 3 % of the logits' bytes), and the products alone."""
    both = ("forward", "both")
    found = [Provider(TRUTH, _eager, directions=both), Provider(COMPILE, _eager, compiled=True, directions=both)]
    if not small:
        absent = "" if hasattr(F, "linear_cross_entropy") else "this torch has no F.linear_cross_entropy"
        found.append(Provider(NATIVE, missing=absent) if absent else Provider(NATIVE, _native, directions=both))
        why = rivals.missing(CUT, device)
        found.append(Provider(CUT, missing=why) if why else Provider(CUT, _cut, directions=both))
        if device == "cuda":
            liger, why = rivals.call("liger-kernel", OP, device)
            found.append(Provider("liger-kernel", None if liger is None else _liger(liger), None, why, directions=both))
    # not held to the error rule here, where sums of products have another order; tests/ hold it to a bound
    found.append(Provider(OURS, _ours, directions=both))
    if not small:
        found.append(Provider(LEAST, partial(_ours, max_memory_bytes=least), directions=both))
    found.append(Provider(PRODUCTS, make=_products, directions=both))
    return tuple(found)


def case(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    device: str,
    name: str = "",
    ignored: float = 0,
    **fields: Any,
) -> Case:
    """One case, named after (rows, features) x classes."""
    size = dtype.itemsize
    moved = size * features * (rows + classes) + 8 * rows
    return Case(
        op=OP,
        name=name or f"{rows}x{features} x {classes} {str(dtype).removeprefix('torch.')}",
        shape=(rows, features),
        dtype=dtype,
        inputs=partial(draw, rows, features, classes, dtype, ignored),
        providers=providers(rows < 100, 3 * rows * classes * size // 100, device),
        moved_bytes={"forward": moved, "backward": 2 * moved, "both": 3 * moved},
        formula=FORMULA,
        **fields,
    )


def _sweep(
    by: str, sizes: tuple[int, ...], option: Callable[[int], dict[str, int]], dtype: torch.dtype, device: str
) -> list[Case]:
    """Ours at one shape over an option, beside eager."""
    found, word = [], str(dtype).removeprefix("torch.")
    for size in sizes:
        one = case(
            *(SWEPT_GPU if device == "cuda" else SWEPT),
            dtype,
            device,
            f"{by}={size} {word}",
            part="sweep",
            sweep=f"{by} {word}",
            size=size,
            memory=FULL,
            rounds=FEW,
        )
        function: Callable[..., Tensor] = partial(_ours, **option(size))
        ours = [Provider(OURS, function, directions=("both",)) if p.name == OURS else p for p in one.providers]
        found.append(replace(one, providers=tuple(p for p in ours if p.name in (TRUTH, OURS))))
    return found


def cases(device: str) -> list[Case]:
    """The shapes of the targets, half of the rows ignored, many rows, then the sweeps over chunks and memory."""
    f32, bf16 = torch.float32, torch.bfloat16
    found = [
        case(1024, 512, 32000, f32, device, quick=True, memory=("quick", "full")),
        case(1024, 512, 32000, bf16, device, quick=True, memory=FULL),
        case(2048, 768, 50257, f32, device, memory=FULL, rounds=FEW),
        case(2048, 768, 50257, bf16, device, memory=FULL, rounds=FEW),
        case(1024, 2048, 128256, f32, device, memory=FULL, rounds=FEW),
        case(1024, 2048, 128256, bf16, device, memory=FULL, rounds=FEW),
        case(8192, 512, 32000, f32, device, memory=FULL, rounds=FEW),
        case(8192, 512, 32000, bf16, device, memory=FULL, rounds=FEW),
        case(1024, 512, 32000, f32, device, "1024x512 x 32000 float32, half of the rows ignored", ignored=0.5),
        case(32, 64, 27, f32, device, quick=True, part="overhead", tiny=True),
    ]
    if device == "cuda":  # what a training step of a language model has
        found.append(case(*SWEPT_GPU, bf16, device, quick=True, memory=("quick", "full"), rounds=FEW))
        chunks = (512, 1024, 2048, 4096, 8192)
        return [*found, *_sweep("chunk_rows", chunks, lambda n: {"chunk_rows": n}, bf16, device)]
    for dtype in (f32, bf16):
        logits = SWEPT[0] * SWEPT[2] * dtype.itemsize
        found += _sweep("chunk_rows", (16, 32, 64, 128, 256, 512, 1024), lambda n: {"chunk_rows": n}, dtype, device)
        percents = (2, 3, 6, 12, 25, 50, 100)
        found += _sweep(
            "memory in percent of the logits",
            percents,
            lambda n, b=logits: {"max_memory_bytes": n * b // 100},
            dtype,
            device,
        )  # type: ignore[misc]
    return found


def targets() -> list[SpeedTarget | MemoryTarget]:
    """The figures to reach: ratios of medians within one run, forward and backward together; and the memory."""
    wanted: list[SpeedTarget | MemoryTarget] = []
    for rows, features, classes in ((1024, 512, 32000), (2048, 768, 50257), (8192, 512, 32000), (1024, 2048, 128256)):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{rows}x{features} x {classes} {str(dtype).removeprefix('torch.')}"
            wanted.append(SpeedTarget(OP, name, OURS, TRUTH, 1.0))
            wanted.append(SpeedTarget(OP, name, OURS, COMPILE, 1.0))
            wanted.append(SpeedTarget(OP, name, OURS, NATIVE, 1 / 0.75))
            wanted.append(SpeedTarget(OP, name, OURS, PRODUCTS, 1 / 1.15))
            default = default_bytes(Sizes(rows, features, classes, 1, dtype.itemsize), INPUT | WEIGHT, True)
            logits = 1.01 * default / dtype.itemsize  # and the rows' results
            wanted.append(_memory(rows, features, classes, name, OURS, logits))
            wanted.append(_memory(rows, features, classes, name, LEAST, 0.03 * rows * classes))
    wanted.append(SpeedTarget(OP, "32x64 x 27 float32", OURS, TRUTH, 1.0, threads=1))
    return wanted


def gpu_targets() -> list[Target]:
    """No slower than eager, liger-kernel and PyTorch's own op, in a tenth of the logits' memory."""
    name = "8192x4096 x 128256 bfloat16"
    found: list[Target] = [SpeedTarget(OP, name, OURS, rival, 1.0) for rival in (TRUTH, NATIVE, "liger-kernel", CUT)]
    tenth = (0.1 * 8192 * 128256 + 4096 * (8192 + 128256)) / (8192 * 4096)
    return [*found, MemoryTarget(OP, name, OURS, "both", tenth)]


def _memory(rows: int, features: int, classes: int, name: str, provider: str, logits: float) -> MemoryTarget:
    """So many logits beyond the two gradients, in units of the case's input, as targets are counted."""
    maximum = (logits + features * (rows + classes)) / (rows * features)
    return MemoryTarget(OP, name, provider, "both", maximum)

"""Cross-entropy of logits: shapes of language models, image classifiers, segmentation and character models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops

from . import pages, rivals
from .accuracy import AccuracyCase
from .harness import COMPILE, OURS, TRUTH, Case, Inputs, Provider, Runner
from .instructions import InstructionCase
from .offered import missing_call, missing_options, ours
from .targets import BandwidthTarget, MemoryTarget, SpeedTarget, Target

OP = "cross_entropy"
IN_PLACE = f"{OURS} in place"
FORMULA = (
    "forward reads the logits once; backward reads them and writes the gradient; targets (and class probabilities, "
    "of the logits' size) are read once per direction"
)
ALL = ("forward", "backward", "both")
FULL, BOTH = ("full",), ("quick", "full")  # suites that weigh a case


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, target: str, device: str) -> Inputs:
    """Logits and targets, the same ones each time."""
    g = torch.Generator(device).manual_seed(sum(shape))
    logits = torch.randn(shape, generator=g, device=device)
    if target == "probabilities":
        answer = torch.randn(shape, generator=g, device=device).softmax(1).to(dtype)
    else:
        answer = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=g, device=device)
    logits = logits.to(dtype)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    tensors = {"input": logits, "target": answer}
    if target == "weighted":
        tensors["weight"] = (torch.rand(shape[1], generator=g, device=device) + 0.5).to(dtype)
    return Inputs(tensors, leaves=("input",), fresh=("input",))


def bytes_that_move(shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool) -> dict[str, int]:
    """The formula above."""
    logits = dtype.itemsize
    for n in shape:
        logits *= n
    target = logits if probabilities else logits // dtype.itemsize // shape[1] * 8
    return {"forward": logits + target, "backward": 2 * logits + target, "both": 3 * logits + 2 * target}


PIECE = 40960  # values: more than the small calls' kernel takes; twice that and its gradient are 640 KiB


def piece_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """So many pieces of the shape: fewer rows, of at most 8192 classes, which the loops of longer rows take too."""
    if len(shape) == 2:
        classes = min(shape[1], 8192)
        return count * PIECE // classes, classes
    return count, shape[1], max(1, PIECE // shape[1] // shape[3]), *shape[3:]


def _ours(options: dict[str, Any], **more: Any) -> Callable[..., Tensor]:
    def function(input: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        logits = input.view_as(input) if more else input  # in place of a leaf is refused; a layer's output is none
        return fused_ops.cross_entropy(logits, target, **tensors, **options, **more)

    return function


def _eager(options: dict[str, Any]) -> Callable[..., Tensor]:
    def function(input: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        return F.cross_entropy(input, target, **tensors, **options)

    return function


@cache
def _takes_probabilities() -> str:
    return missing_call(lambda: fused_ops.cross_entropy(torch.zeros(2, 3), torch.full((2, 3), 1 / 3)))


def providers(device: str, options: dict[str, Any], target: str, jax: bool) -> tuple[Provider, ...]:
    """Eager, compiled, ours, ours in place, and jax where the case is one that optax has."""
    needed = [*options, *(["weight"] if target == "weighted" else [])]
    reason = missing_options(fused_ops.cross_entropy, *needed)
    if not reason and target == "probabilities":
        reason = _takes_probabilities()
    in_place = reason or missing_options(fused_ops.cross_entropy, "inplace_backward")
    found = [
        Provider(TRUTH, _eager(options)),
        Provider(COMPILE, _eager(options), compiled=True),
        ours(_ours(options), reason),
        ours(_ours(options, inplace_backward=True), in_place, IN_PLACE),
    ]
    if jax:
        absent = rivals.missing("jax", device)
        found.append(Provider("jax", missing=absent) if absent else Provider("jax", make=_jax, directions=_JAX_RUNS))
    if device == "cuda":
        found += [_gpu_rival(name, device, options, target) for name in GPU_RIVALS]
    return tuple(found)


def _liger(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Tensor]:
    def loss(input: Tensor, target: Tensor, **weight: Tensor) -> Tensor:
        # it computes the gradient in the forward, in the logits' memory
        return function(input.view_as(input), target, **weight, **options)

    return loss


def _flash(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Tensor]:
    def loss(input: Tensor, target: Tensor) -> Tensor:
        return function(input, target, **options)[0].mean()

    return loss


def _quack(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Tensor]:
    def loss(input: Tensor, target: Tensor, **weight: Tensor) -> Tensor:
        return function(input, target, **{name: t.float() for name, t in weight.items()})

    return loss


def _apex(function: Any, options: dict[str, Any]) -> Callable[..., Tensor]:
    def loss(input: Tensor, target: Tensor) -> Tensor:
        return function.apply(input, target, options.get("smoothing", 0.0), -100, True).mean()

    return loss


# how a rival is called, and by which names it knows the options that it has
GPU_RIVALS: dict[str, tuple[Callable[..., Callable[..., Tensor]], dict[str, str]]] = {
    "liger-kernel": (_liger, {"label_smoothing": "label_smoothing", "weight": "weight"}),
    "flash-attn": (_flash, {"label_smoothing": "label_smoothing"}),
    "quack-kernels": (_quack, {"weight": "weight"}),
    "apex": (_apex, {"label_smoothing": "smoothing"}),
}


def _gpu_rival(name: str, device: str, options: dict[str, Any], target: str) -> Provider:
    adapter, known = GPU_RIVALS[name]
    wanted = [*options, *{"weighted": ["weight"], "probabilities": ["class probabilities"]}.get(target, [])]
    lacking = [option for option in wanted if option not in known]
    function, reason = rivals.call(name, OP, device)
    if function is None or lacking:
        return Provider(name, missing=reason or f"has no {', '.join(lacking)}")
    return Provider(name, adapter(function, {known[k]: v for k, v in options.items()}))


_JAX_RUNS = ("forward", "both")  # jax has no backward of its own to call


class JaxRunner:
    """optax's cross-entropy under jax.jit, as an outside yardstick."""

    def __init__(self, inputs: Inputs) -> None:
        import jax
        import jax.dlpack
        import optax

        def loss(logits: Any, target: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

        self._jax = jax
        self._base = jax.dlpack.from_dlpack(inputs.tensors["input"].clone())
        self._target = jax.dlpack.from_dlpack(inputs.tensors["target"].to(torch.int32))
        self._forward, self._both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
        self._copy = jax.jit(lambda x: x + 0)
        self._logits = self._base

    def prepare(self, direction: str) -> None:
        self._logits = self._copy(self._base).block_until_ready()

    def run(self, direction: str) -> None:
        function = self._both if direction == "both" else self._forward
        self._jax.block_until_ready(function(self._logits, self._target))

    def results(self) -> dict[str, Tensor]:
        loss, grad = self._both(self._base, self._target)
        return {"output": torch.from_dlpack(loss), "grad_input": torch.from_dlpack(grad)}


def _jax(case: Case, inputs: Inputs, threads: int) -> Runner:
    return JaxRunner(inputs)


def case(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "",
    layout: str = "contiguous",
    target: str = "indices",
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> Case:
    """One case; its name says what differs from float32, contiguous, class indices and no options."""
    options = options or {}
    words = ["x".join(map(str, shape)), str(dtype).removeprefix("torch.")]
    words += [layout] if layout != "contiguous" else []
    words += [f"{k}={v}" for k, v in options.items()]
    words += {"indices": [], "weighted": ["weight"], "probabilities": ["probabilities"]}[target]
    plain = not options and target == "indices" and len(shape) == 2
    return Case(
        op=OP,
        name=name or " ".join(words),
        shape=shape,
        dtype=dtype,
        inputs=partial(draw, shape, dtype, layout, target),
        providers=providers(device, options, target, plain and not fields.get("sweep")),
        moved_bytes=bytes_that_move(shape, dtype, target == "probabilities"),
        formula=FORMULA,
        pieces=lambda count, device: draw(piece_shape(shape, count), dtype, layout, target, device),
        layout=layout,
        **fields,
    )


GPU_SHAPES = ((32768, 1024), (16384, 4096), (8192, 32000), (4096, 128256), (2048, 262144))


def _pages(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """A case with and without huge pages, in turns; there is nothing to compare but on the CPU."""
    made = case(device, shape, dtype, part=pages.PART, directions=ALL, quick=True)
    both = [p for p in made.providers if p.name in (TRUTH, OURS)]
    both += [pages.provider(_ours({}))] if device == "cpu" else []
    return replace(made, name=f"{made.name} pages", providers=tuple(both))


def cases(device: str) -> list[Case]:
    """The shape classes of the targets below, those that fill a GPU, then the sweeps."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    make = partial(case, device)
    found = [
        make((1024, 32000), f32, quick=True, memory=BOTH, directions=ALL),
        make((1024, 32000), bf16, quick=True, memory=FULL, directions=ALL),
        make((1024, 32000), f16, directions=ALL),
        make((512, 128256), f32, memory=FULL),
        make((512, 128256), bf16),
        make((512, 128256), f16),
        make((8192, 1000), f32, quick=True, memory=FULL, directions=ALL),
        make((65536, 10), f32, quick=True, directions=ALL),
        make((65536, 27), f32, quick=True, memory=FULL, directions=ALL),
        make((16, 21, 256, 256), f32, quick=True, memory=FULL, directions=ALL),
        make((16, 21, 256, 256), f32, layout="channels_last", memory=FULL, directions=ALL),
        make((32, 27), f32, quick=True, part="overhead", tiny=True, directions=ALL),
        make((256, 100), f32, quick=True, part="overhead", tiny=True, directions=ALL),
        make((1024, 32000), f32, options={"label_smoothing": 0.1}, memory=FULL),
        make((1024, 32000), f32, target="weighted", memory=FULL),
        make((1024, 32000), f32, target="probabilities", memory=FULL),
    ]
    if device == "cpu":
        found += [_pages(device, shape, dtype) for shape, dtype in (((1024, 32000), f32), ((1024, 32000), bf16))]
        found.append(_pages(device, (8192, 1000), f32))
    if device == "cuda":
        few = {"65536x27 float32", "16x21x256x256 float32"}
        found = [replace(c, quick=c.name in few) for c in found]
        found += [make(shape, bf16, quick=True, memory=BOTH, directions=ALL) for shape in GPU_SHAPES]
    elements = 1 << 23
    for classes in (27, 100, 316, 1000, 3162, 10000, 32000, 100000, 262144):
        fields = {
            "part": "sweep",
            "sweep": "classes",
            "size": classes,
            "memory": FULL if classes in (100, 1000, 10_000, 100_000) else (),
        }
        found.append(make((elements // classes, classes), name=f"classes={classes}", **fields))
    for rows in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000):
        fields = {"part": "sweep", "sweep": "rows", "size": rows, "memory": FULL if rows >= 10_000 else ()}
        found.append(make((rows, 128), name=f"rows={rows}", **fields))
    return found


def targets() -> list[SpeedTarget | MemoryTarget]:
    """The figures to reach: ratios of medians within one run, forward and backward together.

    None is above what a case's bytes and arithmetic allow (the table of results says what that is): the first of two
    against eager holds for every instruction set, the second for AVX-512, where exponentials cost half as much.
    """
    wanted: list[SpeedTarget | MemoryTarget] = []

    def add(name: str, eager: tuple[float, float], compile: float, in_place: tuple[float, float]) -> None:
        for provider, (every, avx512) in ((OURS, eager), (IN_PLACE, in_place)):
            wanted.append(SpeedTarget(OP, name, provider, TRUTH, every))
            if avx512 > every:
                wanted.append(SpeedTarget(OP, name, provider, TRUTH, avx512, isa="AVX512"))
        wanted.append(SpeedTarget(OP, name, OURS, COMPILE, compile))

    for shape in ("1024x32000", "512x128256"):
        add(f"{shape} float32", (5, 8), 1.6, (9, 14))
        for dtype in ("bfloat16", "float16"):
            add(f"{shape} {dtype}", (4, 6.5), 1.6, (5, 10))
    add("8192x1000 float32", (2.5, 2.5), 1.8, (3, 3))
    add("65536x10 float32", (2.2, 8), 2, (2.2, 8))
    add("65536x27 float32", (2.5, 2.5), 2, (2.5, 2.5))
    for layout in ("", " channels_last"):
        add(f"16x21x256x256 float32{layout}", (2.5, 5), 1.5, (2.5, 6))
    wanted += [SpeedTarget(OP, f"{shape} float32", OURS, TRUTH, 1.0, threads=1) for shape in ("32x27", "256x100")]
    for option in ("label_smoothing=0.1", "weight", "probabilities"):
        wanted.append(SpeedTarget(OP, f"1024x32000 float32 {option}", OURS, TRUTH, 6))
        wanted.append(SpeedTarget(OP, f"1024x32000 float32 {option}", OURS, COMPILE, 1.6))
    wanted.append(SpeedTarget(OP, "1024x32000 float32", IN_PLACE, "copy", 1 / 1.8))
    for name in ("1024x32000 float32", "1024x32000 bfloat16", "8192x1000 float32"):
        wanted.append(MemoryTarget(OP, name, OURS, "forward", 0.02))
        wanted.append(MemoryTarget(OP, name, OURS, "both", 1.05))
        wanted.append(MemoryTarget(OP, name, IN_PLACE, "both", 0.05))
    return wanted


def gpu_targets() -> list[Target]:
    """90 % of a copy's rate each way, and no rival faster."""
    wanted: list[Target] = []
    for name in ("x".join(map(str, shape)) + " bfloat16" for shape in GPU_SHAPES):
        wanted += [BandwidthTarget(OP, name, OURS, direction, 0.9) for direction in ("forward", "backward")]
        others = (TRUTH, COMPILE, "flash-attn", "quack-kernels")
        wanted += [SpeedTarget(OP, name, OURS, rival, 1.0) for rival in others]
        wanted.append(SpeedTarget(OP, name, IN_PLACE, "liger-kernel", 1.0))  # which writes over the logits
        wanted.append(MemoryTarget(OP, name, OURS, "both", 1.05))
        wanted.append(MemoryTarget(OP, name, IN_PLACE, "both", 0.05))
    return wanted


def _exact(inputs: Inputs) -> dict[str, list[Any]]:
    """Loss and gradient of the mean, in 50 digits."""
    from mpmath import mp

    with mp.workdps(50):
        rows, target = inputs.tensors["input"].tolist(), inputs.tensors["target"].tolist()
        losses, grad = [], []
        for row, answer in zip(rows, target, strict=True):
            exps = [mp.exp(mp.mpf(x)) for x in row]
            total = mp.fsum(exps)
            losses.append(mp.log(total) - mp.mpf(row[answer]))
            grad += [(e / total - (j == answer)) / len(rows) for j, e in enumerate(exps)]
        return {"output": [mp.fsum(losses) / len(rows)], "grad_input": grad}


def accuracy_cases() -> list[AccuracyCase]:
    """Ordinary, confident and shifted logits in every dtype."""

    def logits(kind: str, dtype: torch.dtype) -> Inputs:
        shape = (16, 50) if dtype == torch.float64 else (256, 1000)
        g = torch.Generator().manual_seed(7)
        x = torch.randn(shape, generator=g, dtype=torch.float64) * 4
        target = torch.randint(0, shape[1], shape[:1], generator=g)
        if kind == "confident":
            x[torch.arange(shape[0]), target] += 30
        if kind == "shifted by 1000":
            x += 1000
        return Inputs({"input": x.to(dtype), "target": target}, leaves=("input",))

    return [
        AccuracyCase(OP, kind, dtype, logits(kind, dtype), _eager({}), _ours({}), _exact)
        for kind in ("ordinary", "confident", "shifted by 1000")
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]


def instruction_cases() -> list[InstructionCase]:
    """Small calls of every shape class, for the instruction counts."""
    f32 = torch.float32
    shapes = [
        ((32, 27), f32),
        ((32, 1000), f32),
        ((32, 1000), torch.bfloat16),
        ((2048, 27), f32),
        ((2, 21, 32, 32), f32),
    ]
    plain = [
        InstructionCase(
            f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}",
            draw(shape, dtype, layout, "indices", "cpu"),
            _ours({}),
        )
        for shape, dtype in shapes
        for layout in ("contiguous", "channels_last")[: len(shape) // 2]
    ]
    smoothing = [
        InstructionCase(
            f"{'x'.join(map(str, shape))} float32 label_smoothing",
            draw(shape, f32, "contiguous", "indices", "cpu"),
            _ours({"label_smoothing": 0.1}),
        )
        for shape in ((32, 1000), (2048, 27), (2, 21, 32, 32))
    ]
    return plain + smoothing

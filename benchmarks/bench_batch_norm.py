"""Batch norm: training steps of image and tabular models, with activation and residual, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops

from .accuracy import AccuracyCase
from .harness import COMPILE, OURS, TRUTH, Case, Inputs, Provider
from .instructions import InstructionCase
from .offered import missing_options, ours
from .targets import BandwidthTarget, MemoryTarget, SpeedTarget, Target

OP = "batch_norm"
FORMULA = (
    "training forward reads x twice (statistics, then normalise) and writes y; backward reads x and the upstream "
    "gradient twice and writes one; a residual adds a read forward and a write backward; evaluation reads x and "
    "writes y; parameters, statistics and masks (1 bit a value) are not counted"
)
ALL = ("forward", "backward", "both")
FULL, BOTH = ("full",), ("quick", "full")  # suites that weigh a case
EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": partial(F.leaky_relu, inplace=True),
    "tanh": torch.tanh,
}


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, training: bool, device: str
) -> Inputs:
    """x, parameters, running statistics and an upstream gradient, the same ones each time."""
    g = torch.Generator(device).manual_seed(sum(shape))
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def big() -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype).contiguous(memory_format=form)

    def small() -> Tensor:
        return (torch.rand(shape[1], generator=g, device=device) + 0.5).to(wide)

    tensors = {"input": big(), "running_mean": small(), "running_var": small(), "weight": small(), "bias": small()}
    leaves = ("input", "weight", "bias") if training else ()
    if residual:
        tensors["residual"] = big()
        leaves += ("residual",)
    fresh = ("input", "residual") if residual else ("input",)
    return Inputs(tensors, leaves, fresh, big() if training else None)


def _eager(activation: str | None, training: bool) -> Callable[..., Tensor]:
    """As torchvision's models do it: the sum and the relu in place."""

    def function(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.1, EPS)
        if residual is not None:
            y += residual
        return ACTIVATIONS[activation](y) if activation else y

    return function


def _ours(activation: str | None, training: bool, **options: Any) -> Callable[..., Tensor]:
    fused = {"activation": activation, **options} if activation else {}

    def function(
        input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, **residual: Tensor
    ) -> Tensor:
        return fused_ops.batch_norm(
            input, running_mean, running_var, weight, bias, training, 0.1, EPS, **fused, **residual
        )

    return function


def _missing(activation: str | None, residual: bool) -> str:
    needed = ["activation"] * bool(activation) + ["residual"] * residual
    return missing_options(fused_ops.batch_norm, *needed)


def bytes_that_move(numel: int, dtype: torch.dtype, residual: bool, training: bool) -> dict[str, int]:
    """The formula above."""
    x = numel * dtype.itemsize
    if not training:
        return {"forward": 2 * x}
    forward, backward = 3 * x + residual * x, 5 * x + residual * x
    return {"forward": forward, "backward": backward, "both": forward + backward}


PIECE_ROWS = 512  # of channels that are adjacent: more than the small calls' kernel takes, which are of 256 channels
PIECE = 16384  # values of a contiguous image


def piece_shape(shape: tuple[int, ...], layout: str, count: int) -> tuple[int, ...]:
    """So many pieces of the shape: fewer rows, smaller images, or fewer channels of an image of the same size."""
    _, channels, *spatial = shape
    rows = PIECE_ROWS * 256 // max(channels, 256)
    if not spatial:
        return count * rows, channels
    if layout == "channels_last":
        return 2 * count, channels, 16, rows // 32
    return count, max(1, PIECE // math.prod(spatial)), *spatial


def case(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "",
    layout: str = "contiguous",
    activation: str | None = None,
    residual: bool = False,
    training: bool = True,
    kept: bool = False,
    **fields: Any,
) -> Case:
    """One case; its name says what differs from a plain training step. ``kept``: the output is, not the input."""
    words = ["x".join(map(str, shape)), str(dtype).removeprefix("torch.")]
    words += [layout] if layout != "contiguous" else []
    words += ["+ add"] * residual + [f"+ {activation}"] * bool(activation) + ["eval"] * (not training)
    words += ["output kept"] * kept
    options = {"inplace_activated": True} if kept else {}
    eager = _eager(activation, training)
    return Case(
        op=OP,
        name=name or " ".join(words),
        shape=shape,
        dtype=dtype,
        inputs=partial(draw, shape, dtype, layout, residual, training),
        providers=(
            Provider(TRUTH, eager),
            Provider(COMPILE, eager, compiled=True),
            ours(_ours(activation, training, **options), _missing(activation, residual)),
        ),
        moved_bytes=bytes_that_move(math.prod(shape), dtype, residual, training),
        formula=FORMULA,
        pieces=lambda count, device: draw(piece_shape(shape, layout, count), dtype, layout, residual, training, device),
        layout=layout,
        **{"directions": ("both",) if training else ("forward",), **fields},
    )


def _block_inputs(layout: str, residual: bool, device: str) -> Inputs:
    """A batch-norm case's inputs behind a 3x3 convolution, without the upstream of ones own size."""
    inputs = draw((32, 64, 56, 56), torch.float32, layout, residual, True, device)
    g = torch.Generator(device).manual_seed(1)
    kernel = torch.randn((64, 64, 3, 3), generator=g, device=device) / 24
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    tensors = {**inputs.tensors, "kernel": kernel.contiguous(memory_format=form)}
    return Inputs(tensors, (*inputs.leaves, "kernel"), inputs.fresh, inputs.upstream)


def block_case(device: str, layout: str, residual: bool, inplace: bool = False) -> Case:
    """conv, batch norm, (add,) relu (or leaky relu, its output kept): what the saved tensors cost in a network."""
    activation, options = ("leaky_relu", {"inplace_activated": True}) if inplace else ("relu", {})
    shape = (32, 64, 56, 56)

    def behind_convolution(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(input: Tensor, kernel: Tensor, **tensors: Tensor) -> Tensor:
            return norm(F.conv2d(input, kernel, padding=1), **tensors)

        return function

    eager, fused = (behind_convolution(norm) for norm in (_eager(activation, True), _ours(activation, True, **options)))
    reason = _missing(activation, residual)
    return Case(
        op=OP,
        name=f"conv-bn{'-add' * residual}-{activation} block {layout}" + ", output kept" * inplace,
        shape=shape,
        dtype=torch.float32,
        inputs=partial(_block_inputs, layout, residual),
        # Not held to the error rule: its gradients are mostly the convolution's.
        providers=(
            Provider(TRUTH, eager),
            Provider(COMPILE, eager, compiled=True),
            Provider(OURS, missing=reason) if reason else Provider(OURS, fused),
        ),
        moved_bytes={},
        formula="not stated: most of the time is the convolution's",
        layout=layout,
        memory=FULL,
    )


def _gpu_cases() -> list[tuple[tuple[int, ...], str, dict[str, Any]]]:
    """Shape, layout and what follows the normalisation, of layers of a network in bfloat16 that fill a GPU."""
    tails: tuple[dict[str, Any], ...] = ({}, {"activation": "relu"}, {"activation": "relu", "residual": True})
    found = [((128, 64, 56, 56), layout, tail) for layout in ("contiguous", "channels_last") for tail in tails]
    return [*found, ((128, 256, 28, 28), "channels_last", tails[2]), ((128, 2048, 7, 7), "channels_last", {})]


def cases(device: str) -> list[Case]:
    """The shape classes of the targets below, those that fill a GPU, then the blocks and the sweeps."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    big, deep = (32, 64, 56, 56), (32, 256, 28, 28)
    make = partial(case, device)
    found = []
    for layout in ("contiguous", "channels_last"):
        found += [
            make(big, f32, layout=layout, quick=True, memory=FULL, directions=ALL),
            make(deep, f32, layout=layout, directions=ALL),
            make(
                big,
                f32,
                layout=layout,
                activation="relu",
                quick=True,
                memory=BOTH if layout == "contiguous" else FULL,
                directions=ALL,
            ),
            make(big, f32, layout=layout, activation="relu", residual=True, memory=FULL, directions=ALL),
            make(big, bf16, layout=layout, quick=layout == "contiguous", directions=ALL),
            make(big, f16, layout=layout),
            make(big, bf16, layout=layout, activation="relu"),
            make(big, f32, layout=layout, activation="leaky_relu", directions=ALL),
            make(big, f32, layout=layout, activation="leaky_relu", kept=True, directions=ALL),
            make(big, f32, layout=layout, training=False, quick=layout == "contiguous"),
        ]
    found += [
        make((65536, 256), f32, quick=True, memory=FULL, directions=ALL),
        make((4096, 1024), f32, directions=ALL),
        make((4096, 64), f32, quick=True, directions=ALL),
        make((4096, 1024), f32, training=False),
        make((32, 64), f32, quick=True, part="overhead", tiny=True, directions=ALL),
        make((32, 64), f32, activation="tanh", quick=True, part="overhead", tiny=True, directions=ALL),
    ]
    if device == "cuda":
        found = [replace(c, quick=c.name == "65536x256 float32") for c in found]
        for shape, layout, fields in _gpu_cases():
            found.append(make(shape, bf16, layout=layout, quick=True, directions=ALL, **fields))
        found.append(make((128, 64, 56, 56), f32, quick=True, directions=ALL))
    found += [block_case(device, layout, residual) for layout in ("contiguous", "channels_last")
              for residual in (False, True)]  # fmt: skip
    found += [block_case(device, layout, False, inplace=True) for layout in ("contiguous", "channels_last")]
    for layout in ("contiguous", "channels_last"):
        for channels in (8, 32, 128, 512, 2048):
            fields = {"part": "sweep", "sweep": f"channels {layout}", "size": channels}
            shape = ((1 << 22) // channels // 196, channels, 14, 14)
            found.append(make(shape, layout=layout, name=f"channels={channels} {layout}", **fields))
    for rows in (32, 256, 2048, 16384, 131072):
        found.append(make((rows, 64), name=f"rows={rows}", part="sweep", sweep="rows", size=rows))
    return found


def targets() -> list[SpeedTarget | MemoryTarget]:
    """The figures to reach: ratios of medians within one run.

    None is above what a case's bytes allow (the table of results says what that is): with recycled memory eager is
    itself near the rate of a copy in channels_last and for (rows, channels), and in evaluation.
    """
    wanted: list[SpeedTarget | MemoryTarget] = []

    def add(name: str, eager: float, compile: float, direction: str = "both") -> None:
        wanted.append(SpeedTarget(OP, name, OURS, TRUTH, eager, direction))
        wanted.append(SpeedTarget(OP, name, OURS, COMPILE, compile, direction))

    big, deep = "32x64x56x56", "32x256x28x28"
    for shape in (big, deep):
        add(f"{shape} float32", 2.2, 1.5)
        add(f"{shape} float32 channels_last", 1.3, 1.5)
    add("65536x256 float32", 1.05, 1.5)
    add("4096x1024 float32", 1.05, 1.5)
    add("4096x64 float32", 1.2, 1.5)
    for layout in ("", " channels_last"):
        add(f"{big} float32{layout} + relu", 2.5, 2)
        add(f"{big} float32{layout} + add + relu", 2, 2)
        for dtype in ("bfloat16", "float16"):
            add(f"{big} {dtype}{layout}", 1.6, 1.5)
        add(f"{big} bfloat16{layout} + relu", 2.5, 1.5)
        add(f"{big} float32{layout} eval", 1.0, 1.0, "forward")
    add("4096x1024 float32 eval", 1.0, 1.0, "forward")
    for name in ("32x64 float32", "32x64 float32 + tanh"):
        wanted.append(SpeedTarget(OP, name, OURS, TRUTH, 1.0, threads=1))
    return wanted


def gpu_targets() -> list[Target]:
    """1.5x eager (cuDNN), and 85 % of a copy's rate each way."""
    wanted: list[Target] = []
    for one in cases("cuda"):
        if one.quick and one.shape[0] == 128:
            wanted.append(SpeedTarget(OP, one.name, OURS, TRUTH, 1.5))
            wanted += [BandwidthTarget(OP, one.name, OURS, way, 0.85) for way in ("forward", "backward")]
    return wanted


def _exact(inputs: Inputs) -> dict[str, list[Any]]:
    """Output and gradients of a (rows, channels) training step, in 50 digits."""
    from mpmath import mp

    t = {name: value.tolist() for name, value in inputs.tensors.items()}
    assert inputs.upstream is not None
    upstream, rows, channels = inputs.upstream.tolist(), len(t["input"]), len(t["weight"])
    out = [[mp.mpf(0)] * channels for _ in range(rows)]
    grad = [[mp.mpf(0)] * channels for _ in range(rows)]
    grad_weight, grad_bias = [], []
    for c in range(channels):
        x = [mp.mpf(row[c]) for row in t["input"]]
        g = [mp.mpf(row[c]) for row in upstream]
        mean = mp.fsum(x) / rows
        invstd = 1 / mp.sqrt(mp.fsum((v - mean) ** 2 for v in x) / rows + mp.mpf(EPS))
        hat = [(v - mean) * invstd for v in x]
        dot, total = mp.fsum(a * b for a, b in zip(g, hat, strict=True)), mp.fsum(g)
        grad_weight.append(dot)
        grad_bias.append(total)
        for r in range(rows):
            out[r][c] = hat[r] * mp.mpf(t["weight"][c]) + mp.mpf(t["bias"][c])
            grad[r][c] = mp.mpf(t["weight"][c]) * invstd * (g[r] - total / rows - hat[r] * dot / rows)
    flat = {name: [v for row in rows for v in row] for name, rows in (("output", out), ("grad_input", grad))}
    return {**flat, "grad_weight": grad_weight, "grad_bias": grad_bias}


def accuracy_cases() -> list[AccuracyCase]:
    """Centred data, and data whose mean is far larger than its spread, in both layouts."""

    def inputs(mean: float, std: float, dtype: torch.dtype, layout: str) -> Inputs:
        shape = (64, 6) if dtype == torch.float64 else (16, 8, 12, 12)
        base = draw(shape, torch.float64, layout if len(shape) == 4 else "contiguous", False, True, "cpu")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {name: t.to(wide) for name, t in base.tensors.items()}
        tensors["input"] = (base.tensors["input"] * std + mean).to(dtype)
        assert base.upstream is not None
        return Inputs(tensors, base.leaves, (), base.upstream.to(dtype))

    found = []
    for mean, std in ((0.0, 1.0), (10.0, 1.0), (1000.0, 0.01)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            if mean == 1000.0 and dtype in (torch.bfloat16, torch.float16):
                continue  # such data has one value only in 16 bits
            for layout in ("contiguous", "channels_last")[: 1 if dtype == torch.float64 else 2]:
                name, made = f"mean {mean:g}, std {std:g}", inputs(mean, std, dtype, layout)
                both = (_eager(None, True), _ours(None, True))
                found.append(AccuracyCase(OP, name, dtype, made, *both, _exact, layout))
    return found


def instruction_cases() -> list[InstructionCase]:
    """Small calls of every shape class, for the instruction counts."""
    f32 = torch.float32
    calls: list[tuple[tuple[int, ...], torch.dtype, str, str | None]] = [
        ((32, 64), f32, "contiguous", None),
        ((512, 64), f32, "contiguous", None),
        ((8, 16, 14, 14), f32, "contiguous", None),
        ((8, 16, 14, 14), f32, "channels_last", None),
        ((8, 16, 14, 14), torch.bfloat16, "contiguous", None),
    ]
    if not _missing("relu", False):
        calls.append(((8, 16, 14, 14), f32, "contiguous", "relu"))
    return [
        InstructionCase(
            " ".join(["x".join(map(str, shape)), str(dtype).removeprefix("torch."), layout, activation or ""]).strip(),
            draw(shape, dtype, layout, False, True, "cpu"),
            _ours(activation, True),
        )
        for shape, dtype, layout, activation in calls
    ]

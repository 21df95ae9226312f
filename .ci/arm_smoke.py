"""Every op, direction, dtype, layout class and tail of the CPU kernels against float64, by the error rule.

Small enough for an emulated processor: .ci/arm runs it under qemu-user. Prints how many results were compared.
"""

import itertools
import time
from typing import Any

import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.core.library import isa
from fused_ops.testing import assert_no_worse_than

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
compared = 0


def compare(name: str, ours: Any, eager: Any, dtype: torch.dtype, tensors: list[torch.Tensor], upstream: Any) -> None:
    """Values and gradients of ours(*tensors) and eager(*tensors), and those of float64."""
    global compared
    results = []
    for function, to in ((ours, dtype), (eager, dtype), (eager, torch.float64)):
        leaves = [t.detach().to(to).requires_grad_() for t in tensors]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype).expand(out.shape))
        results.append((out, *grads))
    for k, (mine, theirs, truth) in enumerate(zip(*results, strict=True)):
        what = f"{name} {dtype} {'value' if k == 0 else f'gradient {k}'}"
        if dtype == torch.float64:
            assert torch.allclose(mine, truth, rtol=1e-11, atol=1e-12, equal_nan=True), what
        else:
            largest = float(truth.detach().abs().max())  # of few values, eager's error is a matter of luck
            roundings = 4 if dtype == torch.float32 else 1
            assert_no_worse_than(mine, theirs, truth, what, roundings * torch.finfo(dtype).eps * largest)
        compared += 1


def logits(layout: str, rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.randint(0, classes, (rows,))
    if rows > 2:
        target[2] = -100
    x = 3 * torch.randn(rows, classes)
    if layout == "classes apart":
        x = x.t().contiguous().t()
    elif layout == "strided":
        x = torch.randn(rows, 2 * classes)[:, ::2]
    elif layout == "segmentation":
        x, target = 3 * torch.randn(2, classes, rows), torch.randint(0, classes, (2, rows))
    return x, target


def cross_entropy() -> None:
    options: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"reduction": "sum"}]
    shapes = ((5, 7), (9, 16), (3, 61), (4, 1027))  # few classes, whole registers, tails, more than a chunk
    for dtype, layout in itertools.product(DTYPES, ("rows", "classes apart", "strided", "segmentation")):
        for (rows, classes), kwargs in itertools.product(shapes, options):
            x, target = logits(layout, rows, classes)
            compare(
                f"cross_entropy {layout} {rows}x{classes} {kwargs}",
                lambda x, t=target, k=kwargs: fused_ops.cross_entropy(x, t, **k),
                lambda x, t=target, k=kwargs: F.cross_entropy(x, t, **k),
                dtype,
                [x.to(dtype)],
                torch.tensor(0.7),
            )


def cross_entropy_options() -> None:
    x, target = logits("rows", 6, 37)
    weight, rows = torch.rand(37) + 0.5, torch.rand(6) + 0.5

    def eager(x: torch.Tensor) -> torch.Tensor:
        u = 5 * torch.tanh(2 * x / 5)
        nll = F.cross_entropy(u, target, weight=weight.to(x.dtype), reduction="none", label_smoothing=0.1)
        return (rows.to(x.dtype) * (nll + 1e-3 * u.logsumexp(1).square() * (target >= 0))).sum()

    def ours(x: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 2.0}
        return fused_ops.cross_entropy(
            x, target, weight.to(x.dtype), reduction="sum", token_weight=rows.to(x.dtype), **options
        )

    compare("cross_entropy with options", ours, eager, torch.float64, [x], torch.tensor(1.0))
    compare("cross_entropy with options", ours, eager, torch.float32, [x], torch.tensor(1.0))
    shares = torch.rand(6, 37).softmax(1)
    for dtype in DTYPES:
        compare(
            "cross_entropy of probabilities",
            lambda x: fused_ops.cross_entropy(x, shares.to(x.dtype)),
            lambda x: F.cross_entropy(x, shares.to(x.dtype)),
            dtype,
            [x.to(dtype)],
            torch.tensor(1.0),
        )


def linear_cross_entropy() -> None:
    for dtype, (rows, features, classes) in itertools.product(DTYPES, ((5, 8, 7), (70, 12, 131), (33, 16, 1025))):
        target = torch.randint(0, classes, (rows,))
        target[1] = -100
        compare(
            f"linear_cross_entropy {rows}x{features}x{classes}",
            lambda x, w, t=target: fused_ops.linear_cross_entropy(x, w, t),
            lambda x, w, t=target: F.cross_entropy(x @ w.t(), t),
            dtype,
            [torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)],
            torch.tensor(0.7),
        )


ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
}


def batch_norm() -> None:
    shapes = ((6, 7), (70, 16), (3, 5, 7, 7), (2, 19, 3, 3), (2, 3, 33, 32))
    for dtype, shape, last in itertools.product(DTYPES, shapes, (False, True)):
        if last and len(shape) < 4:
            continue
        layout = torch.channels_last if last else torch.contiguous_format
        c = shape[1]
        x, r = (torch.randn(shape).to(dtype).to(memory_format=layout) for _ in range(2))
        upstream = torch.randn(shape).to(memory_format=layout)
        weight, bias = (torch.rand(c).add(0.5).to(dtype) for _ in range(2))
        mean, var = torch.rand(c).to(dtype), (torch.rand(c) + 0.5).to(dtype)
        name = f"batch_norm {shape} {'channels_last' if last else 'contiguous'}"
        for activation, formula in ACTIVATIONS.items():
            compare(
                f"{name} {activation}",
                lambda x, w, b, a=activation: fused_ops.batch_norm(x, None, None, w, b, True, activation=a),
                lambda x, w, b, f=formula: f(F.batch_norm(x, None, None, w, b, True)),
                dtype,
                [x, weight, bias],
                upstream,
            )
        compare(
            f"{name} residual",
            lambda x, w, b, r: fused_ops.batch_norm(x, None, None, w, b, True, activation="relu", residual=r),
            lambda x, w, b, r: F.relu(F.batch_norm(x, None, None, w, b, True) + r),
            dtype,
            [x, weight, bias, r],
            upstream,
        )
        compare(
            f"{name} evaluation",
            lambda x, w, b, m=mean, v=var: fused_ops.batch_norm(x, m.to(x.dtype), v.to(x.dtype), w, b),
            lambda x, w, b, m=mean, v=var: F.batch_norm(x, m.to(x.dtype), v.to(x.dtype), w, b),
            dtype,
            [x, weight, bias],
            upstream,
        )


if __name__ == "__main__":
    assert isa() is not None, "the library was not loaded"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for part in (cross_entropy, cross_entropy_options, linear_cross_entropy, batch_norm):
        before, started = compared, time.process_time()
        part()
        print(f"{part.__name__}: {compared - before} results, {time.process_time() - started:.0f} s of CPU", flush=True)
    print(f"arm_smoke: {compared} results on {isa()} of torch {torch.__version__}")

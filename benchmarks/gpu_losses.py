"""Cross-entropy on one GPU beyond the plain loss: every option on odd rows, small calls, more than 2^31 logits.

``python -m benchmarks.gpu_losses FILE --part options`` writes a list of rows as JSON; ``--tiny`` runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops
from fused_ops.ops.cross_entropy import functions

from . import gpu_rows

Shape = tuple[int, int]
Loss = Callable[[Tensor], Tensor]
# Rows that begin at no multiple of 16 bytes: of a language model's vocabulary, of ImageNet's classes, of characters.
ODD: tuple[tuple[Shape, torch.dtype], ...] = (
    ((4097, 32001), torch.bfloat16),
    ((4097, 32001), torch.float32),
    ((16385, 1001), torch.bfloat16),
    ((65537, 27), torch.float32),
)
TINY_ODD = (((5, 301), torch.bfloat16), ((9, 27), torch.float32))
# On both sides of where one block stops taking all rows, by how a row is read (with_gradient.cu of the CUDA kernels).
SMALL: tuple[Shape, ...] = (
    *((32, 27), (256, 27), (1024, 27), (1056, 27)),
    *((8, 1000), (32, 1000), (33, 990), (128, 256)),
    *((4, 8000), (5, 6500)),
)


def options(x: Tensor) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """By name: the target, the options, and whether PyTorch has them too."""
    rows, classes = x.shape
    indices = torch.randint(0, classes, (rows,), device=x.device)
    ignored = torch.where(torch.arange(rows, device=x.device) % 3 == 0, -100, indices)
    several = torch.randint(0, classes, (rows, 4), device=x.device)
    weight, share = torch.rand(classes, device=x.device).to(x.dtype), torch.rand(rows, 4, device=x.device)
    factors, mask = torch.rand(rows, device=x.device), torch.rand(classes, device=x.device) < 0.9
    spread = torch.rand(x.shape, device=x.device).softmax(1).to(x.dtype)
    mask[indices] = True
    each = (torch.rand(x.shape, device=x.device) < 0.9).scatter_(1, indices[:, None], True)
    theirs: dict[str, tuple[Any, dict[str, Any]]] = {
        "none": (indices, {}),
        "a third ignored": (ignored, {}),
        "sum": (indices, {"reduction": "sum"}),
        "no reduction": (indices, {"reduction": "none"}),
        "weight": (indices, {"weight": weight}),
        "label_smoothing": (indices, {"label_smoothing": 0.1}),
        "label_smoothing, weight": (indices, {"label_smoothing": 0.1, "weight": weight}),
        "probabilities": (spread, {}),
        "probabilities, label_smoothing": (spread, {"label_smoothing": 0.1}),
    }
    ours: dict[str, tuple[Any, dict[str, Any]]] = {
        "sparse": ((several, share), {}),
        "mixup": ((indices, indices.flip(0), 0.3), {}),
        "z_loss": (indices, {"z_loss": 1e-4}),
        "logit_scale": (indices, {"logit_scale": 2.0}),
        "softcap": (indices, {"softcap": 30.0}),
        "token_weight": (indices, {"token_weight": factors}),
        "normalizer": (indices, {"normalizer": 1000.0}),
        "class_mask": (indices, {"class_mask": mask}),
        "class_mask of rows": (indices, {"class_mask": each}),
        "empty": (indices, {"empty": "zero"}),
        "loss_dtype": (indices, {"loss_dtype": torch.float32}),
        "return_outputs": (indices, {"return_outputs": True}),
        "inplace_backward": (indices, {"inplace_backward": True}),
        "inplace_backward, label_smoothing": (indices, {"inplace_backward": True, "label_smoothing": 0.1}),
    }
    return {name: (*v, name in theirs) for name, v in {**theirs, **ours}.items()}


def _logits(shape: Shape, dtype: torch.dtype, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def _step(x: Tensor, loss: Callable[[Tensor], Any]) -> gpu_rows.Run:
    """Forward and backward, the gradient in a tensor of its own, or in that of a layer's result."""

    def run() -> None:
        found = loss(x.view_as(x))
        found = found.loss if isinstance(found, tuple) else found
        torch.autograd.grad(found, x, torch.ones_like(found))

    return run


def _option(way: str, option: str, shape: Shape, dtype: torch.dtype, device: str) -> gpu_rows.Run:
    x = _logits(shape, dtype, device)
    target, given, _ = options(x)[option]
    function: Any = F.cross_entropy if way == "eager" else fused_ops.cross_entropy
    return _step(x, lambda v: function(v, target, **given))


def option_rows(tiny: bool, device: str) -> Iterator[gpu_rows.Row]:
    """Forward and backward of each option, beside eager where it has the option."""
    names = {name: both for name, (*_, both) in options(torch.zeros(8, 8)).items()}
    for shape, dtype in TINY_ODD if tiny else ODD:
        for option, both in names.items():
            for way in ("eager", "ours")[not both :]:
                fields = {"option": option, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "way": way}
                yield fields, partial(_option, way, option, shape, dtype, device)


def _small(way: str, shape: Shape, device: str) -> gpu_rows.Run:
    x, target = _logits(shape, torch.float32, device), torch.randint(0, shape[1], shape[:1], device=device)
    if way == "eager":
        return lambda: torch.autograd.grad(F.cross_entropy(x, target), x)
    run = lambda: torch.autograd.grad(fused_ops.cross_entropy(x, target), x)  # noqa: E731
    if way == "ours":
        return run

    def in_two() -> None:
        before, functions._SMALL = functions._SMALL, -1
        try:
            run()
        finally:
            functions._SMALL = before

    return in_two


def small_rows(tiny: bool, device: str) -> Iterator[gpu_rows.Row]:
    """What a call costs the host and, as a graph, the device: the loss that brings its gradient, and the two ops."""
    for shape in SMALL[:1] if tiny else SMALL:
        for way in ("eager", "ours", "ours, loss and gradient apart"):
            yield {"shape": shape, "way": way}, partial(_small, way, shape, device)


def _large(way: str, shape: Shape, dtype: torch.dtype, device: str) -> gpu_rows.Run:
    x = _logits(shape, dtype, device)
    target = torch.randint(0, min(shape[1], 128), shape[:1], device=device, dtype=torch.uint8)
    if way == "raw op":  # the loss with its gradient, one read of the logits up to 32 KiB a row
        return lambda: torch.ops.fused_ops.cross_entropy_with_gradient(x.detach(), target, -100, 1)
    if way == "eager":
        return _step(x, lambda v: F.cross_entropy(v, target))
    return _step(x, lambda v: fused_ops.cross_entropy(v, target, inplace_backward=way == "in place"))


def large_rows(tiny: bool, device: str) -> Iterator[gpu_rows.Row]:
    """More than 2^31 logits: long rows, many rows, and rows that a warp keeps."""
    sizes = ((7, 33), (65, 2), (9, 500)) if tiny else ((67200, 32001), (1 << 28, 9), (2_160_000, 1001))
    for shape in sizes:
        for way in ("ours", "in place", "raw op", "eager"):
            yield {"shape": shape, "way": way}, partial(_large, way, shape, torch.bfloat16, device)


PARTS: dict[str, gpu_rows.Questions] = {"options": option_rows, "small": small_rows, "large": large_rows}

if __name__ == "__main__":
    gpu_rows.main(__doc__, PARTS)

"""Small float64 calls of cross-entropy, for the derivative checks and the fuzzed raw ops."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.sample import Sample

_MASKED = (True, True, False, True)


def leaf(shape: tuple[int, ...], generator: torch.Generator, low: float | None = None) -> Tensor:
    """Random values that require grad; with ``low`` all at least that."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values if low is None else values.abs() + low).requires_grad_()


def targets(shape: tuple[int, ...], g: torch.Generator) -> dict[str, Any]:
    """A target of each kind for logits of this shape."""
    rows = (shape[0], *shape[2:])
    classes = shape[1]
    index = torch.randint(0, classes, rows, generator=g)
    several = torch.stack([torch.randint(0, classes, rows, generator=g) for _ in range(2)], 1)
    several.view(-1)[0] = -100
    ignored = index.clone()
    ignored.view(-1)[-1] = -100
    return {
        "index": ignored,
        "dense": leaf(shape, g, 0.1),
        "sparse": (several, leaf(several.shape, g, 0.1)),
        "mixup": (ignored, index.flip(0), leaf((shape[0],), g, 0.1)),
    }


def _option_samples() -> list[Sample]:
    """One call per option and kind of target, and some with everything at once."""
    found: list[Sample] = []
    g = torch.Generator().manual_seed(11)
    extras: tuple[tuple[str, dict[str, Any]], ...] = (
        ("plain", {"loss_dtype": torch.float64}),
        ("smoothing", {"label_smoothing": 0.2}),
        ("z_loss", {"z_loss": 0.3, "reduction": "sum"}),
        ("softcap", {"softcap": 2.0, "logit_scale": 1.5, "reduction": "none"}),
        ("mask", {"class_mask": torch.tensor(_MASKED), "label_smoothing": 0.1}),
        ("outputs", {"return_outputs": True, "z_loss": 0.1, "label_smoothing": 0.1}),
    )
    for shape in ((3, 4), (2, 4, 3)):
        for name, options in extras if len(shape) == 2 else extras[1:2] + extras[5:]:
            for kind, target in targets(shape, g).items():
                if name == "mask":  # a target that is masked has an infinite loss
                    target = _off_the_mask(kind, target)
                found.append(Sample(f"{list(shape)} {kind}, {name}", (leaf(shape, g), target), options))
    rows: dict[str, Any] = {"token_weight": leaf((3,), g, 0.1), "normalizer": leaf((), g, 1.0)}
    for kind, target in targets((3, 4), g).items():
        weight = leaf((4,), g, 0.5) if kind != "index" else leaf((4,), g, 0.5).detach()
        options = {"weight": weight, "label_smoothing": 0.1, **rows}
        found.append(Sample(f"[3, 4] {kind}, weights", (leaf((3, 4), g), target), options))
    return found


def _off_the_mask(kind: str, target: Any) -> Any:
    if kind == "index":
        return torch.where(target == 2, 0, target)
    if kind == "dense":
        return torch.where(torch.tensor(_MASKED), target.detach(), 0.0)
    moved = [torch.where(t == 2, 0, t) if not t.is_floating_point() else t for t in target]
    return tuple(moved)


def samples() -> list[Sample]:
    """Class indices over shapes, reductions and dtypes of the target; then the options."""
    found: list[Sample] = []
    shapes = ((3,), (1, 1), (5, 4), (2, 3, 4), (2, 3, 2, 2))
    target_dtypes = itertools.cycle((torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8))
    for shape, reduction in itertools.product(shapes, ("none", "mean", "sum")):
        dtype = next(target_dtypes)
        generator = torch.Generator().manual_seed(len(found))
        input = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        classes, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
        target = torch.randint(0, classes, rows, generator=generator).to(dtype)
        options: dict[str, int | str] = {"reduction": reduction}
        if len(shape) > 1 and input.numel() > 1:
            options["ignore_index"] = 7
            target.view(-1)[-1] = 7
        name = f"{list(shape)} {reduction}, {str(dtype).removeprefix('torch.')} target"
        found.append(Sample(name, (input, target), options))
    return found + _option_samples()

"""Small float64 calls over cross-entropy's options, for the derivative checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.sample import Sample

_MASKED = (True, True, False, True)


def _leaf(shape: tuple[int, ...], generator: torch.Generator, low: float | None = None) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values if low is None else values.abs() + low).requires_grad_()


def _targets(shape: tuple[int, ...], g: torch.Generator) -> dict[str, Any]:
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
        "dense": _leaf(shape, g, 0.1),
        "sparse": (several, _leaf(several.shape, g, 0.1)),
        "mixup": (ignored, index.flip(0), _leaf((shape[0],), g, 0.1)),
    }


def option_samples() -> list[Sample]:
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
            for kind, target in _targets(shape, g).items():
                if name == "mask":  # a target that is masked has an infinite loss
                    target = _off_the_mask(kind, target)
                found.append(Sample(f"{list(shape)} {kind}, {name}", (_leaf(shape, g), target), options))
    rows: dict[str, Any] = {"token_weight": _leaf((3,), g, 0.1), "normalizer": _leaf((), g, 1.0)}
    for kind, target in _targets((3, 4), g).items():
        weight = _leaf((4,), g, 0.5) if kind != "index" else _leaf((4,), g, 0.5).detach()
        options = {"weight": weight, "label_smoothing": 0.1, **rows}
        found.append(Sample(f"[3, 4] {kind}, weights", (_leaf((3, 4), g), target), options))
    return found


def _off_the_mask(kind: str, target: Any) -> Any:
    if kind == "index":
        return torch.where(target == 2, 0, target)
    if kind == "dense":
        return torch.where(torch.tensor(_MASKED), target.detach(), 0.0)
    moved = [torch.where(t == 2, 0, t) if not t.is_floating_point() else t for t in target]
    return tuple(moved)


def linear_samples() -> list[Sample]:
    """Calls of ``linear_cross_entropy``, in chunks of two rows."""
    found: list[Sample] = []
    g = torch.Generator().manual_seed(5)

    def head(rows: int = 3) -> tuple[Tensor, Tensor]:
        return _leaf((rows, 2), g), _leaf((4, 2), g)

    chunks = {"chunk_rows": 2}
    for reduction in ("none", "mean", "sum"):
        options: dict[str, Any] = {"reduction": reduction, "linear_bias": _leaf((4,), g), **chunks}
        found.append(Sample(f"index, {reduction}", (*head(), _targets((3, 4), g)["index"]), options))
    for kind, target in _targets((3, 4), g).items():
        options = {"z_loss": 0.1, "label_smoothing": 0.1, **chunks}
        found.append(Sample(f"{kind}, z_loss and smoothing", (*head(), target), options))
    index = _targets((3, 4), g)["index"]
    low_rank = (_leaf((1, 2), g), _leaf((4, 1), g), 0.5)
    more: tuple[tuple[str, dict[str, Any]], ...] = (
        ("lora", {"lora": low_rank, "linear_bias": _leaf((4,), g)}),
        ("softcap and scale", {"softcap": 2.0, "logit_scale": 1.5}),
        ("weights", {"weight": torch.rand(4, generator=g, dtype=torch.float64), "token_weight": _leaf((3,), g, 0.1)}),
        ("outputs", {"return_outputs": True, "z_loss": 0.1}),
    )
    found += [Sample(f"index, {name}", (*head(), index), {**options, **chunks}) for name, options in more]
    positions = (_leaf((3, 2), g), _leaf((4, 3, 2), g), _targets((3, 4, 3), g)["index"])
    found.append(Sample("several positions", positions, {"linear_bias": _leaf((4, 3), g), **chunks}))
    shifted = (_leaf((2, 3, 2), g), _leaf((4, 2), g), torch.randint(0, 4, (2, 3), generator=g))
    found.append(Sample("shift", shifted, {"shift": True, **chunks}))
    return found

"""Small float64 calls of linear cross-entropy, for the derivative checks and the fuzzed raw ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core.sample import Sample
from fused_ops.ops.cross_entropy.samples import leaf, targets


def samples() -> list[Sample]:
    """Calls of ``linear_cross_entropy``, in chunks of two rows."""
    found: list[Sample] = []
    g = torch.Generator().manual_seed(5)

    def head(rows: int = 3) -> tuple[Tensor, Tensor]:
        return leaf((rows, 2), g), leaf((4, 2), g)

    chunks = {"chunk_rows": 2}
    for reduction in ("none", "mean", "sum"):
        options: dict[str, Any] = {"reduction": reduction, "linear_bias": leaf((4,), g), **chunks}
        found.append(Sample(f"index, {reduction}", (*head(), targets((3, 4), g)["index"]), options))
    for kind, target in targets((3, 4), g).items():
        options = {"z_loss": 0.1, "label_smoothing": 0.1, **chunks}
        found.append(Sample(f"{kind}, z_loss and smoothing", (*head(), target), options))
    index = targets((3, 4), g)["index"]
    low_rank = (leaf((1, 2), g), leaf((4, 1), g), 0.5)
    more: tuple[tuple[str, dict[str, Any]], ...] = (
        ("lora", {"lora": low_rank, "linear_bias": leaf((4,), g)}),
        ("softcap and scale", {"softcap": 2.0, "logit_scale": 1.5}),
        ("weights", {"weight": torch.rand(4, generator=g, dtype=torch.float64), "token_weight": leaf((3,), g, 0.1)}),
        ("outputs", {"return_outputs": True, "z_loss": 0.1}),
    )
    found += [Sample(f"index, {name}", (*head(), index), {**options, **chunks}) for name, options in more]
    positions = (leaf((3, 2), g), leaf((4, 3, 2), g), targets((3, 4, 3), g)["index"])
    found.append(Sample("several positions", positions, {"linear_bias": leaf((4, 3), g), **chunks}))
    shifted = (leaf((2, 3, 2), g), leaf((4, 2), g), torch.randint(0, 4, (2, 3), generator=g))
    found.append(Sample("shift", shifted, {"shift": True, **chunks}))
    return found

"""A language model's head on one GPU, in the order of what is worth knowing first; each row is written at once.

``python -m benchmarks.gpu_heads FILE`` writes a list of rows as JSON; ``--tiny`` takes small sizes, and runs anywhere.
Times are of a forward and backward: the three matrix products alone, eager, ours, and ours by other plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops

from . import gpu_rows, rivals


class Head(NamedTuple):
    """The sizes of a call, and the share of its rows that is ignored."""

    rows: int
    features: int
    classes: int
    ignored: float = 0.0


LLAMA, TINY = Head(8192, 4096, 128256), Head(64, 32, 1000)


def questions(first: Head) -> Iterator[tuple[str, Head, dict[str, dict[str, Any] | None]]]:
    """(what is asked, head, ways): None for those that are not ours, else the options of ours."""
    alone: dict[str, dict[str, Any] | None] = {"products": None, "eager": None, "ours": {}}
    rows = first.rows
    yield "default", first, alone
    chunks = [{"chunk_rows": n} for n in (rows // 8, rows // 4, rows // 2, rows)]
    yield "chunks", first, {f"ours, {c['chunk_rows']} rows": c for c in chunks}
    square = first._replace(rows=first.features)  # whose logits take grad_weight's memory
    yield "rows <= in_features", square, {**alone, "ours, all rows": {"chunk_rows": square.rows}}
    yield "twice the rows", first._replace(rows=2 * rows), alone
    yield "odd vocabulary", first._replace(classes=first.classes + 1), alone
    yield (
        "GPT-2's vocabulary",
        first._replace(features=min(first.features, 768), classes=first.classes * 50257 // 128256),
        alone,
    )
    yield "a third ignored", first._replace(ignored=0.33), alone
    options = {"z_loss": {"z_loss": 1e-4}, "smoothing": {"label_smoothing": 0.1}, "softcap": {"softcap": 30.0}}
    yield "options", first, {f"ours, {name}": given for name, given in options.items()}
    sum_bytes, row_bytes = 4 * first.features * first.classes, 2 * first.classes
    limits = [sum_bytes + n * row_bytes for n in (rows // 4, rows // 8)]
    larger = first._replace(rows=4 * rows)
    yield "limits", larger, {f"ours, {n} bytes": {"max_memory_bytes": n} for n in limits}
    yield "rivals", first, dict.fromkeys(("liger-kernel", "cut-cross-entropy"))  # last: they compile for long


def run_of(way: str, options: dict[str, Any] | None, head: Head, device: str) -> gpu_rows.Run:
    """A forward and backward."""
    torch.manual_seed(0)
    x, w = (torch.randn(n, head.features, device=device) for n in (head.rows, head.classes))
    x, w = x.bfloat16().requires_grad_(), (w * head.features**-0.5).bfloat16().requires_grad_()
    target = torch.randint(0, head.classes, (head.rows,), device=device)
    target[: int(head.rows * head.ignored)] = -100
    target = target[torch.randperm(head.rows, device=device)]

    def products() -> None:
        with torch.no_grad():
            z = x @ w.t()
            z @ w, z.t() @ x

    def train(loss: Callable[[], Tensor]) -> None:
        x.grad = w.grad = None
        loss().backward()

    if way == "products":
        return products
    if way == "eager":
        return lambda: train(lambda: F.cross_entropy(F.linear(x, w), target))
    if options is None:
        call, missing = rivals.call(way, "linear_cross_entropy", device)
        if call is None:
            raise RuntimeError(missing)
        return lambda: train(lambda: call(x, w, target))
    return lambda: train(lambda: fused_ops.linear_cross_entropy(x, w, target, **options))


def rows(tiny: bool, device: str) -> Iterator[gpu_rows.Row]:
    """All questions."""
    for question, head, ways in questions(TINY if tiny else LLAMA):
        for way, options in ways.items():
            fields = {"question": question, **head._asdict(), "way": way}
            yield fields, partial(run_of, way, options, head, device)


if __name__ == "__main__":
    gpu_rows.main(__doc__, {"heads": rows})

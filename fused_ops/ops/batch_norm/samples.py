"""The calls of batch norm that every check runs on."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from fused_ops.core.sample import Sample
from fused_ops.ops.batch_norm import activations


def samples() -> list[Sample]:
    """Small float64 calls over the option grid."""
    found: list[Sample] = []

    def add(name: str, shape: tuple[int, ...], training: bool, affine: bool = True, **options: Any) -> None:
        generator = torch.Generator().manual_seed(len(found))
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        x, w, b, r = draw(shape), draw(shape[1]), draw(shape[1]), draw(shape)
        if "channels last" in name:
            x = x.contiguous(memory_format=torch.channels_last)
        if options.pop("residual", False):
            options["residual"] = r.requires_grad_()
        stats = (draw(shape[1]), draw(shape[1]).exp())
        params = (w.requires_grad_(), b.requires_grad_()) if affine else (None, None)
        label = f"{name}, {'training' if training else 'evaluation'}"
        found.append(Sample(label, (x.requires_grad_(), *stats, *params, training), options))

    shapes = {"rows": (5, 3), "length": (3, 2, 4), "image": (2, 2, 2, 3), "channels last": (2, 3, 2, 2)}
    for (name, shape), training in itertools.product(shapes.items(), (True, False)):
        add(name, shape, training)
        add(f"{name}, correction 1", shape, training, correction=1)
        add(f"{name}, no weight", shape, training, affine=False)
        add(f"{name}, relu after residual", shape, training, activation="relu", residual=True)
    for activation, training in itertools.product(activations.CODES, (True, False)):
        if activation is not None:
            add(activation, (4, 3), training, activation=activation)
            add(f"{activation}, residual", (2, 2, 3), training, activation=activation, residual=True)
    lengths, rows = torch.tensor([4, 2, 3]), torch.tensor([True, False, True, True, True])
    for training in (True, False):
        add("lengths, silu after residual", (3, 2, 4), training, valid=lengths, activation="silu", residual=True)
        add("valid rows", (5, 2), training, valid=rows, activation="relu", residual=True)
    add("ghost batches", (7, 2), True, groups=2)
    add("ragged ghost batches, gelu after residual", (5, 2, 2), True, groups=2, activation="gelu", residual=True)
    kinds = itertools.product((None, "leaky_relu", "elu"), ("rows", "image", "channels last"), (True, False))
    for activation, name, training in kinds:
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": 0.2,
            "alpha": 1.3,
            "inplace_activated": True,
        }
        add(f"{name}, output of {activation} kept", shapes[name], training, **options)
    add("ghost batches, output kept", (5, 2, 2), True, groups=2, activation="elu", inplace_activated=True)
    add("lengths, output kept", (3, 2, 4), True, valid=lengths, activation="leaky_relu", inplace_activated=True)
    return found

"""Fused cross-entropy, linear cross-entropy and batch norm for PyTorch, with hand-derived, gradchecked backward passes.

A model, in place; the training loop stays as it is:
    convert(model, loss=criterion)   its batch norms, losses and head become those of this package
    report(model)                    what was replaced, and what has run
    revert(model)                    all of it back to PyTorch's
    patch()                          in its ``with`` block torch.nn.functional's functions are those below
    fold(model)                      a batch norm in evaluation mode becomes a part of the layer before it

Functions, as those of torch.nn.functional, and more:
    cross_entropy                    CrossEntropyOutput with return_outputs=True
    linear_cross_entropy             of a linear head, whose logits are never all in memory
    batch_norm                       with the addition and the activation behind it

Modules, with the state_dict of torch.nn's:
    CrossEntropyLoss, LinearCrossEntropyLoss
    BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d, SyncBatchNorm

Tools to prove gradients right are in fused_ops.testing. On the command line: python -m fused_ops info | check | demo
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fused_ops.conversion import backend_registry as _backend_registry  # noqa: F401 (names the backend)
from fused_ops.conversion.api import convert, revert
from fused_ops.conversion.patch import patch
from fused_ops.conversion.report import report
from fused_ops.core import functionalize as _functionalize  # noqa: F401 (registers a rule)
from fused_ops.ops.batch_norm.api import batch_norm
from fused_ops.ops.batch_norm.fold import fold
from fused_ops.ops.batch_norm.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from fused_ops.ops.cross_entropy.api import cross_entropy
from fused_ops.ops.cross_entropy.modules import CrossEntropyLoss
from fused_ops.ops.cross_entropy.reduction import CrossEntropyOutput
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy
from fused_ops.ops.linear_cross_entropy.modules import LinearCrossEntropyLoss

if TYPE_CHECKING:
    from fused_ops import testing as testing

__version__ = "0.1.0"
_SUBMODULES = ("examples", "testing")  # imported when they are asked for
__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LinearCrossEntropyLoss",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "cross_entropy",
    "fold",
    "linear_cross_entropy",
    "patch",
    "report",
    "revert",
]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"fused_ops.{name}")
    raise AttributeError(f"module 'fused_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})

"""Fused cross-entropy and batch normalisation for PyTorch, with hand-derived, gradchecked backward passes."""

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

"""Fused cross-entropy and batch normalisation for PyTorch, with hand-derived, gradchecked backward passes."""

from fused_ops._batch_norm_fold import fold
from fused_ops._batch_norm_modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from fused_ops._convert_patch import patch
from fused_ops.batch_norm import batch_norm
from fused_ops.convert import convert, revert
from fused_ops.cross_entropy import cross_entropy

__version__ = "0.1.0"
__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "batch_norm",
    "convert",
    "cross_entropy",
    "fold",
    "patch",
    "revert",
]

"""How many rows of logits linear cross-entropy has at a time on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST_ROWS = 1024  # with fewer, reading the weights again for each chunk takes longer than its products
_FEWEST_SUMMED = 2048  # the same where a chunk reads and writes a sum in float32 besides
_L2_BYTES = 50 << 20  # where torch does not say


def chosen_rows(rows: int, row_bytes: int, l2_bytes: int, summed_features: int = 0) -> int:
    """Rows of a chunk: as many as the second-level cache holds, but no fewer than the products need.

    A chunk of r rows computes 6 r features classes operations. It reads the weights twice and, where it is one of
    several and they have 16 bits, reads and writes the float32 sum of their gradient, 8 bytes a weight: on an H200
    222 / r of the products' time. Measured there at 8192 rows, 4096 features and 128256 classes:
    `python -m benchmarks --device cuda --suite full --op linear_cross_entropy --part sweep`.

    Args:
        rows: Of the call.
        row_bytes: Of one row's logits.
        l2_bytes: Of the GPU's second-level cache.
        summed_features: Features of 16-bit weights whose gradient is wanted; 0 if there are none. Their logits may take
            half as much memory as that sum; all of them at once, where they take no more than it.
    """
    wanted = max(l2_bytes // max(row_bytes, 1) // 256 * 256, _FEWEST_ROWS)
    if summed_features:
        wanted = max(wanted, _FEWEST_SUMMED, summed_features)
        if rows <= 2 * summed_features:
            wanted = max(rows, 1)
    return -(-rows // -(-rows // wanted)) if rows else 1


def gpu_rows(input: Tensor, row_bytes: int, wants_weight: bool) -> int:
    """``chosen_rows`` for inputs (rows, features) on the GPU where they are."""
    properties = torch.cuda.get_device_properties(input.device)
    summed = input.size(1) if wants_weight and input.dtype.itemsize == 2 else 0
    return chosen_rows(input.size(0), row_bytes, getattr(properties, "L2_cache_size", 0) or _L2_BYTES, summed)

"""How many rows of logits linear cross-entropy has at a time on a GPU: an estimate, not measured yet."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST_ROWS = 1024  # with fewer, reading the weights again for each chunk takes longer than its products
_MOST_CHUNKS = 8  # grad_weight is read and written once a chunk
_L2_BYTES = 50 << 20  # where torch does not say


def chosen_rows(rows: int, row_bytes: int, l2_bytes: int) -> int:
    """Rows of a chunk: as many as the second-level cache holds, but no fewer than the products need.

    A chunk of r rows computes 6 r features classes operations, and besides reads the weights twice and reads and writes
    their gradient, 12 to 16 bytes a weight in 16 bit: beyond r of about a thousand the first is the longer on GPUs with
    some 270 operations a byte.
    """
    in_cache = l2_bytes // max(row_bytes, 1) // 256 * 256
    wanted = max(in_cache, _FEWEST_ROWS, -(-rows // _MOST_CHUNKS))
    return -(-rows // -(-rows // wanted)) if rows else 1


def gpu_rows(input: Tensor, row_bytes: int) -> int:
    """``chosen_rows`` for inputs (rows, features) on the GPU where they are."""
    properties = torch.cuda.get_device_properties(input.device)
    return chosen_rows(input.size(0), row_bytes, getattr(properties, "L2_cache_size", 0) or _L2_BYTES)

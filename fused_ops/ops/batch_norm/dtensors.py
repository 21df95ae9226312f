"""Batch norm of DTensors: what this rank computes of it, by the placements of the input.

The statistics are of the whole DTensor: the ranks along a dimension of the mesh that divides the batch or a spatial
dimension are a ``group``. Along one that divides the channels each normalises its own. What one group cannot do (a
batch that several dimensions divide, ghost batches of a divided one) is gathered first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.distributed.dtensor import Layout, any_dtensor, check_mesh, layout_of, ranks_beside

_CHANNELS = 1


class Spread(NamedTuple):
    """Where input and parameters are for the computation."""

    input: Layout
    channels: Layout  # of what has one value a channel
    row_dims: list[int]  # of the mesh, which divide what the statistics are of

    def parameter(self, value: Tensor | None) -> Tensor | None:
        """This rank's part of weight or bias, of whose gradient the ranks that share rows have a part each."""
        if value is None:
            return None
        sums = self.input.sum_over(self.row_dims).placements
        pairs = zip(sums, self.channels.placements, strict=True)
        placements = tuple(s if s.is_partial() else c for s, c in pairs)
        return self.channels.local(value, self.channels._replace(placements=placements))

    def statistic(self, value: Tensor | None) -> Tensor | None:
        """This rank's copy of its part of running statistics."""
        return None if value is None else self.channels.local(value).detach().clone()

    def write(self, part: Tensor | None, statistic: Tensor | None) -> None:
        """What became of the copy, into the statistics themselves."""
        if part is None or statistic is None:
            return
        new: Any = self.channels.whole(part, tuple(statistic.shape))
        with torch.no_grad():
            statistic.copy_(new if any_dtensor(statistic) else new.full_tensor())

    def group(self) -> Any:
        """Of the ranks whose rows the statistics are of, or None."""
        return next(iter(self.input.groups_of(self.row_dims)), None)


def check_group(group: Any, input: Any) -> None:
    """Raises where a synchronised module's group has ranks that its input's mesh lacks: statistics would lack them."""
    beside = ranks_beside(group, input.device_mesh)
    if beside:
        raise ValueError(
            "batch_norm: expected a DTensor on a mesh of all ranks of the synchronised module's process group, got one "
            f"on {input.device_mesh}, without the ranks {beside}"
        )


def number_of(count: Any) -> int:
    """The number that a tensor holds."""
    return int(count.full_tensor() if any_dtensor(count) else count)


def mask_of(valid: Any, input: Tensor) -> Any:
    """The mask that lengths stand for: those of a part of the positions are others."""
    if not isinstance(valid, Tensor) or valid.dim() != 1 or valid.dtype == torch.bool or input.dim() != 3:
        return valid
    lengths = valid.full_tensor() if any_dtensor(valid) else valid  # type: ignore[attr-defined]
    return torch.arange(input.size(2), device=lengths.device) < lengths.unsqueeze(1)


def spread(named: list[tuple[str, Any]], group: Any, training: bool, groups: int) -> Spread:
    """How a call is computed.

    Args:
        named: The tensors, input first.
        group: As given.
        training: Whether the statistics are those of the batch.
        groups: How many ghost batches.

    Raises:
        RuntimeError: an ordinary input beside DTensors, or several meshes.
        ValueError: a process group.
    """
    from torch.distributed.tensor import Replicate, Shard

    check_mesh("batch_norm", named)
    if group is not None:
        raise ValueError(f"batch_norm: expected group=None with DTensors, whose placements say it, got {group}")
    layout = layout_of(named[0][1])
    rows = [i for i, p in enumerate(layout.placements) if p.is_shard() and not p.is_shard(_CHANNELS)]
    divided = [i for i in rows if layout.mesh.size(i) > 1]
    gathered = [] if not training else divided[1:] if groups == 1 else divided
    placements = tuple(Replicate() if i in gathered else p for i, p in enumerate(layout.placements))
    channels = tuple(Shard(0) if p.is_shard(_CHANNELS) else Replicate() for p in placements)
    return Spread(
        layout._replace(placements=placements),
        layout._replace(placements=channels),
        [i for i in rows if i not in gathered],
    )

"""DTensors as what this rank holds of them, and back: where their parts are, and the groups that share a dimension.

DTensor's own classes are imported where they are needed, as that takes a third of a second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import is_channels_last
from fused_ops.core.torch_private import assume_constant_result

_ORDINARY = (Tensor, torch.nn.Parameter, type(None))


def any_dtensor(*values: Any) -> bool:
    """Whether one is a DTensor, or a tuple with one; asks for what it has, as importing its class takes long."""
    if torch.compiler.is_compiling():
        return _any_traced(values)
    for value in values:  # a loop, since any() of a generator takes longer than all of its questions
        kind = type(value)
        if kind not in _ORDINARY and (any_dtensor(*value) if kind in (tuple, list) else hasattr(value, "full_tensor")):
            return True
    return False


def _any_traced(values: Any) -> bool:
    """The same under torch.compile, which knows a class, and not what a DTensor has."""
    found = getattr(torch.distributed, "tensor", None)  # there if anybody has imported it
    if found is None:
        return False
    for value in values:
        if _any_traced(value) if isinstance(value, (tuple, list)) else isinstance(value, found.DTensor):
            return True
    return False


class Layout(NamedTuple):
    """Where the parts of a tensor are."""

    mesh: Any
    placements: tuple[Any, ...]  # one for each dimension of the mesh: Replicate, Shard, or Partial of a gradient

    def dims_of(self, dim: int) -> list[int]:
        """The dimensions of the mesh over which a dimension of the tensor is spread."""
        return [i for i, placement in enumerate(self.placements) if placement.is_shard(dim)]

    def groups_of(self, mesh_dims: list[int]) -> tuple[Any, ...]:
        """The process groups along dimensions of the mesh, without those of one rank."""
        return tuple(self.mesh.get_group(i) for i in mesh_dims if self.mesh.size(i) > 1)

    def start_of(self, size: int, mesh_dim: int) -> int:
        """Where this rank's part of a dimension of that size begins, if that of the mesh alone divides it."""
        ranks = self.mesh.size(mesh_dim)
        begin: int = min(size, -(-size // ranks) * self.mesh.get_local_rank(mesh_dim))  # as torch.chunk does
        return begin

    def without(self, dim: int) -> Layout:
        """Of a tensor that lacks the dimension, and has it whole where it is divided here."""
        from torch.distributed.tensor import Replicate, Shard

        return self._replace(
            placements=tuple(
                Replicate() if not p.is_shard() or p.dim == dim else Shard(p.dim - (p.dim > dim))
                for p in self.placements
            )
        )

    def whole_along(self, dim: int) -> Layout:
        """The same, but for one dimension of the tensor, which is whole on each rank."""
        from torch.distributed.tensor import Replicate

        return self._replace(placements=tuple(Replicate() if p.is_shard(dim) else p for p in self.placements))

    def everywhere(self) -> Layout:
        """Of a tensor that every rank has whole."""
        from torch.distributed.tensor import Replicate

        return self._replace(placements=(Replicate(),) * len(self.placements))

    def sum_over(self, mesh_dims: list[int]) -> Layout:
        """Of a sum of which the ranks along dimensions of the mesh have a part each, and all others the same."""
        from torch.distributed.tensor import Partial, Replicate

        return self._replace(
            placements=tuple(Partial() if i in mesh_dims else Replicate() for i in range(len(self.placements)))
        )

    def local(self, value: Tensor, grad: Layout | None = None) -> Tensor:
        """This rank's part of a DTensor, moved where it lies elsewhere, or of a tensor that every rank has whole.

        Args:
            value: The tensor.
            grad: Where the parts of its gradient will be. Default: as here.
        """
        from torch.distributed.tensor import DTensor

        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, self.mesh, self.everywhere().placements, run_check=False)
        if value.placements != self.placements:
            value = value.redistribute(placements=self.placements)
        part: Tensor = value.to_local(grad_placements=(grad or self).placements)
        return part

    def whole(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The DTensor of that shape of which ``part`` is this rank's."""
        from torch.distributed.tensor import DTensor

        if is_channels_last(part):
            strides = torch.empty((shape[0], *shape[2:], shape[1]), device="meta").movedim(-1, 1).stride()
        else:
            strides = torch.empty(shape, device="meta").stride()
        size = torch.Size(shape)
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=size, stride=strides)


def _dim_of(placement: Any, dims: int) -> int:
    """The dimension that a placement divides, counted: torch.compile(dynamic=True) makes a symbol of its number."""
    return next(d for d in range(dims) if placement.is_shard(d) or placement.is_shard(d - dims))


def layout_of(value: Any, once: int | None = None) -> Layout:
    """Where a DTensor's parts are, or should be put first: replicated or in contiguous parts.

    Args:
        value: The DTensor.
        once: A dimension of it that one dimension of the mesh at most may divide.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    for placement in value.placements:
        mine = Shard(_dim_of(placement, value.dim())) if type(placement) is Shard else Replicate()
        placements.append(Replicate() if mine in placements and mine.is_shard(once) and once is not None else mine)
    return Layout(value.device_mesh, tuple(placements))


def check_mesh(op: str, values: list[tuple[str, Any]]) -> None:
    """Raises unless the first tensor is a DTensor and all DTensors are on its mesh, in which this rank is."""
    name, input = values[0]
    found = [(name, value) for name, value in values if any_dtensor(value)]
    if not any_dtensor(input):
        raise RuntimeError(
            f"{op}: got mixed torch.Tensor and DTensor: expected {name} to be a DTensor as {found[0][0]} is, or "
            "ordinary tensors (to_local() or full_tensor())"
        )
    mesh = input.device_mesh
    for other, value in found:
        if value.device_mesh != mesh:
            raise RuntimeError(
                f"{op}: expected all DTensors on one mesh, got {name} on {mesh} and {other} on {value.device_mesh}"
            )
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"{op}: expected a mesh that this rank is in, got {name} on {mesh}")


@assume_constant_result
def ranks_beside(group: Any, mesh: Any) -> list[int]:
    """The ranks of a group that a mesh lacks."""
    return sorted(set(torch.distributed.get_process_group_ranks(group)) - set(mesh.mesh.flatten().tolist()))


def why_not_a_colwise_head(input: Any, weight: Any, bias: Any) -> str:
    """Why a linear layer of DTensors is not one whose classes alone are divided; empty where it is."""
    if not (any_dtensor(input) and any_dtensor(weight) and (bias is None or any_dtensor(bias))):
        return "some of its tensors are DTensors, and others are not"
    mesh, placements = weight.device_mesh, weight.placements
    if input.device_mesh != mesh or (bias is not None and (bias.device_mesh, bias.placements) != (mesh, placements)):
        return "its tensors are DTensors that are not placed alike"
    if not all(p.is_replicate() for p in input.placements):
        return "its input is divided over a mesh"
    if not all(p.is_replicate() or (type(p).__name__ == "Shard" and p.is_shard(0)) for p in placements):
        return "its weight is divided by features"
    return ""


def placements_of_logits(weight: Any, dim: int) -> tuple[Any, ...]:
    """Of the logits of such a layer, which have the classes at ``dim``."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(dim) if p.is_shard() else p for p in weight.placements)


def are_placements(given: Any, placements: tuple[Any, ...], dims: int) -> bool:
    """Whether they say the same of a tensor of that many dimensions, counted from either end."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(p.dim % dims) if type(p) is Shard else p for p in given) == placements

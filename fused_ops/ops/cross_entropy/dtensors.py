"""Cross-entropy of DTensors: what this rank computes of it, by the placements of the logits, and the DTensors of that.

Along a dimension of the mesh that divides the classes the ranks are a ``class_group``, along one that divides the rows
a ``row_group``; the ranks along any other do all the same. docs/distributed.md has the table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fused_ops.distributed.dtensor import Layout, check_mesh, layout_of
from fused_ops.ops.cross_entropy.arguments import check_shapes, share_of_rows, target_tensors
from fused_ops.ops.cross_entropy.reduction import CrossEntropyOutput
from fused_ops.ops.cross_entropy.reference import class_dim
from fused_ops.ops.cross_entropy.shards import Ranks

_CLASSES = Ranks._fields[:3]
_SCALARS = ("loss", "z_loss")  # of the outputs, where there is a reduction


class Logits(NamedTuple):
    """Logits that are spread over a mesh, or those that a spread head makes."""

    layout: Layout
    shape: tuple[int, ...]  # on all ranks
    dim: int  # of the classes
    kind: str  # of the target

    def row_dims(self) -> list[int]:
        """The dimensions of the mesh over which rows are spread."""
        placements = enumerate(self.layout.placements)
        return [i for i, placement in placements if placement.is_shard() and not placement.is_shard(self.dim)]

    def alike(self, value: Any) -> Any:
        """What every rank has whole, and of whose gradient the ranks that share the rows have a part each."""
        if not isinstance(value, Tensor):
            return value
        return self.layout.everywhere().local(value, self.layout.sum_over(self.row_dims()))

    def target(self, target: Any) -> Any:
        """This rank's part of a target of any kind."""
        rows = self.layout.without(self.dim)
        if self.kind == "index":
            return rows.local(target)
        if self.kind == "dense":
            return self.layout.local(target)
        if self.kind == "sparse":
            return tuple(self.layout.whole_along(self.dim).local(t) for t in target)
        first, second, lam = target
        lam = rows.local(share_of_rows(lam, first)) if isinstance(lam, Tensor) else lam
        return rows.local(first), rows.local(second), lam

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """This rank's options of ``cross_entropy``, with the process groups."""
        mine = dict(options)
        mine["weight"], mine["normalizer"] = self.alike(options["weight"]), self.alike(options["normalizer"])
        if (mask := options["class_mask"]) is not None:
            mine["class_mask"] = self.alike(mask) if mask.dim() == 1 else self.layout.local(mask)
        if options["token_weight"] is not None:
            mine["token_weight"] = self.layout.without(self.dim).local(options["token_weight"])
        beside = options["row_group"]  # ranks outside of the mesh, which have other rows
        beside = beside if isinstance(beside, tuple) else () if beside is None else (beside,)
        mine["row_group"] = (*self.layout.groups_of(self.row_dims()), *beside) or None
        for mesh_dim in self.layout.dims_of(self.dim):
            for group in self.layout.groups_of([mesh_dim]):
                classes = self.shape[self.dim]
                where = {"class_start": self.layout.start_of(classes, mesh_dim), "classes": classes}
                mine |= {"class_group": group, **where}
        return mine

    def result(self, result: Any, reduction: str) -> Any:
        """What this rank computed as DTensors: sums over its rows as a part of the sum over all rows."""
        sums, rows = self.layout.sum_over(self.row_dims()), self.layout.without(self.dim)
        shape = (*self.shape[: self.dim], *self.shape[self.dim + 1 :])

        def whole(name: str, part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            return sums.whole(part, ()) if name in _SCALARS and reduction != "none" else rows.whole(part, shape)

        if isinstance(result, Tensor):
            return whole("loss", result)
        named = zip(CrossEntropyOutput._fields, result, strict=True)
        return CrossEntropyOutput(*(whole(name, part) for name, part in named))  # type: ignore[arg-type]


def refuse_groups(op: str, options: dict[str, Any]) -> None:
    """Raises for classes that are spread beside DTensors."""
    for name in _CLASSES:
        if options[name] is not None:
            raise ValueError(f"{op}: expected {name}=None with DTensors, whose placements say it, got {options[name]}")


def named_options(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those that may be tensors."""
    return [(name, options[name]) for name in ("weight", "class_mask", "token_weight", "normalizer")]


def spread(input: Tensor, target: Any, options: dict[str, Any]) -> tuple[Tensor, Logits]:
    """This rank's logits, and where all are.

    Raises:
        RuntimeError: ordinary logits beside DTensors, or several meshes; as ``cross_entropy`` for shapes and dtypes.
        ValueError: ``class_group``.
    """
    check_mesh("cross_entropy", [("input", input), *target_tensors(target), *named_options(options)])
    refuse_groups("cross_entropy", options)
    weight, mask, token_weight = (options[name] for name in ("weight", "class_mask", "token_weight"))
    kind = check_shapes(input, target, weight, mask, token_weight, options["ignore_index"])
    dim = class_dim(input)
    logits = Logits(layout_of(input, once=dim), tuple(input.shape), dim, kind)
    return logits.layout.local(input), logits

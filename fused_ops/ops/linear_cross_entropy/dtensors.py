"""Linear cross-entropy of DTensors: what this rank computes of it, by the placements of the weight and of the input.

Along each dimension of the mesh::

    weight      input       the ranks
    Shard(0)    Replicate   are a class_group
    Replicate   Shard       are a row_group (features excepted); each has a part of the weight's gradient
    Shard(0)    Shard       are the one or the other, by what has to be gathered for it
    Replicate   Replicate   do all the same

What is placed otherwise (features that are divided, Partial) is gathered first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.distributed.dtensor import Layout, check_mesh, layout_of
from fused_ops.ops.cross_entropy.arguments import check_shapes, target_tensors
from fused_ops.ops.cross_entropy.dtensors import Logits, named_options, refuse_groups
from fused_ops.ops.linear_cross_entropy.arguments import (
    Shape,
    check_main_grad,
    checked_ignore_index,
    flat,
    flat_target,
    low_rank,
    shapes,
    shifted,
)


class Head(NamedTuple):
    """Where the matrices of a head are, and the logits that it makes."""

    input: Layout
    weight: Layout  # of bias and of lora's B too
    logits: Logits

    def matrix(self, value: Tensor | None) -> Tensor | None:
        """This rank's part of what has the classes first, with the gradient from its rows."""
        return None if value is None else self.weight.local(value, self.gradient())

    def gradient(self) -> Layout:
        """Where the parts of such a matrix' gradient are."""
        sums = self.logits.layout.sum_over(self.logits.row_dims()).placements
        placements = (s if s.is_partial() else w for s, w in zip(sums, self.weight.placements, strict=True))
        return self.weight._replace(placements=tuple(placements))

    def with_main_grad(self, weight: Tensor, main_grad: Any) -> tuple[Tensor | None, Tensor | None]:
        """This rank's part of the weight, and of what its gradient is added to, which must be where that is found."""
        if main_grad is None:
            return self.matrix(weight), None
        check_main_grad(main_grad, weight)
        wanted, found = self.gradient().placements, getattr(main_grad, "placements", None)
        if found is None or tuple(found) != wanted:
            raise RuntimeError(
                f"linear_cross_entropy: expected main_grad to be a DTensor with the placements {wanted}, as this call "
                f"finds the gradient of linear_weight, got {found or type(main_grad).__name__}"
            )
        part = self.matrix(weight.detach())  # to_local makes zeros of no gradient, and ``weight.grad`` is to stay
        assert part is not None
        return part.detach().requires_grad_(weight.requires_grad), main_grad.to_local()

    def lora(self, lora: Any, shape: Shape) -> Any:
        """This rank's part of lora's (A, B, scale)."""
        if lora is None:
            return None
        a, b, scale = lora
        b = b if not shape.outputs else b.reshape(shape.classes, -1, b.size(-1))
        part = self.matrix(b)
        assert part is not None
        return self.logits.alike(a), part.flatten(0, -2), scale


def _rows_beside(input: Layout, lead: tuple[int, ...], mesh_dim: int) -> int:
    """The rows of all ranks along one dimension of the mesh."""
    dims = [i for i, p in enumerate(input.placements) if p.is_shard() and i != mesh_dim]
    ranks: int = math.prod([input.mesh.size(i) for i in dims])  # a list, as Dynamo has no product of a generator
    return math.prod(lead) // ranks


def _layouts(input: Tensor, weight: Tensor, shape: Shape) -> tuple[Layout, Layout]:
    """Where input and weight will be for the computation.

    Where both are divided along one dimension of the mesh, one of them is gathered: the input (and its gradient
    all-reduced, three times rows * features numbers on the way) or the weight (and its gradient reduce-scattered, two
    times classes * features), whichever is less.
    """
    from torch.distributed.tensor import Replicate, Shard

    mine = layout_of(input)
    theirs = layout_of(weight, once=0) if hasattr(weight, "placements") else mine.everywhere()
    rows, classes = list(mine.placements), list(theirs.placements)
    for i, (of_input, of_weight) in enumerate(zip(mine.placements, theirs.placements, strict=True)):
        if of_input.is_shard(input.dim() - 1):
            rows[i] = Replicate()
        if of_weight != Shard(0):
            classes[i] = Replicate()
        elif rows[i].is_shard():
            outputs = shape.classes * math.prod(shape.outputs)
            keep_classes = 3 * _rows_beside(mine, shape.lead, i) <= 2 * outputs
            (rows if keep_classes else classes)[i] = Replicate()
    return mine._replace(placements=tuple(rows)), theirs._replace(placements=tuple(classes))


def _without_data(value: Any) -> Any:
    """Of the same shape and dtype, for checks."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _checked(input: Tensor, weight: Tensor, target: Any, options: dict[str, Any]) -> tuple[Shape, str]:
    """The shape of the call and the kind of its target; raises for shapes and dtypes that do not fit."""
    shape = shapes(input, weight, options["linear_bias"])
    if options["lora"] is not None:
        low_rank(options["lora"], shape, input.size(-1))
    parts = tuple(_without_data(t) for _, t in target_tensors(target))
    found = flat_target(parts if isinstance(target, (tuple, list)) else parts[0], shape, options["ignore_index"], False)
    mask, token_weight = (_without_data(options[name]) for name in ("class_mask", "token_weight"))
    if isinstance(mask, Tensor) and mask.dim() > 1:
        mask = flat("class_mask", mask, shape, shape.classes)
    token_weight = flat("token_weight", token_weight, shape, None)
    logits = torch.empty((), dtype=input.dtype, device=input.device).expand(shape.with_classes(shape.classes, True))
    ignored = checked_ignore_index(options["ignore_index"])
    return shape, check_shapes(logits, found, options["weight"], mask, token_weight, ignored)


def spread(
    input: Tensor, weight: Tensor, target: Any, options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Logits]:
    """This rank's (input, linear_weight, target) and options, and where the logits would be.

    Raises:
        RuntimeError: ordinary input beside DTensors, or several meshes; a ``main_grad`` that is not where the gradient
            is; as ``linear_cross_entropy`` for shapes and dtypes.
        ValueError: ``class_group`` or ``sequence_parallel``.
    """
    op = "linear_cross_entropy"
    lora = options["lora"]
    named = [("input", input), ("linear_weight", weight), ("linear_bias", options["linear_bias"])]
    named += [*target_tensors(target), *named_options(options), ("main_grad", options["main_grad"])]
    named += [(f"lora[{i}]", t) for i, t in enumerate(lora if isinstance(lora, (tuple, list)) else ())]
    check_mesh(op, named)
    refuse_groups(op, options)
    if options["sequence_parallel"]:
        raise ValueError(f"{op}: expected sequence_parallel=False with DTensors, whose placements say it")
    mine = dict(options)
    if mine.pop("shift"):
        target, mine["ignore_index"] = shifted(input, target, mine["ignore_index"])
    shape, kind = _checked(input, weight, target, mine)
    of_input, of_weight = _layouts(input, weight, shape)
    from torch.distributed.tensor import Shard

    dim = len(shape.lead)
    pairs = zip(of_input.placements, of_weight.placements, strict=True)
    layout = of_input._replace(placements=tuple(Shard(dim) if w.is_shard() else i for i, w in pairs))
    logits = Logits(layout, shape.with_classes(shape.classes, False), dim, kind)
    head = Head(of_input, of_weight, logits)
    mine |= {"linear_bias": head.matrix(mine["linear_bias"]), "lora": head.lora(lora, shape)}
    matrix, mine["main_grad"] = head.with_main_grad(weight, mine["main_grad"])
    return (of_input.local(input), matrix, logits.target(target)), logits.options(mine), logits

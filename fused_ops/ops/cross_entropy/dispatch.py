"""Which implementation serves a checked call of cross-entropy: a Function, an op of a graph, or plain formulas."""

from __future__ import annotations

from torch import Tensor

from fused_ops.core.graph import in_graph, needs_formulas
from fused_ops.ops.cross_entropy import functions as eager
from fused_ops.ops.cross_entropy import graph
from fused_ops.ops.cross_entropy import rows_reference as reference
from fused_ops.ops.cross_entropy.rows import cross_entropy_rows
from fused_ops.ops.cross_entropy.rows_reference import RowArgs, RowOptions


def index_loss(
    input: Tensor, target: Tensor, ignore_index: int, reduction: str, inplace_backward: bool = False
) -> Tensor:
    """The loss of checked class indices, where ``needs_formulas`` does not hold."""
    if in_graph():
        return graph.index_loss(input, target, ignore_index, reduction)
    return eager.index_loss(input, target, ignore_index, reduction, inplace_backward)


def rows(a: RowArgs, o: RowOptions, inplace_backward: bool = False) -> tuple[Tensor, ...]:
    """nll, lse, mass, target_weight, entropy, prediction and target_log_probability of each row."""
    if needs_formulas():
        return reference.formulas(a, o)
    if in_graph():
        return graph.cross_entropy_rows(a, o)
    return cross_entropy_rows(inplace_backward, a, o)

"""What the graphs that the backend has rewritten call."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fused_ops.core.memory_format import in_its_format
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.api import batch_norm as fused_batch_norm
from fused_ops.ops.batch_norm.api import recomputing


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``fused_ops.batch_norm`` with ``slope`` for the activation's one number."""
    args = (running_mean, running_var, weight, bias, training, momentum, eps)
    own: dict[str, Any] = {}
    if residual is not None:
        input = in_its_format(input)
        if residual.stride() != input.stride():  # in steps of their own
            function = activations.function_of(activations.CODES[activation], slope, slope)
            return function(batch_norm(input, *args) + residual)
        own["residual"] = residual
    if activation is not None:
        own |= {"activation": activation, "negative_slope": slope, "alpha": slope}
    return fused_batch_norm(input, *args, **own)


def count_batch(batches: Tensor, number: int = 1) -> Tensor:
    """``num_batches_tracked.add_(1)``, of checkpointed batch norms: once for each batch, as their statistics."""
    return batches if recomputing() else batches.add_(number)


def run_checkpointed(body: fx.GraphModule, written: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """A checkpointed part of a graph, by activation checkpointing of eager mode.

    Args:
        body: The part's graph.
        written: Which of the arguments it writes in place. They are no inputs of the checkpoint, which holds its inputs
            to be the same when it runs again.
        *args: The part's arguments.
        **kwargs: The options of ``torch.utils.checkpoint.checkpoint``.
    """
    fixed = {i: args[i] for i in written}
    others = [a for i, a in enumerate(args) if i not in fixed]
    context = body.meta.get("_checkpoint_context_fn")
    options = kwargs | {"use_reentrant": False} | ({} if context is None else {"context_fn": context})
    return checkpoint(partial(_run_body, body, fixed), *others, **options)


def _run_body(body: fx.GraphModule, fixed: dict[int, Any], *others: Any) -> Any:
    rest = iter(others)
    count = len(fixed) + len(others)
    return body(*(fixed[i] if i in fixed else next(rest) for i in range(count)))

"""The losses that are found without a head's logits: cross-entropy, and what label smoothing makes of log_softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.conversion.deferred_logits import (
    ALWAYS,
    AS_IT_IS,
    DeferredLogits,
    SpreadLogits,
    consume,
    version_of,
)
from fused_ops.distributed.dtensor import any_dtensor
from fused_ops.ops.cross_entropy.api import cross_entropy
from fused_ops.ops.cross_entropy.shards import Ranks
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy
from fused_ops.ops.linear_cross_entropy.arguments import LowRank

_HALF = (torch.bfloat16, torch.float16)
_NONE = -(2**40)  # an ignore_index that no class index is


def _loss(logits: DeferredLogits, target: Tensor, **options: Any) -> Any:
    """Linear cross-entropy of the head, with what was carried along."""
    state, head, carried = logits._state, logits._state.head, logits._state.carried
    state.check()
    scale = carried.times / carried.over
    if carried.bounded:
        scale, options["softcap"] = carried.times * carried.cap / carried.over, carried.cap
    if scale != 1:
        options["logit_scale"] = scale
    if head.low_input is not None and head.low_weight is not None:
        options["lora"] = LowRank(head.low_input, head.low_weight)
    # Autocast was heeded by the head; on, it lets 16-bit logits be given class weights in float32.
    device, dtype, weight = head.input.device.type, head.input.dtype, options.get("weight")
    mixed = dtype in _HALF and weight is not None and weight.dtype == options.get("loss_dtype") == torch.float32
    with torch.autocast(device, dtype if mixed else None, enabled=mixed):
        result = linear_cross_entropy(head.input, head.weight, target, linear_bias=head.bias, **options)
    consume(state, result if isinstance(result, Tensor) else result.loss)
    return result


def _is_target(logits: DeferredLogits, target: Any) -> bool:
    return type(target) is Tensor or (isinstance(logits, SpreadLogits) and any_dtensor(target))


def _are_indices(logits: DeferredLogits, target: Tensor) -> bool:
    lead = logits._state.head.input.shape[:-1]
    return not target.is_floating_point() and target.shape == lead and (len(lead) == 1 or logits._state.moved)


def _cross_entropy(
    func: Any,
    logits: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> Any:
    """Of class indices, or of class probabilities of (rows, classes) logits."""
    legacy = size_average is not None or reduce is not None
    # over which classes or rows are spread: not of a whole head
    ranks = [options.pop(name, None) for name in Ranks._fields]
    other = legacy or any(value is not None for value in ranks)
    if other or not isinstance(logits, DeferredLogits) or not _is_target(logits, target) or logits._state.carried.sign:
        return NotImplemented
    state = logits._state
    carries = state.carried != AS_IT_IS
    if carries and (options.get("softcap") is not None or options.get("logit_scale", 1.0) != 1.0):
        return NotImplemented
    if _are_indices(logits, target):
        options["ignore_index"] = ignore_index
    elif target.shape != state.twin.shape or target.dim() != 2 or ignore_index >= 0:
        return NotImplemented
    options.pop("inplace_backward", None)
    if options.get("loss_dtype") is None:
        wide = state.twin.dtype in _HALF and torch.is_autocast_enabled(state.head.input.device.type)
        plain = torch.promote_types(state.twin.dtype, target.dtype) if target.is_floating_point() else state.twin.dtype
        options["loss_dtype"] = torch.float32 if wide else plain
    return _loss(logits, target, weight=weight, reduction=reduction, label_smoothing=label_smoothing, **options)


def _nll_loss(
    func: Any,
    log_probabilities: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    legacy = size_average is not None or reduce is not None
    if legacy or not isinstance(log_probabilities, DeferredLogits) or not _is_target(log_probabilities, target):
        return NotImplemented
    state = log_probabilities._state
    if state.carried.sign != 1 or not _are_indices(log_probabilities, target):
        return NotImplemented
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    return _loss(log_probabilities, target, loss_dtype=state.twin.dtype, **options)


# --- What label smoothing by hand takes of the log-probabilities: one of each row, and the sum of each row -----------


def _last_dimension(logits: Any, dim: Any) -> bool:
    if not isinstance(logits, DeferredLogits) or isinstance(logits, SpreadLogits):
        return False
    if type(dim) is not int or not torch.is_grad_enabled():
        return False
    n = logits._state.twin.dim()
    return dim % n == n - 1 and not logits._state.moved and logits._state.carried.sign != 0


def _rows(logits: DeferredLogits, target: Tensor | None) -> Any:
    """Both at once, for a gather and a sum: with label smoothing of 1 the loss is the mean over the classes."""
    state = logits._state
    key = None if target is None else (target, version_of(target))
    if state.outputs is None or (key is not None and not _same(key, state.outputs[0])):
        head = state.head
        lead = head.input.shape[:-1]
        indices = (
            torch.zeros(lead, dtype=torch.int64, device=head.input.device) if target is None else target.reshape(lead)
        )
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": 1.0, "return_outputs": True}
        options |= {"loss_dtype": torch.promote_types(state.twin.dtype, torch.float32), "ignore_index": _NONE}
        state.outputs = key, _loss(logits, indices, **options)
    return state.outputs[1]


def _same(key: Any, other: Any) -> bool:
    return other is not None and key[0] is other[0] and key[1] == other[1]


def _gather(func: Any, logits: Any, dim: Any, index: Any, **options: Any) -> Any:
    """One log-probability of each row."""
    if options or type(index) is not Tensor or not _last_dimension(logits, dim):
        return NotImplemented
    state = logits._state
    shape = (*state.head.input.shape[:-1], 1)
    if index.shape != shape or index.dtype != torch.int64:
        return NotImplemented
    try:
        found = _rows(logits, index).target_log_probability
    except IndexError:  # gather has another exception for it
        return NotImplemented
    return (found * float(state.carried.sign)).to(state.twin.dtype).view(shape)


def _sum(func: Any, logits: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **more: Any) -> Any:
    """Of each row's log-probabilities."""
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if more or not _last_dimension(logits, dim) or not (dtype is None or dtype.is_floating_point):
        return NotImplemented
    state = logits._state
    found = _rows(logits, None).loss * (-float(state.carried.sign) * state.twin.size(-1))
    return (found.unsqueeze(-1) if keepdim else found).to(dtype or state.twin.dtype)


def _mean(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    found = _sum(func, logits, *args, **kwargs)
    return found if found is NotImplemented else found / logits._state.twin.size(-1)


ALWAYS[F.cross_entropy] = ALWAYS[cross_entropy] = _cross_entropy
ALWAYS[F.nll_loss] = _nll_loss
ALWAYS[Tensor.gather] = ALWAYS[torch.gather] = _gather
ALWAYS[Tensor.sum] = ALWAYS[torch.sum] = _sum
ALWAYS[Tensor.mean] = ALWAYS[torch.mean] = _mean

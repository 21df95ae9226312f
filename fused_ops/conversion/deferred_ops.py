"""What can be done to a head's logits without having them: views, rows, casts, scales, a soft cap, a bias, LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.conversion.deferred_logits import AS_IT_IS, HANDLERS, DeferredLogits, Needed, SpreadLogits

_HALF = (torch.bfloat16, torch.float16)
_PRIME = 1_000_003  # a size of the last dimension that no other has


def _of_first(func: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
    return lambda real: func(real, *args, **kwargs)


def _twin(func: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the function makes of a tensor that has a shape only; NotImplemented where it raises, as it then will."""
    try:
        return func(logits, *args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
        return NotImplemented


# --- Views, and choices of rows --------------------------------------------------------------------------------------


def _reshape(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """Another view of the rows, in their order."""
    state = logits._state
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return NotImplemented
    twin = _twin(func, state.twin, *args, **kwargs)
    if twin is state.twin:
        return logits
    if twin is NotImplemented or (state.moved and twin.shape != state.twin.shape):
        return NotImplemented
    if state.moved:
        return logits.derive(_of_first(func, args, kwargs), twin)
    if twin.dim() < 2 or twin.size(-1) != state.twin.size(-1):
        return NotImplemented
    head = _rows_of(state.head, lambda t: t.reshape(*twin.shape[:-1], t.size(-1)))
    return logits.derive(_of_first(func, args, kwargs), twin, head=head)


def _rows_of(head: Any, choose: Callable[[Tensor], Any]) -> Any:
    low = None if head.low_input is None else choose(head.low_input)
    return head._replace(input=choose(head.input), low_input=low)


def _leading(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """What leaves the last dimension alone can be done to the head's input as well."""
    state = logits._state
    probe = torch.empty((*state.twin.shape[:-1], _PRIME), device="meta")
    probes, twins = _twin(func, probe, *args, **kwargs), _twin(func, state.twin, *args, **kwargs)
    if state.moved or NotImplemented in (probes, twins):
        return NotImplemented
    several = isinstance(twins, (tuple, list))
    if not several:
        probes, twins = (probes,), (twins,)
    if any(t.dim() < 2 or t.size(-1) != _PRIME for t in probes):
        return NotImplemented
    found = []
    for i, twin in enumerate(twins):
        pick = partial(_picked, func, args, kwargs, i if several else None)
        found.append(logits.derive(pick, twin, head=_rows_of(state.head, pick)))
    return type(twins)(found) if several else found[0]


def _picked(func: Any, args: Any, kwargs: Any, i: int | None, tensor: Tensor) -> Tensor:
    result = func(tensor, *args, **kwargs)
    return result if i is None else result[i]  # type: ignore[no-any-return]


def _swap_dimensions(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """The classes become dimension 1, the order of the others stays."""
    state, n = logits._state, logits._state.twin.dim()
    order = (0, n - 1, *range(1, n - 1))
    if state.moved or n < 3:
        return NotImplemented
    probe = _twin(func, torch.empty(tuple(range(2, n + 2)), device="meta"), *args, **kwargs)
    if probe is NotImplemented or tuple(probe.shape) != tuple(2 + i for i in order):
        return NotImplemented
    return logits.derive(_of_first(func, args, kwargs), state.twin.permute(order), moved=True)


def _choose_rows(func: Any, logits: DeferredLogits, index: Any) -> Any:
    state = logits._state
    items = index if isinstance(index, tuple) else (index,)
    if state.moved or not _is_about_rows(items, logits.dim()):
        return NotImplemented
    try:
        head = _rows_of(state.head, lambda t: t[index])
    except (RuntimeError, IndexError):
        return NotImplemented
    if head.input.dim() < 2:
        return NotImplemented
    tensors = [item for item in items if isinstance(item, Tensor)]
    shape = (*head.input.shape[:-1], state.twin.size(-1))
    twin = state.twin.new_empty(shape) if tensors else state.twin[index]
    return logits.derive(_of_first(func, (index,), {}), twin, head=head, reads=tensors)


def _is_about_rows(items: tuple[Any, ...], dimensions: int) -> bool:
    """Whether an index leaves the last dimension as it is."""
    used, dots = 0, False
    for item in items:
        if isinstance(item, Tensor):
            used += item.dim() if item.dtype in (torch.bool, torch.uint8) else 1
        elif item is ...:
            dots = True
        elif isinstance(item, slice) or type(item) is int:
            used += 1
        else:
            return False
    full = isinstance(items[-1], slice) and items[-1] == slice(None) if items else False
    if dots and items[-1] is not ...:
        return full and used <= dimensions
    return used < dimensions or (used == dimensions and full)


# --- Values ----------------------------------------------------------------------------------------------------------


def _cast(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """To float32, which is what the loss is computed in anyway."""
    state = logits._state
    real = state.head.input
    probe = _twin(func, torch.empty((), dtype=state.twin.dtype, device=real.device), *args, **kwargs)
    if not isinstance(probe, Tensor) or probe.device != real.device:
        return NotImplemented
    if probe.dtype == state.twin.dtype:
        return logits
    if probe.dtype != torch.float32 or state.twin.dtype not in _HALF:
        return NotImplemented
    return logits.derive(_of_first(func, args, kwargs), _as(state.twin, torch.float32))


def _as(twin: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(twin.shape, twin.stride(), dtype=dtype, device="meta")


def _number(value: Any) -> float | None:
    """A factor that is not 0; numbers alone, since a tensor may change and want a gradient."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value != 0
    return float(value) if usable else None


def _scale(divides: bool, func: Any, logits: Any, other: Any, **more: Any) -> Any:
    logits, other = (logits, other) if isinstance(logits, DeferredLogits) else (other, logits)
    factor, state = _number(other), logits._state
    carried = state.carried
    if more or factor is None or (carried.bounded and factor < 0 and not carried.sign):
        return NotImplemented
    if carried.sign:
        if abs(factor) != 1:
            return NotImplemented
        carried = carried._replace(sign=carried.sign * int(factor))
    elif carried.bounded:
        carried = carried._replace(cap=carried.cap / factor if divides else carried.cap * factor)
    elif divides:
        carried = carried._replace(over=carried.over * factor)
    else:
        carried = carried._replace(times=carried.times * factor)
    return logits.derive(lambda real: func(real, other), state.twin, carried=carried)


def _multiply(func: Any, logits: Any, other: Any, **more: Any) -> Any:
    return _scale(False, func, logits, other, **more)


def _divide(func: Any, logits: Any, other: Any, **more: Any) -> Any:
    return _scale(True, func, logits, other, **more) if isinstance(logits, DeferredLogits) else NotImplemented


def _negate(func: Any, logits: DeferredLogits, **more: Any) -> Any:
    return _scale(False, lambda real, _: func(real), logits, -1.0, **more)


def _tanh(func: Any, logits: DeferredLogits, **more: Any) -> Any:
    state = logits._state
    if more or state.carried.bounded or state.carried.sign:
        return NotImplemented
    return logits.derive(func, state.twin, carried=state.carried._replace(bounded=True))


def _add(func: Any, logits: Any, other: Any, **more: Any) -> Any:
    """A bias, or LoRA's low-rank term."""
    if more or isinstance(logits, SpreadLogits) or isinstance(other, SpreadLogits):
        return NotImplemented
    if isinstance(logits, DeferredLogits) and isinstance(other, DeferredLogits):
        return _add_low_rank(func, logits, other)
    logits, other = (logits, other) if isinstance(logits, DeferredLogits) else (other, logits)
    state = logits._state
    classes = state.twin.size(-1)
    if type(other) not in (Tensor, torch.nn.Parameter) or state.moved or state.carried != AS_IT_IS:
        return NotImplemented
    if other.numel() != classes or other.dim() > state.twin.dim() or other.dim() == 0 or other.size(-1) != classes:
        return NotImplemented
    dtype = torch.result_type(state.twin, other)
    if other.device != state.head.input.device or (dtype != state.twin.dtype and dtype != torch.float32):
        return NotImplemented
    bias = other.reshape(classes).to(state.head.input.dtype)
    bias = bias if state.head.bias is None else state.head.bias + bias
    head = state.head._replace(bias=bias)
    return logits.derive(func, _as(state.twin, dtype), head=head, own=(other,))


def _add_low_rank(func: Any, logits: DeferredLogits, low: DeferredLogits) -> Any:
    """``x W^T + scale * (x A^T) B^T``: the second is the result of a linear layer with the weight B."""
    mine, theirs = logits._state, low._state
    plain = theirs.carried._replace(times=1.0, over=1.0) == mine.carried == AS_IT_IS
    if not plain or mine.moved or theirs.moved or mine.twin.shape != theirs.twin.shape or logits is low:
        return NotImplemented
    if mine.head.low_input is not None or theirs.head.low_input is not None or theirs.head.bias is not None:
        return NotImplemented
    if mine.twin.dtype != theirs.twin.dtype or mine.head.input.dtype != theirs.head.input.dtype:
        base, term = (str(state.twin.dtype).removeprefix("torch.") for state in (mine, theirs))
        return Needed(
            f"its low-rank term is {term} and its base {base}: get_peft_model(..., autocast_adapter_dtype=False) keeps "
            "adapters in the base's dtype, autocast runs both in one"
        )
    scale = theirs.carried.times / theirs.carried.over
    low_input = theirs.head.input if scale == 1 else theirs.head.input * scale
    head = mine.head._replace(low_input=low_input, low_weight=theirs.head.weight)
    return logits.derive(func, mine.twin, head=head, others=(low,))


def _log_softmax(
    func: Any, logits: DeferredLogits, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Any:
    return _log_probabilities(func, logits, dim, dtype)


def _log_softmax_method(func: Any, logits: DeferredLogits, dim: Any, dtype: Any = None) -> Any:
    return _log_probabilities(func, logits, dim, dtype)


def _log_probabilities(func: Any, logits: DeferredLogits, dim: Any, dtype: Any) -> Any:
    """Over the classes, for a loss that is made of them."""
    state, device = logits._state, logits._state.head.input.device.type
    wide = state.twin.dtype in _HALF and torch.is_autocast_enabled(device)
    result = dtype or (torch.float32 if wide else state.twin.dtype)
    if state.carried.sign or state.moved or type(dim) is not int or dim % state.twin.dim() != state.twin.dim() - 1:
        return NotImplemented
    if result not in (state.twin.dtype, torch.float32) or (result == torch.float32 and state.twin.dtype.itemsize > 4):
        return NotImplemented
    carried = state.carried._replace(sign=1)
    twin = torch.empty(state.twin.shape, dtype=result, device="meta")
    return logits.derive(lambda real: F.log_softmax(real, -1, dtype=result), twin, carried=carried)


def _named(names: Sequence[str], *places: Any) -> list[Any]:
    return [getattr(place, name) for name in names for place in places if hasattr(place, name)]


HANDLERS.update(
    {
        **dict.fromkeys(_named(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), Tensor), _reshape),
        **dict.fromkeys(_named(("contiguous", "squeeze", "unsqueeze", "clone"), Tensor), _reshape),
        **dict.fromkeys(_named(("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "clone"), torch), _reshape),
        **dict.fromkeys(
            _named(("narrow", "select", "split", "chunk", "unbind", "tensor_split"), Tensor, torch), _leading
        ),
        **dict.fromkeys(_named(("transpose", "permute", "movedim", "swapaxes"), Tensor, torch), _swap_dimensions),
        Tensor.mT.__get__: _swap_dimensions,  # type: ignore[attr-defined]
        Tensor.__getitem__: _choose_rows,
        **dict.fromkeys(_named(("float", "to", "half", "bfloat16", "cpu", "cuda"), Tensor), _cast),
        **dict.fromkeys(_named(("mul", "multiply", "__mul__", "__rmul__"), Tensor, torch), _multiply),
        **dict.fromkeys(_named(("div", "divide", "true_divide", "__truediv__"), Tensor, torch), _divide),
        **dict.fromkeys(_named(("neg", "negative", "__neg__"), Tensor, torch), _negate),
        **dict.fromkeys(_named(("tanh",), Tensor, torch, F), _tanh),
        **dict.fromkeys(_named(("add", "__add__", "__radd__"), Tensor, torch), _add),
        F.log_softmax: _log_softmax,
        **dict.fromkeys((torch.log_softmax, Tensor.log_softmax), _log_softmax_method),
    }
)

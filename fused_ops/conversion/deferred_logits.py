"""The logits of a linear head that are not computed until somebody needs them; their cross-entropy does not."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.torch_private import tree_map_only
from fused_ops.ops.cross_entropy.api import cross_entropy
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy

_HALF = (torch.bfloat16, torch.float16)


class HeadTensors(NamedTuple):
    """What the logits are made of, as the head saw it (under autocast, in its dtype)."""

    input: Tensor  # (..., in_features)
    weight: Tensor  # (classes, in_features)
    bias: Tensor | None  # (classes,)

    def versions(self) -> tuple[int, ...]:
        """Tells whether one has been written to."""
        return tuple(-1 if t is None or t.is_inference() else t._version for t in self)


@dataclass
class _State:
    head: HeadTensors
    versions: tuple[int, ...]
    moved: bool  # the classes are dimension 1, not the last
    origin: tuple[DeferredLogits, Callable[[Tensor], Tensor]] | None  # what these are a view or a cast of
    real: Tensor | None = None
    children: list[weakref.ref[DeferredLogits]] = field(default_factory=list)


class DeferredLogits(Tensor):
    """``linear(input, weight, bias)``: the shape and the dtype are known, the values are found when needed.

    ``F.cross_entropy`` of them, or of what view, reshape, flatten, a choice of rows, ``float()`` or a swap of the
    classes to dimension 1 makes of them, is ``fused_ops.linear_cross_entropy``. Everything else computes the logits,
    once, with their graph, and goes on with those: from then on this is an ordinary tensor in all but its type.
    """

    _state: _State

    @classmethod
    def of(cls, head: HeadTensors) -> DeferredLogits:
        """The logits of a head."""
        return _deferred(head, head.input.dtype, False, None)

    def settle(self) -> Tensor:
        """The logits as an ordinary tensor with its graph, computed at the first call."""
        state = self._state
        if state.real is None:
            if state.origin is not None:
                real = state.origin[1](state.origin[0].settle())
            else:
                self._check_versions()
                with _as_made(state.head.input):
                    real = F.linear(*state.head)
            if state.real is None:  # a parent settles its children
                state.real = real
            for child in state.children:
                if (found := child()) is not None:
                    found.settle()
        return state.real

    def _check_versions(self) -> None:
        if self._state.versions != self._state.head.versions():
            raise RuntimeError(
                "convert(loss=...) has put off computing these logits, and their head's weight or input was changed in "
                "place since (by optimizer.step(), say): use them before that, or convert without loss"
            )

    def _child(self, input: Tensor, dtype: torch.dtype, moved: bool, view: Callable[[Tensor], Tensor]) -> Tensor:
        state = self._state
        child = _deferred(state.head._replace(input=input), dtype, moved, (self, view))
        state.children.append(weakref.ref(child))
        return child

    def cross_entropy(self, target: Any, weight: Tensor | None = None, **options: Any) -> Any:
        """The loss without the logits, or NotImplemented where it needs them.

        Args:
            target: Class indices, or class probabilities of (rows, classes) logits.
            weight: (classes,), the factor of each class.
            **options: Of ``F.cross_entropy`` or ``fused_ops.cross_entropy``.
        """
        state, head = self._state, self._state.head
        options.pop("inplace_backward", None)
        legacy = options.pop("size_average", None), options.pop("reduce", None)
        if state.real is not None or legacy != (None, None) or not isinstance(target, Tensor):
            return NotImplemented
        lead = head.input.shape[:-1]
        indices = not target.is_floating_point() and target.shape == lead and (len(lead) == 1 or state.moved)
        if indices:
            options.setdefault("ignore_index", -100)
        elif target.shape != self.shape or len(lead) != 1 or options.pop("ignore_index", -100) >= 0:
            return NotImplemented
        self._check_versions()
        if options.get("loss_dtype") is None:
            wide = self.dtype in _HALF and torch.is_autocast_enabled(self.device.type)
            options["loss_dtype"] = torch.float32 if wide else self.dtype
        with torch.autocast(self.device.type, enabled=False):
            return linear_cross_entropy(
                head.input, head.weight, target, linear_bias=head.bias, weight=weight, **options
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return Tensor.__torch_function__(func, (), args, kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], DeferredLogits) and args[0]._state.real is None:
            wanted = torch.is_grad_enabled() or func is cross_entropy
            result = handler(func, *args, **kwargs) if wanted else NotImplemented
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.settle, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what calls past ``__torch_function__``: ``Function.apply``. Autograd, above this, has ``_Defer``."""
        args, kwargs = tree_map_only(DeferredLogits, lambda t: t.settle().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    """The linear layer as autograd sees it, with an output that has no memory."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, moved: bool
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.moved = moved
        shape = [*input.shape[:-1], weight.size(0)]
        strides = list(torch.empty(shape, device="meta").stride())
        for sizes in (shape, strides) if moved else ():
            sizes.insert(1, sizes.pop())
        return Tensor._make_wrapper_subclass(DeferredLogits, shape, strides=strides, dtype=dtype, device=input.device)

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        grad = (grad_logits.movedim(1, -1) if ctx.moved else grad_logits).to(input.dtype)
        flat, (needs_input, needs_weight, needs_bias, *_) = grad.flatten(0, -2), ctx.needs_input_grad
        return (
            grad @ weight if needs_input else None,
            flat.t() @ input.flatten(0, -2) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            None,
            None,
        )


def _deferred(head: HeadTensors, dtype: torch.dtype, moved: bool, origin: Any) -> DeferredLogits:
    logits: DeferredLogits = _Defer.apply(*head, dtype, moved)
    logits._state = _State(head, head.versions(), moved, origin)
    return logits


@contextlib.contextmanager
def _as_made(like: Tensor) -> Any:
    """The modes in which the head was called, whatever they are now; what is saved is no checkpoint's affair."""
    own = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(like.device.type, enabled=False), own:
        yield


# --- What keeps them deferred ---------------------------------------------------------------------------------------


def _reshape(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    shape = func(torch.empty(logits.shape, device="meta"), *args, **kwargs).shape
    state = logits._state
    if state.moved or len(shape) < 2 or shape[-1] != logits.size(-1):
        return NotImplemented
    input = state.head.input
    rows = input.reshape(*shape[:-1], input.size(-1))
    return logits._child(rows, logits.dtype, False, lambda real: func(real, *args, **kwargs))


def _view(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return NotImplemented
    return _reshape(func, logits, *args, **kwargs)


def _swap_dimensions(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    if logits._state.moved or logits.dim() != 3:
        return NotImplemented
    probe = torch.empty((2, 3, 4), device="meta")
    if func(probe, *args, **kwargs).shape != (2, 4, 3):
        return NotImplemented
    return logits._child(logits._state.head.input, logits.dtype, True, lambda real: func(real, *args, **kwargs))


def _contiguous(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs or logits._state.moved else logits


def _cast(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """To float32, which is what the loss is computed in anyway."""
    if kwargs or args not in ((), (torch.float32,)) or (not args and func is not Tensor.float):
        return NotImplemented
    if logits.dtype == torch.float32:
        return logits
    if logits.dtype not in _HALF:
        return NotImplemented
    state = logits._state
    return logits._child(state.head.input, torch.float32, state.moved, Tensor.float)


def _choose_rows(func: Any, logits: DeferredLogits, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if logits._state.moved or not _is_about_rows(items, logits.dim()):
        return NotImplemented
    input = logits._state.head.input[index]
    if input.dim() < 2:
        return NotImplemented
    return logits._child(input, logits.dtype, False, lambda real: real[index])


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


def _cross_entropy(
    func: Any,
    logits: DeferredLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    **options: Any,
) -> Any:
    more = {"size_average": size_average, "ignore_index": ignore_index, "reduce": reduce}
    return logits.cross_entropy(target, weight, **more, **options)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    cross_entropy: _cross_entropy,
    **dict.fromkeys((Tensor.view,), _view),
    **dict.fromkeys((Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _reshape),
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.permute, torch.permute), _swap_dimensions),
    **dict.fromkeys((Tensor.movedim, torch.movedim, Tensor.mT.__get__), _swap_dimensions),  # type: ignore[attr-defined]
    Tensor.contiguous: _contiguous,
    Tensor.float: _cast,
    Tensor.to: _cast,
    Tensor.__getitem__: _choose_rows,
}
_METADATA = frozenset(
    (
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.is_complex),
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "grad_fn")
        ),
    )
)

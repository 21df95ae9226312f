"""The logits of a linear head that are not computed until somebody needs them; their cross-entropy does not."""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from fused_ops.conversion.records import HeadRecord
from fused_ops.core.torch_private import refuse_data_pointer, tree_leaves, tree_map_only
from fused_ops.distributed.dtensor import any_dtensor, are_placements, placements_of_logits
from fused_ops.distributed.fsdp import is_pre_backward_hook

_CONVERT = "convert without loss, or fused_ops.revert the model"
_PAST_PYTHON = "code in C++ or a custom autograd.Function used them"


class HeadTensors(NamedTuple):
    """What the logits are made of, as the head saw it (under autocast, in its dtype)."""

    input: Tensor  # (..., in_features)
    weight: Tensor  # (classes, in_features)
    bias: Tensor | None = None  # (classes,)
    low_input: Tensor | None = None  # (..., rank): LoRA's, with low_weight added to the logits
    low_weight: Tensor | None = None  # (classes, rank)


class Carried(NamedTuple):
    """What has been asked of the linear layer's result z, for the loss to do.

    ``u = z * times / over``; then, if ``bounded``, ``cap * tanh(u)``; then, if ``sign`` is 1 or -1, that times the
    ``log_softmax``.
    """

    times: float = 1.0
    over: float = 1.0
    bounded: bool = False
    cap: float = 1.0
    sign: int = 0


AS_IT_IS = Carried()


class Needed(NamedTuple):
    """What a handler returns that needs the logits, instead of NotImplemented, where the reason is worth telling."""

    why: str


@dataclass(eq=False)
class State:
    """Of logits that are not there: how to compute them, and what a loss without them needs."""

    head: HeadTensors
    twin: Tensor  # on meta: the shape, the strides and the dtype of the logits
    compute: Callable[..., Tensor]  # of the settled parents and of ``own``
    own: tuple[Tensor, ...]  # differentiable tensors that compute takes besides its parents
    watched: tuple[tuple[Tensor, int], ...]  # the tensors that computing them reads, and their versions
    record: HeadRecord | None = None
    parents: tuple[State, ...] = ()
    carried: Carried = AS_IT_IS
    moved: bool = False  # the classes are dimension 1, not the last
    real: Tensor | None = None
    version: int = 0  # of real, when it was computed
    consumed: bool = False  # a loss has been computed from these, or from what was made of them, without them
    outputs: Any = None  # of the rows, for whoever asks for more than one of them
    hooks: list[Any] = field(default_factory=list)  # of FSDP, which want to know when the backward begins
    losses: list[weakref.ref[Tensor]] = field(default_factory=list)
    children: list[weakref.ref[State]] = field(default_factory=list)
    with_grad: bool = field(default_factory=torch.is_grad_enabled)

    def line(self) -> list[State]:
        """This and all that it was made of."""
        return list(dict.fromkeys((self, *(state for parent in self.parents for state in parent.line()))))

    def check(self) -> None:
        """Raises where the logits cannot be what they would have been."""
        for tensor, version in self.watched:
            if version_of(tensor) != version or _is_freed(tensor):
                raise RuntimeError(
                    "convert(loss=...) has put off computing these logits, and their head's weight or input was "
                    "changed in place or freed since (by optimizer.step(), say): use them before that, or "
                    f"{_CONVERT}"
                )

    def settle(self, reason: str) -> Tensor:
        """The logits as an ordinary tensor with its graph, computed, and the reason counted, at the first call."""
        if self.real is not None:
            return self.real
        self.check()
        parents = [parent.settle("") for parent in self.parents]
        if self.real is None:  # a parent settles its children
            with _as_made(self):
                self.real = self.compute(*parents, *self.own)
            self.version = version_of(self.real)
            for hook in self.hooks:
                self.real.register_hook(hook)
            for child in self.children:
                if (found := child()) is not None:
                    found.settle("")
        if reason and self.record is not None:
            self.record.computed[reason] += 1
        return self.real


class DeferredLogits(Tensor):
    """``linear(input, weight, bias)``: the shape and the dtype are known, the values are found when needed.

    ``F.cross_entropy`` of them, or of what the functions of ``deferred_ops`` make of them (other views of the rows, a
    choice of rows, float32, a scale, a soft cap, a bias, LoRA's low-rank term, ``log_softmax``), is
    ``fused_ops.linear_cross_entropy``. Everything else computes the logits, once, with their graph, and goes on with
    those: from then on this is an ordinary tensor in all but its type.
    """

    _state: State

    @classmethod
    def of(
        cls, head: HeadTensors, record: HeadRecord | None = None, also_watched: Sequence[Tensor] = ()
    ) -> DeferredLogits:
        """The logits of a head."""
        own = tuple(t for t in head if t is not None)
        shape = (*head.input.shape[:-1], head.weight.size(0))
        twin = torch.empty(shape, dtype=head.input.dtype, device="meta")
        watched = tuple((t, version_of(t)) for t in (*own, *also_watched))
        return cls.with_state(State(head, twin, F.linear, own, watched, record))

    @classmethod
    def with_state(cls, state: State) -> DeferredLogits:
        """As autograd and Python see it."""
        logits: DeferredLogits = _Defer.apply(state, *(t for one in state.line() for t in one.own))
        logits._state = state
        return logits

    def derive(self, compute: Callable[..., Tensor], twin: Tensor, **changes: Any) -> Tensor:
        """What ``compute`` makes of these, with another head or carried along.

        Args:
            compute: Of these logits, of those in ``others``, and of ``own``.
            twin: The result's shape, strides and dtype, on meta.
            **changes: Of ``head``, ``carried`` and ``moved``, those that are others than here; ``others``, further
                parents; ``own``, tensors that compute takes and may differentiate; ``reads``, that it reads.
        """
        mine = self._state
        reads, own = changes.pop("reads", ()), changes.pop("own", ())
        parents = (mine, *(other._state for other in changes.pop("others", ())))
        kept = {"head": mine.head, "carried": mine.carried, "moved": mine.moved, "record": mine.record, **changes}
        watched = (
            *(pair for parent in parents for pair in parent.watched),
            *((t, version_of(t)) for t in (*reads, *own)),
        )
        child = State(twin=twin, compute=compute, own=own, watched=watched, parents=parents, **kept)
        for parent in parents:
            parent.children.append(weakref.ref(child))
        return self.with_state(child)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and args[0]._state.real is None:
            return Tensor.__torch_function__(func, (), args, kwargs)
        result = _handled(func, args, kwargs)
        why = result.why if isinstance(result, Needed) else ""
        if not why and result is not NotImplemented:
            return result
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if func in _ASK_FOR_GRADIENTS:
            _refuse_if_too_late(func, name, args, kwargs)
        reason = why or f"{name.removesuffix('.__get__')} used them"
        args, kwargs = tree_map_only(DeferredLogits, lambda t: t._state.settle(reason), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what calls past ``__torch_function__``: ``Function.apply``. Autograd, above this, has ``_Defer``."""
        args, kwargs = tree_map_only(
            DeferredLogits, lambda t: t._state.settle(_PAST_PYTHON).detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


class SpreadLogits(DeferredLogits):
    """The same of DTensors, a head whose classes are divided over a mesh: it can be asked what a DTensor can.

    Once computed they are a DTensor, whose ``F.cross_entropy`` is PyTorch's: inside of ``loss_parallel()`` alone.
    """

    @property
    def device_mesh(self) -> Any:
        """Of the head."""
        weight: Any = self._state.head.weight
        return weight.device_mesh

    @property
    def placements(self) -> tuple[Any, ...]:
        """Where the logits are, or would be; log_softmax moves them as DTensor likes."""
        state = self._state
        if state.real is not None or state.carried.sign:
            return tuple(self._real("placements").placements)
        return placements_of_logits(state.head.weight, 1 if state.moved else state.twin.dim() - 1)

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **options: Any) -> Any:
        """These, where they would be there already; else the logits."""
        same_mesh = device_mesh is None or device_mesh == self.device_mesh
        if same_mesh and placements is not None and are_placements(placements, self.placements, self.dim()):
            return self
        return self._real("redistribute").redistribute(device_mesh, placements, **options)

    def to_local(self, **options: Any) -> Any:
        """The logits of this rank's classes."""
        return self._real("to_local").to_local(**options)

    def full_tensor(self, **options: Any) -> Any:
        """The logits of all classes."""
        return self._real("full_tensor").full_tensor(**options)

    def _real(self, name: str) -> Any:
        return self._state.settle(f"DTensor.{name} used them")


def _handled(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function can do without the logits; NotImplemented if it needs them."""
    deferred = [a for a in args[:2] if isinstance(a, DeferredLogits)]
    if not deferred or any(a._state.real is not None for a in deferred) or torch.is_inference_mode_enabled():
        return NotImplemented
    result = ALWAYS[func](func, *args, **kwargs) if func in ALWAYS else NotImplemented
    if result is NotImplemented and func in HANDLERS and torch.is_grad_enabled():
        result = HANDLERS[func](func, *args, **kwargs)
    return result


class _Defer(torch.autograd.Function):
    """The logits as autograd sees them: a function of the leaves, with an output that has no memory."""

    @staticmethod
    def forward(ctx: Any, state: State, *leaves: Tensor) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        twin, device = state.twin, state.head.input.device
        kind = SpreadLogits if any_dtensor(state.head.weight) else DeferredLogits
        logits = Tensor._make_wrapper_subclass(kind, twin.shape, strides=twin.stride(), dtype=twin.dtype, device=device)
        refuse_data_pointer(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor | None) -> Any:
        """Only what called past ``__torch_function__`` comes here; the settled logits have a graph of their own."""
        state, needs = ctx.state, ctx.needs_input_grad[1:]
        if grad_logits is None:
            return None, *(None for _ in needs)
        state.check()
        if state.real is not None and version_of(state.real) != state.version:
            raise RuntimeError(
                "a custom autograd.Function, or code in C++, was given logits that convert(loss=...) had put off "
                f"computing, and they were changed in place: give it a clone of them, or {_CONVERT}"
            )
        if not state.parents:
            return None, *_linear_grads(grad_logits, needs, *state.own)
        with _as_made(
            state
        ):  # of aliases: a gradient with respect to one is partial, also where they depend on another
            aliases = {one: tuple(t.view_as(t) for t in one.own) for one in state.line()}
            real = _computed(state, aliases)
        wanted = [a for a, need in zip((a for own in aliases.values() for a in own), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(real, wanted, grad_logits, create_graph=torch.is_grad_enabled()))
        return None, *(next(grads) if need else None for need in needs)


def _computed(state: State, aliases: dict[State, tuple[Tensor, ...]]) -> Tensor:
    """The logits once more, of other leaves."""
    return state.compute(*(_computed(parent, aliases) for parent in state.parents), *aliases[state])


def _linear_grads(
    grad: Tensor, needs: Sequence[bool], input: Tensor, weight: Tensor, *bias: Tensor
) -> list[Tensor | None]:
    """Of a linear layer alone."""
    flat = grad.flatten(0, -2)
    return [
        grad @ weight if needs[0] else None,
        flat.t() @ input.flatten(0, -2) if needs[1] else None,
        *(flat.sum(0) if needs[2] else None for _ in bias),
    ]


def version_of(tensor: Tensor) -> int:
    """Tells whether it has been written to."""
    return -1 if tensor.is_inference() else tensor._version


def _is_freed(tensor: Tensor) -> bool:
    """Whether its memory was given back, as sharding does with a weight."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    return tensor.numel() > 0 and tensor.device.type != "meta" and tensor.untyped_storage().nbytes() == 0


@contextlib.contextmanager
def _as_made(state: State) -> Any:
    """The modes in which the head was called, whatever they are now; what is saved is no checkpoint's affair."""
    device = state.head.input.device.type
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # torch.func allows no such hooks, and has none
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(state.with_grad))
        stack.enter_context(torch.autocast(device, enabled=False))
        yield


def consume(state: State, loss: Tensor) -> None:
    """Notes that a loss was computed without these logits; FSDP's hooks wait for its gradient instead of theirs."""
    if state.record is not None:
        state.record.fused += 1
    for one in state.line():
        one.consumed = True
        one.losses.append(weakref.ref(loss))
        for hook in one.hooks if loss.requires_grad else ():
            loss.register_hook(hook)


# --- Questions about gradients ---------------------------------------------------------------------------------------


_ASK_FOR_GRADIENTS = frozenset(
    (
        *(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook),
        *(torch.autograd.grad, torch.autograd.backward),
    )
)


def _refuse_if_too_late(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Of logits that a loss has done without, no gradient is ever computed."""
    asked = (args, kwargs)  # of grad and backward, what is differentiated may be such logits
    if func is torch.autograd.grad:
        asked = (args[1:2], {"inputs": kwargs.get("inputs")})
    elif func is torch.autograd.backward:
        asked = ((), {"inputs": kwargs.get("inputs")})
    for logits in tree_leaves(asked):
        if isinstance(logits, DeferredLogits) and logits._state.consumed:
            raise RuntimeError(
                f"{name}: the loss of these logits was computed without them (convert(loss=...)), so they get no "
                f"gradient: ask for it before the loss, or {_CONVERT}"
            )


def _register_hook(func: Any, logits: DeferredLogits, hook: Any) -> Any:
    """FSDP's hook on what a module returns wants to know when the backward begins: a loss can tell it as well."""
    if not is_pre_backward_hook(hook):
        return NotImplemented
    state = logits._state
    state.hooks.append(hook)
    for loss in state.losses:
        if (found := loss()) is not None and found.requires_grad:
            found.register_hook(hook)
    return torch.utils.hooks.RemovableHandle(OrderedDict())


def _grad_fn(func: Any, logits: DeferredLogits) -> Any:
    """None where no gradient will come: DDP then hands on the logits as they are."""
    return None if logits._state.consumed else NotImplemented


def _clone(func: Any, logits: DeferredLogits, **more: Any) -> Any:
    """DDP copies what a module returns, in a Function, for nothing but the loss that it returns as well."""
    state = logits._state
    if more or not state.consumed or torch.is_grad_enabled() or not _is_distributed():
        return NotImplemented
    return logits.derive(func, state.twin)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# What does without the logits; deferred_ops and deferred_losses add to it.
HANDLERS: dict[Any, Callable[..., Any]] = {Tensor.register_hook: _register_hook}
ALWAYS: dict[Any, Callable[..., Any]] = {Tensor.clone: _clone}  # with gradients off too
ALWAYS[Tensor.grad_fn.__get__] = _grad_fn  # type: ignore[union-attr]

_FLAGS = ("floating_point", "complex", "signed", "contiguous", "inference", "conj", "neg")
_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "retains_grad", "itemsize", "nbytes"),
    *(
        "is_cpu",
        "is_cuda",
        "is_meta",
        "is_mps",
        "is_xpu",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "_base",
    ),
)
METADATA = frozenset(
    (
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__, Tensor.stride),
        *(Tensor.element_size, Tensor.get_device),
        *(getattr(Tensor, f"is_{name}") for name in _FLAGS),
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
        *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
    )
)

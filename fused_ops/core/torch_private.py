"""Every private name of torch that this package uses, each with what does instead where a release does not have it.

What does instead is made of public names: slower, or careful where it cannot know, and never wrong. A name is looked up
once, when this module is imported, so that a call costs what torch's own costs.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, overrides
from torch.autograd import Function
from torch.autograd import forward_ad as _forward_ad
from torch.fx.node import map_aggregate

_F = TypeVar("_F", bound=Callable[..., Any])


def _found(place: str, instead: Any) -> Any:
    """Torch's name at "module:path", or what does instead."""
    try:
        return pkgutil.resolve_name(place)
    except (ImportError, AttributeError):
        return instead


# ---- which of PyTorch's systems are active


class _NoSetupContext(Function):
    """A Function that torch.func refuses: it has no ``setup_context``."""

    @staticmethod
    def forward(ctx: Any) -> Tensor:
        return torch.empty(0)


def _are_old_functions_refused() -> bool:
    try:
        _NoSetupContext.apply()
    except RuntimeError:
        return True
    return False


def _task_of_the_engine() -> int:
    """0 in a backward pass, -1 elsewhere: only a backward pass takes a callback for its end."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: None)
    except RuntimeError:
        return -1
    return 0


class _ForwardLevels:
    """What is asked of ``torch.autograd.forward_ad``: a dual tensor can be made where there is a level."""

    @property
    def _current_level(self) -> int:
        one = torch.ones(())
        try:
            _forward_ad.make_dual(one, one)
        except RuntimeError:
            return -1
        return 0


transforms_active: Callable[[], bool] = _found("torch:_C._are_functorch_transforms_active", _are_old_functions_refused)
is_tracing: Callable[[], bool] = _found("torch:_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
dispatch_modes: Callable[[], int] = _found("torch:_C._len_torch_dispatch_stack", lambda: 1)  # there may be one
forward_grad_enabled: Callable[[], bool] = _found("torch:_C._is_fwd_grad_enabled", lambda: False)
graph_task_id: Callable[[], int] = _found("torch:_C._current_graph_task_id", _task_of_the_engine)
forward_ad: Any = _ForwardLevels() if _found("torch.autograd.forward_ad:_current_level", None) is None else _forward_ad
any_global_hook: Callable[[], bool] = _found("torch.nn.modules.module:_has_any_global_hook", lambda: True)

_transform_types = _found("torch:_C._functorch.TransformType", None)
_interpreters = _found("torch:_C._functorch.get_interpreter_stack", None)


def levels(transform: str) -> int:
    """How many levels of a transform of torch.func are active, "Jvp" or "Functionalize"; 2 where it may be any."""
    if _transform_types is None or _interpreters is None:
        return 2 if transform == "Jvp" and transforms_active() else 0
    kind = getattr(_transform_types, transform)
    return sum(level.key() == kind for level in _interpreters() or ())


_function_mode = _found("torch.overrides:_get_current_function_mode", None)


def is_innermost(mode: overrides.TorchFunctionMode) -> bool:
    """Whether the mode is the one that ends first, as far as can be told."""
    return _function_mode is None or _function_mode() is mode


# ---- what a tensor is


def _has_no_memory(tensor: Any) -> bool:
    """Whether a tensor has no memory of its own, as fake ones and those of transforms have not, or may have none."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return True
    try:
        return bool(tensor.untyped_storage().device.type != tensor.device.type)
    except RuntimeError:
        return True


is_batched: Callable[[Tensor], bool] = _found("torch:_C._functorch.is_legacy_batchedtensor", _has_no_memory)
is_fake: Callable[[Any], bool] = _found("torch._subclasses.fake_tensor:is_fake", _has_no_memory)
has_torch_function: Callable[..., bool] = _found(
    "torch:_C._has_torch_function_variadic", lambda *values: overrides.has_torch_function(values)
)
# Makes whoever takes the address of a tensor without memory raise, C++ included; without it they get 0.
refuse_data_pointer: Callable[[Tensor], None] = _found("torch:_C._set_throw_on_mutable_data_ptr", lambda tensor: None)

# Raises on the device, where values are not to be waited for; without it nothing is checked there.
assert_async: Callable[[Tensor, str], None] = _found("torch:_assert_async", lambda ok, message: None)

# ---- who shards weights


def sharding_states() -> tuple[Any, ...] | None:
    """What fully_shard keeps of each module that it was given; None where there may be some that cannot be found.

    Not looked up when this module is imported: that would import fully_shard, which takes seconds.
    """
    if "torch.distributed.fsdp._fully_shard" not in sys.modules:
        return ()
    kind = getattr(sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state"), "FSDPState", None)
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    if kind is None or known is None:
        return None
    return tuple(state for state in (reference() for reference in list(known.values())) if isinstance(state, kind))


_PLACING = ("ColwiseParallel._prepare_input_fn", "ColwiseParallel._prepare_output_fn")


def is_colwise_hook(hook: Any) -> bool:
    """Whether it is one that ColwiseParallel gave a module, through distribute_module: it moves whole tensors alone."""
    if getattr(hook, "__module__", "") != "torch.distributed.tensor._api":
        return False
    held = [getattr(cell.cell_contents, "func", None) for cell in getattr(hook, "__closure__", None) or ()]
    return any(getattr(function, "__qualname__", "") in _PLACING for function in held)


def _unknown_group(name: str) -> Any:
    raise RuntimeError(f"fused_ops: no process group {name!r} was used in this process yet; expected one that was")


# The process group of a name, as graphs hold it.
resolve_group: Callable[[str], Any] = _found(
    "torch.distributed.distributed_c10d:_resolve_process_group", _unknown_group
)

# ---- ops and Functions

_dispatch_call_boxed = _found("torch:_C._dispatch_call_boxed", None)
# Where it cannot be told, "yes" keeps the way open from a kernel that does not serve a call to the reference.
has_kernel: Callable[[str, str], bool] = _found("torch:_C._dispatch_has_kernel_for_dispatch_key", lambda op, key: True)


# Whether the backward that is going on runs a node of its graph, which is none of a leaf; without it, it may.
runs_node: Callable[[Any], bool] = _found("torch:_C._will_engine_execute_node", lambda node: True)


def without_overrides(op: Any) -> Callable[..., Any]:
    """An op without what a call of it spends on ``__torch_function__``, for arguments that have none; or as it is."""
    handle = getattr(op, "_handle", None)
    return op if _dispatch_call_boxed is None or handle is None else partial(_dispatch_call_boxed, handle)


_set_strategy = _found("torch:_C._dynamo.eval_frame.set_code_exec_strategy", None)
_frame_strategy = _found("torch:_C._dynamo.eval_frame._FrameExecStrategy", None)
_frame_action = _found("torch:_C._dynamo.eval_frame._FrameAction", None)


def hide_from_dynamo(function: Any) -> None:
    """Dynamo leaves a function alone, and all that it calls, where it would compile it as a frame of its own.

    A backward that runs inside of a compiled function, after a graph break, is such a frame.
    """
    code = getattr(function, "__code__", None)
    if code is not None and None not in (_set_strategy, _frame_strategy, _frame_action):
        _set_strategy(code, _frame_strategy(_frame_action.SKIP, _frame_action.SKIP))


def call_backward_directly(function: type[Function]) -> None:
    """For plain eager mode: the engine calls what looks for ``backward`` and calls that, for half a microsecond."""
    hide_from_dynamo(function.backward)
    backward_class = getattr(function, "_backward_cls", None)
    if backward_class is not None:
        backward_class.apply = function.backward


def functionalize_rules() -> tuple[dict[Any, Any], Any, Any, Any] | None:
    """(rules of the op that Functions are for torch.func, the key of functionalize's, its API, that op), or None."""
    call = _found("torch._functorch.autograd_function:custom_function_call", None)
    api = _found("torch._subclasses.functional_tensor:FunctorchFunctionalizeAPI", None)
    key = getattr(_transform_types, "Functionalize", None)
    rules = getattr(call, "functorch_table", {})
    return None if api is None or key not in rules else (rules, key, api, call)


# The base class of PyTorch's losses with a weight for each class.
WeightedLoss: Any = _found("torch.nn.modules.loss:_WeightedLoss", torch.nn.NLLLoss)

# ---- nested values, and words


def _map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    return map_aggregate(tree, lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves: list[Any] = []
    map_aggregate(tree, leaves.append)
    return leaves, tree


def _unflatten(leaves: Any, tree: Any) -> Any:
    rest = iter(leaves)
    return map_aggregate(tree, lambda _: next(rest))


def _reduction_of(size_average: bool | None, reduce: bool | None) -> str:
    name = "none" if reduce is False else "sum" if size_average is False else "mean"
    said = f"size_average and reduce args will be deprecated, please use reduction='{name}' instead."
    warnings.warn(said, stacklevel=3)
    return name


tree_map: Callable[..., Any] = _found("torch.utils._pytree:tree_map", lambda f, tree: map_aggregate(tree, f))
tree_map_only: Callable[..., Any] = _found("torch.utils._pytree:tree_map_only", _map_only)
tree_leaves: Callable[..., list[Any]] = _found("torch.utils._pytree:tree_leaves", lambda tree: _flatten(tree)[0])
tree_flatten: Callable[..., tuple[list[Any], Any]] = _found("torch.utils._pytree:tree_flatten", _flatten)
tree_unflatten: Callable[..., Any] = _found("torch.utils._pytree:tree_unflatten", _unflatten)
legacy_reduction: Callable[..., str] = _found("torch.nn._reduction:legacy_get_string", _reduction_of)

# ---- the graphs of Dynamo: only the backend asks, when Dynamo is there; looking some of them up would import it

BACKEND_REGISTRY = "torch._dynamo.backends.registry"  # the module that knows torch.compile's backends
HigherOrder: Any = _found("torch._ops:HigherOrderOperator", ())
_FakeTensor = _found("torch._subclasses.fake_tensor:FakeTensor", None)
_CHECKPOINT = "torch._higher_order_ops.wrap:tag_activation_checkpoint"
_MODE_OPTIONS = "torch._inductor:list_mode_options"


def assume_constant_result(function: _F) -> _F:
    """As ``torch.compiler.assume_constant_result``, which imports Dynamo for this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def lookup_backend(backend: Any) -> Any:
    """The backend of torch.compile of that name; a callable as it is."""
    return backend if callable(backend) else _found(f"{BACKEND_REGISTRY}:lookup_backend", None)(backend)


def inductor_options(mode: str) -> dict[str, Any]:
    """The options of Inductor that a mode of torch.compile stands for."""
    return dict(_found(_MODE_OPTIONS, lambda mode: {})(mode))


def checkpoint_operator() -> Any:
    """What activation checkpointing is in a graph; None: it stays as it is."""
    return _found(_CHECKPOINT, None)


def is_plain_fake(value: Any) -> bool:
    """Whether it is a fake strided tensor that stands for one without a class of its own."""
    return type(value) is _FakeTensor and value.layout is torch.strided


def storage_id(tensor: Tensor) -> int:
    """What tensors that share memory have in common, fake ones too; without this name all of them may."""
    return getattr(tensor.untyped_storage(), "_cdata", 0)

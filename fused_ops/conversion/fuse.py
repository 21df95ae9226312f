"""Batch norm with the addition and the activation that follow it: found in a module's forward, done in one op."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import random
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_ops.conversion.hooks import hooked
from fused_ops.ops.batch_norm.modules import _FusedBatchNorm

Activation = tuple[str, float]  # its name and its slope or alpha

_PLAIN: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), "relu"),
    F.silu: "silu",
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
}
_OTHERS = frozenset({"relu6", "hardtanh", "mish", "softplus", "gelu", "celu", "selu", "hardsigmoid", "prelu"})
_SLOPES = {"leaky_relu": ("negative_slope", 0.01), "elu": ("alpha", 1.0)}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = frozenset(getattr(operator, f"i{name}") for name in dir(operator) if hasattr(operator, f"i{name}"))
# What forward may ask that has another answer while it is traced, or that tracing would lose.
_UNTRACEABLE = frozenset({"isinstance", "type", "checkpoint", "is_compiling", "is_fx_tracing", "is_tracing"})
_OF_MODULES = frozenset(nn.Module().__dict__)


class NotTraceable(Exception):
    """Why a forward cannot be rewritten."""


def activation_of(module: nn.Module) -> Activation | None:
    """The fused form of an activation module; None if there is none."""
    kind = type(module)
    if kind in _PLAIN:
        return _PLAIN[kind], 0.0
    if kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)  # type: ignore[arg-type]
    if kind is nn.ELU:
        return "elu", float(module.alpha)  # type: ignore[arg-type]
    if kind is nn.GELU and module.approximate == "none":
        return "gelu", 0.0
    return None


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # past any __setattr__ that the classes have


def _joins(bn: Any) -> bool:
    return isinstance(bn, _FusedBatchNorm) and bn.activation is None and not hooked(bn)


def norm_then(
    bn: Any, input: Tensor, residual: Any, in_place: bool, activation: Activation | None, after: nn.Module | None
) -> Tensor:
    """``activation(bn(input) + residual)`` in one op where that is the same, step by step where it is not.

    Args:
        bn: A module, as it is now: hooked or replaced, it is called alone.
        input: Of ``bn``.
        residual: Added, or None.
        in_place: Whether it is added with ``+=``, which keeps the dtype and the shape.
        activation: Where it is a function.
        after: The activation where it is a module, as it is now.
    """
    fused = activation
    if after is not None and not hooked(after):
        fused = activation_of(after)
    same = residual is None or (isinstance(residual, Tensor) and _alike(residual, input))
    if same and _joins(bn) and (after is None or fused is not None):
        result: Tensor = bn(input, residual, activation=fused)
        return result
    output: Tensor = bn(input)
    if residual is not None:
        output = output.add_(residual) if in_place else output + residual
    if activation is not None:
        name, slope = activation
        function = getattr(torch if name in ("tanh", "sigmoid") else F, name)
        output = function(output, slope) if name in _SLOPES else function(output)
    return output if after is None else after(output)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


# --- The forwards that are rewritten --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fusion:
    """One batch norm and what is done in its op, by the names that the module has for them."""

    bn: str
    then: str  # e.g. "add, ReLU"
    activation: bool
    residual: bool


class Rewritten:
    """What marks the class of a module whose forward is rewritten; made for it, a subclass of its own class."""

    _fused_ops_original: type[nn.Module]
    _fused_ops_fusions: tuple[Fusion, ...]


def _sequential_forward(self: nn.Module, input: Any) -> Any:
    """nn.Sequential's, with each batch norm and the activation after it in one call."""
    modules = list(self._modules.values())
    i = 0
    while i < len(modules):
        module, following = modules[i], modules[i + 1] if i + 1 < len(modules) else None
        if _joins(module) and following is not None and activation_of(following) is not None:
            input = norm_then(module, input, None, False, None, following)
            i += 2
        else:
            input = module(input)  # type: ignore[misc]
            i += 1
    return input


def _restore(original: type[nn.Module]) -> nn.Module:
    """An empty module that rewrites its forward when its state arrives (pickle, deepcopy)."""
    module: nn.Module = original.__new__(original)
    _become(module, _arriving(original))
    return module


def _arriving(original: type[nn.Module]) -> type[nn.Module]:
    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        _become(self, original)
        original.__setstate__(self, state)
        with contextlib.suppress(NotTraceable):  # its own forward gives the same, in more steps
            rewrite(self)

    return type(original.__name__, (original,), {"__setstate__": __setstate__})


def _reduce(self: nn.Module, protocol: Any) -> Any:
    original = self._fused_ops_original
    state = self.__getstate__() if hasattr(original, "__getstate__") else self.__dict__.copy()  # Python 3.10 has none
    return _restore, (original,), state


_classes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()


def _make_class(
    original: type[nn.Module], key: Any, forward: Callable[..., Any], fusions: tuple[Fusion, ...], reads: frozenset[str]
) -> type[nn.Module]:
    """The class, one for all modules that come out alike."""
    found = _classes.get((original, key, fusions, reads))
    if found is not None:
        return found

    def stale(self: nn.Module, name: str, value: Any = None) -> bool:
        return name in reads or name in self.__dict__.get("_modules", ()) or isinstance(value, nn.Module)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if stale(self, name, value):
            _become(self, original)  # the forward was traced with what was there
        original.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        if stale(self, name):
            _become(self, original)
        original.__delattr__(self, name)

    def add_module(self: nn.Module, name: str, module: nn.Module | None) -> None:
        _become(self, original)
        original.add_module(self, name, module)

    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "forward": functools.wraps(original.forward)(forward),
        "_fused_ops_original": original,
        "_fused_ops_fusions": fusions,
    }
    if forward is not _sequential_forward:
        namespace |= {"__setattr__": __setattr__, "__delattr__": __delattr__, "add_module": add_module}
    made: type[nn.Module] = type(original.__name__, (Rewritten, original), namespace)
    _classes[(original, key, fusions, reads)] = made
    return made


def rewrite(module: nn.Module, apart: dict[str, str] | None = None) -> tuple[Fusion, ...]:
    """Gives the module, in place, a forward in which its batch norms take in what follows them.

    Args:
        module: Any.
        apart: Filled with the batch norms that have an activation behind them without a fused form, and its name.

    Returns:
        What was fused; nothing was changed where that is empty.

    Raises:
        NotTraceable: torch.fx cannot follow the module's own forward.
    """
    original = type(module)
    if "forward" in module.__dict__:
        raise NotTraceable("forward is set on the instance")
    if original.forward is nn.Sequential.forward:
        return _rewrite_sequential(module, apart)
    arity = _arity(original.forward)
    programs, reads, found = [], set(), []
    for training in (True, False):
        graph, names = _trace(module, arity, training)
        found.append(_fuse(graph, module, apart))
        programs.append(graph.python_code("self"))
        reads |= names
    if not any(found):
        return ()
    fusions = found[0] or found[1]
    key = tuple((p.src, tuple(sorted((k, id(v)) for k, v in p.globals.items()))) for p in programs)
    forward = _dispatch(original, [_compiled(original, p) for p in programs], arity)
    _become(module, _make_class(original, key, forward, fusions, frozenset(reads)))
    return fusions


def _rewrite_sequential(module: nn.Module, apart: dict[str, str] | None) -> tuple[Fusion, ...]:
    children = list(module._modules.items())
    fusions = []
    for (name, bn), (_, after) in itertools.pairwise(children):
        activation = None if after is None else activation_of(after)
        if _joins(bn) and activation is not None:
            fusions.append(Fusion(name, type(after).__name__, True, False))
        elif apart is not None and _joins(bn) and _is_activation(after):
            apart[name] = type(after).__name__
    if fusions:
        _become(module, _make_class(type(module), "sequential", _sequential_forward, tuple(fusions), frozenset()))
    return tuple(fusions)


def _is_activation(after: object) -> bool:
    return type(after).__module__ == nn.modules.activation.__name__ and not isinstance(after, nn.MultiheadAttention)


def _compiled(original: type, program: Any) -> Callable[..., Any]:
    scope = dict(program.globals)
    fx.graph_module._exec_with_source(program.src, scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _dispatch(original: type[nn.Module], programs: list[Callable[..., Any]], arity: int) -> Callable[..., Any]:
    """The rewritten forward for the call that was traced, the module's own for any other."""
    own, (in_training, in_evaluation) = original.forward, programs

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != arity or not all(isinstance(a, Tensor) for a in args):
            return own(self, *args, **kwargs)
        return in_training(self, *args) if self.training else in_evaluation(self, *args)

    return forward


# --- Tracing --------------------------------------------------------------------------------------------------------


def _arity(forward: Any) -> int:
    """How many arguments a call must give; those that have a default keep it in what is traced."""
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise NotTraceable("forward is decorated or not a plain function")
    _check_code(forward.__code__)
    count = 0
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise NotTraceable(f"forward wants the keyword {parameter.name}")
            count += 1
    return count


def _check_code(code: types.CodeType) -> None:
    found = sorted(_UNTRACEABLE & set(code.co_names))
    if found:
        raise NotTraceable(f"forward uses {found[0]}")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _check_code(constant)


class _Proxy(fx.Proxy):
    """With the in-place operators, which torch.fx would take for the others."""


def _in_place(operation: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _operation in _IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class _Tracer(fx.Tracer):
    """Follows one forward and goes into no module that it calls."""

    def __init__(self, forward: types.FunctionType) -> None:
        own = {
            n: f for n in forward.__code__.co_names if isinstance(f := forward.__globals__.get(n), types.FunctionType)
        }
        super().__init__(autowrap_functions=tuple(own.values()))
        file = sys.modules.get(forward.__module__)
        if file is not None and file.__dict__ is forward.__globals__:
            self._autowrap_search.append(file)  # the functions beside the class are called, not followed
        self._mode = self._modes()

    @staticmethod
    def _modes() -> tuple[bool, ...]:
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        autocast = (torch.is_autocast_enabled(kind) for kind in kinds)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._modes() != self._mode:
            raise NotTraceable("forward switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise NotTraceable("forward makes a tensor of its own or uses one that is neither parameter nor buffer")
        return super().create_arg(a)


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def _trace(module: nn.Module, arity: int, training: bool) -> tuple[fx.Graph, set[str]]:
    """The graph of the module's forward called with ``arity`` tensors, and the attributes that it read."""
    original, reads, scope = type(module), set[str](), dict[str, Any]()
    names = [f"input_{i}" for i in range(arity)]
    exec(f"def forward({', '.join(['self', *names])}): return own({', '.join(['self', *names])})", scope)
    scope["own"] = original.forward

    def __getattribute__(self: nn.Module, name: str) -> Any:
        value = original.__getattribute__(self, name)
        if isinstance(value, types.MethodType) and not name.startswith("__"):
            function = value.__func__
            if isinstance(function, types.FunctionType) and function.__module__ != nn.Module.__module__:
                _check_code(function.__code__)
        elif name not in _OF_MODULES and not name.startswith("__"):
            reads.add(name)
        return value

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        raise NotTraceable(f"forward sets self.{name}")

    namespace = {"forward": scope["forward"], "__getattribute__": __getattribute__, "__setattr__": __setattr__}
    was, before = module.training, _random_state()
    module.training = training
    _become(module, type(original.__name__, (original,), namespace))
    try:
        graph = _Tracer(original.forward).trace(module)  # type: ignore[arg-type]
    except NotTraceable:
        raise
    except Exception as error:  # whatever the user's code does with a proxy
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotTraceable(f"torch.fx cannot trace forward: {line}") from error
    finally:
        _become(module, original)
        module.training = was
    if _random_state() != before:
        raise NotTraceable("forward draws random numbers")
    return graph, reads


# --- Matching -------------------------------------------------------------------------------------------------------


def _fuse(graph: fx.Graph, module: nn.Module, apart: dict[str, str] | None) -> tuple[Fusion, ...]:
    """Rewrites the graph in place."""
    fusions = []
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        if not _joins(module.get_submodule(str(node.target))):
            continue
        addition, residual = _addition(node)
        last = node if addition is None else addition
        after, activation, name = _activation(last, module)
        if after is None and apart is not None and (other := _other_activation(last, module)):
            apart[str(node.target)] = other
        end = after or last
        if end is node or not _may_move(graph, node, addition, end, module):
            continue
        with graph.inserting_before(end):
            bn = graph.create_node("get_attr", str(node.target))
            then = graph.create_node("get_attr", str(end.target)) if end.op == "call_module" else None
            in_place = addition is not None and addition.target in (operator.iadd, "add_")
            fused = graph.call_function(norm_then, (bn, node.args[0], residual, in_place, activation, then))
        end.replace_all_uses_with(fused)
        for old in (after, addition, node):
            if old is not None:
                graph.erase_node(old)
        words = [word for word in ("add" if residual is not None else "", name) if word]
        fusions.append(Fusion(str(node.target), ", ".join(words), bool(name), residual is not None))
    return tuple(fusions)


def _sole_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _addition(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition that alone uses the batch norm's result, and what it adds."""
    user = _sole_user(node)
    if user is None or user.target not in _ADDITIONS or len(user.args) != 2 or user.kwargs:
        return None, None
    left, right = user.args
    if left is right or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None, None
    if left is node:
        return user, right
    in_place = user.target in (operator.iadd, "add_")  # it writes to what it adds to
    return (None, None) if in_place else (user, left)


def _activation(of: fx.Node, module: nn.Module) -> tuple[fx.Node | None, Activation | None, str]:
    """The activation that alone uses a result, its fused form where it is a function, and its name."""
    node = _sole_user(of)
    if node is None or not node.args or node.args[0] is not of:
        return None, None, ""
    if node.op == "call_module":
        after = module.get_submodule(str(node.target))
        joins = len(node.args) == 1 and not node.kwargs and activation_of(after) is not None
        return (node, None, type(after).__name__) if joins else (None, None, "")
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return None, None, ""
    name = _FUNCTIONS[node.target]
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    given, slope = list(node.args[1:]), 0.0
    if name in _SLOPES:
        option, default = _SLOPES[name]
        slope = given.pop(0) if given else options.pop(option, default)  # type: ignore[assignment]
    if name == "gelu" and options.get("approximate", "none") == "none":
        options.pop("approximate", None)
    if given or options or not isinstance(slope, (int, float)):
        return None, None, ""
    return node, (name, float(slope)), name


def _other_activation(of: fx.Node, module: nn.Module) -> str:
    """The name of an activation that alone uses a result and has no fused form; empty if there is none."""
    node = _sole_user(of)
    if node is None or node.op == "output":
        return ""
    if node.op == "call_module":
        after = module.get_submodule(str(node.target))
        return type(after).__name__ if _is_activation(after) else ""
    name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
    return name if node.op == "call_function" and name in _OTHERS else ""


def _may_move(graph: fx.Graph, bn: fx.Node, addition: fx.Node | None, end: fx.Node, module: nn.Module) -> bool:
    """Whether nothing between the batch norm and the end of what is fused may write to what they read."""
    nodes = list(graph.nodes)
    read = {bn.args[0], *(addition.args if addition is not None else ())}
    for node in nodes[nodes.index(bn) + 1 : nodes.index(end)]:
        if node is addition:
            continue
        if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
            return False
        if node.op == "call_function" and (_writes(node) or (_foreign(node) and read & set(node.all_input_nodes))):
            return False
        if node.op == "call_module" and read & set(node.all_input_nodes):
            called = module.get_submodule(str(node.target))
            if any(getattr(m, "inplace", False) for m in called.modules()):
                return False
    return True


def _foreign(node: fx.Node) -> bool:
    """Whether it is a function of the user's, of which nobody knows what it writes to."""
    return not (getattr(node.target, "__module__", None) or "torch").startswith(
        ("torch", "_operator", "math", "builtins")
    )


def _writes(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    in_place = node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs or node.target is operator.setitem

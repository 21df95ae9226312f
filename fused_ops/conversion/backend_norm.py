"""The batch norms of a captured graph become ours, with the addition and the activation behind them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_ops.conversion import backend_run
from fused_ops.conversion.backend_effects import (
    ADD,
    Effects,
    between,
    is_plain,
    name_of,
    numel,
    only_user,
    storages,
    value,
)
from fused_ops.conversion.records import GraphRecord
from fused_ops.core.library import DTYPES

# Where a call of Python costs more than the kernels save, forward and backward on one thread (AVX-512): PyTorch's own
# batch norm (and activation) is as fast at 20,000 to 50,000 values, its addition and activation at about 200,000.
SMALL_VALUES = 1 << 15
SMALL_RESIDUAL_VALUES = 1 << 18

_signature = inspect.signature(F.batch_norm)


class _Activation(NamedTuple):
    """An activation as batch_norm has it, and the names and defaults of its further arguments."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()


_INPLACE = (("inplace", False),)
_LEAKY = _Activation("leaky_relu", (("negative_slope", 0.01), *_INPLACE))
_ELU = _Activation("elu", (("alpha", 1.0), *_INPLACE))
_GELU = _Activation("gelu", (("approximate", "none"),))
_ACTIVATIONS: dict[Any, _Activation] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _Activation("relu", _INPLACE)),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _LEAKY),
    **dict.fromkeys((F.elu, F.elu_), _ELU),
    F.silu: _Activation("silu", _INPLACE),
    F.gelu: _GELU,
    **dict.fromkeys((F.tanh, torch.tanh, "tanh", "tanh_"), _Activation("tanh")),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), _Activation("sigmoid")),
    F.hardswish: _Activation("hardswish", _INPLACE),
}


_OTHER_ACTIVATIONS = frozenset(
    ("celu", "gelu", "hardsigmoid", "hardtanh", "mish", "prelu", "relu6", "rrelu", "selu", "softplus", "softsign")
)


class _Behind(NamedTuple):
    """What follows a batch norm: the nodes that its op takes over, and what they are."""

    nodes: tuple[fx.Node, ...] = ()
    residual: fx.Node | None = None
    activation: str | None = None
    slope: Any = 0.0

    @property
    def label(self) -> str:
        return " + ".join(["batch_norm", *(["add"] if self.residual else []), *filter(None, [self.activation])])


# These save for their backward what PyTorch's do not: the residual and the bias.
_SAVES_ALL = ("elu", "silu", "gelu", "tanh", "sigmoid", "hardswish")


def fuse_batch_norms(
    graph: fx.Graph, effects: Effects, record: GraphRecord, why_not_ours: Callable[[Tensor], str]
) -> None:
    """Rewrites the graph; of two batch norms that are added, the later one takes the sum.

    Args:
        graph: What Dynamo captured.
        effects: What its nodes read and write.
        record: Where what is done is noted.
        why_not_ours: Why a batch norm of this input is not to be ours; empty where it is.
    """
    for node in reversed(graph.find_nodes(op="call_function", target=F.batch_norm)):
        reason = _rewrite(graph, effects, node, record, why_not_ours)
        if reason:
            record.left[f"batch_norm: {reason}"] += 1


def _rewrite(
    graph: fx.Graph, effects: Effects, node: fx.Node, record: GraphRecord, why_not_ours: Callable[[Tensor], str]
) -> str:
    """Replaces one batch norm; returns what was not done, and why."""
    given = _signature.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    call = given.arguments
    tensors = [call[name] for name in ("input", "running_mean", "running_var", "weight", "bias")]
    if not is_plain(*tensors) or value(call["input"]).dtype not in DTYPES or value(call["input"]).dim() < 2:
        return "its arguments are not plain tensors"
    if reason := why_not_ours(value(call["input"])):
        return reason
    if value(node).device.type == "cpu" and numel(node) < SMALL_VALUES:
        return f"of less than {SMALL_VALUES:,} values, at which PyTorch's is as fast"
    if not call["training"] and effects.why_not_saved(node, storages(*map(value, tensors[1:3]))):
        return "its running statistics are written later"  # PyTorch's has its gradient of what they are then
    behind, reason = _what_follows(effects, node, tensors, bool(call["training"]))
    record.fused[behind.label] += 1
    last = behind.nodes[-1] if behind.nodes else node
    own: dict[str, Any] = {"activation": behind.activation, "slope": behind.slope, "residual": behind.residual}
    with graph.inserting_before(last):
        args = (*tensors, *(call[name] for name in ("training", "momentum", "eps")))
        options = {name: own[name] for name in own if behind.nodes and own[name] is not None}
        new = graph.call_function(backend_run.batch_norm, args, options)
    new.meta = dict(last.meta)
    effects.stands_for(new, (node, *behind.nodes))
    last.replace_all_uses_with(new)
    for old in (*reversed(behind.nodes), node):
        graph.erase_node(old)
    return reason


def _what_follows(effects: Effects, node: fx.Node, tensors: list[Any], training: bool) -> tuple[_Behind, str]:
    """The most that can be done in the same op; and why what comes next is not, if it is something to fuse."""
    found, reason = _candidates(node)
    reads = storages(*(value(t) for t in tensors))
    writes = storages(*(value(t) for t in tensors[1:3])) if training else frozenset()
    for behind in found:
        if behind.residual and value(node).device.type == "cpu" and numel(node) < SMALL_RESIDUAL_VALUES:
            reason = f"of less than {SMALL_RESIDUAL_VALUES:,} values, at which an addition costs nothing"
            continue
        blocked = _why_not(effects, node, behind, reads, writes)
        if not blocked and behind.activation is not None:
            saved = [tensors[4], *([behind.residual] if behind.activation in _SAVES_ALL else [])]
            blocked = effects.why_not_saved(behind.nodes[-1], storages(*map(value, saved)))
        if not blocked:
            return behind, reason
        reason = reason or blocked
    return _Behind(), reason


def _why_not(effects: Effects, node: fx.Node, behind: _Behind, reads: frozenset[int], writes: frozenset[int]) -> str:
    if not behind.nodes:
        return ""
    if behind.residual is None:
        return effects.why_not_over(between(node, behind.nodes[-1], behind.nodes), reads, writes)
    add, residual = behind.nodes[0], storages(value(behind.residual))
    if residual & writes:
        return "its residual is one of its running statistics"
    before = effects.why_not_over(between(node, add), reads, writes)
    if before or len(behind.nodes) == 1:
        return before
    return effects.why_not_over(between(add, behind.nodes[-1]), reads | residual, writes)


def _candidates(node: fx.Node) -> tuple[list[_Behind], str]:
    """What may be fused, the most of it first."""
    user = only_user(node)
    if user is None:
        several = "its result is used more than once" if len(node.users) > 1 else ""
        return [_Behind()], several
    if not _keeps_shape(node, user):
        return [_Behind()], ""
    activation = _activation(user)
    if activation is not None:
        return [_Behind((user,), None, *activation), _Behind()], ""
    if name_of(user).rstrip("_") in _OTHER_ACTIVATIONS:
        return [_Behind()], f"not with {name_of(user)}, which it does not have"
    residual, reason = _residual(node, user)
    if residual is None:
        return [_Behind()], reason
    found = [_Behind((user,), residual), _Behind()]
    last = only_user(user)
    if last is not None and _keeps_shape(user, last):
        activation = _activation(last)
        if activation is not None:
            found.insert(0, _Behind((user, last), residual, *activation))
    return found, ""


def _activation(node: fx.Node) -> tuple[str, Any] | None:
    """Its name and its one number, where batch_norm has it."""
    known = _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if known is None or len(node.args) > 1 + len(known.arguments):
        return None
    names = [name for name, _ in known.arguments]
    options = dict(known.arguments) | dict(zip(names, node.args[1:], strict=False))
    options |= {name: v for name, v in node.kwargs.items() if name != "input"}
    if options.keys() - set(names) or options.get("approximate", "none") != "none":
        return None
    return known.name, options.get("negative_slope", options.get("alpha", 0.0))


def _residual(node: fx.Node, add: fx.Node) -> tuple[fx.Node | None, str]:
    """What is added to the result of ``node``; None, and perhaps why, where it is no residual."""
    is_method = add.op == "call_method" and add.target in ("add", "add_")
    if not (is_method or (add.op == "call_function" and add.target in ADD)) or len(add.args) != 2:
        return None, ""
    in_place = add.target in (operator.iadd, "add_")
    left, right = add.args
    other = right if left is node else left
    if add.kwargs or not isinstance(other, fx.Node) or not isinstance(value(other), Tensor):
        return None, ""
    if in_place and left is not node:
        return None, "it is added to a tensor in place"
    x, y = value(node), value(other)
    if not is_plain(other) or x.dtype != y.dtype or x.device != y.device or not _same(x.shape, y.shape):
        return None, "the tensor that is added has another shape or dtype"
    if not _same(x.stride(), y.stride()):
        return None, "the tensor that is added has another memory format"
    return other, ""


def _keeps_shape(before: fx.Node, after: fx.Node) -> bool:
    x, y = value(before), value(after)
    return is_plain(before) and is_plain(after) and x.dtype == y.dtype and _same(x.shape, y.shape)


def _same(sizes: Any, others: Any) -> bool:
    """Whether they are equal for sure; sizes may be symbols."""
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))

"""The cross-entropies of a captured graph become ours, without logits where a linear layer computes them."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_ops.conversion.backend_effects import (
    ADD,
    DIVIDE,
    MULTIPLY,
    Effects,
    between,
    is_plain,
    name_of,
    numel,
    storages,
    uses,
    value,
)
from fused_ops.conversion.records import GraphRecord
from fused_ops.core.library import DTYPES
from fused_ops.ops.cross_entropy.api import cross_entropy
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy
from fused_ops.ops.linear_cross_entropy.plan import SMALL_BYTES as SMALL_LOGITS_BYTES

# On the CPU; below, PyTorch's own is as fast (forward and backward, one thread, AVX-512), and smaller logits are no
# burden.
SMALL_VALUES = 1 << 15

_signature = inspect.signature(F.cross_entropy)
_RESHAPES = frozenset(("view", "reshape", "flatten", torch.reshape, torch.flatten))
_CASTS = frozenset(("float", "to", "contiguous", "type"))
_SWAPS = frozenset(
    ("transpose", "permute", "movedim", "swapaxes", torch.transpose, torch.permute, torch.movedim, torch.swapaxes)
)
_HALF = (torch.bfloat16, torch.float16)


@dataclass
class _Logits:
    """How a loss's logits come from a linear layer, found from the loss backwards."""

    chain: list[fx.Node] = field(default_factory=list)  # from the loss to the linear layer
    rows: list[fx.Node] = field(default_factory=list)  # of them, what chooses or reshapes rows; the last one first
    scale: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))  # factors and divisors
    cap: tuple[list[Any], list[Any]] | None = None  # those behind the tanh
    bias: fx.Node | None = None

    @property
    def linear(self) -> fx.Node:
        return self.chain[-1]


class _NotFused(Exception):
    """Why logits are computed."""


def fuse_cross_entropies(
    graph: fx.Graph, effects: Effects, record: GraphRecord, why_not_ours: Callable[[Tensor], str]
) -> None:
    """Rewrites every call of ``torch.nn.functional.cross_entropy``, and notes what was done.

    Args:
        graph: What Dynamo captured.
        effects: What its nodes read and write.
        record: Where what is done is noted.
        why_not_ours: Why a loss of these logits is not to be ours; empty where it is.
    """
    for node in graph.find_nodes(op="call_function", target=F.cross_entropy):
        given = _signature.bind(*node.args, **node.kwargs)
        given.apply_defaults()
        call = given.arguments
        tensors = [call[name] for name in ("input", "target", "weight")]
        if not is_plain(*tensors) or value(call["input"]).dtype not in DTYPES:
            record.left["cross_entropy: its arguments are not plain tensors"] += 1
            continue
        if reason := why_not_ours(value(call["input"])):
            record.left[f"cross_entropy: {reason}"] += 1
            continue
        if value(node).device.type == "cpu" and numel(call["input"]) < SMALL_VALUES:
            record.left[f"cross_entropy: of less than {SMALL_VALUES:,} values, at which PyTorch's is as fast"] += 1
            continue
        try:
            found = _logits_of(effects, node, call)
        except _NotFused as error:
            if str(error):
                record.left[f"linear + cross_entropy: {error}"] += 1
            node.target = cross_entropy
            record.fused["cross_entropy"] += 1
            continue
        names = _replace(graph, node, call, found)
        record.fused[" + ".join(["linear", *names, "cross_entropy"])] += 1


# --- Which logits -----------------------------------------------------------------------------------------------------


def _logits_of(effects: Effects, loss: fx.Node, call: dict[str, Any]) -> _Logits:
    """The way from the loss back to the linear layer."""
    found = _Logits()
    here = call["input"]
    while True:
        if not isinstance(here, fx.Node) or here.op not in ("call_function", "call_method") or not is_plain(here):
            raise _NotFused
        found.chain.append(here)
        if here.target is F.linear:
            break
        _step(found, here)
        here = here.args[0] if not _is_second(here) else here.args[1]
    for before, after in zip(found.chain, [loss, *found.chain], strict=False):
        others = [n for n in before.users if n is not after]
        if others:
            output = others[-1].op == "output"
            raise _NotFused(
                "its logits are a result of the graph" if output else f"{name_of(others[0])} uses its logits as well"
            )
        if uses(before, after) != 1:
            raise _NotFused("its logits are used more than once")
    _check(effects, found, loss, call)
    return found


def _is_second(node: fx.Node) -> bool:
    """Whether the logits are the second factor or summand."""
    return node.target in MULTIPLY | ADD and not isinstance(value(node.args[0]), Tensor)


def _step(found: _Logits, node: fx.Node) -> None:
    """Takes note of one node of the chain; raises where linear_cross_entropy has nothing like it."""
    target, first = node.target, node.args[0] if node.args else None
    if not isinstance(first, fx.Node) and not _is_second(node):
        raise _NotFused
    if target in MULTIPLY or target in ("mul", "mul_") or target in DIVIDE or target in ("div", "div_"):
        _scale(found, node)
    elif target in (torch.tanh, F.tanh, "tanh", "tanh_"):
        if found.cap is not None or found.bias is not None:
            raise _NotFused("tanh lies between them, and once is not all that does")
        found.cap, found.scale = found.scale, ([], [])
    elif target in ADD or target in ("add", "add_"):
        _bias(found, node)
    elif target in _CASTS:
        before, after = value(first), value(node)
        if after.dtype not in (before.dtype, torch.float32) or before.device != after.device:
            raise _NotFused(f"its logits are cast to {after.dtype}")
        if after.dtype != before.dtype and before.dtype not in _HALF:
            raise _NotFused(f"its logits are cast to {after.dtype}")
    elif target in _SWAPS or target in _RESHAPES or target is operator.getitem:
        found.rows.append(node)
    else:
        raise _NotFused(f"{name_of(node)} lies between them" if _leads_to_linear(node) else "")


def _scale(found: _Logits, node: fx.Node) -> None:
    number = node.args[0] if _is_second(node) else node.args[1]
    kind = value(number)
    if len(node.args) != 2 or node.kwargs or isinstance(kind, bool):
        raise _NotFused
    if not isinstance(kind, (int, float, torch.SymFloat, torch.SymInt)):
        raise _NotFused("its logits are scaled by a tensor" if _leads_to_linear(node) else "")
    if isinstance(kind, (int, float)) and not (math.isfinite(kind) and kind):
        raise _NotFused(f"its logits are scaled by {kind}")
    divides = node.target in DIVIDE or node.target in ("div", "div_")
    if found.bias is not None:
        raise _NotFused("its logits are scaled before a bias is added")
    found.scale[divides].append(number)


def _bias(found: _Logits, node: fx.Node) -> None:
    """A bias that is added to the logits, before they are scaled."""
    logits, other = value(node.args[0]), node.args[1]
    if len(node.args) != 2 or node.kwargs or not isinstance(other, fx.Node) or not is_plain(other):
        raise _NotFused
    bias, classes = value(other), logits.size(-1)
    fits = bias.dim() >= 1 and bias.numel() and all(isinstance(s, int) for s in bias.shape)
    if not fits or bias.numel() != bias.size(-1) or not _known(bias.size(-1) == classes) or bias.dtype != logits.dtype:
        raise _NotFused("what is added to its logits is no bias" if _leads_to_linear(node) else "")
    if found.bias is not None:
        raise _NotFused("two biases are added")
    found.bias = other


def _leads_to_linear(node: fx.Node) -> bool:
    """Whether a linear layer is near above: else nobody asks why it is not fused."""
    for _ in range(8):
        inputs = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
        if not inputs or node.op == "placeholder":
            return False
        node = inputs[0]
        if node.target is F.linear:
            return True
    return False


def _check(effects: Effects, found: _Logits, loss: fx.Node, call: dict[str, Any]) -> None:
    """Raises where the pieces do not make a call of linear_cross_entropy."""
    linear = found.linear
    if numel(linear) * value(linear).itemsize <= SMALL_LOGITS_BYTES:
        raise _NotFused(f"the logits are of less than {SMALL_LOGITS_BYTES >> 20} MiB")
    if not is_plain(*linear.args, *linear.kwargs.values()) or value(linear).dim() < 2:
        raise _NotFused("the linear layer's arguments are not plain tensors")
    if found.bias is not None and len(_linear_arguments(linear)) > 2 and _linear_arguments(linear)[2] is not None:
        raise _NotFused("the linear layer has a bias, and another one is added")
    if found.cap is not None and not _is_positive(found.cap):
        raise _NotFused("the bound of its logits is not positive")
    if call["size_average"] is not None or call["reduce"] is not None:
        raise _NotFused("the loss has size_average or reduce")
    classes, last = value(linear).size(-1), True  # whether the classes are the last dimension
    for node in reversed(found.rows):
        last = _keeps_rows(node, classes, last)
    logits, target = value(call["input"]), value(call["target"])
    at = -1 if last else 1
    if logits.dim() < 2 or (last and logits.dim() > 2) or not _known(logits.size(at) == classes):
        raise _NotFused("the classes of the loss are not those of the linear layer")
    if target.is_floating_point() and logits.dim() > 2:
        raise _NotFused("its target is probabilities of more than two dimensions")
    tensors = [*_linear_arguments(linear), found.bias, *(n for row in found.rows for n in row.all_input_nodes)]
    inside = set(found.chain)
    reads = storages(*(value(n) for n in tensors if n not in inside))
    before = effects.why_not_over(between(linear, loss, inside), reads, frozenset())
    reason = before or effects.why_not_saved(loss, reads)
    if reason:
        raise _NotFused(reason)


def _keeps_rows(node: fx.Node, classes: Any, last: bool) -> bool:
    """Whether the classes are the last dimension of what the node returns; raises where rows are not kept whole."""
    before, after = value(node.args[0]), value(node)
    if last and node.target in _RESHAPES and after.dim() >= 2 and _sizes(node) is not None:
        kept = _known(before.size(-1) == classes) and _known(after.size(-1) == classes)
    else:
        kept = last and node.target is operator.getitem and after.dim() >= 2
        kept = kept and _is_about_rows(node.args[1], before.dim())
    if kept:
        return True
    if last and node.target in _SWAPS and after.dim() >= 3:
        probe = torch.empty(tuple(range(2, 2 + after.dim())), device="meta")
        args, kwargs = node.args[1:], node.kwargs
        call = getattr(probe, str(node.target)) if node.op == "call_method" else _partial(node.target, probe)
        if call(*args, **kwargs).shape == probe.movedim(-1, 1).shape:
            return False
    raise _NotFused(f"{name_of(node)} takes its logits apart")


def _sizes(node: fx.Node) -> list[Any] | None:
    """The sizes (or dimensions) that a reshape is given; None if it is given something else."""
    given = [*node.args[1:], *node.kwargs.values()]
    found = list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return found if all(isinstance(value(n), (int, torch.SymInt)) for n in found) else None


def _partial(function: Any, first: Any) -> Any:
    return lambda *args, **kwargs: function(first, *args, **kwargs)


def _is_about_rows(index: Any, dimensions: int) -> bool:
    """Whether an index leaves the last dimension as it is."""
    items = index if isinstance(index, (tuple, list)) else (index,)
    used, dots = 0, False
    for item in items:
        kind = value(item)
        if isinstance(kind, Tensor):
            used += kind.dim() if kind.dtype in (torch.bool, torch.uint8) else 1
        elif item is ...:
            dots = True
        elif isinstance(kind, (slice, int, torch.SymInt)) and not isinstance(kind, bool):
            used += 1
        else:
            return False
    full = bool(items) and isinstance(items[-1], slice) and items[-1] == slice(None)
    if dots and items[-1] is not ...:
        return full and used <= dimensions
    return used < dimensions or (used == dimensions and full)


def _known(fact: Any) -> bool:
    return bool(statically_known_true(fact))


def _is_positive(parts: tuple[list[Any], list[Any]]) -> bool:
    return all(value(n) > 0 for part in parts for n in part if isinstance(n, (int, float)))


def _linear_arguments(linear: fx.Node) -> list[Any]:
    return [*linear.args, *(linear.kwargs[name] for name in ("input", "weight", "bias") if name in linear.kwargs)]


# --- The loss without them --------------------------------------------------------------------------------------------


def _replace(graph: fx.Graph, loss: fx.Node, call: dict[str, Any], found: _Logits) -> list[str]:
    """Rewrites the loss; returns what is done to the logits, besides."""
    with graph.inserting_before(loss):
        input, weight, *rest = _linear_arguments(found.linear)
        features = value(input).size(-1)
        if not isinstance(features, int):
            features = graph.call_method("size", (weight, -1))
        for node in reversed(found.rows):
            input = _of_rows(graph, node, input, features)
        options = {name: call[name] for name in ("weight", "reduction", "label_smoothing")}
        options["linear_bias"] = rest[0] if rest else None
        if found.bias is not None:
            options["linear_bias"] = graph.call_method("reshape", (found.bias, -1))
        if call["ignore_index"] != -100 and not value(call["target"]).is_floating_point():
            options["ignore_index"] = call["ignore_index"]
        if found.cap is not None:
            options["softcap"] = _product(graph, *found.cap)
            options["logit_scale"] = _product(graph, *_joined(found.scale, found.cap))
        else:
            options["logit_scale"] = _product(graph, *found.scale)
        if value(loss).dtype != value(found.linear).dtype:
            options["loss_dtype"] = value(loss).dtype
        given = {name: option for name, option in options.items() if option is not None}
        new = graph.call_function(linear_cross_entropy, (input, weight, call["target"]), given)
    new.meta = dict(loss.meta)
    loss.replace_all_uses_with(new)
    for old in (loss, *found.chain):
        graph.erase_node(old)
    names = {"logit_scale": "scale", "softcap": "softcap"}
    return [*(["bias"] if found.bias else []), *(name for option, name in names.items() if option in given)]


def _of_rows(graph: fx.Graph, node: fx.Node, input: fx.Node, features: Any) -> fx.Node:
    """What a node does to the rows of the logits, done to the rows of the head's input."""
    if node.target in _SWAPS:
        return input  # the classes go elsewhere, the rows stay in order
    if node.target is operator.getitem:
        return graph.call_function(operator.getitem, (input, node.args[1]))
    if node.target in ("flatten", torch.flatten):
        return graph.call_function(torch.flatten, (input, *node.args[1:]), dict(node.kwargs))
    sizes = _sizes(node)
    assert sizes is not None
    return graph.call_method("reshape", (input, *sizes[:-1], features))


def _joined(scale: tuple[list[Any], list[Any]], cap: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
    """cap * tanh(scale * z) as cap * tanh(scale * cap * z / cap)."""
    return scale[0] + cap[0], scale[1] + cap[1]


def _product(graph: fx.Graph, factors: list[Any], divisors: list[Any]) -> Any:
    """The product of numbers, which may be nodes; what is a factor and a divisor cancels. None for 1."""
    factors, divisors = list(factors), list(divisors)
    for number in list(factors):
        if number in divisors:
            factors.remove(number)
            divisors.remove(number)
    result: Any = 1.0
    for numbers, operation in ((factors, operator.mul), (divisors, operator.truediv)):
        for number in numbers:
            nodes = isinstance(result, fx.Node) or isinstance(number, fx.Node)
            result = graph.call_function(operation, (result, number)) if nodes else operation(result, number)
    return None if not isinstance(result, fx.Node) and result == 1 else result

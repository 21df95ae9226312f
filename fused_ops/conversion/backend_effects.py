"""What a node of a captured graph reads and writes, by the schemas of the operators that it runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops.core.torch_private import HigherOrder, is_plain_fake, storage_id, tree_leaves, tree_map

_READERS = frozenset(("item", "size", "stride", "dim", "numel"))  # methods that write nothing
_STATISTICS = frozenset(("running_mean", "running_var"))  # written by ops whose schemas do not say so
_MANY = 1 << 62


class Effect(NamedTuple):
    """The storages that a node reads and writes."""

    reads: frozenset[int]
    writes: frozenset[int]


NOTHING = Effect(frozenset(), frozenset())


def value(node: Any) -> Any:
    """What Dynamo found a node to be: a fake tensor, a number that may be a symbol, ...; None if nothing."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def fill_values(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Finds what the nodes are where nobody has noted it: parts that DDP cuts a graph into lack it."""
    nodes = list(graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if all("example_value" in node.meta for node in inputs):
        return
    fake_mode = next((t.fake_mode for t in example_inputs if is_plain_fake(t)), None)
    if fake_mode is None:
        return
    grad = torch.is_grad_enabled()
    try:
        with fake_mode:
            _Fill(graph_module).run(*example_inputs)
    finally:
        torch.set_grad_enabled(grad)


class _Fill(fx.Interpreter):
    """Notes what each node is."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.op not in ("get_attr", "output"):
            node.meta.setdefault("example_value", result)
        return result


def storages(*values: Any) -> frozenset[int]:
    """The storages of the tensors in them."""
    return frozenset(storage_id(t) for t in tree_leaves(values) if isinstance(t, Tensor))


def is_plain(*nodes: Any) -> bool:
    """Whether each is None or a strided tensor without a class of its own."""
    return all(node is None or is_plain_fake(value(node)) for node in nodes)


def numel(node: fx.Node) -> int:
    """How many values, in the call that is compiled for; a large number where nobody knows."""
    found = value(node).numel()
    hint = found if isinstance(found, int) else found.node.hint
    return _MANY if hint is None else int(hint)


class Effects:
    """What the nodes of one graph read and write, each looked at once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._known: dict[fx.Node, Effect | None] = {}

    def of(self, node: fx.Node) -> Effect | None:
        """None where it cannot be told, and for what changes a mode (autocast, grad mode, the random state)."""
        if node not in self._known:
            self._known[node] = _effect_of(node)
        return self._known[node]

    def stands_for(self, new: fx.Node, old: Iterable[fx.Node]) -> None:
        """Takes note of a node that does what the others did."""
        effects = [self.of(node) or NOTHING for node in old]
        reads, writes = (frozenset().union(*sets) for sets in zip(*effects, strict=True))
        self._known[new] = Effect(reads, writes)

    def why_not_over(self, between: Iterable[fx.Node], reads: frozenset[int], writes: frozenset[int]) -> str:
        """Why what reads and writes these storages cannot be moved over these nodes; empty if it can be."""
        for node in between:
            effect = self.of(node)
            if effect is None:
                return f"{name_of(node)} lies in between"
            if effect.writes & (reads | writes):
                return f"{name_of(node)} writes to what it reads in between"
            if effect.reads & writes:
                return f"{name_of(node)} uses its running statistics in between"
        return ""

    def why_not_saved(self, after: fx.Node, saved: frozenset[int]) -> str:
        """Why these storages are not as they were when a backward comes: which later node writes them; or empty."""
        node = after.next
        while saved and node.op != "output":
            effect = self.of(node)
            touched = storages(*map(value, node.all_input_nodes)) if effect is None else effect.writes
            if touched & saved:
                return f"{name_of(node)} writes later to what its backward would need"
            node = node.next
        return ""

    def written_inputs(self) -> set[fx.Node]:
        """The inputs of the graph that its nodes write, as far as can be told."""
        writes: frozenset[int] = frozenset()
        writes = writes.union(*(effect.writes for effect in map(self.of, self._graph.nodes) if effect is not None))
        return {node for node in self._graph.nodes if node.op == "placeholder" and storages(value(node)) & writes}


def name_of(node: fx.Node) -> str:
    """What a node calls, for people."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _effect_of(node: fx.Node) -> Effect | None:
    if node.op in ("placeholder", "get_attr", "output"):
        return NOTHING
    if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrder):
        return None
    given = [value(n) for n in node.all_input_nodes]
    if any(v is None for v in given):
        return None
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    if not tensors:
        made = isinstance(value(node), (Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
        return NOTHING if made else None
    if not all(is_plain_fake(t) for t in tensors):
        return None
    if node.op == "call_method" and node.target in _READERS:
        return Effect(storages(tensors), frozenset())
    try:
        writes = _run(node, tensors[0].fake_mode)  # type: ignore[attr-defined]
    except Exception:  # whatever a function makes of aliases without values
        return None
    if node.op == "call_method" and str(node.target).endswith("_"):  # some write no values: requires_grad_
        writes |= storages(value(node.args[0]))
    return Effect(storages(tensors), frozenset(writes))


def _run(node: fx.Node, fake_mode: Any) -> set[int]:
    """The storages that the node writes, from running it on aliases of the fake tensors."""
    record = _Record()
    with fake_mode, torch.no_grad():
        args, kwargs = tree_map(_alias, fx.map_arg((node.args, node.kwargs), value))
        with record:
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)  # type: ignore[operator]
    return record.writes


def _alias(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _Record(TorchDispatchMode):
    """Notes the storages that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in _STATISTICS:
                self.writes |= storages(args[i] if i < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)


def between(first: fx.Node, last: fx.Node, without: Iterable[fx.Node] = ()) -> Iterable[fx.Node]:
    """The nodes after ``first`` and before ``last``."""
    left_out = set(without)
    node = first.next
    while node is not last:
        if node not in left_out:
            yield node
        node = node.next


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses it, once; else None."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if uses(node, user) == 1 and user.op != "output" else None


def uses(node: fx.Node, user: fx.Node) -> int:
    """How often it is an argument of that user."""
    return sum(leaf is node for leaf in tree_leaves((user.args, user.kwargs)))


ADD = frozenset((operator.add, operator.iadd, torch.add))
MULTIPLY = frozenset((operator.mul, operator.imul, torch.mul))
DIVIDE = frozenset((operator.truediv, operator.itruediv, torch.div, torch.true_divide))

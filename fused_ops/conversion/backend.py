"""The backend of torch.compile that fuses what Dynamo captured, and leaves the rest to another backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from fused_ops.conversion import backend_run
from fused_ops.conversion.backend_effects import Effects, fill_values
from fused_ops.conversion.backend_head import fuse_cross_entropies
from fused_ops.conversion.backend_norm import fuse_batch_norms
from fused_ops.conversion.records import GRAPHS, GraphRecord
from fused_ops.core import library
from fused_ops.core.torch_private import checkpoint_operator, inductor_options, lookup_backend

_COUNTER = "num_batches_tracked_"  # Dynamo's name of the buffer


def fused_ops(
    graph_module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fused_ops")``: this package's ops in the graph that Dynamo captured.

    Args:
        graph_module: The graph. It is rewritten in place.
        example_inputs: Its inputs, fake.
        options: ``{"inner": ...}`` is what runs the rewritten graph, the name of a backend of torch.compile or a
            callable as one; ``"eager"`` by default. Further options are the inner backend's.
        mode: Of torch.compile; for ``"inductor"`` as the inner backend.

    Returns:
        What runs the graph.

    Raises:
        TypeError: ``options["inner"]`` is neither a name nor a callable.
        ValueError: options or a mode that the inner backend does not have.
    """
    rest = dict(options or {})
    inner = rest.pop("inner", "eager")
    run_inner = _inner(inner, rest, mode)
    record = GraphRecord()
    reason = _not_understood(graph_module)
    if reason:
        record.left[reason] += 1
    else:
        fill_values(graph_module, example_inputs)
        for part in reversed(_parts(graph_module)):
            _rewrite(part, record, inner)
    GRAPHS.append(record)
    return _counted(run_inner(graph_module, example_inputs), record)


def _counted(run: Callable[..., Any], record: GraphRecord) -> Callable[..., Any]:
    def run_graph(*args: Any) -> Any:
        record.calls += 1
        return run(*args)

    if hasattr(run, "_boxed_call"):  # takes its arguments as one list, and frees them
        run_graph._boxed_call = True  # type: ignore[attr-defined]
    return run_graph


def _inner(inner: Any, options: dict[str, Any], mode: str | None) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """The inner backend with its options."""
    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(f"backend fused_ops: expected inner to be a name or a callable, got {type(inner).__name__}")
    if inner == "eager":
        if options or mode:
            unknown = next(iter(options), f"mode={mode}")
            raise ValueError(f"backend fused_ops: the inner backend 'eager' has no options, got {unknown!r}")
        return lambda graph_module, _: graph_module.forward
    found = lookup_backend(inner)
    given: dict[str, Any] = {}
    if inner == "inductor":
        given["config_patches"] = {**(inductor_options(mode) if mode else {}), **options}
    else:
        given = {name: v for name, v in (("options", options), ("mode", mode)) if v}
    return lambda graph_module, inputs: found(graph_module, inputs, **given)


def _not_understood(graph_module: fx.GraphModule) -> str:
    """Why nothing is rewritten."""
    for part in _parts(graph_module):
        for node in part.graph.nodes:
            if "functorch" in str(getattr(node.target, "__module__", "")):
                return "a transform of torch.func is inside"
    return ""


def _parts(graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph, and those of its parts that are checkpointed: the graphs that run as they stand."""
    found = [graph_module]
    for node in _checkpoints(graph_module):
        found += _parts(_body(graph_module, node))
    return found


def _checkpoints(part: fx.GraphModule) -> list[fx.Node]:
    operator = checkpoint_operator()
    return [] if operator is None else list(part.graph.find_nodes(op="call_function", target=operator))


def _body(part: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """The graph of what is checkpointed."""
    return part.get_submodule(node.args[0].target)  # type: ignore[union-attr,arg-type,return-value]


def _rewrite(part: fx.GraphModule, record: GraphRecord, inner: Any) -> None:
    for node in _checkpoints(part):
        if inner == "eager":
            _checkpoint_as_eager(part, node)
    effects = Effects(part.graph)
    fuse_batch_norms(part.graph, effects, record, lambda input: _why_not_ours(input, inner))
    fuse_cross_entropies(part.graph, effects, record, lambda input: _why_not_ours(input, ""))
    part.recompile()


def _checkpoint_as_eager(part: fx.GraphModule, node: fx.Node) -> None:
    """Checkpoints as eager mode does.

    What Dynamo's operator does, run eagerly, is for AOTAutograd to trace: it leaves the random state as it is, and
    raises in the backward where a buffer was written.
    """
    body = _body(part, node)
    buffers = {n for n in Effects(body.graph).written_inputs() if "_buffers_" in str(n.target)}
    all_ours = not body.graph.find_nodes(op="call_function", target=F.batch_norm)
    for buffer in buffers if all_ours else ():
        for user in buffer.users:
            if str(buffer.target).endswith(_COUNTER) and user.target == "add_" and user.args == (buffer, 1):
                user.op, user.target = "call_function", backend_run.count_batch
    written = tuple(i for i, n in enumerate(body.graph.find_nodes(op="placeholder")) if n in buffers)
    node.target = backend_run.run_checkpointed
    node.args = (node.args[0], written, *node.args[1:])


def _why_not_ours(input: Tensor, inner: Any) -> str:
    """Why an op on this tensor stays PyTorch's; empty if it becomes ours."""
    device = input.device.type
    if inner == "inductor" and device == "cuda":
        return "Inductor fuses it on CUDA"
    if all(what == "plain PyTorch" for _, kind, what, _ in library.backends() if kind == device):
        return f"no kernels on {device}"
    return ""

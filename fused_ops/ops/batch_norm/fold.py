"""Folding evaluation-mode batch norm into the convolution or linear layer before it."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_ops.core.hooks import hooked, plain
from fused_ops.core.memory_format import wide
from fused_ops.ops.batch_norm.modules import SyncBatchNorm, _FusedBatchNorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_OF_ANY_DIMENSION = (nn.SyncBatchNorm, SyncBatchNorm)  # in evaluation as any other
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_OF_ANY_DIMENSION)
_FORWARDS = {kind.forward for kind in (*_LAYERS, *_BATCH_NORMS, _FusedBatchNorm)}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
}


class _Tracer(fx.Tracer):
    """Keeps this package's batch norm whole, as torch.fx does PyTorch's, and tells which buffers a forward reads."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _FusedBatchNorm) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if hooked(m) and not self.is_leaf_module(m, path):
            raise ValueError(f"fold: {path} ({type(m).__name__}) has hooks, which the folded model would not have")
        return super().call_module(m, forward, args, kwargs)


def fold(module: nn.Module, bn: nn.Module | None = None) -> nn.Module:
    """Folds batch norm in evaluation mode into the layer before it; nothing given is changed.

    Args:
        module: A convolution (transposed too) or linear layer to fold ``bn`` into; without ``bn`` a whole model, in
            which every batch norm that is the only reader of such a layer is folded (found by torch.fx).
        bn: PyTorch's or this package's BatchNorm1d/2d/3d or SyncBatchNorm in evaluation mode, with running statistics.

    Returns:
        The layer with folded weight and bias, followed by ``bn``'s activation if it has one; or the model, as a
        ``torch.fx.GraphModule``.

    Raises:
        ValueError: ``bn`` or the model is in training mode, ``bn`` has no running statistics, the numbers of channels
            differ, one of the two has hooks, a forward of its own, or a weight that is no plain parameter
            (parametrized, weight_norm, pruned), or a module that holds others has hooks.
        TypeError: ``module`` is none of these layers, or ``bn`` no batch norm.

    Warns:
        UserWarning: pairs of the model that stay, each with the reason: those above, and weights that something else
            reads too (tied ones, or a penalty on ``bn.weight``).

    Note:
        Weights are folded in float64 and rounded once. Tracing sees no shapes: a linear layer on a 3-d tensor whose
        batch norm has as many channels as the layer has features is taken for one on (batch, features).
    """
    if bn is not None:
        return _fold_pair(module, bn)
    if module.training:
        raise ValueError("fold: expected a model in evaluation mode (call model.eval()), got one in training mode")
    tracer = _Tracer()
    graph = tracer.trace(_copied(module))
    traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
    modules = dict(traced.named_modules())
    called = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    readers = _readers(traced)
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        bn_module, layer = modules[str(node.target)], modules[str(before.target)]
        if called[node.target] > 1 or called[before.target] > 1 or not isinstance(bn_module, _BATCH_NORMS):
            continue
        if bn_module.running_mean is None or not isinstance(layer, _LAYERS) or _linear_on_length(layer, bn_module):
            continue
        reason = _why_not(layer) or _why_not(bn_module) or _read_elsewhere(layer, bn_module, readers)
        if reason:
            warnings.warn(f"fold: {node.target} stays behind {before.target}: {reason}", stacklevel=2)
            continue
        folded = modules[str(before.target)] = _fold_pair(layer, bn_module)  # for a batch norm behind this one
        traced.set_submodule(str(before.target), folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        traced.delete_submodule(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return traced


def _copied(model: nn.Module) -> nn.Module:
    held = [m.__dict__.get(name) for m in model.modules() for name in ("process_group", "synchronised")]
    try:
        return copy.deepcopy(model, {id(group): group for group in held if group is not None})
    except RuntimeError as error:
        what = "a weight that is computed from others, as weight_norm and pruning do, must be made a parameter first"
        raise ValueError(f"fold: cannot copy the model: {what}") from error


def _readers(traced: fx.GraphModule) -> Counter[int]:
    """By the id of each parameter and buffer, how many modules hold it, and how often the graph itself reads it."""
    found: Counter[int] = Counter()
    for module in traced.modules():
        found.update({id(t) for t in (*module._parameters.values(), *module._buffers.values())})
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            found[id(functools.reduce(getattr, str(node.target).split("."), traced))] += 1
    return found


def _read_elsewhere(layer: nn.Module, bn: nn.Module, readers: Counter[int]) -> str:
    for module in (layer, bn):
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and readers[id(t)] > 1:
                return f"the {name} of its {type(module).__name__} has another reader"
    return ""


def _why_not(module: nn.Module) -> str:
    """Why a layer or a batch norm is not what its class says; empty where it is."""
    kind = type(module)
    if hooked(module):
        return f"its {kind.__name__} has hooks (weight_norm and pruning are hooks too)"
    if not plain(module):
        return f"its {kind.__name__} has a forward set on the instance, or is compiled"
    if kind.forward not in _FORWARDS:
        return f"{kind.__name__} is a subclass with a forward of its own"
    if "parametrizations" in module._modules:
        return f"its {kind.__name__} is parametrized"
    for name in ("weight", "bias"):
        if name not in module._parameters or type(module._parameters[name]) not in (nn.Parameter, type(None)):
            return f"the {name} of its {kind.__name__} is no plain parameter"
    return ""


def _linear_on_length(layer: nn.Module, bn: nn.Module) -> bool:
    """Whether the sizes tell that batch norm's channels are not the linear layer's features."""
    return isinstance(layer, nn.Linear) and (
        not isinstance(bn, (nn.BatchNorm1d, *_OF_ANY_DIMENSION)) or layer.out_features != bn.num_features
    )


def _fold_pair(layer: nn.Module, bn: nn.Module) -> nn.Module:
    if not isinstance(layer, _LAYERS):
        raise TypeError(f"fold: expected module to be a convolution or linear layer, got {type(layer).__name__}")
    if not isinstance(bn, _BATCH_NORMS):
        raise TypeError(f"fold: expected bn to be a BatchNorm1d, 2d or 3d or a SyncBatchNorm, got {type(bn).__name__}")
    if reason := _why_not(layer) or _why_not(bn):
        raise ValueError(f"fold: cannot fold: {reason}")
    if bn.training and not getattr(bn, "frozen", False):
        raise ValueError("fold: expected bn in evaluation mode (call bn.eval()), got training mode")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold: expected bn to have running statistics, got track_running_stats=False")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != bn.num_features:
        raise ValueError(f"fold: expected bn of {channels} channels, got {bn.num_features}")
    folded: Any = copy.deepcopy(layer)
    scale, shift = _affine(bn)
    weight = wide(layer.weight.detach())
    by_output = _by_output(layer, scale)
    old_bias = torch.zeros_like(shift) if layer.bias is None else wide(layer.bias.detach())
    folded.weight = nn.Parameter((weight * by_output).to(layer.weight), layer.weight.requires_grad)
    folded.bias = nn.Parameter((old_bias * scale + shift).to(layer.weight), layer.weight.requires_grad)
    activation = _activation_of(bn)
    return folded if activation is None else nn.Sequential(folded, activation)


def _affine(bn: Any) -> tuple[Tensor, Tensor]:
    """Batch norm as scale * x + shift, wide."""
    scale = (wide(bn.running_var) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * wide(bn.weight.detach())
    shift = -wide(bn.running_mean) * scale
    return scale, shift if bn.bias is None else shift + wide(bn.bias.detach())


def _by_output(layer: Any, scale: Tensor) -> Tensor:
    """``scale`` in the shape that multiplies the layer's weight, output channel by output channel."""
    rest = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, _TRANSPOSED):
        return scale.reshape(-1, 1, *rest)
    per_group = scale.reshape(layer.groups, 1, -1, *rest)  # weight: (in, out / groups, ...)
    inputs = layer.in_channels // layer.groups
    return per_group.expand(-1, inputs, *per_group.shape[2:]).reshape(layer.in_channels, -1, *rest)


def _activation_of(bn: nn.Module) -> nn.Module | None:
    if not isinstance(bn, _FusedBatchNorm) or bn.activation is None:
        return None
    if bn.activation == "leaky_relu":
        return nn.LeakyReLU(bn.negative_slope)
    return nn.ELU(bn.alpha) if bn.activation == "elu" else _ACTIVATIONS[bn.activation]()

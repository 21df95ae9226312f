"""Folding evaluation-mode batch norm into the convolution or linear layer before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_ops.ops.batch_norm.modules import _FusedBatchNorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
    """Keeps this package's batch norm whole, as torch.fx does PyTorch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _FusedBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def fold(module: nn.Module, bn: nn.Module | None = None) -> nn.Module:
    """Folds batch norm in evaluation mode into the layer before it; nothing given is changed.

    Args:
        module: A convolution (transposed too) or linear layer to fold ``bn`` into; without ``bn`` a whole model, in
            which every batch norm that is the only reader of such a layer is folded (found by torch.fx).
        bn: PyTorch's or this package's BatchNorm1d/2d/3d in evaluation mode, with running statistics.

    Returns:
        The layer with folded weight and bias, followed by ``bn``'s activation if it has one; or the model, as a
        ``torch.fx.GraphModule``.

    Raises:
        ValueError: ``bn`` or the model is in training mode, ``bn`` has no running statistics, or the numbers of
            channels differ.
        TypeError: ``module`` is none of these layers, or ``bn`` no batch norm.

    Note:
        Weights are folded in float64 and rounded once. Tracing sees no shapes: a linear layer on a 3-d tensor whose
        batch norm has as many channels as the layer has features is taken for one on (batch, features).
    """
    if bn is not None:
        return _fold_pair(module, bn)
    if module.training:
        raise ValueError("fold: expected a model in evaluation mode (call model.eval()), got one in training mode")
    tracer = _Tracer()
    graph = tracer.trace(copy.deepcopy(module))
    traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
    modules = dict(traced.named_modules())
    readers = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        bn_module, layer = modules[str(node.target)], modules[str(before.target)]
        once = readers.count(node.target) == 1 and readers.count(before.target) == 1
        if not once or not isinstance(bn_module, _BATCH_NORMS) or bn_module.running_mean is None:
            continue
        if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)) or _linear_on_length(layer, bn_module):
            continue
        traced.set_submodule(str(before.target), _fold_pair(layer, bn_module))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        traced.delete_submodule(str(node.target))
    traced.graph.lint()
    traced.recompile()
    return traced


def _linear_on_length(layer: nn.Module, bn: nn.Module) -> bool:
    """Whether the sizes tell that batch norm's channels are not the linear layer's features."""
    return isinstance(layer, nn.Linear) and (
        not isinstance(bn, nn.BatchNorm1d) or layer.out_features != bn.num_features
    )


def _fold_pair(layer: nn.Module, bn: nn.Module) -> nn.Module:
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
        raise TypeError(f"fold: expected module to be a convolution or linear layer, got {type(layer).__name__}")
    if not isinstance(bn, _BATCH_NORMS):
        raise TypeError(f"fold: expected bn to be a BatchNorm1d, 2d or 3d, got {type(bn).__name__}")
    if bn.training and not getattr(bn, "frozen", False):
        raise ValueError("fold: expected bn in evaluation mode (call bn.eval()), got training mode")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold: expected bn to have running statistics, got track_running_stats=False")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != bn.num_features:
        raise ValueError(f"fold: expected bn of {channels} channels, got {bn.num_features}")
    folded = copy.deepcopy(layer)
    scale, shift = _affine(bn)
    weight = layer.weight.detach().double()
    by_output = _by_output(layer, scale)
    old_bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
    folded.weight = nn.Parameter((weight * by_output).to(layer.weight), layer.weight.requires_grad)
    folded.bias = nn.Parameter((old_bias * scale + shift).to(layer.weight), layer.weight.requires_grad)
    activation = _activation_of(bn)
    return folded if activation is None else nn.Sequential(folded, activation)


def _affine(bn: Any) -> tuple[Tensor, Tensor]:
    """Batch norm as scale * x + shift, in float64."""
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = -bn.running_mean.double() * scale
    return scale, shift if bn.bias is None else shift + bn.bias.detach().double()


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

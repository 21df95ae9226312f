"""The linear head of a model: found, and made to leave its logits to the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from fused_ops.conversion import report as limits
from fused_ops.conversion.deferred_logits import DeferredLogits, HeadTensors
from fused_ops.conversion.fuse import NotTraceable, Rewritten, _arity, _become, _trace, hooked
from fused_ops.core.function import autocast_enabled
from fused_ops.core.torch_private import any_global_hook, forward_ad, is_tracing, transforms_active


class HeadLinear(nn.Linear):
    """``nn.Linear`` whose result, where it is going to be differentiated, is not computed before somebody needs it."""

    def forward(self, input: Tensor) -> Tensor:
        """The logits."""
        head = self._deferrable(input)
        return super().forward(input) if head is None else DeferredLogits.of(head)

    def _get_name(self) -> str:
        return "Linear"  # printed as it was

    def _deferrable(self, input: Tensor) -> HeadTensors | None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(input) is not Tensor:
            return None
        weight, bias = self.weight, self.bias
        if input.dim() < 2 or type(weight) not in (nn.Parameter, Tensor):
            return None
        tensors = [input, weight] if bias is None else [input, weight, bias]
        if autocast_enabled(input):
            dtype = torch.get_autocast_dtype(input.device.type)
            tensors = [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        if len({(t.dtype, t.device) for t in tensors}) > 1 or input.size(-1) != self.in_features:
            return None  # which PyTorch has a message for
        if math.prod(input.shape[:-1]) * self.out_features * tensors[0].element_size() <= limits.SMALL_BYTES:
            return None
        if not (input.requires_grad or weight.requires_grad) or _watched(self):
            return None
        return HeadTensors(tensors[0], tensors[1], None if bias is None else tensors[2])


def _watched(head: nn.Module) -> bool:
    """Whether somebody other than the loss is to see the logits: hooks, a tracer, a transform."""
    if hooked(head) or any_global_hook() or is_tracing():
        return True
    return bool(transforms_active()) or forward_ad._current_level >= 0


def find_head(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The linear layer whose result is what ``model`` returns (or scores tokens with), and how it was found or not."""
    found = token_head(model)
    if found is not None:
        return found, ""
    try:
        return _last(model), ""
    except NotTraceable as error:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            return None, "it has no linear layer"
        return linear[-1], f"taken for the head as the last linear layer: {error}"


def token_head(model: nn.Module) -> nn.Module | None:
    """The head of a language model of transformers."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Linear) else None


def _last(module: nn.Module) -> nn.Module:
    """The module that computes last in a forward, at any depth."""
    if isinstance(module, nn.Linear):
        return module
    if type(module).forward is nn.Sequential.forward and len(module._modules):
        last = list(module._modules.values())[-1]
        return module if last is None else _last(last)
    if not any(isinstance(child, nn.Linear) for child in module.modules()):
        return module
    graph = _own_graph(module)
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    while getattr(result, "op", "") == "call_method" and result.target in ("view", "reshape", "flatten", "float"):
        result = result.args[0]
    if getattr(result, "op", "") == "call_module":
        return _last(module.get_submodule(str(result.target)))
    if isinstance(result, (tuple, dict)):
        raise NotTraceable("forward returns more than one tensor")
    return module


def _own_graph(module: nn.Module) -> fx.Graph:
    """Of the forward that the module had before convert rewrote it."""
    now = type(module)
    own: type[nn.Module] = now.__dict__["_fused_ops_original"] if isinstance(module, Rewritten) else now
    _become(module, own)
    try:
        return _trace(module, _arity(own.forward), True)[0]
    finally:
        _become(module, now)


__all__ = ["HeadLinear", "find_head", "token_head"]

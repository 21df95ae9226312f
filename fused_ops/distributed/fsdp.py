"""What fully_shard does to a weight that a module's forward has used, and to what the module returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.core.torch_private import is_colwise_hook, sharding_states


def _is_its(state: Any, hook: Any) -> bool:
    while hook is not None:
        if getattr(hook, "__self__", None) is state:
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def is_pre_backward_hook(hook: Any) -> bool:
    """Whether it is fully_shard's, which returns the gradient as it is and only needs to know that there is one."""
    owner = getattr(hook, "__self__", None)
    if owner is None or getattr(hook, "__name__", "") != "_pre_backward":
        return False
    return any(state is owner for state in sharding_states() or ())


def has_only_hooks_of_parallelism(module: nn.Module) -> bool:
    """Whether the hooks of a module are fully_shard's and ColwiseParallel's alone."""
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    states = sharding_states() or ()
    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(is_colwise_hook(hook) or any(_is_its(state, hook) for state in states) for hook in forward)


def source_of(weight: Tensor) -> tuple[Tensor | None, tuple[nn.Module, ...] | None]:
    """The shard that a weight was gathered from, and the modules after whose forward its memory is freed.

    Returns:
        (None, ()) of a weight that is nobody's; no modules where it stays gathered; None where they are not known.
    """
    states = sharding_states()
    if states is None:
        return None, None if torch.distributed.is_initialized() else ()
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            for parameter in () if group is None else group.fsdp_params:
                if getattr(parameter, "_unsharded_param", None) is weight:
                    freed = group.post_forward_mesh_info is not None
                    return parameter.sharded_param.to_local(), getattr(state, "_modules", None) if freed else ()
    return None, ()


def before_it_is_freed(modules: tuple[nn.Module, ...], act: Callable[[], Any]) -> None:
    """Calls ``act`` once, at the end of the modules' forward that runs now, before fully_shard's own hook frees it."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        act()

    handles = [module.register_forward_hook(hook, prepend=True, always_call=True) for module in modules]


__all__ = ["before_it_is_freed", "has_only_hooks_of_parallelism", "is_pre_backward_hook", "source_of"]

"""Whether somebody has put something of their own into a module: hooks, or a forward on the instance."""

from __future__ import annotations

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches what goes in or comes out of this module alone."""
    state = module.__dict__
    return any(state.get(name) for name in _HOOKS)


def plain(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward and of nothing else, global hooks apart."""
    state = module.__dict__
    return not (
        state.get("_forward_hooks")
        or state.get("_forward_pre_hooks")
        or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
        or state.get("_compiled_call_impl")
        or "forward" in state
    )

"""torch.func.functionalize of this package's Functions, which PyTorch has no rule for.

A Function of this package changes nothing that it is given and returns new tensors, so functionalized it is itself, on
what the functional tensors hold.
"""

from __future__ import annotations

from typing import Any

from fused_ops.core.function import FusedFunction
from fused_ops.core.torch_private import functionalize_rules


def _install() -> None:
    """Gives PyTorch's table a rule for our Functions; others meet what was there. Without these names: as PyTorch."""
    found = functionalize_rules()
    if found is None:
        return
    rules, key, api, call = found
    others = rules[key]

    def rule(interpreter: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(function, FusedFunction):
            return others(interpreter, function, *args, **kwargs)
        context = api(interpreter)
        inside: Any = context.unwrap_tensors(args)
        with context.redispatch_to_next():
            outputs = call(function, *inside, **kwargs)
        return context.wrap_tensors(outputs)

    rules[key] = rule


_install()

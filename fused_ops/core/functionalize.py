"""torch.func.functionalize of this package's Functions, which PyTorch has no rule for.

A Function of this package changes nothing that it is given and returns new tensors, so functionalized it is itself, on
what the functional tensors hold.
"""

from __future__ import annotations

from typing import Any

from fused_ops.core.function import FusedFunction


def _install() -> None:
    """Gives PyTorch's table a rule for our Functions; others meet what was there. Without these names: as PyTorch."""
    try:
        from torch._C._functorch import TransformType
        from torch._functorch.autograd_function import custom_function_call
        from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

        table = custom_function_call.functorch_table
        others = table[TransformType.Functionalize]
    except (ImportError, AttributeError, KeyError):
        return

    def rule(interpreter: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(function, FusedFunction):
            return others(interpreter, function, *args, **kwargs)
        context = FunctorchFunctionalizeAPI(interpreter)
        inside: Any = context.unwrap_tensors(args)
        with context.redispatch_to_next():
            outputs = custom_function_call(function, *inside, **kwargs)
        return context.wrap_tensors(outputs)

    table[TransformType.Functionalize] = rule


_install()

"""What the graphs of torch.compile and torch.export hold: one op a call, with its gradient, and numbers as a tensor.

The autograd Functions serve eager mode. A graph holds an op of ``register_graph_op`` instead: Dynamo, AOTAutograd and
export see one opaque call with a fake kernel and an autograd formula, so an exported program can be trained. Where a
torch.func transform is inside of what is compiled, where two levels of forward-mode AD are active, and for
``torch.jit.trace``, neither a Function nor an op is right: ``needs_formulas`` says so, and the call is made of
PyTorch's own differentiable ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ops._function import _transforms_active
from fused_ops._library import _fragment, register

implementations: dict[Any, Callable[..., Any]] = {}  # of the ops of register_graph_op
_FORWARD_LEVEL = torch._C._functorch.TransformType.Jvp


def needs_formulas() -> bool:
    """Whether only PyTorch's own differentiable ops give the right derivatives of this call."""
    if torch.compiler.is_compiling():
        return bool(_transforms_active())  # Dynamo inlines a Function there, without its backward
    if torch.jit.is_tracing():
        return True
    return bool(_transforms_active()) and _forward_levels() > 1


def _forward_levels() -> int:
    """Levels of forward-mode AD: autograd drops the tangent of a Function's ``jvp`` at all but the innermost."""
    return sum(level.key() == _FORWARD_LEVEL for level in torch._C._functorch.get_interpreter_stack() or ())


def as_tensor(*numbers: float) -> Tensor:
    """Numbers, which may be symbols, as a float64 tensor of the CPU, (len(numbers),).

    A float handed to an op would be a constant of the graph: another value, another compilation. Only arithmetic on
    a tensor is known to keep a symbol one.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in numbers])


def register_graph_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines an op for graphs, and returns it ready to be called.

    Args:
        schema: The op's schema. Numbers that may change from call to call are ``SymInt`` or in a tensor.
        implementation: What runs, below autograd and below every dispatch mode.
        fake: Implementation on shapes, strides and dtypes alone.
        setup_context: As of an autograd Function; None with ``backward``: not differentiable.
        backward: Likewise.
    """
    op = register(schema, implementation, fake, native=False)
    implementations[op] = implementation
    if backward is not None:
        name = schema.split("(", 1)[0]
        torch.library.register_autograd(f"fused_ops::{name}", backward, setup_context=setup_context, lib=_fragment)
    return op


def refuse_script(module: torch.nn.Module) -> None:
    """Raises for ``torch.jit.script``, which cannot read what these modules do."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script is not supported; use torch.jit.trace, or torch.export instead"
    )

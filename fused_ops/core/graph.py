"""What the graphs of torch.compile and torch.export hold: one op a call, with its gradient, and numbers as a tensor.

The autograd Functions serve eager mode. A graph holds an op of ``register_graph_op`` instead: Dynamo, AOTAutograd and
export see one opaque call with a fake kernel and an autograd formula, so an exported program can be trained. Where a
torch.func transform is inside of what is compiled, where two levels of forward-mode AD are active, and for
``torch.jit.trace``, neither a Function nor an op is right: ``needs_formulas`` says so, and the call is made of
PyTorch's own differentiable ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fused_ops.core.library import _fragment, register
from fused_ops.core.torch_private import (
    dispatch_modes,
    forward_ad,
    forward_grad_enabled,
    hide_from_dynamo,
    is_tracing,
    levels,
    transforms_active,
)

_F = TypeVar("_F", bound=Callable[..., Any])

implementations: dict[Any, Callable[..., Any]] = {}  # of the ops of register_graph_op


def needs_formulas() -> bool:
    """Whether only PyTorch's own differentiable ops give the right derivatives of this call."""
    if torch.compiler.is_compiling():
        return bool(transforms_active())  # Dynamo inlines a Function there, without its backward
    if is_tracing():
        return True
    # Autograd drops the tangent of a Function's ``jvp`` at all but the innermost forward level.
    return bool(transforms_active()) and (levels("Jvp") > 1 or functionalizing())


def linearizing() -> bool:
    """Whether a graph of tangents is made, as by torch.func.linearize.

    It computes at once what depends on no tangent, except ops that write to an argument; what such an op writes is then
    read before it is written.
    """
    return forward_ad._current_level >= 0 and bool(dispatch_modes()) and get_proxy_mode() is not None


def left_to_pytorch(input: Tensor) -> bool:
    """Whether a call that PyTorch has an op for is to be that op.

    torch.jit.trace and ONNX know no other; Inductor on CUDA fuses its own with what is around it.
    """
    if not torch.compiler.is_compiling():
        return is_tracing()
    if torch.compiler.is_dynamo_compiling():
        return input.is_cuda
    return bool(torch.onnx.is_in_onnx_export())


def in_graph() -> bool:
    """Whether the call becomes a part of a graph: of torch.compile, torch.export or make_fx.

    A transform that make_fx traces needs the Functions, and leaves nothing in the graph that it is to follow.
    """
    if torch.compiler.is_compiling():
        return True
    plain = not transforms_active() and forward_ad._current_level < 0
    return plain and bool(dispatch_modes()) and get_proxy_mode() is not None


def functionalizing() -> bool:
    """Whether torch.func.functionalize is active, which refuses Functions."""
    return bool(transforms_active()) and not torch.compiler.is_compiling() and levels("Functionalize") > 0


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
        hide_from_dynamo(backward)
        name = f"fused_ops::{schema.split('(', 1)[0]}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_Guarded())
    return op


class _Guarded:
    """Stands for the library where an autograd formula is registered, and puts ``_refuse_transforms`` before it."""

    ns = _fragment.ns

    @staticmethod
    def impl(name: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        def guarded(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0 or transforms_active():
                _refuse_transforms(name, args)
            return kernel(keyset, *args, **kwargs)

        _fragment.impl(name, guarded, key, **options)


def _refuse_transforms(name: str, args: tuple[Any, ...]) -> None:
    """Raises where PyTorch would drop a tangent without a word, and where it has no rule for a gradient."""
    tensors = [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
    if transforms_active() and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        what = "torch.func cannot differentiate"
    elif forward_grad_enabled() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        what = "forward-mode AD cannot follow"
    else:
        return
    raise NotImplementedError(
        f"{what} fused_ops::{name} of a graph that is made already: use the transform inside of what torch.compile, "
        "torch.export or make_fx is given"
    )


def fx_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of the module as one node, where torch.fx traces one of the arguments; else None.

    An option that is None is left out, as a default.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, fx.Proxy):
            tracer: Any = value.tracer
            if type(tracer).__module__.startswith("torch.ao.quantization"):
                raise RuntimeError(
                    f"{type(module).__name__} of fused_ops cannot be quantised: fused_ops.revert(model) first"
                )
            given = {name: option for name, option in kwargs.items() if option is not None}
            return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)
    return None


_USE_INSTEAD = "use torch.jit.trace or torch.export, or fused_ops.revert(model) first"


def refuse_script(module: nn.Module) -> None:
    """For ``__prepare_scriptable__`` of a module."""
    raise RuntimeError(f"torch.jit.script cannot compile {type(module).__name__} of fused_ops: {_USE_INSTEAD}")


def no_script(function: _F) -> _F:
    """Marks a public function for ``torch.jit.script``, which then says what to do instead."""
    function.__script_unsupported = f"{function.__name__} of fused_ops is not supported: {_USE_INSTEAD}"  # type: ignore[attr-defined]
    return function

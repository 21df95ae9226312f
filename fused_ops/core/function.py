"""FusedFunction: the one base class of the package's autograd Functions."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from fused_ops.core.checks import check_data
from fused_ops.core.torch_private import (
    call_backward_directly,
    dispatch_modes,
    forward_ad,
    hide_from_dynamo,
    is_batched,
    is_fake,
    transforms_active,
)


def autocast_enabled(input: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; meta tensors have none."""
    device = input.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def has_values(t: Tensor) -> bool:
    """Whether values of a tensor of the CPU can be read at once: it is no fake one, no batch, and not traced.

    What traces (make_fx, say) is a dispatch mode, and would take a value that is read for a constant.
    """
    return t.device.type == "cpu" and not (is_fake(t) or is_batched(t) or dispatch_modes())


def is_plain(t: Tensor) -> bool:
    """Whether it is a tensor of values, on any device: no subclass, no fake one, no batch, and not traced."""
    return type(t) is Tensor and not (is_fake(t) or is_batched(t) or dispatch_modes())


def is_one(grad: Tensor) -> bool:
    """Whether it can be read, on the CPU and neither fake nor a batch of gradients nor traced, and is 1."""
    return type(grad) is Tensor and grad.is_cpu and not (is_batched(grad) or dispatch_modes()) and grad.item() == 1


def is_differentiated() -> bool:
    """Whether a backward that runs is to be differentiated: by a graph of its own, a transform or forward-mode AD."""
    return torch.is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves for the backward and, only where tangents flow, for ``jvp``.

    What is kept for ``jvp`` is out of reach of saved-tensor hooks, so it would undo checkpointing and offloading.
    """
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def checked_saved(saved: Sequence[Any], *grads: Tensor | None) -> Sequence[Any]:
    """Saved tensors, once they and the gradients that come in have their data: for formulas in plain PyTorch."""
    check_data("backward", [*(("a saved tensor", t) for t in saved), *(("a gradient", g) for g in grads)])
    return saved


def _of_first_output(function: type[FusedFunction]) -> Callable[..., Any]:
    """``apply`` of a Function of the first output alone; what the others are, it appends to its last argument."""

    def forward(ctx: Any, *args_and_rest: Any) -> Any:
        *args, rest = args_and_rest
        first, *others = outputs = function.forward(*args)
        function.setup_context(ctx, tuple(args), outputs)
        rest += others
        return first

    def backward(ctx: Any, *grads: Any) -> Any:
        return *function.backward(ctx, *grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": function.__module__}
    made = types.new_class(function.__name__, (Function,), exec_body=lambda names: names.update(members))
    call_backward_directly(made)
    apply: Callable[..., Any] = super(Function, made).apply  # type: ignore[misc]
    return apply


class FusedFunction(Function):
    """A ``setup_context``-style Function with a fast ``apply`` and a ``vmap`` rule that is right for any op.

    ``Function.apply`` binds its arguments with ``inspect.signature`` on every call (about 12 us). Calls here are always
    positional and complete, so that step is only taken when a torch.func transform or torch.compile needs it.

    Every output of a Function costs microseconds, differentiable or not. A subclass with
    ``only_first_output`` has one that is differentiable, its first, and in plain eager mode it has no others: they are
    returned beside it, as what they are, results of its forward.
    """

    only_first_output: ClassVar[bool] = False
    _plain_apply: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        hide_from_dynamo(cls.backward)
        if cls.only_first_output:
            cls._plain_apply = staticmethod(_of_first_output(cls))

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Runs the Function on positional arguments."""
        if torch.compiler.is_compiling() or transforms_active():
            return super().apply(*args)
        if not cls.only_first_output or forward_ad._current_level >= 0:
            return super(Function, cls).apply(*args)  # type: ignore[misc]
        rest: list[Any] = []
        return cls._plain_apply(*args, rest), *rest

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Applies the Function to each example in turn and stacks the results.

        Args:
            info: ``batch_size`` and ``randomness``, from torch.func.
            in_dims: The mapped dimension of each argument, or None.
            *args: The Function's arguments.

        Returns:
            The stacked outputs and their mapped dimensions (0).
        """
        examples = [
            cls.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if not examples:
            raise RuntimeError(f"{cls.__name__}: vmap over a dimension of size 0 is not supported")
        if isinstance(examples[0], torch.Tensor):
            return torch.stack(examples), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*examples, strict=True))
        return stacked, (0,) * len(stacked)


# Where Dynamo has given up on what calls it: torch 2.14 then fails inside on a Function's ``super().apply``.
hide_from_dynamo(FusedFunction.apply)

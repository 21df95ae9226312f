"""torch.nn.functional's functions as ours, for code that calls them itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fused_ops.core.torch_private import is_innermost
from fused_ops.ops.batch_norm.api import batch_norm
from fused_ops.ops.cross_entropy.api import cross_entropy
from fused_ops.ops.linear_cross_entropy.api import linear_cross_entropy


def _parameters(function: Callable[..., Any]) -> tuple[int, frozenset[str]]:
    """How many positional arguments, and the names of all."""
    found = inspect.signature(function).parameters
    positional = [p for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(positional), frozenset(found)


# By name: the function, and what it takes, found here as Dynamo cannot follow the question.
_OURS: dict[str, tuple[Callable[..., Any], int, frozenset[str]]] = {
    function.__name__: (function, *_parameters(function))
    for function in (batch_norm, cross_entropy, linear_cross_entropy)
    if hasattr(F, function.__name__)  # torch 2.10 has no linear_cross_entropy
}


Name = Literal["batch_norm", "cross_entropy", "linear_cross_entropy"]


class patch(TorchFunctionMode):
    """Inside ``with fused_ops.patch():`` the functional ops of PyTorch that this package has are this package's.

    It is about the calls that this thread makes inside the block, however the function was imported, and those of
    PyTorch's modules; other threads are not touched, and nothing of ``torch.nn.functional`` is replaced. Leaving the
    block, by an exception too, ends it. Blocks nest: the innermost one that names a function serves it.

    Args:
        *names: Of ``"batch_norm"``, ``"cross_entropy"`` and, where torch has it, ``"linear_cross_entropy"``; all by
            default.

    Raises:
        ValueError: an unknown name.
        RuntimeError: one object entered again while it is active (make a new one), or left before a block inside it.

    Note:
        A call with an argument that this package's function does not have goes to PyTorch. Every torch function that is
        called inside costs about a microsecond more. Activation checkpointing runs the forward again in the backward,
        so the backward belongs inside the block as well.
    """

    def __init__(self, *names: Name) -> None:
        super().__init__()
        unknown = [name for name in names if name not in _OURS]
        if unknown:
            raise ValueError(f"patch: expected names of {sorted(_OURS)}, got {unknown[0]!r}")
        self._serves = {getattr(F, name): _OURS[name] for name in names or _OURS}
        self._active = False

    def __enter__(self) -> Any:
        if self._active:
            raise RuntimeError("patch: this one is active already; for a block inside a block make a new patch()")
        self._active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if not is_innermost(self):  # what would be taken off is not this one
            raise RuntimeError("patch: blocks inside this one must end before it")
        self._active = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self._serves.get(func)
        if found is not None:
            ours, positional, names = found
            if len(args) <= positional and all(name in names for name in kwargs):
                return ours(*args, **kwargs)
        return func(*args, **kwargs)

"""What each cell of the matrix should come to: right, or one of these refusals, each with the reason in a sentence."""

import re
from dataclasses import dataclass

from .cases import Case
from .registry import System


@dataclass(frozen=True)
class Refusal:
    """Cells that end in an error, on purpose. The patterns match whole names."""

    systems: str
    cases: str
    error: type[Exception]
    message: str
    because: str

    def covers(self, system: System, case: Case) -> bool:
        """Whether the cell is one of them."""
        return bool(re.fullmatch(self.systems, system.name) and re.fullmatch(self.cases, repr(case)))


_TRANSFORMS = (
    r"func\.grad|jvp|jvp of jvp|vjp of jvp|jacfwd\(jacfwd\)|hessian|jacrev\(jacfwd\)|jacrev\(jacrev\)"
    r"|functionalize\(grad\)|func\.grad\(compile\)"
)
_COUNTING = (
    r"bn-(BatchNorm1d|BatchNorm2d, relu|BatchNorm3d|SyncBatchNorm of one process|momentum=None|LazyBatchNorm\dd)"
)

REFUSALS = (
    Refusal(
        r"second derivative|batch of gradients, differentiated|vmap|per-sample gradients, vmap\(grad\)|functionalize|"
        rf"{_TRANSFORMS}",
        "ce-inplace_backward",
        RuntimeError,
        "inplace_backward=True",
        "`inplace_backward=True` writes the gradient over the logits, which no transform can follow.",
    ),
    Refusal(
        r"compile, (fullgraph|dynamic|mark_dynamic)|compile under no_grad|compile\(.*|checkpoint in compile",
        "ce-inplace_backward",
        RuntimeError,
        "inplace_backward=True",
        "`inplace_backward=True` is for eager autograd: a graph break without `fullgraph=True`, an error with it.",
    ),
    Refusal(
        r"checkpoint in compile",
        "ce-patch",
        RuntimeError,
        "TorchFunctionModeStack|side effect",
        "`patch()` entered inside a checkpoint that `fullgraph=True` compiles: Dynamo lets no mode begin in one. "
        "Enter it around the call.",
    ),
    Refusal(
        rf"{_TRANSFORMS}|compile\(func\.grad\)",
        _COUNTING,
        RuntimeError,
        "captured Tensor",
        "As PyTorch's module: torch.func may not change the captured `num_batches_tracked`.",
    ),
    Refusal(
        r"jit\.script",
        ".*",
        Exception,
        r"torch\.jit\.trace|torch\.export|torch\.compile",
        "TorchScript compiles no `autograd.Function`; the error names what does: trace, export or compile.",
    ),
)


def refusal(system: System, case: Case) -> Refusal | None:
    """The refusal that is expected of a cell, or None: it is to be right."""
    return next((r for r in REFUSALS if r.covers(system, case)), None)

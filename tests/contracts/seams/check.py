"""The oracle's answers, and how a result is compared with them."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .cases import BATCH, Case


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """What a call gives, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def scalar(result: Any) -> Tensor:
    """One number whose derivatives show those of every output: sum of asinh, which is never flat."""
    return sum(o.double().asinh().sum() for o in outputs_of(result))


def scalar_of(function, case: Case, fixed: dict[str, Tensor], **numbers):
    """The case as a function of its differentiable tensors."""

    def run(*values: Tensor) -> Tensor:
        return scalar(function(**dict(zip(case.diff, values, strict=True)), **fixed, **{**case.options, **numbers}))

    return run


class Answer:
    """The oracle's: outputs, gradients by name, and the statistics after the call."""

    def __init__(self, case: Case, batch: int = BATCH, seed: int = 0, dtype=torch.float64, **numbers: Any) -> None:
        t = case.tensors(batch, seed)
        if dtype is not None:
            t = {n: v.double() if v.is_floating_point() else v for n, v in t.items()}
        for name in case.diff:
            t[name].requires_grad_()
        outputs = outputs_of(case.oracle(**t, **{**case.options, **numbers}))
        self.outputs = [o.detach() for o in outputs]
        self.scalar = scalar(outputs)
        grads = torch.autograd.grad(self.scalar, [t[n] for n in case.diff])
        self.scalar = self.scalar.detach()
        self.grads = dict(zip(case.diff, grads, strict=True))
        self.statistics = {n: t[n].detach() for n in case.mutable}


@cache
def _answer(case: Case, batch: int, seed: int, numbers: tuple) -> Answer:
    return Answer(case, batch, seed, **dict(numbers))


def answer(case: Case, batch: int = BATCH, seed: int = 0, **numbers: Any) -> Answer:
    """Cached; do not change it."""
    return _answer(case, batch, seed, tuple(numbers.items()))


@cache
def hessian(case: Case) -> tuple[tuple[Tensor, ...], ...]:
    """The oracle's second derivatives, by reverse mode alone."""
    t = case.tensors(dtype=torch.float64)
    fixed = {n: v for n, v in t.items() if n not in case.diff}

    def run(*values):
        return scalar_of(case.oracle, case, {n: v.clone() for n, v in fixed.items()})(*values)

    return torch.autograd.functional.hessian(run, tuple(t[n] for n in case.diff))


def directions(case: Case) -> tuple[Tensor, ...]:
    """A fixed vector in the space of the differentiable tensors."""
    found = []
    for n, t in case.tensors().items():
        if n in case.diff:
            steps = torch.arange(1, t.numel() + 1, dtype=torch.float64).view(t.shape)
            found.append(torch.cos(3 * steps).to(t.dtype))
    return tuple(found)


def close(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-8, size: float | None = None) -> None:
    """Raises unless shape and numbers agree, to ``tolerance`` of ``size`` (default: of the largest number)."""
    assert isinstance(got, Tensor), f"{what}: expected a tensor, got {type(got).__name__}"
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}"
    difference = (got.detach().double() - expected.double()).abs().max().item() if got.numel() else 0.0
    if size is None:
        size = expected.double().abs().max().item() if expected.numel() else 0.0
    if not difference <= tolerance * max(size, 1e-2) and not (math.isnan(size) and math.isnan(difference)):
        raise AssertionError(f"{what}: off by {difference:.3g} of {size:.3g}")


def tolerance_of(case: Case) -> float:
    """What rounding may cost."""
    return 3e-2 if case.low_precision else 1e-8


def check(
    case: Case,
    outputs: Any = None,
    grads: Any = None,
    statistics: dict[str, Tensor] | None = None,
    *,
    expected: Answer | None = None,
    tolerance: float | None = None,
) -> None:
    """Compares what is given with the oracle."""
    expected = expected or answer(case)
    tolerance = tolerance_of(case) if tolerance is None else tolerance
    if outputs is not None:
        outputs = outputs_of(outputs)
        assert len(outputs) == len(expected.outputs), f"expected {len(expected.outputs)} outputs, got {len(outputs)}"
        for i, (o, e) in enumerate(zip(outputs, expected.outputs, strict=True)):
            close(o, e, f"output {i}", tolerance)
    if grads is not None:
        grads = grads if isinstance(grads, dict) else dict(zip(case.diff, tree_leaves(grads), strict=True))
        for name, e in expected.grads.items():
            assert grads.get(name) is not None, f"gradient of {name}: none"
            close(grads[name], e, f"gradient of {name}", tolerance)
    for name, value in (statistics or {}).items():
        if name in case.mutable:
            close(value, expected.statistics[name], name, tolerance)


class Call:
    """Fresh tensors of a case, ready to run this package's function."""

    def __init__(self, case: Case, batch: int = BATCH, seed: int = 0, dtype=None, grad: bool = True) -> None:
        self.case, self.tensors = case, case.tensors(batch, seed, dtype)
        if grad:
            for name in case.diff:
                self.tensors[name].requires_grad_()

    @property
    def diff(self) -> tuple[Tensor, ...]:
        """The differentiable tensors."""
        return tuple(self.tensors[n] for n in self.case.diff)

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The others, by name."""
        return {n: t for n, t in self.tensors.items() if n not in self.case.diff}

    @property
    def function(self):
        """The case as a function of its differentiable tensors; captures the others."""
        return scalar_of(self.case.ours, self.case, self.fixed)

    def run(self, **numbers: Any) -> Any:
        """This package's result."""
        return self.case.ours(**self.tensors, **{**self.case.options, **numbers})

    def run_and_check(self, run=None, **how: Any) -> None:
        """Value, gradient and statistics of ``run`` (default: the plain call)."""
        outputs = (run or self.run)()
        grads = torch.autograd.grad(scalar(outputs), self.diff, allow_unused=True)
        check(self.case, outputs, grads, self.tensors, **how)

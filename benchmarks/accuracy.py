"""The error of ours and of eager against the truth: float64, and for float64 itself 50 decimal digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .harness import OURS, TRUTH, AutogradRunner, Inputs, in_float64


@dataclass(frozen=True)
class AccuracyCase:
    """One kind of input in one dtype."""

    op: str
    name: str
    dtype: torch.dtype
    inputs: Inputs
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    exact: Callable[[Inputs], dict[str, list[Any]]]  # quantity -> its values as mpmath numbers; for float64 only
    layout: str = "contiguous"


def ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of ``dtype`` at the float64 value ``truth``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(truth)[1].double() - 1
    return torch.ldexp(torch.tensor(info.eps, dtype=torch.float64), exponent).clamp_min(info.tiny * info.eps)


def errors(found: Tensor, truth: Tensor | list[Any]) -> tuple[float, float]:
    """(largest error in ulp, ||error|| / ||truth||)."""
    values = found.detach().double().flatten()
    if isinstance(truth, list):
        difference = torch.tensor(
            [float(value - exact) for value, exact in zip(values.tolist(), truth, strict=True)], dtype=torch.float64
        )
        exact = torch.tensor([float(t) for t in truth], dtype=torch.float64)
    else:
        exact = truth.flatten()
        difference = values - exact
    worst = float((difference.abs() / ulp(exact, found.dtype)).max())
    return worst, float(difference.norm() / exact.norm())


def measure(case: AccuracyCase) -> Iterator[dict[str, object]]:
    """One row per quantity and provider."""
    if case.dtype == torch.float64:
        from mpmath import mp

        with mp.workdps(50):
            yield from _rows(case, case.exact(case.inputs))
    else:
        yield from _rows(case, AutogradRunner(case.eager, in_float64(case.inputs)).results())


def _rows(case: AccuracyCase, truth: dict[str, Any]) -> Iterator[dict[str, object]]:
    for provider, function in ((TRUTH, case.eager), (OURS, case.ours)):
        for quantity, value in AutogradRunner(function, case.inputs).results().items():
            max_ulp, relative = errors(value, truth[quantity])
            yield {
                "op": case.op,
                "case": case.name,
                "layout": case.layout,
                "dtype": str(case.dtype).removeprefix("torch."),
                "quantity": quantity,
                "provider": provider,
                "max_ulp": float(f"{max_ulp:.4g}"),
                "relative_error": float(f"{relative:.4g}"),
            }

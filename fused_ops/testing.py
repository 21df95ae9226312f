"""Tools to prove gradients right: the comparison table, the error rule, and the three checks of an op."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientRow:
    """How one gradient compares with its reference."""

    name: str
    exact: bool  # equal in every bit that counts (torch.equal)
    approximate: bool  # torch.allclose
    max_difference: float  # max |ours - reference|
    relative_error: float  # ||ours - reference|| / ||reference||; NaN where the reference is all zeros
    near_zero: bool  # the reference is ~0: allclose would pass zeros here, so the row proves little


@dataclass(frozen=True)
class GradientComparison:
    """The rows of a comparison, in the order given; ``str()`` is the table."""

    rows: tuple[GradientRow, ...]

    @property
    def exact(self) -> int:
        """Number of rows that are exact."""
        return sum(row.exact for row in self.rows)

    @property
    def approximate(self) -> int:
        """Number of rows that are approximately equal."""
        return sum(row.approximate for row in self.rows)

    def __str__(self) -> str:
        width = max([len("gradient"), *(len(row.name) for row in self.rows)])
        lines = [f"{'gradient':<{width}} | exact | approximate | maxdiff   | relative  |"]
        for row in self.rows:
            cells = (
                f"{row.exact!s:<5} | {row.approximate!s:<11} | {row.max_difference:<9.3e} | {row.relative_error:<9.2e}"
            )
            lines.append(f"{row.name:<{width}} | {cells} | {'true gradient ~0' if row.near_zero else ''}".rstrip())
        lines.append(f"{len(self.rows)} gradients: {self.exact} exact, {self.approximate} approximate")
        return "\n".join(lines)


def compare_gradients(
    gradients: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    zero_atol: float = 1e-7,
    file: IO[str] | None = None,
    quiet: bool = False,
) -> GradientComparison:
    """Compares gradients with their references, prints one aligned table and returns it as data.

    Args:
        gradients: Name to (ours, reference); both of one shape.
        rtol: Relative tolerance of ``approximate``, as in ``torch.allclose``.
        atol: Absolute tolerance of ``approximate``, as in ``torch.allclose``.
        zero_atol: A reference with no entry above this is marked as ~0.
        file: Where the table is printed; standard output by default.
        quiet: Print nothing.

    Returns:
        One row per gradient.

    Raises:
        ValueError: two tensors of a pair differ in shape (nothing is broadcast).
        TypeError: an entry is not a pair of tensors.
    """
    rows = []
    for name, pair in gradients.items():
        if len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            raise TypeError(f"gradients[{name!r}]: expected a pair of tensors (ours, reference), got {pair!r}")
        rows.append(_compare(name, pair[0].detach(), pair[1].detach(), rtol, atol, zero_atol))
    comparison = GradientComparison(tuple(rows))
    if not quiet:
        print(comparison, file=file or sys.stdout)
    return comparison


def _compare(name: str, ours: Tensor, reference: Tensor, rtol: float, atol: float, zero_atol: float) -> GradientRow:
    if ours.shape != reference.shape:
        raise ValueError(
            f"gradients[{name!r}]: expected the reference's shape {list(reference.shape)}, got {list(ours.shape)}"
        )
    a, b = ours.double(), reference.double()
    difference = (a - b).abs()
    norm = float(b.norm())
    return GradientRow(
        name=name,
        exact=torch.equal(ours, reference),
        approximate=torch.allclose(a, b, rtol=rtol, atol=atol),
        max_difference=float(difference.max()) if difference.numel() else 0.0,
        relative_error=float((a - b).norm()) / norm if norm else float("nan"),
        near_zero=not bool((b.abs() > zero_atol).any()) and not bool(b.isnan().any()),
    )

"""Tools to prove gradients right: the comparison table, the error rule, and the three checks of an op."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
import fused_ops.ops
from fused_ops.core.graph import implementations
from fused_ops.core.memory_format import wide
from fused_ops.core.sample import Sample
from fused_ops.core.torch_private import tree_flatten, tree_map, tree_unflatten


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
    a, b = wide(ours), wide(reference)
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


def assert_no_worse_than(
    ours: Tensor, eager: Tensor, truth: Tensor, name: str = "result", eager_error: float = 0.0
) -> None:
    """Asserts the package's error rule: no further from the truth than PyTorch's eager op, plus one rounding.

    Args:
        ours: The result to judge.
        eager: What PyTorch's own op of the same dtype gives.
        truth: The float64 result on the same inputs (for float64 results one of higher precision, rounded to float64).
        name: What to call the result in a message.
        eager_error: The largest error of PyTorch's op where it was measured on more than ``eager``, such as other
            layouts of the same values: that of one small tensor is a matter of luck.

    Raises:
        AssertionError: wrong shape or dtype, a NaN or infinity where the truth has none (or the other way round), or
            an error beyond what the rule allows.
    """
    if ours.shape != truth.shape or ours.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: expected shape {list(truth.shape)} and {eager.dtype}, got {list(ours.shape)} and {ours.dtype}"
        )
    rounded = truth.to(ours.dtype).double()  # overflow to infinity is the right answer where the dtype ends
    finite = rounded.isfinite()
    if not torch.equal(ours.double()[~finite].nan_to_num(7.0), rounded[~finite].nan_to_num(7.0)):
        raise AssertionError(f"{name}: expected the truth's NaNs and infinities, got others")
    error = (ours.double() - truth).abs()[finite]
    allowed = (eager.double() - truth).abs()[finite].nan_to_num(0.0, 0.0)
    budget = (
        max(eager_error, float(allowed.max()) if allowed.numel() else 0.0)
        + torch.finfo(ours.dtype).eps * truth.abs()[finite]
    )
    if not bool((error <= budget).all()):
        worst = float((error - budget).max())
        raise AssertionError(f"{name}: further from the truth than eager plus one rounding, by {worst:.3e}")


CHECKS = ("gradcheck", "forward AD", "gradgradcheck", "opcheck")
# Fresh memory, with nothing in it to compare; a number that depends on the data. Neither is ever traced.
_NO_VALUES = {"fused_ops::linear_cross_entropy_buffer", "fused_ops::cross_entropy_with_gradient"}
_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@dataclass(frozen=True)
class CheckResult:
    """How one sample of one op fared in each of CHECKS: "passed", "failed" or "not run"."""

    op: str
    sample: str
    outcomes: dict[str, str]
    details: tuple[str, ...]  # one line per failure

    @property
    def failed(self) -> bool:
        """Whether any of the checks failed."""
        return "failed" in self.outcomes.values()


class _RecordRawOps(TorchDispatchMode):
    """Keeps the arguments of every call of a raw op of this package, those inside of its other ops included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_ops":
            self.calls.append((func, args, kwargs or {}))
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the op; of one that calls raw ops, what it does, in sight of this mode."""
        inside = implementations.get(func)
        if inside is None:
            return func(*args, **kwargs)
        with self, torch.no_grad():
            return inside(*args, **kwargs)


def check_op(function: Callable[..., Any], samples: Iterable[Sample], op: str | None = None) -> list[CheckResult]:
    """Runs gradcheck, forward-mode AD, gradgradcheck and opcheck on every sample.

    Args:
        function: The public function of the op.
        samples: Calls of it in float64; their tensors that require grad are the ones to check.
        op: What to call it; the function's name by default.

    Returns:
        One result a sample. opcheck runs on the raw ops that the sample's forward and backward call; it is "not run"
        where its own requirements (expecttest, numpy) are not installed.
    """
    return [_check_sample(op or function.__name__, function, sample) for sample in samples]


def op_names() -> list[str]:
    """The ops of the package: each has a folder of its name."""
    return sorted(m.name for m in pkgutil.iter_modules(fused_ops.ops.__path__) if m.ispkg)


def samples_of(op: str) -> list[Sample]:
    """Small float64 calls of an op of the package, over its options."""
    folder = f"fused_ops.ops.{op}"
    name = "samples" if importlib.util.find_spec(f"{folder}.samples") else "reference"
    found: list[Sample] = importlib.import_module(f"{folder}.{name}").samples()
    return found


def check_all() -> list[CheckResult]:
    """``check_op`` for every op of the package, on its samples."""
    results = []
    for op in op_names():
        results += check_op(getattr(fused_ops, op), samples_of(op), op)
    return results


def _check_sample(op: str, function: Callable[..., Any], sample: Sample) -> CheckResult:
    leaves, spec = tree_flatten((sample.args, sample.kwargs))
    checked = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    inputs = tuple(leaves[i] for i in checked)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, tensor in zip(checked, tensors, strict=True):
            values[i] = tensor
        args, kwargs = tree_unflatten(values, spec)
        outputs = tree_flatten(function(*args, **kwargs))[0]
        return tuple(o for o in outputs if isinstance(o, Tensor) and (o.requires_grad or not tensors[0].requires_grad))

    checks: dict[str, Callable[[], bool | None]] = {
        "gradcheck": lambda: gradcheck(call, inputs),
        "forward AD": lambda: gradcheck(call, inputs, check_forward_ad=True, check_backward_ad=False),
        "gradgradcheck": lambda: gradgradcheck(call, inputs),
        "opcheck": lambda: _opcheck(call, inputs),
    }
    outcomes, details = {}, []
    for name, run in checks.items():
        try:
            passed = run()
        except Exception as error:  # whatever a check raises is its verdict
            passed = False
            first_line = str(error).strip().partition("\n")[0]
            details.append(f"{name}: {type(error).__name__}: {first_line}")
        outcomes[name] = "not run" if passed is None else "passed" if passed else "failed"
    return CheckResult(op, sample.name, outcomes, tuple(details))


@contextlib.contextmanager
def _as_if_compiling() -> Iterator[None]:
    """Calls take the ops that the graphs of torch.compile hold."""
    with (
        patch("torch.compiler.is_compiling", lambda: True),
        patch("fused_ops.ops.batch_norm.arguments.is_compiling", lambda: True),  # its own name for it: a lookup less
    ):
        yield


def _opcheck(call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> bool | None:
    """opcheck of every raw op that the forward and the backward call; None if opcheck cannot run here."""
    if any(importlib.util.find_spec(name) is None for name in ("expecttest", "numpy")):
        return None
    recorder = _RecordRawOps()
    for compiling in (contextlib.nullcontext, _as_if_compiling):
        with recorder, compiling():
            outputs = [output for output in call(*inputs) if output.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs], allow_unused=True)
    if not recorder.calls:
        raise AssertionError("expected the function to call a raw op of the package, it called none")
    for func, args, kwargs in recorder.calls:
        detached = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        compared = () if func.name() in _NO_VALUES else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(func, *detached, test_utils=(*_OPCHECKS, *compared))
    return True

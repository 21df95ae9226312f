"""PyTorch's samples under AOT autograd with symbolic sizes, and the raw ops they call under opcheck's symbolic test.

The first is what ``torch.testing._internal.optests`` runs on every OpInfo of PyTorch: eager against a graph traced with
symbolic shapes, outputs and gradients.
"""

import pytest
import torch
from opinfo_cases import FAMILIES, chosen
from torch.testing._internal.optests import aot_autograd_check
from torch.utils._pytree import tree_map

from fused_ops.testing import _NO_VALUES, _RecordRawOps


@pytest.fixture
def _no_input_is_changed():
    """Instead of the fixture of that name: without wrappers around the raw ops that a tracer sees."""


def _detached(case):
    def one(t):
        return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t

    return tree_map(one, (case.args, case.kwargs))


def _samples(check, at_most):
    """The samples with values: PyTorch's own check divides an empty gradient by its norm."""
    for family in FAMILIES:
        for case in chosen(family, torch.float64, check, at_most):
            if case.inputs and all(t.numel() for t in case.inputs):
                yield pytest.param(case, id=case.name)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("case", list(_samples("aot", 3)))
def test_aot_autograd(case, dynamic):
    args, kwargs = _detached(case)
    aot_autograd_check(case.ours, args, kwargs, dynamic=dynamic, check_gradients=True)


@pytest.mark.parametrize("case", list(_samples("opcheck", 3)))
def test_symbolic_shapes_of_the_raw_ops(case):
    with _RecordRawOps() as recorder:
        outputs = case.call(case.ours, *(t.detach().clone().requires_grad_() for t in case.inputs))
        if outputs.requires_grad:
            outputs.sum().backward()
    assert recorder.calls
    for op, args, kwargs in recorder.calls:
        if op.name() in _NO_VALUES:
            continue
        given = tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, (args, kwargs))
        torch.library.opcheck(op, *given, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))

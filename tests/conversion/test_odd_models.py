"""``convert`` and the backend change nothing of what odd models do: the corpus of ``odd_models``, case by case."""

import pytest
import torch
from odd_models import CASES, MODES, Difference, check
from odd_models.case import Case, images
from odd_models.check import activations_run, build
from opinfo_cases import FULL
from torch import nn

import fused_ops
from fused_ops.core import library

GRID = [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in MODES if mode in case.modes]


def unless_slow(at_once, slow=lambda case, mode: True):
    """The grid, or what of it is done at once and, marked so, slowly."""
    return [
        pytest.param(*p.values, id=p.id, marks=() if at_once(*p.values) else pytest.mark.slow)
        for p in GRID
        if at_once(*p.values) or slow(*p.values)
    ]


def convert(model):
    fused_ops.convert(model)
    return model


convert.in_place = True  # a copy of a converted model needs no second conversion


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="fused_ops")


def compiled_alone(model):
    """What Dynamo does by itself."""
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


pytestmark = pytest.mark.usefixtures("graphs_of_any_size")


def test_there_are_cases_of_every_kind():
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)


def shows_most(case, mode):
    """float64, and of every second case one of the other modes in turn."""
    others, place = [m for m in case.modes if m != "float64"], CASES.index(case)
    return mode == "float64" or (place % 2 == 0 and mode == others[place // 2 % len(others)])


@pytest.mark.parametrize(("case", "mode"), unless_slow(shows_most))
def test_convert(case, mode):
    check(case, convert, mode)


@pytest.mark.parametrize("transform", [convert, compiled])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.fuses is not None])
def test_fuses(case, transform):
    """Counted by the activations that PyTorch still runs."""
    if any(what == "plain PyTorch" for _, kind, what, _ in library.backends() if kind == "cpu"):
        pytest.skip("without the library the fused op is PyTorch's own ops")
    if transform is compiled and case.name == "InactiveDropoutBetween":
        pytest.skip("a dropout of nothing is a node of the graph")
    model = build(case, double=False)
    before = activations_run(model, case)
    call = transform(model)
    activations_run(call, case)  # compiles
    assert before - activations_run(call, case) == case.fuses


def at_once(case, mode):
    """Of the backend, which compiles: where rewriting a graph can go wrong, in the mode that shows most."""
    return mode == "float64" and case.build.__module__.endswith((".writes", ".batch_statistics"))


@pytest.mark.parametrize(("case", "mode"), unless_slow(at_once, lambda *p: FULL or shows_most(*p)))
def test_backend(case, mode):
    check(case, compiled, mode, reference=compiled_alone)


# --- The check itself: it must notice what it is there for -------------------------------------------------------


def changed(change):
    """A transform that changes the output of the model."""

    def transform(model):
        return lambda *args: change(model(*args))

    return transform


def frozen_statistics(model):
    model.bn.momentum = 0.0
    return model


WRONG = {
    "values": changed(lambda y: y * 1.001),
    "types": changed(lambda y: [y]),
    "strides": changed(lambda y: y.contiguous(memory_format=torch.channels_last)),
    "detached": changed(lambda y: y.detach()),
    "error": changed(lambda y: 1 / 0),
    "gradients": changed(lambda y: y + (y - y.detach())),
    "random numbers": changed(lambda y: torch.rand(1) * 0 + y),
    "printed": changed(lambda y: print("here") or y),
    "statistics": frozen_statistics,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_check_notices(wrong, mode):
    case = Case("Block", Block, lambda: images(4, 3, 4))
    check(case, lambda model: model, mode)
    if (wrong is WRONG["values"] and mode == "bf16") or (wrong is frozen_statistics and mode == "eval"):
        wrong = changed(lambda y: y * 1.2)
    with pytest.raises(Difference):
        check(case, wrong, mode)

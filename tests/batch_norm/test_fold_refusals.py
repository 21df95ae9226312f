"""What fold leaves alone, and that it says why: each of these was folded into something else, or crashed."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import fused_ops


class Pair(nn.Module):
    """A convolution and its batch norm, and what a forward may read of them besides."""

    def __init__(self, more=None):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        nn.init.uniform_(self.bn.weight, 0.5, 2.0)
        self.bn.running_mean.uniform_(), self.bn.running_var.uniform_(0.5, 2.0)
        self.more = more

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.more is None else y + self.more(self, x)


class Tied(Pair):
    """An autoencoder's decoder with the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.back = nn.Conv1d(2, 2, 1, bias=False)
        self.back.weight = self.conv.weight

    def forward(self, x):
        return self.back(self.bn(self.conv(x)))


READ_TWICE = {
    "tied": Tied,
    "weight in forward": lambda: Pair(lambda self, x: F.conv1d(x, self.conv.weight)),
    "scale in forward": lambda: Pair(lambda self, x: self.bn.weight.abs().sum()),
    "statistics in forward": lambda: Pair(lambda self, x: self.bn.running_mean.sum()),
}


@pytest.mark.parametrize("name", READ_TWICE)
def test_what_has_another_reader_stays(name):
    model, x = READ_TWICE[name]().eval(), torch.randn(3, 2, 5)
    with pytest.warns(UserWarning, match=r"bn stays behind conv: the \w+ of its \w+ has another reader"):
        folded = fused_ops.fold(model)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)
    assert any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())


def hooked(pair):
    pair.conv.register_forward_hook(lambda module, args, output: output * 2)


def patched(pair):
    pair.bn.forward = lambda x: x * 3


def pruned(pair):
    prune.random_unstructured(pair.conv, "weight", 0.5)


class Scaled(nn.Conv1d):
    def forward(self, x):
        return super().forward(x) * 2


def subclass(pair):
    pair.conv.__class__ = Scaled


CHANGED = {
    "hook": (hooked, "has hooks"),
    "forward": (patched, "a forward set on the instance"),
    "weight_norm": (lambda pair: weight_norm(pair.conv), "hooks"),
    "parametrized": (lambda pair: parametrizations.weight_norm(pair.conv), "parametrized"),
    "batch norm parametrized": (
        lambda pair: parametrize.register_parametrization(pair.bn, "weight", nn.Softplus()),
        "parametrized",
    ),
    "pruned": (pruned, "hooks"),
    "subclass": (subclass, "Scaled is a subclass with a forward of its own"),
    "buffer": (lambda pair: (pair.bn.__delattr__("weight"), pair.bn.register_buffer("weight", torch.ones(2))), "plain"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGED)
def test_what_is_not_what_it_seems_stays(name):
    change, reason = CHANGED[name]
    model, x = Pair(), torch.randn(3, 2, 5)
    change(model)
    model.eval()
    with pytest.raises(ValueError, match=f"fold: cannot fold: .*{reason}"):
        fused_ops.fold(model.conv, model.bn)
    if name in ("weight_norm", "pruned"):  # which nobody can copy
        with pytest.raises(ValueError, match="fold: cannot copy the model: a weight that is computed"):
            fused_ops.fold(model)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folded = fused_ops.fold(model)
    if name != "subclass":  # into which torch.fx looks, and finds no layer
        assert any(str(w.message).startswith("fold: bn stays behind conv:") and reason in str(w.message) for w in said)
    torch.testing.assert_close(folded(x), model(x))


def test_hooks_around_modules_that_tracing_looks_into():
    model = nn.Sequential(Pair()).eval()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match=r"fold: 0 \(Pair\) has hooks"):
        fused_ops.fold(model)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.SiLU())
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(self.conv(self.body(x)))
        y += x
        return self.relu(y)


def test_converted_models_are_folded_wholly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(), Block()).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for _ in range(3):
        model(x * 3 + 1)
    model.eval()
    expected = model(x)
    fused_ops.convert(model)
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fused_ops.fold(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))

"""Forwards that ask what they were given, decide by it, draw lots, call themselves, or are called in unusual ways."""

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odd_models.case import Net, case, images


@case
class IsTensor(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if torch.is_tensor(y) else y


@case(inputs=lambda: ([images()[0], images()[0]],))
class TensorOrList(Net):
    def forward(self, x):
        y = torch.cat(x) if isinstance(x, list) else x
        return self.relu(self.bn(self.stem(y)))


def _first(value):
    """A helper far from the model."""
    return value if isinstance(value, Tensor) else value[0]


@case(inputs=lambda: ((images()[0], 3),))
class InstanceAskedInAHelper(Net):
    def forward(self, x):
        return self.relu(self.bn(self.stem(_first(x)))) * x[1]


@case
class ClassOfTheTensor(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if y.__class__ is Tensor and type(y).__name__ == "Tensor" else -y


@case
class Matches(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        match y:
            case Tensor():
                return self.relu(y)
            case _:
                return y


@case
class MatchesTheShape(Net):
    def forward(self, x):
        match tuple(x.shape):
            case (4, _, h, w) if h == w:
                return self.relu(self.bn(self.stem(x)))
            case _:
                return self.bn(self.stem(x))


@functools.singledispatch
def _activate(value):
    raise TypeError(type(value))


@_activate.register
def _(value: Tensor):
    return F.relu(value)


@case
class SingleDispatch(Net):
    def forward(self, x):
        return _activate(self.bn(self.stem(x)))


@case
class HasAttribute(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if hasattr(y, "new_zeros") and getattr(y, "grad_fn", None) is not None else torch.tanh(y)


@case
class AsksForDtypes(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y.to(x.dtype)) if y.dtype != x.dtype else F.leaky_relu(y)


@case
class AsksForItsNorm(Net):
    def forward(self, x):
        y = self.stem(x)
        for module in (self.bn, self.bn2):
            y = module(y) if isinstance(module, nn.BatchNorm2d) else y
        return self.relu(y) if isinstance(self.relu, nn.ReLU) else y


@case
class DecidesByValues(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if y.sum() > 0 else self.relu(-y)


@case
class LoopsByValues(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        for _ in range(5):
            if y.abs().max() < 0.5:
                break
            y = y * 0.5
        return y


@case
class LoopsByShape(Net):
    def forward(self, x):
        y = self.stem(x)
        outs = [self.relu(self.bn(y[:, :, i : i + 2])) for i in range(0, y.shape[2] - 1, 2)]
        return torch.cat(outs, 2)


@case
class TriesAndExcepts(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        try:
            return self.relu(y.view(3, 7))
        except RuntimeError:
            return torch.tanh(y)


@case
class Asserts(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        assert y.dim() == 4 and y.shape[1] == 4, y.shape
        return self.relu(y)


@case(inputs=lambda: images(3))
class RaisesAfterTheNorm(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        if x.shape[0] == 3:
            raise KeyError("a batch of three")
        return y


class _Own(ValueError):
    pass


@case
class RaisesItsOwnEveryOtherTime(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.bn(self.stem(x))
        if self.calls % 2 == 0:
            raise _Own("even")
        return self.relu(y)


@case
class NamesFromStrings(Net):
    def forward(self, x):
        y = self.stem(x)
        for i in ("", "2"):
            y = getattr(self, f"bn{i}")(y)
        return getattr(F, "relu")(y)  # noqa: B009


@case
class WalksItsChildren(Net):
    def forward(self, x):
        for name, child in self.named_children():
            x = child(x) if name != "relu" else self.relu(x)
        return x


@case
class Recursive(Net):
    def forward(self, x, depth=0):
        y = self.relu(self.bn(self.stem(x) if depth == 0 else self.conv2(x)))
        return y if depth == 2 else self.forward(y, depth + 1)


@case
class RecursiveThroughCall(Net):
    def forward(self, x, depth=0):
        y = self.relu(self.bn2(self.conv2(self.stem(x) if depth == 0 else x)))
        return y if depth == 1 else self(y, depth + 1)


@case
class Tree(nn.Module):
    """Modules of its own class below it."""

    def __init__(self, depth=2):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()
        self.below = Tree(depth - 1) if depth else None

    def forward(self, x):
        y = self.relu(self.bn(x))
        return y + self.below(y) if self.below is not None else y


@case(inputs=lambda: {"pixels": images()[0]})
class KeywordsOnly(Net):
    def forward(self, *, pixels, scale=2.0):
        return self.relu(self.bn(self.stem(pixels))) * scale


@case(inputs=lambda: {"x": images()[0], "extra": torch.ones(4, 1, 1), "name": "odd"})
class AnyKeywords(Net):
    def forward(self, *args, **kwargs):
        y = self.relu(self.bn(self.stem(kwargs["x"])) + kwargs["extra"])
        return {name: y for name in kwargs if name != "x"}


@case
class PositionalOnly(Net):
    def forward(self, x, /, mask=None):
        y = self.bn(self.stem(x))
        return self.relu(y if mask is None else y * mask)


@case(inputs=lambda: (images()[0], None, ["a", {"shift": torch.randn(4, 1, 1)}]))
class NestedArguments(Net):
    def forward(self, x, nothing, nested):
        assert nothing is None
        return self.relu(self.bn(self.stem(x)) + nested[1]["shift"])


@case
class MutableDefault(Net):
    def forward(self, x, calls=[]):  # noqa: B006
        y = self.relu(self.bn(self.stem(x)))
        calls.append(1)
        out = y * len(calls)
        calls.clear()
        return out


@case
class LocalFunctions(Net):
    def forward(self, x):
        def block(conv, bn):
            return lambda value: self.relu(bn(conv(value)))

        steps = [block(self.conv, self.bn), functools.partial(block(self.conv2, self.bn2))]
        return functools.reduce(lambda value, step: step(value), steps, x)


@case
class NumpyStochasticDepth(Net):
    def forward(self, x):
        y = self.stem(x)
        if self.training and np.random.rand() < 0.5:
            return y
        return self.relu(self.bn2(self.conv2(y)) + y)


@case
class RandomStochasticDepth(Net):
    def __init__(self):
        super().__init__()
        self.dropped = []

    def forward(self, x):
        y = self.stem(x)
        for _ in range(3):
            drop = self.training and random.random() < 0.5
            self.dropped.append(drop)
            y = y if drop else self.relu(self.bn2(self.conv2(y)) + y)
        return y


@case
class TorchStochasticDepth(Net):
    """timm's DropPath: each sample's branch is dropped by lot."""

    def forward(self, x):
        y = self.stem(x)
        branch = self.bn2(self.conv2(y))
        if self.training:
            branch = branch * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.5)).to(branch.dtype) / 0.5
        return self.relu(branch + y)


@case
class DropoutBetween(Net):
    def forward(self, x):
        return self.relu(F.dropout(self.bn(self.stem(x)), 0.3, self.training))


@case
class NoiseBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y + torch.randn_like(y) * 0.1)


@case
class FunctionalActivations(Net):
    def forward(self, x):
        y = self.stem(x)
        functions = (F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.elu, F.leaky_relu, F.softplus, torch.tanh)
        return [function(self.bn(y)) for function in functions]


@case
class ActivationsWithArguments(Net):
    def forward(self, x):
        y = self.stem(x)
        return (
            F.leaky_relu(self.bn(y), 0.3), F.leaky_relu(self.bn(y), negative_slope=-0.2), F.elu(self.bn(y), 0.5),
            F.gelu(self.bn(y), approximate="tanh"), F.hardtanh(self.bn(y), -0.5, 2.0), torch.clamp(self.bn(y), min=0),
            self.bn(y).clamp_min(0), F.threshold(self.bn(y), 0.1, 0.2), torch.maximum(self.bn(y), torch.zeros_like(y)),
        )  # fmt: skip


@case
class ActivationFromADict(Net):
    functions = {"relu": F.relu, "swish": lambda x: x * torch.sigmoid(x)}  # noqa: RUF012

    def __init__(self):
        super().__init__(activation=nn.Identity())
        self.act = "relu"

    def forward(self, x):
        y = self.functions[self.act](self.bn(self.stem(x)))
        return self.functions["swish"](self.bn2(self.conv2(y)))


@case
class ActivationAsAttribute(Net):
    def __init__(self):
        super().__init__(activation=nn.Identity())
        self.act = torch.relu

    def forward(self, x):
        return self.act(self.bn(self.stem(x)))


class _Registry:
    known = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if kwargs or not cls.__name__.startswith(("Registered", "_")):
            raise TypeError(f"who made {cls.__name__}?")
        _Registry.known.append(cls.__name__)


@case
class RegisteredByInitSubclass(Net, _Registry):
    def forward(self, x):
        return self.relu(self.bn(self.stem(x)))


class _Meta(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.made_by = "meta"
        return made


@case
class OwnMetaclass(Net, metaclass=_Meta):
    def forward(self, x):
        return self.relu(self.bn(self.stem(x)))


@case
@dataclass(eq=False)
class ModuleAsDataclass(nn.Module):
    width: int = 3

    def __post_init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(self.width), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))


class _Mixin:
    def forward(self, x):
        return super().forward(x) * 2


class _Base(Net):
    def forward(self, x):
        return self.relu(self.bn(self.stem(x)))


@case
class CallsSuper(_Mixin, _Base):
    pass


@case
class ForwardByAnotherName(Net):
    def _forward_impl(self, x):
        return self.relu(self.bn(self.stem(x)))

    forward = _forward_impl


def _logged(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        self.log.append(len(args))
        return forward(self, *args, **kwargs)

    return wrapper


@case
class DecoratedForward(Net):
    def __init__(self):
        super().__init__()
        self.log = []

    @_logged
    def forward(self, x):
        return self.relu(self.bn(self.stem(x)))


@case
class ForwardSetOnTheInstance(Net):
    def __init__(self):
        super().__init__()
        self.forward = functools.partial(self.other, shift=1.0)

    def other(self, x, shift):
        return self.relu(self.bn(self.stem(x)) + shift)


@case
class NormsForwardSetOnTheInstance(_Base):
    def __init__(self):
        super().__init__()
        self.bn.forward = lambda x: nn.BatchNorm2d.forward(self.bn, x) * 2


@case
class ActivationsForwardSetOnTheInstance(_Base):
    def __init__(self):
        super().__init__()
        self.relu.forward = lambda x: F.relu(x) + 1


@case
class OwnCall(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return super().__call__(x * 2)

    def forward(self, x):
        return self.relu(self.bn(self.stem(x)))


@case
class OwnGetattr(Net):
    """Attributes of a part, reached through the whole."""

    def __getattr__(self, name):
        if name == "normalise":
            return self.bn
        return super().__getattr__(name)

    def forward(self, x):
        return self.relu(self.normalise(self.stem(x)))


@case
class Properties(Net):
    @property
    def normalised(self):
        return lambda value: self.bn(value)

    @staticmethod
    def scaled(value):
        return value * 0.5

    @classmethod
    def shifted(cls, value):
        return value + 0.5

    def forward(self, x):
        return self.relu(self.shifted(self.scaled(self.normalised(self.stem(x)))))


@case
class CallsForwardOfItsParts(Net):
    """Past the hooks."""

    def forward(self, x):
        return self.relu.forward(self.bn.forward(self.conv.forward(x)))


@case
class UnboundForward(Net):
    def forward(self, x):
        return nn.ReLU.forward(self.relu, nn.BatchNorm2d.forward(self.bn, self.stem(x)))


@case
class GoesBackToNumpy(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        mean = float(np.asarray(y.detach().double().tolist()).mean())
        return y - mean


@case
class TensorSubclass(Net):
    def forward(self, x):
        y = self.bn(self.stem(x).as_subclass(_Tagged))
        return self.relu(y)


class _Tagged(Tensor):
    pass


@case
class ReturnsItsInput(Net):
    def forward(self, x):
        self.bn(self.stem(x))
        return x


@case
class ReturnsNothing(Net):
    def forward(self, x):
        self.bn(self.stem(x))


@case
class LargerInEvaluation(Net):
    """Another path and another type when it does not train, as detection models have."""

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        return {"loss": y.square().mean()} if self.training else [{"scores": s} for s in y.mean((1, 2, 3))]


@case
class EarlyExit(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        if not self.training and float(y.mean()) > 0:
            return y.mean((2, 3))
        return self.relu(self.bn2(self.conv2(y))).mean((2, 3))


@case(inputs=lambda: (images()[0], 3))
class NumberAsArgument(Net):
    def forward(self, x, times):
        y = self.stem(x)
        for _ in range(times):
            y = self.relu(self.bn2(self.conv2(y)) + y)
        return y

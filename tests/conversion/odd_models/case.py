"""What a case is, the list of them, and the small network that most of them are variations of."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

MODES = ("train", "eval", "bf16", "float64")


def images(batch=4, channels=3, size=5):
    """Arguments of a model: one batch of images."""
    return (torch.randn(batch, channels, size, size),)


@dataclass(frozen=True)
class Case:
    """One odd model.

    Attributes:
        name: The name of what builds it.
        build: Makes the model; called under a fixed seed, once for each copy that is needed.
        inputs: Makes the arguments of one call: a tuple, or a dict of keyword arguments.
        after: What is done to the model after one step with it; may return another model to go on with.
        around: A context manager of the model around all of it, the conversion included.
        effects: What to compare of the model besides its buffers and its python attributes.
        fuses: How many of its activations ``convert`` does together with a batch norm; None where that is left open.
        rounds: The coarsest dtype that the model itself rounds to in a run that is otherwise in float64.
        spared: PyTorch's ops may raise in their backward for what ours have no need of; compared until then.
        modes: Those that it has a meaning in.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple | dict] = images
    after: Callable[[nn.Module], nn.Module | None] | None = None
    around: Callable[[nn.Module], contextlib.AbstractContextManager] = contextlib.nullcontext
    effects: Callable[[nn.Module], object] | None = None
    fuses: int | None = None
    rounds: torch.dtype | None = None
    spared: bool = False
    modes: tuple[str, ...] = MODES


CASES: list[Case] = []


def case(build=None, **options):
    """Registers the class or function below as the builder of a case."""

    def register(build):
        assert all(build.__name__ != other.name for other in CASES), build.__name__
        CASES.append(Case(build.__name__, build, **options))
        return build

    return register if build is None else register(build)


class Net(nn.Module):
    """Convolution, batch norm and ReLU, a second pair of the first two, for the forwards of the cases to use."""

    def __init__(self, norm=nn.BatchNorm2d, activation=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = norm(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = norm(4)
        self.relu = nn.ReLU() if activation is None else activation

    def stem(self, x):
        """Something differentiable to normalise."""
        return self.conv(x)


class Sequence(nn.Module):
    """A model whose work is in one ``nn.Sequential``: ``self.net``."""

    def __init__(self, *modules):
        super().__init__()
        self.net = nn.Sequential(*(modules or layers()))

    def forward(self, x):
        return self.net(x)


def layers(activation=None):
    """Two triples of convolution, batch norm and activation."""
    first, second = activation or nn.ReLU(), activation or nn.ReLU()
    return [
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), first,
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), second,
    ]  # fmt: skip

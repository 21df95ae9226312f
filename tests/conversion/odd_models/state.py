"""Forwards with a memory: buffers, parameters and python attributes that they read and write."""

import torch
import torch.nn.functional as F
from torch import nn

from odd_models.case import Net, case


@case
class BufferAddedTo(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.relu(self.bn(self.stem(x))) * self.steps


@case
class BufferReplaced(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.steps = self.steps + 1
        return self.relu(self.bn(self.stem(x))) / self.steps


@case
class MovingAverageOfFeatures(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(4, 1, 1))

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        if self.training:
            self.center.mul_(0.9).add_(y.detach().mean((0, 2, 3)).view(4, 1, 1), alpha=0.1)
        return y - self.center


@case
class Counter(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn(self.stem(x)))


@case
class CounterChoosesThePath(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.bn(self.stem(x))
        return self.relu(y) if self.calls % 2 else torch.tanh(y)


@case
class ListOfFeatures(Net):
    """What it keeps in the list is read by others after the forward."""

    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x):
        y = self.bn(self.stem(x))
        self.features = [y.detach(), self.relu(y).detach()]
        return self.relu(y)


@case
class ListOfShapes(Net):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x):
        self.shapes.append(x.shape)
        return self.relu(self.bn(self.stem(x)))


@case
class DictOfFeatures(Net):
    def __init__(self):
        super().__init__()
        self.features = {}

    def forward(self, x):
        y = self.features["stem"] = self.bn(self.stem(x))
        self.features["activation"] = self.relu(y)
        out = self.features["activation"].mean() + self.features["stem"].mean()
        self.features = {name: tensor.detach() for name, tensor in self.features.items()}
        return out


@case
class LastOutputKept(Net):
    """An auxiliary loss of the step before."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        out = y if self.last is None else y + 0.5 * self.last
        self.last = y.detach()
        return out


def _warmer(model):
    model.temperature.fill_(3.0)


@case(after=_warmer)
class TemperatureAsNumber(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x):
        return self.relu(self.bn(self.stem(x)) / self.temperature.item())


def _raise_flag(model):
    model.flag.fill_(True)


@case(after=_raise_flag)
class BufferAsFlag(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, x):
        y = self.bn(self.stem(x))
        return torch.tanh(y) if self.flag else self.relu(y)


def _schedule(model):
    model.scale, model.config["bias"] = 0.25, 2.0


@case(after=_schedule)
class AttributeOnASchedule(Net):
    def __init__(self):
        super().__init__()
        self.scale, self.config = 1.0, {"bias": 1.0}

    def forward(self, x):
        return self.relu(self.bn(self.stem(x)) * self.scale + self.config["bias"])


@case
class InitialisedByTheFirstBatch(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.tensor(0))

    def forward(self, x):
        y = self.stem(x)
        if not self.ready.item():
            self.bn.bias.data.copy_(y.detach().mean((0, 2, 3)))
            self.ready.fill_(1)
        return self.relu(self.bn(y))


@case
class WeightClippedFirst(Net):
    def forward(self, x):
        with torch.no_grad():
            self.bn.weight.clamp_(0.5, 0.9)
        return self.relu(self.bn(self.stem(x)))


@case
class BiasWrittenBetween(Net):
    """Batch norm does not save its bias for the backward: nothing raises, and the activation sees the old one."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        with torch.no_grad():
            self.bn.bias.add_(1.0)
        return self.relu(y)


@case
class WeightWrittenBetween(Net):
    """The backward needs the weight as it was: eager raises."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        with torch.no_grad():
            self.bn.weight.mul_(0.5)
        return self.relu(y)


@case
class MomentumSetByForward(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.bn.momentum = 1 / (1 + self.calls)
        return self.relu(self.bn(self.stem(x)))


@case
class MasksByShape(Net):
    """A cache that fills itself."""

    def __init__(self):
        super().__init__()
        self.masks = {}

    def forward(self, x):
        y = self.bn(self.stem(x))
        size = y.shape[-1]
        if size not in self.masks:
            self.masks[size] = torch.ones(size, size, dtype=y.dtype).tril()
        return self.relu(y * self.masks[size])


SEEN = []


def _forget(model):
    SEEN.clear()


@case(after=_forget, effects=lambda model: list(SEEN))
class WritesAGlobal(Net):
    def __init__(self):
        super().__init__()
        SEEN.clear()

    def forward(self, x):
        SEEN.append(tuple(x.shape))
        return self.relu(self.bn(self.stem(x)))


@case
class Prints(Net):
    def forward(self, x):
        print("shape", tuple(x.shape))
        return self.relu(self.bn(self.stem(x)))


@case
class CentersItsLoss(Net):
    """A vector-quantising layer: nearest code, straight-through gradient, codes moved by hand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 4))

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x))).permute(0, 2, 3, 1).reshape(-1, 4)
        nearest = torch.cdist(y.detach(), self.codes.to(y.dtype)).argmin(-1)
        if self.training:
            self.codes.index_add_(0, nearest, (0.01 * y.detach()).to(self.codes.dtype))
        return y + (self.codes[nearest] - y).detach()


@case
class MemoryBank(Net):
    """A queue of features, written in a ring, as in contrastive learning."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(6, 4))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x))).mean((2, 3))
        at = int(self.pointer)
        scores = y @ self.queue.t().to(y.dtype)
        self.queue[at : at + 2] = y[:2].detach().to(self.queue.dtype)
        self.pointer[0] = (at + 2) % 6
        return scores, y


@case
class FunctionalOnItsBuffers(Net):
    def forward(self, x):
        bn = self.bn
        y = F.batch_norm(
            self.stem(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps
        )
        return F.relu(y)


@case
class ExtraState(Net):
    def __init__(self):
        super().__init__()
        self.epoch = 0

    def get_extra_state(self):
        return {"epoch": self.epoch}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]

    def forward(self, x):
        self.epoch += 1
        return self.relu(self.bn(self.stem(x)))


@case
class ParameterMadeInForward(nn.Module):
    """Half lazy, by hand."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.scale = nn.BatchNorm2d(3), nn.ReLU(), None

    def forward(self, x):
        if self.scale is None:
            self.scale = nn.Parameter(x.new_full((x.shape[1], 1, 1), 1.5))
        return self.relu(self.bn(x)) * self.scale

"""Forwards that open contexts: autocast, gradient modes, random numbers, saved tensors, checkpoints."""

import functools
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from odd_models.case import Net, case


@case(rounds=torch.bfloat16)
class AutocastOffAroundTheNorm(Net):
    def forward(self, x):
        y = self.stem(x)
        with torch.autocast("cpu", enabled=False):
            y = self.relu(self.bn(y.to(self.bn.weight.dtype)))
        return self.conv2(y)


@case(rounds=torch.bfloat16)
class AutocastOnInside(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.stem(x.float())
        return self.relu(self.bn(y.to(self.bn.weight.dtype)))


@case(rounds=torch.bfloat16)
class AutocastBetween(Net):
    """The activation alone is inside."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            return self.conv2(self.relu(y))


@case
class NoGradBackbone(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.relu(self.bn(self.stem(x)))
        return self.relu(self.bn2(self.conv2(y)))


@case
class NoGradBetween(Net):
    """Batch norm is differentiated, what follows is not."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        with torch.no_grad():
            gate = self.relu(y)
        return y * gate


@case
class EnableGradInside(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.stem(x)
            with torch.enable_grad():
                return self.relu(self.bn(y))


@case
class GradModeByTraining(Net):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return self.relu(self.bn(self.stem(x)))


@case
class AsksForTheGradMode(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if torch.is_grad_enabled() else y

    def __call__(self, x):
        if self.training:
            return super().__call__(x)
        with torch.no_grad():
            return super().__call__(x)


@case
class DecoratedByNoGrad(Net):
    @torch.no_grad()
    def statistics(self, x):
        return self.relu(self.bn(x))

    def forward(self, x):
        y = self.stem(x)
        return y * self.statistics(y)


@case
class InferenceModeInEvaluation(Net):
    def forward(self, x):
        with torch.inference_mode(not self.training):
            return self.relu(self.bn(self.stem(x)))


@case
class ForkedRandomNumbers(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            y = nn.functional.dropout(y, 0.5, self.training)
        return self.relu(y) + torch.rand(())


@case
class SeedsInsideForward(Net):
    def forward(self, x):
        torch.manual_seed(5)
        return self.relu(self.bn(self.stem(x)) + torch.randn(4, 1, 1).to(x.dtype))


@case
class SavedTensorsHooks(Net):
    """What passes through them is only looked at: how many are saved may change, what comes back may not."""

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return self.relu(self.bn(self.stem(x)))


@case
class SaveOnCpu(Net):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return self.relu(self.bn(self.stem(x)))


class _Checkpointed(Net):
    reentrant = False

    def __init__(self):
        super().__init__()
        self.checkpoint = functools.partial(checkpoint, use_reentrant=self.reentrant)
        self.runs = 0

    def part(self, x):
        self.runs += 1
        return self.relu(self.bn2(self.conv2(x)))

    def forward(self, x):
        return self.checkpoint(self.part, self.relu(self.bn(self.stem(x))))


def _batches_aside(model):
    """A batch norm that runs again in the backward counts its batch twice in eager mode; ours may count it once."""
    return model.runs > 0


@case(effects=_batches_aside)
class CheckpointedActivation(_Checkpointed):
    """Non-reentrant, without a batch norm in it: nothing that runs again writes."""

    def part(self, x):
        return self.relu(self.conv2(x))


@case(effects=_batches_aside)
class CheckpointedReentrant(_Checkpointed):
    reentrant = True

    def part(self, x):
        return self.relu(self.conv2(x))


def _frozen(kind):
    """The batch norm inside of the checkpoint in evaluation mode."""

    def build():
        model = kind()
        model.bn2.train = lambda mode=True: model.bn2
        model.bn2.training = False
        return model

    return build


@case
def CheckpointedFrozenNorm():
    return _frozen(_Checkpointed)()


@case
def CheckpointedFrozenNormReentrant():
    model = _frozen(_Checkpointed)()
    model.checkpoint = functools.partial(checkpoint, use_reentrant=True)
    return model


@case
class CheckpointSequential(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU())

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        return checkpoint_sequential(self.net, 2, y, use_reentrant=False)


@case
class RecordFunction(Net):
    def forward(self, x):
        with torch.profiler.record_function("block"):
            y = self.bn(self.stem(x))
        return self.relu(y)


@case
class Warns(Net):
    def __init__(self):
        super().__init__()
        self.warned = []

    def forward(self, x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("an odd shape", UserWarning, stacklevel=1)
        self.warned += [str(w.message) for w in caught]
        return self.relu(self.bn(self.stem(x)))


@case
class GradientInsideForward(Net):
    """A gradient penalty: differentiates the block with respect to its input, twice differentiable."""

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y, slope.square().sum()

    def __call__(self, x):
        with torch.enable_grad():
            return super().__call__(x)


@case(modes=("eval", "float64"))
class FunctionalCallInside(Net):
    """Perturbed weights through torch.func.functional_call."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        state = {name: p * 1.5 for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, state, (x,)) + self.net(x)


@case
class CustomFunctionBetween(Net):
    def forward(self, x):
        return self.relu(_Doubled.apply(self.bn(self.stem(x))))


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad

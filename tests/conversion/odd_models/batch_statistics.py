"""The order in which statistics are read and written, and the options of batch norms."""

import torch
import torch.nn.functional as F
from torch import nn

from odd_models.case import Net, case, images


@case
class SharedNormTwiceInASum(Net):
    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn(y) + self.bn(2 * y))


@case
class SharedNormActivationFirst(Net):
    def forward(self, x):
        y = self.stem(x)
        first = self.bn(y)
        second = self.bn(3 * y)
        return self.relu(second) - self.relu(first)


@case
class SharedNormInARow(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        return self.relu(self.bn(self.conv2(y)))


@case
class SharedNormInAChain(Net):
    def forward(self, x):
        return self.relu(self.bn(self.bn(self.stem(x))))


@case(inputs=lambda: (*images(), *images(2)))
class SiameseBranches(Net):
    def forward(self, x, other):
        return self.relu(self.bn(self.stem(x))), self.relu(self.bn(self.stem(other)))


@case
class TwoNormsOneActivation(Net):
    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn(y) + self.bn2(self.conv2(y)))


@case
class TwoNormsSwapped(Net):
    def forward(self, x):
        y = self.stem(x)
        second = self.bn2(self.conv2(y))
        return self.relu(self.bn(y) + second)


@case
class ReadsTheMeanBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y + self.bn.running_mean.view(4, 1, 1).to(y.dtype))


@case
class CountReadBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) * int(self.bn.num_batches_tracked)


@case(spared=True)
class StatisticsResetBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        self.bn.reset_running_stats()
        return self.relu(y)


@case
class StatisticsWrittenBefore(Net):
    def forward(self, x):
        y = self.stem(x)
        self.bn.running_var.mul_(1.5)
        return self.relu(self.bn(y))


@case
class StatisticsSharedByTwo(Net):
    def __init__(self):
        super().__init__()
        self.bn2.running_mean, self.bn2.running_var = self.bn.running_mean, self.bn.running_var

    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn(y) + self.bn2(2 * y))


@case
class WeightsSharedByTwo(Net):
    def __init__(self):
        super().__init__()
        self.bn2.weight, self.bn2.bias = self.bn.weight, self.bn.bias

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn(self.stem(x))))))


@case
class NormBothWays(Net):
    """One batch of statistics, one of running ones, as in self-distillation."""

    def forward(self, x):
        y = self.stem(x)
        bn = self.bn
        first = self.relu(bn(y))
        frozen = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        return first + F.relu(frozen)


@case
class UsedTwice(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) + y


@case
class ReturnedBesides(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y), y


@case
class TwoActivations(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return F.relu(y) + F.relu(-y)


@case
class BranchesOnTraining(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if self.training else F.silu(y)


@case
class BranchesOnTheNormsTraining(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) if self.bn.training else F.silu(y)


def _freeze(model):
    model.bn.eval()


@case(after=_freeze)
class NormsTrainingChangedAlone(Net):
    """Frozen by a line of the training loop, until the next train()."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y) * (2 if self.bn.training else 1)


@case
class FrozenNorm(Net):
    """Fine-tuning as it is usually written: train() leaves the batch norms in evaluation."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn(y)))) + y)


@case
class FrozenWeights(Net):
    def __init__(self):
        super().__init__()
        self.bn.weight.requires_grad_(False)
        self.bn2.bias.requires_grad_(False)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn(self.stem(x))))))


class _Plain(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        return self.relu(self.bn2(self.conv2(y)) + y)


def _options(**options):
    return _Plain(norm=lambda channels: nn.BatchNorm2d(channels, **options))


@case
def CumulativeAverage():
    return _options(momentum=None)


@case
def WithoutAffine():
    return _options(affine=False)


@case
def WithoutRunningStatistics():
    return _options(track_running_stats=False)


@case
def WithoutAnything():
    return _options(track_running_stats=False, affine=False, eps=0.1)


@case
def MomentumZero():
    return _options(momentum=0.0)


@case
def WithoutBias():
    return _options(bias=False)


def _batch_of_one():
    return (torch.randn(1, 3, 1, 1),)


@case(inputs=_batch_of_one)
class OneValuePerChannel(Net):
    """Training raises; what ran before it raised has run."""

    def forward(self, x):
        return self.relu(self.bn(F.conv2d(x, self.conv.weight[:, :, 1:2, 1:2])))


@case(inputs=lambda: (torch.randn(0, 3, 5, 5),))
class EmptyBatch(_Plain):
    pass


class _OneDimension(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.linear, self.bn, self.relu = nn.Linear(shape[-1], shape[-1], bias=False), nn.BatchNorm1d(6), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.linear(x)))


@case(inputs=lambda: (torch.randn(5, 6),))
def OneDimension():
    return _OneDimension(6)


@case(inputs=lambda: (torch.randn(5, 6, 7),))
def OneDimensionAndTime():
    return _OneDimension(6, 7)


@case(inputs=lambda: (torch.randn(3, 3, 4, 4, 4),))
class ThreeDimensions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += self.conv(x)
        return self.relu(y)


@case
class MiddleHasAHook(Net):
    """A hook of the tensor between, which scales its gradient."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        if y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        return self.relu(y)


@case
class MiddleRetainsItsGradient(Net):
    """Read after the backward, as in Grad-CAM."""

    def __init__(self):
        super().__init__()
        self.found = []

    def forward(self, x):
        y = self.bn(self.stem(x))
        if y.requires_grad:
            y.retain_grad()
            y.register_hook(lambda grad: self.found.append(grad.detach().clone()))
        return self.relu(y)

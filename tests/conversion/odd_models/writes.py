"""In-place writes, to what a batch norm gave, to its input, to the residual, to views of them."""

import torch
import torch.nn.functional as F
from torch import nn

from odd_models.case import Net, case


@case
class ResidualScaledBetween(Net):
    def forward(self, x):
        r = self.stem(x)
        y = self.bn2(self.conv2(r))
        r = r.clone()
        y = y + r
        r.mul_(2)
        return self.relu(y)


@case
class ResidualWrittenAfterTheNorm(Net):
    def forward(self, x):
        r = self.stem(x)
        y = self.bn(r.clone())
        r.mul_(2)
        return self.relu(y + r)


@case
class ViewOfTheResidualWritten(Net):
    def forward(self, x):
        r = self.stem(x)
        y = self.bn(r * 1)
        r[:, 0] = 0
        return self.relu(y + r)


@case
class ResidualSeenThroughAView(Net):
    def forward(self, x):
        base = self.stem(x)
        r = base.view(base.shape[0], 4, -1).view(base.shape)
        y = self.bn(base * 1)
        base.add_(1)
        return self.relu(y + r)


@case
class ResidualWrittenByAnActivation(Net):
    """An in-place ReLU on the shortcut, run after the batch norm."""

    def forward(self, x):
        r = self.stem(x)
        y = self.bn2(self.conv2(r * 1))
        r = F.relu(r, inplace=True)
        return self.relu(y + r)


@case
class NormsInputWrittenAfter(Net):
    """Its backward needs it: eager raises."""

    def forward(self, x):
        h = self.stem(x)
        y = self.bn(h)
        h.add_(1)
        return self.relu(y)


@case
class InputOfTheModelWritten(Net):
    def forward(self, x):
        x.mul_(2)
        return self.relu(self.bn(self.stem(x)))


@case
class AddedInPlace(Net):
    def forward(self, x):
        r = self.stem(x)
        y = self.bn2(self.conv2(r))
        y += r
        return F.relu_(y)


@case
class AddedInPlaceIntoTheResidual(Net):
    def forward(self, x):
        r = self.stem(x)
        y = self.bn2(self.conv2(r))
        r += y
        return self.relu(r)


@case
class AddMethodInPlace(Net):
    def forward(self, x):
        r = self.stem(x)
        return self.bn2(self.conv2(r)).add_(r).relu_()


@case
class PreActivationOverwritten(Net):
    """An in-place ReLU also changes what is returned beside it."""

    def __init__(self):
        super().__init__(activation=nn.ReLU(inplace=True))

    def forward(self, x):
        y = self.bn(self.stem(x))
        out = self.relu(y)
        return out, y


@case
class PreActivationInAList(Net):
    def __init__(self):
        super().__init__(activation=nn.ReLU(inplace=True))

    def forward(self, x):
        features = [self.bn(self.stem(x))]
        self.relu(features[0])
        return features[0]


@case
class ResultOfTheActivationDropped(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        F.relu_(y)
        return y * 2


@case
class ClampedInPlaceBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        y.clamp_(max=0.5)
        return self.relu(y)


@case
class WrittenThroughAViewBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        y.view(-1)[::3] = 1
        return self.relu(y)


@case
class SetItemBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        y[:, :1] = y[:, 1:2]
        return self.relu(y)


@case
class ChunkWrittenBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x)).clone()
        first, _ = y.split(2, dim=1)
        first.mul_(-1)
        return self.relu(y)


@case
class DetachedAndWritten(Net):
    """Behind the back of autograd."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        y.detach().mul_(0.5)
        return self.relu(y)


@case
class DataWritten(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        y.data.neg_()
        return self.relu(y)


@case(spared=True)
class OutputWrittenAfterTheActivation(Net):
    """ReLU's backward reads its result, and raises; one op's reads its input alone."""

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        y.mul_(2)
        return y


@case
class OutputOfSiluWritten(Net):
    """SiLU's backward reads its input: writing the result is allowed."""

    def forward(self, x):
        y = F.silu(self.bn(self.stem(x)))
        y.mul_(2)
        return y


@case
class CopiedIntoABuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("out", torch.zeros(4, 4, 5, 5))

    def forward(self, x):
        y = self.bn(self.stem(x))
        self.out.copy_(y.detach())
        return self.relu(y) + self.out.to(y.dtype)


@case
class OutArgument(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.bn(self.stem(x))
            room = torch.empty_like(y)
            torch.add(y, y, out=room)
            return F.relu(room)


@case(spared=True)
class RunningMeanWrittenBetween(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        self.bn.running_mean.zero_()
        return self.relu(y)


@case
class AddedTwice(Net):
    def forward(self, x):
        r = self.stem(x)
        y = self.bn(r)
        return self.relu(y + r + r)


@case
class AddedToItself(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y + y)


@case
class ScaledResiduals(Net):
    def forward(self, x):
        r = self.stem(x)
        first = F.relu(torch.add(self.bn(r), r, alpha=0.5))
        second = F.relu(self.bn2(self.conv2(r)).add_(r, alpha=2))
        return first, second, F.relu(self.bn(r) - r), F.relu(r - self.bn(r))


@case
class AddedNumbers(Net):
    def forward(self, x):
        y = self.stem(x)
        return F.relu(self.bn(y) + 1), F.relu(1.5 + self.bn(y)), F.relu(self.bn(y) + torch.ones((), dtype=y.dtype))


@case
class BroadcastResidual(Net):
    def forward(self, x):
        r = self.stem(x)
        return self.relu(self.bn(r) + r.mean((2, 3), keepdim=True)), self.relu(self.bn2(r) + r[:1])


@case
class ResidualThatBroadcastsTheNorm(Net):
    """The sum is larger than what the batch norm gave."""

    def forward(self, x):
        r = self.stem(x)
        y = self.bn(r[:, :, :1, :1])
        return self.relu(y + r)


@case
class ResidualOfAnotherDtype(Net):
    def forward(self, x):
        r = self.stem(x)
        return self.relu(self.bn(r) + r.detach().double()), self.relu(self.bn2(r) + torch.ones(5, dtype=torch.long))


@case
class WrittenByAnotherLibrary(Net):
    """numpy shares its memory."""

    def forward(self, x):
        y = self.bn(self.stem(x))
        if y.dtype != torch.bfloat16:
            y.detach().numpy()[:, 0] = 0.25
        return self.relu(y)


@case
class SwapsHalves(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        a, b = y.chunk(2, 1)
        return self.relu(torch.cat([b, a], 1))


@case
class ActivationOnPartOfIt(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return torch.cat([F.relu(y[:, :2]), y[:, 2:]], 1)


@case
class ActivationInPlaceOnPartOfIt(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        F.relu_(y[:, :2])
        return y

"""Memory formats: of the input, of the residual, of what comes out and is viewed."""

import torch
from torch import nn

from odd_models.case import Net, case, images


def images_last():
    return (images(4, 3, 6)[0].contiguous(memory_format=torch.channels_last),)


class _Residual(Net):
    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn2(self.conv2(y)) + y)


@case(inputs=images_last)
class ChannelsLastInput(_Residual):
    pass


@case(inputs=images_last)
def ChannelsLastModel():
    return _Residual().to(memory_format=torch.channels_last)


def _to_last(model):
    model.to(memory_format=torch.channels_last)


@case(after=_to_last)
class ChannelsLastLater(_Residual):
    pass


@case
class ChannelsLastNormContiguousResidual(Net):
    """The view after it needs the layout that the sum has in eager mode."""

    def forward(self, x):
        r = self.stem(x).contiguous()
        y = self.bn(r.contiguous(memory_format=torch.channels_last))
        return self.relu(r + y).view(x.shape[0], -1)


@case
class ContiguousNormChannelsLastResidual(Net):
    def forward(self, x):
        r = self.stem(x).contiguous(memory_format=torch.channels_last)
        y = self.bn(r.contiguous())
        return self.relu(y + r).view(x.shape[0], -1)


@case
class ChannelsLastNormThenView(Net):
    """Raises in eager mode as well."""

    def forward(self, x):
        y = self.bn(self.stem(x).contiguous(memory_format=torch.channels_last))
        return self.relu(y).view(x.shape[0], -1)


@case
class ChannelsLastNormThenPermutedView(Net):
    def forward(self, x):
        y = self.bn(self.stem(x).contiguous(memory_format=torch.channels_last))
        return self.relu(y).permute(0, 2, 3, 1).view(-1, 4)


@case
class TransposedInput(Net):
    def forward(self, x):
        y = self.stem(x).transpose(2, 3)
        return self.relu(self.bn(y))


@case
class TransposedResidual(Net):
    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn(y) + y.transpose(2, 3))


@case
class PermutedInput(Net):
    def forward(self, x):
        y = self.stem(x).permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
        return self.relu(self.bn(y))


@case
class EverySecondPixel(Net):
    def forward(self, x):
        return self.relu(self.bn(self.stem(x)[:, :, ::2, 1::2]))


@case
class SlicedChannels(Net):
    def __init__(self):
        super().__init__()
        self.small = nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.small(y[:, 1:3]))


@case
class SlicedChannelsLast(SlicedChannels):
    def forward(self, x):
        y = self.stem(x).contiguous(memory_format=torch.channels_last)
        return self.relu(self.small(y[:, 1:3]))


@case
class ExpandedInput(Net):
    def forward(self, x):
        y = self.stem(x).mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)
        return self.relu(self.bn(y))


@case(inputs=lambda: (torch.randn(4, 7, 6),))
class TimeBeforeFeatures(nn.Module):
    """The transposes around a BatchNorm1d that speech and time series models have."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.relu = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn(self.linear(x).transpose(1, 2)))
        return y.transpose(1, 2).reshape(-1, 6)


@case(inputs=lambda: (torch.randn(3, 3, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d),))
class ChannelsLast3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm3d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x) + x)


@case(inputs=lambda: (torch.randn(1, 3, 6, 6).contiguous(memory_format=torch.channels_last),))
class BatchOfOne(_Residual):
    pass


@case(inputs=lambda: (torch.randn(6, 3, 1, 1),))
class OnePixel(nn.Module):
    """Both layouts at once."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))).flatten(1)


@case
class AsksForStrides(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x).contiguous(memory_format=torch.channels_last)))
        last = y.is_contiguous(memory_format=torch.channels_last)
        return (y.permute(0, 2, 3, 1).reshape(-1, 4) if last else y.flatten(1)), y.stride()


@case
class Flattened(Net):
    def forward(self, x):
        return self.relu(self.bn(self.stem(x))).view(-1, 100)


@case
class ComplexSpectrum(Net):
    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        y = y.float() if y.dtype == torch.bfloat16 else y
        return torch.fft.rfft2(y).abs(), torch.complex(y, y)


@case(rounds=torch.bfloat16, modes=("train", "eval"))
class MixedDtypes(Net):
    """A bfloat16 activation through a float32 batch norm."""

    def forward(self, x):
        y = self.stem(x).bfloat16()
        return self.relu(self.bn(y)), self.relu(self.bn2(y) + y)


@case(rounds=torch.float16, modes=("train", "eval"))
class HalfThroughFloat(Net):
    def forward(self, x):
        y = self.stem(x).half()
        return self.relu(self.bn(y) + y.float())

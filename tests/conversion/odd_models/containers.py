"""Sequentials and their like, whole, nested, shared, subclassed, and walked by hand."""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from odd_models.case import Net, Sequence, case, images, layers


@case(fuses=2)
def PlainSequential():
    return nn.Sequential(*layers())


@case(fuses=2)
def SequentialInside():
    return Sequence()


@case(fuses=2)
def NamedSequential():
    return nn.Sequential(OrderedDict(zip(("conv", "norm", "act", "conv2", "norm2", "act2"), layers(), strict=True)))


@case(fuses=2)
def SharedActivation():
    return nn.Sequential(*layers(nn.ReLU()))


@case(fuses=2)
def ActivationInPlace():
    return nn.Sequential(*layers(nn.ReLU(inplace=True)))


@case(fuses=1)
def IdentityBetween():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU())


@case(fuses=1)
def InactiveDropoutBetween():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU())


@case
def ActiveDropoutBetween():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.4), nn.ReLU())


@case
def NestedSequentials():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU(), nn.Sequential(nn.Sequential())
    )


@case
def ActivationFirstInTheNext():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))


@case
def NormAloneInASequential():
    return nn.Sequential(nn.BatchNorm2d(3))


@case
def EmptySequential():
    return nn.Sequential()


@case
def TwoNormsInARow():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.ReLU())


@case
def TwoActivationsInARow():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Sigmoid(), nn.ReLU())


@case
def OneNormInTwoPlaces():
    bn = nn.BatchNorm2d(3)
    return nn.Sequential(bn, nn.ReLU(), nn.Conv2d(3, 3, 1), bn, nn.GELU())


@case
class OneNormInTwoSequentials(nn.Module):
    def __init__(self):
        super().__init__()
        bn = nn.BatchNorm2d(3)
        self.first, self.second = nn.Sequential(bn, nn.ReLU()), nn.Sequential(bn, nn.Tanh())

    def forward(self, x):
        return self.first(x) + self.second(2 * x)


@case
class OneSequentialTwice(Sequence):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.again = self.net

    def forward(self, x):
        return self.again(self.net(x)) + self.net(-x)


_KINDS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.ELU, nn.Softplus, nn.Mish,
    nn.PReLU, nn.Sigmoid, nn.Tanh, nn.CELU, nn.SELU, nn.Softsign, nn.RReLU, nn.Hardsigmoid, nn.LogSigmoid, nn.Softmax2d,
)  # fmt: skip


@case
class ActivationsOfEveryKind(nn.Module):
    def __init__(self):
        super().__init__()
        kinds = [kind() for kind in _KINDS]
        kinds += [nn.GELU("tanh"), nn.LeakyReLU(0.3), nn.LeakyReLU(-0.1), nn.ELU(0.5), nn.Hardtanh(-0.5, 2.0)]
        kinds += [nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True), nn.Threshold(0.1, 0.2), nn.GLU(dim=2)]
        self.parts = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(3), kind) for kind in kinds)

    def forward(self, x):
        return [part(x) for part in self.parts]


@case(fuses=2)
class SubclassThatKeepsForward(nn.Sequential):
    def __init__(self):
        super().__init__(*layers())


@case
class SubclassWithForward(nn.Sequential):
    def __init__(self):
        super().__init__(*layers())

    def forward(self, x):
        return super().forward(x) + 1


@case
class SubclassThatSkips(nn.Sequential):
    def __init__(self):
        super().__init__(*layers())

    def forward(self, x):
        for module in self:
            x = module(x) if not isinstance(module, nn.ReLU) else torch.tanh(x)
        return x


@case
class SubclassWithIter(nn.Sequential):
    """nn.Sequential's forward iterates over itself."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))

    def __iter__(self):
        return reversed(list(super().__iter__()))


@case
class WalkedByHand(Sequence):
    """The features after every module, as perceptual losses take them."""

    def forward(self, x):
        features = []
        for module in self.net:
            x = module(x)
            features.append(x)
        return features


@case
class WalkedInPart(Sequence):
    def forward(self, x):
        y = self.net[0](x)
        y = self.net[1](y)
        return self.net[2](y), y, self.net[3:](self.net[2](y))


@case
class BothWhole(Sequence):
    """The whole and one of its modules in one forward."""

    def forward(self, x):
        return self.net(x), self.net[1](self.net[0](x))


@case
class SlicedInForward(Sequence):
    def forward(self, x):
        return self.net[:2](x), self.net[:3](x), self.net[2:](self.net[0](x))


@case
class ListOfModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(layers())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@case(after=lambda model: model.layers.append(nn.Tanh()) and None)
class ListOfModulesAppendedTo(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(layers())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@case
class DictOfModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(zip("abcdef", layers(), strict=True))
        self.order = list("abcdef")

    def forward(self, x):
        for name in self.order:
            x = self.parts[name](x)
        return x


@case
class PlainListOfModules(nn.Module):
    """Not registered: no parameters of the model, but run."""

    def __init__(self):
        super().__init__()
        self.bn, self._hidden = nn.BatchNorm2d(3), [nn.ReLU()]

    def forward(self, x):
        return self._hidden[0](self.bn(x))


@case
def SequentialWithForwardOnTheInstance():
    model = Sequence()
    model.net.forward = lambda x: F.softplus(model.net[1](model.net[0](x)))
    return model


@case
def NormWithForwardOnTheInstance():
    model = Sequence()
    bn = model.net[1]
    bn.forward = lambda x: nn.BatchNorm2d.forward(bn, x) + 1
    return model


@case
def ActivationWithForwardOnTheInstance():
    model = Sequence()
    model.net[2].forward = lambda x: F.relu(x) * 2
    return model


class _Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class _Renamed(nn.BatchNorm2d):
    pass


class _Frozen(nn.Module):
    """As detectron2's and torchvision's."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 1.5)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


@case
def SubclassesOfNorms():
    return nn.Sequential(nn.Conv2d(3, 4, 1), _Doubling(4), nn.ReLU(), nn.Conv2d(4, 4, 1), _Renamed(4), nn.ReLU())


@case
def FrozenNormsOfOthers():
    return nn.Sequential(nn.Conv2d(3, 4, 1), _Frozen(4), nn.ReLU())


class _NormWithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation is the batch norm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@case
def NormsWithTheirActivation():
    return nn.Sequential(nn.Conv2d(3, 4, 1), _NormWithActivation(4), nn.Conv2d(4, 4, 1), _NormWithActivation(4))


class _ReluOfAnotherKind(nn.ReLU):
    def forward(self, x):
        return F.relu(x) - 0.5


@case
def SubclassOfActivation():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), _ReluOfAnotherKind())


@case
def OtherNorms():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.InstanceNorm2d(4, affine=True), nn.ReLU()
    )


@case(modes=("eval", "float64", "train"))
def SynchronisedNorm():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.ReLU())


@case
def LazyModules():
    return nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())


@case
def LazyModulesInForward():
    return _LazyNet()


class _LazyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@case
def QuantisationStubs():
    from torch.ao.quantization import DeQuantStub, QuantStub

    return nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), DeQuantStub(), nn.ReLU())


@case
def TiedConvolutions():
    model = nn.Sequential(*layers())
    model.append(nn.Conv2d(4, 4, 3, bias=False))
    model[6].weight = model[3].weight
    return nn.Sequential(nn.ZeroPad2d(2), model)


class _Wrapper(nn.Module):
    """As nn.DataParallel on one device: everything is asked of the module inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@case
def Wrapped():
    return _Wrapper(Sequence())


@case
def DataParallel():
    return nn.DataParallel(Sequence())


@case
class TeacherAndStudent(nn.Module):
    """A moving average of the weights, moved in the forward."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(*layers())
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, 0.5)
            target = self.teacher(x)
        return self.student(x) - target


@case
class UNet(Net):
    """Skip connections by concatenation."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    def forward(self, x):
        skip = self.relu(self.bn(self.stem(x)))
        y = F.interpolate(self.down(skip), size=skip.shape[2:], mode="nearest")
        return self.up(torch.cat([y, skip], 1))


@case
class DenseConcatenation(nn.Module):
    """Batch norm and activation before the convolution, of everything so far."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 2 * i), nn.ReLU(), nn.Conv2d(3 + 2 * i, 2, 1)) for i in range(3)
        )

    def forward(self, x):
        features = [x]
        for part in self.parts:
            features.append(part(torch.cat(features, 1)))
        return torch.cat(features, 1)


@case
class SqueezeAndExcite(Net):
    def forward(self, x):
        y = self.bn(self.stem(x))
        return self.relu(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


@case
class BasicBlock(nn.Module):
    """As torchvision writes it: one ReLU module for both places, added in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu, self.downsample = nn.ReLU(inplace=True), None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


@case(modes=("eval", "float64"))
def CompiledInside():
    """A part that somebody has compiled already."""
    model = Sequence()
    model.net = torch.compile(model.net, backend="eager")
    return model


@case(inputs=lambda: (images()[0], torch.tensor([0, 1, 2, 1])))
class LossInside(Sequence):
    """Returns its loss, as transformers' models do."""

    def __init__(self):
        super().__init__(*layers(), nn.Flatten(), nn.LazyLinear(3))
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": self.loss(logits, labels), "logits": logits}


@case(inputs=lambda: (images()[0], torch.tensor([0, 1, 2, 1])))
class LossWithWeights(LossInside):
    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), ignore_index=1, reduction="sum")


class _OwnLoss(nn.CrossEntropyLoss):
    def forward(self, logits, labels):
        return super().forward(logits / 2, labels)


@case(inputs=lambda: (images()[0], torch.tensor([0, 1, 2, 1])))
class LossOfItsOwn(LossInside):
    def __init__(self):
        super().__init__()
        self.loss = _OwnLoss()

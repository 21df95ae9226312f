"""What forwards return besides tensors."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor

from odd_models.case import Net, case


class _Pair(Net):
    """Features before and after the activation, made by ``pair``."""

    def pair(self, x):
        y = self.relu(self.bn(self.stem(x)))
        return y, self.relu(self.bn2(self.conv2(y)) + y)


@case
class ReturnsOrderedDict(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        return OrderedDict(b=b, a=a)


@case
class ReturnsDict(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        return {"b": b, 3: a, "nothing": None, "name": "pair"}


Features = namedtuple("Features", ["low", "high"])


@case
class ReturnsNamedTuple(_Pair):
    def forward(self, x):
        return Features(*self.pair(x))


@dataclass
class Output:
    low: Tensor
    high: Tensor
    note: str = "fine"


@case
class ReturnsDataclass(_Pair):
    def forward(self, x):
        return Output(*self.pair(x))


class Answer(OrderedDict):
    """As transformers' ModelOutput: a dict whose entries are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def to_tuple(self):
        return tuple(self[key] for key in self)


@case
class ReturnsDictWithAttributes(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        out = Answer()
        out["low"], out["high"] = a, b
        return out


@case
class ReadsItsOwnAnswer(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        out = Answer(low=a, high=b)
        out["sum"] = out.low.sum() + out.to_tuple()[1].sum()
        return out


class Plain:
    def __init__(self, features, size):
        self.features, self.size = features, size


@case
class ReturnsObject(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        return Plain([a, b], tuple(b.shape))


@case
class ReturnsNested(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        return [a, (b, None, {"shape": b.shape, "deep": [a.mean()]})], 3, "x"


@case
class ReturnsGenerator(_Pair):
    """Half of the model runs while its result is read."""

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        yield y
        yield self.relu(self.bn2(self.conv2(y)) + y)


@case
class UsesGenerators(_Pair):
    def stages(self, x):
        y = x
        for conv, bn in ((self.conv, self.bn), (self.conv2, self.bn2)):
            y = self.relu(bn(conv(y)))
            yield y

    def forward(self, x):
        return [stage.mean() for stage in self.stages(x)]


@case
class ReturnsNumbers(_Pair):
    def forward(self, x):
        _, b = self.pair(x)
        return b, b.shape[0], b.numel() > 3, b.detach().double().mean().item()


@case
class ReturnsArray(_Pair):
    def forward(self, x):
        _, b = self.pair(x)
        return b, b.detach().double().numpy()


@case
class ReturnsViews(_Pair):
    def forward(self, x):
        a, b = self.pair(x)
        return a[:, :2], b.unbind(0), x[0]


@case
class ReturnsTheSameTwice(_Pair):
    def forward(self, x):
        _, b = self.pair(x)
        return b, b


@case
class ReturnsIndices(_Pair):
    def forward(self, x):
        _, b = self.pair(x)
        return b.max(dim=1).values, (b > 0.5), torch.argsort(b.flatten(1).double(), stable=True)[:, :0]


try:
    from transformers.modeling_outputs import ImageClassifierOutput
except ImportError:
    pass
else:

    @case
    class ReturnsModelOutput(_Pair):
        def forward(self, x):
            a, b = self.pair(x)
            return ImageClassifierOutput(loss=b.mean(), logits=b, hidden_states=(a,))

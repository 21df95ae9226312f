"""What the tests of a head's deferred logits share."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_ops
from fused_ops.conversion.deferred_logits import DeferredLogits

ROWS, FEATURES, CLASSES = 40, 8, 700


class Double(torch.autograd.Function):
    """Which gets past ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any op returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.device.type != "meta":
                self.size = max(self.size, t.untyped_storage().nbytes())
        return result


def network(bias=True):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.Tanh())
    return nn.Sequential(body, nn.Linear(FEATURES, CLASSES, bias=bias))


def converted(loss=F.cross_entropy, **options):
    model = network(**options)
    fused_ops.convert(model, loss=loss)
    return model


def converted_head(*, bias=True, dtype=torch.float32):
    """A linear layer alone: as it was, and converted."""
    torch.manual_seed(0)
    theirs, ours = (nn.Linear(FEATURES, CLASSES, bias=bias).to(dtype) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fused_ops.convert(ours, loss=F.cross_entropy)
    return theirs, ours


def record(model):
    """The counts of the one head in a model."""
    (found,) = [m.__dict__["_fused_ops_record"] for m in model.modules() if "_fused_ops_record" in m.__dict__]
    return found


def counts(model):
    """How often the loss did without the logits, and why the others did not."""
    found = record(model)
    return found.fused, dict(found.computed)


def batch(dtype=torch.float32):
    y = torch.randint(0, CLASSES, (ROWS,))
    y[3] = -100
    return torch.randn(ROWS, FEATURES).to(dtype), y


def gradients(model, x, y, loss=F.cross_entropy):
    return torch.autograd.grad(loss(model(x), y), list(model.parameters()))


def deferred(logits):
    """Whether they are there in name only."""
    return isinstance(logits, DeferredLogits) and logits._state.real is None

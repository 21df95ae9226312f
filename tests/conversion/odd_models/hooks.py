"""Hooks of every kind, on every part, and on all modules at once."""

import contextlib

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

from odd_models.case import Net, Sequence, case


class _Block(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def forward(self, x):
        return self.relu(self.bn(self.stem(x)))


class _Listed(Sequence):
    def __init__(self):
        super().__init__()
        self.seen = []


def _both(hook):
    """The same hook on a block with a forward of its own, and on the modules of a Sequential."""

    def block():
        model = _Block()
        hook(model, model.bn, model.relu)
        return model

    def listed():
        model = _Listed()
        hook(model, model.net[1], model.net[2])
        return model

    for build in (block, listed):
        build.__name__ = f"{hook.__name__}In{'Forward' if build is block else 'Sequential'}"
        case(build)


@_both
def ForwardHookOnNorm(model, bn, relu):
    bn.register_forward_hook(lambda m, args, out: model.seen.append(out.detach()))


@_both
def ForwardHookThatChanges(model, bn, relu):
    bn.register_forward_hook(lambda m, args, out: out * 2)


@_both
def ForwardHookOnActivation(model, bn, relu):
    relu.register_forward_hook(lambda m, args, out: model.seen.append(args[0].detach()))


@_both
def ForwardPreHookOnActivation(model, bn, relu):
    relu.register_forward_pre_hook(lambda m, args: (args[0] - 0.5,))


@_both
def ForwardPreHookOnNorm(model, bn, relu):
    bn.register_forward_pre_hook(lambda m, args: (args[0] * 3 + 1,))


@_both
def HookWithKeywords(model, bn, relu):
    bn.register_forward_hook(lambda m, args, kwargs, out: out + len(kwargs) + 1, with_kwargs=True, always_call=True)


@_both
def BackwardHookOnNorm(model, bn, relu):
    bn.register_full_backward_hook(lambda m, gin, gout: (gin[0] * 2,))


@_both
def BackwardHookOnActivation(model, bn, relu):
    relu.register_full_backward_hook(lambda m, gin, gout: model.seen.append(gout[0].detach().clone()))


@_both
def BackwardPreHookOnActivation(model, bn, relu):
    relu.register_full_backward_pre_hook(lambda m, gout: (gout[0] * 3,))


@_both
def HookThatRemovesItself(model, bn, relu):
    def hook(m, args, out):
        model.seen.append(float(out.detach().double().mean()))
        handle.remove()

    handle = bn.register_forward_hook(hook)


@_both
def HookOnParameters(model, bn, relu):
    bn.weight.register_hook(lambda grad: grad * 2)
    bn.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(3))


def _later(register):
    """A hook that comes after the conversion."""

    def after(model):
        register(model)

    return after


@case(after=_later(lambda model: model.net[1].register_forward_hook(lambda m, args, out: out - 1)))
def HookOnNormLater():
    return Sequence()


@case(after=_later(lambda model: model.net[2].register_forward_hook(lambda m, args, out: out - 1)))
def HookOnActivationLater():
    return Sequence()


@case(after=_later(lambda model: model.net.register_forward_hook(lambda m, args, out: out * 2)))
def HookOnSequentialLater():
    return Sequence()


@case(after=_later(lambda model: model.bn.register_forward_hook(lambda m, args, out: out - 1)))
def HookOnNormOfForwardLater():
    return _Block()


@case(after=_later(lambda model: model.net[2].register_full_backward_pre_hook(lambda m, gout: (gout[0] * 3,))))
def BackwardHookLater():
    return Sequence()


@contextlib.contextmanager
def _global_forward_hook(model):
    handle = global_hooks.register_module_forward_hook(lambda m, args, out: out * 2 if type(m) is nn.ReLU else None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _global_pre_hook(model):
    kinds = (nn.BatchNorm2d, nn.ReLU)
    handle = global_hooks.register_module_forward_pre_hook(
        lambda m, args: (args[0] + 1,) if isinstance(m, kinds) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _global_backward_hook(model):
    handle = global_hooks.register_module_full_backward_hook(
        lambda m, gin, gout: (gin[0] * 2,) if isinstance(m, nn.ReLU) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _removed_at_the_end(model):
    try:
        yield
    finally:
        while model._handles:
            model._handles.pop().remove()


def _global_hook(model):
    hook = global_hooks.register_module_forward_hook(lambda m, args, out: out + 1 if type(m) is nn.ReLU else None)
    model._handles.append(hook)


for _around in (_global_forward_hook, _global_pre_hook, _global_backward_hook):
    for _kind in (_Block, Sequence):
        _made = type("Made", (_kind,), {})
        _made.__name__ = f"{_around.__name__[1:]}_{'forward' if _kind is _Block else 'sequential'}"
        case(_made, around=_around)


@case(around=_removed_at_the_end, after=_global_hook)
class GlobalHookLater(Sequence):
    def __init__(self):
        super().__init__()
        self._handles = []


@case
def StateDictHooks():
    model = Sequence()
    model.net[1].register_state_dict_post_hook(lambda m, state, prefix, meta: state.update({prefix + "extra": 1}))
    return model


@case
def ParametrizedConvolution():
    model = Sequence()
    parametrizations.weight_norm(model.net[0])
    return model


@case
def SpectralNorm():
    model = Sequence()
    parametrizations.spectral_norm(model.net[3])
    return model


class _Positive(nn.Module):
    def forward(self, w):
        return w.abs() + 0.1


@case
def ParametrizedNorm():
    model = Sequence()
    parametrize.register_parametrization(model.net[1], "weight", _Positive())
    return model


@case(after=lambda model: parametrize.register_parametrization(model.net[1], "weight", _Positive()) and None)
def ParametrizedNormLater():
    return Sequence()


@case
def PrunedNorm():
    model = Sequence()
    prune.l1_unstructured(model.net[1], "weight", 0.5)
    return model


@case(after=lambda model: prune.random_unstructured(model.net[1], "weight", 0.5) and None)
def PrunedNormLater():
    return Sequence()


@case
class TapsOnEveryModule(Sequence):
    """A feature extractor made of hooks."""

    def __init__(self):
        super().__init__()
        self.taps = {}
        for name, module in self.net.named_children():
            module.register_forward_hook(lambda m, args, out, name=name: self.taps.update({name: out.detach()}))

    def forward(self, x):
        self.taps.clear()
        return self.net(x)


@case
class ActivationMaximisation(Sequence):
    """Hooks registered and removed within one call."""

    def forward(self, x):
        found = []
        handle = self.net[1].register_forward_hook(lambda m, args, out: found.append(out))
        try:
            y = self.net(x)
        finally:
            handle.remove()
        return y, torch.stack(found).mean()

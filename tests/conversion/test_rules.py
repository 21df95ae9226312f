"""The registry of rules: what a rule needs to hold, what it may do, and those of well-known libraries."""

import copy
import importlib
import inspect
import pickle
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_convert import Block, assert_alike
from torch import nn

import fused_ops
from fused_ops.conversion import rules


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))


class Unit(nn.Module):
    """Convolution, batch norm, activation."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), activation()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def unit(self, x):
    return rules.norm_then(self.conv(x), self.bn, self.act)


def written_again():
    class Unit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Another docstring."""
            # and a comment
            return self.act(
                self.bn(self.conv(x)),
            )

    return Unit


def written_otherwise():
    class Unit(nn.Module):
        def forward(self, x):
            return self.act(self.bn(self.conv(x)) + 0)

    return Unit


def ran(model, *args, **kwargs):
    model(*args, **kwargs)
    return {(e.path, e.what): e.times for e in fused_ops.report(model).fused}


# --- A rule of one's own ----------------------------------------------------------------------------------------------


def test_five_lines(registry):
    @rules.register(Unit)
    def forward(self, x):
        return rules.norm_then(self.conv(x), self.bn, self.act)

    theirs = nn.Sequential(Unit(), Unit(nn.GELU))
    ours = copy.deepcopy(theirs)
    report = fused_ops.convert(ours)
    assert {e.path: e.now for e in report.replaced if e.what == "Unit"} == {"0": "by its rule", "1": "by its rule"}
    assert isinstance(ours[0], Unit) and repr(ours) == repr(theirs)
    assert inspect.signature(ours[0].forward) == inspect.signature(theirs[0].forward)
    assert_alike(theirs, ours, torch.randn(2, 3, 4, 4))
    assert ran(ours, torch.randn(2, 3, 4, 4)) == {("0.bn", "relu"): 1, ("1.bn", "gelu"): 1}
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin[0]) is type(ours[0])
        fused_ops.revert(twin)
        assert [type(m) for m in twin.modules()] == [type(m) for m in theirs.modules()]
    fused_ops.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_without_fusing_blocks_stay(registry):
    rules.register(Unit)(unit)
    model = Unit()
    report = fused_ops.convert(model, fuse_activations=False)
    assert [e.path for e in report.replaced] == ["bn"] and type(model) is Unit


def test_only_the_exact_class(registry):
    rules.register(Unit)(unit)

    class Derived(Unit):
        def forward(self, x):
            return super().forward(x) * 2

    theirs = nn.Sequential(Derived())
    ours = copy.deepcopy(theirs)
    assert [e.path for e in fused_ops.convert(ours).replaced] == ["0.bn"]
    assert_alike(theirs, ours, torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("put", ["forward", "hook"])
def test_an_instance_with_something_of_its_own_is_left_alone(registry, put):
    rules.register(Unit)(unit)
    model = nn.Sequential(Unit(), Unit())
    if put == "forward":
        model[0].forward = lambda x: x * 2
    else:
        model[0].register_forward_hook(lambda module, args, output: output * 2)
    report = fused_ops.convert(model)
    assert type(model[0]) is Unit and type(model[1]) is not Unit
    assert [(e.path, "instance" in e.reason or "hooks" in e.reason) for e in report.left] == [("0", True)]


def test_a_class_whose_forward_is_another_now(registry, monkeypatch):
    rules.register(Unit)(unit)
    monkeypatch.setattr(Unit, "forward", lambda self, x: self.act(self.bn(self.conv(x))) * 2)
    model = Unit()
    report = fused_ops.convert(model)
    assert type(model) is Unit and ["another forward" in e.reason for e in report.left] == [True]


# --- Fingerprints ---------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_what_the_source_does():
    assert rules.fingerprint(Unit) == rules.fingerprint(written_again())
    assert rules.fingerprint(Unit) != rules.fingerprint(written_otherwise())
    compiled = type("Compiled", (nn.Module,), {})
    exec("def forward(self, x):\n    return x", scope := {})
    compiled.forward = scope["forward"]
    with pytest.raises(ValueError, match="source cannot be read"):
        rules.fingerprint(compiled)
    compiled.forward = torch.no_grad()(Unit.forward)
    with pytest.raises(ValueError, match="decorated"):
        rules.fingerprint(compiled)


def test_a_fingerprint_that_does_not_match_is_said(registry):
    name = f"{Unit.__module__}.{Unit.__qualname__}"
    rules.register(name, rules.fingerprint(written_otherwise()), "0123")(unit)
    model = nn.Sequential(Unit())
    report = fused_ops.convert(model)
    assert type(model[0]) is Unit and [e.path for e in report.replaced] == ["0.bn"]
    assert "another version of its library" in report.left[0].reason and "another version" in str(report)
    rules.register(name, rules.fingerprint(Unit))(unit)
    assert ran(model if fused_ops.convert(model) else None, torch.randn(2, 3, 4, 4)) == {("0.bn", "relu"): 1}


@pytest.mark.parametrize(
    "arguments, kind, error",
    [
        (("a.B",), "block", (ValueError, "expected a fingerprint with the name 'a.B'")),
        ((Unit,), "bolck", (ValueError, "expected kind to be one of")),
        ((3,), "block", (TypeError, "expected target to be a class of modules")),
        ((int,), "block", (TypeError, "expected target to be a class of modules")),
    ],
)
def test_errors(arguments, kind, error):
    with pytest.raises(error[0], match=error[1]):
        rules.register(*arguments, kind=kind)


# --- No code of the class is run --------------------------------------------------------------------------------------


class Meta(type):
    made: ClassVar = []

    def __new__(cls, name, bases, namespace):
        cls.made.append(name)
        return super().__new__(cls, name, bases, namespace)


class Watchful(nn.Sequential, metaclass=Meta):
    seen: ClassVar = []

    def __init_subclass__(cls, **options):
        cls.seen.append(cls)

    def __setattr__(self, name, value):
        self.seen.append(name)
        super().__setattr__(name, value)


def test_classes_that_watch_their_subclasses_and_attributes():
    theirs = Watchful(nn.BatchNorm1d(3), nn.ReLU())
    ours = copy.deepcopy(theirs)
    made, seen = list(Meta.made), list(Watchful.seen)
    fused_ops.convert(ours)
    assert (made, seen) == (Meta.made, Watchful.seen) and type(ours) is not Watchful
    assert_alike(theirs, ours, torch.randn(4, 3))
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin) is type(ours)
    fused_ops.revert(ours)
    assert type(ours) is Watchful


def test_sequentials_that_go_their_own_way():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(list(self._modules.values()))

    theirs = Backwards(nn.ReLU(), nn.BatchNorm1d(3), nn.Tanh())
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours)
    assert type(ours) is Backwards
    assert_alike(theirs, ours, torch.randn(4, 3))


# --- What is decided at each call -------------------------------------------------------------------------------------


def block():
    torch.manual_seed(0)
    return Block(3, nn.ReLU(), down=True)


def replaced_by_a_subclass(model):
    class Twice(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model.bn2 = Twice(3)


def in_place_shortcut(model):
    model.down = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))


def one_norm_for_both(model):
    model.down = nn.Sequential(nn.Conv2d(3, 3, 1), model.bn2)


def another_dtype(model):
    model.down = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), Cast())


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


def another_layout(model):
    model.down = nn.Sequential(nn.Conv2d(3, 3, 1), ChannelsLast())


def smaller(model):
    model.down = nn.AdaptiveAvgPool2d(1)


def frozen(model):
    model.bn2.eval()


CHANGES = [
    replaced_by_a_subclass,
    in_place_shortcut,
    one_norm_for_both,
    another_dtype,
    another_layout,
    smaller,
    frozen,
    lambda model: setattr(model, "down", None),
    lambda model: setattr(model, "bn2", nn.Identity()),
    lambda model: setattr(model, "relu", nn.ReLU6()),
    lambda model: setattr(model, "relu", nn.Sequential(nn.ReLU())),
    lambda model: model.down[1].register_forward_hook(lambda module, args, output: output * 2) and None,
    lambda model: setattr(model.bn1, "forward", types.MethodType(lambda self, x: x * 2, model.bn1)),
    lambda model: parametrize_weight(model.bn2),
]


def parametrize_weight(module):
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_blocks_give_way(change):
    """Each of these makes the fused block another function, unless it looks at its modules in each call."""
    results = []
    for convert in (False, True):
        model = block()
        if convert:
            fused_ops.convert(model)
        torch.manual_seed(1)
        change(model)
        model.double()
        x = torch.arange(96.0, dtype=torch.float64).sin().view(2, 3, 4, 4).requires_grad_()
        y = model(x * 1)
        y.sin().sum().backward()
        strides = y.stride()
        results.append((y.detach(), x.grad, [p.grad for p in model.parameters()], list(model.buffers()), strides))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-9)


def test_global_hooks_see_every_module():
    seen, model = [], block()
    fused_ops.convert(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    model(torch.randn(2, 3, 4, 4))
    handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "Sequential"] + [
        "ReLU",
        "Block",
    ]


# --- Kinds of rules ---------------------------------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """As detectron2's and torchvision's."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


def test_frozen_batch_norms_by_registration(registry):
    from fused_ops.conversion.blocks import frozen_batch_norm, serves_frozen

    rules.register(FrozenBatchNorm2d, kind="norm", takes=serves_frozen)(frozen_batch_norm)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.ReLU())
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours)
    x = torch.randn(2, 3, 5, 5)
    assert_alike(theirs, ours, x)
    for dtype in (torch.float32, torch.bfloat16):  # the buffers of float32 make the result float32
        h = torch.randn(2, 4, 5, 5).to(dtype)
        with torch.no_grad():
            expected, found = theirs[1:](h), ours[1:](h)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert ran(ours, x) == {("1", "relu"): 2}  # the float32 call above and this one
    assert list(ours.state_dict()) == list(theirs.state_dict())


class Smooth(nn.Module):
    """A label-smoothing wrapper."""

    def forward(self, logits, target):
        return F.cross_entropy(logits, target, label_smoothing=0.1)


def test_losses_by_rule(registry):
    @rules.register(Smooth, kind="loss")
    def smooth(self, logits, target):
        return fused_ops.cross_entropy(logits, target, label_smoothing=0.1)

    loss, (x, y) = Smooth(), (torch.randn(4, 5), torch.tensor([0, 4, 2, 1]))
    expected = loss(x, y)
    report = fused_ops.convert(nn.Linear(3, 5), loss=loss)
    assert ("loss", "Smooth") in [(e.path, e.what) for e in report.replaced]
    torch.testing.assert_close(loss(x, y), expected)
    assert fused_ops.revert(loss) == [""] and type(loss) is Smooth


# --- Well-known libraries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(rules._rules))
def test_rules_know_the_installed_version(name):
    """Of those libraries that are installed; another version of one needs a look at its forward, and a fingerprint."""
    module, _, kind = name.rpartition(".")
    if module == "test_convert":
        pytest.skip("a rule of the tests")
    pytest.importorskip(module.partition(".")[0], exc_type=(ImportError, RuntimeError))
    found = getattr(importlib.import_module(module), kind)
    assert rules.rule_of(found)[0] is rules._rules[name]


def torchvision_resnet(which):
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    return getattr(models, which)(num_classes=4)


def timm_model(which, **options):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    return timm.create_model(which, num_classes=4, **options)


MODELS = {
    "torchvision resnet18": (lambda: torchvision_resnet("resnet18"), 16),
    "torchvision resnext50": (lambda: torchvision_resnet("resnext50_32x4d"), 48),
    "timm resnet18": (lambda: timm_model("resnet18"), 16),
    "timm resnet26d": (lambda: timm_model("resnet26d", drop_path_rate=0.0), 26),
    "timm efficientnet": (lambda: timm_model("efficientnet_b0"), 33),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    build, fused = MODELS[name]
    torch.manual_seed(0)
    theirs = build().double()
    ours = copy.deepcopy(theirs)
    report = fused_ops.convert(ours)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        model(x).square().sum().backward()
        results.append(([p.grad for p in model.parameters()], list(model.buffers())))
    assert len(report.fused) == fused and report.left == []
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)

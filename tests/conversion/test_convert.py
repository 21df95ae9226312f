"""convert and revert: what is replaced and fused, what is left alone, and that nothing else changes."""

import copy
import functools
import io
import pickle
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_patch import called
from torch import nn
from torch.nn.utils import parametrize

import fused_ops
from fused_ops.conversion import api, records, rules


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU module for both places, added in place."""

    def __init__(self, channels, activation=None, down=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = activation or nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if down else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out)


@rules.register(Block)
def fused_block(self, x):
    out = rules.norm_then(self.conv1(x), self.bn1, self.relu)
    return rules.norm_add_then(self.conv2(out), self.bn2, self.down, x, self.relu)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        Block(6),
        Block(6, nn.SiLU(), down=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pair(build):
    """The same model twice, the second converted."""
    torch.manual_seed(0)
    theirs = build()
    ours = copy.deepcopy(theirs)
    return theirs, ours, fused_ops.convert(ours)


def assert_alike(theirs, ours, *inputs):
    """Outputs, gradients of inputs and parameters, and buffers, in training and in evaluation; float64."""
    theirs, ours = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    for training in (True, False):
        found = []
        for model in (theirs, ours):
            model.train(training)
            leaves = [t.double().clone().requires_grad_() for t in inputs]
            torch.manual_seed(1)
            output = model(*(leaf * 1 for leaf in leaves))
            wanted = [*leaves, *model.parameters()]
            grads = torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), wanted,
                                        allow_unused=True)  # fmt: skip
            found.append((output.detach(), grads, list(model.buffers())))
        torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


class Wrap(nn.Module):
    """A module around a function of batch norm and other children."""

    def __init__(self, function, **children):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function


def wrap(function, **children):
    """A class of its own for each function: its forward is the function."""
    kind = type("Wrapped", (Wrap,), {"forward": function})
    return kind(None, **children)


# --- What is replaced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norm_is_replaced_in_place(dimensions, options):
    module = getattr(nn, f"BatchNorm{dimensions}d")(3, **options)
    model = nn.Sequential(module)
    before, keys = dict(module.__dict__), list(model.state_dict())
    twin = copy.deepcopy(model)
    report = fused_ops.convert(model)
    assert [(e.path, e.what) for e in report.replaced] == [("0", f"BatchNorm{dimensions}d")]
    assert model[0] is module and type(module) is getattr(fused_ops, f"BatchNorm{dimensions}d")
    assert list(model.state_dict()) == keys
    assert_alike(twin, model, torch.randn(4, 3, *[2] * (dimensions if dimensions > 1 else 0)))
    assert fused_ops.revert(model) == ["0"]
    assert type(module) is getattr(nn, f"BatchNorm{dimensions}d") and module.__dict__ == before


def test_the_model_itself_may_be_one():
    module = nn.BatchNorm1d(3)
    assert [e.path for e in fused_ops.convert(module).replaced] == [""]
    assert type(module) is fused_ops.BatchNorm1d
    fused_ops.revert(module)
    assert type(module) is nn.BatchNorm1d


def test_raw_ops_are_called():
    theirs, ours, _ = pair(network)
    x = torch.randn(2, 3, 8, 8)
    assert called(lambda: theirs(x)) == []
    names = called(lambda: ours(x))
    assert names.count("batch_norm_plain_forward") == 4 and names.count("batch_norm_forward") == 2
    block = Block(3)
    theirs, ours, _ = pair(
        lambda: nn.Sequential(block, nn.BatchNorm2d(3), nn.Identity(), nn.Dropout(0.5).eval(), nn.ELU())
    )
    assert_alike(theirs, ours, torch.randn(2, 3, 4, 4))


def test_network():
    theirs, ours, report = pair(network)
    assert report.fused == []  # nothing has run
    assert_alike(theirs, ours, torch.randn(3, 3, 9, 9))  # copies
    assert report.fused == []
    ours.train()(torch.randn(3, 3, 9, 9))
    assert {e.path: (e.what, e.times) for e in report.fused} == {
        "1": ("leaky_relu", 1),
        "3.bn1": ("relu", 1),
        "3.bn2": ("add, relu", 1),
        "4.bn1": ("silu", 1),
        "4.bn2": ("add, silu", 1),
    }
    assert sorted(e.path for e in report.replaced) == [
        "",
        "1",
        "3",
        "3.bn1",
        "3.bn2",
        "4",
        "4.bn1",
        "4.bn2",
        "4.down.1",
    ]
    assert report.left == [] and report.notes == [n for n in report.notes if "plain PyTorch" in n]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)


def test_references_hooks_mode_and_optimizer_stay():
    model = network()
    model[1].eval()
    model[3].bn1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    modules = [id(m) for m in model.modules()]
    fused_ops.convert(model)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == ids
    assert [id(m) for m in model.modules()] == modules
    assert not model[1].training and model[3].training and not model[3].bn1.weight.requires_grad
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    before = model[3].bn2.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[3].bn2.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_stays(dtype):
    model = network().to(dtype)
    fused_ops.convert(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_meta_device():
    with torch.device("meta"):
        model = network()
    fused_ops.convert(model)
    assert model(torch.randn(2, 3, 8, 8, device="meta")).shape == (2, 4)


class Trainer(nn.Module):
    """A model with its loss."""

    def __init__(self, options):
        super().__init__()
        self.loss, self.head = nn.CrossEntropyLoss(**options), nn.Linear(3, 4)

    def forward(self, x, y):
        return self.loss(self.head(x), y)


@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(4)}, {"label_smoothing": 0.1, "reduction": "sum"}])
def test_cross_entropy_is_replaced_in_place(options):
    theirs, ours, report = pair(lambda: Trainer(options))
    module, before = ours.loss, {**theirs.loss.__dict__}
    assert [e.path for e in report.replaced] == ["loss"] and type(module) is fused_ops.CrossEntropyLoss
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, y = torch.randn(5, 3), torch.tensor([0, 3, 1, -100, 2])
    assert "cross_entropy" in called(lambda: ours(x, y))[0] and called(lambda: theirs(x, y)) == []
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    twin = pickle.loads(pickle.dumps(ours))
    fused_ops.revert(twin)
    for model in (ours, twin):
        fused_ops.revert(model)
        assert type(model.loss) is nn.CrossEntropyLoss and model.loss.__dict__.keys() == before.keys()
        assert list(model.loss._buffers) == list(before["_buffers"])
        assert model.loss._non_persistent_buffers_set == set()
        torch.testing.assert_close(model(x, y), theirs(x, y))


def test_lazy():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    fused_ops.convert(model)
    assert type(model[0]) is fused_ops.LazyBatchNorm2d
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())(x))
    assert type(model[0]) is fused_ops.BatchNorm2d
    fused_ops.revert(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_shared_module_and_tied_parameters():
    def build():
        bn = nn.BatchNorm1d(3)
        model = nn.ModuleDict({"a": nn.Sequential(bn, nn.Tanh()), "b": nn.Sequential(nn.Linear(3, 3), bn)})
        model["c"] = nn.BatchNorm1d(3)
        model["c"].weight = bn.weight
        return nn.Sequential(model["a"], model["b"], model["c"])

    theirs, ours, report = pair(build)
    assert [e.path for e in report.replaced if e.what == "BatchNorm1d"] == ["0.0", "2"]  # the shared one once
    assert ours[0][0] is ours[1][1] and ours[0][0].weight is ours[2].weight
    assert_alike(theirs, ours, torch.randn(5, 3))
    assert ours[0][0].num_batches_tracked == 0
    ours(torch.randn(5, 3))
    assert ours[0][0].num_batches_tracked == 2


def test_called_past_the_container():
    """Batch norm is batch norm for whoever calls it, whatever its own container fuses."""

    class Reaches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh())

        def forward(self, x):
            return self.inner[0](x) + self.inner(x)

    theirs, ours, report = pair(Reaches)
    assert_alike(theirs, ours, torch.randn(5, 3))
    ours(torch.randn(5, 3))
    assert [(e.path, e.times) for e in report.fused] == [("inner.0", 1)]


# --- What is left alone ------------------------------------------------------------------------------------------


class Mine(nn.BatchNorm2d):
    pass


def test_left_alone_with_a_reason():
    changed, parametrized, hooked = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    changed.forward = lambda x: x
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    hooked.register_forward_hook(lambda module, args, output: None)
    users = fused_ops.BatchNorm2d(3, activation="relu")
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    model = nn.ModuleList([Mine(3), nn.SyncBatchNorm(3), changed, parametrized, users, nn.InstanceNorm2d(3), hooked])
    model.append(scripted)
    kinds = [type(m) for m in model]
    report = fused_ops.convert(model)
    assert report.replaced == [] and [type(m) for m in model] == kinds
    reasons = {e.path: e.reason for e in report.left}
    assert set(reasons) == {"0", "1", "2", "3", "6", "7"}
    assert "subclass" in reasons["0"] and "over processes" in reasons["1"] and "instance" in reasons["2"]
    assert "hooks" in reasons["6"] and "scripted" in reasons["7"] and all(r in str(report) for r in reasons.values())
    assert fused_ops.revert(model) == [] and users.activation == "relu"


def test_global_hooks_leave_all_alone():
    model = network()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    report = fused_ops.convert(model)
    handle.remove()
    assert report.replaced == [] and {e.reason for e in report.left} == {"there are global hooks"}


def test_a_class_whose_forward_was_replaced_is_left_alone(monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    report = fused_ops.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert report.replaced == [] and ["forward of its class" in e.reason for e in report.left] == [True]


def test_twice_says_so_and_changes_nothing():
    model = network()
    fused_ops.convert(model)
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="converted already"):
        fused_ops.convert(model)
    assert [(type(m), m.__dict__) for m in model.modules()] == before
    model.append(nn.BatchNorm1d(4))
    assert [e.path for e in fused_ops.convert(model).replaced] == ["8"]  # what has come since
    kinds = [type(m) for m in [*network().modules(), nn.BatchNorm1d(4)]]
    fused_ops.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert fused_ops.revert(model) == []


def compiled_in_place():
    model = network()
    model.compile(backend="eager")
    return model


BAD_MODELS = {
    "a function": (lambda: lambda x: x, "to be a torch.nn.Module, got function"),
    "None": (lambda: None, "to be a torch.nn.Module, got NoneType"),
    "compiled": (lambda: torch.compile(network(), backend="eager"), "got a compiled one"),
    "compiled in place": (compiled_in_place, "got a compiled one"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))), "got a scripted or traced one"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_what_is_no_model_to_convert(name):
    build, message = BAD_MODELS[name]
    model = build()
    kinds = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(TypeError, match=message):
        fused_ops.convert(model)
    assert kinds == ([type(m) for m in model.modules()] if kinds else [])


@pytest.mark.parametrize(
    "loss, said",
    [
        (nn.MSELoss(), "MSELoss"),
        (nn.NLLLoss(), "NLLLoss"),
        (F.mse_loss, "mse_loss"),
        (functools.partial(F.binary_cross_entropy, reduction="sum"), "binary_cross_entropy"),
        (3, "int"),
    ],
)
def test_a_loss_that_is_no_cross_entropy(loss, said):
    model = network()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=rf"expected loss to be a cross-entropy .*, got {said}"):
        fused_ops.convert(model, loss=loss)
    assert [type(m) for m in model.modules()] == kinds


def test_a_head_or_a_target_without_a_loss():
    for options in ({"head": "7"}, {"target": torch.tensor([1])}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} goes with a loss"):
            fused_ops.convert(network(), **options)


class Fails(nn.Module):
    """Whose forward fails, after convert has changed everything."""

    def __init__(self):
        super().__init__()
        self.inner, self.loss = network(), nn.CrossEntropyLoss()

    def forward(self, x):
        self.inner(x)
        raise KeyError("on purpose")


def state_of(model):
    return [(type(m), dict(m.__dict__), list(m._buffers), set(m._non_persistent_buffers_set)) for m in model.modules()]


def test_all_or_nothing(monkeypatch):
    model = Fails()
    before = state_of(model)
    with pytest.raises(KeyError, match="on purpose"):
        fused_ops.convert(model, sample=torch.randn(2, 3, 8, 8))
    assert state_of(model) == before
    fused_ops.convert(model)
    converted = state_of(model)
    calls = []

    def become_once(module, kind):
        calls.append(kind)
        if len(calls) == 3:
            raise MemoryError
        object.__setattr__(module, "__class__", kind)

    monkeypatch.setattr(api, "become", become_once)
    with pytest.raises(MemoryError):
        fused_ops.revert(model)
    assert state_of(model) == converted


def test_revert_restores_everything():
    model = network()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    fused_ops.convert(model)
    model(torch.randn(2, 3, 8, 8))
    fused_ops.revert(model)
    assert [(type(m), m.__dict__) for m in model.modules()] == before


def test_without_fusing():
    theirs, ours = network(), network()
    report = fused_ops.convert(ours, fuse_activations=False)
    assert report.fused == [] and type(ours[3]) is Block and type(ours) is nn.Sequential
    assert_alike(theirs, ours, torch.randn(3, 3, 9, 9))


# --- Forwards that only Python can follow stay as they are --------------------------------------------------------


def by_mode(self, x):
    return F.relu(self.bn(x)) if self.bn.training else F.silu(self.bn(x))


def counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(self.bn(x))


@torch.no_grad()
def decorated(self, x):
    return F.relu(self.bn(x))


def mutates_between(self, x):
    skip = x + 1
    y = self.bn(x)
    skip.mul_(2)
    return F.relu(y + skip)


def twice(self, x):
    return F.relu(self.bn(x) + self.bn(2 * x))


def random_depth(self, x):
    return F.relu(self.bn(x)) if random.random() < 0.5 else x


FORWARDS = [by_mode, counts, decorated, mutates_between, twice, random_depth]


@pytest.mark.parametrize("function", FORWARDS, ids=[f.__name__ for f in FORWARDS])
def test_forwards_are_never_rewritten(function):
    theirs, ours, report = pair(lambda: wrap(function))
    assert [e.path for e in report.replaced] == ["bn"] and type(ours) is type(theirs)
    for training in (True, False):
        results = []
        for model in (theirs.train(training), ours.train(training)):
            random.seed(3)
            x = torch.arange(15.0).view(5, 3).sin().requires_grad_()
            output = model(x * 1)
            grads = torch.autograd.grad(output.square().sum(), x) if output.requires_grad else []
            results.append((output.detach(), grads, list(model.buffers())))
        torch.testing.assert_close(results[1], results[0])
    assert getattr(ours, "calls", None) == getattr(theirs, "calls", None)
    assert report.fused == [] and "torch.compile(model, backend='fused_ops')" in str(report)


# --- What gives way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watch", ["bn1", "relu"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_see_what_they_would_have_seen(watch, kind):
    results = []
    for converted in (False, True):
        torch.manual_seed(0)
        block = Block(3, nn.ReLU())
        if converted:
            fused_ops.convert(block)
        seen = []
        handle = getattr(getattr(block, watch), kind)(lambda module, *values, seen=seen: seen.append(values))
        block(torch.ones(2, 3, 4, 4, requires_grad=True).cumsum(3)).sin().sum().backward()
        handle.remove()
        results.append(seen)
    assert len(results[0]) == (1 if watch == "bn1" else 2)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "relu", nn.Tanh()),
        lambda block: setattr(block, "bn1", nn.Identity()),
        lambda block: setattr(block, "bn2", nn.BatchNorm2d(3, eps=1.0)),
        lambda block: setattr(block, "down", nn.Conv2d(3, 3, 1, bias=False)),
        lambda block: block.add_module("bn1", nn.Identity()),
        lambda block: nn.SyncBatchNorm.convert_sync_batchnorm(block),
        lambda block: block.bn1.__dict__.update(eps=2.0),
    ],
)
def test_changes_after_the_conversion_count(change):
    theirs, ours, _ = pair(lambda: Block(3))
    for block in (theirs, ours):
        torch.manual_seed(5)
        change(block)
    assert_alike(theirs.eval(), ours.eval(), torch.randn(2, 3, 4, 4))


def test_sequential_may_grow():
    theirs, ours, _ = pair(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    for model in (theirs, ours):
        model.append(nn.Tanh())
        model.insert(1, nn.Sigmoid())
    assert_alike(theirs, ours, torch.randn(5, 3))


def test_a_dropout_that_switches_on_is_not_passed_over():
    def build():
        return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU()).eval()

    theirs, ours, report = pair(build)
    ours(torch.randn(5, 3))
    assert [e.times for e in report.fused] == [1]
    assert_alike(theirs, ours, torch.randn(5, 3))  # in training too, with the same random numbers
    ours.train()(torch.randn(5, 3))
    assert [e.times for e in report.fused] == [1]


# --- Copies ------------------------------------------------------------------------------------------------------


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies(twin_of):
    model = network()
    before = network()
    fused_ops.convert(model)
    twin = twin_of(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert_alike(model, twin, torch.randn(2, 3, 8, 8))
    fused_ops.revert(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in before.modules()]


def test_state_dicts_go_both_ways():
    theirs, ours, _ = pair(network)
    ours(torch.randn(2, 3, 8, 8))
    theirs.load_state_dict(ours.state_dict())
    fresh = network()
    fused_ops.convert(fresh)
    fresh.load_state_dict(theirs.state_dict())
    assert_alike(theirs, fresh, torch.randn(2, 3, 8, 8))


# --- The report --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_a_sample_runs_once_and_leaves_all_as_it_was(kind):
    model = network()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 10, 10)
    states = torch.get_rng_state(), random.getstate()
    sample = {"tensor": x, "tuple": (x,), "mapping": {"input": x}}[kind]
    report = fused_ops.convert(model, sample=sample)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert [(e.what, e.times) for e in report.fused] == [
        ("leaky_relu", 1), ("relu", 1), ("add, relu", 1), ("silu", 1), ("add, silu", 1)
    ]  # fmt: skip
    assert "5 of 6 batch norms" in str(report) and "2 with add, " not in str(report)
    assert str(fused_ops.report(model)).count("5 of 6 batch norms") == 1


def test_report_at_any_time():
    model = network()
    assert "nothing" in str(fused_ops.report(model))
    fused_ops.convert(model)
    report = fused_ops.report(model)
    model(torch.randn(2, 3, 8, 8))
    model.eval()(torch.randn(2, 3, 8, 8))
    assert {e.times for e in report.fused} == {2} and len(report.replaced) == 9
    assert str(fused_ops.report(model)) == str(report) and "by its rule" in str(report)
    part = fused_ops.report(model[3])
    assert [(e.path, e.what) for e in part.fused] == [("bn1", "relu"), ("bn2", "add, relu")]
    with pytest.raises(TypeError, match="expected model to be"):
        fused_ops.report(3)


def test_report_shows_kinds_not_modules():
    model = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()) for _ in range(50)))
    assert 5 < len(str(fused_ops.convert(model, sample=torch.randn(4, 3))).splitlines()) < 15


@pytest.mark.parametrize("after", [nn.ReLU6(), nn.GELU(approximate="tanh"), nn.Mish()])
def test_report_names_activations_that_stay_apart(after):
    model = nn.Sequential(nn.BatchNorm1d(3), after)
    report = fused_ops.convert(model, sample=torch.randn(4, 3))
    assert report.fused == [] and f"1 on their own: before {type(after).__name__}" in str(report)


def test_what_is_shown_of_graphs(monkeypatch):
    monkeypatch.setattr(records, "GRAPHS", [])
    assert "no graph yet" in str(fused_ops.report())
    fused, left = Counter({"batch_norm + relu": 3}), Counter({"batch_norm: its result is used twice": 1})
    records.GRAPHS.append(records.GraphRecord(fused, left, 7))
    text = str(fused_ops.report())
    assert "run 7 times" in text and "batch_norm + relu" in text and "used twice" in text

"""convert and revert: what is replaced and fused, what is left alone, and that nothing else changes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_patch import called
from torch import nn
from torch.nn.utils import parametrize

import fused_ops


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


def test_network():
    theirs, ours, report = pair(network)
    assert {e.path: e.what for e in report.fused} == {
        "1": "LeakyReLU",
        "3.bn1": "ReLU",
        "3.bn2": "add, ReLU",
        "4.bn1": "SiLU",
        "4.bn2": "add, SiLU",
    }
    assert (
        len(report.replaced) == 6
        and report.left == []
        and report.notes == [n for n in report.notes if "plain PyTorch" in n]
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert_alike(theirs, ours, torch.randn(3, 3, 9, 9))


def test_references_hooks_mode_and_optimizer_stay():
    model = network()
    model[1].eval()
    model[3].bn1.weight.requires_grad_(False)
    seen = []
    handle = model[4].bn1.register_forward_hook(lambda m, i, o: seen.append(o))
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
    handle.remove()
    assert len(seen) == 1


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
    assert [e.path for e in report.replaced] == ["0.0", "2"]  # the shared one once
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
    assert [e.path for e in report.fused] == ["inner.0"]
    assert_alike(theirs, ours, torch.randn(5, 3))


# --- What is left alone ------------------------------------------------------------------------------------------


def test_left_alone_with_a_reason():
    class Mine(nn.BatchNorm2d):
        pass

    changed, parametrized = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    changed.forward = lambda x: x
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    users = fused_ops.BatchNorm2d(3, activation="relu")
    model = nn.ModuleList([Mine(3), nn.SyncBatchNorm(3), changed, parametrized, users, nn.InstanceNorm2d(3)])
    kinds = [type(m) for m in model]
    report = fused_ops.convert(model)
    assert report.replaced == [] and [type(m) for m in model] == kinds
    reasons = {e.path: e.reason for e in report.left}
    assert set(reasons) == {"0", "1", "2", "3"}
    assert "subclass" in reasons["0"] and "over processes" in reasons["1"] and "instance" in reasons["2"]
    assert fused_ops.revert(model) == [] and users.activation == "relu"


def test_twice_is_once():
    model = network()
    fused_ops.convert(model)
    again = fused_ops.convert(model)
    assert again.replaced == [] and again.fused == [] and {e.reason for e in again.left} == {"already converted"}
    kinds = [type(m) for m in network().modules()]
    fused_ops.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert fused_ops.revert(model) == []


def test_revert_restores_everything():
    model = network()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    fused_ops.convert(model)
    fused_ops.revert(model)
    assert [(type(m), m.__dict__) for m in model.modules()] == before


def test_without_fusing():
    theirs, ours = network(), network()
    report = fused_ops.convert(ours, fuse_activations=False)
    assert report.fused == [] and type(ours[3]) is Block and type(ours) is nn.Sequential
    assert_alike(theirs, ours, torch.randn(3, 3, 9, 9))


def test_not_a_module():
    with pytest.raises(TypeError, match="expected model to be"):
        fused_ops.convert(lambda x: x)


# --- What is fused -----------------------------------------------------------------------------------------------

FUSED = {
    "F.relu": lambda self, x: F.relu(self.bn(x)),
    "inplace": lambda self, x: F.relu(self.bn(x), inplace=True),
    "method": lambda self, x: self.bn(x).tanh(),
    "sigmoid": lambda self, x: torch.sigmoid(self.bn(x)),
    "silu": lambda self, x: F.silu(self.bn(x)),
    "gelu": lambda self, x: F.gelu(self.bn(x)),
    "hardswish": lambda self, x: F.hardswish(self.bn(x)),
    "leaky": lambda self, x: F.leaky_relu(self.bn(x), 0.3),
    "leaky by name": lambda self, x: F.leaky_relu(self.bn(x), negative_slope=0.3, inplace=True),
    "elu": lambda self, x: F.elu(self.bn(x), 0.7),
    "elu default": lambda self, x: F.elu(self.bn(x)),
    "add": lambda self, x: self.bn(x) + x,
    "add from the left": lambda self, x: F.relu(x + self.bn(x)),
    "torch.add": lambda self, x: torch.add(self.bn(x), x).relu(),
    "add_": lambda self, x: self.bn(x).add_(x).relu_(),
    "residual after": lambda self, x: F.relu(self.bn(x) + x.cos().sin()),
    "default argument": lambda self, x, skip=None: F.relu(self.bn(x)) if skip is None else self.bn(x) + skip,
    "keyword": lambda self, *, x=None: x,
}
ALONE = {
    "used twice": lambda self, x: F.relu(h := self.bn(x)) + h,
    "result": lambda self, x: self.bn(x),
    "tanh gelu": lambda self, x: F.gelu(self.bn(x), approximate="tanh"),
    "scaled add": lambda self, x: torch.add(self.bn(x), x, alpha=2).relu() * 2,
    "number": lambda self, x: (self.bn(x) + 1).cos(),
    "random": lambda self, x: F.relu(self.bn(x)) * float(torch.rand(())),
    "own constant": lambda self, x: F.relu(self.bn(x)) * torch.ones(3),
    "control flow": lambda self, x: F.relu(self.bn(x)) if x.sum() > 0 else self.bn(x),
    "isinstance": lambda self, x: F.relu(self.bn(x)) if isinstance(x, torch.Tensor) else x,
    "one in-place": lambda self, x: (x + 0).add_(self.bn(x)),
}


@pytest.mark.parametrize("name", [n for n in FUSED if n != "keyword"])
def test_fused(name):
    theirs, ours, report = pair(lambda: wrap(FUSED[name]))
    assert [e.path for e in report.fused] == ["bn"], report.notes
    assert_alike(theirs, ours, torch.randn(5, 3))
    op = "act" if "add" in name or "residual" in name else "packed"
    assert called(lambda: ours(torch.randn(5, 3))) == [f"batch_norm_{op}_forward"]


@pytest.mark.parametrize("name", ALONE)
def test_not_fused(name):
    theirs, ours, report = pair(lambda: wrap(ALONE[name]))
    if name != "random":
        assert_alike(theirs, ours, torch.randn(5, 3))
    assert [e.path for e in report.replaced] == ["bn"] and report.fused == []
    assert type(ours) is type(theirs)


def grad_mode(self, x):
    with torch.no_grad():
        h = F.relu(self.bn(x))
    return h * x


def counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(self.bn(x))


@torch.no_grad()
def decorated(self, x):
    return F.relu(self.bn(x))


def mutates_between(self, x):
    y = self.bn(x)
    x.mul_(2)
    return F.relu(y) + x


def mutates_by_operator(self, x):
    y = self.bn(x)
    x += 1
    return F.relu(y) + x


def mutator(x):
    return x.mul_(2)


def mutates_by_function(self, x):
    x = x + 0
    y = self.bn(x)
    return F.relu(y + mutator(x))


def adds_into_what_is_used_again(self, x):
    skip = x.cos()
    h = skip
    h += self.bn(x)
    return F.relu(h) + skip


@pytest.mark.parametrize(
    "function",
    [
        grad_mode,
        counts,
        decorated,
        mutates_between,
        mutates_by_operator,
        adds_into_what_is_used_again,
        mutates_by_function,
    ],
)
def test_forwards_that_tracing_would_change(function):
    theirs, ours, report = pair(lambda: wrap(function))
    assert report.fused == []
    x = torch.randn(5, 3)
    results = [model(x.clone().requires_grad_() * 1) for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    assert results[0].requires_grad == results[1].requires_grad
    assert getattr(ours, "calls", None) == getattr(theirs, "calls", None)


def helper(x):
    return x * int(x.shape[0])  # which torch.fx cannot follow


def uses_a_function(self, x):
    return helper(F.relu(self.bn(helper(x))))


def test_functions_of_the_file_are_called_not_traced():
    theirs, ours, report = pair(lambda: wrap(uses_a_function))
    assert [e.path for e in report.fused] == ["bn"], report.notes
    assert_alike(theirs, ours, torch.randn(5, 3))
    assert_alike(theirs, ours, torch.randn(7, 3))


def by_mode(self, x):
    h = self.bn(x)
    return F.silu(h) if self.training else F.relu(h)


def test_forward_that_depends_on_the_mode():
    theirs, ours, report = pair(lambda: wrap(by_mode))
    assert len(report.fused) == 1
    assert_alike(theirs, ours, torch.randn(5, 3))


def test_other_arguments_take_the_own_forward():
    theirs, ours, _ = pair(lambda: wrap(FUSED["default argument"]))
    x, skip = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(ours(x, skip), theirs(x, skip))
    torch.testing.assert_close(ours(x, skip=skip), theirs(x, skip=skip))
    torch.testing.assert_close(ours(x=x), theirs(x=x))


@pytest.mark.parametrize("residual", [torch.randn(1, 3), torch.randn(3), torch.randn(5, 3).double(), 2.0])
def test_residual_of_another_shape_or_dtype(residual):
    theirs, ours, _ = pair(lambda: wrap(lambda self, x, r: F.relu(self.bn(x) + r)))
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x, residual), theirs(x, residual), rtol=1e-5, atol=1e-5)  # float32 in either


def test_in_place_addition_keeps_the_dtype():
    def forward(self, x, r):
        out = self.bn(x)
        out += r
        return F.relu(out)

    theirs, ours, report = pair(lambda: wrap(forward))
    assert len(report.fused) == 1
    x, r = torch.randn(5, 3), torch.randn(5, 3).double()
    torch.testing.assert_close(ours(x, r), theirs(x, r), rtol=1e-5, atol=1e-5)
    assert ours(x, r).dtype == torch.float32


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


def test_attribute_that_forward_reads():
    def forward(self, x):
        return F.relu(self.bn(x)) * self.scale

    theirs, ours, report = pair(lambda: wrap(forward, scale=2.0))
    assert len(report.fused) == 1
    ours.unrelated = 3
    assert type(ours) is not type(theirs)
    theirs.scale = ours.scale = 5.0
    assert_alike(theirs, ours, torch.randn(5, 3))
    assert type(ours) is type(theirs)


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
def test_report_with_a_sample(kind):
    model = network()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 10, 10)
    random = torch.get_rng_state()
    sample = {"tensor": x, "tuple": (x,), "mapping": {"input": x}}[kind]
    report = fused_ops.convert(model, sample=sample)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert report.ok and len(report.checks) > 10
    names = {check.name for check in report.checks}
    assert {"output", "gradient of 3.bn2.weight", "1.running_mean"} <= names
    element = x.new_empty(4, 6, 8, 8).numel() * 4
    assert report.saved_bytes == element * (5 + 5 + 6 + 5 + 6)
    text = str(report)
    assert "fused with add, ReLU" in text and "6 replaced, 5 of them fused, 0 left alone" in text
    assert "agrees" in text and "DIFFERS" not in text


def test_report_finds_a_difference(monkeypatch):
    model = network()
    own = fused_ops.BatchNorm2d.forward
    monkeypatch.setattr(fused_ops.BatchNorm2d, "forward", lambda self, *a, **k: own(self, *a, **k) * 1.001)
    report = fused_ops.convert(model, sample=torch.randn(4, 3, 10, 10))
    assert not report.ok and "DIFFERS" in str(report)


@pytest.mark.parametrize(
    "model, name",
    [
        (nn.Sequential(nn.BatchNorm1d(3), nn.ReLU6()), "ReLU6"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.GELU(approximate="tanh")), "GELU"),
        (wrap(lambda self, x: self.other(self.bn(x)), other=nn.Hardtanh()), "Hardtanh"),
        (wrap(lambda self, x: F.relu6(self.bn(x))), "relu6"),
        (wrap(lambda self, x: self.other(self.bn(x) + x), other=nn.Mish()), "Mish"),
    ],
)
def test_report_names_activations_that_stay_apart(model, name):
    report = fused_ops.convert(model)
    (note,) = (n for n in report.notes if "not fused with" in n)
    assert f"not fused with the {name} behind it" in note and note.split(":")[0] in ("0", "bn")


def test_report_says_why():
    model = nn.Sequential(nn.SyncBatchNorm(3), wrap(ALONE["control flow"]))
    text = str(fused_ops.convert(model))
    assert "left alone: synchronises" in text and "1: nothing fused with its batch norms: torch.fx cannot" in text
    assert "bytes" in text and "predicted" not in text

"""convert(model, loss=...): the logits are left out where only cross-entropy wants them, and are there otherwise."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_patch import called
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.conversion import report as limits
from fused_ops.conversion.deferred_logits import DeferredLogits
from fused_ops.conversion.head import HeadLinear

ROWS, FEATURES, CLASSES = 40, 8, 700


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    monkeypatch.setattr(limits, "SMALL_BYTES", 0)


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
    report = fused_ops.convert(model, loss=loss)
    assert [(e.path, e.what) for e in report.fused] == [("1", "cross-entropy"), ("0.1", "Tanh")]
    return model


def batch(dtype=torch.float32):
    y = torch.randint(0, CLASSES, (ROWS,))
    y[3] = -100
    return torch.randn(ROWS, FEATURES).to(dtype), y


def gradients(model, x, y, loss=F.cross_entropy):
    return torch.autograd.grad(loss(model(x), y), list(model.parameters()))


def deferred(logits):
    """Whether they are there in name only."""
    return isinstance(logits, DeferredLogits) and logits._state.real is None


# --- The loss without the logits -------------------------------------------------------------------------------------

LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore_index": {"ignore_index": 5},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": torch.linspace(0.5, 2, CLASSES)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_error_rule(options, dtype):
    """Loss and gradients of the head's tensors, in the norm: in a product, which element is worst is luck."""
    torch.manual_seed(1)
    input, head = torch.randn(ROWS, FEATURES).to(dtype), nn.Linear(FEATURES, CLASSES).to(dtype)
    y = torch.randint(0, CLASSES, (ROWS,))
    y[3] = options.get("ignore_index", -100)

    def results(head, input, loss):
        input = input.clone().requires_grad_()
        value = loss(head(input), y)
        return [value.detach(), *torch.autograd.grad(value.sum(), (input, head.weight, head.bias))]

    loss = nn.CrossEntropyLoss(**options).to(dtype)
    truth = results(copy.deepcopy(head).double(), input.double(), copy.deepcopy(loss).double())
    eager = results(head, input, loss)
    fused_ops.convert(head, loss=loss)
    ours = results(head, input, loss)
    for name, mine, theirs, exact in zip(("loss", "input", "weight", "bias"), ours, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        allowed = (theirs - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (mine - exact).norm() <= allowed, name


@pytest.mark.parametrize("converted_loss", [False, True])
def test_no_logits(converted_loss, chunks_in_sight):
    loss = nn.CrossEntropyLoss()
    model = converted(loss if converted_loss else F.cross_entropy)
    assert isinstance(loss, fused_ops.CrossEntropyLoss) == converted_loss
    rows = 16384  # their logits are more than the op keeps at once
    x, y = torch.randn(rows, FEATURES), torch.randint(0, CLASSES, (rows,))
    with Largest() as largest:
        found = gradients(model, x, y, loss)
    assert largest.size <= 0.03 * 4 * rows * CLASSES
    torch.testing.assert_close(found, gradients(network(), x, y), rtol=1e-4, atol=1e-6)


FORMS = {
    "flat": lambda h, y: (h.view(-1, CLASSES), y.view(-1)),
    "reshape": lambda h, y: (h.reshape(-1, h.size(-1)), y.reshape(-1)),
    "flatten": lambda h, y: (torch.flatten(h, 0, 1), y.flatten()),
    "transposed": lambda h, y: (h.transpose(1, 2), y),
    "permuted": lambda h, y: (h.permute(0, 2, 1), y),
    "mT": lambda h, y: (h.mT, y),
    "shifted": lambda h, y: (h[..., :-1, :].contiguous().view(-1, CLASSES), y[:, 1:].reshape(-1)),
    "shifted, transposed": lambda h, y: (h[:, :-1].transpose(1, 2), y[:, 1:]),
    "float": lambda h, y: (h.float().to(torch.float32).view(-1, CLASSES), y.view(-1)),
    "chosen": lambda h, y: (h[y > 100], y[y > 100]),
    "probabilities": lambda h, y: (h.flatten(0, 1), F.one_hot(y.flatten(), CLASSES) * 0.9 + 0.1 / CLASSES),
}
COMPUTED = {
    "scaled": lambda h, y: (h.flatten(0, 1) * 0.5, y.flatten()),
    "flat, then moved": lambda h, y: (h.reshape(-1, CLASSES, 1), y.view(-1, 1)),
    "some classes": lambda h, y: (h[..., :650].flatten(0, 1), y.flatten().clamp(max=649)),
    "new dimension": lambda h, y: (h.flatten(0, 1)[:, :, None], y.view(-1, 1)),
    "double": lambda h, y: (h.double().flatten(0, 1), y.flatten()),
    "probabilities, transposed": lambda h, y: (h.mT, F.one_hot(y, CLASSES).mT.float()),
}


@pytest.mark.parametrize("name", [*FORMS, *COMPUTED])
def test_what_models_do_to_logits(name):
    form, x = {**FORMS, **COMPUTED}[name], torch.randn(4, 6, FEATURES)
    y = torch.randint(0, CLASSES, (4, 6))
    found = []
    for loss in (None, F.cross_entropy):
        torch.manual_seed(0)
        head = nn.Linear(FEATURES, CLASSES)
        if loss is not None:
            fused_ops.convert(head, loss=loss)
        logits = head(x)
        value = F.cross_entropy(*form(logits, y))
        found.append((value.detach(), torch.autograd.grad(value, list(head.parameters()))))
    assert deferred(logits) == (name in FORMS)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_patch_and_our_functions():
    x, y = batch()
    model = converted()
    for loss in (fused_ops.cross_entropy, fused_ops.CrossEntropyLoss(z_loss=1e-3), nn.CrossEntropyLoss()):
        logits = model(x)
        with fused_ops.patch():
            value = loss(logits, y)
        assert deferred(logits)
        torch.testing.assert_close(value, loss(network()(x), y))
    rows = fused_ops.cross_entropy(model(x), y, return_outputs=True)
    assert torch.equal(rows.prediction, model(x).argmax(1))
    mixed = (y.clamp(min=0), y.clamp(min=0).flip(0), 0.3)  # a target that asks for the logits
    torch.testing.assert_close(fused_ops.cross_entropy(model(x), mixed), fused_ops.cross_entropy(network()(x), mixed))


def test_small_logits_are_computed(monkeypatch):
    monkeypatch.undo()
    model, (x, _) = converted(), batch()
    assert type(model(x)) is torch.Tensor


# --- The logits when they are asked for ------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """Which gets past ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def in_place(logits):
    logits[:, 3] = 0.0
    logits.mul_(2)
    return logits


def view_in_place(logits):
    logits.view(-1, 5, CLASSES)[:, :2].zero_()
    return logits


def cast_then_in_place(logits):
    wide, chosen = logits.float(), logits[logits.new_ones(ROWS, dtype=torch.bool)]
    logits.zero_()
    return wide + chosen + logits


ASKED = {
    "softmax": lambda h: h.softmax(1),
    "operator": lambda h: 1 - h * h,
    "first": lambda h: h[0],
    "one": lambda h: h[2, 5],
    "matmul": lambda h: h @ torch.ones(CLASSES, 2).double(),
    "Function": Double.apply,
    "in place": in_place,
    "view in place": view_in_place,
    "cast, then in place": cast_then_in_place,
    "stack": lambda h: torch.stack([h, h]),
    "checkpoint": lambda h: checkpoint(torch.sin, h, use_reentrant=False),
    "after a loss": lambda h: F.cross_entropy(h, torch.arange(ROWS)) + h.logsumexp(1).sum(),
    "hook": lambda h: (h.register_hook(lambda g: 3 * g), F.cross_entropy(h, torch.arange(ROWS)))[1],
}


@pytest.mark.parametrize("name", ASKED)
def test_logits_when_asked(name):
    x, _ = batch(torch.float64)
    found = []
    for model in (network().double(), converted().double()):
        output = ASKED[name](model(x))
        upstream = torch.linspace(-1, 1, output.numel()).view(output.shape)
        grads = torch.autograd.grad(output, list(model.parameters()), upstream)
        found.append((output.detach(), grads))
        assert type(output) is torch.Tensor or name in ("in place", "view in place")
    found[1] = (found[1][0] + 0, found[1][1])
    torch.testing.assert_close(found[1], found[0])


def test_values_without_gradients():
    (x, y), model = batch(), converted()
    logits, expected = model(x), network()(x).detach()
    assert logits.shape == expected.shape and logits.dtype == expected.dtype and len(logits) == ROWS
    assert logits.requires_grad and not logits.is_leaf and logits.size(1) == CLASSES and logits.device == x.device
    assert deferred(logits)
    with torch.no_grad():
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        assert float(logits[1, 2]) == pytest.approx(float(expected[1, 2]), rel=1e-4)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    torch.testing.assert_close(torch.tensor(logits.detach().numpy()), expected)
    torch.testing.assert_close(torch.tensor(model(x).tolist()), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model(x).detach())), expected)
    torch.testing.assert_close(copy.deepcopy(model(x).detach()), expected)
    assert repr(model(x).detach()) == repr(logits.detach())
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    deferred_logits = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(deferred_logits.sum(), expected.sum())


def test_gradient_of_the_logits():
    (x, y), model = batch(), converted()
    logits = model(x)
    logits.retain_grad()
    F.cross_entropy(logits, y).backward()
    theirs = network()(x).detach().requires_grad_()
    torch.testing.assert_close(logits.grad, torch.autograd.grad(F.cross_entropy(theirs, y), theirs)[0])
    other = model(x)
    grads = torch.autograd.grad(other, list(model.parameters()), torch.ones(ROWS, CLASSES))
    expected = (m := network())(x).backward(torch.ones(ROWS, CLASSES)) or [p.grad for p in m.parameters()]
    torch.testing.assert_close(list(grads), expected, rtol=1e-4, atol=1e-4)


def test_logits_of_weights_that_are_gone():
    (x, y), model = batch(), converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, early = model(x), model(x)
    early.argmax()
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="before that"):
        logits.argmax(1)
    with pytest.raises(RuntimeError, match="before that"):
        F.cross_entropy(logits, y)
    torch.testing.assert_close(early.detach(), network()(x).detach())


# --- Where the head is an ordinary layer -----------------------------------------------------------------------------


def test_ordinary_without_gradients_and_under_transforms():
    (x, y), model = batch(), converted()
    frozen = converted().requires_grad_(False)
    assert type(frozen(x)) is torch.Tensor
    with torch.no_grad():
        assert type(model(x)) is torch.Tensor
    model = converted().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    theirs = network().eval()
    found = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(list(found.values()), list(gradients(theirs, x, y)), rtol=1e-5, atol=1e-6)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, jvp = torch.func.jvp(loss, (parameters,), (tangents,))
    torch.testing.assert_close(jvp, sum(g.sum() for g in found.values()), rtol=1e-4, atol=1e-4)


def test_hooks_see_the_logits():
    (x, y), model = batch(), converted()
    seen = []
    handles = [
        model[1].register_forward_hook(lambda module, args, output: seen.append(type(output))),
        model[1].register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0].shape)),
    ]
    F.cross_entropy(model(x), y).backward()
    assert seen == [torch.Tensor, (ROWS, CLASSES)]
    for handle in handles:
        handle.remove()
    assert deferred(model(x))


def test_hook_of_the_model():
    (x, y), model = batch(), converted()
    model.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(F.cross_entropy(model(x), y), F.cross_entropy(network()(x) * 2, y))


@pytest.mark.parametrize("what", ["model", "loss", "step"])
def test_compile(what):
    torch._dynamo.reset()
    (x, y), model = batch(), converted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager") if what == "model" else model
    loss = torch.compile(F.cross_entropy, backend="aot_eager") if what == "loss" else F.cross_entropy

    def step(x, y):
        return loss(compiled(x), y)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if what == "step" else step
    found = torch.autograd.grad(run(x, y), list(model.parameters()))
    torch.testing.assert_close(found, gradients(network(), x, y), rtol=1e-5, atol=1e-6)


def test_export():
    (x, _), model = batch(), converted().eval()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x).detach() + 0)


# --- As models are used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype, inside):
    (x, y), found = batch(), []
    for model in (network(), converted()):
        with torch.autocast("cpu", dtype):
            logits = model(x)
            loss = F.cross_entropy(logits, y) if inside else None
        loss = F.cross_entropy(logits, y) if loss is None else loss
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    assert deferred(logits) and logits.dtype == dtype
    assert found[0][0].dtype == found[1][0].dtype == (torch.float32 if inside else dtype)
    truth = gradients(network().double(), x.double(), y)
    for (name, _), ours, eager, exact in zip(model.named_parameters(), found[1][1], found[0][1], truth, strict=True):
        error, allowed = (ours - exact).norm(), (eager - exact).norm()
        eps = torch.finfo(dtype).eps
        assert error <= 1.5 * allowed + eps * exact.norm(), (name, float(error), float(allowed))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["model", "head", "with the loss"])
def test_checkpointing(where, reentrant):
    (x, y), found = batch(torch.float64), []
    for model in (network().double(), converted().double()):
        x = x.requires_grad_()
        if where == "model":
            loss = F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y)
        elif where == "head":
            loss = F.cross_entropy(checkpoint(model[1], model[0](x), use_reentrant=reentrant), y)
        else:
            loss = checkpoint(lambda x, model=model: F.cross_entropy(model(x), y), x, use_reentrant=reentrant)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_accumulation_and_scaler():
    (x, y), states = batch(), []
    for model in (network(), converted()):
        optimizer, scaler = (
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            torch.amp.GradScaler("cpu", init_scale=64.0),
        )
        for _ in range(3):
            for part, targets in zip(x.chunk(2), y.chunk(2), strict=True):
                scaler.scale(F.cross_entropy(model(part), targets) / 2).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_double_backward():
    x, y = batch(torch.float64)
    found = []
    for model in (network().double(), converted().double()):
        model = model.eval()
        wanted = list(model.parameters())
        for loss in (F.cross_entropy, lambda h, y: Double.apply(h).square().mean()):
            first = torch.autograd.grad(loss(model(x), y), wanted, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    torch.testing.assert_close(found[2:], found[:2])


def test_tied_weights():
    """Gradients of a weight that is an embedding too."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(CLASSES, FEATURES)
            self.head = nn.Linear(FEATURES, CLASSES, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens).tanh())

    theirs, tokens = Tied(), torch.randint(0, CLASSES, (3, 9))
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours, loss=F.cross_entropy)
    assert ours.head.weight is ours.embedding.weight
    for model in (theirs, ours):
        F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:]).backward()
    torch.testing.assert_close(ours.head.weight.grad, theirs.head.weight.grad, rtol=1e-5, atol=1e-6)


# --- Which layer it is, and back -------------------------------------------------------------------------------------


class Model(nn.Module):
    """A head that is not registered last."""

    def __init__(self, returns=None):
        super().__init__()
        self.head, self.body, self.returns = nn.Linear(6, 5), nn.Sequential(nn.Linear(4, 6), nn.ReLU()), returns


def returning(result):
    def forward(self, x):
        return result(self, self.body(x))

    kind = type("Head", (Model,), {"forward": forward})
    return kind()


@pytest.mark.parametrize(
    "model, path",
    [
        (nn.Linear(4, 5), ""),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))), "1.1"),
        (returning(lambda self, h: self.head(h)), "head"),
        (returning(lambda self, h: self.head(h).view(-1, 5)), "head"),
        (nn.Sequential(nn.ReLU(), returning(lambda self, h: self.head(h))), "1.head"),
    ],
)
def test_found(model, path):
    report = fused_ops.convert(model, loss=F.cross_entropy)
    assert [(e.path, e.what) for e in report.fused] == [(path, "cross-entropy")]
    assert not report.notes or (fused_ops.core.library.missing_reason and "plain PyTorch" in report.notes[0])
    assert type(model.get_submodule(path)) is HeadLinear
    assert "cross-entropy" in str(report)


@pytest.mark.parametrize(
    "model, why",
    [
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "a ReLU"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "a Conv2d"),
        (returning(lambda self, h: self.head(h) * 2), "a Head"),
    ],
)
def test_not_found(model, why):
    report = fused_ops.convert(model, loss=F.cross_entropy)
    assert report.fused == [] and why in report.notes[0] and "head and loss: not fused" in str(report)


def test_taken_for_the_head():
    model = returning(lambda self, h: self.head(h) if h.sum() > 0 else -self.head(h))
    report = fused_ops.convert(model, loss=F.cross_entropy)
    assert [e.path for e in report.fused] == ["body.0"] and "last linear layer" in report.notes[0]
    x, y = torch.randn(3, 4), torch.tensor([1, 2, 0])
    twin = copy.deepcopy(model)
    fused_ops.revert(twin)
    torch.testing.assert_close(gradients(model, x, y), gradients(twin, x, y))


def test_revert_and_copies(tmp_path):
    loss, model = nn.CrossEntropyLoss(label_smoothing=0.1), network()
    before = [(type(m), dict(m.__dict__)) for m in (*model.modules(), *loss.modules())]
    keys, text = list(model.state_dict()), repr(model)
    fused_ops.convert(model, loss=loss)
    assert list(model.state_dict()) == keys and repr(model) == text
    again = fused_ops.convert(model, loss=loss)
    assert {e.path: e.reason for e in again.left} == dict.fromkeys(("0.1", "1", "loss"), "already converted")
    torch.save(model, tmp_path / "model.pt")
    x, y = batch()
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ):
        logits = twin(x)
        torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(network()(x), y))
        assert deferred(logits)
        fused_ops.revert(twin)
        assert type(twin[1]) is nn.Linear and type(twin(x)) is torch.Tensor
    assert fused_ops.revert(model) == ["0", "0.1", "1"] and fused_ops.revert(loss) == [""]
    assert [(type(m), m.__dict__) for m in (*model.modules(), *loss.modules())] == before


@pytest.mark.parametrize("target", [None, torch.randint(0, CLASSES, (ROWS,))])
def test_report_with_a_sample(target):
    model, (x, _) = network(), batch()
    report = fused_ops.convert(model, loss=nn.CrossEntropyLoss(), sample=x, target=target)
    assert report.ok and {"loss", "output", "gradient of 1.weight"} <= {c.name for c in report.checks}
    assert [e.saved_bytes for e in report.fused] == [4 * 4 * ROWS * CLASSES, 5 * 4 * ROWS * FEATURES]


class Weighted(nn.Module):
    """A loss of two arguments besides the output."""

    def __init__(self):
        super().__init__()
        self.rows = nn.CrossEntropyLoss(reduction="none")

    def forward(self, output, target, weight):
        return (self.rows(output, target) * weight).mean()


def weighted(output, target, weight):
    return (F.cross_entropy(output, target, reduction="none") * weight).mean()


@pytest.mark.parametrize("loss", [Weighted(), weighted], ids=["module", "function"])
@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_sample_of_a_loss_that_takes_more(kind, loss):
    model, (x, y), weight = network(), batch(), torch.rand(ROWS)
    truth = weighted(network()(x).double(), y, weight.double()).item()
    assert loss(model(x), y, weight).item() == pytest.approx(truth, rel=1e-5)
    target = (y, weight) if kind is tuple else {"weight": weight, "target": y}
    report = fused_ops.convert(model, loss=loss, sample=x, target=target)
    assert report.ok and {"loss", "gradient of 1.weight"} <= {c.name for c in report.checks}
    assert loss(model(x), y, weight).item() == pytest.approx(truth, rel=1e-5)
    fused_ops.revert(loss) if isinstance(loss, nn.Module) else None


def test_a_tuple_is_one_target_where_the_loss_takes_one():
    (x, y), model = batch(), network()
    report = fused_ops.convert(model, loss=fused_ops.CrossEntropyLoss(), sample=x, target=(y, y.flip(0), 0.3))
    assert report.ok and "loss" in {c.name for c in report.checks}


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            Weighted(),
            None,
            r"what loss takes besides the output .*: loss takes \(output, target, weight\), target is of T",
        ),
        (weighted, torch.zeros(ROWS, dtype=torch.int64), r"loss takes \(output, target, weight\), target is of Tensor"),
        (weighted, (1, 2, 3), r"loss takes \(output, target, weight\), target is of tuple"),
        (weighted, {"labels": 1}, r"loss takes \(output, target, weight\), target is of dict"),
        (
            fused_ops.CrossEntropyLoss(return_outputs=True),
            None,
            "expected loss to return a tensor on the sample, got Cro",
        ),
    ],
)
def test_a_target_that_does_not_fit_changes_nothing(loss, target, message):
    model = network()
    with pytest.raises(TypeError, match=message):
        fused_ops.convert(model, loss=loss, sample=batch()[0], target=target)
    assert fused_ops.revert(model) == []


def test_errors():
    model = network()
    with pytest.raises(TypeError, match="expected loss to be"):
        fused_ops.convert(model, loss="mean")
    with pytest.raises(ValueError, match="target goes with"):
        fused_ops.convert(model, sample=torch.randn(4, FEATURES), target=torch.tensor([0, 1, 2, 3]))
    model, (x, y) = converted(), batch()
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(model(x), y + CLASSES)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(model(x), y[1:])
    with pytest.raises(RuntimeError, match=r"must match|shapes cannot"):
        model[1](torch.randn(4, FEATURES + 1))
    assert called(lambda: model(x)) == ["batch_norm_plain_forward"]

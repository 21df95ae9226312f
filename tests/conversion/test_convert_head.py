"""convert(model, loss=...): which layer is the head, the loss without its logits, and as models are trained."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from heads import (
    CLASSES,
    FEATURES,
    ROWS,
    Double,
    Largest,
    batch,
    converted,
    counts,
    deferred,
    gradients,
    network,
)
from test_patch import called
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.conversion.head import HeadLinear, register_head

pytestmark = pytest.mark.usefixtures("heads_of_any_size")


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
    rows = 16384  # their logits are more than the op keeps at once: 512 of them
    x, y = torch.randn(rows, FEATURES), torch.randint(0, CLASSES, (rows,))
    with Largest() as largest:
        found = gradients(model, x, y, loss)
    assert largest.size <= 512 * 4 * CLASSES
    torch.testing.assert_close(found, gradients(network(), x, y), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_class_weights_under_autocast(dtype, wide):
    (x, y), found = batch(), []
    for model in (network(), converted()):
        with torch.autocast("cpu", dtype):
            logits = model(x).float() if wide else model(x)
            loss = F.cross_entropy(logits, y, weight=torch.linspace(0.5, 2, CLASSES))
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    assert counts(model) == (1, {})
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=1e-3)


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

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(6, 5), nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def forward(self, x):
        return self.head(self.body(x))


class Speaking(Model):
    def get_output_embeddings(self):
        return self.head


class Ruled(Model):
    pass


register_head(Ruled, "head")


@pytest.mark.parametrize(
    "model, path",
    [
        (nn.Linear(4, 5), ""),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))), "1.1"),
        (nn.Sequential(nn.Linear(4, 5), nn.Identity()), "0"),
        (Speaking(), "head"),
        (Ruled(), "head"),
        (nn.Sequential(nn.ReLU(), Ruled()), "1.head"),
        (torch.optim.swa_utils.AveragedModel(Ruled()), "module.head"),
    ],
)
def test_found(model, path):
    fused_ops.convert(model, loss=F.cross_entropy)
    head = model.get_submodule(path)
    assert [m for m in model.modules() if type(m) is HeadLinear] == [head]
    x, y = torch.randn(3, 4), torch.tensor([1, 2, 0])
    twin = copy.deepcopy(model)
    fused_ops.revert(twin)
    torch.testing.assert_close(gradients(model, x, y), gradients(twin, x, y))
    assert counts(model) == (1, {})


@pytest.mark.parametrize("head", ["head", None])
def test_named(head):
    model = Model()
    fused_ops.convert(model, loss=F.cross_entropy, head=head or model.head)
    assert type(model.head) is HeadLinear and type(model.body[0]) is nn.Linear


class Own(nn.Linear):
    pass


class Patched(Speaking):
    def __init__(self):
        super().__init__()
        self.head.forward = torch.relu


@pytest.mark.parametrize(
    "model, why",
    [
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "a ReLU"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "a Conv2d"),
        (Model(), "no rule for a Model.*head="),
        (nn.Sequential(nn.ReLU(), Own(3, 4)), "Own, a subclass of nn.Linear"),
        (Patched(), "forward set on the instance"),
        (nn.Sequential(), "empty"),
    ],
)
def test_not_found(model, why):
    report = fused_ops.convert(model, loss=F.cross_entropy)
    assert not any(isinstance(m, HeadLinear) for m in model.modules())
    assert re.search(why, str(report).replace("\n", " "))


def test_a_head_that_is_none():
    model = Model()
    for head, error in (("tail", ValueError), (nn.Linear(6, 5), ValueError), ("body.1", TypeError), (3, TypeError)):
        with pytest.raises(error, match="expected head to be"):
            fused_ops.convert(model, loss=F.cross_entropy, head=head)
    assert fused_ops.revert(model) == []


def test_a_layer_that_is_not_the_last():
    """Whatever layer is named, the model computes what it did."""
    model, x, y = Model(), torch.randn(3, 4), torch.tensor([1, 2, 0])
    twin = copy.deepcopy(model)
    fused_ops.convert(model, loss=F.cross_entropy, head="body.0")
    torch.testing.assert_close(gradients(model, x, y), gradients(twin, x, y))
    assert counts(model) == (0, {"torch.nn.functional.relu used them": 1})


def test_revert_and_copies(tmp_path):
    loss, model = nn.CrossEntropyLoss(label_smoothing=0.1), network()
    before = [(type(m), dict(m.__dict__)) for m in (*model.modules(), *loss.modules())]
    keys, text = list(model.state_dict()), repr(model)
    fused_ops.convert(model, loss=loss)
    assert list(model.state_dict()) == keys and repr(model) == text
    with pytest.raises(RuntimeError, match="converted already"):
        fused_ops.convert(model, loss=loss)
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
    assert [(e.path, e.what, e.times) for e in report.fused] == [("0.1", "tanh", 1), ("1", "cross-entropy", 1)]
    assert "logits never computed for 1 losses" in str(report)


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
    assert "1" in [e.path for e in report.fused]
    assert loss(model(x), y, weight).item() == pytest.approx(truth, rel=1e-5)
    fused_ops.revert(loss) if isinstance(loss, nn.Module) else None


def test_a_tuple_is_one_target_where_the_loss_takes_one():
    (x, y), model = batch(), network()
    report = fused_ops.convert(model, loss=fused_ops.CrossEntropyLoss(), sample=x, target=(y, y.flip(0), 0.3))
    assert next(e.path for e in report.fused) == "0.1"


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

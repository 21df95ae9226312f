"""What models do to their logits before the loss, carried along without them: values, gradients, and what ran."""

import pytest
import torch
import torch.nn.functional as F
from heads import CLASSES, FEATURES, Double, Largest, converted_head, counts, deferred
from torch import nn

import fused_ops
from fused_ops.conversion.head import defer

ORDER = torch.tensor([1, 0, 5, 2])
BUFFER = torch.linspace(-1, 1, CLASSES).view(1, CLASSES)


pytestmark = pytest.mark.usefixtures("heads_of_any_size")


def flat(h, y):
    return h.view(-1, h.size(-1)), y.view(-1)


def softcap(h, cap=5.0):
    """In the order of Gemma 2."""
    h = h / cap
    h = torch.tanh(h)
    return h * cap


CARRIED = {
    "flat": flat,
    "reshape": lambda h, y: (h.reshape(-1, h.size(-1)), y.reshape(-1)),
    "flatten": lambda h, y: (torch.flatten(h, 0, 1), y.flatten()),
    "unflatten": lambda h, y: flat(h.unflatten(1, (2, 3)), y),
    "squeeze": lambda h, y: flat(h.unsqueeze(1).squeeze(1), y),
    "transposed": lambda h, y: (h.transpose(1, 2), y),
    "permuted": lambda h, y: (h.permute(0, 2, 1), y),
    "of images": lambda h, y: (h.view(4, 2, 3, -1).permute(0, 3, 1, 2).contiguous(), y.view(4, 2, 3)),
    "moved": lambda h, y: (torch.movedim(h, -1, 1).float(), y),
    "mT": lambda h, y: (h.mT, y),
    "shifted": lambda h, y: (h[..., :-1, :].contiguous().view(-1, CLASSES), y[:, 1:].reshape(-1)),
    "shifted, transposed": lambda h, y: (h[:, :-1].transpose(1, 2), y[:, 1:]),
    "narrowed": lambda h, y: flat(h.narrow(1, 1, 4).contiguous(), y[:, 1:5].contiguous()),
    "selected": lambda h, y: (h.select(1, 2), y[:, 2]),
    "a part": lambda h, y: flat(h.chunk(2, dim=1)[1].clone(), y[:, 3:].contiguous()),
    "float": lambda h, y: flat(h.float().to(torch.float32).to(h.device), y),
    "chosen": lambda h, y: (h[y > 100], y[y > 100]),
    "by index": lambda h, y: (h[torch.arange(4), ORDER], y[torch.arange(4), ORDER]),
    "probabilities": lambda h, y: (h.flatten(0, 1), F.one_hot(y.flatten(), CLASSES) * 0.9 + 0.1 / CLASSES),
    "scaled": lambda h, y: flat(h * 0.0625, y),
    "scaled from the left": lambda h, y: flat(3 * h, y),
    "divided": lambda h, y: flat(h / 3.0, y),
    "scaled twice": lambda h, y: flat(torch.div(torch.mul(-h, 2), 7), y),
    "soft cap": lambda h, y: flat(softcap(h).float(), y),
    "soft cap of 0.5": lambda h, y: flat(softcap(h.float(), 0.5), y),
    "tanh": lambda h, y: flat(h.tanh(), y),
    "scale, then soft cap": lambda h, y: flat(softcap(h * 1.7), y),
    "soft cap, then scale": lambda h, y: flat(softcap(h) * 1.5 / 4, y),
    "bias": lambda h, y: flat(h + BUFFER.to(h.device, h.dtype), y),
    "bias of another dtype": lambda h, y: flat(BUFFER[0] + h.float(), y),
    "bias, scale, soft cap": lambda h, y: flat(softcap((h + BUFFER.to(h.dtype)) * 1.5), y),
    "log_softmax, nll_loss": None,
}  # fmt: skip
COMPUTED = {
    "flat, then moved": lambda h, y: (h.reshape(-1, CLASSES, 1), y.view(-1, 1)),
    "some classes": lambda h, y: (h[..., :650].flatten(0, 1), y.flatten().clamp(max=649)),
    "new dimension": lambda h, y: (h.flatten(0, 1)[:, :, None], y.view(-1, 1)),
    "double": lambda h, y: (h.double().flatten(0, 1), y.flatten()),
    "probabilities, transposed": lambda h, y: (h.mT, F.one_hot(y, CLASSES).mT.float()),
    "scaled by a tensor": lambda h, y: flat(h * torch.tensor(0.5), y),
    "scale, then bias": lambda h, y: flat(h * 2 + BUFFER, y),
    "a number added": lambda h, y: flat(h + 1.0, y),
    "soft cap, then bias": lambda h, y: flat(softcap(h) + BUFFER, y),
    "soft cap turned round": lambda h, y: flat(softcap(h) * -1.0, y),
    "bias of each row": lambda h, y: flat(h + torch.ones(6, 1), y),
    "sum of two": lambda h, y: flat(h + h, y),
    "in place": lambda h, y: flat(h.mul_(2), y),
}


def loss_of(form, logits, y):
    if form is None:
        return F.nll_loss(F.log_softmax(logits, dim=-1).flatten(0, 1), y.flatten())
    return F.cross_entropy(*form(logits, y))


def results(head, x, y, form):
    x = x.clone().requires_grad_()
    loss = loss_of(form, head(x), y)
    return [loss.detach(), *torch.autograd.grad(loss, (x, *head.parameters()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CARRIED)
def test_carried(name, dtype):
    """Values and gradients against float64: no further than eager's, in the norm, and one rounding."""
    form, x = CARRIED[name], torch.randn(4, 6, FEATURES).to(dtype)
    y = torch.randint(0, CLASSES, (4, 6))
    theirs, ours = converted_head(dtype=dtype)
    exact = nn.Linear(FEATURES, CLASSES).double()
    exact.load_state_dict(theirs.state_dict())
    truth = results(exact, x.double(), y, form)
    eager, found = results(theirs, x, y, form), results(ours, x, y, form)
    assert counts(ours) == (1, {})
    for what, mine, other, right in zip(("loss", "input", "weight", "bias"), found, eager, truth, strict=True):
        assert mine.dtype == other.dtype
        allowed = 1.5 * (other - right).norm() + 2 * torch.finfo(dtype).eps * right.norm()
        assert (mine - right).norm() <= allowed, what


@pytest.mark.parametrize("name", COMPUTED)
def test_computed(name):
    form, x, y = COMPUTED[name], torch.randn(4, 6, FEATURES), torch.randint(0, CLASSES, (4, 6))
    theirs, ours = converted_head()
    torch.testing.assert_close(results(ours, x, y, form), results(theirs, x, y, form), rtol=1e-5, atol=1e-6)
    fused, computed = counts(ours)
    assert fused == 0 and sum(computed.values()) == 1


@pytest.mark.parametrize("name", ["soft cap", "scaled", "bias", "shifted", "log_softmax, nll_loss"])
def test_settled_all_the_same(name):
    """What is carried along is computed as it would have been, bit for bit, if somebody looks."""
    x, y = torch.randn(4, 6, FEATURES), torch.randint(0, CLASSES, (4, 6))
    theirs, ours = converted_head()
    form = CARRIED[name] or (lambda h, y: (h.log_softmax(-1), y))
    expected, found = form(theirs(x), y)[0], form(ours(x), y)[0]
    assert deferred(found) and found.shape == expected.shape and found.dtype == expected.dtype
    assert found.stride() == expected.stride() and found.is_contiguous() == expected.is_contiguous()
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad(t, list(m.parameters()), upstream) for t, m in ((expected, theirs), (found, ours))]
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    assert torch.equal(form(ours(x), y)[0].detach(), expected.detach())


def test_a_view_that_cannot_be():
    theirs, ours = converted_head()
    for head in (theirs, ours):
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            head(torch.randn(4, 6, FEATURES))[:, :-1].view(-1, CLASSES)


# --- Label smoothing by hand, and the log-probabilities of the targets -----------------------------------------------


def smoother(log_probs, labels, epsilon=0.1):
    """As in transformers' LabelSmoother."""
    log_probs, labels = -log_probs, labels.unsqueeze(-1)
    padding = labels.eq(-100)
    nll = log_probs.gather(dim=-1, index=torch.clamp(labels, min=0))
    smooth = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return (1 - epsilon) * nll.sum() / count + epsilon * smooth.sum() / (count * log_probs.shape[-1])


def timm(log_probs, labels, epsilon=0.1):
    rows = labels.clamp(min=0)
    nll = -log_probs.gather(dim=-1, index=rows.unsqueeze(-1)).squeeze(-1)
    return ((1 - epsilon) * nll + epsilon * -log_probs.mean(dim=-1)).mean()


BY_HAND = {
    "transformers": smoother,
    "timm": timm,
    "of the targets": lambda log_probs, y: torch.gather(log_probs, -1, y.clamp(min=0)[..., None]).square().mean(),
    "sum alone": lambda log_probs, y: log_probs.sum(-1).mean(),
}


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_HAND)
def test_log_probabilities(name, dtype, capped):
    by_hand, x = BY_HAND[name], torch.randn(4, 6, FEATURES).to(dtype)
    y = torch.randint(0, CLASSES, (4, 6))
    y[1, :2] = -100
    theirs, ours = converted_head(dtype=dtype)
    exact = nn.Linear(FEATURES, CLASSES).double()
    exact.load_state_dict(theirs.state_dict())

    def results(head, x):
        x = x.clone().requires_grad_()
        loss = by_hand(F.log_softmax(softcap(head(x)) if capped else head(x), dim=-1), y)
        return [loss.detach(), *torch.autograd.grad(loss, (x, *head.parameters()))]

    truth, eager, found = results(exact, x.double()), results(theirs, x), results(ours, x)
    assert counts(ours) == (1, {})
    for mine, other, right in zip(found, eager, truth, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - right).norm() <= 1.5 * (other - right).norm() + 2 * torch.finfo(dtype).eps * right.norm()


def test_log_probabilities_of_what_is_no_class():
    x, index = torch.randn(3, FEATURES), torch.tensor([[1], [CLASSES], [2]])
    for head in converted_head():
        with pytest.raises(RuntimeError, match="out of bounds"):
            head(x).log_softmax(-1).gather(-1, index)


def test_two_indices():
    """A second gather is of its own rows, also where the first index was written to."""
    x, index = torch.randn(3, FEATURES), torch.tensor([[1], [5], [2]])
    found = []
    for head in converted_head():
        log_probs, mine = F.log_softmax(head(x), -1), index.clone()
        first = log_probs.gather(-1, mine)
        mine.add_(3)
        found.append(torch.cat([first, log_probs.gather(-1, mine), log_probs.gather(-1, index)]))
    torch.testing.assert_close(found[1], found[0])


# --- LoRA: the sum of two linear layers ------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A base and its low-rank term, as peft computes them."""

    def __init__(self, scale, dropout=0.0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.base = nn.Linear(FEATURES, CLASSES).to(dtype)
        self.a, self.b = (nn.Linear(i, o, bias=False).to(dtype) for i, o in ((FEATURES, 3), (3, CLASSES)))
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def forward(self, x):
        result = self.base(x)
        return (result + self.b(self.a(self.dropout(x))) * self.scale).to(result.dtype)


@pytest.mark.parametrize("scale, dropout", [(1, 0.0), (0.7, 0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["all", "low rank"])
def test_low_rank(scale, dropout, dtype, trained):
    x, y = torch.randn(5, 8, FEATURES).to(dtype), torch.randint(0, CLASSES, (5, 8))
    found = []
    for kind in ("exact", "eager", "ours"):
        model = LowRank(scale, dropout, dtype)
        if kind == "exact":
            model.double()
        if kind == "ours":
            fused_ops.convert(model, loss=F.cross_entropy, head="base")
            defer(model.b)
        model.base.requires_grad_(trained == "all")
        torch.manual_seed(5)  # of the dropout
        mine = x.double() if kind == "exact" else x.clone()
        mine.requires_grad_(trained == "all")
        loss = F.cross_entropy(*flat(model(mine) * 0.5, y))
        wanted = [t for t in (mine, *model.parameters()) if t.requires_grad]
        found.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
    assert counts(model) == (1, {})
    for mine, other, right in zip(found[2], found[1], found[0], strict=True):
        assert (mine - right).norm() <= 1.5 * (other - right).norm() + 2 * torch.finfo(dtype).eps * right.norm()


def test_low_rank_of_another_dtype_is_computed_and_says_why():
    """As peft has it by default for a 16-bit model: the sum is rounded once, from float32."""
    x, y, found = torch.randn(6, FEATURES).bfloat16(), torch.randint(0, CLASSES, (6,)), []
    for convert in (False, True):
        model = LowRank(0.7)
        model.base.bfloat16()
        if convert:
            fused_ops.convert(model, loss=F.cross_entropy, head="base")
            defer(model.b)
        base = model.base(x)
        loss = F.cross_entropy((base + model.b(model.a(x.float())) * 0.7).to(base.dtype), y)
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    fused, reasons = counts(model)
    assert fused == 0 and len(reasons) == 1
    assert "low-rank term is float32 and its base bfloat16" in next(iter(reasons))
    assert "autocast_adapter_dtype=False" in next(iter(reasons))


def test_low_rank_that_is_looked_at():
    """The gradient of a custom Function's logits reaches each tensor once, through both terms."""
    x, found = torch.randn(6, FEATURES, dtype=torch.float64), []
    for convert in (False, True):
        model = LowRank(0.7, dtype=torch.float64)
        if convert:
            fused_ops.convert(model, loss=F.cross_entropy, head="base")
            defer(model.b)
        mine = x.clone().requires_grad_()
        logits = model(torch.sin(mine))
        (Double.apply(logits) * logits).sum().backward()
        found.append([mine.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0])


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft cap", "divided", "bias", "shifted", "log_softmax, nll_loss", "smoothing"])
def test_no_tensor_of_their_size(name, chunks_in_sight):
    """The largest tensor of a step is a small part of the logits."""
    x, y = torch.randn(2, 16384, FEATURES), torch.randint(0, CLASSES, (2, 16384))
    _, ours = converted_head()
    with Largest() as largest:
        if name == "smoothing":
            smoother(F.log_softmax(softcap(ours(x)), -1), y).backward()
        else:
            loss_of(CARRIED[name], ours(x), y).backward()
    assert counts(ours) == (1, {})
    assert largest.size <= 0.06 * 4 * x[..., 0].numel() * CLASSES

"""What training loops ask of linear cross-entropy: a gradient added to their buffer, and ignored rows left out."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.ops.linear_cross_entropy import by_rows

WAYS = [{}, {"chunk_rows": 5}, {"max_memory_bytes": 4000}, {"label_smoothing": 0.1, "z_loss": 0.01, "chunk_rows": 7}]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(dtype=torch.float32, lead=(23,), features=12, outputs=(30,), ignored=3):
    torch.manual_seed(len(lead) + features)
    x = torch.randn(*lead, features).to(dtype)
    w, b = torch.randn(*outputs, features).to(dtype), torch.randn(outputs).to(dtype)
    target = torch.randint(0, outputs[0], (*lead, *outputs[1:]))
    if ignored:
        target.view(-1)[::ignored] = -100
    return (x, w, b), target


def leaves_of(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(tensors, target, factor=1.0, **options):
    x, w, b = leaves = leaves_of(tensors)
    loss = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    return loss.detach(), *torch.autograd.grad(loss * factor, leaves, allow_unused=True)


# ---- main_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_weight_s_gradient_is_added_to_main_grad(way, dtype):
    """Of several micro-batches: to the bit what was there plus each of the gradients, where these come the same way."""
    off = 0 if way else 4 * torch.finfo(dtype).eps  # without main_grad a small head is one op
    batches = [draw(dtype, (rows,)) for rows in (23, 11, 40)]
    weight = batches[0][0][1].clone().requires_grad_()
    buffer = torch.randn(weight.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = buffer.clone()
    for factor, ((x, _, b), target) in zip((1.0, 0.25, -3.0), batches, strict=True):
        plain = run((x, weight, b), target, factor, **way)
        x, b = leaves_of((x, b))
        loss = fused_ops.linear_cross_entropy(x, weight, target, linear_bias=b, main_grad=buffer, **way)
        version = buffer._version
        (loss * factor).backward()
        expected += plain[2]
        assert weight.grad is None and buffer._version > version
        for mine, other in ((loss, plain[0]), (x.grad, plain[1]), (b.grad, plain[3]), (buffer, expected)):
            torch.testing.assert_close(mine, other, rtol=off, atol=off)


def test_main_grad_of_every_other_way():
    """No reduction, several positions, a low-rank term, a module, a retained graph, autocast."""
    (x, w, b), target = draw(torch.float64, (4, 5), outputs=(9, 2))
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"return_outputs": True}):
        leaves, buffer = leaves_of((x, w, b)), torch.zeros_like(w)

        def loss_of(x, w, b, options=options, **more):
            found = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, **options, **more)
            return (found.loss if options.get("return_outputs") else found).sum()

        want = torch.autograd.grad(loss_of(*leaves), leaves)
        loss = loss_of(*leaves, main_grad=buffer)
        loss.backward(retain_graph=True)
        torch.testing.assert_close(buffer, want[1])
        loss.backward()
        torch.testing.assert_close(buffer, 2 * want[1])
        assert leaves[1].grad is None
        torch.testing.assert_close(leaves[0].grad, 2 * want[0])
    (x, w, _), target = draw(torch.float64)
    low = torch.randn(3, 12).double(), torch.randn(30, 3).double()
    layer = fused_ops.LinearCrossEntropyLoss(12, 30, dtype=torch.float64)
    buffer, lora = torch.zeros(30, 12).double(), (*leaves_of(low), 0.5)
    layer(x, target, lora=lora, main_grad=buffer).backward()
    weight, *rest = leaves_of((layer.linear.weight, *low))
    fused_ops.linear_cross_entropy(x, weight, target, lora=(*rest, 0.5)).backward()
    torch.testing.assert_close(buffer, weight.grad)
    assert layer.linear.weight.grad is None
    for mine, other in zip(lora[:2], rest, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    (x, w, _), target = draw()
    w.requires_grad_()
    buffer = torch.zeros(w.shape)
    with torch.autocast("cpu", torch.bfloat16):
        plain, mine = (fused_ops.linear_cross_entropy(x, w, target, main_grad=m) for m in (None, buffer))
    (expected,) = torch.autograd.grad(plain, w)
    mine.backward()
    assert torch.equal(buffer, expected)


def test_main_grad_of_what_needs_no_gradient_and_of_a_tied_weight():
    (x, w, _), target = draw()
    buffer = torch.zeros(w.shape)
    x.requires_grad_()
    fused_ops.linear_cross_entropy(x, w, target, main_grad=buffer).backward()
    assert not buffer.any() and x.grad.any()
    w.requires_grad_()
    ids = torch.randint(0, 30, (23,))
    expected = torch.autograd.grad(F.cross_entropy(F.linear(w[ids], w.detach()), target), w)[0]
    head = torch.autograd.grad(F.cross_entropy(F.linear(w[ids].detach(), w), target), w)[0]
    fused_ops.linear_cross_entropy(w[ids], w, target, main_grad=buffer).backward()
    torch.testing.assert_close(w.grad, expected)  # of the embedding alone
    torch.testing.assert_close(buffer, head)


def test_main_grad_refuses():
    (x, w, _), target = draw()
    w.requires_grad_()

    def call(main_grad):
        return fused_ops.linear_cross_entropy(x, w, target, main_grad=main_grad)

    for bad, kind, text in (
        (torch.zeros(30, 11), RuntimeError, r"main_grad of shape \[30, 12\].*got \[30, 11\]"),
        (torch.zeros(30, 12, dtype=torch.bfloat16), RuntimeError, "main_grad.*got.*bfloat16"),
        (torch.zeros(30, 12, dtype=torch.float64), RuntimeError, "main_grad.*got.*float64"),
        (torch.zeros(30, 12, requires_grad=True), RuntimeError, "main_grad not to require grad"),
        (3.0, TypeError, "'main_grad' must be Tensor, not float"),
    ):
        with pytest.raises(kind, match=text):
            call(bad)
    buffer = torch.zeros(30, 12)
    with pytest.raises(RuntimeError, match="without create_graph"):
        torch.autograd.grad(call(buffer), w, create_graph=True)
    with pytest.raises(RuntimeError, match="without create_graph"):
        torch.func.grad(lambda w: fused_ops.linear_cross_entropy(x, w, target, main_grad=buffer))(w.detach())
    assert not buffer.any()


# ---- compact


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("ignored", [0, 1, 2, 5])
def test_compact_changes_nothing_but_the_work(way, ignored, monkeypatch):
    """As on a GPU, where it is not known on the host which rows are ignored."""
    tensors, target = draw(torch.float64, ignored=ignored)
    seen = []

    def product(head, part, x, out):
        seen.append(x.size(0))
        return plain(head, part, x, out)

    plain = by_rows.product
    monkeypatch.setattr(by_rows, "has_values", lambda t: False)
    monkeypatch.setattr(by_rows, "product", product)
    monkeypatch.setattr("fused_ops.ops.linear_cross_entropy.plan.suits", lambda *_: False)
    for reduction in ("mean", "sum"):
        found = []
        for compact in (False, True):
            seen.clear()
            found.append(run(tensors, target, reduction=reduction, compact=compact, **way))
            if way:
                assert sum(seen) in ((int((target != -100).sum()),) if compact else (23, 46))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_compact_with_what_has_a_value_for_each_row(kind):
    (x, w, _), target = draw(torch.float64, (3, 8), outputs=(30,))
    ignore = 7
    target = torch.where(target < 0, ignore, target).to(kind)
    rows = {"token_weight": torch.rand(3, 8), "class_mask": torch.rand(3, 8, 30) < 0.9}
    rows["class_mask"].view(24, 30)[torch.arange(24), target.reshape(-1).long()] = True
    low = torch.randn(2, 12).double(), torch.randn(30, 2).double()
    for options in (rows, {"class_mask": torch.arange(30) < 40, "normalizer": 5.0}, {"shift": True}):
        found = []
        for compact in (False, True):
            leaves = leaves_of((x, w, *low))
            more = {"ignore_index": ignore, "lora": (*leaves[2:], 2.0), "chunk_rows": 5, "compact": compact, **options}
            loss = fused_ops.linear_cross_entropy(*leaves[:2], target, **more)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    (x, w, b), target = draw(torch.float64, (10,), outputs=(9, 4), ignored=0)
    target[2], target[5, 1] = -100, -100  # a row of which nothing counts, and one of which something does
    for mine, other in zip(*(run((x, w, b), target, compact=compact) for compact in (False, True)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_compact_with_the_second_derivative_and_in_a_graph():
    (x, w, _), target = draw(torch.float64)

    def loss(x, w):
        return fused_ops.linear_cross_entropy(x, w, target, chunk_rows=4, compact=True)

    leaves = leaves_of((x, w))
    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for mine, other in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_compact_refuses():
    (x, w, _), target = draw()
    for options in ({"reduction": "none"}, {"return_outputs": True}):
        with pytest.raises(ValueError, match="compact=True is for a reduced loss"):
            fused_ops.linear_cross_entropy(x, w, target, compact=True, **options)
    for other in (torch.rand(23, 30).softmax(1), (target.clamp(min=0), target.clamp(min=0), 0.3)):
        with pytest.raises(ValueError, match="compact=True is for class indices"):
            fused_ops.linear_cross_entropy(x, w, other, compact=True)

"""Ignored rows that are left out of the products on a GPU too."""

import pytest
import torch

import fused_ops
from fused_ops.ops.linear_cross_entropy import by_rows

WAYS = [{}, {"chunk_rows": 5}, {"max_memory_bytes": 4000}, {"label_smoothing": 0.1, "z_loss": 0.01, "chunk_rows": 7}]


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

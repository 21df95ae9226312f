"""Linear cross-entropy of a small head: product, loss and gradients in one raw op."""

import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import draw, eager, run
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.ops.linear_cross_entropy import reference, small
from fused_ops.testing import assert_no_worse_than

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def ours(x, w, target, linear_bias=None, **options):
    return fused_ops.linear_cross_entropy(x, w, target, linear_bias=linear_bias, **options)


@pytest.fixture
def calls(monkeypatch):
    """The ``needs`` of each call of the raw op."""
    seen, op = [], small._small_op

    def watch(*args):
        seen.append(args[-1])
        return op(*args)

    monkeypatch.setattr(small, "_small_op", watch)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("upstream", [1.0, -3.0])
@pytest.mark.parametrize("shape", [(32, 64, 27), (1, 1, 1), (7, 3, 200), (300, 5, 2)])
def test_error_rule(shape, upstream, bias, reduction, dtype, calls):
    tensors, target = draw(dtype, *shape, bias=bias)
    if shape[0] == 1:
        target[:] = 0
    given = torch.tensor(upstream, dtype=dtype)
    found = run(ours, tensors, target, given, reduction=reduction)
    assert calls == [7 if bias else 3]
    theirs = run(eager, tensors, target, given, reduction=reduction)
    exact = run(eager, [t.double() for t in tensors], target, given.double(), reduction=reduction)
    for name, mine, other, truth in zip(("loss", "input", "weight", "bias"), found, theirs, exact, strict=False):
        assert mine.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)
        elif name == "loss":
            assert_no_worse_than(mine, other, truth, name)
        else:  # sums of products have another order: as far off as theirs, to the last bits
            eps = (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
            assert (mine - truth).abs().max() <= (other - truth).abs().max() + eps * truth.abs().max(), name


@pytest.mark.parametrize("index", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("layout", ["transposed", "every second", "one of several"])
def test_layouts_and_index_dtypes(layout, index):
    def change(t):
        if layout == "one of several":  # memory that begins before the tensor
            return torch.stack([-t, 2 * t, t])[2]
        return t.t().contiguous().t() if layout == "transposed" else torch.stack([t, t], -1)[..., 0]

    tensors, target = draw(torch.float64)
    expected = run(eager, tensors, target.clamp(min=0), ignore_index=0)
    matrices = [change(t) for t in tensors[:2]]
    leaves = [t.detach().requires_grad_() for t in (*matrices, tensors[2])]
    loss = ours(leaves[0], leaves[1], target.clamp(min=0).to(index), leaves[2], ignore_index=0)
    for mine, other in zip((loss.detach(), *torch.autograd.grad(loss, leaves)), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_only_what_is_wanted_is_found(calls):
    (x, w, b), target = draw(torch.float32)
    for mask in range(8):
        leaves = [t.detach().requires_grad_(bool(mask & (1 << i))) for i, t in enumerate((x, w, b))]
        ours(leaves[0], leaves[1], target, leaves[2])
    with torch.no_grad():
        ours(leaves[0], leaves[1], target, leaves[2])
    assert calls == [*range(8), 0]


def test_the_second_backward_finds_the_gradients_again(calls):
    tensors, target = draw(torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    loss = ours(leaves[0], leaves[1], target, leaves[2])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()  # it is the caller's
    for factor in (1.0, 2.0):
        again = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for mine, other in zip(again, expected, strict=True):
            torch.testing.assert_close(mine, factor * other)
    assert calls == [7, 7, 7]


def test_a_change_in_place_is_seen():
    (x, w, _), target = draw(torch.float32)
    loss = ours(x.requires_grad_(), w.requires_grad_(), target)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_several_gradients_at_once_and_the_second_derivative():
    (x, w, b), target = draw(torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    several = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def batched(function):
        loss = function(leaves[0], leaves[1], target, leaves[2])
        return torch.autograd.grad(loss, leaves, several, is_grads_batched=True)

    def second(function):
        grads = torch.autograd.grad(function(*leaves[:2], target, leaves[2]).sin(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for derivative in (batched, second):
        for mine, other in zip(derivative(ours), derivative(eager), strict=True):
            torch.testing.assert_close(mine, other)
    tied = torch.randn(20, 20, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(20) % 7
    assert torch.autograd.gradgradcheck(lambda t: ours(t, t, rows), tied)
    for create_graph in (False, True):  # which is where one tensor might count as two; both above would double alike
        mine, other = (torch.autograd.grad(f(tied, tied, rows), tied, create_graph=create_graph) for f in (ours, eager))
        torch.testing.assert_close(mine, other)


@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
def test_the_kernel_says_what_does_not_fit():
    (x, w, b), target = draw(torch.float32)
    good = (x, w, b, target)
    for at, bad, message in (
        (0, x.long(), "input must be float32"),
        (0, x[0], "expected input"),
        (1, w.double(), "linear_weight must have the dtype of input"),
        (1, w[:, 1:], "expected input"),
        (2, b.double(), "linear_bias must have the dtype of input"),
        (2, b[1:], "linear_bias must have the shape"),
        (3, target[1:], "expected a target of each of 20 rows"),
        (3, target.float(), "target must hold class indices"),
    ):
        with pytest.raises(RuntimeError, match=message):
            small._small_op(*good[:at], bad, *good[at + 1 :], -100, 1, 7)
    with pytest.raises(RuntimeError, match="reduction must be 1"):
        small._small_op(*good, -100, 0, 7)


@pytest.mark.parametrize("rows", [20, 400])
def test_a_loss_scale_keeps_float16_gradients_in_range(rows, calls):
    """Gradients that are rounded before the loss scale comes to them would lose what it is there for."""
    (x, w), target = draw(torch.float16, rows, 32, 2000, bias=False)
    w /= 4
    upstream = torch.tensor(16384.0, dtype=torch.float16)
    scaled, theirs = (run(f, [x, w], target, upstream)[1:] for f in (ours, eager))
    exact = run(eager, [x.double(), w.double()], target, upstream.double())[1:]
    for mine, other, truth in zip(scaled, theirs, exact, strict=True):
        allowed = (other - truth).norm() + torch.finfo(torch.float16).eps * truth.norm()
        assert (mine - truth).norm() <= allowed
    assert calls == []


@pytest.mark.parametrize("needs", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_as_the_reference(dtype, needs):
    (x, w, b), target = draw(dtype)
    for bias, reduction in ((b, 1), (None, 2)):
        args = (x, w, bias, target, -100, reduction, needs)
        for mine, other in zip(small._small_op(*args), reference.small(*args), strict=True):
            assert mine.shape == other.shape and mine.dtype == other.dtype
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_everything_ignored_bad_targets_and_nothing_at_all(calls):
    tensors, target = draw(torch.float32)
    for reduction in ("mean", "sum"):
        found, theirs = (run(f, tensors, torch.full_like(target, -100), reduction=reduction) for f in (ours, eager))
        for mine, other in zip(found, theirs, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)
    leaves = [t.requires_grad_() for t in tensors]
    with pytest.raises(IndexError, match="Target 40 is out of bounds"):
        ours(leaves[0], leaves[1], target.clamp(min=40), leaves[2])
    del calls[:]
    for empty in ([leaves[0][:0], leaves[1]], [leaves[0][:, :0], leaves[1][:, :0]]):
        ours(*empty, target[: len(empty[0])])
    assert calls == []


def test_checkpoint_and_hooks():
    (x, w, _), target = draw(torch.float32)
    x.requires_grad_()
    expected = torch.autograd.grad(eager(x, w, target), x)[0]
    for reentrant in (True, False):
        x.grad = None
        checkpoint(lambda x: ours(x, w, target), x, use_reentrant=reentrant).backward()
        torch.testing.assert_close(x.grad, expected)
    with torch.autograd.graph.save_on_cpu():
        loss = ours(x, w, target)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_linear_probe_learns_as_with_eager():
    """Steps of training: F.linear and F.cross_entropy, and the op, with the same weights at the end."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(32, 64, generator=g), torch.randint(0, 27, (32,), generator=g)
    ends = []
    for function in (ours, eager):
        w = torch.zeros(27, 64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            function(x, w, target).backward()
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert F.linear(x, ends[0]).argmax(1).eq(target).float().mean() > 0.9

"""Cross-entropy against PyTorch, the float64 truth and finite differences, and under the transforms."""

import pytest
import torch
import torch.nn.functional as F
from conftest import check_derivatives
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.ops.cross_entropy import reference
from fused_ops.testing import assert_no_worse_than, samples_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 7, 15, 16, 17, 27, 33, 1000, 1025, 3001]
REDUCTIONS = ["none", "mean", "sum"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_no_worse_than_eager(dtype, classes, reduction):
    torch.manual_seed(classes)
    x = (torch.randn(13, classes) * 4).to(dtype)
    target = torch.randint(0, classes, (13,))
    target[3] = -100

    def run(function, x):
        x = x.detach().requires_grad_()
        loss = function(x, target, reduction=reduction)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss.dtype)
        return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]

    truth = run(F.cross_entropy, x.double())
    for ours, eager, exact in zip(run(fused_ops.cross_entropy, x), run(F.cross_entropy, x), truth, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
        else:
            assert_no_worse_than(ours, eager, exact)


@pytest.mark.parametrize("sample", samples_of("cross_entropy"), ids=lambda s: s.name)
def test_derivatives(sample):
    check_derivatives(fused_ops.cross_entropy, sample)


@pytest.mark.parametrize("value", [-1, 3, 2**62, -(2**63)])
def test_target_out_of_bounds(value):
    with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
        fused_ops.cross_entropy(torch.randn(2, 3), torch.tensor([0, value]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(9, 33), (3, 5, 7), (2, 3, 4, 5)])
def test_kernels_match_reference(shape, reduction, dtype):
    x, target = torch.randn(shape, dtype=dtype), torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::4] = -100
    options = (-100, REDUCTIONS.index(reduction))
    ours, expected = (
        torch.ops.fused_ops.cross_entropy_forward(x, target, *options),
        reference.forward(x, target, *options),
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    _, lse, total = ours
    args = (torch.randn_like(ours[0]), x, target, lse, total, *options)
    torch.testing.assert_close(torch.ops.fused_ops.cross_entropy_backward(*args), reference.backward(*args))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (9, 33), (300, 27), (2, 2100), (3, 5, 7), (2, 3, 4, 5)])
def test_a_loss_that_brings_its_gradient_matches_reference(shape, reduction, dtype):
    x, target = torch.randn(shape, dtype=dtype) * 3, torch.randint(0, shape[1], (shape[0], *shape[2:]))
    x.view(-1)[0] += 20  # a confident row
    if shape[0] > 2:
        target.view(-1)[2] = 1000  # ignored
    if shape[0] > 2 and len(shape) == 2:
        x[2] = torch.inf
    options = (1000, REDUCTIONS.index(reduction))
    for layout in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        ours = torch.ops.fused_ops.cross_entropy_with_gradient(layout, target, *options)
        expected = reference.with_gradient(layout, target, *options)
        assert ours[2] == expected[2] == (shape[0] > 2)
        for a, b in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(5, 3), (32, 27), (256, 100), (4, 8000)])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4, 1e30])
def test_a_small_loss_is_no_worse_than_eager(shape, size):
    generator = torch.Generator().manual_seed(shape[1])
    x, target = torch.randn(shape, generator=generator) * size, torch.randint(0, shape[1], shape[:1])

    def values(function, x):
        x = x.detach().requires_grad_()
        loss = function(x, target)
        return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(1.7, dtype=x.dtype))[0]

    truth = values(F.cross_entropy, x.double())
    for ours, eager, exact in zip(values(fused_ops.cross_entropy, x), values(F.cross_entropy, x), truth, strict=True):
        assert_no_worse_than(ours, eager, exact)


def test_a_small_loss_serves_every_derivative_and_upstream_gradient():
    x, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, -100, 1, 2, 2])
    for upstream in (torch.inf, torch.nan):  # ignored rows stay out of it
        loss = fused_ops.cross_entropy(x, target)
        assert type(loss.grad_fn).__name__ == "_SmallFunctionBackward"
        grad = torch.autograd.grad(loss, x, torch.tensor(upstream), retain_graph=True)[0]
        assert (grad[2] == 0).all() and not grad[0].isfinite().all()
        again = torch.autograd.grad(loss, x, torch.tensor(2.0))[0]
        torch.testing.assert_close(again, 2 * torch.autograd.grad(F.cross_entropy(x, target), x)[0])
    x = x.detach().double().requires_grad_()
    for reduction in ("mean", "sum"):
        for rows in (target, target.clamp(min=0)):
            f = lambda x: fused_ops.cross_entropy(x, rows, reduction=reduction)  # noqa: B023, E731
            assert torch.autograd.gradcheck(f, x, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(f, x)


def test_a_small_loss_hands_its_gradient_over_once():
    x, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, 3, 1, 2, 2])
    loss = fused_ops.cross_entropy(x, target)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    expected = first.clone()
    first.zero_()  # it is the caller's
    for upstream in (1.0, 2.0, 1.0, 0.5):
        again = torch.autograd.grad(loss, x, torch.tensor(upstream), retain_graph=True)[0]
        assert torch.equal(again, upstream * expected)
        again.zero_()
    several = torch.tensor([1.0, -2.0, 4.0])
    batched = torch.autograd.grad(loss, x, several, retain_graph=True, is_grads_batched=True)[0]
    assert torch.equal(batched, several.view(3, 1, 1) * expected)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(x.grad, 2 * expected)


def test_third_derivative():
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 3, -100])

    def value(function):
        return torch.func.jacrev(torch.func.hessian(lambda x: function(x, target).sin()))(x)

    torch.testing.assert_close(value(fused_ops.cross_entropy), value(F.cross_entropy))


@pytest.mark.parametrize("transform", ["grad", "hessian", "jacrev", "jacfwd"])
def test_torch_func(transform):
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 3, 0])

    def value(function):
        return getattr(torch.func, transform)(lambda x: function(x, target))(x)

    torch.testing.assert_close(value(fused_ops.cross_entropy), value(F.cross_entropy))


def test_vmap():
    x, target = torch.randn(5, 3, 4, dtype=torch.float64), torch.randint(0, 4, (5, 3))

    def value(function):
        one = lambda x, t: function(x, t)  # noqa: E731
        return torch.vmap(one)(x, target), torch.vmap(torch.func.grad(one))(x, target)

    torch.testing.assert_close(value(fused_ops.cross_entropy), value(F.cross_entropy))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_as_one_graph(reduction):
    x, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))

    def f(x):
        return fused_ops.cross_entropy(x * 2, target, reduction=reduction).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))  # not the same bits: in eager mode a small loss brings its gradient
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(f(x), x)[0])


def test_saved_tensor_hooks_see_everything_and_checkpointing_saves_nothing():
    x, target, seen = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        loss = fused_ops.cross_entropy(x, target)
    assert x.shape in seen
    again = checkpoint(fused_ops.cross_entropy, x, target, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(again, x)[0])


def test_a_logit_changed_between_forward_and_backward_is_noticed():
    x, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    y = x * 1
    loss = fused_ops.cross_entropy(y, target)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dual_tensors():
    x, t, target = torch.randn(6, 5), torch.randn(6, 5), torch.randint(0, 5, (6,))
    with forward_ad.dual_level():
        ours, theirs = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, t), target)).tangent
            for f in (fused_ops.cross_entropy, F.cross_entropy)
        )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_bit(threads):
    x, target = torch.randn(512, 1000, requires_grad=True), torch.randint(0, 1000, (512,))

    def run():
        loss = fused_ops.cross_entropy(x, target)
        return loss, *torch.autograd.grad(loss, x)

    torch.set_num_threads(1)
    one = run()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))

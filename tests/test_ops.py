"""Both ops against PyTorch, the float64 truth and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fused_ops
from fused_ops.reference import batch_norm as bn_reference
from fused_ops.reference import cross_entropy as ce_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 7, 15, 16, 17, 27, 33, 1000, 1025, 3001]


def no_worse(ours, eager, truth):
    """No further from the float64 truth than eager of the same dtype, plus one rounding."""
    if ours.dtype == torch.float64:  # the truth itself is only as good as float64 arithmetic
        return bool(((ours - truth).abs() <= 1e-13 * max(truth.numel(), 100) * truth.abs().max()).all())
    rounding = torch.finfo(ours.dtype).eps * truth.abs()
    error, allowed = (ours.double() - truth).abs(), (eager.double() - truth).abs().max()
    return bool((error <= allowed + rounding).all())


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
        assert ours.dtype == eager.dtype
        assert no_worse(ours, eager, exact)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4), (2, 3, 2, 2)])
def test_cross_entropy_gradcheck(reduction, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else ())

    def f(x):
        return fused_ops.cross_entropy(x, target, reduction=reduction)

    assert gradcheck(f, x, check_forward_ad=True)
    assert gradgradcheck(f, x)


@pytest.mark.parametrize("value", [-1, 3, 2**62, -(2**63)])
def test_target_out_of_bounds(value):
    with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
        fused_ops.cross_entropy(torch.randn(2, 3), torch.tensor([0, value]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (70, 300), (3, 4, 5), (2, 3, 40, 33)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_no_worse_than_eager(dtype, shape, training, channels_last):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    channels = shape[1]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    weight, bias = torch.randn(channels), torch.randn(channels)
    upstream = torch.randn(shape).to(dtype)

    def run(function, x, kind):
        x = x.detach().requires_grad_()
        w, b = (p.to(kind).requires_grad_() for p in (weight, bias))
        mean, var = torch.zeros(channels, dtype=kind), torch.ones(channels, dtype=kind)
        y = function(x, mean, var, w, b, training)
        grads = torch.autograd.grad(y, (x, w, b), upstream.to(y.dtype))
        return y.detach(), *grads, mean, var

    truth = run(F.batch_norm, x.double(), torch.float64)
    ours, eager = run(fused_ops.batch_norm, x, wide), run(F.batch_norm, x, wide)
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert no_worse(mine, theirs, exact)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4), (2, 2, 2, 3)])
def test_batch_norm_gradcheck(correction, training, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 0.5

    def f(x, w, b):
        return fused_ops.batch_norm(x, mean.clone(), var.clone(), w, b, training, correction=correction)

    assert gradcheck(f, (x, weight, bias), check_forward_ad=True)
    assert gradgradcheck(f, (x, weight, bias))


def test_batch_norm_keeps_digits_at_large_mean():
    x = 1000 + 0.01 * torch.randn(256, 8)
    exact = F.batch_norm(x.double(), None, None, training=True)
    assert (fused_ops.batch_norm(x, None, None, training=True) - exact).abs().max() < 2e-6


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    x, image = torch.randn(512, 1000), torch.randn(16, 32, 24, 24)
    target = torch.randint(0, 1000, (512,))

    def run():
        a, b = x.detach().requires_grad_(), image.detach().requires_grad_()
        loss = fused_ops.cross_entropy(a, target)
        y = fused_ops.batch_norm(b, None, None, training=True)
        return loss, y, *torch.autograd.grad((loss, (y * image).sum()), (a, b))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(threads)
        many = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_kernels_match_reference():
    x, target = torch.randn(9, 33, dtype=torch.float64), torch.randint(0, 33, (9,))
    ours = torch.ops.fused_ops.cross_entropy_forward(x, target, -100, 1)
    for a, b in zip(ours, ce_reference.forward(x, target, -100, 1), strict=True):
        torch.testing.assert_close(a, b)
    stats = torch.zeros(33).double(), torch.ones(33).double()
    ours = torch.ops.fused_ops.batch_norm_forward(x, *stats, None, None, True, 0.1, 1e-5, 0)
    for a, b in zip(ours, bn_reference.forward(x, *stats, None, None, True, 0.1, 1e-5, 0), strict=True):
        torch.testing.assert_close(a, b)

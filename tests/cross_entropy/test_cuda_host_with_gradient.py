"""The CUDA kernels of a loss that brings its gradient, run by tests/cuda_host, and what a small call costs."""

import pytest
import torch
import torch.nn.functional as F
from cuda_host import DTYPES, CrossEntropy, Guarded, aligned
from test_cuda_host_cross_entropy import LAYOUTS, MODES, data
from test_cuda_host_ops import emulated  # noqa: F401  (a fixture)
from torch.profiler import ProfilerActivity, profile

import fused_ops
from fused_ops.ops.cross_entropy import reference
from fused_ops.testing import assert_no_worse_than

# A thread's row in shared memory (up to 128 bytes), a warp's (4 KiB) and a block's (32 KiB) in registers, and beyond.
CLASSES = [1, 2, 3, 7, 8, 16, 17, 31, 33, 64, 65, 127, 130, 257, 511, 1000, 1024, 1030, 2047, 2049, 4097, 8193, 16390]


@pytest.fixture
def kernels(cuda_host):
    return CrossEntropy(cuda_host)


def run(kernels, x, target, reduction="mean", offset=0, strides=None):
    """Loss and gradient of logits ``offset`` elements behind an aligned address."""
    x = aligned(x, offset)
    before, out = x.clone(), Guarded(x.shape, strides or torch.empty(x.shape).stride(), x.dtype, offset)
    loss = kernels.with_gradient(x, target, reduction=MODES[reduction], grad=out.tensor)
    out.check()
    assert torch.equal(x.nan_to_num(9.0), before.nan_to_num(9.0))
    return loss, out.tensor.clone()


def eager(x, target, reduction):
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(x, target, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def compare(kernels, x, target, reduction="mean", **options):
    found = run(kernels, x, target, reduction, **options)
    launches = kernels.launches
    loss, _, _ = kernels.forward(x, target, reduction=MODES[reduction])
    torch.testing.assert_close(found[0], loss, rtol=2 * torch.finfo(x.dtype).eps, atol=0)  # as the forward finds it
    theirs, exact = (eager(v, target, reduction) for v in (x, x.double()))
    for name, mine, other, truth in zip(("loss", "grad"), found, theirs, exact, strict=True):
        if x.dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)
        else:
            assert_no_worse_than(mine, other, truth, name)
    kernels.launches = launches
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_row_lengths(kernels, classes, dtype):
    x, target = data(5 if classes > 300 else 37, classes, dtype)
    target[0] = classes - 1
    for reduction, offset in (("mean", 0), ("sum", classes % 7 + 1)):
        compare(kernels, x, target, reduction, offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernels, layout, dtype):
    for classes in (3, 70):
        x, target = data(45, classes, dtype)
        x = LAYOUTS[layout](x)
        target = target.reshape(3, 15) if x.dim() > 2 else target
        compare(kernels, x, target, strides=x.stride() if layout == "channels last" else None)


def launches(kernels, rows, classes, reduction="mean"):
    x, target = data(rows, classes, torch.float32)
    compare(kernels, x, target, reduction)
    return kernels.launches


def test_launches(kernels):
    """One where one block takes all rows; else the rows and their total, with a count of many targets before."""
    assert launches(kernels, 256, 27) == launches(kernels, 1024, 10) == launches(kernels, 32, 1000) == 1
    assert launches(kernels, 4, 8000) == 1
    assert launches(kernels, 301, 5) == 1  # two tiles, of which the second is other threads' in part
    assert launches(kernels, 33, 200) == launches(kernels, 5, 2000) == 2
    assert launches(kernels, 1030, 9) == 3 and launches(kernels, 1030, 9, "sum") == 2
    assert launches(kernels, 3, 8200) == 3  # of the forward two, of the backward one: the row is read twice


def test_more_rows_than_blocks(kernels):
    assert launches(kernels, 1056 * 256 + 300, 2) == 4  # counts, rows, sums of sums, the total


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(cuda_host, order, dtype):
    for rows, classes in ((300, 5), (20, 50), (70, 500), (7, 4000)):
        x, target = data(rows, classes, dtype)
        first, second = (run(CrossEntropy(cuda_host, k), x, target, offset=1) for k in (0, order))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 100, 3000])
def test_rows_that_are_not_finite(kernels, classes, dtype):
    inf, nan, top = float("inf"), float("nan"), torch.finfo(dtype).max
    rows = [[-inf, 1.0, 0.0], [1.0, -inf, 2.0], [-inf] * 3, [inf, 0.0, 0.0], [0.0, inf, 0.0], [nan, 0.0, 0.0]]
    rows += [[0.0, 0.0, nan], [top, -top, 0.0], [top, top, top], [30.0, 0.0, 0.0]]
    x = torch.full((len(rows), classes), -inf, dtype=dtype)
    x[:, :3] = torch.tensor(rows, dtype=torch.float64).to(dtype)
    for i in range(len(rows)):  # one by one, as one row spoils the loss
        found, truth = (f(x[i : i + 1]) for f in (lambda v: run(kernels, v, v.new_zeros(1).long()), theirs_of))
        torch.testing.assert_close(found, truth, equal_nan=True, rtol=1e-2, atol=1e-24)
    whole = run(kernels, x, torch.tensor([-100, 0, *[-100] * 8]))[1]
    assert not whole[[0, *range(2, 10)]].any() and whole[1].isfinite().all()  # ignored rows stay out of it


def theirs_of(v):
    loss, grad = eager(v.double(), torch.zeros(1, dtype=torch.int64), "mean")
    return loss.to(v.dtype), grad.to(v.dtype)


@pytest.mark.parametrize("classes", [50, 300, 9000])
def test_a_bad_target_poisons_its_row_and_raises_on_the_device(kernels, classes):
    x, target = data(4, classes, torch.float32)
    target[1] = classes
    loss, grad = run(kernels, x, target, "sum")
    assert kernels.error == 710 and loss.isnan()
    if classes < 9000:  # else a launch before the gradient's has failed
        assert grad[1].isnan().all() and not grad[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_do(host_ops, reduction):
    op = host_ops["cross_entropy_with_gradient"]
    for x, target in ((torch.empty(0, 5), torch.empty(0).long()), (torch.randn(3, 5), torch.full((3,), -100))):
        loss, grad, ignored = op(x, target, -100, MODES[reduction])
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        assert grad.shape == x.shape and not grad.any() and ignored == -1
    with pytest.raises(RuntimeError, match="reduction must be 1"):
        op(torch.randn(3, 5), torch.zeros(3).long(), -100, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (7, 9), (2, 3, 5), (3, 0), (40, 700)])
def test_a_scaled_gradient(host_ops, shape, dtype):
    scale, classes = host_ops["cross_entropy_scale_gradient"], 0 if len(shape) == 1 else 1
    gradient = torch.randn(shape).to(dtype)
    target = torch.randint(0, 3, (*shape[:classes], *shape[classes + 1 :]), dtype=torch.int32)
    for upstream in (1.0, -0.3, float("inf"), float("nan")):
        keep = (target != 2).unsqueeze(classes)
        given = torch.where(keep, gradient, 0.0).transpose(0, -1).contiguous().transpose(0, -1)
        found = scale(given, torch.tensor([upstream], dtype=dtype), target, 2)
        expected = reference.scale_gradient(given, torch.tensor(upstream, dtype=dtype), target, 2)
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and found.is_contiguous()
    for bad in ((gradient, torch.ones(2, dtype=dtype)), (gradient, torch.tensor(1)), (gradient[..., None], scale)):
        with pytest.raises((RuntimeError, TypeError)):
            scale(*bad, target, 2)


def costs(cuda_host, call):
    """What the call returns, the kernels that it launches, and the tensors that it allocates."""
    cuda_host.cuda_host_launches()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    memory = [e.nbytes() for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, cuda_host.cuda_host_launches(), sum(n > 0 for n in memory)


def test_what_a_small_call_costs(emulated, cuda_host, monkeypatch):  # noqa: F811
    x, target, one = torch.randn(32, 27, requires_grad=True), torch.randint(0, 27, (32,)), torch.ones(())
    grads = []
    for small, forward, backward in ((32768, (1, 2), (1, 1)), (-1, (2, 4), (1, 2))):
        monkeypatch.setattr("fused_ops.ops.cross_entropy.functions._SMALL", small)
        loss, *found = costs(cuda_host, lambda: fused_ops.cross_entropy(x, target))
        assert tuple(found) == forward
        grad, *found = costs(cuda_host, lambda: torch.autograd.grad(loss, x, one))  # noqa: B023
        assert tuple(found) == backward
        grads.append(grad[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_small_loss_serves_every_derivative_and_upstream_gradient(emulated, reduction):  # noqa: F811
    x, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, -100, 1, 2, 2])
    for upstream in (torch.inf, torch.nan):  # ignored rows stay out of it
        loss = fused_ops.cross_entropy(x, target, reduction=reduction)
        assert type(loss.grad_fn).__name__ == "_SmallOnDeviceFunctionBackward"
        grad = torch.autograd.grad(loss, x, torch.tensor(upstream), retain_graph=True)[0]
        assert (grad[2] == 0).all() and not grad[0].isfinite().all()
        expected = torch.autograd.grad(F.cross_entropy(x, target, reduction=reduction), x)[0]
        for _ in range(2):  # through a graph that is retained
            again = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)[0]
            torch.testing.assert_close(again, 2 * expected)
    batched = torch.autograd.grad(loss, x, torch.tensor([1.0, 3.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([expected, 3 * expected]))
    f = lambda x: fused_ops.cross_entropy(x, target, reduction=reduction)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(f)(x.detach()), expected)
    x = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


def test_a_backward_frees_what_was_saved(emulated):  # noqa: F811
    x, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    loss = fused_ops.cross_entropy(x, target)
    assert len(loss.grad_fn.saved_tensors) == 3  # the gradient among them: a loss that is kept for a log keeps none
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()

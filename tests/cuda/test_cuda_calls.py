"""Calls that models make of the ops: torch.compile, autocast, CUDA graphs of small losses, more than 2^31 values.

Where there is no GPU the CPU answers, with small sizes, so that the questions themselves are known to be right.
"""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.core import library
from fused_ops.testing import assert_no_worse_than

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU")
BACKENDS = ["aot_eager", *(["inductor"] if HAS_GPU else [])]


def tensors(rows=48, features=40, classes=130):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    weight = torch.randn(classes, features, generator=generator) / 8
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[::7] = -100
    return x.to(DEVICE), weight.to(DEVICE), target.to(DEVICE)


def head(x, matrix, target, **options):
    return fused_ops.cross_entropy(F.linear(x, matrix), target, **options)


def norm(x, weight, target, **options):
    y = fused_ops.batch_norm(x, None, None, training=True, activation="relu", **options)
    y = F.linear(y, weight)
    return (y.float() if y.dtype.itemsize == 2 else y).square().mean()


CALLS = {
    "cross_entropy": head,
    "label_smoothing": lambda *t: head(*t, label_smoothing=0.1),
    "z_loss, softcap": lambda *t: head(*t, z_loss=1e-3, softcap=20.0),
    "class weights": lambda x, w, t: head(x, w, t, weight=torch.linspace(0.5, 2, w.size(0), device=x.device).to(x)),
    "linear_cross_entropy": lambda *t: fused_ops.linear_cross_entropy(*t, chunk_rows=16),
    "batch_norm": norm,
}


def gradients(function, x, weight, target):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    loss = function(*leaves, target)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_compiled_calls(call, backend):
    compiled = torch.compile(CALLS[call], backend=backend, fullgraph=True)
    for rows in (48, 33):  # another size may compile again
        found, expected = (gradients(f, *tensors(rows)) for f in (compiled, CALLS[call]))
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def eager_head(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_calls_under_autocast(call, dtype):
    x, weight, target = tensors()
    with torch.autocast(DEVICE, dtype):
        found = gradients(CALLS[call], x, weight, target)
    assert found[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in found[1:])
    exact = gradients(CALLS[call], x.double(), weight.double(), target)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0.05, atol=0.02 * float(truth.abs().max()))
    if call in ("cross_entropy", "linear_cross_entropy"):
        with torch.autocast(DEVICE, dtype):
            theirs = gradients(eager_head, x, weight, target)
        assert_no_worse_than(found[0], theirs[0], exact[0], "loss")


def test_a_step_with_a_gradient_scaler():
    """Losses times 65536 in float16: no gradient is lost to the range before the scale comes to it."""
    x, weight, target = tensors()
    steps = {}
    for name, function in (("ours", head), ("eager", eager_head)):
        leaf = weight.clone().requires_grad_()
        scaler, optimizer = torch.amp.GradScaler(DEVICE), torch.optim.SGD([leaf], 1.0)
        with torch.autocast(DEVICE, torch.float16):
            loss = function(x, leaf, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps[name] = leaf.detach() - weight
    torch.testing.assert_close(steps["ours"], steps["eager"], rtol=0.02, atol=1e-4)


# ---- small losses, whose gradient comes with them


@pytest.fixture
def on_device():
    if library.missing_reason if DEVICE == "cpu" else library.cuda_missing_reason:
        pytest.skip("no kernels")


@pytest.mark.parametrize("shape", [(32, 27), (1024, 10), (300, 100), (33, 990), (4, 8000), (5, 6000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_losses(shape, dtype, on_device):
    x = (torch.randn(shape, device=DEVICE, dtype=dtype) * 3).requires_grad_()
    target = torch.randint(0, shape[1], shape[:1], device=DEVICE)
    target[1] = -100
    for reduction in ("mean", "sum"):
        loss = fused_ops.cross_entropy(x, target, reduction=reduction)
        assert "Small" in type(loss.grad_fn).__name__
        for upstream in (1.0, -3.5):
            wanted = torch.tensor(upstream, device=DEVICE, dtype=dtype)
            mine = torch.autograd.grad(loss, x, wanted, retain_graph=True)[0]
            theirs, truth = (
                torch.autograd.grad(F.cross_entropy(v, target, reduction=reduction), v, wanted.to(v.dtype))[0]
                for v in (x, x.detach().double().requires_grad_())
            )
            assert_no_worse_than(mine, theirs, truth, "gradient") if dtype == torch.float32 else None
            torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-6)
        infinite = torch.autograd.grad(loss, x, torch.full_like(loss, torch.inf))[0]
        assert not infinite[1].any() and not infinite[0].isfinite().all()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(x, target, reduction=reduction).detach())
    assert torch.autograd.grad(loss.new_zeros(()) + fused_ops.cross_entropy(x, target), x, create_graph=True)


@needs_gpu
def test_a_small_loss_waits_for_nothing_and_is_captured():
    x = torch.randn(32, 27, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 27, (32,), device=DEVICE)

    def step():
        loss = fused_ops.cross_entropy(x, target) * 3
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_gpu
def test_a_small_loss_as_two_graphs_whose_backward_is_replayed_twice():
    """make_graphed_callables captures forward and backward apart: a gradient scaled in place would be scaled again."""

    class Loss(torch.nn.Module):
        def forward(self, x, target):
            return fused_ops.cross_entropy(x, target)

    x = torch.randn(32, 27, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 27, (32,), device=DEVICE)
    expected = torch.autograd.grad(F.cross_entropy(x, target), x)[0]
    graphed = torch.cuda.make_graphed_callables(Loss(), (x, target))
    loss = graphed(x, target)
    for _ in range(3):
        grad = torch.autograd.grad(loss, x, torch.full_like(loss, 2.0), retain_graph=True)[0]
        torch.testing.assert_close(grad, 2 * expected)


# ---- more than 2^31 values

LARGE = {  # (rows, classes), or the shape of a batch norm's input
    "long rows": (67_200, 32_001),
    "rows in registers": (2_160_000, 1001),
    "short rows": ((1 << 28) + 1, 9),
    "one row": (1, (1 << 31) + 77),
}
TINY = {"long rows": (5, 3001), "rows in registers": (9, 1001), "short rows": (257, 9), "one row": (1, 777)}


@pytest.fixture
def room():
    if HAS_GPU and torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB of the GPU's memory")
    yield
    if HAS_GPU:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("op", ["forward, backward", "in place", "with its gradient", "smoothing"])
@pytest.mark.parametrize("size", LARGE)
def test_large_losses(size, op, room):
    """The first and the last rows, which are beyond 2^31, as if they were alone; the sums by the rows' own losses."""
    rows, classes = (LARGE if HAS_GPU else TINY)[size]
    x = torch.empty(rows, classes, device=DEVICE, dtype=torch.bfloat16).normal_()
    target = torch.randint(0, min(classes, 250), (rows,), device=DEVICE, dtype=torch.uint8)
    ends = torch.tensor([0, rows // 2, rows - 1], device=DEVICE).unique()
    few = x[ends].float().requires_grad_()
    options = {"label_smoothing": 0.1} if op == "smoothing" else {}
    expected = F.cross_entropy(few, target[ends].long(), reduction="sum", **options)
    expected.backward()
    if op == "with its gradient":
        loss, grad, _ = torch.ops.fused_ops.cross_entropy_with_gradient(x, target, -100, 2)
    else:
        leaf = x.requires_grad_()
        logits = leaf.view_as(leaf) if op == "in place" else leaf
        found = fused_ops.cross_entropy(logits, target, reduction="none", inplace_backward=op == "in place", **options)
        torch.testing.assert_close(found[ends].sum().float(), expected.detach(), rtol=1e-2, atol=1e-2)
        loss = found.detach().sum(dtype=torch.float64)
        grad = torch.autograd.grad(found, leaf, torch.ones_like(found))[0]
    assert float(loss) == pytest.approx(float(expected.detach()) / len(ends) * rows, rel=0.5 if rows < 1000 else 0.2)
    torch.testing.assert_close(grad[ends].float(), few.grad, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_a_large_batch_norm(last, room):
    batch, channels, size = (4100, 64, 91) if HAS_GPU else (5, 8, 7)
    x = torch.empty(batch, channels, size, size, device=DEVICE, dtype=torch.bfloat16)
    x = (x.to(memory_format=torch.channels_last) if last else x).normal_().add_(1)
    assert not HAS_GPU or x.numel() > 2**31
    x.requires_grad_()
    y = fused_ops.batch_norm(x, None, None, training=True, activation="relu")
    for part in (0, batch - 1):
        assert 0.3 < float(y[part].float().mean()) < 0.5  # of a normal distribution's positive half
    grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    assert grad[-1].isfinite().all() and float(grad[-1].float().abs().max()) > 0

"""Both ops on a GPU: the error rule, gradcheck, and what only a device can show. Skipped where there is none."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops import _library
from fused_ops.testing import assert_no_worse_than

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CE_SHAPES = [(33, 2), (100, 10), (64, 1000), (9, 2049), (5, 50257), (2, 300001), (3, 19, 20, 33), (2, 150, 65)]
BN_SHAPES = [(129, 33), (8, 64, 7, 7), (4, 32, 56, 56), (16, 3, 4, 4), (2, 5, 100001), (4096, 256)]


def reversed_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def run(function, tensors, upstream):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def compare(ours, eager, tensors, upstream):
    found, other, truth = (
        run(f, [t.to(kind) for t in tensors], upstream)
        for f, kind in ((ours, tensors[0].dtype), (eager, tensors[0].dtype), (eager, torch.float64))
    )
    for i, (mine, theirs, exact) in enumerate(zip(found, other, truth, strict=True)):
        assert_no_worse_than(mine, theirs, exact, f"result {i}")


def test_kernels_serve_the_ops():
    served = {name: by for name, device, by, _ in _library.backends() if device == "cuda"}
    for name in ("cross_entropy_forward", "cross_entropy_backward", "batch_norm_forward", "batch_norm_act_backward"):
        assert served[name] == "CUDA kernel"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CE_SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(shape, dtype, reduction):
    for order in (lambda t: t.contiguous(), reversed_last if len(shape) > 2 else lambda t: t.t().contiguous().t()):
        x = order((torch.randn(shape, device=DEVICE) * 3).to(dtype))
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=DEVICE)
        target.view(-1)[1] = -100
        upstream = torch.randn(target.shape if reduction == "none" else (), device=DEVICE).to(dtype)
        compare(
            lambda v, t=target: fused_ops.cross_entropy(v, t, reduction=reduction),
            lambda v, t=target: F.cross_entropy(v, t, reduction=reduction),
            *([x], upstream),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BN_SHAPES, ids=str)
def test_batch_norm(shape, dtype):
    for order in (lambda t: t, reversed_last):
        x = order((torch.randn(shape, device=DEVICE) * 2 + 5).to(dtype)) if len(shape) > 2 else None
        x = (torch.randn(shape, device=DEVICE) * 2 + 5).to(dtype) if x is None else x
        params = [torch.randn(shape[1], device=DEVICE).to(dtype) for _ in range(2)]
        upstream = order(torch.randn(shape, device=DEVICE).to(dtype)) if len(shape) > 2 else torch.randn_like(x)
        for training in (True, False):
            stats = [torch.randn(shape[1], device=DEVICE), torch.rand(shape[1], device=DEVICE) + 0.5]

            def call(function, stats=stats, training=training):
                def norm(v, w, b):
                    here = [s.to(v.dtype, copy=True) for s in stats]
                    return function(v, *here, w, b, training)

                return norm

            compare(call(fused_ops.batch_norm), call(F.batch_norm), [x, *params], upstream)


@pytest.mark.parametrize("op", ["cross_entropy", "batch_norm"])
def test_gradcheck(op):
    samples = importlib.import_module(f"fused_ops.reference.{op}").samples()
    for sample in samples:

        def to_gpu(v):
            return v.detach().to(DEVICE).requires_grad_(v.requires_grad) if torch.is_tensor(v) else v

        args, kwargs = [to_gpu(a) for a in sample.args], {k: to_gpu(v) for k, v in sample.kwargs.items()}
        leaves = [t for t in [*args, *kwargs.values()] if torch.is_tensor(t) and t.requires_grad]

        def call(*_, args=args, kwargs=kwargs):
            return getattr(fused_ops, op)(*args, **kwargs)

        assert torch.autograd.gradcheck(call, leaves), sample.name


def both_ops():
    x = torch.randn(64, 32, device=DEVICE)
    target, weight = torch.randint(0, 32, (64,), device=DEVICE), torch.ones(32, device=DEVICE)
    stats = torch.zeros(32, device=DEVICE), torch.ones(32, device=DEVICE)

    def step(x):
        leaf = x.detach().requires_grad_()
        y = fused_ops.batch_norm(leaf, *stats, weight, None, True, activation="relu", residual=leaf)
        loss = fused_ops.cross_entropy(y, target)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return step, x


def test_nothing_waits_for_the_device():
    step, x = both_ops()
    step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used():
    step, x = both_ops()
    expected = step(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = x * 1  # ready only behind the sleep
        found = step(later)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_cuda_graph():
    step, x = both_ops()
    expected = step(x * 2)
    static = x.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(static)
    static.copy_(x * 2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_repeated_runs_give_the_same_bits():
    step, x = both_ops()
    first = step(x)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(step(x), first, strict=True))


def test_a_bad_target_is_a_device_error(run_python):
    code = (
        "import torch, fused_ops\n"
        "fused_ops.cross_entropy(torch.randn(3, 5, device='cuda'), torch.tensor([0, 5, 1], device='cuda')).item()"
    )
    result = run_python("-c", code, check=False)
    assert result.returncode != 0 and "device-side assert" in result.stderr


def test_no_device_memory_beyond_the_tensors_grows():
    step, x = both_ops()
    step(x)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        step(x)
    assert torch.cuda.memory_allocated() == before

"""Every op on a GPU: the error rule, gradcheck, and what only a device can show. Skipped where there is none.

``make gpu-report`` runs all of it, and what is called sanitized under compute-sanitizer besides.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from cuda_host import OPS
from test_batch_norm_inplace import ACTIVATIONS
from test_cuda_host_batch_norm_parts import call_ranks
from test_cuda_host_cross_entropy_options import CASES, draw, laid_out
from test_cuda_host_cross_entropy_options import compare as compare_rows
from test_cuda_host_kept_output import MORE, Kept
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import fused_ops
from fused_ops.core import library
from fused_ops.core.sample import Sample
from fused_ops.core.torch_private import has_kernel
from fused_ops.ops.batch_norm import activations, reference
from fused_ops.ops.linear_cross_entropy.by_rows import INPUT, WEIGHT, Plan
from fused_ops.testing import assert_no_worse_than, check_op, samples_of

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CE_SHAPES = [(33, 2), (100, 10), (64, 1000), (9, 2049), (5, 50257), (2, 300001), (3, 19, 20, 33), (2, 150, 65)]
BN_SHAPES = [(129, 33), (8, 64, 7, 7), (4, 32, 56, 56), (16, 3, 4, 4), (2, 5, 100001), (4096, 256)]
BN_SHAPES += [(40, 24, 7, 7), (64, 16, 4, 4), (20000, 8), (32, 64), (8, 16, 7, 7), (4, 3, 32, 32)]  # some are packed


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


def on_gpu(value, dtype=None):
    """The value with its tensors on the GPU, in another floating-point dtype if that is wanted."""

    def move(t):
        if not torch.is_tensor(t):
            return t
        kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
        return t.detach().to(DEVICE, kind, copy=True).requires_grad_(t.requires_grad)

    return tree_map(move, value)


def call_of(op, args, kwargs):
    """A call as a function of its tensors that require grad, and those tensors."""
    values, spec = tree_flatten((args, kwargs))
    places = [i for i, v in enumerate(values) if torch.is_tensor(v) and v.requires_grad]

    def call(*leaves):
        given = list(values)
        for i, leaf in zip(places, leaves, strict=True):
            given[i] = leaf
        args, kwargs = tree_unflatten(given, spec)
        outputs = tree_flatten(getattr(fused_ops, op)(*args, **kwargs))[0]
        return tuple(o for o in outputs if torch.is_tensor(o) and o.requires_grad)

    return call, [values[i] for i in places]


def test_kernels_serve_the_ops():
    served = {name: by for name, device, by, _ in library.backends() if device == "cuda"}
    for name in [name for names in OPS.values() for name in names]:
        assert has_kernel(f"fused_ops::{name}", "CUDA"), name
        assert served.get(name, "CUDA kernel") == "CUDA kernel", name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sanitized_samples(op, dtype):
    """Forward and backward of every sample: small calls through every kernel."""
    for sample in samples_of(op):
        call, leaves = call_of(op, *on_gpu((sample.args, sample.kwargs), dtype))
        outputs = call(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        torch.cuda.synchronize()
        if dtype != torch.float64:
            continue
        cpu_call, cpu_leaves = call_of(op, sample.args, sample.kwargs)
        expected = cpu_call(*cpu_leaves)
        ones = [torch.ones_like(o) for o in expected]
        for mine, other in zip(outputs, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), other, rtol=1e-9, atol=1e-10)
        for mine, other in zip(grads, torch.autograd.grad(expected, cpu_leaves, ones, allow_unused=True), strict=True):
            assert (mine is None) == (other is None), sample.name
            if mine is not None:
                torch.testing.assert_close(mine.cpu(), other, rtol=1e-8, atol=1e-9)


# Rows of a thread, a warp and a block, of one block and of several, and those that are read twice. So many that memory
# ends with a whole 16 bytes: the last vector of a row that does not begin at a multiple of them is read with all that
# it shares those with, and memcheck knows the end of an allocation to the byte.
WITH_GRADIENT = [(37, 27), (1300, 9), (24, 130), (104, 513), (4, 2500), (8, 4001), (8, 20001), (3, 19, 20, 33)]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", WITH_GRADIENT, ids=str)
def test_sanitized_losses_with_gradients(shape, dtype):
    """The op that brings the gradient, and what scales it, by the error rule; rows of any alignment."""
    ops, classes = torch.ops.fused_ops, shape[1]
    target = torch.randint(0, classes, (shape[0], *shape[2:]), device=DEVICE)
    target.view(-1)[1] = -100
    scale = torch.tensor(-2.0, device=DEVICE, dtype=dtype)
    for reduction, name in ((1, "mean"), (2, "sum")):
        x = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
        if len(shape) == 2:
            x = torch.cat([x, x[:, :1]], 1)[:, :classes]
        loss, grad, ignored = ops.cross_entropy_with_gradient(x, target, -100, reduction)
        scaled = ops.cross_entropy_scale_gradient(grad, scale, target, -100)
        assert ignored == -1 and torch.equal(scaled, grad * scale)
        infinite = ops.cross_entropy_scale_gradient(grad, scale * torch.inf, target, -100)
        assert not infinite.movedim(1, -1)[target == -100].any()
        other, truth = (
            run(lambda v, n=name: F.cross_entropy(v, target, reduction=n), [x.to(kind)], torch.ones((), device=DEVICE))
            for kind in (dtype, torch.float64)
        )
        for mine, theirs, exact in zip((loss, grad), other, truth, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-13)
            else:
                assert_no_worse_than(mine, theirs, exact, name)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("case", CASES)
def test_cross_entropy_options(case, dtype):
    """The rows of every option by the error rule, fresh and in place, in every layout."""
    ops = {name: getattr(torch.ops.fused_ops, name).default for name in OPS["cross_entropy"]}
    for classes, rows in ((7, 45), (100, 45), (1500, 15), (50257, 15)):
        a, o = draw(case, rows, classes, dtype)
        for layout in (
            ("contiguous", "transposed", "channels last", "class stride") if classes < 200 else ("row stride",)
        ):
            compare_rows(ops, on_gpu(laid_out(a, layout)), o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [(64, 0, 0), (64, 300, 256), (64, 64, 200), (64, -1, 600)])
def test_linear_cross_entropy(plan, dtype, monkeypatch):
    """In chunks of rows; in tiles of classes where all rows' logits are kept, some, and none but grad_weight's."""
    chunk_rows, kept_rows, tile_classes = plan
    chosen = Plan(1000, chunk_rows, INPUT | WEIGHT, kept_rows, tile_classes)
    monkeypatch.setattr("fused_ops.ops.linear_cross_entropy.graph.plan", lambda *_: chosen)
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(300, 64, generator=g)).to(DEVICE, dtype)
    weight = (torch.randn(1000, 64, generator=g) / 8).to(DEVICE, dtype)
    target = torch.randint(0, 1000, (300,), generator=g).to(DEVICE)
    target[::7] = -100
    found, exact = [], []
    for function, kind, to in (
        (fused_ops.linear_cross_entropy, dtype, found),
        (lambda a, w, t: F.cross_entropy(F.linear(a, w), t), torch.float64, exact),
    ):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
        loss = function(*leaves, target)
        to += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-4}
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, **tolerance)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    moved = [Sample(s.name, on_gpu(s.args), on_gpu(s.kwargs)) for s in samples_of(op)[::6]]
    assert not [r.details for r in check_op(getattr(fused_ops, op), moved) if r.failed]


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


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", MORE)
def test_batch_norm_that_keeps_its_output(layout, activation, dtype):
    """What is stored to the bit, and the gradients, as by the reference on the CPU; in a graph too, without waiting."""
    here = Kept(layout, dtype, activation)
    call, ops = here.to(DEVICE), torch.ops.fused_ops
    wanted = here.keep(reference.keep)
    kept = call.keep(ops.batch_norm_keep)
    assert torch.equal(kept[0].cpu(), wanted[0])
    found = call.backward(ops.batch_norm_keep_backward, kept)
    for ours, want in zip(found, here.backward(reference.keep_backward, wanted), strict=True):
        scale, roundings = float(want.abs().max()), 100 if dtype == torch.float64 else 4
        assert (ours.cpu().double() - want.double()).abs().max() <= roundings * torch.finfo(dtype).eps * scale
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.keep(ops.batch_norm_keep)
        again = call.backward(ops.batch_norm_keep_backward, captured)
    graph.replay()
    assert captured[0].numel() == call.x.numel()
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    for sample in samples_of(op):
        call, leaves = call_of(op, *on_gpu((sample.args, sample.kwargs)))
        assert torch.autograd.gradcheck(call, leaves), sample.name


def all_ops():
    x = torch.randn(64, 32, device=DEVICE)
    target, weight = torch.randint(0, 32, (64,), device=DEVICE), torch.ones(32, device=DEVICE)
    head = torch.randn(32, 32, device=DEVICE)
    stats = torch.zeros(32, device=DEVICE), torch.ones(32, device=DEVICE)
    valid = torch.arange(64, device=DEVICE) % 5 > 0
    raw_ops = {name: getattr(torch.ops.fused_ops, name).default for name in OPS["batch_norm"]}

    def step(x):
        leaf = x.detach().requires_grad_()
        y = fused_ops.batch_norm(leaf, *stats, weight, None, True, activation="relu", residual=leaf, groups=3)
        y = fused_ops.batch_norm(y, *stats, weight, None, True, activation="silu", valid=valid)
        y = fused_ops.batch_norm(y, *stats, None, None, True, activation="leaky_relu", inplace_activated=True)
        part = types.SimpleNamespace(x=x, grad=x + 1, residual=x - 1, weight=weight, bias=weight)
        found = call_ranks(raw_ops, part, activations.SILU, valid)
        loss = fused_ops.cross_entropy(y, target)
        loss = loss + fused_ops.cross_entropy(y, target, label_smoothing=0.1, z_loss=0.1, softcap=5.0)
        loss = loss + fused_ops.linear_cross_entropy(y, head, target, chunk_rows=32)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0], *(t for t in found.values() if t is not None)

    return step, x


def test_nothing_waits_for_the_device():
    step, x = all_ops()
    step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used():
    step, x = all_ops()
    expected = step(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = x * 1  # ready only behind the sleep
        found = step(later)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_cuda_graph():
    step, x = all_ops()
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
    step, x = all_ops()
    first = step(x)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(step(x), first, strict=True))


@pytest.mark.parametrize("options", ["", ", label_smoothing=0.1"])
def test_a_bad_target_is_a_device_error(run_python, options):
    code = (
        "import torch, fused_ops\n"
        "x, target = torch.randn(3, 5, device='cuda'), torch.tensor([0, 5, 1], device='cuda')\n"
        f"fused_ops.cross_entropy(x, target{options}).item()"
    )
    result = run_python("-c", code, check=False)
    assert result.returncode != 0 and "device-side assert" in result.stderr


def test_no_device_memory_beyond_the_tensors_grows():
    step, x = all_ops()
    step(x)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        step(x)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used_whichever_is_current():
    step, x = all_ops()
    expected = step(x)
    logits = torch.randn(6, 9, device="cuda:1", requires_grad=True)
    target = torch.randint(0, 9, (6,), device="cuda:1")
    for options in ({}, {"label_smoothing": 0.1}):
        loss = fused_ops.cross_entropy(logits, target, **options)
        loss.backward()
        assert loss.device == logits.grad.device == logits.device and loss.isfinite()
    with torch.cuda.device(1):
        assert all(torch.equal(a, b) for a, b in zip(step(x), expected, strict=True))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        fused_ops.cross_entropy(logits, target.to("cuda:0"))

"""The CUDA kernels of cross-entropy, run on the CPU by tests/cuda_host, against the reference and PyTorch eager."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_host import DTYPES, TARGET_DTYPES, CrossEntropy, Guarded, aligned

from fused_ops.ops.cross_entropy import reference
from fused_ops.testing import assert_no_worse_than

# Around a 16-byte vector of each type (2, 4, 8), groups of 2, 8 and 32 threads, steps of a warp and a block.
CLASSES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 511, 1000, 1023, 1025, 2047]
LONG = [2049, 4097, 8191, 16385, 32771, 65537, 140001]  # a block a row, and several
MODES = {"none": 0, "mean": 1, "sum": 2}


def spatial(x):
    return x.reshape(-1, 5, 3, x.size(1)).permute(0, 3, 1, 2)


def flat_spatial(x):
    """(rows, classes) as a dense (batch, classes, 15)."""
    return spatial(x).flatten(2).contiguous()


LAYOUTS = {
    "contiguous": lambda x: x,
    "row stride": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "transposed": lambda x: x.t().contiguous().t(),
    "class stride": lambda x: torch.stack([x, x], -1)[..., 0],
    "spatial": flat_spatial,
    "channels last": lambda x: spatial(x).contiguous(memory_format=torch.channels_last).flatten(2),
    "spatial, class stride": lambda x: torch.stack([flat_spatial(x)] * 2, -1)[..., 0],
}


def eager(x, target, upstream, reduction):
    x = x.detach().clone().requires_grad_()
    loss = F.cross_entropy(x, target.long(), reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]


def run(kernels, x, target, reduction="mean", offset=0, in_place=False, strides=None):
    """Loss and gradient by the kernels, from logits ``offset`` elements behind an aligned address."""
    x, mode = aligned(x, offset), MODES[reduction]
    before = x.clone()
    loss, lse, total = kernels.forward(x, target, reduction=mode)
    torch.manual_seed(1)
    upstream = torch.randn(loss.shape).to(x.dtype)
    if in_place:
        grad = kernels.backward(upstream, x, target, lse, total, reduction=mode, grad=x).clone()
    else:
        out = Guarded(x.shape, strides or torch.empty(x.shape).stride(), x.dtype, offset)
        grad = kernels.backward(upstream, x, target, lse, total, reduction=mode, grad=out.tensor).clone()
        out.check()
        assert torch.equal(x.nan_to_num(9.0), before.nan_to_num(9.0))
    return loss, grad, lse, total, upstream


def compare(kernels, x, target, reduction="mean", **options):
    loss, grad, lse, total, upstream = run(kernels, x, target, reduction, **options)
    theirs, exact = (eager(v, target, upstream, reduction) for v in (x, x.double()))
    for name, mine, other, truth in zip(("loss", "grad"), (loss, grad), theirs, exact, strict=True):
        if x.dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)
        else:
            assert_no_worse_than(mine, other, truth, name)
    _, lse_ref, total_ref = reference.forward(x, target, -100, MODES[reduction])
    torch.testing.assert_close(lse, lse_ref, rtol=1e-6 if x.dtype != torch.float64 else 1e-13, atol=1e-6)
    assert total == total_ref
    return loss, grad


def data(rows, classes, dtype, scale=3.0):
    torch.manual_seed(rows * 100003 + classes)
    x, target = (torch.randn(rows, classes) * scale).to(dtype), torch.randint(0, classes, (rows,))
    if rows > 2:
        target[2] = -100
    return x, target


@pytest.fixture
def kernels(cuda_host):
    return CrossEntropy(cuda_host)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_row_lengths(kernels, classes, dtype):
    compare(kernels, *data(37, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", LONG)
def test_long_rows(kernels, classes, dtype):
    x, target = data(3, classes, dtype)
    target[0] = classes - 1
    compare(kernels, x, target, "sum", offset=classes % 3)
    pieces = -(-classes * x.element_size() // 262144)
    assert kernels.launches == (1 if pieces == 1 else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("classes", [13, 77, 400, 2100])
def test_alignment(kernels, offset, classes, dtype):
    x, target = data(5, classes, dtype)
    grads = [compare(kernels, x, target, "none", offset=k)[1] for k in (0, offset)]
    assert torch.equal(*grads)  # the order of a row's sums does not depend on where it lies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [3, 70])
def test_layouts(kernels, layout, classes, dtype):
    x, target = data(45, classes, dtype)
    x = LAYOUTS[layout](x)
    target = target.reshape(3, 15) if x.dim() > 2 else target
    strides = x.stride() if layout == "channels last" else None
    for reduction in MODES:
        compare(kernels, x, target, reduction, strides=strides)
    run(kernels, x, target, strides=x.stride())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [9, 100, 2500])
def test_in_place_is_the_same(kernels, layout, classes, dtype):
    x, target = data(15, classes, dtype)
    x = LAYOUTS[layout](x)
    target = target.reshape(1, 15) if x.dim() > 2 else target
    fresh, over = run(kernels, x, target, strides=x.stride()), run(kernels, x, target, in_place=True)
    assert torch.equal(fresh[1], over[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_on_rows_of_several_blocks(kernels, dtype):
    x, target = data(3, 40001, dtype)
    assert torch.equal(run(kernels, x, target)[1], run(kernels, x, target, in_place=True)[1])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 50, 500, 5001, 40001])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(cuda_host, order, dtype, classes):
    x, target = data(20 if classes < 5000 else 3, classes, dtype)
    for name, layout in LAYOUTS.items():
        if name in ("contiguous", "transposed"):
            first, second = (run(CrossEntropy(cuda_host, k), layout(x), target) for k in (0, order))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            first, second = (run(CrossEntropy(cuda_host, k), layout(x), target, in_place=True) for k in (0, order))
            assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("classes", [6, 70, 700, 3001, 40001])
def test_a_row_depends_on_itself_alone(kernels, classes):
    x, target = data(9 if classes < 5000 else 4, classes, torch.float32)
    loss, grad, lse, *_ = run(kernels, x, target, "none")
    for row in range(x.size(0)):
        one = slice(row, row + 1)
        alone_loss, alone_lse, total = kernels.forward(x[one], target[one], reduction=0)
        assert torch.equal(alone_loss, loss[one]) and torch.equal(alone_lse, lse[one])
        torch.manual_seed(1)
        upstream = torch.randn(loss.shape)[one]
        out = torch.empty_like(x[one])
        alone = kernels.backward(upstream, x[one], target[one], alone_lse, total, reduction=0, grad=out)
        assert torch.equal(alone, grad[one])


@pytest.mark.parametrize("target_dtype", TARGET_DTYPES)
def test_target_dtypes_and_ignore_index(kernels, target_dtype):
    x, target = data(30, 11, torch.float32)
    target = torch.where(target == -100, 7, target).to(target_dtype)
    loss, lse, total = kernels.forward(x, target, ignore_index=7)
    expected, lse_ref, total_ref = reference.forward(x, target, 7, reference.MEAN)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(lse, lse_ref)
    assert total == total_ref < 30
    grad = kernels.backward(torch.ones(()), x, target, lse, total, ignore_index=7, grad=torch.empty_like(x))
    torch.testing.assert_close(
        grad, reference.backward(torch.ones(()), x, target, lse_ref, total_ref, 7, reference.MEAN)
    )
    assert bool((grad[target == 7] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 40, 300, 3000, 40000])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_extremes(kernels, classes, dtype, layout):
    inf, nan, top = float("inf"), float("nan"), torch.finfo(dtype).max
    rows = [
        *([-inf, 1.0, 0.0], [1.0, -inf, 2.0], [-inf] * 3, [inf, 0.0, 0.0], [0.0, inf, 0.0], [nan, 0.0, 0.0]),
        *([0.0, 0.0, nan], [top, -top, 0.0], [-top, top, 0.0], [30.0, 0.0, 0.0], [8.0, 0.0, -1.0], [top, top, top]),
    ]
    if classes > 10000:
        rows = rows[:3] + rows[6:10]
    x = torch.full((len(rows), classes), -inf, dtype=dtype)
    x[:, :3] = torch.tensor(rows, dtype=torch.float64).to(dtype)
    x = LAYOUTS[layout](x)
    target = torch.zeros(len(rows), dtype=torch.int64)
    loss, grad, _, _, upstream = run(kernels, x, target, "none")
    theirs, truth = (eager(v, target, upstream, "none") for v in (x, x.double()))
    assert torch.equal(loss.isnan(), theirs[0].isnan())
    keep = ~loss.isnan()
    for i in range(len(rows)):
        if keep[i] and dtype != torch.float64:
            assert_no_worse_than(loss[i], theirs[0][i], truth[0][i], f"loss of row {i}")
            assert_no_worse_than(grad[i], theirs[1][i], truth[1][i], f"grad of row {i}")
    confident = 9 if classes <= 10000 else 6
    assert rows[confident if classes <= 10000 else 6][0] == 30.0
    exact = torch.log1p(2 * torch.tensor(-30.0, dtype=torch.float64).exp())  # what lse - x_target would lose
    torch.testing.assert_close(loss[confident].double(), exact.to(dtype).double(), rtol=1e-2, atol=0.0)
    wanted = torch.expm1(-exact) * upstream[confident].double()
    torch.testing.assert_close(grad[confident, 0].double(), wanted.to(dtype).double(), rtol=2e-2, atol=1e-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [4, 90, 4000, 40000])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_huge_log_sum_exp_keeps_the_logarithm(kernels, classes, dtype, layout):
    x = LAYOUTS[layout](torch.full((2, classes), 2.0**100, dtype=dtype))
    grad = run(kernels, x, torch.tensor([1, 2]), "sum")[1]
    upstream = run(kernels, x, torch.tensor([1, 2]), "sum")[-1]
    expected = (1 / classes - F.one_hot(torch.tensor([1, 2]), classes).double()) * upstream.double()
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("classes", [50, 40000])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_bad_target_poisons_its_row_and_raises_on_the_device(kernels, bad, classes, layout):
    x, target = data(4, classes, torch.float32)
    x = LAYOUTS[layout](x)
    good = run(kernels, x, target, "none")
    target[1] = bad if bad != 50 else classes
    loss, lse, total = kernels.forward(x, target, reduction=0)
    assert kernels.error == 710
    assert loss.isnan().tolist() == [False, True, False, False]
    assert lse.isnan().tolist() == [False, True, False, False]
    assert torch.equal(loss[[0, 2, 3]], good[0][[0, 2, 3]])
    upstream = torch.ones(4)
    grad = kernels.backward(upstream, x, target, lse, total, reduction=0, grad=torch.zeros(x.shape))
    assert kernels.error == 710
    assert grad[1].isnan().all() and not grad[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("reduction", MODES)
def test_nothing_to_do(kernels, reduction):
    loss, _, total = kernels.forward(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), reduction=MODES[reduction])
    expected = F.cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), reduction=reduction)
    assert torch.equal(loss.isnan(), expected.isnan()) and loss.shape == expected.shape and total == 0
    ignored = torch.full((3,), -100)
    loss = kernels.forward(torch.randn(3, 5), ignored, reduction=MODES[reduction])[0]
    expected = F.cross_entropy(torch.randn(3, 5), ignored, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)


def test_more_rows_than_blocks(kernels, host_ops, cuda_host):
    x, target = data(4096 * 128 + 300, 2, torch.float32)
    loss, grad = compare(kernels, x, target)
    assert loss.isfinite() and grad.isfinite().all()
    cuda_host.cuda_host_launches()
    again, _, total = host_ops["cross_entropy_forward"](
        x, target, -100, MODES["mean"]
    )  # scratch with a guard behind it
    assert torch.equal(again, loss) and total == (target != -100).sum()
    assert cuda_host.cuda_host_launches() == 3  # the rows, 2051 sums folded to 9, the total


AT_THE_END_OF_A_PAGE = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, {tests!r})
from cuda_host import CrossEntropy, build

dtype, classes = torch.{dtype}, {classes}
kernels, libc = CrossEntropy(build()), ctypes.CDLL(None)
length, page = classes * dtype.itemsize, mmap.PAGESIZE
inside = -(-length // page) * page
memory = mmap.mmap(-1, inside + page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(start + inside), ctypes.c_size_t(page), 0) == 0
x = torch.frombuffer(memory, dtype=dtype, count=classes, offset=inside - length).view(1, classes)
x.copy_(torch.linspace(-3, 3, classes))
target = torch.tensor([classes - 1])
loss, lse, total = kernels.forward(x, target)
grad = kernels.backward(torch.ones((), dtype=dtype), x, target, lse, total, grad=torch.empty(1, classes, dtype=dtype))
exact = x.double()
torch.testing.assert_close(lse, exact.logsumexp(1), rtol=1e-6, atol=0)
wanted = exact.softmax(1)
wanted[0, -1] -= 1
torch.testing.assert_close(grad, wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-10)
before = grad.clone()
kernels.backward(torch.ones((), dtype=dtype), x, target, lse, total, grad=x)
assert torch.equal(x, before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the page is protected as on Linux")
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [("bfloat16", 8_257_537), ("float16", 8_257_537), ("float32", 4_128_769), ("float64", 2_064_385)],
)
def test_a_piece_shorter_than_a_vector_is_read_within_its_row(cuda_host, run_python, dtype, classes):
    """The last of a long row's pieces is one class, behind which there may be no memory."""
    tests = str(Path(__file__).parent.parent)
    run_python("-c", AT_THE_END_OF_A_PAGE.format(tests=tests, dtype=dtype, classes=classes))


@pytest.mark.parametrize("order", [0, 1])
def test_more_rows_than_blocks_with_a_block_a_row(cuda_host, order):
    x, target = data(4096 + 40, 520, torch.float64)
    compare(CrossEntropy(cuda_host, order), x, target)


@pytest.mark.slow
def test_more_rows_than_blocks_with_eight_threads_a_row(kernels):
    x, target = data(1056 * 32 + 40, 64, torch.bfloat16)
    compare(kernels, LAYOUTS["transposed"](x), target)

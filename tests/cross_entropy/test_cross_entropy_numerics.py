"""Cross-entropy's values: the error rule over classes, layouts and dtypes; extremes, ISAs, batch splits, in place."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without

import fused_ops
from fused_ops.ops.cross_entropy import reference
from fused_ops.testing import assert_no_worse_than

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Around the vector widths (4, 8, 16), around two and four vectors, the chunk of 1024, and vocabularies.
CLASSES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 1023, 1024, 1025, 32000, 50257]


def spatial(x):
    """(rows, classes) as (batch, classes, 5, 3) with rows a multiple of 15."""
    return x.reshape(-1, 5, 3, x.size(1)).permute(0, 3, 1, 2)


LAYOUTS = {
    "contiguous": lambda x: x,
    "row stride": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "transposed": lambda x: x.t().contiguous().t(),
    "class stride": lambda x: torch.stack([x, x], -1)[..., 0],
    "spatial": lambda x: spatial(x).contiguous(),
    "channels last": lambda x: spatial(x).contiguous(memory_format=torch.channels_last),
    "spatial, class stride": lambda x: torch.stack([spatial(x), spatial(x)], -1)[..., 0],
}


def run(function, x, target, upstream=None, **options):
    x = x.detach().requires_grad_()
    loss = function(x, target, **options)
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]


def compare(x, target, **options):
    ours, eager, truth = (
        run(f, v, target, **options)
        for f, v in ((fused_ops.cross_entropy, x), (F.cross_entropy, x), (F.cross_entropy, x.double()))
    )
    for name, mine, theirs, exact in zip(("loss", "grad"), ours, eager, truth, strict=True):
        if x.dtype == torch.float64:
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-13)
        else:
            assert_no_worse_than(mine, theirs, exact, name)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_error_rule_over_classes(classes, dtype):
    torch.manual_seed(classes)
    x, target = (torch.randn(7, classes) * 3).to(dtype), torch.randint(0, classes, (7,))
    target[2] = -100
    compare(x, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 10, 21, 37, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_rule_over_layouts(layout, classes, dtype):
    torch.manual_seed(classes)
    x = LAYOUTS[layout]((torch.randn(2 * 15 * 20, classes) * 3).to(dtype))
    target = torch.randint(0, classes, (x.size(0), *x.shape[2:]))
    target.view(-1)[::7] = -100
    _, grad = compare(x, target, reduction="sum")
    assert grad.is_contiguous() or layout == "channels last"
    if layout == "channels last" and classes > 1:
        assert grad.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "spatial"])
@pytest.mark.parametrize("kind", ["random", "expanded", "non-contiguous"])
def test_upstream_gradients(kind, layout, dtype):
    x = LAYOUTS[layout](torch.randn(30, 21).to(dtype))
    target = torch.randint(0, 21, (x.size(0), *x.shape[2:]))
    upstream = {
        "random": lambda: torch.randn(target.shape),
        "expanded": lambda: torch.tensor(0.7).expand(target.shape),
        "non-contiguous": lambda: torch.randn(*target.shape, 2)[..., 0],
    }[kind]().to(dtype)
    ours, eager, truth = (
        run(f, v, target, u, reduction="none")[1]
        for f, v, u in (
            (fused_ops.cross_entropy, x, upstream),
            (F.cross_entropy, x, upstream),
            (F.cross_entropy, x.double(), upstream.double()),
        )
    )
    assert_no_worse_than(ours, eager, truth)


@pytest.mark.parametrize("layout", ["contiguous", "spatial", "class stride"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(scale, dtype, layout):
    x = LAYOUTS[layout]((torch.randn(30, 37, dtype=torch.float64) * scale).to(dtype))
    target = torch.randint(0, 37, (x.size(0), *x.shape[2:]))
    compare(x, target, reduction="sum")


@pytest.mark.parametrize("layout", ["contiguous", "spatial", "class stride"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["masked", "all masked", "target masked", "inf", "nan", "nan target"])
def test_not_finite(what, dtype, layout):
    inf, nan = float("inf"), float("nan")
    x, rows = torch.randn(15, 40, dtype=torch.float64), torch.full((15,), 3)
    if what == "masked":
        x[:, 4:33] = -inf
    elif what == "all masked":
        x[5] = -inf
    elif what == "target masked":
        x[5, 3] = -inf
    else:
        x[5, 3 if what == "nan target" else 20] = inf if what == "inf" else nan
    x = LAYOUTS[layout](x.to(dtype))
    target = rows.reshape(x.size(0), *x.shape[2:])
    ones = torch.ones(target.shape, dtype=dtype)
    ours = run(fused_ops.cross_entropy, x, target, ones, reduction="none")
    exact = run(F.cross_entropy, x.double(), target, ones.double(), reduction="none")
    for mine, truth in zip(ours, exact, strict=True):
        expected = truth.to(dtype)
        torch.testing.assert_close(mine, expected, equal_nan=True, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "spatial"])
def test_a_confident_target_keeps_its_gradient(layout, dtype):
    """Where PyTorch gives 0 in bfloat16: p - 1 of a p that rounds to 1."""
    x = LAYOUTS[layout](torch.tensor([[8.0, 0, 0, 0, 0, 0, 0, 0]] * 15).to(dtype))
    target = torch.zeros(x.size(0), *x.shape[2:], dtype=torch.int64)
    ours = run(fused_ops.cross_entropy, x, target, reduction="sum")[1]
    rest = 7 * math.exp(-8)
    target_gradient, other = torch.tensor([-rest / (1 + rest), math.exp(-8) / (1 + rest)], dtype=torch.float64)
    exact = torch.where(x == 8, target_gradient, other)
    torch.testing.assert_close(ours.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "class stride", "channels last"])
def test_a_row_depends_on_itself_alone(layout, dtype):
    x, target = LAYOUTS[layout]((torch.randn(300, 29) * 3).to(dtype)), torch.randint(0, 29, (300,))
    if x.dim() == 4:
        target = target.reshape(x.size(0), *x.shape[2:])
    loss, grad = run(fused_ops.cross_entropy, x, target, torch.ones(target.shape, dtype=dtype), reduction="none")
    for begin, end in ((0, 1), (1, 3), (3, 20)):
        part = slice(begin, end)
        ones = torch.ones(target[part].shape, dtype=dtype)
        some, some_grad = run(fused_ops.cross_entropy, x[part], target[part], ones, reduction="none")
        assert torch.equal(some, loss[part]) and torch.equal(some_grad, grad[part])


def test_a_lane_depends_on_itself_alone():
    x, target = torch.randn(1, 29, 100) * 3, torch.randint(0, 29, (1, 100))
    loss, grad = run(fused_ops.cross_entropy, x, target, torch.ones(1, 100), reduction="none")
    for begin, end in ((0, 1), (1, 18), (5, 100)):
        part = slice(begin, end)
        some, some_grad = run(
            fused_ops.cross_entropy, x[..., part], target[:, part], torch.ones(1, end - begin), reduction="none"
        )
        if end - begin > 1:  # a single position is walked as a row
            assert torch.equal(some, loss[:, part]) and torch.equal(some_grad, grad[..., part])


ISA_CODE = """
import torch, fused_ops, torch.nn.functional as F, fused_ops.core.library as library
assert library.isa() == {isa!r}, library.isa()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in ((9, 1000), (9, 27), (3, 21, 17), (2, 3, 5, 5)):
        x = (torch.randn(shape) * 3).to(dtype).requires_grad_()
        t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        exact = x.detach().double().requires_grad_()
        loss, truth = fused_ops.cross_entropy(x, t), F.cross_entropy(exact, t)
        loss.backward(), truth.backward()
        eps = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), truth, rtol=eps, atol=0)
        rtol = 1e3 * eps if dtype.itemsize > 2 else eps
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=rtol, atol=eps / x.size(0) / 8)
"""


@pytest.mark.parametrize(("capability", "isa"), [("default", "DEFAULT"), ("avx2", "AVX2"), ("avx512", "AVX512")])
def test_every_isa(capability, isa, run_python):
    skip_without(isa)
    run_python("-c", ISA_CODE.format(isa=isa), ATEN_CPU_CAPABILITY=capability)


# ---- inplace_backward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "row stride", "transposed", "spatial", "channels last"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_inplace_backward_gives_the_same_gradient(reduction, layout, dtype):
    values = LAYOUTS[layout](torch.randn(30, 21).to(dtype))
    target = torch.randint(0, 21, (values.size(0), *values.shape[2:]))
    target.view(-1)[3] = -100
    expected = run(
        fused_ops.cross_entropy,
        values,
        target,
        torch.ones_like(target, dtype=dtype).mean() if reduction != "none" else torch.ones_like(target, dtype=dtype),
        reduction=reduction,
    )
    leaf = values.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = LAYOUTS[layout](leaf * 1) if layout in ("row stride",) else leaf * 1
    loss = fused_ops.cross_entropy(logits, target, reduction=reduction, inplace_backward=True)
    loss.backward(torch.ones_like(loss))
    assert torch.equal(loss.detach(), expected[0])
    torch.testing.assert_close(leaf.grad, expected[1], rtol=0 if layout != "transposed" else 1e-2, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_inplace_backward_uses_the_memory_of_the_logits(options):
    leaf, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    logits = leaf * 1
    (grad,) = torch.autograd.grad(fused_ops.cross_entropy(logits, target, inplace_backward=True, **options), logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert logits._version == 1  # one write, not one a row: a view of each row took 2 us a row


def test_inplace_backward_refuses_what_would_be_wrong():
    leaf, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))

    def loss(x, **options):
        return fused_ops.cross_entropy(x, target, inplace_backward=True, **options)

    with pytest.raises(RuntimeError, match="must not be a leaf"):
        loss(leaf)
    logits = leaf * 1
    twice = loss(logits)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.backward()
    logits = leaf * 1
    used = logits.square().sum()
    loss(logits).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss(leaf * 1), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(leaf.detach())
    with pytest.raises(RuntimeError, match="share memory"):
        loss((leaf[:1] * 1).expand(6, 5)).backward()


def test_inplace_raw_op_writes_nothing_if_a_target_is_bad():
    x, target = torch.randn(600, 7), torch.zeros(600, dtype=torch.int64)
    target[-1] = 7
    before, lse, total = x.clone(), torch.zeros(600).double(), torch.ones(()).double()
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        torch.ops.fused_ops.cross_entropy_backward_(torch.ones(()), x, target, lse, total, -100, 1)
    assert torch.equal(x, before)


def test_inplace_reference_is_the_kernel():
    x, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    loss, lse, total = reference.forward(x, target, -100, 1)
    args = (target, lse, total, -100, 1)
    a, b = x.clone(), x.clone()
    torch.ops.fused_ops.cross_entropy_backward_(torch.ones_like(loss), a, *args)
    reference.backward_(torch.ones_like(loss), b, *args)
    torch.testing.assert_close(a, b)


@pytest.mark.skipif("FUSED_OPS_LARGE_TESTS" not in os.environ, reason="needs 10 GB; FUSED_OPS_LARGE_TESTS=1 runs it")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_more_than_two_to_the_31_elements(options, layout):
    rows, classes, copies = 1000, 32003, 70
    base, target = torch.randn(rows, classes).bfloat16(), torch.randint(0, classes, (rows,))
    assert rows * classes * copies > 2**31
    x = base.repeat(copies, 1) if layout == "contiguous" else base.t().contiguous().repeat(1, copies).t()
    expected = run(fused_ops.cross_entropy, base if layout == "contiguous" else x[:rows], target, None, **options)[1]
    x.requires_grad_()
    loss = fused_ops.cross_entropy(x * 1, target.repeat(copies), reduction="sum", inplace_backward=True, **options)
    grad = torch.autograd.grad(loss, x)[0]
    for copy in (0, 1, copies // 2, copies - 2, copies - 1):
        part = grad[copy * rows : (copy + 1) * rows]
        torch.testing.assert_close(part / rows, expected, rtol=2**-7, atol=1e-8)

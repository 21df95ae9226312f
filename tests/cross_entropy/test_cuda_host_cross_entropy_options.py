"""The CUDA kernels of cross-entropy's options, run on the CPU by tests/cuda_host, against the reference's formulas."""

import pytest
import torch
from cuda_host import DTYPES, Guarded, aligned
from test_cuda_host_cross_entropy import LAYOUTS

from fused_ops.core.memory_format import acc_dtype
from fused_ops.ops.cross_entropy import rows_reference as reference
from fused_ops.ops.cross_entropy.row import Row as row_of
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.rows_reference import RowGrads
from fused_ops.testing import assert_no_worse_than

# Around a vector of each type, groups of 4 and 32 threads, steps of a warp and a block; then a block a row or several.
CLASSES = [1, 2, 5, 8, 9, 31, 33, 63, 65, 129, 257, 511, 1025]
LONG = [4097, 16385, 32771]


def draw(case, rows, classes, dtype, seed=0):
    """Flat (rows, classes) arguments of a case."""
    g = torch.Generator().manual_seed(seed)
    words = case.split(" + ")
    x = (torch.randn(rows, classes, generator=g) * 3).to(dtype)
    shape = (rows, 3) if "sparse" in words else (rows,)
    indices = torch.randint(0, classes, shape, generator=g)
    if "sparse" in words:
        indices[::4, 1] = indices[::4, 2]  # the same class twice
        indices[1, 0] = indices[min(2, rows - 1)] = -100
    elif rows > 1:
        indices[1] = -100
    dense = [w for w in words if w.startswith("dense")]
    probabilities = None
    if dense:
        probabilities = torch.randn(rows, classes, generator=g).softmax(1).to(dtype)
        probabilities = probabilities.to(acc_dtype(dtype)) if dense[0] == "dense wide" else probabilities
    if "sparse" in words:
        probabilities = torch.rand(shape, generator=g).to(dtype)
    mask = None
    if "mask" in words or "row mask" in words:
        mask = torch.rand(rows if "row mask" in words else 1, classes, generator=g) > 0.3
        mask[:, 0] = True
        counted = indices.clamp(min=0)
        mask = mask.scatter(1, counted.reshape(rows, -1), True) if "row mask" in words else mask[0]
        if mask.dim() == 1:
            mask[counted.flatten()] = True
        if dense:
            probabilities = torch.where(mask, probabilities, 0.0)
    weight = torch.rand(classes, generator=g).to(dtype) + 0.5 if "weight" in words else None
    scale = {"scale": 0.7, "minus": -1.3}.get(next((w for w in words if w in ("scale", "minus")), ""), 1.0)
    options = RowOptions(-100, 0.1 * ("smoothing" in words), scale, 4.0 * ("softcap" in words), "statistics" in words)
    return RowArgs(x, None if dense else indices, probabilities, weight, mask), options


CASES = [
    "index + smoothing",
    "index + weight",
    "index + weight + smoothing + statistics",
    "index + mask + smoothing + softcap",
    "index + row mask + smoothing + weight + minus + statistics",
    "dense",
    "dense wide + weight + smoothing",
    "dense + mask + scale + softcap + smoothing + statistics",
    "sparse + statistics",
    "sparse + row mask + weight + smoothing + softcap",
]


def laid_out(a, layout):
    """The same call in another layout."""
    change = LAYOUTS[layout]
    spatial = change(a.input).dim() > 2
    indices = a.indices
    if indices is not None and spatial:
        indices = change(indices) if indices.dim() > 1 else indices.reshape(-1, 15)
    probabilities = a.probabilities if a.probabilities is None else change(a.probabilities)
    mask = change(a.class_mask) if a.class_mask is not None and a.class_mask.dim() > 1 else a.class_mask
    return RowArgs(change(a.input), indices, probabilities, a.weight, mask)


def gradients_of_rows(a, o):
    g = torch.Generator().manual_seed(1)
    rows = reference.counted_rows(a, -100).shape
    made = [torch.randn(rows, generator=g, dtype=torch.float64).to(a.input.device) for _ in range(4)]
    return RowGrads(made[0], made[1], *(made[2:] if o.statistics else (None, None)))


def run(ops, a, o, offset=0):
    """The seven results and the gradient, which in place is the same bits; nothing around it is touched."""
    a = a._replace(input=aligned(a.input, offset) if offset else a.input)
    results = ops["cross_entropy_rows_forward"](*a, *o)
    g = gradients_of_rows(a, o)
    saved = (results[1], results[2], results[4] if o.statistics else None)
    fresh = ops["cross_entropy_rows_backward"](*g, *a, *saved, *o)
    over = Guarded(a.input.shape, a.input.stride(), a.input.dtype, offset, a.input.device)
    over.tensor.copy_(a.input)
    ops["cross_entropy_rows_backward_"](*g, over.tensor, *a[1:], *saved, *o)
    over.check()
    assert torch.equal(over.tensor, fresh) or bool(fresh.isnan().any())
    return results, fresh


def plain(a, o, dtype):
    """nll, lse, entropy and the gradient by the reference's formulas in this dtype."""
    row = row_of(a, o, dtype)
    lse = torch.where(row.valid | o.statistics, row.u.logsumexp(row.dim), 0.0)
    found = [-row.dot(row.log_p, a.probabilities, a.weight).to(dtype), lse]
    if o.statistics:
        p, log_p = row.neg_entropy_terms()
        found.append(-(p * log_p).sum(row.dim))
    return found, reference.grad_input(gradients_of_rows(a, o), a, o, dtype)


def assert_gradient_is_no_worse(ours, theirs, truth, a, o):
    """The error rule, with a rounding of each of the terms that the gradient is the sum of, and of softcap's slope."""
    row = row_of(a, o, torch.float64)
    p, log_p = row.neg_entropy_terms()
    q, entropy = row.q(a.probabilities, a.weight), -(p * log_p).sum(row.dim, keepdim=True)
    given = gradients_of_rows(a, o)
    g = [0.0 if v is None else v.abs().unsqueeze(row.dim) for v in given]
    terms = g[0] * (p * q.sum(row.dim, keepdim=True) + q) + (g[1] + g[3]) * p + g[2] * p * (log_p.abs() + entropy)
    eps, error = torch.finfo(ours.dtype).eps, (ours.double() - truth).abs()
    assert bool((error <= (theirs.double() - truth).abs().max() + 2 * eps * terms * abs(row.slope)).all())


def compare(ops, a, o, offset=0):
    results, grad = run(ops, a, o, offset)
    acc, dtype = acc_dtype(a.input.dtype), a.input.dtype
    (truth, grad_truth), (theirs, grad_theirs) = plain(a, o, torch.float64), plain(a, o, acc)
    ours = [results[0], results[1], *([results[4]] if o.statistics else [])]
    for name, mine, other, exact in zip(("nll", "lse", "entropy"), ours, theirs, truth, strict=False):
        if acc == torch.float64:
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_no_worse_than(mine.to(acc), other, exact, name)
    if acc == torch.float64:
        torch.testing.assert_close(grad, grad_truth, rtol=1e-11, atol=1e-13)
    else:
        assert_gradient_is_no_worse(grad, grad_theirs.to(dtype), grad_truth, a, o)
    expected = reference.forward(*(t.double() if t is not None and t.is_floating_point() else t for t in a), *o)
    exactly = dict(rtol=1e-6 if acc != torch.float64 else 1e-13, atol=1e-12)
    for i in (2, 3):  # mass, target_weight
        torch.testing.assert_close(results[i], expected[i], **exactly)
    if o.statistics:
        assert torch.equal(results[5], expected[5])
        torch.testing.assert_close(results[6], expected[6], rtol=2e-6, atol=2e-6)
    return results, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_row_lengths(host_ops, case, dtype):
    for classes in CLASSES:
        compare(host_ops, *draw(case, 37, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[2::2])
def test_long_rows(host_ops, cuda_host, case, dtype):
    for classes in LONG:
        a, o = draw(case, 2, classes, dtype)
        compare(host_ops, a, o, offset=classes % 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_layouts(host_ops, case, dtype):
    for classes in (3, 70):
        for layout in LAYOUTS:
            a, o = draw(case, 45, classes, dtype)
            compare(host_ops, laid_out(a, layout), o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_alignment(host_ops, offset, dtype):
    for case in CASES[::3]:
        for classes in (13, 77, 2100):
            a, o = draw(case, 3, classes, dtype)
            first, second = run(host_ops, a, o), run(host_ops, a, o, offset)
            assert all(torch.equal(x, y) for x, y in zip(first[0], second[0], strict=True))
            assert torch.equal(first[1], second[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["index + smoothing", "index + weight + smoothing + statistics"])
@pytest.mark.parametrize(("rows", "classes", "layout"), [(4096 * 32, 64, "transposed"), (4096, 2056, "contiguous")])
def test_more_rows_than_blocks(host_ops, case, rows, classes, layout):
    """Eight threads a row or a block: the first blocks take more rows once their shared memory has been used."""
    a, o = draw(case, rows + 40, classes, torch.bfloat16)
    results, grad = run(host_ops, laid_out(a, layout), o)
    few = RowArgs(a.input[-60:], a.indices[-60:], *a[2:])
    alone, _ = run(host_ops, laid_out(few, layout), o)
    assert all(torch.equal(x[-60:], y) for x, y in zip(results, alone, strict=True))
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[2::2])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(host_ops, cuda_host, case, dtype):
    for classes, layout in ((5, "transposed"), (90, "transposed"), (90, "contiguous"), (3000, "contiguous")):
        a, o = draw(case, 6, classes, dtype)
        a, found = laid_out(a, layout), []
        for order in (0, 1, 2):
            cuda_host.cuda_host_set_order(order)
            found.append(run(host_ops, a, o))
        cuda_host.cuda_host_set_order(0)
        for results, grad in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results, found[0][0], strict=True))
            assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("case", CASES)
def test_a_row_depends_on_itself_alone(host_ops, case):
    for classes in (9, 700, 20000):
        a, o = draw(case, 4, classes, torch.float32)
        results, grad = run(host_ops, a, o)
        part = slice(3, 4)
        mask = a.class_mask if a.class_mask is None or a.class_mask.dim() == 1 else a.class_mask[part]
        indices, probabilities = (None if t is None else t[part] for t in (a.indices, a.probabilities))
        alone = host_ops["cross_entropy_rows_forward"](a.input[part], indices, probabilities, a.weight, mask, *o)
        assert all(torch.equal(x, y[part]) for x, y in zip(alone, results, strict=True) if x.numel())
        g = [None if t is None else t[part] for t in gradients_of_rows(a, o)]
        saved = (alone[1], alone[2], alone[4] if o.statistics else None)
        one = host_ops["cross_entropy_rows_backward"](
            *g, a.input[part], indices, probabilities, a.weight, mask, *saved, *o
        )
        assert torch.equal(one, grad[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("case", ["index + smoothing", "index + weight", "index + weight + statistics", "dense"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero weight"])
def test_extremes_are_those_of_the_cpu(host_ops, zero, case, layout, dtype):
    inf, nan, top = float("inf"), float("nan"), torch.finfo(dtype).max / 4
    rows = [
        *([-inf, 1.0, 0.0], [1.0, -inf, 2.0], [-inf] * 3, [inf, 0.0, 0.0], [0.0, inf, 0.0], [nan, 0.0, 0.0]),
        *([0.0, 0.0, nan], [top, -top, 0.0], [-top, top, 0.0], [30.0, 0.0, 0.0], [top, top, top]),
    ]
    for classes in (3, 40, 3000):
        a, o = draw(case, len(rows), classes, dtype)
        x = torch.full((len(rows), classes), -40.0, dtype=dtype)
        x[:, :3] = torch.tensor(rows, dtype=torch.float64).to(dtype)
        if zero and a.weight is not None:
            a.weight[0] = 0.0
        a = laid_out(a._replace(input=x, indices=None if a.indices is None else torch.zeros(len(rows)).long()), layout)
        ours, grad = run(host_ops, a, o)
        g = gradients_of_rows(a, o)
        cpu = torch.ops.fused_ops.cross_entropy_rows_forward(*a, *o)
        cpu_grad = torch.ops.fused_ops.cross_entropy_rows_backward(*g, *a, *cpu[1:3], cpu[4] if o[4] else None, *o)
        for mine, other in zip(ours, cpu, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(grad, cpu_grad, rtol=2e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("case", ["index + smoothing", "sparse + weight + statistics"])
def test_a_bad_target_poisons_its_row_and_raises_on_the_device(host_ops, cuda_host, case, layout):
    for classes in (50, 40000):
        a, o = draw(case, 4, classes, torch.float32)
        a = laid_out(a, layout)
        good, good_grad = run(host_ops, a, o)
        a.indices[3] = classes
        with pytest.raises(RuntimeError, match="CUDA error 710"):
            host_ops["cross_entropy_rows_forward"](*a, *o)
        assert cuda_host.cuda_host_trapped() == 1
        over = a.input.clone()
        g, saved = gradients_of_rows(a, o), (good[1], good[2], good[4] if o.statistics else None)
        with pytest.raises(RuntimeError, match="CUDA error 710"):
            host_ops["cross_entropy_rows_backward_"](*g, over, *a[1:], *saved, *o)
        assert cuda_host.cuda_host_trapped() == 1
        assert over[3].isnan().all() and torch.equal(over[:3], good_grad[:3])


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_prediction_is_argmax(host_ops, layout):
    for classes in (3, 50, 3000, 40000):
        a, o = draw("index + statistics", 8, classes, torch.float32)
        x = a.input.round()  # with ties
        x[0], x[1, -1], x[2, classes // 2], x[3, -1] = -float("inf"), float("nan"), float("inf"), float("inf")
        x[4] = 1.0
        a = laid_out(a._replace(input=x), layout)
        assert torch.equal(host_ops["cross_entropy_rows_forward"](*a, *o)[5], x.argmax(1))


def test_nothing_to_do(host_ops):
    for case in CASES:
        for rows, classes in ((0, 5), (3, 0)):
            a, o = draw(case, 4, 5, torch.float32)
            a = a._replace(
                input=a.input[:rows, :classes],
                indices=None if a.indices is None else torch.full_like(a.indices[:rows], -100),
                probabilities=None
                if a.probabilities is None
                else a.probabilities[:rows, : classes if a.indices is None else None],
                weight=None if a.weight is None else a.weight[:classes],
                class_mask=None,
            )
            if classes:
                results, grad = run(host_ops, a, o)
                assert grad.numel() == 0 and results[0].numel() == rows
            else:
                assert host_ops["cross_entropy_rows_forward"](*a, *o)[0].shape == (rows,)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]])
def test_one_upstream_gradient_serves_all_rows(host_ops, case):
    """The gradient of a sum, expanded, is the same as its copies."""
    for classes in (9, 300, 40000):
        a, o = draw(case, 5, classes, torch.float32)
        results = host_ops["cross_entropy_rows_forward"](*a, *o)
        saved = (results[1], results[2], results[4] if o.statistics else None)
        value = torch.tensor(0.3, dtype=torch.float64)
        for given in range(4 if o.statistics else 2):
            one = RowGrads(*(value.expand(5) if i == given else None for i in range(4)))
            each = RowGrads(*(g if g is None else g.contiguous() for g in one))
            found, expected = (host_ops["cross_entropy_rows_backward"](*g, *a, *saved, *o) for g in (one, each))
            assert torch.equal(found, expected) and bool(found.any()) == (given < 3 or a.probabilities is None)


def test_quiet_rows_have_no_gradient_whatever_they_hold(host_ops):
    a, o = draw("index + smoothing", 4, 30, torch.float32)
    a.input[1] = float("nan")
    grad = run(host_ops, a, o)[1]
    assert bool((grad[1] == 0).all()) and grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[9]])
def test_the_chunk_of_linear_cross_entropy(host_ops, case, dtype):
    """The rows' results and the gradient of their weighted sum, as forward and backward give them."""
    for classes in (9, 300, 20000):
        a, o = draw(case, 5, classes, dtype)
        scale = torch.rand(5, dtype=torch.float64)
        scale[4] = 0
        results = host_ops["cross_entropy_rows_forward"](*a, *o)
        for z_loss in (0.0, 0.2):
            logits = a.input.clone()
            found = host_ops["linear_cross_entropy_chunk_"](logits, *a[1:], scale, z_loss, *o)
            assert all(torch.equal(x, y) for x, y in zip(found, results, strict=True))
            grad_lse = torch.where(scale == 0, 0.0, 2 * z_loss * results[1] * scale)
            g = (scale, grad_lse if z_loss else None, None, None)
            expected = host_ops["cross_entropy_rows_backward"](*g, *a, results[1], results[2], None, *o)
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-12)
        logits = a.input.clone()
        found = host_ops["linear_cross_entropy_chunk_"](logits, *a[1:], None, 0.0, *o)
        assert torch.equal(logits, a.input) and torch.equal(found[0], results[0])

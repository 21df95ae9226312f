"""Parts of rows, their merge and the gradient of a shard, for simulated ranks in one process (real ones:
tests/distributed): against the rows' op of all classes, against float64, and each kernel against its reference."""

import itertools
import math

import pytest
import torch
from conftest import skip_without
from cross_entropy_formulas import DTYPES, draw, layouts

import fused_ops
from fused_ops.ops.cross_entropy import shards, shards_reference
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions, rows_shape
from fused_ops.ops.cross_entropy.rows_reference import RowGrads
from fused_ops.ops.cross_entropy.shards import Shard
from fused_ops.testing import assert_no_worse_than

INF = math.inf
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def split(classes, ranks, empty=()):
    """(start, size) of each rank's classes, of uneven sizes; those of ``empty`` have none."""
    given = [0 if rank in empty else 1 + rank % 3 for rank in range(ranks)]
    bounds = [0, *itertools.accumulate(given)]
    bounds = [min(classes, bound * classes // bounds[-1]) for bound in bounds]
    return [(a, b - a) for a, b in itertools.pairwise(bounds)]


def here(a, start, n):
    """The arguments of the rank with n classes from start on."""
    dim = 0 if a.input.dim() == 1 else 1

    def cut(t):
        return t.narrow(dim, start, n)

    dense = a.indices is None
    mask = a.class_mask
    return a._replace(
        input=cut(a.input),
        probabilities=cut(a.probabilities) if dense else a.probabilities,
        class_mask=cut(mask) if mask is not None and mask.dim() > 1 else mask,
    )


def allowed(a):
    return a.class_mask.sum(1, dtype=torch.float64) if a.class_mask is not None and a.class_mask.dim() > 1 else None


def simulated(a, o, places, merge=shards.merge):
    classes = a.input.size(0 if a.input.dim() == 1 else 1)
    found = [Shard(None, start, classes, allowed(a)) for start, _ in places]
    parts = [shards.partial(here(a, *place), o, shard) for place, shard in zip(places, found, strict=True)]
    return found, merge(torch.stack(parts), a, o)


def reduced(parts, a, o):
    """What many ranks do in the place of ``merge``."""

    def largest(of_part):
        found = torch.stack([of_part(part) for part in parts])
        assert not found.isnan().any()  # of which a backend's maximum may make anything
        return found.amax(0)

    top = largest(shards_reference.maxima)
    total = torch.stack([shards_reference.summands(part, top, a, o) for part in parts]).sum(0)
    best = largest(lambda part: shards_reference.best_class(part, top)) if o.statistics else None
    return shards_reference.merge_sums(top, total, best, a, o)


FORMS = pytest.mark.parametrize("merge", [shards.merge, reduced], ids=["gathered", "reduced"])


def gradients(g, a, o, places, found, merged):
    pairs = zip(places, found, strict=True)
    return [shards.gradient(g, here(a, *place), o, shard, merged) for place, shard in pairs]


def arguments(kind, logits, weighted, masks, seed=0):
    torch.manual_seed(seed)
    dtype, classes = logits.dtype, logits.size(1)
    target = draw(kind, logits.shape, dtype, seed)
    if kind == "index":
        target.view(-1)[1::3] = torch.randint(0, classes, target.view(-1)[1::3].shape)
    indices, probabilities = {"index": (target, None), "dense": (None, target)}.get(kind, target)
    weight = (torch.rand(classes) + 0.1).to(dtype) if weighted else None
    mask = None if not masks else torch.rand(classes if masks == 1 else logits.shape) > 0.3
    if masks:
        mask.select(0 if masks == 1 else 1, 3).fill_(True)
    return RowArgs(logits, indices, probabilities, weight, mask)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
def test_shards_are_the_whole_and_kernels_are_their_reference(kind, dtype, merge, monkeypatch):
    """Every combination of weight, smoothing, mask, cap and outputs, in every layout, over 1, 3 and 8 ranks."""
    x = (torch.randn(30, 37) * 3).to(dtype)
    grid = itertools.product((0, 1), (0.0, 0.1), (0, 1, 2), (0.0, 4.0), (False, True))
    splits = [split(37, 3), split(37, 8, (0, 5)), split(37, 1)]
    tolerance = TOLERANCE[dtype]
    for i, (weighted, smoothing, masks, cap, statistics) in enumerate(grid):
        logits = list(layouts(x).values())[i % 5]
        a, o = arguments(kind, logits, weighted, masks), RowOptions(-100, smoothing, 0.5, cap, statistics)
        places = splits[i % 3]
        found, merged = simulated(a, o, places, merge)
        whole = torch.ops.fused_ops.cross_entropy_rows_forward(*a, *o)
        for name, mine, other in zip(merged._fields, merged, whole, strict=False):
            if name == "target_log_probability" and not statistics:
                continue
            torch.testing.assert_close(mine, other, rtol=tolerance / 10, atol=tolerance / 10, equal_nan=True)
        rows = [torch.randn_like(merged.nll) for _ in range(4)]
        g = RowGrads(*rows) if statistics else RowGrads(*rows[:2], None, None)
        g = g._replace(target_log_probability=None) if kind != "index" else g
        grads = gradients(g, a, o, places, found, merged)
        expected = torch.ops.fused_ops.cross_entropy_rows_backward(*g, *a, whole[1], whole[2], whole[4], *o)
        torch.testing.assert_close(torch.cat(grads, 1), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        for place, shard in zip(places, found, strict=True):
            own = here(a, *place)
            own = own._replace(input=own.input.clone())
            grad = shards.gradient(g, own, o, shard, merged)
            shards.gradient_(g, own, o, shard, merged)
            assert torch.equal(own.input.nan_to_num(), grad.nan_to_num())
        with monkeypatch.context() as patched:
            patched.setattr(shards, "_forward_op", shards_reference.forward)
            patched.setattr(shards, "_backward_op", shards_reference.backward)
            _, plain = simulated(a, o, places, merge)
            plain_grads = gradients(g, a, o, places, found, merged)
        for mine, other in zip(merged, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance / 10, atol=tolerance / 10, equal_nan=True)
        for mine, other in zip(grads, plain_grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert mine.stride() == other.stride()


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [8, 64])
def test_many_ranks_by_the_error_rule(ranks, dtype, merge):
    """Values and gradients of a mean over 8 and 64 ranks are as near to float64 as PyTorch's own of one process."""
    torch.manual_seed(ranks)
    x = (torch.randn(40, 500) * 4).to(dtype)
    target, places = torch.randint(0, 500, (40,)), split(500, ranks, (1, 6))
    target[:8] = torch.tensor([start for start, _ in places][:8]) % 500  # on a border
    a, o = RowArgs(x, target, None, None, None), RowOptions()
    found, merged = simulated(a, o, places, merge)
    scale = torch.full((40,), 1 / 40, dtype=torch.float64)
    grad = torch.cat(gradients(RowGrads(scale, None, None, None), a, o, places, found, merged), 1)
    results = []
    for y in (x, x.double()):
        y = y.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(y, target)
        results.append((loss.detach(), torch.autograd.grad(loss, y)[0]))
    (loss, eager), (exact_loss, exact) = results
    mine = merged.nll.mean()
    if dtype == torch.float64:
        torch.testing.assert_close((mine, grad), (exact_loss, exact), rtol=1e-12, atol=1e-14)
    else:
        assert_no_worse_than(mine.to(dtype), loss, exact_loss, "loss")
        assert_no_worse_than(grad, eager, exact, "grad")


def one(values, dtype=torch.float64):
    return torch.tensor([values], dtype=dtype)


ROWS = {
    "plain": [1.0, 2.0, 3.0, 0.5, -1.0, 2.0],
    "ties over ranks": [3.0, 1.0, 3.0, 3.0, 0.0, 3.0],
    "-inf in one": [1.0, -INF, 3.0, 0.5, -1.0, 2.0],
    "a rank of -inf": [1.0, 2.0, -INF, -INF, -1.0, 2.0],
    "ranks of -inf": [-INF, -INF, -INF, -INF, -1.0, 2.0],
    "all -inf": [-INF] * 6,
    "all -inf but one": [-INF, -INF, -INF, 2.0, -INF, -INF],
    "+inf": [1.0, 2.0, INF, 0.5, -1.0, 2.0],
    "nan": [1.0, 2.0, 5.0, math.nan, -1.0, 2.0],
    "nan alone in a rank": [1.0, 2.0, math.nan, -INF, -1.0, 2.0],
    "nan and +inf": [INF, 2.0, 5.0, math.nan, -1.0, 2.0],
    "two nans": [1.0, math.nan, 5.0, math.nan, -1.0, 2.0],
    "huge": [3e38, 2.0, -3e38, 1.0, 3e38, 0.0],
    "far": [4e9, 4e9 + 512, 4e9, 4e9 - 1024, 0.0, 4e9 + 512],
    "confident": [60.0, 0.0, 1.0, -3.0, 2.0, 0.0],
    "very confident": [700.0, 0.0, 1.0, -3.0, 2.0, 0.0],
}


@FORMS
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_are_not_ordinary_are_as_in_one_process(name, dtype, merge):
    logits = one(ROWS[name], dtype)
    if name == "huge" and dtype == torch.float32:
        pytest.skip("the rows' op takes differences in float, which overflow")
    targets = {f"index {t}": (torch.tensor([t]), None) for t in range(6)}
    targets["dense"] = (None, one([0.1, 0.2, 0.0, 0.3, 0.3, 0.1], dtype))
    targets["sparse"] = (torch.tensor([[0, 3, 5]]), one([0.5, 0.0, 0.5], dtype))
    for places in ([(0, 2), (2, 2), (4, 2)], [(0, 3), (3, 0), (3, 3)], [(i, 1) for i in range(6)]):
        for (kind, target), smoothing, masked in itertools.product(targets.items(), (0.0, 0.1), (False, True)):
            mask = torch.tensor([True, True, False, True, False, True]) if masked else None
            a, o = RowArgs(logits, *target, None, mask), RowOptions(-100, smoothing, 1.0, 0.0, True)
            found, merged = simulated(a, o, places, merge)
            whole = torch.ops.fused_ops.cross_entropy_rows_forward(*a, *o)
            what = (places, kind, smoothing, masked)
            tolerance = 1e-13 if dtype == torch.float64 else 1e-6
            # the rows' op has a target far below the others' entropy to no more than this
            least = {"entropy": 1e-24}
            for field, mine, other in zip(merged._fields, merged, whole, strict=False):
                torch.testing.assert_close(
                    mine,
                    other,
                    rtol=tolerance,
                    atol=least.get(field, 1e-30),
                    equal_nan=True,
                    msg=lambda m, w=(what, field): f"{w}: {m}",
                )
            ones = torch.ones(1, dtype=torch.float64)
            g = RowGrads(ones, 0.5 * ones, 0.25 * ones, None)
            grad = torch.cat(gradients(g, a, o, places, found, merged), 1)
            other = torch.ops.fused_ops.cross_entropy_rows_backward(*g, *a, whole[1], whole[2], whole[4], *o)
            torch.testing.assert_close(
                grad, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, w=what: f"{w}: {m}"
            )


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_confident_target_keeps_loss_and_gradient(dtype, merge):
    """The target's p - 1 is minus the sum of the others', wherever those are."""
    for target, places in itertools.product((0, 5), ([(0, 3), (3, 3)], [(0, 1), (1, 5)], [(0, 5), (5, 1)])):
        logits = torch.zeros(1, 6, dtype=dtype)
        logits[0, target] = 30.0
        a, o = RowArgs(logits, torch.tensor([target]), None, None, None), RowOptions()
        found, merged = simulated(a, o, places, merge)
        rest = 5 * math.exp(-30)
        g = RowGrads(torch.ones(1, dtype=torch.float64), None, None, None)
        grad = torch.cat(gradients(g, a, o, places, found, merged), 1)
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        assert math.isclose(merged.nll.item(), math.log1p(rest), rel_tol=tolerance)
        assert math.isclose(grad[0, target].item(), -rest / (1 + rest), rel_tol=tolerance)


@FORMS
def test_a_single_example_and_rows_without_classes(merge):
    for shape in ((7,), (3, 7), (0, 7), (2, 7, 3), (2, 7, 0)):
        x = torch.randn(shape)
        rows = rows_shape(x)
        a, o = RowArgs(x, torch.randint(0, 7, rows), None, None, None), RowOptions(-100, 0.1)
        found, merged = simulated(a, o, [(0, 0), (0, 4), (4, 3), (7, 0)], merge)
        whole = torch.ops.fused_ops.cross_entropy_rows_forward(*a, *o)
        torch.testing.assert_close(merged.nll, whole[0])
        g = RowGrads(torch.ones(rows, dtype=torch.float64), None, None, None)
        grads = gradients(g, a, o, [(0, 0), (0, 4), (4, 3), (7, 0)], found, merged)
        expected = torch.ops.fused_ops.cross_entropy_rows_backward(*g, *a, whole[1], whole[2], None, *o)
        torch.testing.assert_close(torch.cat(grads, 0 if x.dim() == 1 else 1), expected)


@pytest.mark.slow
@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_every_isa(isa, run_pytest):
    skip_without(isa)
    run_pytest(__file__, "-m", "not slow", ATEN_CPU_CAPABILITY=isa.lower())

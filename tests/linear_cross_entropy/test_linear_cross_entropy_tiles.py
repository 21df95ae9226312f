"""Linear cross-entropy in tiles of classes: the logits in the memory of the weight's gradient."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, peak_bytes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

import fused_ops
from fused_ops.ops.linear_cross_entropy import by_classes as tiles
from fused_ops.ops.linear_cross_entropy import reference
from fused_ops.ops.linear_cross_entropy.by_classes import tiles_of
from fused_ops.ops.linear_cross_entropy.by_rows import BIAS, INPUT, WEIGHT, Plan
from fused_ops.ops.linear_cross_entropy.plan import L2_BYTES, Sizes, choose, default_bytes, least_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(dtype, rows=70, features=20, classes=300, bias=True, ignored=9):
    g = torch.Generator().manual_seed(rows)
    found = [torch.randn(s, generator=g).to(dtype) for s in ((rows, features), (classes, features), (classes,))]
    target = torch.randint(0, classes, (rows,), generator=g)
    target[:ignored] = -100
    return found if bias else found[:2], target


def eager(x, w, target, bias=None, z_loss=0.0, scale=None):
    z = F.linear(x, w, bias)
    losses = F.cross_entropy(z, target, reduction="none")
    if z_loss:
        losses = losses + z_loss * (target != -100) * z.to(torch.promote_types(z.dtype, torch.float32)).logsumexp(
            1
        ).square().to(z.dtype)
    return (losses if scale is None else losses * scale.to(losses.dtype)).sum()


def run(function, tensors, target, upstream=None, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = function(leaves[0], leaves[1], target, *leaves[2:], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def ours(x, w, target, bias=None, z_loss=0.0, scale=None, **options):
    return fused_ops.linear_cross_entropy(
        x, w, target, linear_bias=bias, z_loss=z_loss, token_weight=scale, reduction="sum", **options
    )


@pytest.fixture
def used(monkeypatch):
    """The (kept_rows, tile_classes) of the calls that went in tiles."""
    seen, forward = [], tiles.forward

    def watch(*args):
        seen.append(args[-2:])
        return forward(*args)

    monkeypatch.setattr(tiles, "forward", watch)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [1, 3000, 20000, 35000])
@pytest.mark.parametrize("shape", [(70, 20, 300), (20, 70, 300), (33, 33, 129), (70, 3, 1000), (1, 5, 40)])
@pytest.mark.parametrize("options", ["plain", "bias and z_loss", "token weights"])
def test_error_rule(options, shape, memory, dtype, used):
    tensors, target = draw(dtype, *shape, bias=options == "bias and z_loss", ignored=shape[0] // 5)
    more = {"z_loss": 1e-3} if options == "bias and z_loss" else {}
    if options == "token weights":
        more["scale"] = torch.linspace(0, 2, shape[0]).to(dtype)
    found = run(ours, tensors, target, max_memory_bytes=memory, **more)
    theirs = run(eager, tensors, target, **more)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    truth = run(eager, [t.double() for t in tensors], target, **wide)
    if dtype != torch.float32 or shape[0] > 1:
        assert used or memory > shape[0] * shape[2] * dtype.itemsize / 2
    for name, mine, other, exact in zip(("loss", "input", "weight", "bias"), found, theirs, truth, strict=False):
        # sums in another order, rounded once a tile: as far off as theirs, to the last bits
        eps = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
        bound = (other.double() - exact).abs().max() + eps * exact.abs().max()
        assert (mine.double() - exact).abs().max() <= bound, name
        assert mine.dtype == dtype


@pytest.mark.parametrize("kept", [-1, 0, 11, 50])
@pytest.mark.parametrize("tile", [32, 100, 300])
def test_tiles_do_not_matter_beyond_rounding(tile, kept):
    (x, w, b), target = draw(torch.float32)
    head = reference.Head(x, w, b, None, None)
    a = tiles.RowArgs(x, target, None, None, None)
    scale = torch.full((70,), 1 / 61, dtype=torch.float64)
    o = tiles.RowOptions(-100, 0.0, 1.0, 0.0, False)
    found = tiles.forward(head, a, o, scale, 0.0, (True, True), 16, kept, tile)
    expected = run(eager, [x.double(), w.double(), b.double()], target)
    torch.testing.assert_close((found[0] * scale).sum(), expected[0] / 61, rtol=1e-6, atol=0)
    for mine, other in zip((found[4], found[3], found[5]), expected[1:], strict=True):
        torch.testing.assert_close(mine.double(), other / 61, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("memory", [0, 20000, 35000])
def test_memory_stays_within_what_is_allowed(memory, used, chunks_in_sight):
    rows, features, classes = 600, 200, 3000
    tensors, target = draw(torch.bfloat16, rows, features, classes, bias=False, ignored=0)
    sizes = Sizes(rows, features, classes, 1, 2)
    memory = memory * rows * classes * 2 // 100000 or least_bytes(sizes, INPUT | WEIGHT, True)[0]
    biggest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_flatten(out)[0]:
                if isinstance(t, torch.Tensor) and not t._is_view():
                    biggest.append(t.untyped_storage().nbytes())
            return out

    leaves = [t.requires_grad_() for t in tensors]
    with Watch():
        fused_ops.linear_cross_entropy(*leaves, target, max_memory_bytes=memory).backward()
    assert used
    assert sorted(set(biggest))[-1] <= max(memory, 2 * features * classes)
    assert sum(b > memory for b in set(biggest)) <= 1  # grad_weight


@pytest.mark.usefixtures("served")
def test_rows_depend_on_neither_the_threads_nor_each_other():
    (x, w), target = draw(torch.float32, bias=False, ignored=0)
    z = (w @ x.t()).contiguous()

    def sums(z, target):
        found = (
            z.new_full((z.size(1),), -torch.inf),
            z.new_zeros(z.size(1), dtype=torch.float64),
            z.new_zeros(z.size(1)),
        )
        tiles._sums_op(z, target, 0, 300, *found)
        return found

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sums(z, target)
        torch.set_num_threads(4)
        four = sums(z.repeat(1, 50).contiguous(), target.repeat(50))
    finally:
        torch.set_num_threads(threads)
    alone = sums(z[:, 33:34].contiguous(), target[33:34])
    for a, b, c in zip(one, four, alone, strict=True):
        assert torch.equal(a.repeat(50), b) and torch.equal(a[33:34], c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_the_reference(dtype):
    g = torch.Generator().manual_seed(0)
    z = (10 * torch.randn(77, 45, generator=g)).to(dtype)
    z[3, 3], z[:, 7], z[5, 8] = -torch.inf, -torch.inf, torch.nan
    target = torch.randint(0, 200, (45,), generator=g)
    states = []
    for op in (tiles._sums_op, reference.tile_sums_):
        state = torch.full((45,), -torch.inf), torch.zeros(45, dtype=torch.float64), torch.zeros(45)
        for first in (0, 77, 123):
            op(z if first != 77 else -z.flip(0), target, first, 200, *state)
        states.append(state)
    for mine, other in zip(*states, strict=True):
        ok = ~torch.isnan(other)
        torch.testing.assert_close(mine[ok], other[ok], rtol=1e-5, atol=0)
    assert states[0][1][8].isnan()
    grads = []
    factor, at_target = torch.rand(45, generator=g), torch.randn(45, generator=g)
    for op in (tiles._grads_op, reference.tile_grads_):
        out = z.clone()
        op(out, target, 100, 200, z.float().amax(0).nan_to_num(0.0), factor, at_target)
        grads.append(out)
    torch.testing.assert_close(*grads, equal_nan=True)
    if dtype != torch.float32:
        sums = [torch.ones(77 * 45), torch.ones(77 * 45)]
        part = torch.randn(77 * 45, generator=g).to(dtype)
        tiles.add_op(sums[0], part)
        reference.add_(sums[1], part)
        assert torch.equal(*sums)


@pytest.mark.parametrize("memory", [1, 30000])
def test_edges_are_those_of_cross_entropy(memory):
    tensors, target = draw(torch.float32, bias=False)
    nothing = torch.full_like(target, -100)
    found = run(ours, tensors, nothing, max_memory_bytes=memory)
    assert found[0] == 0 and all(not g.any() for g in found[1:])
    call = lambda t: fused_ops.linear_cross_entropy(*tensors, t, max_memory_bytes=memory)  # noqa: E731
    tensors = [t.requires_grad_() for t in tensors]
    assert call(nothing).isnan()
    target[20] = 300
    with pytest.raises(IndexError, match="Target 300 is out of bounds"):
        call(target)
    target[20] = 5
    huge = [1e15 * tensors[0].detach(), 1e14 * tensors[1].detach()]
    exact = run(eager, [t.double() for t in huge], target)
    for mine, other in zip(run(ours, huge, target, max_memory_bytes=memory), exact, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("memory", [1, 30000])
def test_a_confident_row_has_an_exact_loss_and_gradient(memory):
    """logits [30, 0, ...]: eager's loss is 0, and so is its gradient at the target."""
    x, w = torch.eye(40)[:33, :33].contiguous(), 30 * torch.eye(50)[:, :33].contiguous()
    target = torch.arange(33)
    found = run(ours, [x, w], target, max_memory_bytes=memory)
    others = 49 * math.exp(-30)
    torch.testing.assert_close(float(found[0]), 33 * math.log1p(others), rtol=1e-6, atol=0)
    expected = torch.full((33,), -others / (1 + others))
    torch.testing.assert_close(found[2].diagonal(), expected, rtol=1e-6, atol=1e-18)


def test_frozen_and_retained():
    (x, w), target = draw(torch.float32, bias=False)
    x.requires_grad_(), w.requires_grad_()
    loss = fused_ops.linear_cross_entropy(x, w, target, max_memory_bytes=2000)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for mine, other in zip(torch.autograd.grad(loss, (x, w), torch.tensor(3.0)), first, strict=True):
        torch.testing.assert_close(mine, 3 * other)
    (only,) = torch.autograd.grad(fused_ops.linear_cross_entropy(x.detach(), w, target, max_memory_bytes=2000), w)
    torch.testing.assert_close(only, first[1])


def test_the_second_derivative():
    tensors, target = draw(torch.float32, bias=False)
    leaves = [t.requires_grad_() for t in tensors]

    def second(leaves, function, **options):
        grads = torch.autograd.grad(function(leaves[0], leaves[1], target, **options), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)

    found = second(leaves, ours, max_memory_bytes=5000)
    exact = second([t.detach().double().requires_grad_() for t in leaves], eager)
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [100, 1024, 8192, 65536])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("percent", [None, 3, 12, 50, 200])
@pytest.mark.parametrize("in_tiles", [True, False])
@pytest.mark.parametrize("l2_bytes", [0, L2_BYTES])
def test_plans_keep_to_their_memory(l2_bytes, in_tiles, percent, itemsize, rows):
    sizes = Sizes(rows, 512, 32000, 1, itemsize, l2_bytes)
    logits = rows * sizes.row_bytes
    allowed = None if percent is None else logits * percent // 100
    needs = INPUT | WEIGHT | BIAS
    least = least_bytes(sizes, needs, in_tiles)[0]
    assert choose(sizes, needs, in_tiles, None, least)
    if allowed is not None and allowed < least:
        assert itemsize == 2 and allowed < 128 * sizes.row_bytes + 4 * 512 * 32000
        with pytest.raises(ValueError, match=f"to be at least {least}, for .* got {allowed}"):
            choose(sizes, needs, in_tiles, None, allowed)
        return
    plan = choose(sizes, needs, in_tiles, None, allowed)
    assert isinstance(plan, Plan)
    if plan.tile_classes:
        rest = max(0, rows - 512 - plan.kept_rows)
        narrow = 6 * 512 * rest if itemsize == 2 else 0
        bytes_used = plan.kept_rows * sizes.row_bytes + plan.tile_classes * rows * itemsize + narrow
        if plan.kept_rows < 0:
            bytes_used = max(plan.chunk_rows * sizes.row_bytes, plan.tile_classes * rows * itemsize)
    else:
        several = itemsize == 2 and plan.chunk_rows < rows
        bytes_used = plan.chunk_rows * sizes.row_bytes + (4 * 512 * 32000 if several else 0)
    summed = 4 * 512 * 32000 if itemsize == 2 else 0
    enough = 470 if itemsize == 2 else min(512, max(256, -(-rows // 2)))  # rows, for fast products
    if l2_bytes:
        enough = 2048 if itemsize == 2 else 1024
    enough = enough * sizes.row_bytes + summed
    default = max(0.03 * logits, min(enough, logits))
    assert bytes_used <= (default if allowed is None else allowed)
    if not plan.tile_classes and allowed is not None:
        assert plan.chunk_rows >= (min(rows, 128) if itemsize == 2 else 1)


@pytest.mark.parametrize("classes", [1, 2, 100, 1000, 50257])
@pytest.mark.parametrize(("pitch", "features"), [(1, 1), (1, 7), (64, 64), (65, 128), (100, 101), (5, 4096)])
@pytest.mark.parametrize("tile", [1, 128, 1024])
def test_no_gradient_lands_on_logits_that_are_wanted(tile, pitch, features, classes):
    last = classes
    for first, end, copied in tiles_of(classes, features, pitch, tile):
        assert end == last and 0 <= first < end
        assert first * features >= first * pitch  # the logits of the tiles to come
        assert end - first <= tile if copied else end * pitch <= first * features and end - first >= min(tile, end)
        last = first
    assert last == 0


@pytest.mark.parametrize("in_tiles", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("rows", "features", "classes"), [(1024, 512, 32000), (2048, 768, 50257), (8192, 512, 32000), (1024, 2048, 128256)]
)
def test_default_plans_have_fast_products(rows, features, classes, itemsize, in_tiles):
    """Every row's logits once, in chunks of enough rows or all of them in the memory that grad_weight will have."""
    plan = choose(Sizes(rows, features, classes, 1, itemsize), INPUT | WEIGHT, in_tiles, None, None)
    if plan.tile_classes:
        assert in_tiles and features + plan.kept_rows >= rows
    else:
        assert plan.chunk_rows >= min(rows // 2, 512) if itemsize == 4 else 400


def test_the_page_says_what_the_default_takes():
    page = (ROOT / "docs" / "linear_cross_entropy.md").read_text(encoding="utf-8")
    cell = r"([\d.]+) % \((\d+) MB\) \|"
    rows = re.findall(rf"^\| (\d+) x (\d+) x (\d+) \| {cell} {cell}$", page, re.MULTILINE)
    assert len(rows) == 4
    for *shape, wide, wide_mb, narrow, narrow_mb in rows:
        for itemsize, percent, megabytes in ((4, wide, wide_mb), (2, narrow, narrow_mb)):
            sizes = Sizes(*map(int, shape), 1, itemsize)
            taken = default_bytes(sizes, INPUT | WEIGHT, True)
            assert abs(100 * taken / (sizes.rows * sizes.row_bytes) - float(percent)) <= 0.51, (shape, itemsize, taken)
            assert round(taken / 1e6) == int(megabytes), (shape, itemsize, taken)


def test_a_limit_that_cannot_be_kept_is_an_error_that_names_the_least():
    """Llama 3's head on a GPU: chunks of a row each would read and write 2.1 GB of gradient 8192 times."""
    sizes, needs = Sizes(8192, 4096, 128256, 1, 2), INPUT | WEIGHT
    least = 8192 * 128256 * 2
    with pytest.raises(ValueError, match=f"expected max_memory_bytes to be at least {least}, for all logits, got 5"):
        choose(sizes, needs, False, None, 500_000_000)
    assert choose(sizes, needs, False, None, least).chunk_rows == 8192
    some = 128 * 128256 * 2
    assert choose(sizes, needs, True, None, some).kept_rows == -1
    with pytest.raises(ValueError, match=f"to be at least {some}, for 128 rows or classes of logits, got {some - 1}"):
        choose(sizes, needs, True, None, some - 1)
    twice, least = sizes._replace(rows=16384), 128 * 128256 * 2 + 4096 * 128256 * 4
    with pytest.raises(ValueError, match=f"to be at least {least}, for 128 rows of logits and a float32 sum"):
        choose(twice, needs, False, None, 2_000_000_000)
    assert choose(twice, needs, False, None, least).chunk_rows == 128


def test_a_limit_of_a_call_that_cannot_be_kept_is_an_error():
    x, w = torch.randn(600, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    target = torch.randint(0, 3000, (600,))
    with pytest.raises(ValueError, match="expected max_memory_bytes to be at least 12000, for a row of logits, got 99"):
        fused_ops.linear_cross_entropy(x, w, target, label_smoothing=0.1, max_memory_bytes=99)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"label_smoothing": 0.1}, {}], ids=str)
def test_16_bit_gradients_stay_within_what_is_allowed(options):
    """The weight's are summed in float32, which is a part of it; the bias's in float32 too, without a copy."""
    (x, w, b), target = draw(torch.bfloat16, 1000, 50, 4000, ignored=0)
    leaves, allowed = [t.requires_grad_() for t in (x, w, b)], 128 * 4000 * 2 + 4 * 50 * 4000
    other_rows = 40 * 1000 * 8 + 1000 * 50 * 6

    def step(allowed=allowed):
        fused_ops.linear_cross_entropy(
            x, w, target, linear_bias=b, max_memory_bytes=allowed, **options
        ).sum().backward()

    gradients = sum(t.nbytes for t in leaves)
    step()
    for t in leaves:
        t.grad = None
    assert peak_bytes(step) < gradients + 1.4 * allowed + other_rows
    if options:
        with pytest.raises(ValueError, match=f"to be at least {allowed}, for 128 rows of logits and a float32 sum"):
            fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, max_memory_bytes=allowed - 1, **options)


def test_rows_of_a_limit_that_a_main_grad_is_no_part_of():
    """Without reduction the backward's sum is the main_grad itself, so that a row of logits is the least."""
    (x, w), target = draw(torch.bfloat16, 1000, 50, 4000, bias=False)
    main_grad = torch.zeros(w.shape)
    call = {"reduction": "none", "max_memory_bytes": 8000, "main_grad": main_grad}
    fused_ops.linear_cross_entropy(x, w.requires_grad_(), target, **call).sum().backward()
    assert main_grad.any()
    with pytest.raises(ValueError, match="to be at least 8000, for a row of logits"):
        fused_ops.linear_cross_entropy(x, w, target, **{**call, "max_memory_bytes": 7999})


def test_a_limit_asks_nothing_of_sizes_that_are_symbols():
    def gradient(x, w, target):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        rows = fused_ops.linear_cross_entropy(x, w, target, reduction="none", max_memory_bytes=1 << 22)
        return torch.autograd.grad(rows.sum(), (x, w))

    (x, w), target = draw(torch.bfloat16, 1000, 50, 4000, bias=False)
    assert not make_fx(gradient, tracing_mode="symbolic")(x, w, target).shape_env.guards

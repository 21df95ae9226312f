"""A weight's gradient that is added to an existing one, in float32: of every way a call can go."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import peak_bytes
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.ops.linear_cross_entropy import by_classes, by_rows

NUMBERS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "logit_scale": 0.7}
WAYS = [{}, {"chunk_rows": 5}, {"max_memory_bytes": 4000}, {**NUMBERS, "chunk_rows": 7}]
WAYS += [{"compact": True, "chunk_rows": 5}, {"reduction": "none", **NUMBERS}, {"reduction": "none", "chunk_rows": 5}]
WAYS += [{"reduction": "sum", "chunk_rows": 5}]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(dtype=torch.float32, lead=(23,), features=12, outputs=(30,), seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g).to(dtype) for s in ((*lead, features), (*outputs, features), outputs))
    target = torch.randint(0, outputs[0], (*lead, *outputs[1:]), generator=g)
    target.view(-1)[::3] = -100
    return (x, w, b), target


def leaves_of(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def loss_of(x, w, target, **options):
    found = fused_ops.linear_cross_entropy(x, w, target, **options)
    return found.loss if options.get("return_outputs") else found


def gradient(x, w, target, factor=1.0, **options):
    """That of the weight, without main_grad."""
    (w,) = leaves_of(w)
    return torch.autograd.grad((loss_of(x, w, target, **options) * factor).sum(), w)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_micro_batches_add_up(way, dtype):
    """To the bit what was there plus each gradient, where that is not rounded and a power of two times what is kept."""
    same = "chunk_rows" in way or "max_memory_bytes" in way  # without main_grad a small head is one op
    exact, off = same and dtype.itemsize > 2, 4 * torch.finfo(dtype).eps
    batches = [draw(dtype, (rows,), seed=rows) for rows in (23, 11, 40)]
    (weight,) = leaves_of(batches[0][0][1])
    buffer = torch.randn(weight.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for factor, ((x, _, b), target) in zip((1.0, 0.25, -3.0), batches, strict=True):
        plain, expected = leaves_of(x, weight, b), buffer.clone()
        other = loss_of(*plain[:2], target, linear_bias=plain[2], **way)
        (other.sum() * factor).backward()
        x, b = leaves_of(x, b)
        loss = loss_of(x, weight, target, linear_bias=b, main_grad=buffer, **way)
        version = buffer._version
        (loss.sum() * factor).backward()
        assert weight.grad is None and buffer._version > version
        for mine, theirs in ((loss, other), (x.grad, plain[0].grad), (b.grad, plain[2].grad)):
            torch.testing.assert_close(mine, theirs, rtol=0 if same else off, atol=0 if same else off)
        if (
            not exact or factor == -3 or way.get("reduction") == "none"
        ):  # chunk by chunk, or multiplied and added at once
            torch.testing.assert_close(buffer, expected + plain[1].grad, rtol=max(off, 1e-6), atol=max(off, 1e-6))
        else:
            assert torch.equal(buffer, expected + plain[1].grad)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_has_the_bits_of_the_float32_sum(dtype, reduction, monkeypatch):
    (x, w, _), target = draw(dtype)
    (weight,), parts, buffer = leaves_of(w), [], torch.zeros(w.shape)

    def noted(total, part):
        parts.append(part.float())
        by_classes_add(total, part)

    by_classes_add = by_classes.add_op
    monkeypatch.setattr(by_classes, "add_op", noted)
    loss_of(x, weight, target, chunk_rows=3, reduction=reduction, main_grad=buffer).sum().backward()
    assert len(parts) > 1 and torch.equal(buffer, sum(parts))
    rounded = gradient(x, w, target, chunk_rows=3, reduction=reduction)
    assert torch.equal(buffer.to(dtype), rounded) and not torch.equal(buffer, rounded.float())


@pytest.mark.parametrize(("reduction", "chunk_rows"), [("mean", 30), ("none", 30), ("mean", None)])
def test_it_is_closer_to_the_truth_than_rounded_gradients(reduction, chunk_rows):
    """Of 8 micro-batches of a step; where one product has all rows, as in tiles, it is rounded once and not scaled."""
    batches = [draw(torch.bfloat16, (960,), 32 if chunk_rows else 1024, (300,), seed=seed) for seed in range(8)]
    weight = 0.02 * batches[0][0][1]  # small logits, whose roundings would drown all else
    shapes = torch.zeros(weight.shape), torch.zeros(weight.shape), torch.zeros(weight.shape, dtype=torch.float64)
    ours, rounded, exact = shapes
    for (x, _, _), target in batches:
        (w,) = leaves_of(weight)
        options = {"reduction": reduction, "chunk_rows": chunk_rows}
        (loss_of(x, w, target, main_grad=ours, **options).sum() / 6).backward()
        rounded += gradient(x, weight, target, 1 / 6, **options)
        exact += gradient(x.double(), weight.double(), target, 1 / 6, reduction=reduction)
    off, theirs = ((t - exact).norm() / exact.norm() for t in (ours, rounded))
    assert off < (0.9 if chunk_rows else 1) * theirs < 0.01, (off, theirs)


def test_every_other_way():
    """Several positions, outputs, a low-rank term, a module, float64 class probabilities, all rows ignored."""
    (x, w, b), target = draw(torch.float64, (4, 5), outputs=(9, 2))
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"return_outputs": True}):
        leaves, buffer = leaves_of(x, w, b), torch.zeros_like(w)
        call = partial(loss_of, *leaves[:2], target, linear_bias=leaves[2], **options)
        want = torch.autograd.grad(call().sum(), leaves)
        call(main_grad=buffer).sum().backward()
        torch.testing.assert_close(buffer, want[1])
        torch.testing.assert_close(leaves[0].grad, want[0])
        assert leaves[1].grad is None
    (x, w, _), target = draw(torch.float64)
    low = torch.randn(3, 12).double(), torch.randn(30, 3).double()
    layer = fused_ops.LinearCrossEntropyLoss(12, 30, dtype=torch.float64)
    buffer, lora = torch.zeros(30, 12).double(), (*leaves_of(*low), 0.5)
    layer(x, target, lora=lora, main_grad=buffer).backward()
    weight, *rest = leaves_of(layer.linear.weight, *low)
    fused_ops.linear_cross_entropy(x, weight, target, lora=(*rest, 0.5)).backward()
    torch.testing.assert_close(buffer, weight.grad)
    assert layer.linear.weight.grad is None
    for mine, other in zip(lora[:2], rest, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    (x, w, _), target = draw()
    for options in ({"reduction": "none"}, {"chunk_rows": 4}):
        (leaf,), buffer = leaves_of(w), torch.zeros_like(w)
        wide = torch.rand(23, 30).double().softmax(1)
        loss_of(x, leaf, wide, main_grad=buffer, **options).sum().backward()
        torch.testing.assert_close(buffer, gradient(x, w, wide, **options))
    for dtype, reduction in itertools.product(DTYPES, ("sum", "none")):
        (leaf,), buffer = leaves_of(w.to(dtype)), torch.ones(w.shape, dtype=torch.promote_types(dtype, torch.float32))
        nothing = torch.full_like(target, -100)
        loss_of(x.to(dtype), leaf, nothing, reduction=reduction, main_grad=buffer).sum().backward()
        assert bool((buffer == 1).all())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    """Of a float32 weight that is cast in the call."""
    (x, w, _), target = draw()
    (leaf,), buffer = leaves_of(w), torch.zeros(w.shape)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradient(x, w, target, chunk_rows=5, reduction=reduction)
        loss = loss_of(x, leaf, target, chunk_rows=5, reduction=reduction, main_grad=buffer).sum()
    loss.backward()
    assert leaf.grad is None and torch.equal(buffer.bfloat16().float(), plain)


@pytest.mark.parametrize("way", [{}, {"chunk_rows": 5}, {"reduction": "none"}], ids=str)
def test_each_backward_adds_once(way):
    """A retained graph, a checkpoint of either kind, a backward of other inputs alone, no grad mode, what is frozen."""
    (x, w, _), target = draw()
    want = gradient(x, w, target, **way)
    x, w = leaves_of(x, w)
    near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    buffer = torch.zeros(w.shape)
    loss = loss_of(x, w, target, main_grad=buffer, **way).sum()
    loss.backward(retain_graph=True)
    (2 * loss).backward(retain_graph=True)
    near(buffer, 3 * want)
    torch.autograd.grad(loss, x)
    near(buffer, 3 * want)
    for reentrant in (False, True):
        buffer.zero_()
        call = partial(loss_of, target=target, main_grad=buffer, **way)
        checkpoint(call, x, w, use_reentrant=reentrant).sum().backward()
        near(buffer, want)
    with torch.no_grad():
        loss_of(x, w, target, main_grad=buffer, **way)
    loss_of(x, w.detach(), target, main_grad=buffer, **way).sum().backward()
    near(buffer, want)
    assert w.grad is None


def test_a_tied_weight_has_the_rest_of_its_gradient():
    (_, w, _), target = draw()
    (w,), buffer, ids = leaves_of(w), torch.zeros(w.shape), torch.randint(0, 30, (23,))
    expected = torch.autograd.grad(F.cross_entropy(F.linear(w[ids], w.detach()), target), w)[0]
    head = torch.autograd.grad(F.cross_entropy(F.linear(w[ids].detach(), w), target), w)[0]
    fused_ops.linear_cross_entropy(w[ids], w, target, main_grad=buffer).backward()
    torch.testing.assert_close(w.grad, expected)  # of the embedding alone
    torch.testing.assert_close(buffer, head)


@pytest.mark.parametrize(
    "way", [{}, {"label_smoothing": 0.1, "chunk_rows": 32}, {"reduction": "none", "chunk_rows": 32}], ids=str
)
def test_the_backward_takes_no_copy_of_the_gradient(way):
    (x, w, _), target = draw(torch.bfloat16, (64,), 512, (10000,))
    (w,), buffer = leaves_of(w), torch.zeros(w.shape)
    found = {}
    for main_grad in (None, buffer):
        loss = loss_of(x, w, target, main_grad=main_grad, **way).sum()
        found[main_grad is buffer] = peak_bytes(lambda: (0.3 * loss).backward())  # noqa: B023
    chunk, widened = 32 * 10000 * 2, 3 * 1024 * 512 * 4
    assert found[True] < chunk + widened < w.nbytes, found
    assert "reduction" not in way or found[False] > 3 * w.nbytes  # a sum in float32, and its rounding


def test_the_op_keeps_the_sum_in_float32():
    """As its fake kernel says, in chunks also where it would go in tiles."""
    for dtype, cut, more in itertools.product(DTYPES, ((None, None), (5, None), (None, 4000)), (None, 0.1)):
        (x, w, _), target = draw(dtype)
        numbers = None if more is None else torch.tensor([more, 1, 0, 0], dtype=torch.float64)
        args = (x, w, None, None, None, target, None, None, None, torch.ones(23).double(), -100, numbers, 1, *cut)
        op, needs = torch.ops.fused_ops.linear_cross_entropy, by_rows.INPUT | by_rows.WEIGHT
        found = op(*args, needs | by_rows.WIDE_WEIGHT, False)[2]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        plain = op(*args, needs, False)[2]
        assert torch.equal(found.to(dtype), plain) or (cut[0] is None and more is None)
        torch.testing.assert_close(found.to(dtype), plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))
        torch.library.opcheck(op.default, (*args, needs | by_rows.WIDE_WEIGHT, False), test_utils="test_faketensor")


@pytest.mark.parametrize("shape", [(5, 4, 0), (0, 4, 3), (5, 0, 3)])
def test_shapes_without_elements(shape):
    """(rows, classes, features)."""
    rows, classes, features = shape
    x, w = torch.ones(rows, features, requires_grad=True), torch.ones(classes, features, requires_grad=True)
    main_grad = torch.zeros(classes, features)
    target = torch.full((rows,), -100)
    fused_ops.linear_cross_entropy(x, w, target, reduction="sum", main_grad=main_grad).backward()
    assert w.grad is None and not main_grad.any()


def test_what_it_refuses():
    (x, w, _), target = draw()
    w.requires_grad_()

    def call(main_grad, **options):
        return fused_ops.linear_cross_entropy(x, w, target, main_grad=main_grad, **options)

    for bad, kind, text in (
        (torch.zeros(30, 11), RuntimeError, r"main_grad of shape \[30, 12\].*got \[30, 11\]"),
        (torch.zeros(30, 12, dtype=torch.bfloat16), RuntimeError, "main_grad.*got.*bfloat16"),
        (torch.zeros(30, 12, dtype=torch.float64), RuntimeError, "main_grad.*got.*float64"),
        (torch.zeros(30, 12, requires_grad=True), RuntimeError, "main_grad not to require grad"),
        (torch.zeros(12, 30).t(), RuntimeError, r"main_grad to be contiguous, got strides \[1, 30\]"),
        (3.0, TypeError, "'main_grad' must be Tensor, not float"),
    ):
        with pytest.raises(kind, match=text):
            call(bad)
    buffer = torch.zeros(30, 12)
    plain = partial(pytest.raises, RuntimeError, match="without create_graph")
    for options in ({}, {"chunk_rows": 5}, {"reduction": "none"}):
        with plain():
            torch.autograd.grad(call(buffer, **options).sum(), w, create_graph=True)
        rows = call(buffer, **options)
        with plain():
            torch.autograd.grad(rows, w, torch.ones(2, *rows.shape), is_grads_batched=True)
    with plain():
        torch.func.grad(lambda w: fused_ops.linear_cross_entropy(x, w, target, main_grad=buffer))(w.detach())
    with plain(), torch.autograd.forward_ad.dual_level():
        call(buffer)
    with plain():
        torch.jit.trace(lambda x, w: fused_ops.linear_cross_entropy(x, w, target, main_grad=buffer), (x, w))
    assert not buffer.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    """A break of the graph, and an error where there must be none."""
    (x, w, _), target = draw()
    want = gradient(x, w, target, reduction=reduction)
    (w,), buffer = leaves_of(w), torch.zeros(w.shape)

    def call(x, w, buffer):
        return (loss_of(x * 1, w, target, reduction=reduction, main_grad=buffer) * 1).sum()

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without create_graph"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(x, w, buffer)
    torch._dynamo.reset()
    torch.compile(call, backend="aot_eager")(x, w, buffer).backward()
    torch.testing.assert_close(buffer, want, rtol=1e-5, atol=1e-6)
    assert w.grad is None

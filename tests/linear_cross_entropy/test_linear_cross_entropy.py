"""Linear cross-entropy against linear + cross_entropy: values, gradients, memory, transforms, errors."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import check_derivatives
from torch.testing._internal.common_methods_invocations import op_db

import fused_ops
from fused_ops.testing import assert_no_worse_than, samples_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(dtype, rows=20, features=6, classes=40, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(s, generator=g) for s in ((rows, features), (classes, features), (classes,)))
    target = torch.randint(0, classes, (rows,), generator=g)
    target[::6] = -100
    return [t.to(dtype) for t in (x, w, *([b] if bias else []))], target


def eager(x, w, target, linear_bias=None, ignore_index=None, **options):
    logits = F.linear(x, w, linear_bias)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **options)


def run(function, tensors, target, upstream=None, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    bias = {"linear_bias": leaves[2]} if len(leaves) > 2 else {}
    loss = function(leaves[0], leaves[1], target, **bias, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("sample", samples_of("linear_cross_entropy"), ids=lambda s: s.name)
def test_derivatives(sample):
    check_derivatives(fused_ops.linear_cross_entropy, sample)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 20, 100])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_error_rule(bias, reduction, chunk_rows, dtype):
    tensors, target = draw(dtype, bias=bias)
    upstream = torch.linspace(0.5, 2, 20, dtype=torch.float64)[: 20 if reduction == "none" else 1]
    upstream = upstream.to(dtype).reshape(() if reduction != "none" else (20,))
    ours = run(fused_ops.linear_cross_entropy, tensors, target, upstream, reduction=reduction, chunk_rows=chunk_rows)
    theirs = run(eager, tensors, target, upstream, reduction=reduction)
    truth = run(eager, [t.double() for t in tensors], target, upstream.double(), reduction=reduction)
    for name, mine, other, exact in zip(("loss", "input", "weight", "bias"), ours, theirs, truth, strict=False):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)
        elif name == "loss" and dtype != torch.float32:
            assert_no_worse_than(mine, other, exact, name)
        else:  # products are summed in another order and rounded once a chunk: as far off as theirs, to the last bits
            rounding = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
            assert (mine - exact).abs().max() <= (other - exact).abs().max() + rounding * exact.abs().max(), name


@pytest.mark.parametrize("chunk_rows", [None, 3, 8])
@pytest.mark.parametrize("case", ["smoothing", "weight", "dense", "dense and weight", "sparse", "mixup"])
def test_targets(case, chunk_rows):
    (x, w, b), target = draw(torch.float64)
    options = {"label_smoothing": 0.1} if case == "smoothing" else {}
    options |= {"weight": torch.rand(40, dtype=torch.float64)} if "weight" in case else {}
    if "dense" in case:
        target = torch.randn(20, 40, dtype=torch.float64).softmax(1)
    expected = target
    if case == "sparse":
        target = torch.randint(0, 40, (20, 3)), torch.rand(20, 3, dtype=torch.float64)
        expected = torch.zeros(20, 40, dtype=torch.float64).scatter_add(1, *target)
    if case == "mixup":
        target = target.clamp(min=0), torch.randint(0, 40, (20,)), 0.3
        expected = 0.3 * F.one_hot(target[0], 40).double() + 0.7 * F.one_hot(target[1], 40)
    ours = run(fused_ops.linear_cross_entropy, [x, w, b], target, chunk_rows=chunk_rows, **options)
    theirs = run(eager, [x, w, b], expected, **options)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options_are_those_of_cross_entropy(reduction, chunk_rows):
    (x, w, b), target = draw(torch.float64)
    options = dict(z_loss=0.1, logit_scale=0.7, softcap=3.0, token_weight=torch.rand(20).double(), reduction=reduction)
    options |= {"class_mask": torch.arange(40) % 7 != 3, "label_smoothing": 0.1}
    target = torch.where(target % 7 == 3, 0, target)
    options |= {"normalizer": 5.0} if reduction == "mean" else {}
    one = torch.ones(20, dtype=torch.float64) if reduction == "none" else None
    ours = run(fused_ops.linear_cross_entropy, [x, w, b], target, one, chunk_rows=chunk_rows, **options)

    def whole(x, w, target, linear_bias, **options):
        return fused_ops.cross_entropy(F.linear(x, w, linear_bias), target, **options)

    for mine, other in zip(ours, run(whole, [x, w, b], target, one, **options), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_outputs(chunk_rows):
    (x, w, b), target = draw(torch.float32)
    options = {"z_loss": 0.1, "return_outputs": True}
    ours = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=chunk_rows, **options)
    whole = fused_ops.cross_entropy(F.linear(x, w, b), target, **options)
    for name, mine, other in zip(ours._fields, ours, whole, strict=True):
        torch.testing.assert_close(mine, other, msg=name)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3), (1,)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["index", "dense"])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_shapes(chunk_rows, kind, reduction, positions, leading):
    if positions and not leading:
        pytest.skip("several positions need a batch")
    x, w = torch.randn(*leading, 6), torch.randn(7, *positions, 6)
    b = torch.randn(7, *positions)
    target = torch.randint(0, 7, (*leading, *positions)) if kind == "index" else torch.rand(*leading, 7, *positions)
    ours = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_rows=chunk_rows)
    logits = F.linear(x, w.reshape(-1, 6), b.reshape(-1)).reshape(-1, 7, *positions)
    flat = target.reshape(-1, *positions) if kind == "index" else target.reshape(-1, 7, *positions)
    expected = F.cross_entropy(logits, flat, reduction=reduction)
    torch.testing.assert_close(ours, expected.reshape((*leading, *positions)) if reduction == "none" else expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_opinfo_samples(chunk_rows, dtype):
    info = next((op for op in op_db if op.name == "nn.functional.linear_cross_entropy"), None)
    if info is None:
        pytest.skip("this torch has no linear_cross_entropy")
    seen = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        theirs = F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        ours = fused_ops.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs, chunk_rows=chunk_rows)
        tolerance = {8: 1e-10, 4: 2e-5, 2: 0.05}[dtype.itemsize]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        leaves = [t for t in (sample.input, sample.args[0]) if t.requires_grad]
        upstream = torch.randn_like(theirs)
        for mine, other in zip(
            torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        seen += 1
    assert seen > 5


def test_native_options_are_accepted():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")
    (x, w, b), target = draw(torch.float32)
    options = torch.nn.LinearCrossEntropyOptions()
    ours = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, options=options)
    torch.testing.assert_close(ours, F.linear_cross_entropy(x, w, target, linear_bias=b, options=options))


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("subset", [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_subset_of_gradients(reduction, subset, chunk_rows):
    tensors, target = draw(torch.float64)
    expected = run(lambda *a, **k: eager(*a, reduction=reduction, **k).sum(), tensors, target)[1:]
    leaves = [t.clone().requires_grad_(i in subset) for i, t in enumerate(tensors)]
    loss = fused_ops.linear_cross_entropy(
        *leaves[:2], target, linear_bias=leaves[2], chunk_rows=chunk_rows, reduction=reduction
    )
    found = torch.autograd.grad(loss.sum(), [leaves[i] for i in subset])
    for i, grad in zip(subset, found, strict=True):
        torch.testing.assert_close(grad, expected[i])


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_nothing_is_rescaled_silently(chunk_rows):
    """Upstream gradients other than 1, twice, on leaves and through a tied weight."""
    tensors, target = draw(torch.float64)
    (x, w, b) = leaves = [t.requires_grad_() for t in tensors]
    expected = torch.autograd.grad(eager(x, w, target, b), leaves)
    loss = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=chunk_rows)
    for factor in (1.0, 3.0, 1.0, -0.5):
        found = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, factor * other)
    (loss * 2).backward(retain_graph=True)
    loss.backward()
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * other)
    ids = torch.randint(0, 40, (20,))

    def tied(function):
        def loss(w):
            return function(w[ids] * 2, w, target)

        return torch.autograd.grad(loss(w), w)[0]

    ours = tied(lambda *a: fused_ops.linear_cross_entropy(*a, chunk_rows=chunk_rows))
    torch.testing.assert_close(ours, tied(eager))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", [{"chunk_rows": 3}, {"max_memory_bytes": 2000}], ids=str)
def test_an_upstream_gradient_is_multiplied_in_place(option, dtype):
    """What the forward found is handed over, whatever the factor; a second backward is right all the same."""
    tensors, target = draw(dtype)
    (x, w, b) = leaves = [t.requires_grad_() for t in tensors]
    loss = fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, **option)
    node = loss.grad_fn
    while not hasattr(node, "gradients"):
        node = node.next_functions[0][0]
    places = [g.data_ptr() for g in node.gradients if g.numel()]
    plain = [g.clone() for g in node.gradients if g.numel()]
    for factor in (-3.0, 0.5, 1.0):
        found = torch.autograd.grad(loss, leaves, torch.tensor(factor, dtype=loss.dtype), retain_graph=True)
        assert ([g.data_ptr() for g in found] == places) == (factor == -3.0)
        for mine, other in zip(found, plain, strict=True):
            assert torch.equal(mine, other * factor)
        assert node.gradients is None


def test_a_gradient_changed_in_place_does_not_change_the_next():
    tensors, target = draw(torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    loss = fused_ops.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], chunk_rows=3)
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [g.clone() for g in grads]
    for g in grads:
        g.zero_()
    for mine, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(mine, other)


def test_parameters_get_gradients_of_their_own():
    """Accumulating into .grad after a backward must not reach what a retained graph still holds."""
    tensors, target = draw(torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    loss = fused_ops.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], chunk_rows=3)
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad.zero_()
    loss.backward()
    for leaf, grad in zip(leaves, first, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("chunk_rows", [None, 1])
def test_everything_ignored_and_nothing_at_all(chunk_rows):
    tensors, target = draw(torch.float32)
    found = run(fused_ops.linear_cross_entropy, tensors, torch.full_like(target, -100), chunk_rows=chunk_rows)
    assert found[0].isnan() and all(bool((grad == 0).all()) for grad in found[1:])
    tensors[0] = tensors[0][:0]
    for reduction in ("none", "mean", "sum"):
        options = {"reduction": reduction}
        ours, theirs = (
            run(lambda *a, f=f, o=options, **k: f(*a, **k, **o).sum(), tensors, target[:0])
            for f in (lambda *a, **k: fused_ops.linear_cross_entropy(*a, **k, chunk_rows=chunk_rows), eager)
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


def test_ignored_rows_cost_nothing_and_poison_nothing():
    tensors, target = draw(torch.float32)
    tensors[0][::6] = float("nan")
    for reduction in ("mean", "sum", "none"):
        found = run(
            lambda *a, r=reduction, **k: fused_ops.linear_cross_entropy(*a, reduction=r, chunk_rows=4, **k).sum(),
            tensors,
            target,
        )
        assert all(bool(t.isfinite().all()) for t in found)
        assert bool((found[1][::6] == 0).all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_shift(chunk_rows, reduction):
    x, w = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    target = torch.randint(0, 9, (2, 5))
    target[1, 2] = -100
    ours = fused_ops.linear_cross_entropy(x, w, target, shift=True, chunk_rows=chunk_rows, reduction=reduction)
    logits, shifted = F.linear(x, w)[:, :-1].reshape(-1, 9), target[:, 1:].reshape(-1)
    expected = F.cross_entropy(logits, shifted, reduction=reduction)
    if reduction == "none":
        assert bool((ours[:, -1] == 0).all())
        ours, expected = ours[:, :-1], expected.reshape(2, 4)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_lora(chunk_rows):
    (x, w, b), target = draw(torch.float64)
    low = [torch.randn(2, 6, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)]
    leaves = [t.requires_grad_() for t in (x, w, b, *low)]

    def ours(x, w, b, p, q):
        return fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, lora=(p, q, 0.5), chunk_rows=chunk_rows)

    def theirs(x, w, b, p, q):
        return F.cross_entropy(F.linear(x, w, b) + 0.5 * x @ p.t() @ q.t(), target)

    torch.testing.assert_close(ours(*leaves), theirs(*leaves))
    for mine, other in zip(
        torch.autograd.grad(ours(*leaves), leaves), torch.autograd.grad(theirs(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunk_size_does_not_matter_beyond_rounding(dtype):
    """The weights' gradients are a sum over the chunks, which rounds once a chunk in float32."""
    tensors, target = draw(dtype, rows=200, features=32, classes=300)
    truth = run(eager, [t.double() for t in tensors], target)
    theirs = run(eager, tensors, target)
    for chunk_rows in (1, 13, 64, 200):
        ours = run(fused_ops.linear_cross_entropy, tensors, target, chunk_rows=chunk_rows)
        for mine, other, exact in zip(ours, theirs, truth, strict=True):
            error, allowed = (mine - exact).abs().max(), (other - exact).abs().max()
            sums = torch.finfo(torch.float32).eps / 2 * (len(target) // chunk_rows)
            assert error <= allowed + (torch.finfo(dtype).eps + sums) * exact.abs().max()


def test_no_input_is_changed():
    tensors, target = draw(torch.float32)
    before = [t.clone() for t in (*tensors, target)]
    run(fused_ops.linear_cross_entropy, tensors, target, chunk_rows=3)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, target), strict=True))


BAD = {
    "inner dimension": lambda f, x, w, t: f(x, w[:, :-1], t),
    "bias": lambda f, x, w, t: f(x, w, t, linear_bias=torch.ones(3)),
    "weight one-dimensional": lambda f, x, w, t: f(x, w[0], t),
    "target = classes": lambda f, x, w, t: f(x, w, t + 5),
    "reduction": lambda f, x, w, t: f(x, w, t, reduction="avg"),
    "smoothing 2": lambda f, x, w, t: f(x, w, t, label_smoothing=2.0),
    "ignore_index with probabilities": lambda f, x, w, t: f(x, w, torch.rand(2, 5), ignore_index=1),
    "batch mismatch": lambda f, x, w, t: f(x, w, torch.zeros(3, dtype=torch.int64)),
    "class weight": lambda f, x, w, t: f(x, w, t, weight=torch.ones(3)),
    "class weight requires grad": lambda f, x, w, t: f(x, w, t, weight=torch.ones(5, requires_grad=True)),
    "dtypes differ": lambda f, x, w, t: f(x, w.double(), t),
    "int input": lambda f, x, w, t: f(x.long(), w.long(), t),
    "float target": lambda f, x, w, t: f(x, w, t.float()),
    "positions without batch": lambda f, x, w, t: f(x[0], torch.randn(5, 2, 3), t),
}


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("chunk_rows", [None, 1])
def test_errors_have_pytorchs_type(chunk_rows, case):
    x, w, target = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 2])
    with pytest.raises(Exception) as theirs:
        BAD[case](F.linear_cross_entropy, x, w, target)
    with pytest.raises(theirs.type):
        BAD[case](lambda *a, **k: fused_ops.linear_cross_entropy(*a, **k, chunk_rows=chunk_rows), x, w, target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"max_memory_bytes": -1}, ValueError, "max_memory_bytes"),
        ({"lora": (1, 2)}, TypeError, "lora"),
        ({"lora": (torch.ones(1, 3), torch.ones(4, 1), 1.0)}, RuntimeError, "lora's A of shape"),
        ({"shift": True, "target": torch.rand(2, 5)}, RuntimeError, "shift=True"),
        ({"token_weight": torch.ones(3)}, ValueError, "batch_size"),
        ({"class_mask": torch.ones(2, 4, dtype=torch.bool)}, RuntimeError, "class_mask"),
    ],
)
def test_errors_of_our_own(options, error, message):
    options = {"target": torch.tensor([0, 2]), **options}
    with pytest.raises(error, match=message):
        fused_ops.linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), **options)


def test_max_memory_sets_the_chunks():
    tensors, target = draw(torch.float32)
    expected = run(eager, tensors, target)
    for size in (1, 40 * 4 * 3, 1 << 30):
        for mine, other in zip(
            run(fused_ops.linear_cross_entropy, tensors, target, max_memory_bytes=size), expected, strict=True
        ):
            torch.testing.assert_close(mine, other)


def test_module():
    module = fused_ops.LinearCrossEntropyLoss(6, 5, bias=True, label_smoothing=0.1, reduction="sum", chunk_rows=2)
    x, target = torch.randn(7, 6), torch.randint(0, 5, (7,))
    expected = eager(x, module.linear.weight, target, module.linear.bias, label_smoothing=0.1, reduction="sum")
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(x, target), expected)
    assert "chunk_rows=2" in repr(module) and "label_smoothing=0.1" in repr(module)
    torch.testing.assert_close(module(x, target, normalizer=1.0, reduction="mean"), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        fused_ops.LinearCrossEntropyLoss(6, 5, nonsense=1)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(6, 5, out_features=(2,), bias=True, weight=torch.rand(5))
        ours = fused_ops.LinearCrossEntropyLoss(6, 5, out_features=(2,), bias=True, weight=torch.rand(5))
        ours.load_state_dict(theirs.state_dict())
        target = torch.randint(0, 5, (7, 2))
        torch.testing.assert_close(ours(x, target), theirs(x, target))


def test_an_interrupt_in_the_middle_leaves_nothing_behind(monkeypatch):
    from fused_ops.ops.linear_cross_entropy import by_rows as chunks

    tensors, target = draw(torch.float32)
    expected = run(fused_ops.linear_cross_entropy, tensors, target, chunk_rows=3)
    original, calls = chunks._chunk_op, itertools.count()

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "_chunk_op", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(fused_ops.linear_cross_entropy, tensors, target, chunk_rows=3)
    for mine, other in zip(run(fused_ops.linear_cross_entropy, tensors, target, chunk_rows=3), expected, strict=True):
        assert torch.equal(mine, other)


def test_the_loss_is_finite_where_logits_are_huge():
    tensors, target = draw(torch.float32)
    tensors[0] *= 1e15
    ours, theirs = (run(f, tensors, target) for f in (fused_ops.linear_cross_entropy, eager))
    assert math.isfinite(float(ours[0]))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

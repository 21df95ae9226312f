"""Linear cross-entropy under torch.func, forward-mode AD, double backward, torch.compile, autocast, checkpointing."""

import pytest
import torch
from test_linear_cross_entropy import draw, eager, run
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import fused_ops


@pytest.mark.parametrize("transform", ["grad", "hessian", "jacrev", "jacfwd"])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_torch_func(chunk_rows, transform):
    (x, w), target = draw(torch.float64, rows=4, features=3, classes=5, bias=False)

    def value(function):
        return getattr(torch.func, transform)(lambda w: function(x, w, target))(w)

    ours = value(lambda *a: fused_ops.linear_cross_entropy(*a, chunk_rows=chunk_rows))
    torch.testing.assert_close(ours, value(eager))


def test_vmap_and_third_derivative():
    (x, w), target = draw(torch.float64, rows=6, features=3, classes=5, bias=False)
    xs, targets = x.view(2, 3, 3), target.view(2, 3)

    def ours(x, target):
        return fused_ops.linear_cross_entropy(x, w, target, chunk_rows=2)

    def theirs(x, target):
        return eager(x, w, target)

    torch.testing.assert_close(torch.vmap(ours)(xs, targets), torch.vmap(theirs)(xs, targets))
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(ours))(xs, targets), torch.vmap(torch.func.grad(theirs))(xs, targets)
    )

    def third(function):
        leaf = x.clone().requires_grad_()
        value = function(leaf, target)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sin().sum(), leaf, create_graph=True)
        return value

    torch.testing.assert_close(third(ours), third(theirs))


def test_second_derivatives_of_tied_weights():
    ids, target = torch.tensor([0, 3, 1, 4]), torch.tensor([1, 2, -100, 0])
    w, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def hvp(function, reduction, create_graph):
        leaf = w.clone().requires_grad_()
        loss = function(leaf[ids] * leaf.sum(), leaf, target, reduction=reduction).sin().sum()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(grad, leaf, v, create_graph=create_graph)[0].detach()

    for reduction in ("mean", "none"):
        expected = hvp(eager, reduction, False)
        for create_graph in (False, True):
            ours = hvp(lambda *a, **k: fused_ops.linear_cross_entropy(*a, **k, chunk_rows=3), reduction, create_graph)
            torch.testing.assert_close(ours, expected)


def test_the_second_derivative_never_holds_all_logits():
    tensors, target = draw(torch.float32, rows=600, features=4, classes=500, bias=False)
    leaves = [t.requires_grad_() for t in tensors]
    loss = fused_ops.linear_cross_entropy(*leaves, target, chunk_rows=8)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(max((t.numel() for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)), default=0))
            return out

    v = [torch.randn_like(g) for g in grads]
    with Watch():
        ours = torch.autograd.grad(grads, leaves, v)
    assert 0 < max(largest) <= 8 * 500
    exact = [t.detach().double().requires_grad_() for t in tensors]
    first = torch.autograd.grad(eager(*exact, target), exact, create_graph=True)
    expected = torch.autograd.grad(first, exact, [t.double() for t in v])
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_dual_tensors(chunk_rows):
    (x, w, b), target = draw(torch.float64)
    tangents = [torch.randn_like(t) for t in (x, w, b)]
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, v) for t, v in zip((x, w, b), tangents, strict=True)]
        ours = fused_ops.linear_cross_entropy(*dual[:2], target, linear_bias=dual[2], chunk_rows=chunk_rows)
        theirs = eager(*dual[:2], target, dual[2])
        ours, theirs = (forward_ad.unpack_dual(t).tangent for t in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"z_loss": 0.1, "return_outputs": True}])
def test_compiled_as_one_graph(options, chunk_rows):
    tensors, target = draw(torch.float32)
    leaves = [t.requires_grad_() for t in tensors]

    def f(x, w, b):
        out = fused_ops.linear_cross_entropy(x * 2, w, target, linear_bias=b, chunk_rows=chunk_rows, **options)
        return (out.loss + out.entropy.sum() if options.get("return_outputs") else out).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), f(*leaves))
    for mine, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_autocast_as_eager(chunk_rows):
    tensors, target = draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(fused_ops.linear_cross_entropy, tensors, target, chunk_rows=chunk_rows)
        theirs = run(eager, tensors, target)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_checkpoint(chunk_rows):
    (x, w, _), target = draw(torch.float32)
    x.requires_grad_()

    def f(x):
        return fused_ops.linear_cross_entropy(x, w, target, chunk_rows=chunk_rows)

    for reentrant in (True, False):
        again = checkpoint(f, x, use_reentrant=reentrant)
        assert torch.equal(torch.autograd.grad(again, x)[0], torch.autograd.grad(f(x), x)[0]) if not reentrant else True
        if reentrant:
            again.backward()
            assert torch.equal(x.grad, torch.autograd.grad(f(x), x)[0])

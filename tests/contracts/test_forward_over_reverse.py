"""Forward-mode AD over a backward without create_graph, as of Hessian-vector products: the tangents, or an error."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

import fused_ops
from fused_ops.testing import samples_of

OPS = ["cross_entropy", "linear_cross_entropy", "batch_norm"]


def parts_of(function, sample):
    """The sample as a function of its tensors that require grad, and those."""
    values, spec = tree_flatten((sample.args, sample.kwargs))
    places = [i for i, v in enumerate(values) if torch.is_tensor(v) and v.requires_grad]

    def call(leaves):
        given = [v.clone() if torch.is_tensor(v) else v for v in values]
        for i, leaf in zip(places, leaves, strict=True):
            given[i] = leaf
        args, kwargs = tree_unflatten(given, spec)
        outputs = [o for o in tree_flatten(function(*args, **kwargs))[0] if torch.is_tensor(o) and o.requires_grad]
        return sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)

    return call, [values[i].detach().clone().requires_grad_() for i in places]


def products(call, leaves, vectors):
    """The Hessian-vector product by two backwards."""
    grads = torch.autograd.grad(call(leaves), leaves, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
    found = torch.autograd.grad(along, leaves, allow_unused=True)
    return [torch.zeros_like(x) if h is None else h for h, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("op", OPS)
def test_tangents_of_gradients_are_there(op):
    torch.manual_seed(0)
    refused = 0
    for sample in samples_of(op):
        call, leaves = parts_of(getattr(fused_ops, op), sample)
        vectors = [torch.randn_like(x) for x in leaves]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) for x, v in zip(leaves, vectors, strict=True)]
            try:
                grads = torch.autograd.grad(call(duals), duals)
            except (RuntimeError, NotImplementedError) as error:
                assert "forward" in str(error) or "inplace" in str(error), (sample.name, error)
                refused += 1
                continue
            tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
        for tangent, expected in zip(tangents, products(call, leaves, vectors), strict=True):
            tangent = torch.zeros_like(expected) if tangent is None else tangent
            torch.testing.assert_close(
                tangent, expected, rtol=1e-7, atol=1e-9, msg=lambda m, s=sample: f"{s.name}: {m}"
            )
    assert refused < len(samples_of(op)) // 4


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [6, 700])
def test_tangents_of_upstream_gradients_are_handed_on(rows, dtype, op):
    """Of a graph that was made outside of the dual level: the backward is linear in what comes from above."""
    torch.manual_seed(0)
    x, w = torch.randn(rows, 30, dtype=dtype, requires_grad=True), torch.randn(40, 30, dtype=dtype)
    target = torch.randint(0, 30, (rows,))
    loss = {
        "cross_entropy": lambda: fused_ops.cross_entropy(x, target),
        "linear_cross_entropy": lambda: fused_ops.linear_cross_entropy(x, w, target),
        "batch_norm": lambda: fused_ops.batch_norm(x, None, None, training=True),
    }[op]()
    upstream = torch.randn_like(loss)
    (expected,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn_like(upstream), upstream)
        (grad,) = torch.autograd.grad(loss, x, dual)
        torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, expected)

"""Batch norm on tensors so large that the kernels write past the cache, lines that begin anywhere in a row included."""

import pytest
import torch
import torch.nn.functional as F
from conftest import grid

import fused_ops
from fused_ops.testing import assert_no_worse_than

SHAPES = {
    "planes": (6, 40, 96, 96),
    "planes that split lines": (3, 67, 103, 103),
    "planes of parts of lines": (64, 520, 9, 9),
    "rows": (9000, 256),
    "wide rows": (2050, 1030),
    "rows that split lines": (30011, 77),
    "few columns": (430003, 5),
    "channels last": (8, 24, 111, 111),
}


def step(function, x, r, upstream, activation, training, kind):
    channels = x.size(1)
    generator = torch.Generator().manual_seed(1)
    w, b, mean, var = (torch.rand(channels, generator=generator).to(kind) + 0.5 for _ in range(4))
    leaves = [t.detach().requires_grad_() for t in (x, w, b) + ((r,) if r is not None else ())]
    y = function(leaves[0], mean, var, leaves[1], leaves[2], training, leaves[3] if r is not None else None, activation)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def composed(x, mean, var, w, b, training, r, activation):
    y = F.batch_norm(x, mean, var, w, b, training)
    y = y if r is None else y + r
    return y if activation is None else getattr(F, activation)(y)


def fused(x, mean, var, w, b, training, r, activation):
    return fused_ops.batch_norm(x, mean, var, w, b, training, residual=r, activation=activation)


HOW = [
    (None, False, True),
    ("relu", True, True),
    ("relu", False, True),
    ("hardswish", True, True),
    (None, False, False),
]


@grid(shape=SHAPES, dtype=[torch.float32, torch.bfloat16, torch.float16], how=HOW)
def test_large_tensors_by_the_error_rule(shape, dtype, how):
    activation, residual, training = how
    x, r, g = (torch.randn(SHAPES[shape]).to(dtype) for _ in range(3))
    if shape == "channels last":
        x, r, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, r, g))
    assert x.numel() * x.element_size() >= 4 << 20
    r = r if residual else None
    kind = torch.float32
    ours, eager = (step(f, x, r, g, activation, training, kind) for f in (fused, composed))
    truth = step(
        composed, x.double(), None if r is None else r.double(), g.double(), activation, training, torch.float64
    )
    names = ("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")
    for name, a, b, c in zip(names, ours, eager, truth, strict=False):
        if activation == "relu" and name.startswith("grad"):  # eager's own sign of z decides some of its gradients
            continue
        assert_no_worse_than(a, b, c, name)
    if activation == "relu" and residual:
        assert torch.equal(ours[4], torch.where(ours[0] > 0, g, torch.zeros(())).to(dtype))


@pytest.mark.parametrize("shape", [(2, 300, 70, 71), (2050, 1030), (9000, 256)])
def test_a_single_thread_gives_the_same_bits(shape):
    """Eight threads are more than the second shape's tiles of columns, and share each; one takes them in turn."""
    x, g = torch.randn(shape), torch.randn(shape)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            found.append(step(fused, x, None, g, "relu", True, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

"""Batch norm's activations where they have a kink and where the numbers end: the gradient is PyTorch's there."""

import pytest
import torch
from torch.nn import functional as F

import fused_ops
from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.keep_output_reference import before

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
POINTS = [-INF, -3.5, -3.0, -2.5, -1.0, -0.0, 0.0, 1.0, 2.5, 3.0, 3.5, INF, NAN]
ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.25),
    "elu": lambda z: F.elu(z, 1.5),
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}
# At NaN the slope of PyTorch's elu and hardswish is 1 in the tail of a tensor and NaN elsewhere; with a residual our
# backward of leaky_relu has one bit a value, which says of NaN that it is not negative.
UNSETTLED = ("elu", "hardswish", "leaky_relu")
LAYOUTS = {  # times POINTS: few enough for one value at a time, whole registers, planes, interleaved channels
    "few": lambda z: z.reshape(-1, 1),
    "rows": lambda z: z.repeat(40, 1).t().contiguous(),
    "planes": lambda z: z.repeat(14).reshape(2, 1, -1),
    "channels last": lambda z: z.repeat(2, 16, 7).reshape(2, 16, 7, -1).contiguous(memory_format=torch.channels_last),
}
CALLS = [(option, name) for option in ("plain", "residual") for name in ACTIVATIONS]
CALLS += [("inplace_activated", "leaky_relu"), ("inplace_activated", "elu")]


def normalized(z, activation, **options):
    """batch_norm that changes nothing before the activation: statistics 0 and 1, no eps."""
    mean, var = z.new_zeros(z.size(1)), z.new_ones(z.size(1))
    return fused_ops.batch_norm(z, mean, var, eps=0.0, activation=activation, negative_slope=0.25, alpha=1.5, **options)


def assert_same(ours, truth):
    """Up to rounding; the truth is PyTorch's in float64 (in others its gelu of infinity is NaN on some processors)."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), truth, rtol=4 * eps, atol=4 * eps, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("option", "name"), CALLS)
def test_value_and_gradient_are_pytorchs(option, name, layout, dtype):
    points = [p for p in POINTS if p == p or name not in UNSETTLED]
    z = LAYOUTS[layout](torch.tensor(points, dtype=dtype))
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    options = {"plain": {}, "residual": {"residual": torch.zeros_like(z)}}.get(option, {"inplace_activated": True})
    y, truth = normalized(leaf, name, **options), ACTIVATIONS[name](exact)
    assert_same(y, truth)
    assert_same(*(torch.autograd.grad(out.sum(), x)[0] for out, x in ((y, leaf), (truth, exact))))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_reference_too(name):
    """First and second derivative, which forward-mode AD and double backward take."""
    code = activations.CODES[name]
    slope = activations.slope_of(code, 0.25, 1.5)
    points = [p for p in POINTS if p == p or name not in UNSETTLED]
    z = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(ACTIVATIONS[name](z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    assert_same(activations.first_derivative(code, z.detach(), slope), first)
    assert_same(activations.second_derivative(code, z.detach(), slope), second)


@pytest.mark.parametrize("name", ["leaky_relu", "elu"])
def test_the_reference_of_a_kept_output_too(name):
    code = activations.CODES[name]
    slope = activations.slope_of(code, 0.25, 1.5)
    z = torch.tensor(POINTS[:-1], dtype=torch.float64, requires_grad=True)
    y = ACTIVATIONS[name](z)
    (truth,) = torch.autograd.grad(y.sum(), z)
    for kept in (z > z, z == z):
        found = before(torch.ones_like(y), y.detach(), z.detach().clone(), kept, code, slope)
        assert_same(found, truth)

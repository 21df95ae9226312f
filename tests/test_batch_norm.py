"""Batch norm against its reference; derivatives of every order and mode."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fused_ops
from fused_ops.reference import _activation
from fused_ops.reference import batch_norm as reference


def checked(sample):
    """The sample's function of the tensors that require grad, and those tensors."""
    inputs = tuple(a for a in (*sample.args, *sample.kwargs.values()) if torch.is_tensor(a) and a.requires_grad)

    def function(*values):
        given = iter(values)

        def pick(a):
            if not torch.is_tensor(a):
                return a
            return next(given) if a.requires_grad else a.clone()

        args = [pick(a) for a in sample.args]
        return fused_ops.batch_norm(*args, **{k: pick(a) for k, a in sample.kwargs.items()})

    return function, inputs


@pytest.mark.parametrize("sample", reference.samples(), ids=lambda s: s.name)
def test_derivatives(sample):
    function, inputs = checked(sample)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivative(training):
    x, w = torch.randn(4, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.5

    def plain(x, *_):  # F.batch_norm's own third derivative takes its statistics for constants
        m, v = (x.mean(0), x.var(0, correction=0)) if training else (mean, var)
        return (x - m) * (v + 1e-5).rsqrt() * w

    def value(function):
        def f(x):
            return function(x, mean.clone(), var.clone(), w, None, training).sin().sum()

        return torch.func.jacrev(torch.func.hessian(f))(x)

    torch.testing.assert_close(value(fused_ops.batch_norm), value(plain))


def test_kernels_match_reference():
    x = torch.randn(9, 33, dtype=torch.float64)
    stats = torch.zeros(33).double(), torch.ones(33).double()
    ours = torch.ops.fused_ops.batch_norm_forward(x, *stats, None, None, True, 0.1, 1e-5, 0)
    for a, b in zip(ours, reference.forward(x, *stats, None, None, True, 0.1, 1e-5, 0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(9, 33), (3, 4, 2, 3), (3, 4, 7, 9)])
def test_masks_match_the_reference(shape):
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    call = (x, r, *[None] * 5, True, 0.1, 1e-5, 0, _activation.RELU, 0.0, 1)
    ours, expected = torch.ops.fused_ops.batch_norm_act_forward(*call), reference.act_forward(*call)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)

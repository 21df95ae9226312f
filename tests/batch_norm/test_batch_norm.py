"""Batch norm against its reference; derivatives of every order and mode."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fused_ops
from fused_ops.ops.batch_norm import activations, arguments, reference
from fused_ops.ops.batch_norm.samples import samples
from fused_ops.testing import _opcheck


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


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sample", samples(), ids=lambda s: s.name)
def test_derivatives(sample, fast):
    """All of the first derivatives, and of the second ones all or what a random direction sees of them."""
    function, inputs = checked(sample)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast)


ORDINARY = [s for s in samples() if not s.kwargs.get("inplace_activated")]


@pytest.fixture
def functional(monkeypatch):
    """Plain eager calls take the Function that calls under torch.func take."""
    return lambda: monkeypatch.setattr(arguments, "way_of", lambda *_: arguments.Way.FUNCTION)


@pytest.mark.parametrize("sample", ORDINARY[::3], ids=lambda s: s.name)
def test_derivatives_by_the_functional_function(sample, functional):
    functional()
    function, inputs = checked(sample)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


ONE_OPTION = [s.name.count(",") == 1 and "training" in s.name for s in ORDINARY]  # each layout, each activation


@pytest.mark.parametrize(
    "sample",
    [pytest.param(s, marks=() if one else pytest.mark.slow) for s, one in zip(ORDINARY, ONE_OPTION, strict=True)],
    ids=lambda s: s.name,
)
def test_opcheck_of_the_functional_ops(sample, functional):
    functional()
    function, inputs = checked(sample)
    assert _opcheck(lambda *given: (function(*given),), inputs) is not False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (300, 7), (5, 300), (3, 4, 2, 3), (3, 4, 9, 9)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_both_functions_agree_in_every_bit(dtype, shape, activation, training, residual, functional):
    x, g, r = (torch.randn(shape).to(dtype) for _ in range(3))
    params = [torch.randn(shape[1]).to(dtype) for _ in range(2)]

    def results():
        leaves = [t.clone().requires_grad_() for t in ((x, *params, r) if residual else (x, *params))]
        added = leaves[3] if residual else None
        running = torch.full(shape[1:2], 0.5, dtype=dtype), torch.full(shape[1:2], 2.0, dtype=dtype)
        y = fused_ops.batch_norm(leaves[0], *running, *leaves[1:3], training, activation=activation, residual=added)
        return y.grad_fn.name(), [y.detach(), *torch.autograd.grad(y, leaves, g), *running]

    (name, ours), _ = results(), functional()
    other_name, theirs = results()
    assert name != other_name
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_plain_eager_calls_write_the_running_statistics_in_place():
    x, weight = torch.randn(6, 3, requires_grad=True), nn.Parameter(torch.ones(3))
    running = torch.zeros(3), torch.ones(3)

    def eager(x=x, weight=weight, **options):
        y = fused_ops.batch_norm(x, *running, weight, None, True, **options)
        return "Eager" in y.grad_fn.name()

    assert eager() and eager(x.detach()) and eager(activation="silu")
    assert eager(x.T.contiguous().T) and eager(x.reshape(2, 3, 3))
    assert eager(residual=x) and eager(groups=2) and eager(valid=x[:, 0] > -9)
    assert not eager(x.as_subclass(nn.Parameter))  # another type
    with forward_ad.dual_level():
        assert not eager()
    strided = torch.zeros(3, 2)[:, 0], torch.ones(3, 2)[:, 0]
    dense = torch.zeros(3), torch.ones(3)
    for pair in (strided, dense):
        fused_ops.batch_norm(x, *pair, training=True)
    assert torch.equal(strided[0], dense[0]) and torch.equal(strided[1], dense[1]) and dense[0].abs().sum() > 0


def test_an_error_leaves_the_running_statistics_alone():
    x, running = torch.randn(6, 3), (torch.zeros(3), torch.ones(3))
    for bad in ({"weight": torch.ones(4)}, {"eps": 0.0}, {"activation": "none"}, {"momentum": None}, {"input": x[:1]}):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            fused_ops.batch_norm(
                **{"input": x, "training": True, **bad}, running_mean=running[0], running_var=running[1]
            )
    assert not running[0].any() and (running[1] == 1).all() and running[0]._version == 0


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
    found = []
    for forward in (torch.ops.fused_ops.batch_norm_forward, reference.forward):
        stats = torch.zeros(33).double(), torch.ones(33).double()
        found.append([*forward(x, *stats, None, None), *stats])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(9, 33), (3, 4, 2, 3), (3, 4, 7, 9)])
def test_masks_match_the_reference(shape):
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    found = []
    for forward in (torch.ops.fused_ops.batch_norm_forward, reference.forward):
        mask = torch.full((reference.mask_bytes(x),), 0xAA, dtype=torch.uint8)
        found.append([*forward(x, *[None] * 4, activation=activations.RELU, residual=r, mask=mask), mask])
    torch.testing.assert_close(*found)

"""Batch norm against its reference; derivatives of every order and mode."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fused_ops
from fused_ops.ops.batch_norm import activations, reference
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
@pytest.mark.parametrize("sample", reference.samples(), ids=lambda s: s.name)
def test_derivatives(sample, fast):
    """All of the first derivatives, and of the second ones all or what a random direction sees of them."""
    function, inputs = checked(sample)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast)


BEYOND_PACKED = ("residual", "valid", "groups", "inplace_activated")
PACKED = [s for s in reference.samples() if not any(s.kwargs.get(name) is not None for name in BEYOND_PACKED)]


@pytest.fixture
def functional(monkeypatch):
    """Plain eager calls take the ops that everything else takes."""
    return lambda: monkeypatch.setattr("fused_ops.ops.batch_norm.eager.serves", lambda *_: False)


@pytest.mark.parametrize("sample", PACKED, ids=lambda s: s.name)
def test_derivatives_by_the_functional_ops(sample, functional):
    functional()
    function, inputs = checked(sample)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


ONE_OPTION = [s.name.count(",") == 1 and "training" in s.name for s in PACKED]  # each layout, each activation


@pytest.mark.parametrize(
    "sample",
    [pytest.param(s, marks=() if one else pytest.mark.slow) for s, one in zip(PACKED, ONE_OPTION, strict=True)],
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
def test_packed_and_functional_ops_agree_in_every_bit(dtype, shape, activation, training, functional):
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    params = [torch.randn(shape[1]).to(dtype) for _ in range(2)]

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        running = torch.full(shape[1:2], 0.5, dtype=dtype), torch.full(shape[1:2], 2.0, dtype=dtype)
        y = fused_ops.batch_norm(leaves[0], *running, *leaves[1:], training, activation=activation)
        return y.grad_fn.name(), [y.detach(), *torch.autograd.grad(y, leaves, g), *running]

    (name, ours), _ = results(), functional()
    other_name, theirs = results()
    assert name != other_name
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_packed_ops_serve_plain_eager_calls_alone(functional):
    x, weight = torch.randn(6, 3, requires_grad=True), nn.Parameter(torch.ones(3))
    running = torch.zeros(3), torch.ones(3)

    def packed(x=x, weight=weight, **options):
        y = fused_ops.batch_norm(x, *running, weight, None, True, **options)
        return "Packed" in y.grad_fn.name()

    assert packed() and packed(x.detach()) and packed(activation="silu")
    assert packed(x.T.contiguous().T) and packed(x.reshape(2, 3, 3))
    assert not packed(residual=x) and not packed(groups=2) and not packed(valid=x[:, 0] > -9)
    assert not packed(x.as_subclass(nn.Parameter))  # another type
    with forward_ad.dual_level():
        assert not packed()
    versions = [t._version for t in running]
    assert packed() and [t._version for t in running] == [v + 1 for v in versions]
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
    stats = torch.zeros(33).double(), torch.ones(33).double()
    ours = torch.ops.fused_ops.batch_norm_forward(x, *stats, None, None, True, 0.1, 1e-5, 0)
    for a, b in zip(ours, reference.forward(x, *stats, None, None, True, 0.1, 1e-5, 0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(9, 33), (3, 4, 2, 3), (3, 4, 7, 9)])
def test_masks_match_the_reference(shape):
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    call = (x, r, *[None] * 5, True, 0.1, 1e-5, 0, activations.RELU, 0.0, 1)
    ours, expected = torch.ops.fused_ops.batch_norm_act_forward(*call), reference.act_forward(*call)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)

"""The tools that prove gradients right must themselves notice wrong ones."""

import pytest
import torch
from opinfo_cases import thin

import fused_ops
from fused_ops.core.function import FusedFunction
from fused_ops.core.sample import Sample
from fused_ops.testing import CHECKS, assert_no_worse_than, check_op, compare_gradients, op_names, samples_of


def test_table_and_data(capsys):
    a = torch.tensor([1.0, 2.0])
    result = compare_gradients(
        {"same": (a, a.clone()), "close": (a + 1e-6, a), "far": (a + 1, a), "zeros": (torch.zeros(2), torch.zeros(2))}
    )
    assert [row.exact for row in result.rows] == [True, False, False, True]
    assert [row.approximate for row in result.rows] == [True, True, False, True]
    assert [row.near_zero for row in result.rows] == [False, False, False, True]
    assert result.rows[2].max_difference == 1.0
    assert result.rows[2].relative_error == pytest.approx(2**0.5 / 5**0.5)
    assert (result.exact, result.approximate) == (2, 3)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("|") for line in lines[:-1]}) == 1
    assert lines[4].endswith("true gradient ~0")
    assert lines[-1] == "4 gradients: 2 exact, 3 approximate"


def test_zeros_are_marked_even_when_ours_are_not_zero():
    row = compare_gradients({"b1": (torch.full((3,), 1e-9), torch.full((3,), -1e-9))}, quiet=True).rows[0]
    assert row.approximate and row.near_zero and not row.exact


def test_nothing_is_broadcast():
    with pytest.raises(ValueError, match=r"gradients\['w'\]: expected the reference's shape \[2, 1\], got \[1, 2\]"):
        compare_gradients({"w": (torch.zeros(1, 2), torch.zeros(2, 1))})


def test_pairs_of_tensors_only():
    with pytest.raises(TypeError, match=r"gradients\['w'\]: expected a pair of tensors"):
        compare_gradients({"w": (torch.zeros(1), None)})


def test_nan_is_neither_exact_nor_approximate():
    nan = torch.tensor([float("nan")])
    row = compare_gradients({"x": (nan, nan)}, quiet=True).rows[0]
    assert not row.exact and not row.approximate and not row.near_zero


def test_no_worse_than_allows_eager_plus_one_rounding():
    truth = torch.tensor([1.0, 3.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 1e-5])
    assert_no_worse_than(truth.float() + 1e-5, eager, truth)
    with pytest.raises(AssertionError, match="loss: further from the truth"):
        assert_no_worse_than(truth.float() + 2e-5, eager, truth, "loss")
    with pytest.raises(AssertionError, match=r"expected shape \[2\] and torch.float32, got \[1\]"):
        assert_no_worse_than(eager[:1], eager, truth)
    with pytest.raises(AssertionError, match=r"got \[2\] and torch.float64"):
        assert_no_worse_than(truth, eager, truth)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_no_worse_than_refuses_nan_and_infinity(wrong):
    truth = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_no_worse_than(torch.tensor([wrong]), torch.tensor([1.0]), truth)
    with pytest.raises(AssertionError, match="NaNs and infinities"):
        assert_no_worse_than(torch.tensor([1.0]), torch.tensor([wrong]), torch.tensor([wrong], dtype=torch.float64))


class Cube(FusedFunction):
    """x ** 3 with whatever derivative rule the class says."""

    factor, second = 3.0, True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def backward(cls, ctx, grad):
        (x,) = ctx.saved_tensors
        x = x if cls.second else x.detach()
        return grad * cls.factor * x**2

    @staticmethod
    def jvp(ctx, x_t):
        return 3 * ctx.saved_tensors[0] ** 2 * x_t


class WrongFactor(Cube):
    factor = 2.9


class WrongSecond(Cube):
    second = False


@pytest.mark.parametrize(
    ("function", "failing"),
    [
        (Cube, {"opcheck"}),
        (WrongFactor, {"gradcheck", "opcheck"}),
        (WrongSecond, {"gradgradcheck", "opcheck"}),
    ],
)
def test_check_op_tells_right_from_wrong(function, failing):
    pytest.importorskip("expecttest")
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (result,) = check_op(function.apply, [Sample("cube", (x,))], "cube")
    assert set(result.outcomes) == set(CHECKS)
    # opcheck fails for all three: they call no raw op of the package, and a check of nothing is not a pass.
    assert {name for name, outcome in result.outcomes.items() if outcome == "failed"} == failing
    assert len(result.details) == len(failing)


def test_every_op_is_checked():
    assert set(op_names()) == {"batch_norm", "cross_entropy", "linear_cross_entropy"}


@pytest.mark.parametrize("op", op_names())
@pytest.mark.parametrize("at_most", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_samples_pass(op, at_most):
    """As ``python -m fused_ops check``; the derivatives of all of them are in the tests of each op."""
    samples = thin(samples_of(op), op, at_most)
    results = check_op(getattr(fused_ops, op), samples, op)
    assert len(results) == len(samples) > 3
    assert [(r.sample, r.details) for r in results if set(r.outcomes.values()) != {"passed"}] == []

"""Integer arguments: what PyTorch's argument parser takes is taken, and anything else is refused by name."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fused_ops

TARGET = torch.tensor([0, 1, 2, 1])
X, W = (torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 6))


class Index:
    def __index__(self):
        return 1

    def __repr__(self):  # the name of a test, which is the same in every process
        return "Index()"


def losses(value, x, functional, **options):
    """The loss and its gradient of either module of functions."""
    x = x.clone().requires_grad_()
    loss = functional(x, TARGET, ignore_index=value, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def head(function):
    return lambda x, target, **options: function(x, W, target, **options)


IGNORE_INDEX = {
    "small": (fused_ops.cross_entropy, F.cross_entropy, {}),
    "smoothing": (fused_ops.cross_entropy, F.cross_entropy, {"label_smoothing": 0.1}),
    "small head": (head(fused_ops.linear_cross_entropy), head(F.linear_cross_entropy), {}),
    "head": (head(fused_ops.linear_cross_entropy), head(F.linear_cross_entropy), {"label_smoothing": 0.1}),
}
MORE = {
    "chunk_rows": lambda v: head(fused_ops.linear_cross_entropy)(X, TARGET, chunk_rows=v),
    "max_memory_bytes": lambda v: head(fused_ops.linear_cross_entropy)(X, TARGET, max_memory_bytes=v),
    "groups": lambda v: fused_ops.batch_norm(X, None, None, training=True, groups=v),
    "correction": lambda v: fused_ops.batch_norm(X, None, None, training=True, correction=v),
    "correction, activated": lambda v: fused_ops.batch_norm(
        X, None, None, training=True, correction=v, groups=2, activation="relu"
    ),
}
INTEGERS = [1, np.int64(1), np.int32(1), np.array(1), torch.tensor(1), Index()]
OTHERS = [True, 1.5, float("nan"), np.float64(2), Fraction(3, 2), torch.tensor(2.0), "1"]


@pytest.mark.parametrize("call", IGNORE_INDEX)
@pytest.mark.parametrize("value", [*INTEGERS, -(2**63), 2**63 - 1], ids=repr)
def test_ignore_index_is_what_it_is_to_pytorch(value, call):
    ours, eager, options = IGNORE_INDEX[call]
    x = X if "head" in call else X @ W.t()
    for a, b in zip(losses(value, x, ours, **options), losses(value, x, eager, **options), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("call", IGNORE_INDEX)
@pytest.mark.parametrize("value", [*OTHERS, 2**63, 2**70, -(2**70)], ids=repr)
def test_no_ignore_index(value, call):
    ours, eager, options = IGNORE_INDEX[call]
    x = X if "head" in call else X @ W.t()
    with pytest.raises((TypeError, ValueError)) as error:
        losses(value, x, eager, **options)
    said = f"must fit in 64 bits, got {value}" if type(value) is int else f"must be int, not {type(value).__name__}"
    with pytest.raises(error.type, match=rf"cross_entropy\(\): argument 'ignore_index' {said}"):
        losses(value, x, ours, **options)


def test_a_bool_tensor_is_no_integer():
    with pytest.raises(TypeError, match="argument 'ignore_index' must be int, not Tensor"):
        fused_ops.cross_entropy(X, TARGET, ignore_index=torch.tensor(True))


@pytest.mark.parametrize("call", MORE)
@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_every_integer_argument_takes_them(value, call):
    assert torch.equal(MORE[call](value), MORE[call](1))


@pytest.mark.parametrize("call", MORE)
@pytest.mark.parametrize("value", OTHERS[1:], ids=repr)
def test_no_integer_argument_takes_others(value, call):
    name = call.partition(",")[0]
    with pytest.raises(TypeError, match=rf"\(\): argument '{name}' must be int, not {type(value).__name__}"):
        MORE[call](value)


@pytest.mark.parametrize("call", [call for call in MORE if call != "groups"])  # True == 1 group, the ordinary call
def test_no_integer_argument_takes_true(call):
    with pytest.raises(TypeError, match=f"argument '{call.partition(',')[0]}' must be int, not bool"):
        MORE[call](True)


@pytest.mark.parametrize(("call", "value"), [("chunk_rows", 0), ("max_memory_bytes", -5), ("groups", 0)])
def test_below_one(call, value):
    with pytest.raises(ValueError, match=rf"{call} .*, got {value}"):
        MORE[call](value)


@pytest.mark.parametrize("call", ["groups", "correction", "correction, activated"])
def test_beyond_64_bits(call):
    name = call.partition(",")[0]
    with pytest.raises(ValueError, match=rf"batch_norm\(\): argument '{name}' must fit in 64 bits, got {2**70}"):
        MORE[call](2**70)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-100, 200, 2**40])
def test_shift_with_an_ignore_index_beyond_the_targets_dtype(value, dtype):
    target = TARGET.to(dtype).unsqueeze(0)
    loss = fused_ops.linear_cross_entropy(X.unsqueeze(0), W, target, shift=True, ignore_index=value)
    torch.testing.assert_close(loss, F.cross_entropy(X[:-1] @ W.t(), TARGET[1:]))

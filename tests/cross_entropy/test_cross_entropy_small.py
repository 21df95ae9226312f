"""Cross-entropy of few adjacent classes, walked many rows at once: every class count, every edge of a tile."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.testing import assert_no_worse_than

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 15, 17, 64, 259]  # around the registers (4, 8, 16), a pass and a tile of 256


def run(function, x, target, upstream, **options):
    x = x.detach().requires_grad_()
    loss = function(x, target, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]


def draw(rows, classes, dtype):
    x, target = (torch.randn(rows, classes) * 4).to(dtype), torch.randint(0, classes, (rows,))
    target[::5] = -100
    return x, target, torch.randn(rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid(dtype):
    torch.manual_seed(0)
    results = []
    for classes in range(1, 71):
        for rows in ROWS:
            x, target, upstream = draw(rows, classes, dtype)
            ours, eager, truth = (
                run(f, v, target, upstream)
                for f, v in ((fused_ops.cross_entropy, x), (F.cross_entropy, x), (F.cross_entropy, x.double()))
            )
            assert not ours[1][::5].any()
            torch.testing.assert_close(ours[1].double(), truth[1], rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
            results.append([result.flatten() for result in (*ours, *eager, *truth)])
    loss, grad, eager_loss, eager_grad, true_loss, true_grad = map(torch.cat, zip(*results, strict=True))
    assert_no_worse_than(loss, eager_loss, true_loss, "loss")
    assert_no_worse_than(grad, eager_grad, true_grad, "grad")


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_not_finite(dtype):
    """A row that is not finite is PyTorch's, and the rows beside it stay what they were."""
    torch.manual_seed(1)
    for classes in range(1, 71):
        x, target, upstream = draw(37, classes, dtype)
        upstream = torch.ones_like(upstream)
        clean = run(fused_ops.cross_entropy, x, target, upstream)
        bad = {2: -torch.inf, 6: torch.inf, 18: torch.nan, 31: -torch.inf, 5: torch.nan}  # row 5 is ignored
        for row, value in bad.items():
            x[row, row % classes] = value
        x[12] = -torch.inf
        ours = run(fused_ops.cross_entropy, x, target, upstream)
        exact = run(F.cross_entropy, x.double(), target, upstream)
        exact[1][::5] = 0  # PyTorch gives NaN where the logits of an ignored row are
        touched = torch.zeros(37, dtype=torch.bool)
        touched[[*bad, 12]] = True
        touched[5] = False
        for mine, before, truth in zip(ours, clean, exact, strict=True):
            assert torch.equal(mine[~touched], before[~touched])
            torch.testing.assert_close(
                mine, truth.to(dtype), equal_nan=True, rtol=8 * torch.finfo(dtype).eps, atol=1e-6
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_layouts_in_place_and_splits_are_bitwise(dtype):
    torch.manual_seed(2)
    for classes in range(1, 71):
        x, target, upstream = draw(131, classes, dtype)
        loss, grad = run(fused_ops.cross_entropy, x, target, upstream)
        wide = torch.randn(131, classes + 3).to(dtype)[:, :classes].copy_(x)
        for function, logits in (
            (fused_ops.cross_entropy, wide),
            (lambda v, *a, **o: fused_ops.cross_entropy(v * 1, *a, inplace_backward=True, **o), x),
        ):
            other = run(function, logits, target, upstream)
            assert torch.equal(other[0], loss) and torch.equal(other[1], grad), classes
        for part in (slice(3, 4), slice(1, 18), slice(16, 120)):
            other = run(fused_ops.cross_entropy, x[part], target[part], upstream[part])
            assert torch.equal(other[0], loss[part]) and torch.equal(other[1], grad[part]), classes


@pytest.mark.parametrize("row", [0, 16, 300])
def test_a_bad_target_raises(row):
    target = torch.zeros(301, dtype=torch.int64)
    target[row] = 27
    with pytest.raises(IndexError, match="Target 27 is out of bounds"):
        fused_ops.cross_entropy(torch.randn(301, 27), target)

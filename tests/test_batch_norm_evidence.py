"""Evidence on batch norm beyond the error rule's grid: running statistics to one rounding, and what follows."""

import math

import pytest
import torch

import fused_ops
from fused_ops.testing import assert_no_worse_than

SHAPES = {
    "rows": (20000, 33),
    "planes": (8, 5, 56, 56),
    "small planes": (300, 7, 4, 4),
    "channels last": (8, 33, 28, 28),
    "few channels": (8, 2, 100, 100),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def lay_out(x, name):
    return x.contiguous(memory_format=torch.channels_last) if name == "channels last" else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 1e-3, 100.0])
def test_running_statistics_are_exact_to_one_rounding(layout, dtype, mean):
    """A mean near zero too: what is left of the values after they cancel is rounded once, whatever eager does."""
    x = lay_out((torch.randn(SHAPES[layout]) + mean).to(dtype), layout)
    dims = [d for d in range(x.dim()) if d != 1]
    truth = x.double().mean(dims), x.double().var(dims)
    found = torch.zeros(x.size(1)), torch.zeros(x.size(1))
    fused_ops.batch_norm(x, *found, training=True, momentum=1.0)
    assert_no_worse_than(found[0], truth[0].float(), truth[0], "running_mean")
    assert (found[1] - truth[1]).abs().max() <= 3e-7 * truth[1].max()


def test_running_mean_of_float64():
    x = torch.randn(20000, 7, dtype=torch.float64)
    found, eager = torch.zeros(7).double(), torch.zeros(7).double()
    fused_ops.batch_norm(x, found, torch.ones(7).double(), training=True, momentum=1.0)
    torch.nn.functional.batch_norm(x, eager, torch.ones(7).double(), training=True, momentum=1.0)
    truth = torch.tensor([math.fsum(x[:, c].tolist()) / 20000 for c in range(7)], dtype=torch.float64)
    assert_no_worse_than(found, eager, truth, "running_mean")

"""Evidence on batch norm beyond the error rule's grid: running statistics to one rounding, and what follows."""

import math

import pytest
import torch
from conftest import grid

import fused_ops
from fused_ops.ops.batch_norm import activations
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
    if dtype == torch.float32:
        assert_no_worse_than(found[0], truth[0].float(), truth[0], "running_mean")
        assert (found[1] - truth[1]).abs().max() <= 3e-7 * truth[1].max()
    else:  # sums of 16-bit values are partly float32: a rounding of the values' size, not of what cancellation leaves
        size = x.double().square().mean(dims).sqrt()
        assert bool(((found[0] - truth[0]).abs() <= torch.finfo(torch.float32).eps * size).all())
        assert (found[1] - truth[1]).abs().max() <= 1e-6 * truth[1].max()


def test_running_mean_of_float64():
    x = torch.randn(20000, 7, dtype=torch.float64)
    found, eager = torch.zeros(7).double(), torch.zeros(7).double()
    fused_ops.batch_norm(x, found, torch.ones(7).double(), training=True, momentum=1.0)
    torch.nn.functional.batch_norm(x, eager, torch.ones(7).double(), training=True, momentum=1.0)
    truth = torch.tensor([math.fsum(x[:, c].tolist()) / 20000 for c in range(7)], dtype=torch.float64)
    size = torch.finfo(torch.float64).eps * x.square().mean(0).sqrt()
    assert bool(((found - truth).abs() <= (eager - truth).abs().max() + size).all())


def test_accuracy_table_is_up_to_date():
    """The page names what the command measures, and our figures on it are today's, up to another processor's."""
    from benchmarks import batch_norm_accuracy as page

    written = page.MARKER.search(page.PAGE.read_text(encoding="utf-8"))[0].splitlines()[1:-1]
    made = page.table().splitlines()
    assert [line.split(" | ")[:4] for line in written] == [line.split(" | ")[:4] for line in made]
    for old, new in zip(written[2:], made[2:], strict=True):
        for a, b in zip(old.strip("| ").split(" | ")[4:], new.strip("| ").split(" | ")[4:], strict=True):
            ours, before = (float(cell.split(" / ")[0]) for cell in (b, a))
            assert ours <= 2 * before + 6e-8, (old, new)


def test_a_large_mean_leaves_errors_of_the_order_of_a_rounding():
    """At mean 1e3 and standard deviation 1e-2, in float32 and every layout."""
    from benchmarks import batch_norm_accuracy as page

    checked = 0
    for name, pairs in page.rows():
        if name[2:] == ("float32", "100000"):
            errors = dict(zip(page.QUANTITIES, pairs, strict=True))
            del errors["eval output"]  # as exact as float32 running statistics can be
            assert all(ours < 1e-6 for ours, _ in errors.values()), (name, errors)
            checked += 1
    assert checked == 5


DDP = """
import torch, torch.distributed as dist
import torch.nn.functional as F
from torch import nn
import fused_ops
from tests.distributed.processes import finish, run, start

def model(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Flatten(), nn.Linear(4 * 36, 2))

def check(a, b, broadcast):
    ours = nn.parallel.DistributedDataParallel(model(fused_ops.BatchNorm2d), broadcast_buffers=broadcast)
    (ours(a) * ours(b)).sum().backward()
    plain = model(nn.BatchNorm2d)
    (plain(a) * plain(b)).sum().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        mean = theirs.grad.clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mine.grad, mean / 2, rtol=1e-4, atol=1e-5)
    assert ours.module[1].num_batches_tracked == 2

def worker(rank, port):
    start(rank, port, timeout_s=1800)
    torch.manual_seed(rank)
    a, b = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    for broadcast in (True, False):
        check(a, b, broadcast)
    finish(f"agrees{rank}", "yes")

if __name__ == "__main__":
    run(worker)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed with gloo")
def test_two_forwards_before_one_backward_under_ddp(tmp_path, run_python):
    """Nothing that the first backward needs is changed by the second forward, or by the buffers' broadcast."""
    script = tmp_path / "two.py"
    script.write_text(DDP)
    run_python(str(script), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert (tmp_path / "agrees0").exists() and (tmp_path / "agrees1").exists()


@grid(
    activation=activations.CODES,
    layout=["rows", "planes", "channels last"],
    training=[True, False],
    residual=[False, True],
)
def test_derivatives_of_every_activation_layout_and_mode(activation, layout, training, residual):
    shape = {"rows": (4, 2), "planes": (2, 2, 5, 7), "channels last": (2, 2, 2, 2)}[layout]
    x, r = (lay_out(torch.randn(shape, dtype=torch.float64), layout) for _ in range(2))
    w, b = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def function(x, w, b, r):
        options = {"activation": activation, "residual": r if residual else None}
        return fused_ops.batch_norm(x, mean.clone(), var.clone(), w, b, training, **options)

    inputs = [t.requires_grad_() for t in (x, w, b, r)]
    inputs[3].requires_grad_(residual)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (1, 1, 2, 1), (6, 1), (2, 3, 1, 1), (1, 40, 33)])
def test_one_sample_or_one_channel(shape, activation):
    x, g = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    found = []
    for fused in (False, True):
        leaf = x.clone().requires_grad_()
        if fused:
            y = fused_ops.batch_norm(leaf, None, None, training=True, activation=activation)
        else:
            y = torch.nn.functional.batch_norm(leaf, None, None, training=True)
            y = y if activation is None else getattr(torch.nn.functional, activation)(y)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
    torch.testing.assert_close(found[1], found[0])

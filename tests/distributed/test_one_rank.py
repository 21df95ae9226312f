"""Everything that is sent, in a group of one rank: gloo on the CPU, and NCCL where there is a GPU (make gpu-report)."""

import itertools
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fused_ops
from fused_ops.distributed import collectives

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)
BACKENDS = ["gloo", "nccl"]


@pytest.fixture(params=BACKENDS)
def device(request):
    """Of the backend's tensors; the group of all ranks is there meanwhile."""
    if request.param == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        pytest.skip("needs a GPU and NCCL")
    dist.init_process_group(request.param, rank=0, world_size=1, store=dist.HashStore())
    yield "cuda" if request.param == "nccl" else "cpu"
    dist.destroy_process_group()


def run(function, leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("many", [False, True])
def test_losses(device, many):
    """As without groups, where they gather and where they reduce."""
    torch.manual_seed(0)
    x, w = torch.randn(40, 8, device=device), torch.randn(37, 8, device=device)
    target = torch.randint(0, 37, (40,), device=device)
    target[::5] = -100
    group = dist.group.WORLD
    ways = ({"class_group": group}, {"row_group": group}, {"class_group": group, "row_group": group})
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    with mock.patch.object(collectives, "MANY_RANKS", 1 if many else 64):
        for way, more in itertools.product(ways, ({}, {"chunk_rows": 7})):
            apart = {"sequence_parallel": "class_group" in way}

            def head(x, w, options):
                return fused_ops.linear_cross_entropy(x, w, target, **options)

            found = run(lambda x, w, given={**options, **more, **way, **apart}: head(x, w, given), (x, w))
            torch.testing.assert_close(found, run(lambda x, w: head(x, w, options), (x, w)))
        for way in ways:
            logits = (x @ w.t(),)
            found = run(lambda y, way=way: fused_ops.cross_entropy(y, target, **options, **way), logits)
            torch.testing.assert_close(found, run(lambda y: fused_ops.cross_entropy(y, target, **options), logits))
    if device == "cpu":  # on a GPU it is an error of the device, after which nothing runs
        with pytest.raises(IndexError, match="Target 37"):
            fused_ops.cross_entropy(x @ w.t(), target.fill_(37), class_group=group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_collectives_of_one_rank_are_the_identity(device, dtype):
    x, group = torch.randn(5, 3, device=device).to(dtype), dist.group.WORLD
    sums = collectives.sum_of_ranks, collectives.sum_of_shares, collectives.copy_to_shares, collectives.total
    for function in (*sums, collectives.maximum):
        assert torch.equal(function(x, group), x)
    assert torch.equal(collectives.gather(x, group), x.unsqueeze(0))
    for function in (collectives.gather_rows, collectives.scatter_rows):
        assert torch.equal(function(x, group, [5]), x)
    assert collectives.gather_sizes(7, group) == [7]
    with mock.patch.object(collectives, "_GATHERED_BYTES", 0):
        assert torch.equal(collectives.sum_of_ranks(x, group), x)


def test_synchronised_batch_norm(device):
    """A group of one rank is ordinary batch norm."""
    torch.manual_seed(1)
    x = torch.randn(6, 4, 5, device=device)
    synchronised, ordinary = (kind(4, device=device) for kind in (fused_ops.SyncBatchNorm, fused_ops.BatchNorm1d))
    assert torch.equal(synchronised(x), ordinary(x))
    assert torch.equal(synchronised.running_var, ordinary.running_var)


AFTER_ITS_GROUP = """
import gc, sys, weakref
import torch, torch.distributed as dist
import fused_ops
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
h, w = torch.randn(64, 32, requires_grad=True), torch.randn(600, 32, requires_grad=True)
t, group = torch.randint(0, 600, (64,)), dist.group.WORLD
losses = [
    fused_ops.cross_entropy(h @ w.t(), t, class_group=group, label_smoothing=0.1),
    fused_ops.cross_entropy(h @ w.t(), t, row_group=group),
    fused_ops.linear_cross_entropy(h, w, t, class_group=group),
    fused_ops.linear_cross_entropy(h, w, t, class_group=group, chunk_rows=16),
    fused_ops.linear_cross_entropy(h, w, t, class_group=group, chunk_rows=16, reduction="none").sum(),
    fused_ops.batch_norm(h, None, None, training=True, group=group).square().sum(),
    fused_ops.SyncBatchNorm(32)(h).square().sum(),
]
for loss in losses:
    loss.backward(retain_graph=True)
group = weakref.ref(group)
dist.destroy_process_group()
gc.collect()
assert group() is None, gc.get_referrers(group())
"""


def test_a_graph_does_not_keep_a_group_that_is_destroyed(run_python, tmp_path):
    """Its threads may outlive Python, and end the process where they free a tensor then."""
    run_python("-c", AFTER_ITS_GROUP, str(tmp_path / "store"))

"""A head with deferred logits under FSDP2, in every way of resharding, and under DDP: two processes against one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

SCRIPT = """
import torch, torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
import fused_ops
from fused_ops.conversion import head as limits
from tests.distributed.processes import finish, run, start

limits.SMALL_BYTES = 0
CLASSES = 300

class Net(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)
        self.unused = nn.Linear(2, 2)
        self.inside = inside

    def forward(self, x, y):
        logits = self.head(self.norm(self.body(x).tanh()))
        return (F.cross_entropy(logits.float(), y), logits) if self.inside else logits

BF16 = dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
# name: (what is sharded besides the root, its reshard_after_forward, the root's, the loss in forward, more)
SHARDED = {
    "root": ([], None, None, False, {}),
    "root, loss in forward": ([], None, None, True, {}),
    "root, freed": ([], None, True, False, {}),
    "root, freed, loss in forward": ([], None, True, True, {}),
    "root, kept": ([], None, False, False, {}),
    "head": (["head"], False, None, False, {}),
    "head, loss in forward": (["head"], False, None, True, {}),
    "head, freed": (["head"], True, None, False, {}),
    "head, freed to some": (["head"], 2, None, False, {}),
    "body": (["body"], True, None, False, {}),
    "group": ([["norm", "head"]], False, None, False, {}),
    "group, freed": ([["norm", "head"]], True, None, False, {}),
    "bf16": ([], None, None, False, BF16),
    "bf16, loss in forward": (["head"], False, None, True, BF16),
}
PARALLEL = {
    "DDP": {},
    "DDP, loss in forward": {},
    "DDP, unused": {"find_unused_parameters": True},
    "DDP, unused, loss in forward": {"find_unused_parameters": True},
    "DDP, static": {"static_graph": True},
    "DDP, static, loss in forward": {"static_graph": True},
}

def prepared(name, converted):
    torch.manual_seed(0)
    inside = name.endswith("loss in forward")
    model = Net(inside)
    record = None
    if converted:
        fused_ops.convert(model, loss=F.cross_entropy, head="head")
        record = model.head.__dict__["_fused_ops_record"]
    if name in PARALLEL:
        if "unused" not in name:
            model.unused.requires_grad_(False)
        return DistributedDataParallel(model, **PARALLEL[name]), record
    mesh = init_device_mesh("cpu", (2,))
    parts, part_freed, root_freed, _, more = SHARDED[name]
    for part in parts:
        what = [getattr(model, p) for p in part] if isinstance(part, list) else getattr(model, part)
        fully_shard(what, mesh=mesh, reshard_after_forward=part_freed, **more)
    fully_shard(model, mesh=mesh, reshard_after_forward=root_freed, **more)
    return model, record

def full(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()

def trained(name, converted, x, y):
    model, record = prepared(name, converted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    losses, found = [], {}

    def step():
        optimizer.zero_grad()
        output = model(x, y)
        loss, logits = output if isinstance(output, tuple) else (F.cross_entropy(output.float(), y), output)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    for _ in range(3):
        step()
    found |= {"loss": torch.stack(losses), **{n: full(p) for n, p in model.named_parameters()}}
    counts = (record.fused, dict(record.computed)) if converted else None
    output = model(x, y)  # looked at while the weights are there
    logits = output[1] if isinstance(output, tuple) else output
    if name == "root, freed, loss in forward":
        output[0].backward()
    else:
        found["logits"] = logits.detach().float()
        (logits.float() * 1.5).logsumexp(-1).sum().backward()
    found["gradient"] = full(model.head.weight.grad if name in SHARDED else model.module.head.weight.grad)
    output = model(x, y)
    step()
    try:
        logits = output[1] if isinstance(output, tuple) else output
        found["old"] = logits.detach().sum()
    except RuntimeError as error:
        found["old"] = str(error)
    return found, counts

def worker(rank, port):
    start(rank, port, timeout_s=1800)
    torch.manual_seed(7)
    x, y = torch.randn(2, 12, 8)[rank], torch.randint(0, CLASSES, (2, 12))[rank]
    report = {}
    for name in (*SHARDED, *PARALLEL):
        try:
            (theirs, _), (ours, counts) = trained(name, False, x, y), trained(name, True, x, y)
            far = 2e-2 if name.startswith("bf16") else 1e-5
            old, _ = ours.pop("old"), theirs.pop("old")
            apart = [n for n, t in ours.items() if not torch.allclose(t, theirs[n], rtol=far, atol=far)]
            report[name] = [apart, *counts, old if isinstance(old, str) else "computed"]
        except Exception as error:
            import traceback; traceback.print_exc()
            report[name] = [[repr(error)], 0, {}, ""]
            dist.barrier()
    finish(f"report{rank}", report)

if __name__ == "__main__":
    run(worker)
"""

FREED = {"fully_shard frees its weight after the forward (reshard_after_forward)": 3}
# name: (losses without the logits, why the others were not), of three steps
EXPECTED = {
    "root": (3, {}),
    "root, loss in forward": (3, {}),
    "root, freed": (0, FREED),
    "root, freed, loss in forward": (3, {}),  # and the logits, which it returns too, are gone
    "root, kept": (3, {}),
    "head": (3, {}),
    "head, loss in forward": (3, {}),
    "head, freed": (0, FREED),
    "head, freed to some": (0, FREED),
    "body": (3, {}),
    "group": (3, {}),
    "group, freed": (0, FREED),
    "bf16": (3, {}),
    "bf16, loss in forward": (3, {}),
    "DDP": (3, {}),
    "DDP, loss in forward": (3, {}),
    "DDP, unused": (0, {"torch.Tensor.grad_fn used them": 3}),
    "DDP, unused, loss in forward": (3, {}),
    "DDP, static": (2, {"torch.Tensor.grad_fn used them": 1}),
    "DDP, static, loss in forward": (3, {}),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return [json.loads((folder / f"report{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", EXPECTED)
def test_two_processes(name, two_processes):
    """Losses, weights, logits that are looked at and their gradient; what is left of logits after a step."""
    for report in two_processes:
        apart, fused, computed, old = report[name]
        assert apart == [] and (fused, computed) == EXPECTED[name]
        assert "before that, or convert without loss" in old or (fused == 0 and old == "computed")

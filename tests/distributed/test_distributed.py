"""Converted models on two processes (gloo): DDP and FSDP2 against one process with the same model unconverted."""

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

COMMON = """
import copy, traceback
import torch, torch.distributed as dist
import torch.nn.functional as F
import fused_ops
from fused_ops.conversion import head as limits
from test_convert import network
from tests.distributed.processes import finish, run as start_all, start

def train(model, x, y, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

def check(run, rank):
    torch.manual_seed(7)
    x, y = torch.randn(8, 3, 10, 10), torch.randint(0, 4, (8,))
    mine = slice(4 * rank, 4 * rank + 4)
    results = [run(converted, x[mine], y[mine]) for converted in (False, True)]
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
    parts = [torch.empty_like(results[1]["7.weight"]) for _ in range(2)]
    dist.all_gather(parts, results[1]["7.weight"].contiguous())
    assert torch.equal(*parts)
    assert len(results[0]) == 40  # parameters and buffers

def worker(rank, port):
    start(rank, port)
    problems, ordinary = {}, limits.SMALL_BYTES
    for name, code in WAYS.items():
        limits.SMALL_BYTES = 0 if "head" in name else ordinary
        try:
            space = dict(globals())
            exec(code, space)
            check(space["run"], rank)
            problems[name] = ""
        except BaseException:
            problems[name] = traceback.format_exc()
        dist.barrier()
    finish(f"problems{rank}", problems)

if __name__ == "__main__":
    start_all(worker)
"""
DDP = """
def run(converted, x, y):
    model = network()
    if converted:
        report = fused_ops.convert(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    train(parallel, x, y)
    return {name: t.detach() for name, t in model.state_dict().items()}
"""
FSDP = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def run(converted, x, y):
    model = network()
    if converted:
        report = fused_ops.convert(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in (model[3], model[4]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, x, y)
    if converted:
        try:
            fused_ops.revert(model)
        except RuntimeError as error:
            assert "after the conversion" in str(error)
        else:
            raise AssertionError("revert of a sharded model must say that it cannot")
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
    return {name: t.detach() for name, t in full.items()}
"""


HEAD = """
def run(converted, x, y):
    model = network()
    if converted:
        fused_ops.convert(model, loss=F.cross_entropy)
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=UNUSED)
    train(parallel, x, y)
    assert not converted or model.eval()(x)._state.real is None
    return {name: t.detach() for name, t in model.state_dict().items()}
"""
FSDP_HEAD = FSDP.replace("convert(model)", "convert(model, loss=F.cross_entropy)")
WAYS = {
    "DDP": DDP,
    "FSDP2": FSDP,
    "DDP with the head": HEAD.replace("UNUSED", "False"),
    "DDP with the head, unused parameters": HEAD.replace("UNUSED", "True"),
    "FSDP2 with the head": FSDP_HEAD,
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What went wrong on each process, by way."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "script.py").write_text(f"WAYS = {WAYS!r}\n{COMMON}")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "conversion")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"problems{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes(way, two_processes):
    assert [found[way] for found in two_processes] == ["", ""]

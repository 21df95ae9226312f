"""examples/train_parallel.py: each way of spreading the work computes, step for step, what one process does."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)
slow = pytest.mark.slow
WAYS = [
    pytest.param("resnet", "data", 2, marks=slow),
    pytest.param("resnet", "sharded", 2, marks=slow),
    pytest.param("llama", "data", 2, marks=slow),
    pytest.param("llama", "sharded", 2, marks=slow),
    pytest.param("llama", "tensor", 2, marks=slow),
    pytest.param("llama", "sequence", 2),
    pytest.param("llama", "both", 4, marks=slow),
]


def run(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["-m", "examples.train_parallel", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("model, way, processes", WAYS)
def test_as_one_process(model, way, processes):
    if model == "llama":
        pytest.importorskip("transformers")
    result = run(processes, "--model", model, "--parallel", way, "--steps", "3", "--tolerance", "1e-5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "largest difference of losses, weights and buffers" in result.stdout


@pytest.mark.slow
def test_it_fails_where_the_numbers_differ():
    """A tolerance that nothing meets: the comparison is a real one."""
    result = run(1, "--model", "resnet", "--steps", "1", "--tolerance", "0")
    assert result.returncode != 0 and "largest difference" in result.stdout

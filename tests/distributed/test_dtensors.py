"""DTensors as arguments, on meshes of processes: against one process, PyTorch, and float64 formulas."""

import sys

import pytest
import torch

from tests.distributed import processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

CASES = [
    "one_dimension_of_the_mesh",
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return processes.problems_of("tests.distributed.dtensor_cases", 2, tmp_path_factory.mktemp("dtensors"))


@pytest.mark.parametrize("name", CASES)
def test_in_two_processes(name, two_processes):
    assert two_processes[name] == []

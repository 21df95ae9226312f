"""Linear cross-entropy whose classes or rows are spread over processes: against one process, and float64 formulas."""

import json
import sys

import pytest
import torch
from conftest import run_python

from tests.distributed import processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

CASES = [
    "options_and_targets",
    "sums_in_the_forward",
    "arguments_that_all_have",
    "outputs_and_what_is_retained",
    "rows_of_the_input_on_each_rank",
    "several_positions",
    "derivatives_of_derivatives",
    "rows_of_a_mean_on_each_rank",
    "errors",
    "compiled_as_one_graph",
    "memory",
]
MODULE = "tests.distributed.head_shard_cases"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return processes.problems_of(MODULE, 2, tmp_path_factory.mktemp("head_shards"))


@pytest.mark.parametrize("name", CASES)
def test_in_two_processes(name, two_processes):
    assert two_processes[name] == []


def test_every_case_is_here(two_processes):
    assert sorted(two_processes) == sorted(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_in_more_processes(world, tmp_path):
    assert {name: found for name, found in processes.problems_of(MODULE, world, tmp_path).items() if found} == {}

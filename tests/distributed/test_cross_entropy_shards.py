"""Cross-entropy whose classes or rows are spread over processes: against one process, and float64 formulas."""

import sys

import pytest
import torch

from tests.distributed import processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

CASES = [
    "options_and_targets",
    "outputs",
    "replicated_arguments_have_whole_gradients",
    "second_derivatives",
    "row_groups",
    "bad_targets_raise_on_all_ranks",
    "compiled_as_one_graph",
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return processes.problems_of("tests.distributed.shard_cases", 2, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", CASES)
def test_in_two_processes(name, two_processes):
    assert two_processes[name] == []

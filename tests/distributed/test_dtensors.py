"""DTensors as arguments, on meshes of processes: against one process, PyTorch, and float64 formulas."""

import functools
import sys
from contextlib import ExitStack

import pytest
import torch

from tests.distributed.processes import Pool, cases_of, run_case

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

CASES = [
    "one_dimension_of_the_mesh",
    "two_dimensions_of_the_mesh",
    "outputs",
    "one_example",
    "as_pytorch_where_it_has_the_case",
    "derivatives",
    "compiled",
    "errors",
    "heads",
    "shifted_targets",
    "heads_at_several_positions",
    "heads_with_main_grad",
    "heads_on_two_dimensions_of_the_mesh",
    "models",
    "models_on_two_dimensions_of_the_mesh",
    "deferred_heads",
    "deferred_heads_of_rows_that_are_gathered",
    "deferred_heads_are_dtensors_to_all_else",
    "heads_in_autocast",
    "compiled_heads",
    "batch_norms",
    "synchronised_batch_norms",
    "batch_norm_keeps_the_memory_format",
]
WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))]


MODULE = "tests.distributed.dtensor_cases"


@pytest.fixture(scope="module")
def pools():
    """By the number of processes, from the first test on that asks."""
    with ExitStack() as stack:
        yield functools.cache(lambda world: stack.enter_context(Pool(world)))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_dtensors(name, world, pools):
    pools(world).run(run_case, MODULE, name)


def test_every_case_is_known_here(pools):
    assert pools(2).run(cases_of, MODULE) == [sorted(CASES)] * 2

"""Cross-entropy whose classes or rows are spread over processes: against one process, and float64 formulas."""

import sys

import pytest
import torch

import fused_ops
from fused_ops.distributed import collectives
from tests.distributed.processes import Pool, cases_of, run_case

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

CASES = [
    "options_and_targets",
    "outputs",
    "replicated_arguments_have_whole_gradients",
    "second_derivatives",
    "row_groups",
    "a_mesh_of_classes_and_rows",
    "bad_targets_raise_on_all_ranks",
    "compiled_as_one_graph",
    "derivatives_by_finite_differences",
    "transforms",
    "a_group_of_one_rank",
    "masks_and_shapes",
    "the_backward_writes_over_the_logits",
    "modules",
    "checkpointed",
    "what_many_ranks_do",
    "what_empty_says_is_about_all_ranks",
    "wrong_arguments_raise_before_a_collective",
]


MODULE = "tests.distributed.shard_cases"


@pytest.fixture(scope="module")
def two_processes():
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="module", params=[3, 4])
def more_processes(request):
    with Pool(request.param) as pool:
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_in_two_processes(name, two_processes):
    two_processes.run(run_case, MODULE, name)


def test_every_case_is_known_here(two_processes):
    assert two_processes.run(cases_of, MODULE) == [sorted(CASES)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_in_more_processes(name, more_processes):
    more_processes.run(run_case, MODULE, name)


@pytest.fixture
def group_of_1024(monkeypatch):
    """A group of ranks that all have what this one has; and of each collective its kind and a rank's bytes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen, gather, reduce = [], collectives._all_gather, torch.distributed.all_reduce

    def noted_gather(output, input, **options):
        work = gather(output, input, **options)
        output.view(1024, -1)[:] = input
        seen.append(("gather", input.nbytes))
        return work

    def noted_reduce(input, op, **options):
        seen.append(("max" if op == torch.distributed.ReduceOp.MAX else "sum", input.nbytes))
        return reduce(input, op, **options)

    monkeypatch.setattr(collectives, "_all_gather", noted_gather)
    monkeypatch.setattr(torch.distributed, "all_reduce", noted_reduce)
    torch.distributed.init_process_group("fake", rank=3, world_size=1024, store=FakeStore())
    yield seen
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("many", [True, False])
def test_what_a_call_sends(many, group_of_1024, monkeypatch):
    """One gather, or of many ranks maxima and sums; the backward sends nothing."""
    if not many:
        monkeypatch.setattr(collectives, "MANY_RANKS", 1025)
    group, rows = torch.distributed.group.WORLD, 5
    x, target = torch.randn(rows, 4, requires_grad=True), torch.tensor([3, 1024 * 4 - 1, 13, -100, 12])
    where = {"class_group": group, "class_start": 12, "classes": 4 * 1024}
    row = rows * 8
    parts = [("max", 3 * row), ("sum", 9 * row)] if many else [("gather", 7 * row)]
    with_outputs = [*parts, ("max", row)] if many else [("gather", 9 * row)]
    calls = (
        ({**where}, parts),
        ({**where, "return_outputs": True, "label_smoothing": 0.1}, with_outputs),
        ({"class_group": group}, [("gather", 8), *parts]),  # the sizes first
        ({**where, "row_group": group}, [("gather", 2 * 8), *parts]),
        ({**where, "class_mask": torch.rand(4 * 1024) > 0.1, "label_smoothing": 0.1}, parts),
        ({**where, "class_mask": torch.ones(rows, 4) > 0, "label_smoothing": 0.1}, [("gather", row), *parts]),
    )
    for options, expected in calls:
        loss = fused_ops.cross_entropy(x, target, **options)
        loss = loss.loss if isinstance(loss, tuple) else loss
        assert group_of_1024 == expected
        torch.autograd.grad(loss, x)
        assert group_of_1024 == expected  # none in the backward
        group_of_1024.clear()
    fused_ops.cross_entropy(x, target.clamp(max=3), row_group=group).backward()
    assert group_of_1024 == [("gather", 2 * 8)]

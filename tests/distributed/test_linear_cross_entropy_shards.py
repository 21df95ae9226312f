"""Linear cross-entropy whose classes or rows are spread over processes: against one process, and float64 formulas."""

import json
import sys

import pytest
import torch

from tests.distributed.processes import Pool, cases_of, run_case

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
    "sums_of_16_bits",
    "scattered_sums_are_in_the_order_of_ranks",
    "checkpointed",
    "main_grads",
    "padded_rows_of_logits_have_the_same_bits",
    "what_many_ranks_do",
    "memory",
]
SLOW = ["transforms", "compiled_as_one_graph", "classes_and_rows_on_a_mesh"]  # imports take long, or of 4 processes
MODULE = "tests.distributed.head_shard_cases"


@pytest.fixture(scope="module")
def two_processes():
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="module", params=[3, 4])
def more_processes(request):
    with Pool(request.param) as pool:
        yield pool


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_in_two_processes(name, two_processes):
    two_processes.run(run_case, MODULE, name)


def test_every_case_is_known_here(two_processes):
    assert two_processes.run(cases_of, MODULE) == [sorted([*CASES, *SLOW])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *SLOW])
def test_in_more_processes(name, more_processes):
    more_processes.run(run_case, MODULE, name)


COUNT = """
import json, sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import fused_ops
from fused_ops.distributed import collectives
from fused_ops.ops.linear_cross_entropy import by_rows

RANKS, ROWS, CLASSES, FEATURES = 1024, 100, 4, 600
collectives.MANY_RANKS = int(sys.argv[1])
dist.init_process_group("fake", rank=3, world_size=RANKS, store=FakeStore())
events, product, gather, reduce = [], by_rows.product, collectives._all_gather, dist.all_reduce
exchange = dist.all_to_all_single

class Work:
    def wait(self):
        events.append("wait")

def noted_product(*args):
    events.append("product")
    return product(*args)

def noted_gather(output, input, **options):
    events.append(["gather", input.nbytes])
    gather(output, input, **options)
    return Work()

def noted_reduce(input, op=None, **options):
    events.append(["max" if op == dist.ReduceOp.MAX else "sum", input.nbytes])
    reduce(input, **options)
    return Work()

def noted_exchange(output, input, *sizes, **options):
    events.append(["exchange", input.nbytes, output.nbytes])
    return exchange(output, input, *sizes, **options)

by_rows.product, collectives._all_gather, collectives.dist.all_reduce = noted_product, noted_gather, noted_reduce
collectives.dist.all_to_all_single = noted_exchange
x = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
w = torch.randn(CLASSES, FEATURES, dtype=torch.bfloat16, requires_grad=True)
target = torch.randint(0, CLASSES * RANKS, (ROWS,))
target[:10] = -100
where = {"class_group": dist.group.WORLD, "class_start": 3 * CLASSES, "classes": CLASSES * RANKS}
found = {}
for name, options in {
    "mean": where,
    "sizes": {"class_group": dist.group.WORLD},
    "rows apart": {**where, "return_outputs": True},
    "mask of rows": {**where, "class_mask": torch.ones(ROWS, CLASSES).bool(), "label_smoothing": 0.1},
}.items():
    events.clear()
    out = fused_ops.linear_cross_entropy(x, w, target, chunk_rows=60, **options)
    forward = list(events)
    events.clear()
    (out.loss if name == "rows apart" else out).backward()
    found[name] = forward, [e for e in events if e not in ("product", "wait")]
events.clear()
options = {**where, "sequence_parallel": True, "chunk_rows": RANKS}
loss = fused_ops.linear_cross_entropy(x[:2], w, target.repeat(21)[: 2 * RANKS], **options)
forward = [e for e in events if e not in ("product", "wait")]
events.clear()
loss.backward()
found["rows of each"] = forward, events
print(json.dumps(found))
"""


def test_what_1024_ranks_gather(run_python):
    """One gather a chunk, which travels while the next product is computed, and one sum of the input's gradient."""
    found = json.loads(run_python("-c", COUNT, "1025").stdout)
    of_row, hidden = 7 * 8, ["sum", 100 * 600 * 4]
    in_chunks = ["product", ["gather", 30 * of_row]]
    for _ in range(2):
        in_chunks += ["product", ["gather", 30 * of_row], "wait"]
    assert found["mean"] == [[*in_chunks, "wait"], [hidden]]
    assert found["sizes"] == [[["gather", 8], "wait", *in_chunks, "wait"], [hidden]]
    gathered = [e for e in found["rows apart"][0] if e not in ("product", "wait")]
    assert gathered == [["gather", rows * 9 * 8] for rows in (30, 30, 30, 10)]
    assert found["rows apart"][1] == [hidden]
    sizes, features = ["gather", 8], 600 * 2
    of_chunks = [["gather", rows * of_row] for rows in (512, 512, 512, 302)]  # 210 are ignored
    exchanged = ["exchange", 2048 * features, 1024 * 2 * features]  # sent and received: once the hidden states
    assert found["rows of each"] == [[sizes, ["gather", 2 * features], *of_chunks], [exchanged]]
    gathered = [e for e in found["mask of rows"][0] if e not in ("product", "wait")]
    assert gathered == [["gather", 100 * 8], *(["gather", 30 * of_row] for _ in range(3))]


def test_what_1024_ranks_reduce(run_python):
    """Maxima of a chunk, which travel while the next product is computed, then sums."""
    found = json.loads(run_python("-c", COUNT, "64").stdout)
    hidden, maxima, sums = ["sum", 100 * 600 * 4], ["max", 30 * 3 * 8], ["sum", 30 * 9 * 8]
    in_chunks = ["product", maxima]
    for _ in range(2):
        in_chunks += ["product", maxima, "wait", sums]
    assert found["mean"] == [[*in_chunks, "wait", sums], [hidden]]
    reduced = [e for e in found["rows apart"][0] if e not in ("product", "wait")]
    most, classes = (lambda rows: ["max", rows * 3 * 8]), (lambda rows: ["max", rows * 8])
    rest = [e for rows in (30, 30, 30, 10) for e in (["sum", rows * 9 * 8], classes(rows))]
    assert sorted(map(str, reduced)) == sorted(map(str, [*rest, *map(most, (30, 30, 30, 10))]))
    assert found["rows apart"][1] == [hidden]

"""Batch norm over the ranks of a process group (gloo) against float64 formulas on the whole batch.

The functions before the fixtures run on each rank; the tests compare what they return.
"""

import copy
import itertools
import pickle
import sys
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import pairs_or_all, pairwise
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.distributed import collectives
from fused_ops.ops.batch_norm import activations, ranks, ranks_reference, reference
from tests.distributed.processes import Pool

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"),
    pytest.mark.xdist_group("sync_batch_norm"),
]

EPS = 1e-5
SHAPES = {"rows": (9, 5), "length": (7, 3, 6), "image": (6, 4, 3, 5), "large image": (5, 2, 40, 30)}
LAYOUTS = ("contiguous", "channels last", "every second")
# How many batch entries each of two, three and four ranks has.
SPLITS = {"uneven": (2, None), "empty": (0, None), "one": (None, 1), "three": (1, 0, None), "four": (0, 1, None, 2)}


def bounds(split, batch):
    """(begin, end) of each rank's part; None in a split is what is left."""
    known = sum(n for n in split if n is not None)
    sizes = [batch - known if n is None else n for n in split]
    ends = list(itertools.accumulate(sizes))
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def values(shape, dtype, seed, residual=False, masked=False):
    """The whole batch: input, weight, bias, upstream gradient, residual, valid; means that are far apart from 0."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(*shape) * 2 + 3 * draw(*shape[:2], *[1] * (len(shape) - 2))
    weight, bias = draw(shape[1]), draw(shape[1])
    tensors = [t.to(dtype) for t in (x, weight, bias, draw(*shape), draw(*shape))]
    valid = draw(shape[0], *shape[2:]) > -0.7 if masked else None
    return *tensors[:4], tensors[4] if residual else None, valid


def laid_out(t, layout):
    if layout == "channels last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return torch.stack([t, t + 1], -1)[..., 0] if layout == "every second" else t.contiguous()


def batch_norm_of_part(case, again=1):
    """What a rank finds, ``again`` times with the same bits."""
    shape, dtype, layout, activation, residual, masked, split, seed = case
    begin, end = bounds(split, shape[0])[dist.get_rank()]
    x, weight, bias, grad, other, valid = values(shape, dtype, seed, residual, masked)
    results = []
    for _ in range(again):
        mine = [laid_out(t[begin:end], layout).detach().requires_grad_() for t in (x, other) if t is not None]
        params = [t.clone().requires_grad_() for t in (weight, bias)]
        running = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
        output = fused_ops.batch_norm(
            *(mine[0], *running, *params, True, 0.3, EPS),
            activation=activation, residual=mine[1] if residual else None, negative_slope=0.2,
            valid=None if valid is None else valid[begin:end], group=dist.group.WORLD,
        )  # fmt: skip
        output.backward(laid_out(grad[begin:end], layout))
        last = [t.is_contiguous(memory_format=torch.channels_last) for t in (mine[0], output) if t.dim() == 4]
        assert len(set(last)) <= 1 or layout == "every second" or end - begin < 2
        found = [output.detach(), *(t.grad for t in mine), *(t.grad for t in params), *running]
        results.append([t.contiguous() for t in found])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    return results[0]


def cases_of_parts(cases):
    return [batch_norm_of_part(case, again=2) for case in cases]


def whole_batch(seed=0, shape=(7, 3, 4), rows=(0, None)):
    """float64 leaves (input, weight, bias, residual) of these batch entries, and two tensors of the input's shape."""
    x, weight, bias, grad, other, _ = values(shape, torch.float64, seed, residual=True)
    generator = torch.Generator().manual_seed(seed + 100)
    tangent = torch.randn(shape, generator=generator, dtype=torch.float64)
    here = slice(*rows)
    leaves = [t.clone().requires_grad_() for t in (x[here], weight, bias, other[here])]
    return leaves, grad[here], tangent[here]


def second_derivatives(leaves, grad, tangent, function):
    """Of <gradients, directions>, where the directions of weight and bias are fixed; any number of ranks."""
    grads = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
    directions = tangent, torch.linspace(-1, 2, 3).double(), torch.linspace(3, 1, 3).double(), tangent.flip(-1)
    total = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    second = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
    third = torch.autograd.grad(second[0].square().sum(), leaves[:1])
    return [t.detach() for t in (*grads, *second, *third)]


def tangents(leaves, grad, tangent, function):
    """Of the output, and of the gradients (forward over reverse)."""
    directions = tangent, torch.linspace(-1, 2, 3).double(), torch.linspace(3, 1, 3).double(), tangent.flip(-1)
    values_of = [t.detach() for t in leaves]
    output = torch.func.jvp(function, tuple(values_of), directions)

    def gradients(*at):
        return torch.func.vjp(function, *at)[1](grad)

    return [*output, *torch.func.jvp(gradients, tuple(values_of), directions)[1]]


def call_of(activation, group=None):
    def function(x, weight, bias, other):
        options = {"activation": activation, "residual": other, "negative_slope": 0.2}
        return fused_ops.batch_norm(x, None, None, weight, bias, True, 0.1, EPS, group=group, **options)

    return function


def derivatives_of_part(activation, split):
    here = bounds(split, 7)[dist.get_rank()]
    function = call_of(activation, dist.group.WORLD)
    return second_derivatives(*whole_batch(rows=here), function) + tangents(*whole_batch(rows=here), function)


def compiled_part():
    """Eager and compiled results of a module, with what both wrote; without a graph break."""
    begin, end = bounds((3, None), 8)[dist.get_rank()]
    torch.manual_seed(3)
    data = torch.randn(8, 4, 3, 3)[begin:end]
    found = []
    for compiles in (False, True):
        module = fused_ops.SyncBatchNorm(4, activation="silu")
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiles else module
        for _ in range(2):
            x, other = data.clone().requires_grad_(), data.flip(0).clone().requires_grad_()
            output = run(x, residual=other)
            output.square().sum().backward()
        found.append([output.detach(), x.grad, other.grad, module.weight.grad, *module.buffers()])
    return found


def errors_of_rank():
    """What a rank raises, in calls where all ranks raise alike; a right call ends it."""
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.randn(4, 3, requires_grad=True)
    stats = torch.zeros(3), torch.ones(3)
    found = {}

    def note(name, *args, **options):
        try:
            fused_ops.batch_norm(*args, **options)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    one = torch.randn(1, 3) if rank == 0 else torch.randn(0, 3)
    note("one value", one, *stats, training=True, group=group)
    note("groups", x, *stats, training=True, groups=2, group=group)
    note("no group", x, *stats, training=True, group="world")
    note("weight", x, *stats, torch.ones(2), training=True, group=group)
    note("mixed", x, *stats, torch.ones(3).double(), training=True, group=group)
    note("eps", x, *stats, training=True, eps=0.0, group=group)
    note("activation", x, *stats, training=True, activation="mish", group=group)
    note("dimensions", torch.randn(4), *stats, training=True, group=group)
    note("empty", torch.empty(0), None, None, training=True, group=group)
    note("device", x, torch.zeros(3, device="meta"), torch.ones(3, device="meta"), training=True, group=group)
    note("residual", x, *stats, training=True, residual=x[1:], group=group)
    call = lambda t: fused_ops.batch_norm(t, None, None, training=True, group=group)  # noqa: E731
    for name, transform in {
        "vmap": lambda: torch.func.vmap(call)(torch.randn(2, 4, 3)),
        "functionalize": lambda: torch.func.functionalize(call)(torch.randn(4, 3)),
        "trace": lambda: torch.jit.trace(call, torch.randn(4, 3)),
        "second forward level": lambda: torch.func.jvp(
            lambda t: torch.func.jvp(call, (t,), (t,))[1], (torch.randn(4, 3),), (torch.randn(4, 3),)
        ),
    }.items():
        try:
            transform()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    untouched = torch.equal(stats[0], torch.zeros(3)) and torch.equal(stats[1], torch.ones(3))
    assert call(x).sum().isfinite() and untouched
    return found


def modules_of_rank():
    """Modules on this rank's part of three batches: what they return in training and evaluation, and their state."""
    rank, found = dist.get_rank(), {}
    kinds = {
        "ordinary": {},
        "cumulative": {"momentum": None},
        "no running statistics": {"track_running_stats": False},
        "not affine": {"affine": False},
        "frozen": {"frozen": True},
        "correction": {"correction": 1},
        "inplace_activated": {"activation": "leaky_relu", "inplace_activated": True},
    }
    for name, options in kinds.items():
        module = fused_ops.SyncBatchNorm(3, **options).double()
        outputs = []
        for batch in batches():
            begin, end = bounds((2, None), len(batch))[rank]
            outputs.append(module(batch[begin:end]).detach())
        with mock.patch.object(collectives, "_all_gather", side_effect=AssertionError("communication")):
            module.eval()
            outputs.append(module(batches()[0]).detach())
            nested = copy.deepcopy(module)
        found[name] = outputs, {k: v.clone() for k, v in nested.state_dict().items()}
    return found


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 3, 4, generator=generator, dtype=torch.float64) + n for n in (5, 7, 3)]


def checkpointed():
    module = fused_ops.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    checkpoint(module, x, use_reentrant=False).sum().backward()
    before = module.running_mean.clone()
    fresh = fused_ops.SyncBatchNorm(3)
    fresh(x)
    return torch.equal(before, fresh.running_mean), int(module.num_batches_tracked)


class Residual(nn.Module):
    """A part of a convolutional network with what convert fuses, and an nn.SyncBatchNorm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4), nn.SiLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 25, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 2))

    def forward(self, x):
        x = self.first(x)
        return self.head(x + self.second(x))


def steps(model, x, y, share=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") * share).backward()
        optimizer.step()


def train_in_parallel():
    begin, end = bounds((3, None), 8)[dist.get_rank()]
    torch.manual_seed(11)
    x, y = torch.randn(8, 3, 5, 5, dtype=torch.float64), torch.arange(8) % 2
    torch.manual_seed(12)
    model = Residual().double()
    report = str(fused_ops.convert(model, sync_batch_norm=True))
    parallel = nn.parallel.DistributedDataParallel(model)
    steps(parallel, x[begin:end], y[begin:end], share=dist.get_world_size())
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return report, state, str(fused_ops.report(model)), sorted(fused_ops.revert(model)), repr(model)


def subgroups():
    """Every rank in a group of one, which is ordinary batch norm; and, from three ranks on, the first two together."""
    rank, x = dist.get_rank(), torch.randn(5, 3) + dist.get_rank()
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())]
    module, plain = fused_ops.SyncBatchNorm(3, process_group=alone[rank]), fused_ops.BatchNorm1d(3)
    assert torch.equal(module(x), plain(x)) and torch.equal(module.running_var, plain.running_var)
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="pickle"):
            refused(module)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    fused_ops.convert(model, sync_batch_norm=alone[rank], sample=x)
    assert model[0].synchronised is alone[rank]
    if rank > 0:
        with pytest.raises((TypeError, ValueError), match="group"):
            fused_ops.batch_norm(x, None, None, training=True, group=alone[0])
    if dist.get_world_size() < 3:
        return
    pair = dist.new_group([0, 1])
    if rank < 2:
        together = fused_ops.batch_norm(x.double(), None, None, training=True, group=pair)
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x, group=pair)
        both = fused_ops.batch_norm(torch.cat(parts).double(), None, None, training=True)
        torch.testing.assert_close(together, both[5 * rank : 5 * rank + 5])


# ---- float64 formulas on the whole batch


def truth(x, weight, bias, other, valid, activation):
    """(output, mean, unbiased variance) of ordinary PyTorch operations in float64."""
    dims = [d for d in range(x.dim()) if d != 1]
    keep = torch.ones_like(x) if valid is None else valid.unsqueeze(1).expand_as(x).to(x.dtype)
    count = keep.sum(dims, keepdim=True)
    mean = (x * keep).sum(dims, keepdim=True) / count
    square = ((x - mean).square() * keep).sum(dims, keepdim=True)
    shape = (1, -1, *[1] * (x.dim() - 2))
    z = (x - mean) / (square / count + EPS).sqrt() * weight.view(shape) + bias.view(shape)
    z = z if other is None else z + other
    return activations.function_of(activations.CODES[activation], 0.2, 1.0)(z) * keep, mean, square / (count - 1)


def expected(case):
    shape, dtype, _, activation, residual, masked, _, seed = case
    x, weight, bias, grad, other, valid = values(shape, dtype, seed, residual, masked)
    leaves = [t.double().requires_grad_() for t in (x, other, weight, bias) if t is not None]
    x, *others, weight, bias = leaves
    output, mean, var = truth(x, weight, bias, others[0] if others else None, valid, activation)
    output.backward(grad.double())
    momentum = 0.3
    running = momentum * mean.flatten(), momentum * var.flatten() + (1 - momentum)
    return [t.detach() for t in (output, *(leaf.grad for leaf in leaves), *running)]


def check_case(case, found):
    """``found``: of each rank. Whole tensors are joined, the gradients of weight and bias added."""
    truths, dtype = expected(case), case[1]
    elementwise = 3 if case[4] else 2
    unit = torch.finfo(dtype).eps
    for i, (parts, right) in enumerate(zip(zip(*found, strict=True), truths, strict=True)):
        if i < elementwise:
            mine = torch.cat(parts)
        elif i < elementwise + 2:
            mine = torch.stack([p.double() for p in parts]).sum(0)
        else:
            mine = parts[0]
            assert all(torch.equal(mine, p) for p in parts), (case, i)
        assert mine.dtype == (torch.float64 if elementwise <= i < elementwise + 2 else dtype)
        scale = max(1.0, float(right.abs().max()))
        if elementwise <= i < elementwise + 2:  # each part is rounded, and may be larger than their sum
            scale = max(scale, *(float(p.abs().max()) for p in parts))
        error = (mine.double() - right).abs().max() / scale if right.numel() else 0.0
        units = {2: 4, 4: 40, 8: 400}[dtype.itemsize]  # what is right is of float64 itself: sums of 12,000 values
        assert error <= units * unit, (case, i, float(error) / unit)


@pytest.fixture(scope="module")
def two():
    with Pool(2) as pool:
        yield pool


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AXES = (
    SHAPES.values(), DTYPES, LAYOUTS, (None, "relu", "leaky_relu", "silu"), (False, True), (False, True),
)  # fmt: skip


def cases(choose, splits):
    return [(*case, SPLITS[split], seed) for seed, (*case, split) in enumerate(choose(*AXES, splits))]


@pairs_or_all
def test_two_ranks_find_what_one_process_does(two, choose):
    chosen = cases(choose, ("uneven", "empty", "one"))
    for case, *found in zip(chosen, *two.run(cases_of_parts, chosen), strict=True):
        check_case(case, found)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "split"), [(3, "three"), (4, "four")])
def test_more_ranks_find_what_one_process_does(world, split):
    with Pool(world) as pool:
        chosen = cases(pairwise, (split,))
        for case, *found in zip(chosen, *pool.run(cases_of_parts, chosen), strict=True):
            check_case(case, found)
        pool.run(subgroups)


@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
def test_derivatives_of_any_order(two, activation):
    """First, second and third, and tangents of the output and of the gradients, as of one process."""
    split = (3, None)
    leaves, grad, tangent = whole_batch()
    function = call_of(activation)
    right = second_derivatives(leaves, grad, tangent, function) + tangents(*whole_batch(), function)
    found = two.run(derivatives_of_part, activation, split)
    assert len(right) == len(found[0]) == 15
    for i, (whole, *parts) in enumerate(zip(right, *found, strict=True)):
        mine = torch.cat(parts) if whole.dim() > 1 else sum(parts)
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")


def test_derivatives_where_a_rank_has_nothing(two):
    right = second_derivatives(*whole_batch(), call_of("silu")) + tangents(*whole_batch(), call_of("silu"))
    for whole, *parts in zip(right, *two.run(derivatives_of_part, "silu", (0, None)), strict=True):
        torch.testing.assert_close(torch.cat(parts) if whole.dim() > 1 else sum(parts), whole, rtol=1e-9, atol=1e-9)


def test_compiled_without_a_break(two):
    for eager, compiled in two.run(compiled_part):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b)


def test_errors_come_on_all_ranks_and_leave_the_group_usable(two):
    here, there = two.run(errors_of_rank)
    assert list(here) == list(there)
    for name, start in {
        "one value": "ValueError: Expected more than 1 value per channel when training, got 1 on all ranks together",
        "groups": "ValueError: batch_norm: expected groups to be 1 with group",
        "no group": "TypeError: batch_norm(): argument 'group' must be a torch.distributed.ProcessGroup or None",
        "weight": "RuntimeError: weight should contain 3 elements not 2",
        "mixed": "RuntimeError: batch_norm: mixed dtype",
        "eps": "ValueError: batch_norm eps must be positive during training",
        "activation": "ValueError: batch_norm: expected activation to be None or one of",
        "dimensions": "IndexError: batch_norm: input must be (batch, channels, ...)",
        "empty": "IndexError: batch_norm: input must be (batch, channels, ...)",
        "device": "RuntimeError: Expected all tensors to be on the same device",
        "residual": "RuntimeError: batch_norm: expected residual of input's shape",
        "vmap": "NotImplementedError: batch_norm: vmap with a group is not supported",
        "functionalize": "NotImplementedError: batch_norm: group is not supported",
        "trace": "NotImplementedError: batch_norm: group is not supported",
        "second forward level": "NotImplementedError: batch_norm: group is not supported",
    }.items():
        assert here.pop(name).startswith(start), name
        assert there[name].startswith(start), name
    assert here == {}


def test_modules_are_pytorchs_on_the_whole_batch(two):
    options = {
        "ordinary": {},
        "cumulative": {"momentum": None},
        "no running statistics": {"track_running_stats": False},
        "not affine": {"affine": False},
    }
    results = two.run(modules_of_rank)
    for name, made in options.items():
        module, rights = nn.BatchNorm1d(3, **made).double(), []
        rights = [module(batch).detach() for batch in batches()]
        module.eval()
        outputs = [torch.cat(parts) for parts in zip(*(r[name][0][:-1] for r in results), strict=True)]
        for mine, right in zip(outputs, rights, strict=True):
            torch.testing.assert_close(mine, right)
        for result in results:
            torch.testing.assert_close(result[name][0][-1], module(batches()[0]).detach())
            assert list(result[name][1]) == list(module.state_dict())
            for key, value in module.state_dict().items():
                torch.testing.assert_close(result[name][1][key], value)
                assert torch.equal(result[name][1][key], results[0][name][1][key])
    frozen = results[0]["frozen"][1]
    assert torch.equal(frozen["running_mean"], torch.zeros(3).double()) and int(frozen["num_batches_tracked"]) == 0
    leaky = fused_ops.BatchNorm1d(3, activation="leaky_relu").double()
    for name, module in (("inplace_activated", leaky), ("correction", fused_ops.BatchNorm1d(3, correction=1).double())):
        parts = [torch.cat(p) for p in zip(*(r[name][0][:-1] for r in results), strict=True)]
        for mine, batch in zip(parts, batches(), strict=True):
            torch.testing.assert_close(mine, module(batch).detach())


def test_checkpointing_counts_a_batch_once(two):
    assert two.run(checkpointed) == [(True, 1), (True, 1)]


def test_ddp_of_a_converted_model_trains_as_one_process(two):
    torch.manual_seed(11)
    x, y = torch.randn(8, 3, 5, 5, dtype=torch.float64), torch.arange(8) % 2
    torch.manual_seed(12)
    model = Residual()
    original = repr(model)
    model.second[1] = nn.BatchNorm2d(4)  # PyTorch's synchronised one of one process
    steps(model.double(), x, y)
    results = two.run(train_in_parallel)
    for report, state, later, reverted, text in results:
        assert "fused_ops' BatchNorm2d, synchronised" in report and "fused_ops' SyncBatchNorm, synchronised" in report
        assert "left alone" not in report and "2 of 3 batch norms" in later and ", synchronised" in later
        assert {"first.1", "second.1", "head.2"} < set(reverted) and text == original
        for name, right in model.state_dict().items():
            torch.testing.assert_close(state[name], right, rtol=1e-9, atol=1e-9)
            assert torch.equal(state[name], results[0][1][name])


def test_a_group_of_one_is_ordinary_batch_norm(two):
    two.run(subgroups)


# ---- in this process


def test_without_torch_distributed_it_is_ordinary_batch_norm():
    assert not dist.is_initialized()
    torch.manual_seed(0)
    module, plain = fused_ops.SyncBatchNorm(4, activation="relu"), fused_ops.BatchNorm2d(4, activation="relu")
    x = torch.randn(3, 4, 5, 5)
    residual = torch.randn(3, 4, 5, 5)
    assert torch.equal(module(x, residual), plain(x, residual)) and torch.equal(module.running_var, plain.running_var)
    assert not isinstance(module, nn.SyncBatchNorm) and type(pickle.loads(pickle.dumps(module))) is type(module)
    other = nn.SyncBatchNorm(4)
    other.load_state_dict(module.state_dict())
    module.load_state_dict(other.state_dict())
    assert list(module.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(module.eval()(x), other.eval()(x).relu())
    assert repr(module) == repr(other)[:-1] + ", activation=relu)"
    with pytest.raises(ValueError, match="at least 2D"):
        module(torch.randn(4))
    with pytest.raises(ValueError, match="groups"):
        fused_ops.SyncBatchNorm(4, groups=2)
    with pytest.raises(TypeError, match="process_group"):
        fused_ops.SyncBatchNorm(4, process_group=3)
    assert fused_ops.SyncBatchNorm(4, 1e-5, 0.1, True, True, None, "meta", torch.float64).weight.is_meta


def test_pytorchs_own_conversion_takes_ours():
    made = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fused_ops.SyncBatchNorm(3)))
    assert type(made[0]) is nn.SyncBatchNorm
    with pytest.raises(RuntimeError, match="activation='relu'"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fused_ops.SyncBatchNorm(3, activation="relu")))


def test_fold_takes_it_in_evaluation():
    """As any batch norm; the process group is neither copied nor lost."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        group = torch.distributed.group.WORLD
        x = torch.randn(4, 3, 5, 5)
        for kind in (partial(fused_ops.SyncBatchNorm, process_group=group, activation="relu"), nn.SyncBatchNorm):
            last = fused_ops.SyncBatchNorm(2, process_group=group)
            model = nn.Sequential(nn.Conv2d(3, 6, 3), kind(6), nn.Flatten(), nn.Linear(54, 2), kind(2), nn.Tanh(), last)
            for module in (model[1], model[4], last):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            expected = model.eval()(x)
            folded = fused_ops.fold(model)
            torch.testing.assert_close(folded(x), expected)
            left = [m for m in folded.modules() if isinstance(m, (fused_ops.SyncBatchNorm, nn.SyncBatchNorm))]
            assert len(left) == 1 and left[0].process_group is group and left[0] is not last
            torch.testing.assert_close(
                fused_ops.fold(model[3], model[4])(torch.ones(2, 54)), model[3:5](torch.ones(2, 54))
            )
        with pytest.raises(ValueError, match="evaluation mode"):
            fused_ops.fold(nn.Linear(3, 2), fused_ops.SyncBatchNorm(2))
    finally:
        torch.distributed.destroy_process_group()


def test_convert_without_sync_batch_norm_leaves_pytorchs():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3), fused_ops.BatchNorm1d(3))
    report = fused_ops.convert(model)
    assert [entry.path for entry in report.left] == ["0"] and "sync_batch_norm=True" in report.left[0].reason
    assert type(model[0]) is nn.SyncBatchNorm and not model[1].synchronised
    again = fused_ops.convert(model, sync_batch_norm=True)
    assert [entry.path for entry in again.replaced] == ["0"]
    assert {entry.path: entry.reason.split("; ")[1] for entry in again.left} == {
        "1": "converted already: revert first",
        "2": "write fused_ops.SyncBatchNorm",
    }
    group = model[0].process_group
    fused_ops.revert(model)
    assert type(model[0]) is nn.SyncBatchNorm and model[0].process_group is group
    assert vars(model[0]).keys() == vars(nn.SyncBatchNorm(3)).keys()
    with pytest.raises(TypeError, match="sync_batch_norm"):
        fused_ops.convert(model, sync_batch_norm="world")


@pytest.mark.parametrize("parts", [1, 8, 64])
def test_the_merge_of_many_parts(parts):
    """Far from 0, of unequal sizes, some of them empty; where all is one value, exactly that and no variance."""
    generator = torch.Generator().manual_seed(parts)
    sizes = torch.randint(0, 9, (parts,), generator=generator).tolist()
    sizes[-1] += 2
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) * 1e-3 + torch.tensor([1e6, -3.0, 0.0])
    found = ranks_reference.merge(torch.stack([ranks._moments_op(part, None) for part in x.split(sizes)]))
    exact = x - x.mean(0)
    torch.testing.assert_close(found.mean, x.mean(0) + exact.mean(0), rtol=1e-15, atol=1e-18)
    torch.testing.assert_close(found.m2, (exact - exact.mean(0)).square().sum(0), rtol=1e-7, atol=0)
    assert found.values == found.positions == len(x)
    same = ranks_reference.merge(torch.stack([ranks._moments_op(torch.full((n, 2), 0.1), None) for n in sizes]))
    assert torch.equal(same.mean, torch.full((2,), 0.1).double()) and torch.equal(same.m2, torch.zeros(2).double())


def test_the_merge_of_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    parts = torch.stack([ranks._moments_op(torch.tensor([v]).T, None) for v in ([1.0, 2.0], [inf, 3.0], [])])
    found = ranks_reference.merge(parts)
    assert found.mean == inf and found.m2.isnan()
    assert ranks_reference.merge(parts[2:]).mean.isnan() and ranks_reference.merge(parts[2:]).values == 0
    assert ranks_reference.merge(torch.tensor([[2.0, 2.0, nan, 1.0], [1.0, 1.0, 3.0, 0.0]])).mean.isnan()


def test_merging_has_the_same_bits_with_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(1024, 2 + 2 * 300, generator=generator, dtype=torch.float64) + 1
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append((*ranks_reference.merge(parts), parts.view(1024, 2, -1).sum(0)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


RAW = list(itertools.product(("rows", "length", "image", "large image"), LAYOUTS, DTYPES))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_kernels_of_the_parts_are_their_references(activation):
    code = activations.CODES[activation]
    for i, (name, layout, dtype) in enumerate(RAW):
        shape = SHAPES[name]
        x, weight, bias, grad, other, valid = values(shape, dtype, i, residual=i % 2 == 0, masked=i % 3 == 0)
        x, grad = laid_out(x, layout), laid_out(grad, layout)
        moments = ranks_reference.moments(x, valid)
        near = {2: (1e-6, 1e-6), 4: (1e-6, 1e-9), 8: (1e-12, 1e-9)}[dtype.itemsize]  # 16-bit values less a float32 mean
        torch.testing.assert_close(ranks._moments_op(x, valid), moments, rtol=near[0], atol=near[1])
        found = ranks_reference.merge(moments.unsqueeze(0))
        statistics = torch.stack((found.mean, (found.m2 / found.values + EPS).rsqrt()))
        masks = [None, None]
        if reference.has_mask(other, valid, code):
            masks = [torch.zeros(reference.mask_bytes(x), dtype=torch.uint8) for _ in range(2)]
        calls = (ranks._normalise_op, ranks_reference.normalise)
        outputs = [
            f(statistics, x, weight, bias, code, 0.0, other, m, valid) for f, m in zip(calls, masks, strict=True)
        ]
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}
        torch.testing.assert_close(*outputs, **tolerance)
        assert outputs[0].stride() == outputs[1].stride()
        rest = (grad, x, weight, bias, statistics, code, 0.0, other if masks[0] is None else None, masks[1], valid)
        sums = [f(*rest) for f in (ranks._sums_op, ranks_reference.grad_sums)]
        torch.testing.assert_close(
            *sums, rtol=1e-4 if dtype.itemsize < 8 else 1e-10, atol=1e-3 if dtype.itemsize < 8 else 1e-9
        )
        means = sums[1] / found.values
        written = [torch.empty_like(outputs[0]) for _ in range(2)]
        grads = [
            f(means, to, *rest) for f, to in zip((ranks._gradient_op, ranks_reference.gradient), written, strict=True)
        ]
        torch.testing.assert_close(*grads, **tolerance)
        torch.testing.assert_close(*written, **tolerance)
        assert ranks._gradient_op(None, written[0], *rest).numel() == 0


def test_one_gather_a_direction_for_any_number_of_ranks():
    """A group of 1024 ranks that sends nothing: what is gathered, in calls and in bytes that a rank sends."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1024, store=FakeStore())
    sent, gather = [], collectives._all_gather

    def counted(output, input, **options):
        sent.append(input.nbytes)
        work = gather(output, input, **options)
        output.view(1024, -1).copy_(input)  # as if all ranks had the same
        return work

    try:
        with mock.patch.object(collectives, "_all_gather", counted):
            module = fused_ops.SyncBatchNorm(64)
            x = torch.randn(2, 64, 8, 8, dtype=torch.bfloat16).requires_grad_()
            module.bfloat16()
            output = module(x)
            assert sent == [8 * (2 + 2 * 64)]
            grad = torch.randn_like(output)
            (found,) = torch.autograd.grad(output, x, grad)
            assert sent == [8 * (2 + 2 * 64), 8 * 2 * 64]
            module.eval()
            module(x)
            module.train().frozen = True
            module(x).sum().backward()
            assert len(sent) == 2
    finally:
        dist.destroy_process_group()
        collectives._groups.clear()
    plain = x.detach().clone().requires_grad_()  # 1024 copies of a batch have its statistics and its gradient
    right = fused_ops.batch_norm(plain, None, None, training=True)
    right.backward(grad)
    torch.testing.assert_close(output, right)
    torch.testing.assert_close(found, plain.grad)

"""The raw ops of the CUDA bindings on the CPU: checks, allocation and hand-over, under the public functions."""

import importlib
import os
import random

import pytest
import torch
from cuda_host import OPS
from test_raw_ops import CLEAN, fingerprint, same, spoil, valid_calls
from torch.utils._pytree import tree_flatten, tree_unflatten

import fused_ops
from fused_ops.ops.cross_entropy import functions
from fused_ops.ops.linear_cross_entropy import by_classes
from fused_ops.ops.linear_cross_entropy.by_rows import Plan
from fused_ops.testing import assert_no_worse_than, compare_gradients, samples_of

CALLED_AS = {  # by whom, in the order of OPS
    "cross_entropy": [
        f"cross_entropy.functions.{rows}{name}"
        for rows in ("", "rows_")
        for name in ("forward_op", "backward_op", "backward_inplace_op")
    ]
    + ["cross_entropy.functions._with_gradient_op", "cross_entropy.functions._scale_gradient_op"],
    "linear_cross_entropy": [
        "linear_cross_entropy.by_rows._chunk_op",
        "linear_cross_entropy.functions.rescale_op",
        "linear_cross_entropy.by_classes._sums_op",
        "linear_cross_entropy.by_classes._grads_op",
    ],
    "batch_norm": [
        *(f"batch_norm.functions._{name}_op" for name in ("forward", "backward", "plain_forward", "plain_backward")),
        *(f"batch_norm.ranks._{name}_op" for name in ("moments", "normalise", "sums", "gradient")),
        *(f"batch_norm.keep_output._{name}_op" for name in ("keep", "keep_backward")),
    ],
}
ON_CPU = functions._on_cpu
TILES = {name: getattr(by_classes, name) for name in ("is_padded", "skips_ignored")}
CALLS = int(os.environ.get("FUSED_OPS_FUZZ_CALLS", "1000"))


def call_with(monkeypatch, namespace):
    """The public functions run on the raw ops of a namespace."""
    on_device = namespace is not torch.ops.fused_ops  # a small loss goes the GPU's way
    monkeypatch.setattr("fused_ops.ops.cross_entropy.functions._on_cpu", functions._on_device if on_device else ON_CPU)
    with_gradient = namespace.cross_entropy_with_gradient.default
    monkeypatch.setattr("fused_ops.ops.cross_entropy.functions._with_gradient", with_gradient)
    for name in ("forward", "plain_forward", "plain_backward"):  # as eager calls take them
        op = getattr(namespace, f"batch_norm_{name}").default
        monkeypatch.setattr(f"fused_ops.ops.batch_norm.functions._{name}", op)
    for name, of_a_gpu in (("is_padded", True), ("skips_ignored", False)):
        function = (lambda value: lambda tensor: value)(of_a_gpu) if on_device else TILES[name]
        monkeypatch.setattr(by_classes, name, function)
    for op, places in CALLED_AS.items():
        for place, name in zip(places, OPS[op], strict=True):
            module, attribute = place.rsplit(".", 1)
            module = importlib.import_module(f"fused_ops.ops.{module}")
            monkeypatch.setattr(module, attribute, getattr(namespace, name).default)


@pytest.fixture
def emulated(host_ops, monkeypatch):
    call_with(monkeypatch, torch.ops.fused_ops_host)
    return host_ops


def is_differentiable(value):
    return torch.is_tensor(value) and value.requires_grad


def call_of(function, sample):
    """The sample as a function of its tensors that require grad, those tensors, and all its values, copied."""
    values, spec = tree_flatten((sample.args, sample.kwargs))
    values = [v.detach().clone().requires_grad_(v.requires_grad) if torch.is_tensor(v) else v for v in values]
    places = [i for i, value in enumerate(values) if is_differentiable(value)]

    def call(*leaves):
        given = list(values)
        for i, leaf in zip(places, leaves, strict=True):
            given[i] = leaf
        args, kwargs = tree_unflatten(given, spec)
        outputs = tree_flatten(function(*args, **kwargs))[0]
        return tuple(o for o in outputs if torch.is_tensor(o))

    return call, [values[i] for i in places], values


def gradients(function, sample):
    call, leaves, values = call_of(function, sample)
    outputs = call(*leaves)
    wanted = [o for o in outputs if o.requires_grad]
    torch.manual_seed(0)
    grads = torch.autograd.grad(wanted, leaves, [torch.randn_like(o) for o in wanted], allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return [o.detach() for o in outputs], grads, [v for v in values if torch.is_tensor(v)]


@pytest.mark.parametrize(("op", "small"), [*((op, 32768) for op in OPS), ("cross_entropy", -1)])
def test_samples_give_what_the_cpu_gives(op, small, emulated, monkeypatch, cuda_host):
    function = getattr(fused_ops, op)
    monkeypatch.setattr("fused_ops.ops.cross_entropy.functions._SMALL", small)
    assert len(samples_of(op)) > 10
    for sample in samples_of(op):
        cuda_host.cuda_host_launches()
        ours = gradients(function, sample)
        assert cuda_host.cuda_host_launches() > 0, sample.name
        with monkeypatch.context() as patch:
            call_with(patch, torch.ops.fused_ops)
            theirs = gradients(function, sample)
        for mine, other in zip(ours[0], theirs[0], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12, msg=lambda m, s=sample: f"{s.name}: {m}")
        for mine, other in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11, msg=lambda m, s=sample: f"{s.name}: {m}")
            assert mine.stride() == other.stride()
        for mine, other in zip(ours[2], theirs[2], strict=True):  # running statistics too
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, emulated):
    function = getattr(fused_ops, op)
    for sample in samples_of(op)[:: max(1, len(samples_of(op)) // 12)]:
        call, leaves, _ = call_of(function, sample)
        assert torch.autograd.gradcheck(lambda *t, call=call: tuple(o for o in call(*t) if o.requires_grad), leaves)


def test_in_place_backward(emulated, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fused_ops.ops.cross_entropy.functions._SMALL", -1)  # which is to the bit as in place
    x, target = torch.randn(6, 40, requires_grad=True), torch.randint(0, 40, (6,))
    expected = torch.autograd.grad(fused_ops.cross_entropy(x, target), x)[0]
    logits = x * 1
    ours = torch.autograd.grad(fused_ops.cross_entropy(logits, target, inplace_backward=True), logits)[0]
    assert torch.equal(ours, expected) and ours.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 7, 1000, 8449, 300_001])
def test_a_gradient_is_rescaled_where_it_lies(host_ops, dtype, count):
    """To the bit as PyTorch, of any alignment, and nothing beside it; not touched by a scale of 1."""
    rescale = host_ops["linear_cross_entropy_rescale_"]
    for offset, kind in ((0, torch.float64), (1, torch.float32), (3, torch.float64), (5, torch.bfloat16)):
        memory = torch.randn(count + offset + 70).to(dtype)
        before, grad = memory.clone(), memory[offset : offset + count]
        for scale in (torch.tensor(1.0, dtype=kind), torch.tensor([-0.3], dtype=kind)):
            rescale(grad, scale)
            expected = before.clone()
            expected[offset : offset + count] *= scale.reshape(())
            assert torch.equal(memory, expected)
    grad = torch.tensor([1.0, float("inf"), 0.0], dtype=dtype)
    rescale(grad, torch.tensor(0.0))
    assert grad[0] == 0 and grad[1].isnan() and grad[2] == 0
    for bad in (lambda: rescale(torch.randn(4, 3).T, torch.tensor(1.0)), lambda: rescale(grad, torch.ones(2))):
        with pytest.raises(RuntimeError, match="rescale_"):
            bad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features", "classes"), [(300, 24, 1300), (24, 64, 1100), (70, 72, 600), (9, 8, 513)])
@pytest.mark.parametrize("way", ["kept", "again", "first by rows"])
def test_tiles(way, rows, features, classes, dtype, emulated, monkeypatch):
    """By the error rule, with ignored rows of NaN, whatever a row's logits are computed for: once, twice, kept."""
    kept, tile = {"kept": (rows, 256), "again": (64, 200), "first by rows": (-1, 600)}[way]
    g = torch.Generator().manual_seed(rows)
    x, w, bias = (torch.randn(s, generator=g).to(dtype) for s in ((rows, features), (classes, features), (classes,)))
    target = torch.randint(0, classes, (rows,), generator=g)
    target[::5] = -100
    target[1], target[2] = 0, classes - 1
    plan = Plan(classes, 40, 7, kept, tile)
    monkeypatch.setattr("fused_ops.ops.linear_cross_entropy.graph.plan", lambda *_: plan)

    def run(loss, *tensors, **more):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = loss(*leaves, **more)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def eager(x, w, bias):
        z = torch.nn.functional.linear(x, w, bias)
        more = 1e-3 * (target != -100) * z.logsumexp(1).square()
        return torch.nn.functional.cross_entropy(z, target) + more.sum() / (target != -100).sum()

    options = {"z_loss": 1e-3, "max_memory_bytes": 1}
    found = run(lambda x, w, b: fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, **options), x, w, bias)
    theirs, truth = run(eager, x, w, bias), run(eager, *(t.double() for t in (x, w, bias)))
    for mine, other, true in zip(found, theirs, truth, strict=True):
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= (other - true).abs().max() + rounding
    x[::5] = float("nan")
    again = run(lambda x, w, b: fused_ops.linear_cross_entropy(x, w, target, linear_bias=b, **options), x, w, bias)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1][1::5], found[1][1::5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("classes", "rows"), [(1, 1), (33, 7), (513, 100), (1300, 300), (40, 1000)])
def test_tile_kernels_write_their_tile_alone(classes, rows, dtype, emulated):
    """What each adds and writes, of two tiles one after the other; rows whose logits are -inf, inf or NaN."""
    sums, grads = (emulated[f"linear_cross_entropy_tile_{name}_"] for name in ("sums", "grads"))
    pitch = -(-rows // 64) * 64
    g = torch.Generator().manual_seed(classes)
    memory = torch.randn(2 * classes, pitch, generator=g).to(dtype)
    logits = memory[:, :rows]
    for value, row in ((-torch.inf, 3), (torch.inf, 4), (torch.nan, 5)):
        logits[:, row : row + 1] = value
    target = torch.randint(0, 2 * classes, (rows,), generator=g)
    target[6:7] = torch.iinfo(torch.int64).min
    highest = torch.full((rows,), -torch.inf)
    others, at_target = torch.zeros(rows, dtype=torch.float64), torch.full((rows,), -torch.inf)
    for first in (0, classes):
        sums(logits[first : first + classes], target, first, 2 * classes, highest, others, at_target)
    z, counts = logits.double(), target >= 0
    fine = counts & z.isfinite().all(0)
    assert torch.equal(highest.double()[fine], z.amax(0)[fine])
    picked = torch.where(counts, target, 0)
    expected = (z - z.amax(0)).exp().scatter(0, picked[None], 0.0).sum(0)
    torch.testing.assert_close(others[fine], expected[fine], rtol=1e-6, atol=1e-30)
    assert torch.equal(at_target[fine].double(), z.gather(0, picked[None])[0][fine])
    assert not torch.isfinite(others[4:6][counts[4:6]]).any()
    factor, target_grad = torch.rand(rows, generator=g), -torch.rand(rows, generator=g)
    before = memory.clone()
    for first in (0, classes):
        grads(logits[first : first + classes], target, first, 2 * classes, highest, factor, target_grad)
    wanted = ((z - highest.double()).exp() * factor).scatter(0, picked[None], target_grad.double()[None])
    wanted = torch.where(counts, wanted, 0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double()[:, fine], wanted[:, fine], rtol=8 * eps, atol=eps**2)
    assert bool((logits[:, ~counts] == 0).all()) and torch.equal(memory[:, rows:], before[:, rows:])


def test_a_bad_target_is_a_device_error(emulated, cuda_host):
    x, target = torch.randn(3, 5), torch.tensor([0, 5, 1])
    with pytest.raises(RuntimeError, match="CUDA error 710"):
        fused_ops.cross_entropy(x, target)
    assert cuda_host.cuda_host_trapped() == 1
    assert fused_ops.cross_entropy(x, target, ignore_index=5).isfinite()


def test_a_small_network_learns_the_same(emulated):
    def train(norm, loss):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), norm(5), torch.nn.Flatten(), torch.nn.Linear(180, 7))
        x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 7, (4,))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
        return dict(net.named_parameters())

    ours = train(fused_ops.BatchNorm2d, fused_ops.cross_entropy)
    theirs = train(torch.nn.BatchNorm2d, torch.nn.functional.cross_entropy)
    names = list(ours)
    table = compare_gradients({n: (ours[n].detach(), theirs[n].detach()) for n in names}, rtol=1e-4, atol=1e-6)
    assert table.approximate == len(names)


@pytest.mark.parametrize("op", OPS)
def test_garbage_is_a_result_or_an_exception(op, host_ops, cuda_host):
    rng = random.Random(0)
    calls = [c for c in valid_calls([op]) if c[0]._schema.name.split("::")[1] in host_ops]
    right = wrong = 0
    for _ in range(CALLS):
        function, args, kwargs = rng.choice(calls)
        function = host_ops[function._schema.name.split("::")[1]]
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            i = rng.randrange(len(args))
            args[i] = spoil(args[i], rng)
        mutable = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        before = fingerprint(args)
        cuda_host.cuda_host_trapped()  # a GPU would be lost after a bad target; here the next call is a fresh one
        try:
            result = function(*args, **kwargs)
        except CLEAN as error:
            assert "CUDA error 719" not in str(error)  # a race
            wrong += 1
        else:
            right += 1
            for output in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(output, torch.Tensor) and output.device.type == "cpu":
                    output.double().sum().item()
        if not mutable:
            assert all(same(a, b) for a, b in zip(before, fingerprint(args), strict=True)), (function, args)
    assert right > CALLS // 20 and wrong > CALLS // 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_small_head_costs(dtype, emulated, cuda_host, monkeypatch):
    """Between its products a launch that finds loss and gradient, and one that scales this; float16 takes one more."""
    monkeypatch.setattr("fused_ops.ops.linear_cross_entropy.api.is_small", lambda *_: False)  # what the CPU has for it
    (x, w), target = (
        (torch.randn(s).to(dtype).requires_grad_() for s in ((32, 8), (27, 8))),
        torch.randint(0, 27, (32,)),
    )
    cuda_host.cuda_host_launches()
    loss = fused_ops.linear_cross_entropy(x, w, target)
    assert cuda_host.cuda_host_launches() == (2 if dtype == torch.float16 else 1)
    found = torch.autograd.grad(loss, (x, w), torch.tensor(0.3, dtype=dtype))
    assert cuda_host.cuda_host_launches() == 1
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), target)
    eager = torch.nn.functional.cross_entropy(x @ w.t(), target)
    theirs = torch.autograd.grad(eager, (x, w), torch.tensor(0.3, dtype=dtype))
    upstream = torch.tensor(0.3, dtype=dtype).double()
    for mine, other, right in zip(found, theirs, torch.autograd.grad(truth, exact, upstream), strict=True):
        assert_no_worse_than(mine, other, right)

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
from fused_ops.testing import compare_gradients, samples_of

CALLED_AS = {  # by whom, in the order of OPS
    "cross_entropy": [
        f"cross_entropy.functions.{rows}{name}"
        for rows in ("", "rows_")
        for name in ("forward_op", "backward_op", "backward_inplace_op")
    ]
    + ["cross_entropy.functions._with_gradient_op", "cross_entropy.functions._scale_gradient_op"],
    "linear_cross_entropy": ["linear_cross_entropy.by_rows._chunk_op", "linear_cross_entropy.functions.rescale_op"],
    "batch_norm": [
        *(f"batch_norm.functions._{name}_op" for name in ("forward", "backward", "plain_forward", "plain_backward")),
        *(f"batch_norm.ranks._{name}_op" for name in ("moments", "normalise", "sums", "gradient")),
        *(f"batch_norm.keep_output._{name}_op" for name in ("keep", "keep_backward")),
    ],
}
ON_CPU = functions._on_cpu
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

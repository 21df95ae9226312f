"""The raw ops of the CUDA bindings on the CPU: checks, allocation and hand-over, under the public functions."""

import importlib
import os
import random

import pytest
import torch
from test_raw_ops import CLEAN, fingerprint, same, spoil, valid_calls

import fused_ops
from fused_ops.reference import batch_norm as batch_norm_reference
from fused_ops.testing import compare_gradients

OPS = {
    "cross_entropy": ["cross_entropy_forward", "cross_entropy_backward", "cross_entropy_backward_"],
    "batch_norm": [
        *("batch_norm_forward", "batch_norm_backward", "batch_norm_act_forward", "batch_norm_act_backward"),
    ],
}
HOLDERS = {"cross_entropy": "_cross_entropy_plain", "batch_norm": "batch_norm"}  # the modules that call the raw ops
ATTRIBUTES = {
    "cross_entropy": ["_forward_op", "_backward_op", "_backward_inplace_op"],
    "batch_norm": ["_forward_op", "_backward_op", "_act_forward_op", "_act_backward_op"],
}
CALLS = int(os.environ.get("FUSED_OPS_FUZZ_CALLS", "1000"))


@pytest.fixture(scope="module")
def host_ops(cuda_host):
    """The emulated ops by name; the library that defines them lives as long as they do."""
    library = torch.library.Library("fused_ops_host", "FRAGMENT")
    for name in [name for names in OPS.values() for name in names]:
        schema = str(getattr(torch.ops.fused_ops, name).default._schema).split("::", 1)[1]
        library.define(schema)
        if "_act_" in name:
            library.define(schema.replace(name, f"{name}_reference", 1))
            function = getattr(batch_norm_reference, name.removeprefix("batch_norm_"))
            library.impl(f"{name}_reference", function, "CompositeExplicitAutograd")
    yield {name: getattr(torch.ops.fused_ops_host, name).default for names in OPS.values() for name in names}
    library._destroy()


@pytest.fixture
def emulated(host_ops, monkeypatch):
    """The public functions run on the emulated ops."""
    for op, attributes in ATTRIBUTES.items():
        module = importlib.import_module(f"fused_ops.{HOLDERS[op]}")
        for attribute, name in zip(attributes, OPS[op], strict=True):
            monkeypatch.setattr(module, attribute, host_ops[name])
    return host_ops


def gradients(function, sample):
    args = [a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in sample.args]
    kwargs = {
        k: v.detach().clone().requires_grad_(v.requires_grad) if torch.is_tensor(v) else v
        for k, v in sample.kwargs.items()
    }
    leaves = [t for t in [*args, *kwargs.values()] if torch.is_tensor(t) and t.requires_grad]
    output = function(*args, **kwargs)
    torch.manual_seed(0)
    grads = torch.autograd.grad(output, leaves, torch.randn_like(output), allow_unused=True)
    return output.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)], args


def samples_with_kernels(op):
    """The op's samples, of cross-entropy those of class indices alone: its options run on the reference on a GPU."""
    samples = importlib.import_module(f"fused_ops.reference.{op}").samples()
    if op != "cross_entropy":
        return samples
    plain = {"reduction", "ignore_index"}
    return [
        s
        for s in samples
        if torch.is_tensor(s.args[1]) and not s.args[1].is_floating_point() and s.kwargs.keys() <= plain
    ]


@pytest.mark.parametrize("op", OPS)
def test_samples_give_what_the_cpu_gives(op, emulated, monkeypatch, cuda_host):
    function = getattr(fused_ops, op)
    samples = samples_with_kernels(op)
    assert len(samples) > 10
    for sample in samples:
        cuda_host.cuda_host_launches()
        ours = gradients(function, sample)
        served = not (sample.kwargs.get("valid") is not None or sample.kwargs.get("groups", 1) > 1)
        assert (cuda_host.cuda_host_launches() > 0) == served, sample.name
        with monkeypatch.context() as patch:
            module = importlib.import_module(f"fused_ops.{HOLDERS[op]}")
            for attribute, name in zip(ATTRIBUTES[op], OPS[op], strict=True):
                patch.setattr(module, attribute, getattr(torch.ops.fused_ops, name).default)
            theirs = gradients(function, sample)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-12, msg=lambda m, s=sample: f"{s.name}: {m}")
        for mine, other in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11, msg=lambda m, s=sample: f"{s.name}: {m}")
            assert mine.stride() == other.stride()
        for mine, other in zip(ours[2], theirs[2], strict=True):  # running statistics too
            if torch.is_tensor(mine):
                torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, emulated):
    function = getattr(fused_ops, op)
    samples = samples_with_kernels(op)
    for sample in samples[:: max(1, len(samples) // 12)]:
        names = [n for n, v in sample.kwargs.items() if torch.is_tensor(v) and v.requires_grad]
        places = [i for i, a in enumerate(sample.args) if torch.is_tensor(a) and a.requires_grad]

        def call(*leaves, sample=sample, names=names, places=places):
            args, kwargs = list(sample.args), dict(sample.kwargs)
            for i, leaf in zip(places, leaves, strict=False):
                args[i] = leaf
            kwargs.update(zip(names, leaves[len(places) :], strict=True))
            return function(*args, **kwargs)

        leaves = [*(sample.args[i] for i in places), *(sample.kwargs[n] for n in names)]
        assert torch.autograd.gradcheck(call, leaves), sample.name


def test_in_place_backward(emulated):
    torch.manual_seed(0)
    x, target = torch.randn(6, 40, requires_grad=True), torch.randint(0, 40, (6,))
    expected = torch.autograd.grad(fused_ops.cross_entropy(x, target), x)[0]
    logits = x * 1
    ours = torch.autograd.grad(fused_ops.cross_entropy(logits, target, inplace_backward=True), logits)[0]
    assert torch.equal(ours, expected) and ours.data_ptr() == logits.data_ptr()


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
        except CLEAN:
            wrong += 1
        else:
            right += 1
            for output in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(output, torch.Tensor) and output.device.type == "cpu":
                    output.double().sum().item()
        if not mutable:
            assert all(same(a, b) for a, b in zip(before, fingerprint(args), strict=True)), (function, args)
    assert right > CALLS // 20 and wrong > CALLS // 20

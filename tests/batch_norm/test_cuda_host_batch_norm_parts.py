"""Batch norm's CUDA bindings on the CPU: packed calls, and the ops of a batch that is spread over processes."""

import functools

import pytest
import torch
from cuda_host import DTYPES, numbers
from test_cuda_host_batch_norm import LEAKY, NONE, PARTS, RELU, Case, call_parts, last, near, parts_of
from test_raw_ops import OVER_RANKS, over_ranks

import fused_ops
from fused_ops.ops.batch_norm import activations, ranks_reference, reference
from fused_ops.testing import samples_of


def allocations(call):
    """How often a call asks for memory, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()  # what is freed is another event
    events = profile.profiler.kineto_results.events()
    assert kept is not None
    return sum(e.name() == "[memory]" and e.nbytes() > 0 for e in events)


def is_packed(library, shape, layout, dtype, writes_mask=False):
    spatial = torch.Size(shape[2:]).numel()
    head = numbers([*shape[:2], spatial, int(layout is not None and spatial > 1), DTYPES.index(dtype)])
    return bool(library.bn_is_packed(head, int(writes_mask)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout", "packed"),
    [
        *(
            ((32, 64), None, True),
            ((8, 16, 7, 7), None, True),
            ((4, 64, 5, 5), last, True),
            ((2, 3, 32, 32), None, True),
        ),
        *(((5000, 8), None, False), ((2, 3, 4097), None, False), ((512, 2100), None, False)),
    ],
)
def test_a_small_call_is_one_launch_each_way(host_ops, cuda_host, shape, layout, packed, dtype):
    case = Case(shape, dtype, layout)
    packed = packed and dtype != torch.float64
    assert is_packed(cuda_host, shape, layout, dtype) == packed
    forward = functools.partial(host_ops["batch_norm_forward"], case.x, *case.stats, case.weight, case.bias)
    arguments = case.grad, case.x, case.weight, case.bias, forward()[1]
    for call, results in ((forward, 2), (functools.partial(host_ops["batch_norm_backward"], *arguments), 3)):
        cuda_host.cuda_host_launches()
        call()
        assert cuda_host.cuda_host_launches() in ((1,) if packed else (3, 4))
        assert allocations(call) == results + (not packed)


# ---- a batch that is spread over processes


def call_ranks(ops, case, activation, valid):
    """Everything that the four ops return or write, for one part of a batch."""
    mine = ops["batch_norm_moments"](case.x, valid)
    found = ranks_reference.merge(torch.stack((mine, mine)))
    statistics = torch.stack((found.mean, (found.m2 / found.values + 1e-5).rsqrt()))
    masked = reference.has_mask(case.residual, valid, activation)
    mask = torch.zeros(reference.mask_bytes(case.x), dtype=torch.uint8) if masked else None
    options = activation, 0.3, case.residual, mask, valid
    y = ops["batch_norm_normalise"](statistics, case.x, case.weight, case.bias, *options)
    given = case.grad, case.x, case.weight, case.bias, statistics, *options
    sums = ops["batch_norm_grad_sums"](*given)
    means = torch.stack((sums[0], sums[1] * statistics[1].square())) / found.values
    grad_residual = None if case.residual is None else torch.zeros_like(case.residual)
    grad = ops["batch_norm_gradient"](means, grad_residual, *given)
    names = ("moments", "output", "sums", "mask", "grad_residual", "grad_input")
    return dict(zip(names, (mine, y, sums, mask, grad_residual, grad), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize(("shape", "layout"), PARTS)
def test_parts_of_a_batch(host_ops, cuda_host, shape, layout, valid, dtype):
    names = ("moments", "normalise", "grad_sums", "gradient")
    plain = {f"batch_norm_{name}": getattr(ranks_reference, name) for name in names}
    for activation, residual in ((NONE, False), (RELU, True), (activations.SILU, True), (LEAKY, False)):
        case = Case(shape, dtype, layout, residual=residual)
        counted = parts_of(valid, case, 1, torch.bool)
        found, wanted = (call_ranks(ops, case, activation, counted) for ops in (host_ops, plain))
        for name, ours in found.items():
            if ours is None or name == "mask":
                assert ours is None or torch.equal(ours, wanted[name])
                continue
            close = near(name, ours, wanted)
            if ours.dtype == torch.float64 and dtype != torch.float64:  # moments and sums
                close = {"rtol": 1e-5, "atol": 64 * torch.finfo(dtype).eps}
            torch.testing.assert_close(ours, wanted[name], msg=lambda m, n=name: f"{n}: {m}", **close)
        assert ours.stride() == case.x.stride()
        cuda_host.cuda_host_set_order(1)  # no bit depends on it
        again = call_ranks(host_ops, case, activation, counted)
        cuda_host.cuda_host_set_order(0)
        assert all(v is None or torch.equal(v, again[name]) for name, v in found.items())


def test_parts_are_the_whole_of_one_process(host_ops):
    """What one rank finds is what the op of a whole batch has: the same kernels."""
    case = Case((40, 3, 7, 7), torch.float32, residual=True)
    mine = host_ops["batch_norm_moments"](case.x, None)
    whole = call_parts(host_ops, case, True, RELU, None, 1)
    assert mine[:2].tolist() == [1960, 1960]
    torch.testing.assert_close(mine[2:5], whole["statistics"][0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 0), (2, 3, 0)])
def test_empty_parts(host_ops, shape):
    x, statistics = torch.ones(shape), torch.ones(2, shape[1], dtype=torch.float64)
    expected = ranks_reference.moments(x)
    assert torch.equal(host_ops["batch_norm_moments"](x, None), expected)
    options = None, None, statistics, NONE, 0.0, None, None, None
    assert not host_ops["batch_norm_grad_sums"](x, x, *options).any()
    assert host_ops["batch_norm_gradient"](statistics, None, x, x, *options).shape == x.shape
    assert host_ops["batch_norm_normalise"](statistics, x, None, None, NONE, 0.0, None, None, None).shape == x.shape


def test_a_call_over_ranks_is_served_by_kernels(host_ops, cuda_host, monkeypatch):
    for place, answer in OVER_RANKS.items():
        monkeypatch.setattr(place, answer)
    for name, op in (
        ("moments", "moments"),
        ("normalise", "normalise"),
        ("sums", "grad_sums"),
        ("gradient", "gradient"),
    ):
        monkeypatch.setattr(f"fused_ops.ops.batch_norm.ranks._{name}_op", host_ops[f"batch_norm_{op}"])
    samples = [part for sample in samples_of("batch_norm") for part in over_ranks(sample)]
    assert len(samples) > 10
    for sample in samples:
        cuda_host.cuda_host_launches()
        fused_ops.batch_norm(*sample.args, **sample.kwargs).sum().backward()
        assert cuda_host.cuda_host_launches() >= 6, sample.name

"""PyTorch's own module samples and error inputs, and the checks of its module tests, run on our modules.

``FUSED_OPS_FULL_GRID=1`` takes every sample; by default a fixed, evenly spread part of them.
"""

import copy
import io
import itertools
import pickle
from functools import cache

import pytest
import torch
from opinfo_cases import DTYPES, thin
from test_opinfo import relative_errors
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

import fused_ops

BATCH_NORMS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
LAZY = ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]
KINDS = [*BATCH_NORMS, *LAZY, "CrossEntropyLoss", "LinearCrossEntropyLoss"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of lazy modules and of its own chunks
each_kind = pytest.mark.parametrize("kind", KINDS)


def info(kind):
    found = [m for m in module_db if m.module_cls is getattr(nn, kind.removeprefix("Lazy"), None)]
    if not found:
        pytest.skip(f"this torch has no samples of {kind}")
    return found[0]


@cache
def samples(kind, dtype, training=True):
    """(constructor args, constructor kwargs, forward args, forward kwargs) of each sample."""
    torch.manual_seed(0)
    found = []
    for s in info(kind).module_inputs_func(info(kind), "cpu", dtype, True, training):
        build, call = s.constructor_input, s.forward_input
        args = build.args[1:] if kind in LAZY else build.args
        found.append((args, dict(build.kwargs), call.args, dict(call.kwargs)))
    return found


def pair(kind, sample, dtype):
    """PyTorch's module and ours, with one state that is not the initial one, after a first call if they are lazy."""
    args, kwargs, inputs, _ = sample
    theirs, ours = (getattr(m, kind)(*args, **kwargs).to(dtype) for m in (nn, fused_ops))
    if kind in LAZY:
        for module in (theirs, ours):
            module.eval()(inputs[0].detach())
            module.train().to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def some(kind, dtype, check, at_most=15):
    return thin(samples(kind, dtype), f"{check} {kind} {dtype}", at_most)


def step(module, inputs, kwargs, upstream=None):
    """The output and the gradients of inputs and parameters."""
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    output = module(*inputs, **kwargs)
    if upstream is None:
        generator = torch.Generator().manual_seed(3)
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    wanted = [*(t for t in inputs if t.requires_grad), *module.parameters()]
    grads = torch.autograd.grad(output, wanted, upstream.to(output.dtype)) if output.requires_grad else ()
    return [output.detach(), *grads]


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
def test_forward_and_backward(kind, dtype, train):
    """No further from the truth than PyTorch's module, over all the samples together."""
    errors = []
    for sample in some(kind, dtype, f"forward {train}"):
        theirs, ours = pair(kind, sample, dtype)
        exact = copy.deepcopy(theirs).double()
        for module in (theirs, ours, exact):
            module.train(train)
        for scattered in (False, True):
            inputs = [
                noncontiguous_like(t.detach()).requires_grad_(t.requires_grad) if scattered else t for t in sample[2]
            ]
            wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
            found = [step(m, i, sample[3]) for m, i in ((ours, inputs), (theirs, inputs), (exact, wide))]
            for mine, other, right in zip(*found, strict=True):
                assert mine.dtype == other.dtype and mine.shape == other.shape
                if dtype == torch.float64:
                    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, equal_nan=True)
                else:
                    errors.append(relative_errors(mine, other, right))
        for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-3)
    if errors:
        mine, other = torch.tensor(errors, dtype=torch.float64).T
        assert mine.max() <= other.max() + 1 and mine.mean() <= other.mean() + 0.05


@each_kind
def test_copies_pickles_and_state(kind):
    for sample in some(kind, torch.float32, "pickle"):
        theirs, ours = pair(kind, sample, torch.float32)
        expected = step(copy.deepcopy(ours).eval(), sample[2], sample[3])
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
            for mine, other in zip(step(module.eval(), sample[2], sample[3]), expected, strict=True):
                assert torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
        theirs.load_state_dict(ours.state_dict())


@each_kind
def test_factory_arguments_and_moves(kind):
    """device= and dtype= reach every parameter and buffer, as does .to()."""
    for args, kwargs, *_ in some(kind, torch.float32, "factory", 8):
        if kind == "CrossEntropyLoss":  # neither in PyTorch's
            module = getattr(fused_ops, kind)(*args, **kwargs)
        else:
            for device, dtype in itertools.product(("cpu", "meta"), (torch.float32, torch.float64)):
                made = [getattr(m, kind)(*args, **kwargs | {"device": device, "dtype": dtype}) for m in (fused_ops, nn)]
                places = [[(n, t.device, t.dtype) for n, t in m.state_dict().items()] for m in made]
                if kind not in LAZY:
                    assert places[0] == places[1]
            module = getattr(fused_ops, kind)(*args, **kwargs)
        if kind not in LAZY:
            module.to(torch.bfloat16)
            assert all(t.dtype in (torch.bfloat16, torch.int64) for t in module.state_dict().values())
            module.share_memory()
            assert module.to("meta").to_empty(device="cpu") is module


@each_kind
def test_meta_modules_give_shapes(kind):
    for sample in some(kind, torch.float32, "meta"):
        _, ours = pair(kind, sample, torch.float32)
        real = step(ours, sample[2], sample[3])
        inputs = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in sample[2]]
        meta = step(ours.to("meta"), inputs, sample[3], torch.empty(real[0].shape, device="meta"))
        assert [(t.shape, t.dtype) for t in meta] == [(t.shape, t.dtype) for t in real]


@each_kind
def test_gradcheck_of_inputs_and_parameters(kind):
    for sample in some(kind, torch.float64, "gradcheck", 2):
        _, ours = pair(kind, sample, torch.float64)
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in sample[2]]
        names = [n for n, _ in ours.named_parameters()]
        leaves = [t for t in inputs if t.requires_grad] + [
            p.detach().clone().requires_grad_() for p in ours.parameters()
        ]
        buffers = dict(ours.named_buffers())
        if not torch.isfinite(ours(*inputs, **sample[3])).all():
            continue

        def call(*values, ours=ours, inputs=inputs, names=names, sample=sample, buffers=buffers):
            values = list(values)
            given = [values.pop(0) if t.requires_grad else t for t in inputs]
            state = dict(zip(names, values, strict=True)) | {n: b.clone() for n, b in buffers.items()}
            return torch.func.functional_call(ours, state, tuple(given), sample[3])

        assert gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(call, leaves, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("kind", BATCH_NORMS[1:])
def test_memory_format_goes_through(kind):
    layout = torch.channels_last if kind == "BatchNorm2d" else torch.channels_last_3d
    for sample in some(kind, torch.float32, "layout"):
        theirs, ours = pair(kind, sample, torch.float32)
        x = sample[2][0].detach().contiguous(memory_format=layout).requires_grad_()
        for module in (theirs, ours):
            y = module(x)
            grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
            assert y.is_contiguous(memory_format=layout) and grad.is_contiguous(memory_format=layout)


@each_kind
def test_error_inputs(kind):
    """PyTorch's error inputs raise the same type, in the constructor or in the call."""
    module_info, seen = info(kind), 0
    if module_info.module_error_inputs_func is None or kind in LAZY:
        pytest.skip("PyTorch has none")
    for bad in module_info.module_error_inputs_func(module_info, "cpu", torch.float32, True, True):
        build, call = bad.module_error_input.constructor_input, bad.module_error_input.forward_input

        def run(build=build, call=call):
            module = getattr(fused_ops, kind)(*build.args, **build.kwargs)
            module(*call.args, **call.kwargs)

        with pytest.raises(bad.error_type):
            run()
        seen += 1
    assert seen


@pytest.mark.parametrize("kind", [*BATCH_NORMS, *LAZY])
def test_repr_and_reset(kind):
    for sample in some(kind, torch.float32, "repr"):
        theirs, ours = pair(kind, sample, torch.float32)
        assert repr(ours) == repr(theirs)
        ours.reset_parameters()
        theirs.reset_parameters()
        for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(mine, other)

"""``inplace_activated=True``: what is kept, the gradients by the error rule, and what must work or raise."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, skip_without
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.ops.batch_norm import activations, keep_output_reference, reference
from fused_ops.testing import assert_no_worse_than

LAYOUTS = {
    "rows": (200, 70),
    "few columns": (300, 3),
    "planes": (3, 4, 23, 29),
    "many planes": (3, 40, 9, 9),
    "small planes": (9, 5, 3, 3),
    "channels last": (4, 70, 5, 6),
    "few channels last": (4, 6, 9, 8),
    "transposed": (5, 4, 6, 7),
}
ACTIVATIONS = [None, "leaky_relu", "elu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def lay_out(x, name):
    if "channels last" in name:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(0, 2).contiguous().transpose(0, 2) if name == "transposed" else x


def eager(x, mean, var, w, b, training, activation):
    y = F.batch_norm(x, mean, var, w, b, training)
    return y if activation is None else getattr(F, activation)(y)


def fused(x, mean, var, w, b, training, activation):
    return fused_ops.batch_norm(x, mean, var, w, b, training, activation=activation, inplace_activated=True)


def results(function, x, g, w, b, training, activation):
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    mean, var = torch.full_like(w, 0.5), torch.full_like(w, 2.0)
    y = function(leaves[0], mean, var, *leaves[1:], training, activation)
    gradients = torch.autograd.grad(y, leaves, g.to(y.dtype))
    names = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
    return dict(zip(names, (y.detach(), *gradients, mean, var), strict=True))


def values(shape, layout, dtype, seed=0):
    torch.manual_seed(seed)
    x, g = (lay_out((torch.randn(shape) * s + m).to(dtype), layout) for s, m in [(2, 3), (1, 0)])
    w, b = (torch.randn(shape[1]) for _ in range(2))
    for c, small in enumerate((0.0, 1e-30, -1e-3)):  # channels whose x must be kept, and a negative weight
        w[c] = small if c < shape[1] - 1 else w[c]
    w[-1] = -1.5
    return x, g, w.to(dtype), b.to(dtype)


def check(draws, training, activation):
    """The error rule; gradients may be off, too, by what the output's own error, two roundings, makes of them.

    Eager's error is the largest over the draws (x, g, w, b): over four channels of one it is a matter of luck.
    """
    for found in zip(*(_errors(*draw, training, activation) for draw in draws), strict=True):  # of one result each
        theirs = max(eager_error for *_, eager_error in found)
        for name, error, rounding, _ in found:
            excess = float((error - rounding).max())
            assert excess <= theirs, (name, excess, theirs)


def _errors(x, g, w, b, training, activation):
    """(name, error, what it may be beside eager's largest, eager's largest) of each result."""
    ours, theirs = (results(f, x, g, w, b, training, activation) for f in (fused, eager))
    wide = [t.double() for t in (x, g, w, b)]
    truth = results(eager, *wide, training, activation)
    code, slope = activations.CODES[activation], {"elu": 1.0, "leaky_relu": 0.01, None: 0.0}[activation]
    x, g, w, b = wide
    y = truth["output"].to(ours["output"].dtype).double()
    stats = [torch.full_like(w, v) for v in (0.5, 2.0)]
    statistics = reference.forward(x, *stats, w, b, training)[1]
    kept = keep_output_reference.keep(y, x, w, b, None, code, slope, 1)
    rounded = keep_output_reference.keep_backward(
        g, y, w, b, statistics, *kept, training, True, True, 0, code, slope, None, 1
    )
    spread = dict(zip(("grad_input", "grad_weight", "grad_bias"), rounded, strict=True))
    for name, value in ours.items():
        exact = truth[name]
        if name not in spread:
            assert_no_worse_than(value, theirs[name], exact, name)
            continue
        rounding = torch.finfo(value.dtype).eps * exact.abs() + 2 * (spread[name] - exact).abs().max()
        yield name, (value.double() - exact).abs(), rounding, float((theirs[name].double() - exact).abs().max())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_eager(dtype, activation, layout, training):
    check([values(LAYOUTS[layout], layout, dtype)], training, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["rows", "planes", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_where_the_upstream_gradient_follows_the_output(layout, activation, dtype):
    """The worst case: rounding is not averaged away, because the gradient and the normalised x go together."""
    draws = []
    for seed in range(3):
        x, g, w, b = values(LAYOUTS[layout], layout, dtype, seed)
        draws.append((x, results(eager, x, g, w, b, True, activation)["output"] + 0.1 * g, w, b))
    check(draws, True, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_kernel_equals_reference(dtype, activation, layout, groups):
    x, g, w, b = values(LAYOUTS[layout], layout, dtype)
    code, ops = activations.CODES[activation], torch.ops.fused_ops
    slope = {"elu": 1.3, "leaky_relu": 0.2, None: 0.0}[activation]
    valid = torch.rand(x.shape[:1] + x.shape[2:]) < 0.7 if layout in ("planes", "few channels last") else None
    numbers = {"activation": code, "slope": slope, "valid": valid, "groups": groups}
    y, statistics = ops.batch_norm_forward(x, None, None, w, b, **numbers)
    kept = (
        ops.batch_norm_keep(y, x, w, b, valid, code, slope, groups),
        keep_output_reference.keep(y, x, w, b, valid, code, slope, groups),
    )
    assert torch.equal(kept[0][0], kept[1][0]) and kept[0][0].numel() > 0
    found = [
        f(g, y, w, b, statistics, *its, True, True, True, 0, code, slope, valid, groups)
        for f, its in zip((ops.batch_norm_keep_backward, keep_output_reference.keep_backward), kept, strict=True)
    ]
    for ours, want in zip(*found, strict=True):
        scale = float(want.abs().max())
        roundings = 100 if ours.dtype == torch.float64 else 4  # the reference's sums round in float64
        assert (ours.double() - want.double()).abs().max() <= roundings * torch.finfo(ours.dtype).eps * scale
    assert found[0][0].stride() == y.stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_output_is_saved(dtype, activation):
    """Of tensors of the input's size there is the output; x is freed, and elu keeps little of it."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(8, 16, 20, 20).to(dtype).requires_grad_()
    weight, bias = (torch.full((16,), v, dtype=dtype, requires_grad=True) for v in (1.0, 0.1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = x * 1
        freed = weakref.ref(hidden)
        y = fused_ops.batch_norm(hidden, None, None, weight, bias, True, activation=activation, inplace_activated=True)
    assert y.untyped_storage().data_ptr() in saved
    assert hidden.untyped_storage().data_ptr() not in saved
    small = sum(saved.values()) - y.untyped_storage().nbytes()
    assert small <= (0.08 if activation == "elu" else 0.02) * y.untyped_storage().nbytes()
    del hidden
    gc.collect()
    assert freed() is None
    y.sum().backward()


def test_channels_of_small_weight_keep_their_input():
    x, weight = torch.randn(8, 16, 20, 20), torch.ones(16)
    weight[3], weight[5] = 1e-4, 0.0
    bias = torch.full((16,), 0.5)
    y = fused_ops.batch_norm(x, None, None, weight, bias, True)
    kept, _ = torch.ops.fused_ops.batch_norm_keep(y, x, weight, bias, None, 0, 0.0, 1)
    assert torch.equal(kept.reshape(8, 2, 20, 20), x[:, [3, 5]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{"correction": 1}, {"groups": 2}, {"valid": True}])
def test_options_equal_the_ordinary_op(activation, options):
    x = torch.randn(6, 5, 7, 8, dtype=torch.float64)
    w, b = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    if "valid" in options:
        options = {"valid": torch.rand(6, 7, 8) < 0.6}
    found = []
    for inplace in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = fused_ops.batch_norm(
            leaves[0], None, None, *leaves[1:], True, activation=activation, inplace_activated=inplace, **options
        )
        found.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(x).cumsum(0).sin())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


def test_changed_output_is_noticed():
    y = fused_ops.batch_norm(torch.randn(5, 3, requires_grad=True), None, None, training=True, inplace_activated=True)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_input_is_not_changed_and_not_shared():
    x = torch.randn(5, 3, requires_grad=True)
    before, version = x.detach().clone(), x._version
    y = fused_ops.batch_norm(x, None, None, training=True, activation="elu", inplace_activated=True)
    y.sum().backward()
    assert torch.equal(x, before) and x._version == version and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("can be inverted", {"activation": "relu"}),
        ("can be inverted", {"activation": "silu"}),
        ("residual", {"residual": torch.ones(5, 3)}),
        ("negative_slope above 0, got 0", {"activation": "leaky_relu", "negative_slope": 0.0}),
        ("negative_slope above 0, got -0.1", {"activation": "leaky_relu", "negative_slope": -0.1}),
        ("alpha above 0", {"activation": "elu", "alpha": -1.0}),
    ],
)
def test_what_cannot_be_rebuilt_raises(text, options):
    for training in (True, False):
        with pytest.raises(ValueError, match=text):
            fused_ops.batch_norm(
                torch.randn(5, 3), torch.zeros(3), torch.ones(3), training=training, inplace_activated=True, **options
            )
    if "residual" not in options:
        with pytest.raises(ValueError, match=text):
            fused_ops.BatchNorm1d(3, inplace_activated=True, **options)


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_modules(kind):
    shape = {"BatchNorm1d": (4, 3), "BatchNorm2d": (4, 3, 2, 5), "BatchNorm3d": (2, 3, 2, 2, 3)}[kind]
    x, found = torch.randn(shape), []
    for inplace in (False, True):
        module = getattr(fused_ops, kind)(3, activation="leaky_relu", inplace_activated=inplace)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad, module.weight.grad, *module.state_dict().values()))
        assert ("inplace_activated=True" in repr(module)) == inplace
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transforms_and_compile(activation):
    """Where nothing is kept for a later backward, the option changes nothing."""
    x, w = torch.randn(4, 6, 3), torch.randn(3)

    def loss(x, w, inplace=True):
        y = fused_ops.batch_norm(x, None, None, w, None, True, activation=activation, inplace_activated=inplace)
        return y.sin().sum()

    for function in (torch.func.grad(loss), torch.func.jacrev(loss, argnums=1), torch.func.hessian(loss, argnums=1)):
        torch.testing.assert_close(function(x[0], w), function(x[0], w, False))
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))
    torch.testing.assert_close(mapped(x, w), torch.stack([torch.func.grad(loss)(v, w) for v in x]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (x[0].clone().requires_grad_() for _ in range(2))
    compiled(a, w).backward()
    loss(b, w).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    plain, kept = (fused_ops.BatchNorm1d(3, activation="elu", inplace_activated=True) for _ in range(2))
    x = torch.randn(5, 3, requires_grad=True)
    expected = torch.autograd.grad(plain(x).square().sum(), (x, plain.weight))
    checkpoint(kept, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close((x.grad, kept.weight.grad), expected)
    torch.testing.assert_close(kept.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout):
    shape = tuple(8 * n if d == 0 else n for d, n in enumerate(LAYOUTS[layout]))
    x, g, w, b = values(shape, layout, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(fused, x, g, w, b, True, "elu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].values(), other.values(), strict=True))


CHILD = """
import sys
sys.path[:0] = ["tests", "tests/batch_norm"]
import torch, fused_ops
import test_batch_norm_inplace as t
for layout in t.LAYOUTS:
    for activation in t.ACTIVATIONS:
        for dtype in t.DTYPES:
            t.test_kernel_equals_reference(dtype, activation, layout, 1)
print(fused_ops.core.library.isa())
"""


@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_isa_equals_the_reference(isa, run_python):
    skip_without(isa)
    run_python("-c", CHILD, cwd=ROOT, ATEN_CPU_CAPABILITY=isa, OMP_NUM_THREADS="1")


def test_a_plain_backward_adds_no_zeros_of_the_input_s_size():
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if any(isinstance(t, torch.Tensor) and t.numel() >= x.numel() for t in tree_leaves(result)):
                self.names.append(func.overloadpacket.__name__)
            return result

    x, weight, bias = torch.randn(4, 8, 9, 9), torch.rand(8) + 0.5, torch.rand(8)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = fused_ops.batch_norm(x, None, None, *leaves[1:], True, activation="leaky_relu", inplace_activated=True)
    upstream = torch.randn_like(y)
    with Seen() as seen:
        torch.autograd.grad(y, leaves, upstream)
    assert "batch_norm_keep_backward" in seen.names
    assert not {"zeros", "zero_", "new_zeros", "zeros_like", "add", "add_"} & set(seen.names)

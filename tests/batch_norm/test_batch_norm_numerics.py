"""Batch norm's values: the error rule over layouts, dtypes and activations; threads, ISAs, extremes and bad calls."""

import platform

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without
from torch.testing._internal.common_methods_invocations import op_db

import fused_ops
from fused_ops.ops.batch_norm import activations, reference
from fused_ops.testing import assert_no_worse_than

ACTIVATIONS = list(activations.CODES)
LAYOUTS = {
    "rows": (200, 70),
    "planes": (3, 4, 23, 29),
    "small planes": (9, 5, 3, 3),
    "channels last": (3, 70, 5, 6),
    "length channels last": (6, 40, 33),
    "volume": (2, 3, 4, 5, 3),
    "volume channels last": (2, 6, 4, 5, 3),
    "transposed": (5, 4, 6, 7),
}
# In float32 each value takes several roundings, and eager's largest error over a handful of channels is a matter of
# luck: these are judged over several draws at once, plus one rounding of the largest value instead of each.
SEVERAL_ROUNDINGS = ("silu", "hardswish", "gelu", "tanh", "sigmoid")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def lay_out(x, name):
    if "channels last" in name:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.transpose(0, 2).contiguous().transpose(0, 2) if name == "transposed" else x


def results(function, x, r, upstream, kind, training, activation):
    """Output and gradients of batch norm (+ residual) (+ activation), and the running statistics."""
    channels = x.size(1)
    generator = torch.Generator().manual_seed(1)
    w, b = (torch.randn(channels, generator=generator).to(kind).requires_grad_() for _ in range(2))
    mean, var = torch.full((channels,), 0.5, dtype=kind), torch.full((channels,), 2.0, dtype=kind)
    leaves = [t.detach().requires_grad_() for t in (x, r)]
    y = function(leaves[0], mean, var, w, b, training, leaves[1], activation)
    gradients = torch.autograd.grad(y, (*leaves, w, b), upstream.to(y.dtype))
    names = ("output", "grad_input", "grad_residual", "grad_weight", "grad_bias", "running_mean", "running_var")
    return dict(zip(names, (y.detach(), *gradients, mean, var), strict=True))


def composed(x, mean, var, w, b, training, r, activation):
    y = F.batch_norm(x, mean, var, w, b, training) + r
    return y if activation is None else getattr(F, activation)(y, *([0.01] if activation == "leaky_relu" else []))


def fused(x, mean, var, w, b, training, r, activation):
    return fused_ops.batch_norm(x, mean, var, w, b, training, residual=r, activation=activation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_composed_eager(dtype, activation, layout, training):
    several = dtype == torch.float32 and activation in SEVERAL_ROUNDINGS
    drawn = []
    for seed in range(3, 7 if several else 4):
        torch.manual_seed(seed)
        x, r, g = (
            lay_out((torch.randn(LAYOUTS[layout]) * s + m).to(dtype), layout) for s, m in [(2, 3), (1, 0), (1, 0)]
        )
        ours, eager = (results(f, x, r, g, torch.float32, training, activation) for f in (fused, composed))
        truth = results(composed, x.double(), r.double(), g.double(), torch.float64, training, activation)
        drawn.append((ours, eager, truth))
    for name in ours:
        value, other, exact = (torch.stack([d[i][name] for d in drawn]) for i in range(3))
        if several:
            allowed = (other.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
            assert (value.double() - exact).abs().max() <= allowed, name
        else:
            assert_no_worse_than(value, other, exact, name)
    if layout != "transposed":
        theirs = F.batch_norm(x, None, None, training=True)  # contiguous for (batch, length, channels), too
        assert ours["output"].stride() == theirs.stride()
        assert theirs.stride() != x.stride() or ours["grad_input"].stride() == x.stride()


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("layout", ["rows", "planes", "channels last"])
def test_large_mean_keeps_its_digits(layout, ratio):
    torch.manual_seed(0)
    std = 0.01
    x = lay_out(ratio * std + std * torch.randn(LAYOUTS[layout]), layout)
    g, leaf = torch.randn(LAYOUTS[layout]), x.clone().requires_grad_()
    exact = x.double().requires_grad_()
    y, z = (F.batch_norm(exact, None, None, training=True), fused_ops.batch_norm(leaf, None, None, training=True))
    y.backward(g.double())
    z.backward(g)
    assert (z - y).abs().max() < 2e-6
    assert (leaf.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()


def test_op_info_samples():
    """Every sample that PyTorch tests F.batch_norm with gives the same, or raises the same type of error."""
    info = next(op for op in op_db if op.name == "nn.functional.batch_norm")
    seen = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=False):

        def call(function, sample=sample):
            args = [a.clone() if torch.is_tensor(a) else a for a in sample.args]
            kwargs = {k: a.clone() if torch.is_tensor(a) else a for k, a in sample.kwargs.items()}
            try:
                return function(sample.input, *args, **kwargs), args[:2]
            except Exception as error:
                return type(error)

        ours, theirs = call(fused_ops.batch_norm), call(F.batch_norm)
        if isinstance(theirs, type):
            assert ours is theirs
        else:
            torch.testing.assert_close(ours, theirs)
        seen += 1
    assert seen > 10


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    "change", [torch.Tensor.double, torch.Tensor.bool, lambda t: t[:1]], ids=["double", "bool", "one"]
)
@pytest.mark.parametrize("place", range(4))
def test_parameters_of_another_dtype_or_size_are_refused(place, change):
    arguments = [torch.ones(3) for _ in range(4)]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=r"mixed dtype|should contain 3 elements not 1"):
        fused_ops.batch_norm(torch.randn(4, 3), *arguments, True)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty(shape, training, activation):
    channels = shape[1]
    mean, var, w = torch.zeros(channels), torch.ones(channels), torch.ones(channels, requires_grad=True)
    x = torch.empty(shape, requires_grad=True)
    y = fused_ops.batch_norm(x, mean, var, w, None, training, activation=activation, residual=x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and torch.equal(w.grad, torch.zeros(channels))
    assert torch.equal(mean, torch.zeros(channels)) and torch.equal(var, torch.ones(channels))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["rows", "planes", "small planes", "channels last"])
def test_non_finite_stays_in_its_channel(layout, bad):
    x = lay_out(torch.randn(LAYOUTS[layout]), layout)
    x[1, 1] = bad
    found = []
    for function in (F.batch_norm, fused_ops.batch_norm):
        leaf, mean, var = x.clone().requires_grad_(), torch.zeros(x.size(1)), torch.ones(x.size(1))
        y = function(leaf, mean, var, None, None, True)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaf), mean, var))
    torch.testing.assert_close(found[1], found[0], equal_nan=True, rtol=1e-4, atol=1e-4)
    y = found[1][0]
    assert y[:, 1].isnan().all() and y[:, [c for c in range(x.size(1)) if c != 1]].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 7.25, 1e30, -3e38, 1e-30])
def test_constant_channel(value):
    x = torch.full((64, 3), value, requires_grad=True)
    y = fused_ops.batch_norm(x, None, None, training=True)
    (grad,) = torch.autograd.grad(y, x, torch.randn(64, 3))
    assert torch.equal(y, torch.zeros(64, 3)) and grad.isfinite().all()


def test_variance_beyond_float32():
    x = torch.tensor([[1e30], [-1e30]], requires_grad=True)
    y = fused_ops.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y.detach(), torch.tensor([[1.0], [-1.0]]))


@pytest.mark.parametrize("correction", [0, 1])
def test_correction_is_the_unbiased_variance(correction):
    x = torch.randn(7, 3, dtype=torch.float64)
    expected = (x - x.mean(0)) / (x.var(0, correction=correction) + 1e-5).sqrt()
    torch.testing.assert_close(fused_ops.batch_norm(x, None, None, training=True, correction=correction), expected)


@pytest.mark.parametrize("layout", ["rows", "planes", "small planes", "channels last"])
@pytest.mark.parametrize("groups", [2, 3, 100])
def test_ghost_batches_equal_a_loop(layout, groups):
    x = lay_out(torch.randn(LAYOUTS[layout], dtype=torch.float64), layout)
    channels = x.size(1)
    stats, other = ([torch.zeros(channels).double(), torch.ones(channels).double()] for _ in range(2))
    y = fused_ops.batch_norm(x, *stats, training=True, groups=groups, activation="tanh")
    size = max(1, -(-x.size(0) // groups))
    if size == 1 and x[0, 0].numel() == 1:
        assert torch.equal(y, torch.zeros_like(y))
        return
    expected = torch.cat([F.batch_norm(part, *other, training=True).tanh() for part in x.split(size)])
    torch.testing.assert_close((y, stats), (expected, other))


@pytest.mark.parametrize("layout", ["planes", "small planes", "channels last", "length channels last", "rows"])
@pytest.mark.parametrize("training", [True, False])
def test_valid_equals_batch_norm_of_what_is_valid(layout, training):
    torch.manual_seed(0)
    x = lay_out(torch.randn(LAYOUTS[layout], dtype=torch.float64), layout).requires_grad_()
    valid = torch.rand(x.shape[:1] + x.shape[2:]) < 0.6
    stats, other = ([torch.full((x.size(1),), v).double() for v in (0.5, 2)] for _ in range(2))
    y = fused_ops.batch_norm(x, *stats, training=training, valid=valid, activation="silu")
    rows = F.silu(F.batch_norm(x.movedim(1, -1)[valid], *other, training=training))
    torch.testing.assert_close(y.movedim(1, -1)[valid], rows)
    assert torch.equal(y.movedim(1, -1)[~valid], torch.zeros_like(x.movedim(1, -1)[~valid]))
    g = torch.randn_like(rows)
    upstream = torch.ones_like(y)
    upstream.movedim(1, -1)[valid] = g
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream), torch.autograd.grad(rows, x, g))
    torch.testing.assert_close(stats, other)


def test_lengths_equal_their_mask():
    x, lengths = torch.randn(3, 2, 5), torch.tensor([5, 0, 2])
    mask = torch.arange(5) < lengths[:, None]
    a, b = (fused_ops.batch_norm(x, None, None, training=True, valid=v) for v in (lengths, mask))
    assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [*LAYOUTS, "large planes", "few channels"])
def test_threads_do_not_change_a_bit(layout):
    shape = {"large planes": (4, 40, 40, 41), "few channels": (4, 2, 150, 150)}.get(layout) or LAYOUTS[layout]
    x, r, g = (lay_out(torch.randn(shape), layout) for _ in range(3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(fused, x, r, g, torch.float32, True, "relu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].values(), other.values(), strict=True))


def test_expanded_and_reused_upstream_gradient():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    y = fused_ops.batch_norm(x, None, None, training=True, activation="gelu")
    z = F.gelu(F.batch_norm(x, None, None, training=True))
    g = torch.ones(1, 3, 1, 1, dtype=torch.float64).expand(4, 3, 5, 5)
    ours = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*ours) and torch.equal(g, torch.ones_like(g))
    torch.testing.assert_close(ours[0], torch.autograd.grad(z, x, g)[0])


def test_relu_after_residual_saves_bits():
    """The residual itself is not kept: a bit a value is."""
    saved = []
    x, r = torch.randn(4, 16, 8, 8, requires_grad=True), torch.randn(4, 16, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_ops.batch_norm(x, None, None, training=True, activation="relu", residual=r)
    large = [t for t in saved if t.numel() * t.element_size() > 1000]
    assert [t.shape for t in large] == [x.shape] and large[0].data_ptr() == x.data_ptr()
    assert sum(t.numel() for t in saved if t.dtype == torch.uint8) == x.numel() // 8


ERRORS = [
    (ValueError, "Expected more than 1 value per channel", lambda: call(torch.randn(1, 3))),
    (ValueError, "eps must be positive", lambda: call(torch.randn(2, 3), eps=0.0)),
    (ValueError, "neither be None", lambda: call(torch.randn(2, 3), running_mean=torch.zeros(3))),
    (RuntimeError, "must be defined in evaluation", lambda: call(torch.randn(2, 3), training=False)),
    (RuntimeError, "weight should contain 3 elements not 4", lambda: call(torch.randn(2, 3), weight=torch.ones(4))),
    (
        RuntimeError,
        r"mixed dtype.*weight.*\(Float\), got Half",
        lambda: call(torch.randn(2, 3), weight=torch.ones(3).half()),
    ),
    (RuntimeError, "mixed dtype", lambda: call(torch.randn(2, 3).double(), bias=torch.ones(3))),
    (IndexError, "must be", lambda: call(torch.randn(3))),
    (NotImplementedError, "floating-point", lambda: call(torch.ones(2, 3, dtype=torch.int64))),
    (TypeError, "must be Tensor, not list", lambda: call([1.0])),
    (TypeError, "momentum", lambda: call(torch.randn(2, 3), momentum=None)),
    (ValueError, "activation", lambda: call(torch.randn(2, 3), activation="swish")),
    (ValueError, "groups", lambda: call(torch.randn(2, 3), groups=0)),
    (RuntimeError, "residual", lambda: call(torch.randn(2, 3), residual=torch.randn(3))),
    (RuntimeError, "valid", lambda: call(torch.randn(2, 3, 4), valid=torch.ones(2, 3).bool())),
    (TypeError, "valid", lambda: call(torch.randn(2, 3, 4), valid=torch.ones(2))),
]


def call(x, **options):
    args = {"running_mean": None, "running_var": None, "training": True, **options}
    return fused_ops.batch_norm(x, **args)


@pytest.mark.parametrize(("kind", "text", "function"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(kind, text, function):
    if fused_ops.core.library.missing_reason and ("mixed" in text or "elements" in text):
        pytest.skip("checked by the native library")
    with pytest.raises(kind, match=text):
        function()


@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
def test_raw_ops_reject_garbage():
    ops = torch.ops.fused_ops
    x, statistics = torch.randn(4, 3), torch.zeros(2, 3).double()
    mask, long_mask = torch.empty(2, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)

    def forward(input=x, **options):
        return ops.batch_norm_forward(input, None, None, None, None, **options)

    def backward(grad=x, statistics=statistics, **options):
        return ops.batch_norm_backward(grad, x, None, None, statistics, **options)

    def keep_backward(stored, offsets, code=0):
        numbers = True, True, True, 0, code, 0.0, None, 1
        return ops.batch_norm_keep_backward(x, x, None, None, statistics, stored, offsets, *numbers)

    forward(activation=1, residual=x, mask=torch.empty(4, dtype=torch.uint8)), backward(grad_residual=x.clone())
    for bad in (
        lambda: forward(x[0]),
        lambda: forward(activation=99),
        lambda: forward(groups=0),
        lambda: forward(residual=x[:2]),
        lambda: forward(valid=torch.ones(7).bool()),
        lambda: forward(activation=1, residual=x, mask=long_mask),
        lambda: forward(activation=1, residual=x, mask=torch.empty(8, dtype=torch.uint8)[::2]),
        lambda: forward(activation=1, mask=mask),
        lambda: forward(activation=5, residual=x, mask=mask),
        lambda: backward(statistics=statistics[:, :2]),
        lambda: backward(groups=2),
        lambda: backward(activation=1, mask=mask),
        lambda: backward(x[:2]),
        lambda: backward(grad_residual=x[:2]),
        lambda: backward(grad_residual=x.double()),
        lambda: backward(grad_residual=x.T.contiguous().T),
        lambda: keep_backward(x[0], torch.zeros(2).long()),
        lambda: keep_backward(x[0, :0], torch.tensor([0, 7])),
        lambda: keep_backward(x[0, :0], torch.zeros(2)),
        lambda: keep_backward(x[0, :0], torch.zeros(2).long(), code=4),
    ):
        with pytest.raises(RuntimeError):
            bad()


CHILD = """
import torch, fused_ops
from fused_ops.ops.batch_norm import backward_reference as B, reference as R
ops = torch.ops.fused_ops
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 4e-6, torch.float64: 1e-12}[dtype]
    for shape in ((70, 300), (3, 4, 23, 29), (9, 5, 3, 3), (2, 2, 70, 70)):
        for act in range(9):
            torch.manual_seed(act)
            x, r, g = (torch.randn(shape).to(dtype) for _ in range(3))
            w, b = (torch.randn(shape[1]).to(R.acc_dtype(dtype)) for _ in range(2))
            numbers = dict(activation=act, slope=0.0 if act == 1 else 0.1)
            found = []
            for forward, backward in ((ops.batch_norm_forward, ops.batch_norm_backward), (R.forward, B.backward)):
                signs = torch.empty(R.mask_bytes(x), dtype=torch.uint8) if R.has_mask(r, None, act) else None
                y, statistics = forward(x, None, None, w, b, residual=r, mask=signs, **numbers)
                if not found:  # both backwards get the same signs of z
                    shared = None if signs is None else signs.clone()
                saved = dict(residual=r if signs is None else None, mask=shared, grad_residual=torch.empty_like(x))
                grads = backward(g, x, w, b, found[0][1] if found else statistics, **saved, **numbers)
                found.append((y, statistics, *grads, saved["grad_residual"]))
            for a, c in zip(*found):
                limit = tolerance if a.dtype == dtype else 4e-6
                error = (a.double() - c.double()).abs().max() / c.double().abs().max()
                assert error < limit, (dtype, shape, act, float(error))
bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)  # every bfloat16 and float16, NaNs with any payload among them
for dtype in (torch.bfloat16, torch.float16):
    for shape in ((1, 1, 256, 256), (256, 256), (1024, 64), (256, 4, 8, 8)):
        x, scale = bits.view(dtype).reshape(shape), 1.00390625
        n = shape[1]
        params = (torch.zeros(n), torch.ones(n), torch.full((n,), scale), torch.zeros(n))
        y = ops.batch_norm_forward(x, *params, False, 0.1, 0.0)[0]
        torch.testing.assert_close(y, (x.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)
print(fused_ops.core.library.isa())
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="one ISA there")
@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_isa_matches_the_reference(isa, run_python):
    skip_without(isa)
    assert run_python("-c", CHILD, ATEN_CPU_CAPABILITY=isa).stdout.strip().lower() == isa


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 4, 9, 7), (2, 3, 5, 1), (5, 12)])
def test_mask_is_the_sign(shape, channels_last):
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.full((reference.mask_bytes(x),), 0xAA, dtype=torch.uint8)
    options = {"activation": activations.RELU, "residual": r, "mask": mask}
    y, _ = torch.ops.fused_ops.batch_norm_forward(x, None, None, None, None, **options)
    assert torch.equal(reference.unpack(mask, x), y > 0)

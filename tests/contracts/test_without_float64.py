"""A device without float64, as MPS: the CPU with that rule switched on, where a fresh float64 tensor is an error.

Every raw op runs on its reference, in sight of the mode that looks for float64. The results are those of the ordinary
ops to what float32 sums cost, and the fake kernels say the dtypes that the references return.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import fused_ops
from fused_ops.core import library, memory_format
from fused_ops.core.graph import implementations
from fused_ops.ops.batch_norm import ranks_reference
from fused_ops.ops.batch_norm.reference import mask_bytes
from fused_ops.ops.cross_entropy import shards_reference
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.testing import samples_of as samples

# Numbers of Python as tensors, which are on the CPU whatever the device: those of an op for graphs, and of a product.
OF_NUMBERS = {torch.ops.aten.lift_fresh.default, torch.ops.aten._efficientzerotensor.default}


class WithoutFloat64(TorchDispatchMode):
    """Raises where an op makes a float64 tensor; the package's ops run on the reference, inside of the mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fused_ops":
            with self, torch.no_grad():
                if func in implementations:
                    return implementations[func](*args, **kwargs)
                out = library.references[func](*args, **kwargs)
            self.check_fake(func, args, kwargs, out)
            return out
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
        made = [] if given or func in OF_NUMBERS else made
        assert not made, f"{func} makes a float64 tensor of shape {list(made[0].shape)}"
        return out

    @staticmethod
    def check_fake(func, args, kwargs, out):
        with FakeTensorMode() as mode:
            as_fake = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, (args, kwargs))
            try:
                fake = func(*as_fake[0], **as_fake[1])
            except DynamicOutputShapeException:  # a size that depends on the data
                return
        assert [t.dtype for t in tree_leaves(fake) if isinstance(t, torch.Tensor)] == [
            t.dtype for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        ], func


@pytest.fixture
def rule(monkeypatch):
    """Switches the rule on for the CPU."""
    return lambda: monkeypatch.setattr(memory_format, "_WITHOUT_FLOAT64", ("mps", "cpu"))


def same_without_float64(run, rule):
    """What run() gives with the rule on is what it gives without, to what float32 sums cost."""
    expected = run()
    rule()
    with WithoutFloat64():
        found = run()
    for mine, ordinary in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.to(ordinary.dtype), ordinary, rtol=1e-5, atol=1e-5)


def narrow(values, dtype=torch.float32):
    """The floating-point tensors in this dtype, leaves that require grad if they did; float64 as a dtype too."""

    def one(t):
        if t is torch.float64:
            return torch.float32
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    return tree_map(one, values)


def weighted(t):
    return (t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).reshape(t.shape) ** 3).sum()


def derivatives(function, args, kwargs):
    """The outputs of a call, the gradients, the gradients of a sum of their squares, and the tangents.

    Of weighted sums: the sum of squares of normalised values has a gradient of roundings alone.
    """
    leaves, spec = tree_flatten((args, kwargs))
    wanted = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.requires_grad]

    def call(tensors):
        values = [t.clone() if isinstance(t, torch.Tensor) else t for t in leaves]  # running statistics are written
        for i, t in zip(wanted, tensors, strict=True):
            values[i] = t
        a, k = tree_unflatten(values, spec)
        out = tree_leaves(function(*a, **k))
        return [t for t in out if isinstance(t, torch.Tensor) and t.is_floating_point()]

    inputs = [leaves[i] for i in wanted]
    outputs = call(inputs)
    total = sum(weighted(t) for t in outputs if t.requires_grad)
    plain = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first if g is not None), inputs, allow_unused=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), torch.ones_like(t)) for t in inputs]
        tangents = [forward_ad.unpack_dual(t).tangent for t in call(duals)]
    return [None if t is None else t.detach() for t in (*outputs, *plain, *first, *second, *tangents)]


OPS = {name: getattr(fused_ops, name) for name in ("cross_entropy", "batch_norm", "linear_cross_entropy")}
CASES = [(name, i) for name in OPS for i in range(len(samples(name)))]


@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{n} {samples(n)[i].name}" for n, i in CASES])
def test_no_sample_makes_a_float64_tensor(name, index, rule):
    sample = samples(name)[index]
    args, kwargs = narrow((sample.args, sample.kwargs))
    expected = derivatives(OPS[name], *narrow((sample.args, sample.kwargs), torch.float64))
    rule()
    with WithoutFloat64():
        found = derivatives(OPS[name], args, kwargs)
    for mine, truth in zip(found, expected, strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None:
            scale = float(truth.abs().nan_to_num(0, 0, 0).max()) if truth.numel() else 0.0
            torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-4, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"activation": "gelu"}], ids=str)
def test_batch_norm_modules(options, dtype, rule):
    x = (torch.randn(8, 3, 6, 5) * 3 + 40).to(dtype)
    module = fused_ops.BatchNorm2d(3, **options)

    def run():
        module.reset_parameters()
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        weighted(y.float()).backward()
        module.eval()
        with torch.no_grad():
            after = module(x)
        module.train()
        return [y.detach(), leaf.grad, module.weight.grad.clone(), module.running_mean, module.running_var, after]

    expected = [t.clone() for t in run()]
    module.zero_grad()
    rule()
    with WithoutFloat64():
        found = run()
    near = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, ordinary in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, ordinary, rtol=near, atol=near * float(ordinary.abs().max()))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0}, {"z_loss": 0.1}], ids=str)
def test_a_head(options, chunk, rule):
    x, w = torch.randn(10, 8), torch.randn(50, 8)
    target = torch.randint(0, 50, (10,))
    target[2] = -100

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss = fused_ops.linear_cross_entropy(*leaves, target, chunk_rows=chunk, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = run()
    rule()
    with WithoutFloat64():
        found = run()
    for mine, ordinary in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, ordinary, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_of_a_row_and_their_merge(smoothing, rule):
    x, target, o = torch.randn(6, 10) * 3, torch.randint(0, 10, (6,)), RowOptions(-100, smoothing, 1.0, 0.0, True)
    g = torch.rand(6)

    def run():
        allowed = torch.full((), 10.0, dtype=memory_format.wide_dtype(x))
        a = [RowArgs(x[:, s : s + 5].clone(), target, None, None, None) for s in (0, 5)]
        parts = [shards_reference.forward(*t, allowed, s, 10, *o) for t, s in zip(a, (0, 5), strict=True)]
        m = shards_reference.merge(torch.stack(parts), a[0], o)
        tops = torch.stack([shards_reference.maxima(p) for p in parts]).amax(0)
        sums = sum(shards_reference.summands(p, tops, a[0], o) for p in parts)
        best = torch.stack([shards_reference.best_class(p, tops) for p in parts]).amax(0)
        again = shards_reference.merge_sums(tops, sums, best, a[0], o)
        saved = m.high, m.low, m.mass, m.target_weight, m.entropy, m.target_log_probability
        grads = [
            shards_reference.backward(g, None, None, None, *t, allowed, *saved, s, 10, *o)
            for t, s in zip(a, (0, 5), strict=True)
        ]
        return [*m, *again, *grads]

    same_without_float64(run, rule)


def test_batch_norm_in_parts(rule):
    x, g, r = (torch.randn(6, 3, 4) for _ in range(3))
    weight, bias, valid = torch.rand(3), torch.randn(3), torch.rand(6, 4) > 0.3

    def run():
        m = ranks_reference.merge(torch.stack([ranks_reference.moments(part, None) for part in x.chunk(2)]))
        counted = ranks_reference.moments(x, valid)
        statistics = torch.stack((m.mean, (m.m2 / m.values + 1e-5).rsqrt()))
        mask = torch.zeros(mask_bytes(x), dtype=torch.uint8)
        y = ranks_reference.normalise(statistics, x, weight, bias, 1, 0.0, r, mask, None)
        args = g, x, weight, bias, statistics, 1, 0.0, None, mask, None
        sums = ranks_reference.grad_sums(*args)
        return [*m, counted, y, sums, ranks_reference.gradient(sums / m.values, torch.empty_like(x), *args)]

    same_without_float64(run, rule)


def test_sums_in_blocks(rule):
    """A float32 sum over a million values is off by roundings of its blocks, and not by those of a million."""
    x = torch.rand(3, 1_000_003)
    rule()
    for dims in (1, [1], [0, 1]):
        found, exact = memory_format.wide_sum(x, dims), x.double().sum(dims)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)
    assert memory_format.wide_sum(x, [0, 1], keepdim=True).shape == (1, 1)

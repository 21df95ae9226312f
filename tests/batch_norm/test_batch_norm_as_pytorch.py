"""What PyTorch's batch norm does beside its arithmetic: how it writes running statistics, and its result's strides."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_ops

# ---- running statistics are written without autograd's notice


class SavesTheStatistics(nn.Module):
    """PyTorch's batch norm saves the running statistics for its backward; then they are written."""

    def __init__(self, kind, **options):
        super().__init__()
        self.bn = kind(3, **options)

    def forward(self, x):
        y = F.batch_norm(x.sin(), self.bn.running_mean, self.bn.running_var)
        return y + self.bn(x * 2)


OPTIONS = ({}, {"momentum": None}, {"inplace_activated": True})
COMPILED = [(options, backend) for backend in ("aot_eager", "eager", "fused_ops") for options in OPTIONS]


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        *((options, None) for options in OPTIONS),
        COMPILED[0],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED[1:]),
    ],
    ids=str,
)
def test_who_saved_the_running_statistics_can_go_on(options, backend):
    found = []
    for kind in (fused_ops.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(0)
        kept = {name: v for name, v in options.items() if kind is not nn.BatchNorm2d or name == "momentum"}
        model = SavesTheStatistics(kind, **kept).double()
        if backend is not None:
            torch._dynamo.reset()
        call = model if backend is None else torch.compile(model, backend=backend)
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            loss = call(x).pow(3).sum()
            loss.backward()
        found.append((loss, x.grad, model.bn.weight.grad, model.bn.running_mean, model.bn.running_var))
    torch.testing.assert_close(*found)


STATISTICS = {
    "contiguous": lambda: (torch.zeros(3), torch.ones(3)),
    "strided": lambda: tuple(torch.stack([torch.zeros(3), torch.ones(3)], 1).unbind(1)),
    "one tensor": lambda: tuple(torch.stack([torch.zeros(3), torch.ones(3)]).unbind(0)),
}
WAYS = {
    "eager": lambda f, x, *running: f(x, *running, training=True),
    "no grad": lambda f, x, *running: f(x.detach(), *running, training=True),
    "large": lambda f, x, *running: f(x.repeat(16, 1, 32, 32), *running, training=True),
    "a parameter": lambda f, x, *running: f(nn.Parameter(x.detach()), *running, training=True),
    "forward AD": lambda f, x, *running: f(forward_ad.make_dual(x, x), *running, training=True),
    "torch.func": lambda f, x, *running: torch.func.grad(lambda y: f(y, *running, training=True).pow(3).sum())(x),
}


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("way", WAYS)
def test_their_version_is_pytorchs(way, statistics):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 1, 1, requires_grad=True)
    found = []
    for function in (fused_ops.batch_norm, F.batch_norm):
        running = STATISTICS[statistics]()
        with forward_ad.dual_level():
            WAYS[way](function, x, *running)
        assert running[0].abs().sum() > 0
        found.append(([t._version for t in running], *running))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1:], found[1][1:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_take_them_as_arguments(reentrant):
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    plain = [t.clone() for t in running]

    def function(x, mean, var):
        return fused_ops.batch_norm(x, mean, var, training=True, activation="relu")

    function(x, *plain).pow(3).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(function, x, *running, use_reentrant=reentrant).pow(3).sum().backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(running[0], plain[0]) and torch.equal(running[1], plain[1])  # counted once


# ---- strides


def layouts(shape):
    """Tensors of that shape: dense in any order, with gaps, and with odd strides in dimensions of size 1."""
    orders = list(itertools.permutations(range(len(shape))))
    for order in orders if len(shape) < 5 else orders[::3]:
        yield torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    larger = torch.randn([size + 2 for size in shape])
    window = tuple(slice(1, 1 + size) for size in shape)
    yield larger[window]
    yield larger.movedim(1, -1).contiguous().movedim(-1, 1)[window]
    dense = torch.randn(shape)
    yield torch.randn(50_000).as_strided(
        shape, [7777 if n == 1 else s for n, s in zip(shape, dense.stride(), strict=True)]
    )
    pooled = torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1)
    yield pooled.mean(tuple(range(2, len(shape))), keepdim=True) if len(shape) > 2 else pooled


SIZES = [s for n in (2, 3, 4) for s in itertools.product((1, 2), repeat=n)]
SIZES += [  # of five dimensions a few
    (2, 1, 1, 1, 1),
    (2, 3, 1, 1, 1),
    (2, 1, 2, 1, 2),
    (1, 2, 1, 2, 1),
    (3, 2, 2, 1, 2),
    (3, 4, 1, 1),
    (3, 4, 2, 3),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_strides_of_the_output(activation, training):
    checked = 0
    for shape in SIZES:
        for x in layouts(shape):
            if training and x.numel() == x.size(1):
                continue
            arguments = torch.zeros(x.size(1)), torch.ones(x.size(1)), None, None, training
            theirs = F.batch_norm(x, *arguments)
            theirs = F.relu(theirs) if activation else theirs
            for leaf in (x, x.detach().requires_grad_()):
                ours = fused_ops.batch_norm(leaf, *arguments, activation=activation)
                assert ours.stride() == theirs.stride(), (x.shape, x.stride())
                torch.testing.assert_close(ours, theirs)
            checked += 1
    assert checked > 400


EMPTY = [s for n in (4, 5) for s in itertools.product((0, 2, 3), repeat=n) if s.count(0) == 1 and 0 in (s[0], s[2])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.usefixtures("served")
def test_what_is_empty_keeps_its_memory_format(affine, training):
    """As with PyTorch, the output and its gradient; behind an activation too, which drops it there."""
    for shape in EMPTY:
        for last in (torch.channels_last if len(shape) == 4 else torch.channels_last_3d, torch.contiguous_format):
            found, x = [], torch.empty(shape).contiguous(memory_format=last).requires_grad_()
            params = [torch.ones(shape[1]) for _ in range(2)] if affine else (None, None)
            arguments = torch.zeros(shape[1]), torch.ones(shape[1]), *params, training
            for function in (F.batch_norm, fused_ops.batch_norm, partial(fused_ops.batch_norm, activation="relu")):
                y = function(x, *arguments)
                found.append((y.stride(), torch.autograd.grad(y, x, torch.ones_like(y))[0].stride()))
            assert found[1] == found[2] == found[0], (shape, x.stride())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_strides_in_graphs_are_the_real_ones(activation, training):
    empty = (0, 3, 2, 2), (0, 3, 1, 1), (2, 3, 0, 4), (0, 1, 2, 2), (0, 2, 2, 1, 2)
    for shape in ((2, 1), (2, 1, 2), (2, 3, 1, 1), (1, 1, 1, 2), (2, 2, 1, 2), *empty):
        for x in layouts(shape):
            if training and x.numel() == x.size(1):
                continue
            arguments = torch.zeros(x.size(1)), torch.ones(x.size(1)), None, None, training
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (x, *arguments)]
                fake = fused_ops.batch_norm(*fakes, activation=activation)
            real = fused_ops.batch_norm(x, *arguments, activation=activation)
            assert fake.shape == real.shape and fake.stride() == real.stride(), (x.shape, x.stride())

"""The batch-norm modules against PyTorch's, folding, and the transforms that models go through."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import fused_ops

KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
SHAPES = {"BatchNorm1d": (4, 3), "BatchNorm2d": (4, 3, 2, 5), "BatchNorm3d": (2, 3, 2, 2, 3)}


def pair(kind, **options):
    """PyTorch's module and ours with the same, not trivial, state."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(3, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours = getattr(fused_ops, kind)(3, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_module_equals_pytorch(kind, momentum, affine, track):
    """In float64: of four values a channel, float32 leaves a gradient four digits, of PyTorch's too."""
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track}
    theirs, ours = (module.double() for module in pair(kind, **options))
    for step in range(4):
        if step == 3:
            theirs.eval(), ours.eval()
        x = torch.randn(SHAPES[kind], dtype=torch.float64)
        results = []
        for module in (theirs, ours):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    back = copy.deepcopy(theirs)
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values(), strict=True))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_module_db(kind):
    """The module samples that PyTorch tests its own with."""
    info = next(m for m in module_db if m.module_cls is getattr(nn, kind))
    seen = 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, False, True):
        build, call = sample.constructor_input, sample.forward_input
        torch.manual_seed(seen)
        theirs = getattr(nn, kind)(*build.args, **build.kwargs).double()
        ours = getattr(fused_ops, kind)(*build.args, **build.kwargs).double()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(*call.args, **call.kwargs), theirs(*call.args, **call.kwargs))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        seen += 1
    assert seen >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_lazy_module(kind):
    lazy, x = getattr(fused_ops, "Lazy" + kind)(activation="relu", momentum=0.2), torch.randn(SHAPES[kind])
    y = lazy(x)
    assert type(lazy) is getattr(fused_ops, kind) and lazy.activation == "relu" and lazy.momentum == 0.2
    torch.testing.assert_close(y, getattr(nn, kind)(3)(x).relu())


def test_pickle_and_deepcopy():
    module = fused_ops.BatchNorm1d(3, activation="silu", groups=2)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.activation == "silu" and twin.groups == 2
        assert "activation=silu, groups=2" in repr(twin)


@pytest.mark.parametrize(
    ("kind", "shape"), [("BatchNorm2d", (2, 3, 4)), ("BatchNorm1d", (2, 3, 4, 5)), ("BatchNorm3d", (2, 3, 4, 5))]
)
def test_wrong_dimensions(kind, shape):
    with pytest.raises(ValueError, match="expected"):
        getattr(fused_ops, kind)(3)(torch.randn(shape))


def test_frozen_uses_and_keeps_running_statistics():
    module = fused_ops.BatchNorm1d(3, frozen=True)
    module.running_mean.normal_()
    before, x = copy.deepcopy(module.state_dict()), torch.randn(5, 3, requires_grad=True)
    y = module(x)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, module.running_mean, module.running_var))
    y.sum().backward()
    assert module.weight.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint_counts_once(reentrant, momentum):
    plain, kept = fused_ops.BatchNorm1d(3, momentum=momentum), fused_ops.BatchNorm1d(3, momentum=momentum)
    x = torch.randn(5, 3, requires_grad=True)
    expected = torch.autograd.grad(plain(x).square().sum(), (x, plain.weight), allow_unused=True)
    checkpoint(kept, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close((x.grad, kept.weight.grad), expected)
    torch.testing.assert_close(kept.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert kept.num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_the_functional_ops_counts_once(reentrant):
    """Ghost batches are not for the packed ops; the functional ones return the statistics, to be written back once."""
    x = torch.randn(6, 3, requires_grad=True)
    plain, kept = ((torch.zeros(3), torch.ones(3)) for _ in range(2))

    def function(running, x):
        return fused_ops.batch_norm(x, *running, training=True, groups=2)

    expected = torch.autograd.grad(function(plain, x).pow(3).sum(), x)[0]
    checkpoint(function, kept, x, use_reentrant=reentrant).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_checkpoint_frees_the_input():
    """What a forward saves must be reachable by saved-tensor hooks, or checkpointing and offloading save nothing."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape), lambda _: None):
        x = torch.randn(5, 3, requires_grad=True) * 1
        y = fused_ops.batch_norm(x, None, None, training=True, activation="silu")
    assert (5, 3) in packed
    context = y.grad_fn.next_functions and y.grad_fn
    assert not getattr(context, "saved_for_forward", None)


def test_two_forwards_before_one_backward():
    module = fused_ops.BatchNorm1d(3)
    a, b = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    both = torch.autograd.grad((module(a) * module(b)).sum(), (a, b))
    theirs = nn.BatchNorm1d(3)
    torch.testing.assert_close(both, torch.autograd.grad((theirs(a) * theirs(b)).sum(), (a, b)))


def conv_model(linear=False):
    if linear:
        return nn.Sequential(nn.Linear(6, 4), fused_ops.BatchNorm1d(4, activation="silu"), nn.Linear(4, 2))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        fused_ops.BatchNorm2d(6, activation="leaky_relu", negative_slope=0.2),
    )


@pytest.mark.parametrize("linear", [False, True])
def test_fold_model(linear):
    torch.manual_seed(1)
    model = conv_model(linear).double()
    x = torch.randn(4, 6, dtype=torch.float64) if linear else torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for _ in range(3):
        model(torch.randn_like(x) * 2 + 1)
    with pytest.raises(ValueError, match="evaluation mode"):
        fused_ops.fold(model)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    folded = fused_ops.fold(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


FOLDED = {
    "linear": (lambda: nn.Linear(24, 16), nn.BatchNorm1d, (64, 24)),
    "linear without bias": (lambda: nn.Linear(24, 16, bias=False), nn.BatchNorm1d, (64, 24)),
    "convolution": (lambda: nn.Conv2d(8, 16, 3), nn.BatchNorm2d, (4, 8, 9, 9)),
    "convolution in groups": (lambda: nn.Conv1d(8, 16, 3, groups=4), nn.BatchNorm1d, (4, 8, 30)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(8, 16, 3, groups=2), nn.BatchNorm2d, (4, 8, 7, 7)),
}


@pytest.mark.parametrize("layer", FOLDED)
@pytest.mark.parametrize("ratio", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_rounds_once(layer, ratio, dtype):
    """Weight and bias are the exact ones rounded, which costs half a rounding of every product that is added.

    The layer then adds its products in an order of its own, with half a rounding of the sum so far for each of them: in
    PyTorch's convolutions up to a dozen in all, on processors where they start from the bias, which is large here.
    """
    torch.manual_seed(2)
    make, kind, shape = FOLDED[layer]
    model = nn.Sequential(make(), kind(16)).to(dtype).eval()
    with torch.no_grad():
        for t in (*model[1].parameters(), model[1].running_var):
            t.copy_(torch.rand_like(t) + 0.5)
        model[1].running_mean.copy_(ratio * torch.randn(16))
        folded = fused_ops.fold(*model)
        exact = fused_ops.fold(*copy.deepcopy(model).double())
        for mine, truth in zip(folded.parameters(), exact.parameters(), strict=True):
            assert torch.equal(mine, truth.to(dtype))
        if dtype == torch.float64:
            return
        x = torch.randn(shape)
        truth = copy.deepcopy(model).double()(x.double())
        sizes = copy.deepcopy(exact)
        for t in sizes.parameters():
            t.abs_()
        half = torch.finfo(dtype).eps / 2 * sizes(x.double().abs())
        added_exactly = copy.deepcopy(folded).double()(x.double())
        assert bool(((added_exactly - truth).abs() <= half).all())
        terms = model[0].weight[0].numel() + 1  # or fewer
        assert bool(((folded(x).double() - truth).abs() <= (terms + 1) * half).all())


def test_fold_of_batch_norms_one_behind_the_other():
    """Both go into the layer, the second into what the first has made of it."""
    for kind in (nn.BatchNorm1d, fused_ops.BatchNorm1d):
        model = nn.Sequential(nn.Linear(5, 3), kind(3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).double()
        for bn in (model[1], model[2], model[4]):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
        x = torch.randn(4, 5, dtype=torch.float64)
        folded = fused_ops.fold(model.eval())
        torch.testing.assert_close(folded(x), model(x))
        assert sum(isinstance(m, nn.BatchNorm1d) for m in folded.modules()) == 1


def test_fold_leaves_what_it_cannot_fold():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    model, x = Shared().eval(), torch.randn(2, 2, 3)
    model.bn.running_var.fill_(3.0)
    assert torch.equal(fused_ops.fold(model)(x), model(x))


def test_fold_errors():
    bn = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="evaluation mode"):
        fused_ops.fold(nn.Linear(2, 3), bn)
    with pytest.raises(ValueError, match="bn of 4 channels, got 3"):
        fused_ops.fold(nn.Linear(2, 4), bn.eval())
    with pytest.raises(TypeError, match="convolution or linear"):
        fused_ops.fold(nn.ReLU(), bn)
    with pytest.raises(TypeError, match="BatchNorm1d"):
        fused_ops.fold(nn.Linear(2, 3), nn.ReLU())


class Model(nn.Module):
    def __init__(self, momentum):
        super().__init__()
        self.bn = fused_ops.BatchNorm2d(4, momentum=momentum, activation="relu")
        self.last = fused_ops.BatchNorm2d(4, momentum=momentum)

    def forward(self, x):
        return self.last(self.bn(x, residual=x * 2))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(momentum, channels_last, training):
    eager = Model(momentum).train(training)
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 4, 5, 6)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = eager(a), function(b)
        torch.testing.assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model, x = Model(0.1).train(training), torch.randn(3, 4, 5, 6)
    program = torch.export.export(copy.deepcopy(model), (x,), strict=False)
    ops = {str(node.target) for node in program.graph.nodes}
    assert "fused_ops.batch_norm.default" in ops
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_keeps_the_input_dtype(dtype):
    module, x = fused_ops.BatchNorm1d(3), torch.randn(4, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == nn.BatchNorm1d(3)(x).dtype == dtype


@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_ensemble_under_vmap(activation, training):
    """vmap over models, each with statistics of its own, equals a loop over them."""
    models, x = 3, torch.randn(5, 2, 4)
    weight, bias, mean = torch.randn(models, 2), torch.randn(models, 2), torch.randn(models, 2)
    var = torch.rand(models, 2) + 0.5

    def loss(w, b, m, v, x):
        stats = (None, None) if training else (m, v)
        return fused_ops.batch_norm(x, *stats, w, b, training, activation=activation, residual=x).sin().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 4))
    found = torch.func.vmap(gradient, in_dims=(0, 0, 0, 0, None))(weight, bias, mean, var, x)
    for i in range(models):
        one = gradient(weight[i], bias[i], mean[i], var[i], x)
        torch.testing.assert_close([f[i] for f in found], list(one))

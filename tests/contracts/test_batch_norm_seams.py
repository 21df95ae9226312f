"""Batch norm where PyTorch's other systems meet it: torch.func, torch.compile, torch.export, TorchScript, torch.fx."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch._dynamo.testing
from conftest import grid
from torch import nn
from torch.export import Dim
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing import assert_close

import fused_ops
from fused_ops.ops.batch_norm.samples import samples
from fused_ops.testing import _as_if_compiling, _RecordRawOps

# One call of each class of options: its keywords, and those that say how the tensors are made.
CALLS = {
    "plain": {},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.2},
    "elu": {"activation": "elu", "alpha": 1.3},
    "gelu": {"activation": "gelu"},
    "hardswish": {"activation": "hardswish"},
    "residual": {"residual": True},
    "residual, relu": {"residual": True, "activation": "relu"},
    "mask, residual, silu": {"valid": "mask", "residual": True, "activation": "silu"},
    "lengths": {"valid": "lengths", "activation": "tanh"},
    "ghost batches": {"groups": 3, "residual": True, "activation": "relu"},
    "correction": {"correction": 1, "momentum": 0.3, "eps": 0.01},
    "output kept": {"inplace_activated": True, "activation": "leaky_relu"},
    "evaluation": {"training": False, "residual": True, "activation": "relu"},
    "evaluation, lengths": {"training": False, "valid": "lengths"},
    "no affine": {"affine": False, "activation": "sigmoid"},
    "no running statistics": {"running": False},
}
FEW = ("plain", "residual, relu", "lengths", "ghost batches", "evaluation")
NAMES = ("input", "running_mean", "running_var", "weight", "bias", "residual", "valid")


class Call:
    """A function of the tensors that are there, and such tensors; of these, those that require grad come first."""

    def __init__(self, name):
        self.options = {"training": True, **CALLS[name]}
        self.made = {k: self.options.pop(k, v) for k, v in (("affine", True), ("running", True))}
        self.made |= {k: self.options.pop(k, None) for k in ("residual", "valid")}
        made = self.made
        present = {"input": True, "residual": made["residual"], "valid": made["valid"]}
        present |= dict.fromkeys(("weight", "bias"), made["affine"])
        present |= dict.fromkeys(("running_mean", "running_var"), made["running"])
        order = ("input", "weight", "bias", "residual", "running_mean", "running_var", "valid")
        self.names = [n for n in order if present[n]]
        self.differentiable = sum(n in order[:4] for n in self.names)
        self.rest = self.tensors()[self.differentiable :]

    def tensors(self, batch=5, seed=0):
        draw = torch.Generator().manual_seed(seed)
        shapes = {"input": (batch, 3, 4), "residual": (batch, 3, 4)}
        made = {n: torch.randn(shapes.get(n, 3), generator=draw, dtype=torch.float64) for n in self.names}
        if self.made["running"]:
            made["running_var"] = made["running_var"].exp()
        if self.made["valid"] == "mask":
            made["valid"] = torch.rand(batch, 4, generator=draw) > 0.3
        if self.made["valid"] == "lengths":
            made["valid"] = torch.randint(1, 5, (batch,), generator=draw)
        return [made[n] for n in self.names]

    def __call__(self, *tensors):
        given = dict.fromkeys(NAMES) | dict(zip(self.names, tensors, strict=True))
        return fused_ops.batch_norm(**given, **self.options)

    def loss(self, *differentiable):
        """Of the first tensors alone; with copies of the others, so that no call changes another's."""
        return self(*differentiable, *(t.clone() for t in self.rest)).sin().sum()

    def leaves(self):
        return self.tensors()[: self.differentiable]


def results(function, call, tensors):
    """The output, every gradient, and what the other tensors are afterwards."""
    given = [t.clone().requires_grad_(i < call.differentiable) for i, t in enumerate(tensors)]
    output = function(*given)
    grads = torch.autograd.grad(output.sin().sum(), given[: call.differentiable])
    return [output, *grads, *given[call.differentiable :]]


def close(a, b):
    assert_close(a, b, rtol=1e-9, atol=1e-7)  # PyTorch's own gradients cancel to about 1e-9


def every(names=CALLS, at_once=CALLS):
    """A test of each call; those not ``at_once`` are marked slow."""
    marks = {n: () if n in at_once else pytest.mark.slow for n in names}
    return pytest.mark.parametrize("call", [pytest.param(Call(n), id=n, marks=marks[n]) for n in names])


# ---- torch.func


@every()
def test_nested_forward_levels(call):
    everything = tuple(range(call.differentiable))
    second = jacfwd(jacfwd(call.loss, argnums=everything), argnums=everything)(*call.leaves())
    close(second, hessian(call.loss, argnums=everything)(*call.leaves()))


@every(FEW)
def test_three_forward_levels(call):
    x, *rest = call.leaves()
    v = torch.ones_like(x)

    def second(x):
        return jvp(lambda y: jvp(lambda z: call.loss(z, *rest), (y,), (v,))[1], (x,), (v,))[1]

    numeric = (second(x + 1e-5 * v) - second(x - 1e-5 * v)) / 2e-5
    assert_close(jvp(second, (x,), (v,))[1], numeric, rtol=1e-5, atol=1e-6)


@every()
def test_functionalize(call):
    everything = tuple(range(call.differentiable))
    gradient = grad(call.loss, argnums=everything)
    close(functionalize(gradient)(*call.leaves()), gradient(*call.leaves()))


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "nested jvp": lambda f, x: jvp(lambda y: jvp(f, (y,), (x.cos(),))[1], (x,), (x.sin(),)),
    "linearize": lambda f, x: linearize(f, x)[1](x.cos()),
    "jacrev": lambda f, x: jacrev(f)(x),
    "hessian": lambda f, x: hessian(f)(x),
    "functionalize": lambda f, x: functionalize(f)(x),
    "functionalize(grad)": lambda f, x: functionalize(grad(f))(x),
    "compile(grad)": lambda f, x: torch.compile(grad(f), backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_captured_running_statistics(transform):
    """They are updated as PyTorch's batch norm does, once."""
    x = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for function in (fused_ops.batch_norm, F.batch_norm):
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        run = TRANSFORMS[transform]
        if transform == "linearize" and function is F.batch_norm:
            # It calls the function twice; in what it returns PyTorch's own updates them a third time.
            run = lambda f, x: [jvp(f, (x,), (x.cos(),))[1] for _ in range(2)][1]  # noqa: E731
        value = run(lambda x, f=function, r=running: f(x, *r, training=True).pow(3).sum(), x)
        if transform == "nested jvp":  # PyTorch's own is wrong
            value = ()
        found.append((value, *running))
    assert_close(*found)
    assert found[0][1].abs().sum() > 0


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_linearize_where_the_signs_are_kept(activation):
    """It computed at once what reads the signs of z, and later what writes them: other numbers, without a word."""
    x, r, v = (torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(3))

    def loss(x, r):
        return fused_ops.batch_norm(x, None, None, training=True, residual=r, activation=activation).sin().sum()

    for function in (loss, grad(loss, argnums=(0, 1))):
        value, along = linearize(function, x, r)
        close((value, along(v, v.cos())), jvp(function, (x, r), (v, v.cos())))


def test_running_statistics_under_vmap():
    x = torch.randn(2, 5, 3)
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="batched tensor as input while the running_mean or running_var"):
        vmap(lambda x: fused_ops.batch_norm(x, *running, training=True))(x)
    found = []
    for function in (fused_ops.batch_norm, F.batch_norm):
        each = torch.zeros(2, 3), torch.ones(2, 3)
        found.append((vmap(lambda x, m, v, f=function: f(x, m, v, training=True))(x, *each), *each))
    assert_close(*found)


# ---- torch.compile


@every(at_once=FEW)
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_transforms_inside_of_compile(call, backend):
    everything = tuple(range(call.differentiable))
    gradient = grad(call.loss, argnums=everything)
    close(torch.compile(gradient, backend=backend, fullgraph=True)(*call.leaves()), gradient(*call.leaves()))


@every(FEW)
def test_forward_mode_inside_of_compile(call):
    x, *rest = call.leaves()

    def tangent(x):
        return jvp(lambda x: call.loss(x, *rest), (x,), (x.cos(),))

    close(torch.compile(tangent, backend="aot_eager", fullgraph=True)(x), tangent(x))


@pytest.mark.parametrize("residual", [False, True])
def test_per_sample_gradients_inside_of_compile(residual):
    x, w = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(w, x):
        added = x.cos() if residual else None
        return fused_ops.batch_norm(x, None, None, w, training=True, activation="gelu", residual=added).sin().sum()

    each = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))
    expected = [torch.stack(g) for g in zip(*(grad(loss, argnums=(0, 1))(w, one) for one in x), strict=True)]
    close(torch.compile(each, backend="aot_eager", fullgraph=True)(w, x), tuple(expected))


@every(at_once=FEW)
def test_compile_with_dynamic_sizes(call):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call.__call__, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for batch in (5, 7, 4):
        close(results(compiled, call, call.tensors(batch)), results(call, call, call.tensors(batch)))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]
    with torch.no_grad():  # the activation was a crash there
        close(compiled(*call.tensors()), call(*call.tensors()))


@pytest.mark.parametrize("name", ["leaky_relu", "elu", None])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_numbers_do_not_compile_again(name, dynamic, backend):
    def function(x, running_mean, running_var, momentum, eps, slope):
        options = {"activation": name, "negative_slope": slope, "alpha": slope}
        return fused_ops.batch_norm(x, running_mean, running_var, None, None, True, momentum, eps, **options)

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for i in range(1, 6):
        x = torch.randn(5, 3, requires_grad=True)
        found = []
        for f in (compiled, function):
            running = torch.zeros(3), torch.ones(3)
            y = f(x, *running, 0.2 * i, 0.01 * i, 0.1 * i)
            found.append([y, torch.autograd.grad(y.sin().sum(), x)[0], *running])
        assert_close(*found)
    assert counter.frame_count <= (1 if dynamic else 2)


@pytest.mark.parametrize("needed", [("input",), ("weight",), ("residual",), ("input", "residual")])
def test_unneeded_gradients_are_not_computed(needed):
    call = Call("residual, relu")
    given = [t.requires_grad_(n in needed) for n, t in zip(call.names, call.tensors(), strict=True)]
    wanted = [t for t in given if t.requires_grad]
    expected = torch.autograd.grad(call(*given).sin().sum(), wanted)
    loss = torch.compile(call.__call__, backend="eager", fullgraph=True)(*given).sin().sum()
    with _RecordRawOps() as recorder:
        close(torch.autograd.grad(loss, wanted), expected)
    ((op, arguments, _),) = [c for c in recorder.calls if c[0]._opname == "batch_norm_grad"]
    assert arguments[-1] == sum(bit for bit, n in ((1, "input"), (2, "residual"), (4, "weight")) if n in needed)
    computed = [g.numel() > 0 for g in op(*arguments)]
    assert computed == [n in needed for n in ("input", "residual", "weight", "weight")]


@every()
def test_second_derivative_through_a_graph(call):
    def second(function):
        given = [t.requires_grad_(i < call.differentiable) for i, t in enumerate(call.tensors())]
        leaves = given[: call.differentiable]
        grads = torch.autograd.grad(function(*given).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)

    close(second(torch.compile(call.__call__, backend="eager", fullgraph=True)), second(call))


@every(at_once=FEW)
def test_compiled_autograd(call):
    given = [t.requires_grad_(i < call.differentiable) for i, t in enumerate(call.tensors())]
    expected = results(call, call, call.tensors())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        call(*given).sin().sum().backward()
    close([t.grad for t in given[: call.differentiable]], expected[1 : 1 + call.differentiable])


# ---- torch.export


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first = fused_ops.BatchNorm2d(3, **options)
        self.linear = nn.Conv2d(3, 3, 1)
        self.last = fused_ops.BatchNorm2d(3, activation="relu")

    def forward(self, x):
        return self.last(self.linear(self.first(x)), residual=x)


def trained(model, xs):
    """Outputs and gradients of a few steps, then what the model holds by name."""
    outputs = []
    for x in xs:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.pow(3).sum().backward()
        outputs += [y.detach(), leaf.grad]
    return outputs, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


MODULES = ({}, {"momentum": None}, {"affine": False}, {"activation": "elu"}, {"groups": 2}, {"frozen": True})


@grid(options=MODULES, strict=[False, True], training=[False, True])
def test_an_exported_program_trains(options, strict, training):
    model = Net(**options).double().train(training)
    xs = [torch.randn(b, 3, h, w, dtype=torch.float64) for b, h, w in ((6, 4, 7), (9, 4, 7), (5, 8, 9))]
    sizes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    program = torch.export.export(copy.deepcopy(model), (xs[0],), dynamic_shapes=sizes, strict=strict).module()
    ours, expected = trained(program, xs), trained(model, xs)
    close(ours[0], expected[0])
    close(ours[1], expected[1])
    assert set(ours[2]) <= set(expected[2]) and (not training or "last.running_var" in ours[2])
    close(ours[2], {n: expected[2][n] for n in ours[2]})  # strict drops buffers that nobody reads


# ---- TorchScript


def saved(traced):
    memory = io.BytesIO()
    torch.jit.save(traced, memory)
    memory.seek(0)
    return torch.jit.load(memory)


@every()
@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.filterwarnings("ignore:.*might cause the trace to be incorrect:torch.jit.TracerWarning")
def test_jit_trace(call, grad_mode):
    given = [t.requires_grad_(grad_mode and i < call.differentiable) for i, t in enumerate(call.tensors())]
    traced = saved(torch.jit.trace(call.__call__, tuple(given), check_trace=False))
    for batch in (5, 8):
        close(results(traced, call, call.tensors(batch)), results(call, call, call.tensors(batch)))


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*might cause the trace to be incorrect:torch.jit.TracerWarning")
def test_jit_trace_of_modules(options, training):
    model = Net(**options).double().train(training)
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64)
    traced = saved(torch.jit.trace(model, x))
    state = copy.deepcopy(traced.state_dict())
    model.load_state_dict(state)
    ours, expected = trained(traced, (x, x[:4] * 2)), trained(model, (x, x[:4] * 2))
    for a, b in zip(ours, expected, strict=True):
        close(a, b)
    assert training == (not torch.equal(state["last.running_mean"], ours[2]["last.running_mean"]))


def test_jit_script_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"BatchNorm1d.*torch\.jit\.trace or torch\.export, or fused_ops\.revert"):
        torch.jit.script(nn.Sequential(nn.Linear(3, 3), fused_ops.BatchNorm1d(3)))


# ---- torch.fx


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = fused_ops.BatchNorm1d(3, activation="relu")
        self.rest = nn.Sequential(fused_ops.BatchNorm1d(3), nn.Tanh())
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x, valid):
        y = self.rest(self.bn(x, residual=x, valid=valid))
        return fused_ops.batch_norm(y, None, None, self.weight, training=True, activation="gelu")


def test_leaves_of_fx():
    model = Traced()
    traced = torch.fx.symbolic_trace(model)
    assert model.bn.num_batches_tracked == 0
    calls = [(n.op, n.target) for n in traced.graph.nodes if n.op.startswith("call")]
    modules = [("call_module", name) for name in ("bn", "rest.0", "rest.1")]
    assert calls == [*modules, ("call_function", fused_ops.batch_norm)]
    assert traced.graph.find_nodes(op="call_module", target="rest.0")[0].kwargs == {}
    x, valid = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.3
    again = pickle.loads(pickle.dumps(traced))
    assert_close(again(x, valid), model(x, valid))
    assert_close(again.state_dict(), model.state_dict())


def test_a_subclass_is_asked():
    seen = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(4, 3)
    y = fused_ops.batch_norm(x.as_subclass(Asked), None, None, training=True)
    assert type(y) is Asked and seen == [fused_ops.batch_norm]
    with torch.device("cpu"):  # a mode, which is asked for every function
        assert_close(torch.Tensor(y), fused_ops.batch_norm(x, None, None, training=True))


@every()
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(call, mode):
    def everything(*tensors):
        return [t.clone() for t in results(call, call, tensors)]

    graph = make_fx(everything, tracing_mode=mode)(*call.tensors())
    for batch in (5,) if mode == "real" else (5, 8):
        close(graph(*call.tensors(batch)), everything(*call.tensors(batch)))


# ---- the ops of graphs


@pytest.mark.parametrize("sample", samples()[::6], ids=lambda s: s.name)
def test_opcheck(sample):
    """Of every op that a graph of the sample's call holds, forward and backward."""
    with _RecordRawOps() as recorder, _as_if_compiling():
        output = fused_ops.batch_norm(*(a.clone() if torch.is_tensor(a) else a for a in sample.args), **sample.kwargs)
        output.sin().sum().backward()
    calls = [call for call in recorder.calls if call[0]._opname in ("batch_norm", "batch_norm_grad")]
    assert len(calls) == 2
    for op, args, kwargs in calls:
        args = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
        assert all(r == "SUCCESS" for r in torch.library.opcheck(op, tuple(args), kwargs).values())


def test_opcheck_of_the_statistics():
    op = torch.ops.fused_ops.batch_norm_write_statistics.default
    torch.library.opcheck(op, tuple(torch.rand(3) for _ in range(4)))


def test_masks_of_graphs_have_room():
    """The bits of z's signs, in a size that no small plane changes."""
    for shape, last in itertools.product(((3, 5), (3, 5, 2), (2, 3, 2, 3), (2, 9, 5, 7)), (False, True)):
        if last and len(shape) < 4:
            continue
        x, r = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        if last:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

        def f(x, r):
            return fused_ops.batch_norm(x, None, None, training=True, residual=r, activation="relu").sin().sum()

        found = [torch.autograd.grad(g(x, r), (x, r)) for g in (f, torch.compile(f, backend="aot_eager", dynamic=True))]
        close(*found)

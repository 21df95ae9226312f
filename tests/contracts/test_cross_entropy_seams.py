"""Cross-entropy where another system of PyTorch meets it: compile, export, nested transforms, tracing, DTensor."""

import itertools

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fused_ops
from fused_ops import cross_entropy

CLASSES = 6


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()


def logits(rows=7):
    return torch.randn(rows, CLASSES, dtype=torch.float64)


def indices(rows=7):
    return torch.randint(0, CLASSES - 1, (rows,))


def shares(rows=7):
    return torch.rand(rows, CLASSES, dtype=torch.float64).softmax(1)


def of_f(x, target, **options):
    return F.cross_entropy(x, target, **options)


CALLS = {
    "indices": lambda: (indices(), {}),
    "weight": lambda: (indices(), {"weight": torch.rand(CLASSES, dtype=torch.float64)}),
    "smoothing": lambda: (indices(), {"label_smoothing": 0.1, "ignore_index": 2}),
    "probabilities": lambda: (shares(), {}),
    "sum": lambda: (indices(), {"reduction": "sum"}),
}
TRANSFORMS = {
    "value": lambda f: f,
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "jacrev of grad": lambda f: torch.func.jacrev(torch.func.grad(f)),
    "vmap of grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack((x, 2 * x))),
}


@pytest.mark.parametrize(
    ("call", "transform"),
    [
        pytest.param(c, t, marks=() if c == "indices" or t == "vmap of grad" else pytest.mark.slow)
        for c, t in itertools.product(CALLS, TRANSFORMS)
    ],
)
def test_a_transform_inside_of_what_is_compiled(call, transform):
    target, options = CALLS[call]()
    x, made = logits(), TRANSFORMS[transform]
    expected = made(lambda y: of_f(y, target, **options))(x)
    compiled = torch.compile(made(lambda y: cross_entropy(y, target, **options)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_two_levels_of_forward_mode():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    v, target = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), torch.tensor(2)

    def slope(y):
        return torch.func.jvp(lambda z: cross_entropy(z, target), (y,), (v,))[1]

    second = torch.func.jvp(slope, (x,), (v,))[1]
    p = x.softmax(0)[0]
    torch.testing.assert_close(second, p * (1 - p))
    assert round(float(second), 7) == 0.0819251


@pytest.mark.parametrize("nested", ["jacfwd of jacfwd", "jacrev of jacfwd", "jacfwd of jacrev", "jacrev of jacrev"])
@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives_by_nested_transforms(call, nested):
    outer, inner = (getattr(torch.func, name) for name in nested.split(" of "))
    target, options = CALLS[call]()
    x = logits()
    found = outer(inner(lambda y: cross_entropy(y, target, **options)))(x)
    torch.testing.assert_close(found, outer(inner(lambda y: of_f(y, target, **options)))(x))


def test_formulas_give_no_nan_where_a_class_is_masked():
    """The gradient of class probabilities beside a logit that is minus infinity for good."""
    mask = torch.tensor([True] * (CLASSES - 1) + [False])
    x, t = logits(), shares() * mask
    weight = torch.rand(CLASSES, dtype=torch.float64)

    def loss(y, p, w):
        return cross_entropy(y, p, w, class_mask=mask, label_smoothing=0.1)

    grads = torch.func.grad(loss, argnums=(0, 1, 2))
    expected = grads(x, t, weight)
    compiled = torch.compile(grads, backend="aot_eager", fullgraph=True)(x, t, weight)
    for found, right in zip(compiled, expected, strict=True):
        assert right.isfinite().all()
        torch.testing.assert_close(found, right)


VARYING = {
    "normalizer": (0.2, 0.3, 0.4, 0.5),
    "z_loss": (0.2, 0.3, 0.4, 0.5),
    "logit_scale": (0.2, 0.3, 0.4, 0.5),
    "softcap": (2.0, 3.0, 4.0, 5.0),
    "label_smoothing": (0.2, 0.3, 0.4, 0.5),
    "lam": (0.2, 0.3, 0.4, 0.5),
    "ignore_index": (1, 2, 3, 4),
}


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", VARYING)
def test_a_changing_number_needs_no_further_graph(name, dynamic):
    target, other = indices(), indices()

    def loss(x, number):
        if name == "lam":
            return cross_entropy(x, (target, other, number))
        return cross_entropy(x, target, **{name: number})

    compiled = torch.compile(loss, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for number in VARYING[name]:
        x = logits().requires_grad_()
        y = x.detach().clone().requires_grad_()
        found, right = compiled(x, number), loss(y, number)
        found.backward()
        right.backward()
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(x.grad, y.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (1 if dynamic else 2)


@pytest.mark.parametrize("name, value", [("softcap", -1.0), ("z_loss", float("nan")), ("normalizer", float("inf"))])
def test_a_bad_number_is_refused_by_what_is_compiled(name, value):
    target = indices()
    compiled = torch.compile(lambda x, n: cross_entropy(x, target, **{name: n}), backend="eager")
    with pytest.raises(ValueError, match=f"cross_entropy: {name} must be finite"):
        compiled(logits(), value)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = nn.Linear(CLASSES, CLASSES).double()
        self.options = options

    def forward(self, x, target):
        return cross_entropy(self.linear(x), target, **self.options)


MASK = torch.arange(CLASSES) < CLASSES - 1
OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.1},
    {"reduction": "none"},
    {"class_mask": MASK},
    {"normalizer": 3.0},
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_an_exported_program_can_be_trained(options, strict):
    model, rows = Model(**options), Dim("rows")
    args = logits(), indices()
    exported = torch.export.export(model, args, dynamic_shapes=({0: rows}, {0: rows}), strict=strict).module()
    x, target = logits(11), indices(11)
    found, right = exported(x, target), model(x, target)
    torch.testing.assert_close(found, right)
    found.sum().backward()
    right.sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        assert own[name].grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, own[name].grad)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_a_traced_loss_can_be_saved_and_trained(options, tmp_path):
    torch.jit.trace(Model(**options), (logits(), indices())).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    x, target = logits(11), indices(11)
    model = Model(**options)
    model.load_state_dict(traced.state_dict())
    found, right = traced(x, target), model(x, target)
    torch.testing.assert_close(found, right)
    found.sum().backward()
    right.sum().backward()
    torch.testing.assert_close(dict(traced.named_parameters())["linear.weight"].grad, model.linear.weight.grad)


def test_torch_fx_takes_it_as_one_call():
    model = Model(label_smoothing=0.1)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [cross_entropy]
    x, target = logits(), indices()
    torch.testing.assert_close(graph(x, target), model(x, target))


class Logged(torch.Tensor):
    """A subclass that notes which functions it is given to."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_subclass_is_asked():
    x, target = logits(), indices()
    loss = cross_entropy(x.as_subclass(Logged), target, z_loss=0.1)
    assert type(loss) is Logged and Logged.seen[-1] is cross_entropy
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), cross_entropy(x, target, z_loss=0.1))


@pytest.fixture
def mesh(tmp_path):
    """One process that is a group of its own."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensors_on_a_mesh_of_one_process(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, target = logits(), indices()
    spread = distribute_tensor(target, mesh, [Replicate()])
    for placement in (Replicate(), Shard(0), Shard(1)):
        whole = distribute_tensor(x.clone(), mesh, [placement]).requires_grad_()
        found = cross_entropy(whole, spread, label_smoothing=0.1, z_loss=0.1)
        found.backward()
        y = x.clone().requires_grad_()
        right = cross_entropy(y, target, label_smoothing=0.1, z_loss=0.1)
        right.backward()
        torch.testing.assert_close(found.full_tensor(), right)
        torch.testing.assert_close(whole.grad.full_tensor(), y.grad)
    with pytest.raises(RuntimeError, match="got mixed"):
        cross_entropy(x, spread)


def test_loss_parallel_with_patch(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    x, target = logits().float(), indices()
    parts = distribute_tensor(x.clone().requires_grad_(), mesh, [Shard(1)])
    with fused_ops.patch(), loss_parallel():
        loss = F.cross_entropy(parts, target)
        loss.backward()
    y = x.clone().requires_grad_()
    right = F.cross_entropy(y, target)
    right.backward()
    torch.testing.assert_close(loss.full_tensor() if hasattr(loss, "full_tensor") else loss, right)
    torch.testing.assert_close(parts.grad.full_tensor(), y.grad)


CALLED = {
    "ce": lambda x: cross_entropy(x, torch.arange(6)),
    "smoothing": lambda x: cross_entropy(x, torch.arange(6), label_smoothing=0.1),
    "lce": lambda x: fused_ops.linear_cross_entropy(x, x.exp(), torch.arange(6), chunk_rows=2),
    "bn": lambda x: fused_ops.batch_norm(x, None, None, None, None, True),
}
MADE = {
    "compiled": lambda f, x: torch.compile(f, backend="eager"),
    "exported": lambda f, x: torch.export.export(Applied(f), (x,)).module(),
    "make_fx": lambda f, x: make_fx(f)(x),
}


class Applied(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", CALLED)
def test_a_graph_drops_no_tangent(name, made):
    """PyTorch's engine would: an op with an autograd formula has none for forward mode."""
    x = logits(6)
    graph = MADE[made](CALLED[name], x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        try:
            found = graph(dual)
        except NotImplementedError as error:
            assert "forward-mode AD cannot follow fused_ops::" in str(error)
        else:  # since torch 2.14 Dynamo leaves tensors with tangents to eager mode
            assert made == "compiled"
            right = CALLED[name](dual)
            for mine, its in zip(*map(torch.autograd.forward_ad.unpack_dual, (found, right)), strict=True):
                torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", CALLED)
def test_what_make_fx_traced_without_gradients_has_them(name):
    graph = make_fx(CALLED[name])(logits(6))
    x = logits(6).requires_grad_()
    found, right = (torch.autograd.grad(f(x).sin().sum(), x) for f in (graph, CALLED[name]))
    torch.testing.assert_close(found, right)
    with pytest.raises(NotImplementedError, match=r"torch\.func cannot differentiate fused_ops::"):
        torch.func.grad(lambda y: graph(y).sum())(x.detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_patch_around_what_was_compiled(backend):
    x, target = logits(), indices()
    compiled = torch.compile(lambda y: F.cross_entropy(y, target), backend=backend)
    with fused_ops.patch():
        torch.testing.assert_close(compiled(x), F.cross_entropy(x, target))

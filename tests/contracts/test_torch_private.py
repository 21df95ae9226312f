"""Private names of torch are in core/torch_private.py alone, and without any one of them every op is still right."""

import ast
import re

from conftest import ROOT

PLACE = ROOT / "fused_ops" / "core" / "torch_private.py"
NAMES = re.findall(r'_found\(\s*"([^"]+)"', PLACE.read_text())
DOCUMENTED = {"torch.utils._python_dispatch"}  # TorchDispatchMode, which the checks of an op watch raw ops with
CHECKS = """
import os, pkgutil, sys, traceback, warnings
import torch, torch._dynamo, torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode

find = pkgutil.resolve_name

def hide(hidden):
    asked = []
    def resolve(place):
        asked.append(place)
        if place == hidden:
            raise AttributeError(place)
        return find(place)
    pkgutil.resolve_name = resolve
    import fused_ops
    pkgutil.resolve_name = find
    assert hidden in (*asked, "none")
    return fused_ops

def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)

x, w, bias, target, other = draw(6, 5), draw(5, 5), draw(5), torch.tensor([0, 4, 2, 1, -100, 3]), draw(6, 5)
gamma, beta = draw(5), draw(5)

def both(ours, theirs, *tensors):
    found = []
    for f in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = f(*leaves)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if y.dim() else torch.ones_like(y)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, upstream)))
    for a, b in zip(*found): same(a, b)

def transforms(ours, theirs, x, traced=True):
    same(grad(ours)(x), grad(theirs)(x))
    same(vmap(grad(ours))(torch.stack((x, other))), torch.stack([grad(theirs)(t) for t in (x, other)]))
    same(jvp(ours, (x,), (other,))[1], jvp(theirs, (x,), (other,))[1])
    same(jacfwd(grad(ours))(x), jacfwd(grad(theirs))(x))
    twice = lambda f: jvp(lambda t: jvp(f, (t,), (other,))[1], (x,), (x * x,))[1]
    same(twice(ours), twice(theirs))
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, other))).tangent for f in (ours, theirs)]
        same(*tangents)
    def batched(f):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        upstream = torch.stack((torch.ones_like(y), 3 * torch.ones_like(y)))
        return torch.autograd.grad(y, leaf, upstream, is_grads_batched=True)[0]
    same(batched(ours), batched(theirs))
    traces = lambda f: make_fx(grad(f))(other), lambda f: torch.jit.trace(f, (other,), check_trace=False)
    for trace in traces if traced else ():
        same(trace(ours)(x), trace(theirs)(x))

def check(o):
    plain = lambda t: o.cross_entropy(t, target), lambda t: F.cross_entropy(t, target)
    smooth = (lambda t: o.cross_entropy(t, target, label_smoothing=0.1),
              lambda t: F.cross_entropy(t, target, label_smoothing=0.1))
    head = (lambda t: o.linear_cross_entropy(t, w, target, linear_bias=bias),
            lambda t: F.cross_entropy(F.linear(t, w, bias), target))
    norm = (lambda t: (o.batch_norm(t, None, None, gamma, beta, True) ** 3).sum(),
            lambda t: (((t - t.mean(0)) / (t.var(0, correction=0) + 1e-5).sqrt() * gamma + beta) ** 3).sum())
    for pair in (plain, smooth, head, norm):
        both(*pair, x)
        transforms(*pair, x, pair in (plain, norm))
    both(lambda *t: o.linear_cross_entropy(t[0], t[1], target, linear_bias=t[2], chunk_rows=2),
         lambda *t: F.cross_entropy(F.linear(*t), target), x, w, bias)
    both(lambda *t: o.batch_norm(t[0], None, None, t[1], t[2], True, activation="leaky_relu", inplace_activated=True),
         lambda *t: F.leaky_relu(F.batch_norm(t[0], None, None, t[1], t[2], True)), x, gamma, beta)
    leaf = x.clone().requires_grad_()
    o.cross_entropy(leaf * 1, target, inplace_backward=True).backward()
    same(leaf.grad, grad(plain[1])(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both(lambda t: o.cross_entropy(t, target, size_average=False),
             lambda t: F.cross_entropy(t, target, reduction="sum"), x)
    with FakeTensorMode():
        assert o.cross_entropy(torch.empty(4, 3), torch.zeros(4, dtype=torch.int64)).shape == ()
    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "seen"
    assert o.cross_entropy(x.as_subclass(Sub), target) == "seen"

    layer = o.LinearCrossEntropyLoss(5, 5, bias=True, weight=torch.ones(5)).double()
    same(layer(x, target), F.cross_entropy(layer.linear(x), target))

    module, theirs = o.BatchNorm1d(5), nn.BatchNorm1d(5)
    for m in (module, theirs): m(other.float())
    leaf = x.float().requires_grad_()
    checkpoint(module, leaf, use_reentrant=False).sum().backward()
    theirs(x.float())
    same(module.running_mean, theirs.running_mean), same(module.running_var, theirs.running_var)
    assert module.num_batches_tracked == 2

    torch.manual_seed(0)
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 20000)
        def forward(self, x):
            return self.head(self.body(x).tanh())
    model, inputs, labels = Model(), torch.randn(64, 5), torch.randint(0, 20000, (64,))
    loss_of = nn.CrossEntropyLoss()
    def step():
        model.zero_grad()
        loss = loss_of(model(inputs), labels)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    before = step()
    o.convert(model, loss=loss_of)
    for a, b in zip(step(), before): same(a, b)
    assert model(inputs).shape == (64, 20000)
    with o.patch(), o.patch("batch_norm"):
        same(F.cross_entropy(x, target), plain[0](x))

theirs = lambda t: F.cross_entropy(t, target)
transforms(theirs, theirs, x)  # imports and sets up what every child would again
for name in sys.argv[1:]:
    if os.fork() == 0:
        try:
            check(hide(name))
        except BaseException:
            print("WITHOUT", name)
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    os.wait()
print("tried", len(sys.argv) - 1)
"""


def test_there_are_private_names():
    assert len(NAMES) == len(set(NAMES)) > 20


def test_without_any_of_them_the_ops_are_right(run_python):
    """Of a release without that name, and, first, with all of them."""
    said = run_python("-c", CHECKS, "none", *NAMES, OMP_NUM_THREADS="1").stdout
    assert "WITHOUT" not in said, said
    assert said.endswith(f"tried {len(NAMES) + 1}\n")


def private_names(path):
    """What a file uses of torch that begins with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            if node.module in DOCUMENTED:
                continue
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torch")
        elif isinstance(node, ast.Attribute) and re.match(r"torch(\.\w+)+$", ast.unparse(node)):
            yield ast.unparse(node)


def test_private_names_are_in_one_place():
    for path in (ROOT / "fused_ops").rglob("*.py"):
        found = {name for name in private_names(path) if re.search(r"\._(?!_)", name)}
        assert path == PLACE or found == set(), path

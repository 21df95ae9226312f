"""What each of some processes does in the tests of DTensors: the same call on a mesh, and in one process.

Every rank draws the same whole tensors, spreads them as a case says, and compares what comes back, gathered, with the
formulas and with PyTorch where it has the case.
"""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_cross_entropy_options import draw, formula
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fused_ops
from tests.distributed.shard_cases import near, raises

CASES = {}
R, S = Replicate(), Shard
OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01, "logit_scale": 0.7, "softcap": 5.0, "label_smoothing": 0.1},
)
KINDS = ("index", "dense", "sparse", "mixup")


def case(function):
    CASES[function.__name__] = function
    return function


_meshes = {}


def mesh_of(*shape):
    """One mesh of a shape, as making one is a dozen collectives."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])
    return _meshes[shape]


def spread(t, mesh, placements, grad=False):
    """A DTensor of a whole tensor, which is a leaf."""
    return distribute_tensor(t.detach().clone(), mesh, list(placements)).requires_grad_(grad)


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def partial_rows(placements, dim):
    """What becomes of a sum over the rows of logits that lie there."""
    return tuple(Partial() if p.is_shard() and not p.is_shard(dim) else R for p in placements)


def without(placements, dim):
    """Where the rows of logits lie."""
    return tuple(R if not p.is_shard() or p.is_shard(dim) else S(p.dim - (p.dim > dim)) for p in placements)


def problem(kind, shape, dtype=torch.float64, seed=0):
    """(tensors that may have a gradient, those that have none), by argument; a target's parts by number."""
    g = torch.Generator().manual_seed(seed)
    rows = (shape[0], *shape[2:])
    target = draw(kind, shape, dtype, seed)
    if not isinstance(target, tuple):
        target = (target,)
    if kind == "index" and shape[0] > 1:
        target[0][1] = shape[1] - 1
    lowest = -100 if shape[0] > 1 else 0  # one row must count, lest all be NaN
    target = tuple(t if t.is_floating_point() else t.clamp(lowest, shape[1] - 1) for t in target)
    parts = {f"target{i}": t for i, t in enumerate(target)}
    fixed = {name: t for name, t in parts.items() if not t.is_floating_point()}
    free = {name: t for name, t in parts.items() if t.is_floating_point()}
    free["input"] = torch.randn(shape, dtype=torch.float64, generator=g).mul(3).to(dtype)
    free["token_weight"] = (torch.rand(rows, dtype=torch.float64, generator=g) + 0.1).to(dtype)
    weight = (torch.rand(shape[1], dtype=torch.float64, generator=g) + 0.3).to(dtype)
    (fixed if kind == "index" else free)["weight"] = weight
    mask = torch.rand(shape, generator=g) < 0.7
    for part in target[: 1 if kind != "mixup" else 2]:
        if not part.is_floating_point():
            part = part if kind == "sparse" else part.unsqueeze(1)
            mask = mask.scatter(1, part.clamp(min=0), True)
    if kind == "dense":
        mask |= True
    return free, fixed | {"class_mask": mask}


def call(tensors, options, function=fused_ops.cross_entropy):
    named = dict(tensors)
    target = [named.pop(f"target{i}") for i in range(3) if f"target{i}" in named]
    return function(named.pop("input"), target[0] if len(target) == 1 else tuple(target), **named, **options)


def by_formula(tensors, reduction, options):
    """The same by ``formula``, from float64 tensors."""
    named = dict(tensors)
    token_weight, x = named.pop("token_weight", None), named.pop("input")
    target = tuple(named.pop(f"target{i}") for i in range(3) if f"target{i}" in named)
    rows = formula(x, target[0] if len(target) == 1 else target, **named, **options)
    token_weight = torch.ones_like(rows) if token_weight is None else token_weight
    if reduction != "mean":
        return (rows * token_weight).sum() if reduction == "sum" else rows * token_weight
    weight = named.get("weight")
    counts = torch.ones_like(rows)
    if len(target) == 2:
        counts = (target[0] != -100).any(1).double()
    elif not target[0].is_floating_point():
        shares = [(target[0], counts)]
        if len(target) == 3:
            lam = target[2].reshape(-1, *(1,) * (rows.dim() - 1)).expand(rows.shape)
            shares = [(target[0], lam), (target[1], 1 - lam)]
        of_class = torch.ones(x.size(1), dtype=torch.float64) if weight is None else weight
        counts = sum(torch.where(t != -100, share * of_class[t.clamp(min=0)], 0.0) for t, share in shares)
    return (rows * token_weight).sum() / (counts * token_weight).sum()


def compare(kind, shape, mesh, placements, reduction, options, plain, seed=0, which=None):
    """A call of DTensors against the formula: the value, all gradients, and where they lie."""
    free, fixed = problem(kind, shape, seed=seed)
    if which is not None:
        free, fixed = (
            {k: v for k, v in t.items() if k in which or "target" in k or k == "input"} for t in (free, fixed)
        )
    leaves = {name: t.clone().requires_grad_() for name, t in free.items()}
    exact = by_formula({**leaves, **fixed}, reduction, options)
    upstream = torch.linspace(-0.5, 2, max(exact.numel(), 1), dtype=torch.float64).reshape(exact.shape)
    grads = torch.autograd.grad(exact, list(leaves.values()), upstream)

    ours = {"input": spread(free["input"], mesh, placements, True)}
    for name, t in {**free, **fixed}.items():
        if name != "input":
            elsewhere = [S(0) if i == 0 else R for i in range(mesh.ndim)]  # not where the logits want it
            ours[name] = t.clone() if plain else spread(t, mesh, elsewhere)
            ours[name].requires_grad_(name in free)
    found = call(ours, {"reduction": reduction, **options})
    what = (kind, shape, placements, reduction, sorted(options), plain)
    settled, seen = [], set()
    for p in placements:
        p = R if p.is_partial() or (p.is_shard(1) and "classes" in seen) else p
        seen |= {"classes"} if p.is_shard(1) else set()
        settled.append(p)
    wanted = without(settled, 1) if reduction == "none" else partial_rows(settled, 1)
    assert found.placements == wanted, (what, found.placements, wanted)
    near(found.full_tensor().detach(), exact.detach(), 1e-12, what)
    found_grads = torch.autograd.grad(
        found, [ours[name] for name in free], spread(upstream, mesh, [R] * mesh.ndim), retain_graph=True
    )
    for name, grad, right in zip(free, found_grads, grads, strict=True):
        assert isinstance(grad, DTensor) == isinstance(ours[name], DTensor)
        if name == "input":
            here = tuple(R if p.is_partial() else p for p in placements)
            assert grad.placements == here, (what, grad.placements)
        near(whole(grad), right, 1e-11, (what, name))


def placements_of(dims, mesh_dims):
    """All ways to place a tensor on a mesh."""
    return list(itertools.product([R, *(S(d) for d in range(dims)), Partial()], repeat=mesh_dims))


@case
def one_dimension_of_the_mesh(rank, world):
    mesh, i = mesh_of(world), 0
    for shape in ((5, 7), (1, 3), (3, 5, 2)):
        for placements in placements_of(len(shape), 1):
            if placements[0].is_partial() and shape[0] != 5:
                continue
            for kind, reduction in itertools.product(KINDS, ("mean", "sum", "none")):
                i += 1
                compare(kind, shape, mesh, placements, reduction, OPTIONS[i % 3], plain=bool(i % 2), seed=i)
    compare("index", (5, 7), mesh, [S(1)], "mean", {}, True, which=())
    compare("index", (5, 7), mesh, [S(0)], "mean", {}, False, which=())

"""What each of some processes does in the tests of DTensors: the same call on a mesh, and in one process.

Every rank draws the same whole tensors, spreads them as a case says, and compares what comes back, gathered, with the
formulas and with PyTorch where it has the case.
"""

import itertools
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cross_entropy_formulas import draw, formula
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

import fused_ops
from fused_ops.conversion import head
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
    def seeded(rank, world):
        torch.manual_seed(0)  # every rank draws the same
        function(rank, world)

    CASES[function.__name__] = seeded
    return function


_meshes = {}


def mesh_of(*shape):
    """One mesh of a shape, as making one is a dozen collectives."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])
    return _meshes[shape]


def sides(world):
    """Of a mesh of two dimensions."""
    return (1, world) if world % 2 else (2, world // 2)


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
            for kind, reduction in itertools.product(KINDS, ("mean", "sum", "none")):
                i += 1
                if shape[0] != 5 and (i % 5 or placements[0].is_partial()):
                    continue
                compare(kind, shape, mesh, placements, reduction, OPTIONS[i // 3 % 3], (i // 12 + i) % 2 == 0, seed=i)
    compare("index", (5, 7), mesh, [S(1)], "mean", {}, True, which=())
    compare("index", (5, 7), mesh, [S(0)], "mean", {}, False, which=())


@case
def two_dimensions_of_the_mesh(rank, world):
    meshes = [mesh_of(*sides(world))] if world > 2 else [mesh_of(1, 2), mesh_of(2, 1)]
    i = 0
    for mesh, shape in itertools.product(meshes, ((5, 7), (3, 5, 2))):
        for placements in placements_of(len(shape), 2):
            i += 1
            if world == 2 and i % 5:
                continue
            kind, reduction = KINDS[i % 4], ("mean", "sum", "none")[i % 3]
            compare(kind, shape, mesh, placements, reduction, OPTIONS[i // 3 % 3], i // 4 % 2 == 0, seed=i)


@case
def outputs(rank, world):
    mesh, shape = mesh_of(world), (5, 7)
    free, fixed = problem("index", shape)
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "return_outputs": True}
    exact = call({**free, **fixed}, options)
    for placements, reduction in itertools.product(([S(1)], [S(0)], [R]), ("mean", "none")):
        x = spread(free["input"], mesh, placements, True)
        found = call({**free, **fixed, "input": x}, {**options, "reduction": reduction})
        y = free["input"].clone().requires_grad_()
        exact = call({**free, **fixed, "input": y}, {**options, "reduction": reduction})
        total, expected = 0, 0
        for name, mine, right in zip(exact._fields, found, exact, strict=True):
            scalar = reduction != "none" and name in ("loss", "z_loss")
            assert mine.placements == (partial_rows(placements, 1) if scalar else without(placements, 1)), name
            assert mine.shape == right.shape and mine.dtype == right.dtype
            if not right.is_floating_point():
                assert torch.equal(mine.full_tensor(), right)
                continue
            near(mine.full_tensor().detach(), right.detach(), 1e-12, (name, placements, reduction))
            total, expected = total + mine.full_tensor().sum(), expected + right.sum()
        (grad,), (right,) = torch.autograd.grad(total, x), torch.autograd.grad(expected, y)
        near(grad.full_tensor(), right, 1e-12, (placements, reduction))


@case
def one_example(rank, world):
    """Logits of one dimension."""
    mesh, x = mesh_of(world), torch.randn(7, dtype=torch.float64)
    for placement, target in itertools.product((S(0), R), (torch.tensor(6), torch.tensor([6]))):
        y, whole_y = spread(x, mesh, [placement], True), x.clone().requires_grad_()
        loss, right = (fused_ops.cross_entropy(t, target, z_loss=0.1) for t in (y, whole_y))
        assert loss.placements == (R,) and loss.shape == right.shape
        near(loss.full_tensor().detach(), right.detach(), 1e-12, placement)
        (grad,), (exact,) = torch.autograd.grad(loss, y), torch.autograd.grad(right, whole_y)
        near(grad.full_tensor(), exact, 1e-12, placement)


@case
def as_pytorch_where_it_has_the_case(rank, world):
    """Values, gradients and placements; without an ignored row, whose mean over rows PyTorch has wrong."""
    mesh = mesh_of(world)
    x, target = torch.randn(2 * world, 2 * world, dtype=torch.float64), torch.arange(2 * world).flip(0)
    for parallel, placement, reduction in itertools.product((False, True), (S(1), S(0), R), ("mean", "sum", "none")):
        if parallel and placement != S(1):
            continue
        found = []
        for patched in (False, True):
            for function in (F.cross_entropy, torch.nn.CrossEntropyLoss(reduction=reduction)):
                with loss_parallel() if parallel else nullcontext(), fused_ops.patch() if patched else nullcontext():
                    y = spread(x, mesh, [placement], True)
                    named = {"reduction": reduction} if function is F.cross_entropy else {}
                    loss = function(y, spread(target, mesh, [R]), **named)
                    loss.sum().backward()
                    found.append((loss, y.grad))
        (theirs, grad), *_, (ours, our_grad) = found
        what = (parallel, placement, reduction)
        for loss, y_grad in found[2:]:
            near(loss.full_tensor().detach(), theirs.full_tensor().detach(), 1e-13, what)
            near(y_grad.full_tensor(), grad.full_tensor(), 1e-13, what)
        assert our_grad.placements == (placement,)
        if parallel or placement != S(1):
            assert grad.placements == our_grad.placements
        if (placement, reduction) == (S(0), "mean"):
            # In PyTorch an average of the ranks' means, wrong if rows are not even; since 2.14 every rank has the mean.
            assert ours.placements == (Partial("sum"),) and theirs.placements in ((Partial("avg"),), (R,))
        else:
            assert ours.placements == theirs.placements, what


def dtensors_differentiate_twice(mesh):
    """Whether this torch's to_local has a second derivative, of which ours is made."""
    x = spread(torch.ones(2), mesh, [R], True)
    (grad,) = torch.autograd.grad(x.to_local().pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(grad.sum(), x, allow_unused=True)[0] is not None


@case
def derivatives(rank, world):
    """Backward twice, the second derivative, and a gradient written over the logits."""
    mesh = mesh_of(world)
    x, upstream = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    target = torch.tensor([0, 6, -100, 3, 4])
    y = x.clone().requires_grad_()
    (right,) = torch.autograd.grad(F.cross_entropy(y, target, label_smoothing=0.1), y, create_graph=True)
    (second,) = torch.autograd.grad((right * upstream).sum(), y)
    for placement in (S(1), S(0), R):
        y = spread(x, mesh, [placement], True)
        loss = fused_ops.cross_entropy(y, target, label_smoothing=0.1)
        grads = [torch.autograd.grad(loss, y, create_graph=True)[0] for _ in range(2)]
        for grad in grads:
            near(grad.full_tensor().detach(), right.detach(), 1e-12, placement)
        if dtensors_differentiate_twice(mesh):
            (found,) = torch.autograd.grad((grads[0] * spread(upstream, mesh, [placement])).sum(), y)
            near(found.full_tensor(), second, 1e-12, placement)
        logits = y * 1.0
        loss = fused_ops.cross_entropy(logits, target, label_smoothing=0.1, inplace_backward=True)
        (grad,) = torch.autograd.grad(loss, logits)
        near(grad.full_tensor(), right.detach(), 1e-12, placement)
        here, there = grad.to_local(), logits.to_local()
        assert here.numel() == 0 or (here.data_ptr() == there.data_ptr() and there._version > 0)
        raises(
            RuntimeError, "must not be a leaf", lambda y=y: fused_ops.cross_entropy(y, target, inplace_backward=True)
        )


@case
def compiled(rank, world):
    mesh = mesh_of(world)
    x, target = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, -100, 3, 4])
    for placement, options in ((S(1), {"label_smoothing": 0.1}), (S(0), {}))[: 1 if world == 2 else 2]:

        def f(y, options=options):
            return fused_ops.cross_entropy(y * 2, target, **options)

        y, whole_y = spread(x, mesh, [placement], True), x.clone().requires_grad_()
        loss = torch.compile(f, fullgraph=True, backend="aot_eager")(y)
        right = f(whole_y)
        loss.backward()
        right.backward()
        near(loss.full_tensor().detach(), right.detach(), 1e-12, placement)
        near(y.grad.full_tensor(), whole_y.grad, 1e-12, placement)


@case
def errors(rank, world):
    mesh, ce, lce = mesh_of(world), fused_ops.cross_entropy, fused_ops.linear_cross_entropy
    x, target, w = torch.randn(4, 6), torch.tensor([0, 5, 2, 3]), torch.randn(6, 6)
    y, v, group = spread(x, mesh, [S(1)]), spread(w, mesh, [S(0)]), mesh.get_group()
    mixed = "got mixed torch.Tensor and DTensor: expected input to be a DTensor as"
    raises(RuntimeError, f"{mixed} target is", lambda: ce(x, spread(target, mesh, [R])))
    raises(RuntimeError, f"{mixed} weight is", lambda: ce(x, target, spread(torch.ones(6), mesh, [R])))
    raises(RuntimeError, f"{mixed} linear_weight is", lambda: lce(x, v, target))
    other = init_device_mesh("cpu", (world, 1))
    raises(RuntimeError, "expected all DTensors on one mesh", lambda: ce(y, spread(target, other, [R, R])))
    for name, value in {"class_group": group, "classes": 6}.items():
        raises(
            ValueError,
            f"expected {name}=None with DTensors",
            lambda name=name, value=value: ce(y, target, **{name: value}),
        )
    z, bn = spread(x, mesh, [R]), fused_ops.batch_norm
    raises(
        RuntimeError,
        "mixed torch.Tensor and DTensor",
        lambda: bn(x, None, None, spread(x[0], mesh, [R]), training=True),
    )
    raises(ValueError, "expected group=None with DTensors", lambda: bn(z, None, None, training=True, group=group))
    raises(ValueError, "sequence_parallel=False", lambda: lce(z, v, target, sequence_parallel=True))
    raises(ValueError, "to match target batch_size (3)", lambda: ce(y, target[:3]))
    raises(ValueError, "to match target batch_size (3)", lambda: lce(z, v, target[:3]))
    raises(RuntimeError, "all 6 classes", lambda: ce(y, target, torch.ones(3)))
    raises(RuntimeError, "token_weight of shape [4]", lambda: ce(y, target, token_weight=torch.ones(3)))
    raises(
        RuntimeError,
        "class_mask of shape [6] or [4, 6]",
        lambda: ce(y, target, class_mask=torch.ones(3, dtype=torch.bool)),
    )
    raises(RuntimeError, "A of shape [rank, 6]", lambda: lce(z, v, target, lora=(w[:2, :5], w[:, :2], 1.0)))
    wrong = target.clone()
    wrong[0] = 6
    for placement, reduction in itertools.product((S(1), S(0), R), ("mean", "sum", "none")):
        where = spread(x, mesh, [placement])
        raises(IndexError, "Target 6 is out of bounds", lambda x=where, r=reduction: ce(x, wrong, reduction=r))
    ignored = torch.full((4,), -100)
    for placement in (S(1), S(0), R):
        where = spread(x, mesh, [placement])
        raises(ValueError, "nothing counts", lambda x=where: ce(x, ignored, empty="raise"))
        assert ce(where, ignored, empty="zero").full_tensor() == 0
        assert ce(where, ignored).full_tensor().isnan()


def classes_last(t, name):
    """Of tensors drawn for (batch, classes, positions) logits those that a head of (batch, positions, ...) takes."""
    return t.movedim(1, -1).contiguous() if t.dim() == 3 and (name.startswith("target") or name == "class_mask") else t


def compare_head(
    kind, lead, classes, mesh, of_input, of_weight, reduction, options, plain, rows_spread, seed=0, **more
):
    """The same of a head, whose logits the formula has: the value, all gradients, and where the loss lies.

    Args:
        kind: Of target.
        lead: (batch,) or (batch, positions).
        classes: How many.
        mesh: On which the tensors are.
        of_input: Placements of (*lead, 4).
        of_weight: Placements of (classes, 4).
        reduction: Of the loss.
        options: Numbers.
        plain: Whether all else is no DTensor.
        rows_spread: The dimensions of the mesh along which the loss is a sum.
        seed: Of all values.
        **more: For ours alone.
    """
    g = torch.Generator().manual_seed(seed)
    free, fixed = problem(kind, (lead[0], classes, *lead[1:]), seed=seed)
    del free["input"]
    shapes = {"x": (*lead, 4), "w": (classes, 4), "linear_bias": (classes,), "a": (2, 4), "b": (classes, 2)}
    free |= {name: torch.randn(shape, dtype=torch.float64, generator=g) for name, shape in shapes.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in free.items()}
    named = {**leaves, **fixed}
    x, w, bias, a, b = (named.pop(name) for name in shapes)
    logits = F.linear(x, w, bias) + 0.5 * x @ a.t() @ b.t()
    exact = by_formula({**named, "input": logits if len(lead) == 1 else logits.movedim(-1, 1)}, reduction, options)
    upstream = torch.linspace(-0.5, 2, max(exact.numel(), 1), dtype=torch.float64).reshape(exact.shape)
    grads = torch.autograd.grad(exact, list(leaves.values()), upstream)

    placed = {"x": of_input, "w": of_weight, "linear_bias": [S(0) if p == S(0) else R for p in of_weight]}
    placed["b"] = placed["linear_bias"]
    ours = {}
    for name, t in {**free, **fixed}.items():
        t = classes_last(t, name)
        if name in placed or not plain:
            t = spread(t, mesh, placed.get(name, [R] * mesh.ndim))
        ours[name] = (
            t.clone().requires_grad_(name in free) if not isinstance(t, DTensor) else t.requires_grad_(name in free)
        )
    named = dict(ours)
    x, w, bias, a, b = (named.pop(name) for name in shapes)
    target = tuple(named.pop(f"target{i}") for i in range(3) if f"target{i}" in named)
    if kind == "mixup":
        target = (*target[:2], target[2].reshape(-1, *(1,) * (len(lead) - 1)).expand(lead))
    found = fused_ops.linear_cross_entropy(
        x,
        w,
        target[0] if len(target) == 1 else target,
        linear_bias=bias,
        lora=(a, b, 0.5),
        reduction=reduction,
        **named,
        **options,
        **more,
    )
    what = (kind, lead, classes, of_input, of_weight, reduction, sorted(options), plain)
    near(found.full_tensor().detach(), exact.detach(), 1e-12, what)
    if reduction != "none":
        assert found.placements == tuple(Partial() if i in rows_spread else R for i in range(mesh.ndim)), what
    else:
        assert [i for i, p in enumerate(found.placements) if p.is_shard()] == rows_spread, what
    found_grads = torch.autograd.grad(found, [ours[name] for name in free], spread(upstream, mesh, [R] * mesh.ndim))
    for name, grad, right in zip(free, found_grads, grads, strict=True):
        assert isinstance(grad, DTensor) == isinstance(ours[name], DTensor)
        if name == "x":
            assert grad.placements == tuple(R if p.is_partial() else p for p in of_input), (what, grad.placements)
        near(whole(grad), classes_last(right, name), 1e-11, (what, name))


@case
def heads(rank, world):
    mesh = mesh_of(world)
    rows = [
        ((5,), 9, R, S(0), []),
        ((5,), 9, S(0), S(0), []),  # few rows: the hidden states are gathered
        ((8,), 3, S(0), S(0), [0]),  # few classes: the weight is
        ((5,), 9, S(0), R, [0]),
        ((2, 3), 9, S(1), S(0), []),  # sequence-parallel hidden states
        ((2, 9), 3, S(1), S(0), [0]),
        ((2, 3), 9, S(1), R, [0]),
        ((2, 3), 9, S(2), S(1), []),  # the features are divided
        ((5,), 9, S(1), S(0), []),
        ((5,), 9, Partial(), Partial(), []),
        ((5,), 9, R, R, []),
    ]
    for i, ((lead, classes, of_input, of_weight, spread_rows), kind) in enumerate(itertools.product(rows, KINDS)):
        reduction = ("mean", "sum", "none")[i % 3]
        where = mesh, [of_input], [of_weight], reduction, OPTIONS[i // 3 % 3], i // 4 % 2 == 0, spread_rows, i
        more = {"chunk_rows": 2} if (i // 4 + i) % 2 else {}  # and all logits at once
        compare_head(kind, lead, classes, *where, **more)


@case
def shifted_targets(rank, world):
    mesh = mesh_of(world)
    x, w = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    target = torch.randint(0, 9, (3, 5))
    for of_input, of_weight, of_target in itertools.product((R, S(0), S(1)), (R, S(0)), (None, R, S(0), S(1))):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        right = fused_ops.linear_cross_entropy(*leaves, target, shift=True)
        ours = spread(x, mesh, [of_input], True), spread(w, mesh, [of_weight], True)
        found = fused_ops.linear_cross_entropy(
            *ours, target if of_target is None else spread(target, mesh, [of_target]), shift=True
        )
        what = (of_input, of_weight, of_target)
        near(found.full_tensor().detach(), right.detach(), 1e-12, what)
        for mine, exact in zip(torch.autograd.grad(found, ours), torch.autograd.grad(right, leaves), strict=True):
            near(mine.full_tensor(), exact, 1e-12, what)


@case
def heads_at_several_positions(rank, world):
    mesh = mesh_of(world)
    w, b = torch.randn(7, 3, 4, dtype=torch.float64), torch.randn(21, 2, dtype=torch.float64)
    a = torch.randn(2, 4, dtype=torch.float64)
    for rows, of_input, of_weight in itertools.product((5, 1), (R, S(0)), (R, S(0), S(1))):
        x, target = torch.randn(rows, 4, dtype=torch.float64), torch.randint(0, 7, (rows, 3))
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        right = fused_ops.linear_cross_entropy(*leaves[:2], target, lora=(a, leaves[2], 0.5))
        ours = [spread(x, mesh, [of_input], True), spread(w, mesh, [of_weight], True), b.clone().requires_grad_()]
        found = fused_ops.linear_cross_entropy(*ours[:2], target, lora=(a, ours[2], 0.5))
        near(found.full_tensor().detach(), right.detach(), 1e-12, (rows, of_input, of_weight))
        for mine, exact in zip(torch.autograd.grad(found, ours), torch.autograd.grad(right, leaves), strict=True):
            near(whole(mine), exact, 1e-12, (rows, of_input, of_weight))


@case
def heads_with_main_grad(rank, world):
    """A DTensor gets the weight's gradient where it lies as the ranks find it, and the weight gets none."""
    mesh, x, w = mesh_of(world), torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    target, classes = torch.randint(0, 9, (5,)), 3 * w
    for of_input, of_weight, of_gradient in (
        (R, S(0), S(0)),
        (R, R, R),
        (S(1), S(0), S(0)),  # the features are gathered
        (R, S(1), R),
        (S(0), S(0), S(0)),  # the rows are gathered, as there are few
        (S(0), R, Partial()),
    ):
        for options in ({}, {"chunk_rows": 2, "reduction": "none"}):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            right = fused_ops.linear_cross_entropy(*leaves, target, **options).sum()
            exact = torch.autograd.grad(right, leaves)
            ours = spread(x, mesh, [of_input], True), spread(w, mesh, [of_weight], True)
            start = classes if rank == 0 or not of_gradient.is_partial() else 0 * classes
            if of_gradient.is_partial():
                buffer = DTensor.from_local(start.clone(), mesh, [of_gradient])
            else:
                buffer = spread(classes, mesh, [of_gradient])
            version, what = buffer.to_local()._version, (of_input, of_weight, options)
            for _ in range(2):
                loss = fused_ops.linear_cross_entropy(*ours, target, main_grad=buffer, **options)
                loss.full_tensor().sum().backward()
            assert ours[1].grad is None and buffer.to_local()._version > version, what
            near(buffer.full_tensor(), classes + 2 * exact[1], 1e-12, what)
            near(ours[0].grad.full_tensor(), 2 * exact[0], 1e-12, what)
            for wrong in (torch.zeros_like(w), spread(w, mesh, [S(1)])):
                message = "expected main_grad to be a DTensor with the placements"
                call = lambda wrong=wrong, ours=ours: fused_ops.linear_cross_entropy(*ours, target, main_grad=wrong)  # noqa: E731
                raises(RuntimeError, message, call)


@case
def heads_on_two_dimensions_of_the_mesh(rank, world):
    meshes = [mesh_of(*sides(world))] if world > 2 else [mesh_of(1, 2), mesh_of(2, 1)]
    for mesh in meshes:
        for i, (of_input, of_weight, spread_rows) in enumerate(
            (
                ([S(0), R], [R, S(0)], [0]),  # DP x TP
                ([S(0), S(1)], [R, S(0)], [0]),  # with sequence parallelism
                ([S(0), R], [S(0), R], []),  # a weight as FSDP leaves it
                ([S(0), S(0)], [R, R], [0, 1]),
                ([R, R], [S(0), S(0)], []),
                ([S(1), S(0)], [S(1), R], [0, 1]),
            )
        ):
            options, more = OPTIONS[(i + 1) % 3], {"chunk_rows": 2} if i % 2 else {}
            where = mesh, of_input, of_weight, ("mean", "sum", "none")[i % 3], options, i // 2 % 2 == 0, spread_rows, i
            compare_head(KINDS[i % 4], (2, 3), 11, *where, **more)


class Net(torch.nn.Module):
    """A body, a head of a number of classes that no mesh divides evenly, and the loss in one of some ways."""

    def __init__(self, way):
        super().__init__()
        self.body, self.norm = torch.nn.Linear(6, 8), torch.nn.LayerNorm(8)
        self.head, self.loss = torch.nn.Linear(8, 15), torch.nn.CrossEntropyLoss()
        self.way, self.mesh = way, None

    def hidden(self, x):
        h = self.norm(self.body(x).relu())
        if self.mesh is None or self.way == "FSDP2":
            return h
        h = DTensor.from_local(h, self.mesh, [R], run_check=False)
        return h.redistribute(placements=[S(1)]) if "sequence" in self.way else h

    def forward(self, x, target):
        h = self.hidden(x)
        if "head" in self.way or self.way == "FSDP2":
            weight, bias = self.head.weight, self.head.bias
            return fused_ops.linear_cross_entropy(h, weight, target, linear_bias=bias)
        logits, target = self.head(h).flatten(0, 1), target.flatten()
        return self.loss(logits, target) if "module" in self.way else F.cross_entropy(logits, target)


def trained(way, mesh, sharded):
    """The parameters after three steps, and the losses unless the batch is sharded."""
    torch.manual_seed(3)
    net = Net(way).double()
    batch = 4 if dist.get_world_size() % 2 == 0 else 6
    x, target = torch.randn(batch, 3, 6, dtype=torch.float64), torch.randint(0, 15, (batch, 3))
    if mesh is not None:
        if "convert" in way:
            fused_ops.convert(net, **({"loss": F.cross_entropy, "head": "head"} if "loss" in way else {}))
        net.mesh, data = (mesh["b"], mesh["a"]) if mesh.ndim == 2 else (mesh, mesh)
        if way != "FSDP2":
            layout = S(1) if "sequence" in way else R
            plan = ColwiseParallel(input_layouts=layout, use_local_output=False)
            parallelize_module(net, net.mesh, {"head": plan})
        if way == "FSDP2" or mesh.ndim == 2:
            fully_shard(net, mesh=data)
            x, target = (t.chunk(data.size())[data.get_local_rank()] for t in (x, target))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, foreach=False)
    losses = []
    for _ in range(3):
        with fused_ops.patch() if "patch" in way and mesh is not None else nullcontext():
            loss = net(x, target)
            loss.backward()
        losses.append(loss.detach())
        if mesh is not None and way != "FSDP2":
            # the hidden states' rows are so many that the weight is gathered, but where data parallelism divides them
            many = way == "head, sequence" and 3 * x[..., 0].numel() > 2 * 15
            assert isinstance(loss, DTensor) and loss.placements == (Partial() if many else R,), way
            assert net.head.weight.grad.placements == net.head.weight.placements, way
        optimizer.step()
        optimizer.zero_grad()
    return [*(whole(p.detach()) for p in net.parameters()), *(whole(t) for t in losses if not sharded)]


def can_run(way, mesh):
    """Whether this torch has a linear layer of hidden states that were gathered along their rows: 2.10 has not."""
    if way != "patch, sequence":
        return True
    x = spread(torch.randn(4, 3, 8), mesh, [R] * mesh.ndim).redistribute(placements=[S(1)] * mesh.ndim)
    try:
        F.linear(x.redistribute(placements=[R] * mesh.ndim), spread(torch.randn(6, 8), mesh, [R] * mesh.ndim))
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)
        return False
    return True


@case
def models(rank, world):
    mesh = mesh_of(world)
    for way in (
        *("patch", "patch, sequence", "module, convert", "convert, loss, patch", "head", "head, sequence", "FSDP2"),
    ):
        sharded = way == "FSDP2"
        if not can_run(way, mesh):
            continue
        for mine, right in zip(trained(way, mesh, sharded), trained(way, None, sharded), strict=True):
            near(mine, right, 1e-10, way)


@case
def models_on_two_dimensions_of_the_mesh(rank, world):
    """FSDP2 over the first, tensor parallelism over the second."""
    mesh = mesh_of(*sides(world))
    for way in ("patch", "patch, sequence", "head", "head, sequence"):
        if not can_run(way, mesh_of(world)):
            continue
        for mine, right in zip(trained(way, mesh, True), trained(way, None, True), strict=True):
            near(mine, right, 1e-10, way)


def deferred_head(mesh, converted=True, **layouts):
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 15)).double()
    net.report = fused_ops.convert(net, loss=F.cross_entropy) if converted else None
    if mesh is not None:
        plan = {"2": ColwiseParallel(use_local_output=False, **layouts)}
        parallelize_module(net, mesh["b"] if mesh.ndim > 1 else mesh, plan)
        if mesh.ndim > 1:
            fully_shard(net, mesh=mesh["a"])
    return net


LOSSES = {
    "alone": lambda logits, t: F.cross_entropy(logits.flatten(0, 1), t.flatten(), ignore_index=3),
    "options": lambda logits, t: fused_ops.cross_entropy(logits.transpose(1, 2) * 0.5, t, z_loss=0.1),
    "smoothed": lambda logits, t: F.cross_entropy(logits.view(-1, 15), t.view(-1), label_smoothing=0.1),
    "shifted": lambda logits, t: F.cross_entropy(logits[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
    "by log_softmax": lambda logits, t: F.nll_loss(logits.flatten(0, 1).log_softmax(-1), t.flatten()),
    "used before": lambda logits, t: logits.square().mean() + F.cross_entropy(logits.flatten(0, 1), t.flatten()),
    "used after": lambda logits, t: F.cross_entropy(logits.flatten(0, 1), t.flatten()) + logits.square().mean(),
}


@case
def deferred_heads(rank, world):
    """A head that ColwiseParallel divides leaves its logits to the loss; what else uses them has them as DTensors."""
    meshes = [mesh_of(world)] if world == 2 else [mesh_of(world), mesh_of(*sides(world))]
    x, target = torch.randn(4, 3, 6, dtype=torch.float64), torch.randint(0, 15, (4, 3))
    for mesh, (name, loss), inside in itertools.product(meshes, LOSSES.items(), (False, True)):
        if name == "used before" and not inside:
            continue  # of DTensors that are there PyTorch's cross_entropy is for loss_parallel() alone
        net, alone = deferred_head(mesh), deferred_head(None, converted=False)
        with mock.patch.object(head, "SMALL_BYTES", 0):
            logits = net(x)
        labels = spread(target, logits.device_mesh, [R]) if inside else target
        with loss_parallel() if inside else nullcontext():
            found, expected = loss(logits, labels), loss(alone(x), target)
            found.backward()
        expected.backward()
        assert isinstance(found, DTensor) and logits.placements == (S(2),)
        near(found.full_tensor().detach(), expected.detach(), 1e-12, name)
        for mine, right in zip(net.parameters(), alone.parameters(), strict=True):
            near(whole(mine.grad), right.grad, 1e-12, (name, inside))
        computed = "used" in name
        assert (logits._state.real is not None) == computed, name
        assert ("logits never computed for 1 losses" in str(net.report)) != (name == "used before"), str(net.report)


@case
def deferred_heads_of_rows_that_are_gathered(rank, world):
    """What ColwiseParallel gathers in front of the head is still on its way when the logits are put off."""
    mesh, x, target = mesh_of(world), torch.randn(4, 2 * world, 6, dtype=torch.float64), torch.arange(8 * world) % 15
    net, alone = deferred_head(mesh, input_layouts=S(1)), deferred_head(None, converted=False)
    here, whole_x = (t.clone().requires_grad_() for t in (x.chunk(world, 1)[rank], x))
    with mock.patch.object(head, "SMALL_BYTES", 0):
        logits = net(here)
    found, expected = (F.cross_entropy(y.flatten(0, 1), target) for y in (logits, alone(whole_x)))
    found.backward()
    expected.backward()
    assert logits._state.real is None
    near(found.full_tensor().detach(), expected.detach(), 1e-12, "loss")
    near(here.grad, whole_x.grad.chunk(world, 1)[rank], 1e-12, "input")
    near(whole(net[2].weight.grad), alone[2].weight.grad, 1e-12, "weight")


USES = (
    *(lambda y: y.to_local(), lambda y: y.full_tensor(), lambda y: y.argmax(-1), lambda y: y + 1, lambda y: y.sum(-1)),
    *(lambda y: y.redistribute(placements=[R]), lambda y: y.redistribute(placements=[S(-1)]), lambda y: y[0]),
    *(lambda y: y.transpose(1, 2), lambda y: y.log_softmax(-1), lambda y: y.detach(), lambda y: y.exp()),
)


@case
def deferred_heads_are_dtensors_to_all_else(rank, world):
    mesh, x = mesh_of(world), torch.randn(4, 3, 6, dtype=torch.float64)
    with mock.patch.object(head, "SMALL_BYTES", 0):
        for i, use in enumerate(USES):
            found, right = (use(deferred_head(mesh, converted)(x)) for converted in (True, False))
            assert getattr(found, "placements", None) == getattr(right, "placements", None), i
            near(whole_of_any(found).detach(), whole_of_any(right).detach(), 0, i)
        for net in (deferred_head(mesh, output_layouts=R), deferred_head(mesh)):
            net[2].register_forward_hook(lambda *_: None)
            assert type(net(x)) is DTensor  # as somebody else's hook may look at them
        assert type(deferred_head(mesh, output_layouts=R)(x)) is DTensor
        with torch.no_grad():
            assert type(deferred_head(mesh)(x)) is DTensor
        net = deferred_head(mesh)
        logits = net(x)
        with torch.no_grad():
            net[2].weight.mul_(2)
        raises(RuntimeError, "changed in place", logits.sum)


def whole_of_any(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@case
def heads_in_autocast(rank, world):
    mesh = mesh_of(world)
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(0, 9, (6,))
    for of_input, of_weight in ((R, S(0)), (S(0), R)):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        ours = spread(x, mesh, [of_input], True), spread(w, mesh, [of_weight], True)
        with torch.autocast("cpu", torch.bfloat16):
            right = fused_ops.linear_cross_entropy(*leaves, target, label_smoothing=0.1)
            found = fused_ops.linear_cross_entropy(*ours, target, label_smoothing=0.1)
        assert found.dtype == right.dtype
        near(found.full_tensor().detach(), right.detach(), 1e-2, of_input)
        for mine, exact in zip(torch.autograd.grad(found, ours), torch.autograd.grad(right, leaves), strict=True):
            near(mine.full_tensor(), exact, 2e-2, of_input)


@case
def compiled_heads(rank, world):
    mesh = mesh_of(world)
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    target = torch.randint(0, 9, (5,))
    for of_input, of_weight, dynamic in ((S(0), S(0), True), (R, S(0), None), (S(0), R, None))[
        : 1 if world == 2 else 3
    ]:

        def f(x, w):
            return fused_ops.linear_cross_entropy(x * 2, w, target, chunk_rows=2)

        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        ours = spread(x, mesh, [of_input], True), spread(w, mesh, [of_weight], True)
        right, found = f(*leaves), torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*ours)
        near(found.full_tensor().detach(), right.detach(), 1e-12, of_input)
        for mine, exact in zip(torch.autograd.grad(found, ours), torch.autograd.grad(right, leaves), strict=True):
            near(mine.full_tensor(), exact, 1e-12, of_input)


BATCH_NORM = (
    {},
    {"activation": "relu", "residual": (6, 4, 3)},
    {"activation": "silu", "correction": 1},
    {"valid": (6, 3)},
    {"valid": (6,)},  # lengths
    {"groups": 2},
)


def by_pytorch(t, training, options):
    """Batch norm of float64 tensors in plain PyTorch, with the running statistics."""
    x, valid = t["input"], torch.ones(6, 3, dtype=torch.bool)
    if "valid" in t:
        valid = t["valid"] if t["valid"].dim() == 2 else torch.arange(3) < t["valid"].unsqueeze(1)
    mean, var = t["running_mean"], t["running_var"]
    groups = x.chunk(options.get("groups", 1) if training else 1)
    outputs = []
    for part, counts in zip(groups, valid.chunk(len(groups)), strict=True):
        at, of = mean, var
        if training:
            counts = counts.unsqueeze(1).double()
            n = counts.sum()
            at = (part * counts).sum((0, 2)) / n
            squares = ((part - at[:, None]).square() * counts).sum((0, 2))
            of = squares / (n - options.get("correction", 0))
            mean, var = mean + 0.1 * (at.detach() - mean), var + 0.1 * (squares.detach() / (n - 1) - var)
        y = (part - at[:, None]) / (of[:, None] + 1e-5).sqrt() * t["weight"][:, None] + t["bias"][:, None]
        outputs.append(y)
    y = torch.cat(outputs)
    y = y + t["residual"] if "residual" in t else y
    function = {None: lambda y: y, "relu": F.relu, "silu": F.silu}[options.get("activation")]
    return torch.where(valid.unsqueeze(1), function(y), 0.0), mean, var


@case
def batch_norms(rank, world):
    meshes = [mesh_of(world), mesh_of(*sides(world))]
    i = 0
    for mesh, options, training in itertools.product(meshes, BATCH_NORM, (True, False)):
        for placements in placements_of(3, mesh.ndim):
            i += 1
            if mesh.ndim == 2 and (i % 7 or any(p.is_partial() for p in placements)):
                continue
            t = {"input": torch.randn(6, 4, 3, dtype=torch.float64) * 2 + 3, "weight": torch.rand(4).double() + 0.5}
            t |= {"bias": torch.randn(4).double(), "running_mean": torch.randn(4).double()}
            t["running_var"] = torch.rand(4).double() + 0.5
            if "residual" in options:
                t["residual"] = torch.randn(6, 4, 3, dtype=torch.float64)
            if "valid" in options:
                t["valid"] = torch.rand(6, 3) < 0.7 if len(options["valid"]) == 2 else torch.tensor([3, 0, 2, 1, 3, 3])
            numbers = {name: value for name, value in options.items() if name not in t}
            free = [name for name in ("input", "weight", "bias", "residual") if name in t]
            leaves = {name: t[name].clone().requires_grad_() for name in free}
            right, mean, var = by_pytorch({**t, **leaves}, training, numbers)
            ours = {"input": spread(t["input"], mesh, placements)}
            for name in t:
                if name != "input":
                    ours[name] = t[name].clone() if i % 2 else spread(t[name], mesh, [S(0), *[R] * (mesh.ndim - 1)])
            named = {name: value.requires_grad_(name in free) for name, value in ours.items()}
            found = fused_ops.batch_norm(**named, training=training, **numbers)
            what = (options, training, placements)
            near(found.full_tensor().detach(), right.detach(), 1e-10, what)
            near(whole(ours["running_mean"]), mean, 1e-12, what)
            near(whole(ours["running_var"]), var, 1e-12, what)
            upstream = torch.randn(right.shape, dtype=torch.float64)
            grads = torch.autograd.grad(found, [ours[name] for name in free], spread(upstream, mesh, [R] * mesh.ndim))
            exact = torch.autograd.grad(right, list(leaves.values()), upstream)
            for name, mine, other in zip(free, grads, exact, strict=True):
                near(whole(mine), other, 1e-10, (what, name))
            if (mesh.ndim == 1 and options.get("groups") is None) or not training:
                assert found.placements == tuple(R if p.is_partial() else p for p in placements), what


@case
def synchronised_batch_norms(rank, world):
    """Modules that are synchronised take a DTensor's statistics over all of it; momentum=None averages."""
    mesh, group = mesh_of(world), dist.group.WORLD
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    for momentum, placement in itertools.product((0.1, None), (S(0), S(2), R)):
        alone = torch.nn.BatchNorm1d(4, momentum=momentum).double()
        ours = [fused_ops.SyncBatchNorm(4, momentum=momentum, process_group=g).double() for g in (None, group)]
        ours.append(torch.nn.Sequential(torch.nn.BatchNorm1d(4, momentum=momentum).double()))
        fused_ops.convert(ours[-1], sync_batch_norm=True)
        ours.append(fused_ops.BatchNorm1d(4, momentum=momentum).double())
        for module in (alone, *ours):
            for factor in (1, 2, 3):
                y = module(x * factor if module is alone else spread(x * factor, mesh, [placement]))
            if module is alone:
                right = y
                continue
            assert y.placements == (placement,)
            near(y.full_tensor().detach(), right.detach(), 1e-12, momentum)
            for mine, other in zip(module.buffers(), alone.buffers(), strict=True):
                near(mine, other, 1e-12, (momentum, placement))
    lacking = mesh_of(world, 1)["b"]  # each rank alone
    raises(ValueError, "without the ranks", fused_ops.SyncBatchNorm(4).double(), spread(x, lacking, [S(0)]))


@case
def batch_norm_keeps_the_memory_format(rank, world):
    mesh = mesh_of(world)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    y = fused_ops.batch_norm(DTensor.from_local(x, mesh, [S(0)]), None, None, training=True)
    assert y.shape == (4 * world, 3, 2, 5) and y.is_contiguous(memory_format=torch.channels_last)
    assert y.to_local().is_contiguous(memory_format=torch.channels_last)
    near(y.full_tensor()[:4], F.batch_norm(x, None, None, training=True), 1e-12, "channels_last")

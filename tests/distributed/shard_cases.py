"""What each of some processes does in the tests of cross-entropy whose classes or rows are spread over them.

Every rank draws the same whole problem, takes its part, and compares what comes out with the whole in one process and
with float64 formulas.
"""

import itertools
import math
from functools import partial

import torch
import torch.distributed as dist
from cross_entropy_formulas import DTYPES, draw, formula

import fused_ops

CASES = {}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CLASSES = 37
OPTIONS = {
    "none": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.01},
    "all": {"z_loss": 0.01, "logit_scale": 0.7, "softcap": 5.0, "label_smoothing": 0.1},
}


def case(function):
    CASES[function.__name__] = function
    return function


def sizes_of(kind, world, classes=CLASSES):
    """How many classes each rank has."""
    if kind == "even":
        return [classes // world + (rank < classes % world) for rank in range(world)]
    if kind == "uneven":
        return [classes - 3 * (world - 1), *[3] * (world - 1)]
    return [0, classes - (world - 2), *[1] * (world - 2)]  # an empty one


class Part:
    """This rank's classes of a whole."""

    def __init__(self, kind, rank, world, classes=CLASSES):
        self.sizes = sizes_of(kind, world, classes)
        self.start, self.n, self.classes = sum(self.sizes[:rank]), self.sizes[rank], classes

    def of(self, t):
        return t.narrow(min(t.dim() - 1, 1), self.start, self.n)

    def where(self):
        return {"class_group": dist.group.WORLD, "class_start": self.start, "classes": self.classes}


def near(mine, exact, tolerance, what):
    """Within the tolerance of a value, or of 1 where it is smaller."""
    assert mine.shape == exact.shape, (what, mine.shape, exact.shape)
    off = (mine.double() - exact.double()).abs() / exact.double().abs().clamp(min=1.0)
    assert bool((off <= tolerance).all()), (what, float(off.max()), mine, exact)


def everywhere_alike(*tensors):
    """The same bits on all ranks."""
    for t in tensors:
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, t.contiguous())
        assert all(torch.equal(parts[0].nan_to_num(), part.nan_to_num()) for part in parts)


def target_here(kind, target, part):
    return part.of(target) if kind == "dense" else target


def compare(part, kind, x, target, options, dtype, upstream_of_rows=True):
    """Loss, outputs and gradients of this rank's classes against the whole and its formula; no reduction."""
    rows = (x.size(0), *x.shape[2:])
    upstream = torch.linspace(-0.5, 2, math.prod(rows)).reshape(rows).to(dtype)
    given = {**options, "reduction": "none"}
    here = part.of(x).clone().requires_grad_()
    ours = fused_ops.cross_entropy(here, target_here(kind, target, part), **part.where(), **given)
    (grad,) = torch.autograd.grad(ours, here, upstream)
    whole = x.clone().requires_grad_()
    theirs = fused_ops.cross_entropy(whole, target, **given)
    (their_grad,) = torch.autograd.grad(theirs, whole, upstream)
    wide = x.double().requires_grad_()
    exact = formula(wide, target, **{k: v for k, v in options.items()})
    (exact_grad,) = torch.autograd.grad(exact, wide, upstream.double())
    what = (kind, dtype, part.sizes, sorted(options))
    everywhere_alike(ours.detach().double())
    assert ours.dtype == theirs.dtype and grad.dtype == dtype
    near(ours.detach(), exact.detach(), TOLERANCE[dtype], (what, "loss"))
    near(grad, part.of(exact_grad), TOLERANCE[dtype], (what, "grad"))
    near(ours.detach(), theirs.detach(), 2 * TOLERANCE[dtype], (what, "loss, one process"))
    near(grad, part.of(their_grad), 2 * TOLERANCE[dtype], (what, "grad, one process"))


@case
def options_and_targets(rank, world):
    torch.manual_seed(0)
    base = torch.randn(30, CLASSES, dtype=torch.float64) * 3
    grid = itertools.product(("index", "dense", "sparse", "mixup"), OPTIONS, DTYPES)
    for i, (kind, name, dtype) in enumerate(grid):
        part = Part(("even", "uneven", "empty")[i % 3], rank, world)
        x = base.to(dtype)
        target = draw(kind, x.shape, dtype, seed=i)
        if kind == "index":
            target[1::3] = torch.randint(0, CLASSES, target[1::3].shape)
            target[2] = min(part.sizes[0], CLASSES - 1)  # the first class of the next rank
        options = dict(OPTIONS[name])
        if i % 2:
            options["weight"] = torch.linspace(0.2, 2, CLASSES).to(dtype)
        compare(part, kind, x, target, options, dtype)


@case
def outputs(rank, world):
    torch.manual_seed(3)
    for dtype, kind, layout in itertools.product(DTYPES, ("even", "uneven", "empty"), (0, 1)):
        part = Part(kind, rank, world)
        x = (torch.randn(30, CLASSES, dtype=torch.float64) * 3).round(decimals=1).to(dtype)
        x = x.reshape(-1, 5, 3, CLASSES).permute(0, 3, 1, 2) if layout else x
        x[0], x[1] = 1.0, 2.0  # ties over the ranks
        target = draw("index", x.shape, dtype)
        options = {"z_loss": 0.1, "return_outputs": True, "logit_scale": 0.5}
        wholes = []
        for y, where in ((part.of(x), part.where()), (x, {})):
            y = y.clone().requires_grad_()
            out = fused_ops.cross_entropy(y, target, **options, **where)
            total = out.loss.double() + (out.lse * 0.3 + out.entropy + out.target_log_probability * 0.7).double().sum()
            wholes.append((out, torch.autograd.grad(total, y)[0]))
        (ours, grad), (theirs, their_grad) = wholes
        everywhere_alike(*(t.detach() for t in ours))
        for name, mine, other in zip(ours._fields, ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            if mine.is_floating_point():
                near(mine.detach(), other.detach(), TOLERANCE[dtype], (name, dtype, kind))
            else:
                assert torch.equal(mine, other), (name, dtype, kind)
        near(grad, part.of(their_grad), 4 * TOLERANCE[dtype], ("grad", dtype, kind))


@case
def replicated_arguments_have_whole_gradients(rank, world):
    torch.manual_seed(4)
    x = torch.randn(12, CLASSES, dtype=torch.float64)
    token = torch.rand(12, dtype=torch.float64) + 0.1
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1
    for kind, sizes in itertools.product(("dense", "sparse", "mixup"), ("even", "empty")):
        part, target = Part(sizes, rank, world), draw(kind, x.shape, x.dtype)
        found = []
        for y, where, own in ((part.of(x), part.where(), part.of), (x, {}, lambda t: t)):
            own_target = own(target) if kind == "dense" else target
            leaves = [t.clone().requires_grad_() for t in (y, token, weight)]
            if kind == "dense":
                own_target = own_target.clone().requires_grad_()
                leaves.append(own_target)
            else:
                last = own_target[-1].clone().requires_grad_()
                own_target = (*own_target[:-1], last)
                leaves.append(last)
            loss = fused_ops.cross_entropy(
                leaves[0], own_target, leaves[2], token_weight=leaves[1], label_smoothing=0.1, z_loss=0.01, **where
            )
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)])
            again = torch.autograd.grad(loss, leaves)
            assert all(torch.equal(a, b) for a, b in zip(found[-1][1:], again, strict=True))
        for i, (mine, whole) in enumerate(zip(*found, strict=True)):
            near(mine, part.of(whole) if i == 1 or (i == 4 and kind == "dense") else whole, 1e-12, (kind, sizes, i))


@case
def second_derivatives(rank, world):
    torch.manual_seed(5)
    x = torch.randn(4, 7, dtype=torch.float64)
    weight = torch.rand(7, dtype=torch.float64) + 0.1
    for kind, sizes in itertools.product(("index", "dense", "sparse"), ("even", "empty")):
        part, target = Part(sizes, rank, world, 7), draw(kind, x.shape, x.dtype)
        if kind == "index":
            target = torch.tensor([0, 6, -100, 3])

        def loss(y, w, own=lambda t: t, target=target, kind=kind, **where):
            given = own(target) if kind == "dense" else target
            out = fused_ops.cross_entropy(
                y, given, w, label_smoothing=0.1, softcap=4.0, z_loss=0.1, return_outputs=True, **where
            )
            return out.loss + out.entropy.square().sum()

        fixed = weight if kind == "index" else weight.requires_grad_()
        upstream = torch.randn(x.shape, dtype=torch.float64)
        found = []
        for y, where in ((part.of(x), {**part.where(), "own": part.of}), (x, {})):
            y = y.clone().requires_grad_()
            leaves = [y] if kind == "index" else [y, fixed]
            first = torch.autograd.grad(loss(y, fixed, **where), leaves, create_graph=True)
            mine = part.of(upstream) if where else upstream
            # what is spread over the ranks: the sum of shares, as the loss of the second derivative
            dot = (first[0] * mine).sum()
            dot = fused_ops.distributed.collectives.sum_of_shares(dot, dist.group.WORLD) if where else dot
            rest = first[1].square().sum() if len(first) > 1 else 0
            second = torch.autograd.grad(dot + rest, leaves)
            tangent = torch.func.jvp(partial(loss, w=fixed, **where), (y.detach(),), (mine,))[1]
            found.append([*first, *second, tangent])
        n = len(found[0]) // 2
        for i, (mine, whole) in enumerate(zip(*found, strict=True)):
            near(mine.detach(), (part.of(whole) if i in (0, n) else whole).detach(), 1e-10, (kind, sizes, i))


@case
def row_groups(rank, world):
    torch.manual_seed(6)
    x = torch.randn(11, 6, dtype=torch.float64)
    target = draw("index", x.shape, x.dtype)
    token = torch.rand(11, dtype=torch.float64) + 0.1
    weight = torch.rand(6, dtype=torch.float64) + 0.1
    first = {"uneven": 7, "empty": 0, "ignored": 5}
    for name, reduction in itertools.product(first, ("mean", "sum", "none")):
        begin = [0, *(min(first[name] + 2 * r, 11) for r in range(world - 1)), 11]
        mine = slice(begin[rank], begin[rank + 1])
        labels = target.clone()
        if name == "ignored":
            labels[:5] = -100
        y, t = x[mine].clone().requires_grad_(), token[mine].clone().requires_grad_()
        loss = fused_ops.cross_entropy(
            y, labels[mine], weight, token_weight=t, reduction=reduction, row_group=dist.group.WORLD
        )
        whole, tokens = x.clone().requires_grad_(), token.clone().requires_grad_()
        expected = fused_ops.cross_entropy(whole, labels, weight, token_weight=tokens, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (y, t))
        exact = torch.autograd.grad(expected.sum(), (whole, tokens))
        if reduction == "none":
            near(loss.detach(), expected.detach()[mine], 1e-12, name)
        else:
            total = fused_ops.distributed.collectives.sum_of_ranks(loss.detach(), dist.group.WORLD)
            near(total, expected.detach(), 1e-12, (name, reduction))
        for i in range(2):
            near(grads[i], exact[i][mine], 1e-12, (name, reduction, i))


def raises(error, message, function, *args, **options):
    try:
        function(*args, **options)
    except error as found:
        assert message in str(found), str(found)
    else:
        raise AssertionError(f"expected {error.__name__}: {message}")


@case
def bad_targets_raise_on_all_ranks(rank, world):
    torch.manual_seed(1)
    x, target = torch.randn(4, 6), torch.tensor([0, 5, -100, 3])
    part = Part("even", rank, world, 6)
    rows = {"row_group": dist.group.WORLD}
    for bad, options in itertools.product((6, -1, -(2**63)), ({}, {"label_smoothing": 0.1}, {"return_outputs": True})):
        wrong = target.clone()
        wrong[3] = bad
        here = wrong if rank == 0 else target  # on one rank alone
        calls = [(part.of(x), wrong, part.where()), (part.of(x), here, {"class_group": dist.group.WORLD})]
        calls += [(x, here, {**rows, "reduction": reduction}) for reduction in ("mean", "sum", "none")]
        calls += [(x, (here.unsqueeze(1), torch.ones(4, 1)), rows), (x, here, {**rows, "normalizer": 3})]
        for y, labels, where in calls:
            raises(
                IndexError, f"Target {bad} is out of bounds.", fused_ops.cross_entropy, y, labels, **where, **options
            )
        loss = fused_ops.cross_entropy(part.of(x), target, **part.where(), reduction="sum")  # and nothing is left
        near(loss, fused_ops.cross_entropy(x, target, reduction="sum"), 3e-6, "after an error")


@case
def compiled_as_one_graph(rank, world):
    torch.manual_seed(7)
    x, weight = torch.randn(10, CLASSES), torch.rand(CLASSES) + 0.1
    group = dist.group.WORLD
    for kind, given in (("index", True), ("dense", True), ("sparse", False), ("index", False)):
        part, target = Part("uneven", rank, world), draw(kind, x.shape, x.dtype)
        target = target_here(kind, target, part)
        where = part.where() if given else {"class_group": group}

        def loss(y, w, target=target, where=where):
            out = fused_ops.cross_entropy(
                y * 2, target, w, z_loss=0.1, label_smoothing=0.1, return_outputs=True, row_group=group, **where
            )
            return out.loss + out.entropy.sum()

        leaves = [part.of(x).clone().requires_grad_(), weight.clone().requires_grad_(kind != "index")]
        wanted = leaves[:1] if kind == "index" else leaves
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*leaves), loss(*leaves))
        for a, b in zip(*(torch.autograd.grad(f(*leaves), wanted) for f in (compiled, loss)), strict=True):
            torch.testing.assert_close(a, b)

"""What each of some processes does in the tests of cross-entropy whose classes or rows are spread over them.

Every rank draws the same whole problem, takes its part, and compares what comes out with the whole in one process and
with float64 formulas.
"""

import itertools
import math
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from cross_entropy_formulas import DTYPES, draw, formula

import fused_ops
from fused_ops.distributed import collectives

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
        if world == 2 and (i + i // 4) % 4:  # one dtype each, in turn
            continue
        part = Part(("even", "uneven", "empty")[i // 4 % 3], rank, world)
        x = base.to(dtype)
        target = draw(kind, x.shape, dtype, seed=i)
        if kind == "index":
            target[1::3] = torch.randint(0, CLASSES, target[1::3].shape)
            target[2] = min(part.sizes[0], CLASSES - 1)  # the first class of the next rank
        options = dict(OPTIONS[name])
        if i // 4 % 2:
            options["weight"] = torch.linspace(0.2, 2, CLASSES).to(dtype)
        compare(part, kind, x, target, options, dtype)


@case
def outputs(rank, world):
    torch.manual_seed(3)
    for dtype, kind, layout in itertools.product(DTYPES, ("even", "uneven", "empty"), (0, 1)):
        if world == 2 and layout != (kind == "uneven"):
            continue
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
            dot = collectives.sum_of_shares(dot, dist.group.WORLD) if where else dot
            rest = first[1].square().sum() if len(first) > 1 else 0
            second = torch.autograd.grad(dot + rest, leaves)
            tangent = torch.func.jvp(partial(loss, w=fixed, **where), (y.detach(),), (mine,))[1]
            found.append([*first, *second, tangent])
        n = len(found[0]) // 2
        for i, (mine, whole) in enumerate(zip(*found, strict=True)):
            near(mine.detach(), (part.of(whole) if i in (0, n) else whole).detach(), 1e-10, (kind, sizes, i))


def some_rows(target, rows):
    return tuple(some_rows(t, rows) for t in target) if isinstance(target, tuple) else target[rows]


@case
def row_groups(rank, world):
    torch.manual_seed(6)
    x, token, weight = (torch.rand(shape, dtype=torch.float64) + 0.1 for shape in ((11, 6), (11,), (6,)))
    first = {"uneven": 7, "empty": 0, "ignored": 5}
    kinds = [("index", name, reduction) for name in first for reduction in ("mean", "sum", "none")]
    kinds += [(kind, "empty", "mean") for kind in ("dense", "sparse", "mixup")]
    for kind, name, reduction in kinds:
        begin = [0, *(min(first[name] + 2 * r, 11) for r in range(world - 1)), 11]
        mine, labels = slice(begin[rank], begin[rank + 1]), draw(kind, x.shape, x.dtype)
        if name == "ignored":
            labels[:5] = -100
        y, t = x[mine].clone().requires_grad_(), token[mine].clone().requires_grad_()
        here = some_rows(labels, mine)
        options = {"reduction": reduction, "label_smoothing": 0.1}
        loss = fused_ops.cross_entropy(y, here, weight, token_weight=t, row_group=dist.group.WORLD, **options)
        whole, tokens = x.clone().requires_grad_(), token.clone().requires_grad_()
        expected = fused_ops.cross_entropy(whole, labels, weight, token_weight=tokens, **options)
        grads = torch.autograd.grad(loss.sum(), (y, t))
        exact = torch.autograd.grad(expected.sum(), (whole, tokens))
        if reduction == "none":
            near(loss.detach(), expected.detach()[mine], 1e-12, name)
        else:
            total = collectives.sum_of_ranks(loss.detach(), dist.group.WORLD)
            near(total, expected.detach(), 1e-12, (kind, name, reduction))
        for i in range(2):
            near(grads[i], exact[i][mine], 1e-12, (kind, name, reduction, i))


@case
def a_mesh_of_classes_and_rows(rank, world):
    """Two by two where there are four ranks, else as many rows as ranks."""
    torch.manual_seed(13)
    across = 2 if world == 4 else 1
    tensor, data = rank % across, rank // across
    classes = [dist.new_group([d * across + t for t in range(across)]) for d in range(world // across)][data]
    rows = [dist.new_group([d * across + t for d in range(world // across)]) for t in range(across)][tensor]
    x, target = torch.randn(9, CLASSES, dtype=torch.float64), torch.randint(0, CLASSES, (9,))
    target[0] = -100
    part, mine = Part("uneven", tensor, across), slice(*((0, 2), (2, 9), (9, 9), (9, 9))[data])
    if world == 3:
        mine = slice(3 * rank, 3 * rank + 3)
    y, whole = part.of(x)[mine].clone().requires_grad_(), x.clone().requires_grad_()
    loss = fused_ops.cross_entropy(y, target[mine], label_smoothing=0.1, class_group=classes, row_group=rows)
    expected = fused_ops.cross_entropy(whole, target, label_smoothing=0.1)
    near(collectives.sum_of_ranks(loss.detach(), rows), expected.detach(), 1e-12, "loss")
    near(*(torch.autograd.grad(loss, y)[0], part.of(torch.autograd.grad(expected, whole)[0])[mine]), 1e-12, "grad")
    wrong = target[mine].clone()
    if rank // across == 0:
        wrong[-1] = CLASSES
    raises(IndexError, f"Target {CLASSES}", fused_ops.cross_entropy, y, wrong, class_group=classes, row_group=rows)


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
    for kind, given in (("index", True), ("sparse", False)):
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


@case
def derivatives_by_finite_differences(rank, world):
    """Of a whole that all ranks have alike, each takes its part: the ranks' checks go in step."""
    torch.manual_seed(8)
    group, classes = dist.group.WORLD, 5
    part = Part("uneven" if world < 3 else "even", rank, world, classes)
    x, weight, token = (torch.randn(shape, dtype=torch.float64) for shape in ((3, classes), (classes,), (3,)))
    sparse = torch.rand(3, 2, dtype=torch.float64)
    targets = {
        "index": lambda _: torch.tensor([4, -100, 0]),
        "dense": lambda p: part.of(collectives.copy_to_shares(p, group)),
        "sparse": lambda p: (torch.tensor([[0, 4], [-100, 2], [1, 1]]), p),
    }
    more = {"index": None, "dense": x.softmax(1), "sparse": sparse}
    for kind, target in targets.items():

        def values(x, token, *others, kind=kind, target=target):
            own = part.of(collectives.copy_to_shares(x, group))
            w = others[0] if others else weight.abs()
            out = fused_ops.cross_entropy(
                own,
                target(others[1] if others else None),
                w,
                token_weight=token,
                label_smoothing=0.1,
                softcap=3.0,
                z_loss=0.1,
                return_outputs=True,
                **part.where(),
            )
            wanted = out.loss, out.lse, out.entropy
            return wanted if kind != "index" else (*wanted, out.target_log_probability)

        inputs = [x, token.abs() + 0.1] + ([weight.abs() + 0.1, more[kind]] if more[kind] is not None else [])
        inputs = [t.clone().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(values, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(values, inputs, check_fwd_over_rev=True, fast_mode=True)


@case
def transforms(rank, world):
    torch.manual_seed(9)
    group, part, target = dist.group.WORLD, Part("even", rank, world, 5), torch.tensor([4, -100, 0])

    def ours(x):
        own = part.of(collectives.copy_to_shares(x, group))
        return fused_ops.cross_entropy(own, target, label_smoothing=0.1, z_loss=0.1, **part.where())

    def whole(x):
        return fused_ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1)

    x = torch.randn(3, 5, dtype=torch.float64)
    for f in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        near(f(ours)(x), f(whole)(x), 1e-12, f.__name__)
    batch = torch.randn(2, 3, 5, dtype=torch.float64)
    near(torch.vmap(ours)(batch), torch.vmap(whole)(batch), 1e-12, "vmap")
    near(torch.vmap(torch.func.grad(ours))(batch), torch.vmap(torch.func.grad(whole))(batch), 1e-12, "vmap of grad")
    nested = torch.func.jacfwd(torch.func.jacfwd(ours))
    raises(NotImplementedError, "one level of forward-mode AD", nested, x)


@case
def a_group_of_one_rank(rank, world):
    torch.manual_seed(10)
    group = dist.new_group([rank], use_local_synchronization=True)
    for dtype in DTYPES:
        x, target = torch.randn(20, CLASSES).to(dtype), torch.randint(0, CLASSES, (20,))
        found = []
        for where in ({"class_group": group, "row_group": group}, {}):
            y = x.clone().requires_grad_()
            loss = fused_ops.cross_entropy(y, target, label_smoothing=0.1, **where)
            found += [loss.detach(), torch.autograd.grad(loss, y)[0]]
        near(found[0], found[2], TOLERANCE[dtype], dtype)
        near(found[1], found[3], TOLERANCE[dtype], dtype)


@case
def masks_and_shapes(rank, world):
    torch.manual_seed(11)
    shapes = ((CLASSES,), (4, CLASSES), (0, CLASSES), (3, CLASSES, 2, 2), (2, CLASSES, 0))
    for shape, kind, masks in itertools.product(shapes, ("even", "empty"), (0, 1, 2)):
        part, x = Part(kind, rank, world), torch.randn(shape, dtype=torch.float64)
        dim = min(x.dim() - 1, 1)
        target = torch.randint(0, CLASSES, (*shape[:dim], *shape[dim + 1 :]))
        mask = None if not masks else torch.rand(CLASSES if masks == 1 or x.dim() == 1 else shape) > 0.3
        found = []
        for y, where, own in ((part.of(x), part.where(), part.of), (x, {}, lambda t: t)):
            y = y.clone().requires_grad_()
            given = own(mask) if mask is not None and mask.dim() > 1 else mask
            loss = fused_ops.cross_entropy(y, target, label_smoothing=0.1, reduction="sum", class_mask=given, **where)
            found += [loss.detach(), torch.autograd.grad(loss, y)[0]]
        near(found[0].nan_to_num(-1, -2), found[2].nan_to_num(-1, -2), 1e-12, (shape, kind, masks))
        assert torch.equal(found[0].isfinite(), found[2].isfinite())
        near(found[1], part.of(found[3]), 1e-12, (shape, kind, masks))


@case
def the_backward_writes_over_the_logits(rank, world):
    torch.manual_seed(12)
    part, target = Part("uneven", rank, world), torch.randint(0, CLASSES, (20,))
    leaf = part.of(torch.randn(20, CLASSES)).clone().requires_grad_()
    options = {"label_smoothing": 0.1, **part.where()}
    logits = leaf * 1
    loss = fused_ops.cross_entropy(logits, target, inplace_backward=True, **options)
    grad = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(grad, torch.autograd.grad(fused_ops.cross_entropy(leaf, target, **options), leaf)[0])
    assert torch.equal(logits, grad)
    raises(RuntimeError, "modified by an inplace operation", torch.autograd.grad, loss, leaf)


@case
def modules(rank, world):
    """The losses as modules take the groups as the functions do."""
    torch.manual_seed(15)
    part, target = Part("uneven", rank, world), torch.randint(0, CLASSES, (20,))
    x, h, head = torch.randn(20, CLASSES), torch.randn(20, 5), torch.randn(CLASSES, 5)
    weight = torch.rand(CLASSES) + 0.1
    loss = fused_ops.CrossEntropyLoss(weight, label_smoothing=0.1, **part.where())
    near(loss(part.of(x), target), fused_ops.cross_entropy(x, target, weight, label_smoothing=0.1), 3e-6, "classes")
    assert f"classes={CLASSES}" in repr(loss)
    rows = [20 - 2 * (world - 1), *[2] * (world - 1)]
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    mean = fused_ops.CrossEntropyLoss(row_group=dist.group.WORLD)(x[mine], target[mine])
    near(collectives.sum_of_ranks(mean, dist.group.WORLD), fused_ops.cross_entropy(x, target), 3e-6, "rows")
    options = {"weight": weight, "z_loss": 0.1}
    expected = fused_ops.linear_cross_entropy(h, head, target, **options)
    for apart in (False, True):
        where = {**part.where(), "sequence_parallel": apart}
        module = fused_ops.LinearCrossEntropyLoss(5, part.n, **options, **where)
        module.linear.weight.data.copy_(head[part.start : part.start + part.n])
        near(module(h[mine] if apart else h, target).detach(), expected, 3e-6, apart)


@case
def checkpointed(rank, world):
    """torch.utils.checkpoint lets a backward unpack what was saved once."""
    torch.manual_seed(14)
    part, x, target = Part("uneven", rank, world), torch.randn(20, CLASSES), torch.randint(0, CLASSES, (20,))
    found = []
    for run in (lambda f, y: f(y), partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)):
        leaf = part.of(x).clone().requires_grad_()
        loss = run(lambda y: fused_ops.cross_entropy(y * 2, target, label_smoothing=0.1, **part.where()), leaf)
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*found)


@case
def what_empty_says_is_about_all_ranks(rank, world):
    x, target = torch.randn(3, 4), torch.full((3,), -100)
    rows = {"row_group": dist.group.WORLD}
    assert fused_ops.cross_entropy(x, target, **rows).isnan()
    assert fused_ops.cross_entropy(x, target, empty="zero", **rows) == 0
    raises(ValueError, "nothing counts", fused_ops.cross_entropy, x, target, empty="raise", **rows)
    if rank == 0:
        target[1] = 2
    loss = fused_ops.cross_entropy(x, target, empty="raise", **rows)
    assert loss == (fused_ops.cross_entropy(x, target) if rank == 0 else 0)


@case
def wrong_arguments_raise_before_a_collective(rank, world):
    if rank:  # nobody to talk to
        return
    group, x, target = dist.group.WORLD, torch.randn(3, 4), torch.tensor([0, 1, 2])
    eight = {"class_start": 0, "classes": 8, "class_group": group}
    calls = (
        (ValueError, "class_start and classes together, got only class_start", {"class_start": 0}),
        (ValueError, "got only classes", {"classes": 4, "class_group": group}),
        (ValueError, "together, got only class_start and classes", {"class_start": 0, "classes": 4}),
        (ValueError, "class_start=6", {"class_start": 6, "classes": 8, "class_group": group}),
        (ValueError, "class_start=-1", {"class_start": -1, "classes": 8, "class_group": group}),
        (TypeError, "'classes' must be int", {"class_start": 0, "classes": 8.5, "class_group": group}),
        (TypeError, "'class_group' must be a torch.distributed.ProcessGroup", {"class_group": "model"}),
        (TypeError, "'row_group' must be", {"row_group": 3}),
        (
            RuntimeError,
            "for all 8 classes",
            {"weight": torch.ones(4), **eight},
        ),
        (
            RuntimeError,
            "class_mask of shape [8]",
            {"class_mask": torch.ones(4) > 0, **eight},
        ),
        (ValueError, "normalizer is for", {"class_group": group, "normalizer": 3, "reduction": "sum"}),
        (RuntimeError, "normalizer", {"row_group": group, "normalizer": torch.ones(2)}),
        (RuntimeError, "token_weight of shape", {"row_group": group, "token_weight": torch.ones(2)}),
        (ValueError, "batch_size", {"class_group": group, "target": target[:2]}),
    )
    for error, message, options in calls:
        raises(error, message, fused_ops.cross_entropy, x, **{"target": target, **options})


@case
def what_many_ranks_do(rank, world):
    """The cases once more with what reduces in the place of what gathers: the same bits on all ranks as well."""
    cases = (
        options_and_targets,
        outputs,
        replicated_arguments_have_whole_gradients,
        second_derivatives,
        a_mesh_of_classes_and_rows,
        bad_targets_raise_on_all_ranks,
        transforms,
        masks_and_shapes,
        the_backward_writes_over_the_logits,
    )
    with mock.patch.object(collectives, "MANY_RANKS", 1):
        for function in cases:
            function(rank, world)

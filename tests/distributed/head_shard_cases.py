"""What each of some processes does in the tests of linear cross-entropy whose classes or rows are spread over them.

Every rank draws the same whole head, takes its part, and compares what comes out with the whole in one process and
with float64 formulas.
"""

import itertools
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from cross_entropy_formulas import DTYPES, draw, formula

import fused_ops
from fused_ops.distributed import collectives
from fused_ops.ops.linear_cross_entropy import by_rows, plan
from tests.distributed.shard_cases import OPTIONS, Part, everywhere_alike, near, raises

CASES = {}
CLASSES, FEATURES, ROWS = 37, 8, 30
EPS = {torch.float64: 1e-14, torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OF_CLASSES = ("linear_weight", "linear_bias", "b")  # the tensors of which a rank has some entries


def case(function):
    CASES[function.__name__] = function
    return function


def draw_head(dtype=torch.float64, seed=0, rank=None, positions=()):
    """The tensors of a head by name; with a rank those of a low-rank term too."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    found = {"input": normal(ROWS, FEATURES), "linear_weight": normal(CLASSES, *positions, FEATURES)}
    found["linear_bias"] = normal(CLASSES, *positions)
    return found if rank is None else {**found, "a": normal(rank, FEATURES), "b": normal(CLASSES, rank)}


def rows_of(world, kind, rows=ROWS):
    """How many rows each rank has of the hidden states."""
    first = {"uneven": rows - 2 * (world - 1), "empty": 0}[kind]
    rest = [2] * (world - 1) if kind == "uneven" else [rows - (world - 2), *[1] * (world - 2)]
    return [first, *rest]


class Mine:
    """What this rank has of the tensors: its classes, and with ``rows`` its rows of the input."""

    def __init__(self, part, rank, rows=None):
        self.part, self.start, self.n = part, 0 if rows is None else sum(rows[:rank]), None
        self.n = None if rows is None else rows[rank]
        self.options = {**part.where(), "sequence_parallel": rows is not None}

    def of(self, name, t):
        if name in OF_CLASSES:
            return t.narrow(0, self.part.start, self.part.n)
        return t.narrow(0, self.start, self.n) if name == "input" and self.n is not None else t

    def target(self, target):
        return self.part.of(target) if isinstance(target, torch.Tensor) and target.is_floating_point() else target


def called(leaves, target, options):
    """The loss of a head by the names of its tensors."""
    given = {k: v for k, v in leaves.items() if k not in ("input", "linear_weight", "a", "b")}
    if "a" in leaves:
        given["lora"] = (leaves["a"], leaves["b"], 0.5)
    return fused_ops.linear_cross_entropy(leaves["input"], leaves["linear_weight"], target, **given, **options)


def run(tensors, target, options, function=called, upstream=None):
    """The loss, and the gradients by name."""
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    loss = function(leaves, target, options)
    total = loss if upstream is None or loss.dim() == 0 else (loss * upstream.to(loss.dtype)).sum()
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True))


def exactly(leaves, target, options):
    logits = leaves["input"] @ leaves["linear_weight"].t() + leaves["linear_bias"]
    rows = formula(logits, target, **{k: v for k, v in options.items() if k != "reduction"})
    return rows if options["reduction"] == "none" else rows.sum()


def no_further(mine, whole, exact, dtype, what):
    """No further from the truth than twice what one process is, and one rounding."""
    assert mine.shape == exact.shape and mine.dtype == whole.dtype == dtype, what
    if mine.numel() == 0:
        return
    off, theirs = ((t.double() - exact).abs().max() for t in (mine, whole))
    assert off <= 2 * theirs + EPS[dtype] * exact.abs().max(), (what, float(off), float(theirs))


@case
def options_and_targets(rank, world):
    upstream = torch.linspace(-0.5, 2, ROWS)
    grid = [
        (kind, name, DTYPES[(i + j) % 4])
        for i, kind in enumerate(("index", "dense", "sparse", "mixup"))
        for j, name in enumerate(OPTIONS)
    ]
    for i, (kind, name, dtype) in enumerate(grid):
        part, tensors = Part(("even", "uneven", "empty")[i % 3], rank, world), draw_head(dtype, i)
        target, options = draw(kind, (ROWS, CLASSES), dtype, seed=i), dict(OPTIONS[name])
        if kind == "index":
            target[1::3] = torch.randint(0, CLASSES, target[1::3].shape, generator=torch.Generator().manual_seed(i))
            target[2] = min(part.sizes[0], CLASSES - 1)  # the first class of the next rank
        if i % 2:
            options["weight"] = torch.linspace(0.2, 2, CLASSES).to(dtype)
        mine, what = Mine(part, rank), (kind, name, dtype, part.sizes)
        reduction = "none" if i % 3 else "sum"
        cut = {"reduction": reduction, "chunk_rows": 8} if i % 5 else {"reduction": reduction}
        held = {key: mine.of(key, t) for key, t in tensors.items()}
        loss, grads = run(held, mine.target(target), {**options, **cut, **mine.options}, upstream=upstream)
        whole, whole_grads = run(tensors, target, {**options, **cut}, upstream=upstream)
        wide = {key: t.double() for key, t in tensors.items()}
        exact, exact_grads = run(wide, target, {**options, "reduction": reduction}, exactly, upstream)
        everywhere_alike(loss.double(), grads["input"].double())
        no_further(loss, whole, exact, dtype, (what, "loss"))
        for key, grad in grads.items():
            no_further(grad, mine.of(key, whole_grads[key]), mine.of(key, exact_grads[key]), dtype, (what, key))


def same_as_whole(mine, tensors, target, options, own=None, tolerance=1e-12, function=called):
    """Loss and gradients of this rank's part against one process, in float64; ``own`` are the options of the part."""
    held = {key: mine.of(key, t) for key, t in tensors.items()}
    loss, grads = run(held, mine.target(target), {**options, **mine.options, **(own or {})}, function)
    whole, whole_grads = run(tensors, target, options, function)
    everywhere_alike(loss, *(grads[key] for key in grads if key not in OF_CLASSES and mine.n is None))
    near(loss, whole, tolerance, (options, "loss"))
    for key, grad in grads.items():
        near(grad, mine.of(key, whole_grads[key]), tolerance, (options, key))


@case
def sums_in_the_forward(rank, world):
    g = torch.Generator().manual_seed(3)
    token, weight = torch.rand(ROWS, generator=g), torch.rand(CLASSES, generator=g) + 0.1
    mask = (torch.arange(CLASSES) < 13) | (torch.arange(CLASSES) % 5 > 0)  # targets are among the first 13
    ways = [
        {"z_loss": 0.1, "softcap": 4.0},
        {"weight": weight.double(), "reduction": "sum"},
        {"token_weight": token.double(), "label_smoothing": 0.1, "class_mask": mask},
        {"normalizer": 7.5, "logit_scale": 0.5},
        {"ignore_index": 3, "loss_dtype": torch.float32},
    ]
    kinds = ("index", "dense", "sparse", "mixup")
    for i, options in enumerate(ways):
        kind = "index" if "ignore_index" in options else kinds[i % 4]
        target = draw(kind, (ROWS, CLASSES), torch.float64, i)
        target = target.where(target != -100, 3) if "ignore_index" in options else target
        for chunks in ({"chunk_rows": 7}, {"max_memory_bytes": 4000}):
            part = Part(("even", "uneven", "empty")[i % 3], rank, world)
            tolerance = 1e-6 if "loss_dtype" in options else 1e-12
            same_as_whole(Mine(part, rank), draw_head(seed=i), target, {**options, **chunks}, tolerance=tolerance)
    ignored = torch.full((ROWS,), -100)
    for empty in ("nan", "zero"):
        for cut in ({}, {"chunk_rows": 7}):
            options = {"empty": empty, **cut, **Part("even", rank, world).where()}
            held = {key: Mine(Part("even", rank, world), rank).of(key, t) for key, t in draw_head().items()}
            loss, grads = run(held, ignored, options)
            assert loss.isnan() if empty == "nan" else loss == 0
            assert empty == "nan" or all(grad.abs().sum() == 0 for grad in grads.values())


@case
def arguments_that_all_have(rank, world):
    """Gradients of a token weight, of class weights and of a target's probabilities are whole."""
    g = torch.Generator().manual_seed(4)
    more = {"token_weight": torch.rand(ROWS, generator=g).double(), "weight": torch.rand(CLASSES, generator=g).double()}
    for i, kind in enumerate(("sparse", "mixup")):
        *indices, last = draw(kind, (ROWS, CLASSES), torch.float64)
        tensors = {**draw_head(seed=i), **more, "last": last}

        def function(leaves, indices, options):
            named = {key: t for key, t in leaves.items() if key != "last"}
            return called(named, (*indices, leaves["last"]), {**options, "label_smoothing": 0.1, "z_loss": 0.1})

        part = Part(("even", "empty")[i], rank, world)
        same_as_whole(Mine(part, rank), tensors, tuple(indices), {"chunk_rows": 7}, function=function)


@case
def outputs_and_what_is_retained(rank, world):
    for i, dtype in enumerate(DTYPES):
        part, tensors = Part(("even", "uneven", "empty")[i % 3], rank, world), draw_head(dtype, i)
        mine, target = Mine(part, rank), draw("index", (ROWS, CLASSES), dtype)
        found = []
        for held, own in (({k: mine.of(k, t) for k, t in tensors.items()}, mine.options), (tensors, {})):
            leaves = {key: t.clone().requires_grad_() for key, t in held.items()}
            out = called(leaves, target, {"z_loss": 0.1, "return_outputs": True, "chunk_rows": 7, **own})
            rest = (out.lse * 0.3 + out.entropy + out.target_log_probability * 0.7).double().sum()
            total = out.loss.double() + rest
            grads = torch.autograd.grad(total, leaves.values(), retain_graph=True)
            again = torch.autograd.grad(total, leaves.values())
            assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
            found.append((out, dict(zip(leaves, grads, strict=True))))
        (out, grads), (whole, whole_grads) = found
        everywhere_alike(*(t.detach() for t in out))
        wide = 16 * EPS[dtype]
        for name, ours, theirs in zip(out._fields, out, whole, strict=True):
            assert ours.dtype == theirs.dtype
            if ours.is_floating_point():
                near(ours.detach(), theirs.detach(), wide, (name, dtype))
            elif dtype.itemsize > 2:
                assert torch.equal(ours, theirs), (name, dtype)
        for key, grad in grads.items():
            near(grad, mine.of(key, whole_grads[key]), 4 * wide, (key, dtype))
    part, tensors = Part("even", rank, world), draw_head()
    held = {key: Mine(part, rank).of(key, t).clone().requires_grad_() for key, t in tensors.items()}
    loss = called(held, draw("index", (ROWS, CLASSES), None), {"chunk_rows": 7, **part.where()})
    first = torch.autograd.grad(loss, held.values(), retain_graph=True)
    again = torch.autograd.grad(2 * loss, held.values())
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-14, atol=0)


@case
def rows_of_the_input_on_each_rank(rank, world):
    """sequence_parallel, with a low-rank term, several dimensions, shifted targets."""
    target = draw("index", (ROWS, CLASSES), torch.float64)
    for i, (sizes, rows, cut) in enumerate(
        itertools.product(("even", "empty"), ("uneven", "empty", None), ({}, {"chunk_rows": 7}))
    ):
        counts = None if rows is None else rows_of(world, rows)
        mine = Mine(Part(sizes, rank, world), rank, counts)
        same_as_whole(mine, draw_head(seed=i, rank=2), target, {"label_smoothing": 0.1, **cut})
    mine = Mine(Part("even", rank, world), rank, rows_of(world, "uneven", 6))
    tensors = draw_head()
    tensors["input"] = tensors["input"].reshape(6, 5, FEATURES)
    for shift, kind in ((True, "index"), (False, "mixup")):
        labels = draw(kind, (6, CLASSES, 5), torch.float64)
        labels = labels if shift else (*labels[:2], 0.3)
        same_as_whole(mine, tensors, labels, {"shift": shift, "reduction": "mean", "chunk_rows": 7})
    for wrong in (ROWS - 1, ROWS + 1):  # a target of other rows than the ranks have together
        held = mine.of("input", draw_head()["input"][:wrong]), tensors["linear_weight"][: mine.part.n]
        options = {"class_group": dist.group.WORLD, "sequence_parallel": True}
        raises(ValueError, f"expected {ROWS} rows", fused_ops.linear_cross_entropy, *held, target, **options)


@case
def several_positions(rank, world):
    for i, sizes in enumerate(("even", "empty")):
        tensors = draw_head(seed=i, positions=(2,))
        target, mask = draw("index", (ROWS, CLASSES, 2), torch.float64), torch.rand(ROWS, CLASSES, 2) > 0.2
        mask[:, :13] = True
        part = Part(sizes, rank, world)
        dist.broadcast(mask, 0)
        for cut in ({}, {"chunk_rows": 7}):
            options = {"z_loss": 0.1, "class_mask": mask, "label_smoothing": 0.1, **cut}
            same_as_whole(Mine(part, rank), tensors, target, options, {"class_mask": part.of(mask)})


@case
def derivatives_of_derivatives(rank, world):
    tensors = draw_head()
    target = draw("index", (ROWS, CLASSES), torch.float64)
    tangents = {
        key: torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1))
        for key, t in tensors.items()
    }
    for sizes, (options, reduction) in itertools.product(
        ("even", "empty"), (({"chunk_rows": 7}, "mean"), ({"chunk_rows": 7}, "none"), ({}, "mean"))
    ):
        given = {**options, "reduction": reduction, "z_loss": 0.1, "label_smoothing": 0.1, "softcap": 4.0}
        mine, found = Mine(Part(sizes, rank, world), rank), []
        for own, of in ((mine.options, mine.of), ({}, lambda key, t: t)):
            leaves = {key: of(key, t).clone().requires_grad_() for key, t in tensors.items()}
            loss = called(leaves, target, {**given, **own}).square().sum()
            first = dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), create_graph=True), strict=True))
            shared = (first["input"] * tangents["input"]).sum()
            spread = sum((first[key] * of(key, tangents[key])).sum() for key in first if key in OF_CLASSES)
            spread = collectives.sum_of_shares(spread, dist.group.WORLD) if own else spread
            second = dict(zip(leaves, torch.autograd.grad(shared + spread, leaves.values()), strict=True))
            found.append((first, second))
        (first, second), (whole_first, whole_second) = found
        for key in first:
            near(first[key].detach(), mine.of(key, whole_first[key]).detach(), 1e-11, (given, sizes, key))
            near(second[key], mine.of(key, whole_second[key]), 1e-10, (given, sizes, key, "second"))


@case
def transforms(rank, world):
    """Forward-mode AD, torch.func.grad, and one over the other."""
    tensors, target = draw_head(rank=2), draw("index", (ROWS, CLASSES), torch.float64)
    tangents = {key: draw_head(seed=5, rank=2)[key] for key in tensors}
    for sizes, reduction in (("even", "mean"), ("empty", "none")):
        given, found = {"chunk_rows": 7, "reduction": reduction, "z_loss": 0.1, "softcap": 4.0}, []
        mine = Mine(Part(sizes, rank, world), rank, rows_of(world, "uneven") if sizes == "even" else None)
        for own, of in ((mine.options, mine.of), ({}, lambda key, t: t)):
            here, along = ({key: of(key, t) for key, t in ts.items()} for ts in (tensors, tangents))

            def loss(leaves, own=own, given=given):
                return called(leaves, target, {**given, **own})

            def total(leaves, loss=loss):
                return loss(leaves).square().sum()

            value, tangent = torch.func.jvp(loss, (here,), (along,))
            grads, second = torch.func.jvp(torch.func.grad(total), (here,), (along,))
            found.append((value, tangent, grads, second))
        for a, b in zip(*(f[:2] for f in found), strict=True):
            near(a, b, 1e-11, (given, sizes, "forward mode"))
        for a, b in zip(*(f[2:] for f in found), strict=True):
            for key in a:
                near(a[key], mine.of(key, b[key]), 1e-10, (given, sizes, key))
    leaves = {key: mine.of(key, t).clone().requires_grad_() for key, t in tensors.items()}
    rows = called(leaves, target, {**mine.options, **given})
    several = {"grad_outputs": torch.eye(ROWS, dtype=rows.dtype), "is_grads_batched": True}
    raises(NotImplementedError, "is_grads_batched", torch.autograd.grad, rows, leaves["input"], **several)


@case
def rows_of_a_mean_on_each_rank(rank, world):
    """row_group: the losses of the ranks add up to the mean, and so do the gradients of the weights."""
    tensors, target = draw_head(), draw("index", (ROWS, CLASSES), torch.float64)
    token = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for rows, cut, more in itertools.product(
        ("uneven", "empty"), ({}, {"chunk_rows": 7}), ({}, {"label_smoothing": 0.1}, {"reduction": "sum"})
    ):
        counts = rows_of(world, rows)
        begin, labels = sum(counts[:rank]), target.clone()
        labels[:2] = -100
        here = slice(begin, begin + counts[rank])
        held = {**tensors, "input": tensors["input"][here], "token_weight": token[here]}
        loss, grads = run(held, labels[here], {**cut, **more, "row_group": dist.group.WORLD})
        whole, whole_grads = run({**tensors, "token_weight": token}, labels, {**cut, **more})
        near(collectives.sum_of_ranks(loss, dist.group.WORLD), whole, 1e-12, (rows, cut, more))
        for key, grad in grads.items():
            if key in OF_CLASSES:
                near(collectives.sum_of_ranks(grad, dist.group.WORLD), whole_grads[key], 1e-12, (rows, cut, more, key))
            else:
                near(grad, whole_grads[key][here], 1e-12, (rows, cut, more, key))


@case
def classes_and_rows_on_a_mesh(rank, world):
    """Both groups: two ranks share the classes of the same rows, which are some of those of a mean."""
    if world != 4:
        return
    class_groups, row_groups = ([dist.new_group(r) for r in ranks] for ranks in (([0, 1], [2, 3]), ([0, 2], [1, 3])))
    tensors, target = draw_head(rank=2), draw("index", (ROWS, CLASSES), torch.float64)
    mine = Mine(Part("uneven", rank % 2, 2), rank % 2)
    first, here = rank // 2, slice(0, 12) if rank < 2 else slice(12, ROWS)
    for spread, cut in itertools.product((False, True), ({}, {"chunk_rows": 7})):
        rows = [2, here.stop - here.start - 2] if spread else [0, here.stop - here.start]
        mine.start, mine.n = (sum(rows[: rank % 2]), rows[rank % 2]) if spread else (0, rows[1])
        held = {key: mine.of(key, t[here] if key == "input" else t) for key, t in tensors.items()}
        own = {**mine.options, "class_group": class_groups[first], "sequence_parallel": spread, **cut}
        loss, grads = run(held, target[here], {**own, "row_group": row_groups[rank % 2], "label_smoothing": 0.1})
        whole, whole_grads = run(tensors, target, {**cut, "label_smoothing": 0.1})
        near(collectives.sum_of_ranks(loss, row_groups[rank % 2]), whole, 1e-12, cut)
        for key, grad in grads.items():
            expected = mine.of(key, whole_grads[key][here] if key == "input" else whole_grads[key])
            grad = grad if key == "input" else collectives.sum_of_ranks(grad, row_groups[rank % 2])
            near(grad, expected, 1e-12, (cut, spread, key))


@case
def errors(rank, world):
    """Bad targets raise on all ranks, in whichever chunk; wrong arguments before anything is exchanged."""
    tensors, target = draw_head(torch.float32), draw("index", (ROWS, CLASSES), None)
    mine = Mine(Part("even", rank, world), rank)
    held = {key: mine.of(key, t).requires_grad_() for key, t in tensors.items()}
    expected = called(tensors, target, {})
    for bad, at, cut in itertools.product((CLASSES, -1), (1, ROWS - 1), ({}, {"chunk_rows": 7})):
        wrong = target.clone()
        wrong[at] = bad
        for on_rank_0 in (False, True):
            labels = target if on_rank_0 and rank else wrong
            message = f"Target {bad} is out of bounds."
            raises(IndexError, message, called, held, labels, {**cut, **mine.options, "reduction": "sum"})
        near(called(held, target, {**cut, **mine.options}).detach(), expected, 1e-5, "after an error")
    group = {"class_group": dist.group.WORLD}
    for error, message, options in (
        (ValueError, "sequence_parallel=True is for", {"sequence_parallel": True}),
        (ValueError, "got only class_start", {**group, "class_start": 0}),
        (TypeError, "argument 'class_group' must be", {"class_group": "world"}),
        (RuntimeError, "weight tensor should be defined", {**mine.options, "weight": torch.ones(5)}),
        (ValueError, "expected the", {**mine.options, "class_start": CLASSES}),
        (ValueError, "chunk_rows must be", {**group, "chunk_rows": 0}),
        (RuntimeError, "expected lora's A", {**group, "lora": (torch.ones(1, 3), torch.ones(1, 1), 1.0)}),
    ):
        if rank == 0:  # no other rank answers
            raises(error, message, called, held, target, options)
    near(called(held, target, mine.options).detach(), expected, 1e-5, "after errors")


@case
def compiled_as_one_graph(rank, world):
    tensors, target = draw_head(torch.float32), draw("index", (ROWS, CLASSES), None)
    for rows, options in (
        (None, {}),
        ("uneven", {"row_group": dist.group.WORLD, "z_loss": 0.1}),
        (None, {"reduction": "none", "label_smoothing": 0.1}),
    ):
        mine = Mine(Part("uneven", rank, world), rank, rows and rows_of(world, rows))
        own = {**mine.options, **options}
        if rows:
            del own["class_start"], own["classes"]
        held = {key: mine.of(key, t) for key, t in tensors.items()}

        def function(leaves, target, options):
            return called({**leaves, "input": leaves["input"] * 2}, target, options).square().sum()

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        (loss, grads), (expected, eager) = (run(held, target, own, f) for f in (compiled, function))
        torch.testing.assert_close(loss, expected)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, eager[key], msg=lambda m, k=key: f"{k}: {m}")


@case
def sums_of_16_bits(rank, world):
    """Summed in float32 and rounded once, whether they are gathered or all-reduced."""
    for n in (64, 2**19):
        parts = [torch.randn(n, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(world)]
        found = collectives.sum_of_shares(parts[rank], dist.group.WORLD)
        everywhere_alike(found)
        exact = torch.stack(parts).double().sum(0)
        assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-7.99 + 1e-6).all())


@case
def scattered_sums_are_in_the_order_of_ranks(rank, world):
    """The same bits as adding them up here, of parts that differ in size, and 16 bits rounded once."""
    for dtype, rows in itertools.product(DTYPES, ([3] * world, [5, 0, 1, 2][:world], [0] * world)):
        parts = [torch.randn(sum(rows), 3, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        found = collectives.scatter_rows(parts[rank].t().contiguous().t(), dist.group.WORLD, rows)
        total = parts[0][mine].to(torch.float64 if dtype == torch.float64 else torch.float32)
        for part in parts[1:]:
            total = total + part[mine].to(total.dtype)
        assert found.dtype == dtype and torch.equal(found, total.to(dtype)), (dtype, rows)


@case
def checkpointed(rank, world):
    """torch.utils.checkpoint lets a backward unpack what was saved once, the second derivative's too."""
    tensors, target = draw_head(), draw("index", (ROWS, CLASSES), None)
    mine = Mine(Part("uneven", rank, world), rank)
    held = {key: mine.of(key, t) for key, t in tensors.items()}
    for create_graph, options in itertools.product((False, True), ({"chunk_rows": 7}, {})):
        found = []
        for run in (lambda f: f(), partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)):
            leaves = {key: t.clone().requires_grad_() for key, t in held.items()}
            loss = run(lambda leaves=leaves, given={**options, **mine.options}: called(leaves, target, given))
            found.append(torch.autograd.grad(loss, leaves.values(), create_graph=create_graph))
        for a, b in zip(*found, strict=True):
            near(a.detach(), b.detach(), 0, options)


def added_up(held, target, options, buffer):
    """The gradients by name after two backwards; that of the weight is what is added to the buffer."""
    leaves = {name: t.clone().requires_grad_() for name, t in held.items()}
    for factor in (1.0, 0.5):
        loss = called(leaves, target, {**options, "main_grad": buffer}).sum()
        (factor * loss).backward(retain_graph=True)
        (2 * factor * loss).backward()
    assert leaves["linear_weight"].grad is None
    return {name: leaf.grad for name, leaf in leaves.items() if name != "linear_weight"} | {"linear_weight": buffer}


@case
def main_grads(rank, world):
    """Each rank's main_grad gets the gradient of its classes: what one process finds, times what was asked for."""
    target = draw("index", (ROWS, CLASSES), torch.float64)
    ways = ({}, {"chunk_rows": 7, "z_loss": 0.1, "softcap": 4.0}, {"reduction": "none", "chunk_rows": 7})
    for sizes, rows, options in itertools.product(("even", "empty"), ("uneven", None), ways):
        mine = Mine(Part(sizes, rank, world), rank, rows and rows_of(world, rows))
        tensors = draw_head(rank=2)
        held = {key: mine.of(key, t) for key, t in tensors.items()}
        buffer = torch.ones_like(held["linear_weight"])
        found = added_up(held, mine.target(target), {**options, **mine.options}, buffer)
        found["linear_weight"] = buffer - 1
        upstream = torch.ones(ROWS)
        whole = run(tensors, target, options, upstream=upstream)[1]
        for key, grad in found.items():
            near(grad, 4.5 * mine.of(key, whole[key]), 1e-12, (sizes, rows, options, key))
    counts = rows_of(world, "uneven")
    here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    held, labels = {**tensors, "input": tensors["input"][here]}, target[here]
    found = added_up(
        held, labels, {"row_group": dist.group.WORLD, "chunk_rows": 7}, torch.zeros(CLASSES, FEATURES).double()
    )
    sums = collectives.sum_of_ranks(found["linear_weight"], dist.group.WORLD)
    near(sums, 4.5 * run(tensors, target, {})[1]["linear_weight"], 1e-12, "row_group")
    main_grads_of_16_bits(Mine(Part("even", rank, world), rank), draw_head(torch.bfloat16), target)


def main_grads_of_16_bits(mine, tensors, target):
    """The float32 sum, whose rounding is the gradient without main_grad."""
    held = {key: mine.of(key, t).clone().requires_grad_() for key, t in tensors.items()}
    for options in ({"reduction": "sum"}, {"reduction": "none"}):
        buffer = torch.zeros(held["linear_weight"].shape)
        options = {**options, "chunk_rows": 7, **mine.options}
        (grad,) = torch.autograd.grad(called(held, target, options).sum(), held["linear_weight"])
        called(held, target, {**options, "main_grad": buffer}).sum().backward()
        assert torch.equal(buffer.bfloat16(), grad) and not torch.equal(buffer, grad.float())


@case
def padded_rows_of_logits_have_the_same_bits(rank, world):
    """As on a GPU, where rows of an odd number of classes begin at multiples of 64 logits."""
    product, strides = by_rows.product, []

    def watched(head, part, x, out):
        strides.append((out.stride(0), head.weight.size(0)))
        return product(head, part, x, out)

    target, part = draw("index", (ROWS, CLASSES, 2), None), Part("uneven", rank, world)
    kinds = itertools.product((torch.float32, torch.bfloat16), ("mean", "none"), ((), (2,)))
    for dtype, reduction, positions in kinds:
        held = {key: Mine(part, rank).of(key, t) for key, t in draw_head(dtype, positions=positions).items()}
        options = {"reduction": reduction, "chunk_rows": 8, "z_loss": 0.1, "label_smoothing": 0.1, **part.where()}
        labels, found = target if positions else target[:, 0], []
        for padded in (False, True):
            strides.clear()
            is_padded = mock.patch.object(by_rows.tiles, "is_padded", lambda like, padded=padded: padded)
            with mock.patch.object(by_rows, "product", watched), is_padded:
                found.append(run(held, labels, options, upstream=torch.linspace(-1, 1, labels.numel()).view_as(labels)))
            assert strides and all(s == (-(-n // 64) * 64 if padded else n) for s, n in strides)
        (loss, grads), (other, others) = found
        assert torch.equal(loss, other) and all(torch.equal(grads[key], others[key]) for key in grads)


@case
def memory(rank, world):
    """Of the head on a rank: what its two chunks of logits and the exchange take, not its logits."""
    from benchmarks.memory import peak_extra_bytes

    rows, classes, features = 2048, 4096 * world, 16
    assert rows * classes // world * 4 > plan.SMALL_BYTES
    x, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes // world, features)
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(0))
    options = {"class_group": dist.group.WORLD, "class_start": rank * 4096, "classes": classes, "chunk_rows": 128}
    weight.requires_grad_()

    def step():
        fused_ops.linear_cross_entropy(x, weight, target, **options).backward()

    step()
    found = peak_extra_bytes(step)
    assert found is None or found < rows * 4096 * 4 / 2, found


@case
def what_many_ranks_do(rank, world):
    """The cases once more with what reduces in the place of what gathers: the same bits on all ranks as well."""
    cases = (
        options_and_targets,
        sums_in_the_forward,
        outputs_and_what_is_retained,
        rows_of_the_input_on_each_rank,
        several_positions,
        errors,
    )
    with mock.patch.object(collectives, "MANY_RANKS", 1):
        for function in cases:
            function(rank, world)

"""Every layout of cross-entropy's options (chunks of classes, registers of rows) on every instruction set."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import pairs_or_all

import fused_ops
from fused_ops.ops.cross_entropy import rows_reference as reference
from fused_ops.testing import assert_no_worse_than

OPS = torch.ops.fused_ops
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "row stride": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "class stride": lambda x: torch.stack([x, x], -1)[..., 0],
    "spatial": lambda x: x.reshape(-1, 19, x.size(1)).permute(0, 2, 1).contiguous(),
}


def run(function, x, upstream):
    x = x.detach().requires_grad_()
    outputs = function(x)
    return [*(o.detach() for o in outputs), torch.autograd.grad(outputs, x, upstream)[0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [27, 300, 2500])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "logit_scale": -1.3}, {"logit_scale": 2.0}])
def test_grid_of_the_entropys_gradient(options, classes, layout):
    """With ignored rows and class weights: log p and the entropy are near, lse and u are not.

    Of 38 rows the largest error is a matter of luck: what rounding the scaled logits costs, ours and eager's alike.
    Eager's is that of several draws.
    """
    torch.manual_seed(classes)
    x, *others = (LAYOUTS[layout](torch.randn(38, classes) * 4 + 30) for _ in range(4))
    target = torch.randint(0, classes, (x.size(0), *x.shape[2:]))
    target.view(-1)[::7] = -100
    weight, scale = torch.rand(classes) + 0.3, options.get("logit_scale", 1.0)
    upstream = [torch.randn(target.shape), torch.randn(target.shape)]

    def ours(x):
        out = fused_ops.cross_entropy(x, target, weight, reduction="none", return_outputs=True, **options)
        return out.loss, out.entropy

    def eager(x):
        u, smoothing = x * scale, options.get("label_smoothing", 0.0)
        log_p = u.log_softmax(1)
        loss = F.cross_entropy(u, target, weight.to(x.dtype), reduction="none", label_smoothing=smoothing)
        return loss, -(log_p.exp() * log_p).sum(1)

    wide = [u.double() for u in upstream]
    errors = [
        [float((a - b).abs().max()) for a, b in zip(run(eager, y, upstream), run(eager, y.double(), wide), strict=True)]
        for y in others
    ]
    found = zip(
        ("loss", "entropy", "grad"),
        run(ours, x, upstream),
        run(eager, x, upstream),
        run(eager, x.double(), wide),
        map(max, *errors),
        strict=True,
    )
    for name, mine, theirs, exact, error in found:
        assert_no_worse_than(mine, theirs, exact, name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_of_maxima_that_move(layout, dtype):
    """Every chunk has a larger maximum than the one before, and one is so large that what was before is nothing."""
    for classes, slope in itertools.product((27, 300, 4200), (6.0, 600.0)):
        x = LAYOUTS[layout]((torch.randn(38, classes) + torch.linspace(0, slope, classes)).to(dtype))
        target = torch.randint(0, classes, (x.size(0), *x.shape[2:]))
        out = fused_ops.cross_entropy(x, target, label_smoothing=0.1, reduction="none", return_outputs=True)
        log_p = x.double().log_softmax(1)
        entropy = -torch.where(log_p == -float("inf"), 0.0, log_p.exp() * log_p).sum(1)
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 3e-6}
        torch.testing.assert_close(out.entropy.double(), entropy, **tolerance)
        torch.testing.assert_close(out.lse.double(), x.double().logsumexp(1), rtol=2e-7, atol=2e-7)
        assert torch.equal(out.prediction, x.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 5, 16, 27, 64, 65, 200, 1030])
@pairs_or_all
def test_grid_of_kernels_and_reference(choose, classes, dtype):
    """Targets, smoothing, masks, transforms and outputs together, over every layout; in place the same bits."""
    torch.manual_seed(classes)
    options = ("index", "dense", "sparse"), (0.0, 0.2), (0, 1, 2), ((1.0, 0.0), (0.7, 3.0))
    for kind, smoothing, masks, (scale, cap), layout in choose(*options, LAYOUTS):
        x = LAYOUTS[layout]((torch.randn(38, classes) * 3).to(dtype))
        rows = (x.size(0), *x.shape[2:])
        indices = torch.randint(0, classes, rows if kind == "index" else (rows[0], 2, *rows[1:]))
        indices.view(-1)[::5] = -100
        probabilities = {"dense": torch.rand(x.shape), "sparse": torch.rand(indices.shape)}.get(kind)
        mask = None if not masks else torch.rand(classes if masks == 1 else x.shape) > 0.3
        weight = torch.rand(classes).to(dtype) if masks != 1 else None
        args = (x, None if kind == "dense" else indices, probabilities, weight, mask)
        numbers = (-100, smoothing, scale, cap, smoothing == 0)
        ours, expected = OPS.cross_entropy_rows_forward(*args, *numbers), reference.forward(*args, *numbers)
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5
        for mine, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        g = [torch.randn(rows, dtype=torch.float64) for _ in range(4)]
        grads = (*g[:2], *((g[2], g[3]) if smoothing == 0 else (None, None)))
        saved = (*args[1:], expected[1], expected[2], expected[4], *numbers)
        mine, other = OPS.cross_entropy_rows_backward(*grads, x, *saved), reference.backward(*grads, x, *saved)
        tolerance = {8: 1e-10, 4: 2e-5, 2: 2e-2}[dtype.itemsize]
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        if layout != "row stride":
            OPS.cross_entropy_rows_backward_(*grads, x, *saved)
            torch.testing.assert_close(x, mine, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [27, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_of_classes_off_the_target_whose_logits_are_infinite(layout, classes, dtype):
    """A share of 0 times the -inf of a masked logit is 0: k sparse targets are padded with such."""
    x = (torch.randn(38, classes) * 3).to(dtype)
    x[:, 3] = -float("inf")
    x = LAYOUTS[layout](x)
    indices = torch.full((x.size(0), 2, *x.shape[2:]), 3)
    indices[:, 0] = torch.randint(4, classes, indices[:, 0].shape)
    probabilities = torch.zeros(indices.shape, dtype=dtype)
    probabilities[:, 0] = 0.75
    wide = x.double()
    u = torch.where(wide == -float("inf"), -1e300, wide).requires_grad_()
    exact = -0.75 * u.log_softmax(1).gather(1, indices[:, :1]).squeeze(1)
    truth = torch.autograd.grad(exact.sum(), u)[0]
    loss, grad = run(
        lambda x: (fused_ops.cross_entropy(x, (indices, probabilities), reduction="none"),),
        x,
        [torch.ones(exact.shape, dtype=dtype)],
    )
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6 if dtype.itemsize < 8 else 1e-13}
    torch.testing.assert_close(loss, exact.detach().to(dtype), **tolerance)
    torch.testing.assert_close(grad, truth.to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_of_ignored_rows_that_are_not_finite(layout, options, dtype):
    for classes, bad in itertools.product((21, 100), (float("nan"), float("inf"), -float("inf"), 1e4)):
        x = torch.randn(38, classes).to(dtype)
        x[::3] = bad
        target = torch.randint(0, classes, (38,))
        target[::3] = -100
        x = LAYOUTS[layout](x)
        target = target.reshape(x.size(0), *x.shape[2:])
        loss, grad = run(
            lambda x, t=target: (fused_ops.cross_entropy(x, t, reduction="none", **options),),
            x,
            [torch.ones(target.shape, dtype=dtype)],
        )
        ignored = target == -100
        assert bool((loss[ignored] == 0).all()) and bool(loss.isfinite().all())
        assert bool((torch.where(ignored.unsqueeze(1), grad, 0.0) == 0).all()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [27, 200, 1030])
def test_grid_of_batch_splits_is_bitwise(classes, dtype):
    x = (torch.randn(76, classes) * 3).to(dtype)
    for layout, kind in itertools.product(LAYOUTS, ("index", "dense")):
        logits = LAYOUTS[layout](x)
        rows = (logits.size(0), *logits.shape[2:])
        target = torch.randint(0, classes, rows) if kind == "index" else torch.rand(logits.shape)

        def call(x, target):
            out = fused_ops.cross_entropy(x, target, label_smoothing=0.1, reduction="none", return_outputs=True)
            return out.loss, out.lse, out.entropy

        ones = [torch.ones(rows, dtype=dtype), *[torch.ones(rows, dtype=torch.promote_types(dtype, torch.float32))] * 2]
        whole = run(lambda x, t=target: call(x, t), logits, ones)
        for part in (slice(0, 1), slice(1, 3), slice(3, None)):
            some = run(lambda x, t=target[part]: call(x, t), logits[part], [o[part] for o in ones])
            assert all(torch.equal(a[part], b) for a, b in zip(whole, some, strict=True)), (layout, kind)


@pytest.mark.parametrize("shape", [(4, 5, 3, 1, 2), (4, 5, 1, 1, 3), (4, 5, 3, 1, 1), (4, 5, 2, 3, 1), (4, 5, 2, 1, 3)])
def test_strides_beside_dimensions_of_one_element(shape):
    """The stride of such a dimension says nothing of those around it: of logits, of probabilities and of masks."""
    x, probabilities = torch.randn(shape), torch.rand(shape)
    mask = torch.rand(shape) < 0.7
    mask[:, 0] = True
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    upstream = [torch.tensor(2.0)]

    def loss(x, t, mask=None):
        return run(lambda x: [fused_ops.cross_entropy(x, t, class_mask=mask, reduction="sum")], x, upstream)

    for dim in range(2, 5):
        odd_x, odd_probabilities, odd_mask = (
            torch.stack([t, t], dim + 1).select(dim + 1, 0) for t in (x, probabilities, mask)
        )
        for found, expected in (
            (loss(odd_x, target), loss(x, target)),
            (loss(odd_x, odd_probabilities), loss(x, probabilities)),
            (loss(odd_x, target, odd_mask), loss(x, target, mask)),
        ):
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs)

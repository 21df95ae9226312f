"""Corners that seeded faults (tests/mutation) showed no other test to look into."""

import pytest
import torch
from torch.nn import functional as F

import fused_ops
from fused_ops.ops.cross_entropy import rows_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")

needs_kernels = pytest.mark.skipif(
    fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel"
)


def gradients(output, leaf, upstream=None):
    return torch.autograd.grad(output, leaf, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [100.0, INF, -INF, NAN])
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 33), (3, 70, 3), (1, 3000, 2)], ids=str)
def test_what_an_ignored_row_holds_does_not_reach_its_gradient(shape, bad, dtype):
    """Whatever walks the rows: a gradient of 0 times exp(100 - 0), which a float cannot hold, would be NaN."""
    x = torch.randn(shape).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target[0] = -100
    x[0] = bad
    x.requires_grad_()
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(shape[1]).to(dtype)}, {"z_loss": 0.1}):
        loss = fused_ops.cross_entropy(x, target, reduction="sum", **options)
        (grad,) = gradients(loss, x)
        assert loss.isfinite() and not grad[0].any() and grad.isfinite().all()


def zero_weights(bad, dtype):
    """Logits whose first row's target has the weight 0, targets and weights."""
    x = torch.tensor([[0.5, 1.0, 2.0, 0.0, 1.0], [0.0, 1.0, -1.0, 2.0, 0.5], [1.0, 0.0, 3.0, 0.0, 0.0]]).to(dtype)
    x[0] = torch.tensor(bad).to(dtype)
    return x, torch.tensor([0, 3, 1]), torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0]).to(dtype)


ZERO_WEIGHT_ROWS = [[-INF, 1.0, 2.0, 0.0, 1.0], [-INF] * 5, [0.0, INF, 1.0, 0.0, 0.0], [0.0, NAN, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", ZERO_WEIGHT_ROWS, ids=["target", "all", "inf", "nan"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_weight_of_zero_times_an_infinite_loss_is_nan_as_pytorch(reduction, smoothing, bad, dtype):
    """0 * inf, whichever options choose the walk; the gradient has no such product and is finite where p is."""
    x, target, weight = zero_weights(bad, dtype)
    given = {"reduction": reduction, "label_smoothing": smoothing}

    def found(function):
        leaf = x.double().requires_grad_() if function is F.cross_entropy else x.clone().requires_grad_()
        loss = function(leaf, target, weight.to(leaf.dtype), **given)
        return loss.detach(), *gradients(loss.sum(), leaf)

    expected = found(F.cross_entropy)
    for options in ({}, {"return_outputs": True}, {"logit_scale": 1.0000001}, {"z_loss": 1e-30}):
        for layout in ("rows", "spatial", "one by one", "strided"):

            def ours(x, target, weight, options=options, layout=layout, **given):
                if layout == "spatial":
                    x, target = x.t().unsqueeze(0), target.unsqueeze(0)
                if layout == "strided":
                    x = torch.stack([x, x], -1)[..., 0]
                if layout == "one by one":
                    given["token_weight"] = torch.ones(3).to(x.dtype)
                out = fused_ops.cross_entropy(x, target, weight, **given, **options)
                out = out.loss if options.get("return_outputs") else out
                return out[0] if layout == "spatial" and given["reduction"] == "none" else out

            for mine, other in zip(found(ours), expected, strict=True):
                eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
                torch.testing.assert_close(mine.double(), other, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    numbers = (-100, smoothing, 1.0, 0.0, True)
    nll = rows_reference.forward(x, target, None, weight, None, *numbers)[0]
    raw = torch.ops.fused_ops.cross_entropy_rows_forward(x, target, None, weight, None, *numbers)[0]
    assert nll.isnan().tolist() == raw.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 1, 2])
@pytest.mark.parametrize("bad", ZERO_WEIGHT_ROWS[:3], ids=["target", "all", "inf"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_heads_weight_of_zero_times_an_infinite_loss_is_nan_as_pytorch(smoothing, bad, chunk_rows, dtype):
    """The bias puts the first row's logits into every row; its target's weight is 0."""
    _, target, weight = zero_weights(bad, dtype)
    x, w, bias = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.tensor(bad).to(dtype)
    for reduction in ("none", "mean", "sum"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        expected = F.cross_entropy(F.linear(x, w, bias), target, weight, **options)
        for outputs in (False, True):
            leaf = x.clone().requires_grad_()
            loss = fused_ops.linear_cross_entropy(
                leaf,
                w,
                target,
                linear_bias=bias,
                weight=weight,
                chunk_rows=chunk_rows,
                return_outputs=outputs,
                **options,
            )
            loss = loss.loss if outputs else loss
            assert torch.equal(loss.isnan(), expected.isnan())
            (grad,) = gradients(loss.sum(), leaf)
            assert grad.isnan().all() == (bad != ZERO_WEIGHT_ROWS[0])


@pytest.mark.parametrize("layout", ["rows", "spatial"])
def test_what_pytorch_has_not_adds_nothing_at_a_share_of_zero(layout):
    """Several indices may be padded with any class, one of logit -inf too; mixup's lam may be 0 or 1."""
    x, target, _ = zero_weights(ZERO_WEIGHT_ROWS[0], torch.float32)
    pairs, shares = torch.stack([target, torch.tensor([1, 2, 4])], 1), torch.tensor([[0.0, 1.0]]).repeat(3, 1)
    if layout == "spatial":
        x, pairs, shares = (t.t().unsqueeze(0) for t in (x, pairs, shares))
    for weight in (None, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])):
        padded = fused_ops.cross_entropy(x, (pairs, shares), weight)
        mixed = fused_ops.cross_entropy(x, (pairs[:, 0], pairs[:, 1], 0.0), weight)
        exact = F.cross_entropy(x, pairs[:, 1], weight)
        torch.testing.assert_close(padded, exact)
        torch.testing.assert_close(mixed, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "spatial"])
def test_entropy_of_a_maximum_that_moves_from_chunk_to_chunk(layout, dtype):
    x = torch.linspace(-4, 4, 5000, dtype=torch.float64).to(dtype).repeat(3, 1)
    x = x if layout == "rows" else x.unsqueeze(2).repeat(1, 1, 4)
    target = torch.zeros(x[:, 0].shape, dtype=torch.int64)
    found = fused_ops.cross_entropy(x, target, return_outputs=True).entropy
    exact = torch.distributions.Categorical(logits=x.double().movedim(1, -1)).entropy()
    torch.testing.assert_close(found.double(), exact, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 33, 67, 129, 1025, 2051])
def test_a_maximum_in_the_tail_is_the_maximum(classes, dtype):
    """exp(1000 - 0) is no float."""
    x = torch.zeros(4, classes).to(dtype)
    x[:, -1] = 1000
    for logits in (x, x.unsqueeze(2).repeat(1, 1, 3), torch.stack([x, x], -1)[..., 0]):
        leaf = logits.requires_grad_()
        target = torch.zeros(logits[:, 0].shape, dtype=torch.int64)
        for options in ({}, {"z_loss": 1e-9}):
            loss = fused_ops.cross_entropy(leaf, target, **options)
            (grad,) = gradients(loss, leaf)
            torch.testing.assert_close(loss, torch.full_like(loss, 1000), rtol=1e-2, atol=0)
            assert grad.isfinite().all() and (grad[:, -1] > 0).all() and (grad[:, 0] < 0).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("layout", ["rows", "spatial"])
def test_a_confident_target_keeps_its_gradient_with_options(layout, dtype):
    """p - 1 would be 0 in the accumulator; minus the others' p is not."""
    x = torch.zeros(3, 5, dtype=torch.float64)
    x[:, 1] = 60
    x = x if layout == "rows" else x.unsqueeze(2).repeat(1, 1, 4)
    target = torch.ones(x[:, 0].shape, dtype=torch.int64)
    leaf = x.to(dtype).requires_grad_()
    options = {"logit_scale": 0.5, "reduction": "sum", "token_weight": torch.full(target.shape, 2.0).to(dtype)}
    (grad,) = gradients(fused_ops.cross_entropy(leaf, target, **options), leaf)
    small = torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    torch.testing.assert_close(grad[:, 1].double(), (-4 * small).expand_as(grad[:, 1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}], ids=str)
def test_a_negative_index_is_ignored_in_every_dtype(options, dtype):
    x = torch.randn(3, 5, requires_grad=True)
    target = torch.tensor([1, -100, 4])
    expected = fused_ops.cross_entropy(x, target, **options)
    assert torch.equal(fused_ops.cross_entropy(x, target.to(dtype), **options), expected)
    with pytest.raises(IndexError, match="-99"):
        fused_ops.cross_entropy(x, (target + (target < 0)).to(dtype), **options)


@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
def test_every_index_of_a_row_is_checked(bad):
    """Not only its last."""
    x, share = torch.randn(3, 5, requires_grad=True), torch.rand(3, 2)
    for place in range(2):
        indices = torch.tensor([[0, 1], [2, 3], [4, 0]])
        indices[1, place] = bad
        with pytest.raises(IndexError, match="out of bounds"):
            fused_ops.cross_entropy(x, (indices, share))


def test_an_ignored_row_of_nan_in_a_chunk_of_linear_cross_entropy():
    """With statistics its lse is NaN, and a weight of 0 does not make that 0."""
    x = torch.randn(3, 5)
    x[1] = NAN
    target, scale = torch.tensor([1, -100, 2]), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    numbers = (-100, 0.1, 1.0, 0.0, True)
    torch.ops.fused_ops.linear_cross_entropy_chunk_(x, target, None, None, None, scale, 0.1, *numbers)
    assert not x[1].any() and x.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 64, 130])
def test_moments_of_rows_that_drift(channels, dtype):
    """The blocks that a channel is summed in have means of their own, whose differences are most of the variance."""
    x = torch.arange(9000, dtype=torch.float64).div(9000).unsqueeze(1) * torch.arange(1, channels + 1) + 5
    x = x.to(dtype)
    mean, var = torch.zeros(channels), torch.ones(channels)
    if dtype == torch.float64:
        mean, var = mean.double(), var.double()
    fused_ops.batch_norm(x, mean, var, training=True, momentum=1.0)
    exact = x.double()
    around = exact - exact.mean(0)  # torch.var is 3e-12 off here
    tolerance = 1e-13 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=tolerance, atol=0)
    torch.testing.assert_close(var.double(), around.square().sum(0) / 8999, rtol=tolerance, atol=0)


def test_a_flat_leaky_relu_keeps_every_input():
    """What the output says nothing about; the reference used to divide by the slope."""
    output, one = torch.randn(4, 3), torch.ones(3)
    leaky_relu = fused_ops.ops.batch_norm.activations.LEAKY_RELU
    assert fused_ops.ops.batch_norm.keep_output_reference.stored_mask(output, one, one, leaky_relu, 0.0).all()


@pytest.mark.parametrize("layout", ["rows", "small planes", "planes", "channels last"])
def test_ghost_batches_have_masks_of_their_own(layout):
    """relu behind a residual keeps a sign a value; each ghost batch is what it would be alone."""
    shape = {"rows": (12, 5), "small planes": (12, 5, 3)}.get(layout, (12, 5, 7, 9))
    x, r, upstream = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    if layout == "channels last":
        x, r, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, r, upstream))

    def run(x, r, upstream, groups):
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        y = fused_ops.batch_norm(x, None, None, training=True, activation="relu", residual=r, groups=groups)
        return y.detach(), *torch.autograd.grad(y, (x, r), upstream)

    whole = run(x, r, upstream, 3)
    parts = [run(*(t[i : i + 4] for t in (x, r, upstream)), 1) for i in (0, 4, 8)]
    for together, *alone in zip(whole, *parts, strict=True):
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


# ---- 16-bit results are rounded once, to the nearest


def share_of_misrounded(found, exact):
    """Of a 16-bit result's values, those that are not the nearest to the exact ones."""
    return float((found != exact.to(found.dtype)).double().mean())


def logits_of(layout, dtype):
    x = {"rows": (40, 700), "few classes": (2000, 10), "spatial": (3, 60, 150)}.get(layout, (20, 300))
    x = torch.randn(x, dtype=torch.float64).to(dtype)
    return x if layout != "strided" else torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("layout", ["rows", "few classes", "spatial", "strided"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"inplace_backward": True}], ids=str
)
def test_gradients_of_cross_entropy_are_rounded_to_nearest(options, layout, dtype):
    x = logits_of(layout, dtype)
    target = torch.randint(0, x.size(1), (x.size(0), *x.shape[2:]))
    exact = x.double().requires_grad_()
    scaled = exact if "softcap" not in options else 3 * torch.tanh(exact / 3)
    smoothing = options.get("label_smoothing", 0.0)
    (truth,) = gradients(F.cross_entropy(scaled, target, reduction="sum", label_smoothing=smoothing), exact)
    leaf = x.detach().requires_grad_()
    (grad,) = gradients(fused_ops.cross_entropy(leaf * 1, target, reduction="sum", **options), leaf)
    assert share_of_misrounded(grad, truth) < 0.01


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_a_gradient_halfway_between_two_numbers_goes_to_the_even_one(dtype):
    """All of a row's probability on one class: its gradient is the product of two 16-bit numbers, often such a tie."""
    classes = 101  # whole registers and a tail, even places and odd ones
    upstream = (1 + torch.arange(classes) * torch.finfo(dtype).eps).to(dtype)
    x = torch.full((classes, classes), -INF).fill_diagonal_(0.0).to(dtype).requires_grad_()
    target = (torch.arange(classes) + 1) % classes
    weight = torch.full((classes,), 1.5, dtype=dtype)
    (grad,) = gradients(fused_ops.cross_entropy(x, target, weight, reduction="none"), x, upstream)
    exact = (1.5 * upstream.double()).to(dtype)
    assert torch.equal(grad.diagonal(), exact)
    assert torch.equal(grad.gather(1, target.unsqueeze(1)).squeeze(1), -exact)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("layout", ["rows", "spatial", "channels last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_batch_norm_is_rounded_to_nearest(activation, layout, dtype):
    shape = {"rows": (300, 37), "spatial": (8, 5, 9, 11)}.get(layout, (8, 35, 5, 7))
    x, upstream = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    if layout == "channels last":
        x, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    exact, leaf = x.double().requires_grad_(), x.detach().requires_grad_()
    truth = F.batch_norm(exact, None, None, training=True)
    truth = truth if activation is None else getattr(F, activation)(truth)
    y = fused_ops.batch_norm(leaf, None, None, training=True, activation=activation)
    assert share_of_misrounded(y, truth) < 0.01
    (grad,), (grad_truth,) = gradients(y, leaf, upstream), gradients(truth, exact, upstream.double())
    assert share_of_misrounded(grad, grad_truth) < 0.01

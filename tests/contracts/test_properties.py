"""Laws that hold for any input, tried on inputs that hypothesis invents; and small cases against 50 digits of mpmath.

``FUSED_OPS_PROPERTY_EXAMPLES`` sets the number of inputs per law; they are the same in every run.
"""

import os

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_opinfo import relative_errors

import fused_ops
from fused_ops.ops.batch_norm import reference as bn
from fused_ops.ops.cross_entropy import reference as ce

EXAMPLES = int(os.environ.get("FUSED_OPS_PROPERTY_EXAMPLES", "40"))
law = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
seeds = st.integers(0, 2**31 - 1)
classes_of = st.integers(1, 70) | st.sampled_from([127, 128, 129, 1023, 1025])
rows_of = st.integers(1, 9)
scales = st.sampled_from([1e-6, 1.0, 30.0, 1e4, 1e12])


def gen(seed):
    return torch.Generator().manual_seed(seed)


def draw(seed, rows, classes, scale=1.0, dtype=torch.float64):
    """Logits and targets, about one in five ignored but never all."""
    g = gen(seed)
    x = (torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < 0.2] = -100
    target[0] = target[0].clamp(min=0)
    return x, target


def grad_of(function, x):
    x = x.detach().clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def close(a, b, tolerance=1e-9, scale=None):
    limit = tolerance * max(1.0, float(b.abs().max()) if scale is None and b.numel() else float(scale or 1.0))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=limit)


# ---- cross-entropy


@law
@given(seeds, rows_of, classes_of, st.floats(-1e3, 1e3))
def test_a_constant_added_to_a_row_changes_nothing(seed, rows, classes, shift):
    x, target = draw(seed, rows, classes)
    for options in ({}, {"label_smoothing": 0.1}):
        (loss, grad), (other, other_grad) = (
            grad_of(lambda x, options=options: fused_ops.cross_entropy(x, target, **options), v) for v in (x, x + shift)
        )
        close(other, loss)
        close(other_grad, grad)


@law
@given(seeds, rows_of, classes_of, scales, st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1e-2]))
def test_a_row_of_the_gradient_sums_to_the_z_loss_term(seed, rows, classes, scale, smoothing, z_loss):
    x, target = draw(seed, rows, classes, scale)
    lse = x.logsumexp(1)
    _, grad = grad_of(
        lambda x: fused_ops.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing, z_loss=z_loss), x
    )
    expected = torch.where(target >= 0, 2 * z_loss * lse, 0.0)
    close(grad.sum(1), expected, 1e-9)


@law
@given(seeds, rows_of, classes_of)
def test_permuted_classes_and_rows(seed, rows, classes):
    x, target = draw(seed, rows, classes)
    weight = torch.rand(classes, generator=gen(seed), dtype=torch.float64)
    by_class, by_row = torch.randperm(classes, generator=gen(seed)), torch.randperm(rows, generator=gen(seed))
    place = torch.argsort(by_class)
    moved = torch.where(target >= 0, place[target.clamp(min=0)], target)

    def loss(x, target, weight):
        return grad_of(
            lambda x: fused_ops.cross_entropy(x, target, weight, label_smoothing=0.2, reduction="none").sum(), x
        )

    (value, grad), (moved_value, moved_grad) = loss(x, target, weight), loss(x[:, by_class], moved, weight[by_class])
    close(moved_value, value)
    close(moved_grad, grad[:, by_class])
    rows_value, rows_grad = loss(x[by_row], target[by_row], weight)
    close(rows_value, value)
    assert torch.equal(rows_grad, grad[by_row])


@law
@given(seeds, rows_of, classes_of, st.floats(0.01, 100.0))
def test_scaling_laws(seed, rows, classes, factor):
    """logit_scale is a factor of the logits; weights and upstream gradients are factors of the loss."""
    x, target = draw(seed, rows, classes)
    scaled = grad_of(lambda x: fused_ops.cross_entropy(x, target, logit_scale=factor), x)
    expected = grad_of(lambda x: fused_ops.cross_entropy(x * factor, target), x)
    for a, b in zip(scaled, expected, strict=True):
        close(a, b)
    whole = torch.full((classes,), factor, dtype=torch.float64)
    plain = grad_of(lambda x: fused_ops.cross_entropy(x, target, reduction="sum"), x)
    times = grad_of(lambda x: fused_ops.cross_entropy(x, target, whole, reduction="sum"), x)
    upstream = grad_of(lambda x: fused_ops.cross_entropy(x, target, reduction="sum") * factor, x)
    mean = grad_of(lambda x: fused_ops.cross_entropy(x, target, whole), x)
    for a, b, c in zip(plain, times, upstream, strict=True):
        close(b, a * factor)
        close(c, a * factor)
    for a, b in zip(mean, plain, strict=True):
        close(a, b / (target >= 0).sum())


@law
@given(seeds, rows_of, classes_of, scales)
def test_one_hot_probabilities_are_indices(seed, rows, classes, scale):
    x, target = draw(seed, rows, classes, scale)
    target = target.clamp(min=0)
    hot = F.one_hot(target, classes).double()
    sparse = (target.unsqueeze(1), torch.ones(rows, 1, dtype=torch.float64))
    expected = grad_of(lambda x: fused_ops.cross_entropy(x, target), x)
    for other in (hot, sparse, (target, target, 0.3)):
        for a, b in zip(grad_of(lambda x: fused_ops.cross_entropy(x, other), x), expected, strict=True):  # noqa: B023
            close(a, b)


@law
@given(seeds, rows_of, classes_of)
def test_staged_is_closed_form_is_kernel_is_pytorch(seed, rows, classes):
    x, target = draw(seed, rows, classes)
    target = target.clamp(min=0)
    staged = grad_of(lambda x: ce.staged(x, target)["loss"], x)
    pytorch = grad_of(lambda x: F.cross_entropy(x, target), x)
    kernel = grad_of(lambda x: fused_ops.cross_entropy(x, target), x)
    loss, lse, total = ce.forward(x, target, -100, ce.MEAN)
    one = torch.ones((), dtype=torch.float64)
    closed = loss, ce.backward(one, x, target, lse, total, -100, ce.MEAN)
    for other in (staged, kernel, closed):
        for a, b in zip(other, pytorch, strict=True):
            close(a, b)


@law
@given(seeds, st.integers(2, 40), classes_of, st.data())
def test_batch_splits_and_threads_are_the_same_bits(seed, rows, classes, data):
    x, target = draw(seed, rows, classes, dtype=torch.float32)
    cut = data.draw(st.integers(1, rows - 1))

    def each(x, target):
        return grad_of(lambda x: fused_ops.cross_entropy(x, target, reduction="none").sum(), x)[1]

    whole = each(x, target)
    assert torch.equal(torch.cat([each(x[:cut], target[:cut]), each(x[cut:], target[cut:])]), whole)
    torch.set_num_threads(data.draw(st.sampled_from([2, 3, 5])))
    try:
        assert torch.equal(each(x, target), whole)
    finally:
        torch.set_num_threads(1)


# ---- linear cross-entropy


@law
@given(seeds, st.integers(1, 30), st.integers(1, 20), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_chunks_change_nothing(seed, rows, features, classes, chunk_rows, bias):
    g = gen(seed)
    x, w = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, features), (classes, features)))
    b = torch.randn(classes, generator=g, dtype=torch.float64) if bias else None
    target = draw(seed, rows, classes)[1]

    def run(function, **options):
        leaves = [t.clone().requires_grad_() for t in (x, w, *([b] if bias else []))]
        loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2] if bias else None, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def plain(x, w, target, linear_bias):
        return F.cross_entropy(F.linear(x, w, linear_bias), target)

    ours = run(fused_ops.linear_cross_entropy, chunk_rows=chunk_rows)
    for a, b_, c in zip(ours, run(fused_ops.linear_cross_entropy), run(plain), strict=True):
        close(a, b_)
        close(a, c)


# ---- batch norm

batches, channels_of = st.integers(2, 12), st.integers(1, 20) | st.sampled_from([63, 65, 257])
spatials = st.sampled_from([(), (1,), (3,), (7, 5), (2, 3, 4), (33,), (600,)])


def image(seed, batch, channels, spatial, mean=0.0, std=1.0, dtype=torch.float64):
    x = torch.randn(batch, channels, *spatial, generator=gen(seed), dtype=torch.float64) * std + mean
    return x.to(dtype)


def over(x):
    return [d for d in range(x.dim()) if d != 1]


@law
@given(seeds, batches, channels_of, spatials, st.sampled_from([0.0, 1e3, -1e6]), st.sampled_from([1e-2, 1.0, 1e5]))
def test_moments_of_the_output(seed, batch, channels, spatial, mean, std):
    x = image(seed, batch, channels, spatial, mean, std)
    y = fused_ops.batch_norm(x, None, None, training=True)
    variance = x.var(over(x), correction=0)
    assert y.mean(over(y)).abs().max() < 1e-6
    torch.testing.assert_close(y.var(over(y), correction=0), variance / (variance + 1e-5), rtol=1e-6, atol=1e-9)


@law
@given(seeds, batches, channels_of, spatials, st.floats(-1e3, 1e3), st.floats(0.1, 100.0))
def test_shifts_and_scales_of_the_input(seed, batch, channels, spatial, shift, factor):
    """With eps scaled along, neither changes the output; the gradient divides by the factor."""
    x, g = image(seed, batch, channels, spatial), image(seed + 1, batch, channels, spatial)

    def run(x, eps):
        return grad_of(lambda x: (fused_ops.batch_norm(x, None, None, training=True, eps=eps) * g).sum(), x)

    (value, grad), (other, other_grad) = run(x, 1e-5), run(x * factor + shift, 1e-5 * factor**2)
    close(other, value, 1e-6)
    close(other_grad * factor, grad, 1e-6)


@law
@given(seeds, batches, channels_of, spatials, st.floats(-1e2, 1e2), st.sampled_from([0, 1]))
def test_grad_input_is_blind_to_constants_and_orthogonal(seed, batch, channels, spatial, constant, correction):
    """A constant added to the upstream gradient of a channel reaches nothing; grad_input sums to zero."""
    x, g = image(seed, batch, channels, spatial), image(seed + 1, batch, channels, spatial)
    weight = torch.rand(channels, generator=gen(seed), dtype=torch.float64) + 0.5

    def run(g):
        return grad_of(
            lambda x: (fused_ops.batch_norm(x, None, None, weight, training=True, correction=correction) * g).sum(),
            x,
        )[1]

    grad = run(g)
    close(run(g + constant), grad, 1e-7, scale=grad.abs().max() + abs(constant))
    close(grad.sum(over(x)), torch.zeros(channels, dtype=torch.float64), 1e-9, scale=grad.abs().sum())


@law
@given(seeds, batches, channels_of, spatials)
def test_permuted_channels_and_batches(seed, batch, channels, spatial):
    x = image(seed, batch, channels, spatial)
    by_channel, by_batch = torch.randperm(channels, generator=gen(seed)), torch.randperm(batch, generator=gen(seed))

    def run(x):
        return grad_of(lambda x: fused_ops.batch_norm(x, None, None, training=True, activation="silu").sum(), x)[1]

    close(run(x[:, by_channel]), run(x)[:, by_channel], 1e-8)
    close(run(x[by_batch]), run(x)[by_batch], 1e-8)


@law
@given(seeds, batches, channels_of, spatials, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_kernel_is_reference_is_pytorch(seed, batch, channels, spatial, training, dtype):
    x = image(seed, batch, channels, spatial, 3.0, 2.0, dtype)
    g = image(seed + 1, batch, channels, spatial, dtype=dtype)
    weight, bias, mean, var = (torch.rand(4, channels, generator=gen(seed), dtype=torch.float64) + 0.5).to(dtype)

    def run(function, dtype=dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        stats = [mean.to(dtype, copy=True), var.to(dtype, copy=True)]
        y = function(leaves[0], *stats, *leaves[1:], training)
        return [y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype)), *stats]

    ours, eager, truth = run(fused_ops.batch_norm), run(F.batch_norm), run(F.batch_norm, torch.float64)
    found = bn.forward(x, mean.clone(), var.clone(), weight, bias, training)
    close(found[0], ours[0], 1e-5 if dtype == torch.float32 else 1e-10)
    for a, b, c in zip(ours, eager, truth, strict=True):
        if dtype == torch.float64:
            close(a, c, 1e-9)
        else:  # by the error rule, with one rounding of the largest value
            largest = c.abs().max() * torch.finfo(dtype).eps
            assert (a.double() - c).abs().max() <= (b.double() - c).abs().max() + largest


# ---- 50 digits


def digits(tensor):
    return [[mpmath.mpf(float(v)) for v in row] for row in tensor.reshape(-1, tensor.size(-1))]


def exact_cross_entropy(x, target, smoothing, z_loss):
    """Loss and gradient of the mean, in 50 digits."""
    with mpmath.workdps(50):
        rows, counted = digits(x), [int(t) for t in target]
        n = sum(t >= 0 for t in counted)
        loss, grad = mpmath.mpf(0), []
        for row, t in zip(rows, counted, strict=True):
            if t < 0:
                grad.append([mpmath.mpf(0)] * len(row))
                continue
            top = max(row)
            lse = top + mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in row))
            q = [(1 - mpmath.mpf(smoothing)) * (j == t) + mpmath.mpf(smoothing) / len(row) for j in range(len(row))]
            loss += mpmath.fsum(a * (lse - v) for a, v in zip(q, row, strict=True)) + mpmath.mpf(z_loss) * lse**2
            p = [mpmath.exp(v - lse) for v in row]
            grad.append([(b * (1 + 2 * mpmath.mpf(z_loss) * lse) - a) / n for a, b in zip(q, p, strict=True)])
        return loss / n, grad


def within(found, exact, roundings, scale=None):
    """Every value within so many roundings of float64 of the exact one (or of ``scale``)."""
    flat = [v for row in exact for v in row] if isinstance(exact, list) else [exact]
    for mine, right in zip(found.flatten().tolist(), flat, strict=True):
        limit = roundings * mpmath.mpf(2) ** -52 * max(abs(right), scale or 0, mpmath.mpf(10) ** -300)
        assert abs(mpmath.mpf(mine) - right) <= limit, (mine, right)


@law
@given(seeds, st.integers(1, 4), st.integers(1, 20), st.sampled_from([1e-3, 1.0, 40.0]), st.sampled_from([0.0, 0.1]))
def test_cross_entropy_in_50_digits(seed, rows, classes, scale, smoothing):
    x, target = draw(seed, rows, classes, scale)
    z_loss = 0.0 if smoothing == 0 else 0.125
    loss, grad = exact_cross_entropy(x, target, smoothing, z_loss)
    found = grad_of(lambda x: fused_ops.cross_entropy(x, target, label_smoothing=smoothing, z_loss=z_loss), x)
    within(found[0], loss, 8, max(1, scale))
    within(found[1], grad, 8, 1)
    if smoothing == 0:
        reference = ce.forward(x, target, -100, ce.MEAN)
        within(reference[0], loss, 8, max(1, scale))
        one = torch.ones((), dtype=torch.float64)
        within(ce.backward(one, x, target, *reference[1:], -100, ce.MEAN), grad, 8, 1)


def exact_batch_norm(x, g, weight, bias, correction):
    """Output and the gradients of input, weight, bias, in 50 digits, of (batch, channels)."""
    with mpmath.workdps(50):
        columns, upstream = digits(x.t()), digits(g.t())
        y, dx, dw, db = [], [], [], []
        for c, (values, grads) in enumerate(zip(columns, upstream, strict=True)):
            n, m = len(values), len(values) - correction
            w, b = mpmath.mpf(float(weight[c])), mpmath.mpf(float(bias[c]))
            mean = mpmath.fsum(values) / n
            centred = [v - mean for v in values]
            inv = 1 / mpmath.sqrt(mpmath.fsum(v * v for v in centred) / m + mpmath.mpf(1e-5))
            xhat = [v * inv for v in centred]
            dot = mpmath.fsum(a * h for a, h in zip(grads, xhat, strict=True))
            total = mpmath.fsum(grads)
            y.append([v * w + b for v in xhat])
            dx.append([w * inv * (a - total / n - h * dot / m) for a, h in zip(grads, xhat, strict=True)])
            dw.append(dot)
            db.append(total)
        return [list(r) for r in zip(*y, strict=True)], [list(r) for r in zip(*dx, strict=True)], [dw], [db]


@law
@given(seeds, st.integers(2, 6), st.integers(1, 5), st.sampled_from([0, 1]), st.sampled_from([0.0, 1e3]))
def test_batch_norm_in_50_digits(seed, batch, channels, correction, mean):
    x, g = image(seed, batch, channels, (), mean), image(seed + 1, batch, channels, ())
    weight, bias = torch.rand(2, channels, generator=gen(seed), dtype=torch.float64) + 0.5
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = fused_ops.batch_norm(leaves[0], None, None, *leaves[1:], training=True, correction=correction)
    exact = exact_batch_norm(x, g, weight, bias, correction)
    # values of size `mean` that differ by about 1 lose the digits of the mean before anything is computed
    lost = max(1.0, mean)
    found = [y.detach(), *torch.autograd.grad(y, leaves, g)]
    spread = float((1 / x.var(0, correction=correction).sqrt()).max().clamp(min=1))
    reference = bn.forward(x, None, None, weight, bias, True, 0.1, 1e-5, correction)
    for values, right, size in zip(found, exact, (1, spread, batch, batch), strict=True):
        within(values, right, 64 * batch * spread * lost, size)
    within(reference[0], exact[0], 64 * batch * spread * lost, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_50_digits(dtype):
    """The error rule with a truth that is none of PyTorch's, over all the cases together."""
    errors = []
    for seed in range(12):
        x, target = draw(seed, 4, 19, 5.0, dtype)
        loss, grad = exact_cross_entropy(x, target, 0.0, 0.0)
        truth = torch.tensor(float(loss)).double(), torch.tensor([[float(v) for v in row] for row in grad]).double()
        ours = grad_of(lambda x, target=target: fused_ops.cross_entropy(x, target), x)
        eager = grad_of(lambda x, target=target: F.cross_entropy(x, target), x)
        errors += [relative_errors(*found) for found in zip(ours, eager, truth, strict=True)]
    mine, other = torch.tensor(errors, dtype=torch.float64).T
    assert mine.max() <= other.max() + 1 and mine.mean() <= other.mean() + 0.5  # half a unit: one rounding

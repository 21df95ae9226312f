"""The references work in pieces: of a bounded size, in the dtype that the rule names, with the results of one piece."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ops.core import memory_format
from fused_ops.core.memory_format import channel_sums, memory_pieces, pieces
from fused_ops.ops.batch_norm import activations, keep_output_reference
from fused_ops.ops.batch_norm import reference as batch_norm
from fused_ops.ops.batch_norm.backward_reference import backward as batch_norm_backward
from fused_ops.ops.cross_entropy import reference, rows_reference
from fused_ops.ops.linear_cross_entropy import reference as head

SHAPES = [(300,), (40, 7), (40, 300), (5, 3, 11), (2, 3, 40, 9), (0, 3), (3, 0), (2, 3, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("elements", [1, 50, 1 << 20])
def test_pieces_are_small_and_cover_the_input_once(shape, elements, monkeypatch):
    monkeypatch.setattr(memory_format, "_CPU_PIECE", elements)
    x, rows = torch.zeros(shape), torch.zeros(*shape[:1], *shape[2:]) if len(shape) > 1 else torch.zeros(())
    for piece in pieces(x):
        x[piece.all] += 1
        rows[piece.row] += 1
        least = torch.Size(shape[1:2]).numel() * torch.Size(shape[3:]).numel()  # of one batch entry and position
        assert len(shape) == 1 or x[piece.all].numel() <= max(elements, least)
    assert bool((x == 1).all()) and bool((rows == 1).all())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("elements", [1, 50, 1 << 20])
def test_memory_pieces_are_stretches_of_memory_in_its_order(shape, elements, channels_last):
    x = torch.zeros(shape)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    place = torch.arange(x.numel()).as_strided(x.shape, x.stride())
    found = [place[index] for index in memory_pieces(x, elements)]
    assert all(piece.numel() <= max(elements, 1) for piece in found)
    begins = [int(piece.min()) for piece in found if piece.numel()]
    assert begins == [sum(piece.numel() for piece in found[:i]) for i in range(len(begins))]


def losses(dtype):
    torch.manual_seed(0)
    x, target = (torch.randn(40, 70) * 3).to(dtype), torch.randint(0, 70, (40,))
    target[3] = -100
    return x, target


def calls(dtype):
    """By name, each reference on inputs of this dtype."""
    x, target = losses(dtype)
    image = (torch.randn(6, 5, 4, 3) * 2 + 9).to(dtype)
    many = image.flatten(2).mean(2).repeat(20, 1)
    own = torch.promote_types(dtype, torch.float32)
    grad, weight, bias = torch.randn(image.shape).to(dtype), (torch.rand(5) + 0.5).to(own), torch.randn(5).to(own)
    options = (-100, 0.1, 1.3, 0.0, True)
    ones = torch.ones(40, dtype=torch.float64)
    lse = x.double().logsumexp(1)
    statistics = batch_norm.forward(image, None, None, weight, bias, True)[1]
    valid = torch.arange(24).reshape(6, 4, 1).expand(6, 4, 3) % 5 != 0
    return {
        "cross_entropy": lambda: reference.forward(x, target, -100, 1),
        "its backward": lambda: reference.backward(torch.ones((), dtype=dtype), x, target, lse, ones.sum(), -100, 1),
        "rows": lambda: rows_reference.forward(x, target, None, None, None, *options),
        "their backward": lambda: rows_reference.backward(
            ones, ones, ones, None, x, target, None, None, None, lse, ones, lse, *options
        ),
        "batch_norm": lambda: batch_norm.forward(image, None, None, weight, bias, True, 0.1, 1e-5, 0, 1),
        "batch_norm of rows": lambda: batch_norm.forward(many, None, None, weight, bias, True),
        "groups": lambda: batch_norm.forward(image, None, None, weight, bias, True, groups=3, valid=valid),
        "batch_norm's backward": lambda: batch_norm_backward(
            grad, image, weight, bias, statistics, activation=1, valid=valid
        ),
        "kept output": lambda: kept_output(image, grad, weight, bias, statistics),
    }


def kept_output(image, grad, weight, bias, statistics):
    """What is stored of x, and the gradients from the output, of the elu of a training batch."""
    y = batch_norm.forward(image, None, None, weight, bias, True, 0.1, 1e-5, 0, activations.ELU, 1.0)[0]
    kept = keep_output_reference.keep(y, image, weight, bias, None, activations.ELU, 1.0, 1)
    numbers = True, True, True, 0, activations.ELU, 1.0, None, 1
    return kept[0], *keep_output_reference.keep_backward(grad, y, weight, bias, statistics, *kept, *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8192, 100), (3, 1, 300, 300), (40, 100, 40)], ids=str)
def test_sums_of_channels_are_the_same_on_any_number_of_threads(shape, dtype):
    x, found = torch.randn(shape, dtype=dtype), []
    for threads in (1, 2, 3, 7):  # a fixture sets it back
        torch.set_num_threads(threads)
        found.append(channel_sums(x))
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0], x.double().transpose(0, 1).flatten(1).sum(1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("code", sorted({*activations.CODES.values()} - {activations.NONE}))
def test_activations_are_the_same_on_any_number_of_threads(code):
    """Of a thread's share the last values are not computed as the others."""
    x, grad, found = torch.randn(7, 9, 1201), torch.randn(7, 9, 1201), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append((activations.apply_(code, x.clone(), 0.7), activations.backward(code, grad, x.clone(), 0.7)))
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("options", ["none", "smoothing and z_loss", "weights, mask and softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_positions_gradient_is_its_own(dtype, options):
    """Whatever other positions, and however many, an image has."""
    x, target = torch.randn(3, 21, 301).to(dtype), torch.randint(1, 21, (3, 301))
    one = torch.ones((), dtype=torch.float64)
    more = [torch.rand(21).to(dtype), torch.arange(21) > 0] if "weights" in options else [None, None]
    numbers = (-100, 0.0, 1.3, 5.0, False) if "weights" in options else (-100, 0.1, 1.0, 0.0, False)

    def grad(x, target):
        ones, lse = torch.ones(target.shape, dtype=dtype), x.double().exp().cumsum(1)[:, -1].log()
        if options == "none":
            return reference.backward(ones, x, target, lse, one, -100, 0)
        grads = ones, None if "weights" in options else ones, None, None
        return rows_reference.backward(*grads, x, target, None, *more, lse, ones, lse, *numbers)

    whole = grad(x, target)
    assert all(torch.equal(whole[..., i:], grad(x[..., i:].clone(), target[:, i:])) for i in (1, 8, 250, 300))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("classes", [2, 4, 100])
def test_each_rows_gradient_is_as_near_as_eagers(classes, smoothing):
    """In roundings of the row's largest value, of rows where the target has more or less of all."""
    torch.manual_seed(0)
    x, target = torch.randn(2000, classes) * 3, torch.zeros(2000, dtype=torch.int64)
    exact, eager = (
        torch.autograd.grad(F.cross_entropy(leaf, target, label_smoothing=smoothing, reduction="sum"), leaf)[0]
        for leaf in (x.double().requires_grad_(), x.clone().requires_grad_())
    )
    ones, lse = torch.ones(2000, dtype=torch.float64), x.double().logsumexp(1)
    options = -100, smoothing, 1.0, 0.0, False
    found = rows_reference.backward(ones, *[None] * 3, x, target, *[None] * 3, lse, ones, None, *options)
    one = exact.abs().amax(1) * torch.finfo(torch.float32).eps
    error, allowed = ((t - exact).abs().amax(1) / one for t in (found, eager))
    assert error.max() <= max(allowed.max(), 4) + 1 and error.mean() <= allowed.mean() + 0.05


@pytest.mark.parametrize("name", calls(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_pieces_have_the_results_of_one(name, dtype, monkeypatch):
    whole = calls(dtype)[name]()
    monkeypatch.setattr(memory_format, "_CPU_PIECE", 64)
    parts = calls(dtype)[name]()
    near = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
    for part, one in zip(tree_leaves(parts), tree_leaves(whole), strict=True):
        torch.testing.assert_close(part, one, rtol=near, atol=near)


class Largest(TorchDispatchMode):
    """The most elements of a fresh tensor of a floating-point dtype, by dtype."""

    def __init__(self):
        super().__init__()
        self.by_dtype = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t._is_view():
                self.by_dtype[t.dtype] = max(self.by_dtype.get(t.dtype, 0), t.numel())
        return out


@pytest.mark.parametrize("name", calls(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_made_on_the_way_is_small(name, dtype, monkeypatch):
    """Beside the result, a piece in float32; in float64 a value for each row or channel, or a piece of a sum."""
    monkeypatch.setattr(memory_format, "_CPU_PIECE", 140)
    call = calls(dtype)[name]
    with Largest() as largest:
        call()
    assert largest.by_dtype.get(torch.float64, 0) <= 140
    if dtype != torch.float32:
        assert largest.by_dtype[torch.float32] <= 140


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_far_mean_costs_no_digits(dtype):
    """No further from the truth than PyTorch's own batch norm, and a rounding."""
    torch.manual_seed(0)
    x = (torch.randn(64, 3, 50) + 3000).to(dtype)
    found, statistics = batch_norm.forward(x, None, None, None, None, True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    eager = F.batch_norm(x, None, None, training=True)
    error, allowed = ((t.double() - exact).abs().max() for t in (found, eager))
    assert error <= allowed + torch.finfo(dtype).eps * exact.abs().max()
    torch.testing.assert_close(statistics[0], x.double().mean((0, 2)), rtol=1e-9, atol=0)


def test_an_infinite_value_in_one_piece_is_an_infinite_mean(monkeypatch):
    monkeypatch.setattr(memory_format, "_CPU_PIECE", 10)
    x = torch.randn(20, 2)
    x[1, 0] = torch.inf
    running = [torch.zeros(2), torch.ones(2)]
    batch_norm.forward(x, *running, None, None, True)
    expected = [torch.zeros(2), torch.ones(2)]
    F.batch_norm(x, *expected, training=True)
    assert running[0][0] == expected[0][0] == torch.inf
    torch.testing.assert_close(running[0][1], expected[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_logits_are_taken_in_pieces(dtype, monkeypatch):
    torch.manual_seed(0)
    z, target = (torch.randn(50, 200) * 3).to(dtype), torch.randint(0, 90, (200,))
    factor, target_grad = torch.rand(200), torch.rand(200)

    def tile():
        rows = [torch.full((200,), -torch.inf), torch.zeros(200), torch.zeros(200)]
        head.tile_sums_(z, target, 10, 90, *rows)
        grads = z.clone()
        head.tile_grads_(grads, target, 10, 90, rows[0], factor, target_grad)
        return [*rows, grads]

    whole = tile()
    monkeypatch.setattr(memory_format, "_CPU_PIECE", 1)
    with Largest() as largest:
        parts = tile()
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, one)
    assert dtype == torch.float32 or largest.by_dtype[torch.float32] <= 50 * 64
    at = (target >= 10) & (target < 60)
    exact = z.double().logsumexp(0)
    found = whole[0].double() + (whole[1].double() + torch.where(at, (whole[2] - whole[0]).double().exp(), 0.0)).log()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)

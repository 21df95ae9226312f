"""What docs/reliability.md promises: the same bits whatever the threads, the batch and the run; inputs left alone (see
also conftest.py, which checks it around every raw op of the suite); and exactly what is kept for the backward."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import fused_ops

BATCH_NORM_MODES = [
    {"training": t, "activation": a, "residual": r, "valid": v, "groups": g}
    for t, (a, r, v, g) in itertools.product(
        (True, False),
        (
            (None, False, False, 1),
            ("relu", True, False, 1),
            ("relu", False, True, 1),
            ("silu", True, False, 1),
            ("gelu", False, False, 3),
            ("tanh", True, True, 1),
        ),
    )
]
CROSS_ENTROPY_MODES = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 0.1},
    {"softcap": 5.0, "return_outputs": True},
    {"weight": True, "class_mask": True},
]
IMAGES = {
    "planes": lambda: torch.randn(6, 5, 40, 37),
    "rows": lambda: torch.randn(700, 70),
    "channels last": lambda: torch.randn(6, 35, 20, 17).contiguous(memory_format=torch.channels_last),
    "bfloat16": lambda: torch.randn(6, 5, 40, 37).bfloat16(),
}
LOGITS = {
    "rows": lambda: torch.randn(600, 300),
    "small": lambda: torch.randn(5000, 10),
    "spatial": lambda: torch.randn(5, 21, 30, 31),
    "bfloat16": lambda: torch.randn(300, 1025).bfloat16(),
}


def batch_norm(x, training, activation, residual, valid, groups):
    generator = torch.Generator().manual_seed(1)
    channels = x.size(1)
    params = [(torch.rand(channels, generator=generator) + 0.5).requires_grad_() for _ in range(2)]
    stats = [torch.rand(channels, generator=generator) + 0.5 for _ in range(2)]
    mask = torch.rand(x.size(0), *x.shape[2:], generator=generator) > 0.1 if valid else None
    r = torch.randn(x.shape, generator=generator).to(x.dtype) if residual else None
    x = x.detach().clone().requires_grad_()
    y = fused_ops.batch_norm(x, *stats, *params, training, activation=activation, residual=r, valid=mask, groups=groups)
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *params), upstream), *stats]


def cross_entropy(x, **options):
    generator = torch.Generator().manual_seed(1)
    classes = x.size(1)
    target = torch.randint(0, classes, (x.size(0), *x.shape[2:]), generator=generator)
    target.view(-1)[::9] = -100
    if "weight" in options:
        options = {"weight": torch.rand(classes, generator=generator).to(x.dtype)}
        options["class_mask"] = torch.ones(classes, dtype=torch.bool)
        options["class_mask"][0] = False
        target[target == 0] = 1
    x = x.detach().clone().requires_grad_()
    found = fused_ops.cross_entropy(x, target, **options)
    outputs = [t for t in found if isinstance(t, torch.Tensor)] if isinstance(found, tuple) else [found]
    loss = outputs[0]
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.dtype)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(loss, x, upstream)]


CALLS = [
    *((f"batch_norm {i} {m}", batch_norm, i, m) for i, m in itertools.product(IMAGES, BATCH_NORM_MODES)),
    *((f"cross_entropy {i} {m}", cross_entropy, i, m) for i, m in itertools.product(LOGITS, CROSS_ENTROPY_MODES)),
]


def same(a, b):
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("function", "name", "options"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_the_same_bits_for_any_threads_and_in_any_run(function, name, options):
    x = (IMAGES if function is batch_norm else LOGITS)[name]()
    torch.set_num_threads(1)
    one = function(x, **options)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        noise = torch.full((1000, 1000), float("nan"))  # memory that the next results may be given
        del noise
        assert same(function(x, **options), one), threads


@pytest.mark.parametrize(("function", "name", "options"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_deterministic_algorithms(function, name, options):
    """Accepted without a warning; and nothing depends on fresh memory, which that mode fills with NaN."""
    x = (IMAGES if function is batch_norm else LOGITS)[name]()
    expected = function(x, **options)
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(function(x, **options), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_linear_cross_entropy_and_second_derivatives():
    x, w = torch.randn(40, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    image, target = torch.randn(4, 3, 5, requires_grad=True), torch.randint(0, 30, (40,))

    def run():
        loss = fused_ops.linear_cross_entropy(x, w, target, chunk_rows=7)
        loss = loss + fused_ops.batch_norm(image, None, None, training=True, activation="silu").square().sum()
        loss = loss + fused_ops.cross_entropy(x, target % 8)
        first = torch.autograd.grad(loss, (x, w, image), create_graph=True)
        return [*(t.detach() for t in first), *torch.autograd.grad(sum(t.square().sum() for t in first), (x, w, image))]

    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert same(run(), expected) and same(run(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", CROSS_ENTROPY_MODES, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_a_row_does_not_know_its_batch(name, options):
    x = LOGITS[name]()
    target = torch.randint(1, x.size(1), (x.size(0), *x.shape[2:]))
    if "weight" in options:
        options = {"weight": torch.rand(x.size(1)).to(x.dtype), "class_mask": torch.arange(x.size(1)) > 0}
    options = {**options, "reduction": "none"}

    def rows(x, target):
        x = x.detach().requires_grad_()
        found = fused_ops.cross_entropy(x, target, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return [loss.detach(), *torch.autograd.grad(loss.sum(), x)]

    whole = rows(x, target)
    for part in (slice(0, 1), slice(2, 5), slice(x.size(0) - 3, None)):
        assert same(rows(x[part], target[part]), [t[part] for t in whole])


# ---- what is kept for the backward


def saved(function, again=0):
    """Bytes that the forward saves; only `again` tensors are of memory that another one of them has."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = function()
    places = [t.data_ptr() for t in kept if t.numel()]
    assert len(places) - len(set(places)) == again, "saved twice"
    del output
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in kept if t.numel()}.values())


def sizes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 40), (5, 40, 2, 3)])
def test_cross_entropy_keeps_logits_target_and_a_number_a_row(shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(0, 40, (shape[0], *shape[2:]))
    row, weight = 8 * target.numel(), torch.rand(40).to(dtype)
    for reduction in ("none", "mean", "sum"):
        found = saved(lambda: fused_ops.cross_entropy(x, target, reduction=reduction))  # noqa: B023
        if reduction != "none" and dtype in (torch.float32, torch.float64):
            assert found == sizes(x, target)  # small: the gradient itself besides, which the Function keeps
        else:
            assert found == sizes(x, target) + row + 8  # lse; how many rows count
    general = saved(lambda: fused_ops.cross_entropy(x, target, label_smoothing=0.1, reduction="sum"))
    assert general == sizes(x, target) + 2 * row  # lse; the mass of the target
    weighted = saved(lambda: fused_ops.cross_entropy(x, target, weight, reduction="sum"))
    assert weighted == sizes(x, target, weight) + 2 * row
    dense = torch.rand(shape).to(dtype)
    assert saved(lambda: fused_ops.cross_entropy(x, dense, reduction="sum")) == sizes(x, dense) + 2 * row
    # PyTorch's square keeps lse too, and its product by z_loss a number
    z_loss = saved(lambda: fused_ops.cross_entropy(x, target, z_loss=0.1, reduction="sum"), again=1)
    assert sizes(x, target) + 2 * row <= z_loss <= sizes(x, target) + 3 * row + 8
    assert saved(lambda: fused_ops.cross_entropy(x.detach(), target)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(30, 40), (5, 40, 6, 8)])
def test_batch_norm_keeps_input_and_two_numbers_a_channel(shape, training, dtype):
    x, residual = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype).requires_grad_()
    acc = torch.float32 if dtype == torch.bfloat16 else dtype
    weight, bias = (torch.rand(40).to(acc).requires_grad_() for _ in range(2))
    stats = torch.rand(40).to(acc), torch.rand(40).to(acc) + 0.5
    channels = 2 * 8 * 40  # mean and invstd

    def call(**options):
        copies = (t.clone() for t in stats)
        return saved(lambda: fused_ops.batch_norm(x, *copies, weight, bias, training, **options))

    bits = shape[0] * ((x[0].numel() + 7) // 8)
    assert call() == sizes(x, weight) + channels
    assert call(residual=residual) == sizes(x, weight) + channels
    assert call(activation="relu") == sizes(x, weight, bias) + channels
    assert call(activation="silu") == sizes(x, weight, bias) + channels
    if len(shape) == 2:
        assert call(activation="relu", residual=residual) == sizes(x, weight) + channels + bits
    else:
        assert call(activation="relu", residual=residual) == sizes(x, weight) + channels + x.numel() // 8
    assert call(activation="silu", residual=residual) == sizes(x, weight, bias, residual) + channels
    valid = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    assert call(valid=valid) == sizes(x, weight, valid) + channels
    if training:
        assert call(groups=5) == sizes(x, weight) + 5 * channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_keeps_no_logits(dtype):
    """For a scalar loss the head's gradients besides, which the backward hands over instead of computing them."""
    x, w = torch.randn(50, 6).to(dtype).requires_grad_(), torch.randn(400, 6).to(dtype).requires_grad_()
    bias, target = torch.randn(400).to(dtype).requires_grad_(), torch.randint(0, 400, (50,))

    def call(**options):
        options = {"linear_bias": bias, "chunk_rows": 8, **options}
        return saved(lambda: fused_ops.linear_cross_entropy(x, w, target, **options))

    assert call() == call(reduction="sum") == sizes(x, w, bias, target) + 8 * 50  # the factor of each row
    assert call(linear_bias=None) == sizes(x, w, target) + 8 * 50
    assert call(reduction="none") == sizes(x, w, bias, target) + 2 * 8 * 50  # lse; the mass of the target
    assert call(label_smoothing=0.1, softcap=3.0) == sizes(x, w, bias, target) + 8 * 50


def test_modules_keep_what_their_functions_keep():
    x = torch.randn(6, 5, 4, 3, requires_grad=True)
    module = fused_ops.BatchNorm2d(5)
    assert saved(lambda: module(x)) == sizes(x, module.weight) + 2 * 8 * 5
    logits, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    assert saved(lambda: fused_ops.CrossEntropyLoss()(logits, target)) == sizes(logits, target)
    many = torch.randn(300, 110, requires_grad=True), torch.randint(0, 110, (300,))
    assert saved(lambda: fused_ops.CrossEntropyLoss()(*many)) == sizes(*many) + 8 * 300 + 8
    block = nn.Sequential(nn.Conv2d(5, 5, 1), fused_ops.BatchNorm2d(5, activation="relu"))
    assert saved(lambda: block(x)) == sizes(x, block[0].weight) + 4 * x.numel() + 2 * 4 * 5 + 2 * 8 * 5


def test_the_suite_watches_every_raw_op(monkeypatch):
    """The fixture of conftest.py knows each op that the library registers, but for the one that only allocates."""
    from conftest import raw_ops

    monkeypatch.undo()  # the fixture's own replacements
    found = {op._schema.name.split("::")[1] for _, _, op in raw_ops()}
    assert found >= {*fused_ops.core.library._registered}


def test_the_suite_would_notice_a_change_of_an_input(monkeypatch):
    """The check of conftest.py, on an op that does change one."""
    from fused_ops.ops.cross_entropy import functions as plain

    original = plain.forward_op

    def guilty(input, *rest):
        input.add_(1)
        return original(input, *rest)

    from conftest import leaves_its_arguments_alone

    monkeypatch.setattr(plain, "forward_op", leaves_its_arguments_alone(guilty))
    with pytest.raises(AssertionError, match="changed"):
        fused_ops.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]))

"""The CUDA kernels of batch norm, run on the CPU by tests/cuda_host, against the reference and PyTorch eager."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cuda_host import DTYPES, BatchNorm, Guarded, aligned

from fused_ops.ops.batch_norm import activations, backward_reference, reference
from fused_ops.testing import assert_no_worse_than

# Planes around a unit of 8 values and the 32 below which a mask's rows run through the channels; tiles of columns of
# all widths; several parts; 32 small or odd planes of a channel and more, which are walked as columns.
SHAPES = [
    *((2, 1), (3, 5), (17, 32), (129, 33), (40, 64), (1025, 3), (2, 3, 1), (3, 4, 7), (2, 3, 8), (2, 5, 9)),
    *((2, 3, 31), (2, 3, 32), (2, 3, 33), (3, 2, 49), (2, 40, 64), (4, 3, 16, 16), (1, 2, 8193), (5, 1, 63, 65)),
    *((40, 3, 7, 7), (33, 8, 3, 3), (70, 5, 41), (32, 12, 6, 6), (3, 2, 4096), (600, 264), (270, 24), (2100, 8)),
]
RELU, LEAKY, NONE = activations.RELU, activations.LEAKY_RELU, activations.NONE


def last(x):
    """The same values with the channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


class Case:
    """One call: its tensors from a shape, a dtype and a memory layout."""

    def __init__(self, shape, dtype, layout=None, offset=0, mean=0.5, parameters=None, residual=False):
        torch.manual_seed(sum(shape))
        order = layout or (lambda t: t)
        self.x = aligned(order((torch.randn(shape) * 2 + mean).to(dtype)), offset)
        self.grad = aligned(order(torch.randn(shape).to(dtype)), offset)
        self.residual = aligned(order(torch.randn(shape).to(dtype)), offset) if residual else None
        kind, channels = parameters or dtype, shape[1]
        self.weight, self.bias = torch.randn(channels).to(kind), torch.randn(channels).to(kind)
        self.stats = torch.randn(channels).to(kind), torch.rand(channels).add(0.5).to(kind)
        self.offset = offset

    def guarded(self):
        return Guarded(self.x.shape, self.x.stride(), self.x.dtype, self.offset)


def run(kernels, case, training=True, activation=NONE, slope=0.1, correction=0, affine=True):
    """Output, statistics, mask and all gradients by the kernels."""
    weight, bias = (case.weight, case.bias) if affine else (None, None)
    masked = reference.has_mask(case.residual, None, activation)
    out, grad_input, grad_residual = (case.guarded() for _ in range(3))
    options = (correction, activation, slope)
    y, mean, invstd, new_mean, new_var, mask = kernels.forward(
        *(case.x, case.residual, *case.stats, weight, bias, training, 0.1, 1e-5, *options),
        *(reference.mask_bytes(case.x) if masked else 0, out.tensor),
    )
    residual = None if masked else case.residual
    grads = kernels.backward(
        *(case.grad, case.x, residual, weight, bias, mean, invstd, mask, training, *options),
        *(grad_input.tensor, grad_residual.tensor if case.residual is not None else None, True),
    )
    for memory in (out, grad_input):
        memory.check()
    assert case.residual is None or grad_residual.check() is None
    return (y, mean, invstd, new_mean, new_var, mask), grads


def expected(case, training=True, activation=NONE, slope=0.1, correction=0, affine=True, kind=None):
    """The same by the reference, in the dtype of the case or in ``kind``."""
    to = (lambda t: t) if kind is None else (lambda t: None if t is None else t.to(kind))
    weight, bias = (to(case.weight), to(case.bias)) if affine else (None, None)
    x, residual, stats = to(case.x), to(case.residual), map(to, case.stats)
    stats = [t.clone() for t in stats]
    masked = reference.has_mask(residual, None, activation)
    mask = torch.empty(reference.mask_bytes(x), dtype=torch.uint8) if masked else None
    options = {"correction": correction, "activation": activation, "slope": slope, "residual": residual}
    y, statistics = reference.forward(x, *stats, weight, bias, training, mask=mask, **options)
    grad_residual = None if residual is None else torch.empty_like(residual)
    grads = backward_reference.backward(
        to(case.grad), x, weight, bias, statistics, training, grad_residual=grad_residual, **options
    )
    return (y, *statistics, *stats, mask), (grads[0], grad_residual, *grads[1:])


def tolerance(dtype):
    return {"rtol": {torch.float64: 1e-10}.get(dtype, 8 * torch.finfo(dtype).eps), "atol": 4 * torch.finfo(dtype).eps}


def compare(kernels, case, **options):
    (y, mean, invstd, new_mean, new_var, mask), grads = run(kernels, case, **options)
    found, wanted = expected(case, **options, kind=torch.float64)
    dtype = case.x.dtype
    for name, ours, theirs in zip(("output", "mean", "invstd"), (y, mean, invstd), found[:3], strict=True):
        near = (
            tolerance(dtype) if name == "output" else {"rtol": 1e-10 if dtype == torch.float64 else 1e-6, "atol": 1e-7}
        )
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **near, msg=lambda m, name=name: f"{name}: {m}")
    if new_mean is not None:
        kind = case.stats[0].dtype
        torch.testing.assert_close(new_mean, found[3].to(kind), **tolerance(kind))
        torch.testing.assert_close(new_var, found[4].to(kind), **tolerance(kind))
    for name, ours, theirs in zip(("input", "residual", "weight", "bias"), grads, wanted, strict=True):
        if ours is None:
            continue
        near = tolerance(ours.dtype)
        near["atol"] *= 40 if ours.dim() == 1 else 4
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **near, msg=lambda m, name=name: f"grad_{name}: {m}")
    if mask is not None:
        assert torch.equal(mask, found[5])


@pytest.fixture(params=["launches"])
def kernels(request, cuda_host):
    return BatchNorm(cuda_host, packed=request.param == "packed")


both_ways = pytest.mark.parametrize("kernels", ["launches", "packed"], indirect=True)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [None, last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels, shape, layout, dtype):
    compare(kernels, Case(shape, dtype, layout))
    compare(kernels, Case(shape, dtype, layout, residual=True), activation=RELU)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [None, last])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_error_rule(kernels, mean, layout, dtype):
    for shape in ((64, 12), (6, 4, 300), (3, 5, 7, 7), (35, 5, 7, 7), (700, 16), (3, 3, 4096)):
        case = Case(shape, dtype, layout, mean=mean)
        (y, *_), (grad_input, _, grad_weight, grad_bias) = run(kernels, case)

        def eager(kind, case=case):
            x, w, b = (t.detach().to(kind).requires_grad_() for t in (case.x, case.weight, case.bias))
            out = F.batch_norm(x, None, None, w, b, True)
            return out.detach(), *torch.autograd.grad(out, (x, w, b), case.grad.to(kind))

        theirs, truth = eager(dtype), eager(torch.float64)
        for name, ours, other, exact in zip(
            ("output", "input", "weight", "bias"), (y, grad_input, grad_weight, grad_bias), theirs, truth, strict=True
        ):
            assert_no_worse_than(ours, other, exact, f"{name} of {shape}")


@both_ways
@pytest.mark.parametrize("activation", range(9))
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activations(kernels, activation, residual, training, dtype):
    for shape, layout in (
        ((9, 8), None),
        ((2, 3, 4), None),
        ((2, 3, 40), None),
        ((2, 3, 40), last),
        ((32, 2, 41), None),
    ):
        case = Case(shape, dtype, layout, residual=residual)
        if activation not in (NONE, RELU, LEAKY) and dtype != torch.float64:
            (y, *_), grads = run(kernels, case, training=training, activation=activation)
            found, wanted = expected(case, training=training, activation=activation)
            torch.testing.assert_close(y, found[0], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(grads[0], wanted[0], rtol=4e-2, atol=4e-2)
        else:
            compare(kernels, case, training=training, activation=activation)


@pytest.mark.parametrize("parameters", DTYPES[:1] + DTYPES[2:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_another_dtype(kernels, dtype, parameters):
    if parameters in (dtype, torch.float32):
        compare(kernels, Case((5, 3, 20), dtype, parameters=parameters))


@both_ways
@pytest.mark.parametrize("offset", [1, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment(kernels, offset, dtype):
    for shape, layout in (
        *(((20, 24), None), ((2, 3, 64), None), ((2, 8, 5, 5), last), ((2, 3, 16), None), ((3, 2, 4096), None)),
        *(((33, 8, 7, 7), None), ((300, 40), None), ((2, 16, 200), last)),
    ):
        here, there = (Case(shape, dtype, layout, k, residual=True) for k in (0, offset))
        first, second = (run(kernels, case, activation=RELU) for case in (here, there))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(cuda_host, order, packed):
    for shape, layout in (
        ((300, 40), None),
        ((2, 3, 5000), None),
        ((2, 3, 16), None),
        ((2, 36, 90), last),
        ((33, 5, 41), None),
        ((3, 40), None),
    ):
        case = Case(shape, torch.float32, layout, residual=True)
        first, second = (run(BatchNorm(cuda_host, k, packed), case, activation=RELU) for k in (0, order))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("training", "correction", "affine"), list(itertools.product([False, True], [0, 1], [False, True]))
)
def test_modes(kernels, training, correction, affine):
    for shape, layout in (((9, 5), None), ((2, 3, 40), None), ((2, 3, 40), last)):
        case = Case(shape, torch.float64, layout)
        compare(kernels, case, training=training, correction=correction, affine=affine)


@both_ways
@pytest.mark.parametrize("layout", [None, last])
def test_only_what_is_needed(kernels, layout):
    case = Case((3, 4, 50), torch.float32, layout, residual=True)
    (_, mean, invstd, *_, mask), full = run(kernels, case, activation=RELU)
    for need_input, need_residual, need_params in itertools.product([False, True], repeat=3):
        memory = [case.guarded().tensor if need else None for need in (need_input, need_residual)]
        args = (case.grad, case.x, None, case.weight, case.bias, mean, invstd, mask, True, 0, RELU, 0.1)
        found = kernels.backward(*args, *memory, need_params)
        for ours, whole, need in zip(found, full, (need_input, need_residual, need_params, need_params), strict=True):
            assert torch.equal(ours, whole) if need else ours is None


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0), (2, 0, 5)])
def test_empty(kernels, shape):
    case = Case(shape, torch.float32)
    (y, mean, invstd, new_mean, new_var, _), grads = run_empty(kernels, case)
    assert y.shape == case.x.shape and mean.isnan().all() and invstd.isnan().all()
    assert torch.equal(new_mean, case.stats[0]) and torch.equal(new_var, case.stats[1])
    assert not grads[2].any() and not grads[3].any()


def run_empty(kernels, case):
    empty = torch.empty_like(case.x)
    stats = (*case.stats, case.weight, case.bias)
    found = kernels.forward(case.x, None, *stats, True, 0.1, 1e-5, 0, NONE, 0.0, 0, empty)
    args = (case.grad, case.x, None, case.weight, case.bias, found[1], found[2], None, True, 0, NONE, 0.0)
    return found, kernels.backward(*args, empty.clone(), None, True)


@both_ways
@pytest.mark.parametrize("layout", [None, last])
def test_one_value_a_channel_and_values_that_are_not_finite(kernels, layout):
    case = Case((1, 3, 1), torch.float32)
    (y, mean, _, _, new_var, _), _ = run(kernels, case)
    torch.testing.assert_close(y.flatten(), case.bias) and torch.testing.assert_close(mean.float(), case.x.flatten())
    assert new_var.isnan().all()
    case = Case((4, 3, 40), torch.float32, layout)
    case.x[0, 0, 0], case.x[1, 1, 1] = float("nan"), float("inf")
    case.x[:, 2] = 3.0
    (y, _, invstd, *_), grads = run(kernels, case)
    assert y[:, :2].isnan().all() and grads[0][:, :2].isnan().all()
    torch.testing.assert_close(y[:, 2], case.bias[2].expand(4, 40))
    assert invstd[2] == 1e-5**-0.5


# ---- positions that do not count, and ghost batches: by the raw ops, which cut the batch

PARTS = [
    *(((9, 12), None), ((9, 12), last), ((130, 24), None), ((5, 3, 1), None), ((5, 3, 5), None), ((3, 2, 77), None)),
    *(((4, 24, 3, 5), last), ((40, 3, 7, 7), None), ((2, 3, 8, 1025), None), ((600, 8, 9), last), ((7, 2, 4096), None)),
]


def parts_of(valid, case, groups, kind):
    """Which positions count of a case: None if all do. Nothing depends on the others, whatever they are."""
    if not valid:
        return None
    counted = torch.rand(case.x.shape[:1] + case.x.shape[2:]) < 0.6
    size = reference.group_size(case.x.size(0), groups)
    if case.x.size(0) > size:
        counted[:size] = False  # nothing of the first ghost batch
    for t in (case.x, case.grad, case.residual):
        if t is not None:
            t.masked_fill_(~counted.unsqueeze(1), float("nan"))
    return counted if kind == torch.bool else counted.to(torch.uint8) * 3


def call_parts(ops, case, training, activation, valid, groups):
    """Everything that the two raw ops return or write."""
    stats = [t.clone() for t in case.stats]
    masked = reference.has_mask(case.residual, valid, activation)
    mask = torch.empty(reference.mask_bytes(case.x), dtype=torch.uint8) if masked else None
    grad_residual = None if case.residual is None else torch.empty_like(case.residual)
    numbers = {"training": training, "correction": 0, "activation": activation, "slope": 0.3}
    options = {**numbers, "residual": case.residual, "mask": mask, "valid": valid, "groups": groups}
    parameters = case.weight, case.bias
    y, statistics = ops["batch_norm_forward"](case.x, *stats, *parameters, **options)
    grads = ops["batch_norm_backward"](
        case.grad, case.x, *parameters, statistics, grad_residual=grad_residual, **options
    )
    names = ("output", "statistics", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
    found = dict(zip(names, (y, statistics, *stats, *grads), strict=True))
    return found | {"grad_residual": grad_residual, "mask": mask}


def near(name, found, wanted):
    """What a result may differ by: sums over the batch by more than one value."""
    if name == "statistics":
        return {"rtol": 1e-10 if wanted["output"].dtype == torch.float64 else 1e-6, "atol": 5e-7}
    near = tolerance(found.dtype)
    near["atol"] *= 40 if found.dim() == 1 else 4
    return near


def compare_parts(ops, case, *options):
    found = call_parts(ops, case, *options)
    wanted = call_parts(
        {f"batch_norm_{f.__name__}": f for f in (reference.forward, backward_reference.backward)}, case, *options
    )
    for name, ours in found.items():
        if ours is None or ours.dtype == torch.uint8:
            assert ours is None or torch.equal(ours, wanted[name])
            continue
        torch.testing.assert_close(
            ours, wanted[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **near(name, ours, wanted)
        )
    assert not found["output"].isnan().any() and not found["grad_input"].isnan().any()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layout"), PARTS)
def test_positions_that_do_not_count(host_ops, shape, layout, dtype):
    for activation, residual, kind in ((NONE, False, torch.bool), (RELU, True, torch.uint8)):
        case = Case(shape, dtype, layout, residual=residual)
        valid = parts_of(True, case, 1, kind)
        compare_parts(host_ops, case, True, activation, valid, 1)
        found = compare_parts(host_ops, case, False, activation, valid, 1)
        skipped = ~valid.bool().unsqueeze(1).expand(shape)
        for name in ("output", "grad_input", *(["grad_residual"] if residual else [])):
            assert not found[name][skipped].any(), name


@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize(("shape", "layout"), PARTS)
def test_ghost_batches(host_ops, cuda_host, shape, layout, valid, groups):
    for dtype, activation, residual in (
        (torch.float64, NONE, False),
        (torch.float32, activations.SILU, True),
        (torch.bfloat16, RELU, True),
        (torch.float16, LEAKY, False),
    ):
        case = Case(
            shape, dtype, layout, parameters=torch.float32 if dtype == torch.bfloat16 else None, residual=residual
        )
        counted = parts_of(valid, case, groups, torch.bool)
        found = compare_parts(host_ops, case, True, activation, counted, groups)
        cuda_host.cuda_host_launches()
        call_parts(host_ops, case, True, activation, counted, groups)
        count = reference.group_count(shape[0], groups)
        launches = cuda_host.cuda_host_launches()
        assert launches % count == 0 and launches // count in (2, 4, 6, 7)  # one each way, or 3 or 4, or one way so
        for order in (1, 2):  # no bit depends on it
            cuda_host.cuda_host_set_order(order)
            again = call_parts(host_ops, case, True, activation, counted, groups)
            cuda_host.cuda_host_set_order(0)
            for name, value in found.items():
                assert value is None or torch.equal(value.nan_to_num(), again[name].nan_to_num()), name


def test_a_ghost_batch_is_a_batch_of_its_own(host_ops):
    """The bits of a call for each, but for what is summed over them."""
    case = Case((10, 16, 5, 5), torch.float32, residual=True)
    whole = call_parts(host_ops, case, True, RELU, None, 3)
    for i, begin in enumerate(range(0, 10, 4)):
        part = Case((10, 16, 5, 5), torch.float32, residual=True)
        for name in ("x", "grad", "residual"):
            setattr(part, name, getattr(case, name)[begin : begin + 4])
        alone = call_parts(host_ops, part, True, RELU, None, 1)
        for name in ("output", "grad_input", "grad_residual"):
            assert torch.equal(whole[name][begin : begin + 4], alone[name]), name
        assert torch.equal(whole["statistics"][:, 16 * i : 16 * i + 16], alone["statistics"])


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "layout"), [((4096, 8), None), ((8, 4, 2048), None), ((8, 16, 512), last)])
def test_sums_of_gradients_keep_what_float_would_round_off(kernels, shape, layout, dtype):
    """Large gradients that cancel in pairs a step apart, and small ones: a float's sum is wrong in every digit."""
    case = Case(shape, dtype, layout)
    size, rest = 1 << 20, case.grad.clone()
    for part, sign in ((case.grad[: shape[0] // 2], 1), (case.grad[shape[0] // 2 :], -1)):
        part.copy_(part + sign * size)
    _, (_, _, grad_weight, grad_bias) = run(kernels, case)
    x, grad = case.x.double(), case.grad.double()
    dims = [d for d in range(x.dim()) if d != 1]
    xhat = (x - x.mean(dims, keepdim=True)) * (x.var(dims, keepdim=True, unbiased=False) + 1e-5).rsqrt()
    eps = torch.finfo(dtype).eps
    exact = grad.sum(dims)
    torch.testing.assert_close(grad_bias.double(), exact, rtol=2 * eps, atol=1e-4 * rest.double().abs().max())
    weight = (grad * xhat).sum(dims)
    torch.testing.assert_close(grad_weight.double(), weight, rtol=8 * eps, atol=size * x.numel() * 2**-40)

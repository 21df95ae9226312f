"""Cross-entropy's options: PyTorch's against PyTorch, ours against their formulas, and both under the transforms."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without
from cross_entropy_formulas import DTYPES, as_dense, draw, formula, layouts
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.testing import assert_no_worse_than

ALL = dict(z_loss=0.01, logit_scale=0.7, softcap=5.0, label_smoothing=0.1)


def run(function, x, upstream=None, others=()):
    x = x.detach().requires_grad_()
    others = [o.detach().requires_grad_() for o in others]
    loss = function(x, *others)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *others], upstream)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 33, 300, 1025])
@pytest.mark.parametrize("case", ["weight", "smoothing", "both", "dense", "dense, both"])
def test_error_rule_against_eager(case, classes, dtype):
    """PyTorch's error is the largest one over the layouts of the same logits.

    It rounds lse to the dtype of the logits, so that its gradients are off by up to half a unit in the last place of
    lse, or by nothing, as the few rows happen to fall; which they do differently for each instruction set.
    """
    torch.manual_seed(classes)
    x = (torch.randn(60, classes) * 4).to(dtype)
    weight = (torch.rand(classes) + 0.3).to(dtype)
    found = []
    for (layout, logits), reduction in itertools.product(layouts(x).items(), ("mean", "sum", "none")):
        target = draw("dense" if "dense" in case else "index", logits.shape, dtype)
        options = {"reduction": reduction, "label_smoothing": 0.1 if case not in ("weight", "dense") else 0.0}
        wanted = [target] if "dense" in case else []

        def call(function, x, *others, target=target, options=options, wide=torch.Tensor.clone):
            given = {**options, "weight": wide(weight)} if "weight" in case or "both" in case else options
            return function(x, others[0] if others else target, **given)

        shape = (logits.size(0), *logits.shape[2:]) if reduction == "none" else ()
        upstream = torch.linspace(0.5, 2, math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype)
        wide = torch.Tensor.double
        ours = run(lambda x, *o: call(fused_ops.cross_entropy, x, *o), logits, upstream, wanted)
        eager = run(lambda x, *o: call(F.cross_entropy, x, *o), logits, upstream, wanted)
        truth = run(
            lambda x, *o: call(F.cross_entropy, x, *o, wide=torch.Tensor.double),
            wide(logits),
            wide(upstream),
            [wide(w) for w in wanted],
        )
        for name, mine, theirs, exact in zip(("loss", "grad", "grad_target"), ours, eager, truth, strict=False):
            if dtype == torch.float64:
                torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)
            else:
                found.append(((name, reduction), layout, mine, theirs, exact))
    errors = {}
    for key, _, _, theirs, exact in found:
        error = (theirs.double() - exact).abs().nan_to_num(0.0, 0.0)
        errors[key] = max(errors.get(key, 0.0), float(error.max()))
    for key, layout, mine, theirs, exact in found:
        assert_no_worse_than(mine, theirs, exact, f"{key}, {layout}", errors[key])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opinfo_samples(dtype):
    """PyTorch's own samples: values and gradients by the error rule, in every dtype."""
    info = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
    seen = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        x, target = sample.input, sample.args[0]
        if sample.kwargs.get("reduction") == "mean" and x.numel() == 0:
            continue

        def call(function, x, cast, target=target, kwargs=sample.kwargs):
            def convert(v):
                return cast(v).detach() if isinstance(v, torch.Tensor) and v.is_floating_point() else v

            return function(x, convert(target), **{k: convert(v) for k, v in kwargs.items()})

        shape = call(F.cross_entropy, x.detach(), lambda v: v).shape
        upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
        ours = run(lambda x: call(fused_ops.cross_entropy, x, lambda v: v), x, upstream)
        eager = run(lambda x: call(F.cross_entropy, x, lambda v: v), x, upstream)
        truth = run(lambda x: call(F.cross_entropy, x, torch.Tensor.double), x.double(), upstream.double())
        for mine, theirs, exact in zip(ours, eager, truth, strict=True):
            assert mine.dtype == theirs.dtype
            if dtype == torch.float64:
                torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11, equal_nan=True)
            else:
                assert_no_worse_than(mine, theirs, exact, str(sample))
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["index", "dense", "sparse", "mixup"])
@pytest.mark.parametrize(
    "option", ["none", "z_loss", "logit_scale", "softcap", "label_smoothing", "mask", "masks", "all"]
)
def test_options_against_their_formula(option, kind, dtype):
    options = {option: ALL[option]} if option in ALL else dict(ALL) if option == "all" else {}
    x = (torch.randn(30, 37, dtype=torch.float64) * 3).to(dtype)
    for layout, logits in layouts(x).items():
        target = draw(kind, logits.shape, dtype)
        if option in ("mask", "masks", "all"):
            mask = torch.rand(37 if option != "masks" else logits.shape) > 0.4
            mask.select(0 if mask.dim() == 1 else 1, 0).fill_(True)
            mask.narrow(0 if mask.dim() == 1 else 1, 0, 13).fill_(True)
            options = {**options, "class_mask": mask}
            if kind == "dense":
                spread = mask.reshape(-1, *(1,) * (logits.dim() - 2)) if mask.dim() == 1 else mask
                target = target * spread
        upstream = torch.randn(logits.size(0), *logits.shape[2:], dtype=torch.float64).to(dtype)
        ours = run(
            lambda x, t=target, o=options: fused_ops.cross_entropy(x, t, reduction="none", **o), logits, upstream
        )
        truth = run(lambda x, t=target, o=options: formula(x, t, **o), logits.double(), upstream.double())
        tolerance = {8: 1e-12, 4: 3e-6, 2: 2 * torch.finfo(dtype).eps}[dtype.itemsize]
        for name, mine, exact in zip(("loss", "grad"), ours, truth, strict=True):
            scale = exact.abs().clamp(min=1.0)
            assert mine.dtype == dtype and bool(((mine.double() - exact).abs() <= tolerance * scale).all()), (
                layout,
                name,
            )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "dense", "sparse", "mixup"])
def test_weights_of_tokens_and_the_mean(kind, reduction):
    x = torch.randn(15, 20, dtype=torch.float64)
    target, token = draw(kind, x.shape, x.dtype), torch.rand(15, dtype=torch.float64)
    weight = torch.rand(20, dtype=torch.float64)
    rows = formula(x, target, weight)
    dense, valid = as_dense(target, x.shape)
    per_row = {
        "index": (dense * weight).sum(1),
        "mixup": (dense * weight).sum(1),
        "dense": torch.ones(15),
        "sparse": valid,
    }
    counts = per_row[kind].double()
    expected = {
        "none": rows * token,
        "sum": (rows * token).sum(),
        "mean": (rows * token).sum() / (counts * token).sum(),
    }
    ours = fused_ops.cross_entropy(x, target, weight, reduction=reduction, token_weight=token)
    torch.testing.assert_close(ours, expected[reduction])
    if reduction == "mean":
        for normalizer in (7, torch.tensor(7.0), torch.tensor([7])):
            ours = fused_ops.cross_entropy(x, target, weight, normalizer=normalizer)
            torch.testing.assert_close(ours, rows.sum() / 7)


def test_mixup_is_the_mix_of_two_losses():
    x, a, b = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 5, (8,)), torch.randint(0, 5, (8,))
    expected = 0.3 * F.cross_entropy(x, a) + 0.7 * F.cross_entropy(x, b)
    torch.testing.assert_close(fused_ops.cross_entropy(x, (a, b, 0.3)), expected)
    torch.testing.assert_close(fused_ops.cross_entropy(x, [a.int(), b, torch.full((8,), 0.3)]), expected)


def test_gradient_accumulation_with_a_normalizer_is_one_batch():
    x, target = torch.randn(12, 5, requires_grad=True), torch.randint(0, 5, (12,))
    target[:5] = -100
    whole = torch.autograd.grad(fused_ops.cross_entropy(x, target), x)[0]
    count = (target != -100).sum()
    losses = [fused_ops.cross_entropy(x[i : i + 4], target[i : i + 4], normalizer=count) for i in range(0, 12, 4)]
    torch.testing.assert_close(torch.autograd.grad(sum(losses), x)[0], whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "spatial", "class stride"])
def test_outputs(layout, dtype):
    x = layouts((torch.randn(30, 37, dtype=torch.float64) * 3).to(dtype))[layout]
    target = draw("index", x.shape, dtype)
    out = fused_ops.cross_entropy(x, target, z_loss=0.1, return_outputs=True)
    assert isinstance(out, fused_ops.CrossEntropyOutput)
    log_p, valid, wide = x.double().log_softmax(1), target != -100, x.double()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    expected = {
        "lse": wide.logsumexp(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "target_log_probability": torch.where(valid, log_p.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1), 0.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value.to(acc), rtol=2e-6, atol=2e-6)
    assert torch.equal(out.prediction, x.argmax(1)) and torch.equal(out.correct, x.argmax(1) == target)
    z = 0.1 * expected["lse"][valid].square().mean()
    torch.testing.assert_close(out.z_loss, z.to(dtype))
    torch.testing.assert_close(out.loss, (F.cross_entropy(wide, target) + z).to(dtype))
    other = fused_ops.cross_entropy(x, x.softmax(1), return_outputs=True)
    assert other.correct is None and other.target_log_probability is None
    assert torch.equal(other.prediction, out.prediction)


def test_prediction_of_ties_and_nans_is_argmax():
    x = torch.randn(50, 1500).round()
    x[3, 700] = x[4, 1200] = float("nan")
    x[5] = -float("inf")
    out = fused_ops.cross_entropy(x, torch.zeros(50, dtype=torch.int64), reduction="none", return_outputs=True)
    assert torch.equal(out.prediction, x.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_huge_logits(kind, scale, dtype):
    if dtype == torch.float16:
        scale = 1e4
    x = (torch.randn(15, 37, dtype=torch.float64) * scale).to(dtype)
    target, weight = draw(kind, x.shape, dtype), (torch.rand(37) + 0.3).to(dtype)
    ours, eager, truth = (
        run(lambda x, f=f, t=t, w=w: f(x, t, w, label_smoothing=0.1, reduction="sum"), v)
        for f, v, t, w in (
            (fused_ops.cross_entropy, x, target, weight),
            (F.cross_entropy, x, target, weight),
            (F.cross_entropy, x.double(), target.double() if kind == "dense" else target, weight.double()),
        )
    )
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)
        else:
            assert_no_worse_than(mine, theirs, exact)


def test_a_confident_target_keeps_its_gradient():
    x = torch.tensor([[8.0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bfloat16)
    grad = run(
        lambda x: fused_ops.cross_entropy(x, torch.tensor([0]), torch.ones(8).bfloat16() * 2, reduction="sum"), x
    )[1]
    rest = 7 * math.exp(-8)
    torch.testing.assert_close(grad[0, 0].item(), -2 * rest / (1 + rest), rtol=0.01, atol=0)


@pytest.mark.parametrize("case", ["masked", "nan", "inf", "all masked", "ignored nan"])
@pytest.mark.parametrize("kind", ["index", "dense"])
@pytest.mark.parametrize("layout", ["contiguous", "spatial"])
def test_not_finite_as_pytorch(layout, kind, case):
    x = torch.randn(15, 9, dtype=torch.float64)
    inf = float("inf")
    if case == "masked":
        x[2, 4] = -inf
    elif case == "all masked":
        x[2] = -inf
    else:
        x[0 if case == "ignored nan" else 2, 4] = inf if case == "inf" else float("nan")
    x = layouts(x)[layout]
    target = draw(kind, x.shape, x.dtype)
    for smoothing in (0.0, 0.1):
        options = dict(reduction="none", label_smoothing=smoothing, weight=torch.ones(9, dtype=x.dtype))
        ones = torch.ones(x.size(0), *x.shape[2:], dtype=x.dtype)
        ours = run(lambda x, o=options: fused_ops.cross_entropy(x, target, **o), x, ones)
        theirs = run(lambda x, o=options: F.cross_entropy(x, target, **o), x, ones)
        if case == "ignored nan" and kind == "index":  # theirs is NaN in a row that does not count
            theirs[1] = torch.where((target == -100).unsqueeze(1), 0.0, theirs[1])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


def test_masked_classes_are_as_good_as_gone():
    x, target = torch.randn(6, 10, dtype=torch.float64), torch.tensor([0, 1, 2, 0, -100, 1])
    mask = torch.tensor([True] * 3 + [False] * 7)
    for smoothing in (0.0, 0.2):
        x[:, 5] = float("nan")
        ours = run(lambda x, s=smoothing: fused_ops.cross_entropy(x, target, class_mask=mask, label_smoothing=s), x)
        few = run(lambda x, s=smoothing: F.cross_entropy(x, target, label_smoothing=s), x[:, :3])
        torch.testing.assert_close(ours[0], few[0])
        torch.testing.assert_close(ours[1][:, :3], few[1])
        assert bool((ours[1][:, 3:] == 0).all())
    lost = fused_ops.cross_entropy(x, torch.full((6,), 4), class_mask=mask, reduction="none")
    assert bool((lost == float("inf")).all())


def test_empty():
    x, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    assert fused_ops.cross_entropy(x, target, label_smoothing=0.1).isnan()
    loss = fused_ops.cross_entropy(x, target, empty="zero", z_loss=0.1)
    assert loss == 0 and bool((torch.autograd.grad(loss, x)[0] == 0).all())
    with pytest.raises(ValueError, match="nothing counts"):
        fused_ops.cross_entropy(x, target, empty="raise")
    target[0] = 1
    for empty in ("zero", "raise"):
        torch.testing.assert_close(fused_ops.cross_entropy(x, target, empty=empty), F.cross_entropy(x, target))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
@pytest.mark.parametrize("kind", ["index", "dense"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_batches_as_pytorch(reduction, kind, shape):
    x = torch.randn(shape)
    target = x.softmax(1) if kind == "dense" else torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    for options in ({"label_smoothing": 0.1}, {"weight": torch.ones(3)}):
        ours, theirs = (
            run(lambda x, f=f, o=options: f(x, target, reduction=reduction, **o).sum(), x)
            for f in (fused_ops.cross_entropy, F.cross_entropy)
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


BAD = {
    "weight too long": lambda f, x, t: f(x, t, torch.ones(4)),
    "weight too long, probabilities": lambda f, x, t: f(x, x, torch.ones(4)),
    "weight of another dtype": lambda f, x, t: f(x, t, torch.ones(3).double()),
    "weight that requires grad": lambda f, x, t: f(x, t, torch.ones(3, requires_grad=True)),
    "smoothing 1.5": lambda f, x, t: f(x, t, label_smoothing=1.5),
    "smoothing, out of range": lambda f, x, t: f(x, t + 7, label_smoothing=0.1),
    "int probabilities": lambda f, x, t: f(x, torch.ones(2, 3, dtype=torch.int64)),
    "float indices": lambda f, x, t: f(x, t.float(), label_smoothing=0.1),
    "bool indices": lambda f, x, t: f(x, t.bool(), label_smoothing=0.1),
    "ignore_index with probabilities": lambda f, x, t: f(x, x, ignore_index=1),
    "batch mismatch": lambda f, x, t: f(x, torch.zeros(5, dtype=torch.int64), torch.ones(3)),
    "extra dimension": lambda f, x, t: f(x, t.unsqueeze(1), torch.ones(3)),
    "reduction": lambda f, x, t: f(x, t, torch.ones(3), reduction="avg"),
    "None target": lambda f, x, t: f(x, None, torch.ones(3)),
    "list input": lambda f, x, t: f([1.0], t, torch.ones(3)),
    "int input": lambda f, x, t: f(x.long(), t, torch.ones(3).long()),
    "weight a list": lambda f, x, t: f(x, t, [1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_have_pytorchs_type(case):
    x, target = torch.randn(2, 3), torch.tensor([0, 2])
    with pytest.raises(Exception) as theirs:
        BAD[case](F.cross_entropy, x, target)
    with pytest.raises(theirs.type):
        BAD[case](fused_ops.cross_entropy, x, target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": -1.0}, ValueError, "softcap must be finite and above 0"),
        ({"softcap": float("nan")}, ValueError, "softcap"),
        ({"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale"),
        ({"z_loss": "a"}, TypeError, "z_loss"),
        ({"z_loss": float("inf")}, ValueError, "z_loss"),
        ({"token_weight": torch.ones(3)}, RuntimeError, r"token_weight of shape \[2\], got \[3\]"),
        ({"class_mask": torch.ones(3)}, RuntimeError, "class_mask of dtype"),
        ({"class_mask": torch.ones(4, dtype=torch.bool)}, RuntimeError, "class_mask of shape"),
        ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer"),
        ({"normalizer": torch.ones(2)}, RuntimeError, "normalizer"),
        ({"empty": "no"}, ValueError, "empty must be one of"),
        ({"loss_dtype": torch.int64}, TypeError, "loss_dtype"),
        ({"target": (torch.tensor([0, 1]),)}, TypeError, "2 or 3 entries"),
        ({"target": (torch.tensor([0, 1]), torch.ones(2))}, RuntimeError, r"indices of shape \[2, -1\]"),
        ({"target": (torch.tensor([[0], [1]]), torch.ones(2, 2))}, RuntimeError, "probabilities"),
        ({"target": (torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(5))}, RuntimeError, "lam"),
        ({"target": (torch.tensor([0, 1]), torch.tensor([0, 9]), 0.5)}, IndexError, "Target 9 is out of bounds"),
        ({"target": (torch.tensor([[0], [-3]]), torch.ones(2, 1))}, IndexError, "Target -3 is out of bounds"),
    ],
)
def test_errors_of_our_own(options, error, message):
    options = {"target": torch.tensor([0, 2]), **options}
    with pytest.raises(error, match=message):
        fused_ops.cross_entropy(torch.randn(2, 3), **options)


def test_legacy_reduction_arguments():
    x, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for options in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="reduction"):
            ours = fused_ops.cross_entropy(x, target, **options)
        with pytest.warns(UserWarning, match="reduction"):
            torch.testing.assert_close(ours, F.cross_entropy(x, target, **options))
    torch.testing.assert_close(
        fused_ops.cross_entropy(x, target, torch.ones(3), None, 1, None, "sum", 0.1),
        F.cross_entropy(x, target, torch.ones(3), None, 1, None, "sum", 0.1),
    )


@pytest.mark.parametrize("smoothing", [-0.1, float("nan"), torch.tensor(0.1), 1.0])
def test_odd_smoothing_as_pytorch(smoothing):
    x, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    ours, theirs = (f(x, target, label_smoothing=smoothing) for f in (fused_ops.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("input", "target", "weight"),
    [(i, t, w) for i in ("f", "d", "b") for t in ("f", "d", "h") for w in (None, "f", "d")],
)
def test_result_dtype_of_probabilities_as_pytorch(input, target, weight):
    kinds = {"f": torch.float32, "d": torch.float64, "b": torch.bfloat16, "h": torch.float16}
    x, t = torch.randn(4, 3).to(kinds[input]), torch.rand(4, 3).to(kinds[target])
    w = None if weight is None else torch.rand(3).to(kinds[weight])
    ours, theirs = fused_ops.cross_entropy(x, t, w), F.cross_entropy(x, t, w)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)


def general(x, target):
    return fused_ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1, softcap=3.0)


def plain_general(x, target):
    u = 3 * torch.tanh(x / 3)
    return F.cross_entropy(u, target, label_smoothing=0.1) + 0.1 * u.logsumexp(-1).square().mean()


@pytest.mark.parametrize("transform", ["grad", "hessian", "jacrev", "jacfwd"])
def test_torch_func(transform):
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 3, 0])
    ours, theirs = (getattr(torch.func, transform)(lambda x, f=f: f(x, target))(x) for f in (general, plain_general))
    torch.testing.assert_close(ours, theirs)


def test_vmap():
    x, target = torch.randn(5, 3, 4, dtype=torch.float64), torch.randint(0, 4, (5, 3))
    for f, g in ((general, plain_general), (torch.func.grad(general), torch.func.grad(plain_general))):
        torch.testing.assert_close(torch.vmap(f)(x, target), torch.vmap(g)(x, target))


@pytest.mark.parametrize("kind", ["index", "dense", "sparse", "mixup"])
def test_compiled_as_one_graph(kind):
    x = torch.randn(10, 6, requires_grad=True)
    target, weight = draw(kind, x.shape, x.dtype), torch.rand(6)

    def f(x):
        out = fused_ops.cross_entropy(x * 2, target, weight, z_loss=0.1, return_outputs=True, label_smoothing=0.1)
        return out.loss + out.entropy.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(f(x), x)[0])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_export(options):
    class Model(torch.nn.Module):
        def forward(self, x, target):
            return fused_ops.cross_entropy(x, target, **options)

    x, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    batch = torch.export.Dim("batch", min=2, max=1 << 20)
    program = torch.export.export(Model(), (x, target), dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    assert any("fused_ops.cross_entropy" in str(node.target) for node in program.graph.nodes)
    x, target = torch.randn(9, 5), torch.randint(0, 5, (9,))
    torch.testing.assert_close(program.module()(x, target), F.cross_entropy(x, target, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_autocast_as_pytorch(kind, dtype):
    x = torch.randn(10, 6).to(dtype).requires_grad_()
    target = draw(kind, x.shape, dtype)
    for enabled in (True, False):
        results = []
        for f in (fused_ops.cross_entropy, F.cross_entropy):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = f(x, target, label_smoothing=0.1), f(x, target)
            results.append([*loss, *torch.autograd.grad(sum(loss), x)])
        for mine, theirs in zip(*results, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


def test_loss_dtype():
    x, target = torch.randn(10, 600).bfloat16(), torch.randint(0, 600, (10,))
    for options in ({}, {"label_smoothing": 0.1}):
        loss = fused_ops.cross_entropy(x, target, loss_dtype=torch.float32, **options)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, F.cross_entropy(x.float(), target, **options))


def test_checkpoint_and_hooks():
    x, target, seen = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        loss = general(x, target)
    assert seen.count(x.shape) == 1
    again = checkpoint(general, x, target, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(again, x)[0])


@pytest.mark.parametrize("kind", ["index", "dense", "sparse", "mixup"])
@pytest.mark.parametrize("layout", ["contiguous", "spatial", "transposed"])
def test_in_place(layout, kind):
    leaf = layouts(torch.randn(30, 37))[layout].requires_grad_()
    target = draw(kind, leaf.shape, leaf.dtype)
    logits = leaf * 1
    loss = fused_ops.cross_entropy(logits, target, label_smoothing=0.1, inplace_backward=True)
    ours = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    expected = torch.autograd.grad(fused_ops.cross_entropy(leaf, target, label_smoothing=0.1), leaf)[0]
    assert torch.equal(ours, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
    logits = leaf * 1
    loss = fused_ops.cross_entropy(logits, target, label_smoothing=0.1, inplace_backward=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="leaf"):
        fused_ops.cross_entropy(leaf, target, label_smoothing=0.1, inplace_backward=True)


@pytest.mark.parametrize("layout", ["contiguous", "spatial", "channels last"])
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_threads_and_batch_splits_do_not_change_a_bit(kind, layout):
    x = layouts(torch.randn(1200, 300))[layout]
    target = draw(kind, x.shape, x.dtype)

    def rows(x, target):
        out = fused_ops.cross_entropy(x, target, reduction="none", return_outputs=True, **ALL)
        grad = run(lambda x: fused_ops.cross_entropy(x, target, reduction="none", **ALL).sum(), x)[1]
        return out.loss, out.lse, out.entropy, grad

    torch.set_num_threads(1)
    one = rows(x, target)
    mean = fused_ops.cross_entropy(x, target, **ALL, loss_dtype=torch.float64)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, rows(x, target), strict=True))
        assert torch.equal(mean, fused_ops.cross_entropy(x, target, **ALL, loss_dtype=torch.float64))
    for part in (slice(0, 1), slice(3, 20)):
        some = rows(x[part], target[part])
        assert all(torch.equal(a[part], b) for a, b in zip(one, some, strict=True))


def test_the_sum_of_many_rows_does_not_depend_on_the_threads():
    x, target = torch.randn(70001, 3), torch.randint(0, 3, (70001,))
    seen = set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        seen.add(fused_ops.cross_entropy(x, target, label_smoothing=0.1, loss_dtype=torch.float64).item())
    assert len(seen) == 1


def test_no_gradient_where_none_is_needed():
    x, target = torch.randn(4, 3), torch.rand(4, 3).requires_grad_()
    fused_ops.cross_entropy(x, target).backward()
    torch.testing.assert_close(target.grad, -x.log_softmax(1) / 4)
    out = fused_ops.cross_entropy(x.clone().requires_grad_(), torch.tensor([0, 1, 2, 0]), return_outputs=True)
    assert not out.prediction.requires_grad and out.entropy.requires_grad and out.lse.requires_grad


def test_module():
    weight, x, target = torch.rand(5), torch.randn(7, 5), torch.randint(0, 5, (7,))
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    ours = fused_ops.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert isinstance(ours, torch.nn.CrossEntropyLoss) and ours.state_dict().keys() == theirs.state_dict().keys()
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x, target), theirs(x, target))
    assert repr(ours) == "CrossEntropyLoss(ignore_index=2, reduction='sum', label_smoothing=0.1)"
    loss = fused_ops.CrossEntropyLoss(z_loss=0.1, class_mask=torch.tensor([True] * 4 + [False]), return_outputs=True)
    target = target % 4
    expected = fused_ops.cross_entropy(x, target, z_loss=0.1, class_mask=loss.class_mask)
    torch.testing.assert_close(loss(x, target, token_weight=torch.ones(7)).loss, expected)
    assert list(loss.state_dict()) == []
    old = fused_ops.CrossEntropyLoss.__new__(fused_ops.CrossEntropyLoss)
    old.__setstate__(theirs.__getstate__())
    torch.testing.assert_close(old(x, target), theirs(x, target))


ISA_CODE = """
import torch, fused_ops.core.library as library
import fused_ops
from fused_ops.ops.cross_entropy import rows_reference as reference
assert library.isa() == {isa!r}
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in ((9, 1500), (9, 27), (3, 21, 37)):
        x, rows = (torch.randn(shape) * 3).to(dtype), (shape[0], *shape[2:])
        weight, mask = torch.rand(shape[1]).to(dtype), torch.rand(shape[1]) > 0.2
        for target in ((torch.randint(0, shape[1], rows), None), (None, x.softmax(1))):
            args, numbers = (x, *target, weight, mask), (-100, 0.1, 0.7, 5.0, True)
            ours = torch.ops.fused_ops.cross_entropy_rows_forward(*args, *numbers)
            tol = 1e-10 if dtype == torch.float64 else 2e-4
            for a, b in zip(ours, reference.forward(*args, *numbers)):
                torch.testing.assert_close(a, b, rtol=tol, atol=tol)
            g = [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
            saved = (*g, None, *args, ours[1], ours[2], ours[4], *numbers)
            tol = tol if dtype.itemsize > 2 else 2e-2
            grad = torch.ops.fused_ops.cross_entropy_rows_backward(*saved)
            torch.testing.assert_close(grad, reference.backward(*saved), rtol=tol, atol=tol)
"""


@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
@pytest.mark.parametrize(("capability", "isa"), [("default", "DEFAULT"), ("avx2", "AVX2"), ("avx512", "AVX512")])
def test_every_isa(capability, isa, run_python):
    skip_without(isa)
    run_python("-c", ISA_CODE.format(isa=isa), ATEN_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_their_reference(dtype):
    """Every combination of target, weight, smoothing, mask, scale, cap and outputs, in every layout."""
    from fused_ops.ops.cross_entropy import rows_reference as reference

    grid = itertools.product(("index", "dense", "sparse"), (0, 1), (0.0, 0.1), (0, 1, 2), (0.0, 4.0), (False, True))
    x = (torch.randn(30, 37) * 3).to(dtype)
    for (kind, weighted, smoothing, masks, cap, statistics), (layout, logits) in itertools.product(
        grid, layouts(x).items()
    ):
        target = draw(kind, logits.shape, dtype)
        indices, probabilities = {"index": (target, None), "dense": (None, target)}.get(kind, target)
        weight = torch.rand(37).to(dtype) if weighted else None
        mask = None if not masks else torch.rand(37 if masks == 1 else logits.shape) > 0.3
        args, numbers = (logits, indices, probabilities, weight, mask), (-100, smoothing, 0.5, cap, statistics)
        ours, expected = (
            torch.ops.fused_ops.cross_entropy_rows_forward(*args, *numbers),
            reference.forward(*args, *numbers),
        )
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        for mine, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        rows = [torch.randn_like(ours[0]) for _ in range(4)]
        grads = (rows[0], rows[1], rows[2] if statistics else None, rows[3] if statistics else None)
        saved = (*grads, *args, expected[1], expected[2], expected[4], *numbers)
        mine, other = (f(*saved) for f in (torch.ops.fused_ops.cross_entropy_rows_backward, reference.backward))
        tolerance = {8: 1e-10, 4: 1e-5, 2: 2e-2}[dtype.itemsize]
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert mine.stride() == other.stride(), layout


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_ignore_index_beyond_the_range_of_the_indices(dtype):
    """-100 as uint8 is 156, and 300 as int8 is 44: no class of that number may be dropped."""
    klass, ignored = (156, -100) if dtype == torch.uint8 else (44, 300)
    x, target = torch.randn(3, 200, requires_grad=True), torch.tensor([klass, 3, 7])
    hidden, head = torch.randn(3, 5), torch.randn(200, 5)
    for options in ({}, {"z_loss": 0.1}, {"label_smoothing": 0.1}):
        ours, expected = (
            fused_ops.cross_entropy(x, t, ignore_index=ignored, **options) for t in (target.to(dtype), target)
        )
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(expected, x)[0])
        heads = [
            fused_ops.linear_cross_entropy(hidden, head, t, ignore_index=ignored, chunk_rows=2, **options)
            for t in (target.to(dtype), target)
        ]
        torch.testing.assert_close(*heads)
    tangent = torch.randn_like(x)
    ours, expected = (
        torch.func.jvp(lambda x, t=t: fused_ops.cross_entropy(x, t, ignore_index=ignored), (x,), (tangent,))[1]
        for t in (target.to(dtype), target)
    )
    torch.testing.assert_close(ours, expected)
    sparse = (target.to(dtype).unsqueeze(1), torch.ones(3, 1))
    torch.testing.assert_close(
        fused_ops.cross_entropy(x, sparse, ignore_index=ignored),
        fused_ops.cross_entropy(x, target, ignore_index=ignored),
    )

"""Linear cross-entropy: the error budget of every option in every dtype, and what the products cost."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused_ops

ROWS, FEATURES, CLASSES = 24, 8, 50


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = {"input": (ROWS, FEATURES), "weight": (CLASSES, FEATURES), "bias": (CLASSES,)}
    shapes |= {"a": (2, FEATURES), "b": (CLASSES, 2)}
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    target = torch.randint(0, CLASSES, (ROWS,), generator=g)
    target[::5] = -100
    fixed = {
        "target": target,
        "rows": torch.rand(ROWS, generator=g).to(dtype) + 0.5,
        "classes": torch.rand(CLASSES, generator=g).to(dtype) + 0.5,
        "dense": torch.randn(ROWS, CLASSES, generator=g).softmax(1).to(dtype),
        "mask": (torch.arange(CLASSES) % 7 != 3).index_fill(0, target.clamp(min=0), True),
    }
    return tensors, fixed


def as_rows(z, f, **options):
    return F.cross_entropy(z, f["target"], reduction="none", **options)


def squared_lse(z, f):
    return z.float().logsumexp(1).square().to(z.dtype) if z.dtype.itemsize == 2 else z.logsumexp(1).square()


def counted(f):
    return f["target"] != -100


# name: (our options, the rows' losses of eager logits, what they are divided by)
CASES = {
    "plain": (lambda f: {}, lambda z, f: as_rows(z, f), lambda f: counted(f).sum()),
    "label_smoothing": (
        lambda f: {"label_smoothing": 0.1},
        lambda z, f: as_rows(z, f, label_smoothing=0.1),
        lambda f: counted(f).sum(),
    ),
    "weight": (
        lambda f: {"weight": f["classes"]},
        lambda z, f: as_rows(z, f, weight=f["classes"]),
        lambda f: (f["classes"][f["target"].clamp(min=0)] * counted(f)).sum(),
    ),
    "probabilities": (
        lambda f: {"target": f["dense"]},
        lambda z, f: F.cross_entropy(z, f["dense"], reduction="none"),
        lambda f: ROWS,
    ),
    "z_loss": (
        lambda f: {"z_loss": 0.01},
        lambda z, f: as_rows(z, f) + 0.01 * squared_lse(z, f) * counted(f),
        lambda f: counted(f).sum(),
    ),
    "logit_scale": (
        lambda f: {"logit_scale": 0.7},
        lambda z, f: as_rows(z * 0.7, f),
        lambda f: counted(f).sum(),
    ),
    "softcap": (
        lambda f: {"softcap": 5.0},
        lambda z, f: as_rows(5 * (z / 5).tanh(), f),
        lambda f: counted(f).sum(),
    ),
    "token_weight": (
        lambda f: {"token_weight": f["rows"]},
        lambda z, f: as_rows(z, f) * f["rows"],
        lambda f: (f["rows"] * counted(f)).sum(),
    ),
    "normalizer": (lambda f: {"normalizer": 7.0}, lambda z, f: as_rows(z, f), lambda f: 7.0),
    "class_mask": (
        lambda f: {"class_mask": f["mask"]},
        lambda z, f: as_rows(z.masked_fill(~f["mask"], -torch.inf), f),
        lambda f: counted(f).sum(),
    ),
    "lora": (lambda f: {"lora": True}, lambda z, f: as_rows(z, f), lambda f: counted(f).sum()),
}


def fused(t, f, options, chunk_rows):
    options = {"target": f["target"], **options}
    if options.pop("lora", False):
        options["lora"] = (t["a"], t["b"], 0.5)
    return fused_ops.linear_cross_entropy(
        t["input"], t["weight"], options.pop("target"), linear_bias=t["bias"], chunk_rows=chunk_rows, **options
    )


def eager(t, f, case):
    options, rows, total = CASES[case]
    z = F.linear(t["input"], t["weight"], t["bias"])
    if "lora" in options(f):
        z = z + 0.5 * t["input"] @ t["a"].t() @ t["b"].t()
    return rows(z, f).sum() / total(f)


def results(function, tensors, case, upstream):
    names = [*tensors] if case == "lora" else ["input", "weight", "bias"]
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    loss = function(leaves)
    grads = torch.autograd.grad(loss, [leaves[n] for n in names], torch.tensor(upstream, dtype=loss.dtype))
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype, chunk_rows):
    """As far from float64 as eager, in the sum of squares, and one rounding."""
    tensors, fixed = inputs(dtype)
    wide = {n: t.double() for n, t in tensors.items()}
    wide_fixed = {n: t.double() if t.is_floating_point() else t for n, t in fixed.items()}
    options = CASES[case][0](fixed)
    for upstream in (1.0, 3.0):
        ours = results(lambda t: fused(t, fixed, options, chunk_rows), tensors, case, upstream)
        theirs = results(lambda t: eager(t, fixed, case), tensors, case, upstream)
        exact = results(lambda t: eager(t, wide_fixed, case), wide, case, upstream)
        for name, truth in exact.items():
            error, allowed = ((v[name].double() - truth).norm() for v in (ours, theirs))
            rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)  # sums in another order
            assert error <= allowed + rounding * truth.norm(), (name, float(error), float(allowed))
            assert ours[name].dtype == dtype


@pytest.mark.parametrize("options", [{"chunk_rows": 64}, {"max_memory_bytes": 100_000}, {"reduction": "none"}])
def test_ignored_rows_cost_no_products(options, chunks_in_sight):
    """Half of the rows ignored: half of the multiplications."""
    rows, features, classes = 512, 32, 1500
    x, w = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    target = torch.randint(0, classes, (rows,))

    def of_addmm_(total, left, right, **_):  # which the counter does not know
        return 2 * left[0] * left[1] * right[1]

    def flops(target):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_addmm_}) as counter:
            fused_ops.linear_cross_entropy(x, w, target, **options).sum().backward()
        return counter.get_total_flops()

    half = target.clone()
    half[torch.randperm(rows)[: rows // 2]] = -100
    products = 2 * rows * features * classes
    assert 3 * products <= flops(target) <= 4 * products
    assert flops(half) <= flops(target) / 2


def test_shift_copies_no_hidden_states(chunks_in_sight):
    x, w = torch.randn(2, 300, 16), torch.randn(2000, 16, requires_grad=True)
    target = torch.randint(0, 2000, (2, 300))
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (16,) and out.shape[0] in (2, 600, 598):
                largest.append(out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())
            return out

    with Watch():
        fused_ops.linear_cross_entropy(x, w, target, shift=True, chunk_rows=64)
    assert all(largest)

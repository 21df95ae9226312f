"""torch.func.functionalize, before and behind the other transforms: values and gradients of PyTorch's own ops."""

import pytest
import torch
from torch.func import functionalize, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fused_ops


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


TARGET, CLASSES, SOFT = torch.tensor([0, 1, 2, 1]), drawn(6, 3), drawn(4, 3).softmax(1)
MANY, HEAD = torch.arange(600) % 70, drawn(70, 3)
WEIGHT, BIAS, MEAN, VAR = drawn(3), drawn(3) + 1, drawn(3) / 2, drawn(3).exp()


def scalar(y, x):
    """A sum that has a gradient."""
    return (y.square() * x).sum()


CASES = {  # ours, PyTorch's, rows of the input
    "ce": (lambda x: fused_ops.cross_entropy(x, TARGET), lambda x: F.cross_entropy(x, TARGET), 4),
    "ce none": (
        lambda x: fused_ops.cross_entropy(x, TARGET, reduction="none").prod(),
        lambda x: F.cross_entropy(x, TARGET, reduction="none").prod(),
        4,
    ),
    "ce soft": (
        lambda x: fused_ops.cross_entropy(x, SOFT, label_smoothing=0.1),
        lambda x: F.cross_entropy(x, SOFT, label_smoothing=0.1),
        4,
    ),
    "lce small": (
        lambda x: fused_ops.linear_cross_entropy(x, CLASSES, TARGET),
        lambda x: F.cross_entropy(x @ CLASSES.t(), TARGET),
        4,
    ),
    "lce chunks": (
        lambda x: fused_ops.linear_cross_entropy(x, HEAD, MANY, chunk_rows=100),
        lambda x: F.cross_entropy(x @ HEAD.t(), MANY),
        600,
    ),
    "bn": (
        lambda x: scalar(fused_ops.batch_norm(x, None, None, WEIGHT, BIAS, True), x),
        lambda x: scalar(F.batch_norm(x, None, None, WEIGHT, BIAS, True), x),
        4,
    ),
    "bn silu": (
        lambda x: scalar(fused_ops.batch_norm(x, None, None, WEIGHT, BIAS, True, activation="silu", residual=x), x),
        lambda x: scalar(F.silu(F.batch_norm(x, None, None, WEIGHT, BIAS, True) + x), x),
        4,
    ),
    "bn evaluation": (
        lambda x: scalar(fused_ops.batch_norm(x, MEAN, VAR, WEIGHT), x),
        lambda x: scalar(F.batch_norm(x, MEAN, VAR, WEIGHT), x),
        4,
    ),
}
TRANSFORMS = {
    "f": lambda f, x: functionalize(f)(x),
    "backward": lambda f, x: torch.autograd.grad(functionalize(f)(leaf := x.clone().requires_grad_()), leaf)[0],
    "of grad": lambda f, x: functionalize(grad(f))(x),
    "grad of": lambda f, x: grad(functionalize(f))(x),
    "of jvp": lambda f, x: functionalize(lambda y: jvp(f, (y,), (x.cos(),))[1])(x),
    "of vmap": lambda f, x: functionalize(vmap(f))(torch.stack((x, 2 * x))),
    "vmap of": lambda f, x: vmap(functionalize(f))(torch.stack((x, 2 * x))),
    "of per-sample gradients": lambda f, x: functionalize(vmap(grad(f)))(torch.stack((x, 2 * x))),
    "of hessian": lambda f, x: functionalize(hessian(f))(x),
    "without views": lambda f, x: functionalize(grad(f), remove="mutations_and_views")(x),
    "make_fx": lambda f, x: make_fx(functionalize(grad(f)))(x + 1)(x),
}


# Chunks of rows depend on the data (ignored rows are left out), which is not for make_fx; their hessian is large.
PAIRS = [(c, t) for c in CASES for t in TRANSFORMS if c != "lce chunks" or t not in ("make_fx", "of hessian")]


@pytest.mark.parametrize(("case", "transform"), PAIRS)
def test_functionalize(case, transform):
    ours, eager, rows = CASES[case]
    x = drawn(rows, 3)
    torch.testing.assert_close(TRANSFORMS[transform](ours, x), TRANSFORMS[transform](eager, x))


def test_running_statistics_are_updated():
    x, found = drawn(5, 3), {}
    for name, function in (("ours", fused_ops.batch_norm), ("PyTorch's", F.batch_norm)):
        mean, var = MEAN.clone(), VAR.clone()
        y = functionalize(lambda x, mean, var, function=function: function(x, mean, var, training=True))(x, mean, var)
        found[name] = y, mean, var
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_functions_of_others_are_left_to_pytorch():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.square()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

    with pytest.raises(RuntimeError, match="NYI: Functionalize rule for custom_function_call"):
        functionalize(Square.apply)(drawn(3))

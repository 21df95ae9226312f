"""Steps 1 to 3 of the walk-through: each derivation against autograd, as tables of (ours, reference) pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .by_hand import (
    TanhBackward,
    batch_norm_backward,
    cross_entropy_backward,
    staged_backward,
    tanh_one_rounding,
)
from .network import EPS, Parameters, staged_forward
from .training import IGNORE_INDEX, MEAN, ops

Pairs = dict[str, tuple[Tensor, Tensor]]

INTERMEDIATES = (  # in the order in which backpropagation reaches them
    *("logprobs", "probs", "counts_sum_inv", "counts_sum", "counts", "norm_logits", "logit_maxes", "logits"),
    *("h", "hpreact", "bnraw", "bnvar_inv", "bnvar", "bndiff2", "bndiff", "bnmeani", "hprebn", "embcat", "emb"),
)
GRADIENTS = (*INTERMEDIATES, "W2", "b2", "bngain", "bnbias", "W1", "b1", "C")


def autograd_gradients(p: Parameters, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values of one minibatch, and the gradient that autograd gives to every one of them and every parameter."""
    leaves = Parameters(*(t.detach().clone().requires_grad_() for t in p.tensors()))
    values = staged_forward(leaves, x, y)
    tensors = {**{name: values[name] for name in INTERMEDIATES}, **leaves.named()}
    gradients = torch.autograd.grad(values["loss"], [tensors[name] for name in GRADIENTS])
    return {name: v.detach() for name, v in values.items()}, dict(zip(GRADIENTS, gradients, strict=True))


def staged_pairs(p: Parameters, x: Tensor, y: Tensor, tanh_backward: TanhBackward = tanh_one_rounding) -> Pairs:
    """Step 1: the 26 gradients by hand, one elementary step at a time, with autograd's."""
    values, reference = autograd_gradients(p, x, y)
    ours = staged_backward(p, x, y, values, tanh_backward)
    return {name: (ours[name], reference[name]) for name in GRADIENTS}


def fused_pairs(p: Parameters, x: Tensor, y: Tensor) -> tuple[Pairs, Pairs]:
    """Steps 2 and 3: cross-entropy and batch norm each in one step, by formula and by kernel.

    Returns:
        The pairs of the cross-entropy's gradient (logits) and of the batch norm's (hprebn, bngain, bnbias).
    """
    v, autograd = autograd_gradients(p, x, y)
    staged = staged_backward(p, x, y, v)
    formula_ce = cross_entropy_backward(v["logits"], y)
    _, lse, total = ops.cross_entropy_forward(v["logits"], y, IGNORE_INDEX, MEAN)[:3]
    kernel_ce = ops.cross_entropy_backward(torch.ones(()), v["logits"], y, lse, total, IGNORE_INDEX, MEAN)
    cross_entropy = _both("logits", {"formula": formula_ce, "kernel": kernel_ce}, staged, autograd)

    formula_bn = batch_norm_backward(staged["hpreact"], v["bnraw"], v["bnvar_inv"], p.bngain)
    gain, bias = p.bngain.view(-1), p.bnbias.view(-1)
    _, statistics = ops.batch_norm_forward(v["hprebn"], None, None, gain, bias, True, 0.0, EPS, 1)
    kernel_bn, kernel_gain, kernel_bias = ops.batch_norm_backward(
        staged["hpreact"], v["hprebn"], gain, None, statistics, True, True, True, 1
    )
    batch_norm = _both("hprebn", {"formula": formula_bn, "kernel": kernel_bn}, staged, autograd)
    for name, ours in (("bngain", kernel_gain), ("bnbias", kernel_bias)):
        batch_norm |= _both(name, {"kernel": ours.view(1, -1)}, staged, autograd)
    return cross_entropy, batch_norm


def _both(name: str, ours: dict[str, Tensor], staged: dict[str, Tensor], autograd: dict[str, Tensor]) -> Pairs:
    return {
        f"{name}: {how} / {which}": (gradient, reference[name])
        for how, gradient in ours.items()
        for which, reference in (("staged", staged), ("autograd", autograd))
    }

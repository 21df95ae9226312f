"""Every gradient of the network derived by hand: one elementary step at a time, then fused into one-step formulas.

Notation: ``v`` holds the values of the forward pass, ``d[x]`` is the gradient of the loss with respect to ``x``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .network import EPS, Parameters

TanhBackward = Callable[[Tensor, Tensor], Tensor]


def tanh_two_roundings(grad: Tensor, h: Tensor) -> Tensor:
    """(1 - h^2) * grad as it is usually written: h^2 is rounded, then 1 - h^2 is rounded again."""
    return (1.0 - h**2) * grad


def tanh_one_rounding(grad: Tensor, h: Tensor) -> Tensor:
    """(1 - h^2) * grad as PyTorch's own kernel computes it, with 1 - h^2 rounded once."""
    return torch.ops.aten.tanh_backward(grad, h)


def staged_backward(
    p: Parameters, x: Tensor, y: Tensor, v: dict[str, Tensor], tanh_backward: TanhBackward = tanh_one_rounding
) -> dict[str, Tensor]:
    """The 26 gradients of one minibatch, each from the one after it by a single rule.

    Args:
        p: The parameters.
        x: (batch, block) int64 contexts.
        y: (batch,) int64 targets.
        v: The values of ``network.staged_forward``.
        tanh_backward: How the derivative of tanh is rounded.
    """
    d: dict[str, Tensor] = {}
    n = len(x)
    rows = torch.arange(n)

    # loss = -mean of the log-probabilities at the targets: each of those n numbers gets -1/n, all others nothing.
    d["logprobs"] = torch.zeros_like(v["logprobs"])
    d["logprobs"][rows, y] = -1.0 / n
    d["probs"] = d["logprobs"] / v["probs"]  # log' = 1/x
    # probs = counts * counts_sum_inv: a (n, 1) column was broadcast over the classes, so its gradient sums over them.
    d["counts_sum_inv"] = (d["probs"] * v["counts"]).sum(1, keepdim=True)
    d["counts_sum"] = d["counts_sum_inv"] * -(v["counts_sum"] ** -2)  # (1/x)' = -1/x^2
    # counts is used twice: in the product above and in the sum, whose gradient is the same for every summand.
    d["counts"] = d["probs"] * v["counts_sum_inv"] + d["counts_sum"]
    d["norm_logits"] = d["counts"] * v["counts"]  # exp' = exp
    # norm_logits = logits - logit_maxes. The maximum is for stability only: its gradient is zero but for rounding.
    d["logit_maxes"] = (-d["norm_logits"]).sum(1, keepdim=True)
    d["logits"] = d["norm_logits"].clone()
    d["logits"][rows, v["logits"].argmax(1)] += d["logit_maxes"].squeeze(1)

    # logits = h @ W2 + b2. Shapes leave one way to multiply; the bias was broadcast over the rows, so it sums them.
    d["h"] = d["logits"] @ p.W2.T
    d["W2"] = v["h"].T @ d["logits"]
    d["b2"] = d["logits"].sum(0)
    d["hpreact"] = tanh_backward(d["h"], v["h"])

    # hpreact = bngain * bnraw + bnbias, gain and bias broadcast over the rows.
    d["bngain"] = (d["hpreact"] * v["bnraw"]).sum(0, keepdim=True)
    d["bnbias"] = d["hpreact"].sum(0, keepdim=True)
    d["bnraw"] = d["hpreact"] * p.bngain
    # bnraw = bndiff * bnvar_inv: bndiff's first use; the second is in the variance below.
    d["bnvar_inv"] = (d["bnraw"] * v["bndiff"]).sum(0, keepdim=True)
    d["bnvar"] = d["bnvar_inv"] * (-0.5 * (v["bnvar"] + EPS) ** -1.5)
    d["bndiff2"] = (1.0 / (n - 1) * d["bnvar"]).expand_as(v["bndiff2"])  # a sum hands its gradient to each summand
    d["bndiff"] = d["bnraw"] * v["bnvar_inv"] + d["bndiff2"] * (2.0 * v["bndiff"])
    # bndiff = hprebn - bnmeani: hprebn's first use; the second is in the mean.
    d["bnmeani"] = (-d["bndiff"]).sum(0, keepdim=True)
    d["hprebn"] = d["bndiff"] + 1.0 / n * d["bnmeani"]

    d["embcat"] = d["hprebn"] @ p.W1.T
    d["W1"] = v["embcat"].T @ d["hprebn"]
    d["b1"] = d["hprebn"].sum(0)  # zero but for rounding: the batch norm subtracts whatever b1 adds
    d["emb"] = d["embcat"].view_as(v["emb"])
    # emb = C[x]: a row of C that was looked up several times gets the sum of the gradients of its copies.
    d["C"] = torch.zeros_like(p.C).index_add_(0, x.flatten(), d["emb"].reshape(-1, p.C.size(1)))
    return d


def cross_entropy_backward(logits: Tensor, y: Tensor) -> Tensor:
    """From the loss to the logits in one step: (softmax(logits) - one_hot(y)) / n.

    All of ``logit_maxes`` to ``logprobs`` collapses, because d loss_i / d logit_ij = p_ij - [j == y_i].
    """
    d = logits.softmax(1)
    d[torch.arange(len(y)), y] -= 1
    return d / len(y)


def batch_norm_backward(grad: Tensor, bnraw: Tensor, bnvar_inv: Tensor, bngain: Tensor) -> Tensor:
    """From hpreact to hprebn in one step, with the unbiased variance.

    gain * invstd / n * (n g - sum(g) - n/(n-1) * xhat * sum(g * xhat)), sums over the rows.
    """
    n = len(grad)
    dot = (grad * bnraw).sum(0, keepdim=True)
    return bngain * bnvar_inv / n * (n * grad - grad.sum(0, keepdim=True) - n / (n - 1) * bnraw * dot)

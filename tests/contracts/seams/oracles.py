"""The right answers: the ops in plain PyTorch, in float64, from nothing of this package.

``torch.nn.functional`` where it has the option, else the formulas of the ops' pages written out.
"""

import torch
import torch.nn.functional as F


def _classes_last(x):
    return x.movedim(1, -1) if x.dim() > 1 else x


def _distribution(u, target, ignore_index):
    """(share of each class, whether the row counts, what the row counts in the mean by itself) of a target."""
    classes = u.size(-1)

    def one_hot(indices):
        return F.one_hot(torch.where(indices == ignore_index, 0, indices), classes).double()

    if not isinstance(target, tuple):
        if target.is_floating_point():
            shares = _classes_last(target)
            return shares, torch.ones(shares.shape[:-1], dtype=torch.bool), "rows"
        return one_hot(target), target != ignore_index, "weights"
    if len(target) == 2:
        indices, probabilities = (_classes_last(t) for t in target)
        shares = sum(
            one_hot(i) * p.unsqueeze(-1) for i, p in zip(indices.unbind(-1), probabilities.unbind(-1), strict=True)
        )
        return shares, torch.ones(shares.shape[:-1], dtype=torch.bool), "rows"
    first, second, lam = target
    lam = torch.as_tensor(lam, dtype=torch.float64).expand(first.shape).unsqueeze(-1)
    shares = lam * one_hot(first) + (1 - lam) * one_hot(second)
    return shares, torch.ones(shares.shape[:-1], dtype=torch.bool), "weights"


def cross_entropy(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    softcap=None,
    class_mask=None,
    token_weight=None,
    normalizer=None,
    return_outputs=False,
):
    """One formula for all the options; where PyTorch has them, PyTorch's own op (tests compare the two)."""
    extras = (softcap, class_mask, token_weight, normalizer)
    if all(e is None for e in extras) and not (z_loss or isinstance(target, tuple) or return_outputs):
        return F.cross_entropy(
            input * logit_scale,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    u = _classes_last(input) * logit_scale
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    allowed = torch.ones_like(u, dtype=torch.bool)
    if class_mask is not None:
        allowed = allowed & (class_mask if class_mask.dim() == 1 else _classes_last(class_mask))
        u = u.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(u, -1)
    log_p = (u - lse.unsqueeze(-1)).masked_fill(~allowed, 0.0)
    shares, counted, by = _distribution(u, target, ignore_index)
    w = torch.ones(u.size(-1), dtype=torch.float64) if weight is None else weight
    q = w * ((1 - label_smoothing) * shares + label_smoothing * allowed.double() / allowed.sum(-1, keepdim=True))
    factor = counted.double() if token_weight is None else counted * token_weight
    z_rows = z_loss * torch.where(counted, lse, 0.0).square()
    per_row = torch.where(counted, -(q * log_p).sum(-1), 0.0) + z_rows
    share = (shares * w).sum(-1) if by == "weights" else torch.ones_like(lse)
    denominator = (share * factor).sum() if normalizer is None else normalizer

    def reduced(rows):
        rows = rows * factor
        if reduction == "none":
            return rows
        return rows.sum() if reduction == "sum" else rows.sum() / denominator

    if not return_outputs:
        return reduced(per_row)
    p = torch.softmax(u, -1)
    log_target = torch.where(counted, (log_p * shares).sum(-1), 0.0)
    return reduced(per_row), lse, log_target, -(p * log_p).sum(-1), reduced(z_rows)


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, shift=False, lora=None, chunk_rows=None, **options
):
    """Cross-entropy of the logits, which exist here."""
    if shift:
        target = torch.cat((target[..., 1:], torch.full_like(target[..., :1], -100)), -1)
    logits = input @ linear_weight.flatten(0, -2).t()
    if linear_bias is not None:
        logits = logits + linear_bias.flatten()
    if lora is not None:
        a, b, scale = lora
        logits = logits + (input @ a.t()) @ b.t() * scale
    lead, classes = logits.shape[:-1], linear_weight.size(0)
    if linear_weight.dim() > 2:
        return cross_entropy(logits.unflatten(-1, linear_weight.shape[:-1]), target, **options)
    rows = logits.reshape(-1, classes)
    if isinstance(target, torch.Tensor):
        target = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    if (token_weight := options.pop("token_weight", None)) is not None:
        options["token_weight"] = token_weight.reshape(-1)
    loss = cross_entropy(rows, target, **options)
    return loss.reshape(lead) if options.get("reduction") == "none" else loss


_ACTIVATIONS = {
    None: lambda z: z,
    "relu": torch.relu,
    "silu": lambda z: z * torch.sigmoid(z),
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
}


def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    correction=0,
    activation=None,
    residual=None,
    valid=None,
    groups=1,
    inplace_activated=False,
):
    """Written out; PyTorch's own op where nothing is asked beyond it. Updates the running statistics."""
    if (correction, activation, residual, valid, groups) == (0, None, None, None, 1):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    channels = (slice(None), *(None,) * (input.dim() - 2))
    counted = torch.ones(input.shape[:1] + input.shape[2:], dtype=torch.bool) if valid is None else valid
    parts = []
    size = -(-input.size(0) // groups)
    for x, mask in zip(input.split(size), counted.split(size), strict=True):
        if training:
            values = x.movedim(1, -1)[mask]
            n = values.size(0)
            mean = values.mean(0)
            squares = (values - mean).square().sum(0)
            var = squares / (n - correction)
            if running_mean is not None:
                with torch.no_grad():
                    running_mean.lerp_(mean, momentum)
                    running_var.lerp_(squares / (n - 1), momentum)
        else:
            mean, var = running_mean, running_var
        parts.append((x - mean[channels]) / torch.sqrt(var + eps)[channels])
    z = torch.cat(parts)
    if weight is not None:
        z = z * weight[channels]
    if bias is not None:
        z = z + bias[channels]
    if residual is not None:
        z = z + residual
    y = _ACTIVATIONS[activation](z)
    return y if valid is None else torch.where(counted.unsqueeze(1), y, 0.0)

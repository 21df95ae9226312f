"""Targets of every kind, logits in every layout, and the losses of the rows in plain float64 PyTorch."""

import math

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(x):
    """(rows, classes) with rows a multiple of 15, in every walk's layout."""
    spatial = x.reshape(-1, 5, 3, x.size(1)).permute(0, 3, 1, 2)
    return {
        "contiguous": x,
        "transposed": x.t().contiguous().t(),
        "class stride": torch.stack([x, x], -1)[..., 0],
        "spatial": spatial.contiguous(),
        "channels last": spatial.contiguous(memory_format=torch.channels_last),
    }


def draw(kind, shape, dtype, seed=0):
    """A target of this kind for logits of this shape; indices in the first 13 classes only."""
    g = torch.Generator().manual_seed(seed)
    rows = (shape[0], *shape[2:])

    def index():
        found = torch.randint(0, min(shape[1], 13), rows, generator=g)
        found.view(-1)[::5] = -100
        return found

    if kind == "index":
        return index()
    if kind == "dense":
        return torch.randn(shape, generator=g).softmax(1).to(dtype)
    if kind == "sparse":
        indices = torch.stack([index() for _ in range(3)], 1)
        return indices, torch.rand(indices.shape, generator=g).to(dtype)
    return index(), index(), torch.rand(shape[0], generator=g).to(dtype)


def as_dense(target, shape):
    """Any target as class probabilities in float64, and which rows count."""
    if isinstance(target, tuple) and len(target) == 3:
        lam = target[2].double().reshape(-1, *(1,) * (target[0].dim() - 1)).expand(target[0].shape)
        target = torch.stack(target[:2], 1), torch.stack([lam, 1 - lam], 1)
    if isinstance(target, tuple):
        indices, probabilities = target
    elif target.shape == shape:
        return target.double(), torch.ones((shape[0], *shape[2:]), dtype=torch.bool)
    else:
        indices, probabilities = target.unsqueeze(1), torch.ones(target.unsqueeze(1).shape)
    valid = indices != -100
    source = torch.where(valid, probabilities.double(), 0.0)
    return torch.zeros(shape, dtype=torch.float64).scatter_add(1, indices.clamp(min=0), source), valid.any(1)


def formula(x, target, weight=None, label_smoothing=0.0, z_loss=0.0, logit_scale=1.0, softcap=None, class_mask=None):
    """The rows' losses in plain float64 PyTorch."""
    dense, valid = as_dense(target, x.shape)
    u = x * logit_scale
    u = u if softcap is None else softcap * torch.tanh(u / softcap)
    allowed = torch.ones(x.size(1), dtype=torch.bool) if class_mask is None else class_mask
    if allowed.dim() == 1:
        allowed = allowed.reshape(-1, *(1,) * (x.dim() - 2))
    u = u.masked_fill(~allowed, -math.inf)
    log_p = u.log_softmax(1)
    spread = allowed.double() / allowed.expand(x.shape).sum(1, keepdim=True)
    q = (1 - label_smoothing) * dense + label_smoothing * spread
    q = q if weight is None else q * weight.double().reshape(-1, *(1,) * (x.dim() - 2))
    rows = -(q * torch.where(allowed, log_p, 0.0)).sum(1) + z_loss * u.logsumexp(1).square()
    return torch.where(valid, rows, 0.0)

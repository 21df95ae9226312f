"""Gradients that are written by non-temporal stores: the same bits as those of the same rows in a smaller tensor."""

import pytest
import torch

import fused_ops

MIB = 2**20
F32, BF16 = torch.float32, torch.bfloat16


def gradient(x, target):
    leaf = x.clone().requires_grad_()
    fused_ops.cross_entropy(leaf, target, reduction="sum").backward()
    return leaf.grad


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (F32, (2, 21, 256, 256)),  # whole lines
        (F32, (3, 21, 211, 211)),  # every class begins in another place of a line
        (BF16, (3, 21, 263, 263)),
        (F32, (2, 128, 97, 97)),  # the most classes of a buffer
        (F32, (2, 129, 97, 97)),  # one more
        (F32, (2, 2, 1024, 1024)),
    ],
)
def test_large_gradients_are_those_of_their_parts(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 4).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    target[:, ::5] = -100
    target[:, 1::5] = x[:, :, 1::5].argmax(1)  # p of 0.5 and more: the others' sum
    assert x.numel() * x.element_size() >= 8 * MIB  # is streamed
    parts = [gradient(x[:, :, i : i + 50].contiguous(), target[:, i : i + 50]) for i in range(0, shape[2], 50)]
    assert max(part.numel() * part.element_size() for part in parts) < 8 * MIB  # is not
    found = gradient(x, target)
    assert torch.equal(found, torch.cat(parts, 2))
    exact = torch.softmax(x.double(), 1) - torch.nn.functional.one_hot(target.clamp_min(0), shape[1]).movedim(-1, 1)
    exact = torch.where(target.unsqueeze(1) == -100, 0.0, exact)
    torch.testing.assert_close(found.double(), exact, rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-6)

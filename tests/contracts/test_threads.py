"""Many Python threads calling at once, each with its own data and its own answer."""

from concurrent.futures import ThreadPoolExecutor

import torch

import fused_ops

WORKERS = 8


def work(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(257, 101, generator=generator, requires_grad=True)
    target = torch.randint(0, 101, (257,), generator=generator)
    image = torch.randn(4, 19, 33, 5, generator=generator, requires_grad=True)
    loss = fused_ops.cross_entropy(logits, target)
    y = fused_ops.batch_norm(image, None, None, training=True)
    return loss.detach(), y.detach(), *torch.autograd.grad((loss, y.square().sum()), (logits, image))


def test_threads_do_not_disturb_each_other():
    torch.set_num_threads(2)
    alone = [work(seed) for seed in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(5):
            for ours, expected in zip(pool.map(work, range(WORKERS)), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

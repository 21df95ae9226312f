"""Three ways to train one network: gradients by hand, our Functions with ``backward()``, PyTorch's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fused_ops

from .data import BLOCK_SIZE, Split, Vocabulary
from .network import BATCH, EPS, Parameters

ops = torch.ops.fused_ops
MEAN = 1  # the raw cross-entropy ops' code for reduction="mean"
IGNORE_INDEX = -100
DRAW_STEPS = 500  # minibatches gathered at a time

Step = Callable[[Tensor, Tensor, float], Tensor]  # (contexts, targets, learning rate) -> loss, parameters updated


class ByHand:
    """One step of training without autograd: every gradient from a formula, or from a kernel that is one."""

    def __init__(self, p: Parameters) -> None:
        self.p = p
        # The kernels give gradients of shape (hidden,); a view shares the memory of the (1, hidden) parameters.
        self.gain, self.bias = p.bngain.view(-1), p.bnbias.view(-1)
        self.updated = [p.C, p.W1, p.b1, p.W2, p.b2, self.gain, self.bias]
        self.one = torch.ones(())

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        p = self.p
        looked_up = x.view(-1)
        embcat = p.C.index_select(0, looked_up).view(len(x), -1)
        hprebn = torch.addmm(p.b1, embcat, p.W1)
        hpreact, statistics = ops.batch_norm_forward(hprebn, None, None, self.gain, self.bias, True, 0.0, EPS, 1)
        h = hpreact.tanh_()
        logits = torch.addmm(p.b2, h, p.W2)
        loss, lse, total = ops.cross_entropy_forward(logits, y, IGNORE_INDEX, MEAN)[:3]

        d_logits = ops.cross_entropy_backward(self.one, logits, y, lse, total, IGNORE_INDEX, MEAN)
        d_h = d_logits.mm(p.W2.t())
        d_hpreact = torch.ops.aten.tanh_backward(d_h, h)
        d_hprebn, d_gain, d_bias = ops.batch_norm_backward(
            d_hpreact, hprebn, self.gain, None, statistics, True, True, True, 1
        )
        d_emb = d_hprebn.mm(p.W1.t()).view(len(looked_up), -1)
        d_C = torch.zeros_like(p.C).index_add_(0, looked_up, d_emb)
        gradients = [d_C, embcat.t().mm(d_hprebn), d_hprebn.sum(0), h.t().mm(d_logits), d_logits.sum(0), d_gain, d_bias]
        torch._foreach_add_(self.updated, gradients, alpha=-lr)
        return loss


class WithAutograd:
    """One step with ``backward()``; how the batch norm and the loss are computed is given."""

    def __init__(self, p: Parameters, batch_norm: Callable[..., Tensor], cross_entropy: Callable[..., Tensor]) -> None:
        self.p, self.batch_norm, self.cross_entropy = p, batch_norm, cross_entropy
        self.gain, self.bias = p.bngain.view(-1), p.bnbias.view(-1)
        self.updated = [p.C, p.W1, p.b1, p.W2, p.b2, self.gain, self.bias]
        for parameter in self.updated:
            parameter.requires_grad_()

    def __call__(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        p = self.p
        embcat = F.embedding(x, p.C).view(len(x), -1)
        h = self.batch_norm(torch.addmm(p.b1, embcat, p.W1), self.gain, self.bias).tanh()
        loss = self.cross_entropy(torch.addmm(p.b2, h, p.W2), y)
        for parameter in self.updated:
            parameter.grad = None
        loss.backward()
        with torch.no_grad():
            torch._foreach_add_(self.updated, [parameter.grad for parameter in self.updated], alpha=-lr)
        return loss.detach()


def with_functions(p: Parameters) -> WithAutograd:
    """Our autograd Functions, the batch norm with the unbiased variance."""

    def batch_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return fused_ops.batch_norm(x, None, None, gain, bias, True, eps=EPS, correction=1)

    return WithAutograd(p, batch_norm, fused_ops.cross_entropy)


def with_eager(p: Parameters) -> WithAutograd:
    """What a PyTorch user writes: nn.BatchNorm1d (biased variance, running statistics) and F.cross_entropy."""
    module = torch.nn.BatchNorm1d(p.bngain.numel(), eps=EPS)

    def batch_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return module(x)

    step = WithAutograd(p, batch_norm, F.cross_entropy)
    with torch.no_grad():
        module.weight.copy_(step.gain)
        module.bias.copy_(step.bias)
    step.gain, step.bias = module.weight, module.bias
    step.updated[-2:] = [module.weight, module.bias]
    return step


def minibatches(split: Split, generator: torch.Generator, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` minibatches, the numbers drawn in the order in which one draw a step would give them."""
    for start in range(0, steps, DRAW_STEPS):
        n = min(DRAW_STEPS, steps - start)
        ix = torch.randint(0, len(split), (n, BATCH), generator=generator)
        yield from zip(split.contexts[ix].unbind(0), split.targets[ix].unbind(0), strict=True)


@dataclass
class Training:
    """What a training run left: the loss of every step done, and whether it was interrupted."""

    losses: list[Tensor] = field(default_factory=list)
    interrupted: bool = False


def train(step: Step, split: Split, generator: torch.Generator, steps: int, label: str) -> Training:
    """Runs ``steps`` steps, learning rate 0.1 and 0.01 from the half on. Ctrl-C ends it and keeps what was learnt."""
    run = Training()
    try:
        batches = minibatches(split, generator, steps)
        for i, (x, y) in enumerate(tqdm(batches, label, steps, unit="step", leave=True, dynamic_ncols=True)):
            run.losses.append(step(x, y, 0.1 if i < steps / 2 else 0.01))
    except KeyboardInterrupt:
        run.interrupted = True
    return run


@dataclass
class Trained:
    """Parameters with the batch-norm statistics of the whole training set, ready to predict."""

    p: Parameters
    mean: Tensor  # (hidden,)
    var: Tensor  # (hidden,), unbiased

    def logits(self, contexts: Tensor) -> Tensor:
        """(examples, vocabulary) for contexts (examples, block)."""
        hprebn = hidden_of(self.p, contexts)
        gain, bias = self.p.bngain.view(-1), self.p.bnbias.view(-1)
        h = fused_ops.batch_norm(hprebn, self.mean, self.var, gain, bias, False, eps=EPS).tanh()
        return torch.addmm(self.p.b2, h, self.p.W2)

    @torch.no_grad()
    def loss(self, split: Split) -> float:
        """Mean cross-entropy in nats per character."""
        return fused_ops.cross_entropy(self.logits(split.contexts), split.targets).item()

    @torch.no_grad()
    def sample(self, vocabulary: Vocabulary, start: str, generator: torch.Generator, longest: int = 40) -> str:
        """One name that begins with ``start``; DataError if ``start`` holds a character the data has not."""
        letters = vocabulary.encode(start)
        while len(letters) < longest:
            context = ([0] * BLOCK_SIZE + letters)[-BLOCK_SIZE:]
            probabilities = self.logits(torch.tensor([context])).softmax(1)
            letter = int(torch.multinomial(probabilities, 1, generator=generator))
            if letter == 0:
                break
            letters.append(letter)
        return "".join(vocabulary.characters[letter] for letter in letters)


def hidden_of(p: Parameters, contexts: Tensor) -> Tensor:
    """(examples, hidden) before the batch norm."""
    return torch.addmm(p.b1, p.C[contexts].view(len(contexts), -1), p.W1)


@torch.no_grad()
def calibrate(p: Parameters, split: Split) -> Trained:
    """The batch norm's statistics in one pass over the training set, once training is over."""
    hprebn = hidden_of(p, split.contexts)
    return Trained(p, hprebn.mean(0), hprebn.var(0, unbiased=True))

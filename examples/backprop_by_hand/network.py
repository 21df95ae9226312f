"""The network: embedding -> linear -> batch norm -> tanh -> linear -> cross-entropy, one elementary step at a time."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .data import BLOCK_SIZE

SEED = 2147483647
EMBEDDING = 10
HIDDEN = 64
BATCH = 32
EPS = 1e-5


@dataclass
class Parameters:
    """The seven parameters, in the order in which they are drawn."""

    C: Tensor  # (vocabulary, embedding)
    W1: Tensor  # (block * embedding, hidden)
    b1: Tensor  # (hidden,)
    W2: Tensor  # (hidden, vocabulary)
    b2: Tensor  # (vocabulary,)
    bngain: Tensor  # (1, hidden)
    bnbias: Tensor  # (1, hidden)

    @classmethod
    def draw(cls, vocabulary: int, hidden: int = HIDDEN, seed: int = SEED) -> tuple[Parameters, torch.Generator]:
        """Small random values everywhere, also where zeros are usual: a zero gradient would hide a wrong formula."""
        g = torch.Generator().manual_seed(seed)
        fan_in = BLOCK_SIZE * EMBEDDING
        parameters = cls(
            C=torch.randn((vocabulary, EMBEDDING), generator=g),
            W1=torch.randn((fan_in, hidden), generator=g) * (5 / 3) / fan_in**0.5,
            b1=torch.randn(hidden, generator=g),
            W2=torch.randn((hidden, vocabulary), generator=g) * 0.1,
            b2=torch.randn(vocabulary, generator=g) * 0.1,
            bngain=torch.randn((1, hidden), generator=g) * 0.1 + 1.0,
            bnbias=torch.randn((1, hidden), generator=g) * 0.1,
        )
        return parameters, g

    def named(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def tensors(self) -> list[Tensor]:
        return list(self.named().values())

    def count(self) -> int:
        return sum(p.numel() for p in self.tensors())


def staged_forward(p: Parameters, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Every intermediate of one minibatch, by name, in the order in which it is computed.

    Args:
        p: The parameters.
        x: (batch, block) int64 contexts.
        y: (batch,) int64 targets.
    """
    n = len(x)
    v: dict[str, Tensor] = {}
    v["emb"] = p.C[x]  # (n, block, embedding)
    v["embcat"] = v["emb"].view(n, -1)  # (n, block * embedding)
    v["hprebn"] = v["embcat"] @ p.W1 + p.b1  # (n, hidden)
    v["bnmeani"] = 1 / n * v["hprebn"].sum(0, keepdim=True)  # (1, hidden)
    v["bndiff"] = v["hprebn"] - v["bnmeani"]
    v["bndiff2"] = v["bndiff"] ** 2
    v["bnvar"] = 1 / (n - 1) * v["bndiff2"].sum(0, keepdim=True)  # unbiased: n - 1, not n
    v["bnvar_inv"] = (v["bnvar"] + EPS) ** -0.5
    v["bnraw"] = v["bndiff"] * v["bnvar_inv"]
    v["hpreact"] = p.bngain * v["bnraw"] + p.bnbias
    v["h"] = torch.tanh(v["hpreact"])
    v["logits"] = v["h"] @ p.W2 + p.b2  # (n, vocabulary)
    v["logit_maxes"] = v["logits"].max(1, keepdim=True).values  # (n, 1)
    v["norm_logits"] = v["logits"] - v["logit_maxes"]
    v["counts"] = v["norm_logits"].exp()
    v["counts_sum"] = v["counts"].sum(1, keepdim=True)
    v["counts_sum_inv"] = v["counts_sum"] ** -1
    v["probs"] = v["counts"] * v["counts_sum_inv"]
    v["logprobs"] = v["probs"].log()
    v["loss"] = -v["logprobs"][range(n), y].mean()
    return v

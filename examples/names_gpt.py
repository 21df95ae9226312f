"""A small GPT learns to spell names; ``--backend fused`` is the one line with ``patch``.

    python -m fused_ops.examples.names_gpt --names FILE --backend fused      # one name a line

Without ``--names`` it takes the first names of the demo extra.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_ops

from .backprop_by_hand.data import DataError, Vocabulary, read_names, us_first_names

PADDING = -100  # what cross-entropy ignores


class Layer(nn.Module):
    """Causal self-attention, then two linear layers, each added to what comes in."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.mix, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        split = self.mix(self.norm1(x)).view(batch, length, 3, self.heads, features // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, features))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Characters to the logits of the next one; it calls F.cross_entropy itself, as models often do."""

    def __init__(self, characters: int, length: int, features: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, features), nn.Embedding(length, features)
        self.layers = nn.Sequential(*(Layer(features, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, characters, bias=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.embedding(x) + self.position.weight[: x.size(1)]
        logits: Tensor = self.head(self.norm(self.layers(h)))
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=PADDING)


def encode(names: list[str], vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Each name as a row: what goes in (end marker first) and what follows (end marker last, then padding)."""
    length = max(map(len, names)) + 1
    x = torch.zeros(len(names), length, dtype=torch.int64)
    y = torch.full((len(names), length), PADDING)
    for row, name in enumerate(names):
        indices = torch.tensor(vocabulary.encode(name))
        x[row, 1 : len(name) + 1] = indices
        y[row, : len(name)] = indices
        y[row, len(name)] = 0
    return x, y


@torch.no_grad()
def sample(model: nn.Module, vocabulary: Vocabulary, length: int, count: int) -> list[str]:
    """New names, character by character until the end marker."""
    x = torch.zeros(count, 1, dtype=torch.int64)
    while x.size(1) < length:
        following = torch.multinomial(model(x)[:, -1].softmax(1), 1)
        x = torch.cat([x, following], 1)
    texts = ("".join(vocabulary.characters[i] for i in row[1:]) for row in x.tolist())
    return [text.partition(vocabulary.characters[0])[0] for text in texts]


def train(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, backend: str, batch: int = 64
) -> tuple[list[float], float]:
    """Losses of the steps, and milliseconds a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    start = time.perf_counter()
    with fused_ops.patch() if backend == "fused" else contextlib.nullcontext():
        bar = tqdm(range(steps), desc=backend, unit="step")
        for _ in bar:
            rows = torch.randint(0, len(x), (batch,))
            optimizer.zero_grad()
            loss = model(x[rows], y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses, 1000 * (time.perf_counter() - start) / steps


def plot(path: Path, backend: str, losses: list[float]) -> None:
    """The loss of every step and its mean over the 50 before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, linewidth=0.5, alpha=0.5)
    if len(losses) > 50:
        axes.plot(range(49, len(losses)), torch.tensor(losses).unfold(0, 50, 1).mean(1), linewidth=2)
    axes.set(title=f"names, {backend}", xlabel="step", ylabel="loss (nats per character)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Trains, prints names of its own, and says how well and how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", metavar="FILE", help="text file with one name per line (default: US first names)")
    parser.add_argument("--backend", choices=("torch", "fused"), default="fused")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the plot (default ./demo)")
    arguments = parser.parse_args(argv)
    try:
        names = us_first_names() if arguments.names is None else read_names(arguments.names)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    torch.manual_seed(0)
    vocabulary = Vocabulary.of(names)
    x, y = encode(names, vocabulary)
    model = Gpt(len(vocabulary), x.size(1))
    losses, step_ms = train(model, x, y, arguments.steps, arguments.backend)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"names_gpt_{arguments.backend}.png"
    plot(path, arguments.backend, losses)
    last = sum(losses[-50:]) / len(losses[-50:])
    print(f"{arguments.backend}: loss {last:.4f} (mean of the last 50 steps), {step_ms:.2f} ms a step")
    print("new names: " + ", ".join(sample(model.eval(), vocabulary, x.size(1), 12)))
    print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

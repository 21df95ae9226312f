"""A small GPT learns to spell names; ``--backend fused`` is one line with ``patch``, ``linear`` a head without logits.

    python -m fused_ops.examples.names_gpt --names FILE --backend fused      # one name a line
    python -m fused_ops.examples.names_gpt --compare --letters 3 --steps 60  # torch beside linear: losses, time, memory

Without ``--names`` it takes the first names of the demo extra. With ``--letters 3`` a token is three characters, so
that there are as many classes as a language model has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_ops

from .backprop_by_hand.data import DataError, Vocabulary, read_names, us_first_names

PADDING = -100  # what cross-entropy ignores
BACKENDS = ("torch", "fused", "linear")


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
    """Tokens to the logits of the next one; it calls F.cross_entropy itself, as models often do.

    ``linear`` is the other way: the head and its loss as one op.
    """

    def __init__(
        self, characters: int, length: int, features: int = 64, layers: int = 2, heads: int = 4, linear: bool = False
    ) -> None:
        super().__init__()
        self.linear = linear
        self.embedding, self.position = nn.Embedding(characters, features), nn.Embedding(length, features)
        self.layers = nn.Sequential(*(Layer(features, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, characters, bias=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.embedding(x) + self.position.weight[: x.size(1)]
        h = self.norm(self.layers(h))
        if y is not None and self.linear:
            loss: Tensor = fused_ops.linear_cross_entropy(h, self.head.weight, y, ignore_index=PADDING)
            return loss
        logits: Tensor = self.head(h)
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=PADDING)


def encode(names: list[str], vocabulary: Vocabulary, letters: int = 1) -> tuple[Tensor, Tensor]:
    """Each name as a row: what goes in (end marker first) and what follows (end marker last, then padding).

    A token is ``letters`` characters, as digits of one number.
    """
    base = len(vocabulary)
    length = -(-(max(map(len, names)) + 1) // letters)
    x = torch.zeros(len(names), length, dtype=torch.int64)
    y = torch.full((len(names), length), PADDING)
    for row, name in enumerate(names):
        digits = [*vocabulary.encode(name), 0]
        digits += [0] * (-len(digits) % letters)
        tokens = [
            sum(d * base**k for k, d in enumerate(digits[i : i + letters])) for i in range(0, len(digits), letters)
        ]
        y[row, : len(tokens)] = torch.tensor(tokens)
        x[row, 1 : len(tokens)] = y[row, : len(tokens) - 1]
    return x, y


@torch.no_grad()
def sample(model: nn.Module, vocabulary: Vocabulary, length: int, count: int, letters: int = 1) -> list[str]:
    """New names, token by token until the end marker."""
    base, end = len(vocabulary), vocabulary.characters[0]
    x = torch.zeros(count, 1, dtype=torch.int64)
    while x.size(1) < length:
        following = torch.multinomial(model(x)[:, -1].softmax(1), 1)
        x = torch.cat([x, following], 1)
    rows = [[token // base**k % base for token in row[1:] for k in range(letters)] for row in x.tolist()]
    return ["".join(vocabulary.characters[i] for i in row).partition(end)[0] for row in rows]


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


def plot(path: Path, curves: dict[str, list[float]]) -> None:
    """The loss of every step and its mean over the 50 before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for (backend, losses), (style, width) in zip(curves.items(), (("-", 3.0), ("--", 1.2)), strict=False):
        short = len(losses) <= 50
        (line,) = axes.plot(losses, style, linewidth=width if short else 0.5, label=backend if short else None)
        if not short:
            means = torch.tensor(losses).unfold(0, 50, 1).mean(1)
            line.set_alpha(0.5)
            axes.plot(range(49, len(losses)), means, style, linewidth=width, color=line.get_color(), label=backend)
    axes.legend()
    axes.set(title="names", xlabel="step", ylabel="loss (nats per token)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(arguments: argparse.Namespace, names: list[str]) -> dict[str, object]:
    """Trains one model, and says how well, how fast and with how much memory."""
    torch.manual_seed(0)
    vocabulary = Vocabulary.of(names)
    x, y = encode(names, vocabulary, arguments.letters)
    classes = len(vocabulary) ** arguments.letters
    model = Gpt(classes, x.size(1), linear=arguments.backend == "linear")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, step_ms = train(model, x, y, arguments.steps, arguments.backend, arguments.batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    spelled = sample(model.eval(), vocabulary, x.size(1), 12, arguments.letters)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    rows = arguments.batch * x.size(1)
    return {"losses": losses, "step_ms": step_ms, "peak_mib": peak / unit, "names": spelled, "logits": [rows, classes]}


def compare(arguments: argparse.Namespace, given: list[str]) -> None:
    """torch beside linear, each in a process of its own, from the same weights and the same batches."""
    found = {}
    for backend in ("torch", "linear"):
        command = [sys.executable, "-m", __spec__.name, *given, "--backend", backend, "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[backend] = json.loads(done.stdout.splitlines()[-1])
    rows, classes = found["torch"]["logits"]
    print(f"logits of a step: {rows} x {classes}, {rows * classes * 4 / 2**20:.1f} MiB")
    for backend, result in found.items():
        last = sum(result["losses"][-50:]) / len(result["losses"][-50:])
        print(f"{backend:>8}: loss {last:.6f}, {result['step_ms']:.1f} ms a step, {result['peak_mib']:.0f} MiB peak")
    pairs = zip(found["torch"]["losses"], found["linear"]["losses"], strict=True)
    print(f"largest difference of a step's loss: {max(abs(a - b) / a for a, b in pairs):.1e} of it")
    path = arguments.out / "names_gpt_compared.png"
    plot(path, {backend: result["losses"] for backend, result in found.items()})
    print(f"plot: {path}")


def main(argv: list[str] | None = None) -> int:
    """Trains, prints names of its own, and says how well and how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", metavar="FILE", help="text file with one name per line (default: US first names)")
    parser.add_argument("--backend", choices=BACKENDS, default="fused")
    parser.add_argument("--compare", action="store_true", help="torch beside linear, instead of one backend")
    parser.add_argument("--letters", type=int, choices=(1, 2, 3), default=1, help="characters of a token (default 1)")
    parser.add_argument("--batch", type=int, default=64, help="names of a step (default 64)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the plot (default ./demo)")
    parser.add_argument("--json", action="store_true", help="prints the results as one line for programs, and no plot")
    arguments = parser.parse_args(argv)
    try:
        names = us_first_names() if arguments.names is None else read_names(arguments.names)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.compare:
        given = sys.argv[1:] if argv is None else argv
        compare(arguments, [a for a in given if a != "--compare"])
        return 0
    found: Any = run(arguments, names)
    if arguments.json:
        print(json.dumps(found))
        return 0
    backend, losses = arguments.backend, found["losses"]
    path = arguments.out / f"names_gpt_{backend}.png"
    plot(path, {backend: losses})
    last = sum(losses[-50:]) / len(losses[-50:])
    print(f"{backend}: loss {last:.4f} (mean of the last 50 steps), {found['step_ms']:.2f} ms a step")
    print("new names: " + ", ".join(found["names"]))
    print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

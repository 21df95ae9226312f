"""A small ResNet learns scikit-learn's handwritten digits; ``--backend fused`` is the two lines with ``convert``.

python -m fused_ops.examples.resnet_digits --backend fused      # needs pip install 'fused_ops[examples]'
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_ops
from fused_ops.conversion import rules


class Block(nn.Module):
    """Two convolutions around a shortcut, written as for PyTorch: nothing in it knows of fused ops."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels_in == channels
        shortcut = [nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


@rules.register(Block)
def fused_block(self: Any, x: Tensor) -> Any:
    """What ``convert`` makes of its forward: the same, each batch norm with what follows it in one op."""
    out = rules.norm_then(self.conv1(x), self.bn1, self.relu)
    return rules.norm_add_then(self.conv2(out), self.bn2, self.shortcut, x, self.relu)


def resnet(width: int = 16) -> nn.Module:
    """8x8 images of one channel to ten logits."""
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels (the last fifth)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the digits are scikit-learn's: pip install 'fused_ops[examples]'") from None
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.get_default_dtype()).unsqueeze(1) / 16 - 0.5
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, cut = x[order], y[order], len(x) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def train(backend: str, epochs: int, batch: int = 64) -> tuple[list[float], list[float], float]:
    """Losses of the steps, accuracy on the test images after each epoch, and milliseconds a step."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model, loss_of = resnet(), nn.CrossEntropyLoss()
    if backend == "fused":
        print(fused_ops.convert(model, sample=x[:batch]))
        fused_ops.convert(loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses: list[float] = []
    accuracies: list[float] = []
    spent = 0.0
    with tqdm(total=epochs * (len(x) // batch), desc=backend, unit="step") as bar:
        for _ in range(epochs):
            model.train()
            for rows in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = loss_of(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                spent += time.perf_counter() - start
                losses.append(loss.item())
                bar.update()
            model.eval()
            with torch.no_grad():
                accuracies.append((model(test_x).argmax(1) == test_y).float().mean().item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.3f}")
    return losses, accuracies, 1000 * spent / len(losses)


def plot(path: Path, backend: str, losses: list[float], accuracies: list[float]) -> None:
    """Loss of every step, and accuracy after every epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(losses, linewidth=1)
    left.set(title=f"digits, {backend}", xlabel="step", ylabel="training loss (nats)", yscale="log")
    right.plot(range(1, len(accuracies) + 1), accuracies, "o-")
    right.set(title="test images", xlabel="epoch", ylabel="share classified right", ylim=(None, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Trains, then says how well and how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("torch", "fused"), default="fused")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the plot (default ./demo)")
    arguments = parser.parse_args(argv)
    losses, accuracies, step_ms = train(arguments.backend, arguments.epochs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"resnet_digits_{arguments.backend}.png"
    plot(path, arguments.backend, losses, accuracies)
    print(f"{arguments.backend}: loss {losses[-1]:.4f}, test accuracy {accuracies[-1]:.3f}, {step_ms:.2f} ms a step")
    print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

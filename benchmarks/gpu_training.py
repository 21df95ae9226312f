"""Training steps of a ResNet-50 and of a small Llama on one GPU, before and after convert; of torch.nn alone.

``python -m benchmarks.gpu_training FILE`` writes a list of rows as JSON; ``--tiny`` runs anywhere. Under autocast in
bfloat16; the ResNet is channels_last. The compiled ways come last: they compile for minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from fused_ops.conversion import rules

from . import gpu_rows

Batch = tuple[Tensor, Tensor]
WAYS = ("eager", "convert", "backend", "torch.compile", "convert, torch.compile")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        out = 4 * channels
        self.conv1, self.bn1 = nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)
        self.act, self.shortcut = nn.ReLU(), nn.Sequential()
        if stride != 1 or channels_in != out:
            convolution = nn.Conv2d(channels_in, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act(self.bn2(self.conv2(y)))))
        y = y + self.shortcut(x)
        return self.act(y)  # type: ignore[no-any-return]


@rules.register(Bottleneck)
def _bottleneck(self: Bottleneck, x: Tensor) -> Tensor:
    y = rules.norm_then(self.conv1(x), self.bn1, self.act)
    y = rules.norm_then(self.conv2(y), self.bn2, self.act)
    return rules.norm_add_then(self.conv3(y), self.bn3, self.shortcut, x, self.act)


def resnet(width: int, depths: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet; of width 64 and depths 3, 4, 6, 3 it is ResNet-50."""
    stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    layers: list[nn.Module] = [stem, nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(Bottleneck(channels, width << stage, 2 if stage and i == 0 else 1))
            channels = 4 * width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Layer(nn.Module):
    """Attention and a gated feed-forward, each behind an RMS norm."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, 8 * features // 3 // 16 * 16
        self.norm1, self.norm2 = nn.RMSNorm(features), nn.RMSNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features, bias=False), nn.Linear(features, features, bias=False)
        self.gate_up, self.down = nn.Linear(features, 2 * inner, bias=False), nn.Linear(inner, features, bias=False)

    def _turned(self, x: Tensor) -> Tensor:
        """Rotary positions, of (batch, heads, length, features)."""
        half, length = x.size(-1) // 2, x.size(-2)
        steps = torch.arange(half, device=x.device) / half
        angles = torch.arange(length, device=x.device)[:, None] * 10_000.0**-steps
        cos, sin, (a, b) = angles.cos(), angles.sin(), x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        y = F.scaled_dot_product_attention(self._turned(q), self._turned(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, features))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Llama(nn.Module):
    """A small one; its logits are (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, features: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.layers = nn.Sequential(*(Layer(features, heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(features), nn.Linear(features, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(ids))))  # type: ignore[no-any-return]


def _resnet(tiny: bool) -> tuple[nn.Module, Batch, dict[str, Any]]:
    model = resnet(8, (1, 1, 1, 1), 10) if tiny else resnet(64, (3, 4, 6, 3), 1000)
    count, size, classes = (2, 64, 10) if tiny else (256, 224, 1000)
    images = torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (count,))
    return model.to(memory_format=torch.channels_last), (images, labels), {"loss": None}


def _llama(tiny: bool) -> tuple[nn.Module, Batch, dict[str, Any]]:
    vocabulary = 5000 if tiny else 128256
    model = Llama(vocabulary, 32, 1, 2) if tiny else Llama(vocabulary, 2048, 8, 16)
    ids = torch.randint(0, vocabulary, (2, 64) if tiny else (8, 2048))
    return model, (ids, ids.roll(-1, 1)), {"head": "head"}


MODELS: dict[str, Callable[[bool], tuple[nn.Module, Batch, dict[str, Any]]]] = {
    "ResNet-50": _resnet,
    "Llama": _llama,
}


def step_of(name: str, way: str, tiny: bool, device: str) -> gpu_rows.Run:
    """Forward, backward and the optimizer's step on one fixed batch."""
    torch.manual_seed(0)
    with torch.device(device):
        model, (x, y), options = MODELS[name](tiny)
    criterion = nn.CrossEntropyLoss()
    if "convert" in way:
        fused_ops.convert(model, **{"loss": criterion, **options})
        if options.get("loss", criterion) is None:
            fused_ops.convert(criterion)
    forward: Callable[[Tensor], Tensor] = model
    if way == "backend":
        forward = torch.compile(model, backend="fused_ops")
    elif "torch.compile" in way:
        forward = torch.compile(model, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, fused=True)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss: Tensor = criterion(forward(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def rows(tiny: bool, device: str) -> Iterator[gpu_rows.Row]:
    """Each model in each way."""
    for way in WAYS:
        for name in MODELS:
            yield {"model": name, "way": way}, partial(step_of, name, way, tiny, device)


if __name__ == "__main__":
    gpu_rows.main(__doc__, {"training": rows})

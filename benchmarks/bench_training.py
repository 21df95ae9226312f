"""Whole training steps (forward, backward, SGD) of five small models: what the ops are worth in a user's loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops

from .harness import COMPILE, OURS, TRUTH, Case, Inputs, Provider, Runner
from .offered import missing_options

OP = "training"
Loss = Callable[[Tensor, Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "tanh": torch.tanh}


class Norm(nn.Module):
    """Batch norm, then the residual, then the activation; ``fused`` chooses whose."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, activation: str | None, fused: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.activation, self.fused = activation, fused
        self.inside = fused and not missing_options(fused_ops.batch_norm, "activation", "residual")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        arguments = (x, self.running_mean, self.running_var, self.weight, self.bias, True)
        if self.inside:
            return fused_ops.batch_norm(*arguments, activation=self.activation, residual=residual)
        y = fused_ops.batch_norm(*arguments) if self.fused else F.batch_norm(*arguments)
        if residual is not None:
            y = y + residual if self.fused else y.add_(residual)
        return ACTIVATIONS[self.activation](y) if self.activation else y


class NamesMlp(nn.Module):
    """Three characters predict the fourth."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(27, 10), nn.Linear(30, 64, bias=False)
        self.norm, self.outer = Norm(64, "tanh", fused), nn.Linear(64, 27)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.outer(self.norm(self.inner(self.embedding(x).flatten(1))))
        return logits


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels_in: int, channels: int, stride: int, fused: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = Norm(channels, "relu", fused), Norm(channels, "relu", fused)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, Norm(channels, None, fused))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.first(x))
        result: Tensor = self.norm2(self.second(inner), self.shortcut(x))
        return result


class ResNetBlock(nn.Module):
    """One block, pooled to ten classes."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.block, self.head = Block(64, 64, 1, fused), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(x).mean((2, 3)))
        return logits


class ResNet(nn.Module):
    """ResNet-18 for 32x32 images, at half the usual width."""

    def __init__(self, fused: bool, width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), Norm(width, "relu", fused)
        blocks, channels = [], width
        for stage in range(4):
            out = width << stage
            blocks += [Block(channels, out, 1 if stage == 0 else 2, fused), Block(out, out, 1, fused)]
            channels = out
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))
        return logits


class GptHead(nn.Module):
    """The end of a language model: layer norm and the projection to the vocabulary."""

    def __init__(self, fused: bool, features: int = 256, vocabulary: int = 32000) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits


class SegmentationHead(nn.Module):
    """3x3 convolution, norm, 1x1 convolution to the classes, upsampled to the labels' size."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(32, 32, 3, 1, 1, bias=False), Norm(32, "relu", fused)
        self.outer = nn.Conv2d(32, 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.outer(self.norm(self.inner(x))), scale_factor=2.0, mode="bilinear")


class TrainingRunner:
    """One SGD step of a model on one fixed batch."""

    def __init__(self, model: nn.Module, loss: Loss, inputs: Inputs, compiled: bool, threads: int) -> None:
        tensors = dict(inputs.tensors)
        self._x, self._y = tensors.pop("x"), tensors.pop("y")
        self._model = model.to(next(iter(tensors.values())).device, next(iter(tensors.values())).dtype)
        self._model.load_state_dict(tensors)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)

        def forward(x: Tensor, y: Tensor) -> Tensor:
            return loss(model(x), y)

        self._forward = forward
        if compiled:
            import torch._inductor.config as inductor

            inductor.cpp.threads = threads
            self._forward = torch.compile(forward, dynamic=False)

    def prepare(self, direction: str) -> None:
        """Nothing: the batch is there and the step frees the gradients of the one before."""

    def run(self, direction: str) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._forward(self._x, self._y).backward()
        self._optimizer.step()

    def results(self) -> dict[str, Tensor]:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._forward(self._x, self._y)
        loss.backward()
        grads = {f"grad {name}": p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}
        return {"output": loss.detach().clone(), **grads}


def _make(
    model: Callable[[bool], nn.Module], fused: bool, loss: Loss, compiled: bool, case: Case, inputs: Inputs,
    threads: int,
) -> Runner:  # fmt: skip
    return TrainingRunner(model(fused), loss, inputs, compiled, threads)


def _our_loss(input: Tensor, target: Tensor) -> Tensor:
    return fused_ops.cross_entropy(input, target)


def _our_loss_in_place(input: Tensor, target: Tensor) -> Tensor:
    return fused_ops.cross_entropy(input, target, inplace_backward=True)


def _draw(model: Callable[[bool], nn.Module], x: Callable[[], Tensor], y: Callable[[], Tensor], device: str) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tensors = {"x": x(), "y": y(), **model(False).state_dict()}
    # Parameters first: their dtype is the model's.
    order = [name for name in tensors if name not in ("x", "y")] + ["x", "y"]
    return Inputs({name: tensors[name].to(device) for name in order}, leaves=())


def cases(device: str) -> list[Case]:
    """The five models."""

    def make(
        name: str,
        model: Callable[[bool], nn.Module],
        x: Callable[[], Tensor],
        y: Callable[[], Tensor],
        shape: tuple[int, ...],
        quick: bool = False,
        in_place: bool = False,
    ) -> Case:
        providers = [
            Provider(TRUTH, make=partial(_make, model, False, F.cross_entropy, False)),
            Provider(COMPILE, make=partial(_make, model, False, F.cross_entropy, True)),
            Provider(OURS, make=partial(_make, model, True, _our_loss, False)),
            Provider(f"{OURS} + compile", make=partial(_make, model, True, _our_loss, True)),
        ]
        if in_place:
            reason = missing_options(fused_ops.cross_entropy, "inplace_backward")
            function = None if reason else partial(_make, model, True, _our_loss_in_place, False)
            providers.append(Provider(f"{OURS} in place", make=function, missing=reason))
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=torch.float32,
            inputs=partial(_draw, model, x, y),
            providers=tuple(providers),
            moved_bytes={},
            formula="not stated: most of the time is spent in layers that are the same for all providers",
            directions=("step",),
            part="training",
            quick=quick,
            tiny=name == "names MLP",
            memory=("full",),
        )

    def integers(high: int, *shape: int) -> Callable[[], Tensor]:
        return partial(torch.randint, 0, high, shape)

    return [
        make("names MLP", NamesMlp, integers(27, 32, 3), integers(27, 32), (32, 3), quick=True),
        make("ResNet block", ResNetBlock, partial(torch.randn, 32, 64, 32, 32), integers(10, 32), (32, 64, 32, 32)),
        make("ResNet-18-like", ResNet, partial(torch.randn, 64, 3, 32, 32), integers(10, 64), (64, 3, 32, 32)),
        make("GPT head", GptHead, partial(torch.randn, 1024, 256), integers(32000, 1024), (1024, 256), in_place=True),
        make(
            "segmentation head",
            SegmentationHead,
            partial(torch.randn, 8, 32, 128, 128),
            integers(21, 8, 256, 256),
            (8, 32, 128, 128),
            quick=True,
            in_place=True,
        ),
    ]

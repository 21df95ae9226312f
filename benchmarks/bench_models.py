"""Training steps of models that nobody here wrote (transformers, random weights), before and after convert."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_ops

from .harness import OURS, TRUTH, Case, Inputs, Provider, Runner

OP = "models"
AVAILABLE = importlib.util.find_spec("transformers") is not None  # the models extra
PATCHED = f"{OURS} and patch"
Batch = dict[str, Tensor]


def _images(count: int, size: int, classes: int) -> Batch:
    return {"pixel_values": torch.randn(count, 3, size, size), "labels": torch.randint(0, classes, (count,))}


def _scenes(count: int, size: int, classes: int) -> Batch:
    return {"pixel_values": torch.randn(count, 3, size, size), "labels": torch.randint(0, classes, (count, size, size))}


def _tokens(count: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (count, length))
    return {"input_ids": ids, "labels": ids.clone()}


def resnet() -> nn.Module:
    """ResNet-18 at half its width."""
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic", num_labels=100
    )
    return transformers.ResNetForImageClassification(config)


def regnet() -> nn.Module:
    """RegNetX, small."""
    import transformers

    config = transformers.RegNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 160, 256], depths=[1, 2, 4, 2], groups_width=16, layer_type="x",
        num_labels=100,
    )  # fmt: skip
    return transformers.RegNetForImageClassification(config)


def mobilenet() -> nn.Module:
    """MobileNetV2 at half its width, with DeepLabV3's head."""
    import transformers

    config = transformers.MobileNetV2Config(depth_multiplier=0.5, num_labels=21, classifier_dropout_prob=0.0)
    return transformers.MobileNetV2ForSemanticSegmentation(config)


def llama() -> nn.Module:
    """Two layers of 256 features, and a vocabulary of 32,000."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Two layers of 256 features, and a vocabulary of 32,000 with tied weights."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=32000, n_embd=256, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class StepRunner:
    """One SGD step of a model through its own loss, on one batch."""

    def __init__(self, model: nn.Module, inputs: Inputs, patched: bool) -> None:
        self._batch = dict(inputs.tensors)
        first = next(iter(self._batch.values()))
        self._model = model.to(first.device).train()
        if any(t.dtype == torch.float64 for t in self._batch.values()):
            self._model = self._model.double()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        self._patched = patched

    def prepare(self, direction: str) -> None:
        """Nothing: the batch is there and the step frees the gradients of the one before."""

    def _backward(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        batch = {name: t for name, t in self._batch.items() if name != "truth"}
        with fused_ops.patch() if self._patched else contextlib.nullcontext():
            loss: Tensor = self._model(**batch).loss
        loss.backward()
        return loss

    def run(self, direction: str) -> None:
        self._backward()
        self._optimizer.step()

    def results(self) -> dict[str, Tensor]:
        """The loss, and all gradients of a float64 copy as one vector.

        In float32 a ReLU whose input is within rounding of zero may let the gradient through or not, with eager as with
        ours, which moves a gradient by 1e-3; and single gradients (a bias before batch norm) are nothing but rounding.
        """
        loss = self._backward().detach().clone()
        self._optimizer.zero_grad(set_to_none=True)
        batch = {name: t.double() if t.is_floating_point() else t for name, t in self._batch.items()}
        exact = StepRunner(copy.deepcopy(self._model).double(), Inputs(batch, leaves=()), self._patched)
        exact._backward()
        grads = [p.grad.flatten() for p in exact._model.parameters() if p.grad is not None]
        return {"output": loss, "gradients": torch.cat(grads)}


def _make(
    build: Callable[[], nn.Module], convert: bool, patched: bool, case: Case, inputs: Inputs, threads: int
) -> Runner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    if convert:
        fused_ops.convert(model, loss=model.loss_function)  # type: ignore[arg-type]
    return StepRunner(model, inputs, patched)


def _draw(batch: Callable[[], Batch], device: str) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        # A float tensor, so that the harness' float64 run is seen where all that goes in are indices.
        tensors = {**batch(), "truth": torch.zeros(1)}
    return Inputs({name: t.to(device) for name, t in tensors.items()}, leaves=())


def cases(device: str) -> list[Case]:
    """Two classifiers, a segmentation model, two language models."""

    def make(name: str, build: Callable[[], nn.Module], batch: Callable[[], Batch], shape: tuple[int, ...]) -> Case:
        providers = [
            Provider(TRUTH, make=partial(_make, build, False, False)),
            Provider(OURS, make=partial(_make, build, True, False)),
        ]
        if build is mobilenet:  # which makes its loss in its forward
            providers.append(Provider(PATCHED, make=partial(_make, build, True, True)))
        options: dict[str, Any] = {"directions": ("step",), "part": "training", "quick": True}
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=torch.float32,
            inputs=partial(_draw, batch),
            providers=tuple(providers),
            moved_bytes={},
            formula="not stated: most of the time is spent in layers that are the same for all providers",
            memory=("quick", "full"),
            **options,
        )

    return [
        make("ResNet-18, half width", resnet, partial(_images, 32, 96, 100), (32, 3, 96, 96)),
        make("RegNetX", regnet, partial(_images, 32, 96, 100), (32, 3, 96, 96)),
        make("MobileNetV2 with DeepLabV3", mobilenet, partial(_scenes, 8, 128, 21), (8, 3, 128, 128)),
        make("Llama, vocabulary 32000", llama, partial(_tokens, 2, 512, 32000), (2, 512)),
        make("GPT-2, vocabulary 32000", gpt2, partial(_tokens, 2, 512, 32000), (2, 512)),
    ]

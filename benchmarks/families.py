"""Models that nobody here wrote, with random weights: one of each family, small for tests or at a size that trains.

timm, torchvision, transformers and segmentation_models_pytorch are imported when a model of theirs is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .torchvision_without_ops import import_torchvision, is_installed

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: As its authors write it.
        library: The package that it comes from.
        build: Makes the model; True: a small one.
        batch: Makes its keyword arguments, labels among them where its forward takes them; True: a small one.
        targets: Makes the labels of a model whose forward returns logits; None where it returns its loss itself.
        heads: Whether it has a head over a vocabulary that ``convert`` can join with the loss.
    """

    name: str
    library: str
    build: Callable[[bool], nn.Module]
    batch: Callable[[bool], Batch]
    targets: Callable[[bool], Tensor] | None = None
    heads: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot be built here; empty if it can."""
        needed = {"timm": ("timm", "torchvision"), "segmentation_models_pytorch": (
            "segmentation_models_pytorch", "timm", "torchvision")}.get(self.library, (self.library,))  # fmt: skip
        absent = [name for name in needed if not is_installed(name)]
        return f"needs {' and '.join(absent)}: make models" if absent else ""

    def loss(self, output: Any, small: bool) -> Tensor:
        """The loss that it is trained with."""
        if self.targets is None:
            return output.loss
        targets = self.targets(small)
        scores = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        return torch.stack([F.cross_entropy(t, targets) for t in scores]).sum()


def _module(name: str) -> Any:
    if name != "transformers":
        import_torchvision()
    return importlib.import_module(name)


# --- Images ----------------------------------------------------------------------------------------------------------

CLASSES = 10


def _images(small_size: int, size: int, key: str = "x") -> Callable[[bool], Batch]:
    return lambda small: {key: torch.randn(4, 3, *[small_size if small else size] * 2)}


def _classes(small: bool) -> Tensor:
    return torch.arange(4) * 3 % CLASSES


def _timm(name: str, small_size: int = 32, size: int = 128, **small_options: Any) -> Family:
    def build(small: bool) -> nn.Module:
        return _module("timm").create_model(name, num_classes=CLASSES, **(small_options if small else {}))

    return Family(name, "timm", build, _images(small_size, size), _classes)


def _timm_vit(name: str) -> Family:
    def build(small: bool) -> nn.Module:
        options = {"depth": 2, "img_size": 32} if small else {"img_size": 128}
        return _module("timm").create_model(name, num_classes=CLASSES, **options)

    return Family(name, "timm", build, _images(32, 128), _classes)


def _torchvision(name: str, small_size: int = 32, size: int = 128, **options: Any) -> Family:
    def build(small: bool) -> nn.Module:
        models = _module("torchvision.models")
        return getattr(models, name)(weights=None, num_classes=CLASSES, **options)

    return Family(name, "torchvision", build, _images(small_size, size), _classes)


def _densenet() -> Family:
    def build(small: bool) -> nn.Module:
        models = _module("torchvision.models")
        if small:
            return models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES)
        return models.densenet121(num_classes=CLASSES)

    return Family("densenet121", "torchvision", build, _images(32, 128), _classes)


def _resnet(name: str, block: str, layers: tuple[int, ...]) -> Family:
    def build(small: bool) -> nn.Module:
        resnet = _module("torchvision.models.resnet")
        if small:
            return resnet.ResNet(getattr(resnet, block), layers, num_classes=CLASSES)
        return getattr(resnet, name)(num_classes=CLASSES)

    return Family(name, "torchvision", build, _images(32, 128), _classes)


def _scenes(small: bool) -> Tensor:
    size = 32 if small else 128
    return torch.arange(4 * size * size).view(4, size, size) // 7 % CLASSES


def _vgg() -> Family:
    def build(small: bool) -> nn.Module:
        model = _module("torchvision.models").vgg11_bn(num_classes=CLASSES)
        if small:
            model.classifier = nn.Linear(512 * 7 * 7, CLASSES)
        return model

    return Family("vgg11_bn", "torchvision", build, _images(32, 128), _classes)


def _torchvision_segmentation(name: str, key: str = "x") -> Family:
    def build(small: bool) -> nn.Module:
        models = _module("torchvision.models.segmentation")
        return getattr(models, name)(weights=None, weights_backbone=None, num_classes=CLASSES)

    return Family(name, "torchvision", build, _images(32, 128, key), _scenes)


def _video() -> Family:
    def build(small: bool) -> nn.Module:
        video = _module("torchvision.models.video.resnet")
        if not small:
            return video.mc3_18(weights=None, num_classes=CLASSES)
        makers = [video.Conv3DSimple, *[video.Conv3DNoTemporal] * 3]
        return video.VideoResNet(video.BasicBlock, makers, (1, 1, 1, 1), video.BasicStem, num_classes=CLASSES)

    def clips(small: bool) -> Batch:
        return {"x": torch.randn(4, 3, *([2, 16, 16] if small else [8, 64, 64]))}

    return Family("mc3_18", "torchvision", build, clips, _classes)


def _unet(kind: str, encoder: str) -> Family:
    def build(small: bool) -> nn.Module:
        smp = _module("segmentation_models_pytorch")
        options = {"encoder_depth": 3, "decoder_channels": (32, 16, 8)} if small and kind == "Unet" else {}
        return getattr(smp, kind)(encoder, encoder_weights=None, classes=CLASSES, **options)

    return Family(f"{kind}, {encoder}", "segmentation_models_pytorch", build, _images(32, 128), _scenes)


# --- transformers ----------------------------------------------------------------------------------------------------


def _tokens(small: bool) -> Batch:
    length, vocabulary = (12, 101) if small else (256, 16000)
    ids = torch.randint(3, vocabulary, (2, length))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def _pairs(small: bool) -> Batch:
    """For an encoder and a decoder."""
    batch = _tokens(small)
    return batch | {"labels": batch["labels"].flip(1)}


def _speech(small: bool) -> Batch:
    return {"input_features": torch.randn(2, 8, 40 if small else 400), "labels": _tokens(small)["labels"][:, :32]}


def _pictures(small: bool) -> Batch:
    return {"pixel_values": torch.randn(4, 3, *[32 if small else 128] * 2), "labels": _classes(small)}


def _sizes(small: bool) -> dict[str, Any]:
    """What most configurations call the same."""
    width = 16 if small else 256
    return {
        "vocab_size": 101 if small else 16000, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": width // 2,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _transformers(
    name: str, model: str, config: str, batch: Callable[[bool], Batch] = _tokens, heads: bool = True, **options: Any
) -> Family:
    """``options`` replace or, where None, remove those of ``_sizes``; functions of ``small`` are called."""

    def build(small: bool) -> nn.Module:
        transformers = _module("transformers")
        given = (_sizes(small) if heads else {}) | {k: v(small) if callable(v) else v for k, v in options.items()}
        made = getattr(transformers, config)(**{k: v for k, v in given.items() if v is not None})
        return getattr(transformers, model)(made)

    return Family(name, "transformers", build, batch, heads=heads)


def _width(small: bool) -> int:
    return 16 if small else 256


_BART = {
    "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
    "num_key_value_heads": None, "head_dim": None, "d_model": _width, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": _width, "decoder_ffn_dim": _width,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_WHISPER = {
    **_BART, "max_position_embeddings": None, "num_mel_bins": 8,
    "max_source_positions": lambda small: 20 if small else 200, "max_target_positions": 64,
    "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
_GPT2 = {
    "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
    "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": None, "n_embd": _width, "n_layer": 2,
    "n_head": 2, "n_positions": 512,
}  # fmt: skip
_T5 = {
    **dict.fromkeys(_sizes(True)), "vocab_size": lambda small: _sizes(small)["vocab_size"], "d_model": _width,
    "d_kv": lambda small: _width(small) // 2, "d_ff": _width, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BERT = {"num_key_value_heads": None, "head_dim": None}

FAMILIES: tuple[Family, ...] = (
    _timm("resnet18", layers=(1, 1, 1, 1)),
    _timm("resnet50", layers=(1, 1, 1, 1)),
    _timm("resnetv2_50", layers=(1, 1, 1, 1)),
    _timm("seresnet18", layers=(1, 1, 1, 1)),
    _timm("efficientnet_b0"),
    _timm("mobilenetv3_small_050"),
    _timm("regnetx_002"),
    _timm("densenet121", block_config=(2, 2, 2, 2)),
    _timm("repvgg_a0"),
    _timm("inception_v3", small_size=75, size=139),
    _timm("ghostnet_050"),
    _timm("dla46_c"),
    _timm("convnext_atto", depths=(1, 1, 1, 1)),
    _timm_vit("vit_tiny_patch16_224"),
    _resnet("resnet18", "BasicBlock", (1, 1, 1, 1)),
    _resnet("resnet50", "Bottleneck", (1, 1, 1, 1)),
    _densenet(),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("googlenet", init_weights=False),
    _torchvision("inception_v3", small_size=75, size=139, init_weights=False, aux_logits=False),
    _torchvision("efficientnet_b0"),
    _torchvision("regnet_x_400mf", small_size=64),
    _torchvision("shufflenet_v2_x0_5"),
    _vgg(),
    _torchvision_segmentation("fcn_resnet50"),
    _torchvision_segmentation("deeplabv3_mobilenet_v3_large"),
    _torchvision_segmentation("lraspp_mobilenet_v3_large", "input"),
    _video(),
    _unet("Unet", "resnet18"),
    _unet("Unet", "mobilenet_v2"),
    _unet("FPN", "resnet18"),
    _transformers(
        "ResNet", "ResNetForImageClassification", "ResNetConfig", _pictures, False, num_labels=CLASSES,
        embedding_size=lambda small: 8 if small else 32, hidden_sizes=lambda small: [8, 16] if small else [32, 64, 128],
        depths=lambda small: [2, 1] if small else [2, 2, 2], layer_type="basic",
    ),
    _transformers(
        "RegNet", "RegNetForImageClassification", "RegNetConfig", _pictures, False, num_labels=CLASSES,
        embedding_size=lambda small: 8 if small else 32, hidden_sizes=lambda small: [8, 16] if small else [32, 64, 128],
        depths=lambda small: [1, 1] if small else [2, 2, 2], groups_width=lambda small: 4 if small else 16,
    ),
    _transformers("Llama", "LlamaForCausalLM", "LlamaConfig"),
    _transformers("Mistral", "MistralForCausalLM", "MistralConfig"),
    _transformers("Qwen 2", "Qwen2ForCausalLM", "Qwen2Config"),
    _transformers("Qwen 3", "Qwen3ForCausalLM", "Qwen3Config"),
    _transformers("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", sliding_window=8),
    _transformers("Cohere", "CohereForCausalLM", "CohereConfig"),
    _transformers("Granite", "GraniteForCausalLM", "GraniteConfig", logits_scaling=4.0),
    _transformers("GPT-2", "GPT2LMHeadModel", "GPT2Config", **_GPT2),
    _transformers("BART", "BartForConditionalGeneration", "BartConfig", _pairs, **_BART),
    _transformers("T5", "T5ForConditionalGeneration", "T5Config", _pairs, **_T5),
    _transformers("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", _speech, **_WHISPER),
    _transformers("BERT, masked", "BertForMaskedLM", "BertConfig", **_BERT),
    _transformers("RoBERTa, masked", "RobertaForMaskedLM", "RobertaConfig", **_BERT),
)  # fmt: skip

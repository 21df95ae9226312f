"""``convert`` and the backend change nothing of what other people's models do: one of each family, small, float64."""

import pytest
import torch
from odd_models import check
from odd_models.case import Case
from test_odd_models import compiled, compiled_alone
from torch import nn

import fused_ops
from benchmarks.families import FAMILIES

# Of the backend, which compiles for seconds: those with other graphs than the rest.
AT_ONCE = {("timm", "resnet18"), ("transformers", "ResNet"), ("transformers", "Gemma 2"), ("transformers", "BART")}
# Of convert: one of each way in which the families write down their neighbours and heads.
CONVERTED = AT_ONCE | {
    *(("timm", name) for name in ("resnetv2_50", "efficientnet_b0", "mobilenetv3_small_050", "densenet121")),
    *(("torchvision", name) for name in ("resnet50", "densenet121", "mobilenet_v2", "mc3_18")),
    ("segmentation_models_pytorch", "Unet, resnet18"),
    *(("transformers", name) for name in ("RegNet", "Llama", "Granite", "T5", "Whisper", "BERT, masked")),
}


class Trained(nn.Module):
    """A model of a family with its own loss; returns the loss, and the logits after that."""

    def __init__(self, family):
        super().__init__()
        self.model = family.build(True)
        self.family = family

    def forward(self, **batch):
        output = self.model(**batch)
        if self.family.targets is not None:
            return output
        return {"loss": output.loss, "logits": output.logits.detach().clone()}


def converted(wrapper):
    family, model = wrapper.family, wrapper.model
    own = getattr(model, "loss_function", None) if family.heads else None
    fused_ops.convert(model, loss=own)
    return wrapper


converted.in_place = True


def compiled_inside(transform):
    """The model is compiled, not what is around it."""

    def wrap(wrapper):
        call = transform(wrapper.model)
        return lambda **batch: Trained.forward(_Around(wrapper.family, call), **batch)

    return wrap


class _Around:
    def __init__(self, family, model):
        self.family, self.model = family, model


def case_of(family):
    if family.missing:
        pytest.skip(family.missing)
    rounds = torch.float32 if family.heads else None  # their losses turn the logits to float32
    return Case(family.name, lambda: Trained(family), lambda: family.batch(True), rounds=rounds)


pytestmark = pytest.mark.usefixtures("heads_of_any_size", "graphs_of_any_size")


def _families(at_once):
    return [
        pytest.param(f, id=f"{f.library}-{f.name}", marks=() if at_once((f.library, f.name)) else pytest.mark.slow)
        for f in FAMILIES
    ]


@pytest.mark.parametrize("family", _families(lambda key: key in CONVERTED))
def test_convert(family):
    check(case_of(family), converted, "short")


@pytest.mark.parametrize("family", _families(lambda key: key in AT_ONCE))
def test_backend(family):
    case = case_of(family)
    check(case, compiled_inside(compiled), "short", reference=compiled_inside(compiled_alone))

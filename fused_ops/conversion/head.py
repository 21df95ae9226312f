"""The linear head of a model: found by rules, and made to leave its logits to the loss."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.conversion import deferred_losses, deferred_ops  # noqa: F401  # what deferred logits can do
from fused_ops.conversion.deferred_logits import DeferredLogits, HeadTensors, State
from fused_ops.conversion.records import HeadRecord
from fused_ops.conversion.rules import original_of
from fused_ops.core.function import autocast_enabled
from fused_ops.core.graph import in_graph
from fused_ops.core.hooks import hooked
from fused_ops.core.torch_private import (
    any_global_hook,
    assume_constant_result,
    forward_ad,
    is_tracing,
    transforms_active,
)
from fused_ops.distributed.dtensor import any_dtensor, why_not_a_colwise_head
from fused_ops.distributed.fsdp import before_it_is_freed, has_only_hooks_of_parallelism, source_of
from fused_ops.ops.linear_cross_entropy.plan import SMALL_BYTES

_FREED = "fully_shard frees its weight after the forward (reshard_after_forward)"
_PLAIN = (nn.Parameter, Tensor)
RECORD = "_fused_ops_record"  # of a head, in its __dict__: a HeadRecord


class HeadLinear(nn.Linear):
    """``nn.Linear`` whose result is not computed before somebody needs it."""

    def forward(self, input: Tensor) -> Tensor:
        """The logits."""
        if torch.compiler.is_compiling():
            _note_compiled(self)
            return super().forward(input)
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        reason = _why_now(self, input, weight, bias)
        record = self.__dict__.get(RECORD)
        if not reason and weight is not None:
            shard, freed_after = source_of(weight)
            if freed_after is not None and all(module is not self for module in freed_after):
                watched = () if shard is None else (shard,)
                logits = DeferredLogits.of(_tensors(input, weight, bias), record, watched)
                if freed_after:
                    before_it_is_freed(freed_after, partial(_settle_in_time, weakref.ref(logits._state)))
                return logits
            reason = _FREED
        if record is not None:
            record.computed[reason] += 1
        return super().forward(input)

    def _get_name(self) -> str:
        return "Linear"  # printed as it was


def _settle_in_time(reference: weakref.ref[State]) -> None:
    """Where the loss was computed in the forward, nobody need have the logits."""
    state = reference()
    if state is not None and not state.consumed:
        state.settle(_FREED)


def _tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> HeadTensors:
    """As the layer will use them: in autocast's dtype where that is on."""
    if not autocast_enabled(input) or input.dtype == torch.float64:
        return HeadTensors(input, weight, bias)
    dtype = torch.get_autocast_dtype(input.device.type)
    return HeadTensors(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _why_now(head: HeadLinear, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why the logits are computed at once; empty if they need not be."""
    spread = any_dtensor(input)
    if type(input) is not Tensor and not spread:
        return "its input is a subclass of Tensor, or is being traced"
    if not torch.is_grad_enabled():
        return "gradients were off"
    if hooked(head) and not has_only_hooks_of_parallelism(head):
        return "the module has hooks"
    if any_global_hook():
        return "there are hooks of all modules"
    if is_tracing() or in_graph() or transforms_active() or forward_ad._current_level >= 0:
        return "a tracer, a transform of torch.func or forward-mode AD was active"
    if weight is None:  # and must not be computed twice
        return "its weight is computed from other parameters"
    if spread:
        if why := why_not_a_colwise_head(input, weight, bias):
            return why
    elif type(weight) not in _PLAIN or not (bias is None or type(bias) in _PLAIN):
        return "its weight is a subclass of Tensor"
    if not isinstance(weight, nn.Parameter) and weight._is_view():
        return "its weight is a view of another tensor"
    return _why_not_worth_it(input, weight, bias)


def _why_not_worth_it(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    shape, dtype, mixed = input.shape, input.dtype, False
    if len(shape) < 2:
        return "there was one row"
    if autocast_enabled(input) and dtype != torch.float64:
        dtype, mixed = torch.get_autocast_dtype(input.device.type), True
    for t in (weight,) if bias is None else (weight, bias):
        if t.device != input.device or (t.dtype == torch.float64 if mixed else t.dtype != dtype):
            return "input and weight do not fit"  # which PyTorch has a message for
    classes, features = weight.shape
    if shape[-1] != features:
        return "input and weight do not fit"
    if math.prod(shape[:-1]) * classes * dtype.itemsize <= SMALL_BYTES:
        return f"logits under {SMALL_BYTES >> 20} MiB"
    return ""


@assume_constant_result
def _note_compiled(head: HeadLinear) -> None:
    """Called once, when the call is compiled."""
    if (record := head.__dict__.get(RECORD)) is not None:
        record.computed["under torch.compile"] += 1


# --- Which module it is ----------------------------------------------------------------------------------------------

Finder = Callable[[nn.Module], "nn.Module | None"]
_RULES: dict[str, str | Finder] = {}


def register_head(kind: type[nn.Module] | str, where: str | Finder) -> None:
    """Tells ``convert(model, loss=...)`` where the models of a class have their linear head.

    Args:
        kind: The class itself (not its subclasses), or its "module:qualified name" where that is not imported yet.
        where: The name of the submodule that computes the class scores, last of all, such as ``"fc"``; it may itself be
            of a class with a rule, or an ``nn.Sequential``. Or a function of the model that returns the submodule.
    """
    _RULES[kind if isinstance(kind, str) else _name(kind)] = where


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def find_head(model: nn.Module, head: nn.Module | str | None = None) -> tuple[nn.Module | None, str]:
    """The linear layer whose result is what a model scores classes or tokens with.

    Nothing is run or read for it: it is named, or the model says so itself (``get_output_embeddings``), or there is a
    rule for the model's class, or the model is an ``nn.Sequential`` that ends in it.

    Args:
        model: Any module.
        head: The module, or its name in the model, where the caller knows.

    Returns:
        The head, and nothing more to say; or None, and why it was not found.

    Raises:
        ValueError: the model has no module ``head``.
        TypeError: ``head`` is neither a module nor a name, or no linear layer that can leave its result to the loss.
    """
    if head is not None:
        found = _named(model, head)
        if not linears_of(found):
            raise TypeError(f"convert: expected head to be an nn.Linear, got {type(found).__name__}")
        return found, ""
    last, why = _by_rule(model)
    if last is None or linears_of(last):
        return last, why
    return None, _why_not(last)


def _why_not(last: nn.Module) -> str:
    kind = type(last)
    if kind in (nn.Linear, HeadLinear):
        return "the linear layer that computes last has a forward set on the instance"
    if isinstance(last, nn.Linear):
        return f"what computes last is {kind.__module__}.{kind.__qualname__}, a subclass of nn.Linear"
    return f"what computes last is {'an' if kind.__name__[:1] in 'AEIOU' else 'a'} {kind.__name__}, not an nn.Linear"


def _named(model: nn.Module, head: nn.Module | str) -> nn.Module:
    if isinstance(head, nn.Module):
        if all(module is not head for module in model.modules()):
            raise ValueError(f"convert: expected head to be a module of model, got a {type(head).__name__} that is not")
        return head
    if not isinstance(head, str):
        raise TypeError(f"convert: expected head to be a module of model or its name, got {type(head).__name__}")
    try:
        return model.get_submodule(head)
    except AttributeError:
        raise ValueError(f"convert: expected head to be the name of a module of model, got {head!r}") from None


def _by_rule(module: nn.Module) -> tuple[nn.Module | None, str]:
    """The module that computes last, as far as the rules lead."""
    kind = type(module)
    if linears_of(module) or isinstance(module, nn.Linear):
        return module, ""
    rule = _RULES.get(_name(kind))
    if rule is not None:
        found = module.get_submodule(rule) if isinstance(rule, str) else rule(module)
        return (None, f"{kind.__name__} has no head") if found is None else _by_rule(found)
    for of_kind in (token_head, _of_family):
        if (found := of_kind(module)) is not None:
            return _by_rule(found)
    if isinstance(module, nn.Sequential) and (original_of(kind) or kind).forward is nn.Sequential.forward:
        inside = [child for child in module._modules.values() if type(child) is not nn.Identity]
        return _by_rule(inside[-1]) if inside and inside[-1] is not None else (None, "it is an empty nn.Sequential")
    if any(isinstance(child, nn.Linear) for child in module.modules()):
        return (
            None,
            f'there is no rule for a {kind.__name__}: name its linear layer, convert(model, loss=..., head="...")',
        )
    return module, ""


def token_head(model: nn.Module) -> nn.Module | None:
    """The head of a language model of transformers."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def linears_of(head: nn.Module) -> list[nn.Linear]:
    """The linear layers whose results a head is the sum of: itself, or the base and LoRA's second factors; or none.

    What somebody else's subclass or a forward set on the instance computes is not known.
    """
    if type(head) in (nn.Linear, HeadLinear):
        return [head] if "forward" not in head.__dict__ else []  # type: ignore[list-item]
    if _name(type(head)) == "peft.tuners.lora.layer:Linear":
        peft: Any = head
        parts = [peft.base_layer, *peft.lora_B.values()]
        found = [linear for part in parts for linear in linears_of(part)]
        return found if len(found) == len(parts) else []
    return []


def defer(linear: nn.Linear, record: HeadRecord | None = None) -> None:
    """Makes a linear layer leave its result to the loss; the record counts what becomes of it."""
    linear.__class__ = HeadLinear
    if record is not None:
        linear.__dict__[RECORD] = record


def undefer(linear: nn.Linear) -> None:
    """Undoes ``defer``."""
    linear.__class__ = nn.Linear
    linear.__dict__.pop(RECORD, None)


def _of_family(model: nn.Module) -> nn.Module | None:
    """What timm's models and transformers' classifiers call their last layer."""
    package, name = type(model).__module__.partition(".")[0], type(model).__name__
    found: Any = None
    if package == "timm" and callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()  # type: ignore[operator]
    elif package == "transformers" and name.endswith(_CLASSIFIERS):
        found = model._modules.get("score", model._modules.get("classifier"))
    return found if isinstance(found, nn.Module) else None


def _trained_copy(wrapper: nn.Module) -> nn.Module | None:
    """Of what peft trains as a whole."""
    copies: Any = wrapper.modules_to_save
    found = copies[wrapper.active_adapter]
    return found if isinstance(found, nn.Module) else None


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
_TORCHVISION = {
    "fc": (
        "resnet:ResNet",
        "regnet:RegNet",
        "googlenet:GoogLeNet",
        "inception:Inception3",
        "shufflenetv2:ShuffleNetV2",
    ),
    "classifier": (
        *("alexnet:AlexNet", "vgg:VGG", "densenet:DenseNet", "mobilenetv2:MobileNetV2", "mobilenetv3:MobileNetV3"),
        *("efficientnet:EfficientNet", "mnasnet:MNASNet", "convnext:ConvNeXt", "maxvit:MaxVit"),
    ),
    "heads": ("vision_transformer:VisionTransformer",),
    "head": ("swin_transformer:SwinTransformer",),
}
for _attribute, _kinds in _TORCHVISION.items():
    for _kind in _kinds:
        register_head(f"torchvision.models.{_kind}", _attribute)
for _wrapper in ("torch.nn.parallel.distributed:DistributedDataParallel", "torch.optim.swa_utils:AveragedModel"):
    register_head(_wrapper, "module")
register_head("peft.utils.other:ModulesToSaveWrapper", _trained_copy)

__all__ = ["HeadLinear", "defer", "find_head", "linears_of", "register_head", "token_head", "undefer"]

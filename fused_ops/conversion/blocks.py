"""The rules for classes of well-known libraries, none of which is imported: blocks, batch norms, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.conversion.neighbours import activation_of, count, norm_add_then, norm_then, passed
from fused_ops.conversion.rules import own_forward, register
from fused_ops.core.hooks import plain
from fused_ops.core.torch_private import any_global_hook
from fused_ops.ops.batch_norm.api import batch_norm
from fused_ops.ops.batch_norm.modules import _FusedBatchNorm
from fused_ops.ops.cross_entropy.api import cross_entropy

# --- torchvision


@register("torchvision.models.resnet.BasicBlock", "09e53f6b1fd38e8b")
def torchvision_basic_block(self: Any, x: Any) -> Any:
    """Two convolutions beside a shortcut."""
    out = norm_then(self.conv1(x), self.bn1, self.relu)
    return norm_add_then(self.conv2(out), self.bn2, self.downsample, x, self.relu)


@register("torchvision.models.resnet.Bottleneck", "7e710a4c82b50cca")
def torchvision_bottleneck(self: Any, x: Any) -> Any:
    """Three convolutions beside a shortcut."""
    out = norm_then(self.conv1(x), self.bn1, self.relu)
    out = norm_then(self.conv2(out), self.bn2, self.relu)
    return norm_add_then(self.conv3(out), self.bn3, self.downsample, x, self.relu)


# --- timm


@register("timm.models.resnet.BasicBlock", "74590530467e3feb")
def timm_basic_block(self: Any, x: Any) -> Any:
    """As torchvision's, with what timm's variants put in between."""
    out = self.aa(norm_then(self.conv1(x), self.bn1, self.drop_block, self.act1))
    return _timm_end(self, self.conv2(out), self.bn2, x, self.act2)


@register("timm.models.resnet.Bottleneck", "150c9c24fadbfa3f")
def timm_bottleneck(self: Any, x: Any) -> Any:
    """As torchvision's, with what timm's variants put in between."""
    out = norm_then(self.conv1(x), self.bn1, self.act1)
    out = self.aa(norm_then(self.conv2(out), self.bn2, self.drop_block, self.act2))
    return _timm_end(self, self.conv3(out), self.bn3, x, self.act3)


def _timm_end(self: Any, x: Any, norm: Any, shortcut: Any, activation: Any) -> Any:
    """Batch norm, attention and stochastic depth where there are any, the shortcut and the activation."""
    attention, drop_path = self.se, self.drop_path
    if attention is None and (drop_path is None or passed(drop_path)):
        return norm_add_then(x, norm, self.downsample, shortcut, activation)
    x = norm(x)
    if attention is not None:
        x = attention(x)
    if drop_path is not None:
        x = drop_path(x)
    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    return activation(x)


@register("timm.layers.drop.DropPath", "a275b69633d25684", kind="passed")
def _is_off(module: Any) -> bool:
    return module.drop_prob == 0.0 or not module.training


@register("timm.layers.norm_act.BatchNormAct2d", "85a6514a30bc4677", kind="norm")
def batch_norm_act(self: Any, x: Any) -> Any:
    """Batch norm, a dropout and an activation."""
    if type(x) is not Tensor or x.dim() != 4:
        return own_forward(self)(self, x)
    drop, act = self.drop, self.act
    activation = activation_of(act)
    if activation is not None and passed(drop) and plain(act):
        count(self, activation[0])
        return _FusedBatchNorm.forward(self, x, activation=activation)
    return act(drop(_FusedBatchNorm.forward(self, x)))


# --- transformers


@register("transformers.models.resnet.modeling_resnet.ResNetConvLayer", "bf4867df75c111b0")
def resnet_conv_layer(self: Any, hidden_states: Any) -> Any:
    """Convolution, batch norm, activation."""
    return norm_then(self.convolution(hidden_states), self.normalization, self.activation)


@register("transformers.models.regnet.modeling_regnet.RegNetConvLayer", "a82ae287be459752")
def regnet_conv_layer(self: Any, hidden_state: Any) -> Any:
    """Convolution, batch norm, activation."""
    return norm_then(self.convolution(hidden_state), self.normalization, self.activation)


@register("transformers.models.mobilenet_v1.modeling_mobilenet_v1.MobileNetV1ConvLayer", "693b6d9a03a28d0c")
@register("transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ConvLayer", "693b6d9a03a28d0c")
def mobilenet_conv_layer(self: Any, features: Any) -> Any:
    """Convolution, batch norm, activation, where it has them all."""
    if self.normalization is None or self.activation is None:
        return own_forward(self)(self, features)
    if self.config.tf_padding:
        features = own_forward(self).__globals__["apply_tf_padding"](features, self.convolution)
    return norm_then(self.convolution(features), self.normalization, self.activation)


@register("transformers.models.resnet.modeling_resnet.ResNetShortCut", "42fc2e3d2683c762", kind="shortcut")
@register("transformers.models.regnet.modeling_regnet.RegNetShortCut", "42fc2e3d2683c762", kind="shortcut")
def short_cut(self: Any, input: Any) -> Any:
    """Convolution and batch norm."""
    return self.normalization(self.convolution(input))


@register("transformers.models.resnet.modeling_resnet.ResNetBasicLayer", "f40da95caaefd8fe")
@register("transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer", "f40da95caaefd8fe")
@register("transformers.models.regnet.modeling_regnet.RegNetXLayer", "f40da95caaefd8fe")
@register("transformers.models.regnet.modeling_regnet.RegNetYLayer", "f40da95caaefd8fe")
def residual_layer(self: Any, hidden_state: Any) -> Any:
    """Layers in an nn.Sequential beside a shortcut; the last of them ends with its batch norm."""
    layer, skipped = self.layer, hidden_state
    if _ends_with_norm(layer):
        *first, last = layer._modules.values()
        for module in first:
            hidden_state = module(hidden_state)
        hidden_state = last.convolution(hidden_state)
        return norm_add_then(hidden_state, last.normalization, self.shortcut, skipped, self.activation)
    hidden_state = layer(hidden_state)
    hidden_state += self.shortcut(skipped)
    return self.activation(hidden_state)


def _ends_with_norm(layer: Any) -> bool:
    """Whether it is an nn.Sequential whose last module is one of the layers above, without an activation."""
    if type(layer) is not nn.Sequential or not plain(layer) or not layer._modules or any_global_hook():
        return False
    last: Any = layer._modules[next(reversed(layer._modules))]
    rule = type(last).__dict__.get("_fused_ops_rule")
    layers = (resnet_conv_layer, regnet_conv_layer)
    return rule is not None and rule.forward in layers and plain(last) and passed(last.activation)


# --- Batch norms that are constants


def serves_frozen(self: Any, x: Tensor) -> bool:
    """Whether nothing would be saved for a backward, which a multiplication by constants does without."""
    tensors = self.weight, self.bias, self.running_mean, self.running_var
    return (
        x.dim() == 4
        and not (torch.is_grad_enabled() and x.requires_grad)
        and all(t.dtype == x.dtype and t.shape == x.shape[1:2] and not t.requires_grad for t in tensors)
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    )


@register("torchvision.ops.misc.FrozenBatchNorm2d", "f2e51f00870b5af9", kind="norm", takes=serves_frozen)
def frozen_batch_norm(self: Any, x: Any, residual: Any = None, *, activation: Any = None) -> Any:
    """Batch norm by four buffers, in one op where no gradient is to come back through it."""
    if type(x) is not Tensor or not serves_frozen(self, x):
        return own_forward(self)(self, x)
    name, slope = activation or (None, 0.0)
    eps = getattr(self, "eps", 1e-5)
    running = self.running_mean, self.running_var
    return batch_norm(
        *(x, *running, self.weight, self.bias, False, 0.0, eps),
        activation=name, residual=residual, negative_slope=slope, alpha=slope,
    )  # fmt: skip


# --- Losses

_NO_CLASS = -(1 << 63)  # ignore_index of losses that ignore none


@register("timm.loss.cross_entropy.LabelSmoothingCrossEntropy", "4bcb492157573ec0", kind="loss")
def label_smoothing_loss(self: Any, x: Any, target: Any) -> Any:
    """(1 - smoothing) of the negative log-likelihood and smoothing of its mean over the classes."""
    smoothing = self.smoothing
    if (
        (isinstance(x, Tensor) and isinstance(target, Tensor) and x.dim() == 2 and target.dim() == 1)
        and (target.dtype == torch.int64 and len(x) == len(target))
        and (0 <= smoothing <= 1 and self.confidence == 1.0 - smoothing)
    ):
        return _in_its_dtype(x, cross_entropy(x, target, ignore_index=_NO_CLASS, label_smoothing=smoothing))
    return own_forward(self)(self, x, target)


@register("timm.loss.cross_entropy.SoftTargetCrossEntropy", "d3818f9302bdcf9c", kind="loss")
def soft_target_loss(self: Any, x: Any, target: Any) -> Any:
    """Cross-entropy against probabilities."""
    alike = isinstance(x, Tensor) and isinstance(target, Tensor) and x.shape == target.shape and x.dtype == target.dtype
    if alike and x.dim() == 2:
        return _in_its_dtype(x, cross_entropy(x, target))
    return own_forward(self)(self, x, target)


def _in_its_dtype(x: Tensor, loss: Tensor) -> Tensor:
    """As log_softmax has it, which autocast leaves alone on the CPU and makes float32 elsewhere."""
    return loss.to(x.dtype) if x.is_cpu else loss

"""The nn.Modules of batch norm: PyTorch's own, with the forward of this package."""

from __future__ import annotations

import sys
import types
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fused_ops.core.graph import fx_leaf, refuse_script
from fused_ops.distributed.collectives import check_group, default_group
from fused_ops.distributed.dtensor import any_dtensor
from fused_ops.ops.batch_norm import dtensors
from fused_ops.ops.batch_norm.activations import ActivationName
from fused_ops.ops.batch_norm.api import _with_statistics, batch_norm, recomputing, write_running
from fused_ops.ops.batch_norm.arguments import check_keeps_output, code_of, several_ranks

# The options that the modules have beyond PyTorch's.
DEFAULTS: dict[str, Any] = {
    "correction": 0,
    "activation": None,
    "negative_slope": 0.01,
    "alpha": 1.0,
    "groups": 1,
    "frozen": False,
    "inplace_activated": False,
    "synchronised": False,
}


class BatchNormOptions(TypedDict, total=False):
    """What the modules take by keyword beyond PyTorch's, for type checkers, where a signature does not repeat it."""

    correction: int
    activation: ActivationName | None
    negative_slope: float
    alpha: float
    groups: int
    frozen: bool
    inplace_activated: bool


def _bias(bias: bool) -> dict[str, Any]:
    """PyTorch's argument of that name, which the batch norms of its older versions do not have."""
    return {} if bias else {"bias": bias}


class _FusedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the modules add to PyTorch's: the options of ``batch_norm``, and statistics that count once."""

    correction: int
    activation: ActivationName | None
    groups: int
    frozen: bool
    negative_slope: float
    alpha: float
    inplace_activated: bool
    synchronised: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        correction: int = 0,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        groups: int = 1,
        frozen: bool = False,
        inplace_activated: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **_bias(bias))
        self._set(correction, activation, negative_slope, alpha, groups, frozen, inplace_activated)

    def _set(
        self,
        correction: int = 0,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        groups: int = 1,
        frozen: bool = False,
        inplace_activated: bool = False,
    ) -> None:
        """The options that are ours, checked."""
        code = code_of(activation)
        if inplace_activated:
            check_keeps_output(activation, code, alpha if activation == "elu" else negative_slope, None)
        if groups > 1 and self.momentum is None:
            raise ValueError("BatchNorm: groups needs a momentum; a cumulative average takes one batch at a time")
        self.correction, self.activation, self.groups, self.frozen = correction, activation, groups, frozen
        self.negative_slope, self.alpha, self.inplace_activated = negative_slope, alpha, inplace_activated
        self.synchronised = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**DEFAULTS, **state})  # what a module of PyTorch pickled lacks

    def __prepare_scriptable__(self) -> None:
        refuse_script(self)

    def __getattr__(self, name: str) -> Any:
        if name in ("running_mean", "parametrizations") and not is_compiling():
            _refuse_tools(self, sys._getframe(1))
        return super().__getattr__(name)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        activation: tuple[ActivationName, float] | None = None,
    ) -> Tensor:
        """The normalised input; see ``fused_ops.batch_norm``.

        Args:
            input: (batch, channels) or (batch, channels, ...), as the module's name says.
            residual: Added before the activation.
            valid: The positions that count.
            activation: In this call, instead of the module's: its name, and its negative_slope or alpha (else 0).
        """
        if type(input) is not Tensor or residual is not None or valid is not None:
            proxy = fx_leaf(self, input, residual=residual, valid=valid, activation=activation)
            if proxy is not None:
                return proxy  # type: ignore[no-any-return]
        self._check_input_dim(input)
        training = self.training and not self.frozen
        # As self.weight and so on, without the search of nn.Module.__getattr__ where they are what modules have.
        parameters, buffers = self._parameters, self._buffers
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401
        var = buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401
        counts = False
        if training and self.track_running_stats and mean is not None:
            tracked = "num_batches_tracked"
            count = buffers[tracked] if tracked in buffers else self.num_batches_tracked  # noqa: SIM401
            counts = count is not None
            if count is not None and not recomputing():
                count.add_(1)
        elif training:
            mean = var = None
        name, slope, alpha = self.activation, self.negative_slope, self.alpha
        if activation is not None:
            name, slope = activation
            alpha = slope
        group = group_of(self) if training and self.synchronised else None
        momentum = 0.0 if self.momentum is None else self.momentum
        if type(input) is not Tensor and any_dtensor(input):
            if group is not None:
                dtensors.check_group(group, input)  # and the placements say the rest
                group = None
            if counts and self.momentum is None:
                momentum = 1.0 / dtensors.number_of(count)
        elif counts and self.momentum is None:
            options = (self.correction, name, residual, slope, alpha, valid, self.groups, self.inplace_activated)
            return _FusedBatchNorm._cumulative(self, input, options, group)
        return batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            training or mean is None,
            momentum,
            self.eps,
            correction=self.correction,
            activation=name,
            residual=residual,
            negative_slope=slope,
            alpha=alpha,
            valid=valid,
            groups=self.groups,
            inplace_activated=self.inplace_activated,
            group=group,
        )

    def _cumulative(self, input: Tensor, options: tuple[Any, ...], group: Any) -> Tensor:
        """momentum=None: the running statistics are the mean of all batches' so far; the count stays on its device."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        args = (input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        group = None if group is None else several_ranks(group, True, self.groups)
        output, batch_mean, batch_var = _with_statistics(*args, *options, group)
        if (input.numel() or group is not None) and not recomputing():
            with torch.no_grad():
                share = 1.0 / self.num_batches_tracked.to(mean.dtype)  # type: ignore[union-attr]
                write_running(mean.lerp(batch_mean, share), var.lerp(batch_var, share), mean, var)
        return output

    def extra_repr(self) -> str:
        """PyTorch's, then what differs from its defaults."""
        text: str = super().extra_repr()
        for name in ("correction", "activation", "groups", "frozen", "inplace_activated"):
            if getattr(self, name) != DEFAULTS[name]:
                text += f", {name}={getattr(self, name)}"
        if self.synchronised and not isinstance(self, SyncBatchNorm):
            text += ", synchronised=True"
        return text


def group_of(module: Any) -> Any:
    """The process group that a synchronised module's statistics are taken over; None without torch.distributed.

    ``synchronised`` is that group, or True: ``process_group``, if the module has one, or the group of all ranks.
    """
    group = module.synchronised
    if group is True:
        group = getattr(module, "process_group", None)
    return default_group() if group is None else group


_DROPS = {"convert_sync_batchnorm": "nn.SyncBatchNorm", "fuse_conv_bn_eval": "a convolution"}


def _refuse_tools(module: _FusedBatchNorm, frame: types.FrameType | None) -> None:
    """Raises for functions of PyTorch that make another module of a batch norm without the options that only ours has.

    They ask nobody; what they read first of a module tells them, and the name of the function that reads it.
    """
    name = "" if frame is None else frame.f_code.co_name
    if name in _DROPS:
        which = ("activation",) if name == "fuse_conv_bn_eval" else tuple(DEFAULTS)
        kept = ("synchronised",)  # which is what convert_sync_batchnorm makes of every batch norm
        changed = [o for o in which if o not in kept and getattr(module, o) != DEFAULTS[o]]
        lost = [f"{o}={getattr(module, o)!r}" for o in changed]
        if lost:
            raise RuntimeError(
                f"{name}: {_DROPS[name]} has no {', '.join(lost)}, which this batch norm of fused_ops has"
            )
    for _ in range(4):
        if frame is None:
            return
        if frame.f_code.co_name == "fuse_known_modules":
            raise RuntimeError(
                "fuse_modules: cannot fuse or quantise modules of fused_ops: fused_ops.revert(model) first"
            )
        frame = frame.f_back


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on (batch, channels) or (batch, channels, length).

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None: they are the mean of all batches'.
        affine: Whether there are weight and bias.
        track_running_stats: Whether there are running statistics.
        device: Of the parameters and buffers.
        dtype: Likewise.
        bias: Whether there is a bias beside the weight; False needs a torch whose BatchNorm1d takes the argument.
        correction: See ``fused_ops.batch_norm``, as for the others.
        activation: What is applied last.
        negative_slope: Of leaky_relu.
        alpha: Of elu.
        groups: Ghost batches.
        frozen: Use the running statistics in training too, and leave them as they are.
        inplace_activated: Keep the output for the backward instead of the input.

    Raises:
        ValueError: an unknown activation, ``inplace_activated`` with one that cannot be inverted, an input of the
            wrong number of dimensions, or ``groups`` above 1 with ``momentum=None``.

    Note:
        state_dict is PyTorch's, both ways. ``forward`` takes ``residual`` and ``valid`` besides the input.
    """


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on (batch, channels, height, width); options as of ``BatchNorm1d``."""


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` on (batch, channels, depth, height, width); options as of ``BatchNorm1d``."""


class SyncBatchNorm(_FusedBatchNorm):
    """Batch norm whose statistics in training are those of the batches of all ranks of a process group.

    Args:
        num_features: Channels of the input, (batch, channels) or (batch, channels, ...).
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None: they are the mean of all batches'.
        affine: Whether there are weight and bias.
        track_running_stats: Whether there are running statistics.
        process_group: The ranks; None: all. Where torch.distributed is not initialised, or there is one rank, it is
            an ordinary batch norm.
        device: Of the parameters and buffers.
        dtype: Likewise.
        bias: Whether there is a bias beside the weight.
        **options: activation, correction, negative_slope, alpha, frozen and inplace_activated, as of ``BatchNorm1d``.

    Raises:
        ValueError: an unknown activation, ``groups``, an input of fewer than two dimensions, one value per channel on
            all ranks together (on all of them), or a DTensor on a mesh that lacks ranks of the group.

    Note:
        state_dict is that of ``torch.nn.SyncBatchNorm``, both ways, and of any batch norm. For every device, and no
        subclass of ``torch.nn.SyncBatchNorm``, which DistributedDataParallel refuses on the CPU. ``forward`` takes
        ``residual`` and ``valid`` besides the input. A rank may have fewer entries than others, or none; every rank
        has to call it. The statistics of a DTensor are those of all of it. As PyTorch's, a module with a
        ``process_group`` can neither be copied nor pickled.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[BatchNormOptions],
    ) -> None:
        if options.pop("groups", 1) != 1:
            raise ValueError("SyncBatchNorm: expected groups to be 1, as a ghost batch is a part of one rank's batch")
        check_group("SyncBatchNorm", "process_group", process_group)
        numbers = num_features, eps, momentum, affine, track_running_stats
        super().__init__(*numbers, device=device, dtype=dtype, bias=bias, **options)
        self.synchronised, self.process_group = True, process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class _LazyFusedBatchNorm(_FusedBatchNorm):
    """Without num_features; what it becomes has it."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[BatchNormOptions],
    ) -> None:
        pytorchs: Any = super(_FusedBatchNorm, self)
        pytorchs.__init__(eps, momentum, affine, track_running_stats, device, dtype, **_bias(bias))
        self._set(**options)


class LazyBatchNorm1d(_LazyFusedBatchNorm, nn.LazyBatchNorm1d):
    """``BatchNorm1d`` that takes num_features from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyFusedBatchNorm, nn.LazyBatchNorm2d):
    """``BatchNorm2d`` that takes num_features from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyFusedBatchNorm, nn.LazyBatchNorm3d):
    """``BatchNorm3d`` that takes num_features from its first input."""

    cls_to_become = BatchNorm3d

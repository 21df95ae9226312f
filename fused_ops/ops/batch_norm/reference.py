"""Batch normalisation in plain PyTorch: the reference of the kernels, and the fallback where there is none.

Per channel (and ghost batch), over its n values x that count::

    mean = sum(x) / n                      invstd = (M2 / (n - correction) + eps) ** -0.5,  M2 = sum((x - mean) ** 2)
    z    = (x - mean) * invstd * weight + bias + residual             y = activation(z)
    h    = grad_y * activation'(z)         (the gradient of residual)
    grad_x = weight * invstd * (h - mean(h) - (x - mean) * invstd**2 * sum(h * (x - mean)) / (n - correction))

``correction`` is 0 for PyTorch's batch norm and 1 for the unbiased variance. Where a position does not count, y and all
gradients are 0. Inputs of 16 and 32 bits are computed in float32, piece by piece; sums of pieces and statistics
are wide: in float64 where the device has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_ops.core.memory_format import (
    Scratch,
    acc_dtype,
    channel_sums,
    empty_normalised,
    is_channels_last,
    memory_pieces,
    wide,
    wide_dtype,
)
from fused_ops.ops.batch_norm import activations

# NCHW with at most this many values a channel and image has one row of mask bits for each image, not for each channel.
SMALL_SPATIAL = 32
_MERGED_AT_ONCE = 64  # moments of pieces, so that those of few values of many channels take little memory
_GATHER = sum(1 << (56 - 7 * k) for k in range(8))  # of which the product with eight bytes has bit 8k at 56 + k


class Saved(NamedTuple):
    """What the forward keeps for the backward; ``mask`` stands in for ``residual`` where the sign of z is enough."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor  # mean and invstd, (2, groups * channels); over ranks the count too, (3, channels)
    mask: Tensor | None
    valid: Tensor | None


class Options(NamedTuple):
    """The numbers of a call."""

    training: bool
    momentum: float
    eps: float
    correction: int = 0
    activation: int = activations.NONE
    slope: float = 0.0
    groups: int = 1
    group: str | None = None  # the name of the process group that the batch is spread over, and how many ranks it has
    ranks: int = 1


class Call(NamedTuple):
    """A call of the public function whose arguments have been checked."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    valid: Tensor | None
    options: Options


def as_call(values: Sequence[Any]) -> Call:
    """A call from its tensors and numbers in one row, as Functions take them."""
    return Call._make((*values[:7], Options(*values[7:])))


def per_channel(values: Tensor, input: Tensor) -> Tensor:
    """(channels,) reshaped so that it broadcasts against (batch, channels, ...)."""
    return values.reshape(1, -1, *[1] * (input.dim() - 2))


def group_size(batch: int, groups: int) -> int:
    """Batch entries in each ghost batch but the last, which has what is left."""
    if groups < 1:
        raise ValueError(f"batch_norm: expected groups to be at least 1, got {groups}")
    return torch.sym_max(1, -(-batch // groups))  # type: ignore[no-any-return]


def group_count(batch: int, groups: int) -> int:
    """Ghost batches that a batch is cut into: ``groups``, or fewer if the batch is small."""
    return torch.sym_max(1, -(-batch // group_size(batch, groups)))  # type: ignore[no-any-return]


def group_slices(batch: int, groups: int) -> list[slice]:
    """The batch entries of each ghost batch; of an empty batch one without any."""
    size = group_size(batch, groups)
    return [slice(begin, begin + size) for begin in range(0, max(batch, 1), size)]


def _mask_rows(input: Tensor) -> tuple[int, int]:
    spatial = math.prod(input.shape[2:]) if input.size(0) and input.size(1) else 0
    batch, channels = input.size(0), input.size(1)
    if is_channels_last(input):
        return batch * spatial, channels
    return (batch, channels * spatial) if spatial <= SMALL_SPATIAL else (batch * channels, spatial)


def has_mask(residual: Tensor | None, valid: Tensor | None, activation: int) -> bool:
    """Whether the forward returns the signs of z: the backward then needs no residual."""
    return residual is not None and valid is None and activation in activations.SIGN_ONLY


def mask_bytes(input: Tensor) -> int:
    """Size of the mask: a bit per value, each row (of all channels of an image, or of one) starting a byte."""
    rows, length = _mask_rows(input)
    return rows * ((length + 7) // 8)


def pack(positive: Tensor, input: Tensor) -> Tensor:
    """The mask from a bool tensor of the input's shape."""
    rows, length = _mask_rows(input)
    ordered = positive.movedim(1, -1) if is_channels_last(input) else positive
    bits = torch.nn.functional.pad(ordered.reshape(rows, length), (0, -length % 8)).reshape(-1, 8)
    # the product's uppermost byte has a bit of each byte of a number: much faster than sums of eight
    return (bits.view(torch.int64).flatten() * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as a bool tensor of the input's shape."""
    rows, length = _mask_rows(input)
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bools = torch.arange(256, dtype=torch.uint8, device=mask.device).unsqueeze(1).bitwise_right_shift(bits) & 1
    eights = bools.view(torch.int64).flatten()  # to look a byte up is much faster than to shift it
    flat = eights.index_select(0, mask.int()).view(torch.bool).reshape(rows, -1)[:, :length]
    if is_channels_last(input):
        return flat.reshape(input.size(0), *input.shape[2:], input.size(1)).movedim(-1, 1)
    return flat.reshape(input.shape)


def counted(valid: Tensor, input: Tensor) -> Tensor:
    """``valid``, (batch, ...), in the shape that broadcasts against the input."""
    return valid.reshape(input.size(0), 1, *input.shape[2:])


def counted_of(index: tuple[slice, ...], valid: Tensor, input: Tensor) -> Tensor:
    """``counted`` of a piece, as bool."""
    here = (index[0], slice(None), *index[2:])
    return counted(valid, input)[here].bool()


def param_dtype(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of the gradients of weight and bias."""
    return weight.dtype if weight is not None else bias.dtype if bias is not None else input.dtype


class ForwardArguments(NamedTuple):
    """Those of the raw forward op: what its kernels, its reference and its fake kernel are given."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    correction: int = 0
    activation: int = activations.NONE
    slope: float = 0.0
    residual: Tensor | None = None
    mask: Tensor | None = None
    valid: Tensor | None = None
    groups: int = 1


class BackwardArguments(NamedTuple):
    """Those of the raw backward op."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor
    training: bool = True
    need_input: bool = True
    need_params: bool = True
    correction: int = 0
    activation: int = activations.NONE
    slope: float = 0.0
    residual: Tensor | None = None
    mask: Tensor | None = None
    valid: Tensor | None = None
    groups: int = 1
    grad_residual: Tensor | None = None


_Arguments = TypeVar("_Arguments", ForwardArguments, BackwardArguments)


def forward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The output, and mean and invstd, (2, groups * channels) wide; writes running statistics and ``mask``."""
    a = ForwardArguments(*arguments, **named)
    input, training = a.input, a.training
    if input.dim() < 2:
        raise IndexError(f"batch_norm: input must be (batch, channels, ...), got shape {list(input.shape)}")
    if training and input.size(1) and input.numel() == input.size(1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if a.eps < 0 or (training and a.eps == 0):
        raise ValueError(f"batch_norm eps must be positive, but got {a.eps}")
    if not input.is_floating_point():
        raise NotImplementedError(f"batch_norm: input must be a floating-point tensor, got {input.dtype}")
    if (a.running_mean is None) != (a.running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if any(t is not None and t.dim() != 1 for t in (a.running_mean, a.running_var)):
        raise RuntimeError("batch_norm: expected running statistics to have one dimension")
    check_parameters(input, a.running_mean, a.running_var, a.weight, a.bias)
    if not training:
        if a.running_mean is None or a.running_var is None:
            raise RuntimeError("running_mean must be defined in evaluation mode")
        mean, invstd = wide(a.running_mean).clone(), (wide(a.running_var) + a.eps).rsqrt()
    else:
        check_written(a.running_mean, a.running_var)
        mean, invstd, *new = _statistics(a)
    statistics = torch.stack((mean, invstd))
    output = normalised(a, statistics, a.groups if training else 1)
    if training and a.running_mean is not None and a.running_var is not None:
        a.running_mean.data.copy_(new[0])  # as PyTorch's batch norm, without autograd's notice
        a.running_var.data.copy_(new[1])
    return output, statistics


def entries(a: _Arguments, rows: slice) -> _Arguments:
    """The arguments of some of the batch."""
    names = ("input", "grad_output", "residual", "valid", "grad_residual")
    part = a._replace(**{n: t[rows] for n in names if (t := getattr(a, n, None)) is not None})
    return part if a.mask is None else part._replace(mask=mask_of(a.mask, a.input, rows))


def mask_of(mask: Tensor, input: Tensor, rows: slice) -> Tensor:
    """The mask of some of the batch."""
    return mask.view(input.size(0), -1)[rows].view(-1)


def of_group(statistics: Tensor, group: int, channels: int) -> tuple[Tensor, Tensor]:
    """mean and invstd of a group, (channels,) each."""
    mean, invstd = statistics[:2, group * channels : (group + 1) * channels]
    return mean, invstd


def normalised(a: ForwardArguments, statistics: Tensor, groups: int) -> Tensor:
    """The output, from mean and invstd of each group; writes ``mask``."""
    if a.mask is not None and not has_mask(a.residual, a.valid, a.activation):
        raise RuntimeError("batch_norm: expected no mask without a residual and relu or leaky_relu, or with valid")
    output, input = empty_forward_output(a), a.input
    if not input.numel():
        return output
    for i, of_this in enumerate(group_slices(input.size(0), groups)):
        affine = Affine.of(*of_group(statistics, i, input.size(1)), a.weight, a.bias, input)
        _write_output(entries(a, of_this), affine, output[of_this])
    return output


def _write_output(a: ForwardArguments, affine: Affine, output: Tensor) -> None:
    scratch = Scratch()
    for rows, indices in groupby(memory_pieces(a.input), itemgetter(0)):
        signs = None if a.mask is None else torch.empty_like(a.input[rows], dtype=torch.bool)
        for index in indices:
            _write_piece(a, affine.at(index), index, output, None if signs is None else signs[within(index)], scratch)
        if a.mask is not None and signs is not None:
            mask_of(a.mask, a.input, rows).copy_(pack(signs, a.input[rows]))


def within(index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The place of a piece in its batch entries."""
    return (slice(None), *index[1:])


def _write_piece(
    a: ForwardArguments,
    affine: Affine,
    index: tuple[slice, ...],
    output: Tensor,
    signs: Tensor | None,
    scratch: Scratch,
) -> None:
    x, y, dtype = a.input[index], output[index], affine.near.dtype
    z = y if y.dtype == dtype else scratch.like("z", x, dtype)
    affine.apply(scratch.copy("z", x, dtype), z)
    z = z if a.residual is None else z.add_(a.residual[index])
    if signs is not None:
        torch.le(z, 0, out=signs).logical_not_()
    z = activations.apply_(a.activation, z, a.slope)
    if a.valid is not None:
        z = z.masked_fill_(~counted_of(index, a.valid, a.input), 0.0)
    if z is not y:
        y.copy_(z)


class Affine(NamedTuple):
    """z = (x - near) * scale + shift, each (1, channels, ...), mean and invstd wide, the others as it is computed.

    ``near`` is the mean rounded to that dtype; what the rounding took off is in the shift.
    """

    mean: Tensor
    invstd: Tensor
    near: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, input: Tensor) -> Affine:
        """From the statistics of a group, (channels,) each, wide."""
        dtype, mean, invstd = acc_dtype(input.dtype), per_channel(mean, input), per_channel(invstd, input)
        near = mean.to(dtype)
        scale = invstd if weight is None else invstd * wide(per_channel(weight, input))
        shift = rounded_off(mean, near, -scale)
        shift = shift if bias is None else shift + wide(per_channel(bias, input))
        return Affine(mean, invstd, near, scale.to(dtype), shift.to(dtype))

    def at(self, index: tuple[slice, ...]) -> Affine:
        """Of the channels of a piece."""
        channels = index[1]
        return self if channels.start is None else Affine(*(t[:, channels] for t in self))

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """z, written to ``out``."""
        return torch.sub(x, self.near, out=out).mul_(self.scale).add_(self.shift)

    def center(self, x: Tensor, out: Tensor) -> Tensor:
        """x - mean where ``out`` is wide, else x - near, written to it."""
        if out.dtype == x.dtype:
            return torch.sub(x, self.near, out=out)
        return out.copy_(x).sub_(self.mean if out.dtype == self.mean.dtype else self.near)


def rounded_off(mean: Tensor, near: Tensor, factor: Tensor) -> Tensor:
    """(mean - near) * factor, 0 where the mean is no number or exact: the factor may be infinite."""
    rest = torch.where(near.isfinite(), mean - near, 0.0)
    return torch.where(rest == 0, 0.0, rest * factor)


def empty_forward_output(a: ForwardArguments) -> Tensor:
    """Room for the output of a call."""
    return empty_normalised(a.input, alone=a.residual is None and a.activation == activations.NONE)


def _statistics(a: ForwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and invstd of each group and channel, and the new running statistics; all wide."""
    input, correction = a.input, a.correction
    means, invstds = [], []
    new = [None if r is None else wide(r) for r in (a.running_mean, a.running_var)]
    for part in group_slices(input.size(0), a.groups):
        n, mean, m2 = moments(input[part], None if a.valid is None else a.valid[part])
        invstds.append((m2 / (n - correction) + a.eps).rsqrt() if n > correction else m2 / 0 if n else mean)
        means.append(mean)
        if n and new[0] is not None and new[1] is not None:
            new[0] = a.momentum * mean + (1 - a.momentum) * new[0]
            new[1] = a.momentum * (m2 / (n - 1) if n > 1 else m2 / 0) + (1 - a.momentum) * new[1]
    none = input.new_empty(0)
    new_mean, new_var = (none if r is None else r for r in new)
    return torch.cat(means), torch.cat(invstds), new_mean, new_var


def sum_dtype(input: Tensor) -> torch.dtype:
    """What is summed: 32-bit values in float64 where there is that, 16-bit ones in float32, both as by PyTorch."""
    return wide_dtype(input) if input.dtype == torch.float32 else acc_dtype(input.dtype)


class _Moments(NamedTuple):
    values: int  # of a channel
    mean: Tensor
    m2: Tensor


def moments(input: Tensor, valid: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """How many values of each channel count, and their mean and M2, wide, merged from those of pieces."""
    found: dict[int, list[_Moments]] = {}  # by the first of a piece's channels
    scratch = Scratch()
    for index in memory_pieces(input) if input.numel() else ():
        x = scratch.fresh("x", input[index], sum_dtype(input))
        if valid is not None:
            keep = counted_of(index, valid, input).reshape(-1)
            x = x.movedim(1, -1).reshape(-1, x.size(1))[keep]
        if x.numel():
            parts = found.setdefault(index[1].start or 0, [])
            parts.append(_moments_of_piece(x))
            if len(parts) == _MERGED_AT_ONCE:
                parts[:] = [_merged(parts)]
    if not found:
        channels = input.size(1)
        return 0, wide(input.new_full((channels,), math.nan)), wide(input.new_zeros(channels))
    each = [_merged(found[begin]) for begin in sorted(found)]
    return each[0].values, torch.cat([m.mean for m in each]), torch.cat([m.m2 for m in each])


def _moments_of_piece(x: Tensor) -> _Moments:
    """Of a piece that is written over."""
    count = x.numel() // x.size(1)
    mean = channel_sums(x) / count
    near = mean.to(x.dtype)
    x = x.sub_(per_channel(near, x))
    if x.dtype == torch.float64:
        return _Moments(count, mean, channel_sums(x.square_()))
    rest = torch.where(near.isfinite(), channel_sums(x) / count, 0.0)  # says how near the mean it is
    return _Moments(count, near + rest, channel_sums(x.square_()) - count * rest.square())


def _merged(parts: list[_Moments]) -> _Moments:
    if len(parts) == 1:
        return parts[0]
    n, first = sum(p.values for p in parts), parts[0].mean
    mean = first + channel_sums(torch.stack([(p.values / n) * (p.mean - first) for p in parts]))
    # infinite where one is
    mean = torch.where(mean.isfinite(), mean, channel_sums(torch.stack([p.mean for p in parts])))
    return _Moments(n, mean, channel_sums(torch.stack([p.m2 + p.values * (p.mean - mean).square() for p in parts])))


PARAMETERS = ("running_mean", "running_var", "weight", "bias")


def check_parameters(input: Tensor, *parameters: Tensor | None) -> None:
    """Raises unless each of the PARAMETERS has a value a channel, and all are of the input's dtype, or all float32."""
    channels, found = input.size(1), None
    kinds = (input.dtype, torch.float32) if input.dtype.itemsize == 2 else (input.dtype,)
    for name, t in zip(PARAMETERS, parameters, strict=True):
        if t is None:
            continue
        if t.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
        if t.dtype not in kinds or (found is not None and t.dtype != found):
            raise RuntimeError(
                f"batch_norm: mixed dtype: expected parameters and statistics of one dtype, {found or kinds}, got "
                f"{name} of {t.dtype}"
            )
        found = t.dtype


def check_written(*statistics: Tensor | None) -> None:
    """Raises for running statistics of which several are one in memory, which training would write."""
    if any(t is not None and t.dim() == 1 and t.size(0) > 1 and t.stride(0) == 0 for t in statistics):
        raise RuntimeError(
            "batch_norm: running statistics: unsupported operation: more than one element of the written-to tensor "
            "refers to a single memory location. Please clone() the tensor before performing the operation."
        )

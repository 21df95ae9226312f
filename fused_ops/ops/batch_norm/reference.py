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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import (
    Piece,
    Scratch,
    acc_dtype,
    empty_output,
    is_channels_last,
    pieces,
    wide,
    wide_dtype,
    wide_sum,
)
from fused_ops.ops.batch_norm import activations

# NCHW with at most this many values a channel and image has one row of mask bits for each image, not for each channel.
SMALL_SPATIAL = 32


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


def by_row(statistics: Tensor, input: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """mean and invstd of each batch entry's group, to be broadcast against the input."""
    which = torch.arange(input.size(0), device=input.device) // group_size(input.size(0), groups)
    shape = (group_count(input.size(0), groups), input.size(1), *[1] * (input.dim() - 2))
    return statistics[0].reshape(shape)[which], statistics[1].reshape(shape)[which]


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
    bits = torch.nn.functional.pad(ordered.reshape(rows, length).to(torch.uint8), (0, -length % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=input.device)
    return (bits.reshape(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as a bool tensor of the input's shape."""
    rows, length = _mask_rows(input)
    bits = mask.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    flat = bits.reshape(rows, -1)[:, :length].bool()
    if is_channels_last(input):
        return flat.reshape(input.size(0), *input.shape[2:], input.size(1)).movedim(-1, 1)
    return flat.reshape(input.shape)


def counted(valid: Tensor, input: Tensor) -> Tensor:
    """``valid``, (batch, ...), in the shape that broadcasts against the input."""
    return valid.reshape(input.size(0), 1, *input.shape[2:])


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


def forward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The output, and mean and invstd, (2, groups * channels) wide; writes running statistics and ``mask``."""
    a = ForwardArguments(*arguments, **named)
    input, training = a.input, a.training
    if training and input.size(1) and input.numel() == input.size(1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if a.eps < 0 or (training and a.eps == 0):
        raise ValueError(f"batch_norm eps must be positive, but got {a.eps}")
    if not input.is_floating_point():
        raise NotImplementedError(f"batch_norm: input must be a floating-point tensor, got {input.dtype}")
    if (a.running_mean is None) != (a.running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
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


def normalised(a: ForwardArguments, statistics: Tensor, groups: int) -> Tensor:
    """The output, from mean and invstd of each group; writes ``mask``."""
    input, dtype = a.input, acc_dtype(a.input.dtype)
    if a.mask is not None and not has_mask(a.residual, a.valid, a.activation):
        raise RuntimeError("batch_norm: expected no mask without a residual and relu or leaky_relu, or with valid")
    output, signs = empty_forward_output(a), None if a.mask is None else torch.empty_like(input, dtype=torch.bool)
    affine, scratch = None, Scratch()
    for piece in pieces(input):
        x, y = input[piece.all], output[piece.all]
        if affine is None or groups > 1:
            affine = Affine.of(*_by_row_of_piece(statistics, input, groups, piece), a.weight, a.bias, input)
        z = y if y.dtype == dtype else scratch.like("z", x, dtype)
        torch.sub(scratch.copy("z", x, dtype), affine.near, out=z).mul_(affine.scale).add_(affine.shift)
        z = z if a.residual is None else z.add_(a.residual[piece.all])
        if signs is not None:
            signs[piece.all] = ~(z <= 0)
        z = activations.apply_(a.activation, z, a.slope)
        if a.valid is not None:
            z = z.masked_fill_(~counted(a.valid, input)[piece.all].bool(), 0.0)
        if z is not y:
            y.copy_(z)
    if a.mask is not None and signs is not None:
        a.mask.copy_(pack(signs, input))
    return output


class Affine(NamedTuple):
    """z = (x - near) * scale + shift, all in the dtype of the computation and broadcastable against x.

    ``near`` is the mean rounded to that dtype; what the rounding took off, ``rest`` (wide), is in the shift.
    """

    near: Tensor
    rest: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, input: Tensor) -> Affine:
        """From the statistics, wide and broadcastable against the input."""
        dtype = acc_dtype(input.dtype)
        near = mean.to(dtype)
        rest = torch.where(near.isfinite(), mean - near, 0.0)
        scale = invstd if weight is None else invstd * wide(per_channel(weight, input))
        shift = torch.where(rest == 0, 0.0, -rest * scale)  # 0 where the scale is infinite
        shift = shift if bias is None else shift + wide(per_channel(bias, input))
        return Affine(near, rest, scale.to(dtype), shift.to(dtype))


def _by_row_of_piece(statistics: Tensor, input: Tensor, groups: int, piece: Piece) -> tuple[Tensor, Tensor]:
    """``by_row``, of the piece's batch entries; without ghost batches one for all of them."""
    if groups == 1:
        return per_channel(statistics[0], input), per_channel(statistics[1], input)
    which = torch.arange(input.size(0), device=input.device)[piece.all[:1]] // group_size(input.size(0), groups)
    shape = (group_count(input.size(0), groups), input.size(1), *[1] * (input.dim() - 2))
    return statistics[0].reshape(shape)[which], statistics[1].reshape(shape)[which]


def empty_forward_output(a: ForwardArguments) -> Tensor:
    """Room for the output of a call."""
    return empty_output(a.input, alone=a.residual is None and a.activation == activations.NONE)


def _statistics(a: ForwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and invstd of each group and channel, and the new running statistics; all wide."""
    input, correction = a.input, a.correction
    means, invstds = [], []
    new = [None if r is None else wide(r) for r in (a.running_mean, a.running_var)]
    size = group_size(input.size(0), a.groups)
    for begin in range(0, max(input.size(0), 1), size):
        part = slice(begin, begin + size)
        n, mean, m2 = moments(input[part], None if a.valid is None else a.valid[part])
        invstds.append((m2 / (n - correction) + a.eps).rsqrt() if n > correction else m2 / 0 if n else mean)
        means.append(mean)
        if n and new[0] is not None and new[1] is not None:
            new[0] = a.momentum * mean + (1 - a.momentum) * new[0]
            new[1] = a.momentum * (m2 / (n - 1) if n > 1 else m2 / 0) + (1 - a.momentum) * new[1]
    none = input.new_empty(0)
    new_mean, new_var = (none if r is None else r for r in new)
    return torch.cat(means), torch.cat(invstds), new_mean, new_var


def moments(input: Tensor, valid: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """How many values of each channel count, and their mean and M2, wide, merged from those of pieces."""
    channels, dtype, found, scratch = input.size(1), acc_dtype(input.dtype), [], Scratch()
    exact = scratch if sums_exactly(input) else None
    for piece in pieces(input):
        x, dims = scratch.copy("x", input[piece.all], dtype), all_but_channels(input)
        if valid is not None:
            keep = valid.reshape(input.size(0), *input.shape[2:])[piece.row].reshape(-1).bool()
            x, dims = x.movedim(1, -1).reshape(-1, channels)[keep], [0]
        count = x.numel() // max(channels, 1)
        if count:
            mean = wide_sum(x, dims, True, exact) / count
            near = mean.to(dtype)
            x = torch.sub(x, near, out=scratch.like("x", x, dtype))
            rest = mean - near if exact else wide_sum(x, dims, True) / count  # says how near the mean it is
            rest = torch.where(near.isfinite(), rest, 0.0).flatten()
            m2 = wide_sum(x.square_(), dims, exact=exact) - count * rest.square()
            found.append((count, near.flatten() + rest, m2))
    n = sum(count for count, _, _ in found)
    if not n:
        return 0, wide(input.new_full((channels,), math.nan)), wide(input.new_zeros(channels))
    if len(found) == 1:
        return found[0]
    first = found[0][1]
    mean = first + torch.stack([(count / n) * (m - first) for count, m, _ in found]).sum(0)
    mean = torch.where(mean.isfinite(), mean, torch.stack([m for _, m, _ in found]).sum(0))  # infinite where one is
    return n, mean, torch.stack([m2 + count * (m - mean).square() for count, m, m2 in found]).sum(0)


def sums_exactly(input: Tensor) -> bool:
    """Whether sums are taken in float64: of 32-bit values, as by PyTorch, which sums 16-bit values in float32."""
    return input.dtype == torch.float32 and wide_dtype(input) == torch.float64


def all_but_channels(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def check_written(*statistics: Tensor | None) -> None:
    """Raises for running statistics of which several are one in memory, which training would write."""
    if any(t is not None and t.dim() == 1 and t.size(0) > 1 and t.stride(0) == 0 for t in statistics):
        raise RuntimeError(
            "batch_norm: running statistics: unsupported operation: more than one element of the written-to tensor "
            "refers to a single memory location. Please clone() the tensor before performing the operation."
        )

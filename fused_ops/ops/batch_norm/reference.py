"""Batch normalisation in plain PyTorch: the reference of the kernels, and the fallback where there is none.

Per channel (and ghost batch), over its n values x that count::

    mean = sum(x) / n                      invstd = (M2 / (n - correction) + eps) ** -0.5,  M2 = sum((x - mean) ** 2)
    z    = (x - mean) * invstd * weight + bias + residual             y = activation(z)
    h    = grad_y * activation'(z)         (the gradient of residual)
    grad_x = weight * invstd * (h - mean(h) - (x - mean) * invstd**2 * sum(h * (x - mean)) / (n - correction))

``correction`` is 0 for PyTorch's batch norm and 1 for the unbiased variance. Where a position does not count, y and all
gradients are 0. Inputs of 16 and 32 bits are computed in float32, piece by piece, and the sums of pieces in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.memory_format import Piece, empty_output, is_channels_last, pieces
from fused_ops.core.sample import Sample
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


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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
    """The output, and the float64 mean and invstd, (2, groups * channels); writes running statistics and ``mask``."""
    a = ForwardArguments(*arguments, **named)
    input, training = a.input, a.training
    if training and input.size(1) and input.numel() == input.size(1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if a.eps < 0 or (training and a.eps == 0):
        raise ValueError(f"batch_norm eps must be positive, but got {a.eps}")
    if not training:
        if a.running_mean is None or a.running_var is None:
            raise RuntimeError("running_mean must be defined in evaluation mode")
        mean, invstd = a.running_mean.double().clone(), (a.running_var.double() + a.eps).rsqrt()
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
    weight, bias = (None if p is None else per_channel(p.to(dtype), input) for p in (a.weight, a.bias))
    for piece in pieces(input):
        mean, invstd = _by_row_of_piece(statistics, input, groups, piece)
        z = _centered(input[piece.all].to(dtype), mean).mul_(invstd.to(dtype))
        z = z if weight is None else z.mul_(weight)
        z = z if bias is None else z.add_(bias)
        z = z if a.residual is None else z.add_(a.residual[piece.all])
        y = activations.apply(a.activation, z, a.slope)
        if a.valid is not None:
            y = torch.where(counted(a.valid, input)[piece.all].bool(), y, 0.0)
        if signs is not None:
            signs[piece.all] = ~(z <= 0)
        output[piece.all] = y
    if a.mask is not None and signs is not None:
        a.mask.copy_(pack(signs, input))
    return output


def _by_row_of_piece(statistics: Tensor, input: Tensor, groups: int, piece: Piece) -> tuple[Tensor, Tensor]:
    """``by_row``, of the piece's batch entries; without ghost batches one for all of them."""
    if groups == 1:
        return per_channel(statistics[0], input), per_channel(statistics[1], input)
    which = torch.arange(input.size(0), device=input.device)[piece.all[:1]] // group_size(input.size(0), groups)
    shape = (group_count(input.size(0), groups), input.size(1), *[1] * (input.dim() - 2))
    return statistics[0].reshape(shape)[which], statistics[1].reshape(shape)[which]


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    """x - mean, where the mean, float64, may have more digits than x."""
    high = mean.to(x.dtype)
    return x - high if x.dtype == torch.float64 else (x - high).sub_((mean - high).to(x.dtype))


def empty_forward_output(a: ForwardArguments) -> Tensor:
    """Room for the output of a call."""
    return empty_output(a.input, alone=a.residual is None and a.activation == activations.NONE)


def _statistics(a: ForwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and invstd of each group and channel, and the new running statistics, in float64."""
    input, correction = a.input, a.correction
    means, invstds = [], []
    new = [None if r is None else r.double() for r in (a.running_mean, a.running_var)]
    size = group_size(input.size(0), a.groups)
    for begin in range(0, max(input.size(0), 1), size):
        part = slice(begin, begin + size)
        n, mean, m2 = _moments(input[part], None if a.valid is None else a.valid[part])
        invstds.append((m2 / (n - correction) + a.eps).rsqrt() if n > correction else m2 / 0 if n else mean)
        means.append(mean)
        if n and new[0] is not None and new[1] is not None:
            new[0] = a.momentum * mean + (1 - a.momentum) * new[0]
            new[1] = a.momentum * (m2 / (n - 1) if n > 1 else m2 / 0) + (1 - a.momentum) * new[1]
    none = input.new_empty(0)
    new_mean, new_var = (none if r is None else r for r in new)
    return torch.cat(means), torch.cat(invstds), new_mean, new_var


def _moments(input: Tensor, valid: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """How many values of each channel count, and in float64 their mean and M2, merged from those of pieces."""
    channels, found = input.size(1), []
    for piece in pieces(input):
        x, dims = input[piece.all].to(acc_dtype(input.dtype)), _all_but_channels(input)
        if valid is not None:
            keep = valid.reshape(input.size(0), *input.shape[2:])[piece.row].reshape(-1).bool()
            x, dims = x.movedim(1, -1).reshape(-1, channels)[keep], [0]
        count = x.numel() // max(channels, 1)
        if count:
            near = x.mean(dims, keepdim=True)  # near the mean: what is left of the sum says how near
            x = x - near
            rest, m2 = x.sum(dims).double(), x.square_().sum(dims).double()
            near = near.flatten().double()
            mean = torch.where(near.isfinite(), near + rest / count, near)
            found.append((count, mean, m2 - rest.square() / count))
    n = sum(count for count, _, _ in found)
    if not n:
        return 0, input.new_full((channels,), math.nan).double(), input.new_zeros(channels).double()
    if len(found) == 1:
        return found[0]
    first = found[0][1]
    mean = first + torch.stack([(count / n) * (m - first) for count, m, _ in found]).sum(0)
    mean = torch.where(mean.isfinite(), mean, torch.stack([m for _, m, _ in found]).sum(0))  # infinite where one is
    return n, mean, torch.stack([m2 + count * (m - mean).square() for count, m, m2 in found]).sum(0)


def _all_but_channels(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def backward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, empty where not needed, in one step; writes ``grad_residual``."""
    a = BackwardArguments(*arguments, **named)
    input = a.input
    groups = a.groups if a.training else 1
    positive = None if a.mask is None or not a.mask.numel() else unpack(a.mask, input)
    size, channels = group_size(input.size(0), groups), input.size(1)
    grad_input, sums, dots = empty_output(input) if a.need_input else None, [], []
    for i, begin in enumerate(range(0, max(input.size(0), 1), size)):
        rows, here = slice(begin, begin + size), slice(i * channels, (i + 1) * channels)
        part = _batch_entries(a, rows)
        signs = None if positive is None else positive[rows]
        to = None if grad_input is None else grad_input[rows]
        total, dot = _backward_of_group(part, signs, a.statistics[0, here], a.statistics[1, here], to)
        sums.append(total)
        dots.append(dot)
    kind, none = param_dtype(input, a.weight, a.bias), input.new_empty(0)
    return (
        none if grad_input is None else grad_input,
        torch.stack(dots).sum(0).to(kind) if a.need_params else none.to(kind, copy=True),
        torch.stack(sums).sum(0).to(kind) if a.need_params else none.to(kind, copy=True),
    )


def _batch_entries(a: BackwardArguments, rows: slice) -> BackwardArguments:
    residual, valid, grad_residual = (None if t is None else t[rows] for t in (a.residual, a.valid, a.grad_residual))
    a = a._replace(grad_output=a.grad_output[rows], input=a.input[rows])
    return a._replace(residual=residual, valid=valid, grad_residual=grad_residual)


def _backward_of_group(
    a: BackwardArguments, positive: Tensor | None, mean: Tensor, invstd: Tensor, grad_input: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of bias and weight of one group, float64; writes those of the input and the residual."""
    dims, inv = _all_but_channels(a.input), per_channel(invstd, a.input)
    total, dot = torch.zeros_like(inv), torch.zeros_like(inv)
    n: int = 0
    for piece in pieces(a.input):
        h, centered, _, keep = before_activation(a, piece, mean, inv, positive)
        n += int(keep.sum()) if a.valid is not None else h.numel() // max(a.input.size(1), 1)
        total = total + h.sum(dims, keepdim=True)
        dot = dot + centered.mul_(h).sum(dims, keepdim=True)
    grad_mean, grad_slope = (total / n, dot * inv.square() / (n - a.correction)) if n else (total, dot)
    for piece in pieces(a.input) if grad_input is not None or a.grad_residual is not None else ():
        h, centered, scale, keep = before_activation(a, piece, mean, inv, positive)
        if a.grad_residual is not None:
            a.grad_residual[piece.all] = h
        if grad_input is None:
            continue
        if a.training and n:
            h = (h - grad_mean.to(h.dtype)).sub_(centered.mul_(grad_slope.to(h.dtype)))
        grad = h * scale
        grad_input[piece.all] = grad if a.valid is None else torch.where(keep, grad, 0.0)
    return total.flatten(), (dot * inv if n else dot).flatten()


def before_activation(
    a: BackwardArguments, piece: Piece, mean: Tensor, invstd: Tensor, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, x - mean, the scale and which positions count, of a piece; ``invstd`` broadcasts against it."""
    dtype = acc_dtype(a.input.dtype)
    x, h = a.input[piece.all].to(dtype), a.grad_output[piece.all].to(dtype)
    centered = _centered(x, per_channel(mean, x))
    scale = (invstd if a.weight is None else invstd * per_channel(a.weight.double(), x)).to(dtype)
    if positive is not None:
        h = h * activations.sign_derivative(a.activation, positive[piece.all], a.slope, h.dtype)
    elif a.activation != activations.NONE:
        z = centered * scale if a.bias is None else centered * scale + per_channel(a.bias.to(dtype), x)
        z = z if a.residual is None else z + a.residual[piece.all]
        h = h * activations.first_derivative(a.activation, z, a.slope)
    keep = torch.ones((), dtype=torch.bool, device=x.device)
    if a.valid is not None:
        keep = counted(a.valid, a.input)[piece.all].bool()
        h, centered = torch.where(keep, h, 0.0), torch.where(keep, centered, 0.0)
    return h, centered, scale, keep


def check_written(*statistics: Tensor | None) -> None:
    """Raises for running statistics of which several are one in memory, which training would write."""
    if any(t is not None and t.dim() == 1 and t.size(0) > 1 and t.stride(0) == 0 for t in statistics):
        raise RuntimeError(
            "batch_norm: running statistics: unsupported operation: more than one element of the written-to tensor "
            "refers to a single memory location. Please clone() the tensor before performing the operation."
        )


# ---- keeping the output instead of the input
#
# From y = activation(z), z = xhat * weight + bias, follows xhat = (activation^-1(y) - bias) / weight. The rounding of y
# reaches xhat amplified by up to |bias / weight| and, where y is that of elu below zero, by (exp(-z) - 1) / |weight|:
# where that is more than MAX_AMPLIFICATION, x itself is stored, in the order of memory. docs/batch_norm.md derives it.

INVERTIBLE = (activations.NONE, activations.LEAKY_RELU, activations.ELU)
MAX_AMPLIFICATION = 4.0  # kMaxAmplification of csrc/batch_norm/kernels.h


def in_memory_order(values: Tensor, output: Tensor) -> Tensor:
    """The values, flat, in the order in which ``output`` lies in memory."""
    return (values.movedim(1, -1) if is_channels_last(output) else values).reshape(-1)


def _from_memory_order(flat: Tensor, output: Tensor) -> Tensor:
    if not is_channels_last(output):
        return flat.reshape(output.shape)
    return flat.reshape(output.size(0), *output.shape[2:], output.size(1)).movedim(-1, 1)


def stored_mask(output: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, slope: float) -> Tensor:
    """Where x is stored beside the output."""
    channels = output.size(1)
    none = output.new_zeros(channels, dtype=torch.float64)
    size = none + 1 if weight is None else weight.double().abs()
    shift = none if bias is None else bias.double().abs()
    flat = min(1.0, slope) if activation == activations.LEAKY_RELU else 1.0
    reach = MAX_AMPLIFICATION * size
    smallest = torch.finfo(output.dtype).smallest_normal / flat if flat else torch.inf
    mask = per_channel(~(shift + smallest <= reach), output)
    mask = mask.expand(output.shape)
    if activation == activations.ELU:
        y = output.to(acc_dtype(output.dtype))
        limit = (-slope * reach / (1 + reach)).to(y.dtype)
        mask = mask | ~(y >= per_channel(limit, y))
    return mask


def keep(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    activation: int,
    slope: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The x that are stored, in the order of memory; where each part of them begins is for kernels to know."""
    mask = in_memory_order(stored_mask(output, weight, bias, activation, slope), output)
    return in_memory_order(input, output)[mask], output.new_empty(0, dtype=torch.int64)


def rebuild(
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    stored: Tensor,
    activation: int,
    slope: float,
    groups: int,
) -> Tensor:
    """x in float64."""
    y = output.double()
    z = y
    if activation == activations.LEAKY_RELU:
        z = torch.where(y > 0, y, y / slope)
    elif activation == activations.ELU:
        z = torch.where(y > 0, y, (y.clamp(max=0) / slope).log1p())
    if bias is not None:
        z = z - per_channel(bias.double(), z)
    if weight is not None:
        z = z / per_channel(weight.double(), z)
    mean, invstd = by_row(statistics, y, groups)
    x = mean + z / invstd
    mask = in_memory_order(stored_mask(output, weight, bias, activation, slope), output)
    return _from_memory_order(in_memory_order(x, output).masked_scatter(mask, stored.double()), output)


def before(grad_output: Tensor, output: Tensor, z: Tensor, stored: Tensor, activation: int, slope: float) -> Tensor:
    """grad_output times activation': from the output, or from z where x was stored."""
    grad = grad_output.double()
    if activation == activations.LEAKY_RELU:
        return torch.where(output > 0, grad, grad * slope)
    if activation == activations.ELU:
        y = output.double()
        below = torch.where(stored, slope * z.clamp(max=0).exp(), y + slope)
        return torch.where(torch.where(stored, z, y) > 0, grad, grad * below)
    return grad


def keep_backward(
    grad_output: Tensor,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    stored: Tensor,
    offsets: Tensor,
    training: bool,
    need_input: bool,
    need_params: bool,
    correction: int,
    activation: int,
    slope: float,
    valid: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward`` from the forward's output, from which x is rebuilt."""
    y = output
    x = rebuild(y, weight, bias, statistics, stored, activation, slope, groups)
    mean, invstd = by_row(statistics, x, groups)
    z = (x - mean) * invstd
    z = z if weight is None else z * per_channel(weight.double(), z)
    z = z if bias is None else z + per_channel(bias.double(), z)
    h = before(grad_output, y, z, stored_mask(y, weight, bias, activation, slope), activation, slope)
    tensors = h, x, weight, bias, statistics
    grad_input, *grads = backward(*tensors, training, need_input, need_params, correction, valid=valid, groups=groups)
    kind = param_dtype(y, weight, bias)
    to = empty_output(y).copy_(grad_input) if need_input else y.new_empty(0)
    return to, grads[0].to(kind), grads[1].to(kind)


def samples() -> list[Sample]:
    """Small float64 calls over the option grid."""
    found: list[Sample] = []

    def add(name: str, shape: tuple[int, ...], training: bool, affine: bool = True, **options: Any) -> None:
        generator = torch.Generator().manual_seed(len(found))
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        x, w, b, r = draw(shape), draw(shape[1]), draw(shape[1]), draw(shape)
        if "channels last" in name:
            x = x.contiguous(memory_format=torch.channels_last)
        if options.pop("residual", False):
            options["residual"] = r.requires_grad_()
        stats = (draw(shape[1]), draw(shape[1]).exp())
        params = (w.requires_grad_(), b.requires_grad_()) if affine else (None, None)
        label = f"{name}, {'training' if training else 'evaluation'}"
        found.append(Sample(label, (x.requires_grad_(), *stats, *params, training), options))

    shapes = {"rows": (5, 3), "length": (3, 2, 4), "image": (2, 2, 2, 3), "channels last": (2, 3, 2, 2)}
    for (name, shape), training in itertools.product(shapes.items(), (True, False)):
        add(name, shape, training)
        add(f"{name}, correction 1", shape, training, correction=1)
        add(f"{name}, no weight", shape, training, affine=False)
        add(f"{name}, relu after residual", shape, training, activation="relu", residual=True)
    for activation, training in itertools.product(activations.CODES, (True, False)):
        if activation is not None:
            add(activation, (4, 3), training, activation=activation)
            add(f"{activation}, residual", (2, 2, 3), training, activation=activation, residual=True)
    lengths, rows = torch.tensor([4, 2, 3]), torch.tensor([True, False, True, True, True])
    for training in (True, False):
        add("lengths, silu after residual", (3, 2, 4), training, valid=lengths, activation="silu", residual=True)
        add("valid rows", (5, 2), training, valid=rows, activation="relu", residual=True)
    add("ghost batches", (7, 2), True, groups=2)
    add("ragged ghost batches, gelu after residual", (5, 2, 2), True, groups=2, activation="gelu", residual=True)
    kinds = itertools.product((None, "leaky_relu", "elu"), ("rows", "image", "channels last"), (True, False))
    for activation, name, training in kinds:
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": 0.2,
            "alpha": 1.3,
            "inplace_activated": True,
        }
        add(f"{name}, output of {activation} kept", shapes[name], training, **options)
    add("ghost batches, output kept", (5, 2, 2), True, groups=2, activation="elu", inplace_activated=True)
    add("lengths, output kept", (3, 2, 4), True, valid=lengths, activation="leaky_relu", inplace_activated=True)
    return found

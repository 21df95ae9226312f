"""Batch norm as PyTorch's own differentiable ops: right under every transform, any number of times, in both modes.

Nothing here depends on a value or, but for the number of dimensions, on a size: a trace serves every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm.reference import Options, _keep, per_channel


class _Parts:
    """The parts of a batch that have statistics of their own: all of it, or ghost batches.

    Sums over a part are (groups, channels); ``spread`` brings such values back to (batch, channels, 1, ...).
    """

    def __init__(self, x: Tensor, keep: Tensor | None, groups: int):
        self.x, self.keep, self.groups = x, keep, groups
        rows = x.size(0)
        self.part = torch.arange(rows, device=x.device) // ((rows + groups - 1) // groups)
        counted = torch.ones_like(x[:, :1]) if keep is None else keep.to(x.dtype)
        self.count = self.sum(counted)

    def kept(self, values: Tensor) -> Tensor:
        """0 where a position does not count, whatever is there."""
        return values if self.keep is None else torch.where(self.keep, values, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """Over the positions of each part."""
        by_row = values.flatten(2).sum(2) if values.dim() > 2 else values
        return by_row.new_zeros(self.groups, by_row.size(1)).index_add(0, self.part, by_row)

    def spread(self, values: Tensor) -> Tensor:
        """What each row's part has, to be broadcast against x."""
        by_row = values.index_select(0, self.part)
        return by_row.reshape(*by_row.shape, *[1] * (self.x.dim() - 2))

    def divided(self, sums: Tensor, subtracted: int = 0) -> Tensor:
        """sums / (count - subtracted); a part without values gives 0, which nobody reads."""
        return sums / torch.where(self.count > 0, self.count - subtracted, 1.0)


def formulas(
    input: Tensor,
    residual: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    params: tuple[Tensor | None, Tensor | None],
    valid: Tensor | None,
    momentum: float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, differentiable in input, residual, weight and bias, and the new running statistics (else empty)."""
    x, (weight, bias) = input.double(), params
    keep = None if valid is None else _keep(valid, input).bool()
    new: tuple[Tensor, Tensor] = x.new_empty(0), x.new_empty(0)
    if options.training:
        parts = _Parts(x, keep, options.groups)
        mean = parts.divided(parts.sum(parts.kept(x)))
        centered = parts.kept(x - parts.spread(mean))
        squares = parts.sum(centered.square())
        invstd = parts.spread((parts.divided(squares, options.correction) + options.eps).rsqrt())
        if running[0] is not None and running[1] is not None:
            new = (
                _updated(running[0], mean, parts, momentum),
                _updated(running[1], parts.divided(squares, 1), parts, momentum),
            )
    else:
        assert running[0] is not None and running[1] is not None
        centered = x - per_channel(running[0].double(), x)
        centered = centered if keep is None else torch.where(keep, centered, 0.0)
        invstd = per_channel((running[1].double() + options.eps).rsqrt(), x)
    z = centered * invstd
    if weight is not None:
        z = z * per_channel(weight.double(), x)
    if bias is not None:
        z = z + per_channel(bias.double(), x)
    if residual is not None:
        z = z + (residual.double() if keep is None else torch.where(keep, residual.double(), 0.0))
    y = activations.apply(options.activation, z, options.slope)
    y = y if keep is None else torch.where(keep, y, 0.0)
    return y.to(input.dtype), *new


def _updated(running: Tensor, values: Tensor, parts: _Parts, momentum: float) -> Tensor:
    """The running statistic after each part in turn; one without values leaves it as it is. No derivatives."""
    new = running.double()
    for i in range(parts.groups):
        new = torch.where(parts.count[i] > 0, momentum * values[i].detach() + (1 - momentum) * new, new)
    return new.detach().to(running.dtype)

"""What the ops say to other ranks, and the derivatives of it: gathers, and sums in the order of ranks.

Three sums look alike and differ in their derivative, which is what a reader has to know of each call:

=================  =====================  ======================  ==========================================
                   forward                backward                the loss
=================  =====================  ======================  ==========================================
``sum_of_shares``  sum over ranks         as it is                one, which every rank computes alike
``copy_to_shares`` as it is               sum over ranks          one, which every rank computes alike
``sum_of_ranks``   sum over ranks         sum over ranks          a part on each rank; the total is their sum
=================  =====================  ======================  ==========================================

``gather_rows`` and ``scatter_rows`` are the first two for rows that are spread over the ranks. Each one's derivative is
another of them, so that any number of derivatives, forward and reverse, is right across ranks, provided that every rank
takes the same ones. Results have the same bits on all ranks and in every run.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_ops.core.function import FusedFunction
from fused_ops.core.graph import in_graph, register_graph_op
from fused_ops.core.library import register
from fused_ops.core.torch_private import resolve_group

_GATHERED_BYTES = 1 << 20  # What the ranks' parts may take together for a sum to gather them; more is all-reduced.

# From so many ranks on a loss reduces what it merges of all ranks' parts and does not gather it; docs/distributed.md
# has the model. It goes by their number alone, as a row's bits must not depend on how many rows there are.
MANY_RANKS = 64

# Since torch 2.13 the second name is deprecated.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

# By name, as the ops' schemas have no other way to say which. Not held: a group that outlives destroy_process_group has
# threads that may still free tensors when Python is gone, which ends the process.
_groups: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def name_of(group: Any) -> str:
    """The name of a process group, which ``group_of`` finds it by."""
    name: str = group.group_name
    if not torch.compiler.is_compiling() and _groups.get(name) is not group:
        _groups[name] = group  # in the place of one of that name that is destroyed
    return name


def group_of(name: str) -> Any:
    """The process group of that name."""
    try:
        return resolve_group(name)
    except RuntimeError:
        if (group := _groups.get(name)) is not None:
            return group
        raise


def size_of(group: Any) -> int:
    """How many ranks a group has; 1 for no group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Any) -> int:
    """This rank's place in the group; 0 for no group."""
    return 0 if group is None else dist.get_rank(group)


def default_group() -> Any:
    """The group of all ranks; None where torch.distributed is not there or not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def check_group(op: str, name: str, group: Any) -> None:
    """Raises for what is no process group that this rank is in."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}(): argument '{name}' must be a torch.distributed.ProcessGroup or None, not {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: expected {name} to be a process group that this rank is in")


# ---- without derivatives


def start_gather(input: Tensor, group: Any) -> tuple[Tensor, Any]:
    """Starts to gather a tensor that has one shape on all ranks.

    Returns:
        (ranks, *shape), to be read once ``wait()`` of the second returned.
    """
    gathered = input.new_empty(size_of(group), *input.shape)
    work = _all_gather(gathered.view(-1), input.contiguous().view(-1), group=group, async_op=True)
    return gathered, work


def _gather(input: Tensor, group: str, ranks: int) -> Tensor:
    gathered, work = start_gather(input, group_of(group))
    work.wait()
    return gathered


def _fake_gather(input: Tensor, group: str, ranks: int) -> Tensor:
    return input.new_empty(ranks, *input.shape)


def _sum(input: Tensor, group: str, ranks: int) -> Tensor:
    if input.nbytes * ranks <= _GATHERED_BYTES or ranks <= 2:
        total = _gather(input, group, ranks)
        return total[0] if ranks == 1 else total.sum(0)
    # of 16 bits in float32, as above, and rounded once
    dtype = torch.float32 if input.dtype.itemsize == 2 else input.dtype
    total = input.to(dtype, memory_format=torch.contiguous_format, copy=True)
    dist.all_reduce(total, group=group_of(group))
    return total.to(input.dtype)


def _fake_sum(input: Tensor, group: str, ranks: int) -> Tensor:
    return input.new_empty(input.shape)


def _gather_rows(input: Tensor, group: str, rows: list[int]) -> Tensor:
    most = max(rows)
    padded = input.new_zeros(most, *input.shape[1:])
    padded[: input.size(0)] = input
    parts = _gather(padded, group, len(rows))
    if min(rows) == most:
        return parts.flatten(0, 1)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


def _fake_gather_rows(input: Tensor, group: str, rows: list[int]) -> Tensor:
    return input.new_empty(sum(rows), *input.shape[1:])


def _scatter_rows(input: Tensor, group: str, rows: list[int]) -> Tensor:
    # The bytes of a reduce_scatter, and of parts that differ in size too; added in the order of ranks, 16 bits in
    # float32 and rounded once, whatever the backend. On gloo with 2 and 4 processes it takes a quarter to two thirds of
    # the time of reduce_scatter, and six tenths of that of all_reduce.
    where, ranks = group_of(group), len(rows)
    mine = rows[rank_in(where)]
    parts = input.new_empty(ranks * mine, *input.shape[1:])
    dist.all_to_all_single(parts, input.contiguous(), [mine] * ranks, rows, group=where)
    return parts.view(ranks, mine, *input.shape[1:]).sum(0)


def _fake_scatter_rows(input: Tensor, group: str, rows: list[int]) -> Tensor:
    return input.new_empty(rows[rank_in(group_of(group))], *input.shape[1:])


gather_op: Any = register(
    "gather_of_ranks(Tensor input, str group, int ranks) -> Tensor", _gather, _fake_gather, native=False
)


def gather(input: Tensor, group: Any) -> Tensor:
    """A tensor of one shape from all ranks, (ranks, *shape); not differentiable."""
    result: Tensor = gather_op(input.detach(), name_of(group), size_of(group))
    return result


def start_maximum(input: Tensor, group: Any) -> tuple[Tensor, Any]:
    """Starts to find the largest of all ranks of each number, none of them NaN; as ``start_gather``."""
    largest = input.clone(memory_format=torch.contiguous_format)
    return largest, dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True)


def _reduce(input: Tensor, group: str, maximum: bool) -> Tensor:
    total = input.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group_of(group))
    return total


def _fake_reduce(input: Tensor, group: str, maximum: bool) -> Tensor:
    return input.new_empty(input.shape)


_reduce_op: Any = register(
    "reduce_over_ranks(Tensor input, str group, bool maximum) -> Tensor", _reduce, _fake_reduce, native=False
)


def maximum(input: Tensor, group: Any) -> Tensor:
    """The largest of all ranks of each number, none of them NaN; not differentiable."""
    result: Tensor = _reduce_op(input.detach(), name_of(group), True)
    return result


def total(input: Tensor, group: Any) -> Tensor:
    """The sum of all ranks' as the backend adds them up: alike on all ranks; not differentiable."""
    result: Tensor = _reduce_op(input.detach(), name_of(group), False)
    return result


def gather_sizes(size: int, group: Any) -> list[int]:
    """A number of each rank."""
    device = torch.device("cpu")
    if dist.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    sizes: list[int] = gather(torch.tensor([size], device=device), group).flatten().tolist()
    return sizes


# ---- with derivatives: linear maps, each with the one that is its transpose


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.where = inputs[1:]


class _Map:
    """A linear map as a Function, and as the op that graphs hold."""

    def __init__(self, name: str, where: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
        def backward(ctx: Any, grad: Tensor) -> Any:
            return self.transpose(grad, *ctx.where), None, None

        def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
            return self(tangent, *ctx.where)

        functions: dict[str, Callable[..., Any]] = {
            "forward": run,
            "setup_context": _setup,
            "backward": backward,
            "jvp": jvp,
        }
        members: dict[str, Any] = {key: staticmethod(value) for key, value in functions.items()}
        self.transpose = self
        self.function: Any = types.new_class(name, (FusedFunction,), exec_body=lambda names: names.update(members))
        self.op = register_graph_op(f"{name}(Tensor input, str group, {where}) -> Tensor", run, fake, _setup, backward)

    def __call__(self, *args: Any) -> Tensor:
        result: Tensor = self.op(*args) if in_graph() else self.function.apply(*args)
        return result


def _pair(first: _Map, second: _Map) -> None:
    first.transpose, second.transpose = second, first


def _copy(input: Tensor, group: str, ranks: int) -> Tensor:
    return input.clone()


_sum_of_ranks = _Map("sum_of_ranks", "int ranks", _sum, _fake_sum)
_sum_of_shares = _Map("sum_of_shares", "int ranks", _sum, _fake_sum)
_copy_to_shares = _Map("copy_to_shares", "int ranks", _copy, _fake_sum)
_gathered_rows = _Map("gather_rows", "int[] rows", _gather_rows, _fake_gather_rows)
_scattered_rows = _Map("scatter_rows", "int[] rows", _scatter_rows, _fake_scatter_rows)
_pair(_sum_of_shares, _copy_to_shares)
_pair(_gathered_rows, _scattered_rows)


def sum_of_ranks(input: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, each of which goes on to a part of the loss of its own."""
    return _sum_of_ranks(input, name_of(group), size_of(group))


def sum_of_shares(input: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of what each holds a share of, for a loss that every rank computes alike."""
    return _sum_of_shares(input, name_of(group), size_of(group))


def copy_to_shares(input: Tensor, group: Any) -> Tensor:
    """What every rank holds alike, where each rank's share is computed from it."""
    return _copy_to_shares(input, name_of(group), size_of(group))


def gather_rows(input: Tensor, group: Any, rows: list[int]) -> Tensor:
    """The rows of all ranks, ``rows[r]`` of rank r, for a loss that every rank computes a share of."""
    return _gathered_rows(input, name_of(group), rows)


def scatter_rows(input: Tensor, group: Any, rows: list[int]) -> Tensor:
    """This rank's rows of the sum over ranks: a reduce-scatter."""
    return _scattered_rows(input, name_of(group), rows)


# ---- rows in graphs, where nobody knows how many another rank has


def checked_rows(rows: int, here: int, group: Any) -> list[int]:
    """How many of ``rows`` each rank has; raises on all ranks if they have not so many together."""
    sizes = gather_sizes(here, group)
    if sum(sizes) != rows:
        raise ValueError(f"expected {rows} rows on all ranks together, as the target says, got {sizes}")
    return sizes


def _gather_all_rows(input: Tensor, rows: int, group: str, ranks: int) -> Tensor:
    return _gather_rows(input, group, checked_rows(rows, input.size(0), group_of(group)))


def _fake_gather_all_rows(input: Tensor, rows: int, group: str, ranks: int) -> Tensor:
    return input.new_empty(rows, *input.shape[1:])


def _scatter_all_rows(input: Tensor, rows: int, group: str, ranks: int) -> Tensor:
    return _scatter_rows(input, group, checked_rows(input.size(0), rows, group_of(group)))


def _all_rows_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, _, *ctx.where = inputs
    ctx.rows = input.size(0)


def _gather_all_rows_backward(ctx: Any, grad: Tensor) -> Any:
    return _scatter_all_rows_op(grad, ctx.rows, *ctx.where), None, None, None


def _scatter_all_rows_backward(ctx: Any, grad: Tensor) -> Any:
    return gather_all_rows_op(grad, ctx.rows, *ctx.where), None, None, None


gather_all_rows_op: Any = register_graph_op(
    "gather_all_rows(Tensor input, SymInt rows, str group, int ranks) -> Tensor",
    _gather_all_rows,
    _fake_gather_all_rows,
    _all_rows_context,
    _gather_all_rows_backward,
)
_scatter_all_rows_op: Any = register_graph_op(
    "scatter_all_rows(Tensor input, SymInt rows, str group, int ranks) -> Tensor",
    _scatter_all_rows,
    _fake_gather_all_rows,
    _all_rows_context,
    _scatter_all_rows_backward,
)


def gather_all_rows(input: Tensor, rows: int, group: Any) -> Tensor:
    """``gather_rows`` of ranks that have ``rows`` together; asks each how many of them it has.

    Raises:
        ValueError: on all ranks, as those are not so many.
    """
    if in_graph():
        result: Tensor = gather_all_rows_op(input, rows, name_of(group), size_of(group))
        return result
    return gather_rows(input, group, checked_rows(rows, input.size(0), group))

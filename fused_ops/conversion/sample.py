"""One forward and backward of a copy of a model, for the counts of what runs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.conversion.report import modules_of, take_counts
from fused_ops.core.torch_private import tree_leaves, tree_map_only


def check_sample(loss: Any, target: Any) -> None:
    """Raises where ``loss`` does not take ``target``."""
    if target is not None:
        _loss_arguments(loss, target)


def run_sample(model: nn.Module, sample: Any, loss: Callable[..., Any] | None, target: Any) -> None:
    """Runs a copy of the model, and gives the model what was counted on it; nothing else changes."""
    if isinstance(sample, Mapping):
        args, kwargs = (), dict(sample)
    else:
        args, kwargs = sample if isinstance(sample, tuple) else (sample,), {}
    groups = [
        module.__dict__.get(name) for _, module in modules_of(model) for name in ("synchronised", "process_group")
    ]
    kept: dict[int, Any] = {id(group): group for group in groups}  # which cannot be copied
    twin, loss_twin = copy.deepcopy((model, loss if isinstance(loss, nn.Module) else None), kept)
    if target is None and loss_twin is None:
        loss = None  # a model's own, or a function of which nobody knows what it takes
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (args, kwargs))
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with _random_state_kept(devices), torch.enable_grad():
        output = twin(*args, **kwargs)
        results: Any = output
        if loss is not None:
            results = _loss_of(loss if loss_twin is None else loss_twin, output, target)
        elif isinstance(own := getattr(output, "loss", None), Tensor):
            results = own
        found = [t for t in tree_leaves(_as_dict(results)) if isinstance(t, Tensor) and t.requires_grad]
        if found:
            torch.autograd.backward(found, [torch.ones_like(t) for t in found])
    for (_, module), (_, copied) in zip(modules_of(model), modules_of(twin), strict=True):
        take_counts(module, copied)


@contextlib.contextmanager
def _random_state_kept(devices: list[int]) -> Iterator[None]:
    """Python's, NumPy's and torch's generators are left as they were."""
    numpy = sys.modules.get("numpy")
    before, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(of_numpy)


def _as_dict(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def _loss_of(loss: Callable[..., Any], output: Any, target: Any) -> Any:
    if target is None:
        if not isinstance(output, Tensor):
            raise TypeError(f"convert: give target: no classes can be drawn for an output of {type(output).__name__}")
        shape = (*output.shape[:1], *output.shape[2:]) if output.dim() > 1 else ()
        target = torch.randint(output.size(min(1, output.dim() - 1)), shape).to(output.device)
    args, kwargs = _loss_arguments(loss, target)
    found = loss(output, *args, **kwargs)
    if not isinstance(found, Tensor):
        raise TypeError(f"convert: expected loss to return a tensor on the sample, got {type(found).__name__}")
    return found


def _loss_arguments(loss: Callable[..., Any], target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the loss gets besides the output; a tuple is several arguments where the loss takes that many, else one.

    Raises:
        TypeError: the loss does not take them.
    """
    one: tuple[Any, Any] = (target,), {}
    ways = [one]
    if isinstance(target, Mapping):
        ways = [((), dict(target))]
    elif isinstance(target, tuple):
        ways = [(target, {}), one]
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # some callables do not say what they take
        return ways[0]
    for args, kwargs in ways:
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError:
            continue
        return args, kwargs
    raise TypeError(
        "convert: expected target to be what loss takes besides the output (a tensor, a tuple of arguments or a "
        f"mapping of keyword arguments): loss takes {signature}, target is of {type(target).__name__}"
    )

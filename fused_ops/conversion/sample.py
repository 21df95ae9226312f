"""One forward and backward of a copy of a model on a sample, in its own dtype and in float64."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.conversion.report import Check
from fused_ops.core.torch_private import tree_leaves, tree_map

LOOSE = 4.0  # sums of many layers' roundings differ by luck; a wrong gradient is off by orders of magnitude


@dataclass(frozen=True)
class Sample:
    """Arguments of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[..., Any] | None = None
    target: Any = None

    @classmethod
    def of(cls, sample: Any, loss: Callable[..., Any] | None = None, target: Any = None) -> Sample:
        if target is None and not isinstance(loss, nn.Module):
            loss = None  # a model's own, or a function of which nobody knows what it takes
        if isinstance(sample, tuple):
            return cls(sample, {}, loss, target)
        if isinstance(sample, Mapping):
            return cls((), dict(sample), loss, target)
        return cls((sample,), {}, loss, target)

    def to_double(self) -> Sample:
        def widen(leaf: Any) -> Any:
            return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        loss = copy.deepcopy(self.loss).double() if isinstance(self.loss, nn.Module) else self.loss
        args, kwargs, target = tree_map(widen, (self.args, self.kwargs, self.target))
        return Sample(args, kwargs, loss, target)

    def loss_of(self, output: Any) -> Tensor | None:
        """The loss of the model's output; None where it is not to be looked at."""
        if self.loss is None:
            return None
        target = self.target
        if target is None:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"convert: give target: no classes can be drawn for an output of {type(output).__name__}"
                )
            shape = (*output.shape[:1], *output.shape[2:]) if output.dim() > 1 else ()
            drawn = torch.Generator().manual_seed(2)  # the same ones in every dtype
            target = torch.randint(output.size(min(1, output.dim() - 1)), shape, generator=drawn).to(output.device)
        args, kwargs = loss_arguments(self.loss, target)
        found = self.loss(output, *args, **kwargs)
        if not isinstance(found, Tensor):
            raise TypeError(f"convert: expected loss to return a tensor on the sample, got {type(found).__name__}")
        return found


def loss_arguments(loss: Callable[..., Any], target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


@dataclass
class Run:
    """What came out, and the bytes that went into each batch norm."""

    sample: Sample
    found: dict[str, Tensor]
    truth: dict[str, Tensor]
    sizes: dict[str, int]

    def compare(self, after: Run) -> list[Check]:
        """Before (self) and after, each against the float64 truth of before."""
        checks = []
        gradients = [float(t.norm()) for name, t in self.truth.items() if name.startswith("gradient")]
        for name, truth in self.truth.items():
            eps = torch.finfo(self.found[name].dtype).eps
            least = 0.0
            if name.startswith("gradient"):  # one that is zero but for rounding (a bias before batch norm) is measured
                least = max(gradients) * eps**0.5  # against the others: up to eps**1.5 of the largest is nothing
            elif name.endswith("running_mean"):  # a mean near zero against the deviations that it is subtracted from
                least = float(self.truth[name.removesuffix("mean") + "var"].clamp(min=0).sqrt().norm())
            error_before, error_after = (_relative(run.found[name], truth, least) for run in (self, after))
            checks.append(Check(name, error_before, error_after, LOOSE * max(error_before, eps)))
        return checks


def _relative(value: Tensor, truth: Tensor, least: float) -> float:
    norm = max(float(truth.norm()), least)
    return float((value.double() - truth).norm()) / (norm if norm else 1.0)


def run_sample(model: nn.Module, sample: Sample) -> Run:
    """Runs copies; the model, the random state and the sample stay as they are."""
    sizes: dict[str, int] = {}
    found = _run(copy.deepcopy(model), sample, sizes)
    truth = _run(copy.deepcopy(model).double(), sample.to_double(), {})
    return Run(sample, found, truth, sizes)


def _run(model: nn.Module, sample: Sample, sizes: dict[str, int]) -> dict[str, Tensor]:
    for path, module in model.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.register_forward_pre_hook(lambda m, args, path=path: _weigh(sizes, path, args[0]))
        elif type(module) is nn.Linear:
            module.register_forward_hook(lambda m, args, output, path=path: _weigh(sizes, path, output))
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (sample.args, sample.kwargs)
    )
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        output = model(*args, **kwargs)
        loss = sample.loss_of(output)
        outputs = [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor) and t.is_floating_point()]
        found = {f"output {i}" if len(outputs) > 1 else "output": t.detach() for i, t in enumerate(outputs)}
        if loss is not None:
            found, outputs = {"loss": loss.detach(), **found}, [loss]
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(1)
        upstream = [torch.randn(t.shape, dtype=torch.float64).to(t) for t in outputs]
        kept = [(t, g) for t, g in zip(outputs, upstream, strict=True) if t.requires_grad]
        if kept and parameters:
            tensors, gradients = zip(*kept, strict=True)
            grads = torch.autograd.grad(tensors, list(parameters.values()), gradients, allow_unused=True)
            found |= {f"gradient of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}
    found |= {name: b.detach() for name, b in model.named_buffers() if b.is_floating_point()}
    return found


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def _weigh(sizes: dict[str, int], path: str, tensor: Any) -> None:
    if isinstance(tensor, Tensor):
        sizes[path] = sizes.get(path, 0) + tensor.numel() * tensor.element_size()

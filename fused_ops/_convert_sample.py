"""One forward and backward of a copy of a model on a sample, in its own dtype and in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fused_ops._convert_report import Check

LOOSE = 4.0  # sums of many layers' roundings differ by luck; a wrong gradient is off by orders of magnitude


@dataclass(frozen=True)
class Sample:
    """Arguments of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, sample: Any) -> Sample:
        if isinstance(sample, tuple):
            return cls(sample, {})
        return cls((), dict(sample)) if isinstance(sample, Mapping) else cls((sample,), {})

    def to_double(self) -> Sample:
        def widen(leaf: Any) -> Any:
            return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return Sample(*tree_map(widen, (self.args, self.kwargs)))


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
                least = max(gradients) * eps**0.5  # against the others
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
            module.register_forward_pre_hook(_weigher(path, sizes))
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (sample.args, sample.kwargs)
    )
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [t for t in tree_leaves(_plain(model(*args, **kwargs))) if isinstance(t, Tensor)]
        outputs = [t for t in outputs if t.is_floating_point()]
        found = {f"output {i}" if len(outputs) > 1 else "output": t.detach() for i, t in enumerate(outputs)}
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


def _weigher(path: str, sizes: dict[str, int]) -> Any:
    def weigh(module: nn.Module, args: tuple[Any, ...]) -> None:
        sizes[path] = sizes.get(path, 0) + args[0].numel() * args[0].element_size()

    return weigh

"""Runs a case as it is and transformed, and compares all that can be seen of it."""

import contextlib
import dataclasses
import io
import itertools
import math
import random
import types
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from odd_models.case import MODES, Case

# What a run does: whether the model trains at the conversion, then in each step. ``after`` comes after the first step.
PLANS = {
    "train": (True, (True, True)),
    "eval": (False, (False, True, False)),
    "bf16": (True, (True, True)),
    "float64": (True, (True, True, False, True)),
    "short": (True, (True, False)),  # float64 as well
}
FLOAT64 = ("float64", "short")
ACTIVATIONS = {
    f"aten::{name}{end}"
    for name in ("relu", "relu6", "silu", "gelu", "leaky_relu", "hardtanh", "hardswish", "elu")
    for end in ("", "_")
}


class Difference(AssertionError):
    """What a transformed model does otherwise than the untouched one."""


def check(case: Case, transform, mode: str, reference=None) -> None:
    """Raises ``Difference`` where the transformed model does anything else than the untouched one.

    Args:
        case: What to run.
        transform: Takes the model, returns what is to be called in its place.
        mode: One of ``MODES``.
        reference: Another transform, whose doings are as good as the untouched model's: what a compiler changes by
            itself is not a fault of its backend.
    """
    found = run(case, transform, mode)
    try:
        compare(case, mode, found, None)
    except Difference:
        if reference is None:
            raise
        compare(case, mode, found, reference)


def build(case: Case, double: bool) -> nn.Module:
    """The model, with one-dimensional parameters (batch norms' among them) away from 0 and 1."""
    seed(0)
    model = case.build()
    for parameter in model.parameters():
        if not nn.parameter.is_lazy(parameter) and parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return model.double() if double else model


def seed(value: int) -> None:
    torch.default_generator.manual_seed(value)  # torch.manual_seed is for every kind of device, and takes 2 ms
    random.seed(value)
    np.random.seed(value)


def run(case: Case, transform, mode: str, exact: bool = False) -> dict[str, object]:
    """Everything to be seen, by name; ``exact``: all of it in float64."""
    double = exact or mode in FLOAT64
    training, plan = PLANS[mode]
    model = build(case, double).train(training)
    seen: dict[str, object] = {}
    with case.around(model):
        call = model if transform is None else transform(model)
        for i, step_training in enumerate(plan):
            model.train(step_training)
            context = torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16" and not exact)
            one_step(f"step {i}", case, model, call, double, context, seen)
            if i == 0 and case.after is not None:
                seed(100)
                changed = case.after(model)
                if changed is not None:
                    model = changed
                    call = model if transform is None else again(transform, model)
    return seen


def again(transform, model: nn.Module):
    """A model that was made of a transformed one: ``convert`` is done with it, a compiler is not."""
    return model if getattr(transform, "in_place", False) else transform(model)


def one_step(name, case, model, call, double, context, seen) -> None:
    """Forward, backward of a loss of every output, a step of gradient descent; what they left behind."""
    seed(1)
    inputs = case.inputs()
    leaves, given = [], []

    def give(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaf = (value.double() if double else value).detach().requires_grad_()
        leaves.append(leaf)
        given.append(leaf.clone())
        return given[-1]

    inputs = tree_map(give, inputs)
    model.zero_grad()
    seed(2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            with context:
                output = call(**inputs) if isinstance(inputs, dict) else call(*inputs)
                found: list[Tensor] = []
                describe(f"{name}: output", output, given, seen, found)
            loss = sum(weighted(t) for t in found if t.requires_grad)
            if isinstance(loss, Tensor):
                loss.backward()
        except Exception as error:
            seen[f"{name}: error"] = type(error)
    seen[f"{name}: printed"] = printed.getvalue()
    seen[f"{name}: random numbers"] = (torch.rand(()).item(), random.random(), np.random.rand())
    for i, (leaf, tensor) in enumerate(zip(leaves, given, strict=True)):
        seen[f"{name}: input {i}"] = tensor.detach().clone()
        seen[f"{name}: gradient of input {i}"] = leaf.grad
    for path, parameter in model.named_parameters():
        seen[f"{name}: gradient of {path}"] = None if parameter.grad is None else parameter.grad.clone()
        with torch.no_grad():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / (1 + parameter.grad.norm())
    for path, tensor in model.state_dict().items():
        seen[f"{name}: state of {path}"] = tensor.clone() if isinstance(tensor, Tensor) else tensor
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and is_plain(value):
                describe(f"{name}: attribute {path}.{key}", value, (), seen)
    if case.effects is not None:
        describe(f"{name}: effects", case.effects(model), (), seen)


def tree_map(function, value):
    if isinstance(value, dict):
        return type(value)((k, tree_map(function, v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(tree_map(function, v) for v in value)
    return function(value)


def weighted(tensor: Tensor) -> Tensor:
    """A sum in which every element counts otherwise."""
    flat = tensor.reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return (flat.double() * torch.arange(flat.numel()).double().cos()).sum()


def is_plain(value) -> bool:
    """Python state that a forward may change."""
    if isinstance(value, (list, tuple, set)):
        return all(is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(is_plain(v) for v in value.values())
    return value is None or isinstance(value, (bool, int, float, str, torch.Size, Tensor))


def describe(name, value, inputs, seen, tensors=None) -> None:
    """All that is to be compared of a value, by names that tell where in it."""
    seen[f"{name}: type"] = type(value)
    if isinstance(value, Tensor):
        same = [i for i, t in enumerate(inputs) if value is t]
        shared = [i for i, t in enumerate(inputs) if t.numel() and value.data_ptr() == t.data_ptr()]
        strides = [s for s, n in zip(value.stride(), value.shape, strict=True) if n != 1]
        seen[f"{name}: tensor"] = {
            "dtype": value.dtype, "shape": value.shape, "strides": strides if value.numel() else None,
            "requires_grad": value.requires_grad, "is_leaf": value.is_leaf, "inference": value.is_inference(),
            "is input": same, "in the memory of input": shared,
        }  # fmt: skip
        seen[name] = value.detach().clone()
        if tensors is not None:
            tensors.append(value)
    elif isinstance(value, Mapping):
        seen[f"{name}: keys"] = list(value)
        for key, item in value.items():
            describe(f"{name}[{key!r}]", item, inputs, seen, tensors)
    elif isinstance(value, (list, tuple, types.GeneratorType)):
        for i, item in enumerate(value):
            describe(f"{name}[{i}]", item, inputs, seen, tensors)
    elif isinstance(value, np.ndarray):
        describe(name + ".numpy", torch.from_numpy(value), inputs, seen)
    elif dataclasses.is_dataclass(value) or (hasattr(value, "__dict__") and not callable(value)):
        for key, item in vars(value).items():
            describe(f"{name}.{key}", item, inputs, seen, tensors)
    elif not callable(value):
        seen[name] = value


def compare(case: Case, mode: str, found, reference) -> None:
    """Holds a run to that of the untouched model, or of the reference, and both to the float64 truth of it."""
    expected = run(case, reference, mode)
    if case.spared:
        expected = until_error(expected)
        found = {key: value for key, value in found.items() if key in expected}
    differing = [f"{key}: {unlike_facts(key, found, expected)}" for key in {**expected, **found}]
    differing = [line for line in differing if not line.endswith(": ")]
    inexact = [key for key, value in expected.items() if isinstance(value, Tensor) and not equal(found.get(key), value)]
    if inexact:
        eps = {"bf16": torch.finfo(torch.bfloat16).eps, **dict.fromkeys(FLOAT64, 1e-11)}.get(
            mode, torch.finfo(torch.float32).eps
        )
        if case.rounds is not None:
            eps = max(eps, torch.finfo(case.rounds).eps)
        exact = expected if mode in FLOAT64 else run(case, reference, mode, exact=True)
        scales = largest(exact)
        for key in inexact:
            difference = unlike(found.get(key), expected[key], exact.get(key), eps, scales[kind(key)])
            if difference:
                differing.append(f"{key}: {difference}")
    if differing:
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise Difference(f"{case.name}, {mode}:\n  " + "\n  ".join(differing[:8]) + more)


def until_error(seen: dict[str, object]) -> dict[str, object]:
    """What was seen before the first error."""
    before = itertools.takewhile(lambda item: not item[0].endswith(": error"), seen.items())
    return dict(before)


def unlike_facts(key: str, found, expected) -> str:
    """What differs of all that is no tensor: types, strides, python state, what was printed, errors."""
    if key not in expected and ": attribute " in key:
        return ""  # a transform may add some of its own
    ours, theirs = found.get(key, "nothing"), expected.get(key, "nothing")
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ""
    return "" if same(ours, theirs) else f"expected {shown(theirs)}, found {shown(ours)}"


def shown(value) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def same(found, expected) -> bool:
    if isinstance(expected, float) and isinstance(found, float):  # of a mean, say, turned into a number
        return math.isclose(found, expected, rel_tol=1e-2) or (math.isnan(found) and math.isnan(expected))
    return type(found) is type(expected) and bool(found == expected)


def equal(found, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)


def kind(key: str) -> str:
    return "gradient" if "gradient of" in key else "value"


def largest(truth) -> dict[str, float]:
    """The largest number among the values and among the gradients, for what is but rounding around zero."""
    scales = {"gradient": 0.0, "value": 0.0}
    for key, value in truth.items():
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.numel():
            size = value.abs().max()
            if not size.isfinite():
                size = value[value.isfinite()].abs().sum()
            scales[kind(key)] = max(scales[kind(key)], float(size))
    return scales


def unlike(found, expected: Tensor, truth, eps: float, scale: float) -> str:
    """What a tensor differs in; empty: no further from the truth than the expected one, but for rounding."""
    if not isinstance(found, Tensor):
        return ""  # told already
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"expected {tuple(expected.shape)} {expected.dtype}, found {tuple(found.shape)} {found.dtype}"
    if not (expected.is_floating_point() or expected.is_complex()):
        return f"expected {expected.flatten()[:8]}, found {found.flatten()[:8]}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.to(wide), expected.to(wide)
    truth = expected if not isinstance(truth, Tensor) or truth.shape != expected.shape else truth.to(wide)
    if not math.isfinite(found.abs().sum() + expected.abs().sum() + truth.abs().sum()):
        finite = expected.isfinite()
        if not torch.equal(found.isfinite(), finite):
            return f"expected {int(finite.sum())} finite numbers, found {int(found.isfinite().sum())}"
        finite = finite & truth.isfinite()
        found, expected, truth = found[finite], expected[finite], truth[finite]
    error, theirs = float((found - truth).norm()), float((expected - truth).norm())
    allowed = 2 * theirs + 8 * eps * (float(truth.norm()) + scale)
    return "" if error <= allowed else f"error {error:.2e}, of the untouched model {theirs:.2e}, allowed {allowed:.2e}"


def activations_run(model: nn.Module, case: Case) -> int:
    """How many activations PyTorch runs in a forward of the model."""
    seed(1)
    inputs = case.inputs()
    with torch.autograd.profiler.profile() as profile:
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return sum(event.name in ACTIVATIONS for event in profile.function_events)


__all__ = ["MODES", "Difference", "activations_run", "build", "check"]

"""A batch norm called with the activation behind it, and the residual between, decided on the modules as they are then.

Whoever calls these functions knows that nobody else sees what is between the modules. Whether the modules are still
what they seem (exact classes, no hooks, no forward on the instance) is looked at in each call, so that replacing one,
hooking one or switching a dropout on needs no other care.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from fused_ops.core.hooks import plain
from fused_ops.core.torch_private import any_global_hook
from fused_ops.ops.batch_norm import modules as ours
from fused_ops.ops.batch_norm.activations import ActivationName

Activation = tuple[ActivationName, float]  # its name and its slope or alpha

RUNS = "_fused_ops_runs"  # in the __dict__ of a batch norm: how often it ran with what, e.g. {"add, relu": 3}
NORMS: dict[type[nn.Module], Callable[[Any, Tensor], bool] | None] = dict.fromkeys(  # that take what follows them, and
    (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d, ours.SyncBatchNorm)  # when; None: always
)
PASSED: dict[type[nn.Module], Callable[[Any], bool]] = {  # those that return their input, and when they do
    nn.Identity: lambda module: True,
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        lambda module: not module.training or module.p == 0,
    ),
}
_PLAIN: dict[type[nn.Module], Activation] = {
    nn.ReLU: ("relu", 0.0),
    nn.SiLU: ("silu", 0.0),
    nn.Tanh: ("tanh", 0.0),
    nn.Sigmoid: ("sigmoid", 0.0),
    nn.Hardswish: ("hardswish", 0.0),
}
# What may be computed before a batch norm instead of after it: writes to nothing but statistics of its own.
_STEADY = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Identity}
SHORTCUTS: set[type[nn.Module]] = {nn.Sequential}  # that call their children one after the other, and no more
_PARAMETERS = (nn.Parameter, Tensor, type(None))


def activation_of(module: nn.Module) -> Activation | None:
    """The form that ``batch_norm`` has of an activation module; None if there is none."""
    kind = type(module)
    found = _PLAIN.get(kind)
    if found is not None:
        return found
    if kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)  # type: ignore[arg-type]
    if kind is nn.ELU:
        return "elu", float(module.alpha)  # type: ignore[arg-type]
    if kind is nn.GELU and module.approximate == "none":
        return "gelu", 0.0
    return None


def passed(module: nn.Module) -> bool:
    """Whether the module, as it is now, returns its input and does nothing else."""
    returns = PASSED.get(type(module))
    return returns is not None and returns(module) and plain(module)


def takes(norm: Any, input: Any) -> bool:
    """Whether this module is a batch norm that can do more in the same op, called with ``input``."""
    kind = type(norm)
    return (
        kind in NORMS
        and type(input) is Tensor
        and plain(norm)
        and (norm.activation is None and not norm.inplace_activated)
        and type(norm._parameters.get("weight")) in _PARAMETERS
        and not any_global_hook()
        and ((when := NORMS[kind]) is None or when(norm, input))
    )


def run(norm: nn.Module, input: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """The batch norm with the rest in its op, counted."""
    count(norm, activation[0] if residual is None else f"add, {activation[0]}")
    result: Tensor = norm(input, residual, activation=activation)
    return result


def count(norm: nn.Module, what: str) -> None:
    """Counts a call of a batch norm with ``what`` in its op; graphs have their own counts."""
    if not is_compiling():
        state = norm.__dict__
        runs = state.get(RUNS)
        if runs is None:
            runs = state[RUNS] = {}
        runs[what] = runs.get(what, 0) + 1


def sequential_forward(self: nn.Module, input: Any) -> Any:
    """``nn.Sequential``'s, with each batch norm and the activation behind it in one op."""
    modules = list(self._modules.values())
    i, end = 0, len(modules)
    while i < end:
        module: Any = modules[i]
        i += 1
        if type(module) in NORMS and i < end:
            j = i
            while j < end - 1 and passed(modules[j]):  # type: ignore[arg-type]
                j += 1
            activation = activation_of(modules[j])  # type: ignore[arg-type]
            if activation is not None and plain(modules[j]) and takes(module, input):  # type: ignore[arg-type]
                input = run(module, input, None, activation)
                i = j + 1
                continue
        input = module(input)
    return input


def norm_then(input: Any, norm: Any, *then: Any) -> Any:
    """``norm``, then the modules of ``then`` one after the other, in fewer steps where that is the same.

    Args:
        input: Of ``norm``.
        norm: A batch norm, or whatever stands in its place.
        *then: Modules: an activation, and any that may do nothing (an inactive dropout) around it.
    """
    count = len(then)
    i = 0
    while i < count - 1 and passed(then[i]):
        i += 1
    activation = activation_of(then[i]) if count else None
    if activation is not None and plain(then[i]) and takes(norm, input):
        input, rest = run(norm, input, None, activation), then[i + 1 :]
    else:
        input, rest = norm(input), then
    for module in rest:
        input = module(input)
    return input


def norm_add_then(input: Any, norm: Any, shortcut: Any, skipped: Any, activation: Any) -> Any:
    """``out = norm(input); out += shortcut(skipped); activation(out)``, in fewer steps where that is the same.

    The shortcut is then computed before the batch norm, so it must be one of convolutions, poolings and other batch
    norms without hooks, which cannot tell.

    Args:
        input: Of ``norm``.
        norm: A batch norm, or whatever stands in its place.
        shortcut: The module that the residual goes through, or None.
        skipped: What the shortcut is given; the residual itself without one.
        activation: A module.
    """
    fused = activation_of(activation)
    if fused is not None and plain(activation) and takes(norm, input) and _may_go_first(shortcut, norm):
        residual = skipped if shortcut is None else shortcut(skipped)
        if _alike(residual, input):
            return run(norm, input, residual, fused)
        output = norm(input)
    else:
        output = norm(input)
        residual = skipped if shortcut is None else shortcut(skipped)
    output += residual
    return activation(output)


def _may_go_first(shortcut: Any, norm: nn.Module) -> bool:
    if shortcut is None:
        return True
    if type(shortcut) in SHORTCUTS:
        return all(
            (type(child) in _STEADY or type(child) in NORMS) and child is not norm and plain(child)
            for child in shortcut._modules.values()
        ) and plain(shortcut)
    return type(shortcut) is nn.Identity and plain(shortcut)


def _alike(residual: Any, input: Tensor) -> bool:
    """Whether adding it makes nothing of another shape, dtype or layout."""
    return (
        type(residual) is Tensor
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.stride() == input.stride()
    )

"""Models over to this package's ops and back, in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, jit, nn

from fused_ops.conversion import blocks as blocks  # its rules
from fused_ops.conversion.head import RECORD, HeadLinear, defer, find_head, linears_of, token_head
from fused_ops.conversion.neighbours import NORMS, PASSED, RUNS, activation_of
from fused_ops.conversion.records import HeadRecord
from fused_ops.conversion.report import MARK, NOW, Entry, Report, look_at, modules_of, synchronised
from fused_ops.conversion.rules import Converted, Rule, original_of, rule_of, with_rule
from fused_ops.conversion.sample import check_sample, run_sample
from fused_ops.core.hooks import hooked
from fused_ops.core.torch_private import any_global_hook
from fused_ops.distributed.collectives import check_group
from fused_ops.ops.batch_norm import modules as ours
from fused_ops.ops.cross_entropy import modules as losses

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
    nn.LazyBatchNorm1d: ours.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: ours.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: ours.LazyBatchNorm3d,
}
_SYNC: dict[type[nn.Module], type[nn.Module]] = {nn.SyncBatchNorm: ours.SyncBatchNorm}  # where it is asked for
_LOSSES: dict[type[nn.Module], type[nn.Module]] = {nn.CrossEntropyLoss: losses.CrossEntropyLoss}
_SWAPS = _NORMS | _LOSSES | _SYNC
_FORWARDS = {kind: kind.forward for kind in _SWAPS}  # somebody may replace that of a class
_BACK = {**{new: old for old, new in _SWAPS.items()}, HeadLinear: nn.Linear}


def convert(
    model: nn.Module,
    *,
    loss: Callable[..., Any] | None = None,
    head: nn.Module | str | None = None,
    fuse_activations: bool = True,
    sample: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    target: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    sync_batch_norm: Any = False,
) -> Report:
    """Turns a model over to fused ops, in place; ``revert`` turns it back. All of it happens, or nothing.

    Modules become others of the same parameters, buffers, hooks, mode, device and dtype, the same objects, so that
    optimizers and other references to them stay right. state_dict does not change. No forward is run, traced or read:
    what is fused is what a container or a rule (``fused_ops.conversion.rules``) makes certain, and whether it still
    holds is looked at in each call.

    Args:
        model: Any module; it may be a batch norm or a loss itself.
        loss: What the training loop applies to the model's output, if that is cross-entropy: an
            ``nn.CrossEntropyLoss``, ``F.cross_entropy``, a function that calls it, or the model's own
            (``model.loss_function`` of transformers). The linear head of the model and the loss then become
            ``linear_cross_entropy``; the training loop stays as it is. A loss that is a module is converted too.
        head: The linear layer whose result is the logits, or its name in the model. Default: found by rules
            (``get_output_embeddings``, an ``nn.Sequential`` that ends in one, known families); ``register_head`` adds
            one.
        fuse_activations: Do the activation that follows a batch norm, and the residual that is added between them, in
            the same op: of neighbours in an ``nn.Sequential``, and in the blocks that there are rules for.
        sample: An input (a tensor, a tuple of arguments, or a mapping of keyword arguments, labels included) on which
            a copy of the converted model runs forward and backward once, for the report to show what ran.
        target: What ``loss`` takes besides the output for the sample: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. Default for a loss that is a module: classes drawn at random.
        sync_batch_norm: Take the statistics of batch norms in training over all ranks: True, or the process group of
            torch.distributed that has them. Every ``nn.BatchNorm*d`` and ``nn.SyncBatchNorm`` that is converted is
            then synchronised, with what is fused into it; of the latter, True leaves its own ``process_group``.

    Returns:
        What was replaced and what was left alone, and why; and, whenever it is shown, what has run so far, as
        ``fused_ops.report(model)`` shows at any time. ``str()`` and ``rich.print()`` make tables of it.

    Raises:
        TypeError: ``model`` is no module or is compiled or scripted already, ``loss`` is no cross-entropy, or
            ``sync_batch_norm`` neither a bool nor a process group.
        ValueError: ``head`` without ``loss``, or ``target`` without ``loss`` and ``sample``.
        RuntimeError: everything that can be converted is already.

    Note:
        Left alone, with the reason: ``nn.SyncBatchNorm`` without ``sync_batch_norm``, subclasses without a rule (also
        those that parametrizations and FSDP make: convert before them), modules with hooks or with a forward set on
        the instance, and everything while global hooks are set; none of these becomes synchronised. What is fused gives
        way to the separate steps by itself when a module gets hooks or is replaced, or when the residual has another
        shape, dtype or layout.

        With ``loss``, the head's result (where it is to be differentiated and is above 1 MiB) is a tensor whose values
        are computed when they are needed. Cross-entropy does not need them; ``output.argmax(-1)`` computes them, with
        the head's weights of then: after an optimizer's step it raises. Under torch.compile, in evaluation without
        gradients, and where the head has hooks, the head is an ordinary linear layer.
    """
    _check_arguments(model, loss, head, sample, target)
    if not isinstance(sync_batch_norm, bool):
        check_group("convert", "sync_batch_norm", sync_batch_norm)
    plan = _plan(model, loss, head, fuse_activations, sync_batch_norm)
    if plan.already and not plan.changes:
        raise RuntimeError("convert: this model is converted already; fused_ops.revert(model) turns it back")
    with _all_or_nothing([change.module for change in plan.changes]):
        for change in plan.changes:
            change.apply()
        PASSED.update(plan.passed)
        report = Report(model, loss)
        report.replaced, report.left = [c.entry for c in plan.changes], plan.left
        report.notes += plan.notes
        if sample is not None:
            run_sample(model, sample, loss, target)
    return report


def revert(model: nn.Module) -> list[str]:
    """Turns what ``convert`` turned over back into PyTorch's modules and their own forwards, in place: all or nothing.

    Args:
        model: What was converted, or a part or a copy of it; a loss that was given to ``convert`` as well.

    Returns:
        The names of the modules that were turned back.

    Raises:
        RuntimeError: something has made classes of its own of converted modules since (fully_shard does).
    """
    found: list[tuple[str, nn.Module, type[nn.Module]]] = []
    for path, module in modules_of(model):
        kind = type(module)
        if isinstance(module, Converted):
            back = original_of(kind)
        elif MARK in module.__dict__:
            # A copy that its class made by itself is of that class again, with the mark of what it was copied from.
            back = _BACK.get(kind) if isinstance(module, tuple(_BACK)) else kind
        else:
            continue
        if back is None:
            raise RuntimeError(f"revert: {path} was made a {kind.__name__} after the conversion; undo that first")
        found.append((path, module, back))
    with _all_or_nothing([module for _, module, _ in found]):
        for _, module, back in found:
            was = type(module)
            become(module, back)
            sync = ("synchronised",) if isinstance(module, nn.modules.batchnorm._BatchNorm) else ()
            for name in (MARK, RUNS, RECORD, *sync, *(_added(back) if was in _BACK else ())):
                module.__dict__.pop(name, None)
            if back in _LOSSES:
                module._buffers.pop("class_mask", None)
                module._non_persistent_buffers_set.discard("class_mask")
    return [path for path, _, _ in found]


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module one of another class, past any ``__setattr__`` that the classes have."""
    object.__setattr__(module, "__class__", kind)


@dataclass
class _Change:
    """One module that becomes another."""

    module: nn.Module
    kind: type[nn.Module]
    entry: Entry
    record: HeadRecord | None = None
    synchronised: Any = False

    def apply(self) -> None:
        original = type(self.module)
        if self.kind is HeadLinear:
            defer(self.module, self.record)  # type: ignore[arg-type]
        else:
            become(self.module, self.kind)
        self.module.__dict__.update({MARK: True, **(_added(original) if self.kind in _BACK else {})})
        if self.synchronised:
            self.module.__dict__["synchronised"] = self.synchronised
        if original in _LOSSES:
            self.module.register_buffer("class_mask", None, persistent=False)


@dataclass
class _Plan:
    """What is to change, found without changing anything."""

    changes: list[_Change] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    passed: dict[type[nn.Module], Callable[[Any], bool]] = field(default_factory=dict)
    already: int = 0
    synchronised: Any = False  # what the batch norms are to be

    def add(self, path: str, module: nn.Module, kind: type[nn.Module], what: str = "") -> None:
        self.changes.append(_Change(module, kind, Entry(path, type(module).__name__, now=what)))

    def add_norm(self, path: str, module: nn.Module, kind: type[nn.Module], what: str = "") -> None:
        """A batch norm; of those that never take statistics (torchvision's frozen one) none is synchronised."""
        if self.synchronised and isinstance(module, nn.modules.batchnorm._BatchNorm):
            self.add(path, module, kind, synchronised(what, module))
            self.changes[-1].synchronised = self.synchronised
        else:
            self.add(path, module, kind, what)


def _added(kind: type[nn.Module]) -> dict[str, Any]:
    """The options that ours has beyond PyTorch's module, at their defaults."""
    if kind is nn.Linear:
        return {}
    return losses._ADDED if kind in _LOSSES else ours.DEFAULTS


@contextlib.contextmanager
def _all_or_nothing(modules: list[nn.Module]) -> Iterator[None]:
    """Puts the modules back as they are now where something inside raises."""
    before = [(m, type(m), dict(m.__dict__), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    try:
        yield
    except BaseException:
        for module, kind, state, buffers, not_persistent in before:
            become(module, kind)
            module.__dict__.clear()
            module.__dict__.update(state)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(not_persistent)
        raise


# --- What is asked for ----------------------------------------------------------------------------------------------


def _check_arguments(model: object, loss: object, head: object, sample: object, target: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, jit.ScriptModule):
        raise TypeError("convert: expected model to be a module as it was written, got a scripted or traced one")
    if type(model).__name__ == "OptimizedModule" or model.__dict__.get("_compiled_call_impl") is not None:
        raise TypeError("convert: expected model to be a module as it was written, got a compiled one: convert first")
    _check_loss(loss)
    if head is not None and loss is None:
        raise ValueError("convert: head goes with a loss")
    if target is not None and (loss is None or sample is None):
        raise ValueError("convert: target goes with a loss and a sample")
    if sample is not None:
        check_sample(loss, target)


def _check_loss(loss: Any) -> None:
    """Raises for what is known to be no cross-entropy. Of a user's own function or module nobody knows."""
    expected = "convert: expected loss to be a cross-entropy (nn.CrossEntropyLoss, F.cross_entropy, or what calls it)"
    if loss is None:
        return
    if not callable(loss):
        raise TypeError(f"{expected}, got {type(loss).__name__}")
    inner = loss
    while isinstance(inner, functools.partial):
        inner = inner.func
    kind = type(inner)
    torchs_loss = kind.__module__ == nn.CrossEntropyLoss.__module__ and not issubclass(kind, nn.CrossEntropyLoss)
    other = isinstance(inner, nn.Module) and (torchs_loss or kind.__module__.startswith("torch.nn.modules.act"))
    names = ("cross_entropy", "linear_cross_entropy")
    of_torch = (
        getattr(inner, "__module__", None) in (F.__name__, "torch._C._nn")
        or getattr(F, getattr(inner, "__name__", ""), None) is inner
    )
    if other or (of_torch and not isinstance(inner, nn.Module) and getattr(inner, "__name__", "") not in names):
        raise TypeError(f"{expected}, got {getattr(inner, '__name__', kind.__name__)}")


def _plan(model: nn.Module, loss: Any, head: nn.Module | str | None, fuse: bool, sync: Any) -> _Plan:
    plan = _Plan(synchronised=sync)
    norms: set[int] = set()
    containers: list[tuple[str, nn.Module, Rule]] = []
    named = list(modules_of(model))
    if isinstance(loss, nn.Module):
        known = {id(module) for _, module in named}
        named += [(f"loss.{p}" if p else "loss", m) for p, m in modules_of(loss) if id(m) not in known]
    for path, module in named:
        _plan_module(plan, path, module, norms, containers)
    if fuse:
        for path, module, rule in containers:
            _plan_container(plan, path, module, rule, norms)
    if loss is not None:
        _plan_head(plan, model, head)
    elif callable(getattr(model, "loss_function", None)) and type(token_head(model)) is nn.Linear:
        plan.notes.append("its own loss: to do without the logits, convert(model, loss=model.loss_function)")
    return plan


def _plan_module(
    plan: _Plan,
    path: str,
    module: nn.Module,
    norms: set[int],
    containers: list[tuple[str, nn.Module, Rule]],
) -> None:
    kind = type(module)
    if isinstance(module, (*_BACK, Converted)):
        plan.already += MARK in module.__dict__
        if plan.synchronised and not getattr(module, "synchronised", True):
            here = "converted already: revert first" if MARK in module.__dict__ else "write fused_ops.SyncBatchNorm"
            plan.left.append(Entry(path, kind.__name__, f"fused_ops' own, not synchronised; {here}"))
        if kind in NORMS:
            norms.add(id(module))
        return
    swaps = _SWAPS if plan.synchronised else _NORMS | _LOSSES
    rule, reason = (None, "") if kind in swaps else rule_of(kind)
    if rule is not None and rule.kind == "passed":
        plan.passed[kind] = rule.forward
        return
    if kind not in swaps and rule is None:
        if reason := reason or look_at(module):
            plan.left.append(Entry(path, kind.__name__, reason))
        return
    if reason := _why_not(module):
        if rule is None or rule.kind != "sequential":
            plan.left.append(Entry(path, kind.__name__, reason))
    elif rule is None or rule.kind in ("norm", "loss"):
        which = (swaps[kind],) if rule is None else (with_rule(kind, rule), NOW[rule.kind])
        if kind in _LOSSES or (rule is not None and rule.kind == "loss"):
            plan.add(path, module, *which)
        else:
            plan.add_norm(path, module, *which)
            norms.add(id(module))
    else:
        containers.append((path, module, rule))


def _why_not(module: nn.Module) -> str:
    """Why a module of a class that is known is left alone; empty where it is not."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward is set on the instance"
    if kind.forward is not _FORWARDS.get(kind, kind.forward):
        return "the forward of its class was replaced"
    lazy = module.__dict__.get("_initialize_hook")  # of a lazy module, which sets its own
    if hooked(module) and (lazy is None or len(module._forward_pre_hooks) > 1 or module._forward_hooks):
        return "it has hooks"
    return "there are global hooks" if any_global_hook() else ""


def _plan_container(plan: _Plan, path: str, module: nn.Module, rule: Rule, norms: set[int]) -> None:
    """A container or a block, where it has a batch norm that something may be fused with."""
    children: list[Any] = list(module._modules.values())
    if rule.kind == "sequential":
        places = [i for i, child in enumerate(children) if id(child) in norms]
        if any(activation_of(child) for i in places for child in children[i + 1 :] if child is not None):
            plan.add(path, module, with_rule(type(module), rule), NOW[rule.kind])
    elif any(id(m) in norms for _, m in modules_of(module)):
        plan.add(path, module, with_rule(type(module), rule), NOW[rule.kind])


def _plan_head(plan: _Plan, model: nn.Module, given: nn.Module | str | None) -> None:
    """The model's linear head, or the layers of one with LoRA."""
    head, why = find_head(model, given)
    linears = [] if head is None else linears_of(head)
    for linear in linears:
        why = why or (_why_not(linear) if type(linear) is nn.Linear else "")
    if head is None or why:
        plan.notes.append(f"head and loss: not fused: {why}")
        return
    record: HeadRecord | None = HeadRecord()
    paths = {id(module): path for path, module in modules_of(model)}
    for linear in linears:
        if isinstance(linear, HeadLinear):
            plan.already += 1
        else:
            plan.add(paths.get(id(linear), ""), linear, HeadLinear, NOW["head"])
            plan.changes[-1].record = record
        record = None  # of LoRA's layers, the base has it


__all__ = ["Report", "convert", "revert"]

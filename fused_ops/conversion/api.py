"""Models over to this package's ops and back, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fused_ops.conversion.fuse import NotTraceable, Rewritten, rewrite
from fused_ops.conversion.head import RECORD, HeadLinear, defer, find_head, linears_of, token_head
from fused_ops.conversion.records import HeadRecord
from fused_ops.conversion.report import HEAD, Entry, Report, predict_bytes
from fused_ops.conversion.sample import Sample, run_sample
from fused_ops.core import library
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
_LOSSES: dict[type[nn.Module], type[nn.Module]] = {nn.CrossEntropyLoss: losses.CrossEntropyLoss}
_SWAPS = _NORMS | _LOSSES
_BACK = {**{new: old for old, new in _SWAPS.items()}, HeadLinear: nn.Linear}
_MARK = "_fused_ops_converted"  # in the __dict__ of what convert has turned over: a user's own fused modules lack it


def convert(
    model: nn.Module,
    *,
    loss: Callable[..., Any] | None = None,
    head: nn.Module | str | None = None,
    fuse_activations: bool = True,
    sample: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    target: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Report:
    """Turns a model over to fused ops, in place; ``revert`` turns it back.

    Every ``nn.BatchNorm1d/2d/3d`` (lazy ones too) and ``nn.CrossEntropyLoss`` in it becomes this package's: the same
    objects with the same parameters, buffers, hooks, mode, device and dtype, so that optimizers and other references to
    them stay right. state_dict does not change.

    Args:
        model: Any module; it may be one of these itself.
        loss: What the training loop applies to the model's output, if that is cross-entropy: an
            ``nn.CrossEntropyLoss``, ``F.cross_entropy``, a function that calls it, or the model's own
            (``model.loss_function`` of transformers). The linear head of the model and the loss then become
            ``linear_cross_entropy``; the training loop stays as it is. A loss that is a module is converted too.
        head: The linear layer whose result is the logits, or its name in the model. Default: found by rules
            (``get_output_embeddings``, an ``nn.Sequential`` that ends in one, known families); ``register_head`` adds
            one.
        fuse_activations: Do the activation that follows a batch norm, and the residual that is added between them, in
            the same op. In an ``nn.Sequential`` the modules tell; any other module's own forward is traced with
            torch.fx and, where that works, replaced by one that does the same in fewer steps.
        sample: An input (a tensor, a tuple of arguments, or a mapping of keyword arguments) on which output and
            gradients are compared before and after, on copies of the model, with the float64 truth; it also tells how
            many bytes are saved.
        target: What ``loss`` takes besides the output for the sample: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. The loss and its gradients are compared then. Default for a loss that is a module:
            classes drawn at random.

    Returns:
        What was replaced, fused and left alone, and why; ``str()`` and ``rich.print()`` show it as a table.

    Raises:
        TypeError: ``model`` is not a module, ``loss`` cannot be called, or does not take ``target`` besides the output.
        ValueError: ``target`` without ``loss`` and ``sample``.

    Note:
        Left alone: ``nn.SyncBatchNorm``, subclasses (also those that parametrizations and FSDP make: convert before
        them), and modules with a forward of their own set on the instance. What is fused gives way to the separate
        steps by itself where that is not the same: when the batch norm or the activation gets hooks or is replaced,
        when the residual has another shape or dtype, when forward is called with other arguments than tensors, and
        when an attribute that forward reads is set. Not noticed are changes inside such an attribute
        (``self.config.x = 1``) and of globals: revert and convert again.

        With ``loss``, the head's result (where it is to be differentiated and is above 1 MiB) is a tensor whose values
        are computed when they are needed. Cross-entropy does not need them; ``output.argmax(-1)`` computes them, with
        the head's weights of then: after an optimizer's step it raises. Under torch.compile, in evaluation without
        gradients, and where the head has hooks, the head is an ordinary linear layer.
    """
    _check_arguments(model, loss, sample, target)
    before = None if sample is None else run_sample(model, Sample.of(sample, loss, target))
    report = Report()
    for path, module in model.named_modules():
        _swap(path, module, report)
    _join_head(model, loss, head, report)
    if fuse_activations:
        for path, module in model.named_modules():
            _fuse(path, module, report)
    _note_backend(model, report)
    if before is not None:
        after = run_sample(model, before.sample)  # with the loss as it is now
        report.checks = before.compare(after)
        predict_bytes(report, before.sizes)
    return report


def _check_arguments(model: object, loss: object, sample: object, target: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"convert: expected loss to be a module or a function, got {type(loss).__name__}")
    if target is not None and (loss is None or sample is None):
        raise ValueError("convert: target goes with a loss and a sample")


def _join_head(
    model: nn.Module, loss: Callable[..., Any] | None, given: nn.Module | str | None, report: Report
) -> None:
    """The model's linear head and the loss."""
    if isinstance(loss, nn.Module):
        for path, module in loss.named_modules():
            _swap(f"loss.{path}" if path else "loss", module, report)
    if loss is None:
        if callable(getattr(model, "loss_function", None)) and type(token_head(model)) is nn.Linear:
            report.notes.append("its own loss: to do without the logits, convert(model, loss=model.loss_function)")
        return
    head, why = find_head(model, given)
    if head is None:
        report.notes.append(f"head and loss: not fused: {why}")
        return
    record: HeadRecord | None = HeadRecord()
    paths = {id(module): name for name, module in model.named_modules()}
    for linear in linears_of(head):
        path = paths.get(id(linear), "")
        if isinstance(linear, HeadLinear):
            report.left.append(Entry(path, "Linear", "already converted"))
        else:
            defer(linear, record)
            linear.__dict__[_MARK] = True
            report.replaced.append(Entry(path, "Linear"))
            if record is not None:  # of LoRA's layers, the base
                report.fused.append(Entry(path, HEAD))
        record = None


def revert(model: nn.Module) -> list[str]:
    """Turns what ``convert`` turned over back into PyTorch's modules and their own forwards, in place.

    Args:
        model: What was converted, or a part or a copy of it; a loss that was given to ``convert`` as well.

    Returns:
        The names of the modules that were turned back.

    Raises:
        RuntimeError: something has made classes of its own of converted modules since (fully_shard does).
    """
    restored = []
    for path, module in model.named_modules():
        kind = type(module)
        if isinstance(module, Rewritten):
            if Rewritten not in kind.__bases__:
                raise RuntimeError(f"revert: {path} was made a {kind.__name__} after the conversion; undo that first")
            module.__class__ = kind._fused_ops_original
            restored.append(path)
        if _MARK in module.__dict__:
            if kind not in _BACK:
                raise RuntimeError(f"revert: {path} was made a {kind.__name__} after the conversion; undo that first")
            module.__class__ = _BACK[kind]
            for name in (_MARK, RECORD, *_added(_BACK[kind])):
                module.__dict__.pop(name, None)
            if _BACK[kind] in _LOSSES:
                del module.class_mask
            restored.append(path)
    return restored


def _swap(path: str, module: nn.Module, report: Report) -> None:
    kind = type(module)
    if kind in _SWAPS and "forward" not in module.__dict__:
        module.__class__ = _SWAPS[kind]
        module.__dict__.update({_MARK: True, **_added(kind)})
        if kind in _LOSSES:
            module.register_buffer("class_mask", None, persistent=False)
        report.replaced.append(Entry(path, kind.__name__))
    elif reason := _why_not(module):
        report.left.append(Entry(path, kind.__name__, reason))


def _added(kind: type[nn.Module]) -> dict[str, Any]:
    """The options that ours has beyond PyTorch's module, at their defaults."""
    if kind is nn.Linear:
        return {}
    return losses._ADDED if kind in _LOSSES else ours.DEFAULTS


def _why_not(module: nn.Module) -> str:
    """Why a module that looks like one of those is left alone; empty for any other."""
    if isinstance(module, (*_BACK, Rewritten)):
        return "" if _MARK not in module.__dict__ else "already converted"
    if type(module) in _SWAPS:
        return "its forward is set on the instance"
    if isinstance(module, nn.SyncBatchNorm):
        return "synchronises its statistics over processes, which the fused op does not"
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.CrossEntropyLoss)) and not isinstance(
        module, nn.modules.instancenorm._InstanceNorm
    ):
        return "a subclass, whose meaning is its own"
    return ""


def _fuse(path: str, module: nn.Module, report: Report) -> None:
    children = [child for child in module.children() if isinstance(child, ours._FusedBatchNorm)]
    inside = [c for m in module.children() if isinstance(m, (nn.ModuleList, nn.ModuleDict)) for c in m.children()]
    if isinstance(module, Rewritten) or not any(_MARK in c.__dict__ for c in (*children, *inside)):
        return
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return
    apart: dict[str, str] = {}
    try:
        fusions = rewrite(module, apart)
    except NotTraceable as error:
        report.notes.append(f"{path or type(module).__name__}: nothing fused with its batch norms: {error}")
        return
    for bn, name in apart.items():
        where = f"{path}.{bn}" if path else bn
        report.notes.append(f"{where}: not fused with the {name} behind it: batch_norm has no such activation")
    for fusion in fusions:
        name = f"{path}.{fusion.bn}" if path else fusion.bn
        report.fused.append(Entry(name, fusion.then, residual=fusion.residual, activation=fusion.activation))


def _note_backend(model: nn.Module, report: Report) -> None:
    if not report.replaced:
        return
    devices = {p.device.type for p in model.parameters()} or {"cpu"}
    for device in sorted(devices & {"cpu", "cuda"}):
        served = {what for _, kind, what, _ in library.backends() if kind == device}
        if "plain PyTorch" in served:
            why = library.missing_reason or f"this build has no {device} kernels"
            report.notes.append(f"on {device} the ops run as plain PyTorch, slower than fused: {why}")


__all__ = ["Report", "convert", "revert"]

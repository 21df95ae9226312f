"""Which module becomes which: an open registry of exact classes, each with a forward that does the same in fewer steps.

A rule is about one class and holds as long as the forward of that class is the one it was written for, which a
fingerprint of its source tells. No forward is run, traced or interpreted.

    from fused_ops.conversion import rules

    @rules.register(MyBlock)
    def my_block(self, x):
        y = rules.norm_then(self.conv1(x), self.bn1, self.act)
        return rules.norm_add_then(self.conv2(y), self.bn2, None, x, self.act)
"""

from __future__ import annotations

import ast
import copyreg
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fused_ops.conversion.neighbours import (
    NORMS,
    SHORTCUTS,
    activation_of,
    norm_add_then,
    norm_then,
    sequential_forward,
)
from fused_ops.ops.batch_norm.modules import DEFAULTS

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """What becomes of the modules of one class."""

    forward: Callable[..., Any]
    kind: str  # one of _KINDS, or "sequential"
    fingerprints: tuple[str, ...]
    own: Callable[..., Any] | None = None  # the forward that the class had, where the class itself was given
    takes: Callable[..., bool] | None = None


_rules: dict[str, Rule] = {}  # by the module and the qualified name of the class, which need not be importable
_KINDS = ("block", "norm", "loss", "shortcut", "passed")


def register(
    target: type[nn.Module] | str,
    *fingerprints: str,
    kind: str = "block",
    takes: Callable[..., bool] | None = None,
) -> Callable[[_F], _F]:
    """A decorator: ``convert`` gives modules of exactly this class the decorated function as their forward.

    Args:
        target: The class, or its full name ("torchvision.models.resnet.BasicBlock"): nothing is imported.
        *fingerprints: ``rules.fingerprint`` of the forwards that the rule is right for. Needed for a name; for a
            class, by default the forward that it has now.
        kind: "block": its batch norms are fused with what follows them; ``convert(fuse_activations=False)`` leaves it.
            "norm": it is a batch norm. "loss": a cross-entropy. "shortcut": it calls its children one after the other
            and does nothing else. "passed": no forward, but whether the module, as it is now, returns its input.
        takes: For a "norm" whose function also has the arguments ``residual`` and ``activation``: whether it serves
            them, given the module and the input.

    Raises:
        TypeError: ``target`` is neither a class of modules nor a name.
        ValueError: a name without a fingerprint, or an unknown ``kind``.

    Note:
        The function takes the arguments of the class's own forward, under the same names, and gives the same result,
        in training and in evaluation. ``norm_then`` and ``norm_add_then`` look at the modules in each call and take
        the steps one by one where something has changed. Hooks, state_dict, copies and pickles stay as they are.
    """
    if kind not in _KINDS:
        raise ValueError(f"register: expected kind to be one of {list(_KINDS)}, got {kind!r}")
    if isinstance(target, str):
        if not fingerprints:
            raise ValueError(f"register: expected a fingerprint with the name {target!r}: rules.fingerprint(the class)")
        name, own = target, None
    elif isinstance(target, type) and issubclass(target, nn.Module):
        name, own = name_of(target), None if fingerprints else target.forward
    else:
        raise TypeError(f"register: expected target to be a class of modules or its full name, got {target!r}")

    def add(function: _F) -> _F:
        _rules[name] = Rule(function, kind, fingerprints, own, takes)
        return function

    return add


def name_of(kind: type) -> str:
    """By which a rule knows a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def fingerprint(kind: type[nn.Module]) -> str:
    """Of the forward of a class: the same for the same source but for comments, layout, docstrings and annotations.

    Raises:
        ValueError: its source cannot be read, or something is wrapped around it.
    """
    function = kind.forward
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise ValueError(f"{name_of(kind)}: forward is decorated or no plain function")
    return _hash(function)


@functools.cache
def _hash(function: types.FunctionType) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
    except (OSError, SyntaxError, TypeError) as error:
        raise ValueError(f"{function.__qualname__}: its source cannot be read") from error
    return hashlib.sha256(repr(_outline(tree)).encode()).hexdigest()[:16]


def _outline(node: Any) -> Any:
    """A tree of source without what changes nothing, and alike in every version of Python."""
    if isinstance(node, list):
        return [_outline(child) for child in node if not _says_nothing(child)]
    if not isinstance(node, ast.AST):
        return repr(node)
    skipped = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx")
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in skipped]
    return type(node).__name__, [(name, _outline(value)) for name, value in fields if value not in (None, [])]


def _says_nothing(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def rule_of(kind: type[nn.Module]) -> tuple[Rule | None, str]:
    """The rule that holds for a class, or why the one that names it does not; (None, "") if none does."""
    rule = _rules.get(name_of(kind))
    if rule is None:
        return (_SEQUENTIAL, "") if _is_sequential(kind) else (None, "")
    if rule.own is not None:
        return (rule, "") if kind.forward is rule.own else (None, "its class has another forward than the rule is for")
    try:
        found = fingerprint(kind)
    except ValueError as error:
        return None, str(error)
    if found in rule.fingerprints:
        return rule, ""
    return None, f"its forward ({found}) is not the one that the rule is for: another version of its library"


_SEQUENTIAL = Rule(sequential_forward, "sequential", ())


def _is_sequential(kind: type[nn.Module]) -> bool:
    kept = (name for name in ("forward", "__iter__", "__call__"))
    return issubclass(kind, nn.Sequential) and all(getattr(kind, n) is getattr(nn.Sequential, n) for n in kept)


# --- The classes of modules with another forward -----------------------------------------------------------------


class Converted:
    """What marks a class that was made for a rule: it stands before the module's own class among its bases."""

    _fused_ops_original: type[nn.Module]

    def __init_subclass__(cls, **options: Any) -> None:
        """Keeps what the module's own class does with its subclasses (a registry, say) from this one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module's own class has it, but for the class, which no import finds."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        kind = type(self)
        original = original_of(kind)
        if original is None or not isinstance(reduced, tuple):
            return reduced
        call, args, *state = reduced
        if call is kind:  # by a __reduce__ of its own
            return _called, (original, *args), *state
        named = tuple(original if arg is kind else arg for arg in args)
        return (_new, named, *state) if (call, named) == (_NEW_OBJECT, (original,)) else (call, named, *state)


_NEW_OBJECT = getattr(copyreg, "__newobj__", None)  # by which pickle makes an object without __init__
_made: dict[tuple[type[nn.Module], Callable[..., Any]], type[nn.Module]] = {}


def with_rule(original: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """The class whose modules are as those of ``original`` but for their forward; no code of the class is run."""
    made = _made.get((original, rule.forward))
    if made is not None:
        return made
    own: Any = rule.forward
    forward = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "forward": functools.wraps(original.forward)(forward),
        "_fused_ops_original": original,
        "_fused_ops_rule": rule,
    }
    if rule.kind == "norm":
        namespace |= {name: value for name, value in DEFAULTS.items() if not hasattr(original, name)}
    made = type.__new__(type(original), original.__name__, (Converted, original), namespace)
    if rule.takes is not None:
        NORMS[made] = rule.takes
    if rule.kind == "shortcut":
        SHORTCUTS.add(made)
    _made[original, rule.forward] = made
    return made


def original_of(kind: type) -> type[nn.Module] | None:
    """What a made class was made of; None for any other, also for one that was made of a made one."""
    return kind.__dict__.get("_fused_ops_original")


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's own class, for a rule to call with the module where it does not serve."""
    return type(module)._fused_ops_original.forward  # type: ignore[no-any-return,attr-defined]


def _new(original: type[nn.Module]) -> nn.Module:
    """An empty module, for its state to arrive (pickle, deepcopy); one of its own class where no rule holds here."""
    kind = _kind_here(original)
    module: nn.Module = kind.__new__(kind)
    return module


def _called(original: type[nn.Module], *args: Any) -> nn.Module:
    """Likewise where the class says what it is to be called with."""
    return _kind_here(original)(*args)


def _kind_here(original: type[nn.Module]) -> type[nn.Module]:
    rule, _ = rule_of(original)
    return original if rule is None else with_rule(original, rule)


__all__ = ["activation_of", "fingerprint", "norm_add_then", "norm_then", "own_forward", "register"]

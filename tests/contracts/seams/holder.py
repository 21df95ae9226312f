"""A case as a model: what tracers, exporters and copies take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import check as c
from .cases import Case
from .check import check, close, scalar


class Holder(nn.Module):
    """A model that ends in the case: one trainable factor before it, its parameters and statistics as its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        t = case.tensors()
        self.gain = nn.Parameter(torch.ones(1, dtype=t[case.diff[0]].dtype))
        self.args = [n for n in case.names[1:] if n not in case.unbatched or n in ("class_mask", "normalizer")]
        self.args = [n for n in self.args if n not in case.mutable]
        self.state = [n for n in case.names[1:] if n not in self.args]
        self.inner = None
        if case.module is not None:
            self.inner = case.module()
            self.inner.load_state_dict({n: t[n] for n in self.state}, strict=True)
        else:
            for n in self.state:
                if n in case.diff:
                    self.register_parameter(n, nn.Parameter(t[n]))
                else:
                    self.register_buffer(n, t[n])

    def compute(self, x: Any, *args: Any) -> Any:
        """The case on the held tensors."""
        x = x * self.gain
        if self.inner is not None:
            return self.inner(x, *args)
        held = {n: getattr(self, n) for n in self.state}
        case = self.case
        return case.ours(**{case.diff[0]: x}, **dict(zip(self.args, args, strict=True)), **held, **case.options)

    def forward(self, x: Any, *args: Any) -> Any:
        """As ``compute``; see ``holder`` for one with as many arguments as the case has."""
        return self.compute(x, *args)

    def inputs(self, batch: int, seed: int = 0, grad: bool = True) -> tuple[Tensor, ...]:
        """The arguments of a call."""
        t = self.case.tensors(batch, seed)
        found = tuple(t[n] for n in (self.case.diff[0], *self.args))
        if grad:
            found[0].requires_grad_()
        return found

    def check(self, call: Callable[..., Any], batch: int, seed: int = 0, state: Any = None) -> None:
        """Value and gradients of ``call(*inputs)``, of the parameters of ``state`` (default: this module) too."""
        state = state or self
        case = self.case
        for p in state.parameters():
            p.grad = None
        inputs = self.inputs(batch, seed)
        expected = _mixed(case, batch, seed)
        outputs = call(*inputs)
        check(case, outputs, expected=expected)
        scalar(outputs).backward()
        close(inputs[0].grad, expected.grads[case.diff[0]], "gradient of the input", c.tolerance_of(case))
        named = {n.rpartition("inner.")[2]: p for n, p in state.named_parameters()}
        terms = expected.grads[case.diff[0]] * inputs[0].detach().double()
        assert named["gain"].grad is not None, "a parameter before the op gets no gradient"
        size = terms.abs().sum().item()
        close(
            named["gain"].grad.sum(), terms.sum(), "gradient of a parameter before the op", c.tolerance_of(case), size
        )
        for n in self.state:
            if n in case.diff:
                assert named[n].grad is not None, f"parameter {n} gets no gradient"
                close(named[n].grad, expected.grads[n], f"gradient of parameter {n}", c.tolerance_of(case))


def _mixed(case, batch, seed):
    """The oracle on the inputs of one batch and seed, with the parameters and statistics of the first."""
    first, made = case.tensors(), case.tensors(batch, seed)
    held = {n for n in case.names if n in case.unbatched and n not in ("class_mask", "normalizer")} | set(case.mutable)
    tensors = {n: (first if n in held else made)[n] for n in case.names}
    return c.Answer(Case(case.op, case.name, lambda b, s: tensors, case.diff, case.ours, case.oracle, case.options))


def holder(case: Case) -> Holder:
    """A Holder whose forward has named arguments, as tracers want it."""
    made = Holder(case)
    names = ", ".join(f"a{i}" for i in range(len(made.args)))
    space: dict[str, Any] = {}
    exec(f"def forward(self, x{', ' + names if names else ''}):\n    return self.compute(x, {names})", space)
    made.__class__ = type("NamedHolder", (Holder,), {"forward": space["forward"]})
    return made


def same_batch(case: Case) -> bool:
    """Whether the module holds on to nothing but parameters: fold and convert have a model of their own."""
    return case.name not in ("fold", "convert")

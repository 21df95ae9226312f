"""PyTorch's own samples of the ops we replace, as calls of both functions: what tests/contracts/test_opinfo.py runs on.

``FUSED_OPS_FULL_GRID=1`` keeps every sample; by default every ``step``-th is kept, starting where a check's name says,
so that together the checks see nearly all of them.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo import core
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import fused_ops

# For every sample it reads the source of every frame of the stack, to find a unittest.TestCase that is not there.
common_utils.extract_test_fn = core.extract_test_fn = lambda: None

FULL = bool(int(os.environ.get("FUSED_OPS_FULL_GRID", "0")))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["cross_entropy", "nll_loss", "batch_norm", "linear_cross_entropy", "linear_cross_entropy in chunks"]


def thin(items, name, at_most):
    """At most so many of the items, evenly spread, from a start that depends on the name."""
    step = 1 if FULL else max(1, -(-len(items) // at_most))
    return items[zlib.crc32(name.encode()) % step :: step]


@dataclass
class Case:
    """One call: ``ours(*args, **kwargs)`` should be ``theirs(*args, **kwargs)``."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.leaves, self.spec = tree_flatten((self.args, self.kwargs))
        self.places = [i for i, t in enumerate(self.leaves) if isinstance(t, torch.Tensor) and t.requires_grad]

    @property
    def inputs(self):
        """The tensors that require grad."""
        return [self.leaves[i] for i in self.places]

    @property
    def trains(self):
        """batch_norm's ``training``."""
        return self.args[5] if len(self.args) > 5 else self.kwargs.get("training", False)

    def call(self, function, *inputs, places=None):
        """The function's result for other tensors in the places of ``inputs``."""
        values = list(self.leaves)
        for i, tensor in zip(self.places if places is None else places, inputs, strict=True):
            values[i] = tensor
        args, kwargs = tree_unflatten(values, self.spec)
        return function(*args, **kwargs)

    def map(self, change):
        """The case with every tensor changed, requires_grad kept."""

        def one(t):
            if not isinstance(t, torch.Tensor):
                return t
            new = change(t.detach())
            return new.requires_grad_() if t.requires_grad else new

        args, kwargs = tree_map(one, (self.args, self.kwargs))
        return Case(self.name, self.ours, self.theirs, args, kwargs)

    def double(self):
        """In float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def run(self, function, upstream, inputs=None):
        """The result, then the gradients of the inputs."""
        inputs = [t.detach().clone().requires_grad_() for t in self.inputs] if inputs is None else inputs
        loss = self.call(function, *inputs)
        if not inputs:
            return [loss]
        grads = torch.autograd.grad(loss, inputs, upstream(loss), allow_unused=True)
        return [loss.detach(), *(g for g in grads if g is not None)]


def keeps_statistics(function):
    """batch_norm on copies of the running statistics, which it would change."""

    def call(input, running_mean, running_var, *args, **kwargs):
        copies = (None if t is None else t.clone() for t in (running_mean, running_var))
        return function(input, *copies, *args, **kwargs)

    return call


def nll_loss(input, target, **kwargs):
    return F.nll_loss(F.log_softmax(input, 0 if input.dim() == 1 else 1), target, **kwargs)


def linear_then_loss(input, linear_weight, target, *, linear_bias=None, ignore_index=None, options=None, **kwargs):
    outputs = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, outputs)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **kwargs)


def in_chunks(*args, **kwargs):
    return fused_ops.linear_cross_entropy(*args, **kwargs, chunk_rows=2)


def _samples(name, dtype):
    for info in op_db:
        if info.name == name and info.dtypes:
            yield from info.sample_inputs("cpu", dtype, requires_grad=True)


@cache
def cases(family, dtype):
    """All the cases of a family."""
    torch.manual_seed(0)
    found = []

    def add(ours, theirs, args, kwargs):
        found.append(Case(f"{family} {len(found)}", ours, theirs, tuple(args), kwargs))

    if family in ("cross_entropy", "nll_loss"):
        theirs = F.cross_entropy if family == "cross_entropy" else nll_loss
        for s in _samples(f"nn.functional.{family}", dtype):
            kwargs = {
                k: v.detach() if k == "weight" and v is not None and family == "nll_loss" else v
                for k, v in s.kwargs.items()
            }
            add(fused_ops.cross_entropy, theirs, (s.input, *s.args), kwargs)
    elif family == "batch_norm":
        pair = keeps_statistics(fused_ops.batch_norm), keeps_statistics(F.batch_norm)
        for s in (*_samples("nn.functional.batch_norm", dtype), *_samples("native_batch_norm", dtype)):
            args = list(s.args)
            if len(args) == 7:  # native_batch_norm: weight and bias come first
                args = [args[2], args[3], args[0], args[1], *args[4:]]
            for i in (0, 1):
                args[i] = None if args[i] is None else args[i].detach()
            add(*pair, (s.input, *args), s.kwargs)
    else:
        ours = fused_ops.linear_cross_entropy if family == "linear_cross_entropy" else in_chunks
        for s in _samples("nn.functional.linear_cross_entropy", dtype):
            add(ours, linear_then_loss, (s.input, *s.args), {k: v for k, v in s.kwargs.items() if k != "options"})
    return found


def chosen(family, dtype, check, at_most):
    return thin(cases(family, dtype), f"{check} {family} {dtype}", at_most)

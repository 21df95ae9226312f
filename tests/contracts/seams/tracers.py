"""Tracers that compile nothing: TorchScript, torch.fx and make_fx."""

import copy
import io

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fused_ops

from . import check as c
from .cases import OTHER_BATCH
from .check import answer, check, scalar
from .holder import holder, same_batch
from .registry import system


def _scriptable(case):
    if case.module is not None:
        return case.module()
    return {"ce": fused_ops.cross_entropy, "lce": fused_ops.linear_cross_entropy, "bn": fused_ops.batch_norm}[case.op]


@system("jit.script", lambda case: "key" in case.traits or (case.module is not None and case.name != "fold"))
def jit_script(case):
    torch.jit.script(_scriptable(case))


@system("jit.trace", lambda case: same_batch(case) and "inplace" not in case.traits)
def jit_trace(case):
    """Traced, run with other values, saved and loaded."""
    model = holder(case)
    start = copy.deepcopy(model.state_dict())
    traced = torch.jit.trace(model, model.inputs(c.BATCH, grad=False), check_trace=False)
    model.load_state_dict(start)
    model.check(traced, c.BATCH, seed=1, state=traced)
    buffer = io.BytesIO()
    model.load_state_dict(start)
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    model.check(loaded, c.BATCH, seed=1, state=loaded)


@system("fx.symbolic_trace", same_batch)
def symbolic_trace(case):
    model = holder(case)
    traced = torch.fx.symbolic_trace(model)
    model.check(traced, OTHER_BATCH, seed=1, state=traced)


def _value_and_grads(case):
    """A function of all tensors: outputs and gradients, as a training step has them."""

    def run(*values):
        t = dict(zip(case.names, values, strict=True))
        diff = [t[n].detach().requires_grad_() for n in case.diff]
        outputs = c.outputs_of(case.ours(**{**t, **dict(zip(case.diff, diff, strict=True))}, **case.options))
        return (*outputs, *torch.autograd.grad(scalar(outputs), diff))

    return run


def _checked_graph(case, graph, batch):
    t = case.tensors(batch)
    got = graph(*t.values())
    n = len(got) - len(case.diff)
    check(case, tuple(got[:n]), tuple(got[n:]), t, expected=answer(case, batch))


@system("make_fx")
def make_fx_real(case):
    graph = make_fx(_value_and_grads(case))(*case.tensors().values())
    _checked_graph(case, graph, c.BATCH)


@system("make_fx, symbolic, another size", lambda case: "inplace" not in case.traits and same_batch(case), costly=True)
def make_fx_symbolic(case):
    graph = make_fx(_value_and_grads(case), tracing_mode="symbolic")(*case.tensors().values())
    _checked_graph(case, graph, OTHER_BATCH)

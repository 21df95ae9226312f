"""torch.compile, alone and around or inside the transforms."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from . import check as c
from .cases import OTHER_BATCH
from .check import Call, answer, check, scalar
from .holder import same_batch
from .registry import system
from .transforms import _mixed_answers, _stacked

BATCHES = (6, 9, 11)


def _function(case):
    """The case as a function of all its tensors and of the numbers: (one number for the backward, the outputs)."""

    def run(*values, **given):
        outputs = case.ours(**dict(zip(case.names, values, strict=True)), **{**case.options, **given})
        return scalar(outputs), outputs

    return run


def _checked(case, compiled, batch=c.BATCH, **numbers):
    call = Call(case, batch)
    total, outputs = compiled(*call.tensors.values(), **numbers)
    grads = torch.autograd.grad(total, call.diff, allow_unused=True)
    check(case, outputs, grads, call.tensors, expected=answer(case, batch, **numbers))


def _compile(function, backend="aot_eager", **how):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, **how), counter


def _no_new_graph(counter, known, what):
    assert counter.frame_count == known, f"compiled again for {what}: {counter.frame_count} graphs, {known} before"


@system("compile", costly=True)
def compile_default(case):
    compiled, _ = _compile(_function(case))
    _checked(case, compiled)
    _checked(case, compiled, OTHER_BATCH)


@system("compile, fullgraph", costly=True)
def compile_fullgraph(case):
    compiled, _ = _compile(_function(case), fullgraph=True)
    _checked(case, compiled)
    _checked(case, compiled, OTHER_BATCH)


@system("compile, dynamic", costly=True)
def compile_dynamic(case):
    compiled, counter = _compile(_function(case), fullgraph=True, dynamic=True)
    _checked(case, compiled)
    known = counter.frame_count
    for batch in BATCHES:
        _checked(case, compiled, batch)
    _no_new_graph(counter, known, "another size")


@system("compile, mark_dynamic", same_batch, costly=True)
def compile_mark_dynamic(case):
    compiled, counter = _compile(_function(case), fullgraph=True)
    known = 0
    for batch in BATCHES:
        call = Call(case, batch)
        for name, t in call.tensors.items():
            if name not in case.unbatched and t.dim():
                torch._dynamo.mark_dynamic(t, 0)
        total, outputs = compiled(*call.tensors.values())
        check(case, outputs, torch.autograd.grad(total, call.diff), call.tensors, expected=answer(case, batch))
        known = counter.frame_count if batch == BATCHES[0] else known
    _no_new_graph(counter, known, "another size")


def _changing(case, backend, fullgraph):
    for name, values in case.numbers.items():
        compiled, counter = _compile(_function(case), backend, fullgraph=fullgraph)
        known = 0
        for i, value in enumerate(values):
            _checked(case, compiled, **{name: value})
            known = counter.frame_count if i < 2 else known  # a number becomes a symbol when it first changes
        if fullgraph:
            _no_new_graph(counter, known, f"another value of {name}")


def _varies(case):
    return bool(case.numbers)


@system("compile, changing numbers", _varies, costly=True)
def compile_numbers(case):
    _changing(case, "aot_eager", False)


@system("compile, fullgraph, changing numbers", _varies, costly=True)
def compile_numbers_fullgraph(case):
    _changing(case, "aot_eager", True)


INDUCTOR = (
    "ce-mean",
    "ce-normalizer",
    "ce-mixup",
    "ce-outputs",
    "ce-bfloat16",
    "lce-small, bias",
    "lce-chunks",
    "lce-chunks, normalizer",
    "lce-1 MiB of logits",
    "bn-training, statistics",
    "bn-channels_last",
    "bn-residual, relu",
    "bn-momentum=None",
)


def _inductor(case):
    return repr(case) in INDUCTOR


@system("inductor", _inductor, costly=True)
def inductor(case):
    compiled, _ = _compile(_function(case), "inductor")
    _checked(case, compiled)
    _checked(case, compiled, OTHER_BATCH)


@system("inductor, changing numbers", lambda case: _inductor(case) and _varies(case), costly=True)
def inductor_numbers(case):
    """With PyTorch's caches on, as they are by default."""
    _changing(case, "inductor", False)


@system("compile under no_grad", costly=True)
def compile_no_grad(case):
    compiled, _ = _compile(_function(case), fullgraph=True)
    call = Call(case)
    with torch.no_grad():
        _, outputs = compiled(*call.tensors.values())
    check(case, outputs, None, call.tensors)


@system("compile(func.grad)", costly=True)
def compile_grad(case):
    def run(*values):
        diff, rest = values[: len(case.diff)], values[len(case.diff) :]

        def f(diff):
            return scalar(case.ours(**dict(zip(case.names, (*diff, *rest), strict=True)), **case.options))

        return grad(f)(diff)

    compiled, _ = _compile(run, fullgraph=True)
    call = Call(case, grad=False)
    check(case, None, compiled(*call.tensors.values()), call.tensors)


@system("compile(vmap(grad))", costly=True)
def compile_vmap_grad(case):
    def run(diff, *rest):
        return scalar(case.ours(**dict(zip(case.names, (*diff, *rest), strict=True)), **case.options))

    names = set(case.names)
    t = _stacked(case, names)
    diff, rest = tuple(t[n] for n in case.diff), [t[n] for n in case.names[len(case.diff) :]]
    compiled, _ = _compile(lambda diff, *rest: vmap(grad(run))(diff, *rest), fullgraph=True)
    got = compiled(diff, *rest)
    for i, expected in enumerate(_mixed_answers(case, names)):
        check(case, None, tuple(g[i] for g in got), {n: t[n][i] for n in case.mutable}, expected=expected)


@system("compile(vmap)", costly=True)
def compile_vmap(case):
    names = {*case.diff, *case.mutable}
    t = _stacked(case, names)

    def run(*values):
        return case.ours(**dict(zip(case.names, values, strict=True)), **case.options)

    dims = tuple(0 if n in names else None for n in case.names)
    compiled, _ = _compile(lambda *values: vmap(run, in_dims=dims)(*values), fullgraph=True)
    got = compiled(*t.values())
    for i, expected in enumerate(_mixed_answers(case, names)):
        outputs = tuple(o[i] for o in c.outputs_of(got))
        check(case, outputs, None, {n: t[n][i] for n in case.mutable}, expected=expected)


@system("func.grad(compile)", costly=True)
def grad_of_compiled(case):
    compiled, _ = _compile(lambda *values: _function(case)(*values)[0])
    call = Call(case, grad=False)
    rest = list(call.fixed.values())
    got = grad(lambda diff: compiled(*diff, *rest))(call.diff)
    check(case, None, got, call.tensors)


@system("checkpoint in compile", costly=True)
def compile_checkpoint(case):
    from torch.utils.checkpoint import checkpoint

    def run(*values):
        return checkpoint(_function(case), *values, use_reentrant=False)

    compiled, _ = _compile(run, fullgraph=True)
    _checked(case, compiled)


@system("compiled autograd", costly=True)
def compiled_autograd(case):
    function = _function(case)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="aot_eager")
        def step(*values):
            total, outputs = function(*values)
            total.backward()
            return outputs

        call = Call(case)
        outputs = step(*call.tensors.values())
        check(case, outputs, tuple(t.grad for t in call.diff), call.tensors)

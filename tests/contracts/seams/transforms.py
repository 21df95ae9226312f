"""Eager PyTorch and torch.func."""

import torch
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.func import hessian as func_hessian

from . import check as c
from .cases import Case
from .check import Call, answer, check, close, scalar
from .registry import exact, system


@system("eager")
def eager(case):
    Call(case).run_and_check()


@system("second derivative", exact)
def second_derivative(case):
    call = Call(case)
    first = torch.autograd.grad(call.function(*call.diff), call.diff, create_graph=True)
    v = c.directions(case)
    second = torch.autograd.grad(
        sum((g * w).sum() for g, w in zip(first, v, strict=True)), call.diff, allow_unused=True
    )
    for name, got, row in zip(case.diff, second, _times_direction(case), strict=True):
        close(torch.zeros_like(row) if got is None else got, row, f"second derivative by {name}")


def _times_direction(case):
    """The oracle's Hessian times the direction, by differentiable tensor."""
    v = c.directions(case)
    return [sum(torch.tensordot(h, w, w.dim()) for h, w in zip(row, v, strict=True)) for row in c.hessian(case)]


@system("batch of gradients, differentiated", exact)
def batch_of_gradients(case):
    call, factors = Call(case), torch.tensor([3.0, 1.0, 2.0])
    loss, v = call.function(*call.diff), c.directions(case)
    batch = torch.autograd.grad(loss, call.diff, factors.to(loss.dtype), is_grads_batched=True, create_graph=True)
    for i, factor in enumerate(factors.tolist()):
        check(case, None, tuple(g[i] / factor for g in batch), call.tensors)
    second = torch.autograd.grad(
        sum((g[2] * w).sum() for g, w in zip(batch, v, strict=True)), call.diff, allow_unused=True
    )
    for name, got, row in zip(case.diff, second, _times_direction(case), strict=True):
        close(torch.zeros_like(row) if got is None else got, 2 * row, f"second derivative by {name}")


@system("no_grad")
def no_grad(case):
    call = Call(case)
    with torch.no_grad():
        outputs = call.run()
    assert not any(o.requires_grad for o in c.outputs_of(outputs))
    check(case, outputs, None, call.tensors)


@system("inference_mode")
def inference_mode(case):
    with torch.inference_mode():
        call = Call(case, grad=False)
        outputs = call.run()
    check(case, outputs, None, call.tensors)  # the right answer needs gradients


def _stacked(case, names, seeds=(0, 1, 2)):
    """One tensor for the seeds' where the name is asked for, else the first seed's."""
    made = [case.tensors(seed=s) for s in seeds]
    return {n: torch.stack([m[n] for m in made]) if n in names else made[0][n] for n in case.names}


def _mixed_answers(case, names, seeds=(0, 1, 2)):
    """The oracle for each seed, with the tensors that are not stacked from the first."""
    first = case.tensors()
    answers = []
    for seed in seeds:
        made = case.tensors(seed=seed)
        mixed = {n: (made[n] if n in names else first[n]).clone() for n in case.names}
        swapped = Case(case.op, case.name, lambda b, s, m=mixed: m, case.diff, case.ours, case.oracle, case.options)
        answers.append(c.Answer(swapped))
    return answers


@system("vmap")
def vmap_(case):
    names = {*case.diff, *case.mutable}
    t = _stacked(case, names)

    def run(*values):
        return case.ours(**dict(zip(case.names, values, strict=True)), **case.options)

    got = vmap(run, in_dims=tuple(0 if n in names else None for n in case.names))(*t.values())
    for i, expected in enumerate(_mixed_answers(case, names)):
        outputs = tuple(o[i] for o in c.outputs_of(got))
        check(case, outputs, None, {n: t[n][i] for n in case.mutable}, expected=expected)


@system("per-sample gradients, vmap(grad)")
def per_sample(case):
    names = set(case.names)
    t = _stacked(case, names)

    def run(diff, *rest):
        return scalar(case.ours(**dict(zip(case.names, (*diff, *rest), strict=True)), **case.options))

    diff, rest = tuple(t[n] for n in case.diff), [t[n] for n in case.names[len(case.diff) :]]
    got = vmap(grad(run))(diff, *rest)
    for i, expected in enumerate(_mixed_answers(case, names)):
        check(case, None, tuple(g[i] for g in got), {n: t[n][i] for n in case.mutable}, expected=expected)


@system("func.grad")
def func_grad(case):
    call = Call(case, grad=False)
    check(case, None, grad(call.function, tuple(range(len(call.diff))))(*call.diff), call.tensors)


@system("jvp")
def jvp_(case):
    call = Call(case, grad=False)
    v = c.directions(case)
    value, tangent = jvp(call.function, call.diff, v)
    expected = answer(case)
    close(value, expected.scalar, "value", c.tolerance_of(case))
    terms = [g * w.double() for g, w in zip(expected.grads.values(), v, strict=True)]
    size = sum(t.abs().sum().item() for t in terms)
    close(tangent, sum(t.sum() for t in terms), "tangent", c.tolerance_of(case), size)
    check(case, None, None, call.tensors)


@system("linearize", exact, costly=True)
def linearize_(case):
    call = Call(case, grad=False)
    v = c.directions(case)
    value, along = linearize(call.function, *call.diff)
    close(value, answer(case).scalar, "value")
    close(along(*v), sum((g * w).sum() for g, w in zip(answer(case).grads.values(), v, strict=True)), "tangent")


@system("jvp of jvp", exact)
def jvp_of_jvp(case):
    call = Call(case, grad=False)
    v = c.directions(case)
    _, got = jvp(lambda *x: jvp(call.function, x, v)[1], call.diff, v)
    expected = sum((row * w).sum() for row, w in zip(_times_direction(case), v, strict=True))
    close(got, expected, "second tangent")


def _second(case, transform):
    call = Call(case, grad=False)
    got = transform(call.function, tuple(range(len(call.diff))))(*call.diff)
    for i, row in enumerate(c.hessian(case)):
        for j, expected in enumerate(row):
            close(got[i][j], expected, f"second derivative by {case.diff[i]} and {case.diff[j]}")


@system("vjp of jvp", exact)
def vjp_of_jvp(case):
    """The jvp has ended when the gradient is asked for: what its level had saved outlives it."""
    call = Call(case, grad=False)
    v = c.directions(case)
    tangent, pull = vjp(lambda *x: jvp(call.function, x, v)[1], *call.diff)
    for name, got, row in zip(case.diff, pull(torch.ones_like(tangent)), _times_direction(case), strict=True):
        close(got, row, f"second derivative by {name}")


@system("jacfwd(jacfwd)", exact)
def jacfwd_jacfwd(case):
    _second(case, lambda f, n: jacfwd(jacfwd(f, n), n))


@system("hessian", exact)
def hessian_(case):
    _second(case, func_hessian)


@system("jacrev(jacfwd)", exact)
def jacrev_jacfwd(case):
    _second(case, lambda f, n: jacrev(jacfwd(f, n), n))


@system("jacrev(jacrev)", exact)
def jacrev_jacrev(case):
    _second(case, lambda f, n: jacrev(jacrev(f, n), n))


@system("functionalize")
def functionalize_(case):
    call = Call(case, grad=False)
    got = functionalize(lambda *x: call.function(*x))(*call.diff)
    close(got, answer(case).scalar, "value", c.tolerance_of(case))
    check(case, None, None, call.tensors)


@system("functionalize(grad)", exact)
def functionalize_grad(case):
    call = Call(case, grad=False)
    check(case, None, functionalize(grad(call.function, tuple(range(len(call.diff)))))(*call.diff))


@system("backward through dual tensors", exact)
def backward_through_dual(case):
    call = Call(case)
    v = c.directions(case)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, w) for t, w in zip(call.diff, v, strict=True)]
        _, tangent = torch.autograd.forward_ad.unpack_dual(call.function(*duals))
        grads = torch.autograd.grad(tangent, call.diff, allow_unused=True)
    for name, got, row in zip(case.diff, grads, _times_direction(case), strict=True):
        close(torch.zeros_like(row) if got is None else got, row, f"second derivative by {name}")

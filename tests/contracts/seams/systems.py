"""The systems of PyTorch that need no compiler: each a function that runs one case and compares it with the oracle."""

import copy
import io
import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.func import functionalize, grad, hessian as func_hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import check as c
from .cases import OTHER_BATCH, Case
from .check import Call, answer, check, close, scalar


@dataclass(frozen=True)
class System:
    """One row of the table."""

    name: str
    run: Callable[[Case], None]
    applies: Callable[[Case], bool]
    costly: bool  # by default only on the key cases


SYSTEMS: dict[str, System] = {}


def system(name: str, applies: Callable[[Case], bool] = lambda case: True, costly: bool = False) -> Any:
    """Registers a system under the name that the table shows."""

    def register(run):
        SYSTEMS[name] = System(name, run, applies, costly)
        return run

    return register


def exact(case: Case) -> bool:
    """Whether derivatives can be compared to many digits at a bearable cost."""
    return "large" not in case.traits and not case.low_precision


# Eager.


@system("eager")
def eager(case):
    Call(case).run_and_check()


@system("second derivative", exact)
def second_derivative(case):
    call = Call(case)
    first = torch.autograd.grad(call.function(*call.diff), call.diff, create_graph=True)
    v = c.directions(case)
    second = torch.autograd.grad(sum((g * w).sum() for g, w in zip(first, v)), call.diff, allow_unused=True)
    for name, got, row in zip(case.diff, second, _times_direction(case), strict=True):
        close(torch.zeros_like(row) if got is None else got, row, f"second derivative by {name}")


def _times_direction(case):
    """The oracle's Hessian times the direction, by differentiable tensor."""
    v = c.directions(case)
    return [sum(torch.tensordot(h, w, w.dim()) for h, w in zip(row, v)) for row in c.hessian(case)]


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
        check(case, outputs, None, call.tensors)


# torch.func.


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
        return case.ours(**dict(zip(case.names, values)), **case.options)

    got = vmap(run, in_dims=tuple(0 if n in names else None for n in case.names))(*t.values())
    for i, expected in enumerate(_mixed_answers(case, names)):
        outputs = tuple(o[i] for o in c.outputs_of(got))
        check(case, outputs, None, {n: t[n][i] for n in case.mutable}, expected=expected)


@system("per-sample gradients, vmap(grad)")
def per_sample(case):
    names = set(case.names)
    t = _stacked(case, names)

    def run(diff, *rest):
        return scalar(case.ours(**dict(zip(case.names, (*diff, *rest))), **case.options))

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
    terms = [g * w.double() for g, w in zip(expected.grads.values(), v)]
    size = sum(t.abs().sum().item() for t in terms)
    close(tangent, sum(t.sum() for t in terms), "tangent", c.tolerance_of(case), size)
    check(case, None, None, call.tensors)


@system("linearize", exact)
def linearize_(case):
    call = Call(case, grad=False)
    v = c.directions(case)
    value, along = linearize(call.function, *call.diff)
    close(value, answer(case).scalar, "value")
    close(along(*v), sum((g * w).sum() for g, w in zip(answer(case).grads.values(), v)), "tangent")


@system("jvp of jvp", exact)
def jvp_of_jvp(case):
    call = Call(case, grad=False)
    v = c.directions(case)
    _, got = jvp(lambda *x: jvp(call.function, x, v)[1], call.diff, v)
    expected = sum((row * w).sum() for row, w in zip(_times_direction(case), v))
    close(got, expected, "second tangent")


def _second(case, transform):
    call = Call(case, grad=False)
    got = transform(call.function, tuple(range(len(call.diff))))(*call.diff)
    for i, row in enumerate(c.hessian(case)):
        for j, expected in enumerate(row):
            close(got[i][j], expected, f"second derivative by {case.diff[i]} and {case.diff[j]}")


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
        duals = [torch.autograd.forward_ad.make_dual(t, w) for t, w in zip(call.diff, v)]
        _, tangent = torch.autograd.forward_ad.unpack_dual(call.function(*duals))
        grads = torch.autograd.grad(tangent, call.diff, allow_unused=True)
    for name, got, row in zip(case.diff, grads, _times_direction(case), strict=True):
        close(torch.zeros_like(row) if got is None else got, row, f"second derivative by {name}")


# Tensors without data.


def _same_meta(case, tensors, device, expected):
    outputs = case.ours(**tensors, **case.options)
    for got, real in zip(c.outputs_of(outputs), expected, strict=True):
        assert (got.shape, got.dtype, got.device.type) == (real.shape, real.dtype, device), f"{got} for {real.shape}"
        assert got.stride() == real.stride(), f"strides {got.stride()} for {real.stride()}"
    diff = [tensors[n] for n in case.diff]
    for x, g in zip(diff, torch.autograd.grad(scalar(outputs), diff), strict=True):
        assert (g.shape, g.dtype, g.device.type) == (x.shape, x.dtype, device)


@system("FakeTensorMode", lambda case: case.name not in ("fold", "convert"))
def fake(case):
    call, expected = Call(case), c.outputs_of(Call(case).run())
    with FakeTensorMode() as mode:
        _same_meta(case, {n: mode.from_tensor(t) for n, t in call.tensors.items()}, "cpu", expected)


@system("meta device", lambda case: case.name not in ("fold", "convert"))
def meta(case):
    made = {n: t.to("meta") for n, t in Call(case, grad=False).tensors.items()}
    for name in case.diff:
        made[name].requires_grad_()
    _same_meta(case, made, "meta", c.outputs_of(Call(case).run()))


def _raises(run, error, *words):
    """Expects a RuntimeError whose message has one of the words; the state is told where it does not."""
    try:
        run()
    except error as raised:
        assert any(w in str(raised) for w in words), f"message: {str(raised)[:200]}"
    else:
        raise AssertionError("expected an error, got a result")


@system("one tensor on another device", lambda case: case.name not in ("fold", "convert"))
def other_device(case):
    """Eager PyTorch raises, and so do we: nothing is read and nothing answered."""
    for name in case.names:
        if name.endswith("num_batches_tracked"):
            continue  # nobody reads it but its own update
        call = Call(case, grad=False)
        call.tensors[name] = call.tensors[name].to("meta")
        for n in case.diff:
            call.tensors[n].requires_grad_()
        try:
            _raises(call.run, (RuntimeError, NotImplementedError), "device", "meta")
        except AssertionError as error:
            raise AssertionError(f"{name} on meta: {error}") from None


def in_child(run: Callable[[], None]) -> None:
    """Runs in a forked process, so that a crash is a failure and no more; elsewhere in this one."""
    if not hasattr(os, "fork"):
        return run()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            message = b""
            try:
                run()
            except BaseException as error:
                message = (f"{type(error).__name__}: {error}" or "failed").encode()
            os.write(write, message[:4000])
            os.close(write)
        finally:
            os._exit(0)
    os.close(write)
    message = b"".join(iter(lambda: os.read(read, 65536), b""))
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"ended by signal {status & 127}"
    assert not message, message.decode()


def _freed(tensor):
    tensor.untyped_storage().resize_(0)


# The backward of these begins with the op itself; before others PyTorch's own read the upstream gradient, and crash.
DIRECT = ("ce-mean", "ce-sum", "ce-none", "ce-large", "lce-small", "lce-chunks", "lce-1 MiB of logits")


@system("freed storage", lambda case: case.name not in ("fold", "convert"))
def freed_storage(case):
    """As FSDP and ZeRO leave their tensors: an error for every argument, and for a freed upstream gradient."""
    problems = []

    def attempt(what, run):
        try:
            in_child(run)
        except AssertionError as error:
            problems.append(f"{what}: {error}")

    def argument(name):
        call = Call(case)
        _freed(call.tensors[name].detach())
        _raises(call.run, RuntimeError, "not allocated", "storage")

    def upstream():
        call = Call(case)
        output = c.outputs_of(call.run())[0]
        ones = torch.ones_like(output)
        _freed(ones)
        _raises(lambda: torch.autograd.grad(output, call.diff, ones), RuntimeError, "not allocated", "storage")

    def between():
        call = Call(case)
        total = scalar(call.run())
        _freed(call.tensors[case.diff[0]].detach())
        _raises(lambda: torch.autograd.grad(total, call.diff), RuntimeError, "not allocated", "storage")

    for name in case.names:
        if not name.endswith("num_batches_tracked"):
            attempt(name, lambda name=name: argument(name))
    if repr(case) in DIRECT or (case.op == "bn" and "valid" not in case.name):
        attempt("upstream gradient", upstream)
    if case.op == "bn" and "inplace" not in case.name:
        attempt("input, before the backward", between)
    assert not problems, "; ".join(problems)


# Precision, memory and time.


def _float32(case):
    return not case.low_precision and case.name not in ("fold", "convert", "momentum=None")


@system("autocast, GradScaler", _float32)
def autocast(case):
    """bfloat16 in the forward, the scaled gradient through the backward; loose, as the arithmetic is of 16 bits."""
    call = Call(case, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = call.run()
        total = scalar(outputs).float()
    scaler.scale(total).backward()
    tolerance = 0.1 if case.op == "lce" else 1e-5
    check(case, outputs, tuple(t.grad / 1024.0 for t in call.diff), call.tensors, tolerance=tolerance)


def _through_mm(call):
    """The call's function after a matrix product with the unit matrix, so that a policy has an mm to decide on."""

    def run(x, *rest):
        unit = torch.eye(x.size(-1), dtype=x.dtype)
        product = torch.mm(x.reshape(-1, x.size(-1)), unit).reshape(x.shape)
        return call.function(product, *rest)

    return run


def _checkpointed(case, use_reentrant, context=None):
    call = Call(case)
    more = {} if context is None else {"context_fn": context}
    total = checkpoint(_through_mm(call), *call.diff, use_reentrant=use_reentrant, **more)
    close(total, answer(case).scalar, "value", c.tolerance_of(case))
    total.backward()
    check(case, None, tuple(t.grad for t in call.diff), call.tensors)


@system("checkpoint, not reentrant")
def checkpoint_(case):
    _checkpointed(case, False)


@system("checkpoint, reentrant")
def checkpoint_reentrant(case):
    _checkpointed(case, True)


def _policy(mm, others):
    def decide(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return mm if getattr(op, "overloadpacket", op) in products else others

    return lambda: create_selective_checkpoint_contexts(decide)


@system("selective checkpoint, mm kept")
def selective_keep(case):
    _checkpointed(case, False, _policy(CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE))


@system("selective checkpoint, mm recomputed")
def selective_recompute(case):
    _checkpointed(case, False, _policy(CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_SAVE))


@system("selective checkpoint, all kept")
def selective_all(case):
    _checkpointed(case, False, _policy(CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_SAVE))


@system("saved-tensor hooks")
def saved_tensor_hooks(case):
    """Packed into bytes and rebuilt, and moved as save_on_cpu does."""
    call = Call(case)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pickle.dumps(t.detach()), pickle.loads):
        outputs = call.run()
    check(case, outputs, torch.autograd.grad(scalar(outputs), call.diff), call.tensors)
    call = Call(case)
    with torch.autograd.graph.save_on_cpu():
        outputs = call.run()
    check(case, outputs, torch.autograd.grad(scalar(outputs), call.diff), call.tensors)


# Copies, processes, threads.


class Holder(nn.Module):
    """A model that ends in the case: one trainable factor before it, its parameters and statistics as its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        t = case.tensors()
        self.gain = nn.Parameter(torch.ones((), dtype=t[case.diff[0]].dtype))
        self.args = [n for n in case.names[1:] if n not in case.unbatched or n in ("class_mask", "normalizer")]
        self.args = [n for n in self.args if n not in case.mutable]
        self.state = [n for n in case.names[1:] if n not in self.args]
        self.inner = None
        if case.module is not None:
            self.inner = case.module()
            self.inner.load_state_dict({n: t[n] for n in self.state}, strict=False)
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
        return case.ours(**{case.diff[0]: x}, **dict(zip(self.args, args)), **held, **case.options)

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
        close(named["gain"].grad, terms.sum(), "gradient of a parameter before the op", c.tolerance_of(case), size)
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


@system("deepcopy, state_dict")
def deepcopy(case):
    made = case.module() if case.module else None
    if made is not None:
        twin = copy.deepcopy(made)
        twin.load_state_dict(made.state_dict())
    if same_batch(case):
        model = Holder(case)
        twin = copy.deepcopy(model)
        twin.check(twin, c.BATCH)


@system("pickle", lambda case: case.module is not None and case.name != "fold")
def pickled(case):
    again = pickle.loads(pickle.dumps(case.module()))
    buffer = io.BytesIO()
    torch.save(again, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    if case.name == "convert":
        check(case, again(case.tensors()["input"]))
        return
    model = Holder(case)
    model.inner = again
    again.load_state_dict({n: case.tensors()[n] for n in model.state}, strict=False)
    model.check(model, c.BATCH)


def _in_process(name, queue):
    from .cases import BY_NAME

    try:
        torch.set_num_threads(1)
        Call(BY_NAME[name]).run_and_check()
        queue.put("")
    except BaseException:
        queue.put(traceback.format_exc())


@system("multiprocessing, spawn", lambda case: repr(case) in ("ce-mean", "lce-chunks", "bn-training, statistics"))
def spawn(case):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_process, args=(repr(case), queue))
    process.start()
    message = queue.get(timeout=120)
    process.join()
    assert not message, message


@system("threads, as DataParallel")
def threads(case):
    """Four replicas on threads of their own, forward and backward."""
    problems = []

    def work(seed):
        try:
            call = Call(case, seed=seed)
            call.run_and_check(expected=answer(case, seed=seed))
        except BaseException as error:
            problems.append(error)

    for seed in range(4):
        answer(case, seed=seed)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if problems:
        raise problems[0]


# Tracers without a compiler.


def _scriptable(case):
    if case.module is not None:
        return case.module()
    import fused_ops

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
        t = dict(zip(case.names, values))
        diff = [t[n].detach().requires_grad_() for n in case.diff]
        outputs = c.outputs_of(case.ours(**{**t, **dict(zip(case.diff, diff))}, **case.options))
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


@system("make_fx, symbolic, another size", lambda case: "inplace" not in case.traits and same_batch(case))
def make_fx_symbolic(case):
    graph = make_fx(_value_and_grads(case), tracing_mode="symbolic")(*case.tensors().values())
    _checked_graph(case, graph, OTHER_BATCH)


__all__ = ["SYSTEMS", "Holder", "System", "holder", "in_child", "system", "tree_leaves", "tree_map"]

"""Checks and times the providers of a case. Knows no op: a case brings its inputs, providers and byte counts."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from .machine import isa

TRUTH, COPY, COMPILE, OURS = "eager", "copy", "torch.compile", "fused_ops"
HEAVY_S = 0.5  # a run that takes longer is its own block, with no warm-up before each
LIMIT_S = 30.0  # for all the rounds of one provider whose runs are heavy: one that is far slower takes part in fewer
LOOSE = 16  # a rival may be this many times further from the truth than eager, or off by sqrt(eps), and still be timed


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case, by the argument names of its functions."""

    tensors: Mapping[str, Tensor]
    leaves: tuple[str, ...]  # those that are differentiated
    fresh: tuple[str, ...] = ()  # those written anew, untimed, before every run, as the layer before would
    upstream: Tensor | None = None  # gradient of the output; None for a scalar loss
    shared: bool = False  # large, and changed by nobody: all providers take the same memory


class Runner(Protocol):
    """One provider at work on one case."""

    def prepare(self, direction: str) -> None:
        """What must precede a run and is not timed."""

    def run(self, direction: str) -> None:
        """What is timed; frees what it allocated."""

    def results(self) -> dict[str, Tensor]:
        """Output and gradients by name, of one forward and backward run."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case, or the reason why there is none."""

    name: str
    function: Callable[..., Tensor] | None = None
    make: Callable[[Case, Inputs, int], Runner] | None = None  # instead of `function`, for what is not autograd
    missing: str = ""  # why it does not run here
    compiled: bool = False
    strict: bool = False  # held to the error rule (ours)
    directions: tuple[str, ...] = ("forward", "backward", "both", "step")


@dataclass(frozen=True)
class Case:
    """One row of a table: a call of an op at one shape, dtype, layout and set of options."""

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[str], Inputs]  # device -> tensors, the same ones each time
    providers: tuple[Provider, ...]
    moved_bytes: Mapping[str, int]  # direction -> bytes that must move
    formula: str  # how moved_bytes counts
    pieces: Callable[[int, str], Inputs] | None = None  # (how many, device) -> that many pieces that stay in the cache
    layout: str = "contiguous"
    directions: tuple[str, ...] = ("both",)
    part: str = "micro"  # micro, sweep, overhead, training or pages
    tiny: bool = False  # microseconds: judged with one thread, as waking a second one would be most of the time
    sweep: str = ""  # what a sweep varies
    size: int = 0  # its value
    quick: bool = False
    rounds: tuple[int, int] | None = None  # fewest and most; None: as the suite says
    memory: tuple[str, ...] = ()  # suites in which its peak memory is measured

    @property
    def copied(self) -> int:
        """Elements of the largest input, which the copy yardstick copies."""
        count = 1
        for n in self.shape:
            count *= n
        return count


BITS = {"AVX2": 256, "AVX512": 512}  # of a vector register, by instruction set


class Clock:
    """perf_counter less what was spent between pause() and resume()."""

    def __init__(self, device: str = "cpu") -> None:
        self._paused = self._since = 0.0
        self._synchronize = torch.cuda.synchronize if device == "cuda" else None

    def __call__(self) -> float:
        if self._synchronize:
            self._synchronize()
        return time.perf_counter() - self._paused

    def pause(self) -> None:
        if self._synchronize:
            self._synchronize()
        self._since = time.perf_counter()

    def resume(self) -> None:
        if self._synchronize:
            self._synchronize()
        self._paused += time.perf_counter() - self._since


class AutogradRunner:
    """Runs a differentiable function as one training step would: fresh inputs, fresh gradients, nothing kept."""

    def __init__(self, function: Callable[..., Tensor], inputs: Inputs) -> None:
        self._function = function
        self._tensors = {name: t if inputs.shared else t.clone() for name, t in inputs.tensors.items()}
        self._base = {name: inputs.tensors[name] for name in inputs.fresh}
        self._leaves, self._upstream = inputs.leaves, inputs.upstream
        self._arguments: dict[str, Tensor] = {}
        self._output: Tensor | None = None
        self._grads: Sequence[Tensor] = ()

    def prepare(self, direction: str) -> None:
        for name, base in self._base.items():
            self._tensors[name].copy_(base)
        self._arguments = {
            name: t.detach().requires_grad_() if name in self._leaves else t for name, t in self._tensors.items()
        }
        if direction == "backward":
            self._output = self._function(**self._arguments)

    def run(self, direction: str) -> None:
        if direction != "backward":
            self._output = self._function(**self._arguments)
        if direction != "forward":
            self._backward()
        self._output, self._grads = None, ()

    def _backward(self) -> None:
        leaves = [self._arguments[name] for name in self._leaves]
        self._grads = torch.autograd.grad(self._output, leaves, self._upstream)

    def results(self) -> dict[str, Tensor]:
        self.prepare("both")
        self._output = self._function(**self._arguments)
        output = self._output.detach().clone()
        if not self._leaves:
            self._output = None
            return {"output": output}
        self._backward()
        grads = {f"grad_{name}": g.clone() for name, g in zip(self._leaves, self._grads, strict=True)}
        self._output, self._grads = None, ()
        return {"output": output, **grads}


class CopyRunner:
    """The yardstick: the case's largest input, copied into memory that is already mapped."""

    def __init__(self, case: Case, device: str) -> None:
        self._base = torch.ones(case.copied, dtype=case.dtype, device=device)
        self._source, self._target = torch.empty_like(self._base), torch.empty_like(self._base)
        self.moved_bytes = 2 * self._base.numel() * self._base.element_size()

    def prepare(self, direction: str) -> None:
        self._source.copy_(self._base)

    def run(self, direction: str) -> None:
        self._target.copy_(self._source)

    def results(self) -> dict[str, Tensor]:
        return {}


@dataclass
class Check:
    """How far a provider is from the float64 truth."""

    ok: bool
    note: str
    relative_error: float = float("nan")


@dataclass
class Timing:
    """Interleaved samples of one provider in one direction, in ms, in the order of the rounds."""

    samples_ms: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples_ms)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


def make_runner(case: Case, provider: Provider, inputs: Inputs, threads: int) -> Runner:
    """The provider at work; a compiled one is compiled afresh, for this shape and this number of threads."""
    if provider.make is not None:
        return provider.make(case, inputs, threads)
    if provider.function is None:
        raise ValueError(f"{case.op} {case.name}: {provider.name} is not offered: {provider.missing}")
    function = provider.function
    if provider.compiled:
        import torch._inductor.config as inductor

        inductor.cpp.threads = threads  # it is compiled in; left alone, a cached kernel keeps another count
        inductor.cpp.simdlen = BITS.get(isa())  # by itself it takes the processor's best, whatever the rest uses
        function = torch.compile(function, dynamic=False, fullgraph=True)
    return AutogradRunner(function, inputs)


def in_float64(inputs: Inputs) -> Inputs:
    """The same inputs, exactly, as float64."""

    def widen(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    tensors = {name: widen(t) for name, t in inputs.tensors.items()}
    upstream = None if inputs.upstream is None else widen(inputs.upstream)
    return Inputs(tensors, inputs.leaves, inputs.fresh, upstream, inputs.shared)


def no_worse(ours: Tensor, eager: Tensor, truth: Tensor) -> bool:
    """The error rule: no element further from the truth than eager's worst, plus one rounding."""
    if ours.dtype == torch.float64:  # the truth is only as good as float64 arithmetic
        allowed = torch.finfo(torch.float64).eps * max(truth.numel(), 100) * truth.abs().max()
        return bool(((ours - truth).abs() <= allowed).all())
    allowed = (eager.double() - truth).abs().max() + torch.finfo(ours.dtype).eps * truth.abs()
    return bool(((ours.double() - truth).abs() <= allowed).all())


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||; the norm of the value where the truth is zero."""
    norm = float(truth.norm())
    return float((value.double() - truth).norm()) / (norm if norm else 1.0)


def check(
    strict: bool, dtype: torch.dtype, found: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> Check:
    """Ours by the error rule; a rival only has to be roughly right to be worth timing."""
    worst, wrong = 0.0, []
    for name, exact in truth.items():
        if name not in found:
            continue
        error = relative_error(found[name], exact)
        worst = max(worst, error)
        if strict:
            right = found[name].dtype == eager[name].dtype and no_worse(found[name], eager[name], exact)
        else:
            right = error <= max(LOOSE * relative_error(eager[name], exact), torch.finfo(dtype).eps ** 0.5)
        if not right:
            wrong.append(f"{name} is off by {error:.1e}")
    kind = "breaks the error rule" if strict else "wrong"
    return Check(not wrong, f"{kind}: {', '.join(wrong)}" if wrong else "", worst)


def verify(case: Case, runners: Mapping[str, Runner], inputs: Inputs, threads: int) -> dict[str, Check]:
    """Checks every runner against eager in float64; eager itself must be among the case's providers."""
    by_name = {p.name: p for p in case.providers}
    truth = make_runner(case, by_name[TRUTH], in_float64(inputs), threads).results()
    eager = make_runner(case, by_name[TRUTH], inputs, threads).results()
    found = {}
    for name, runner in runners.items():
        try:
            found[name] = check(by_name[name].strict, case.dtype, runner.results(), eager, truth)
        except Exception as error:  # one provider that fails must not hide the others; its row says what happened
            found[name] = Check(False, failure(error))
    return found


def failure(error: Exception) -> str:
    """What a row says of a provider that raised."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def time_interleaved(
    runners: Mapping[str, Runner],
    direction: str,
    *,
    threads: int,
    device: str = "cpu",
    budget_s: float = 2.0,
    block_s: float = 0.02,
    rounds: tuple[int, int] = (5, 25),
) -> dict[str, Timing]:
    """Times the runners in turn, one block of runs each per round, so that a drift of the machine meets them all.

    A run of more than HEAVY_S is timed alone, and no more often than LIMIT_S allows.

    Args:
        runners: By provider name.
        direction: What to run.
        threads: Set for the time of the measurement.
        device: Where the runners run.
        budget_s: Aim for all rounds together, preparations included.
        block_s: A block repeats its run until it takes about this long.
        rounds: Fewest and most rounds, whatever the budget.

    Returns:
        One sample (ms per run) per round and runner; sample i of all runners is of the same round.
    """
    clock = Clock(device)
    timers, steps = {}, {}
    for name, runner in runners.items():

        def step(runner: Runner = runner) -> None:
            clock.pause()
            runner.prepare(direction)
            clock.resume()
            runner.run(direction)

        steps[name] = step
        timers[name] = Timer("step()", globals={"step": step}, timer=clock, num_threads=threads)
    timings = {name: Timing() for name in runners}
    repeats, limit, cost = {}, {}, 0.0  # repeats 0: heavy
    for name, timer in timers.items():  # warm-up and first estimate
        estimate = _once(steps[name], clock)
        if estimate >= HEAVY_S:
            repeats[name], limit[name] = 0, max(1, int(LIMIT_S / estimate))
            timings[name].samples_ms.append(estimate * 1e3)  # the first round: the check before has warmed up
            cost += estimate
            continue
        start = time.perf_counter()
        estimate = max(timer.timeit(1).median, 1e-6)
        wall = (time.perf_counter() - start) / 3  # timeit(1) is two warm-ups and one run
        repeats[name] = max(1, min(math.ceil(block_s / estimate), 2000))
        cost += wall * (repeats[name] + 2)
    count = max(rounds[0], min(rounds[1], int(budget_s / max(cost, 1e-9))))
    names = list(runners)
    for i in range(count):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if len(timings[name].samples_ms) >= limit.get(name, count) or (i == 0 and not repeats[name]):
                continue
            each = timers[name].timeit(repeats[name]).median if repeats[name] else _once(steps[name], clock)
            timings[name].samples_ms.append(each * 1e3)
    return timings


def _once(step: Callable[[], None], clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


def collect() -> None:
    """Frees what the last case left behind, compiled code included."""
    torch._dynamo.reset()
    gc.collect()


def moved(case: Case, direction: str, runner: Runner) -> int | None:
    """Bytes that must move, by the case's formula (the copy knows its own)."""
    own: Any = getattr(runner, "moved_bytes", None)
    return own if own is not None else case.moved_bytes.get(direction)

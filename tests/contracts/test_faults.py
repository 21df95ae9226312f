"""Things that go wrong around a call: nothing is corrupted and nothing hangs. Most run in a process of their own."""

import itertools
import sys
import sysconfig
import threading
import time

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import fused_ops
from fused_ops.ops.linear_cross_entropy import by_rows as linear_chunks

linux = pytest.mark.skipif(sys.platform != "linux", reason="resource limits and fork as on Linux")

CALLS = """
import sys, torch, fused_ops

def calls(rows=64, threads=1):
    '''Every op, forward and backward: name to results.'''
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g).requires_grad_()
    logits, hidden, head, image = r(rows, 1000), r(rows, 32), r(1000, 32), r(rows, 8, 9, 11)
    target = torch.randint(0, 1000, (rows,), generator=g)
    weight = torch.rand(8, generator=g).requires_grad_()
    def ce(): return fused_ops.cross_entropy(logits, target), (logits,)
    def ce_options(): return fused_ops.cross_entropy(logits, target, label_smoothing=.1, z_loss=.1), (logits,)
    def lce(): return fused_ops.linear_cross_entropy(hidden, head, target, chunk_rows=7), (hidden, head)
    def lce_none():
        rows = fused_ops.linear_cross_entropy(hidden, head, target, chunk_rows=7, reduction="none")
        return rows.sum(), (hidden, head)
    def bn(): return fused_ops.batch_norm(image, None, None, weight, training=True).square().sum(), (image, weight)
    def bn_act():
        y = fused_ops.batch_norm(image, None, None, weight, training=True, activation="relu", residual=image)
        return y.square().sum(), (image, weight)
    found = {}
    for f in (ce, ce_options, lce, lce_none, bn, bn_act):
        loss, leaves = f()
        found[f.__name__] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return found

def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(a[name], b[name]):
            assert torch.equal(x, y), name
"""


@linux
def test_an_allocation_that_fails_in_the_middle(run_python):
    """Under an address-space limit that grows step by step, each op fails at each of its allocations in turn."""
    code = (
        CALLS
        + """
import resource
torch.set_num_threads(1)
expected = calls()
big = dict(rows=2000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
failed = succeeded = 0
for step in range(60):
    resource.setrlimit(resource.RLIMIT_AS, (used + (step * 2 + 1) * 2**20, hard))
    try:
        calls(**big)
        succeeded += 1
    except (RuntimeError, MemoryError) as error:
        # what the stable ABI leaves of an allocator's error in an op of ours
        said = "memory" in str(error) or "aoti_torch_empty" in str(error)
        assert said or isinstance(error, MemoryError), error
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if succeeded > 2:
        break
same(calls(), expected)
print(failed, succeeded)
"""
    )
    failed, _ = run_python("-c", code, timeout=200).stdout.split()
    assert int(failed) >= 10


def test_a_keyboard_interrupt_in_the_middle(run_python):
    """Signals that arrive anywhere in a loop of calls: KeyboardInterrupt, and the next call is right."""
    code = (
        CALLS
        + """
import os, random, signal, threading, time
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
expected = calls()
rng = random.Random(0)
hit = 0
for trial in range(40):
    timer = threading.Timer(rng.random() * 0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        for _ in range(1000):
            calls()
    except KeyboardInterrupt:
        hit += 1
    timer.join()
    if trial % 5 == 4:
        same(calls(), expected)
print(hit)
"""
    )
    assert int(run_python("-c", code, timeout=200).stdout) == 40


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_keyboard_interrupt_between_two_chunks_of_linear_cross_entropy(reduction, monkeypatch):
    """In whichever chunk it comes, forward or backward: no gradient is left, and the next call is right."""
    x, w = torch.randn(40, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = torch.randint(0, 30, (40,))
    kept = [t.detach().clone() for t in (x, w, target)]

    def step():
        for t in (x, w):
            t.grad = None
        loss = fused_ops.linear_cross_entropy(x, w, target, chunk_rows=6, z_loss=0.1, reduction=reduction)
        loss.sum().backward()
        return loss.detach(), x.grad, w.grad

    expected, chunk_op, chunks = step(), linear_chunks._chunk_op, itertools.count()

    def interrupted(*args):
        if next(chunks) == stop:
            raise KeyboardInterrupt
        return chunk_op(*args)

    monkeypatch.setattr(linear_chunks, "_chunk_op", interrupted)
    hit = 0
    for stop in range(50):
        chunks = itertools.count()
        try:
            step()
        except KeyboardInterrupt:
            hit += 1
            assert x.grad is None and w.grad is None
        else:
            break
        stop = -1
        for found, right in zip(step(), expected, strict=True):
            assert torch.equal(found, right)
    assert hit >= 7  # 40 rows in chunks of 6
    assert all(torch.equal(t, k) for t, k in zip((x, w, target), kept, strict=True))


def test_exceptions_in_hooks_of_tensors_and_nodes():
    """Behind, between and before our backwards: the graph can be used again, and gives what it would have given."""
    x, image = torch.randn(6, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    head, target = torch.randn(5, 5, requires_grad=True), torch.randint(0, 5, (6,))

    def fail(*_):
        raise ZeroDivisionError("from the hook")

    for where in ("input", "output", "node"):
        hidden, picture = x * 1, image * 1
        y = fused_ops.batch_norm(picture, None, None, training=True, activation="silu")
        losses = [
            fused_ops.cross_entropy(hidden, target),
            fused_ops.linear_cross_entropy(hidden, head, target, chunk_rows=2, reduction="none").sum(),
            y.square().sum(),
        ]
        for loss, watched in zip(losses, (hidden, hidden, picture), strict=True):
            leaves = (image,) if loss is losses[2] else (x,)
            expected = torch.autograd.grad(loss, leaves, retain_graph=True)
            place = {"input": watched, "output": loss, "node": loss.grad_fn}[where]
            hook = place.register_hook(fail)
            with pytest.raises(ZeroDivisionError):
                torch.autograd.grad(loss, leaves, retain_graph=True)
            hook.remove()
            assert torch.equal(torch.autograd.grad(loss, leaves, retain_graph=True)[0], expected[0])


@pytest.mark.parametrize("where", ["pack", "unpack"])
def test_exceptions_in_saved_tensor_hooks(where):
    x, image = torch.randn(6, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    head, target = torch.randn(5, 5, requires_grad=True), torch.randint(0, 5, (6,))
    functions = {
        "cross_entropy": lambda: fused_ops.cross_entropy(x, target),
        "options": lambda: fused_ops.cross_entropy(x, target, label_smoothing=0.1),
        "linear": lambda: fused_ops.linear_cross_entropy(x, head, target, chunk_rows=2),
        "linear rows": lambda: fused_ops.linear_cross_entropy(x, head, target, chunk_rows=2, reduction="none").sum(),
        "batch_norm": lambda: fused_ops.batch_norm(image, None, None, training=True).square().sum(),
        "activation": lambda: fused_ops.batch_norm(image, None, None, training=True, activation="silu").sum(),
    }
    leaves = (x, image, head)
    for name, function in functions.items():
        expected = torch.autograd.grad(function(), leaves, allow_unused=True)
        for fail_at in range(5):
            count = itertools.count()

            def fail(t, count=count, fail_at=fail_at):
                if next(count) == fail_at:
                    raise ZeroDivisionError("from the hook")
                return t

            hooks = (fail, lambda t: t) if where == "pack" else (lambda t: t, fail)
            try:
                with saved_tensors_hooks(*hooks):
                    loss = function()
                    torch.autograd.grad(loss, leaves, allow_unused=True)
            except ZeroDivisionError:
                pass
            else:
                assert next(count) <= fail_at, name
            for a, b in zip(torch.autograd.grad(function(), leaves, allow_unused=True), expected, strict=True):
                assert (a is None and b is None) or torch.equal(a, b), name


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_fork_after_use(threads, run_python):
    """A child of a process whose OpenMP threads exist: with one thread of its own, as DataLoader sets, it is right.

    With several, GNU OpenMP's threads are not there after a fork, for PyTorch's own operators neither.
    """
    code = (
        CALLS
        + f"""
import os
torch.set_num_threads(1)
expected = calls()  # of one thread: PyTorch's sums and products depend on their number
torch.set_num_threads({threads})
before = calls()
for _ in range(3):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            same(calls(), expected)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    same(calls(), before)
"""
    )
    run_python("-c", code, timeout=120, OMP_NUM_THREADS=str(threads))


@linux
def test_dataloader_workers(run_python):
    code = (
        CALLS
        + """
class Data(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return calls()["bn"][0]

if __name__ == "__main__":
    torch.set_num_threads(1)
    expected = calls()["bn"][0]
    torch.set_num_threads(2)
    calls()
    for batch in torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2, multiprocessing_context="fork"):
        assert all(torch.equal(b, expected) for b in batch)
    same(calls(), calls())
"""
    )
    run_python("-c", code, timeout=120, OMP_NUM_THREADS="2")


def test_many_python_threads(run_python):
    """Eight threads with ops of their own, with gradients in other threads than their forwards."""
    code = (
        CALLS
        + """
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(2)
expected = calls()
with ThreadPoolExecutor(8) as pool:
    for found in pool.map(lambda _: calls(), range(40)):
        same(found, expected)
    x = torch.randn(200, 50, requires_grad=True)
    target = torch.randint(0, 50, (200,))
    losses = [fused_ops.cross_entropy(x, target) for _ in range(20)]
    grads = list(pool.map(lambda loss: torch.autograd.grad(loss, x)[0], losses))
    assert all(torch.equal(g, grads[0]) for g in grads)
"""
    )
    run_python("-c", code, timeout=120, OMP_NUM_THREADS="2")


def test_nested_parallelism():
    """Called from inside a parallel region of PyTorch (a backward on several threads, torch.jit's fork and so on)."""
    torch.set_num_threads(2)
    x, target = torch.randn(300, 64, requires_grad=True), torch.randint(0, 64, (300,))
    expected = torch.autograd.grad(fused_ops.cross_entropy(x, target), x)[0]

    def hooked(grad):  # runs an op of ours in the middle of the backward of another
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            assert torch.equal(torch.autograd.grad(fused_ops.cross_entropy(leaf, target), leaf)[0], expected)
        return grad

    y = x * 1
    y.register_hook(hooked)
    assert torch.equal(torch.autograd.grad(fused_ops.cross_entropy(y, target), x)[0], expected)
    futures = [torch.jit.fork(fused_ops.cross_entropy, x, target) for _ in range(4)]
    assert len({torch.jit.wait(f).item() for f in futures}) == 1


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3)])
def test_other_threads_in_the_backward(before, after):
    x, target = torch.randn(700, 333, requires_grad=True), torch.randint(0, 333, (700,))
    image = torch.randn(8, 6, 40, 40, requires_grad=True)

    def run(first, second):
        torch.set_num_threads(first)
        loss = (
            fused_ops.cross_entropy(x, target)
            + fused_ops.batch_norm(image, None, None, training=True, activation="relu", residual=image.detach())
            .square()
            .sum()
        )
        torch.set_num_threads(second)
        return torch.autograd.grad(loss, (x, image))

    for a, b in zip(run(before, after), run(1, 1), strict=True):
        assert torch.equal(a, b)


def test_a_python_callback_while_others_wait():
    """Threads that call, interrupt nothing and hold no lock: a thread that only does Python keeps going."""
    x, target = torch.randn(2000, 500), torch.randint(0, 500, (2000,))
    ticks, done, until = [0], threading.Event(), time.monotonic() + 20

    def tick():
        while not done.is_set():
            ticks[0] += 1
            done.wait(1e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        while ticks[0] < 5 and time.monotonic() < until:  # a busy machine may take its time
            fused_ops.cross_entropy(x, target)
    finally:
        done.set()
        thread.join(20)
    assert not thread.is_alive() and ticks[0] >= 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_the_threads_of_another_pool():
    """Raw ops, which use PyTorch's threads within, called at once from the threads that its interpreter forks onto."""
    torch.set_num_threads(2)
    x, target = torch.randn(300, 64), torch.randint(0, 64, (300,))

    @torch.jit.script
    def at_once(x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        waiting = [torch.jit.fork(torch.ops.fused_ops.cross_entropy_forward, x, target, -100, 0) for _ in range(8)]
        return [torch.jit.wait(f)[0] for f in waiting]

    expected = fused_ops.cross_entropy(x, target, reduction="none")
    assert all(torch.equal(found, expected) for found in at_once(x, target))


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_without_a_gil():
    assert not sys._is_gil_enabled()
    workers = [threading.Thread(target=test_other_threads_in_the_backward, args=(1, 1)) for _ in range(8)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(60)
        assert not thread.is_alive()

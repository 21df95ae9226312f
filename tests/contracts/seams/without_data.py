"""Tensors without data: fake, meta, on another device, or with their storage freed."""

import os
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import check as c
from .check import Call, scalar
from .registry import system


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
                message = f"{type(error).__name__}: {error}".encode()
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


def _reads_first(case):
    """Whether this package reads first: not a product before inplace_backward, not the layer before a norm."""
    return case.name not in ("fold", "convert", "inplace_backward")


@system("freed storage", _reads_first, costly=True)
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

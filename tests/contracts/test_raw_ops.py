"""Raw ops called directly with garbage: every call gives the reference's result or a Python exception.

No argument changes. What the reference makes of the same arguments is compared where it is well defined: for forwards,
and for backwards whose saved tensors still belong to their inputs; numbers finite and of moderate size.

Valid calls are recorded from the samples of every op; each trial spoils up to three arguments of one of them.
``FUSED_OPS_FUZZ_CALLS`` sets the number of trials, ``FUSED_OPS_FUZZ_SEED`` the seed; ``make sanitize`` runs this under
the sanitizers.
"""

import importlib
import itertools
import os
import random

import pytest
import torch

import fused_ops
from fused_ops.core.sample import Sample
from fused_ops.ops.batch_norm import arguments, ranks_reference
from fused_ops.testing import _RecordRawOps, op_names, samples_of

CALLS = int(os.environ.get("FUSED_OPS_FUZZ_CALLS", "4000"))
COMPARED = 0.5  # of the calls that can be
SEED = int(os.environ.get("FUSED_OPS_FUZZ_SEED", "0"))
# AttributeError: None for a tensor without a default goes to the reference, which has nothing to read a shape from.
CLEAN = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, AttributeError)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
ODD_DTYPES = [torch.int8, torch.int16, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn]
INTEGERS = [-1, 0, 1, 2, 3, 7, 64, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-320, 1e308]


class _RecordCopies(_RecordRawOps):
    """Keeps the arguments as they were, for the raw ops that write over one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_ops":
            args_before = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            self.calls.append((func, args_before, kwargs or {}))
        return self.run(func, args, kwargs or {})


def in_tiles():
    """Calls of linear_cross_entropy that take the ops for tiles, which know no float64."""
    for dtype in (torch.float32, torch.bfloat16):
        matrices = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((7, 3), (40, 3))]
        yield Sample("tiles", (*matrices, torch.randint(0, 40, (7,))), {"max_memory_bytes": 200})


# What the package asks before it chooses an op, and the answer: of plain eager calls, of all others, of graphs.
WAYS = {
    "eager": {"fused_ops.ops.cross_entropy.functions.dispatch_modes": False},
    "functional": {"fused_ops.ops.batch_norm.arguments.way_of": arguments.Way.FUNCTION},
    "graph": {"torch.compiler.is_compiling": True},
}
# Batch norm as on the one rank of a group, where a gather finds what the rank has sent.
OVER_RANKS = {
    "fused_ops.ops.batch_norm.api.several_ranks": lambda *_: True,
    "fused_ops.ops.batch_norm.arguments.name_of": lambda *_: "one",
    "fused_ops.ops.batch_norm.arguments.size_of": lambda *_: 1,
    "fused_ops.ops.batch_norm.ranks._gathered": lambda sent, _: sent.unsqueeze(0),
}


def over_ranks(sample):
    """The same call as one rank's part, where there is such a call."""
    training, options = sample.args[5], {"groups": 1, "inplace_activated": False, **sample.kwargs}
    if training and options["groups"] == 1 and not options["inplace_activated"]:
        yield Sample(sample.name, sample.args, {**sample.kwargs, "group": True})


def valid_calls(names):
    calls = []
    for name in names:
        extra = list(in_tiles()) * 4 if name == "linear_cross_entropy" else []
        ways = [{place: lambda *_, answer=a: answer for place, a in way.items()} for way in WAYS.values()]
        called = [*itertools.product((*samples_of(name), *extra), ways)]
        if name == "batch_norm":
            called += [(part, OVER_RANKS) for sample in samples_of(name) for part in over_ranks(sample)]
        for sample, way in called:
            with _RecordCopies() as recorder, pytest.MonkeyPatch.context() as patch:
                for place, function in way.items():
                    patch.setattr(place, function)
                outputs = getattr(fused_ops, name)(*sample.args, **sample.kwargs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                wanted = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
                if wanted:
                    torch.autograd.backward(wanted, [torch.ones_like(o) for o in wanted])
            # but for memory of any size that is asked for, which nobody should read
            calls += [c for c in recorder.calls if c[0]._schema.name != "fused_ops::linear_cross_entropy_buffer"]
    return calls


KEEP_VALUES = ("transposed", "every second", "offset by one")
REFERENCES = {
    f"{op}_{suffix}": getattr(importlib.import_module(f"fused_ops.ops.{module}"), suffix)
    for op, module in (
        ("cross_entropy", "cross_entropy.reference"),
        ("cross_entropy_rows", "cross_entropy.rows_reference"),
        ("batch_norm", "batch_norm.reference"),
        ("batch_norm", "batch_norm.backward_reference"),
        ("linear_cross_entropy", "linear_cross_entropy.reference"),
    )
    for suffix in (*("forward", "backward", "backward_", "chunk_", "small"),)
    if hasattr(importlib.import_module(f"fused_ops.ops.{module}"), suffix)
}
REFERENCES |= {f"batch_norm_plain_{d}": REFERENCES[f"batch_norm_{d}"] for d in ("forward", "backward")}
REFERENCES |= {
    f"batch_norm_{name}": getattr(ranks_reference, name) for name in ("moments", "normalise", "grad_sums", "gradient")
}


def moderate(t):
    return not isinstance(t, torch.Tensor) or not t.is_floating_point() or bool((t.double().abs() < 1e3).all())


def check_against_reference(function, given, used, result):
    """The result, and the arguments written to, are the reference's for the same arguments."""
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    strided = all(t.device.type == "cpu" and t.layout == torch.strided for t in tensors)
    reference = REFERENCES.get(function._schema.name.split("::")[1])
    if reference is None or not strided or not all(map(moderate, given)):
        return False
    try:
        expected = reference(*given)
    except CLEAN:
        return False  # the kernels know how to take some dtypes that plain PyTorch does not
    pairs = (
        [(result, expected)] if isinstance(result, torch.Tensor) else [*zip(result or (), expected or (), strict=True)]
    )
    pairs += [(a, b) for a, b in zip(used, given, strict=True) if isinstance(a, torch.Tensor)]
    floats = [t.dtype for t in tensors if t.is_floating_point()]
    tolerance = 3e-2 if any(d.itemsize == 2 for d in floats) else 1e-3 if torch.float32 in floats else 1e-6
    if "batch_norm" in function._schema.name and any(type(a) is int and a > 2 for a in given[8:11]):
        return False  # a correction beyond the number of values: a variance that is none
    for mine, other in pairs:
        mine = mine.reshape(other.shape)  # (1, channels) running statistics are taken for (channels,)
        if mine.dtype.is_floating_point and not other.isnan().any():
            largest = float(other.double().abs().max()) if other.numel() else 0.0
            if largest < 1e6:
                torch.testing.assert_close(
                    mine.double(), other.double(), rtol=tolerance, atol=tolerance * max(1.0, largest)
                )
    return True


def spoil_tensor(t, rng):
    """Another tensor, of the same kind but with one thing about it changed, and whether its values are the same."""
    dim = rng.randrange(t.dim()) if t.dim() else 0
    kinds = {
        "dtype": lambda: t.to(rng.choice(DTYPES)),
        "odd dtype": lambda: t.to(rng.choice(ODD_DTYPES)),
        "one dimension more": lambda: t.unsqueeze(dim),
        "flat": lambda: t.flatten(),
        "scalar": lambda: t.new_zeros(()),
        "shorter": lambda: t.narrow(dim, 0, rng.randrange(t.size(dim) + 1)),
        "longer": lambda: torch.cat([t, t], dim),
        "empty": lambda: t.new_empty([0] * max(1, t.dim())),
        "expanded": lambda: t.narrow(dim, 0, 1).expand_as(t),
        "transposed": lambda: t.transpose(0, -1).contiguous().transpose(0, -1),
        "every second": lambda: torch.stack([t, t], -1)[..., 0],
        "offset by one": lambda: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "overlapping": lambda: t.as_strided(t.shape, [1] * t.dim()),
        "other values": lambda: torch.full_like(t, rng.choice([-1, 0, 1, 5, 100])),
        "far integers": lambda: torch.full_like(t, rng.choice([2**31, -(2**31), 2**62, -(2**63), 2**63 - 1])),
        "huge": lambda: torch.full_like(t, rng.choice([1e30, -1e30, float("nan"), float("inf"), -float("inf")])),
        "negated view": lambda: torch._neg_view(t) if t.dtype in DTYPES[:4] else t,
        "sparse": lambda: t.to_sparse(),
        "no data": lambda: t.to("meta"),
        "one": lambda: t.flatten()[:1],
        "large": lambda: t.repeat([rng.choice([1, 1, 17, 65]) for _ in range(t.dim())]),
    }
    kind = rng.choice(list(kinds))
    try:
        return kinds[kind](), kind in KEEP_VALUES
    except (RuntimeError, IndexError, TypeError, ValueError, OverflowError):  # this tensor cannot be changed that way
        return t, True


def spoil(value, rng):
    """Another argument, and whether its values are the same."""
    if isinstance(value, torch.Tensor):
        return (rng.choice([None, rng.choice(INTEGERS)]), False) if rng.random() < 0.04 else spoil_tensor(value, rng)
    if isinstance(value, bool):
        return not value, False
    if isinstance(value, int):
        return rng.choice(INTEGERS), False
    if isinstance(value, float):
        return rng.choice(FLOATS), False
    if value is None:
        shape = [rng.choice([0, 1, 2, 3, 7]) for _ in range(rng.randrange(4))]
        return torch.randn(shape, dtype=rng.choice(DTYPES[:4])), False
    return value, True


def share_memory(args, rng):
    """Two of the arguments become one tensor, or two of one memory."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    if len(tensors) > 1:
        i, j = rng.sample(tensors, 2)
        args[i] = args[j] if rng.random() < 0.5 else args[j].detach()


def copied(value):
    """A copy with the strides of the original."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
        return value
    return value.clone(memory_format=torch.preserve_format)


def fingerprint(args):
    return [
        (t._version, t.detach().clone())
        for t in args
        if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided
    ]


def same(a, b):
    """Equal in version and in every value, a NaN being equal to a NaN."""
    return a[0] == b[0] and torch.equal(a[1].isnan(), b[1].isnan()) and bool(((a[1] == b[1]) | a[1].isnan()).all())


@pytest.mark.parametrize("op", op_names())
def test_garbage_is_a_result_or_an_exception(op):
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    calls = valid_calls([op])
    assert len(calls) >= 4
    right = wrong = compared = 0
    for _ in range(CALLS):
        function, args, kwargs = rng.choice(calls)
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        same_values = True
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            i = rng.randrange(len(args))
            args[i], kept = spoil(args[i], rng)
            same_values &= kept
        aliased = rng.random() < 0.05
        if aliased:
            share_memory(args, rng)
            same_values = False
        mutable = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        before = fingerprint(args)
        comparable = same_values or ("forward" in function._schema.name and not aliased)
        given = [copied(a) for a in args] if comparable and rng.random() < COMPARED else None
        try:
            result = function(*args, **kwargs)
        except CLEAN:
            wrong += 1
        else:
            right += 1
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            for output in outputs:
                if isinstance(output, torch.Tensor) and output.device.type == "cpu" and output.numel() < 1 << 24:
                    output.double().sum().item()  # reads every element
            if given is not None:
                compared += check_against_reference(function, given, args, result)
        if not mutable:
            assert all(same(a, b) for a, b in zip(before, fingerprint(args), strict=True)), (function, args)
    assert right > CALLS // 20 and wrong > CALLS // 20 and compared > CALLS // 100

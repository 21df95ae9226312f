"""Runs every kernel on tensors that end, or begin, at a page that must not be touched; see test_guard_pages.py.

Prints each case before it runs, so that after a crash the last line is the one.
"""

import ctypes
import itertools
import os
import sys

import torch

import fused_ops
from fused_ops.core.library import isa
from fused_ops.core.memory_format import empty_output
from fused_ops.ops.batch_norm import reference as bn

OFF, TAIL, HEAD = range(3)
try:
    GUARD = ctypes.CDLL(None).guard_mode
    GUARD.restype = ctypes.c_long
except AttributeError:  # not preloaded: AddressSanitizer has guards of its own

    def GUARD(mode):
        return None


OPS = torch.ops.fused_ops
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# below, at and above the vector widths, twice and four times them, the blocks of 256 and 1024
TAILS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 127, 129, 255, 257, 511, 1023, 1025]
SHORT = [1, 3, 7, 9, 15, 17, 31, 33, 65, 129]


def layouts(rows, classes):
    yield "rows", (rows, classes), lambda x: x
    yield "spatial", (2, classes, rows), lambda x: x
    yield "class stride", (rows, classes), lambda x: torch.stack([x, x], -1)[..., 0]
    yield "channels last", (1, classes, rows, 2), lambda x: x.contiguous(memory_format=torch.channels_last)


def cross_entropy(dtype):
    index_dtypes = itertools.cycle([torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8])
    for classes, rows in itertools.product(TAILS, (1, 5)):
        for name, shape, change in layouts(rows, classes):
            x = change(torch.randn(shape).to(dtype))
            target = torch.randint(0, min(classes, 100), (shape[0], *shape[2:])).to(next(index_dtypes))
            for reduction in (0, 1):
                _, lse, total = OPS.cross_entropy_forward(x, target, -100, reduction)
                upstream = torch.randn(target.shape if reduction == 0 else ()).to(dtype)
                rest = (target, lse, total, -100, reduction)
                yield f"cross_entropy {name} {classes}", OPS.cross_entropy_forward, (x, target, -100, reduction)
                yield f"cross_entropy_backward {name} {classes}", OPS.cross_entropy_backward, (upstream, x, *rest)
                yield f"cross_entropy_backward_ {name} {classes}", OPS.cross_entropy_backward_, (upstream, x, *rest)
            small = (x, target, -100, 2)
            yield f"cross_entropy_with_gradient {name} {classes}", OPS.cross_entropy_with_gradient, small


def cross_entropy_rows(dtype):
    for classes, statistics in itertools.product(TAILS, (False, True)):
        for (name, shape, change), kind in itertools.product(layouts(3, classes), ("index", "dense", "sparse")):
            x, rows = change(torch.randn(shape).to(dtype)), (shape[0], *shape[2:])
            k = min(2, classes)
            indices = torch.randint(0, classes, rows if kind == "index" else (rows[0], k, *rows[1:]))
            probabilities = (
                None if kind == "index" else torch.rand(indices.shape if kind == "sparse" else shape).to(dtype)
            )
            args = (x, None if kind == "dense" else indices, probabilities, torch.rand(classes).to(dtype))
            mask = torch.rand(classes if statistics else shape) > 0.1
            numbers = (-100, 0.1, 0.7, 5.0 if statistics else 0.0, statistics)
            found = OPS.cross_entropy_rows_forward(*args, mask, *numbers)
            g = [torch.randn(rows, dtype=torch.float64) for _ in range(3 if statistics else 2)]
            g += [None] * (4 - len(g))
            saved = (*g, *args, mask, found[1], found[2], found[4], *numbers)
            label = f"{name} {kind} {classes}"
            yield f"rows_forward {label}", OPS.cross_entropy_rows_forward, (*args, mask, *numbers)
            yield f"rows_backward {label}", OPS.cross_entropy_rows_backward, saved
            yield f"rows_backward_ {label}", OPS.cross_entropy_rows_backward_, saved
            scale = torch.rand(rows, dtype=torch.float64)
            chunk = (*args, mask, scale, 0.1, *numbers)
            yield f"linear chunk {label}", OPS.linear_cross_entropy_chunk_, chunk


def linear_tiles(dtype):
    if dtype == torch.float64:
        return
    for rows, classes in itertools.product(TAILS, (1, 33)):
        z, target = torch.randn(classes, rows).to(dtype), torch.randint(0, 2 * classes, (rows,))
        label, where = f"({classes}, {rows})", (target, classes // 2, 2 * classes)
        floats = [torch.rand(rows) for _ in range(3)]
        sums = (floats[0], torch.rand(rows, dtype=torch.float64), floats[2])
        yield f"tile sums {label}", OPS.linear_cross_entropy_tile_sums_, (z, *where, *sums)
        yield f"tile grads {label}", OPS.linear_cross_entropy_tile_grads_, (z, *where, *floats)
        if dtype != torch.float32:
            yield f"add {label}", OPS.linear_cross_entropy_add_, (torch.rand(classes, rows), z)


def linear_small(dtype):
    for classes, features in itertools.product(TAILS, (1, 33)):
        for rows, bias, needs in ((5, True, 7), (1, False, 3), (17, True, 4)):
            x, w = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
            target = torch.randint(0, classes, (rows,))
            args = (x, w, torch.randn(classes).to(dtype) if bias else None, target, 0, 1 + bias, needs)
            yield f"linear small ({rows}, {features}) x {classes}", OPS.linear_cross_entropy_small, args


def batch_norm_inputs(dtype):
    for channels, batch in itertools.product(TAILS[:-2], (2, 5)):
        yield f"({batch}, {channels})", torch.randn(batch, channels).to(dtype)
    for spatial, channels in itertools.product(TAILS, (1, 3)):
        yield f"(3, {channels}, {spatial})", torch.randn(3, channels, spatial).to(dtype)
    for channels, side in itertools.product(SHORT, (1, 3)):
        image = torch.randn(2, channels, side, 3).to(dtype)
        yield f"channels last {channels}, {side}", image.contiguous(memory_format=torch.channels_last)
        yield f"strided {channels}, {side}", torch.stack([image, image], -1)[..., 0]


def batch_norm(dtype):
    for i, (name, x) in enumerate(batch_norm_inputs(dtype)):
        channels, acc = x.size(1), bn.acc_dtype(dtype)
        weight, bias, mean, var = (torch.rand(channels).to(acc) + 0.5 for _ in range(4))
        residual = torch.randn_like(x)
        valid = torch.rand(x.size(0), *x.shape[2:]) > 0.2
        valid.view(-1)[:2] = True
        g = torch.randn_like(x)
        training = i % 3 != 0
        for code, with_residual, with_valid in (
            (0, False, False),
            (1, True, False),
            (i % 9, False, True),
            (i % 9, True, i % 2 == 0),
        ):
            r, v = residual if with_residual else None, valid if with_valid else None
            mask = torch.empty(bn.mask_bytes(x), dtype=torch.uint8) if bn.has_mask(r, v, code) else None
            slope = 0.1 if code != 1 else 0.0
            act = (x, mean, var, weight, bias, training, 0.1, 1e-5, 0, code, slope, r, mask, v)
            yield f"batch_norm_forward {name} {code}", OPS.batch_norm_forward, act
            statistics = OPS.batch_norm_forward(*act)[1]
            numbers = (training, True, True, 0, code, slope)
            rest = (
                None if mask is not None else r,
                mask,
                v,
                1,
                empty_output(x) if r is not None else None,
            )
            back = (g, x, weight, bias, statistics, *numbers, *rest)
            yield f"batch_norm_backward {name} {code}", OPS.batch_norm_backward, back


def copied(args, mode):
    """The arguments anew, in memory of that mode, strides kept."""
    GUARD(mode)
    new = []
    for a in args:
        if isinstance(a, torch.Tensor):
            extent = sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) + 1 if a.numel() else 0
            memory = torch.empty(extent, dtype=a.dtype)
            a = memory.as_strided(a.shape, a.stride()).copy_(a)
        new.append(a)
    return new


def outputs(function, args):
    result = function(*args)
    result = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in (*result, *args) if isinstance(t, torch.Tensor)]


def same(function, a, b):
    """To the last bit, but where there are matrix products, whose order is the address's."""
    a, b = a.nan_to_num(7.0), b.nan_to_num(7.0)
    if function is not OPS.linear_cross_entropy_small or not a.is_floating_point():
        return a.dtype == b.dtype and torch.equal(a, b)
    tolerance = 64 * torch.finfo(a.dtype).eps
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def main():
    assert "sanitize-" in fused_ops.__file__ or not os.environ.get("FUSED_OPS_SANITIZE"), fused_ops.__file__
    torch.set_num_threads(1)
    torch.manual_seed(0)
    calls = 0
    stride, start = (int(n) for n in os.environ.get("FUSED_OPS_GUARD_STRIDE", "1,0").split(","))
    kernels = (cross_entropy, cross_entropy_rows, linear_tiles, linear_small, batch_norm)
    every = itertools.chain.from_iterable(f(d) for f in kernels for d in DTYPES)
    for i, (name, function, args) in enumerate(every):
        if i % stride != start:
            continue
        os.write(2, f"{name} {args[1 if 'backward' in name else 0].dtype if args else ''}\n".encode())
        GUARD(OFF)
        expected = outputs(function, copied(args, OFF))
        for mode in (TAIL, HEAD):
            found = outputs(function, copied(args, mode))
            GUARD(OFF)
            for mine, other in zip(found, expected, strict=True):
                if not same(function, mine, other):
                    sys.exit(f"{name}, mode {mode}: other values than without the guard")
            del found
            calls += 1
    served = GUARD(OFF)
    assert served is None or served > 3 * calls, "torch does not allocate by posix_memalign"
    print(isa(), calls, served)


if __name__ == "__main__":
    main()

"""Builds the CUDA kernels for the CPU and calls them on CPU tensors: the real sources where there is no GPU.

``cuda_runtime.h`` beside this file is the emulation. Nothing here is part of the package.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fused_ops  # noqa: F401  (defines the ops)

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / "cuda_host"
SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of csrc/core/dtype.h
TARGET_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-attributes"]
FLAGS += ["-DFUSED_OPS_CUDA_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
WATCHED = ["-fsanitize=thread"]  # of files with kernels: calls races.cpp at every access to memory
OPS = {  # the raw ops with kernels
    "cross_entropy": [
        f"cross_entropy_{kind}{direction}"
        for kind in ("", "rows_")
        for direction in ("forward", "backward", "backward_")
    ]
    + ["cross_entropy_with_gradient", "cross_entropy_scale_gradient"],
    "linear_cross_entropy": [
        f"linear_cross_entropy_{part}_" for part in ("chunk", "rescale", "tile_sums", "tile_grads")
    ],
    "batch_norm": [
        *(f"batch_norm_{kind}{direction}" for kind in ("", "plain_") for direction in ("forward", "backward")),
        *(f"batch_norm_{part}" for part in ("moments", "normalise", "grad_sums", "gradient", "keep", "keep_backward")),
    ],
}
CANARIES = 64  # elements on both sides of what a kernel may write


def build():
    """The kernels and their bindings, compiled by the host compiler; returns the library, None without a compiler.

    The bindings become the ops ``torch.ops.fused_ops_host.*`` on CPU tensors. What is compiled stays in build/cuda_host
    until a source, the compiler or torch changes; one process compiles, whichever comes first.
    """
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return None
    sources = [*sorted(CSRC.glob("*/cuda/*.cu")), *sorted(HERE.glob("*.cpp")), *sorted(CSRC.glob("*/*_cuda.cpp"))]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    files = [p for folder in (CSRC, HERE) for p in sorted(folder.rglob("*")) if p.suffix in SUFFIXES]
    made_of = [version, torch.__version__, *FLAGS, *WATCHED, *(p.read_text() for p in files)]
    directory = BUILD / hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    objects, library = [directory / f"{i}.o" for i in range(len(sources))], directory / "cuda_host.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in filter(Path.is_dir, BUILD.iterdir()):
                shutil.rmtree(old)
            directory.mkdir()
            compile_all(compiler, sources, objects, library)
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    for name in ("ce_forward_scratch", "ce_backward_scratch", "ce_with_gradient", "bn_scratch", "cuda_host_launches"):
        getattr(loaded, name).restype = ctypes.c_int64
    kernels = [o for o, source in zip(objects, sources, strict=True) if not source.stem.endswith("_cuda")]
    register_shared(loaded, library, kernels)
    return loaded


def compile_all(compiler, sources, objects, library):
    """Compiles and links; the library is there when all of it is."""
    torch_home = Path(torch.__file__).parent

    def compile_one(source, output):
        includes = [f"-I{HERE}", f"-I{CSRC}", "-isystem", str(torch_home / "include")]
        kernels = source.suffix == ".cu" or source.stem == "self_test"
        flags = [*FLAGS, *(WATCHED if kernels else ["-O2"])]
        command = [*compiler, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{source.name} does not compile\n{result.stderr[:2000]}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    whole = library.with_suffix(".new")
    subprocess.run([*compiler, "-shared", *map(str, objects), *libraries, "-o", str(whole)], check=True)
    whole.rename(library)


def define_ops():
    """``torch.ops.fused_ops_host.*`` with the schemas of the package; the library that they live as long as."""
    library = torch.library.Library("fused_ops_host", "FRAGMENT")
    for name in [name for names in OPS.values() for name in names]:
        library.define(str(getattr(torch.ops.fused_ops, name).default._schema).split("::", 1)[1])
    return library


def symbols(path):
    """(name, address, size, kind) of each sized symbol; kernels' files may have one of the same name each."""
    listing = subprocess.run(["nm", "-S", str(path)], check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in listing.splitlines()]
    return [(f[3], int(f[0], 16), int(f[1], 16), f[2]) for f in lines if len(f) == 4]


def register_shared(loaded, library, objects):
    """Tells the emulation where the ``__shared__`` variables are: static variables inside functions, by their names."""
    names = {n for o in objects for n, _, _, kind in symbols(o) if n.startswith("_ZZ") and kind in "bBdDuVv"}
    places, known = symbols(library), "cuda_host_launches"
    base = ctypes.cast(getattr(loaded, known), ctypes.c_void_p).value
    base -= next(address for name, address, _, _ in places if name == known)
    for name, address, size, _ in places:
        if name in names:
            loaded.cuda_host_shared(ctypes.c_void_p(base + address), ctypes.c_int64(size))
    assert len(names) > 1


def pointer(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def numbers(values):
    return (ctypes.c_int64 * len(values))(*values)


def poisoned(count, dtype):
    """Memory that a kernel must write before it reads."""
    return torch.full((count,), float("nan"), dtype=dtype)


def extent_of(shape, strides):
    return 1 + sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))


class Guarded:
    """A strided tensor, ``offset`` elements behind an aligned address, with canaries around it."""

    def __init__(self, shape, strides, dtype, offset=0, device="cpu"):
        extent = extent_of(shape, strides)
        self.memory = torch.full((2 * CANARIES + offset + extent,), 7.0, dtype=dtype, device=device)
        self.tensor = self.memory.as_strided(shape, strides, CANARIES + offset)
        self.tensor.fill_(float("nan"))
        self.outside = torch.ones(self.memory.shape, dtype=torch.bool, device=device)
        self.outside.as_strided(shape, strides, CANARIES + offset).fill_(False)

    def check(self):
        assert bool((self.memory[self.outside] == 7.0).all()), "a kernel wrote outside its output"


def aligned(t, offset):
    """A copy of t with the same strides whose first element is ``offset`` elements behind a 64-byte boundary."""
    extent = extent_of(t.shape, t.stride())
    memory = torch.full((extent + offset + 2 * CANARIES,), 1e4, dtype=t.dtype)
    start = -(memory.data_ptr() // t.element_size()) % (64 // t.element_size()) + offset
    return memory.as_strided(t.shape, t.stride(), start).copy_(t)


class CrossEntropy:
    """The kernels of csrc/cross_entropy/cuda on CPU tensors."""

    def __init__(self, library, order=0):
        self.library, self.order, self.error = library, order, 0

    def layout(self, t):
        """As layout_of in csrc/cross_entropy/op.cpp."""
        if t.dim() == 1:
            return [1, 1, t.size(0), 0, 0, t.stride(0)]
        spatial = torch.Size(t.shape[2:]).numel()
        strides = [t.stride(0), t.stride(-1) if t.dim() > 2 else 0, t.stride(1)]
        if spatial == 1 and strides[0] == 1 and strides[2] != 1:
            return [1, t.size(0), t.size(1), 0, 1, strides[2]]
        return [t.size(0), spatial, t.size(1), *strides]

    def head(self, x, target, ignore_index, reduction):
        return numbers([DTYPES.index(x.dtype), TARGET_DTYPES.index(target.dtype), ignore_index, reduction])

    def finish(self, error):
        self.launches = self.library.cuda_host_launches()
        trapped = self.library.cuda_host_trapped()
        assert error == (710 if trapped else 0)
        self.error = error

    def forward(self, x, target, ignore_index=-100, reduction=1):
        self.library.cuda_host_set_order(self.order)
        layout = numbers(self.layout(x))
        dtype = DTYPES.index(x.dtype)
        scratch = poisoned(self.library.ce_forward_scratch(ctypes.c_int64(dtype), layout), torch.float64)
        shape = target.shape if reduction == 0 else ()
        loss, lse = poisoned(max(target.numel(), 1), x.dtype), poisoned(target.numel(), torch.float64)
        total = poisoned(1, torch.float64)
        head = self.head(x, target, ignore_index, reduction)
        args = (pointer(x), layout, *map(pointer, (target, lse, loss, total, scratch)))
        self.finish(self.library.ce_forward(head, *args))
        return loss[: torch.Size(shape).numel()].reshape(shape), lse.reshape(target.shape), total[0]

    def backward(self, grad_loss, x, target, lse, total, ignore_index=-100, reduction=1, grad=None):
        self.library.cuda_host_set_order(self.order)
        layout, grad_layout = numbers(self.layout(x)), numbers(self.layout(grad))
        dtype = DTYPES.index(x.dtype)
        scratch = poisoned(self.library.ce_backward_scratch(ctypes.c_int64(dtype), layout), torch.float64)
        head = self.head(x, target, ignore_index, reduction)
        args = (pointer(x), layout, *map(pointer, (target, lse, grad_loss.contiguous(), total, grad)), grad_layout)
        self.finish(self.library.ce_backward(head, *args, pointer(scratch)))
        return grad

    def with_gradient(self, x, target, ignore_index=-100, reduction=1, grad=None):
        """The loss; the gradient for an upstream gradient of 1 is written to ``grad``."""
        self.library.cuda_host_set_order(self.order)
        head, loss = self.head(x, target, ignore_index, reduction), poisoned(1, x.dtype)
        layout, grad_layout = numbers(self.layout(x)), numbers(self.layout(grad))
        args = (head, pointer(x), layout, pointer(target), pointer(loss), pointer(grad), grad_layout)
        scratch = poisoned(self.library.ce_with_gradient(*args, None, 1), torch.float64)
        self.finish(self.library.ce_with_gradient(*args, pointer(scratch), 0))
        return loss[0]


class BatchNorm:
    """The kernels of csrc/batch_norm/cuda on CPU tensors, dense or channels_last; if wanted, packed where they may."""

    def __init__(self, library, order=0, packed=False):
        self.library, self.order, self.packed = library, order, packed

    def head(self, x, parameters, training, correction, activation, writes_mask=False):
        self.library.cuda_host_set_order(self.order)
        spatial, last = torch.Size(x.shape[2:]).numel(), x.dim() > 2 and not x.is_contiguous()
        kinds = [DTYPES.index(next((p.dtype for p in parameters if p is not None), x.dtype))]
        counts = [x.size(0), x.size(1), spatial, last, DTYPES.index(x.dtype), *kinds, activation, training, correction]
        head = numbers([*(int(v) for v in counts), 0])
        head[9] = self.packed and self.library.bn_is_packed(head, int(writes_mask))
        return head, None if head[9] else poisoned(self.library.bn_scratch(head), torch.float64)

    def forward(self, x, residual, running_mean, running_var, weight, bias, training, momentum, eps, *options):
        """As the raw op without ``valid`` and ``groups``."""
        correction, activation, slope, mask_bytes, output = options
        parameters = (weight, bias, running_mean, running_var)
        head, scratch = self.head(x, parameters, training, correction, activation, mask_bytes > 0)
        channels, update = x.size(1), training and running_mean is not None
        mean, invstd = poisoned(channels, torch.float64), poisoned(channels, torch.float64)
        new = [poisoned(channels, running_mean.dtype) if update else None for _ in range(2)]
        mask = torch.full((mask_bytes,), 0xAA, dtype=torch.uint8) if mask_bytes else None
        reals = (ctypes.c_double * 3)(slope, momentum, eps)
        args = map(pointer, (x, residual, output, mask, mean, invstd, *new, scratch))
        assert self.library.bn_forward(head, reals, (ctypes.c_void_p * 4)(*map(pointer, parameters)), *args) == 0
        return output, mean, invstd, *new, mask

    def backward(self, grad, x, residual, weight, bias, mean, invstd, mask, training, *options):
        """As the raw op without ``valid`` and ``groups``; into grad_input and grad_residual."""
        correction, activation, slope, grad_input, grad_residual, need_params = options
        parameters = (weight, bias, None, None)
        head, scratch = self.head(x, parameters, training, correction, activation)
        kind = next((p.dtype for p in parameters if p is not None), x.dtype)
        grads = [poisoned(x.size(1), kind) if need_params else None for _ in range(2)]
        reals = (ctypes.c_double * 1)(slope)
        args = map(pointer, (grad, x, residual, mask, mean, invstd, grad_input, grad_residual, *grads, scratch))
        assert self.library.bn_backward(head, reals, (ctypes.c_void_p * 4)(*map(pointer, parameters)), *args) == 0
        return grad_input, grad_residual, *grads

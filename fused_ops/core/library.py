"""Finds and loads the compiled libraries, and registers what serves every op where no kernel does.

Each raw op (``torch.ops.fused_ops.*``) has a C++ schema and CPU kernels when the library is there, and CUDA kernels
when the second one is, which is loaded only beside a torch with CUDA: without it, or where it cannot be loaded, the
CPU kernels serve as ever. Each op's plain-PyTorch reference is registered besides, as the kernel of every device
without one of its own, so the same ops exist and give the same results without a compiler. A fake kernel (shapes only)
serves ``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

import functools
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_ops.core.checks import checked
from fused_ops.core.torch_private import has_kernel

LIBRARY_PATH = Path(__file__).parent.with_name("_C.so")
CUDA_LIBRARY_PATH = LIBRARY_PATH.with_name("_C_cuda.so")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ISAS = ("DEFAULT", "AVX2", "AVX512")
_CUDA_REFUSALS = (
    "",
    "the driver is older than the CUDA that they were built with",
    "the GPU is older than those that they were built for",
)
_registered: list[str] = []  # raw ops, in the order of registration
references: dict[Any, Callable[..., Any]] = {}  # of every op: what serves a device without a kernel

_fragment = torch.library.Library("fused_ops", "FRAGMENT")


def _open(path: Path) -> None:
    """torch.ops.load_library; a file that was cut off is an OSError too, where dlopen would end the process.

    An ELF library ends with the table of its sections, whose place, size and number of entries its header has.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):  # of 64 bits, little-endian
        (begin,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if begin + size * count > path.stat().st_size:
            raise OSError(f"{path}: the file is incomplete")
    torch.ops.load_library(str(path))


def _load() -> str | None:
    """Loads the library; returns why it is not there, or None if it is."""
    if not LIBRARY_PATH.exists():
        return "the native library was not built"
    try:
        _open(LIBRARY_PATH)
    except OSError as error:
        return f"the native library could not be loaded: {error}"
    return None


def _load_cuda() -> str | None:
    """Loads the library of the CUDA kernels, as far as it is of use; returns why there are none, or None if there are.

    Warns where they were built and cannot be used. Where they were not built, the first call on a GPU warns instead.
    """
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if missing_reason is not None or not CUDA_LIBRARY_PATH.exists():
        return missing_reason or "the CUDA kernels were not built"
    try:
        _open(CUDA_LIBRARY_PATH)
        why = _CUDA_REFUSALS[torch.ops.fused_ops.cuda_refusal()]  # with one, they register nothing
        if not why:
            return None
    except OSError as error:
        why = str(error.__cause__ or error)  # torch names the file alone
    why = f"the CUDA kernels could not be loaded: {why}"
    _warn(f"{why}; on a GPU every op runs on its plain-PyTorch reference, right but slower")
    return why


def _warn(message: str) -> None:
    warnings.warn(f"fused_ops: {message}", RuntimeWarning, stacklevel=3)


missing_reason: str | None = _load()
if missing_reason is not None:
    _warn(f"{missing_reason}; every op runs on its plain-PyTorch reference, right but slower")
cuda_missing_reason: str | None = _load_cuda()


def register(
    schema: str, reference: Callable[..., object], fake: Callable[..., object], *, native: bool = True
) -> Callable[..., object]:
    """Defines one raw op as far as the library has not, and returns it ready to be called.

    Args:
        schema: The op's schema. It is defined here, unless the library has defined it already.
        reference: Plain-PyTorch implementation; serves every device that has no kernel.
        fake: Implementation on shapes, strides and dtypes alone.
        native: Whether the library defines the op; one that only strings other ops together is Python's.
    """
    name = schema.split("(", 1)[0]
    if not hasattr(torch.ops.fused_ops, name):
        _fragment.define(schema)
    packet = getattr(torch.ops.fused_ops, name)
    arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    names = [argument.partition("=")[0].split()[-1] for argument in arguments.split(", ") if argument]
    references[packet.default] = reference = checked(name, names, reference, reads=True)
    if native:  # what strings other ops together is no slower on a GPU than elsewhere
        reference = _with_notice(name, reference)
    _fragment.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_ops::{name}", checked(name, names, fake, reads=False), lib=_fragment)
    if native:
        _registered.append(name)
    return packet.default  # type: ignore[no-any-return]


_noticed: set[str] = set()  # kinds of devices on which a reference has run


def _with_notice(name: str, reference: Callable[..., object]) -> Callable[..., object]:
    """The reference, with a warning at the first call on each kind of device that is not the CPU."""

    @functools.wraps(reference)
    def call(*args: object, **named: object) -> object:
        device = next((value.device.type for value in args if isinstance(value, torch.Tensor)), "cpu")
        if device not in ("cpu", "meta") and device not in _noticed:
            _noticed.add(device)
            why = f"there are kernels for the CPU and for CUDA, none for {device}"
            if device == "cuda":
                why = cuda_missing_reason or "no kernel serves this call"
            _warn(f"{name} runs on {device} on its plain-PyTorch reference, right but slower than a kernel: {why}")
        return reference(*args, **named)

    return call


def isa() -> str | None:
    """The instruction set of the CPU kernels that this process runs, or None without the library."""
    return None if missing_reason is not None else _ISAS[torch.ops.fused_ops.cpu_isa()]


def backends() -> list[tuple[str, str, str, str]]:
    """What serves each raw op, for all of DTYPES alike: rows (op, device, what serves it, why nothing faster)."""
    rows = []
    for name in _registered:
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            if has_kernel(f"fused_ops::{name}", key):
                rows.append((name, device, f"{isa()} kernel" if key == "CPU" else "CUDA kernel", ""))
            else:
                why = missing_reason or (key == "CUDA" and cuda_missing_reason) or f"no {key} kernel in this build"
                rows.append((name, device, "plain PyTorch", why))
    return rows

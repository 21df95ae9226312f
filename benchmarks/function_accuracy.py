"""``python -m benchmarks.function_accuracy``: the largest error of each function of csrc/simd, in docs/reliability.md.

Every float32 of a function's range is tried, under every instruction set that this processor has: a quarter of an
hour of one core. Below SMALL, where the results are x, 1 or a half to all but a few of their digits, every
TINY_STEP-th is.
"""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import ROOT, isa

PAGE = ROOT / "docs" / "reliability.md"
MARKER = re.compile(r"(<!-- function_accuracy -->\n).*?(<!-- /function_accuracy -->)", re.DOTALL)
SOURCE = Path(__file__).with_suffix(".cpp")
ISAS = ("DEFAULT", "AVX2", "AVX512")
PIECE = 1 << 26  # floats that one task tries
SMALL, TINY_STEP = 2**-32, 1009


@dataclass(frozen=True)
class Function:
    """One of function_accuracy.cpp's, in its order, and where it is to be right."""

    name: str
    use: str
    low: float
    high: float


FUNCTIONS = (
    Function("`exp_`", "exp", -135, 44),
    Function("`exp_vec`", "exp, in registers", -135, 44),
    Function("`exp_scaled`", "the same, a term of a sum", -135, 44),
    Function("`exp_close`", "exp of activations", -135, 135),
    Function("`expm1_`", "exp(x) - 1", -135, 0),
    Function("`log1p_below`", "log(1 + x)", -1 + 2**-24, 0),
    Function("`tanh_`", "tanh", -135, 135),
    Function("`sigmoid_`", "1 / (1 + exp(-x))", -88, 135),
    Function("`gauss`", "exp(-x^2 / 2)", -13, 13),
    Function("`normal_below`", "(1 + erf(x / sqrt 2)) / 2, in ulp of 1", -135, 135),
)


def flags() -> dict[str, list[str]]:
    """Instruction set -> the kernels' flags, as setup.py has them."""
    found: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("X86_FLAGS", "KERNEL_FLAGS"):
            found[ast.unparse(node.targets[0])] = eval(compile(ast.Expression(node.value), "setup.py", "eval"))
    return {name: [*found["KERNEL_FLAGS"], *mine] for name, mine in found["X86_FLAGS"].items()}


def available() -> tuple[str, ...]:
    """The instruction sets that this processor has."""
    return ISAS[: ISAS.index(isa().upper()) + 1]


def build(name: str, folder: Path) -> ctypes.CDLL:
    """function_accuracy.cpp for one instruction set."""
    library = folder / f"{name}.so"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-std=c++17", "-O2", "-fPIC", "-shared", "-fwrapv"]
    command += ["-fopenmp-simd", f"-I{ROOT / 'csrc'}", f"-DFUSED_OPS_ISA={name}", *flags()[name]]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.largest_error.restype = ctypes.c_double
    loaded.value_at.restype = ctypes.c_float
    loaded.value_at.argtypes = [ctypes.c_int, ctypes.c_float]
    return loaded


def _bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def pieces(function: Function) -> Iterator[tuple[int, int, int]]:
    """(begin, end, step) of the bits of the floats of its range, in pieces."""
    for sign, last in ((0, function.high), (1 << 31, -function.low)):
        if last <= 0:
            continue
        small, end = _bits(SMALL), _bits(last) + 1
        yield sign, sign + small, TINY_STEP
        for begin in range(small, end, PIECE):
            yield sign + begin, sign + min(begin + PIECE, end), 1


def largest_error(library: ctypes.CDLL, function: Function, every: int = 1) -> tuple[float, float]:
    """The largest error in ulp and where it is, of every float of the range or every `every`-th of those."""

    def one(piece: tuple[int, int, int]) -> tuple[float, float]:
        begin, end, step = map(ctypes.c_uint32, (*piece[:2], piece[2] * every))
        at = ctypes.c_float()
        return library.largest_error(FUNCTIONS.index(function), begin, end, step, ctypes.byref(at)), at.value

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a call lets other threads run
        return max(pool.map(one, pieces(function)))


def table() -> str:
    """The table in Markdown."""
    with tempfile.TemporaryDirectory() as scratch:
        libraries = [build(name, Path(scratch)) for name in available()]
        lines = [f"| function | is | for x in | {' | '.join(available())} |", "|" + " --- |" * (3 + len(libraries))]
        for f in FUNCTIONS:
            errors = [f"{largest_error(library, f)[0]:.3f}" for library in libraries]
            lines.append("| " + " | ".join([f.name, f.use, f"[{f.low:g}, {f.high:g}]", *errors]) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Brings the page up to date."""
    measured = table()
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKER.sub(lambda m: m[1] + measured + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Instructions that the CPU kernels execute on fixed inputs: a regression guard that does not depend on the clock.

``python -m benchmarks instructions`` counts them under valgrind and writes instructions.json; a test counts them again
and fails where one grew by more than ALLOWANCE. Only what runs inside a kernel counts, with one thread and
the kernels of each of ISAS (valgrind knows no AVX-512).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .machine import ROOT, isa

COUNTS = Path(__file__).with_name("instructions.json")
LIBRARY = ROOT / "fused_ops" / "_C.so"
ALLOWANCE = 0.05
ISAS = ("AVX2", "DEFAULT")
_HEADER = Path("/usr/include/valgrind/callgrind.h")
_START = "#include <valgrind/callgrind.h>\nvoid start(void) { CALLGRIND_START_INSTRUMENTATION; }\n"


@dataclass(frozen=True)
class InstructionCase:
    """One call, of which forward and backward are counted."""

    name: str
    inputs: Any  # harness.Inputs
    function: Any  # of the inputs' tensors


def compiler() -> str:
    """The compiler that built the library, as it signed it."""
    signed = re.findall(rb"GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+", LIBRARY.read_bytes())
    return ", ".join(sorted({s.decode() for s in signed})) or "unknown"


def unavailable() -> str:
    """Why the instructions cannot be counted here, or an empty string."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not LIBRARY.exists():
        return "the native library was not built"
    if isa() not in ("AVX2", "AVX512"):
        return f"the counts are of x86 kernels up to AVX2, and this processor runs {isa()}"
    return ""


def kernels() -> list[str]:
    """Names of the kernels that the contract headers declare.

    But for those that call others of them: entering the second of two would switch the counting off again.
    """
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "csrc").glob("*/*kernels.h")))
    declared = re.findall(r"^FUSED_OPS_PER_ISA\(\s*[\w:]+\s+(\w+)\(", text, re.MULTILINE)
    return [name for name in declared if not name.startswith("batch_norm_small_")]


def count(kernels_isa: str) -> dict[str, int]:
    """Case and direction -> instructions of one instruction set's kernels, counted anew (a minute or two)."""
    with tempfile.TemporaryDirectory() as scratch:
        starter = _build_starter(Path(scratch))
        command = [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={scratch}/out", "--collect-atstart=no"),
            *(f"--toggle-collect=fused_ops::{kernels_isa}::{name}(*" for name in kernels()),
            *("--dump-before=getppid", f"--instr-atstart={'no' if starter else 'yes'}"),
            *(sys.executable, "-m", "benchmarks.instructions", starter),
        ]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        fixed = {
            "ATEN_CPU_CAPABILITY": kernels_isa.lower(),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "PYTHONHASHSEED": "0",
        }
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **fixed}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"counting failed: {done.stderr.strip()[-2000:]}")
        names = json.loads(done.stdout.splitlines()[-1])
        dumps = [_total(Path(f"{scratch}/out.{i + 1}")) for i in range(3 * len(names))]
    # Per case: the warm-up (not wanted), forward, backward.
    found = {
        f"{n} {d}": dumps[3 * i + j + 1] for i, n in enumerate(names) for j, d in enumerate(("forward", "backward"))
    }
    idle = [
        name for name, n in found.items() if not n and not name.endswith(" backward")
    ]  # it may come with the forward
    if idle:
        raise RuntimeError(f"no kernel ran in {idle}: are its symbols stripped?")
    return found


def _total(dump: Path) -> int:
    match = re.search(r"^totals: (\d+)", dump.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return int(match.group(1)) if match else 0


def _build_starter(folder: Path) -> str:
    """A library that switches the counting on, so that importing torch is not slowed by it; or ''."""
    cc = shutil.which(os.environ.get("CC", "cc"))
    if cc is None or not _HEADER.exists():
        return ""
    source, library = folder / "start.c", folder / "start.so"
    source.write_text(_START, encoding="ascii")
    built = subprocess.run([cc, "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True)
    return str(library) if built.returncode == 0 else ""


def _run_cases(starter: str) -> Iterator[str]:
    """Under valgrind: each getppid() ends one count."""
    import torch

    from . import cases
    from .harness import AutogradRunner

    torch.set_num_threads(1)
    if starter:
        ctypes.CDLL(starter).start()
    for op, module in cases.modules().items():
        for case in getattr(module, "instruction_cases", list)():
            runner = AutogradRunner(case.function, case.inputs)
            runner.results()
            os.getppid()
            runner.prepare("backward")
            os.getppid()
            runner.run("backward")
            os.getppid()
            yield f"{op} {case.name}"


def load() -> dict[str, Any]:
    """What the repository holds: the compiler, and the counts of each instruction set."""
    found: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return found


def update(console: Console) -> int:
    """Counts anew, shows what changed and writes the file."""
    reason = unavailable()
    if reason:
        console.print(f"[red]cannot count: {reason}")
        return 1
    held = load()["instructions"] if COUNTS.exists() else {}
    counted = {name: count(name) for name in ISAS}
    for kernels_isa, after in counted.items():
        before = held.get(kernels_isa, {})
        for name, n in after.items():
            change = f"{n / before[name] - 1:+.1%}" if before.get(name) else "" if name in before else "new"
            console.print(f"{kernels_isa:<8} {name:<60} {n:>12,} {change}")
        for name in before.keys() - after.keys():
            console.print(f"{kernels_isa:<8} {name:<60} gone")
    text = json.dumps({"compiler": compiler(), "instructions": counted}, indent=1)
    COUNTS.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    print(json.dumps(list(_run_cases(*sys.argv[1:]))))

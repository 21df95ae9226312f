"""What a figure depends on besides the code: the machine, its load, the library versions and the commit."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LOAD_LIMIT = 0.5  # a busier machine gives figures that cannot be compared


def cpu_model() -> str:
    """The processor's marketing name, e.g. ``AMD EPYC``."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(match.group(1).split()) if match else platform.machine()


def machine_name(device: str = "cpu") -> str:
    """Model, cores and instruction set in use, or the GPU instead of the latter; never a host name."""
    return f"{cpu_model()}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if device == 'cuda' else isa()}"


def directory_name(machine: str) -> str:
    """``machine_name`` as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def isa() -> str:
    """The instruction set that PyTorch's and our kernels use here (both honour ATEN_CPU_CAPABILITY)."""
    return torch.backends.cpu.get_cpu_capability()


def commit() -> str:
    """Short commit of the working tree, with ``-dirty`` if a file that git knows differs from it.

    ``FUSED_OPS_COMMIT`` names it where the tree is a copy whose history says something else, or nothing.
    """
    if "FUSED_OPS_COMMIT" in os.environ:
        return os.environ["FUSED_OPS_COMMIT"]
    # Results, plots and the pages generated from them follow from a run, so they do not make its commit dirty.
    watched = ["--", ".", ":!benchmarks/results", ":!docs", ":!*.md"]
    try:
        name = _git("rev-parse", "--short=10", "HEAD").strip()
        return f"{name}-dirty" if _git("status", "--porcelain", "--untracked-files=no", *watched).strip() else name
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


ALLOCATORS = ("default", "fresh", "recycled")


def set_allocator(choice: str) -> None:
    """Decides where the C library takes large blocks from, for the rest of the process.

    Left to itself glibc maps blocks above 32 MiB anew each time, so that every page of a new tensor is first touched
    with a page fault, and recycles smaller ones or not, depending on what lies above them on the heap. ``fresh`` maps
    every large block anew, ``recycled`` none.
    """
    if choice == "default":
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
    wanted = {mmap_threshold: 128 << 10} if choice == "fresh" else {mmap_max: 0, trim_threshold: 2**31 - 1}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise RuntimeError(f"--allocator {choice} needs glibc's malloc") from None
    if not all(mallopt(key, value) for key, value in wanted.items()):
        raise RuntimeError(f"--allocator {choice}: mallopt refused")


def load_average() -> float:
    """Runnable processes over the last minute, as ``uptime`` gives them; NaN where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


class OtherProcesses:
    """Cores kept busy by other processes since this object was made (the load average also counts our own work)."""

    def __init__(self) -> None:
        self._start = self._read()

    def busy_cores(self) -> float | None:
        """Mean over the time since the start, or None where /proc does not say."""
        end = self._read()
        if self._start is None or end is None or end[2] <= self._start[2]:
            return None
        busy, own, elapsed = (b - a for a, b in zip(self._start, end, strict=True))
        return max(0.0, (busy - own) / elapsed)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds of all cores' work, seconds of our own, seconds that passed."""
        try:
            fields = [int(f) for f in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
            uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        except (OSError, ValueError):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), uptime


def environment(device: str, allocator: str = "default") -> dict[str, object]:
    """The columns that every row of one run shares."""
    return {
        "machine": machine_name(device),
        "device": device,
        "isa": isa(),
        "allocator": allocator,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "commit": commit(),
        "load_before": round(load_average(), 2),
    }

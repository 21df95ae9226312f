"""Peak extra memory of one provider: how far the resident set rises above what the inputs take, in a fresh process."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path

import torch

from . import cases, harness, machine

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_bytes(key: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def peak_extra_bytes(run: Callable[[], None]) -> int | None:
    """Rise of the resident set while ``run()`` runs; None where the system has no high-water mark to reset."""
    if not os.access(CLEAR, os.W_OK):
        return None
    gc.collect()
    CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one takes
    CLEAR.write_text("5", encoding="ascii")  # 5: reset the high-water mark
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def peak_extra_bytes_cuda(run: Callable[[], None]) -> int:
    """Rise of the allocator's high-water mark while ``run()`` runs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: harness.Case, provider: harness.Provider, direction: str, threads: int, device: str) -> int | None:
    """In this process. The first run compiles, loads and initialises; only the second one counts."""
    torch.set_num_threads(threads)
    runner = harness.make_runner(case, provider, case.inputs(device), threads)
    for counted in (False, True):
        runner.prepare(direction)
        if counted:
            weigh = peak_extra_bytes_cuda if device == "cuda" else peak_extra_bytes
            return weigh(lambda: runner.run(direction))
        runner.run(direction)
    return None


def in_subprocess(case: harness.Case, provider: str, direction: str, threads: int, device: str) -> int | None:
    """``measure`` in a process of its own, so that no other provider's memory is there to be reused."""
    command = [sys.executable, "-m", "benchmarks.memory", case.op, case.name, provider, direction, str(threads), device]
    path = os.pathsep.join([str(machine.ROOT), os.environ.get("PYTHONPATH", "")])
    # Large blocks straight from the system: else holes in malloc's heap decide, and the same run's figure varies.
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=machine.ROOT)
    if done.returncode:
        raise RuntimeError(f"memory of {case.op} {case.name}, {provider}: {done.stderr.strip().splitlines()[-1:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return None if result is None else int(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("op", "case", "provider", "direction"):
        parser.add_argument(name)
    parser.add_argument("threads", type=int)
    parser.add_argument("device")
    args = parser.parse_args()
    case = cases.find(args.op, args.case, args.device)
    provider = next(p for p in case.providers if p.name == args.provider)
    print(json.dumps(measure(case, provider, args.direction, args.threads, args.device)))


if __name__ == "__main__":
    main()

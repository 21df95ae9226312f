"""Processes (gloo) that run a worker, for scripts of the tests; each leaves what it found as JSON.

A module of cases has ``CASES``, functions of (rank, world) by name: all of them run in one start of the processes.
"""

import datetime
import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(worker, *arguments, world=2):
    """``worker(rank, port, *arguments)`` on each of the processes."""
    how = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import torch again
    torch.multiprocessing.start_processes(worker, (free_port(), *arguments), nprocs=world, start_method=how)


def start(rank, port, world=2, timeout_s=60):
    """What a worker does first."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)


def finish(path, found):
    """What a worker does last: leaves ``found`` there."""
    with open(path, "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort the process at its ordinary end


def problems_of(module, world, folder, only=""):
    """Runs a module's cases in processes of their own: by name, the tracebacks of the ranks that failed.

    Args:
        module: Its name, to be imported from the tests' folders.
        world: How many processes.
        folder: Where they leave what they found.
        only: What the names of the cases to run begin with; several with commas.
    """
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "cross_entropy")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.processes", module, str(world), str(folder), only]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(Path(folder, f"rank{rank}").read_text()) for rank in range(world)]
    return {name: [rank[name] for rank in found if rank[name]] for name in found[0]}


def _run_cases(rank, port, module, world, folder, only):
    start(rank, port, world)
    cases = {
        name: case
        for name, case in importlib.import_module(module).CASES.items()
        if name.startswith(tuple(only.split(",")))
    }
    problems, failed = dict.fromkeys(cases, "not run, after one that failed"), False
    for name, case in cases.items():
        try:
            case(rank, world)
            dist.barrier()
            problems[name] = ""
        except Exception:
            problems[name], failed = f"rank {rank}: {traceback.format_exc()}", True
            break
    path = Path(folder, f"rank{rank}")
    if failed:  # the other ranks may wait for this one, and fail as it is gone
        path.write_text(json.dumps(problems))
        os._exit(0)
    finish(path, problems)


if __name__ == "__main__":
    name, world, *rest = sys.argv[1:]
    run(_run_cases, name, int(world), *rest, world=int(world))

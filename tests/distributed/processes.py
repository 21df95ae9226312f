"""Two processes (gloo) that run a worker, for scripts of the tests; each leaves what it found as JSON."""

import datetime
import json
import os
import socket
import sys

import torch
import torch.distributed as dist


def run(worker, *arguments, world=2):
    """``worker(rank, port, *arguments)`` on each of the processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import torch again
    torch.multiprocessing.start_processes(worker, (port, *arguments), nprocs=world, start_method=how)


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

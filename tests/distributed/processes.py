"""Processes (gloo) for tests: those that wait for work (``Pool``), and for scripts those that run a worker.

A module of cases has ``CASES``, functions of (rank, world) by name, for ``run_case``.
"""

import contextlib
import datetime
import importlib
import json
import multiprocessing
import os
import pickle
import sys
import traceback

import torch
import torch.distributed as dist


class Pool:
    """``world`` processes; ``run(function, *arguments)`` returns what ``function(*arguments)`` does on each.

    The function is one that a module has by its name. What it raises is raised here, with the tracebacks, and ends
    the processes, as some may wait for others: the next run has new ones.
    """

    def __init__(self, world):
        self.world = world
        self.start()

    def start(self):
        context = multiprocessing.get_context("forkserver")  # whose imports, the longest part, are done once
        context.set_forkserver_preload(["torch._inductor.compile_fx", "torch.distributed", "fused_ops"])
        self.store, self.connections, self.processes = open_store(), [], []
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            self.connections.append(mine)
            self.processes.append(
                context.Process(target=_serve, args=(rank, self.store.port, self.world, theirs), daemon=True)
            )
            self.processes[-1].start()
            theirs.close()  # so that the end of the process is seen

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def run(self, function, *arguments):
        message = pickle.dumps((function, arguments))
        if not self.processes:
            self.start()
        try:
            for connection in self.connections:
                connection.send_bytes(message)
            found = [pickle.loads(connection.recv_bytes()) for connection in self.connections]
        except (EOFError, OSError) as error:
            self.close()
            raise AssertionError("a process ended") from error
        problems = [f"rank {rank}:\n{problem}" for rank, (problem, _) in enumerate(found) if problem]
        if problems:
            self.close()
            raise AssertionError("\n".join(problems))
        return [result for _, result in found]

    def close(self):
        for connection in self.connections:
            with contextlib.suppress(OSError):  # of one that has ended
                connection.send_bytes(b"")
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        self.processes = []


def _serve(rank, port, world, connection):
    start(rank, port, world, timeout_s=180)  # processes of a busy machine start far apart
    while message := connection.recv_bytes():
        try:
            function, arguments = pickle.loads(message)
            answer = pickle.dumps((None, function(*arguments)))
        except BaseException:
            connection.send_bytes(pickle.dumps((traceback.format_exc(), None)))
            os._exit(1)
        connection.send_bytes(answer)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in finish


def run_case(module, name):
    """A case of a module, on this process of a pool."""
    importlib.import_module(module).CASES[name](dist.get_rank(), dist.get_world_size())
    dist.barrier()


def cases_of(module):
    """The names of a module's cases, on this process of a pool: what they import need not be there elsewhere."""
    return sorted(importlib.import_module(module).CASES)


def open_store():
    """Where processes meet. It holds its port from the start: a free one only looked up may go to another pool."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def run(worker, *arguments, world=2):
    """``worker(rank, port, *arguments)`` on each of the processes."""
    how = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import torch again
    store = open_store()
    torch.multiprocessing.start_processes(worker, (store.port, *arguments), nprocs=world, start_method=how)


def start(rank, port, world=2, timeout_s=60):
    """What a worker does first; ``port`` is that of ``open_store``."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def finish(path, found):
    """What a worker does last: leaves ``found`` there."""
    with open(path, "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort the process at its ordinary end

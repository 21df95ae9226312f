"""Processes (gloo) that wait for work: each call of a pool runs one function on all of them, in a test that asks."""

import multiprocessing
import os
import pickle
import traceback

import torch.distributed as dist
from processes import free_port, start


class Pool:
    """``world`` processes; ``run(function, *arguments)`` returns what ``function(*arguments)`` does on each.

    The function is one that a module has by its name. What it raises is raised here, with the rank's traceback.
    """

    def __init__(self, world):
        context = multiprocessing.get_context("forkserver")  # whose imports, the longest part, are done once
        context.set_forkserver_preload(["torch._inductor.compile_fx", "torch.distributed", "fused_ops"])
        port, self.connections, self.processes = free_port(), [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            self.connections.append(mine)
            self.processes.append(context.Process(target=_serve, args=(rank, port, world, theirs), daemon=True))
            self.processes[-1].start()

    def run(self, function, *arguments):
        message = pickle.dumps((function, arguments))
        for connection in self.connections:
            connection.send_bytes(message)
        found = [pickle.loads(connection.recv_bytes()) for connection in self.connections]
        problems = [f"rank {rank}:\n{problem}" for rank, (problem, _) in enumerate(found) if problem]
        assert not problems, "\n".join(problems)
        return [result for _, result in found]

    def close(self):
        for connection in self.connections:
            connection.send_bytes(b"")
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def _serve(rank, port, world, connection):
    start(rank, port, world, timeout_s=180)  # processes of a busy machine start far apart
    while message := connection.recv_bytes():
        try:
            function, arguments = pickle.loads(message)
            answer = pickle.dumps((None, function(*arguments)))
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        connection.send_bytes(answer)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in processes.finish

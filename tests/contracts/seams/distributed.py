"""DDP, FSDP2, DTensor and loss_parallel, on two processes (gloo) that run every check.

``python -m seams.distributed RESULT`` runs them and writes {check: problem, or ""} as JSON.
"""

import json
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_ops
from tests.distributed import processes

from . import check as c
from .cases import BATCH, BY_NAME
from .check import Call, close, scalar
from .holder import Holder, _mixed

WORLD = 2
CHECKS: dict[str, Callable[[int], None]] = {}
PARALLEL = (
    "ce-mean",
    "ce-z_loss",
    "ce-CrossEntropyLoss, options",
    "lce-small, bias",
    "lce-chunks",
    "lce-LinearCrossEntropyLoss",
    "lce-1 MiB of logits",
    "bn-training, statistics",
    "bn-residual, relu",
    "bn-BatchNorm1d",
)
DTENSOR = (
    "ce-mean",
    "ce-sum",
    "ce-none",
    "ce-weight",
    "ce-smoothing",
    "ce-soft target",
    "lce-small",
    "lce-chunks",
    "bn-evaluation",
    "bn-training, statistics",
)


def _trained(case, model, rank):
    """Value on this rank, and gradients averaged over the ranks, as DDP and FSDP leave them."""
    answers = [_mixed(case, BATCH, seed + 1) for seed in range(WORLD)]
    outputs = model(*model.module_.inputs(BATCH, rank + 1, grad=False))
    c.check(case, outputs, expected=answers[rank])
    scalar(outputs).backward()
    for name, p in model.named_parameters():
        short = name.rpartition("inner.")[2].removeprefix("module.")
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert grad is not None, f"parameter {short} gets no gradient"
        if short != "gain":
            close(grad, sum(a.grads[short] for a in answers) / WORLD, f"gradient of {short}", c.tolerance_of(case))


def _ddp(case):
    def run(rank):
        holder = Holder(case)
        model = torch.nn.parallel.DistributedDataParallel(holder)
        object.__setattr__(model, "module_", holder)
        _trained(case, model, rank)

    return run


def _fsdp(case):
    def run(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = Holder(case)
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        object.__setattr__(model, "module_", model)
        _trained(case, model, rank)

    return run


def _distributed_tensors(case, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made = {}
    for name, t in case.tensors().items():
        placement = Replicate() if name in case.unbatched or not t.dim() else Shard(0)
        made[name] = distribute_tensor(t, mesh, [placement])
        if name in case.diff:
            made[name].requires_grad_()
    return made


def _dtensor(case):
    """As PyTorch's own op on the whole tensors: its values and gradients."""

    def outcome(function, t):
        outputs = function(**t, **case.options)
        grads = torch.autograd.grad(scalar(outputs), [t[n] for n in case.diff])
        return [*c.outputs_of(outputs), *grads, *(t[n] for n in case.mutable)]

    def run(rank):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (WORLD,))
        whole = {name: t.requires_grad_(name in case.diff) for name, t in case.tensors().items()}
        found = outcome(case.ours, _distributed_tensors(case, mesh))
        for i, (mine, exact) in enumerate(zip(found, outcome(case.oracle, whole), strict=True)):
            close(mine.full_tensor(), exact, f"result {i}")

    return run


def _loss_parallel(call):
    """Logits sharded by class, the loss and its gradient found without gathering them."""

    def run(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        from torch.distributed.tensor.parallel import loss_parallel

        mesh = init_device_mesh("cpu", (WORLD,))
        made = Call(BY_NAME["ce-mean"], grad=False).tensors
        x = distribute_tensor(made["input"], mesh, [Shard(1)]).requires_grad_()
        with loss_parallel():
            loss = call(x, made["target"])
            loss.backward()
        plain = made["input"].clone().requires_grad_()
        expected = F.cross_entropy(plain, made["target"])
        expected.backward()
        close(loss.full_tensor() if hasattr(loss, "full_tensor") else loss, expected.detach(), "loss")
        close(x.grad.full_tensor(), plain.grad, "gradient")

    return run


def _patched(x, target):
    with fused_ops.patch():
        return F.cross_entropy(x, target)


for _name in PARALLEL:
    CHECKS[f"DDP|{_name}"] = _ddp(BY_NAME[_name])
    CHECKS[f"FSDP2|{_name}"] = _fsdp(BY_NAME[_name])
for _name in DTENSOR:
    CHECKS[f"DTensor|{_name}"] = _dtensor(BY_NAME[_name])
CHECKS["loss_parallel|ce-mean"] = _loss_parallel(fused_ops.cross_entropy)
CHECKS["loss_parallel|ce-patch"] = _loss_parallel(_patched)
CHECKS["loss_parallel|ce-CrossEntropyLoss"] = _loss_parallel(fused_ops.CrossEntropyLoss())


def _worker(rank: int, port: int, path: str) -> None:
    processes.start(rank, port, WORLD)
    problems = {}
    for name, run in CHECKS.items():
        try:
            run(rank)
            problems[name] = ""
        except BaseException:
            problems[name] = traceback.format_exc()
        dist.barrier()
    processes.finish(f"{path}.{rank}", problems)


def main(path: str) -> None:
    """Runs the checks on two processes; a check fails if it does on either."""
    processes.run(_worker, path, world=WORLD)
    found = []
    for rank in range(WORLD):
        with open(f"{path}.{rank}") as file:
            found.append(json.load(file))
    with open(path, "w") as file:
        json.dump({name: next((f[name] for f in found if f[name]), "") for name in CHECKS}, file)


if __name__ == "__main__":
    main(sys.argv[1])

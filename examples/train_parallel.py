"""A small Llama, or a residual network, trained on several processes: step for step what one process computes.

    python -m torch.distributed.run --nproc-per-node=2 -m fused_ops.examples.train_parallel --parallel tensor

``--parallel`` says how the work is spread, over all processes unless it says otherwise:

=========  ===================================================================================================
data       DistributedDataParallel; a loss whose mean is over the tokens of all processes
sharded    the same with fully_shard (FSDP2), whose weights live in parts
tensor     tensor parallelism: attention, layers and the vocabulary are split; the logits are a DTensor of parts
sequence   tensor parallelism whose activations between the layers are split along the sequence
both       two halves of the batch (fully_shard), each of them with tensor parallelism: 4 processes
=========  ===================================================================================================

Each process first trains the model alone, unconverted, on the whole batch; the table shows both losses. With
``--model resnet`` (data and sharded) the batch norms take the statistics of all processes. The Llama needs
transformers.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fused_ops

from .resnet_digits import resnet

IGNORED = -100
WAYS = ("data", "sharded", "tensor", "sequence", "both")


# ---- the two models, each with its loss: a module from a batch to one number, as fully_shard wants it


class LanguageModel(nn.Module):
    """A Llama and the cross-entropy of each next token, without logits where the head is here as a whole."""

    def __init__(self, vocabulary: int, fused: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        self.model = LlamaForCausalLM(config)
        self.fused = fused
        self.row_group: Any = None  # the processes that have other rows of the batch

    def forward(self, tokens: Tensor, targets: Tensor) -> Any:
        if not self.fused:
            return F.cross_entropy(self.model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        hidden = self.model.model(tokens).last_hidden_state
        weight = self.model.lm_head.weight
        if isinstance(weight, DTensor) and not isinstance(hidden, DTensor):  # each process of the mesh has all of it
            hidden = DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
        loss = fused_ops.linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, row_group=self.row_group)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


class Classifier(nn.Module):
    """A residual network and the cross-entropy of its class."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.model = resnet(8)
        self.row_group: Any = None
        if fused:
            fused_ops.convert(self.model, sync_batch_norm=dist.get_world_size() > 1)
        self.fused = fused

    def forward(self, images: Tensor, targets: Tensor) -> Any:
        logits = self.model(images)
        if not self.fused:
            return F.cross_entropy(logits, targets, ignore_index=IGNORED)
        return fused_ops.cross_entropy(logits, targets, ignore_index=IGNORED, row_group=self.row_group)


def batch_of(model: str, step: int, size: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The same on every process: inputs and targets, some of which are ignored, more of them at the end."""
    generator = torch.Generator().manual_seed(step)
    if model == "resnet":
        images = torch.randn(size, 1, 8, 8, generator=generator)
        return images, torch.randint(0, 10, (size,), generator=generator)
    tokens = torch.randint(0, vocabulary, (size, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.5, size)[:, None]] = IGNORED
    return tokens[:, :-1], targets


# ---- how the work is spread


def split_layers(llama: Any, mesh: DeviceMesh, sequence: bool) -> None:
    """Tensor parallelism of a Llama of transformers; with ``sequence`` its norms work on parts of the sequence."""
    rows: Any = {"output_layouts": Shard(1)} if sequence else {}
    plan: dict[str, Any] = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(**rows),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(**rows),
    }
    if sequence:
        whole: Any = {"desired_input_layouts": (Replicate(),)}
        plan |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), **whole),
        }
    for layer in llama.model.layers:
        parallelize_module(layer, mesh, plan)
    outside: dict[str, Any] = {"lm_head": ColwiseParallel()}  # the head's weight is what the loss takes
    if sequence:
        outside |= {
            # split here, as the model computes positions and the mask from what the embedding gives
            "model.layers.0": PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
            ),
            "model.norm": SequenceParallel(use_local_output=False),
        }
    parallelize_module(llama, mesh, outside)


def spread(model: Any, way: str) -> tuple[nn.Module, slice, float]:
    """The model as it is trained, which part of a batch is this process', and the factor of its loss.

    DistributedDataParallel and fully_shard average the gradients of the processes. The losses of the processes add up
    to the whole mean, so each is multiplied by their number.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if way in ("tensor", "sequence"):
        split_layers(model.model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("tensor",)), way == "sequence")
        return model, slice(None), 1.0
    if way == "both":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
        split_layers(model.model, mesh["tensor"], False)
        parts, part, model.row_group = 2, mesh["data"].get_local_rank(), mesh["data"].get_group()
        return shard(model, mesh["data"]), slice(part, None, parts), float(parts)
    model.row_group = dist.group.WORLD
    if way == "data":
        return nn.parallel.DistributedDataParallel(model), slice(rank, None, ranks), float(ranks)
    return shard(model, init_device_mesh("cpu", (ranks,))), slice(rank, None, ranks), float(ranks)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """``fully_shard`` of each layer and of the rest."""
    from torch.distributed.fsdp import fully_shard

    inside: Any = model.model
    for layer in getattr(getattr(inside, "model", None), "layers", ()):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


# ---- training


def train(arguments: argparse.Namespace) -> bool:
    """Prints both losses of each step; returns whether losses, weights and buffers agree at the end."""

    def build(fused: bool) -> Any:
        torch.manual_seed(0)
        return Classifier(fused) if arguments.model == "resnet" else LanguageModel(arguments.vocabulary, fused)

    alone, together = build(False), build(True)
    together.load_state_dict(copy.deepcopy(alone.state_dict()))
    trained, mine, factor = spread(together, arguments.parallel)
    optimizers = [torch.optim.SGD(m.parameters(), lr=arguments.lr, momentum=0.9) for m in (alone, trained)]
    furthest, first = 0.0, dist.get_rank() == 0
    if first:
        print(f"{'step':>4}  {'one process':>12}  {arguments.parallel:>12}")
    for step in range(arguments.steps):
        inputs, targets = batch_of(arguments.model, step, arguments.batch, arguments.vocabulary)
        expected = alone(inputs, targets)
        loss = trained(inputs[mine], targets[mine])
        optimizers[0].zero_grad()
        optimizers[1].zero_grad()
        expected.backward()
        (loss * factor).backward()
        for optimizer in optimizers:
            optimizer.step()
        total = loss.detach().clone()
        if together.row_group is not None:
            dist.all_reduce(total, group=together.row_group)
        losses = expected.item(), total.item()
        furthest = max(furthest, abs(losses[0] - losses[1]))
        if first:
            print(f"{step:4}  {losses[0]:12.6f}  {losses[1]:12.6f}")
    ours = {name: whole(t) for name, t in together.state_dict().items()}
    for name, t in alone.state_dict().items():
        if t.is_floating_point():
            furthest = max(furthest, float((ours[name] - t).abs().max()))
    if first:
        print(f"largest difference of losses, weights and buffers: {furthest:.1e}")
    return furthest < arguments.tolerance


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "resnet"), default="llama")
    parser.add_argument("--parallel", choices=WAYS, default="data")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=6, help="sequences or images of all processes together")
    parser.add_argument("--vocabulary", type=int, default=1001, help="odd by default: its shards differ")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="what the exit status is 1 beyond")
    given = parser.parse_args(arguments)
    if given.model == "resnet" and given.parallel not in WAYS[:2]:
        parser.error(f"--model resnet: expected --parallel data or sharded, got {given.parallel}")
    if "RANK" not in os.environ:
        parser.error("start it with python -m torch.distributed.run --nproc-per-node=2 -m " + __spec__.name)
    dist.init_process_group("gloo")
    try:
        return 0 if train(given) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # The models hold the group, so its threads are still alive and now and then abort a process that Python takes down
    # (pytorch/pytorch#190489).
    os._exit(status)

"""Which rivals can run here. One that cannot be installed or run is reported with the reason, never left out."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

# provider name: (module to import, distribution on the package index, where it runs)
OPTIONAL = {
    "jax": ("optax", "optax", "cpu or cuda"),
    "cut-cross-entropy": ("cut_cross_entropy", "cut-cross-entropy", "cpu or cuda"),
    "liger-kernel": ("liger_kernel", "liger-kernel", "cuda"),
    "flash-attn": ("flash_attn", "flash-attn", "cuda"),
    "quack-kernels": ("quack", "quack-kernels", "cuda"),
    "apex": ("apex.contrib.xentropy", "apex (NVIDIA's, from source)", "cuda"),
}
ALWAYS = ("eager", "torch.compile")
# what each calls on a GPU, "module:function": looked up here, so that a rival that changed says so in its row
CALLS = {
    "liger-kernel": {
        "cross_entropy": "liger_kernel.transformers.functional:liger_cross_entropy",
        "linear_cross_entropy": "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
    },
    "flash-attn": {"cross_entropy": "flash_attn.ops.triton.cross_entropy:cross_entropy_loss"},
    "quack-kernels": {"cross_entropy": "quack.cross_entropy:cross_entropy"},
    "apex": {"cross_entropy": "apex.contrib.xentropy:SoftmaxCrossEntropyLoss"},
}
COMES_WITH = {"cut-cross-entropy": "linear_cross_entropy"}  # what it is a rival of


@cache
def missing(name: str, device: str) -> str:
    """Why the optional rival does not run here, or an empty string if it does."""
    module, distribution, where = OPTIONAL[name]
    if device not in where:
        return "runs on CUDA only"
    try:
        importlib.import_module(module)
    except Exception as error:  # a rival may fail to import in any way it likes; that is what we report
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{distribution} is not importable: {reason}"
    return ""


def call(name: str, op: str, device: str) -> tuple[Callable[..., Any] | None, str]:
    """A rival's function for an op, or None and why there is none."""
    reason = missing(name, device)
    if reason:
        return None, reason
    module, function = CALLS[name][op].split(":")
    try:
        return getattr(importlib.import_module(module), function), ""
    except Exception as error:
        return None, f"{module} has no {function}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def version(name: str) -> str:
    """The installed version of a rival, or an empty string."""
    distribution = "torch" if name in ALWAYS else OPTIONAL[name][1]
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def report(device: str, ran: set[str], ran_before: Collection[str] = ()) -> list[dict[str, str]]:
    """One row per rival: whether it took part in this run, and if not, why. None for one with kept figures only."""
    rows = []
    for name in (n for n in [*ALWAYS, *OPTIONAL] if n in ran or n not in ran_before):
        reason = "" if name in ALWAYS else missing(name, device)
        if not reason and name not in ran:
            reason = f"no case of this run has it{_hint(name)}"
        rows.append({"rival": name, "version": version(name), "status": reason or "ran"})
    return rows


def _hint(name: str) -> str:
    op = COMES_WITH.get(name)
    return f" (it is a rival of {op} only)" if op else ""

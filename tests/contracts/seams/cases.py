"""The calls of the matrix: every public function and module with its options, at sizes a test can afford.

A case makes its tensors (seeded, of any batch size), calls this package, and names its oracle.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fused_ops

from . import oracles

BATCH, OTHER_BATCH = 6, 9
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class Case:
    """One call. ``ours`` and ``oracle`` take the tensors by name, and the options."""

    op: str  # "ce", "lce" or "bn": the table's column
    name: str
    make: Callable[[int, int], dict[str, torch.Tensor]]  # (batch, seed) -> tensors
    diff: tuple[str, ...]  # the differentiable ones; the input first
    ours: Callable[..., Any]
    oracle: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    unbatched: frozenset[str] = frozenset()  # tensors without a batch dimension (it is the first one)
    numbers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # options that may vary, and their values
    module: Callable[[], nn.Module] | None = None
    traits: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"{self.op}-{self.name}"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, the differentiable ones first."""
        return (*self.diff, *(n for n in self.make(BATCH, 0) if n not in self.diff))

    @cached_property
    def mutable(self) -> tuple[str, ...]:
        """The tensors that a training step updates."""
        return tuple(n for n in self.names if n.rpartition(".")[2] in STATISTICS)

    def tensors(self, batch: int = BATCH, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Fresh tensors, in ``names``' order; no two calls share memory."""
        made = self.make(batch, seed)
        found = {n: made[n] for n in self.names}
        if dtype is not None:
            found = {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}
        return found

    @cached_property
    def low_precision(self) -> bool:
        """Whether the input is of 16 bits."""
        return self.make(BATCH, 0)[self.diff[0]].dtype.itemsize == 2


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + seed)


def _normal(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


CASES: list[Case] = []


def _add(op, name, make, diff, ours, oracle, *, key=False, traits=(), **more):
    traits = frozenset(traits) | ({"key"} if key else set())
    case = Case(op, name, make, tuple(diff), ours, oracle, traits=traits, **more)
    assert case.mutable is not None and case.low_precision is not None  # found now, outside of any transform
    CASES.append(case)


# Cross-entropy. Target, options and further tensors are put together by `_ce`.

CLASSES = 7


def _ce_tensors(*more, shape=(), classes=CLASSES, dtype=torch.float64):
    """The input and, by name, what else the call takes."""

    def make(batch, seed):
        g = _random(seed)
        rows = (batch, *shape)
        t = {"input": (2 * _normal(g, batch, classes, *shape)).to(dtype)}
        indices = torch.randint(0, classes, rows, generator=g)
        made = {
            "target": indices,
            "ignored": torch.where(torch.arange(rows[0]).view(-1, *(1,) * len(shape)) % 3 == 1, 3, indices),
            "soft": torch.softmax(_normal(g, batch, classes, *shape), 1).to(dtype),
            "second": torch.randint(0, classes, rows, generator=g),
            "indices": torch.randint(0, classes, (batch, 3, *shape), generator=g),
            "probabilities": torch.softmax(_normal(g, batch, 3, *shape), 1),
            "lam": torch.rand(batch, generator=g, dtype=torch.float64),
            "weight": torch.rand(classes, generator=g, dtype=torch.float64) + 0.5,
            "token_weight": torch.rand(rows, generator=g, dtype=torch.float64) + 0.5,
            "normalizer": torch.tensor(4.5 + seed, dtype=torch.float64),
        }
        forbidden = torch.arange(classes) == 2  # never a target below
        made["class_mask"] = ~forbidden
        made["allowed"] = torch.where(indices == 2, 4, indices)
        return t | {name: made[name] for name in more}

    return make


_UNBATCHED = frozenset({"weight", "normalizer", "class_mask", "linear_weight", "linear_bias", "a", "b"})


def _ce(
    name, *more, diff=(), target=None, shape=(), classes=CLASSES, dtype=torch.float64, key=False, traits=(), **options
):
    """``more``: the tensors; the first is the target unless ``target`` makes one of several. Lists vary."""
    numbers = {n: tuple(v) for n, v in options.items() if isinstance(v, list)}
    settled = {n: v[0] if isinstance(v, list) else v for n, v in options.items()}
    outputs = settled.get("return_outputs", False)

    def call(function, pick):
        def run(**given):
            given = dict(given)
            x = given.pop("input")
            if target is None:
                t = given.pop(more[0])
            else:
                lam = given.pop("lam", None)
                t = tuple(given.pop(n) for n in more if n in target)
                t = t if lam is None else (*t, lam)
            result = function(x, t, **given)
            return pick(result) if outputs else result

        return run

    def pick(r):
        return r.loss, r.lse, r.target_log_probability, r.entropy, r.z_loss

    _add(
        "ce",
        name,
        _ce_tensors(*more, shape=shape, classes=classes, dtype=dtype),
        ("input", *diff),
        call(fused_ops.cross_entropy, pick),
        call(oracles.cross_entropy, lambda r: r),
        key=key,
        traits=traits,
        options=settled,
        numbers=numbers,
        unbatched=_UNBATCHED,
    )


_ce("mean", "target", key=True)
_ce("sum", "target", reduction="sum")
_ce("none", "target", reduction="none")
_ce("weight", "target", "weight")
_ce("smoothing", "target", label_smoothing=[0.1, 0.2, 0.3, 0.4], key=True)
_ce("weight, smoothing", "ignored", "weight", label_smoothing=0.1, ignore_index=3)
_ce("ignored rows", "ignored", ignore_index=[3, 1, 2, 4])
_ce("soft target", "soft", diff=("soft",))
_ce("soft target, weight, smoothing", "soft", "weight", diff=("soft", "weight"), label_smoothing=0.1)
_ce("pairs", "indices", "probabilities", target=("indices", "probabilities"), diff=("probabilities",))
_ce("mixup", "target", "second", target=("target", "second"), lam=[0.3, 0.4, 0.5, 0.6])
_ce("mixup of tensors", "target", "second", "lam", target=("target", "second"), diff=("lam",))
_ce("class_mask", "allowed", "class_mask")
_ce("class_mask, smoothing", "allowed", "class_mask", label_smoothing=0.1)
_ce("token_weight", "target", "token_weight", diff=("token_weight",))
_ce("normalizer", "target", normalizer=[10.0, 20.0, 30.0, 40.0])
_ce("normalizer as tensor", "target", "normalizer", diff=("normalizer",))
_ce("z_loss", "target", z_loss=[0.1, 0.2, 0.3, 0.4], key=True)
_ce("logit_scale", "target", logit_scale=[0.5, 0.6, 0.7, 0.8])
_ce("softcap", "target", softcap=[3.0, 3.5, 4.0, 4.5])
_ce("spatial", "target", shape=(4,))
_ce("spatial, z_loss", "ignored", shape=(2, 2), z_loss=0.1, ignore_index=3)
_ce("outputs", "target", return_outputs=True, z_loss=0.1)
_ce("bfloat16", "target", dtype=torch.bfloat16)
_ce("large", "target", classes=6001, traits={"large"})


def _inplace(input, target):
    return fused_ops.cross_entropy(input * 1.0, target, inplace_backward=True)


_add("ce", "inplace_backward", _ce_tensors("target"), ("input",), _inplace, oracles.cross_entropy, traits={"inplace"})


def _patched(input, target):
    with fused_ops.patch():
        return F.cross_entropy(input, target)


_add("ce", "patch", _ce_tensors("target"), ("input",), _patched, oracles.cross_entropy)


# Modules: their parameters and buffers are tensors of the case, under their own names.


def _module(op, name, make, diff, build, oracle, *, args, key=False, **more):
    """``args``: the tensors that the forward takes; the others are the module's."""
    module = build()  # its state is replaced in every call

    def ours(**given):
        given = dict(given)
        inputs = [given.pop(n) for n in args]
        return functional_call(module, given, tuple(inputs))

    _add(op, name, make, diff, ours, oracle, key=key, module=lambda: copy.deepcopy(module), **more)


def _ce_module(name, *more, key=False, **options):
    module_options = {k: v for k, v in options.items()}

    def build():
        weight = torch.ones(CLASSES, dtype=torch.float64) if "weight" in more else None
        return fused_ops.CrossEntropyLoss(weight=weight, **module_options)

    def oracle(input, **given):
        return oracles.cross_entropy(input, given.pop(more[0]), given.get("weight"), **options)

    _module(
        "ce",
        name,
        _ce_tensors(*more),
        ("input",),
        build,
        oracle,
        args=("input", more[0]),
        key=key,
        unbatched=_UNBATCHED,
    )


_ce_module("CrossEntropyLoss", "target")
_ce_module("CrossEntropyLoss, options", "ignored", "weight", label_smoothing=0.1, z_loss=0.1, ignore_index=3)


# Linear cross-entropy.

FEATURES = 5


def _lce_tensors(*more, classes=CLASSES, shape=(), outputs=(), dtype=torch.float64, scale=1):
    def make(batch, seed):
        g = _random(seed)
        batch = batch * scale
        rows = (batch, *shape, *outputs)
        t = {
            "input": _normal(g, batch, *shape, FEATURES).to(dtype),
            "linear_weight": _normal(g, classes, *outputs, FEATURES).to(dtype),
        }
        indices = torch.randint(0, classes, rows, generator=g)
        made = {
            "target": indices,
            "ignored": torch.where(torch.arange(indices.numel()).view(rows) % 4 == 1, -100, indices),
            "soft": torch.softmax(_normal(g, batch, classes), 1),
            "linear_bias": _normal(g, classes, *outputs).to(dtype),
            "weight": torch.rand(classes, generator=g, dtype=torch.float64) + 0.5,
            "token_weight": torch.rand(rows, generator=g, dtype=torch.float64) + 0.5,
            "normalizer": torch.tensor(4.5 + seed, dtype=torch.float64),
            "class_mask": torch.arange(classes) != 2,
            "allowed": torch.where(indices == 2, 4, indices),
            "a": _normal(g, 2, FEATURES),
            "b": _normal(g, classes, 2),
        }
        return t | {name: made[name] for name in more}

    return make


def _lce(name, *more, diff=(), key=False, traits=(), sizes=None, **options):
    numbers = {n: tuple(v) for n, v in options.items() if isinstance(v, list)}
    settled = {n: v[0] if isinstance(v, list) else v for n, v in options.items()}

    def call(function):
        def run(**given):
            given = dict(given)
            target = given.pop(more[0])
            if "a" in given:
                given["lora"] = (given.pop("a"), given.pop("b"), 0.5)
            return function(given.pop("input"), given.pop("linear_weight"), target, **given)

        return run

    _add(
        "lce",
        name,
        _lce_tensors(*more, **(sizes or {})),
        ("input", "linear_weight", *diff),
        call(fused_ops.linear_cross_entropy),
        call(oracles.linear_cross_entropy),
        key=key,
        traits=traits,
        options=settled,
        numbers=numbers,
        unbatched=_UNBATCHED,
    )


_lce("small", "target")
_lce("small, bias", "ignored", "linear_bias", diff=("linear_bias",), key=True)
_lce("small, none", "target", reduction="none")
_lce("small, z_loss", "target", z_loss=[0.1, 0.2, 0.3, 0.4])
_lce("small, normalizer", "target", normalizer=[10.0, 20.0, 30.0, 40.0])
_lce("chunks", "ignored", chunk_rows=4, key=True)
_lce("chunks, sum", "target", chunk_rows=4, reduction="sum")
_lce("chunks, none", "target", chunk_rows=4, reduction="none")
_lce("chunks, bias", "target", "linear_bias", diff=("linear_bias",), chunk_rows=4)
_lce("chunks, weight", "target", "weight", chunk_rows=4)
_lce("chunks, smoothing", "target", chunk_rows=4, label_smoothing=[0.1, 0.2, 0.3, 0.4])
_lce("chunks, z_loss", "target", chunk_rows=4, z_loss=[0.1, 0.2, 0.3, 0.4])
_lce("chunks, softcap", "target", chunk_rows=4, softcap=3.0)
_lce("chunks, class_mask", "allowed", "class_mask", chunk_rows=4)
_lce("chunks, token_weight", "target", "token_weight", diff=("token_weight",), chunk_rows=4)
_lce("chunks, normalizer", "target", chunk_rows=4, normalizer=[10.0, 20.0, 30.0, 40.0])
_lce("chunks, normalizer as tensor", "target", "normalizer", diff=("normalizer",), chunk_rows=4)
_lce("chunks, soft target", "soft", diff=("soft",), chunk_rows=4)
_lce("shift", "target", shift=True, sizes={"shape": (4,)})
_lce("shift, chunks", "target", shift=True, chunk_rows=4, sizes={"shape": (4,)})
_lce("lora", "target", "a", "b", diff=("a", "b"), chunk_rows=4)
_lce("positions", "target", sizes={"outputs": (3,)})
_lce("1 MiB of logits", "target", traits={"large"}, sizes={"classes": 300, "scale": 100})
_lce(
    "1 MiB of logits, options",
    "ignored",
    "linear_bias",
    diff=("linear_bias",),
    traits={"large"},
    sizes={"classes": 300, "scale": 100},
    label_smoothing=0.1,
    z_loss=0.1,
)
_lce("bfloat16", "target", sizes={"dtype": torch.bfloat16}, chunk_rows=4)


def _lce_module(name, *, bias=False, key=False, traits=(), classes=CLASSES, scale=1, **options):
    def build():
        return fused_ops.LinearCrossEntropyLoss(FEATURES, classes, bias=bias, dtype=torch.float64, **options)

    made = _lce_tensors("target", "linear_bias", classes=classes, scale=scale)

    def make(batch, seed):
        t = made(batch, seed)
        found = {"input": t["input"], "linear.weight": t["linear_weight"], "target": t["target"]}
        return found | ({"linear.bias": t["linear_bias"]} if bias else {})

    def oracle(input, target, **given):
        return oracles.linear_cross_entropy(
            input, given["linear.weight"], target, linear_bias=given.get("linear.bias"), **options
        )

    diff = ("input", "linear.weight", *(("linear.bias",) if bias else ()))
    unbatched = frozenset({"linear.weight", "linear.bias"})
    _module(
        "lce", name, make, diff, build, oracle, args=("input", "target"), key=key, traits=traits, unbatched=unbatched
    )


_lce_module("LinearCrossEntropyLoss")
_lce_module("LinearCrossEntropyLoss, chunks", bias=True, chunk_rows=4, label_smoothing=0.1)
_lce_module("LinearCrossEntropyLoss, 1 MiB", classes=300, scale=100, traits={"large"})


# Batch norm.

CHANNELS = 3
_PER_CHANNEL = frozenset({"running_mean", "running_var", "num_batches_tracked", "weight", "bias"})


def _bn_tensors(*more, shape=(), dtype=torch.float64, channels_last=False, prefix=""):
    def make(batch, seed):
        g = _random(seed)
        x = (3 * _normal(g, batch, CHANNELS, *shape) + 1).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        stats_dtype = torch.float32 if dtype.itemsize == 2 else dtype
        made = {
            "weight": (torch.rand(CHANNELS, generator=g, dtype=torch.float64) + 0.5).to(stats_dtype),
            "bias": _normal(g, CHANNELS).to(stats_dtype),
            "running_mean": _normal(g, CHANNELS).to(stats_dtype),
            "running_var": (torch.rand(CHANNELS, generator=g, dtype=torch.float64) + 0.5).to(stats_dtype),
            "num_batches_tracked": torch.tensor(4),
            "residual": _normal(g, batch, CHANNELS, *shape).to(dtype),
            "valid": (torch.arange(batch * math.prod(shape)) % 4 != 1).view(batch, *shape),
        }
        return {"input": x} | {prefix + n: made[n] for n in ("weight", "bias", *more)}

    return make


def _bn(name, *more, diff=(), shape=(), key=False, dtype=torch.float64, channels_last=False, **options):
    def call(function):
        def run(input, weight, bias, running_mean=None, running_var=None, **given):
            return function(input, running_mean, running_var, weight, bias, **given)

        return run

    _add(
        "bn",
        name,
        _bn_tensors(*more, shape=shape, dtype=dtype, channels_last=channels_last),
        ("input", "weight", "bias", *diff),
        call(fused_ops.batch_norm),
        call(oracles.batch_norm),
        key=key,
        options={"training": True, **options},
        unbatched=_PER_CHANNEL,
    )


_STATS = ("running_mean", "running_var")
_bn("training", key=True)
_bn("training, statistics", *_STATS, key=True)
_bn("evaluation", *_STATS, training=False, key=True)
_bn("images", *_STATS, shape=(2, 3))
_bn("channels_last", *_STATS, shape=(2, 3), channels_last=True)
_bn("relu", *_STATS, shape=(3,), activation="relu")
_bn("silu", *_STATS, activation="silu")
_bn("residual", *_STATS, "residual", diff=("residual",))
_bn("residual, relu", *_STATS, "residual", diff=("residual",), shape=(3,), activation="relu", key=True)
_bn("residual, silu, evaluation", *_STATS, "residual", diff=("residual",), activation="silu", training=False)
_bn("valid", *_STATS, "valid", shape=(3,))
_bn("groups", *_STATS, groups=3)
_bn("correction", *_STATS, correction=1)
_bn("inplace_activated", *_STATS, shape=(3,), activation="leaky_relu", inplace_activated=True)
_bn("bfloat16", *_STATS, dtype=torch.bfloat16)


def _bn_module(name, cls, shape, *, train=True, key=False, **options):
    def build():
        lazy = cls.__name__.startswith("Lazy")
        module = cls(**options) if lazy else cls(CHANNELS, **options)
        if lazy:
            module(torch.randn(4, CHANNELS, *shape))
        return module.double().train(train)

    def oracle(input, num_batches_tracked, weight, bias, running_mean, running_var):
        momentum = options.get("momentum", 0.1)
        if train:
            num_batches_tracked += 1
        if momentum is None:
            momentum = 1 / num_batches_tracked.item()
        more = {n: v for n, v in options.items() if n != "momentum"}
        return oracles.batch_norm(input, running_mean, running_var, weight, bias, train, momentum, **more)

    _module(
        "bn",
        name,
        _bn_tensors(*STATISTICS, shape=shape),
        ("input", "weight", "bias"),
        build,
        oracle,
        args=("input",),
        key=key,
        unbatched=_PER_CHANNEL,
    )


_bn_module("BatchNorm1d", fused_ops.BatchNorm1d, ())
_bn_module("BatchNorm1d, evaluation", fused_ops.BatchNorm1d, (3,), train=False)
_bn_module("BatchNorm2d, relu", fused_ops.BatchNorm2d, (2, 2), activation="relu")
_bn_module("BatchNorm3d", fused_ops.BatchNorm3d, (2, 1, 2))
_bn_module("SyncBatchNorm of one process", fused_ops.SyncBatchNorm, (2, 2), activation="silu")
_bn_module("momentum=None", fused_ops.BatchNorm1d, (), momentum=None)
_bn_module("LazyBatchNorm1d", fused_ops.LazyBatchNorm1d, ())
_bn_module("LazyBatchNorm2d", fused_ops.LazyBatchNorm2d, (2, 2))
_bn_module("LazyBatchNorm3d", fused_ops.LazyBatchNorm3d, (2, 1, 2), activation="silu")


def _layer_and_norm(name, change, *, train):
    """A linear layer and PyTorch's batch norm, after ``change``, which keeps what they compute."""

    def plain():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.ReLU()).double()
        nn.init.normal_(model[1].weight)
        nn.init.uniform_(model[1].running_var)
        return model.train(train)

    def make(batch, seed):
        return {"input": _normal(_random(seed), batch, CHANNELS)}

    def oracle(input):
        return plain()(input)

    def build():
        return change(plain())

    module = build()

    def ours(input):
        return module(input)

    _add("bn", name, make, ("input",), ours, oracle, module=build)


def _converted(model):
    fused_ops.convert(model)
    return model


_layer_and_norm("fold", fused_ops.fold, train=False)
_layer_and_norm("convert", _converted, train=False)

BY_NAME = {repr(case): case for case in CASES}

"""The error table of docs/reliability.md: every row of it is a call that raises that, here.

``python tests/contracts/test_errors.py`` writes the table.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fused_ops

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- errors -->\n", "<!-- /errors -->"
X, T = torch.zeros(2, 3), torch.tensor([0, 2])
H, W = torch.zeros(2, 4), torch.zeros(3, 4)


class Row(NamedTuple):
    argument: str
    wrong: str
    error: type[Exception]
    args: tuple = ()
    options: dict = {}  # noqa: RUF012


def ce(argument, wrong, error, args=(X, T), **options):
    return Row(argument, wrong, error, args, options)


CROSS_ENTROPY = [
    ce("input", "not a tensor", TypeError, ([1.0], T)),
    ce("input", "no dimension", IndexError, (torch.tensor(1.0), T)),
    ce("input", "not floating-point", NotImplementedError, (X.long(), T)),
    ce("target", "not a tensor", TypeError, (X, [0, 2])),
    ce("target", "a class outside [0, classes)", IndexError, (X, T + 1)),
    ce("target", "another batch size", ValueError, (X, T[:1])),
    ce("target", "of a vector of logits: not one", ValueError, (X[0], T)),
    ce("target", "another shape", RuntimeError, (X[:, :, None].expand(2, 3, 5), T)),
    ce("target", "indices of another dtype", RuntimeError, (X, T.bool())),
    ce("target", "probabilities of an integer dtype", RuntimeError, (X, X.long())),
    ce("target", "a tuple of neither 2 nor 3", TypeError, (X, (T,))),
    ce("weight", "not (classes,)", RuntimeError, weight=torch.ones(4)),
    ce("weight", "requires grad, with class indices", RuntimeError, weight=torch.ones(3, requires_grad=True)),
    ce("weight", "another dtype, with class indices", RuntimeError, weight=torch.ones(3).double()),
    ce("ignore_index", "not an integer", TypeError, ignore_index=1.5),
    ce("ignore_index", "a class, with probabilities", RuntimeError, (X, X), ignore_index=1),
    ce("reduction", "unknown", ValueError, reduction="avg"),
    ce("label_smoothing", "above 1", RuntimeError, label_smoothing=1.5),
    ce("label_smoothing", "not a number", TypeError, label_smoothing="a"),
    ce("z_loss", "not finite", ValueError, z_loss=float("nan")),
    ce("logit_scale", "a tensor", TypeError, logit_scale=torch.ones(())),
    ce("softcap", "not above 0", ValueError, softcap=0.0),
    ce("token_weight", "not the shape of the rows", RuntimeError, token_weight=torch.ones(3)),
    ce("normalizer", "without the mean", ValueError, normalizer=1.0, reduction="sum"),
    ce("normalizer", "more than one element", RuntimeError, normalizer=torch.ones(2)),
    ce("class_mask", "not bool", RuntimeError, class_mask=torch.ones(3)),
    ce("class_mask", "another shape", RuntimeError, class_mask=torch.ones(4, dtype=torch.bool)),
    ce("empty", "unknown", ValueError, empty="no"),
    ce("empty", '"raise", and nothing counts', ValueError, (X, torch.full((2,), -100)), empty="raise"),
    ce("loss_dtype", "not floating-point", TypeError, loss_dtype=torch.int64),
    ce(
        "inplace_backward",
        "input is a leaf that requires grad",
        RuntimeError,
        (X.clone().requires_grad_(), T),
        inplace_backward=True,
    ),
]


def lce(argument, wrong, error, args=(H, W, T), **options):
    return Row(argument, wrong, error, args, options)


LINEAR_CROSS_ENTROPY = [
    lce("input", "not a tensor", TypeError, (None, W, T)),
    lce("input", "not floating-point", NotImplementedError, (H.long(), W.long(), T)),
    lce("linear_weight", "fewer than two dimensions", RuntimeError, (H, W[0], T)),
    lce("linear_weight", "other in_features", RuntimeError, (H, W[:, 1:], T)),
    lce("linear_weight", "another dtype", RuntimeError, (H, W.double(), T)),
    lce("linear_weight", "several positions, input without a batch", RuntimeError, (H[0], W[:, None], T[:1])),
    lce("linear_bias", "another shape", RuntimeError, linear_bias=torch.zeros(4)),
    lce("target", "another batch size", ValueError, (H, W, T[:1])),
    lce("target", "a class outside [0, classes)", IndexError, (H, W, T + 1)),
    lce("ignore_index", "given, with probabilities", RuntimeError, (H, W, X), ignore_index=-100),
    lce("shift", "with another target than class indices", RuntimeError, (H, W, X), shift=True),
    lce("lora", "not (A, B, scale)", TypeError, lora=(1, 2)),
    lce("lora", "other shapes", RuntimeError, lora=(torch.ones(1, 3), torch.ones(3, 1), 1.0)),
    lce("chunk_rows", "below 1", ValueError, chunk_rows=0),
    lce("max_memory_bytes", "below 1", ValueError, max_memory_bytes=0),
    lce("compact", "without reduction", ValueError, compact=True, reduction="none"),
    lce("main_grad", "not a tensor", TypeError, main_grad=1.0),
    lce("main_grad", "another shape", RuntimeError, main_grad=torch.ones(2)),
]
ONES = torch.ones(3)


def bn(argument, wrong, error, args=(X, None, None), **options):
    return Row(argument, wrong, error, args, {"training": True, **options})


BATCH_NORM = [
    bn("input", "not a tensor", TypeError, ([1.0], None, None)),
    bn("input", "fewer than two dimensions", IndexError, (X[0], None, None)),
    bn("input", "not floating-point", NotImplementedError, (X.long(), None, None)),
    bn("input", "one value per channel, in training", ValueError, (X[:1], None, None)),
    bn("running_mean", "without running_var, in training", ValueError, (X, ONES, None)),
    bn("running_mean", "none, in evaluation", RuntimeError, training=False),
    bn("running_mean", "another size", RuntimeError, (X, torch.ones(4), ONES)),
    bn("running_mean", "not one dimension", RuntimeError, (X, ONES[None], ONES)),
    bn("running_mean", "requires grad", RuntimeError, (X, ONES.clone().requires_grad_(), ONES)),
    bn("weight, bias", "not a tensor", TypeError, weight=1.0),
    bn("weight, bias", "another size", RuntimeError, bias=torch.ones(4)),
    bn("weight, bias", "another dtype than input's, or float32 with 16 bit", RuntimeError, weight=ONES.double()),
    bn("training", "not a bool", TypeError, training="yes"),
    bn("momentum", "None, or not a number", TypeError, momentum=None),
    bn("eps", "not above 0, in training", ValueError, eps=0.0),
    bn("eps", "below 0, in evaluation", ValueError, (X, ONES, ONES), training=False, eps=-1.0),
    bn("activation", "unknown", ValueError, activation="swish"),
    bn("residual", "another shape or dtype", RuntimeError, residual=X.double()),
    bn("valid", "not bool or integer", TypeError, valid=torch.ones(2)),
    bn("valid", "another shape", RuntimeError, valid=torch.ones(3, dtype=torch.bool)),
    bn("groups", "below 1", ValueError, groups=0),
]
TABLES = {"cross_entropy": CROSS_ENTROPY, "linear_cross_entropy": LINEAR_CROSS_ENTROPY, "batch_norm": BATCH_NORM}
ROWS = [(op, row) for op, rows in TABLES.items() for row in rows]


@pytest.mark.parametrize(("op", "row"), ROWS, ids=[f"{op}, {r.argument}: {r.wrong}" for op, r in ROWS])
def test_the_error_is_raised(op, row):
    if fused_ops.core.library.missing_reason is not None and row.wrong.startswith("another dtype than input's"):
        pytest.skip("plain PyTorch takes parameters of any dtype")
    with pytest.raises(row.error) as found:
        getattr(fused_ops, op)(*row.args, **row.options)
    assert found.type is row.error
    assert str(found.value)


def table():
    return "".join(f"| {op}: {r.argument} | {r.wrong} | {r.error.__name__} |\n" for op, r in ROWS)


def test_the_page_has_this_table():
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == table(), "python tests/contracts/test_errors.py writes it"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.split(BEGIN)[0] + BEGIN + table() + END + text.split(END)[1])
    sys.exit(0)

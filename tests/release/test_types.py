"""What a type checker says of a user's program, and what help() and repr() show of the public names."""

import inspect
import pydoc
import sys
import typing

import pytest
import torch
from conftest import ROOT
from typing_extensions import is_typeddict

import fused_ops

HEADER = """\
import torch
from torch import Tensor, nn

import fused_ops

x, target, model = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), nn.Sequential(nn.Linear(5, 5))
flag = bool(x.numel())
"""
RIGHT = """\
loss: Tensor = fused_ops.cross_entropy(x, target, reduction="sum", empty="zero", label_smoothing=0.1)
as_pytorch: Tensor = fused_ops.cross_entropy(x, target, None, None, -100, None, "mean", 0.1)
mixed: Tensor = fused_ops.cross_entropy(x, (target, target, 0.3), normalizer=7)
lse: Tensor = fused_ops.cross_entropy(x, target, return_outputs=True).lse
either: Tensor | fused_ops.CrossEntropyOutput = fused_ops.cross_entropy(x, target, return_outputs=flag)
head: Tensor = fused_ops.linear_cross_entropy(x, torch.randn(9, 5), target, chunk_rows=2, lora=None)
entropy: Tensor = fused_ops.linear_cross_entropy(x, torch.randn(9, 5), target, return_outputs=True).entropy
y: Tensor = fused_ops.batch_norm(x, None, None, training=True, activation="gelu")
norm = fused_ops.BatchNorm2d(4, 1e-3, 0.2, device="cpu", activation="silu", groups=2)
lazy = fused_ops.LazyBatchNorm1d(1e-3, activation="elu", alpha=2.0)
sync = fused_ops.SyncBatchNorm(4, activation=None, frozen=True)
criteria = fused_ops.CrossEntropyLoss(reduction="none"), fused_ops.LinearCrossEntropyLoss(5, 9, softcap=30.0)
with fused_ops.patch("cross_entropy"):
    print(fused_ops.convert(model, loss=nn.CrossEntropyLoss()), fused_ops.report(model))
ran: int = len(fused_ops.report(model).fused)
paths: list[str] = fused_ops.revert(model)
folded: nn.Module = fused_ops.fold(model.eval())
"""
WRONG = [
    'fused_ops.batch_norm(x, None, None, training=True, activation="rellu")',
    'fused_ops.BatchNorm2d(4, activation="rellu")',
    'fused_ops.BatchNorm2d(4, activaton="relu")',
    "fused_ops.BatchNorm1d()",
    'fused_ops.LazyBatchNorm2d(activation="rellu")',
    'fused_ops.SyncBatchNorm(4, activation="rellu")',
    'fused_ops.cross_entropy(x, target, reduction="avg")',
    'fused_ops.cross_entropy(x, target, empty="skip")',
    "fused_ops.cross_entropy(x, target, z_los=0.1)",
    "fused_ops.cross_entropy(x, (target,))",
    "fused_ops.cross_entropy(x, target).lse",
    "fused_ops.cross_entropy(x, target, return_outputs=True).backward()",
    'fused_ops.linear_cross_entropy(x, torch.randn(9, 5), target, reduction="avg")',
    "fused_ops.linear_cross_entropy(x, torch.randn(9, 5), target, chunks=2)",
    'fused_ops.CrossEntropyLoss(reduction="avg")',
    "fused_ops.LinearCrossEntropyLoss(5, 9, soft_cap=30.0)",
    "fused_ops.convert(model, head=3)",
    "fused_ops.report().fused",
    'fused_ops.patch("crossentropy")',
]


def test_a_type_checker_finds_what_is_wrong_and_nothing_else(run_python, tmp_path):
    """Of mypy --strict; pyright in strict mode finds the same."""
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(HEADER + RIGHT + "\n".join(WRONG) + "\n", encoding="utf-8")
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'users'}"  # of torch, which takes most of the time
    said = run_python(
        "-m", "mypy", "--strict", "--config-file=", cache, "program.py", cwd=tmp_path, check=False, MYPYPATH=str(ROOT)
    ).stdout.splitlines()
    first = len((HEADER + RIGHT).splitlines()) + 1
    errors = {int(line.split(":")[1]): line for line in said if line.startswith("program.py:") and ": error: " in line}
    assert [line for number, line in errors.items() if number < first] == []
    assert [text for i, text in enumerate(WRONG, first) if i not in errors] == []


def test_the_program_runs_where_it_is_right():
    exec(compile(HEADER + RIGHT, "program.py", "exec"), {})


def unpacked(hint):
    """The TypedDict of ``**options: Unpack[...]``."""
    return typing.get_args(hint)[0]


@pytest.mark.parametrize("name", [name for name in fused_ops.__all__ if name != "CrossEntropyOutput"])
def test_signatures_name_every_argument_and_annotations_can_be_read(name):
    public = getattr(fused_ops, name)
    called = public.__init__ if inspect.isclass(public) else public
    parameters = [p for p in inspect.signature(called).parameters.values() if p.name != "self"]
    hints = typing.get_type_hints(called)
    assert {p.name for p in parameters} <= set(hints)
    for more in (p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)):
        assert name == "patch" or is_typeddict(unpacked(hints[more.name])), more


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is of Python 3.11")
def test_overloads_take_what_the_function_takes(op):
    """An argument that a checker does not know of could not be used; one that is not there could be."""
    function = getattr(fused_ops, op)
    taken = typing.get_type_hints(function)
    overloads = typing.get_overloads(function)
    assert len(overloads) == 3
    for overload in overloads:
        hints = typing.get_type_hints(overload)
        (options,) = [
            hints.pop(p.name) for p in inspect.signature(overload).parameters.values() if p.kind is p.VAR_KEYWORD
        ]
        options = typing.get_type_hints(typing.get_args(options)[0] if typing.get_args(options) else options)
        apart = ("return_outputs", "return")
        assert {k: v for k, v in {**hints, **options}.items() if k not in apart} == {
            k: v for k, v in taken.items() if k not in apart
        }


def test_help_begins_with_the_public_names():
    text = pydoc.plain(pydoc.render_doc(fused_ops))
    head = text[: text.index("PACKAGE CONTENTS")]
    assert [name for name in fused_ops.__all__ if name not in head] == []
    assert len(head.splitlines()) < 40


def test_reprs_are_short():
    logits, target = torch.randn(300, 70, requires_grad=True), torch.randint(70, (300,))
    out = fused_ops.cross_entropy(logits, target, return_outputs=True)
    assert "loss=tensor(" in repr(out) and "lse=<float32 (300,)>" in repr(out) and len(repr(out)) < 400
    assert repr(fused_ops.CrossEntropyLoss()) == "CrossEntropyLoss()"
    head = repr(fused_ops.LinearCrossEntropyLoss(4, 9, softcap=30.0)).splitlines()
    assert head[1].strip() == "in_features=4, num_classes=9, softcap=30.0"
    assert repr(fused_ops.BatchNorm1d(4, activation="relu")).endswith(", activation=relu)")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    report = fused_ops.convert(model)
    assert repr(report) == "<Report: 2 replaced, 0 left alone, 0 ran fused>"
    model(torch.randn(3, 4))
    assert repr(report) == "<Report: 2 replaced, 0 left alone, 1 ran fused>"
    assert repr(fused_ops.report()).startswith("<GraphReport: ")


KINDS = [name for name in fused_ops.__all__ if inspect.isclass(getattr(fused_ops, name)) and hasattr(torch.nn, name)]


@pytest.mark.parametrize("name", KINDS)
def test_a_module_is_built_as_pytorchs(name):
    """Its arguments by their names, order and defaults; what is this package's comes by keyword alone."""
    theirs, ours = (inspect.signature(getattr(package, name).__init__).parameters for package in (torch.nn, fused_ops))
    for parameter in theirs.values():
        found = ours[parameter.name]
        assert (found.kind, found.default) == (parameter.kind, parameter.default)
    positional = [[p.name for p in of.values() if p.kind is p.POSITIONAL_OR_KEYWORD] for of in (theirs, ours)]
    assert positional[0] == positional[1]


@pytest.mark.parametrize("name", [name for name in KINDS if "Norm" in name])
def test_a_batch_norm_without_bias(name):
    kind = getattr(torch.nn, name)
    if "bias" not in inspect.signature(kind.__init__).parameters:
        pytest.skip("this torch has no batch norm without bias")
    sizes = () if name.startswith("Lazy") else (3,)
    norm = getattr(fused_ops, name)(*sizes, bias=False, activation="relu")
    x = torch.randn(4, 3, *{"2d": (5, 5), "3d": (5, 5, 5)}.get(name[-2:], ()))
    expected = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
    torch.testing.assert_close(norm(x), expected)
    assert norm.bias is None and norm.weight is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'activaton'"):
        getattr(fused_ops, name)(*sizes, activaton="relu")

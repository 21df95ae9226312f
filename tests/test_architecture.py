"""The layout of the package as a contract: one file of the same name per op in each place, one-way dependencies."""

import ast
import re

import pytest
from conftest import ROOT

import fused_ops

OPS = sorted(path.stem for path in (ROOT / "fused_ops" / "reference").glob("[a-z]*.py"))
PLACES = (
    "fused_ops/{}.py",
    "fused_ops/reference/{}.py",
    "csrc/{}.h",
    "csrc/{}.cpp",
    "csrc/cpu/{}.cpp",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
    "docs/{}.md",
)


def test_there_are_ops():
    assert {"batch_norm", "cross_entropy"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_file_in_each_place(op):
    assert [place.format(op) for place in PLACES if not (ROOT / place.format(op)).exists()] == []
    assert op in fused_ops.__all__
    lines = [
        line for line in (ROOT / "fused_ops" / "__init__.py").read_text().splitlines() if f"fused_ops.{op} " in line
    ]
    assert len(lines) == 1


def includes(path):
    return re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text())


def test_no_tensor_below_the_contract():
    files = [*(ROOT / "csrc" / "cpu").iterdir(), *(ROOT / "csrc" / f"{op}.h" for op in OPS)]
    files += [ROOT / "csrc" / "dtype.h", ROOT / "csrc" / "isa.h"]
    assert len(files) > 6
    assert {str(path): [i for i in includes(path) if "torch" in i or "c10" in i or "ATen" in i] for path in files} == {
        str(path): [] for path in files
    }


def test_no_pybind_and_no_python_header():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "pybind11" not in text and "Python.h" not in text and "torch/extension.h" not in text, path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_references_import_nothing_of_the_package_above_them():
    for path in (ROOT / "fused_ops" / "reference").glob("*.py"):
        above = [m for m in imported(path) if m.startswith("fused_ops") and not m.startswith("fused_ops.reference")]
        assert above == [], path


def test_ops_do_not_import_each_other_or_the_tools():
    for op in OPS:
        forbidden = {"fused_ops", "fused_ops.testing", *(f"fused_ops.{other}" for other in OPS if other != op)}
        assert forbidden & set(imported(ROOT / "fused_ops" / f"{op}.py")) == set()

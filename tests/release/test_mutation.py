"""docs/reliability.md names tests that exist; the seeded faults of tests/mutation can be seeded into today's code."""

import ast
import re
from collections import Counter

import pytest
from conftest import ROOT
from mutation.faults import EQUIVALENT, PER_FUNCTION, draw, missing
from mutation.operators import edits

PAGE = ROOT / "docs" / "reliability.md"

PYTHON = """
def other(a):
    return a + 1

def f(a: int = 2):
    assert a > 3
    if a and g(a) == -a:  # * and
        h(a)
    b = (a) - a
    b += a
    return b if b is None else a / b
"""
CPP = """
int other(int a) { return a + 1; }
/* f(a) { a + a } */
template <typename T>
inline double f(const T* a, int n) {  // a + a
  double s = 0;
  for (int i = 0; i < n; ++i) s += a[i] * 2.0f;
  if (s == n || n > 3) store(a, s);
  s = s / n;
  return s;
}
double g(int n) { return f(nullptr, n) + 1; }
"""


def seeded(source, name, python):
    return {(e.operator, e.apply(source)) for e in edits(source, name, python)}


def replaced(source, pairs):
    return {(operator, source.replace(old, new)) for operator, old, new in pairs}


def test_faults_of_python():
    assert seeded(PYTHON, "f", True) == replaced(
        PYTHON,
        [
            ("logic", "a and g", "a or g"),
            ("compare", "==", "!="),
            ("negative", "== -a", "==  a"),
            ("condition", "a and g(a) == -a", "(not (a and g(a) == -a))"),
            ("drop", "h(a)", "pass"),
            ("sign", "(a) - a", "(a) + a"),
            ("drop", "b += a", "pass"),
            ("condition", "b is None", "(not (b is None))"),
            ("compare", "is None", "is not None"),
            ("factor", "a / b", "a * b"),
        ],
    )


def test_faults_of_cpp():
    assert seeded(CPP, "f", False) == replaced(
        CPP,
        [
            ("constant", "s = 0", "s = (0 + 1)"),
            ("constant", "i = 0", "i = (0 + 1)"),
            ("bound", "i < n", "i + 1 < n"),
            ("sign", "s +=", "s -="),
            ("index", "a[i]", "a[0]"),
            ("factor", "a[i] *", "a[i] /"),
            ("constant", "2.0f", "(2.0f + 1)"),
            ("drop", "s += a[i] * 2.0f;", ";"),
            ("compare", "s == n", "s != n"),
            ("logic", "||", "&&"),
            ("compare", "n > 3", "n <= 3"),
            ("constant", "> 3", "> (3 + 1)"),
            ("condition", "s == n || n > 3", "!(s == n || n > 3)"),
            ("drop", "store(a, s);", ";"),
            ("drop", "s = s / n;", ";"),
            ("factor", "s / n", "s * n"),
        ],
    )


def test_every_named_function_is_there():
    """Where one was renamed, name it anew in tests/mutation/faults.py."""
    assert missing(ROOT) == []


@pytest.fixture(scope="module")
def chosen():
    return draw(ROOT)


def test_every_op_has_its_faults(chosen):
    faults = [f for place in chosen for f in place[:PER_FUNCTION]]
    counts = Counter((f.suite, f.file.endswith(".py")) for f in faults)
    assert len(faults) >= 150 and counts["guard", False] >= 4
    assert all(counts[suite, python] >= 10 for suite in ("ce", "bn", "lce") for python in (True, False))


def test_every_fault_is_one(chosen):
    for fault in (f for place in chosen for f in place[:PER_FUNCTION]):
        source = (ROOT / fault.file).read_text()
        assert fault.edit.apply(source) != source
        if fault.file.endswith(".py"):
            ast.parse(fault.edit.apply(source))


def test_what_is_known_to_change_nothing_is_still_there():
    """A line that has moved or changed makes another fault of it: look again."""
    names = {f"{path.stem}" for path in ROOT.rglob("*.*") if path.suffix in (".py", ".cpp", ".h")}
    assert {name.split(".")[0] for name in EQUIVALENT} <= names


def test_the_page_shows_no_fault_that_nothing_noticed():
    """``python -m tests.mutation --resume --write`` writes it."""
    text = PAGE.read_text().split("<!-- mutants -->")[1].split("<!-- /mutants -->")[0]
    assert "**nothing**" not in text


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"((?:\w+/)?test_\w+\.py)::(test_\w+)", PAGE.read_text())
    assert len(named) > 50
    for file, function in set(named):
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), f"{file}::{function}"

"""docs/reliability.md names tests that exist; the seeded faults of tests/mutation are faults of today's code."""

import re

from conftest import ROOT
from mutation.mutants import MUTANTS, misplaced

PAGE = ROOT / "docs" / "reliability.md"


def test_every_fault_can_be_seeded():
    """Where the code has changed, change tests/mutation/mutants.py with it."""
    assert not misplaced(ROOT)
    assert len({(m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 60
    assert all(m.old != m.new for m in MUTANTS)


def test_the_page_shows_no_fault_that_nothing_noticed():
    """``python -m tests.mutation --resume --write`` writes it."""
    text = PAGE.read_text().split("<!-- mutants -->")[1].split("<!-- /mutants -->")[0]
    assert "**nothing**" not in text and text.count("::test_") >= 60


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"((?:\w+/)?test_\w+\.py)::(test_\w+)", PAGE.read_text())
    assert len(named) > 150
    for file, function in set(named):
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), f"{file}::{function}"

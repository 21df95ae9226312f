"""The seeded faults of tests/mutation are faults of today's code, and the page has the outcome of each."""

from pathlib import Path

from conftest import ROOT
from mutation.mutants import MUTANTS, misplaced

PAGE = ROOT / "docs" / "reliability.md"


def test_every_fault_can_be_seeded():
    """Where the code has changed, change tests/mutation/mutants.py with it."""
    assert not misplaced(ROOT)
    assert len({(m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 60
    assert all(m.old not in m.new or m.old != m.new for m in MUTANTS)


def test_the_page_shows_that_every_fault_is_noticed():
    """``python -m tests.mutation --resume --write`` writes it."""
    text = PAGE.read_text().split("<!-- mutants -->")[1].split("<!-- /mutants -->")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert "**nothing**" not in text
    assert sorted((file, fault) for file, fault, _ in rows) == sorted((m.file, m.name) for m in MUTANTS)
    for _, _, test in rows:
        name = test.strip("`").split(" (")[0].split("[")[0]
        file, function = name.split("::") if "::" in name else (name.removeprefix("import of "), None)
        source = Path(ROOT / "tests" / Path(file).name).read_text()
        assert function is None or f"def {function}(" in source, test

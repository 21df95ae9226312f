"""The notebook is the walk-through: its cells are made of the same lines, and they run."""

import json

import pytest
from conftest import ROOT

from fused_ops.examples.backprop_by_hand import notebook
from fused_ops.examples.backprop_by_hand.gradients import GRADIENTS

COMMITTED = ROOT / "examples" / "backprop_by_hand.ipynb"
STEPS = 20_000


def test_every_gradient_is_found_once_and_has_its_formula():
    found = [name for _, _, names in notebook.backward_steps() for name in names]
    assert sorted(found) == sorted(GRADIENTS) == sorted(notebook.FORMULAS)


def test_the_committed_notebook_is_what_the_code_gives():
    """Else: make notebook."""
    cells = json.loads(COMMITTED.read_text(encoding="utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [
        (kind, text.strip("\n")) for kind, text in notebook.cells(STEPS)
    ]
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))
    assert "26 gradients:" in COMMITTED.read_text(encoding="utf-8")


def test_it_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the notebook's tools come with make docs")
    pytest.importorskip("nbclient", reason="the notebook's tools come with make docs")
    pytest.importorskip("ipykernel", reason="the notebook's tools come with make docs")
    pytest.importorskip("pyarrow")
    assert notebook.main([str(tmp_path / "made.ipynb"), "--steps", "200"]) == 0
    made = nbformat.read(tmp_path / "made.ipynb", as_version=4)
    text = "".join(o.get("text", "") for cell in made.cells for o in cell.get("outputs", ()))
    assert text.count("True") >= 26 and "parameters of the two runs differ by at most" in text
    pictures = [o for cell in made.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2

"""Every program in the README and on the pages runs as it stands there."""

import ast
import importlib.util
import re

import pytest
from conftest import ROOT

PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs():
    """(page, number, text) of each block that imports what it uses; the others show a line or two of one."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, found in enumerate(PROGRAM.finditer(page.read_text(encoding="utf-8")), 1):
            if re.search(r"^import (fused_ops|torch)$", found.group(1), re.MULTILINE) and "..." not in found.group(1):
                name = f"{page.relative_to(ROOT).with_suffix('').as_posix()}-{number}"
                yield pytest.param(found.group(1), id=name)


def missing(text):
    """The packages that a program imports and this machine has not."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    if "Trainer" in text:
        names.add("accelerate")
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


@pytest.mark.parametrize("text", list(programs()))
def test_a_program_runs(text, run_python, tmp_path):
    if absent := missing(text):
        pytest.skip(f"without {', '.join(absent)}")
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    run_python("program.py", cwd=tmp_path)

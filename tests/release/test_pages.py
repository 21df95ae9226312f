"""Every program in the README and on the pages runs as it stands there."""

import ast
import re

import pytest
from conftest import ROOT

from benchmarks.torchvision_without_ops import is_installed

PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs():
    """(page, number, text) of each block that imports what it uses; the others show a line or two of one."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, found in enumerate(PROGRAM.finditer(page.read_text(encoding="utf-8")), 1):
            if re.search(r"^import (fused_ops|torch)$", found.group(1), re.MULTILINE) and "..." not in found.group(1):
                name = f"{page.relative_to(ROOT).with_suffix('').as_posix()}-{number}"
                yield pytest.param(found.group(1), id=name)


WANT_TORCHVISION = {"torchvision", "timm", "segmentation_models_pytorch"}
# Beside any torch (benchmarks/torchvision_without_ops.py).
WITH_TORCHVISION = """
import runpy
from benchmarks.torchvision_without_ops import import_torchvision
import_torchvision()
runpy.run_path("program.py", run_name="__main__")
"""
# A program on several processes. What it holds at its end, a model or a DTensor, keeps the group's threads alive after
# destroy_process_group, and they abort the process now and then where Python takes it down (pytorch/pytorch#190489).
ON_A_RANK = """
import os, runpy, sys
runpy.run_path("program.py", run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


def imported(text):
    """The packages that a program needs."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    names |= {"accelerate"} if "Trainer" in text else set()
    return names | {"onnx", "onnxscript"} if "torch.onnx.export" in text else names


@pytest.mark.parametrize("text", list(programs()))
def test_a_program_runs(text, run_python, tmp_path):
    packages = imported(text)
    if absent := sorted(name for name in packages if not is_installed(name)):
        pytest.skip(f"without {', '.join(absent)}")
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    command = ("program.py",)
    if packages & WANT_TORCHVISION:
        command = ("-c", WITH_TORCHVISION)
    elif "init_process_group" in text:
        (tmp_path / "rank.py").write_text(ON_A_RANK, encoding="utf-8")
        command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py")
    run_python(*command, cwd=tmp_path)

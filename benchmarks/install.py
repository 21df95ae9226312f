"""What installing and importing the package costs."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .machine import ROOT
from .results import Row

_IMPORT = "import time, torch; t = time.perf_counter(); import fused_ops; print((time.perf_counter() - t) * 1e3)"


def measure(import_runs: int = 5) -> list[Row]:
    """Build time of a clean tree, wheel size, native library size and the import time beyond torch's own."""
    return [*_build(), {"quantity": "import after torch (median)", "value": _import_ms(import_runs), "unit": "ms"}]


def _build() -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree / name)
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("fused_ops", "csrc", "examples"):
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        command = ["setup.py", "-q", "bdist_wheel", "--dist-dir", f"{scratch}/dist"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            return [{"quantity": "build", "value": None, "unit": f"failed: {done.stderr.strip().splitlines()[-1]}"}]
        wheel = next((Path(scratch) / "dist").glob("*.whl"))
        libraries = list((tree / "build").rglob("_C*.so"))
        return [
            {"quantity": "build of a wheel, clean tree", "value": round(seconds, 1), "unit": "s"},
            {"quantity": "wheel", "value": round(wheel.stat().st_size / 1024), "unit": "KiB"},
            {"quantity": "native library", "value": round(max((p.stat().st_size for p in libraries), default=0) / 1024),
             "unit": "KiB"},
        ]  # fmt: skip


def _import_ms(runs: int) -> float:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found = [
        float(subprocess.run([sys.executable, "-c", _IMPORT], env=environment, capture_output=True, check=True).stdout)
        for _ in range(runs)
    ]
    return round(statistics.median(found), 1)

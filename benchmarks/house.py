"""How much there is to read, to build and to carry: ``python -m benchmarks.house [TREE] [--no-build]``.

Prints a table of this tree, or of another checkout of the package, so that two commits can be laid side by side. A
build from nothing in a copy of the tree gives its CPU-seconds, the library's size, and how many translation units each
source is part of.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

TREES = ("fused_ops", "csrc", "tests", "benchmarks", "examples")
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".c"}
ALIKE = 6  # lines in a row that stand in two places
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_ops", "csrc", "examples")


def files(tree: Path, folder: str) -> list[Path]:
    return sorted(p for p in (tree / folder).rglob("*") if p.suffix in SOURCES)


def lines(path: Path) -> list[str]:
    """Without indentation, blank lines, comments of whole lines, includes and imports."""
    stripped = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [s for s in stripped if s and not re.match(r"#|//|import |from |using ", s)]


def duplicates(tree: Path) -> int:
    """Pairs of places in the package with ALIKE or more lines in common, none of them only brackets."""
    places = defaultdict(list)
    for path in (*files(tree, "fused_ops"), *files(tree, "csrc")):
        text = [line for line in lines(path) if re.search(r"\w{2}", line)]
        for i in range(len(text) - ALIKE + 1):
            places[tuple(text[i : i + ALIKE])].append((path, i))
    pairs = {(a, b) for found in places.values() for n, a in enumerate(found) for b in found[n + 1 :]}
    follow = {((a, i + 1), (b, j + 1)) for (a, i), (b, j) in pairs}
    return len(pairs - follow)


def opened(tree: Path) -> Iterator[tuple[str, str]]:
    """The files behind a call of each op on the CPU, as tests/test_architecture.py counts them."""
    path = tree / "tests" / "test_architecture.py"
    if "def files_of" not in path.read_text(encoding="utf-8"):
        return
    sys.path[:0] = [str(tree), str(tree / "tests")]
    spec = importlib.util.spec_from_file_location("architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in module.OPS:
        python, cpp = module.files_of(op)
        length = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (*python, *cpp))
        yield f"files behind {op}", f"{len(python)} Python + {len(cpp)} C++ = {len(python) + len(cpp)}, {length} lines"


def build(tree: Path) -> Iterator[tuple[str, str]]:
    """From nothing, for this machine's processor and compiler."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in filter(lambda n: (tree / n).exists(), BUILT_FROM):
            if (tree / name).is_dir():
                shutil.copytree(tree / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(tree / name, copy / name)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "FUSED_OPS_BUILD": "1", "FUSED_OPS_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        yield "build, CPU-seconds", f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f}"
        yield "warnings", str((done.stdout + done.stderr).count(" warning: "))
        yield "library, bytes", f"{(copy / 'fused_ops' / '_C.so').stat().st_size:,}"
        objects = list((copy / "build").rglob("*.o"))
        yield "translation units", str(len(objects))
        part_of: Counter[str] = Counter()
        for stamp in (o.with_suffix(".json") for o in objects):
            if stamp.exists():
                part_of.update(n for n in json.loads(stamp.read_text())["files"] if n.startswith("csrc/"))
        for kind in (".cpp", ".h"):
            counts = sorted(n for name, n in part_of.items() if name.endswith(kind)) or [len(objects)]
            yield (
                f"units compiled again, a {kind}",
                f"{counts[0]} to {counts[-1]}, median {statistics.median(counts):g}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--no-build", action="store_true", help="only what can be read")
    options = parser.parse_args()
    tree = options.tree.resolve()
    rows = list(opened(tree))
    for folder in TREES:
        found = files(tree, folder)
        rows.append((folder, f"{len(found)} files, {sum(len(p.read_text().splitlines()) for p in found)} lines"))
    rows.append((f"pairs of {ALIKE} or more lines alike", str(duplicates(tree))))
    rows += [] if options.no_build else list(build(tree))
    for name, value in rows:
        print(f"{name:38} {value}", flush=True)


if __name__ == "__main__":
    main()

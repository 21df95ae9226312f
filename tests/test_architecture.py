"""The layout of the package as a contract: a folder an op in each place, and dependencies that go one way."""

import ast
import importlib.machinery
import pickle
import re
import sys

import pytest
import torch
from conftest import ROOT
from torch import fx

import fused_ops

PACKAGE, CSRC = ROOT / "fused_ops", ROOT / "csrc"
MADE_OF = {"cross_entropy": set(), "batch_norm": set(), "linear_cross_entropy": {"cross_entropy"}}
OPS = sorted(MADE_OF)
PLACES = (
    *("fused_ops/ops/{}/api.py", "fused_ops/ops/{}/reference.py", "fused_ops/ops/{}/functions.py"),
    *("fused_ops/ops/{}/modules.py", "csrc/{}/kernels.h", "csrc/{}/op.cpp", "csrc/{}/op_cuda.cpp"),
    *("csrc/{}/cpu", "csrc/{}/cuda", "tests/{0}/test_{0}.py", "benchmarks/bench_{}.py", "docs/{}.md"),
)
# Files that a call of an op may come through on the CPU. These numbers only fall: see the end of this file.
# They rose once, by three each, with what an op over process groups needs (its file of collectives, its formulas, and
# its ops; linear cross-entropy's by one more, its ops over them), and by one each with what it makes of DTensors. An
# eager call of one process runs through none of them. And by one each when long files of plain PyTorch were divided.
READ_AT_MOST = {"batch_norm": 45, "cross_entropy": 40, "linear_cross_entropy": 55}
# The same of one eager call: files of Python in which code runs, and those of C++ behind the binding and the kernels.
# Linear cross-entropy's rose by one, with the dtypes that a device has: one place for all ops says them.
OPENED_AT_MOST = {"batch_norm": 46, "cross_entropy": 28, "linear_cross_entropy": 41}
PLAIN_PYTORCH = {"reference", "rows_reference", "shards_reference", "ranks_reference"}
PLAIN_PYTORCH |= {"derivatives", "activations", "samples", "row", "keep_output_reference", "backward_reference"}
TWINS = {"vec_avx512.h", "vec_avx2.h", "vec_neon.h"}  # of csrc/simd/vec_generic.h, which says what each function does
FOR_PLAIN_PYTORCH = {"fused_ops.core.sample", "fused_ops.core.memory_format", "fused_ops.core.torch_private"}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_files_in_each_place(op):
    assert [place.format(op) for place in PLACES if not (ROOT / place.format(op)).exists()] == []
    assert op in fused_ops.__all__


def test_every_op_is_known_here():
    assert sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py")) == OPS
    assert sorted(path.parent.name for path in CSRC.glob("*/op.cpp")) == OPS


# ---- Python


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path):
    """The package's modules that a file imports anywhere in it, in functions too; packages that only lead there not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def level_of(module):
    """(height, part of the package): imports go down, or stay in one part."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ("__main__", "testing"):
        return 5, "the package"
    if parts[0] == "ops" and len(parts) > 1:
        return 3 if MADE_OF[parts[1]] else 2, parts[1]
    return {"core": 0, "distributed": 1, "ops": 2, "conversion": 4}[parts[0]], parts[0]


def closure(start, edges):
    found, todo = set(), list(start)
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += edges(here)
    return found


def test_imports_go_one_way():
    wrong = []
    for module, others in IMPORTS.items():
        height, part = level_of(module)
        wrong += [f"{module} imports {o}" for o in others if level_of(o)[1] != part and level_of(o)[0] >= height]
    assert wrong == []


@pytest.mark.parametrize("op", OPS)
def test_an_op_uses_only_the_ops_it_is_made_of(op):
    start = [m for m in MODULES if m.startswith(f"fused_ops.ops.{op}.")]
    used = {level_of(m)[1] for m in closure(start, IMPORTS.get) if m.startswith("fused_ops.ops.")}
    assert used <= {op, *MADE_OF[op]}


def test_no_file_imports_one_that_imports_it():
    around = [m for m in MODULES if level_of(m)[0] < 5 and m in closure(IMPORTS[m], IMPORTS.get)]
    assert around == []


def test_plain_pytorch_stands_on_nothing():
    for module, others in IMPORTS.items():
        if module.startswith("fused_ops.ops.") and module.rsplit(".", 1)[1] in PLAIN_PYTORCH:
            above = {m for m in others - FOR_PLAIN_PYTORCH if m.rsplit(".", 1)[1] not in PLAIN_PYTORCH}
            assert above == set(), module


def test_only_the_top_reaches_modules_by_a_string():
    for module, path in MODULES.items():
        if level_of(module)[0] < 5:
            assert not re.search(r"import_module\(|__import__\(|[\"']fused_ops\.\w+\.", path.read_text()), module


# ---- what users see


@pytest.mark.parametrize("name", fused_ops.__all__)
def test_no_public_name_is_a_module(name):
    assert importlib.machinery.PathFinder.find_spec(f"fused_ops.{name}", fused_ops.__path__) is None
    assert pickle.loads(pickle.dumps(getattr(fused_ops, name))) is getattr(fused_ops, name)


def test_a_graph_of_torch_fx_that_calls_a_public_function_can_be_pickled():
    def calls(x, target, w):
        return fused_ops.cross_entropy(fused_ops.batch_norm(x, None, None, training=True), target) + (
            fused_ops.linear_cross_entropy(x, w, target)
        )

    graph = fx.Graph()
    x, target, w = map(graph.placeholder, ("x", "target", "w"))
    y = graph.call_function(fused_ops.batch_norm, (x, None, None), {"training": True})
    losses = [
        graph.call_function(fused_ops.cross_entropy, (y, target)),
        graph.call_function(fused_ops.linear_cross_entropy, (x, w, target)),
    ]
    graph.output(graph.call_function(torch.add, tuple(losses)))
    module = fx.GraphModule(torch.nn.Module(), graph)
    values = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 1]), torch.randn(5, 5, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*values), calls(*values))


# ---- C++


def included(path):
    """Files of csrc that a file includes: every include of ours is written from csrc."""
    names = re.findall(r'#include\s+"([^"]+)"', path.read_text())
    assert [n for n in names if not (CSRC / n).exists()] == [], path
    return {CSRC / n for n in names}


SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))


def cpp_level_of(path):
    """core < simd < contract < arithmetic < binding, and the op, None of core and simd."""
    folder, *rest = path.relative_to(CSRC).parts
    if folder in ("core", "simd"):
        return ("core", "simd").index(folder), None
    return (3 if rest[0] in ("cpu", "cuda") else 2 if rest[0].endswith("kernels.h") else 4), folder


def test_includes_go_one_way():
    wrong = []
    for path in SOURCES:
        height, op = cpp_level_of(path)
        for other in included(path):
            lower, other_op = cpp_level_of(other)
            if lower > height or (other_op is not None and other_op not in {op, *MADE_OF.get(op, ())}):
                wrong.append(f"{path.relative_to(CSRC)} includes {other.relative_to(CSRC)}")
    assert wrong == []


def test_no_tensor_below_the_contract():
    below = [p for p in SOURCES if 0 < cpp_level_of(p)[0] < 4]
    assert len(below) > 40
    for path in below:
        for file in closure([path], included):
            found = re.findall(r"#include\s+<((?:torch|ATen|c10)/[^>]*)>", file.read_text())
            assert found == [], f"{path} through {file}"


def test_no_pybind_and_no_python_header():
    for path in SOURCES:
        text = path.read_text()
        assert "pybind11" not in text and "Python.h" not in text and "torch/extension.h" not in text, path


# ---- how much there is to read


def files_of(op):
    """What stands behind a call of an op on the CPU: what its public function imports, and its kernels include."""
    python = {MODULES[m] for m in closure([f"fused_ops.ops.{op}.api"], IMPORTS.get)}
    patterns = [f"{name}/{files}" for name in (op, *MADE_OF[op]) for files in ("*op.cpp", "cpu/*.cpp")]
    found = closure([path for pattern in patterns for path in CSRC.glob(pattern)], included)
    return python, {path for path in found if path.name not in TWINS}


@pytest.mark.parametrize("op", OPS)
def test_a_reader_opens_no_more_files_than_before(op):
    """Shown by ``pytest -s``; the numbers above may only fall."""
    python, cpp = files_of(op)
    print(f"{op}: {len(python)} files of Python, {len(cpp)} of C++")
    assert len(python) + len(cpp) <= READ_AT_MOST[op]


def run_by(call):
    """Files of the package in which code runs during a call and its backward."""
    files = set()

    def note(frame, event, _):
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call().backward()
    finally:
        sys.setprofile(None)
    return {path for path in MODULES.values() if str(path) in files}


CALLS = {
    "batch_norm": lambda x, _, __: fused_ops.batch_norm(x, None, None, training=True).sum(),
    "cross_entropy": lambda x, _, target: fused_ops.cross_entropy(x, target),
    "linear_cross_entropy": lambda x, w, target: fused_ops.linear_cross_entropy(x, w, target, chunk_rows=4),
}


@pytest.mark.parametrize("op", OPS)
def test_an_eager_call_runs_through_no_more_files_than_before(op):
    x, w = torch.randn(64, 600, requires_grad=True), torch.randn(600, 600, requires_grad=True)
    target = torch.randint(0, 600, (64,))
    CALLS[op](x, w, target)
    python, (_, cpp) = run_by(lambda: CALLS[op](x, w, target)), files_of(op)
    print(f"{op}: code of {len(python)} files of Python, {len(cpp)} of C++")
    assert len(python) > 0 and len(python) + len(cpp) <= OPENED_AT_MOST[op]

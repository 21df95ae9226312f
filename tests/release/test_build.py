"""What a build compiles again, and what it does where it cannot: setup.py with a compiler that only notes its calls."""

import importlib.util
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Stands in for a C++ compiler: notes the source, writes the object and the list of what was included.
COMPILER = """#!{python} -IS
import pathlib, re, sys
arguments = sys.argv[1:]
if "--version" in arguments:
    sys.exit(print("{version}"))
source, output, listed = (pathlib.Path(arguments[arguments.index(flag) + 1]) for flag in ("-c", "-o", "-MF"))
files = [source]
for path in files:
    files += [path.parent / name for name in re.findall(r'#include "(.*)"', path.read_text())]
output.write_text("half")
if "error" in source.read_text():
    sys.exit("an error in " + str(source))
with open("compiled", "a") as log:
    print(output, file=log)
output.write_text("whole")
listed.write_text(str(output) + ": " + " ".join(str(path).replace(" ", "\\\\ ") for path in files))
"""


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_of_fused_ops", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its own module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Tree:
    """Two kernels, a header of one and a header of both, and the fake compiler, in the current folder."""

    def __init__(self, build):
        self.build, self.flags = build, ["-O2"]
        Path("csrc").mkdir()
        Path("csrc/both.h").write_text("")
        Path("csrc/one.h").write_text('#include "both.h"')
        Path("csrc/a.cpp").write_text('#include "one.h"')
        Path("csrc/b c.cpp").write_text('#include "both.h"')
        self.write_compiler("1.0")

    def write_compiler(self, version):
        path = Path("c++").resolve()
        path.write_text(COMPILER.format(python=sys.executable, version=version))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.compiler = str(path)
        self.build.compiler_version.cache_clear()

    def units(self, torch="2.13.0"):
        versions = [self.build.compiler_version(self.compiler), torch]
        return [
            self.build.Unit(str(source), Path("build", isa, source.stem + ".o"), [self.compiler, *self.flags], versions)
            for isa in ("AVX2", "DEFAULT")
            for source in sorted(Path("csrc").glob("*.cpp"))
        ]

    def compiled(self, **kwargs):
        """Builds; returns which objects were made."""
        Path("compiled").unlink(missing_ok=True)
        self.build.compile_units(self.units(**kwargs))
        return sorted(Path("compiled").read_text().splitlines()) if Path("compiled").exists() else []


ALL = ["build/AVX2/a.o", "build/AVX2/b c.o", "build/DEFAULT/a.o", "build/DEFAULT/b c.o"]


@pytest.fixture
def tree(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAX_JOBS", "2")
    made = Tree(build)
    assert made.compiled() == ALL
    assert made.compiled() == []
    return made


@pytest.mark.parametrize(
    ("edited", "expected"), [("a.cpp", "a.o"), ("b c.cpp", "b c.o"), ("one.h", "a.o"), ("both.h", ".o")]
)
def test_an_edit_compiles_what_includes_the_file(edited, expected, tree):
    with open(Path("csrc", edited), "a") as file:
        file.write("\n// edited")
    assert tree.compiled() == [name for name in ALL if name.endswith(expected)]
    assert tree.compiled() == []


def test_a_file_that_was_only_touched_is_not_compiled(tree):
    os.utime("csrc/both.h", (2e9, 2e9))
    assert tree.compiled() == []


def test_a_file_whose_old_time_was_restored_is_compiled(tree):
    Path("csrc/one.h").write_text("// other text")
    os.utime("csrc/one.h", (1e9, 1e9))
    assert tree.compiled() == ["build/AVX2/a.o", "build/DEFAULT/a.o"]


def test_a_removed_header_is_noticed(tree):
    Path("csrc/a.cpp").write_text("")
    Path("csrc/one.h").unlink()
    assert tree.compiled() == ["build/AVX2/a.o", "build/DEFAULT/a.o"]


def test_other_flags_compiler_and_torch_compile_everything(tree):
    tree.flags = ["-O2", "-fsanitize=address"]
    assert tree.compiled() == ALL
    tree.write_compiler("1.1")
    assert tree.compiled() == ALL
    assert tree.compiled(torch="2.14.0") == ALL
    assert tree.compiled(torch="2.14.0") == []


def test_a_failed_compilation_leaves_nothing_that_counts(tree):
    Path("csrc/both.h").write_text("// edited")
    Path("csrc/a.cpp").write_text("error")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        tree.compiled()
    assert "an error in csrc/a.cpp" in failed.value.stderr
    Path("csrc/a.cpp").write_text('#include "one.h"')  # as it was: only the stamp tells that the object is half
    assert {"build/AVX2/a.o", "build/DEFAULT/a.o"} & set(tree.compiled())
    assert tree.compiled() == []
    assert {path.read_text() for path in Path("build").rglob("*.o")} == {"whole"}


@pytest.mark.parametrize("damage", ["", "{", None])
def test_an_interrupted_build_is_taken_up_again(damage, tree):
    stamp = Path("build/AVX2/a.json")
    if damage is None:
        stamp.unlink()
    else:
        stamp.write_text(damage)
    Path("build/AVX2/b c.o").unlink()
    assert tree.compiled() == ["build/AVX2/a.o", "build/AVX2/b c.o"]


def test_an_edit_during_the_build_is_not_missed(tree, monkeypatch):
    Path("csrc/one.h").write_text("// edited")
    compile_only = subprocess.run

    def edit_meanwhile(*args, **kwargs):
        done = compile_only(*args, **kwargs)
        Path("csrc/one.h").write_text("// edited again")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(tree.build.subprocess, "run", edit_meanwhile)
        tree.compiled()
    assert tree.compiled() == ["build/AVX2/a.o", "build/DEFAULT/a.o"]


def test_max_jobs_is_honoured(build, monkeypatch):
    asked = []

    class Pool(build.ThreadPoolExecutor):
        def __init__(self, workers):
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(build, "ThreadPoolExecutor", Pool)
    for wish, expected in (("3", 3), ("", os.cpu_count()), (None, os.cpu_count())):
        monkeypatch.setenv("MAX_JOBS", wish) if wish is not None else monkeypatch.delenv("MAX_JOBS")
        build.compile_units([])
        assert asked.pop() == expected


# ---- the whole setup.py, in a tree whose sources are a line each, beside what it needs of torch

TORCH = {
    "__init__.py": "__version__ = '2.13.0'\nclass version: cuda = None\n",
    "utils/cpp_extension.py": """
from setuptools import Extension
CUDA_HOME = None
def CppExtension(name, sources, **options): return Extension(name, sources, language="c++", **options)
CUDAExtension = CppExtension
""",
}


@pytest.fixture
def small_copy(tmp_path):
    """setup.py with one kernel and one binding that hold nothing, and a compiler that refuses all it is given."""
    tree = tmp_path / "tree"
    files = {"csrc/op/cpu/kernel.cpp": "", "csrc/op/binding.cpp": "", "fused_ops/__init__.py": ""}
    files["setup.cfg"] = "[options]\npackages = fused_ops\n"
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for name, text in TORCH.items():
        (tmp_path / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch" / name).write_text(text)
    shutil.copy(ROOT / "setup.py", tree)
    shutil.copy(ROOT / "csrc" / "exports.map", tree / "csrc")
    refuses = tmp_path / "refuses"
    refuses.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "this compiler knows no C++17" >&2; exit 1; }\n')
    refuses.chmod(0o755)
    return tree, str(refuses)


def set_up(tree, *command, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env={**os.environ, "FUSED_OPS_BUILD": "", "FUSED_OPS_CUDA": "0", "PYTHONPATH": str(tree.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failed_build_is_one_warning_and_no_old_library(small_copy):
    tree, refuses = small_copy
    old = tree / "fused_ops" / "_C.so"
    old.write_bytes(b"of another build")
    result = set_up(tree, "build_ext", "--inplace", CXX=refuses)
    assert result.returncode == 0, result.stderr
    assert "this compiler knows no C++17" in result.stderr
    assert result.stderr.count("fused_ops: WARNING: the library could not be built") == 1
    assert result.stderr.count("installing without the native library (pure PyTorch)") == 1
    assert not old.exists()


def test_a_failed_build_fails_where_the_library_is_required(small_copy):
    tree, refuses = small_copy
    result = set_up(tree, "build_ext", "--inplace", CXX=refuses, FUSED_OPS_BUILD="1")
    assert result.returncode == 1
    assert "this compiler knows no C++17" in result.stderr
    assert "fused_ops: FUSED_OPS_BUILD=1, but the library could not be built" in result.stderr
    result = set_up(tree, "build", CXX="/nonexistent/c++", FUSED_OPS_BUILD="1")
    assert result.returncode == 1 and "FUSED_OPS_BUILD=1, but no C++ compiler found" in result.stderr


# What the disk that is full does: it takes an object, and not the note beside it.
FULL = """#!/bin/sh
[ "$1" = --version ] && exit 0
while [ "$1" != -o ]; do shift; [ $# -gt 0 ] || exit 0; done
echo object > "$2"
echo "$2: $0" > "${2%.o}.d"
ln -sf /dev/full "${2%.o}.json"
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_warning(small_copy, tmp_path):
    tree, _ = small_copy
    full = tmp_path / "full"
    full.write_text(FULL)
    full.chmod(0o755)
    result = set_up(tree, "build_ext", "--inplace", CXX=str(full))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("fused_ops: WARNING: the library could not be built: [Errno 28] No space left") == 1
    assert not (tree / "fused_ops" / "_C.so").exists()


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (None, "torch is not installed in the build environment (use --no-build-isolation)"),
        ("raise OSError('libtorch.so: cannot open')", "torch cannot be imported: OSError: libtorch.so: cannot open"),
        ("import torch.gone", "torch cannot be imported: ModuleNotFoundError: No module named 'torch.gone'"),
        ("__version__ = '2.9.1+cpu'", "expected torch >= 2.10 in the build environment, got 2.9.1+cpu"),
    ],
)
def test_a_torch_that_is_no_use_is_one_warning(torch, reason, small_copy):
    tree, refuses = small_copy
    package = tree.parent / "torch"
    if torch is None:
        (package / "__init__.py").write_text("raise ModuleNotFoundError(name='torch')")
    else:
        (package / "__init__.py").write_text(torch)
    result = set_up(tree, "build", CXX=refuses)
    assert result.returncode == 0, result.stderr
    assert f"fused_ops: WARNING: {reason}; installing without the native library" in result.stderr
    assert result.stderr.count("WARNING") == 1
    result = set_up(tree, "build", CXX=refuses, FUSED_OPS_BUILD="1")
    assert result.returncode == 1 and f"FUSED_OPS_BUILD=1, but {reason}" in result.stderr


# setup.py in this process' place, after a line that changes what it sees
AS_IF = "import runpy, sys; sys.argv = ['setup.py', 'build']; {}; runpy.run_path('setup.py', run_name='__main__')"


def test_another_system_is_one_warning(small_copy):
    tree, refuses = small_copy
    result = run_as_if(tree, "import setuptools.command.build_ext; sys.platform = 'darwin'", CXX=refuses)
    assert result.returncode == 0, result.stderr
    assert "fused_ops: WARNING: the library is for Linux, and this is darwin; installing without" in result.stderr


def test_an_old_setuptools_is_told_what_to_do(small_copy):
    tree, refuses = small_copy
    result = run_as_if(tree, "import setuptools; setuptools.__version__ = '65.5.1'", CXX=refuses)
    assert result.returncode == 1
    assert "expected setuptools >= 77, got 65.5.1: pip install -U 'setuptools>=77' wheel" in result.stderr


def run_as_if(tree, change, **environment):
    env = {**os.environ, "FUSED_OPS_BUILD": "", "FUSED_OPS_CUDA": "0", "PYTHONPATH": str(tree.parent), **environment}
    command = [sys.executable, "-c", AS_IF.format(change)]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("target", "isas"), [("x86_64-linux-gnu", ["DEFAULT", "AVX2", "AVX512"]), ("aarch64-linux-gnu", ["DEFAULT"])]
)
def test_the_compilers_target_decides_the_instruction_sets(target, isas, tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho {target}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert list(runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]) == isas


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_the_library_is_what_the_sources_are_now(small_copy):
    tree, _ = small_copy
    (tree / "csrc" / "op" / "cpu" / "kernel.cpp").write_text("namespace FUSED_OPS_ISA { int first; }\n")

    def built(compiled):
        result = set_up(tree, "build_ext")
        assert re.search(rf"compiling {compiled} translation", result.stdout), result.stdout + result.stderr
        (library,) = tree.glob("build/lib*/fused_ops/_C.so")
        return library.read_bytes()

    first = built(r"(\d) of \1")
    assert built(r"0 of \d") == first
    (tree / "csrc" / "op" / "binding.cpp").write_text('__attribute__((visibility("default"))) int second = 1;\n')
    second = built(r"1 of \d")
    assert second != first
    (tree / "csrc" / "op" / "cpu" / "kernel.cpp").unlink()
    third = built(r"0 of 1")
    assert third != second
    (tree / "csrc" / "exports.map").write_text("{ global: *; };")
    assert built(r"0 of 1") != third

"""How the package builds, installs and loads: one library for every Python and torch, or none and still right."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from conftest import ROOT

import fused_ops
from fused_ops.core import library

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_ops", "csrc", "examples")
USE_BOTH_OPS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_ops
import torch, torch.nn.functional as F
x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
t = torch.tensor([0, 6, 3, -100, 2])
w, b = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
for ours, eager in ((fused_ops.cross_entropy(x, t), F.cross_entropy(x, t)),
                    (fused_ops.batch_norm(x, None, None, w, b, True), F.batch_norm(x, None, None, w, b, True))):
    torch.testing.assert_close(ours, eager)
    for a, e in zip(torch.autograd.grad(ours.square().sum(), (x, w, b), allow_unused=True),
                    torch.autograd.grad(eager.square().sum(), (x, w, b), allow_unused=True)):
        assert (a is None) == (e is None)
        if a is not None: torch.testing.assert_close(a, e)
assert torch.autograd.gradcheck(lambda x: fused_ops.cross_entropy(x, t), x)
print("FILE", fused_ops.__file__)
print("ISA", fused_ops.core.library.isa())
for w in caught: print("WARNING", w.category.__name__, w.message)
"""


def copy_sources(to):
    to.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(
            source, to / name, **({"ignore": ignore} if source.is_dir() else {})
        )
    return to


def pip_wheel(tree, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", "wheels", "."]
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "FUSED_OPS_CUDA": "0", **environment}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def installed(wheel, to):
    """The wheel installed beside this environment's torch, in front of whatever else is installed here."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(to), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return to


def symbols(*arguments):
    return subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def output_of(result, key):
    return [line.removeprefix(f"{key} ") for line in result.stdout.splitlines() if line.startswith(f"{key} ")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source tree with its build folder, wheel) of a build on the objects that are current in this tree's own."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    tree = copy_sources(tmp_path_factory.mktemp("build") / "tree")
    for objects in ROOT.glob("build/temp.*"):
        shutil.copytree(objects, tree / "build" / objects.name)
    result = pip_wheel(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    return tree, wheel


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """(what the build said, wheel) of a build that was told to leave the library out."""
    tree = copy_sources(tmp_path_factory.mktemp("pure") / "tree")
    result = pip_wheel(tree, FUSED_OPS_BUILD="0")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    return result.stdout + result.stderr, wheel


# What serves the repository alone, and no one who has a release.
OF_THE_REPOSITORY = (".github/", ".gitignore", ".pre-commit-config.yaml")


def git_files():
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Made where there is no compiler and no torch, with nothing but setuptools."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in git_files():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    (folder / "alone").mkdir()
    here = Path(setuptools.__file__).parent.parent
    for path in (here / "setuptools", here / "_distutils_hack", *here.glob("setuptools-*.dist-info")):
        (folder / "alone" / path.name).symlink_to(path)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder / "tree",
        env={"PATH": "", "PYTHONPATH": str(folder / "alone"), "FUSED_OPS_BUILD": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / result.stdout.splitlines()[-1]


def unpacked(sdist, to):
    with tarfile.open(sdist) as archive:
        archive.extractall(to, filter="data")
    return to / sdist.name.removesuffix(".tar.gz")


def test_an_sdist_has_all_that_git_has(sdist, tmp_path):
    tree = unpacked(sdist, tmp_path)
    found = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    made = {name for name in found if name.startswith("fused_ops.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert found - made == {name for name in git_files() if not name.startswith(OF_THE_REPOSITORY)}
    version = re.search(r"^Version: (.*)$", (tree / "PKG-INFO").read_text(encoding="utf-8"), re.MULTILINE)
    assert version[1] == fused_ops.__version__


def test_one_wheel_for_every_cpython(built):
    _, wheel = built
    assert re.fullmatch(r"fused_ops-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fused_ops/_C.so", "fused_ops/py.typed", "fused_ops/ops/batch_norm/reference.py"} <= set(names)
    assert "fused_ops/examples/backprop_by_hand/walkthrough.py" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc")) or "tests" in name]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm of binutils on this machine")
def test_the_check_of_wheels_passes_a_right_one_and_names_what_is_wrong(built, tmp_path):
    _, wheel = built
    check = [sys.executable, str(ROOT / ".ci" / "wheel_check")]
    right = tmp_path / wheel.name.replace("-linux_", "-manylinux_2_28_")
    shutil.copy(wheel, right)
    assert subprocess.run([*check, str(right)], capture_output=True).returncode == 0
    old = tmp_path / wheel.name.replace("-linux_", "-manylinux_2_5_")
    shutil.copy(wheel, old)
    result = subprocess.run([*check, str(right), str(old), str(wheel)], capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 2
    assert "expected glibc <= 2.5" in result.stderr and "expected a name like" in result.stderr


def test_the_wheel_works_beside_this_torch(built, run_python, tmp_path):
    target = installed(built[1], tmp_path / "site")
    result = run_python("-c", USE_BOTH_OPS, cwd=tmp_path, PYTHONPATH=str(target))
    assert output_of(result, "FILE") == [str(target / "fused_ops" / "__init__.py")]
    assert output_of(result, "ISA") != ["None"]
    assert output_of(result, "WARNING") == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("isolated", [False, True])
def test_an_sdist_installs_and_its_own_tests_pass(isolated, sdist, tmp_path):
    """In a fresh environment that sees this one's packages, by pip, isolated, pip brings what builds it."""
    # pip and setuptools are this environment's too: a Python may bring a setuptools that is too old
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "here.pth").write_text(str(Path(torch.__file__).parent.parent))
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "FUSED_OPS_CUDA": "0"}
    (tmp_path / "constraints.txt").write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    constraints = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(tmp_path / "constraints.txt"))
    options = ["--no-deps", "--ignore-installed", *([] if isolated else ["--no-build-isolation"])]
    result = subprocess.run(
        [str(python), "-m", "pip", "install", *options, str(sdist)],
        capture_output=True,
        text=True,
        env={**env, **(constraints if isolated else {}), "FUSED_OPS_BUILD": "1"},
        cwd=tmp_path,
    )
    if isolated and re.search("No matching distribution found|ConnectionError|Connection refused", result.stderr):
        pytest.skip("no index that has this torch")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    tree = unpacked(sdist, tmp_path)
    shutil.rmtree(tree / "fused_ops")  # so that the installed one is found
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "tests/batch_norm/test_batch_norm.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tree)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_the_wheel_works_beside_other_releases(built, run_python, tmp_path):
    """Other interpreters with a torch of their own (any release >= 2.10, any CPython >= 3.10), if some are given.

    The package index has no second release of torch as a CPU build, so nothing is downloaded here.
    """
    others = [Path(p) for p in os.environ.get("FUSED_OPS_OTHER_PYTHONS", "").split(os.pathsep) if p]
    if not others:
        pytest.skip("FUSED_OPS_OTHER_PYTHONS names no interpreter with another torch >= 2.10")
    target = installed(built[1], tmp_path / "site")
    for python in others:
        command = [str(python), "-c", USE_BOTH_OPS]
        env = {**os.environ, "PYTHONPATH": str(target)}
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{python}: {result.stderr}"
        assert output_of(result, "FILE") == [str(target / "fused_ops" / "__init__.py")]
        assert output_of(result, "ISA") != ["None"] and output_of(result, "WARNING") == []


def test_the_library_knows_nothing_of_python(built):
    """No symbol of Python or of torch's C++ ABI is needed: that is why one library serves all of them."""
    library = zipfile.ZipFile(built[1]).extract("fused_ops/_C.so", built[0] / "unpacked")
    lines = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    needed = [line.split(maxsplit=1)[1] for line in lines.splitlines()]
    assert [s for s in needed if re.match(r"_?Py[A-Z_]", s)] == []
    assert [s for s in needed if re.match(r"(c10|at|torch|pybind11)::", s)] == []
    assert [s for s in needed if s.startswith(("aoti_torch_", "torch_"))] != []


def test_isa_objects_share_no_code(built):
    """A function compiled with AVX-512 must not become the copy that a baseline processor runs.

    Inline functions outside the ISA's own namespace are weak symbols: the linker keeps any one of their copies.
    """
    objects = sorted((built[0] / "build").glob("temp*/**/AVX*/**/*.o"))
    assert len(objects) >= 4
    for path in objects:
        isa = next(part for part in path.parts if part.startswith("AVX"))
        lines = symbols("-C", "--defined-only", path)
        shared = [line for line in lines if line.split()[1] in "WVu" and f"fused_ops::{isa}::" not in line]
        assert shared == [], path


def test_isa_is_chosen_at_run_time(run_python):
    if library.missing_reason is not None:
        pytest.skip("no native library")
    code = "import fused_ops.core.library as l; print(l.isa())"
    best = run_python("-c", code).stdout.strip()
    order = ["DEFAULT", "AVX2", "AVX512"]
    for wish in ("default", "avx2", "avx512", "nonsense"):
        expected = min(best, wish.upper(), key=order.index) if wish != "nonsense" else best
        assert run_python("-c", code, ATEN_CPU_CAPABILITY=wish).stdout.strip() == expected


def test_build_0_gives_a_working_pure_install(pure, run_python, tmp_path):
    said, wheel = pure
    assert said.count("fused_ops: WARNING:") >= 1 and "FUSED_OPS_BUILD=0; installing without the native library" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    target = installed(wheel, tmp_path / "site")
    result = run_python("-c", USE_BOTH_OPS, cwd=tmp_path, PYTHONPATH=str(target))
    assert output_of(result, "ISA") == ["None"]
    (warning,) = output_of(result, "WARNING")
    assert warning.startswith("RuntimeWarning fused_ops: the native library was not built; every op runs on its plain-")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"CXX": "/nonexistent/c++"}, "no C++ compiler found"), ({"PATH": ""}, "no C++ compiler found")],
)
def test_no_compiler_is_one_warning(environment, reason, tmp_path):
    tree = copy_sources(tmp_path / "tree")
    env = {**{k: v for k, v in os.environ.items() if k != "CXX"}, "FUSED_OPS_CUDA": "0", **environment}
    result = subprocess.run([sys.executable, "setup.py", "build"], cwd=tree, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"fused_ops: WARNING: {reason}; installing without the native library") == 1
    assert (tree / "build" / "lib" / "fused_ops" / "ops" / "cross_entropy" / "api.py").exists()


def test_cuda_can_be_forced(tmp_path):
    tree = copy_sources(tmp_path / "tree")
    for source in tree.glob("csrc/*/cuda/*"):
        source.unlink()
    command = [sys.executable, "setup.py", "--version"]
    forced, off = (
        subprocess.run(command, cwd=tree, env={**os.environ, "FUSED_OPS_CUDA": v}, capture_output=True, text=True)
        for v in "10"
    )
    assert forced.returncode == 1 and "FUSED_OPS_CUDA=1, but this release has no CUDA kernels" in forced.stderr
    assert off.returncode == 0


FOREIGN = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xf3\x00\x01" + bytes(43)  # the header of a RISC-V library


@pytest.mark.parametrize(
    "library", [None, FOREIGN, *(pytest.param(b, marks=pytest.mark.slow) for b in (b"", b"not a library"))]
)
def test_a_missing_or_broken_library_is_one_warning(library, run_python, tmp_path):
    shutil.copytree(ROOT / "fused_ops", tmp_path / "fused_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (tmp_path / "fused_ops" / "_C.so").write_bytes(library)
    result = run_python("-c", USE_BOTH_OPS, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    (warning,) = output_of(result, "WARNING")
    assert ("was not built" if library is None else "could not be loaded") in warning


@pytest.mark.skipif(not library.LIBRARY_PATH.exists(), reason="needs a library to cut")
@pytest.mark.parametrize("name", ["_C.so", "_C_cuda.so"])
@pytest.mark.parametrize("kept", [0.5, pytest.param(0.999, marks=pytest.mark.slow)])
def test_a_library_that_was_cut_off_is_one_warning(name, kept, run_python, tmp_path):
    package = tmp_path / "fused_ops"
    shutil.copytree(ROOT / "fused_ops", package, ignore=shutil.ignore_patterns("_C_cuda.so", "__pycache__"))
    whole = library.LIBRARY_PATH.read_bytes()
    (package / name).write_bytes(whole[: int(kept * len(whole))])
    cuda = "import torch; torch.version.cuda = '13.0'\n" if name == "_C_cuda.so" else ""
    (warning,) = output_of(run_python("-c", cuda + USE_BOTH_OPS, cwd=tmp_path, PYTHONPATH=str(tmp_path)), "WARNING")
    assert f"{name}: the file is incomplete" in warning


def test_import_is_light(run_python):
    """What import fused_ops loads on top of import torch is its own few files, and where torch keeps flop formulas."""
    code = (
        "import sys, torch.utils.flop_counter; before = set(sys.modules); import fused_ops;"
        "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('fused_ops')))"
    )
    assert run_python("-c", code).stdout.split() == []


def test_command_line(run_python, tmp_path):
    said = run_python("-m", "fused_ops", "info", "-v", cwd=tmp_path).stdout
    assert fused_ops.__version__ in said and "cross_entropy_backward" in said
    assert run_python("-m", "fused_ops", "nonsense", check=False).returncode == 2
    assert run_python("-m", "fused_ops", check=False).returncode == 2


def test_check_command_fails_when_an_op_is_wrong(run_python, tmp_path):
    """A sign error in a copy of the reference's second derivative must turn the exit status to 1 and name the op."""
    code = (
        "import fused_ops, fused_ops.__main__ as m, fused_ops.ops.cross_entropy.reference as r;"
        "import fused_ops.testing as t; t.op_names = lambda: ['cross_entropy'];"
        "right, samples = r.double_backward, t.samples_of('cross_entropy')[:2]; t.samples_of = lambda op: samples;"
        "r.double_backward = lambda *a, **k: tuple(-g if g is not None else None for g in right(*a, **k));"
        "raise SystemExit(m.check())"
    )
    result = run_python("-c", code, check=False)
    assert result.returncode == 1
    assert "cross_entropy" in result.stdout and "FAILED" in result.stdout and "gradgradcheck: " in result.stdout


def test_the_library_tells_nothing_of_the_machine_that_built_it_and_exports_nothing(built):
    library = Path(zipfile.ZipFile(built[1]).extract("fused_ops/_C.so", built[0] / "unpacked"))
    assert [line for line in symbols("-DC", "--defined-only", library) if line.strip()] == []
    content = library.read_bytes()
    for folder in (built[0], ROOT, Path(sys.prefix), Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in content, folder
    assert len(content) <= 2_600_000

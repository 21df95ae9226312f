"""The library of CUDA kernels: where it is built, what it needs, when it is loaded, and that its faults are its own."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_build import set_up, small_copy  # noqa: F401  (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ops
from fused_ops.core import library

NEEDS_KERNELS = pytest.mark.skipif(library.missing_reason is not None, reason="without the library there is no kernel")

# ---- loading, beside what is taken for a torch with CUDA

USE = """
import sys, warnings, torch
torch.version.cuda = {cuda!r}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_ops
x, target = torch.randn(4, 7, requires_grad=True), torch.arange(4)
torch.testing.assert_close(fused_ops.cross_entropy(x, target), torch.nn.functional.cross_entropy(x, target))
print("ISA", fused_ops.core.library.isa())
print("WHY", fused_ops.core.library.cuda_missing_reason)
print("CUDA", sorted({{what for _, device, what, _ in fused_ops.core.library.backends() if device == "cuda"}}))
for w in caught: print("WARNING", w.category.__name__, str(w.message))
"""


def used(run_python, folder, cuda, cuda_library=None, before="", **environment):
    """What a process says that uses a copy of the package with this library of CUDA kernels."""
    package = folder / "fused_ops"
    shutil.copytree(ROOT / "fused_ops", package, ignore=shutil.ignore_patterns("_C_cuda.so", "__pycache__"))
    if isinstance(cuda_library, bytes):
        (package / "_C_cuda.so").write_bytes(cuda_library)
    elif cuda_library:
        shutil.copy(cuda_library, package / "_C_cuda.so")
    code = before + USE.format(cuda=cuda)
    said = run_python("-c", code, cwd=folder, PYTHONPATH=str(folder), **environment).stdout
    return {key: [line.partition(" ")[2] for line in said.splitlines() if line.startswith(f"{key} ")] for key in KEYS}


KEYS = ("ISA", "WHY", "CUDA", "WARNING")
BROKEN = b"not a library"


@NEEDS_KERNELS
def test_a_broken_library_of_cuda_kernels_is_one_warning_and_no_loss_to_the_cpu(run_python, tmp_path):
    said = used(run_python, tmp_path, "13.0", BROKEN)
    (warning,) = said["WARNING"]
    assert warning.startswith("RuntimeWarning fused_ops: the CUDA kernels could not be loaded: ")
    assert warning.endswith("on a GPU every op runs on its plain-PyTorch reference, right but slower")
    assert said["ISA"] == [library.isa()] and said["CUDA"] == ["['plain PyTorch']"]
    assert said["WHY"][0].startswith("the CUDA kernels could not be loaded: ")


@NEEDS_KERNELS
def test_beside_a_torch_without_cuda_it_is_not_loaded(run_python, tmp_path):
    said = used(run_python, tmp_path, None, BROKEN)
    assert said == {
        "ISA": [library.isa()],
        "WHY": ["torch was built without CUDA"],
        "CUDA": ["['plain PyTorch']"],
        "WARNING": [],
    }


@NEEDS_KERNELS
def test_where_it_was_not_built_the_import_says_nothing(run_python, tmp_path):
    said = used(run_python, tmp_path, "13.0")
    assert said["WARNING"] == [] and said["WHY"] == ["the CUDA kernels were not built"]


def test_without_the_first_library_the_second_is_not_loaded(monkeypatch, tmp_path):
    (tmp_path / "_C_cuda.so").write_bytes(BROKEN)
    monkeypatch.setattr(library, "CUDA_LIBRARY_PATH", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(library, "missing_reason", "the native library was not built")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library._load_cuda() == "the native library was not built"


def test_a_reference_on_another_device_is_one_warning(monkeypatch):
    monkeypatch.setattr(library, "_noticed", set())
    called = library._with_notice("op", lambda *args: len(args))
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = [torch.empty(2, device="cuda"), torch.empty(2, device="cuda", dtype=torch.int64)]
    with pytest.warns(
        RuntimeWarning, match="fused_ops: op runs on cuda on its plain-PyTorch reference, .*: "
    ) as caught:
        assert called(*there) == 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called(*there, 3) == 3
        assert called(torch.empty(2), 3) == 2
        assert called(torch.empty(2, device="meta")) == 1


# ---- building: setup.py in a tree of empty sources, with an nvcc that notes what it is asked

NVCC = """#!{python} -IS
import pathlib, sys
arguments = sys.argv[1:]
if "--version" in arguments: sys.exit(print("Cuda compilation tools, release {release}, V{release}.1"))
if "--list-gpu-arch" in arguments: sys.exit(print("compute_75 compute_80 compute_86 compute_89 compute_90 {more}"))
with open("asked", "a") as log: print(*arguments, file=log)
if {fails}: sys.exit("this nvcc fails")
output, listed = (pathlib.Path(arguments[arguments.index(flag) + 1]) for flag in ("-o", "-MF"))
output.write_bytes(pathlib.Path({empty!r}).read_bytes())
listed.write_text(f"{{output}}: {{arguments[arguments.index('-c') + 1]}}")
"""


@pytest.fixture
def toolkit(small_copy):  # noqa: F811
    """(tree, function that makes a CUDA toolkit and returns its folder): the tree has one CUDA source."""
    if shutil.which("c++") is None or shutil.which("ar") is None:
        pytest.skip("no C++ compiler on this machine")
    tree, _ = small_copy
    (tree / "csrc" / "op" / "cuda").mkdir()
    (tree / "csrc" / "op" / "cuda" / "kernel.cu").write_text("")
    (tree / "csrc" / "op" / "op_cuda.cpp").write_text("")
    home, lib = tree.parent / "cuda", tree.parent / "torch_lib"
    with open(tree.parent / "torch" / "__init__.py", "a") as torch_:
        torch_.write("class cuda: device_count = staticmethod(lambda: 0)\n")
    empty = str(tree.parent / "empty.o")
    subprocess.run(["c++", "-fPIC", "-x", "c++", "-c", os.devnull, "-o", empty], check=True)
    (lib / "lib").mkdir(parents=True)
    subprocess.run(["c++", "-shared", empty, "-o", str(lib / "lib" / "libtorch.so")], check=True)

    def make(release="13.0", more="compute_100 compute_103 compute_120", fails=False):
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (home / "lib64").mkdir(exist_ok=True)
        subprocess.run(["ar", "rcs", str(home / "lib64" / "libcudart_static.a"), empty], check=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(NVCC.format(python=sys.executable, release=release, more=more, fails=fails, empty=empty))
        nvcc.chmod(0o755)
        return {"CUDA_HOME": str(home), "FUSED_OPS_CUDA": "", "LIBRARY_PATH": str(lib / "lib")}

    return tree, make


def asked_of(tree):
    path = tree / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_a_wheel_has_the_cuda_kernels_beside_any_torch(toolkit):
    tree, make = toolkit
    result = set_up(tree, "build_ext", **make())
    assert result.returncode == 0, result.stderr
    (command,) = asked_of(tree)
    codes = re.findall(r"-gencode=arch=compute_(\d+),code=(\w+)", command)
    assert codes == [
        *(("75", "sm_75"), ("80", "sm_80"), ("86", "sm_86"), ("89", "sm_89"), ("90", "sm_90")),
        *(("100", "sm_100"), ("100", "compute_100"), ("120", "sm_120")),
    ]
    assert "--compress-mode=size" in command
    built = {path.name for path in tree.glob("build/lib*/fused_ops/*.so")}
    assert built == {"_C.so", "_C_cuda.so"}


def test_an_older_nvcc_builds_what_it_knows(toolkit):
    tree, make = toolkit
    result = set_up(tree, "build_ext", **make("12.4", ""))
    assert result.returncode == 0, result.stderr
    (command,) = asked_of(tree)
    assert re.findall(r",code=(\w+)", command) == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert "-Xfatbin -compress-all" in command


def test_the_architectures_can_be_chosen(toolkit):
    tree, make = toolkit
    result = set_up(tree, "build_ext", **make(), TORCH_CUDA_ARCH_LIST="7.5;9.0a+PTX")
    assert result.returncode == 0, result.stderr
    (command,) = asked_of(tree)
    assert re.findall(r",code=(\w+)", command) == ["sm_75", "sm_90a", "compute_90a"]
    result = set_up(tree, "build_ext", **make(), TORCH_CUDA_ARCH_LIST="Hopper")
    assert "expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got 'Hopper'" in result.stderr


@pytest.mark.parametrize(("wish", "built"), [("", False), ("1", True)])
def test_in_place_beside_a_torch_without_cuda_only_by_wish(wish, built, toolkit):
    """It could not be loaded; and one of another build would be taken for this one's."""
    tree, make = toolkit
    old = tree / "fused_ops" / "_C_cuda.so"
    old.write_bytes(b"of another build")
    result = set_up(tree, "build_ext", "--inplace", **{**make(), "FUSED_OPS_CUDA": wish})
    assert result.returncode == 0, result.stderr
    assert (tree / "fused_ops" / "_C.so").exists() and len(asked_of(tree)) == built
    assert old.exists() == built and (not built or old.read_bytes() != b"of another build")


def test_cuda_kernels_that_do_not_compile_cost_the_cpu_nothing(toolkit):
    tree, make = toolkit
    result = set_up(tree, "build_ext", **make(fails=True))
    assert result.returncode == 0, result.stderr
    assert "this nvcc fails" in result.stderr
    assert result.stderr.count("fused_ops: WARNING: the CUDA kernels could not be built") == 1
    assert {path.name for path in tree.glob("build/lib*/fused_ops/*.so")} == {"_C.so"}
    result = set_up(tree, "build_ext", **{**make(fails=True), "FUSED_OPS_CUDA": "1"})
    assert result.returncode == 1
    assert "fused_ops: FUSED_OPS_CUDA=1, but the CUDA kernels could not be built" in result.stderr


def test_a_torch_with_cuda_and_no_toolkit_is_one_warning(toolkit):
    tree, make = toolkit
    with open(tree.parent / "torch" / "__init__.py", "a") as torch_:
        torch_.write("version.cuda = '13.0'\n")
    environment = {**make(), "CUDA_HOME": str(tree / "nowhere")}
    result = set_up(tree, "build_ext", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("fused_ops: WARNING: there is no nvcc (set CUDA_HOME); installing without the CUDA") == 1
    result = set_up(tree, "build_ext", **{**environment, "FUSED_OPS_CUDA": "1"})
    assert result.returncode == 1 and "FUSED_OPS_CUDA=1, but there is no nvcc (set CUDA_HOME)" in result.stderr
    environment = make()
    (Path(environment["CUDA_HOME"]) / "lib64" / "libcudart_static.a").unlink()
    result = set_up(tree, "build_ext", **environment)
    assert "WARNING: there is no libcudart_static.a under" in result.stderr
    result = set_up(tree, "build_ext", **make(release="11.8"))
    assert "WARNING: expected CUDA >= 12, got 11: " in result.stderr
    nvcc = Path(make()["CUDA_HOME"]) / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    result = set_up(tree, "build_ext", **environment)
    assert result.returncode == 0 and result.stderr.count(f"WARNING: {nvcc} does not say its version; installing") == 1
    assert {path.name for path in tree.glob("build/lib*/fused_ops/*.so")} == {"_C.so"}


# ---- the library itself, for one architecture, beside this torch (minutes; objects that are current are taken over)

STUBS = {
    "libtorch_cuda_stub.so": """extern "C" {
int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }
void torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char** message) { *message = nullptr; }
void torch_c10_cuda_free_error_msg(char*) {}
}""",
    "libcuda.so.1": """#include <cstdlib>
extern "C" int cuDriverGetVersion(int* version) { *version = std::atoi(std::getenv("DRIVER_VERSION")); return 0; }""",
    "libnvidia-ml.so.1": """#include <cstdlib>
#include <cstring>
static const char* gpus = std::getenv("GPUS");  // a compute capability each
extern "C" {
int nvmlInit_v2() { return gpus ? 0 : 9; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = (std::strlen(gpus) + 1) / 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, const char** gpu) { *gpu = gpus + 3 * index; return 0; }
int nvmlDeviceGetCudaComputeCapability(const char* gpu, int* major, int* minor) {
  *major = gpu[0] - '0', *minor = gpu[1] - '0';
  return 0;
}
}""",
}


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory):
    """(the library, folder of what stands in for libtorch_cuda and the driver), built by the first of all processes."""
    if shutil.which("nvcc") is None or shutil.which("c++") is None or shutil.which("nm") is None:
        pytest.skip("no nvcc, C++ compiler or nm on this machine")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda_library"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            build_cuda_library(folder.with_suffix(".new"))
            folder.with_suffix(".new").rename(folder)
    (built,) = folder.glob("build/lib*/fused_ops/_C_cuda.so")
    return built, folder


def build_cuda_library(folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "fused_ops", folder / "fused_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for objects in ROOT.glob("build/temp.*"):
        shutil.copytree(objects, folder / "build" / objects.name)
    environment = {**os.environ, "FUSED_OPS_BUILD": "1", "FUSED_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, source in STUBS.items():
        command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)


@pytest.mark.slow
def test_it_needs_torchs_stable_interface_and_the_system_alone(cuda_library):
    built, _ = cuda_library
    listing = subprocess.run(["nm", "-D", str(built)], check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in listing.splitlines()]
    assert [line[-1] for line in lines if line[-2] not in "Uw"] == []  # exports nothing
    needed = {line[-1] for line in lines}
    system = {name for name in needed if "@" in name or re.match(r"_ITM_|__gmon_start__|_ZN?K?St", name)}
    assert system and all(re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name) for name in system if "@" in name)
    assert not [name for name in needed if re.match(r"_?Py[A-Z_]|cuda[A-Z]|cu[A-Z]|__cuda", name)]
    stable = {name for name in needed - system if name.startswith(("aoti_torch_", "torch_"))}
    assert needed - system == stable
    torch_lib = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    listing = subprocess.run(["nm", "-D", "--defined-only", str(torch_lib)], capture_output=True, text=True).stdout
    elsewhere = stable - {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    of_cuda = {"aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg"}
    if torch.version.cuda is None:
        assert elsewhere <= of_cuda
    assert "__libc_single_threaded" not in {name.partition("@")[0] for name in needed}


@pytest.mark.slow
@NEEDS_KERNELS
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the real ones")
@pytest.mark.parametrize(
    ("ahead", "gpus", "reason"),
    [
        (20, "90", None),
        (20, "70 90", None),
        (20, None, None),  # NVML cannot tell
        (-10, "90", "the driver is older than the CUDA that they were built with"),
        (20, "70 80", "the GPU is older than those that they were built for"),
    ],
)
def test_its_kernels_are_registered_where_the_driver_and_a_gpu_are_new_enough(
    ahead, gpus, reason, cuda_library, run_python, tmp_path
):
    """The library is for sm_90; the driver's version is `ahead` of its CUDA's major one."""
    built, folder = cuda_library
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    driver = 1000 * int(re.search(r"release (\d+)", release)[1]) + ahead
    before = f"import ctypes; ctypes.CDLL({str(folder / 'libtorch_cuda_stub.so')!r}, mode=ctypes.RTLD_GLOBAL)\n"
    environment = {"LD_LIBRARY_PATH": str(folder), "DRIVER_VERSION": str(driver), **({"GPUS": gpus} if gpus else {})}
    said = used(run_python, tmp_path, "13.0", built, before, **environment)
    assert said["ISA"] == [library.isa()]
    if reason is None:
        assert said["WHY"] == ["None"] and said["WARNING"] == [] and "CUDA kernel" in said["CUDA"][0]
    else:
        assert said["CUDA"] == ["['plain PyTorch']"]
        (warning,) = said["WARNING"]
        assert f"the CUDA kernels could not be loaded: {reason}; on a GPU every op runs" in warning


@pytest.mark.slow
@NEEDS_KERNELS
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the real ones")
def test_a_torch_that_lacks_what_it_needs_is_one_warning(cuda_library, run_python, tmp_path):
    said = used(run_python, tmp_path, "13.0", cuda_library[0])
    (warning,) = said["WARNING"]
    assert "undefined symbol" in warning and said["ISA"] == [library.isa()]
    assert fused_ops.core.library.cuda_missing_reason == "torch was built without CUDA"

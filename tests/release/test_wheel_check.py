"""The check of a release's wheels passes a right one and names what is wrong; their libraries are a few lines each."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("c++", "nm", "readelf"))), reason="no C++ compiler or binutils on this machine"
)
RIGHT = 'extern "C" int aoti_torch_get_dim(void*, long*); static int f(void* t) { return aoti_torch_get_dim(t, 0); }'
USE = "__attribute__((constructor)) static void use() { volatile auto p = &f; (void)p; }"
PART = """
Fatbin {} code:
================
arch = sm_{}
code version = [1,8]
host = linux
compile_size = 64bit
{}
"""


def gpu_code(missing=None, loose=None):
    """What cuobjdump says of a library with code for every GPU, compressed."""
    kinds = [*(("elf", n) for n in (75, 80, 86, 89, 90, 100, 120)), ("ptx", 100)]
    once = [PART.format(*kind, "" if kind == loose else "compressed") for kind in kinds if kind != missing]
    return "".join(once) * len(list(ROOT.glob("csrc/*/cuda/*.cu")))


@pytest.fixture
def checked(tmp_path):
    """Makes a wheel and returns what the check says on stderr, line by line."""
    platform = f"manylinux_2_{os.confstr('CS_GNU_LIBC_VERSION').split('.')[-1]}_x86_64"

    def library(path, source, *flags):
        exports = [] if "exported" in source else [f"-Wl,--version-script={ROOT}/csrc/exports.map"]
        command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", *exports, *flags, "-o", str(path)]
        subprocess.run(command, input=source, text=True, check=True, cwd=tmp_path)

    def check(source=RIGHT + USE, *flags, said=None, cuda=True, name=f"fused_ops-0.1.0-py3-none-{platform}.whl"):
        library(tmp_path / "_C.so", RIGHT + USE)
        library(tmp_path / "_C_cuda.so", source, *flags)
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for part in ("_C.so", "_C_cuda.so")[: 1 + cuda]:
                wheel.write(tmp_path / part, f"fused_ops/{part}")
        (tmp_path / "said").write_text(said or gpu_code())
        tool = tmp_path / "cuobjdump"
        tool.write_text(f"#!/bin/sh\ncat {tmp_path}/said\n")
        tool.chmod(0o755)
        command = [sys.executable, str(ROOT / ".ci" / "wheel_check"), "--cuda", str(tmp_path / name)]
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert result.returncode == bool(result.stderr)
        return result.stderr.splitlines()

    return check


def test_a_right_wheel_passes(checked):
    assert checked() == []


WRONG = """
extern "C" int PyLong_FromLong(), _ZN2at4copyEv(), cudaMalloc(), cuLaunchKernel(), nobody_has_this();
extern "C" int torch_new_stable_ivalue();  // of torch 2.13
int exported = 1;
static const char *volatile here = "{root}/x", *volatile source = "/somebody/x.cu";
static int g() {{
  return PyLong_FromLong() + _ZN2at4copyEv() + cudaMalloc() + cuLaunchKernel() + nobody_has_this() +
         torch_new_stable_ivalue();
}}
__attribute__((constructor)) static void use_g() {{ volatile auto p = &g; (void)p; }}
"""
FAULTS = [
    r"no symbol of Python, got \['PyLong_FromLong'\]",
    r"no symbol of torch's C\+\+ ABI, got \['_ZN2at4copyEv'\]",
    r"CUDA's runtime inside, got \['cuLaunchKernel', 'cudaMalloc'\]",
    r"stable interface and of the system alone, got \[.*'nobody_has_this', 'torch_new_stable_ivalue'\]",
    r"nothing exported, got \['exported'\]",
    r"alone to be needed, got \['libother\.so'\]",
    r"no path to search for libraries in, got \['/somebody/lib'\]",
    rf"no path of the machine that built it, got (?=.*'{ROOT}/').*'/somebody/x\.cu'.*",
]


def test_what_is_wrong_with_a_library_is_named(checked, tmp_path):
    command = ["c++", "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libother.so", "-o", "libother.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    source = RIGHT + USE + WRONG.format(root=ROOT)
    found = checked(source, "-Wl,--no-as-needed", "libother.so", "-Wl,-rpath,/somebody/lib")
    assert len(found) == len(FAULTS)
    for line, fault in zip(found, FAULTS, strict=True):
        assert re.search(f"_C_cuda\\.so: expected .*{fault}$", line), line


@pytest.mark.parametrize(
    ("said", "faults"),
    [
        (gpu_code(missing=("elf", 90), loose=("elf", 80)), ["expected code for ", "expected all code compressed, got"]),
        (gpu_code(missing=("ptx", 100)), ["expected code for "]),
        (gpu_code()[: -len(PART)], ["expected code for "]),  # one source lacks one
    ],
)
def test_code_that_a_gpu_lacks_or_that_is_not_compressed_is_named(said, faults, checked):
    found = checked(said=said)
    assert len(found) == len(faults) and all(fault in line for fault, line in zip(faults, found, strict=True))


def test_a_release_without_cuda_kernels_or_for_one_python_is_named(checked):
    name, missing = checked(cuda=False, name="fused_ops-0.1.0-cp311-cp311-linux_x86_64.whl")
    assert "expected a name like" in name
    assert "expected fused_ops/_C_cuda.so, got ['fused_ops/_C.so']" in missing


USES_DLOPEN = 'extern "C" void* dlopen(const char*, int); extern "C" void* f() { return dlopen("x", 1); }'


def test_a_library_of_this_machine_can_be_for_an_older_glibc(tmp_path):
    """dlopen has a version of glibc 2.34, which the linker takes, and one of all before."""
    flags = subprocess.run([str(ROOT / ".ci" / "old_glibc"), str(tmp_path)], check=True, capture_output=True, text=True)
    for name, more in (("new", []), ("old", flags.stdout.split())):
        command = ["c++", "-shared", "-fPIC", *more, "-x", "c++", "-", "-o", str(tmp_path / name)]
        subprocess.run(command, input=USES_DLOPEN, text=True, check=True)

    def version(name):
        listing = subprocess.run(["nm", "-D", str(tmp_path / name)], check=True, capture_output=True, text=True).stdout
        return re.search(r"dlopen@GLIBC_2\.(\d+)", listing)

    new, old = version("new"), version("old")
    if new is None or int(new[1]) <= 28:
        pytest.skip("this glibc is old itself")
    assert old is not None and int(old[1]) <= 28
    code = f"import ctypes; f = ctypes.CDLL({str(tmp_path / 'old')!r}).f; f.restype = ctypes.c_void_p; print(f())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "None\n"

"""Builds the optional native library. Everything else about the package is in pyproject.toml.

Environment:
    FUSED_OPS_BUILD=0|1  install without the native library (pure PyTorch) | fail where it cannot be built; by default
        it is built if it can be, and a warning says what is missing if not.
    FUSED_OPS_CUDA=0|1  leave the CUDA kernels out | require them; by default they are built if they can be.
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  the GPUs to build for; by default those that torch was built for.
    FUSED_OPS_SANITIZE=address|undefined|thread  build for a sanitizer (see .ci/sanitize).
    CXX  the compiler, whose target decides the instruction sets; CPPFLAGS, CXXFLAGS: flags to add; MAX_JOBS:
        compilations at a time (default: processors).
    FUSED_OPS_TORCH  the folder of another torch, to build for: a cross build (see .ci/arm).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # which would complain of pyproject.toml's license
    raise SystemExit(
        f"fused_ops: expected setuptools >= 77, got {setuptools.__version__}: pip install -U 'setuptools>=77' wheel"
    )
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import BaseError

ROOT = Path(__file__).parent
LIBRARY = "fused_ops._C"
CXX = shlex.split(os.environ.get("CXX") or "c++")
COLD = ("csrc/batch_norm/cpu/keep_output.cpp",)  # what few calls reach, where the ordinary optimisation is enough
ISA_FLAGS: dict[str, list[str]] = {"DEFAULT": []}
X86_FLAGS = {
    "DEFAULT": ["-Os"],  # no processor that trains needs it, and at -O3 it is the largest of the three
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
COMMON_FLAGS = [
    *("-std=c++17", "-Icsrc", "-O2", "-g0", "-fPIC", "-fwrapv", "-fvisibility=hidden", "-fopenmp-simd"),
    *("-DNDEBUG", "-Wall", "-Wextra"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-Icsrc", "-O3", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden"]
SANITIZERS = {
    "address": ["-fsanitize=address"],
    "undefined": [
        *("-fno-wrapv", "-fsanitize=undefined", "-fsanitize=float-cast-overflow"),
        "-fno-sanitize-recover=undefined,float-cast-overflow",
    ],
    "thread": ["-fsanitize=thread"],
}
LINK_FLAGS: list[str] = []
if sys.platform == "linux":  # exports nothing, and drops the names of functions that are local to a file
    LINK_FLAGS = ["-Wl,--version-script=csrc/exports.map", "-Wl,--discard-all"]


def target_machine() -> str:
    """What the compiler compiles for: a cross compiler's is not this machine."""
    try:
        said = subprocess.run([*CXX, "-dumpmachine"], capture_output=True, text=True, check=False).stdout
    except OSError:  # there is none
        said = ""
    return said.partition("-")[0].strip() or platform.machine().lower()


if target_machine() in ("x86_64", "amd64"):
    ISA_FLAGS = dict(X86_FLAGS)
COMMON_FLAGS += shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
SANITIZE = os.environ.get("FUSED_OPS_SANITIZE")
if SANITIZE:
    LINK_FLAGS = SANITIZERS[SANITIZE]
    ISA_FLAGS["DEFAULT"] = []
    sanitize = ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG", *LINK_FLAGS]
    COMMON_FLAGS, KERNEL_FLAGS = COMMON_FLAGS + sanitize, KERNEL_FLAGS + sanitize


def leave_out(reason: str) -> None:
    """Says once that the library is left out, and why; or fails, where it was asked for."""
    if os.environ.get("FUSED_OPS_BUILD") == "1":
        raise SystemExit(f"fused_ops: FUSED_OPS_BUILD=1, but {reason}")
    print(f"fused_ops: WARNING: {reason}; installing without the native library (pure PyTorch)", file=sys.stderr)


# ---- compiling what changed, and only that


@dataclass(frozen=True)
class Unit:
    """A translation unit: `command` makes `output` of `source`, and besides a list of what it included.

    `versions` are those of what the command's text does not tell: the compiler, and the libraries whose headers it
    reads as the system's own.
    """

    source: str
    output: Path
    command: list[str]
    versions: list[str]

    @property
    def stamp(self) -> Path:
        """Written when the output is complete: what it was made of."""
        return self.output.with_suffix(".json")

    def is_current(self) -> bool:
        """Whether the output is what this command, with these versions, makes of the files as they are now."""
        try:
            made = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if [made["command"], made["versions"]] != [self.command, self.versions] or not self.output.exists():
            return False
        return all(digest(path) == was for path, was in made["files"].items())

    def compile(self) -> None:
        """Raises CalledProcessError, with what the compiler said, where it fails."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.unlink(missing_ok=True)  # an interrupted compilation leaves an object that nothing vouches for
        started = time.time()
        included = self.output.with_suffix(".d")
        command = [*self.command, "-MMD", "-MF", str(included), "-c", self.source, "-o", str(self.output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stdout + done.stderr)
        sys.stderr.write(done.stderr)  # warnings
        listed = included.read_text(encoding="utf-8").replace("\\\n", " ").partition(": ")[2]
        files = [path.replace("$$", "$") for path in shlex.split(listed)]
        if max(os.stat(path).st_mtime for path in files) > started:
            return  # edited meanwhile: the object may be of either text
        made = {"command": self.command, "versions": self.versions, "files": {p: digest(p) for p in files}}
        self.stamp.write_text(json.dumps(made), encoding="utf-8")


def digest(path: str) -> str | None:
    """Of a file's text: other than a time, it survives a copy and a checkout. None where there is no such file."""
    try:
        return digest_of(path, os.stat(path).st_mtime_ns)
    except OSError:
        return None


@functools.cache
def digest_of(path: str, mtime: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def compiler_version(compiler: str) -> str:
    """Path and version of a compiler, which a command names only."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{shutil.which(compiler)} {said}"


def compile_units(units: list[Unit]) -> None:
    """Compiles those that are not current, MAX_JOBS at a time, the largest first; stops at the first that fails."""
    stale = sorted((u for u in units if not u.is_current()), key=lambda u: -os.path.getsize(u.source))
    print(f"fused_ops: compiling {len(stale)} of {len(units)} translation units", flush=True)
    pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    try:
        for _ in pool.map(Unit.compile, stale):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


# ---- CUDA
def cuda_architectures(torch) -> list[str]:
    """nvcc's flags for the GPUs to build for: TORCH_CUDA_ARCH_LIST, else those that torch was built for."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        listed = re.findall(r"(\d+)\.(\d+[af]?)(\+PTX)?", wanted)
        if not listed:
            raise SystemExit(f"fused_ops: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got {wanted!r}")
        found = [(major + minor, bool(ptx)) for major, minor, ptx in listed]
    else:
        found = [
            (n, kind == "compute") for kind, n in re.findall(r"(sm|compute)_(\d+[af]?)", torch._C._cuda_getArchFlags())
        ]
    flags = []
    for number, ptx in found:
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def why_no_cuda(torch, cuda_home: str | None) -> str | None:
    """Why the CUDA kernels cannot be built, or None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if cuda_home is None or not (Path(cuda_home) / "bin" / "nvcc").exists():
        return "there is no nvcc (set CUDA_HOME)"
    said = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release.group(1) if release else '?'}, torch of CUDA {torch.version.cuda}"
    return None


# ---- what setuptools is told


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def object_of(folder: Path, source: str) -> Path:
    return folder / Path(source).relative_to("csrc").with_suffix(".o")


def kernel_units(objects: Path, cxx: list[str]) -> list[Unit]:
    """Each csrc/*/cpu/*.cpp once per ISA, into a namespace of its own."""
    versions = [compiler_version(cxx[0])]
    units = []
    for isa, flags in ISA_FLAGS.items():
        command = [*cxx, *COMMON_FLAGS, *KERNEL_FLAGS, f"-DFUSED_OPS_ISA={isa}", *flags]
        for s in sources("*/cpu/*.cpp"):
            cold = ["-O2"] if s in COLD and not SANITIZE and "-Os" not in flags else []
            units.append(Unit(s, object_of(objects / isa, s), [*command, *cold], versions))
    return units


def binding_units(objects: Path, cxx: list[str], include: list[str], torch_version: str, cuda: bool) -> list[Unit]:
    """Each csrc/<op>/*.cpp, those for CUDA only where its kernels are built.

    Torch's headers are the system's, without the path that they have here.
    """
    found = [flag for folder in include for flag in ("-isystem", folder, f"-ffile-prefix-map={folder}/=")]
    command = [*cxx, *COMMON_FLAGS, *(["-DUSE_CUDA"] if cuda else []), *found]
    versions = [compiler_version(cxx[0]), torch_version]
    wanted = [s for s in sources("*/*.cpp") if cuda or not s.endswith("_cuda.cpp")]
    return [Unit(s, object_of(objects, s), command, versions) for s in wanted]


class PlatformWheel(bdist_wheel):
    """For every Python of a platform, free-threaded ones too: the library has no symbol of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class BuildLibrary(build_ext):
    """Compiles the units of the extension and links them into one library, which is no module of Python's."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        inplace = self.inplace
        try:
            super().run()
        except (subprocess.CalledProcessError, BaseError, OSError) as error:  # OSError: a full disk, for one
            sys.stderr.write(getattr(error, "stderr", ""))
            leave_out(f"the library could not be built: {error}")
            for self.inplace in (False, inplace):  # an older one would be taken for it
                Path(self.get_ext_fullpath(LIBRARY)).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        # an editable installation is given a temporary folder, and would start from nothing each time
        usual = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        objects = Path(usual if self.editable_mode else self.build_temp)
        units = extension.units(objects)
        compile_units(units)
        extension.extra_objects = [str(unit.output) for unit in units]
        # linking takes a second, and whether it is needed is not told by times alone
        self.force = self.compiler.force = True
        super().build_extensions()


def native_extension() -> dict[str, object]:
    """The setup() arguments that build the library, or none of them where it cannot be built."""
    if os.environ.get("FUSED_OPS_BUILD") == "0":
        leave_out("FUSED_OPS_BUILD=0")
        return {}
    if sys.platform != "linux" and os.environ.get("FUSED_OPS_BUILD") != "1":
        leave_out(f"the library is for Linux, and this is {sys.platform}")
        return {}
    if shutil.which(CXX[0]) is None:
        leave_out("no C++ compiler found")
        return {}
    cuda = os.environ.get("FUSED_OPS_CUDA")
    cuda_sources = sources("*/cuda/*.cu")
    if cuda == "1" and not cuda_sources:
        raise SystemExit("fused_ops: FUSED_OPS_CUDA=1, but this release has no CUDA kernels")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension
    except Exception as error:  # half an installation fails as it likes
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        why = "is not installed in the build environment (use --no-build-isolation)"
        leave_out(f"torch {why}" if missing else f"torch cannot be imported: {type(error).__name__}: {error}")
        return {}
    if [int(n) for n in re.findall(r"\d+", torch.__version__)[:2]] < [2, 10]:
        leave_out(f"expected torch >= 2.10 in the build environment, got {torch.__version__}")
        return {}
    no_cuda = "FUSED_OPS_CUDA=0" if cuda == "0" else why_no_cuda(torch, CUDA_HOME)
    if no_cuda and cuda == "1":
        raise SystemExit(f"fused_ops: FUSED_OPS_CUDA=1, but {no_cuda}")
    with_cuda = bool(cuda_sources) and no_cuda is None
    extension = (CUDAExtension if with_cuda else CppExtension)(
        LIBRARY, [], extra_link_args=LINK_FLAGS, py_limited_api=True
    )
    extension.py_limited_api = False  # said to torch, which links nothing of Python's then; setuptools has other ideas
    if other := os.environ.get("FUSED_OPS_TORCH"):
        here = str(Path(torch.__file__).parent)
        extension.include_dirs = [folder.replace(here, other) for folder in extension.include_dirs]
        extension.library_dirs = [folder.replace(here, other) for folder in extension.library_dirs]

    def units(objects: Path) -> list[Unit]:
        found = kernel_units(objects, CXX)
        if with_cuda:
            nvcc = [f"{CUDA_HOME}/bin/nvcc", *NVCC_FLAGS, *cuda_architectures(torch)]
            versions = [compiler_version(nvcc[0])]
            found += [Unit(s, object_of(objects / "cuda", s), nvcc, versions) for s in cuda_sources]
        return found + binding_units(objects, CXX, extension.include_dirs, torch.__version__, with_cuda)

    extension.units = units
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel}}


if __name__ == "__main__":
    setuptools.setup(**native_extension())

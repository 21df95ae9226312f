"""Builds the optional native libraries, one of CPU kernels and one of CUDA kernels. All else is in pyproject.toml.

Environment:
    FUSED_OPS_BUILD=0|1  install without the native library (pure PyTorch) | fail where it cannot be built; by default
        it is built if it can be, and a warning says what is missing if not.
    FUSED_OPS_CUDA=0|1  leave the CUDA kernels out | require them; by default they are built where there is an nvcc:
        into a wheel beside any torch, in place only beside a torch with CUDA, which alone can load them.
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  the GPUs to build for; by default CUDA_ARCHITECTURES and those of this machine.
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
LIBRARY, CUDA_LIBRARY = "fused_ops._C", "fused_ops._C_cuda"
# Compute capabilities; code for one runs on the later ones of its decade. Beyond them there is the PTX of PTX_FROM.
CUDA_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PTX_FROM = 100
OLDEST_CUDA = 12  # of which there are releases of torch >= 2.10
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


def leave_out_cuda(reason: str) -> None:
    """The same of the CUDA kernels."""
    if os.environ.get("FUSED_OPS_CUDA") == "1":
        raise SystemExit(f"fused_ops: FUSED_OPS_CUDA=1, but {reason}")
    what = "GPUs will run plain PyTorch, right but slower"
    print(f"fused_ops: WARNING: {reason}; installing without the CUDA kernels: {what}", file=sys.stderr)


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


# ---- CUDA: nvcc and its static runtime, whatever CUDA torch has, or none


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    nvcc: str
    major: int
    runtime: str  # the static one, so that the library needs no CUDA library but the driver's

    def architectures(self, torch) -> list[str]:
        """nvcc's flags for the GPUs to build for."""
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if wanted:
            listed = re.findall(r"(\d+)\.(\d+[af]?)(\+PTX)?", wanted)
            if not listed:
                raise SystemExit(f"fused_ops: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got {wanted!r}")
            found = [(major + minor, bool(ptx)) for major, minor, ptx in listed]
        else:
            listing = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
            known = {int(n) for n in re.findall(r"compute_(\d+)", listing)}
            here = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
            numbers = sorted(known & {*CUDA_ARCHITECTURES, *(10 * major + minor for major, minor in here)})
            found = [(str(n), n == max(m for m in numbers if m <= PTX_FROM)) for n in numbers]
        flags = []
        for number, ptx in found:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return list(dict.fromkeys(flags))

    def defines(self, torch) -> list[str]:
        """What the bindings are told: which CUDA the driver must know, and the oldest compute capability with code."""
        oldest = min(int(n) for flag in self.architectures(torch) for n in re.findall(r"arch=compute_(\d+)", flag))
        return ["-DUSE_CUDA", f"-DFUSED_OPS_CUDA_MAJOR={self.major}", f"-DFUSED_OPS_CUDA_OLDEST={oldest}"]

    def command(self, torch) -> list[str]:
        """What compiles a .cu file. The code for every GPU but one is dead weight, so it is compressed."""
        small = ["--compress-mode=size"] if self.major >= 13 else ["-Xfatbin", "-compress-all"]
        return [self.nvcc, *NVCC_FLAGS, *small, *self.architectures(torch)]


def find_cuda() -> Cuda | str:
    """The toolkit of CUDA_HOME, or else of the nvcc on the PATH or where it is usually; or why there is none."""
    on_path = shutil.which("nvcc")
    usual = [Path(on_path).resolve().parent.parent] if on_path else []
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else [*usual, Path("/usr/local/cuda")]
    why = "there is no nvcc (set CUDA_HOME)"
    for home in (home for home in homes if (home / "bin" / "nvcc").exists()):
        nvcc = str(home / "bin" / "nvcc")
        release = re.search(r"release (\d+)", compiler_version(nvcc))
        machine = target_machine()  # lib/<machine>-linux-gnu: Debian's own packages
        folders = ("lib64", "lib", f"targets/{machine}-linux/lib", f"lib/{machine}-linux-gnu")
        runtime = next((path for f in folders if (path := home / f / "libcudart_static.a").exists()), None)
        if release is None:
            why = f"{nvcc} does not say its version"
        elif int(release[1]) < OLDEST_CUDA:
            why = f"expected CUDA >= {OLDEST_CUDA}, got {release[1]}: {nvcc}"
        elif runtime is None:
            why = f"there is no libcudart_static.a under {home}"
        else:
            return Cuda(nvcc, int(release[1]), str(runtime))
    return why


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


def binding_units(
    objects: Path, cxx: list[str], include: list[str], torch_version: str, for_cuda: list[str] | None = None
) -> list[Unit]:
    """Each csrc/<op>/*.cpp, those for CUDA, with these flags, or all others.

    Torch's headers are the system's, without the path that they have here.
    """
    found = [flag for folder in include for flag in ("-isystem", folder, f"-ffile-prefix-map={folder}/=")]
    command = [*cxx, *COMMON_FLAGS, *(for_cuda or []), *found]
    versions = [compiler_version(cxx[0]), torch_version]
    wanted = [s for s in sources("*/*.cpp") if s.endswith("_cuda.cpp") == (for_cuda is not None)]
    return [Unit(s, object_of(objects, s), command, versions) for s in wanted]


def cuda_units(objects: Path, cuda: Cuda, torch) -> list[Unit]:
    """Each csrc/*/cuda/*.cu."""
    command, versions = cuda.command(torch), [compiler_version(cuda.nvcc)]
    return [Unit(s, object_of(objects / "cuda", s), command, versions) for s in sources("*/cuda/*.cu")]


class PlatformWheel(bdist_wheel):
    """For every Python of a platform, free-threaded ones too: the library has no symbol of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


FAILURES = (subprocess.CalledProcessError, BaseError, OSError)  # of a build; OSError: a full disk, for one


class BuildLibraries(build_ext):
    """Compiles the units of each extension and links them into one library, which is no module of Python's."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        self.beside_sources = bool(self.inplace) or self.editable_mode
        if self.beside_sources:
            self.extensions = [extension for extension in self.extensions if extension.wanted_in_place]
        if all(extension.name != CUDA_LIBRARY for extension in self.extensions):
            self.remove(CUDA_LIBRARY)
        try:
            super().run()
        except FAILURES as error:
            sys.stderr.write(getattr(error, "stderr", ""))
            leave_out(f"the library could not be built: {error}")
            self.remove(LIBRARY)
            self.remove(CUDA_LIBRARY)
            self.extensions = self.distribution.ext_modules = []

    def remove(self, library: str) -> None:
        """An older one, which would be taken for this build's."""
        was, places = self.inplace, [False, *([True] if self.beside_sources else [])]
        for place in places:
            self.inplace = place
            Path(self.get_ext_fullpath(library)).unlink(missing_ok=True)
        self.inplace = was

    def build_extensions(self) -> None:
        # linking takes a second, and whether it is needed is not told by times alone
        self.force = self.compiler.force = True
        super().build_extensions()

    def build_extension(self, extension) -> None:
        # an editable installation is given a temporary folder, and would start from nothing each time
        usual = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        try:
            units = extension.units(Path(usual if self.editable_mode else self.build_temp))
            compile_units(units)
            extension.extra_objects = [str(unit.output) for unit in units]
            super().build_extension(extension)
        except FAILURES as error:
            if extension.name != CUDA_LIBRARY:
                raise
            sys.stderr.write(getattr(error, "stderr", ""))
            leave_out_cuda(f"the CUDA kernels could not be built: {error}")
            self.remove(CUDA_LIBRARY)
            self.extensions = [other for other in self.extensions if other is not extension]


def native_extensions() -> dict[str, object]:
    """The setup() arguments that build the libraries, or none of them where they cannot be built."""
    if os.environ.get("FUSED_OPS_BUILD") == "0":
        leave_out("FUSED_OPS_BUILD=0")
        return {}
    if sys.platform != "linux" and os.environ.get("FUSED_OPS_BUILD") != "1":
        leave_out(f"the library is for Linux, and this is {sys.platform}")
        return {}
    if shutil.which(CXX[0]) is None:
        leave_out("no C++ compiler found")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except Exception as error:  # half an installation fails as it likes
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        why = "is not installed in the build environment (use --no-build-isolation)"
        leave_out(f"torch {why}" if missing else f"torch cannot be imported: {type(error).__name__}: {error}")
        return {}
    if [int(n) for n in re.findall(r"\d+", torch.__version__)[:2]] < [2, 10]:
        leave_out(f"expected torch >= 2.10 in the build environment, got {torch.__version__}")
        return {}

    def cpu_part(objects: Path) -> list[Unit]:
        return kernel_units(objects, CXX) + binding_units(objects, CXX, cpu.include_dirs, torch.__version__)

    cpu = CppExtension(LIBRARY, [], extra_link_args=LINK_FLAGS, py_limited_api=True)
    cpu.units, cpu.wanted_in_place = cpu_part, True
    extensions = [cpu, *cuda_extension(torch, CppExtension)]
    for extension in extensions:
        extension.py_limited_api = False  # said to torch, which links nothing of Python's then; setuptools differs
        if other := os.environ.get("FUSED_OPS_TORCH"):
            here = str(Path(torch.__file__).parent)
            extension.include_dirs = [folder.replace(here, other) for folder in extension.include_dirs]
            extension.library_dirs = [folder.replace(here, other) for folder in extension.library_dirs]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel}}


def cuda_extension(torch, make) -> list[object]:
    """The library of the CUDA kernels, where there is something to build it of and with."""
    wish = os.environ.get("FUSED_OPS_CUDA")
    if wish == "0":
        return []
    cuda = find_cuda() if sources("*/cuda/*.cu") else "this release has no CUDA kernels"
    if isinstance(cuda, str):
        if wish == "1" or torch.version.cuda is not None:
            leave_out_cuda(cuda)
        return []
    # libtorch.so brings libtorch_cuda.so where there is one, and nothing else names it: it need not be here
    link = [*LINK_FLAGS, "-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
    extension = make(
        CUDA_LIBRARY, [], extra_link_args=[*link, cuda.runtime, "-ldl", "-lrt", "-lpthread"], py_limited_api=True
    )

    def units(objects: Path) -> list[Unit]:
        bindings = binding_units(objects, CXX, extension.include_dirs, torch.__version__, cuda.defines(torch))
        return [*cuda_units(objects, cuda, torch), *bindings]

    extension.units, extension.wanted_in_place = units, torch.version.cuda is not None or wish == "1"
    return [extension]


if __name__ == "__main__":
    setuptools.setup(**native_extensions())

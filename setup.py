"""Builds the optional native library. Everything else about the package is in pyproject.toml.

Environment:
    FUSED_OPS_BUILD=0   install without the native library (pure PyTorch).
    FUSED_OPS_CUDA=0|1  leave the CUDA kernels out | require them; by default they are built if they can be.
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  the GPUs to build for; by default those that torch was built for.
    FUSED_OPS_SANITIZE=address|undefined|thread  build for a sanitizer (see .ci/sanitize).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ISA_FLAGS: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["AVX512"] = [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ]
KERNEL_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
COMMON_FLAGS = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden"]
SANITIZERS = {
    "address": ["-fsanitize=address"],
    "undefined": [
        *("-fno-wrapv", "-fsanitize=undefined", "-fsanitize=float-cast-overflow"),
        "-fno-sanitize-recover=undefined,float-cast-overflow",
    ],
    "thread": ["-fsanitize=thread"],
}
LINK_FLAGS: list[str] = []
if os.environ.get("FUSED_OPS_SANITIZE"):
    LINK_FLAGS = SANITIZERS[os.environ["FUSED_OPS_SANITIZE"]]
    sanitize = ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG", *LINK_FLAGS]
    COMMON_FLAGS, KERNEL_FLAGS = COMMON_FLAGS + sanitize, KERNEL_FLAGS + sanitize


def warn(message: str) -> None:
    print(f"fused_ops: WARNING: {message}; installing without the native library (pure PyTorch)", file=sys.stderr)


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


def native_extension() -> dict[str, object]:
    """The setup() arguments that build the library, or none of them where it cannot be built."""
    if os.environ.get("FUSED_OPS_BUILD", "1") == "0":
        warn("FUSED_OPS_BUILD=0")
        return {}
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        warn("no C++ compiler found")
        return {}
    cuda = os.environ.get("FUSED_OPS_CUDA")
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
    if cuda == "1" and not cuda_sources:
        raise SystemExit("fused_ops: FUSED_OPS_CUDA=1, but this release has no CUDA kernels")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        warn("torch is not installed in the build environment (use --no-build-isolation)")
        return {}
    no_cuda = "FUSED_OPS_CUDA=0" if cuda == "0" else why_no_cuda(torch, CUDA_HOME)
    if no_cuda and cuda == "1":
        raise SystemExit(f"fused_ops: FUSED_OPS_CUDA=1, but {no_cuda}")
    with_cuda = bool(cuda_sources) and no_cuda is None

    class BuildPerIsa(BuildExtension):
        """Compiles csrc/cpu/*.cpp once per ISA, each into its own namespace, and all of it into one library."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": False, "no_python_abi_suffix": True})

        def build_extensions(self) -> None:
            extension = self.extensions[0]
            compiler, build = self.compiler, Path(self.build_temp)
            jobs = []
            for isa, flags in ISA_FLAGS.items():
                for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
                    jobs.append(
                        (source, build / isa / f"{source.stem}.o", [*KERNEL_FLAGS, f"-DFUSED_OPS_ISA={isa}", *flags])
                    )
            if with_cuda:
                nvcc = [f"{CUDA_HOME}/bin/nvcc", *NVCC_FLAGS, *cuda_architectures(torch)]
                jobs += [(Path(source), build / "cuda" / f"{Path(source).stem}.o", nvcc) for source in cuda_sources]
            binding = [*(["-DUSE_CUDA"] if with_cuda else []), *(f"-I{folder}" for folder in extension.include_dirs)]
            jobs += [(Path(source), build / f"{Path(source).stem}.o", binding) for source in extension.sources]
            compile_parallel(compiler, jobs)
            extension.sources, extension.extra_objects = [], [str(output) for _, output, _ in jobs]
            super().build_extensions()

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python knows no wheels for all versions
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "fused_ops._C",
        [source for source in sources if with_cuda or not source.endswith("_cuda.cpp")],
        extra_link_args=LINK_FLAGS,
        depends=[
            str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
        ],
        py_limited_api=limited,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildPerIsa},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
    }


def compile_parallel(compiler, jobs) -> None:
    """Compiles (source, object, flags) with all cores; an object newer than every source is left alone.

    The flags of a .cu are its whole command but for the files.
    """
    from concurrent.futures import ThreadPoolExecutor

    newest = max(p.stat().st_mtime for p in [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.[ch]*")])  # .cu and .cuh too

    def compile_one(job) -> None:
        source, output, flags = job
        if output.exists() and output.stat().st_mtime > newest:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".cu":
            compiler.spawn([*flags, "-c", str(source), "-o", str(output)])
            return
        base = [flag for flag in compiler.compiler_so if flag != "-Wstrict-prototypes"]
        compiler.spawn([*base, *COMMON_FLAGS, *flags, "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))


setup(**native_extension())

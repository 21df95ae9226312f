"""Builds the optional native library. Everything else about the package is in pyproject.toml.

Environment:
    FUSED_OPS_BUILD=0   install without the native library (pure PyTorch).
    FUSED_OPS_CUDA=0|1  leave the CUDA kernels out | require them; by default they are built if they can be.
    FUSED_OPS_SANITIZE=address|undefined|thread  build for a sanitizer (see .ci/sanitize).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
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
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        warn("torch is not installed in the build environment (use --no-build-isolation)")
        return {}

    class BuildPerIsa(BuildExtension):
        """Compiles csrc/cpu/*.cpp once per ISA, each into its own namespace, and links them into one library."""

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
            compile_parallel(compiler, jobs)
            extension.extra_objects = [str(output) for _, output, _ in jobs]
            super().build_extensions()

    extension = CppExtension(
        "fused_ops._C",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")),
        extra_compile_args=COMMON_FLAGS,
        extra_link_args=LINK_FLAGS,
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildPerIsa},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def compile_parallel(compiler, jobs) -> None:
    """Compiles (source, object, flags) with all cores; an object newer than every source is left alone."""
    from concurrent.futures import ThreadPoolExecutor

    newest = max(p.stat().st_mtime for p in [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.[ch]*")])

    def compile_one(job) -> None:
        source, output, flags = job
        if output.exists() and output.stat().st_mtime > newest:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        base = [flag for flag in compiler.compiler_so if flag != "-Wstrict-prototypes"]
        compiler.spawn([*base, *COMMON_FLAGS, *flags, "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))


setup(**native_extension())

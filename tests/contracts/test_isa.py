"""Which instruction set the kernels take: never one that the processor, or the operating system, does not have."""

import shutil
import subprocess

import pytest
from conftest import ROOT

COMPILERS = [name for name in ("g++", "clang++", "clang++-19", "clang++-16") if shutil.which(name)]
CODE = r"""
#include "core/isa.h"
#include <cstdio>
using namespace fused_ops;

constexpr uint32_t kLeaf1 = 1u << 12 | 1u << 28 | 1u << 29;                   // fma, avx, f16c
constexpr uint32_t kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // f, dq, bw, vl

constexpr bool takes(uint32_t leaf1, uint32_t leaf7, uint64_t saved, Isa expected) {
  return best_isa(Processor{leaf1, leaf7, saved}) == expected;
}
static_assert(takes(kLeaf1, kAvx2 | kAvx512, 0xe7, Isa::AVX512));
static_assert(takes(kLeaf1, kAvx2, 0xe7, Isa::AVX2));
static_assert(takes(kLeaf1, kAvx2, 0x7, Isa::AVX2));
static_assert(takes(kLeaf1, kAvx2 | kAvx512, 0x7, Isa::AVX2));     // the system does not save zmm registers
static_assert(takes(kLeaf1, kAvx2 | kAvx512, 0x67, Isa::AVX2));    // nor all of them
static_assert(takes(kLeaf1, kAvx2 | kAvx512, 0x3, Isa::DEFAULT));  // nor ymm registers
static_assert(takes(kLeaf1, kAvx2 | kAvx512, 0, Isa::DEFAULT));
static_assert(takes(0, 0, 0xe7, Isa::DEFAULT));

// Whether each single bit is needed.
constexpr bool all_needed(uint32_t leaf1, uint32_t leaf7, Isa without) {
  for (uint32_t bit = 1; bit; bit <<= 1) {
    if ((leaf1 & bit) && !takes(kLeaf1 & ~bit, kAvx2 | kAvx512, 0xe7, without)) return false;
    if ((leaf7 & bit) && !takes(kLeaf1, (kAvx2 | kAvx512) & ~bit, 0xe7, without)) return false;
  }
  return true;
}
static_assert(all_needed(kLeaf1, kAvx2, Isa::DEFAULT));
static_assert(all_needed(0, kAvx512, Isa::AVX2));

int main() {
  const Isa all[] = {Isa::DEFAULT, Isa::AVX2, Isa::AVX512};
  const char* wishes[] = {"default", "avx2", "avx512", "nonsense", nullptr};
  for (Isa best : all)
    for (const char* wish : wishes)
      std::printf("%d ", static_cast<int>(chosen_isa(best, wish)));
  std::printf("%d\n", static_cast<int>(best_isa(this_processor())));
}
"""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_isa_beyond_the_processor(compiler, tmp_path):
    (tmp_path / "isa.cpp").write_text(CODE)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "isa.cpp", "-o", "isa"]
    subprocess.run(command, cwd=tmp_path, check=True)
    *chosen, best = subprocess.run([tmp_path / "isa"], capture_output=True, text=True, check=True).stdout.split()
    assert chosen == [*"00000", *"01111", *"01222"]
    with open("/proc/cpuinfo") as file:
        flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    avx2 = {"avx2", "fma", "f16c"} <= flags
    assert int(best) == (2 if avx2 and {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags else int(avx2))

// Which of the per-ISA copies of a CPU kernel to run. Each csrc/*/cpu/*.cpp is compiled once per ISA into a namespace
// of its own (setup.py passes -DFUSED_OPS_ISA=<name>); the choice is made once per process, from the CPU and from
// ATEN_CPU_CAPABILITY (default | avx2 | avx512), which can only lower it.
#pragma once
#include <cstdlib>
#include <cstring>

namespace fused_ops {

enum class Isa { DEFAULT, AVX2, AVX512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  Isa best = Isa::DEFAULT;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      best = Isa::AVX512;
  }
  if (const char* wish = std::getenv("ATEN_CPU_CAPABILITY")) {
    if (!std::strcmp(wish, "default")) return Isa::DEFAULT;
    if (!std::strcmp(wish, "avx2") && best == Isa::AVX512) return Isa::AVX2;
  }
  return best;
#else
  return Isa::DEFAULT;
#endif
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace fused_ops

// Declares `signature` in every ISA's namespace, for a contract header; FUSED_OPS_SELECT picks one at run time.
#if defined(__x86_64__)
#define FUSED_OPS_PER_ISA(signature) \
  namespace DEFAULT {                \
  signature;                         \
  }                                  \
  namespace AVX2 {                   \
  signature;                         \
  }                                  \
  namespace AVX512 {                 \
  signature;                         \
  }
#define FUSED_OPS_SELECT(name)                                           \
  (::fused_ops::current_isa() == ::fused_ops::Isa::AVX512 ? AVX512::name \
   : ::fused_ops::current_isa() == ::fused_ops::Isa::AVX2 ? AVX2::name   \
                                                          : DEFAULT::name)
#else
#define FUSED_OPS_PER_ISA(signature) \
  namespace DEFAULT {                \
  signature;                         \
  }
#define FUSED_OPS_SELECT(name) (DEFAULT::name)
#endif

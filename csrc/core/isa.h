// Which of the per-ISA copies of a CPU kernel to run. Each csrc/*/cpu/*.cpp is compiled once per ISA into a namespace
// of its own (setup.py passes -DFUSED_OPS_ISA=<name>); the choice is made once per process, from the CPU and from
// ATEN_CPU_CAPABILITY (default | avx2 | avx512), which can only lower it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_ops {

enum class Isa { DEFAULT, AVX2, AVX512 };

// What an x86 processor says of itself: leaf 1's ECX, leaf 7's EBX, and the register states that the operating system
// saves (XCR0; 0 where it does not say).
struct Processor {
  uint32_t leaf1_ecx, leaf7_ebx;
  uint64_t saved_states;
};

// The best ISA whose instructions the processor has and whose registers the operating system saves. Read from the bits
// themselves: clang's __builtin_cpu_supports knows no "f16c".
constexpr Isa best_isa(const Processor& p) {
  constexpr uint32_t kFma = 1u << 12, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint64_t kXmmYmm = 0x6, kMasksZmm = 0xe0;
  const auto all = [](auto value, auto bits) { return (value & bits) == bits; };
  if (!all(p.saved_states, kXmmYmm) || !all(p.leaf1_ecx, kFma | kAvx | kF16c) || !all(p.leaf7_ebx, kAvx2))
    return Isa::DEFAULT;
  return all(p.saved_states, kMasksZmm) && all(p.leaf7_ebx, kF | kDq | kBw | kVl) ? Isa::AVX512 : Isa::AVX2;
}

#if defined(__x86_64__)
inline Processor this_processor() {
  constexpr uint32_t kXgetbv = 1u << 27;
  Processor p{};
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) p.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) p.leaf7_ebx = ebx;
  if (p.leaf1_ecx & kXgetbv) {
    __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    p.saved_states = static_cast<uint64_t>(edx) << 32 | eax;
  }
  return p;
}
#else
inline Processor this_processor() { return {}; }
#endif

// `wish` is ATEN_CPU_CAPABILITY, or null. More than the processor has is not granted; PyTorch's own kernels grant it.
inline Isa chosen_isa(Isa best, const char* wish) {
  if (!wish) return best;
  if (!std::strcmp(wish, "default")) return Isa::DEFAULT;
  return !std::strcmp(wish, "avx2") && best == Isa::AVX512 ? Isa::AVX2 : best;
}

inline Isa current_isa() {
  static const Isa isa = chosen_isa(best_isa(this_processor()), std::getenv("ATEN_CPU_CAPABILITY"));
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

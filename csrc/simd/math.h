// Vectorisable arithmetic for the CPU kernels: an inline exp, 16-bit conversions and blockwise lane reductions.
// Plain loops that the compiler turns into vectors of whatever width this file's ISA has; nothing here needs
// -ffast-math.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/dtype.h"
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header leaves operands undefined on purpose, and GCC 12 warns of each (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

// The versions of these two that every glibc has: the newer ones differ in how they report errors, which is not asked,
// and would shut out systems before 2.29.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5\n.symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17\n.symver log, log@GLIBC_2.17");
#endif

#ifndef FUSED_OPS_ISA
#define FUSED_OPS_ISA DEFAULT
#endif

// float64 serves checks of gradients and has one copy of its kernels, the DEFAULT one's: FUSED_OPS_FLOAT64 calls
// `kernel`<double> there, and elsewhere `entry`, the function of the contract that this is in.
#if defined(__AVX2__)
#define FUSED_OPS_FLOAT64(kernel, entry, ...) ::fused_ops::DEFAULT::entry(__VA_ARGS__)
#else
#define FUSED_OPS_FLOAT64(kernel, entry, ...) kernel<double>(__VA_ARGS__)
#endif

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kLanes =
    16;  // accumulators per reduction, whatever the vector width: one order of summation for all ISAs
constexpr int64_t kChunk = 1024;  // elements converted at a time: 4 KiB of float, stays in L1

template <class To, class From>
inline To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Whether a * b + c is rounded once, which decides how the last terms of a polynomial are best added.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// exp(x) for x of at most 44, as what exponentials are taken of is a logit beside the maximum or lse of its row: at
// most 0, but for rounding. Cody-Waite reduction, x = n ln2 + r, |r| <= ln2/2, and a polynomial of degree 6, the
// minimax one, for exp(r). 2^(n + 64) is a float for any such x, which the product meets without an error, and 2^-64
// rounds once where the result is denormal. To 0.9 ulp, without
// fused multiply-add 1.0 (docs/reliability.md).
inline float exp_(float x) {
  x = x < -131.0f ? -131.0f : x;                                 // written so that NaN falls through
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  float poly = 1.3814540579915047e-3f;
  poly = poly * r + 8.36874544620514e-3f;
  poly = poly * r + 4.166838899254799e-2f;
  poly = poly * r + 1.666652113199234e-1f;
  poly = poly * r + 4.999999403953552e-1f;
  poly = kFusedMultiplyAdd ? (poly * r + 1.0f) * r + 1.0f : poly * r * r + r + 1.0f;
  return poly * bit_copy<float>((bit_copy<uint32_t>(shifted) << 23) + 0x5f800000u) * 0x1p-64f;  // n is in the low bits
}
inline double exp_(double x) { return std::exp(x); }

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(bfloat16_t v) { return bit_copy<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_acc(float16_t v) {
#if defined(__F16C__) && !defined(FUSED_OPS_GENERIC)
  return _cvtsh_ss(v.bits);
#elif defined(__aarch64__) && !defined(FUSED_OPS_GENERIC)
  return bit_copy<__fp16>(v);
#else
  // Exponent and mantissa moved into a float, then rescaled by 2^112: denormals come out right without a branch.
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  float f = bit_copy<float>(magnitude) * 5.192296858534828e33f;
  if ((v.bits & 0x7c00u) == 0x7c00u) f = bit_copy<float>(magnitude | 0x7f800000u);
  return bit_copy<float>(bit_copy<uint32_t>(f) | sign);
#endif
}

inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
inline void store(bfloat16_t* p, float v) {  // round to nearest even
  const uint32_t u = bit_copy<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
inline void store(float16_t* p, float v) {
#if defined(__F16C__) && !defined(FUSED_OPS_GENERIC)
  p->bits = static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__) && !defined(FUSED_OPS_GENERIC)
  p->bits = bit_copy<uint16_t>(static_cast<__fp16>(v));
#else
  const uint32_t u = bit_copy<uint32_t>(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {
    h = 0x7c00u;  // 65520 and above round to inf
  } else if (a < 0x38800000u) {
    h = bit_copy<uint32_t>(bit_copy<float>(a) + 0.5f) - 0x3f000000u;  // the addition rounds to the denormal grid
  } else {
    a += 0xfffu + ((a >> 13) & 1u);
    h = (a - 0x38000000u) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
#endif
}

// n <= kChunk elements at `from`, `stride` apart, as accumulators: the memory itself where it already is that.
template <class T>
inline const acc_t<T>* load_chunk(const T* from, int64_t stride, int64_t n, acc_t<T>* buffer) {
  if (stride == 1) {
    if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
      return from;
    } else {
      int64_t i = 0;
#if defined(__F16C__) && !defined(FUSED_OPS_GENERIC)
      if constexpr (sizeof(T) == 2) {
        if (std::is_same_v<T, float16_t>)
          for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
      }
#endif
      for (; i < n; ++i) buffer[i] = to_acc(from[i]);
      return buffer;
    }
  }
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_acc(from[i * stride]);
  return buffer;
}

template <class T>
inline void store_chunk(T* to, int64_t stride, int64_t n, const acc_t<T>* from) {
  int64_t i = 0;
  if (stride == 1) {
#if defined(__F16C__) && !defined(FUSED_OPS_GENERIC)
    if constexpr (std::is_same_v<T, float16_t>) {
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) store(to + i, from[i]);
    return;
  }
  for (; i < n; ++i) store(to + i * stride, from[i]);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

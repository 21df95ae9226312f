// One register of floats of this file's ISA: for the loops whose registers must not be left to chance. Loads and stores
// convert the 16-bit types. -DFUSED_OPS_GENERIC leaves out each ISA's own instructions, to test what is without them.
#pragma once
#if defined(FUSED_OPS_GENERIC)
#include "simd/vec_generic.h"
#elif defined(__AVX512F__)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "simd/vec_avx2.h"
#elif defined(__aarch64__)
#include "simd/vec_neon.h"
#else
#include "simd/vec_generic.h"
#endif

#ifndef FUSED_OPS_OF_PARTS  // a function of parts of lines, which is kept out of the loop of whole ones
#define FUSED_OPS_OF_PARTS __attribute__((noinline))
#endif

namespace fused_ops {
namespace FUSED_OPS_ISA {

#if defined(FUSED_OPS_GENERIC) || !(defined(__AVX2__) || defined(__aarch64__))
using namespace generic;
#endif

// log(1 + x) for finite x >= 0 (or NaN) to 2.5 ulp: 1 + x = m 2^e, m in [sqrt(1/2), sqrt(2)), and the series of
// log m = 2 atanh((m - 1) / (m + 1)) to its 23rd power; what 1 + x rounds away is added back to first order.
inline double log1p_(double x) {
  const double u = 1.0 + x;
  const double lost = x - (u - 1.0);
  const uint64_t bits = bit_copy<uint64_t>(u);
  const uint64_t e_bits = (bits - 0x3fe6a09e667f3bcdu) >> 52;
  const double m = bit_copy<double>(bits - (e_bits << 52));
  const double e = bit_copy<double>(e_bits | 0x4330000000000000u) - 4503599627370496.0;
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double poly = 1.0 / 23;
  poly = poly * z + 1.0 / 21;
  poly = poly * z + 1.0 / 19;
  poly = poly * z + 1.0 / 17;
  poly = poly * z + 1.0 / 15;
  poly = poly * z + 1.0 / 13;
  poly = poly * z + 1.0 / 11;
  poly = poly * z + 1.0 / 9;
  poly = poly * z + 1.0 / 7;
  poly = poly * z + 1.0 / 5;
  poly = poly * z + 1.0 / 3;
  const double log_m = 2.0 * s + 2.0 * s * (z * poly);
  const double result = e * 0.693147180369123816490 + (e * 1.90821492927058770002e-10 + (log_m + lost / u));
  return x != x ? x : result;
}

// Two registers of 2 kWidth adjacent values, where the order does not matter: of bfloat16 the even ones and the odd
// ones, as a load of both and a shift, or a mask, is all that takes. Lane l of `first` is value first_of_pair<T>()[l],
// and of `second` kPairStep<T> behind that.
template <class T>
constexpr int32_t kPairStep = kAlternates<T> ? 1 : static_cast<int32_t>(kWidth);

template <class T>
inline int_vec first_of_pair() {
  return kAlternates<T> ? 2 * iota() : iota();
}

template <class T>
inline VecPair load_pair(const T* p) {
  if constexpr (kAlternates<T>) {
    const auto bits = load_bits<bits_vec>(p);
    return {bit_copy<float_vec>(bits << 16), bit_copy<float_vec>(bits & 0xffff0000u)};
  } else {
    return {load_vec(p), load_vec(p + kWidth)};
  }
}

template <class T>
inline void store_pair(T* p, const VecPair& v) {
  if constexpr (kAlternates<T>) {
    const auto bits = (round_to_bfloat16(v.first) >> 16) | (round_to_bfloat16(v.second) & 0xffff0000u);
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    store_vec(p, v.first), store_vec(p + kWidth, v.second);
  }
}

inline void store_pair(double* p, const DoublePair& v) { store_vec(p, v.low), store_vec(p + kWidth / 2, v.high); }

// The first n < kWidth values of v.
template <class T>
inline void store_tail(T* p, int64_t n, float_vec v) {
  if constexpr (kMasks && sizeof(T) == 4) {
    store_lanes(p, n, bit_copy<line_bits>(v));
  } else {
    T buffer[kWidth];
    store_vec(buffer, v);
    std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
  }
}

// Load or store of n <= kWidth values.
template <class T>
inline float_vec load_up_to(const T* p, int64_t n, float fill) {
  return n == kWidth ? load_vec(p) : load_tail(p, n, fill);
}
template <class T>
inline void store_up_to(T* p, int64_t n, float_vec v) {
  if (n == kWidth)
    store_vec(p, v);
  else
    store_tail(p, n, v);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

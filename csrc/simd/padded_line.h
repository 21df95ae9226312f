// A part of a cache line of values: read or written without touching a byte beyond it.
#pragma once
#include <cstring>

#include "simd/vector.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

#define FUSED_OPS_INLINE __attribute__((always_inline))  // of a lambda in a loop that must stay in registers
// A function of parts of lines: with masked lanes no longer than that of whole lines, else kept out of their loop.
#if defined(__AVX512F__)
#define FUSED_OPS_OF_PARTS inline FUSED_OPS_INLINE
#else
#define FUSED_OPS_OF_PARTS __attribute__((noinline))
#endif

constexpr int64_t kLineBytes = 64;

#if defined(__AVX512F__)
// n < 64 / sizeof(T) values, and `rest` behind them: no byte beyond them is read, or written.
template <class T>
inline FUSED_OPS_INLINE __m512i load_lanes(const T* from, int64_t n, __m512i rest) {
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) return _mm512_mask_loadu_epi64(rest, static_cast<__mmask8>(lanes), from);
  if constexpr (sizeof(T) == 4) return _mm512_mask_loadu_epi32(rest, static_cast<__mmask16>(lanes), from);
  return _mm512_mask_loadu_epi16(rest, lanes, from);
}
template <class T>
inline FUSED_OPS_INLINE void store_lanes(T* to, int64_t n, __m512i v) {
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(lanes), v);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(lanes), v);
  else
    _mm512_mask_storeu_epi16(to, lanes, v);
}
#endif

// A part of a line, with `fill` behind it. A copy of a size that is not known is a call, and loading the line behind it
// waits for its stores: with AVX-512, and to read four or eight bytes a value with AVX2, the lanes are masked instead.
template <class T>
struct PaddedLine {
  static constexpr int64_t kSize = kLineBytes / static_cast<int64_t>(sizeof(T));
  alignas(kLineBytes) T values[kSize] = {};
  PaddedLine() = default;
  PaddedLine(const T* from, int64_t n) {
#if defined(__AVX512F__)
    _mm512_store_si512(values, load_lanes(from, n, _mm512_setzero_si512()));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) >= 4) {
      constexpr int64_t kHalf = kSize / 2;
      store_half(values, load_half(from, n)), store_half(values + kHalf, load_half(from + kHalf, n - kHalf));
    } else {
      std::memcpy(values, from, static_cast<size_t>(n) * sizeof(T));
    }
#else
    std::memcpy(values, from, static_cast<size_t>(n) * sizeof(T));
#endif
  }
  PaddedLine(const T* from, int64_t n, T fill) {
    for (T& value : values) value = fill;
#if defined(__AVX512F__)
    _mm512_store_si512(values, load_lanes(from, n, _mm512_load_si512(values)));
#else
    std::memcpy(values, from, static_cast<size_t>(n) * sizeof(T));
#endif
  }
  void write(T* to, int64_t n) const {
#if defined(__AVX512F__)
    store_lanes(to, n, _mm512_load_si512(values));
#else
    std::memcpy(to, values, static_cast<size_t>(n) * sizeof(T));
#endif
  }

#if defined(__AVX2__) && !defined(__AVX512F__)
 private:
  static inline FUSED_OPS_INLINE __m256i load_half(const T* from, int64_t n) {
    if constexpr (sizeof(T) == 8) {
      const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3), count = _mm256_set1_epi64x(n);
      return _mm256_maskload_epi64(reinterpret_cast<const long long*>(from), _mm256_cmpgt_epi64(count, lane));
    } else {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i count = _mm256_set1_epi32(static_cast<int32_t>(n));
      return _mm256_maskload_epi32(reinterpret_cast<const int*>(from), _mm256_cmpgt_epi32(count, lane));
    }
  }
  static inline FUSED_OPS_INLINE void store_half(T* to, __m256i half) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), half);
  }
#endif
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

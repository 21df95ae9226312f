// A cache line of values in registers of accumulators: loads convert, stores round once or go past the cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "simd/padded_line.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

inline FUSED_OPS_INLINE void prefetch(const void* p) {  // inlined, or GCC finds that it has no effect
  __builtin_prefetch(p, 0, 2);
}

// For a part of a line at p: a masked load waits for both lines that a whole one would touch.
template <class T>
inline FUSED_OPS_INLINE void prefetch_part(const T* p) {
  prefetch(p), prefetch(reinterpret_cast<const char*>(p) + kLineBytes - 1);
}

using double_vec = vec_t<double>;
using bits_vec = vec_t<uint32_t>;
using wide_bits_vec = vec_t<uint64_t>;

inline void store_vec(double* p, double_vec v) { std::memcpy(p, &v, sizeof(v)); }

struct DoublePair {
  double_vec low, high;
};
inline DoublePair widen(float_vec v) {
#if defined(__AVX512F__)
  const __m512 f = bit_copy<__m512>(v);
  return {bit_copy<double_vec>(_mm512_cvtps_pd(_mm512_castps512_ps256(f))),
          bit_copy<double_vec>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(f, 1)))};
#elif defined(__AVX2__)
  const __m256 f = bit_copy<__m256>(v);
  return {bit_copy<double_vec>(_mm256_cvtps_pd(_mm256_castps256_ps128(f))),
          bit_copy<double_vec>(_mm256_cvtps_pd(_mm256_extractf128_ps(f, 1)))};
#else
  return {double_vec{v[0], v[1]}, double_vec{v[2], v[3]}};
#endif
}

// widen() of what lies at p.
inline DoublePair widen_at(const float* p) {
#if defined(__AVX512F__)
  return {bit_copy<double_vec>(_mm512_cvtps_pd(_mm256_loadu_ps(p))),
          bit_copy<double_vec>(_mm512_cvtps_pd(_mm256_loadu_ps(p + 8)))};
#elif defined(__AVX2__)
  return {bit_copy<double_vec>(_mm256_cvtps_pd(_mm_loadu_ps(p))),
          bit_copy<double_vec>(_mm256_cvtps_pd(_mm_loadu_ps(p + 4)))};
#else
  return widen(load_bits<float_vec>(p));
#endif
}

// v as one register's worth of bytes at p, which is aligned to it; kStream: past the cache.
template <bool kStream, class V>
inline void put(void* p, V v) {
  if constexpr (kStream) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bit_copy<__m512i>(v));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bit_copy<__m256i>(v));
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bit_copy<__m128i>(v));
#endif
  }
  std::memcpy(p, &v, sizeof(V));
}

// Streamed stores are ordered before what follows.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// kSize values of T. Registers hold them in an order of their own, lane j the value element(j): of bfloat16 a register
// takes every second value, which costs one instruction where consecutive ones cost two.
template <class T>
struct Line {
  using A = acc_t<T>;
  using V = vec_t<A>;
  static constexpr int64_t kLane = kVectorBytes / static_cast<int64_t>(sizeof(A));
  static constexpr int64_t kSize = kLineBytes / static_cast<int64_t>(sizeof(T));
  static constexpr int kVectors = static_cast<int>(kSize / kLane);
  static constexpr bool kPairs = std::is_same_v<T, bfloat16_t>;

  V v[kVectors];

  static constexpr int64_t element(int64_t j) {
    if (!kPairs) return j;
    const int64_t k = j / kLane, l = j % kLane;
    return k / 2 * 2 * kLane + 2 * l + k % 2;
  }

  static inline FUSED_OPS_INLINE Line load(const T* p) {
    Line line;
    if constexpr (kPairs) {
      for (int k = 0; k < kVectors; k += 2) {
        const bits_vec b = load_bits<bits_vec>(p + k * kLane);
        line.v[k] = bit_copy<V>(b << 16), line.v[k + 1] = bit_copy<V>(b & 0xffff0000u);
      }
    } else if constexpr (sizeof(T) == 2) {
      for (int k = 0; k < kVectors; ++k) line.v[k] = load_vec(p + k * kLane);
    } else {
      for (int k = 0; k < kVectors; ++k) line.v[k] = load_bits<V>(p + k * kLane);
    }
    return line;
  }

  template <bool kStream>
  inline FUSED_OPS_INLINE void store(T* p) const {
    if constexpr (kPairs) {
      for (int k = 0; k < kVectors; k += 2) put<kStream>(p + k * kLane, rounded_pair(v[k], v[k + 1]));
    } else if constexpr (sizeof(T) == 2) {
#if defined(__AVX512F__)
      put<kStream>(p, bits());
#elif defined(__AVX2__)
      for (int k = 0; k < kVectors; ++k)
        put<kStream>(p + k * kLane, _mm256_cvtps_ph(bit_copy<__m256>(v[k]), _MM_FROUND_TO_NEAREST_INT));
#else
      for (int k = 0; k < kVectors; ++k) store_vec(p + k * kLane, v[k]);
#endif
    } else {
      for (int k = 0; k < kVectors; ++k) put<kStream>(p + k * kLane, v[k]);
    }
  }

  // n < kSize values, and 0 or `fill` behind them: no byte beyond them is read, or written.
  static inline FUSED_OPS_INLINE Line load_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
    return of_bits(load_lanes(p, n, _mm512_setzero_si512()));
#else
    return load(PaddedLine<T>(p, n).values);
#endif
  }
  static inline FUSED_OPS_INLINE Line load_part(const T* p, int64_t n, T fill) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 8) return of_bits(load_lanes(p, n, bit_copy<__m512i>(V{} + fill)));
    if constexpr (sizeof(T) == 4) return of_bits(load_lanes(p, n, bit_copy<__m512i>(V{} + fill)));
    if constexpr (sizeof(T) == 2) return of_bits(load_lanes(p, n, _mm512_set1_epi16(bit_copy<int16_t>(fill))));
#else
    return load(PaddedLine<T>(p, n, fill).values);
#endif
  }
  inline FUSED_OPS_INLINE void store_part(T* p, int64_t n) const {
#if defined(__AVX512F__)
    store_lanes(p, n, bits());
#else
    PaddedLine<T> out;
    store<false>(out.values);
    out.write(p, n);
#endif
  }

  // Both with the values in the registers' order, kSize of them at p.
  static inline FUSED_OPS_INLINE Line load_ordered(const A* p) {
    Line line;
    for (int k = 0; k < kVectors; ++k) line.v[k] = load_bits<V>(p + k * kLane);
    return line;
  }
  inline FUSED_OPS_INLINE void store_ordered(A* p) const {
    for (int k = 0; k < kVectors; ++k) std::memcpy(p + k * kLane, &v[k], sizeof(V));
  }

 private:
#if defined(__AVX512F__)
  // The line as it lies in memory.
  static inline FUSED_OPS_INLINE Line of_bits(__m512i b) {
    Line line;
    if constexpr (kPairs) {
      const bits_vec pairs = bit_copy<bits_vec>(b);
      line.v[0] = bit_copy<V>(pairs << 16), line.v[1] = bit_copy<V>(pairs & 0xffff0000u);
    } else if constexpr (sizeof(T) == 2) {
      line.v[0] = bit_copy<V>(_mm512_cvtph_ps(_mm512_castsi512_si256(b)));
      line.v[1] = bit_copy<V>(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1)));
    } else {
      line.v[0] = bit_copy<V>(b);
    }
    return line;
  }
  inline FUSED_OPS_INLINE __m512i bits() const {
    if constexpr (kPairs) return bit_copy<__m512i>(rounded_pair(v[0], v[1]));
    if constexpr (sizeof(T) == 2) {
      const __m256i low = _mm512_cvtps_ph(bit_copy<__m512>(v[0]), _MM_FROUND_TO_NEAREST_INT);
      const __m256i high = _mm512_cvtps_ph(bit_copy<__m512>(v[1]), _MM_FROUND_TO_NEAREST_INT);
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
      return bit_copy<__m512i>(v[0]);
    }
  }
#endif
  // Every second value from `low`, the others from `high`. NaN, which rounding might carry away, is looked for in both
  // at once.
  static inline FUSED_OPS_INLINE bits_vec rounded_pair(float_vec low, float_vec high) {
#if defined(__AVX512F__)
    if (__builtin_expect(!_mm512_cmp_ps_mask(bit_copy<__m512>(low), bit_copy<__m512>(high), _CMP_UNORD_Q), 1)) {
      const auto round = [](float_vec f) FUSED_OPS_INLINE {  // as nearest(), one instruction less
        const __m512i u = bit_copy<__m512i>(f), r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
        const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
        return _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
      };
      const __m512i l = _mm512_srli_epi32(round(low), 16);
      return bit_copy<bits_vec>(_mm512_mask_blend_epi16(0xaaaaaaaau, l, round(high)));
    }
#elif defined(__AVX2__)
    if (__builtin_expect(
            !_mm256_movemask_ps(_mm256_cmp_ps(bit_copy<__m256>(low), bit_copy<__m256>(high), _CMP_UNORD_Q)), 1))
      return (nearest(low) >> 16) | (nearest(high) & 0xffff0000u);
#endif
    return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
  }
  // To the nearest bfloat16, ties to even, in the upper half.
  static inline FUSED_OPS_INLINE bits_vec nearest(float_vec f) {
    const bits_vec u = bit_copy<bits_vec>(f);
    return u + 0x7fffu + ((u >> 16) & 1u);
  }
  static inline FUSED_OPS_INLINE bits_vec rounded(float_vec f) {
    return f != f ? bits_vec{} + 0x7fc00000u : nearest(f);
  }
};

// Natural order -> the registers' order, and back; n values, a multiple of a line's.
template <class T, class A>
inline void to_line_order(const A* from, A* to, int64_t n) {
  if constexpr (!Line<T>::kPairs) {
    std::copy_n(from, n, to);
  } else {
    constexpr int64_t kLane = Line<T>::kLane;
    for (int64_t i = 0; i < n; i += 2 * kLane)
      for (int64_t l = 0; l < kLane; ++l) to[i + l] = from[i + 2 * l], to[i + kLane + l] = from[i + 2 * l + 1];
  }
}
template <class T, class A>
inline void from_line_order(const A* from, A* to, int64_t n) {
  if constexpr (!Line<T>::kPairs) {
    std::copy_n(from, n, to);
  } else {
    constexpr int64_t kLane = Line<T>::kLane;
    for (int64_t i = 0; i < n; i += 2 * kLane)
      for (int64_t l = 0; l < kLane; ++l) to[i + 2 * l] = from[i + l], to[i + 2 * l + 1] = from[i + kLane + l];
  }
}

// A bit per value of a line, in natural order: the masks of its lanes in register k, all ones where the bit is set.
template <class T>
struct LineBits {
  using Mask = std::conditional_t<sizeof(T) == 8, wide_bits_vec, bits_vec>;
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static constexpr int64_t kBytes = Line<T>::kSize / 8;

  // n <= kSize of them.
  static inline FUSED_OPS_INLINE Word load(const uint8_t* p, int64_t n) {
    Word word = 0;
    if (n == Line<T>::kSize)
      std::memcpy(&word, p, kBytes);
    else
      std::memcpy(&word, p, static_cast<size_t>((n + 7) / 8));
    return word;
  }
  // b where the bit is set, else a.
  template <class V>
  static inline FUSED_OPS_INLINE V select(Word word, int k, V a, V b) {
    Mask place;
    for (int64_t l = 0; l < Line<T>::kLane; ++l) place[l] = Word{1} << Line<T>::element(k * Line<T>::kLane + l);
    return ((Mask{} + word) & place) != 0 ? b : a;
  }
  // The bits of `not z <= 0`.
  static inline FUSED_OPS_INLINE Word positive(const Line<T>& z) {
    Word word = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) != 8) {
      __mmask16 m[Line<T>::kVectors];
      for (int k = 0; k < Line<T>::kVectors; ++k)
        m[k] = _mm512_cmp_ps_mask(bit_copy<__m512>(z.v[k]), _mm512_setzero_ps(), _CMP_NLE_UQ);
      if constexpr (Line<T>::kPairs)
        return _mm512_movepi16_mask(
            _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_movm_epi32(m[0]), _mm512_movm_epi32(m[1])));
      for (int k = 0; k < Line<T>::kVectors; ++k) word |= static_cast<uint32_t>(m[k]) << (16 * k);
      return word;
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) != 8 && !Line<T>::kPairs) {
      for (int k = 0; k < Line<T>::kVectors; ++k)
        word |= static_cast<uint32_t>(
                    _mm256_movemask_ps(_mm256_cmp_ps(bit_copy<__m256>(z.v[k]), _mm256_setzero_ps(), _CMP_NLE_UQ)))
                << (8 * k);
      return word;
    }
#endif
    for (int k = 0; k < Line<T>::kVectors; ++k)
      for (int64_t l = 0; l < Line<T>::kLane; ++l)
        word |= static_cast<Word>(!(z.v[k][l] <= 0)) << Line<T>::element(k * Line<T>::kLane + l);
    return word;
  }
  // The first n <= kSize bits.
  static inline FUSED_OPS_INLINE void store(Word word, int64_t n, uint8_t* p) {
    if (n == Line<T>::kSize) {
      std::memcpy(p, &word, kBytes);
    } else {
      word &= (Word{1} << n) - 1;
      std::memcpy(p, &word, static_cast<size_t>((n + 7) / 8));
    }
  }
};

// A coefficient of a run: the same for all its values, or one for each, in the registers' order.
template <class T>
struct Spread {
  typename Line<T>::V value;
  explicit Spread(acc_t<T> v) : value(typename Line<T>::V{} + v) {}
  typename Line<T>::V at(int64_t) const { return value; }
};
template <class T>
struct Ordered {
  const acc_t<T>* values;
  explicit Ordered(const acc_t<T>* v) : values(v) {}
  typename Line<T>::V at(int64_t i) const { return load_bits<typename Line<T>::V>(values + i); }
};

// How many of the n values at `to` lie before the first whole line of memory.
template <class T>
inline int64_t values_before_line(const T* to, int64_t n) {
  const int64_t over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLineBytes);
  return over == 0 ? 0 : std::min(n, (kLineBytes - over) / static_cast<int64_t>(sizeof(T)));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

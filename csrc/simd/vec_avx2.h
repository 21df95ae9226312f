// A register of 32 bytes with the instructions of AVX2, FMA and F16C; what each function does is said in
// simd/vec_generic.h.
#pragma once
#define FUSED_OPS_VECTOR_BYTES 32
#include "simd/vec_generic.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

using generic::finish_streaming;
using generic::kAlternates;
using generic::kExpUnit;
using generic::kMasks;
using generic::line_bits;
using generic::load_tail;
using generic::reduce_add;
using generic::reduce_max;
using generic::replace_part;
using generic::round_to_bfloat16;
using generic::write_part;

inline FUSED_OPS_INLINE float_vec max_vec(float_vec a, float_vec b) {
  return bit_copy<float_vec>(_mm256_max_ps(bit_copy<__m256>(a), bit_copy<__m256>(b)));
}

inline FUSED_OPS_INLINE float_vec multiply_add(float_vec a, float_vec b, float_vec c) {
  return bit_copy<float_vec>(_mm256_fmadd_ps(bit_copy<__m256>(a), bit_copy<__m256>(b), bit_copy<__m256>(c)));
}
inline FUSED_OPS_INLINE double_vec multiply_add(double_vec a, double_vec b, double_vec c) {
  return bit_copy<double_vec>(_mm256_fmadd_pd(bit_copy<__m256d>(a), bit_copy<__m256d>(b), bit_copy<__m256d>(c)));
}

inline float_vec load_vec(const bfloat16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_copy<float_vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline float_vec load_vec(const float16_t* p) {
  return bit_copy<float_vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_vec(bfloat16_t* p, float_vec v) {
  const bits_vec out = (v != v) ? (bits_vec{} + 0x7fc0u) : nearest_bfloat16(v) >> 16;
  const __m256i wide = bit_copy<__m256i>(out);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline __m128i to_float16(float_vec v) { return _mm256_cvtps_ph(bit_copy<__m256>(v), _MM_FROUND_TO_NEAREST_INT); }
inline void store_vec(float16_t* p, float_vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_float16(v)); }

// NaN, which rounding might carry away, is looked for in both at once.
inline FUSED_OPS_INLINE bits_vec pack_bfloat16(float_vec low, float_vec high) {
  if (__builtin_expect(!_mm256_movemask_ps(_mm256_cmp_ps(bit_copy<__m256>(low), bit_copy<__m256>(high), _CMP_UNORD_Q)),
                       1))
    return (nearest_bfloat16(low) >> 16) | (nearest_bfloat16(high) & 0xffff0000u);
  return generic::pack_bfloat16(low, high);
}

inline FUSED_OPS_INLINE float_vec exp_scaled(float_vec x) { return generic::exp_in_range(max_vec(splat(-131.0f), x)); }
inline FUSED_OPS_INLINE float_vec exp_vec(float_vec x) { return exp_scaled(x) * kExpUnit; }

inline float_vec permute(float_vec v, int_vec index) {
  return bit_copy<float_vec>(_mm256_permutevar8x32_ps(bit_copy<__m256>(v), bit_copy<__m256i>(index)));
}

inline FUSED_OPS_INLINE void load_transposed(const float* rows, int64_t stride, float_vec* columns) {
  const auto two = [&](int64_t l) FUSED_OPS_INLINE {  // rows l and l + 4, one in each half
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows + l * stride)),
                                _mm_loadu_ps(rows + (l + 4) * stride), 1);
  };
  const __m256 a = two(0), b = two(1), c = two(2), d = two(3);
  const __m256d ab[] = {_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(a, b))};
  const __m256d cd[] = {_mm256_castps_pd(_mm256_unpacklo_ps(c, d)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d))};
  for (int k = 0; k < 2; ++k) {
    columns[2 * k] = bit_copy<float_vec>(_mm256_unpacklo_pd(ab[k], cd[k]));
    columns[2 * k + 1] = bit_copy<float_vec>(_mm256_unpackhi_pd(ab[k], cd[k]));
  }
}

inline DoublePair widen(float_vec v) {
  const __m256 f = bit_copy<__m256>(v);
  return {bit_copy<double_vec>(_mm256_cvtps_pd(_mm256_castps256_ps128(f))),
          bit_copy<double_vec>(_mm256_cvtps_pd(_mm256_extractf128_ps(f, 1)))};
}
inline DoublePair widen_at(const float* p) {
  return {bit_copy<double_vec>(_mm256_cvtps_pd(_mm_loadu_ps(p))),
          bit_copy<double_vec>(_mm256_cvtps_pd(_mm_loadu_ps(p + 4)))};
}

template <bool kStream, class V>
inline void put(void* p, V v) {
  if constexpr (kStream && sizeof(V) == 32)
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_copy<__m256i>(v));
  else
    generic::put<kStream>(p, v);
}
template <bool kStream>
inline FUSED_OPS_INLINE void put_float16(float16_t* p, const float_vec* v) {
  for (int64_t k = 0; k < kLineBytes / 2 / kWidth; ++k) put<kStream>(p + k * kWidth, to_float16(v[k]));
}

inline FUSED_OPS_INLINE __m256 positive_mask(float_vec v) {
  return _mm256_cmp_ps(bit_copy<__m256>(v), _mm256_setzero_ps(), _CMP_NLE_UQ);
}
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(positive_mask(v)));
}
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec first, float_vec second) {
  const __m256i a = bit_copy<__m256i>(positive_mask(first)), b = bit_copy<__m256i>(positive_mask(second));
  const __m256i bytes = _mm256_packs_epi16(_mm256_blend_epi16(a, b, 0xaa), _mm256_setzero_si256());
  const uint32_t word = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));  // eight values in each half
  return (word | word >> 8) & 0xffffu;
}

// A copy of a size that is not known is a call, and loading the line behind it waits for its stores: lanes of four or
// eight bytes are masked instead.
template <class T>
inline FUSED_OPS_INLINE void read_part(T* line, const T* from, int64_t n) {
  if constexpr (sizeof(T) == 8) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    for (int64_t k = 0; k < 8; k += 4)
      _mm256_store_si256(reinterpret_cast<__m256i*>(line + k),
                         _mm256_maskload_epi64(reinterpret_cast<const long long*>(from + k),
                                               _mm256_cmpgt_epi64(_mm256_set1_epi64x(n - k), lane)));
  } else if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t k = 0; k < 16; k += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(line + k),
                         _mm256_maskload_epi32(reinterpret_cast<const int*>(from + k),
                                               _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n - k)), lane)));
  } else {
    generic::read_part(line, from, n);
  }
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// A register of 64 bytes with AVX-512's instructions; what each function does is said in simd/vec_generic.h.
#pragma once
#define FUSED_OPS_VECTOR_BYTES 64
#include "simd/vec_generic.h"
// With masked lanes no longer than a function of whole lines, it is inlined as they are.
#define FUSED_OPS_OF_PARTS inline FUSED_OPS_INLINE

namespace fused_ops {
namespace FUSED_OPS_ISA {

using generic::kAlternates;
constexpr bool kMasks = true;

inline FUSED_OPS_INLINE float_vec max_vec(float_vec a, float_vec b) {
  return bit_copy<float_vec>(_mm512_max_ps(bit_copy<__m512>(a), bit_copy<__m512>(b)));
}

inline FUSED_OPS_INLINE float_vec multiply_add(float_vec a, float_vec b, float_vec c) {
  return bit_copy<float_vec>(_mm512_fmadd_ps(bit_copy<__m512>(a), bit_copy<__m512>(b), bit_copy<__m512>(c)));
}
inline FUSED_OPS_INLINE double_vec multiply_add(double_vec a, double_vec b, double_vec c) {
  return bit_copy<double_vec>(_mm512_fmadd_pd(bit_copy<__m512d>(a), bit_copy<__m512d>(b), bit_copy<__m512d>(c)));
}

inline float_vec load_vec(const bfloat16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_copy<float_vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline float_vec load_vec(const float16_t* p) {
  return bit_copy<float_vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline void store_vec(bfloat16_t* p, float_vec v) {
  const bits_vec out = (v != v) ? (bits_vec{} + 0x7fc0u) : nearest_bfloat16(v) >> 16;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_copy<__m512i>(out)));
}
inline __m256i to_float16(float_vec v) { return _mm512_cvtps_ph(bit_copy<__m512>(v), _MM_FROUND_TO_NEAREST_INT); }
inline void store_vec(float16_t* p, float_vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16(v)); }

inline bits_vec round_to_bfloat16(float_vec v) {
  const __m512i u = bit_copy<__m512i>(v);
  const __mmask16 number = _mm512_cmp_ps_mask(bit_copy<__m512>(v), bit_copy<__m512>(v), _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, u, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(u, number, u, _mm512_set1_epi32(0x7fff));
  return bit_copy<bits_vec>(_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1)));
}

// NaN, which rounding might carry away, is looked for in both at once.
inline FUSED_OPS_INLINE bits_vec pack_bfloat16(float_vec low, float_vec high) {
  if (__builtin_expect(!_mm512_cmp_ps_mask(bit_copy<__m512>(low), bit_copy<__m512>(high), _CMP_UNORD_Q), 1)) {
    const auto round = [](float_vec f) FUSED_OPS_INLINE {  // as nearest_bfloat16(), one instruction less
      const __m512i u = bit_copy<__m512i>(f), r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
      const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
      return _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
    };
    const __m512i l = _mm512_srli_epi32(round(low), 16);
    return bit_copy<bits_vec>(_mm512_mask_blend_epi16(0xaaaaaaaau, l, round(high)));
  }
  return generic::pack_bfloat16(low, high);
}

inline FUSED_OPS_INLINE float_vec exp_vec(float_vec x) {
  x = max_vec(splat(-110.0f), x);
  // x = (n + f/16) ln2 + r with |r| <= ln2/32: a table of 2^(f/16) in one register leaves a cubic.
  const float_vec shifted = x * 1.44269504088896341f + 786432.0f;  // 1.5 * 2^19: rounds to the nearest sixteenth
  const float_vec n = shifted - 786432.0f;
  float_vec r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  const float_vec power = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                           1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                           1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const float_vec rounded_away = {0.00000000e+00f,  4.62854697e-08f,  -1.19921572e-08f,
                                  4.72978225e-08f,  3.19341804e-08f,  3.62105725e-08f,
                                  -3.09907212e-08f, -7.47521319e-09f, 1.71142712e-08f,
                                  -3.04768347e-08f, 5.23333424e-09f,  6.10759160e-09f,
                                  -1.47196055e-08f, -5.25879514e-09f, -6.12825984e-09f,
                                  5.14060920e-09f};  // by them: log of the exact power over the float
  const __m512i f = bit_copy<__m512i>(shifted);
  const float_vec t = bit_copy<float_vec>(_mm512_permutexvar_ps(f, bit_copy<__m512>(power)));
  const float_vec rest = r + bit_copy<float_vec>(_mm512_permutexvar_ps(f, bit_copy<__m512>(rounded_away)));
  const float_vec poly = (r * 0.16666667f + 0.5f) * (r * r) + rest;
  return bit_copy<float_vec>(_mm512_scalef_ps(bit_copy<__m512>(t * poly + t), bit_copy<__m512>(n)));
}

// The instruction that scales passes through the denormals itself.
constexpr float kExpUnit = 1;
inline FUSED_OPS_INLINE float_vec exp_scaled(float_vec x) { return exp_vec(x); }

template <class T>
inline float_vec load_tail(const T* p, int64_t n, float fill) {
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
  const __m512 rest = _mm512_set1_ps(fill);
  if constexpr (sizeof(T) == 4) {
    return bit_copy<float_vec>(_mm512_mask_loadu_ps(rest, mask, p));
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, p);
    if constexpr (std::is_same_v<T, float16_t>)
      return bit_copy<float_vec>(_mm512_mask_cvtph_ps(rest, mask, bits));
    else
      return bit_copy<float_vec>(
          _mm512_mask_mov_ps(rest, mask, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))));
  }
}

inline float reduce_add(float_vec v) { return _mm512_reduce_add_ps(bit_copy<__m512>(v)); }
inline float reduce_max(float_vec v) { return _mm512_reduce_max_ps(bit_copy<__m512>(v)); }

inline float_vec permute(float_vec v, int_vec index) {
  return bit_copy<float_vec>(_mm512_permutexvar_ps(bit_copy<__m512i>(index), bit_copy<__m512>(v)));
}

inline FUSED_OPS_INLINE void load_transposed(const float* rows, int64_t stride, float_vec* columns) {
  const auto four = [&](int64_t l) FUSED_OPS_INLINE {  // rows l, l + 4, l + 8 and l + 12, one in each quarter
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows + l * stride));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + (l + 4) * stride), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + (l + 8) * stride), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(rows + (l + 12) * stride), 3);
  };
  const __m512 a = four(0), b = four(1), c = four(2), d = four(3);
  const __m512d ab[] = {_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b))};
  const __m512d cd[] = {_mm512_castps_pd(_mm512_unpacklo_ps(c, d)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))};
  for (int k = 0; k < 2; ++k) {
    columns[2 * k] = bit_copy<float_vec>(_mm512_unpacklo_pd(ab[k], cd[k]));
    columns[2 * k + 1] = bit_copy<float_vec>(_mm512_unpackhi_pd(ab[k], cd[k]));
  }
}

inline DoublePair widen(float_vec v) {
  const __m512 f = bit_copy<__m512>(v);
  return {bit_copy<double_vec>(_mm512_cvtps_pd(_mm512_castps512_ps256(f))),
          bit_copy<double_vec>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(f, 1)))};
}
inline DoublePair widen_at(const float* p) {
  return {bit_copy<double_vec>(_mm512_cvtps_pd(_mm256_loadu_ps(p))),
          bit_copy<double_vec>(_mm512_cvtps_pd(_mm256_loadu_ps(p + 8)))};
}

template <bool kStream, class V>
inline void put(void* p, V v) {
  if constexpr (kStream && sizeof(V) == 64)
    _mm512_stream_si512(static_cast<__m512i*>(p), bit_copy<__m512i>(v));
  else if constexpr (kStream && sizeof(V) == 32)
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_copy<__m256i>(v));
  else
    generic::put<kStream>(p, v);
}
using generic::finish_streaming;

// A line as it lies in memory, and one of float16 of its registers and into them.
using line_bits = __m512i;
inline FUSED_OPS_INLINE line_bits pack_float16(const float_vec* v) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_float16(v[0])), to_float16(v[1]), 1);
}
inline FUSED_OPS_INLINE void unpack_float16(line_bits b, float_vec* v) {
  v[0] = bit_copy<float_vec>(_mm512_cvtph_ps(_mm512_castsi512_si256(b)));
  v[1] = bit_copy<float_vec>(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1)));
}
template <bool kStream>
inline FUSED_OPS_INLINE void put_float16(float16_t* p, const float_vec* v) {
  put<kStream>(p, pack_float16(v));
}

inline FUSED_OPS_INLINE __mmask16 positive_mask(float_vec v) {
  return _mm512_cmp_ps_mask(bit_copy<__m512>(v), _mm512_setzero_ps(), _CMP_NLE_UQ);
}
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec v) { return positive_mask(v); }
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec first, float_vec second) {
  const __mmask16 m[] = {positive_mask(first), positive_mask(second)};
  return _mm512_movepi16_mask(_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_movm_epi32(m[0]), _mm512_movm_epi32(m[1])));
}

// n < 64 / sizeof(T) values, and `rest` behind them: no byte beyond them is read, or written.
template <class T>
inline FUSED_OPS_INLINE line_bits load_lanes(const T* from, int64_t n, line_bits rest) {
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) return _mm512_mask_loadu_epi64(rest, static_cast<__mmask8>(lanes), from);
  if constexpr (sizeof(T) == 4) return _mm512_mask_loadu_epi32(rest, static_cast<__mmask16>(lanes), from);
  return _mm512_mask_loadu_epi16(rest, lanes, from);
}
template <class T>
inline FUSED_OPS_INLINE void store_lanes(T* to, int64_t n, line_bits v) {
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(lanes), v);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(lanes), v);
  else
    _mm512_mask_storeu_epi16(to, lanes, v);
}

template <class T>
inline FUSED_OPS_INLINE void read_part(T* line, const T* from, int64_t n) {
  _mm512_store_si512(line, load_lanes(from, n, _mm512_setzero_si512()));
}
template <class T>
inline FUSED_OPS_INLINE void replace_part(T* line, const T* from, int64_t n) {
  _mm512_store_si512(line, load_lanes(from, n, _mm512_load_si512(line)));
}
template <class T>
inline FUSED_OPS_INLINE void write_part(const T* line, T* to, int64_t n) {
  store_lanes(to, n, _mm512_load_si512(line));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

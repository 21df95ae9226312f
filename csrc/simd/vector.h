// One register of floats of this file's ISA, with the compiler's own operators: for the loops whose registers must not
// be left to chance. Loads and stores convert the 16-bit types.
#pragma once
#include <cstring>

#include "simd/math.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// log(1 + x) for finite x >= 0 (or NaN) to about 1 ulp: 1 + x = m 2^e, m in [sqrt(1/2), sqrt(2)), and the series of
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

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <class E>
struct vec_of {
  typedef E type __attribute__((vector_size(kVectorBytes)));
};
template <class E>
using vec_t = typename vec_of<E>::type;
using float_vec = vec_t<float>;
constexpr int64_t kWidth = kVectorBytes / 4;

inline float_vec splat(float v) { return float_vec{} + v; }
// b where either is NaN.
__attribute__((always_inline)) inline float_vec max_vec(float_vec a, float_vec b) {
#if defined(__AVX512F__)
  return bit_copy<float_vec>(_mm512_max_ps(bit_copy<__m512>(a), bit_copy<__m512>(b)));
#elif defined(__AVX2__)
  return bit_copy<float_vec>(_mm256_max_ps(bit_copy<__m256>(a), bit_copy<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

template <class V, class E>
inline V load_bits(const E* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline float_vec load_vec(const float* p) { return load_bits<float_vec>(p); }
inline float_vec load_vec(const bfloat16_t* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_copy<float_vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_copy<float_vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  return float_vec{to_acc(p[0]), to_acc(p[1]), to_acc(p[2]), to_acc(p[3])};
#endif
}
inline float_vec load_vec(const float16_t* p) {
#if defined(__AVX512F__)
  return bit_copy<float_vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_copy<float_vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return float_vec{to_acc(p[0]), to_acc(p[1]), to_acc(p[2]), to_acc(p[3])};
#endif
}

inline void store_vec(float* p, float_vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store_vec(bfloat16_t* p, float_vec v) {
#if defined(__AVX2__)
  using bits_vec = vec_t<uint32_t>;
  const bits_vec u = bit_copy<bits_vec>(v);
  const bits_vec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bits_vec out = (v != v) ? (bits_vec{} + 0x7fc0u) : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_copy<__m512i>(out)));
#else
  const __m256i wide = bit_copy<__m256i>(out);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#endif
#else
  for (int64_t l = 0; l < kWidth; ++l) store(p + l, v[l]);
#endif
}
inline void store_vec(float16_t* p, float_vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_copy<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_copy<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t l = 0; l < kWidth; ++l) store(p + l, v[l]);
#endif
}

// Two registers of 2 kWidth adjacent values, where the order does not matter: of bfloat16 the even ones and the odd
// ones, as a load of both and a shift, or a mask, is all that takes. Lane l of `first` is value first_of_pair<T>()[l],
// and of `second` kPairStep<T> behind that.
struct VecPair {
  float_vec first, second;
};
#if defined(__AVX2__)
template <class T>
constexpr bool kAlternates = std::is_same_v<T, bfloat16_t>;
#else
template <class T>
constexpr bool kAlternates = false;
#endif
template <class T>
constexpr int32_t kPairStep = kAlternates<T> ? 1 : static_cast<int32_t>(kWidth);

template <class T>
inline VecPair load_pair(const T* p) {
  if constexpr (kAlternates<T>) {
    const auto bits = load_bits<vec_t<uint32_t>>(p);
    return {bit_copy<float_vec>(bits << 16), bit_copy<float_vec>(bits & 0xffff0000u)};
  } else {
    return {load_vec(p), load_vec(p + kWidth)};
  }
}

#if defined(__AVX2__)
// Rounded to bfloat16, in the upper halves; a NaN that arithmetic made stays one.
inline vec_t<uint32_t> round_to_bfloat16(float_vec v) {
#if defined(__AVX512F__)
  const __m512i u = bit_copy<__m512i>(v);
  const __mmask16 number = _mm512_cmp_ps_mask(bit_copy<__m512>(v), bit_copy<__m512>(v), _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, u, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(u, number, u, _mm512_set1_epi32(0x7fff));
  return bit_copy<vec_t<uint32_t>>(_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1)));
#else
  using bits_vec = vec_t<uint32_t>;
  const bits_vec u = bit_copy<bits_vec>(v);
  return (v != v) ? u : u + 0x7fffu + ((u >> 16) & 1u);
#endif
}
#endif

template <class T>
inline void store_pair(T* p, const VecPair& v) {
#if defined(__AVX2__)
  if constexpr (kAlternates<T>) {
    const auto bits = (round_to_bfloat16(v.first) >> 16) | (round_to_bfloat16(v.second) & 0xffff0000u);
    std::memcpy(p, &bits, sizeof(bits));
    return;
  }
#endif
  store_vec(p, v.first), store_vec(p + kWidth, v.second);
}

// exp_ for a register, for x below 88; -inf gives 0, NaN gives NaN.
__attribute__((always_inline)) inline float_vec exp_vec(float_vec x) {
  x = max_vec(splat(-110.0f), x);
#if defined(__AVX512F__)
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
#else
  const float_vec shifted = x * 1.44269504088896341f + 12582912.0f;
  const float_vec n = shifted - 12582912.0f;
  float_vec r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  float_vec poly = r * 1.3888889e-3f + 8.3333337e-3f;
  poly = poly * r + 4.1666668e-2f;
  poly = poly * r + 1.6666667e-1f;
  poly = poly * r + 0.5f;
  poly = poly * r * r + r + 1.0f;
  using bits_vec = vec_t<int32_t>;
  const bits_vec k = bit_copy<bits_vec>(shifted) - 0x4b400000;
  const bits_vec half = k >> 1;
  return poly * bit_copy<float_vec>((half + 127) << 23) * bit_copy<float_vec>((k - half + 127) << 23);
#endif
}

using int_vec = vec_t<int32_t>;

inline int_vec iota() {
  int_vec v;
  for (int64_t l = 0; l < kWidth; ++l) v[l] = static_cast<int32_t>(l);
  return v;
}

template <class T>
inline int_vec first_of_pair() {
  return kAlternates<T> ? 2 * iota() : iota();
}

// The first n < kWidth values, and `fill` behind them.
template <class T>
inline float_vec load_tail(const T* p, int64_t n, float fill) {
#if defined(__AVX512F__)
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
#else
  float buffer[kWidth];
  for (int64_t l = 0; l < kWidth; ++l) buffer[l] = fill;
  for (int64_t l = 0; l < n; ++l) buffer[l] = to_acc(p[l]);
  return load_vec(buffer);
#endif
}

template <class T>
inline void store_tail(T* p, int64_t n, float_vec v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), bit_copy<__m512>(v));
    return;
  }
#endif
  T buffer[kWidth];
  store_vec(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
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

inline float reduce_add(float_vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bit_copy<__m512>(v));
#else
  float lanes[kWidth];
  store_vec(lanes, v);
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
#endif
}
// v[index[l]] in each lane l.
inline float_vec permute(float_vec v, int_vec index) {
#if defined(__AVX512F__)
  return bit_copy<float_vec>(_mm512_permutexvar_ps(bit_copy<__m512i>(index), bit_copy<__m512>(v)));
#elif defined(__AVX2__)
  return bit_copy<float_vec>(_mm256_permutevar8x32_ps(bit_copy<__m256>(v), bit_copy<__m256i>(index)));
#else
  return float_vec{v[index[0]], v[index[1]], v[index[2]], v[index[3]]};
#endif
}

// The lanes of p whose bit is set, and `fill` in the others.
inline float_vec load_where(const float* p, uint64_t bits, float fill) {
#if defined(__AVX512F__)
  return bit_copy<float_vec>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(bits), p));
#else
  const int_vec set = ((int_vec{} + static_cast<int32_t>(bits & 0xff)) >> iota()) & 1;
  return set != 0 ? load_vec(p) : splat(fill);
#endif
}

// kWidth registers become one: lane l is `op` over all lanes of rows(l), in one order for every l.
template <class Rows, class Op>
__attribute__((always_inline)) inline float_vec reduce_each(const Rows& rows, const Op& op) {
  // lane 4 k + i: op over the k-th four lanes of rows(l + i)
  const auto four = [&](int64_t l) __attribute__((always_inline)) {
    const float_vec a = rows(l), b = rows(l + 1), c = rows(l + 2), d = rows(l + 3);
#if defined(__AVX512F__)
    const auto halves = [&](float_vec x, float_vec y) {
      const __m512 u = bit_copy<__m512>(x), v = bit_copy<__m512>(y);
      return op(bit_copy<float_vec>(_mm512_unpacklo_ps(u, v)), bit_copy<float_vec>(_mm512_unpackhi_ps(u, v)));
    };
    const __m512d ab = bit_copy<__m512d>(halves(a, b)), cd = bit_copy<__m512d>(halves(c, d));
    return op(bit_copy<float_vec>(_mm512_unpacklo_pd(ab, cd)), bit_copy<float_vec>(_mm512_unpackhi_pd(ab, cd)));
#elif defined(__AVX2__)
    const auto halves = [&](float_vec x, float_vec y) {
      const __m256 u = bit_copy<__m256>(x), v = bit_copy<__m256>(y);
      return op(bit_copy<float_vec>(_mm256_unpacklo_ps(u, v)), bit_copy<float_vec>(_mm256_unpackhi_ps(u, v)));
    };
    const __m256d ab = bit_copy<__m256d>(halves(a, b)), cd = bit_copy<__m256d>(halves(c, d));
    return op(bit_copy<float_vec>(_mm256_unpacklo_pd(ab, cd)), bit_copy<float_vec>(_mm256_unpackhi_pd(ab, cd)));
#else
    return op(op(float_vec{a[0], b[0], c[0], d[0]}, float_vec{a[2], b[2], c[2], d[2]}),
              op(float_vec{a[1], b[1], c[1], d[1]}, float_vec{a[3], b[3], c[3], d[3]}));
#endif
  };
#if defined(__AVX512F__)
  const auto fours = [&](float_vec x, float_vec y) {
    const __m512 u = bit_copy<__m512>(x), v = bit_copy<__m512>(y);
    return op(bit_copy<float_vec>(_mm512_shuffle_f32x4(u, v, 0x88)),
              bit_copy<float_vec>(_mm512_shuffle_f32x4(u, v, 0xdd)));
  };
  const float_vec low = fours(four(0), four(4));
  return fours(low, fours(four(8), four(12)));
#elif defined(__AVX2__)
  const __m256 u = bit_copy<__m256>(four(0)), v = bit_copy<__m256>(four(4));
  return op(bit_copy<float_vec>(_mm256_permute2f128_ps(u, v, 0x20)),
            bit_copy<float_vec>(_mm256_permute2f128_ps(u, v, 0x31)));
#else
  return four(0);
#endif
}

inline float reduce_max(float_vec v) {  // of values without NaN
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bit_copy<__m512>(v));
#else
  float lanes[kWidth];
  store_vec(lanes, v);
  for (int64_t l = 1; l < kWidth; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
#endif
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// A register of values with the compiler's own operators, and the functions of it that each ISA has, here in plain C++.
// An ISA's file says how many bytes a register has, has the same functions in its instructions, and takes from here
// what it has none for. The widths written out in the functions are those of 16 bytes.
#pragma once
#include <cstring>
#include <type_traits>

#include "simd/math.h"

#ifndef FUSED_OPS_VECTOR_BYTES
#define FUSED_OPS_VECTOR_BYTES 16
#endif
#define FUSED_OPS_INLINE __attribute__((always_inline))  // of a lambda in a loop that must stay in registers

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kVectorBytes = FUSED_OPS_VECTOR_BYTES;
constexpr int64_t kLineBytes = 64;  // of a cache

template <class E>
struct vec_of {
  typedef E type __attribute__((vector_size(kVectorBytes)));
};
template <class E>
using vec_t = typename vec_of<E>::type;
using float_vec = vec_t<float>;
using double_vec = vec_t<double>;
using int_vec = vec_t<int32_t>;
using bits_vec = vec_t<uint32_t>;
using wide_bits_vec = vec_t<uint64_t>;
constexpr int64_t kWidth = kVectorBytes / 4;

struct VecPair {
  float_vec first, second;
};
struct DoublePair {
  double_vec low, high;
};

inline float_vec splat(float v) { return float_vec{} + v; }

inline int_vec iota() {
  int_vec v;
  for (int64_t l = 0; l < kWidth; ++l) v[l] = static_cast<int32_t>(l);
  return v;
}

template <class V, class E>
inline V load_bits(const E* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline float_vec load_vec(const float* p) { return load_bits<float_vec>(p); }
inline void store_vec(float* p, float_vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store_vec(double* p, double_vec v) { std::memcpy(p, &v, sizeof(v)); }

// To the nearest bfloat16, ties to even, in the upper half; NaN may be carried away.
inline FUSED_OPS_INLINE bits_vec nearest_bfloat16(float_vec f) {
  const bits_vec u = bit_copy<bits_vec>(f);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

namespace generic {

typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2)));

// b where either is NaN.
inline FUSED_OPS_INLINE float_vec max_vec(float_vec a, float_vec b) { return a > b ? a : b; }

// a * b + c, by one instruction where there is one: said so, because whether a compiler joins the two is an accident of
// the code around them, and a value's bits would depend on where it lies.
template <class V>
inline FUSED_OPS_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}

inline float_vec load_vec(const bfloat16_t* p) {
  return bit_copy<float_vec>(__builtin_convertvector(load_bits<half_bits>(p), bits_vec) << 16);
}
inline float_vec load_vec(const float16_t* p) {
  return float_vec{to_acc(p[0]), to_acc(p[1]), to_acc(p[2]), to_acc(p[3])};
}
inline void store_vec(bfloat16_t* p, float_vec v) {
  const bits_vec out = v != v ? bits_vec{} + 0x7fc0u : nearest_bfloat16(v) >> 16;
  const half_bits narrow = __builtin_convertvector(out, half_bits);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store_vec(float16_t* p, float_vec v) {
  for (int64_t l = 0; l < kWidth; ++l) store(p + l, v[l]);
}

// Whether a pair of registers (load_pair) holds every second value each.
template <class T>
constexpr bool kAlternates = std::is_same_v<T, bfloat16_t>;

// Rounded to bfloat16, in the upper halves; a NaN that arithmetic made stays one.
inline bits_vec round_to_bfloat16(float_vec v) { return (v != v) ? bit_copy<bits_vec>(v) : nearest_bfloat16(v); }

// Every second value from `low`, the others from `high`, as bfloat16.
inline FUSED_OPS_INLINE bits_vec pack_bfloat16(float_vec low, float_vec high) {
  const auto rounded = [](float_vec f)
                           FUSED_OPS_INLINE { return f != f ? bits_vec{} + 0x7fc00000u : nearest_bfloat16(f); };
  return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
}

// exp_ of simd/math.h for a register, without its last product, for x in [-131, 44]; NaN gives NaN.
inline FUSED_OPS_INLINE float_vec exp_in_range(float_vec x) {
  const float_vec shifted = x * 1.44269504088896341f + 12582912.0f;
  const float_vec n = shifted - 12582912.0f;
  float_vec r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  float_vec poly = r * 1.3814540579915047e-3f + 8.36874544620514e-3f;
  poly = poly * r + 4.166838899254799e-2f;
  poly = poly * r + 1.666652113199234e-1f;
  poly = poly * r + 4.999999403953552e-1f;
  poly = kFusedMultiplyAdd ? (poly * r + 1.0f) * r + 1.0f : poly * r * r + r + 1.0f;
  return poly * bit_copy<float_vec>((bit_copy<bits_vec>(shifted) << 23) + 0x5f800000u);
}
// exp(x) over kExpUnit for x of at most 44: of a sum of them, the unit is multiplied by once. -inf gives less than the
// unit's part of any float, NaN gives NaN.
constexpr float kExpUnit = 0x1p-64f;
inline FUSED_OPS_INLINE float_vec exp_scaled(float_vec x) { return exp_in_range(max_vec(splat(-131.0f), x)); }
// exp(x) for x of at most 44; -inf gives 0, NaN gives NaN.
inline FUSED_OPS_INLINE float_vec exp_vec(float_vec x) { return exp_scaled(x) * kExpUnit; }

// The first n < kWidth values, and `fill` behind them.
template <class T>
inline float_vec load_tail(const T* p, int64_t n, float fill) {
  float buffer[kWidth];
  for (int64_t l = 0; l < kWidth; ++l) buffer[l] = fill;
  for (int64_t l = 0; l < n; ++l) buffer[l] = to_acc(p[l]);
  return load_bits<float_vec>(buffer);
}

inline float reduce_add(float_vec v) {
  float lanes[kWidth];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}
inline float reduce_max(float_vec v) {  // of values without NaN
  float lanes[kWidth];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t l = 1; l < kWidth; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
}

// v[index[l]] in each lane l.
inline float_vec permute(float_vec v, int_vec index) {
  return float_vec{v[index[0]], v[index[1]], v[index[2]], v[index[3]]};
}

// Four values of each of kWidth rows that lie `stride` apart, the first of them in one register, the second in the
// next.
inline FUSED_OPS_INLINE void load_transposed(const float* rows, int64_t stride, float_vec* columns) {
  const float_vec a = load_bits<float_vec>(rows), b = load_bits<float_vec>(rows + stride),
                  c = load_bits<float_vec>(rows + 2 * stride), d = load_bits<float_vec>(rows + 3 * stride);
  for (int k = 0; k < 4; ++k) columns[k] = float_vec{a[k], b[k], c[k], d[k]};
}

inline DoublePair widen(float_vec v) { return {double_vec{v[0], v[1]}, double_vec{v[2], v[3]}}; }
// widen() of what lies at p.
inline DoublePair widen_at(const float* p) { return widen(load_bits<float_vec>(p)); }

// v as one register's worth of bytes at p, which is aligned to it; kStream: past the cache.
template <bool kStream, class V>
inline void put(void* p, V v) {
#if defined(__SSE2__)
  if constexpr (kStream && sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bit_copy<__m128i>(v));
#endif
  std::memcpy(p, &v, sizeof(V));
}
// Streamed stores are ordered before what follows.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A line of float16 from its registers.
template <bool kStream>
inline FUSED_OPS_INLINE void put_float16(float16_t* p, const float_vec* v) {
  for (int64_t k = 0; k < kLineBytes / 2 / kWidth; ++k) store_vec(p + k * kWidth, v[k]);
}

// A bit per lane, the first the lowest: `not v <= 0`.
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec v) {
  uint32_t word = 0;
  for (int64_t l = 0; l < kWidth; ++l) word |= static_cast<uint32_t>(!(v[l] <= 0)) << l;
  return word;
}
// The same of two registers that hold every second value each, in the values' order.
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec first, float_vec second) {
  uint32_t word = 0;
  for (int64_t l = 0; l < kWidth; ++l)
    word |=
        (static_cast<uint32_t>(!(first[l] <= 0)) << 2 * l) | (static_cast<uint32_t>(!(second[l] <= 0)) << (2 * l + 1));
  return word;
}

// n values into a line of zeros, into a line whose rest stays, and back to memory.
template <class T>
inline void read_part(T* line, const T* from, int64_t n) {
  std::memcpy(line, from, static_cast<size_t>(n) * sizeof(T));
}
template <class T>
inline void replace_part(T* line, const T* from, int64_t n) {
  std::memcpy(line, from, static_cast<size_t>(n) * sizeof(T));
}
template <class T>
inline void write_part(const T* line, T* to, int64_t n) {
  std::memcpy(to, line, static_cast<size_t>(n) * sizeof(T));
}

// Whether load_lanes and store_lanes are here: instructions that leave out the lanes behind a line's part.
constexpr bool kMasks = false;
using line_bits = bits_vec;

}  // namespace generic

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

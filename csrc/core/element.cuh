// Elements on the GPU: conversion to the accumulator and back, and 16-byte accesses to rows of any alignment.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/dtype.h"

namespace fused_ops {
namespace cuda {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(bfloat16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_acc(float16_t x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ inline void set(float& to, float x) { to = x; }
__device__ inline void set(double& to, double x) { to = x; }
__device__ inline void set(bfloat16_t& to, float x) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void set(float16_t& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }

// Element i of an array whose type is known at run time alone.
__device__ inline double number_at(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32: return static_cast<double>(static_cast<const float*>(p)[i]);
    case DType::float64: return static_cast<const double*>(p)[i];
    case DType::bfloat16: return static_cast<double>(to_acc(static_cast<const bfloat16_t*>(p)[i]));
    default: return static_cast<double>(to_acc(static_cast<const float16_t*>(p)[i]));
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// 2^x with a relative error of 2^-22; results below 2^-126 are 0.
__device__ inline float fast_exp2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// exp for an element of T: the fast one where the result is rounded to 16 bits.
template <class T>
__device__ inline acc_t<T> exp_of(acc_t<T> x) {
  if constexpr (std::is_same_v<T, double>)
    return exp(x);
  else if constexpr (std::is_same_v<T, float>)
    return expf(x);
  else
    return fast_exp2(x * kLog2E);
}

// 16 bytes, and the elements in them.
struct alignas(16) Words {
  uint32_t w[4];
};
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// The two halves of a word.
__device__ inline void both_of(uint32_t word, float* out) {
#if defined(__CUDACC__)
  const __half2 both(__ushort_as_half(static_cast<unsigned short>(word)),
                     __ushort_as_half(static_cast<unsigned short>(word >> 16)));
  const float2 two = __half22float2(both);
  out[0] = two.x, out[1] = two.y;
#else
  out[0] = to_acc(float16_t{static_cast<uint16_t>(word)}),
  out[1] = to_acc(float16_t{static_cast<uint16_t>(word >> 16)});
#endif
}

template <class T>
__device__ inline void unpack(const Words& words, acc_t<T>* out) {
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) {
    if constexpr (std::is_same_v<T, double>) {
      out[k] = __hiloint2double(static_cast<int>(words.w[2 * k + 1]), static_cast<int>(words.w[2 * k]));
    } else if constexpr (std::is_same_v<T, float>) {
      out[k] = __uint_as_float(words.w[k]);
    } else if constexpr (std::is_same_v<T, float16_t>) {
      if (k % 2 == 0) both_of(words.w[k / 2], out + k);
    } else {
      const uint32_t word = words.w[k / 2];
      out[k] = to_acc(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word & 0xffffu)});
    }
  }
}

// The larger of each of the two elements in a word; a number where one of them is NaN.
__device__ inline uint32_t larger_pair(bfloat16_t, uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  const auto pair = [](uint32_t w) {
    return __nv_bfloat162(__ushort_as_bfloat16(static_cast<unsigned short>(w)),
                          __ushort_as_bfloat16(static_cast<unsigned short>(w >> 16)));
  };
  const __nv_bfloat162 m = __hmax2(pair(a), pair(b));
  return static_cast<uint32_t>(__bfloat16_as_ushort(m.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(m.y)) << 16;
#else
  const auto one = [](uint32_t x, uint32_t y) {
    const float max =
        std::fmax(to_acc(bfloat16_t{static_cast<uint16_t>(x)}), to_acc(bfloat16_t{static_cast<uint16_t>(y)}));
    bfloat16_t out;
    set(out, max);
    return static_cast<uint32_t>(out.bits);
  };
  return one(a, b) | one(a >> 16, b >> 16) << 16;
#endif
}
__device__ inline uint32_t larger_pair(float16_t, uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  const auto pair = [](uint32_t w) {
    return __half2(__ushort_as_half(static_cast<unsigned short>(w)),
                   __ushort_as_half(static_cast<unsigned short>(w >> 16)));
  };
  const __half2 m = __hmax2(pair(a), pair(b));
  return static_cast<uint32_t>(__half_as_ushort(m.x)) | static_cast<uint32_t>(__half_as_ushort(m.y)) << 16;
#else
  const auto one = [](uint32_t x, uint32_t y) {
    const float max =
        std::fmax(to_acc(float16_t{static_cast<uint16_t>(x)}), to_acc(float16_t{static_cast<uint16_t>(y)}));
    float16_t out;
    set(out, max);
    return static_cast<uint32_t>(out.bits);
  };
  return one(a, b) | one(a >> 16, b >> 16) << 16;
#endif
}

// Two elements rounded into a word.
__device__ inline uint32_t word_of(bfloat16_t, float low, float high) {
#if defined(__CUDACC__)
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);  // one instruction
  return static_cast<uint32_t>(__bfloat16_as_ushort(both.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y))
                                                                   << 16;
#else
  return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(low))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
#endif
}
__device__ inline uint32_t word_of(float16_t, float low, float high) {
#if defined(__CUDACC__)
  const __half2 both = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(both.x)) | static_cast<uint32_t>(__half_as_ushort(both.y)) << 16;
#else
  return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(low))) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
#endif
}

template <class T>
__device__ inline Words pack(const acc_t<T>* in) {
  Words words;
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) {
    if constexpr (std::is_same_v<T, double>) {
      words.w[2 * k] = static_cast<uint32_t>(__double2loint(in[k]));
      words.w[2 * k + 1] = static_cast<uint32_t>(__double2hiint(in[k]));
    } else if constexpr (std::is_same_v<T, float>) {
      words.w[k] = __float_as_uint(in[k]);
    } else if (k % 2 == 0) {
      words.w[k / 2] = word_of(T{}, in[k], in[k + 1]);
    }
  }
  return words;
}

__device__ inline Words load_aligned(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline void store_aligned(void* p, const Words& v) {
  *static_cast<uint4*>(p) = uint4{v.w[0], v.w[1], v.w[2], v.w[3]};
}

__device__ inline unsigned misalignment(const void* p) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) & 15u);
}

// Bytes [offset, offset + 16) of low and high side by side, offset in [0, 16). No register is indexed at run time.
__device__ inline Words window(const Words& low, const Words& high, unsigned offset) {
  uint32_t w[8] = {low.w[0], low.w[1], low.w[2], low.w[3], high.w[0], high.w[1], high.w[2], high.w[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = offset & 8u ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = offset & 4u ? w[i + 1] : w[i];
  Words out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.w[i] = __funnelshift_r(w[i], w[i + 1], (offset & 3u) * 8u);
  return out;
}

// 16 bytes at p, which is `offset` bytes behind an aligned address: the two aligned vectors that hold them, of which
// the second is in the cache for the next thread. Both have a byte that is asked for, so neither leaves its page.
__device__ inline Words load_words(const void* p, unsigned offset) {
  if (offset == 0) return load_aligned(p);
  const char* aligned = static_cast<const char*>(p) - offset;
  return window(load_aligned(aligned), load_aligned(aligned + 16), offset);
}

// The first `have` of a vector of elements at p, `filler` behind them.
template <class T>
__device__ inline void load_vector(const T* p, int64_t have, unsigned offset, acc_t<T> filler, acc_t<T>* out) {
  if (have >= kVector<T>) return unpack<T>(load_words(p, offset), out);
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) out[k] = k < have ? to_acc(p[k]) : filler;
}

template <class T>
__device__ inline void store_elements(T* p, int begin, int end, const acc_t<T>* v) {
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k)
    if (k >= begin && k < end) set(p[k], v[k]);
}

// Writes the first `have` elements of v at p. Called by all lanes of a warp together, lane i of a group of kLanes with
// the i-th vector of consecutive ones. Where p is not aligned, a lane joins its end to the beginning of the next
// lane's, which makes an aligned vector; only the ends of the group are written element by element.
template <class T, int kLanes, bool kAligned>
__device__ inline void store_vector(T* p, int64_t have, unsigned offset, int lane, const acc_t<T>* v) {
  constexpr int64_t kFull = kVector<T>;
  if constexpr (kAligned) {
    if (have >= kFull) return store_aligned(p, pack<T>(v));
    return store_elements(p, 0, static_cast<int>(have > 0 ? have : 0), v);
  } else {
    const Words mine = pack<T>(v);
    Words next;
#pragma unroll
    for (int i = 0; i < 4; ++i) next.w[i] = __shfl_down_sync(0xffffffffu, mine.w[i], 1);
    if (have <= 0) return;
    if (offset == 0 && have >= kFull) return store_aligned(p, mine);
    const int head =
        offset == 0 ? 0 : (16 - static_cast<int>(offset)) / static_cast<int>(sizeof(T));  // up to alignment
    const int64_t next_have = have - kFull;  // elements behind this vector, as far as one more
    const bool has_next = head > 0 && lane % kLanes != kLanes - 1 && have >= kFull && next_have >= head;
    const bool joined = head > 0 && lane % kLanes != 0 && have >= head;  // the lane before writes my head
    const int count = static_cast<int>(have < kFull ? have : kFull);
    store_elements(p, joined ? head : 0, has_next ? head : count, v);
    if (has_next) store_aligned(p + head, window(mine, next, 16u - offset));
  }
}

}  // namespace cuda
}  // namespace fused_ops

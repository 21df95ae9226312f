// Reductions over a group of threads in a fixed order: the lanes of a part of a warp, or a block.
//
// A group of up to 32 threads exchanges registers pairwise; addition and the merges here are commutative, so that every
// lane holds the same bits. A block does so by warps and merges the warps in order. All threads of the block take part.
#pragma once
#include <cuda_runtime.h>

#include "core/element.cuh"

namespace fused_ops {
namespace cuda {

constexpr int kBlock = 256;
constexpr unsigned kAll = 0xffffffffu;

// How many blocks less are to share a multiprocessor where the compiler needs more registers for the same source.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr int kFewerBlocks = 1;
#else
constexpr int kFewerBlocks = 0;
#endif

template <class V>
__device__ inline V shuffled(V v, int lanes) {
  return __shfl_xor_sync(kAll, v, lanes);
}

// merge(a, b) over a group; every thread of it gets the result. V needs `V shuffled(V, int)`. Waits for the group, so
// that memory that its threads read before may be written after.
template <int kGroup, class V, class Merge>
__device__ inline V reduce_group(V v, const Merge& merge) {
  constexpr int kLanes = kGroup < 32 ? kGroup : 32;
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) v = merge(v, shuffled(v, d));
  if constexpr (kGroup > 32) {
    __shared__ V warps[kGroup / 32];
    __syncthreads();  // the reduction before this one has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = warps[0];
#pragma unroll
    for (int w = 1; w < kGroup / 32; ++w) v = merge(v, warps[w]);
  }
  return v;
}

template <int kGroup, class A>
__device__ inline A sum_group(A v) {
  return reduce_group<kGroup>(v, [](A a, A b) { return a + b; });
}

template <int kGroup>
__device__ inline void sync_group() {
  if constexpr (kGroup > 32)
    __syncthreads();
  else
    __syncwarp();
}

struct LossSum {
  double sum, count;
};
__device__ inline LossSum shuffled(LossSum v, int lanes) { return {shuffled(v.sum, lanes), shuffled(v.count, lanes)}; }
__device__ inline LossSum operator+(const LossSum& a, const LossSum& b) { return {a.sum + b.sum, a.count + b.count}; }

__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }  // never joined to an addition
__device__ inline double rounded_product(double a, double b) { return a * b; }

// What a - b, rounded to `difference`, has lost (Knuth).
__device__ inline float lost_by_difference(float a, float b, float difference) {
  const float taken = a - difference;
  return (a - (difference + taken)) + (taken - b);
}

// A sum of many terms to far more digits than float has, and without float64 arithmetic, which takes 64 times as long
// on many GPUs: `low` adds up what the additions to `high` round off (Knuth's two-sum) and what the products round off.
// Of double it is the plain sum.
template <class A>
struct LongSum {
  A high = 0, low = 0;

  __device__ void add(A term) {
    if constexpr (std::is_same_v<A, double>) {
      high += term;
    } else {
      const float sum = high + term, added = sum - high;
      low += (high - (sum - added)) + (term - added);
      high = sum;
    }
  }
  __device__ void add_product(A a, A b) {
    if constexpr (std::is_same_v<A, double>) {
      high += a * b;
    } else {
      const float product = rounded_product(a, b);  // whose loss is taken of this very term
      add(product);
      low += fmaf(a, b, -product);
    }
  }
  // An infinite sum is its `high`: what was rounded off is then inf - inf.
  __device__ double value() const {
    const double exact = static_cast<double>(high) + static_cast<double>(low);
    return high - high == A(0) ? exact : static_cast<double>(high);
  }
};

// What sums of many terms are kept in: float would lose digits that float32 results have.
template <class T>
using sum_t = std::conditional_t<std::is_same_v<T, float>, double, acc_t<T>>;

// The maximum and the sum of exp(x - maximum) of some values. Of none: -inf and 0. A NaN is in the sum alone.
template <class A, class S>
struct Online {
  A max;
  S sum;
};
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
// e^x to 0.7 units in the last place, the same bits on the host: expf is off by up to two, which the entropy's sum
// shows.
__device__ inline float exact_exp(float x) {
  const float shifted = fmaf(x, kLog2E, 12582912.0f), whole = shifted - 12582912.0f;
  const float first = fmaf(whole, -0.693359375f, x), r = fmaf(whole, 2.12194440e-4f, first);  // x - whole log(2)
  const float lost = fmaf(whole, 2.12194440e-4f, first - r);
  float q = 2.4801587e-5f;
  q = fmaf(q, r, 1.9841270e-4f);
  q = fmaf(q, r, 1.3888889e-3f);
  q = fmaf(q, r, 8.3333333e-3f);
  q = fmaf(q, r, 4.1666668e-2f);
  q = fmaf(q, r, 0.16666667f);
  q = fmaf(q, r, 0.5f);
  const float high = 1.0f + r, mantissa = high + fmaf(r * r, q, (r - (high - 1.0f)) + lost);
  const int power = fabsf(whole) < 152.0f ? static_cast<int>(whole) : 0, half = power >> 1;
  const float result = mantissa * __uint_as_float(static_cast<uint32_t>(half + 127) << 23) *
                       __uint_as_float(static_cast<uint32_t>(power - half + 127) << 23);
  return x > 89.0f ? kInfinity<float> : x < -104.0f ? 0.0f : result;
}
__device__ inline double exact_exp(double x) { return exp(x); }

// exp(from - to) with equal infinities 0 apart.
template <class A>
__device__ inline A rescale(A from, A to) {
  return from == to ? A(1) : exact_exp(from - to);
}
template <class A, class S>
__device__ inline Online<A, S> merged(const Online<A, S>& a, const Online<A, S>& b) {
  const A max = larger(a.max, b.max);
  return {max, a.sum * S(rescale(a.max, max)) + b.sum * S(rescale(b.max, max))};
}

// Makes `max` the running maximum and returns what is subtracted from every value.
template <class A, class S>
__device__ inline A raise_to(Online<A, S>& to, A max) {
  if (max > to.max) to.sum *= S(rescale(to.max, max)), to.max = max;
  return to.max == -kInfinity<A> ? A(0) : to.max;
}
// Adds kCount elements of T to a running maximum and sum.
template <class T, int kCount>
__device__ inline void add_values(Online<acc_t<T>, sum_t<T>>& to, const acc_t<T>* v) {
  using A = acc_t<T>;
  A max = v[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) max = larger(max, v[k]);
  const A shift = raise_to(to, max);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum += exp_of<T>(v[k] - shift);
  to.sum += sum;
}

// Merges a group's values: the maxima first, so that each thread rescales its sum once. As reduce_group.
template <int kGroup, class A, class S>
__device__ inline Online<A, S> reduce_online(Online<A, S> v) {
  constexpr int kLanes = kGroup < 32 ? kGroup : 32;
  A max = v.max;
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) max = larger(max, shuffled(max, d));
  S sum = v.sum * S(rescale(v.max, max));
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) sum += shuffled(sum, d);
  if constexpr (kGroup > 32) {
    __shared__ Online<A, S> warps[kGroup / 32];
    __syncthreads();  // the reduction before this one has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {max, sum};
    __syncthreads();
    max = warps[0].max;
#pragma unroll
    for (int w = 1; w < kGroup / 32; ++w) max = larger(max, warps[w].max);
    sum = 0;
#pragma unroll
    for (int w = 0; w < kGroup / 32; ++w) sum += warps[w].sum * S(rescale(warps[w].max, max));
  }
  return {max, sum};
}

}  // namespace cuda
}  // namespace fused_ops

// What the batch-norm kernels know of a channel: sums and moments of its values, its parameters, and the coefficients
// that its values are scaled by.
#pragma once
#include "batch_norm/cuda/kernels.h"
#include "core/reduce.cuh"

namespace fused_ops {
namespace cuda {

constexpr int64_t kFewParts = 64;  // of a channel that a warp merges; more, a block
constexpr int kCoefficients = 5;

// ---- moments

struct Pair {
  double a, b;
};
__device__ inline Pair shuffled(const Pair& v, int lanes) { return {shuffled(v.a, lanes), shuffled(v.b, lanes)}; }
__device__ inline Pair operator+(const Pair& x, const Pair& y) { return {x.a + y.a, x.b + y.b}; }

// Mean, sum of squared distances and number of some values.
struct Moments {
  double mean, m2, n;
};
// From sums of x - near and its square over n values.
__device__ inline Moments moments_around(double near, const Pair& sums, double n) {
  if (n == 0) return {0, 0, 0};
  const double off = sums.a / n, m2 = sums.b - sums.a * off;
  return {near + off, m2 < 0 ? 0.0 : m2, n};
}
// Of a group: `total` and `n` are every thread's, around(near) its sums of x - near and of the square. Adds and divides
// once where Chan's merge, which is this for two threads, divides at every step.
template <int kGroup, class Around>
__device__ inline Moments group_moments(double total, double n, const Around& around) {
  const Pair all = sum_group<kGroup>(Pair{total, n});
  const double near = all.b == 0 ? 0.0 : all.a / all.b;
  return moments_around(near, sum_group<kGroup>(around(near)), all.b);
}

// Sums of x - shift and of its square, in double. The shift is the first value, so that little cancels. S keeps it:
// double where there are registers for it, which saves a conversion a step.
template <class A, class S>
struct Shifted {
  S shift = 0;
  double sum = 0, squares = 0;

  // Adds `count` of kCount values, those that there(k), and the first: around that one in A, from there in double. One
  // that is far off costs no digits, since then its own share is as large. fresh: there were none before.
  template <int kCount, class There>
  __device__ void add(const A* v, int count, bool fresh, const There& there) {
    const A near = v[0];
    A rest = 0, squared = 0;
#pragma unroll
    for (int k = 1; k < kCount; ++k) {
      const A d = there(k) ? v[k] - near : A(0);
      rest += d, squared += d * d;
    }
    if (fresh) shift = static_cast<S>(near);
    const double delta = static_cast<double>(near) - static_cast<double>(shift), r = static_cast<double>(rest);
    sum += count * delta + r;
    squares += static_cast<double>(squared) + delta * (2 * r + count * delta);
  }
  __device__ double total(double n) const { return n * static_cast<double>(shift) + sum; }
  __device__ Pair around(double near, double n) const {
    const double d = static_cast<double>(shift) - near;
    return {sum + n * d, squares + d * (2 * sum + n * d)};
  }
};
struct All {
  __device__ bool operator()(int) const { return true; }
};

// ---- parameters and coefficients

__device__ inline double value_at(const void* p, DType dtype, int64_t i, double missing) {
  return p == nullptr ? missing : number_at(p, dtype, i);
}
__device__ inline void set_value(void* p, DType dtype, int64_t i, double value) {
  if (p == nullptr) return;
  switch (dtype) {
    case DType::float32: return set(static_cast<float*>(p)[i], static_cast<float>(value));
    case DType::float64: return set(static_cast<double*>(p)[i], value);
    case DType::bfloat16: return set(static_cast<bfloat16_t*>(p)[i], static_cast<float>(value));
    case DType::float16: return set(static_cast<float16_t*>(p)[i], static_cast<float>(value));
  }
}

// What the mean loses as it is rounded to A.
template <class A>
__device__ inline double lost_of(double mean) {
  const double low = mean - static_cast<double>(static_cast<A>(mean));
  return low == low ? low : 0;  // inf - inf
}

// Five arrays of one accumulator a channel, at the beginning of the scratch memory: z = (x - mean) * scale + shift.
template <class A>
struct Coefficients {
  A *mean, *scale, *shift, *grad_mean, *grad_slope;
  __device__ Coefficients(double* scratch, int64_t channels)
      : mean(reinterpret_cast<A*>(scratch)),
        scale(mean + channels),
        shift(scale + channels),
        grad_mean(shift + channels),
        grad_slope(grad_mean + channels) {}
  __device__ void set_affine(int64_t c, double exact_mean, double factor, double bias) const {
    mean[c] = static_cast<A>(exact_mean);
    scale[c] = static_cast<A>(factor);
    shift[c] = static_cast<A>(bias - lost_of<A>(exact_mean) * factor);
  }
};
// Behind them: three doubles a channel and part.
__host__ __device__ inline double* partials_of(double* scratch, int64_t channels) {
  return scratch + kCoefficients * channels;
}

}  // namespace cuda
}  // namespace fused_ops

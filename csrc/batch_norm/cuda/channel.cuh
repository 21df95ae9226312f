// What the batch-norm kernels know of a channel: sums and moments of its values, its parameters, and the coefficients
// that its values are scaled by.
#pragma once
#include "batch_norm/cuda/kernels.h"
#include "core/reduce.cuh"

namespace fused_ops {
namespace cuda {

constexpr int64_t kFewParts = 64;  // of a channel that a warp merges; more, a block
constexpr int kCoefficients = 6;

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

// Sums of x - shift and of its square. The shift is the first value, so that little cancels.
template <class A>
struct Shifted {
  A shift = 0;
  LongSum<A> sum, squares;

  // Adds `count` of kCount values, those that there(k), and the first: around that one in A, from there in pairs. One
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
    if (fresh) shift = near;
    // Each is delta + its own d: the sum count * delta + rest, the squares squared + delta * (2 * rest + count *
    // delta).
    const A delta = near - shift, n = static_cast<A>(count), n_delta = rounded_product(n, delta);
    sum.add_product(n, delta), sum.add(rest);
    squares.add(squared), squares.add_product(2 * rest, delta), squares.add_product(n_delta, delta);
    if constexpr (std::is_same_v<A, float>) {
      const A low = lost_by_difference(near, shift, delta);
      sum.low += n * low;
      squares.low += fmaf(n, delta, -n_delta) * delta + 2 * low * (rest + n_delta);
    }
  }
  __device__ double total(double n) const { return n * static_cast<double>(shift) + sum.value(); }
  __device__ Pair around(double near, double n) const {
    const double d = static_cast<double>(shift) - near, s = sum.value();
    return {s + n * d, squares.value() + d * (2 * s + n * d)};
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

// Arrays of one accumulator a channel: z = (x - mean) * scale + shift. At the beginning of the scratch memory, of
// all channels; a kernel that needs no other launch has its block's in shared memory.
template <class A>
struct Coefficients {
  A *mean, *scale, *shift, *grad_mean, *grad_slope;
  A* whole;  // of a backward from the output: not 0 where all of x is stored
  __device__ Coefficients(double* memory, int64_t channels)
      : mean(reinterpret_cast<A*>(memory)),
        scale(mean + channels),
        shift(scale + channels),
        grad_mean(shift + channels),
        grad_slope(grad_mean + channels),
        whole(grad_slope + channels) {}
  // Of the channel whose coefficients are the i-th.
  __device__ void set_affine(int64_t i, int64_t channel, const Parameters& p, double exact_mean, double invstd) const {
    const double factor = invstd * value_at(p.weight, p.dtype, channel, 1);
    mean[i] = static_cast<A>(exact_mean), scale[i] = static_cast<A>(factor);
    shift[i] = static_cast<A>(value_at(p.bias, p.dtype, channel, 0) - lost_of<A>(exact_mean) * factor);
  }
  __device__ void set_means(int64_t i, double exact_mean, double exact_grad_mean, double slope) const {
    grad_mean[i] = static_cast<A>(exact_grad_mean - lost_of<A>(exact_mean) * slope);
    grad_slope[i] = static_cast<A>(slope);
  }
};
// Behind them: three doubles a channel and part.
__host__ __device__ inline double* partials_of(double* scratch, int64_t channels) {
  return scratch + kCoefficients * channels;
}

// ---- what becomes of a channel's moments and sums, once all of it is known

// Running statistics, and mean and invstd, unless those are given; the i-th coefficients. `all` is of no matter in
// evaluation.
template <class A>
__device__ inline void finish_moments(const BatchNormForwardCall& c, int64_t channel, const Moments& all,
                                      const Coefficients<A>& k, int64_t i) {
  const Parameters& p = c.parameters;
  if (c.given) return k.set_affine(i, channel, p, c.mean[channel], c.invstd[channel]);
  const GhostBatch& g = c.ghost;
  const int64_t channels = c.shape.channels;
  double mean = g.first ? value_at(p.running_mean, p.dtype, channel, 0) : g.carried[channel];
  double variance = g.first ? value_at(p.running_var, p.dtype, channel, 1) : g.carried[channels + channel];
  if (c.training) {
    const double old_mean = mean, old_variance = variance;
    mean = all.n > 0 ? all.mean : kNaN<double>;
    variance = all.n > 0 ? all.m2 / (all.n - static_cast<double>(c.correction)) : kNaN<double>;
    const double fresh = all.n > 0 ? c.momentum : 0, kept = all.n > 0 ? 1 - c.momentum : 1;
    const double new_mean = all.n > 0 ? fresh * mean + kept * old_mean : old_mean;
    const double new_variance = all.n > 0 ? fresh * (all.m2 / (all.n - 1)) + kept * old_variance : old_variance;
    if (g.last) {
      set_value(c.new_mean, p.dtype, channel, new_mean), set_value(c.new_var, p.dtype, channel, new_variance);
    } else {
      g.carried[channel] = new_mean, g.carried[channels + channel] = new_variance;
    }
  }
  const double invstd = 1.0 / sqrt(variance + c.eps);
  c.mean[channel] = mean, c.invstd[channel] = invstd;
  k.set_affine(i, channel, p, mean, invstd);
}

// The limit of a channel's outputs: x is stored where an output is not >= it. NaN: of every value; -inf: of none.
// Below `smallest`, the smallest normal number, an output's rounding is no longer relative.
__device__ inline double stored_limit(const Parameters& p, int64_t channel, Activation activation, double slope,
                                      double smallest) {
  const double reach = kMaxAmplification * fabs(value_at(p.weight, p.dtype, channel, 1));
  const double flat = activation == Activation::leaky_relu && slope < 1 ? slope : 1.0;
  if (!(fabs(value_at(p.bias, p.dtype, channel, 0)) + smallest / flat <= reach)) return kNaN<double>;  // NaN too
  return activation == Activation::elu ? -slope * reach / (1 + reach) : -kInfinity<double>;
}

// What a backward's sums and coefficients of a channel are of: x, or z where the forward kept its output and not all of
// x, above `center`; (x - mean) * invstd is `inverse` times that.
struct Deviation {
  double center, inverse;
  bool whole;
};
template <class A>
__device__ inline Deviation deviation_of(const BatchNormBackwardCall& c, int64_t channel) {
  const Parameters& p = c.parameters;
  const double mean = c.mean[channel], invstd = c.invstd[channel];
  if (!c.kept.from_output) return {mean, invstd, true};
  const double limit = stored_limit(p, channel, c.activation, c.slope, c.kept.smallest);
  if (limit != limit) return {mean, invstd, true};
  const double scale = static_cast<double>(static_cast<A>(invstd * value_at(p.weight, p.dtype, channel, 1)));
  return {value_at(p.bias, p.dtype, channel, 0), invstd / scale, false};  // as the forward multiplied
}
template <class A>
__device__ inline void set_backward(const BatchNormBackwardCall& c, int64_t channel, const Deviation& d,
                                    const Coefficients<A>& k, int64_t i) {
  k.set_affine(i, channel, c.parameters, c.mean[channel], c.invstd[channel]);
  if (c.kept.from_output) k.mean[i] = static_cast<A>(d.center), k.whole[i] = static_cast<A>(d.whole);
}

// The parameters' gradients and what every value of grad_x needs, from the sums of h and of h * (x - mean), the mean
// rounded, over n values; the i-th coefficients.
template <class A>
__device__ inline void finish_gradient(const BatchNormBackwardCall& c, int64_t channel, const Pair& all, double n,
                                       const Coefficients<A>& k, int64_t i) {
  const GhostBatch& g = c.ghost;
  const int64_t channels = c.shape.channels;
  const Deviation d = deviation_of<A>(c, channel);
  const double dot = (all.b - lost_of<A>(d.center) * all.a) * d.inverse;  // around the exact mean
  const double grad_weight = (n > 0 ? dot : 0.0) + (g.first ? 0.0 : g.carried[channel]);
  const double grad_bias = (n > 0 ? all.a : 0.0) + (g.first ? 0.0 : g.carried[channels + channel]);
  if (g.last) {
    set_value(c.grad_weight, c.grad_dtype, channel, grad_weight);
    set_value(c.grad_bias, c.grad_dtype, channel, grad_bias);
  } else {
    g.carried[channel] = grad_weight, g.carried[channels + channel] = grad_bias;
  }
  set_backward(c, channel, d, k, i);
  k.set_means(i, d.center, all.a / n, dot * d.inverse / (n - static_cast<double>(c.correction)));
}

}  // namespace cuda
}  // namespace fused_ops

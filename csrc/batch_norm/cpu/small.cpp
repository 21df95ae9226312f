// Batch normalisation on the CPU of small inputs, both directions: the passes of moments.cpp and its
// neighbours, and between them the arithmetic of the channels, vectorised.
//
//   invstd = 1 / sqrt(M2 / (n - correction) + eps),  scale = invstd * weight,  shift = bias - lost * scale
//   grad_weight = dot * invstd,  grad_bias = sum,  grad_slope = dot * invstd^2 / (n - correction)
//
// where `lost` is what rounding the mean to the accumulator loses, and sum and dot are those of h and h * (x - mean).
// Memory: as the passes; everything stays in the first-level cache. The gradient before an activation that takes an exp
// is computed once, into a buffer that the second pass reads. docs/batch_norm.md.
#include <algorithm>
#include <cmath>

#include "batch_norm/cpu/activation.h"
#include "batch_norm/kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// Calls body with a value of the type that `dtype` names.
template <class Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
    case DType::bfloat16: return body(bfloat16_t{});
    case DType::float16: return body(float16_t{});
  }
}

// The n values of a parameter, as doubles. (omp simd in a lambda would want an exception handler: shared code.)
void load(DType dtype, const void* from, double missing, int64_t n, double* __restrict to) {
  if (!from) return std::fill_n(to, n, missing), void();
  with_type(dtype, [&](auto type) {
    const auto* p = static_cast<const decltype(type)*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(to_acc(p[i]));
  });
}

void save(DType dtype, const double* __restrict from, int64_t n, void* to) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = decltype(to_acc(type));
    T* p = static_cast<T*>(to);
    for (int64_t i = 0; i < n; ++i) store(p + i, static_cast<A>(from[i]));
  });
}

// The coefficients of the kernels: five accumulators a channel, of which the forward needs three.
struct Coefficients {
  bool wide;
  alignas(64) double memory[5][kSmallChannels];

  explicit Coefficients(DType dtype) : wide(dtype == DType::float64) {}
  // Row i: doubles, or floats in its first half.
  void write(int i, const double* __restrict from, int64_t n) {
    if (wide) return std::copy_n(from, n, memory[i]), void();
    float* to = reinterpret_cast<float*>(memory[i]);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] = static_cast<float>(from[c]);
  }
  // mean, scale and shift, and in `lost` what rounding the mean loses.
  void write_affine(const double* mean, const double* __restrict invstd, const double* __restrict weight,
                    const double* __restrict bias, int64_t n, double* __restrict lost) {
    double scale[kSmallChannels], shift[kSmallChannels];
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const double low = wide ? 0 : mean[c] - static_cast<double>(static_cast<float>(mean[c]));
      lost[c] = low == low ? low : 0;  // inf - inf
      scale[c] = invstd[c] * weight[c];
      shift[c] = bias[c] - lost[c] * scale[c];
    }
    write(0, mean, n), write(1, scale, n), write(2, shift, n);
  }
};

// At most this many bytes of h are buffered between the two passes.
constexpr int64_t kBufferedBytes = 16384;

// h = g * activation'(z) of a float32 input, where the two passes would each compute it. False if it is left to them:
// it is cheap, z's sign is known, or h is too large for a buffer on the stack.
bool buffer_before(const BatchNormBackward& a, float* __restrict h) {
  const bool sign = a.activation == Activation::relu || a.activation == Activation::leaky_relu;
  const int64_t n = a.layout.numel(), channels = a.layout.channels;
  if (a.activation == Activation::none || sign || n * static_cast<int64_t>(sizeof(float)) > kBufferedBytes)
    return false;
  const float *x = static_cast<const float*>(a.input), *r = static_cast<const float*>(a.residual);
  const float *mean = static_cast<const float*>(a.mean), *scale = static_cast<const float*>(a.scale);
  const float* shift = static_cast<const float*>(a.shift);
  for (int64_t at = 0; at < n; at += channels) {
    if (r) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) h[at + c] = (x[at + c] - mean[c]) * scale[c] + (shift[c] + r[at + c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) h[at + c] = (x[at + c] - mean[c]) * scale[c] + shift[c];
    }
  }
  times_derivative(a.activation, h, static_cast<const float*>(a.grad_output), n, static_cast<float>(a.slope));
  return true;
}

}  // namespace

void batch_norm_small_forward(const BatchNormForward& given, const SmallForward& s) {
  BatchNormForward args = given;
  const int64_t n = args.layout.channels;
  Coefficients coefficients(args.dtype);
  args.mean = coefficients.memory[0], args.scale = coefficients.memory[1], args.shift = coefficients.memory[2];
  double weight[kSmallChannels], bias[kSmallChannels], running[2][kSmallChannels], lost[kSmallChannels];
  load(s.params, s.weight, 1, n, weight), load(s.params, s.bias, 0, n, bias);
  if (s.new_mean || !s.training)
    load(s.params, s.running_mean, 0, n, running[0]), load(s.params, s.running_var, 1, n, running[1]);
  double *mean = s.mean, *invstd = s.invstd;
  if (s.training) {
    Partial partials[kSmallChannels];
    args.partials = partials;
    batch_norm_moments(args, 0, 1);
    const ColumnPartials found(partials, 0, n);
    const double *sample_mean = found.a, *m2 = found.b;
    const double count = static_cast<double>(*found.n), divisor = count - static_cast<double>(s.correction);
    const double rest = 1 - s.momentum;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      mean[c] = sample_mean[c];
      invstd[c] = 1.0 / std::sqrt(m2[c] / divisor + s.eps);
    }
    if (s.new_mean) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        running[0][c] = s.momentum * sample_mean[c] + rest * running[0][c];
        running[1][c] = s.momentum * (m2[c] / (count - 1)) + rest * running[1][c];
      }
      save(s.params, running[0], n, s.new_mean), save(s.params, running[1], n, s.new_var);
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) mean[c] = running[0][c], invstd[c] = 1.0 / std::sqrt(running[1][c] + s.eps);
  }
  coefficients.write_affine(mean, invstd, weight, bias, n, lost);
  batch_norm_apply(args, 0, 1);
}

void batch_norm_small_backward(const BatchNormBackward& given, const SmallBackward& s) {
  BatchNormBackward args = given;
  const int64_t n = args.layout.channels;
  Coefficients coefficients(args.dtype);
  args.mean = coefficients.memory[0], args.scale = coefficients.memory[1], args.shift = coefficients.memory[2];
  args.grad_mean = coefficients.memory[3], args.grad_slope = coefficients.memory[4];
  args.exact_mean = s.mean, args.repeat = 1;
  double weight[kSmallChannels], bias[kSmallChannels], lost[kSmallChannels];
  load(s.params, s.weight, 1, n, weight), load(s.params, s.bias, 0, n, bias);
  coefficients.write_affine(s.mean, s.invstd, weight, bias, n, lost);
  alignas(64) float h[kBufferedBytes / sizeof(float)];
  if (args.dtype == DType::float32 && buffer_before(args, h)) args.grad_output = h, args.activation = Activation::none;
  if (s.reduces) {
    Partial partials[kSmallChannels];
    args.partials = partials;
    batch_norm_grad_sums(args, 0, 1);
    const ColumnPartials found(partials, 0, n);
    const double *sums = found.a, *dots = found.b;
    const double count = static_cast<double>(*found.n), divisor = count - static_cast<double>(s.correction);
    double *grad_weight = weight, *grad_bias = bias, grad_mean[kSmallChannels], slope[kSmallChannels];
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const double sum = 0 + sums[c], dot = 0 + dots[c], inv = s.invstd[c];  // no -0
      grad_weight[c] = dot * inv;
      grad_bias[c] = sum;
      slope[c] = dot * inv * inv / divisor;
      grad_mean[c] = sum / count - lost[c] * slope[c];
    }
    coefficients.write(3, grad_mean, n), coefficients.write(4, slope, n);
    if (s.grad_weight) save(s.params, grad_weight, n, s.grad_weight), save(s.params, grad_bias, n, s.grad_bias);
  }
  if (args.grad_input || args.grad_residual) batch_norm_grad_input(args, 0, 1);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

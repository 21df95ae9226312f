// Activations and their derivatives on the GPU, over a few values in registers.
#pragma once
#include "batch_norm/kernels.h"
#include "core/element.cuh"

namespace fused_ops {
namespace cuda {

__device__ inline float exp_(float x) { return expf(x); }
__device__ inline double exp_(double x) { return exp(x); }
__device__ inline float expm1_(float x) { return expm1f(x); }
__device__ inline double expm1_(double x) { return expm1(x); }
__device__ inline float log1p_(float x) { return log1pf(x); }
__device__ inline double log1p_(double x) { return log1p(x); }
__device__ inline float erf_(float x) { return erff(x); }
__device__ inline double erf_(double x) { return erf(x); }
__device__ inline float tanh_(float x) { return tanhf(x); }
__device__ inline double tanh_(double x) { return tanh(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }

template <class A>
constexpr A kSqrtHalf = static_cast<A>(0.70710678118654752440L);
template <class A>
constexpr A kInvSqrt2Pi = static_cast<A>(0.39894228040143267794L);

template <Activation kind, class A>
__device__ inline A activated(A z, A slope) {
  if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : z;  // NaN stays
  if constexpr (kind == Activation::leaky_relu) return z > A(0) ? z : z * slope;
  if constexpr (kind == Activation::elu) return z > A(0) ? z : slope * expm1_(z);
  if constexpr (kind == Activation::silu) return z / (A(1) + exp_(-z));
  if constexpr (kind == Activation::gelu) return A(0.5) * z * (A(1) + erf_(z * kSqrtHalf<A>));
  if constexpr (kind == Activation::tanh) return tanh_(z);
  if constexpr (kind == Activation::sigmoid) return A(1) / (A(1) + exp_(-z));
  if constexpr (kind == Activation::hardswish) {
    A inner = z + A(3);
    inner = inner < A(0) ? A(0) : inner;
    inner = inner > A(6) ? A(6) : inner;
    return z * inner / A(6);
  }
  return z;
}

template <Activation kind, class A>
__device__ inline A derivative(A z, A slope) {
  if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : A(1);
  if constexpr (kind == Activation::leaky_relu) return z > A(0) ? A(1) : slope;
  if constexpr (kind == Activation::elu) return z > A(0) ? A(1) : slope * exp_(z);
  if constexpr (kind == Activation::silu) {
    const A s = A(1) / (A(1) + exp_(-z));
    return s * (A(1) + z * (A(1) - s));
  }
  if constexpr (kind == Activation::gelu)
    return A(0.5) * (A(1) + erf_(z * kSqrtHalf<A>)) + z * kInvSqrt2Pi<A> * exp_(A(-0.5) * z * z);
  if constexpr (kind == Activation::tanh) {
    const A e = exp_(A(-2) * magnitude(z)), r = A(1) / (A(1) + e);  // no cancellation, where 1 - t^2 has one
    return A(4) * e * r * r;
  }
  if constexpr (kind == Activation::sigmoid) {
    const A e = exp_(-magnitude(z)), r = A(1) / (A(1) + e);
    return e * r * r;
  }
  if constexpr (kind == Activation::hardswish) return z <= A(-3) ? A(0) : z < A(3) ? z / A(3) + A(0.5) : A(1);
  return A(1);
}

#define FUSED_OPS_ACTIVATIONS(use) \
  use(relu) use(leaky_relu) use(elu) use(silu) use(gelu) use(tanh) use(sigmoid) use(hardswish)

// z = activation(z)
template <int kCount, class A>
__device__ inline void activate(Activation kind, A* z, A slope) {
  switch (kind) {
#define FUSED_OPS_CASE(name)                                                                            \
  case Activation::name: {                                                                              \
    _Pragma("unroll") for (int i = 0; i < kCount; ++i) z[i] = activated<Activation::name>(z[i], slope); \
    break;                                                                                              \
  }
    FUSED_OPS_ACTIVATIONS(FUSED_OPS_CASE)
#undef FUSED_OPS_CASE
    case Activation::none: break;
  }
}

// g = g * activation'(z)
template <int kCount, class A>
__device__ inline void times_derivative(Activation kind, const A* z, A* g, A slope) {
  switch (kind) {
#define FUSED_OPS_CASE(name)                                                                              \
  case Activation::name: {                                                                                \
    _Pragma("unroll") for (int i = 0; i < kCount; ++i) g[i] *= derivative<Activation::name>(z[i], slope); \
    break;                                                                                                \
  }
    FUSED_OPS_ACTIVATIONS(FUSED_OPS_CASE)
#undef FUSED_OPS_CASE
    case Activation::none: break;
  }
}

// Those that take few registers have kernels of their own, of which more run at once.
inline bool light_activation(Activation a) {
  return a == Activation::none || a == Activation::relu || a == Activation::leaky_relu;
}
template <int kCount, class A>
__device__ inline void activate_light(Activation kind, A* z, A slope) {
  if (kind == Activation::none) return;
  const A factor = kind == Activation::relu ? A(0) : slope;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A below = factor == A(0) ? A(0) : z[i] * factor;  // relu: 0 also times infinity
    z[i] = z[i] <= A(0) ? below : z[i];
  }
}

}  // namespace cuda
}  // namespace fused_ops

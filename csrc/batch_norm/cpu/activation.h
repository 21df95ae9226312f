// Activations and their derivatives over a run of values.
#pragma once
#include "batch_norm/kernels.h"
#include "simd/special_functions.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

template <class A>
constexpr A kInvSqrt2Pi = static_cast<A>(0.39894228040143267794L);

template <Activation kind, class A>
inline A activated(A z, A slope) {
  if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : z;  // NaN stays
  if constexpr (kind == Activation::leaky_relu) return z > A(0) ? z : z * slope;
  if constexpr (kind == Activation::elu) return z > A(0) ? z : slope * expm1_(z > A(0) ? A(0) : z);
  if constexpr (kind == Activation::silu) return z / (A(1) + exp_close(-z));
  if constexpr (kind == Activation::gelu) return z * normal_below(z, gauss(z));
  if constexpr (kind == Activation::tanh) return tanh_(z);
  if constexpr (kind == Activation::sigmoid) return sigmoid_(z);
  if constexpr (kind == Activation::hardswish) {
    A inner = z + A(3);
    inner = inner < A(0) ? A(0) : inner;
    inner = inner > A(6) ? A(6) : inner;
    return z * inner / A(6);
  }
  return z;
}

template <Activation kind, class A>
inline A derivative(A z, A slope) {
  if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : A(1);
  if constexpr (kind == Activation::leaky_relu) return z > A(0) ? A(1) : slope;
  if constexpr (kind == Activation::elu) return z > A(0) ? A(1) : slope * exp_close(z > A(0) ? A(0) : z);
  if constexpr (kind == Activation::silu) {
    const A s = sigmoid_(z);
    return s * (A(1) + z * (A(1) - s));
  }
  if constexpr (kind == Activation::gelu) {
    const A density = gauss(z);
    return normal_below(z, density) + z * kInvSqrt2Pi<A> * density;
  }
  if constexpr (kind == Activation::tanh) {
    const A gap = tanh_gap(z);
    return A(2) * gap - gap * gap;  // 1 - t^2 = (1 - t) (1 + t), without its cancellation
  }
  if constexpr (kind == Activation::sigmoid) {
    const A e = exp_close(-magnitude(z)), r = A(1) / (A(1) + e);
    return e * r * r;
  }
  if constexpr (kind == Activation::hardswish) return z <= A(-3) ? A(0) : z < A(3) ? z / A(3) + A(0.5) : A(1);
  return A(1);
}

#define FUSED_OPS_ACTIVATIONS(use) \
  use(relu) use(leaky_relu) use(elu) use(silu) use(gelu) use(tanh) use(sigmoid) use(hardswish)

// z[i] = activation(z[i])
template <class A>
inline void activate(Activation kind, A* __restrict z, int64_t n, A slope) {
  switch (kind) {
#define FUSED_OPS_CASE(name)                                                                             \
  case Activation::name: {                                                                               \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) z[i] = activated<Activation::name>(z[i], slope); \
    break;                                                                                               \
  }
    FUSED_OPS_ACTIVATIONS(FUSED_OPS_CASE)
#undef FUSED_OPS_CASE
    case Activation::none: break;
  }
}

// z[i] = g[i] * activation'(z[i])
template <class A>
inline void times_derivative(Activation kind, A* __restrict z, const A* __restrict g, int64_t n, A slope) {
  switch (kind) {
#define FUSED_OPS_CASE(name)                                                                                     \
  case Activation::name: {                                                                                       \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) z[i] = g[i] * derivative<Activation::name>(z[i], slope); \
    break;                                                                                                       \
  }
    FUSED_OPS_ACTIVATIONS(FUSED_OPS_CASE)
#undef FUSED_OPS_CASE
    case Activation::none: {
      for (int64_t i = 0; i < n; ++i) z[i] = g[i];
      break;
    }
  }
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

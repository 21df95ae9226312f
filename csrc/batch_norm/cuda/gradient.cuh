// How the batch-norm backward's kernels get h, the gradient before the activation, from the output's.
#pragma once
#include "batch_norm/cuda/kept_output.cuh"
#include "batch_norm/cuda/mask.cuh"

namespace fused_ops {
namespace cuda {

// How a kernel gets h: from g and the mask if there is one, from z by an activation of few registers, or any way.
enum class From { gradient, light, any };

// g = g * activation'(z) for kCount values; `bits` are the forward's where there is a mask.
template <int kCount, class A>
__device__ inline void before_activation(const BatchNormBackwardCall& c, const A* z, unsigned bits, A* g) {
  const A slope = static_cast<A>(c.slope);
  if (c.mask != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = (bits >> i) & 1u ? g[i] : (slope == A(0) ? A(0) : g[i] * slope);
  } else if (c.activation == Activation::relu) {  // 0, also times infinity
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = z[i] <= A(0) ? A(0) : g[i];
  } else {
    times_derivative<kCount>(c.activation, z, g, slope);
  }
}

// The same, called: inlined, double's functions leave too few registers.
__attribute__((noinline)) __device__ inline void before_any(const BatchNormBackwardCall& c, const double* z,
                                                            unsigned bits, double* g) {
  before_activation<kUnit>(c, z, bits, g);
}

// h from z and g as kFrom says, h into g.
template <From kFrom, class A>
__device__ inline void unit_before(const BatchNormBackwardCall& c, const A* z, unsigned bits, A* g) {
  if constexpr (kFrom == From::gradient) {
    if (c.mask == nullptr) return;
    const A slope = static_cast<A>(c.slope);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const A below = slope == A(0) ? A(0) : g[i] * slope;
      g[i] = (bits >> i) & 1u ? g[i] : below;
    }
  } else if constexpr (kFrom == From::light) {
    const A slope = static_cast<A>(c.slope);
    const bool relu = c.activation == Activation::relu;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const A below = relu ? A(0) : g[i] * slope;
      g[i] = (relu ? !(z[i] <= A(0)) : z[i] > A(0)) ? g[i] : below;
    }
  } else if (c.activation != Activation::none) {
    if constexpr (std::is_same_v<A, double>)
      before_any(c, z, bits, g);
    else
      before_activation<kUnit>(c, z, bits, g);
  }
}

// Runs the code with kFast and kFrom; what is rare, and float64, has one kernel for all.
#define FUSED_OPS_WITH_FROM(fast, from, kFast, kFrom, ...) \
  if (!(fast) || (from) == From::any) {                    \
    constexpr From kFrom = From::any;                      \
    FUSED_OPS_WITH_FAST(T, fast, kFast, __VA_ARGS__)       \
  } else if constexpr (sizeof(T) < 8) {                    \
    constexpr bool kFast = true;                           \
    if ((from) == From::light) {                           \
      constexpr From kFrom = From::light;                  \
      __VA_ARGS__;                                         \
    } else {                                               \
      constexpr From kFrom = From::gradient;               \
      __VA_ARGS__;                                         \
    }                                                      \
  }

}  // namespace cuda
}  // namespace fused_ops

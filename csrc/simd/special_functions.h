// exp, expm1, log1p, sigmoid, tanh and the normal distribution's integral. The errors given are the largest over all
// floats, as docs/reliability.md has them for each instruction set.
#pragma once
#include <cmath>

#include "simd/math.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// exp(x) = (1 + series) * 2^power, for |x| of at most a few hundred: exp_ of simd/math.h with one more term of the
// series.
struct Exponential {
  float series;
  int32_t power;
};
inline Exponential reduced_exp(float x) {
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  float poly = 1.9841270e-4f;
  poly = poly * r + 1.3888889e-3f;
  poly = poly * r + 8.3333337e-3f;
  poly = poly * r + 4.1666668e-2f;
  poly = poly * r + 1.6666667e-1f;
  poly = poly * r + 0.5f;
  return {poly * r * r + r, bit_copy<int32_t>(shifted) - 0x4b400000};
}

// exp(x) to 1.1 ulp.
inline float exp_close(float x) {
  x = x < -110.0f ? -110.0f : x;
  x = x > 100.0f ? 100.0f : x;
  const Exponential e = reduced_exp(x);
  const int32_t half = e.power >> 1;
  return (e.series + 1.0f) * bit_copy<float>(static_cast<uint32_t>(half + 127) << 23) *
         bit_copy<float>(static_cast<uint32_t>(e.power - half + 127) << 23);
}
inline double exp_close(double x) { return std::exp(x); }

// exp(x) - 1 for x <= 0 to 1 ulp: the 1 stays out of the series.
inline float expm1_(float x) {
  x = x < -30.0f ? -30.0f : x;
  const Exponential e = reduced_exp(x);
  const float scale = bit_copy<float>(static_cast<uint32_t>(e.power + 127) << 23);
  return e.series * scale + (scale - 1.0f);
}
inline double expm1_(double x) { return std::expm1(x); }

// log(1 + x) for -1 < x <= 0 to 2.2 ulp: 1 + x = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) /
// (m + 1)), and what 1 + x rounds away added back to first order.
inline float log1p_below(float x) {
  const float u = 1.0f + x, lost = x - (u - 1.0f);
  const int32_t bits = bit_copy<int32_t>(u), e_bits = (bits - 0x3f3504f3) >> 23;
  const float m = bit_copy<float>(bits - (e_bits << 23)), e = static_cast<float>(e_bits);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float poly = 1.0f / 9;
  poly = poly * z + 1.0f / 7;
  poly = poly * z + 1.0f / 5;
  poly = poly * z + 1.0f / 3;
  const float log_m = 2.0f * s + 2.0f * s * (z * poly);
  return e * 0.693145751953125f + (e * 1.42860682030941723e-6f + (log_m + lost / u));
}
inline double log1p_below(double x) { return std::log1p(x); }

inline float magnitude(float x) { return std::fabs(x); }
inline double magnitude(double x) { return std::fabs(x); }

// To 2.5 ulp; 0 where it is denormal.
inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_close(-x)); }
inline double sigmoid_(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// 1 - tanh |x|, which keeps its digits where tanh is near 1.
inline float tanh_gap(float x) { return 2.0f / (exp_close(2.0f * std::fabs(x)) + 1.0f); }
inline double tanh_gap(double x) { return 2.0 / (std::exp(2.0 * std::fabs(x)) + 1.0); }

// tanh(x) to 1.2 ulp: an odd polynomial below 0.625 (a Chebyshev fit, mpmath.chebyfit, of (tanh(x) / x - 1) / x^2
// in x^2 on [0, 0.41]), one minus the gap above.
inline float tanh_(float x) {
  const float a = std::fabs(x), square = x * x;
  float near = -4.71243259e-05f;
  near = near * square + 0.00033257527f;
  near = near * square + -0.00123427162f;
  near = near * square + 0.00347208065f;
  near = near * square + -0.00882346967f;
  near = near * square + 0.021861913f;
  near = near * square + -0.0539675197f;
  near = near * square + 0.133333306f;
  near = near * square + -0.333333333f;
  const float t = a < 1.0f ? near * square * a + a : 1.0f - tanh_gap(x);
  return x != x ? x : std::copysign(t, x);
}
inline double tanh_(double x) { return std::tanh(x); }

// exp(-x^2 / 2): exp_close without its second factor, as nothing that is not 0 needs it. What its square rounds away is
// 65 ulp of it at x = 13, and 2e-8 at most.
inline float gauss(float x) {
  float y = -0.5f * x * x;
  y = y < -150.0f ? -150.0f : y;
  const Exponential e = reduced_exp(y);
  const int32_t exponent = e.power + 127;
  return (e.series + 1.0f) * bit_copy<float>(static_cast<uint32_t>(exponent < 0 ? 0 : exponent) << 23);
}
inline double gauss(double x) { return std::exp(-0.5 * x * x); }

// The normal distribution's integral up to x, to 1.6 ulp of the floats below 1; `density` is gauss(x). The part beyond
// |x| is density times erfcx(|x| / sqrt 2) / 2, a polynomial fitted on [0, 5.5] with the density as its weight (the
// density is 0 soon behind).
inline float normal_below(float x, float density) {
  const float a = std::fabs(x), t = a > 5.5f ? 5.5f : a;
  float beyond = 5.538782e-08f;
  beyond = beyond * t + -1.5356671e-06f;
  beyond = beyond * t + 1.9264338e-05f;
  beyond = beyond * t + -0.0001465349f;
  beyond = beyond * t + 0.0007692836f;
  beyond = beyond * t + -0.0030342056f;
  beyond = beyond * t + 0.009632392f;
  beyond = beyond * t + -0.026047362f;
  beyond = beyond * t + 0.062252734f;
  beyond = beyond * t + -0.13291518f;
  beyond = beyond * t + 0.24999127f;
  beyond = beyond * t + -0.39894187f;
  beyond = (beyond * t + 0.5f) * density;
  return x > 0.0f ? 1.0f - beyond : beyond;
}
inline double normal_below(double x, double) { return 0.5 * (1.0 + std::erf(x * 0.70710678118654752440)); }

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

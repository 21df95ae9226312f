// The largest error of each function of csrc/simd over a range of floats: function_accuracy.py builds this once per
// instruction set, with the kernels' own flags.
#include <algorithm>
#include <cmath>

#include "simd/special_functions.h"
#include "simd/vec.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

constexpr int64_t kBlock = 1024;

template <class F>
void each(const float* x, float* y, const F& f) {
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) y[i] = f(x[i]);
}
template <class F>
void each_register(const float* x, float* y, const F& f) {
  for (int64_t i = 0; i < kBlock; i += kWidth) store_vec(y + i, f(load_vec(x + i)));
}

enum Function { exp_scalar, exp_register, exp_sum, exp_closer, expm1, log1p_below_0, tanh, sigmoid, density, integral };

void found(int which, const float* x, float* y) {
  switch (which) {
    case exp_scalar: return each(x, y, [](float v) { return exp_(v); });
    case exp_register: return each_register(x, y, [](float_vec v) { return exp_vec(v); });
    case exp_sum: return each_register(x, y, [](float_vec v) { return exp_scaled(v) * kExpUnit; });
    case exp_closer: return each(x, y, [](float v) { return exp_close(v); });
    case expm1: return each(x, y, [](float v) { return expm1_(v); });
    case log1p_below_0: return each(x, y, [](float v) { return log1p_below(v); });
    case tanh: return each(x, y, [](float v) { return tanh_(v); });
    case sigmoid: return each(x, y, [](float v) { return sigmoid_(v); });
    case density: return each(x, y, [](float v) { return gauss(v); });
    case integral: return each(x, y, [](float v) { return normal_below(v, gauss(v)); });
  }
}

double truth(int which, double x) {
  switch (which) {
    case expm1: return std::expm1(x);
    case log1p_below_0: return std::log1p(x);
    case tanh: return std::tanh(x);
    case sigmoid: return 1 / (1 + std::exp(-x));
    case density: return std::exp(-0.5 * x * x);
    case integral: return 0.5 * std::erfc(-x * 0.70710678118654752440);
    default: return std::exp(x);
  }
}

// Distance between the floats around `value`; of the integral, which is added to others, the one below 1.
double ulp(int which, double value) {
  constexpr uint64_t kSmallest = 1023 - 126;  // exponent of the floats that are not denormal
  const uint64_t exponent = bit_copy<uint64_t>(value) << 1 >> 53;
  return bit_copy<double>((which == integral ? 1022 - 23 : std::max(exponent, kSmallest) - 23) << 52);
}

}  // namespace
}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// The largest error, in ulp, for every step-th float of bits [begin, end), and where it is. NaN's is inf.
extern "C" double largest_error(int which, uint32_t begin, uint32_t end, uint32_t step, float* at) {
  using namespace fused_ops;
  using namespace fused_ops::FUSED_OPS_ISA;
  double worst = 0;
  float x[kBlock], y[kBlock];
  for (uint64_t bits = begin; bits < end;) {
    for (int64_t i = 0; i < kBlock; ++i, bits += step)
      x[i] = bit_copy<float>(static_cast<uint32_t>(std::min<uint64_t>(bits, end - 1)));
    found(which, x, y);
    for (int64_t i = 0; i < kBlock; ++i) {
      const double exact = truth(which, static_cast<double>(x[i]));
      const bool overflows = std::fabs(exact) >= 0x1.ffffffp127;  // to inf, rounded to the nearest
      if (overflows && static_cast<double>(y[i]) == std::copysign(std::numeric_limits<double>::infinity(), exact))
        continue;
      const double error = std::fabs(static_cast<double>(y[i]) - exact) / ulp(which, exact);
      if (!(error <= worst)) worst = error == error ? error : std::numeric_limits<double>::infinity(), *at = x[i];
    }
  }
  return worst;
}

// The function of one value, for what has no error: NaN and the infinities.
extern "C" float value_at(int which, float at) {
  using namespace fused_ops::FUSED_OPS_ISA;
  float x[kBlock], y[kBlock];
  std::fill_n(x, kBlock, at);
  found(which, x, y);
  return y[kBlock / 2];
}

// Mean and M2 (the sum of squared deviations) of runs of values, and their merging (Chan, Golub and LeVeque, 1979).
#pragma once
#include "simd.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

struct Moments {
  double mean = 0, m2 = 0;
  int64_t n = 0;

  void merge(double other_mean, double other_m2, int64_t other_n) {
    if (other_n == 0) return;
    if (n == 0) {  // exact, and keeps inf and NaN as they came
      mean = other_mean, m2 = other_m2, n = other_n;
      return;
    }
    const double total = static_cast<double>(n + other_n), delta = other_mean - mean;
    mean += delta * (static_cast<double>(other_n) / total);
    m2 += other_m2 + delta * delta * (static_cast<double>(n) * static_cast<double>(other_n) / total);
    n += other_n;
  }
};

// A double split into a pair of accumulators, so that x - mean keeps the digits that a single float mean would lose.
template <class A>
struct Split {
  A high, low;
  explicit Split(double v) : high(static_cast<A>(v)), low(static_cast<A>(v - static_cast<double>(static_cast<A>(v)))) {}
};
template <>
struct Split<double> {
  double high, low = 0;
  explicit Split(double v) : high(v) {}
};

template <class A>
inline double fold(A* lanes) {
  double sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// Two passes over n <= kChunk values in cache: the mean, then deviations from it rounded to A, corrected in double.
template <class A>
inline void chunk_moments(const A* x, int64_t n, double* mean, double* m2) {
  const A shift = x[0];
  A lanes[kLanes] = {}, squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l] - shift;
  }
  for (int64_t l = 0; i + l < n; ++l) lanes[l] += x[i + l] - shift;
  const A center = static_cast<A>(shift + fold(lanes) / static_cast<double>(n));
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = 0;
  for (i = 0; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const A d = x[i + l] - center;
      lanes[l] += d;
      squares[l] += d * d;
    }
  }
  for (int64_t l = 0; i + l < n; ++l) {
    const A d = x[i + l] - center;
    lanes[l] += d;
    squares[l] += d * d;
  }
  const double sum = fold(lanes);
  *mean = center + sum / static_cast<double>(n);
  *m2 = fold(squares) - sum * sum / static_cast<double>(n);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

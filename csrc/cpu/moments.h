// Mean and M2 (the sum of squared deviations) of runs of values, and their merging (Chan, Golub and LeVeque, 1979).
#pragma once
#include <cmath>

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
    if (std::isfinite(delta))
      mean += delta * (static_cast<double>(other_n) / total);
    else
      mean += other_mean;  // inf stays inf, which inf - inf would not
    m2 += other_m2 + delta * delta * (static_cast<double>(n) * static_cast<double>(other_n) / total);
    n += other_n;
  }
};

// Two sums over values of one channel, in 64 lanes (16 in what is left of 64): one order of summation for all ISAs.
// 64-byte vectors are the compiler's, which splits them where the machine's are narrower.
template <class A>
struct Lanes {
  static constexpr int64_t kWidth = 64 / sizeof(A), kVectors = 4;
  typedef A Vector __attribute__((vector_size(64)));

  Vector first[kVectors] = {}, second[kVectors] = {};
  A first_tail = 0, second_tail = 0;

  struct Unaligned {
    Vector v;
  } __attribute__((packed, may_alias));
#define FUSED_OPS_LOAD(p) (reinterpret_cast<const Unaligned*>(p)->v)

  // first += d, second += d * d for d = x - center.
  void add_deviations(const A* x, int64_t n, A center) {
    int64_t i = 0;
    Vector s0 = first[0], s1 = first[1], s2 = first[2], s3 = first[3];
    Vector q0 = second[0], q1 = second[1], q2 = second[2], q3 = second[3];
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      const Vector d0 = FUSED_OPS_LOAD(x + i) - center, d1 = FUSED_OPS_LOAD(x + i + kWidth) - center;
      const Vector d2 = FUSED_OPS_LOAD(x + i + 2 * kWidth) - center, d3 = FUSED_OPS_LOAD(x + i + 3 * kWidth) - center;
      s0 += d0, s1 += d1, s2 += d2, s3 += d3;
      q0 += d0 * d0, q1 += d1 * d1, q2 += d2 * d2, q3 += d3 * d3;
    }
    for (; i + kWidth <= n; i += kWidth) {
      const Vector d = FUSED_OPS_LOAD(x + i) - center;
      s0 += d, q0 += d * d;
    }
    first[0] = s0, first[1] = s1, first[2] = s2, first[3] = s3;
    second[0] = q0, second[1] = q1, second[2] = q2, second[3] = q3;
    for (; i < n; ++i) {
      const A d = x[i] - center;
      first_tail += d, second_tail += d * d;
    }
  }

  static double fold(const Vector* v, A tail) {
    double sum = tail;
    const Vector pairs = (v[0] + v[1]) + (v[2] + v[3]);
    for (int64_t l = 0; l < kWidth; ++l) sum += static_cast<double>(pairs[l]);
    return sum;
  }

  // Returns both sums and starts again from zero.
  void take(double* first_sum, double* second_sum) {
    *first_sum = fold(first, first_tail);
    *second_sum = fold(second, second_tail);
    *this = Lanes();
  }
};

// sum of g and of g * (x - mean) in double, 32 values at a time: PyTorch's own sums are double, and what is left of
// these after cancellation must be no worse.
class ProductLanes {
 public:
  explicit ProductLanes(double mean) : mean_(mean) {}

  template <class A>
  void add(const A* g, const A* x, int64_t n) {
    int64_t i = 0;
    Vector s0 = sum_[0], s1 = sum_[1], s2 = sum_[2], s3 = sum_[3];
    Vector d0 = dot_[0], d1 = dot_[1], d2 = dot_[2], d3 = dot_[3];
    for (; i + 32 <= n; i += 32) {
      step(g + i, x + i, s0, d0), step(g + i + 8, x + i + 8, s1, d1);
      step(g + i + 16, x + i + 16, s2, d2), step(g + i + 24, x + i + 24, s3, d3);
    }
    for (; i + 8 <= n; i += 8) step(g + i, x + i, s0, d0);
    sum_[0] = s0, sum_[1] = s1, sum_[2] = s2, sum_[3] = s3;
    dot_[0] = d0, dot_[1] = d1, dot_[2] = d2, dot_[3] = d3;
    for (; i < n; ++i) {
      const double v = static_cast<double>(g[i]);
      sum_tail_ += v, dot_tail_ += v * (static_cast<double>(x[i]) - mean_);
    }
  }
  double sum() const { return fold(sum_, sum_tail_); }
  double dot() const { return fold(dot_, dot_tail_); }

 private:
  typedef double Vector __attribute__((vector_size(64)));
  typedef float Narrow __attribute__((vector_size(32)));
  template <class V>
  struct Unaligned {
    V v;
  } __attribute__((packed, may_alias));

  inline __attribute__((always_inline)) void step(const float* g, const float* x, Vector& s, Vector& d) const {
#if defined(__AVX512F__)  // the compiler would convert halves and join them
    const Vector a = _mm512_cvtps_pd(_mm256_loadu_ps(g)), b = _mm512_cvtps_pd(_mm256_loadu_ps(x));
#else
    const Vector a = __builtin_convertvector(reinterpret_cast<const Unaligned<Narrow>*>(g)->v, Vector);
    const Vector b = __builtin_convertvector(reinterpret_cast<const Unaligned<Narrow>*>(x)->v, Vector);
#endif
    s += a, d += a * (b - mean_);
  }
  inline __attribute__((always_inline)) void step(const double* g, const double* x, Vector& s, Vector& d) const {
    const Vector a = reinterpret_cast<const Unaligned<Vector>*>(g)->v;
    s += a, d += a * (reinterpret_cast<const Unaligned<Vector>*>(x)->v - mean_);
  }
  static double fold(const Vector* v, double tail) {
    const Vector total = (v[0] + v[1]) + (v[2] + v[3]);
    for (int64_t l = 0; l < 8; ++l) tail += total[l];
    return tail;
  }

  double mean_;
  Vector sum_[4] = {}, dot_[4] = {};
  double sum_tail_ = 0, dot_tail_ = 0;
};

#undef FUSED_OPS_LOAD

// The mean of n values in one pass, rounded: what deviations are taken from, not the result.
template <class A>
inline A pilot_mean(const A* x, int64_t n) {
  Lanes<A> lanes;
  double sum, squares;
  lanes.add_deviations(x, n, x[0]);
  lanes.take(&sum, &squares);
  return static_cast<A>(static_cast<double>(x[0]) + sum / static_cast<double>(n));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

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

// The sum of one channel's values and of their squared deviations from a center, in up to 64 lanes: one order of
// summation for all ISAs. 64-byte vectors are the compiler's, which splits them where the machine's are narrower. The
// values themselves are added in double (doubles as deviations): where they cancel, what is left of the mean must be
// within one rounding. Squares cannot cancel: they are added in the accumulator.
template <class A>
struct Lanes {
  static constexpr int64_t kWidth = 64 / sizeof(A), kVectors = 4;
  typedef A Vector __attribute__((vector_size(64)));
  typedef double Wide __attribute__((vector_size(64)));
  typedef float Half __attribute__((vector_size(32)));

  Wide values[kVectors] = {};
  Vector squares[kVectors] = {};
  double value_tail = 0;
  A square_tail = 0;

  struct Unaligned {
    Vector v;
  } __attribute__((packed, may_alias));
  struct UnalignedHalf {
    Half v;
  } __attribute__((packed, may_alias));

  static inline __attribute__((always_inline)) void step(const A* x, A center, Wide& s, Vector& q) {
    const Vector d = reinterpret_cast<const Unaligned*>(x)->v - center;
    q += d * d;
    if constexpr (sizeof(A) == sizeof(double)) {
      s += d;
    } else {
#if defined(__AVX512F__)  // the compiler would convert quarters and join them
      s += _mm512_cvtps_pd(_mm256_loadu_ps(x)) + _mm512_cvtps_pd(_mm256_loadu_ps(x + 8));
#else
      s += __builtin_convertvector(reinterpret_cast<const UnalignedHalf*>(x)->v, Wide) +
           __builtin_convertvector(reinterpret_cast<const UnalignedHalf*>(x + 8)->v, Wide);
#endif
    }
  }

  void add(const A* x, int64_t n, A center) {
    int64_t i = 0;
    Wide s0 = values[0], s1 = values[1], s2 = values[2], s3 = values[3];
    Vector q0 = squares[0], q1 = squares[1], q2 = squares[2], q3 = squares[3];
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      step(x + i, center, s0, q0), step(x + i + kWidth, center, s1, q1);
      step(x + i + 2 * kWidth, center, s2, q2), step(x + i + 3 * kWidth, center, s3, q3);
    }
    for (; i + kWidth <= n; i += kWidth) step(x + i, center, s0, q0);
    values[0] = s0, values[1] = s1, values[2] = s2, values[3] = s3;
    squares[0] = q0, squares[1] = q1, squares[2] = q2, squares[3] = q3;
    for (; i < n; ++i) {
      const A d = x[i] - center;
      value_tail += static_cast<double>(sizeof(A) == sizeof(double) ? d : x[i]), square_tail += d * d;
    }
  }

  template <int64_t kLength, class V>
  static double fold(const V& v, double sum) {
    for (int64_t l = 0; l < kLength; ++l) sum += static_cast<double>(v[l]);
    return sum;
  }

  // The mean and M2 of the n values added so far around `center`; starts again from zero.
  void take(A center, int64_t n, double* mean, double* m2) {
    const double count = static_cast<double>(n), c = static_cast<double>(center);
    const Wide sums = (values[0] + values[1]) + (values[2] + values[3]);
    const Vector deviations = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    const double share = fold<8>(sums, value_tail) / count, off = sizeof(A) == sizeof(double) ? share : share - c;
    *mean = sizeof(A) == sizeof(double) ? c + share : share;
    *m2 = fold<kWidth>(deviations, static_cast<double>(square_tail)) - off * off * count;
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

// The mean of n values in one pass, rounded: what deviations are taken from, not the result.
template <class A>
inline A pilot_mean(const A* x, int64_t n) {
  Lanes<A> lanes;
  double mean, m2;
  lanes.add(x, n, x[0]);
  lanes.take(x[0], n, &mean, &m2);
  return static_cast<A>(mean);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

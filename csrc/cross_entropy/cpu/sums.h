// The sums over one row that cross-entropy's options need, a chunk of classes at a time.
#pragma once
#include "cross_entropy/cpu/tile.h"
#include "simd/line.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// Of partial sums, so that each is of few terms whatever the width: kLanes of them at least.
constexpr int64_t kRegisters = std::max<int64_t>(2, kLanes / kWidth);

inline float reduce_registers(float_vec (&sums)[kRegisters]) {
  for (int64_t half = kRegisters / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  return reduce_add(sums[0]);
}

// ---- the largest value of a chunk, of those that are not NaN: the sums find those

inline float largest(const float* u, int64_t n) { return max_of_row(u, n); }
inline double largest(const double* u, int64_t n) {
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) best = u[i] > best ? u[i] : best;
  return best;
}

// ---- (sum of exp(u - shift), sum of exp(u - shift) (u - shift)) but for one class; the second only if kEntropy

inline void add_to(DoublePair& sum, float_vec term) {
  const DoublePair wide = widen(term);
  sum.low += wide.low, sum.high += wide.high;
}
inline double reduce_add(const DoublePair& v) {
  double lanes[kWidth], sum = 0;
  store_vec(lanes, v.low), store_vec(lanes + kWidth / 2, v.high);
  for (double lane : lanes) sum += lane;
  return sum;
}

// The entropy is small where one term is 1 and the others are not: few of them are added in float.
template <bool kExcept>
void exp_sums_and_products(const float* u, int64_t n, float shift, int64_t except, double* sum, double* weighted) {
  constexpr int64_t kFold = 4 * kWidth;
  const int_vec wanted = int_vec{} + static_cast<int32_t>(except);
  int_vec at = iota();
  DoublePair sums{}, products{};
  for (int64_t begin = 0; begin < n; begin += kFold) {
    float_vec s{}, w{};
    for (int64_t i = begin; i < std::min(begin + kFold, n); i += kWidth) {
      const float_vec v = load_up_to(u + i, std::min(kWidth, n - i), -std::numeric_limits<float>::infinity()) - shift;
      float_vec e = exp_vec(v);
      if constexpr (kExcept) e = at == wanted ? float_vec{} : e, at += static_cast<int32_t>(kWidth);
      s += e, w += e == 0.0f ? float_vec{} : e * v;
    }
    add_to(sums, s), add_to(products, w);
  }
  *sum += reduce_add(sums), *weighted += reduce_add(products);
}

// `except` is outside [0, n) for none.
template <bool kEntropy>
void exp_sums(const float* u, int64_t n, float shift, int64_t except, double* sum, double* weighted) {
  const bool here = except >= 0 && except < n;
  if (here && kEntropy) return exp_sums_and_products<true>(u, n, shift, except, sum, weighted);
  if (kEntropy) return exp_sums_and_products<false>(u, n, shift, 0, sum, weighted);
  *sum += static_cast<double>(here ? sum_exp_of_row<true>(u, n, shift, except) : sum_exp_of_row<false>(u, n, shift, 0));
}
template <bool kEntropy>
void exp_sums(const double* u, int64_t n, double shift, int64_t except, double* sum, double* weighted) {
  double s[kLanes] = {}, w[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double v = u[i] - shift, e = i == except ? 0 : exp_(v);
    s[i % kLanes] += e;
    if (kEntropy) w[i % kLanes] += e == 0 ? 0 : e * v;
  }
  for (int64_t l = 0; l < kLanes; ++l) *sum += s[l], *weighted += w[l];
}

// ---- (sum of q, sum of q (base - u)); a class that is not allowed counts only where its q is not 0

struct Dot {
  double mass = 0, dot = 0;
  void add(double m, double d) { mass += m, dot += d; }
};

// Which of n <= kWidth classes are allowed: not zero.
inline int_vec load_allowed(const uint8_t* allowed, int64_t n) {
  int32_t flags[kWidth];
  for (int64_t l = 0; l < kWidth; ++l) flags[l] = l < n ? allowed[l] : 0;
  return load_bits<int_vec>(flags);
}

inline void add_dot(const float*, NoShares, const uint8_t*, int64_t, float, Dot*) {}
inline void add_dot(const float* u, OneShare q, const uint8_t*, int64_t n, float base, Dot* to) {  // no mask
  float_vec d[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int64_t k = 0; k < 4; ++k) d[k] += q.value * (base - load_vec(u + i + k * kWidth));  // the sum may overflow
  for (; i < n; i += kWidth) d[0] += q.value * (base - load_up_to(u + i, std::min(kWidth, n - i), base));
  to->add(static_cast<double>(q.value) * static_cast<double>(n),
          static_cast<double>(reduce_add((d[0] + d[1]) + (d[2] + d[3]))));
}
template <bool kMasked>
void add_dot_of(const float* u, EachShare q, const uint8_t* allowed, int64_t n, float base, Dot* to) {
  float_vec m[kRegisters] = {}, d[kRegisters] = {};
  const auto term = [&](int64_t i, int64_t count, float_vec& mass, float_vec& dot) {
    const float_vec share = q.at(i, count), product = share * (base - load_up_to(u + i, count, base));
    mass += share;
    if constexpr (kMasked)
      dot += (load_allowed(allowed + i, count) | (share != 0.0f)) != 0 ? product : float_vec{};
    else
      dot += product;
  };
  int64_t i = 0;
  for (; i + kRegisters * kWidth <= n; i += kRegisters * kWidth)
    for (int64_t k = 0; k < kRegisters; ++k) term(i + k * kWidth, kWidth, m[k], d[k]);
  for (int64_t k = 0; i < n; i += kWidth, ++k) term(i, std::min(kWidth, n - i), m[k], d[k]);
  to->add(static_cast<double>(reduce_registers(m)), static_cast<double>(reduce_registers(d)));
}
inline void add_dot(const float* u, EachShare q, const uint8_t* allowed, int64_t n, float base, Dot* to) {
  if (allowed) return add_dot_of<true>(u, q, allowed, n, base, to);
  add_dot_of<false>(u, q, nullptr, n, base, to);
}
inline void add_dot(const float* u, const Shares<float>& q, const uint8_t* allowed, int64_t n, float base, Dot* to) {
  with_shares(q, [&](auto shares) { add_dot(u, shares, allowed, n, base, to); });
}
inline void add_dot(const double* u, const Shares<double>& q, const uint8_t* allowed, int64_t n, double base, Dot* to) {
  double m[kLanes] = {}, d[kLanes] = {};
  for (int64_t i = 0; q.any() && i < n; ++i) {
    m[i % kLanes] += q.at(i);
    if (!allowed || allowed[i] || q.at(i) != 0) d[i % kLanes] += q.at(i) * (base - u[i]);
  }
  for (int64_t l = 0; l < kLanes; ++l) to->add(m[l], d[l]);
}

// ---- a row

inline double exp_of(float x) { return static_cast<double>(exp_(x)); }
inline double exp_of(double x) { return std::exp(x); }

template <class A>
struct RowState {
  static constexpr A kNone = -std::numeric_limits<A>::infinity();
  A max = kNone, base = 0;          // of the values that are not NaN; the first chunk's maximum, or 0
  A excluded = 0;                   // u of the excluded class
  double others = 0, weighted = 0;  // sums over exp(u - max), without the excluded class
  Dot q;
  int64_t prediction = 0;
  bool found_nan = false;  // with kEntropy: the prediction is the first NaN

  // One chunk, whose first class is c; `except` is the class to leave out of the sums of exponentials, or -1.
  template <bool kEntropy>
  void add(const A* u, const Shares<A>& shares, const uint8_t* allowed, int64_t c, int64_t n, int64_t except) {
    const A chunk_max = largest(u, n);
    if (c == 0 && std::isfinite(chunk_max)) base = chunk_max;
    add_dot(u, shares, allowed, n, base, &q);
    if (chunk_max > max) {
      if (kEntropy && !found_nan) prediction = c + first_of(u, n, chunk_max);
      const bool first = max == kNone;
      const double shrink = first ? 0.0 : static_cast<double>(exp_(max - chunk_max));
      const double fall = first ? 0.0 : static_cast<double>(max) - static_cast<double>(chunk_max);
      if (kEntropy) weighted = shrink == 0 ? 0 : shrink * (weighted + fall * others);
      others *= shrink;
      max = chunk_max;
    }
    const int64_t t = except < c ? -1 : except - c;
    if (t >= 0 && t < n) excluded = u[t];
    exp_sums<kEntropy>(u, n, max == kNone ? A(0) : max, t, &others, &weighted);
    if (kEntropy && others != others && !found_nan) find_nan(u, c, n);
  }

  // log sum exp(u - max). `below` is the excluded class' u - max; not used if none is.
  double log_sum(bool excluded, double below) const {
    if (max == kNone) return std::numeric_limits<double>::quiet_NaN();  // no class left: as PyTorch
    const double rest =
        !excluded || below == 0 ? others - (excluded ? 0.0 : 1.0) : (others - 1.0) + exp_of(static_cast<A>(below));
    return std::is_same_v<A, double> ? std::log1p(rest) : log1p_(rest);
  }

 private:
  static int64_t first_of(const A* u, int64_t n, A value) {
    int64_t i = 0;
    while (i + 1 < n && u[i] != value) ++i;
    return i;
  }
  void find_nan(const A* u, int64_t c, int64_t n) {
    for (int64_t i = 0; i < n && !found_nan; ++i)
      if (u[i] != u[i]) found_nan = true, prediction = c + i;
  }
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

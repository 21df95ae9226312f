// One row of cross-entropy with its classes in registers: its sums, chunk by chunk, and its gradient.
//
// The plain loss of 16 and 32 bit reads the logits where they lie; the options, and float64, read tiles (inputs.h). The
// arithmetic is one: the plain loss is the instance without coefficients, entropy and slopes. That it has an instance
// for 16 bit buys, of (2048, 1000) bfloat16 on one AVX-512 core, a forward of 0.75 ms instead of 0.98.
#pragma once
#include <algorithm>

#include "cross_entropy/cpu/inputs.h"
#include "simd/line.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kClassesPerFold = 8;  // Terms that are added in float before their sum goes into a double.
// Registers of partial sums, so that each is of few terms whatever the width: kLanes of them at least.
constexpr int64_t kRegisters = std::max<int64_t>(2, kLanes / kWidth);

// ---- the largest value, of those that are not NaN: the sums find those

template <class T>
float largest(const T* x, int64_t n) {
  float_vec m[4];
  for (auto& v : m) v = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int64_t k = 0; k < 4; k += 2) {
      const VecPair v = load_pair(x + i + k * kWidth);
      m[k] = max_vec(v.first, m[k]), m[k + 1] = max_vec(v.second, m[k + 1]);
    }
  for (; i + kWidth <= n; i += kWidth) m[0] = max_vec(load_vec(x + i), m[0]);
  if (i < n) m[1] = max_vec(load_tail(x + i, n - i, -std::numeric_limits<float>::infinity()), m[1]);
  return reduce_max(max_vec(max_vec(m[0], m[1]), max_vec(m[2], m[3])));
}
inline double largest(const double* u, int64_t n) {
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) best = u[i] > best ? u[i] : best;
  return best;
}

// ---- the sum of exp(u - shift), but for one class

// What is read next, while there is arithmetic to do: the maximum that comes first would wait for it.
template <class T>
inline void fetch(const T* next, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(next + i);
}

// Without the class `except`, which is outside [0, n) for none: it is looked for only in the registers where it is,
// which of (64, 1000) float32 saves an eighth of the forward's AVX2 instructions. Fetches as many values from `next`
// meanwhile.
template <class T>
void add_exp(const T* x, int64_t n, float shift, int64_t except, const T* next, double* sum) {
  constexpr int64_t kStep = 4 * kWidth;
  float_vec s[4] = {};
  int64_t i = 0;
  const auto steps = [&](auto excepts, int64_t end) FUSED_OPS_INLINE {
    for (; i + kStep <= end; i += kStep) {
      fetch(next + i, kStep);
      int_vec at = first_of_pair<T>() + static_cast<int32_t>(i);
      for (int64_t k = 0; k < 4; k += 2, at += static_cast<int32_t>(2 * kWidth)) {
        const VecPair v = load_pair(x + i + k * kWidth);
        float_vec first = exp_scaled(v.first - shift), second = exp_scaled(v.second - shift);
        if constexpr (excepts) {
          first = at == static_cast<int32_t>(except) ? float_vec{} : first;
          second = at + kPairStep<T> == static_cast<int32_t>(except) ? float_vec{} : second;
        }
        s[k] += first, s[k + 1] += second;
      }
    }
  };
  const int64_t before = except >= 0 && except < n ? except / kStep * kStep : n;
  steps(std::false_type(), before), steps(std::true_type(), std::min(before + kStep, n)), steps(std::false_type(), n);
  int_vec at = iota() + static_cast<int32_t>(i);
  const auto rest = [&](float_vec v) {
    return at == static_cast<int32_t>(except) ? float_vec{} : exp_scaled(v - shift);
  };
  for (; i + kWidth <= n; i += kWidth, at += static_cast<int32_t>(kWidth)) s[0] += rest(load_vec(x + i));
  if (i < n) s[1] += rest(load_tail(x + i, n - i, -std::numeric_limits<float>::infinity()));
  *sum += static_cast<double>(reduce_add((s[0] + s[1]) + (s[2] + s[3])) * kExpUnit);
}
inline void add_exp(const double* x, int64_t n, double shift, int64_t except, const double*, double* sum) {
  double s[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) s[i % kLanes] += i == except ? 0 : exp_(x[i] - shift);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) s[l] += s[l + half];
  *sum += s[0];
}

// A row's maximum, and its sum of exp(u - max) without one class.
template <class A>
struct ExpSum {
  static constexpr A kNone = -std::numeric_limits<A>::infinity();
  A max = kNone;  // of the values that are not NaN
  double others = 0;

  // Raises the maximum; returns the factor of what was summed before.
  double raise(A next) {
    const double shrink = max == kNone ? 0.0 : static_cast<double>(exp_(max - next));
    others *= shrink, max = next;
    return shrink;
  }
  A shift() const { return max == kNone ? A(0) : max; }
};

// A row where it lies; `next` is the row after it.
template <class T>
ExpSum<float> plain_row(const T* x, int64_t classes, int64_t target, const T* next) {
  ExpSum<float> sum;
  for (int64_t c = 0; c < classes; c += kChunk) {
    const int64_t n = std::min(kChunk, classes - c);
    const float chunk_max = largest(x + c, n);
    if (chunk_max > sum.max) sum.raise(chunk_max);
    add_exp(x + c, n, sum.shift(), target - c, c + n < classes ? x + c + n : next, &sum.others);
  }
  return sum;
}

// Per row: the maximum, the sum of exp(x_j - max) over the classes but the target, and x_target - max.
struct RowSums {
  double max[kRowTile], others[kRowTile], below[kRowTile];

  // `below` is NaN for a row of only -inf and for +inf, as in PyTorch.
  void set(int64_t r, const ExpSum<float>& sum, float target) {
    max[r] = static_cast<double>(sum.max), others[r] = sum.others;
    below[r] = static_cast<double>(target) - max[r];
  }

  // lse and loss of n rows; not of float64, for which float's exponential is not enough.
  void finish(int64_t n, double* lse, double* loss) const {
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) {
      // below < 0: the maximum is among the others, which are 1 at least
      const double target = static_cast<double>(exp_(static_cast<float>(below[r])));
      const double log_sum = log1p_(below[r] == 0 ? others[r] : (others[r] - 1.0) + target);
      lse[r] = max[r] + log_sum, loss[r] = log_sum - below[r];
    }
  }
};

// ---- what the options add: sum of exp(u - shift) (u - shift)

inline void add_to(DoublePair& sum, float_vec term) {
  const DoublePair wide = widen(term);
  sum.low += wide.low, sum.high += wide.high;
}
inline double reduce_add(const DoublePair& v) {
  double parts[kWidth], sum = 0;
  store_vec(parts, v.low), store_vec(parts + kWidth / 2, v.high);
  for (double part : parts) sum += part;
  return sum;
}

// add_exp and the weighted sum. The entropy is small where one term is 1 and the others are not: few of them are added
// in float.
template <bool kExcept>
void exp_sums_of(const float* u, int64_t n, float shift, int64_t except, double* sum, double* weighted) {
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
inline void exp_sums(const float* u, int64_t n, float shift, int64_t except, double* sum, double* weighted) {
  if (except >= 0 && except < n) return exp_sums_of<true>(u, n, shift, except, sum, weighted);
  exp_sums_of<false>(u, n, shift, 0, sum, weighted);
}
inline void exp_sums(const double* u, int64_t n, double shift, int64_t except, double* sum, double* weighted) {
  double s[kLanes] = {}, w[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double v = u[i] - shift, e = i == except ? 0 : exp_(v);
    s[i % kLanes] += e, w[i % kLanes] += e == 0 ? 0 : e * v;
  }
  for (int64_t l = 0; l < kLanes; ++l) *sum += s[l], *weighted += w[l];
}

// ---- what coefficients add: (sum of q, sum of q (base - u)); a class that is not allowed counts only where its q is
// not 0

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

inline float reduce_registers(float_vec (&sums)[kRegisters]) {
  for (int64_t half = kRegisters / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  return reduce_add(sums[0]);
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

// ---- a row as the options see it

template <class A>
struct RowState {
  ExpSum<A> sum;        // without the excluded class
  double weighted = 0;  // sum of exp(u - max) (u - max), without it too
  A base = 0;           // the first chunk's maximum, or 0
  A excluded = 0;       // u of the excluded class
  Dot q;
  int64_t prediction = 0;
  bool found_nan = false;  // with statistics: the prediction is the first NaN

  // One chunk, whose first class is c; `except` is the class to leave out of the sums of exponentials, or -1.
  void add(const A* u, const Shares<A>& shares, const uint8_t* allowed, int64_t c, int64_t n, int64_t except,
           bool statistics) {
    const A chunk_max = largest(u, n);
    if (c == 0 && std::isfinite(chunk_max)) base = chunk_max;
    add_dot(u, shares, allowed, n, base, &q);
    if (chunk_max > sum.max) {
      if (statistics && !found_nan) prediction = c + first_of(u, n, chunk_max);
      const ExpSum<A> before = sum;
      const double shrink = sum.raise(chunk_max),
                   fall = static_cast<double>(before.max) - static_cast<double>(chunk_max);
      weighted = shrink == 0 ? 0 : shrink * (weighted + fall * before.others);
    }
    const int64_t t = except < c ? -1 : except - c;
    if (t >= 0 && t < n) excluded = u[t];
    if (!statistics) return add_exp(u, n, sum.shift(), t, u + n, &sum.others);
    exp_sums(u, n, sum.shift(), t, &sum.others, &weighted);
    if (sum.others != sum.others && !found_nan) find_nan(u, c, n);
  }

  // Whether no class is left, nor a NaN; `one`: a class is left out of the sums.
  bool is_gone(bool one) const {
    return sum.max == ExpSum<A>::kNone && sum.others == 0 && (!one || excluded == sum.max);
  }

  // log sum exp(u - max). `below` is the excluded class' u - max; not used if none is.
  double log_sum(bool excluded, double below) const {
    if (sum.max == ExpSum<A>::kNone) return std::numeric_limits<double>::quiet_NaN();  // no class left: as PyTorch
    double rest = sum.others - (excluded ? 0.0 : 1.0);
    // below < 0: the maximum is among the others, which are 1 at least
    if (excluded && below != 0) rest = (sum.others - 1.0) + static_cast<double>(exp_(static_cast<A>(below)));
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

// ---- the gradient

// lse = high + low in the accumulator: x - high is exact where it matters. Beyond kFar a double cannot hold lse to what
// p needs; there high is the maximum itself, and low is found again.
constexpr double kFar = 268435456.0;

struct SplitLse {
  float high, low;

  template <class T>
  SplitLse(const T* x, int64_t stride, int64_t classes, double lse)
      : high(static_cast<float>(lse)), low(static_cast<float>(lse - static_cast<double>(high))) {
    if (!(std::fabs(lse) >= kFar)) return;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += static_cast<double>(exp_(to_acc(x[c * stride]) - high));
    low = static_cast<float>(std::log(sum));
  }
};

// The target's gradient over the upstream one: p - 1, or minus the others' p where that would cancel.
inline double target_residual(double p, double others) { return p >= 0.5 ? -others : p - 1.0; }

// grad_u_j = nll (p_j mass - q_j) + p_j (rest - slope (log p_j + entropy)), of every class but a target's own.
template <class A>
struct Factors {
  A nll, mass, rest, slope, entropy;
};

inline float_vec own_gradient(float_vec p, const Factors<float>& k, NoShares, int64_t, int64_t) {
  return p * (k.nll * k.mass + k.rest);
}
template <class Q>
float_vec own_gradient(float_vec p, const Factors<float>& k, Q q, int64_t i, int64_t n) {
  return k.nll * (p * k.mass - q.at(i, n)) + p * k.rest;
}

// out[0, n) = the gradients of a chunk, in place where out is u; returns the sum of p but for the class `except`, if
// kSum. T is a type of 16 bit only without coefficients.
template <bool kSlope, bool kSum, class Q, class T>
double gradients_of(const T* u, T* out, int64_t n, float high, float low, const Factors<float> k, Q q, int64_t except) {
  float_vec s[2] = {};
  const auto one = [&](float_vec x, int_vec at, int64_t i, int64_t count, float_vec& sum) {
    const float_vec log_p = (x - high) - low, p = exp_vec(log_p);
    if constexpr (kSum) sum += at == static_cast<int32_t>(except) ? float_vec{} : p;
    float_vec grad = own_gradient(p, k, q, i, count);
    if constexpr (kSlope) grad -= p == 0.0f ? float_vec{} : p * (k.slope * (log_p + k.entropy));
    return grad;
  };
  int_vec at = first_of_pair<T>();
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth, at += static_cast<int32_t>(2 * kWidth)) {
    const VecPair v = load_pair(u + i);
    const float_vec first = one(v.first, at, i, kWidth, s[0]);
    store_pair(out + i, {first, one(v.second, at + kPairStep<T>, i + kWidth, kWidth, s[1])});
  }
  at = iota() + static_cast<int32_t>(i);
  for (; i < n; i += kWidth, at += static_cast<int32_t>(kWidth)) {
    const int64_t count = std::min(kWidth, n - i);
    const float_vec x = load_up_to(u + i, count, -std::numeric_limits<float>::infinity());
    store_up_to(out + i, count, one(x, at, i, count, s[0]));
  }
  return kSum ? static_cast<double>(reduce_add(s[0] + s[1])) : 0.0;
}

inline double gradients(const float* u, float* out, int64_t n, float high, float low, const Factors<float>& k,
                        const Shares<float>& q, bool sum, int64_t except) {
  except = except >= 0 && except < n ? except : -1;
  return with_shares(q, [&](auto shares) {
    if (k.slope != 0) return gradients_of<true, true>(u, out, n, high, low, k, shares, except);
    if (sum) return gradients_of<false, true>(u, out, n, high, low, k, shares, except);
    return gradients_of<false, false>(u, out, n, high, low, k, shares, except);
  });
}
inline double gradients(const double* u, double* out, int64_t n, double high, double low, const Factors<double>& k,
                        const Shares<double>& q, bool, int64_t except) {
  double s[kLanes] = {}, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double log_p = (u[i] - high) - low, p = exp_(log_p);
    s[i % kLanes] += i == except ? 0 : p;
    out[i] = q.any() ? k.nll * (p * k.mass - q.at(i)) + p * k.rest : p * (k.nll * k.mass + k.rest);
    if (k.slope != 0 && p != 0) out[i] -= p * (k.slope * (log_p + k.entropy));
  }
  for (double part : s) sum += part;
  return sum;
}

// The plain loss of a row where it lies, in place where grad is x.
template <class T>
void plain_gradient(const T* x, T* grad, int64_t classes, int64_t target, double lse, double scale) {
  const SplitLse at(x, 1, classes, lse);
  const double p_target = static_cast<double>(exp_((to_acc(x[target]) - at.high) - at.low));
  const Factors<float> k{0, 0, static_cast<float>(scale), 0, 0};
  double others = 0;
  if (p_target < 0.5)
    gradients_of<false, false>(x, grad, classes, at.high, at.low, k, NoShares(), -1);
  else
    for (int64_t c = 0; c < classes; c += kChunk)
      others += gradients_of<false, true>(x + c, grad + c, std::min(kChunk, classes - c), at.high, at.low, k,
                                          NoShares(), target >= c && target < c + kChunk ? target - c : -1);
  store(grad + target, static_cast<float>(target_residual(p_target, others) * scale));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

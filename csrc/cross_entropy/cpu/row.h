// One row of cross-entropy, whatever its strides; see also lanes.h and few_classes.h.
#pragma once
#include <algorithm>

#include "cross_entropy/kernels.h"
#include "simd/vec.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kRowTile = 256;       // rows whose logarithms are taken together
constexpr int64_t kClassesPerFold = 8;  // terms that are added in float before they are folded into double
constexpr int64_t kIgnored = -1;

// Per row: the maximum, the sum of exp(x_j - max) over the classes but the target, and x_target - max.
struct RowSums {
  double max[kRowTile], others[kRowTile], below[kRowTile];

  // lse and loss. kExact for float64, where float's exponential is not enough.
  template <bool kExact>
  void finish(int64_t n, double* lse, double* loss) const {
    if constexpr (kExact) {
      for (int64_t r = 0; r < n; ++r) {
        const double rest = below[r] == 0 ? others[r] : others[r] + std::expm1(below[r]);
        const double log_sum = std::log1p(rest);
        lse[r] = max[r] + log_sum, loss[r] = log_sum - below[r];
      }
    } else {
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) {
        // below < 0: the maximum is among the others, which are 1 at least
        const double target = static_cast<double>(exp_(static_cast<float>(below[r])));
        const double log_sum = log1p_(below[r] == 0 ? others[r] : (others[r] - 1.0) + target);
        lse[r] = max[r] + log_sum, loss[r] = log_sum - below[r];
      }
    }
  }
};

// ---- classes adjacent in memory: a register of classes at a time

template <class T>
float max_of_row(const T* x, int64_t n) {  // -inf for NaN: the sum finds those
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

// What is read next, while there is arithmetic to do: the maximum that comes first would wait for it.
template <class T>
inline void fetch(const T* next, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(next + i);
}

// sum of exp(x - shift), without the class `target` if kExcept; kFetch: fetches as many values from `next` meanwhile.
template <bool kExcept, bool kFetch = false, class T>
float sum_exp_of_row(const T* x, int64_t n, float shift, int64_t target, const T* next = nullptr) {
  float_vec s[4] = {};
  const auto term = [&](float_vec v, int_vec at) {
    const float_vec e = exp_vec(v - shift);
    return kExcept ? (at == static_cast<int32_t>(target) ? float_vec{} : e) : e;
  };
  int_vec at = first_of_pair<T>();
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    if constexpr (kFetch) fetch(next + i, 4 * kWidth);
    for (int64_t k = 0; k < 4; k += 2, at += static_cast<int32_t>(2 * kWidth)) {
      const VecPair v = load_pair(x + i + k * kWidth);
      s[k] += term(v.first, at), s[k + 1] += term(v.second, at + kPairStep<T>);
    }
  }
  at = iota() + static_cast<int32_t>(i);
  for (; i + kWidth <= n; i += kWidth, at += static_cast<int32_t>(kWidth)) s[0] += term(load_vec(x + i), at);
  if (i < n) s[1] += term(load_tail(x + i, n - i, -std::numeric_limits<float>::infinity()), at);
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// `next` is the row that is walked after this one.
template <class T>
void row_sums(const T* x, int64_t classes, int64_t target, const T* next, double* max_out, double* others_out,
              double* below) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float max = kNone;
  double others = 0;
  for (int64_t c = 0; c < classes; c += kChunk) {
    const int64_t n = std::min(kChunk, classes - c);
    const float chunk_max = max_of_row(x + c, n);
    if (chunk_max > max) {
      others *= max == kNone ? 0.0 : static_cast<double>(exp_(max - chunk_max));
      max = chunk_max;
    }
    const float shift = max == kNone ? 0.0f : max;
    const bool here = target >= c && target < c + n;
    const T* ahead = c + n < classes ? x + c + n : next;
    others += static_cast<double>(here ? sum_exp_of_row<true, true>(x + c, n, shift, target - c, ahead)
                                       : sum_exp_of_row<false, true>(x + c, n, shift, 0, ahead));
  }
  *max_out = max, *others_out = others;
  *below = static_cast<double>(to_acc(x[target])) - max;  // NaN for a row of only -inf and for +inf, as in PyTorch
}

// lse = high + low in the accumulator: x - high is exact where it matters. Where a double cannot hold lse to what p
// needs (always for float64, beyond kFar for the others: there high is the maximum itself), low is found again.
constexpr double kFar = 268435456.0;

template <class T>
struct SplitLse {
  using A = acc_t<T>;
  A high, low;

  SplitLse(const T* x, int64_t stride, int64_t classes, double lse)
      : high(static_cast<A>(lse)), low(static_cast<A>(lse - static_cast<double>(high))) {
    if (!std::is_same_v<T, double> && !(std::fabs(lse) >= kFar)) return;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += static_cast<double>(exp_(to_acc(x[c * stride]) - high));
    low = static_cast<A>(std::log(sum));
  }
};

// The target's gradient over the upstream one: p - 1, or minus the others' p where that would cancel.
inline double target_residual(double p, double others) { return p >= 0.5 ? -others : p - 1.0; }

// grad[0, n) = exp(x - lse) * scale; returns the sum of the exponentials but the target's, if kSum.
template <bool kSum, class T>
float grads_of_row(const T* x, T* grad, int64_t n, float high, float low, float scale, int64_t target) {
  float_vec s[2] = {};
  const auto step = [&](float_vec v, int_vec at, float_vec& sum) {
    const float_vec p = exp_vec((v - high) - low);
    if constexpr (kSum) sum += at == static_cast<int32_t>(target) ? float_vec{} : p;
    return p * scale;
  };
  int_vec at = first_of_pair<T>();
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth, at += static_cast<int32_t>(2 * kWidth)) {
    const VecPair v = load_pair(x + i);
    const float_vec first = step(v.first, at, s[0]);
    store_pair(grad + i, {first, step(v.second, at + kPairStep<T>, s[1])});
  }
  at = iota() + static_cast<int32_t>(i);
  for (; i < n; i += kWidth, at += static_cast<int32_t>(kWidth)) {
    const int64_t count = std::min(kWidth, n - i);
    store_up_to(grad + i, count, step(load_up_to(x + i, count, -std::numeric_limits<float>::infinity()), at, s[0]));
  }
  return kSum ? reduce_add(s[0] + s[1]) : 0.0f;
}

// In place where grad is x.
template <class T>
void row_backward(const T* x, T* grad, int64_t classes, int64_t target, double lse, double scale) {
  const auto [high, low] = SplitLse<T>(x, 1, classes, lse);
  const double p_target = static_cast<double>(exp_((to_acc(x[target]) - high) - low));
  const float factor = static_cast<float>(scale);
  double others = 0;
  if (p_target < 0.5)
    grads_of_row<false>(x, grad, classes, high, low, factor, 0);
  else
    for (int64_t c = 0; c < classes; c += kChunk)
      others += static_cast<double>(grads_of_row<true>(x + c, grad + c, std::min(kChunk, classes - c), high, low,
                                                       factor, target >= c && target < c + kChunk ? target - c : -1));
  store(grad + target, static_cast<float>(target_residual(p_target, others) * scale));
}

// ---- any strides, and float64

template <class T>
void strided_row_sums(const T* x, int64_t stride, int64_t classes, int64_t target, double* max_out, double* others_out,
                      double* below) {
  using A = acc_t<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  A buffer[kChunk], max = kNone;
  double others = 0;
  for (int64_t c = 0; c < classes; c += kChunk) {
    const int64_t n = std::min(kChunk, classes - c);
    const A* v = load_chunk(x + c * stride, stride, n, buffer);
    const A chunk_max = max_of(v, n);
    if (!(chunk_max <= max)) {  // larger, or NaN
      others *= max == kNone ? 0.0 : static_cast<double>(exp_(max - chunk_max));
      max = chunk_max;
    }
    if (max == kNone) continue;  // nothing but -inf so far
    const int64_t t = target - c;
    if (t >= 0 && t < n)
      others += static_cast<double>(sum_exp(v, t, max)) + static_cast<double>(sum_exp(v + t + 1, n - t - 1, max));
    else
      others += static_cast<double>(sum_exp(v, n, max));
  }
  *max_out = max, *others_out = others;
  *below = static_cast<double>(to_acc(x[target * stride])) - static_cast<double>(max);
}

template <class T>
void strided_row_backward(const T* x, int64_t stride, T* grad, int64_t grad_stride, int64_t classes, int64_t target,
                          double lse, double scale_d) {
  using A = acc_t<T>;
  const A scale = static_cast<A>(scale_d);
  const auto [high, low] = SplitLse<T>(x, stride, classes, lse);
  A in[kChunk], out[kChunk];
  double others = 0, p_target = 0;
  for (int64_t c = 0; c < classes; c += kChunk) {
    const int64_t n = std::min(kChunk, classes - c), t = target - c;
    const A* v = load_chunk(x + c * stride, stride, n, in);
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const A p = exp_((v[i] - high) - low);
      if (i == t)
        p_target = static_cast<double>(p);
      else
        lanes[i % kLanes] += p;
      out[i] = p * scale;
    }
    for (int64_t l = 0; l < kLanes; ++l) others += static_cast<double>(lanes[l]);
    store_chunk(grad + c * grad_stride, grad_stride, n, out);
  }
  store(grad + target * grad_stride, static_cast<A>(target_residual(p_target, others) * scale_d));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

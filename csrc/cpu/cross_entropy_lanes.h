// Adjacent rows of cross-entropy, a register of rows at a time, class after class: every line of memory is touched
// once.
//
// In (batch, classes, height, width) a class is a power of two away from the next as a rule, so that all classes of a
// row fall into the same few sets of the caches: what is read twice is kept in a buffer of its own.
#pragma once
#include <algorithm>

#include "cross_entropy_walks.h"
#include "lines.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kLaneClasses = 128;  // of a pass: 8 KiB at most stay in L1
constexpr int64_t kAhead = 4;          // registers of rows between a prefetch and its use
constexpr int kSecondLevel = 2;        // the cache that a prefetch reads into

// f(std::true_type) for a whole register of rows, which needs no masks, else f(std::false_type).
template <class F>
void with_whole(int64_t rows, const F& f) {
  if (rows == kWidth) return f(std::true_type());
  f(std::false_type());
}

template <bool kWhole, class T>
float_vec load_rows(const T* p, int64_t rows, float fill) {
  return kWhole ? load_vec(p) : load_tail(p, rows, fill);
}

// The maxima of a register of rows, and their sums of exp(x - max) but for one class each.
struct LaneSums {
  static constexpr float kNone = -std::numeric_limits<float>::infinity();
  float_vec max = splat(kNone);
  DoublePair others{};

  // Raises the maxima to `next`, which is no less; the sums' factor.
  DoublePair raise(float_vec next) {
    const float_vec shrink = max == kNone ? float_vec{} : exp_vec(max - next);
    const DoublePair factor = widen(shrink);
    others.low *= factor.low, others.high *= factor.high;
    max = next;
    return factor;
  }

  // `except` is the class to leave out, counted from the first of these, or none of them.
  void add(const float* u, int64_t classes, int_vec except) {
    const float_vec shift = max == kNone ? float_vec{} : max;
    for (int64_t begin = 0; begin < classes; begin += kClassesPerFold) {
      float_vec sum{};
      for (int64_t c = begin; c < std::min(begin + kClassesPerFold, classes); ++c) {
        const float_vec e = exp_vec(load_vec(u + c * kWidth) - shift);
        sum += except == static_cast<int32_t>(c) ? float_vec{} : e;
      }
      const DoublePair wide = widen(sum);
      others.low += wide.low, others.high += wide.high;
    }
  }
};

// Targets of n rows as a register; kIgnored behind them.
inline int_vec load_targets(const int64_t* target, int64_t n) {
  int32_t wanted[kWidth];
  for (int64_t l = 0; l < kWidth; ++l)
    wanted[l] = l < n ? static_cast<int32_t>(target[l]) : static_cast<int32_t>(kIgnored);
  return load_bits<int_vec>(wanted);
}

// Fills out.max, others and below of `rows` rows; those of ignored rows are of no use.
template <class T>
void lanes_sums(const T* x, int64_t stride, int64_t classes, int64_t rows, const int64_t* target, RowSums& out) {
  alignas(64) float u[kLaneClasses * kWidth], max[kRowTile];
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int64_t width = std::min(kWidth, rows - r);
    const int_vec wanted = load_targets(target + r, width);
    LaneSums sums;
    for (int64_t c = 0; c < classes; c += kLaneClasses) {
      const int64_t n = std::min(kLaneClasses, classes - c);
      const T* from = x + c * stride + r;
      float_vec best = sums.max;
      with_whole(width, [&](auto whole) {
        for (int64_t i = 0; i < n; ++i) {
          __builtin_prefetch(from + i * stride + kAhead * kWidth, 0, kSecondLevel);
          const float_vec v = load_rows<whole>(from + i * stride, width, LaneSums::kNone);
          store_vec(u + i * kWidth, v);
          best = max_vec(v, best);
        }
      });
      if (c == 0)
        sums.max = best;
      else
        sums.raise(best);
      sums.add(u, n, wanted - static_cast<int32_t>(c));
    }
    store_vec(max + r, sums.max);
    store_vec(out.others + r, sums.others.low), store_vec(out.others + r + kWidth / 2, sums.others.high);
  }
  for (int64_t r = 0; r < rows; ++r) {
    out.max[r] = max[r];
    out.below[r] = static_cast<double>(to_acc(x[std::max<int64_t>(target[r], 0) * stride + r])) - out.max[r];
  }
}

// What the backward needs of a register of rows: p = exp((x - high) - low).
struct LaneRows {
  float_vec high, low, p_target;

  // `x` is the first row's first class.
  template <class T>
  LaneRows(const T* x, int64_t stride, int64_t classes, int64_t rows, const int64_t* target, const double* lse) {
    float h[kWidth] = {}, l[kWidth] = {}, at[kWidth] = {};
    for (int64_t r = 0; r < rows; ++r) {
      if (target[r] == kIgnored) continue;
      const SplitLse<T> split(x + r, stride, classes, lse[r]);
      h[r] = split.high, l[r] = split.low, at[r] = to_acc(x[target[r] * stride + r]);
    }
    high = load_vec(h), low = load_vec(l);
    p_target = exp_vec((load_vec(at) - high) - low);
  }
};

// In place where grad is x.
template <class T>
void lanes_backward(const T* x, int64_t stride, T* grad, int64_t grad_stride, int64_t classes, int64_t rows,
                    const int64_t* target, const double* lse, const double* scale) {
  for (int64_t r = 0; r < rows; r += kWidth, x += kWidth, grad += kWidth) {
    const int64_t width = std::min(kWidth, rows - r);
    const LaneRows row(x, stride, classes, width, target + r, lse + r);
    const int_vec wanted = load_targets(target + r, width), ignored = wanted == static_cast<int32_t>(kIgnored);
    float factors[kWidth] = {}, p_target[kWidth];
    for (int64_t l = 0; l < width; ++l) factors[l] = static_cast<float>(scale[r + l]);
    const float_vec factor = load_vec(factors);
    double others[kWidth] = {};
    with_whole(width, [&](auto whole) {
      for (int64_t begin = 0; begin < classes; begin += kClassesPerFold) {
        float_vec sum{};
        for (int64_t c = begin; c < std::min(begin + kClassesPerFold, classes); ++c) {
          __builtin_prefetch(x + c * stride + kAhead * kWidth, 0, kSecondLevel);
          const float_vec v = load_rows<whole>(x + c * stride, width, 0.0f);
          const float_vec p = exp_vec((v - row.high) - row.low), g = p * factor;
          sum += wanted == static_cast<int32_t>(c) ? float_vec{} : p;
          // not 0 * p, which is NaN where an ignored row's logits are not finite
          store_up_to(grad + c * grad_stride, whole ? kWidth : width, ignored ? float_vec{} : g);
        }
        const DoublePair wide = widen(sum);
        alignas(64) double terms[kWidth];
        store_vec(terms, wide.low), store_vec(terms + kWidth / 2, wide.high);
        for (int64_t l = 0; l < kWidth; ++l) others[l] += terms[l];
      }
    });
    store_vec(p_target, row.p_target);
    for (int64_t l = 0; l < width; ++l)
      if (target[r + l] != kIgnored)
        store(grad + target[r + l] * grad_stride + l,
              static_cast<float>(target_residual(static_cast<double>(p_target[l]), others[l]) * scale[r + l]));
  }
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Adjacent rows of cross-entropy, a register of rows at a time, class after class: every line of memory is touched
// once.
//
// In (batch, classes, height, width) a class is a power of two away from the next as a rule, so that all classes of a
// row fall into the same few sets of the caches: what is read twice is kept in a buffer of its own.
#pragma once
#include <algorithm>

#include "cross_entropy/cpu/row.h"
#include "simd/line.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kLaneClasses = 128;  // of a pass: 8 KiB at most stay in L1
constexpr int64_t kAhead = 4;          // registers of rows between a prefetch and its use
constexpr int kBlock = 2;              // registers of rows that are walked together
constexpr int kSecondLevel = 2;        // the cache that a prefetch reads into

// f(registers, whole, row) over `rows` rows: kBlock registers at a time while there are as many, whose lines in memory
// are neighbours, then one by one; the last needs masks where it is not whole.
template <class F>
void each_block(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kBlock * kWidth <= rows; r += kBlock * kWidth)
    f(std::integral_constant<int, kBlock>(), std::true_type(), r);
  for (; r + kWidth <= rows; r += kWidth) f(std::integral_constant<int, 1>(), std::true_type(), r);
  if (r < rows) f(std::integral_constant<int, 1>(), std::false_type(), r);
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

// Of kRegisters registers of rows, the last of which holds `rows`.
template <int kRegisters, bool kWhole, class T>
void block_sums(const T* x, int64_t stride, int64_t classes, int64_t rows, const int64_t* target, LaneSums* sums) {
  alignas(64) float u[kRegisters][kLaneClasses * kWidth];
  for (int64_t c = 0; c < classes; c += kLaneClasses) {
    const int64_t n = std::min(kLaneClasses, classes - c);
    const T* from = x + c * stride;
    float_vec best[kRegisters];
    for (int k = 0; k < kRegisters; ++k) best[k] = sums[k].max;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < kRegisters; ++k) {
        const T* at = from + i * stride + k * kWidth;
        __builtin_prefetch(at + kAhead * kWidth, 0, kSecondLevel);
        const float_vec v = load_rows<kWhole>(at, rows, LaneSums::kNone);
        store_vec(u[k] + i * kWidth, v);
        best[k] = max_vec(v, best[k]);
      }
    for (int64_t k = 0; k < kRegisters; ++k) {
      if (c == 0)
        sums[k].max = best[k];
      else
        sums[k].raise(best[k]);
      sums[k].add(u[k], n, load_targets(target + k * kWidth, rows) - static_cast<int32_t>(c));
    }
  }
}

// Fills out.max, others and below of `rows` rows; those of ignored rows are of no use. Not inlined: what the compiler
// may inline into the caller is the walk of few classes.
template <class T>
__attribute__((noinline)) void lanes_sums(const T* x, int64_t stride, int64_t classes, int64_t rows,
                                          const int64_t* target, RowSums& out) {
  alignas(64) float max[kRowTile];
  each_block(rows, [&](auto registers, auto whole, int64_t r) {
    LaneSums sums[registers];
    block_sums<registers, whole>(x + r, stride, classes, whole ? kWidth : rows - r, target + r, sums);
    for (int64_t k = 0; k < registers; ++k, r += kWidth) {
      store_vec(max + r, sums[k].max);
      store_vec(out.others + r, sums[k].others.low), store_vec(out.others + r + kWidth / 2, sums[k].others.high);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    out.max[r] = max[r];
    out.below[r] = static_cast<double>(to_acc(x[std::max<int64_t>(target[r], 0) * stride + r])) - out.max[r];
  }
}

// What the backward needs of a register of rows: p = exp((x - high) - low).
struct LaneRows {
  float_vec high, low, p_target, factor;
  int_vec wanted;

  // `x` is the first row's first class.
  template <class T>
  LaneRows(const T* x, int64_t stride, int64_t classes, int64_t rows, const int64_t* target, const double* lse,
           const double* scale)
      : wanted(load_targets(target, rows)) {
    float h[kWidth] = {}, l[kWidth] = {}, at[kWidth] = {}, f[kWidth] = {};
    for (int64_t r = 0; r < rows; ++r) {
      f[r] = static_cast<float>(scale[r]);
      if (target[r] == kIgnored) continue;
      const SplitLse<T> split(x + r, stride, classes, lse[r]);
      h[r] = split.high, l[r] = split.low, at[r] = to_acc(x[target[r] * stride + r]);
    }
    high = load_vec(h), low = load_vec(l), factor = load_vec(f);
    p_target = exp_vec((load_vec(at) - high) - low);
  }
};

// Of kRegisters registers of rows, the last of which holds `rows`.
template <int kRegisters, bool kWhole, class T>
void block_backward(const T* x, int64_t stride, T* grad, int64_t grad_stride, int64_t classes, int64_t rows,
                    const LaneRows* row, double* others) {
  for (int64_t begin = 0; begin < classes; begin += kClassesPerFold) {
    float_vec sum[kRegisters] = {};
    for (int64_t c = begin; c < std::min(begin + kClassesPerFold, classes); ++c)
      for (int64_t k = 0; k < kRegisters; ++k) {
        const T* from = x + c * stride + k * kWidth;
        __builtin_prefetch(from + kAhead * kWidth, 0, kSecondLevel);
        const float_vec v = load_rows<kWhole>(from, rows, 0.0f);
        const float_vec p = exp_vec((v - row[k].high) - row[k].low), g = p * row[k].factor;
        sum[k] += row[k].wanted == static_cast<int32_t>(c) ? float_vec{} : p;
        // not 0 * p, which is NaN where an ignored row's logits are not finite
        store_up_to(grad + c * grad_stride + k * kWidth, kWhole ? kWidth : rows,
                    row[k].wanted == static_cast<int32_t>(kIgnored) ? float_vec{} : g);
      }
    for (int64_t k = 0; k < kRegisters; ++k) {
      const DoublePair wide = widen(sum[k]);
      alignas(64) double terms[kWidth];
      store_vec(terms, wide.low), store_vec(terms + kWidth / 2, wide.high);
      for (int64_t l = 0; l < kWidth; ++l) others[k * kWidth + l] += terms[l];
    }
  }
}

// In place where grad is x.
template <class T>
__attribute__((noinline)) void lanes_backward(const T* x, int64_t stride, T* grad, int64_t grad_stride, int64_t classes,
                                              int64_t rows, const int64_t* target, const double* lse,
                                              const double* scale) {
  each_block(rows, [&](auto registers, auto whole, int64_t begin) {
    const int64_t width = whole ? kWidth : rows - begin;
    const auto row_of = [&](int64_t k) {
      const int64_t r = begin + k * kWidth;
      return LaneRows(x + r, stride, classes, width, target + r, lse + r, scale + r);
    };
    const LaneRows row[kBlock] = {row_of(0), row_of(registers - 1)};
    double others[kBlock * kWidth] = {};
    block_backward<registers, whole>(x + begin, stride, grad + begin, grad_stride, classes, width, row, others);
    float p_target[kBlock * kWidth];
    for (int64_t k = 0; k < registers; ++k) store_vec(p_target + k * kWidth, row[k].p_target);
    for (int64_t l = 0; l < (registers - 1) * kWidth + width; ++l) {
      const int64_t r = begin + l;
      if (target[r] != kIgnored)
        store(grad + target[r] * grad_stride + r,
              static_cast<float>(target_residual(static_cast<double>(p_target[l]), others[l]) * scale[r]));
    }
  });
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// The plain loss of rows of few classes that are adjacent in memory: kWidth rows together, so that no register is half
// empty.
//
// For sums a row is a lane: registers of four rows' parts are transposed, a register for each class. Where there is but
// something to do to each logit, kWidth packed rows of C classes are exactly C registers, and permutes spread a row's
// value over its logits.
//
// What this buys over the options' loops, which take such rows as across_rows.h does: of (65536, 27) float32 on one
// AVX-512 core a forward of 1.1 ms instead of 8.5 and a backward of 2.0 instead of 9.8. What transposing buys over
// reducing each row under a mask, of (4096, 10) float32 on one core of Zen 4: the forward takes 0.82 of the time with
// AVX2 and 0.82 with AVX-512, the backward 0.84 and 0.95; of (4096, 64) 0.91, 0.97, 0.88 and 1.01.
#pragma once
#include <algorithm>

#include "cross_entropy/cpu/across_rows.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kPackedFloats = 1 << 11;  // Values of a step, whose 8 KiB stay in L1.

// Rows of a tensor, from one of them on.
template <class T>
struct RowsAt {
  T* data;
  const RowLayout& layout;
  int64_t row;
  bool packed;  // each begins in memory where the one before ends

  RowsAt(T* data, const RowLayout& l, int64_t row)
      : data(data),
        layout(l),
        row(row),
        packed((l.spatial == 1 || l.spatial_stride == l.classes) &&
               (l.batch == 1 || l.batch_stride == l.spatial * l.classes)) {}

  T* at(int64_t r) const { return data + (packed ? (row + r) * layout.classes : layout.offset(row + r)); }
};

// Packed rows in floats, `count` of them and what is missing to whole registers.
template <class T>
class PackedRows {
 public:
  // Of no use for more than kFewClasses.
  explicit PackedRows(int64_t classes) : classes_(classes) {
    if (classes > kFewClasses) return;
    int32_t* next = row_of_;
    for (int64_t r = 0; r < kWidth; ++r, next += classes) std::fill(next, next + classes, static_cast<int32_t>(r));
  }

  int64_t rows_of_step() const { return std::min(kRowTile, kPackedFloats / classes_ / kWidth * kWidth); }

  // The `count` rows from `begin` on.
  const float* load(const RowsAt<const T>& x, int64_t begin, int64_t count) {
    const int64_t n = count * classes_;
    if (is_direct(x.packed, count)) return reinterpret_cast<const float*>(x.at(begin));
    if (x.packed)
      copy(x.at(begin), n, values_);
    else
      for (int64_t r = 0; r < count; ++r) copy(x.at(begin + r), classes_, values_ + r * classes_);
    std::fill(values_ + n, values_ + (count + kWidth - 1) / kWidth * kWidth * classes_ + kWidth, 0.0f);
    return values_;
  }

  // The registers of rows [r, r + kWidth), r a multiple of kWidth: f(i, row) with the first float's index i from r on.
  template <class F>
  void each_register(const F& f) const {
    for (int64_t i = 0; i < classes_ * kWidth; i += kWidth) f(i, load_bits<int_vec>(row_of_ + i));
  }

 private:
  // Four classes of a row are loaded at once, which of fewer would be some of the next row's, or behind the last.
  bool is_direct(bool packed, int64_t count) const {
    return std::is_same_v<T, float> && packed && count % kWidth == 0 && classes_ >= 4;
  }

  static void copy(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store_vec(to + i, load_vec(from + i));
    for (; i < n; ++i) to[i] = to_acc(from[i]);
  }

  const int64_t classes_;
  alignas(64) int32_t row_of_[kFewClasses * kWidth];
  alignas(64) float values_[kPackedFloats + kWidth];
};

// f(c, v) with a register v of kWidth packed rows for each class c. Of fewer than four classes up to three values
// behind the last row are read.
template <class F>
inline FUSED_OPS_INLINE void each_class(const float* rows, int64_t classes, const F& f) {
  float_vec v[4];
  int64_t c = 0;
  for (; c + 4 <= classes; c += 4) {
    load_transposed(rows + c, classes, v);
    f(c, v[0]), f(c + 1, v[1]), f(c + 2, v[2]), f(c + 3, v[3]);
  }
  if (c == classes) return;
  const int64_t first = std::max<int64_t>(0, classes - 4);  // some of those before once more
  load_transposed(rows + first, classes, v);
  if (classes - c == 3) f(classes - 3, v[classes - 3 - first]);
  if (classes - c >= 2) f(classes - 2, v[classes - 2 - first]);
  f(classes - 1, v[classes - 1 - first]);
}

// Fills out.max, others and below of n <= kRowTile rows.
template <class T>
__attribute__((noinline)) void few_classes_sums(PackedRows<T>& rows, const RowsAt<const T>& x, int64_t n,
                                                const int64_t* target, RowSums& out) {
  constexpr int64_t kStep = kLineBytes / static_cast<int64_t>(sizeof(T)) / kWidth;  // registers of a line
  const int64_t classes = x.layout.classes;
  alignas(64) float u[kFewClasses * kWidth];
  for (int64_t begin = 0, m = 0; begin < n; begin += m) {
    m = std::min(rows.rows_of_step(), n - begin);
    const float* from = rows.load(x, begin, m);
    const T* next = x.at(begin) + m * classes;  // the next step's; behind the last row too, as it is but a hint
    for (int64_t r = 0; r < m; r += kWidth) {
      const int64_t at = begin + r;
      RegisterSums sums;
      each_class(from + r * classes, classes, [&](int64_t c, float_vec v) FUSED_OPS_INLINE {
        if (c % kStep == 0) prefetch(next + r * classes + c * kWidth);
        store_vec(u + c * kWidth, v);
        sums.max = max_vec(v, sums.max);
      });
      sums.add<true>(u, classes, load_targets(target + at, std::min(kWidth, m - r)));
      const DoublePair max = widen(sums.max), excepted = widen(sums.excepted);
      store_pair(out.max + at, max), store_pair(out.others + at, sums.others);
      store_pair(out.below + at, {excepted.low - max.low, excepted.high - max.high});
    }
  }
}

// others[r] = the sum of `count` packed rows of p, without each row's target; unset where the targets of kWidth rows
// all have less than 0.5, which target_residual() needs none for.
inline void sums_of_others(const float* p, int64_t classes, int64_t count, const int64_t* target, const float* p_target,
                           float* others) {
  for (int64_t r = 0; r < count; r += kWidth) {
    if (!positive_lanes(load_vec(p_target + r) - 0.49f)) continue;
    const int_vec wanted = load_targets(target + r, std::min(kWidth, count - r));
    int_vec at{};
    float_vec sum[2] = {};
    each_class(p + r * classes, classes, [&](int64_t c, float_vec v) FUSED_OPS_INLINE {
      sum[c & 1] += wanted == at ? float_vec{} : v;
      at += 1;
    });
    store_vec(others + r, sum[0] + sum[1]);
  }
}

template <class T>
void store_values(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kWidth) store_up_to(to + i, std::min(kWidth, n - i), load_vec(from + i));
}

// What a step of the backward needs of each row.
struct PackedLse {
  alignas(64) float high[kRowTile], low[kRowTile], factor[kRowTile], p_target[kRowTile], others[kRowTile];
  bool confident = false;  // some target's p is 0.5 or more

  PackedLse(const float* u, int64_t classes, int64_t n, const int64_t* target, const double* lse, const double* scale) {
    bool far = false;
    for (int64_t r = 0; r < n; ++r) p_target[r] = u[r * classes + std::max<int64_t>(target[r], 0)];
    for (int64_t r = n; r % kWidth; ++r) high[r] = low[r] = factor[r] = p_target[r] = 0;
#pragma omp simd reduction(| : far)
    for (int64_t r = 0; r < n; ++r) {
      high[r] = static_cast<float>(lse[r]), low[r] = static_cast<float>(lse[r] - static_cast<double>(high[r]));
      factor[r] = static_cast<float>(scale[r]);
      far |= std::fabs(lse[r]) >= kFar;
    }
    for (int64_t r = 0; far && r < n; ++r)
      if (target[r] != kIgnored) low[r] = SplitLse(u + r * classes, 1, classes, lse[r]).low;
    for (int64_t r = 0; r < n; r += kWidth) {
      const float_vec p = exp_vec((load_vec(p_target + r) - load_vec(high + r)) - load_vec(low + r));
      store_vec(p_target + r, p);
    }
    for (int64_t r = 0; r < n; ++r) confident |= p_target[r] >= 0.5f;
  }
};

// In place where grad is x.
template <class T>
void few_classes_gradient(PackedRows<T>& rows, const RowsAt<const T>& x, const RowsAt<T>& grad, int64_t n,
                          const int64_t* target_, const double* lse, const double* scale_) {
  const int64_t classes = x.layout.classes;
  alignas(64) float e[kPackedFloats + kWidth], out[kPackedFloats + kWidth];
  for (int64_t begin = 0, m = 0; begin < n; begin += m) {
    m = std::min(rows.rows_of_step(), n - begin);
    const int64_t* target = target_ + begin;
    const double* scale = scale_ + begin;
    const float* u = rows.load(x, begin, m);
    PackedLse row(u, classes, m, target, lse + begin, scale);
    const T* next = x.at(begin) + m * classes;
    T* whole = grad.packed && m % kWidth == 0 ? grad.at(begin) : nullptr;
    for (int64_t r = 0; r < m; r += kWidth) {
      const float_vec high = load_vec(row.high + r), low = load_vec(row.low + r), factor = load_vec(row.factor + r);
      rows.each_register([&](int64_t i, int_vec of) {
        const int64_t at = r * classes + i;
        prefetch(next + at);
        const float_vec p = exp_vec((load_vec(u + at) - permute(high, of)) - permute(low, of));
        if (row.confident) store_vec(e + at, p);
        if (whole)
          store_vec(whole + at, p * permute(factor, of));
        else
          store_vec(out + at, p * permute(factor, of));
      });
    }
    if (row.confident) sums_of_others(e, classes, m, target, row.p_target, row.others);
    for (int64_t r = 0; r < m; ++r) {
      T* to = grad.at(begin + r);
      if (!whole) store_values(out + r * classes, classes, to);
      if (target[r] == kIgnored)
        std::fill(to, to + classes, T{});
      else
        store(to + target[r],
              static_cast<float>(target_residual(static_cast<double>(row.p_target[r]), row.others[r]) * scale[r]));
    }
  }
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Cross-entropy's options where rows are adjacent in memory or have few classes: a register of rows at a time.
//
// The rows' classes lie beneath one another in a buffer, (classes, kWidth), in passes of kLaneClasses of them; lanes
// behind the last row hold zeros. A lane's sums come from the number of classes alone.
#pragma once
#include "cross_entropy/cpu/few_classes.h"
#include "cross_entropy/cpu/lanes.h"
#include "cross_entropy/cpu/sums.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

static_assert(kWidth <= kGroup);

inline bool fits_lanes(const CrossEntropyRows& a) {
  return a.dtype != DType::float64 && (a.layout.adjacent_rows() || is_small(a.layout));
}

// q of a register of rows, class by class.
struct ClassShares {
  const float* values;
  float_vec at(int64_t i) const { return splat(values[i]); }
};
struct LaneShares {
  const float* values;
  float_vec at(int64_t i) const { return load_vec(values + i * kWidth); }
};
struct EveryShare {
  float_vec value;
  float_vec at(int64_t) const { return value; }
};

// n classes of `rows` rows, beneath one another.
template <class T>
void load_lanes(const T* from, int64_t row_stride, int64_t class_stride, int64_t rows, int64_t n, float* to) {
  if constexpr (!std::is_same_v<T, double>) {
    if (row_stride == 1) {
      for (int64_t i = 0; i < n; ++i) store_vec(to + i * kWidth, load_up_to(from + i * class_stride, rows, 0.0f));
      return;
    }
  }
  if (rows < kWidth) std::fill(to, to + n * kWidth, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      to[i * kWidth + r] = static_cast<float>(to_acc(from[r * row_stride + i * class_stride]));
}

template <class T>
void store_lanes(const float* from, int64_t row_stride, int64_t class_stride, int64_t rows, int64_t n, T* to) {
  if (row_stride == 1) {
    for (int64_t i = 0; i < n; ++i) store_up_to(to + i * class_stride, rows, load_vec(from + i * kWidth));
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) store(to + r * row_stride + i * class_stride, from[i * kWidth + r]);
}

inline int64_t row_stride(const RowLayout& l) { return l.spatial == 1 ? l.batch_stride : l.spatial_stride; }

class LaneTile {
 public:
  explicit LaneTile(const CrossEntropyRows& a) : a_(a), transform_(a), share_of_all_(share_of_all<float>(a)) {}

  int64_t n = 0;  // classes of the pass
  alignas(64) float u[kLaneClasses * kWidth];
  alignas(64) int32_t allowed[kLaneClasses * kWidth];  // with a mask

  // Rows from `row` on that are walked together.
  int64_t rows_from(int64_t row, int64_t end) const {
    const int64_t left = std::min(kWidth, end - row);
    return a_.layout.spatial == 1 ? left : std::min(left, a_.layout.spatial - row % a_.layout.spatial);
  }

  void load(int64_t row, int64_t rows, int64_t c) {
    n = std::min(kLaneClasses, a_.layout.classes - c);
    row_ = row, rows_ = rows, class_ = c;
    read(a_.logits, a_.dtype, a_.layout, u);
    transform_.apply(u, n * kWidth);
    if (!a_.has_mask) return;
    for (int64_t i = 0; i < n * kWidth; ++i) allowed[i] = 0;
    const RowLayout& l = a_.mask.layout;
    const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row) + c * l.class_stride;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) allowed[i * kWidth + r] = m[r * row_stride(l) + i * l.class_stride];
    for (int64_t i = 0; i < n * kWidth; ++i) u[i] = allowed[i] ? u[i] : -std::numeric_limits<float>::infinity();
  }

  // How many classes each of the rows may have, if smoothing is spread over them.
  void count_allowed(int64_t row, int64_t rows) {
    if (!smooths_rows()) return;
    const RowLayout& l = a_.mask.layout;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row + r);
      int64_t count = 0;
      for (int64_t c = 0; c < l.classes; ++c) count += m[c * l.class_stride] != 0;
      spread_[r] = static_cast<float>(a_.label_smoothing / static_cast<double>(count));
    }
  }

  void load_coefficients() {
    if (!a_.has_dense && !smooths_rows()) return;
    const float* weight = static_cast<const float*>(a_.class_weight);
    const float* constant = static_cast<const float*>(a_.smoothing_weight);
    if (a_.has_dense) read(a_.dense.data, a_.dense.dtype, a_.dense.layout, q_);
    const float soft = static_cast<float>(1.0 - a_.label_smoothing);
    for (int64_t i = 0; i < n; ++i) {
      float* q = q_ + i * kWidth;
      const float factor = weight ? weight[class_ + i] : 1.0f;
      for (int64_t r = 0; a_.has_dense && r < kWidth; ++r) q[r] = (soft != 1 ? q[r] * soft : q[r]) * factor;
      if (a_.label_smoothing == 0) continue;
      for (int64_t r = 0; r < kWidth; ++r) {
        const float mine = constant ? constant[class_ + i] : allowed[i * kWidth + r] ? factor * spread_[r] : 0.0f;
        q[r] = a_.has_dense ? q[r] + mine : mine;
      }
    }
  }

  // f(q of the pass).
  template <class F>
  void with_shares(const F& f) const {
    if (a_.has_dense || smooths_rows()) return f(LaneShares{q_});
    if (share_of_all_ != 0) return f(EveryShare{splat(share_of_all_)});
    if (a_.smoothing_weight) return f(ClassShares{static_cast<const float*>(a_.smoothing_weight) + class_});
    f(NoShares{});
  }

  bool has_mask() const { return a_.has_mask; }

  // f(r, u) of each row's class index, where it is in the pass that begins at class c.
  template <class F>
  void each_target(const RowTarget* targets, int64_t c, const F& f) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t t = targets[r].one() ? targets[r].index(0) - c : -1;
      if (t >= 0 && t < n) f(r, u[t * kWidth + r]);
    }
  }

  // grad_u -> grad_x of the pass, into memory.
  void write(float* grad, void* to, const RowLayout& l) const {
    transform_.chain(u, grad, n * kWidth);
    for (int64_t i = 0; a_.has_mask && i < n * kWidth; ++i) grad[i] = allowed[i] ? grad[i] : 0.0f;
    const int64_t at = l.offset(row_) + class_ * l.class_stride;
    switch (a_.dtype) {
      case DType::float32:
        return store_lanes(grad, row_stride(l), l.class_stride, rows_, n, static_cast<float*>(to) + at);
      case DType::bfloat16:
        return store_lanes(grad, row_stride(l), l.class_stride, rows_, n, static_cast<bfloat16_t*>(to) + at);
      case DType::float16:
        return store_lanes(grad, row_stride(l), l.class_stride, rows_, n, static_cast<float16_t*>(to) + at);
      case DType::float64: return;  // does not come here
    }
  }

 private:
  bool smooths_rows() const { return a_.row_masks && a_.label_smoothing != 0; }

  void read(const void* data, DType dtype, const RowLayout& l, float* to) const {
    with_dtype(data, dtype, [&](const auto* from) {
      load_lanes(from + l.offset(row_) + class_ * l.class_stride, row_stride(l), l.class_stride, rows_, n, to);
    });
  }

  const CrossEntropyRows& a_;
  const Transform<float> transform_;
  const float share_of_all_;
  int64_t row_ = 0, rows_ = 0, class_ = 0;
  float spread_[kWidth] = {};
  alignas(64) float q_[kLaneClasses * kWidth];
};

// The class index of each row, or none of the classes.
inline int_vec lane_targets(const RowTarget* targets, int64_t rows) {
  int64_t index[kWidth];
  for (int64_t r = 0; r < rows; ++r) index[r] = targets[r].one() ? targets[r].index(0) : kIgnored;
  return load_targets(index, rows);
}

// RowState of a register of rows.
template <bool kEntropy>
class LaneState {
 public:
  // One pass, whose first class is c; `except` are the classes to leave out, counted from the first of all.
  void add(const LaneTile& tile, int64_t c, int_vec except) {
    float_vec best = sums_.max;
    for (int64_t i = 0; i < tile.n; ++i) {
      const float_vec v = load_vec(tile.u + i * kWidth);
      if constexpr (kEntropy) {
        const int_vec nan = v != v;
        prediction_ = ((v > best) | nan) & ~found_nan_ ? int_vec{} + static_cast<int32_t>(c + i) : prediction_;
        found_nan_ |= nan;
      }
      best = max_vec(v, best);
    }
    if (c == 0)
      sums_.max = best, base_ = best - best == 0.0f ? best : float_vec{};
    else
      raise(best);
    tile.with_shares([&](auto q) { add(tile, q, except - static_cast<int32_t>(c)); });
  }

  void store(RowState<float>* to, int64_t rows) const {
    float max[kWidth], base[kWidth];
    double others[kWidth], weighted[kWidth], mass[kWidth], dot[kWidth];
    store_vec(max, sums_.max), store_vec(base, base_);
    const auto put = [](double* p, const DoublePair& v) { store_vec(p, v.low), store_vec(p + kWidth / 2, v.high); };
    put(others, sums_.others), put(weighted, weighted_), put(mass, mass_), put(dot, dot_);
    for (int64_t r = 0; r < rows; ++r) {
      to[r].max = max[r], to[r].base = base[r], to[r].others = others[r], to[r].weighted = weighted[r];
      to[r].q = {mass[r], dot[r]};
      to[r].prediction = prediction_[r], to[r].found_nan = found_nan_[r] != 0;
    }
  }

 private:
  void raise(float_vec next) {
    const DoublePair before = widen(sums_.max), after = widen(next), others = sums_.others;
    const DoublePair factor = sums_.raise(next);
    if constexpr (kEntropy) {
      const auto moved = [](double_vec f, double_vec w, double_vec fall, double_vec sum) {
        return f == 0.0 ? double_vec{} : f * (w + fall * sum);
      };
      weighted_.low = moved(factor.low, weighted_.low, before.low - after.low, others.low);
      weighted_.high = moved(factor.high, weighted_.high, before.high - after.high, others.high);
    }
  }

  template <class Q>
  void add(const LaneTile& tile, Q q, int_vec except) {
    const float_vec shift = sums_.max == LaneSums::kNone ? float_vec{} : sums_.max;
    for (int64_t begin = 0; begin < tile.n; begin += kClassesPerFold) {
      float_vec weighted{}, dot{};
      for (int64_t i = begin; i < std::min(begin + kClassesPerFold, tile.n); ++i) {
        const float_vec u = load_vec(tile.u + i * kWidth), v = u - shift;
        float_vec e = exp_vec(v);
        e = except == static_cast<int32_t>(i) ? float_vec{} : e;
        add_to(sums_.others, e);  // in float, each term beside the maximum's 1 would cost lse half a digit
        if constexpr (kEntropy) weighted += e == 0.0f ? float_vec{} : e * v;
        if constexpr (!std::is_same_v<Q, NoShares>) {
          const float_vec share = q.at(i), product = share * (base_ - u);
          add_to(mass_, share);
          if (tile.has_mask())
            dot += ((load_bits<int_vec>(tile.allowed + i * kWidth) != 0) | (share != 0.0f)) ? product : float_vec{};
          else
            dot += product;
        }
      }
      if constexpr (kEntropy) add_to(weighted_, weighted);
      if constexpr (!std::is_same_v<Q, NoShares>) add_to(dot_, dot);
    }
  }

  LaneSums sums_;
  float_vec base_{};
  DoublePair weighted_{}, mass_{}, dot_{};
  int_vec prediction_{}, found_nan_{};
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

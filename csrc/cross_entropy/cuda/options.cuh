// What all kernels of cross-entropy's options share: which kernels a call takes, how long rows are cut, a row's target,
// its logits as u, its share of smoothing.
#pragma once
#include "cross_entropy/cuda/options_kernels.h"
#include "cross_entropy/cuda/rows.cuh"

namespace fused_ops {
namespace cuda {

// What the classes of a call need. All but `general` are for float accumulators, without mask and statistics, and have
// kernels of their own; one kernel for every option does the rest.
enum class Kind {
  plain,   // neither: class weights of the indices alone, z_loss
  bent,    // a scale or a softcap
  smooth,  // the same q for each class
  dense,   // q of a factor per class, of the logits' dtype: a probability, or a class weight and smoothing
  wide,    // the same in float beside 16-bit logits
  general
};
inline Kind kind_of(const CrossEntropyRows& a) {
  const bool moved = a.logit_scale != 1.0 || a.softcap != 0.0, smooth = a.label_smoothing != 0.0;
  if (a.dtype == DType::float64 || a.has_mask || a.statistics) return Kind::general;
  if (!a.has_dense && !smooth) return moved ? Kind::bent : Kind::plain;
  if (moved || (a.class_weight && a.has_dense)) return Kind::general;
  if (!a.has_dense && !a.class_weight) return Kind::smooth;
  if (a.has_dense && !a.dense.layout.adjacent_classes() && a.layout.adjacent_classes()) return Kind::general;
  const DType factors = a.has_dense ? a.dense.dtype : DType::float32;
  return factors == a.dtype ? Kind::dense : factors == DType::float32 ? Kind::wide : Kind::general;
}

// Classes of a long row that one block takes, by the row's length alone.
constexpr int64_t kSegmentClasses = 32768;
inline int64_t option_segments(const RowLayout& l) {
  return l.adjacent_classes() && l.classes > kSegmentClasses ? ceil_div(l.classes, kSegmentClasses) : 1;
}

// The item-th of all rows' segments: the classes [begin, end) of a row.
struct Segment {
  int64_t row, begin, end;
};
__device__ inline Segment segment_of(const RowLayout& l, int64_t item, int64_t segments) {
  const int64_t row = item / segments, begin = (item - row * segments) * kSegmentClasses;
  return {row, begin, begin + kSegmentClasses < l.classes ? begin + kSegmentClasses : l.classes};
}

inline int64_t blocks_for(int64_t items) { return items < kMaxBlocks ? items : kMaxBlocks; }
// Shares of the smoothing, one for all rows or one a row, that scratch begins with.
inline int64_t shares_of(const CrossEntropyRows& a) {
  if (!a.has_mask || a.label_smoothing == 0) return 0;
  return a.row_masks ? a.layout.rows() : 1;
}

// A row's target: indices that count or not, or a distribution over all classes.
struct OptionTarget {
  int64_t first, step;  // of its indices
  int64_t target;       // of the one index
  bool one, ignored, bad;
};
__device__ inline int64_t index_of(const CrossEntropyRows& a, const OptionTarget& t, int64_t k) {
  return target_at(a.indices, t.first + k * t.step);
}
__device__ inline OptionTarget option_target(const CrossEntropyRows& a, int64_t row) {
  OptionTarget t{0, 1, -1, false, !a.has_dense, false};
  if (a.has_dense) return t;
  if (!a.sparse) {  // one index
    const RowTarget one = row_target(a.indices, row, a.layout.classes);
    return {row, 1, one.counts ? one.target : -1, one.counts, !one.counts && !one.bad, one.bad};
  }
  t.step = a.index_spatial;
  t.first = row / t.step * t.step * a.per_row + row % t.step;
  for (int64_t k = 0; k < a.per_row; ++k) {
    const int64_t target = index_of(a, t, k);
    if (target == a.indices.ignore_index) continue;
    t.ignored = false;
    t.bad |= target < 0 || target >= a.layout.classes;
  }
  t.target = -1;
  return t;
}

template <class T>
__device__ inline double weight_of(const CrossEntropyRows& a, int64_t c) {
  return a.class_weight ? static_cast<double>(static_cast<const acc_t<T>*>(a.class_weight)[c]) : 1.0;
}
__device__ inline bool is_allowed(const CrossEntropyRows& a, int64_t row, int64_t c) {
  if (!a.has_mask) return true;
  return static_cast<const uint8_t*>(a.mask.data)[row_offset(a.mask.layout, row) + c * a.mask.layout.class_stride] != 0;
}

// A logit's place on the way to u: scaled, and without the factor softcap where there is one. Kept, since the slope
// needs it as it is. In float the scale and the division are one factor.
struct Bend {
  float scale, factor, cap;
  bool capped;
  __device__ explicit Bend(const CrossEntropyRows& a)
      : scale(static_cast<float>(a.logit_scale)),
        factor(static_cast<float>(a.softcap == 0.0 ? a.logit_scale : a.logit_scale / a.softcap)),
        cap(a.softcap == 0.0 ? 1.0f : static_cast<float>(a.softcap)),
        capped(a.softcap != 0.0) {}
  __device__ float bent(float x) const { return capped ? tanhf(x * factor) : x * factor; }
  __device__ float u_of(float t) const { return t * cap; }
  __device__ float slope(float t) const { return capped ? scale * (1.0f - t * t) : scale; }  // du/dx
};
__device__ inline float bent(const CrossEntropyRows& a, float x) { return Bend(a).bent(x); }
__device__ inline double bent(const CrossEntropyRows& a, double x) {
  x *= a.logit_scale;
  return a.softcap == 0.0 ? x : tanh(x / a.softcap);
}
template <class A>
__device__ inline A u_of(const CrossEntropyRows& a, A t) {
  return a.softcap == 0.0 ? t : static_cast<A>(a.softcap) * t;
}
template <class A>
__device__ inline A slope_of(const CrossEntropyRows& a, A t) {
  const A scale = static_cast<A>(a.logit_scale);
  return a.softcap == 0.0 ? scale : scale * (A(1) - t * t);
}
template <class T>
__device__ inline acc_t<T> bent_at(const CrossEntropyRows& a, int64_t row, int64_t c) {
  if (!is_allowed(a, row, c)) return -kInfinity<acc_t<T>>;
  return bent(a, to_acc(static_cast<const T*>(a.logits)[row_offset(a.layout, row) + c * a.layout.class_stride]));
}

// What label smoothing gives each allowed class of a row, before its weight.
template <class A>
__device__ inline A smoothing_share(const CrossEntropyRows& a, const double* shares, int64_t row) {
  if (a.label_smoothing == 0.0) return A(0);
  if (!a.has_mask) return static_cast<A>(a.label_smoothing / static_cast<double>(a.layout.classes));
  return static_cast<A>(shares[a.row_masks ? row : 0]);
}
__device__ inline bool has_coefficients(const CrossEntropyRows& a) { return a.has_dense || a.label_smoothing != 0.0; }

}  // namespace cuda
}  // namespace fused_ops

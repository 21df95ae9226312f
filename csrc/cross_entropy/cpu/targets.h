// Targets of cross-entropy's rows: class indices of any integer dtype, one or several a row.
#pragma once
#include "cross_entropy/rows_kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

inline int64_t target_at(const Targets& t, int64_t row) {
  switch (t.type) {
    case TargetType::int64: return static_cast<const int64_t*>(t.data)[row];
    case TargetType::int32: return static_cast<const int32_t*>(t.data)[row];
    case TargetType::int16: return static_cast<const int16_t*>(t.data)[row];
    case TargetType::int8: return static_cast<const int8_t*>(t.data)[row];
    case TargetType::uint8: return static_cast<const uint8_t*>(t.data)[row];
  }
  return -1;
}

// The targets of rows [begin, begin + n).
inline void read_targets(const Targets& t, int64_t begin, int64_t n, int64_t* to) {
  const auto read = [&](const auto* from) {
    for (int64_t r = 0; r < n; ++r) to[r] = from[begin + r];
  };
  switch (t.type) {
    case TargetType::int64: return read(static_cast<const int64_t*>(t.data));
    case TargetType::int32: return read(static_cast<const int32_t*>(t.data));
    case TargetType::int16: return read(static_cast<const int16_t*>(t.data));
    case TargetType::int8: return read(static_cast<const int8_t*>(t.data));
    case TargetType::uint8: return read(static_cast<const uint8_t*>(t.data));
  }
}

// One row's target: its indices, or none where it is a distribution over all classes.
class RowTarget {
 public:
  RowTarget() = default;
  RowTarget(const CrossEntropyRows& a, int64_t row) : a_(&a), all_ignored_(!a.has_dense) {
    if (a.has_dense) return;
    step_ = a.index_spatial;
    first_ = row / step_ * step_ * a.per_row + row % step_;
    for (int64_t k = 0; k < a.per_row; ++k) {
      const int64_t t = index(k);
      if (t == a.indices.ignore_index) continue;
      all_ignored_ = false;
      bad_ |= t < 0 || t >= a.layout.classes;
    }
  }

  bool has_indices() const { return !a_->has_dense; }
  int64_t per_row() const { return has_indices() ? a_->per_row : 0; }
  bool one() const { return has_indices() && !a_->sparse && !all_ignored_; }  // a class index that counts
  bool all_ignored() const { return all_ignored_; }
  bool bad() const { return bad_; }
  int64_t index(int64_t k) const { return target_at(a_->indices, first_ + k * step_); }
  bool ignored(int64_t k) const { return index(k) == a_->indices.ignore_index; }
  double probability(int64_t k) const { return a_->sparse ? a_->sparse[first_ + k * step_] : 1.0; }

 private:
  const CrossEntropyRows* a_ = nullptr;
  int64_t first_ = 0, step_ = 1;
  bool all_ignored_ = false, bad_ = false;
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Class indices with nothing but class weights: the walks of index.cpp do, with a factor per row.
#pragma once
#include "cross_entropy/cpu/tile.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

inline bool is_index_alone(const CrossEntropyRows& a) {
  return !a.has_dense && !a.sparse && !a.has_mask && a.label_smoothing == 0 && a.logit_scale == 1 && a.softcap == 0 &&
         !a.statistics;
}

inline double weight_of_row(const CrossEntropyRows& a, int64_t row) {
  const int64_t t = target_at(a.indices, row);
  if (t == a.indices.ignore_index) return 0;
  return weight_of(a, t);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// The contract of the kernel between linear cross-entropy's matrix products.
#pragma once
#include <cstdint>

#include "cross_entropy_rows.h"
#include "isa.h"

namespace fused_ops {

// A chunk of logits: the rows' results, and, with row_scale, the logits overwritten with the gradient of
// sum_r row_scale_r (nll_r + z_loss lse_r^2).
struct LinearCrossEntropyChunk {
  CrossEntropyRowsForward forward;
  CrossEntropyRowsBackward backward;  // grad_nll is row_scale; grad_lse is `grad_lse` with a z_loss
  const double* row_scale;            // (rows,) or null: the logits stay
  double* grad_lse;                   // (rows,) scratch, or null without z_loss
  double z_loss;
};

// Returns the first row with a target that is neither a class nor ignore_index, or -1.
FUSED_OPS_PER_ISA(int64_t linear_cross_entropy_chunk(const LinearCrossEntropyChunk& args, int64_t begin, int64_t end))

}  // namespace fused_ops

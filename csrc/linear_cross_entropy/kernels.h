// The contract of the kernels between linear cross-entropy's matrix products.
#pragma once
#include <cstdint>

#include "core/isa.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {

// A chunk of logits: the rows' results, and, with row_scale, the logits overwritten with the gradient of
// sum_r row_scale_r (nll_r + z_loss lse_r^2).
struct LinearCrossEntropyChunk {
  CrossEntropyForward forward;
  CrossEntropyBackward backward;  // grad_nll is row_scale; grad_lse is `grad_lse` with a z_loss
  const double* row_scale;        // (rows,) or null: the logits stay
  double* grad_lse;               // (rows,) scratch, or null without z_loss
  double z_loss;
};

// Returns the first row with a target that is neither a class nor ignore_index, or -1.
FUSED_OPS_PER_ISA(int64_t linear_cross_entropy_chunk(const LinearCrossEntropyChunk& args, int64_t begin, int64_t end))

// The logits of some classes, one class after the other, each with all rows: a tile of the transposed logits.
struct LinearCrossEntropyTile {
  void* logits;  // (classes, rows), `stride` between classes
  DType dtype;   // not float64
  int64_t classes, rows, stride;
  int64_t first_class;    // of the tile among all
  const int64_t* target;  // (rows,) among all classes
};

// What is known of the rows after the tiles that were seen; before the first, -inf, 0 and anything.
struct LinearCrossEntropySums {
  float* max;           // (rows,)
  double* others;       // (rows,) sum of exp(logit - max) over all classes but the target
  float* target_logit;  // (rows,)
};

// The logits become exp(logit - max) factor, and target_grad at the target.
struct LinearCrossEntropyGrads {
  const float* max;          // (rows,)
  const float* factor;       // (rows,)
  const float* target_grad;  // (rows,)
};

// Of rows [begin, end): every row's sums are its own, whatever the split.
FUSED_OPS_PER_ISA(void linear_cross_entropy_tile_sums(const LinearCrossEntropyTile& tile,
                                                      const LinearCrossEntropySums& sums, int64_t begin, int64_t end))
// Of the tile's classes [begin, end).
FUSED_OPS_PER_ISA(void linear_cross_entropy_tile_grads(const LinearCrossEntropyTile& tile,
                                                       const LinearCrossEntropyGrads& grads, int64_t begin,
                                                       int64_t end))

// sum[begin, end) += part[begin, end), where part is of 16 bit: what a product of matrices adds to a gradient.
FUSED_OPS_PER_ISA(void linear_cross_entropy_add(float* sum, const void* part, DType dtype, int64_t begin, int64_t end))

}  // namespace fused_ops

// The contract of the kernels behind cross-entropy's options: row by row, any target, nothing reduced.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {

// A tensor of (rows, classes) that is read beside the logits.
struct RowSource {
  const void* data;
  DType dtype;  // of probabilities; a mask is bytes
  RowLayout layout;
};

// Of one row: u = softcap(logit_scale * x), -inf where masked; the target distribution t, on `per_row` class indices or
// on all classes; q_j = class_weight_j * ((1 - label_smoothing) t_j + label_smoothing / allowed).
struct CrossEntropyRows {
  DType dtype;
  const void* logits;
  RowLayout layout;
  Targets indices;        // (batch, per_row, spatial) dense; not there with has_dense
  int64_t per_row;        // 1 for class indices
  int64_t index_spatial;  // of the indices' dimensions: layout.spatial, or 1 where layout walks a matrix's columns
  const double* sparse;   // probabilities of the indices, of their shape; null: each counts 1
  bool has_dense, has_mask;
  RowSource dense;               // class probabilities
  RowSource mask;                // not zero: the class is allowed
  bool row_masks;                // a mask of its own for each row
  const void* class_weight;      // (classes,) accumulators, or null
  const void* smoothing_weight;  // (classes,) accumulators: class_weight * label_smoothing / allowed; null: no
                                 // smoothing or row_masks
  double label_smoothing, logit_scale, softcap;  // softcap 0: none
  bool statistics;  // all rows count for lse; entropy, prediction, target_log_probability are wanted
};

struct CrossEntropyRowsForward {
  CrossEntropyRows rows;
  double* nll;                     // (rows,) sum_j q_j (lse - u_j); 0 where ignored
  double* lse;                     // (rows,)
  double* mass;                    // (rows,) sum_j q_j
  double* target_weight;           // (rows,) class weight of the target; 1 for class probabilities, 0 where ignored
  double* entropy;                 // (rows,) of softmax(u), or null without statistics, like the next two
  int64_t* prediction;             // (rows,) argmax
  double* target_log_probability;  // (rows,) u_target - lse; 0 where ignored and for other targets than indices
};

struct CrossEntropyRowsBackward {
  CrossEntropyRows rows;
  const double* grad_nll;  // (rows,) each, null: zeros
  const double* grad_lse;
  const double* grad_entropy;
  const double* grad_target_log_probability;
  const double* lse;  // (rows,) as the forward gave them
  const double* mass;
  const double* entropy;  // null without grad_entropy
  void* grad_logits;
  RowLayout grad_layout;
};

// Each returns the first row with a target that is neither a class nor ignore_index, or -1.
FUSED_OPS_PER_ISA(int64_t cross_entropy_rows_forward(const CrossEntropyRowsForward& args, int64_t begin, int64_t end))
FUSED_OPS_PER_ISA(int64_t cross_entropy_rows_backward(const CrossEntropyRowsBackward& args, int64_t begin, int64_t end))

}  // namespace fused_ops

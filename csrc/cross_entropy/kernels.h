// The contract of the cross-entropy kernels: raw pointers and plain structs, nothing of torch.
//
// One description of the rows for both directions and every option; class indices alone, the plain loss, are what its
// defaults say.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace fused_ops {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// Row r = (b, s) of a (batch, classes, spatial) tensor; a (rows, classes) matrix has spatial == 1.
struct RowLayout {
  int64_t batch, spatial, classes;
  int64_t batch_stride, spatial_stride, class_stride;  // in elements
  int64_t rows() const { return batch * spatial; }
  bool adjacent_classes() const { return class_stride == 1; }
  bool adjacent_rows() const { return class_stride != 1 && spatial_stride == 1; }
  int64_t offset(int64_t row) const { return (row / spatial) * batch_stride + (row % spatial) * spatial_stride; }
};

struct Targets {
  const void* data;  // (rows,) contiguous
  TargetType type;
  int64_t ignore_index;
};

// A tensor of (rows, classes) that is read beside the logits.
struct RowSource {
  const void* data;
  DType dtype;  // of probabilities; a mask is bytes
  RowLayout layout;
};

// Of one row: u = softcap(logit_scale * x), -inf where masked; the target distribution t, on `per_row` class indices or
// on all classes; q_j = class_weight_j * ((1 - label_smoothing) t_j + label_smoothing / allowed).
struct CrossEntropyRows {
  DType dtype{};
  const void* logits = nullptr;
  RowLayout layout{};
  Targets indices{};          // (batch, per_row, spatial) dense; not there with has_dense
  int64_t per_row = 1;        // 1 for class indices
  int64_t index_spatial = 1;  // of the indices' dimensions: layout.spatial, or 1 where layout has a matrix transposed
  const double* sparse = nullptr;  // probabilities of the indices, of their shape; null: each counts 1
  bool has_dense = false, has_mask = false;
  RowSource dense{};                       // class probabilities
  RowSource mask{};                        // not zero: the class is allowed
  bool row_masks = false;                  // a mask of its own for each row
  const void* class_weight = nullptr;      // (classes,) accumulators, or null
  const void* smoothing_weight = nullptr;  // (classes,) accumulators: class_weight * label_smoothing / allowed; null:
                                           // no smoothing or row_masks
  double label_smoothing = 0, logit_scale = 1, softcap = 0;  // softcap 0: none
  bool statistics = false;  // all rows count for lse; entropy, prediction, target_log_probability are wanted
  // The layout has some of the classes, from first_class on; indices may be any class.
  bool shard = false;
  int64_t first_class = 0;
  const double* allowed = nullptr;  // (rows,) what smoothing is spread over, with shard and row_masks
};

// What a shard has of each row, (rows,) each; see shards_reference.py.
struct CrossEntropyPart {
  double* high = nullptr;  // max_j u_j, -inf where no class is left
  double* low = nullptr;   // lse - high
  double* nll = nullptr;   // sum_j q_j (lse - u_j), without a class index' own
  double* mass = nullptr;
  double* target_weight = nullptr;
  double* target_log_probability = nullptr;  // 1 where the target is elsewhere
  double* bad_target = nullptr;              // a target that is not in [0, all_classes), else NaN
  double* entropy = nullptr;                 // with statistics, like the next
  double* prediction = nullptr;              // the class among all; +inf where none is here
  int64_t all_classes = 0;
};

// Everything but lse may be null.
struct CrossEntropyForward {
  CrossEntropyRows rows;
  double* nll;                     // (rows,) sum_j q_j (lse - u_j); 0 where ignored
  double* lse;                     // (rows,)
  double* mass;                    // (rows,) sum_j q_j, without a class index' own
  double* target_weight;           // (rows,) class weight of the target; 1 for class probabilities, 0 where ignored
  double* entropy;                 // (rows,) of softmax(u); with statistics, like the next two
  int64_t* prediction;             // (rows,) argmax
  double* target_log_probability;  // (rows,) u_target - lse; 0 where ignored and for other targets than indices
  void* loss;                      // (rows,) nll rounded to the logits' dtype
  CrossEntropyPart part{};         // with shard, in place of all of them
};

struct CrossEntropyBackward {
  CrossEntropyRows rows;
  const double* grad_nll;  // (rows,) each, null: zeros
  const double* grad_lse;
  const double* grad_entropy;
  const double* grad_target_log_probability;
  const double* lse;      // (rows,) as the forward gave them
  const double* mass;     // null: zeros
  const double* entropy;  // null without grad_entropy
  void* grad_logits;      // in place where it is the logits
  RowLayout grad_layout;
  const void* grad_loss;  // (rows,) of the logits' dtype, in place of grad_nll, or null
  double scale;           // grad_nll of every row, where neither is there
  // With shard, (rows,) of all shards together, in place of lse: high + low.
  const double *high = nullptr, *low = nullptr, *target_weight = nullptr, *target_log_probability = nullptr;
};

struct CrossEntropyWithGradient {
  const float* logits;  // of adjacent classes, as the gradient
  RowLayout layout;
  Targets targets;
  bool mean;  // else the sum
  float* grad_logits;
  RowLayout grad_layout;
};

// Of some rows.
struct BlockResult {
  double loss_sum;  // over the rows that are not ignored
  int64_t count;    // such rows
  int64_t bad_row;  // the first with a target that is neither a class nor ignore_index, else -1
};

// Of rows [begin, end). With a bad row, the results of the rows are of no use.
FUSED_OPS_PER_ISA(BlockResult cross_entropy_forward(const CrossEntropyForward& args, int64_t begin, int64_t end))
// Returns the first bad row, or -1.
FUSED_OPS_PER_ISA(int64_t cross_entropy_backward(const CrossEntropyBackward& args, int64_t begin, int64_t end))
// The first row whose target is neither a class nor ignore_index, or -1.
FUSED_OPS_PER_ISA(int64_t cross_entropy_bad_target(const Targets& targets, int64_t begin, int64_t end, int64_t classes))
// All rows; nothing is written if a target is bad.
FUSED_OPS_PER_ISA(BlockResult cross_entropy_with_gradient(const CrossEntropyWithGradient& args))

}  // namespace fused_ops

// The contract of the cross-entropy kernels: raw pointers and plain structs, nothing of torch.
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

struct BlockResult {
  double loss_sum;  // over the rows of the block that are not ignored
  int64_t count;    // such rows
  int64_t bad_row;  // first row of the block whose target is outside [0, classes) and not ignored, else -1
};

struct CrossEntropyForward {
  DType dtype;
  const void* logits;
  RowLayout layout;
  Targets targets;
  int64_t block_rows;
  double* lse;          // (rows,)
  void* loss;           // (rows,) of dtype, or null when the loss is reduced
  double* row_loss;     // (rows,) the loss before it is rounded, or null
  BlockResult* blocks;  // (ceil(rows / block_rows),)
};

struct CrossEntropyBackward {
  DType dtype;
  const void* logits;
  RowLayout layout;
  Targets targets;
  const double* lse;        // (rows,)
  const void* grad_loss;    // (rows,) of dtype, or null: every row's is `scale`
  const double* row_scale;  // takes the place of grad_loss, or null; its first entry is row row_scale_begin's
  int64_t row_scale_begin;
  double scale;
  void* grad_logits;
  RowLayout grad_layout;
};

struct CrossEntropyWithGradient {
  const float* logits;  // of adjacent classes, as the gradient
  RowLayout layout;
  Targets targets;
  bool mean;  // else the sum
  float* grad_logits;
  RowLayout grad_layout;
};

FUSED_OPS_PER_ISA(void cross_entropy_forward(const CrossEntropyForward& args, int64_t begin_block, int64_t end_block))
// Any rows, outside the blocks.
FUSED_OPS_PER_ISA(BlockResult cross_entropy_forward_rows(const CrossEntropyForward& args, int64_t begin_row,
                                                         int64_t end_row))
// The first row whose target is neither a class nor ignore_index, or -1.
FUSED_OPS_PER_ISA(int64_t cross_entropy_bad_target(const Targets& targets, int64_t begin, int64_t end, int64_t classes))
FUSED_OPS_PER_ISA(int64_t cross_entropy_backward(const CrossEntropyBackward& args, int64_t begin_row, int64_t end_row))
// All rows, as one block; nothing is written if a target is bad.
FUSED_OPS_PER_ISA(BlockResult cross_entropy_with_gradient(const CrossEntropyWithGradient& args))

}  // namespace fused_ops

// The contract of the kernels of batch norm that keeps its output instead of its input: see docs/batch_norm.md.
#pragma once
#include "batch_norm/kernels.h"

namespace fused_ops {

// How far the rounding of the output may be amplified in the rebuilt (x - mean) * invstd, in units of itself.
constexpr double kMaxAmplification = 4;
constexpr int64_t kInplaceRows = 64;  // rows of an item of the columns walk

// Which of a channel's x are kept beside the output.
enum class Keep : int8_t { none, all, below };

// The output is walked in the order of memory; item = a plane, or kInplaceRows rows of columns. The kept x of an item
// are at [begins[item], begins[item + 1]) of `kept`, in that order. Accumulators (float, or double for double) have one
// value a channel (planes) or a column.
struct BatchNormInplace {
  DType dtype;
  ChannelLayout layout;
  Activation activation;  // none, leaky_relu or elu
  double slope;
  bool frozen;
  const void *input, *output, *grad_output;  // as layout; input is read by batch_norm_keep_* alone
  const Keep* keep;                          // none: no x; all: every x; below: the x of outputs not >= limit
  const void* limit;
  const void* bias;                   // activation^-1(output) - bias is a multiple of x - mean: "deviation" below
  const void *mean, *factor, *shift;  // it is (x - mean) * factor + shift where x was kept
  const void *scale, *grad_mean, *grad_slope;  // grad_input = scale * (h - grad_mean - deviation * grad_slope)
  int64_t* begins;
  void* kept;
  void* grad_input;
  Partial* partials;  // sums of h and h * deviation; planes: one an item; columns: (items, columns)

  int64_t items() const {
    return layout.columns() ? (layout.batch + kInplaceRows - 1) / kInplaceRows : layout.planes();
  }
};

FUSED_OPS_PER_ISA(void batch_norm_keep_count(const BatchNormInplace& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_keep_copy(const BatchNormInplace& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_inplace_sums(const BatchNormInplace& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_inplace_grads(const BatchNormInplace& args, int64_t begin_item, int64_t end_item))

}  // namespace fused_ops

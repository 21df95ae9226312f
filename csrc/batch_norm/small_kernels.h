// The contract of batch norm's kernels for small inputs: everything of one op in one call, raw pointers and plain
// structs.
//
// Of a matrix that is one item of the walk over columns (at most 256 columns, and few rows) the two passes take less
// than a microsecond, and so would the arithmetic between them, a division and a square root for each channel, if it
// were not vectorised.
#pragma once
#include "batch_norm/kernels.h"

namespace fused_ops {

constexpr int64_t kSmallChannels = 256;

inline bool is_small(const ChannelLayout& l) {
  return l.columns() && !l.valid && l.channels > 0 && l.channels <= kSmallChannels && l.items() == 1;
}

// What batch_norm_small_forward needs beside the kernels' own arguments, which it completes: of those, the layout, the
// activation and the pointers to what is as large as the input are the caller's.
struct SmallForward {
  bool training;
  double momentum, eps;
  int64_t correction;
  DType params;                                            // dtype of the next six
  const void *weight, *bias, *running_mean, *running_var;  // (channels,), each may be null
  void *new_mean, *new_var;                                // (channels,), null without an update
  double *mean, *invstd;                                   // (channels,), written
};

struct SmallBackward {
  int64_t correction;
  bool reduces;                   // sums are wanted
  DType params;                   // dtype of the next four
  const void *weight, *bias;      // (channels,), each may be null
  void *grad_weight, *grad_bias;  // (channels,), null if not wanted
  const double *mean, *invstd;    // (channels,)
};

FUSED_OPS_PER_ISA(void batch_norm_small_forward(const BatchNormForward& args, const SmallForward& small))
FUSED_OPS_PER_ISA(void batch_norm_small_backward(const BatchNormBackward& args, const SmallBackward& small))

}  // namespace fused_ops

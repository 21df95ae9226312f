// The contract of the batch-norm kernels: raw pointers and plain structs, nothing of torch.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fused_ops {

// (batch, channels, spatial) with spatial values of one channel side by side, or, with spatial == 1, a channels-last
// matrix of `batch` rows of `channels` values. Both are dense.
struct ChannelLayout {
  int64_t batch, channels, spatial;
  bool channels_last() const { return spatial == 1; }
  int64_t count() const { return batch * spatial; }  // values per channel
};

// The input is cut into items that depend on its shape alone, so that results do not depend on the thread count.
// channels_last: item = kRowsPerItem rows of all channels. Otherwise: item = one channel.
constexpr int64_t kRowsPerItem = 64;
inline int64_t item_count(const ChannelLayout& l) {
  return l.channels_last() ? (l.batch + kRowsPerItem - 1) / kRowsPerItem : l.channels;
}

// Two sums per channel and item; items of one channel are merged in order by *_merge.
struct Partial {
  double a, b;  // moments: mean, M2.  gradients: sum of grad, sum of grad * (x - mean)
};

struct BatchNormMoments {
  DType dtype;
  const void* input;
  ChannelLayout layout;
  Partial* partials;  // channels_last: (items, channels), else (channels,)
};

struct BatchNormApply {
  DType dtype;
  const void* input;
  ChannelLayout layout;
  const double* mean;   // (channels,)
  const double* scale;  // (channels,) invstd * weight
  const double* bias;   // (channels,)
  void* output;
};

struct BatchNormGradSums {
  DType dtype;
  const void* input;
  const void* grad_output;
  ChannelLayout layout;
  const double* mean;  // (channels,)
  Partial* partials;   // as in BatchNormMoments
};

// grad_input = scale * (grad_output - grad_mean - (x - mean) * slope)
struct BatchNormGradInput {
  DType dtype;
  const void* input;
  const void* grad_output;
  ChannelLayout layout;
  const double* mean;       // (channels,)
  const double* scale;      // (channels,) invstd * weight
  const double* grad_mean;  // (channels,) mean of grad_output; 0 in evaluation mode
  const double* slope;      // (channels,) invstd^2 * sum(grad * (x - mean)) / (n - correction); 0 in evaluation mode
  void* grad_input;
};

FUSED_OPS_PER_ISA(void batch_norm_moments(const BatchNormMoments& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_apply(const BatchNormApply& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_grad_sums(const BatchNormGradSums& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_grad_input(const BatchNormGradInput& args, int64_t begin_item, int64_t end_item))

}  // namespace fused_ops

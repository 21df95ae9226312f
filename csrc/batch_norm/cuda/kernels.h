// The contract of the batch-norm kernels on a GPU: device pointers, a stream, nothing of torch. Nothing here waits for
// the device or allocates; the caller brings the scratch memory. The result is a cudaError_t as a number.
#pragma once
#include "batch_norm/kernels.h"

namespace fused_ops {
namespace cuda {

// (batch, channels, spatial) dense, or with the channels last: (batch, spatial, channels).
struct BatchNormShape {
  int64_t batch, channels, spatial;
  bool channels_last;
  const uint8_t* valid;                               // (batch, spatial), nonzero where a position counts, or null
  int64_t values() const { return batch * spatial; }  // of one channel
};

// Which of a batch's ghost batches a call is, whose calls follow each other on one stream. Running statistics, and the
// gradients of the parameters, are doubles in `carried` from one to the next and rounded by the last.
struct GhostBatch {
  bool first = true, last = true;
  double* carried = nullptr;  // (2, channels); null where there is one ghost batch
};

// Parameters and running statistics: (channels,) of one dtype, or null.
struct Parameters {
  DType dtype;
  const void *weight, *bias, *running_mean, *running_var;
};

struct BatchNormForwardCall {
  DType dtype;
  BatchNormShape shape;
  Parameters parameters;
  Activation activation;
  double slope;
  bool training;
  double momentum, eps;
  int64_t correction;
  const void *input, *residual;  // as shape; residual may be null
  void* output;                  // as shape
  uint8_t* mask;                 // a bit a value, or null: csrc/batch_norm/kernels.h
  double *mean, *invstd;         // (channels,), written; read where they are given
  bool given;
  double* moments;           // or null: written, (2 + 2 * channels,), instead of all the others, in training
  void *new_mean, *new_var;  // (channels,) of the parameters' dtype, or null
  GhostBatch ghost;
  bool packed;      // one launch, without scratch memory, where batch_norm_is_packed
  double* scratch;  // batch_norm_scratch(...) doubles
};

// What a backward from the forward's output reads besides: the results of batch_norm_keep_..., or null where nothing
// was stored. `origin` is where the call's values begin among those of the whole tensor, `values` of them, in memory.
struct KeptOutput {
  bool from_output;
  double smallest;  // the smallest normal number of the dtype
  const int64_t* offsets;
  const void* stored;
  int64_t values, origin, count;  // count: of `stored`
};

struct BatchNormBackwardCall {
  DType dtype;
  BatchNormShape shape;
  Parameters parameters;
  Activation activation;
  double slope;
  bool training;
  int64_t correction;
  const void *grad_output, *input, *residual;  // as shape; residual may be null
  const uint8_t* mask;                         // the forward's, or null
  const double *mean, *invstd;                 // (channels,)
  void *grad_input, *grad_residual;            // as shape, or null
  DType grad_dtype;                            // of the two below
  void *grad_weight, *grad_bias;               // (channels,), or both null
  double* sums;         // or null: written, (2, channels), of h and h * (x - mean), instead of all the others
  KeptOutput kept;      // if from_output, `input` is the output, without residual, mask, sums and means
  const double* means;  // or null: read, (2, channels), grad_mean and grad_slope, instead of summing up for them
  GhostBatch ghost;
  bool packed;
  double* scratch;
};

int64_t batch_norm_scratch(const BatchNormShape& shape);
// Whether a call may be packed: of a small tensor, whose channels' values each fit a block. If so, also with a smaller
// batch.
bool batch_norm_is_packed(const BatchNormShape& shape, DType dtype, bool writes_mask);
int32_t batch_norm_packed_forward(const BatchNormForwardCall& call, void* stream);
int32_t batch_norm_packed_backward(const BatchNormBackwardCall& call, void* stream);
int32_t batch_norm_forward(const BatchNormForwardCall& call, void* stream);
int32_t batch_norm_backward(const BatchNormBackwardCall& call, void* stream);

// Which x are stored beside a forward's output.
struct KeepCall {
  DType dtype;
  BatchNormShape shape;
  Parameters parameters;  // weight and bias
  Activation activation;
  double slope, smallest;
  const void *output, *input;  // as shape
  int64_t* offsets;            // batch_norm_keep_offsets(...)
  int64_t* count;              // of the values that are stored
  void* stored;                // as many
  double* scratch;             // batch_norm_keep_scratch(...)
};

int64_t batch_norm_keep_offsets(const BatchNormShape& shape);
int64_t batch_norm_keep_scratch(const BatchNormShape& shape);
int32_t batch_norm_keep_mark(const KeepCall& call, void* stream);  // writes count, and what the copy reads
int32_t batch_norm_keep_copy(const KeepCall& call, void* stream);  // writes offsets and stored
bool is_capturing(void* stream);                                   // in a graph

}  // namespace cuda
}  // namespace fused_ops

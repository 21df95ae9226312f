// The contract of the kernels between linear cross-entropy's matrix products on a GPU.
#pragma once
#include "cross_entropy/cuda/options_kernels.h"
#include "linear_cross_entropy/kernels.h"

namespace fused_ops {
namespace cuda {

// As LinearCrossEntropyChunk, whose grad_lse the device computes itself.
struct LinearChunkCall {
  LinearCrossEntropyChunk args;
  double* scratch;  // linear_chunk_scratch(...) doubles
};

// grad *= scale.
struct RescaleCall {
  DType dtype;
  void* grad;  // (count,), dense
  int64_t count;
  DType scale_dtype;
  const void* scale;  // one value
};

int32_t linear_cross_entropy_rescale(const RescaleCall& call, void* stream);

int64_t linear_chunk_scratch(const LinearCrossEntropyChunk& args);
int32_t linear_cross_entropy_chunk(const LinearChunkCall& call, void* stream);

}  // namespace cuda
}  // namespace fused_ops

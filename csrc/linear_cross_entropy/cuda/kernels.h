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

// A row's target where it does not count: it has no gradient, and its sums are of no use.
constexpr int64_t kNoTarget = INT64_MIN;

// As the CPU's linear_cross_entropy_tile_sums; every class begins at a multiple of 16 bytes.
struct TileSumsCall {
  LinearCrossEntropyTile tile;
  int64_t classes;  // of all tiles
  LinearCrossEntropySums sums;
  double* scratch;  // tile_sums_scratch(...) doubles
};

// As the CPU's linear_cross_entropy_tile_grads, in place.
struct TileGradsCall {
  LinearCrossEntropyTile tile;
  LinearCrossEntropyGrads grads;
};

int64_t tile_sums_scratch(const LinearCrossEntropyTile& tile);
int32_t linear_cross_entropy_tile_sums(const TileSumsCall& call, void* stream);
int32_t linear_cross_entropy_tile_grads(const TileGradsCall& call, void* stream);

int32_t linear_cross_entropy_rescale(const RescaleCall& call, void* stream);

int64_t linear_chunk_scratch(const LinearCrossEntropyChunk& args);
int32_t linear_cross_entropy_chunk(const LinearChunkCall& call, void* stream);

}  // namespace cuda
}  // namespace fused_ops

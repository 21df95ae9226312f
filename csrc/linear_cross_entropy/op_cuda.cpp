// Checks, allocation and launch of the ops beside linear cross-entropy's matrix products on a GPU. Nothing here waits
// for the device; a target out of range is an error of the device.
#include "cross_entropy/arguments_cuda.h"
#include "linear_cross_entropy/arguments.h"
#include "linear_cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {
namespace {

RowResults chunk(const ChunkArguments& a) {
  const Tensor& logits = a.tensors.input;
  const RowsOnGpu p(a.tensors, a.options);
  if (a.row_scale) check_in_place(logits);
  const OnDevice device(logits);
  RowOutputs outputs(p);
  MaybeTensor scale;
  LinearChunkCall call{};
  call.args.forward = outputs.forward(p);
  call.args.row_scale = row_values("row_scale", a.row_scale, p, scale);
  call.args.z_loss = a.z_loss;
  if (call.args.row_scale) {
    CrossEntropyBackward& b = call.args.backward;
    b.rows = p.rows, b.grad_nll = call.args.row_scale;
    b.lse = call.args.forward.lse, b.mass = call.args.forward.mass;
    b.grad_logits = logits.mutable_data_ptr(), b.grad_layout = p.rows.layout;
  }
  const Tensor memory = scratch(logits, linear_chunk_scratch(call.args));
  call.scratch = doubles_of(memory);
  check_launch(kOp, linear_cross_entropy_chunk(call, device.stream()));
  return outputs.all();
}

// A tile whose classes can be read 16 bytes at a time.
LinearCrossEntropyTile aligned_tile(const TileArguments& a) {
  const LinearCrossEntropyTile tile = a.tile();
  const bool even = tile.classes <= 1 || tile.stride * element_size(tile.dtype) % 16 == 0;
  if (!even || reinterpret_cast<uintptr_t>(tile.logits) % 16 != 0)
    raise(kHead, ": every class of logits must begin at a multiple of 16 bytes, got a stride of ", tile.stride);
  return tile;
}

void tile_sums(const TileSums& a) {
  TileSumsCall call{aligned_tile(a), a.classes, a.sums(), nullptr};
  const OnDevice device(a.logits);
  const Tensor memory = scratch(a.logits, tile_sums_scratch(call.tile));
  call.scratch = doubles_of(memory);
  check_launch(kHead, linear_cross_entropy_tile_sums(call, device.stream()));
}

void tile_grads(const TileGrads& a) {
  const TileGradsCall call{aligned_tile(a), a.grads()};
  check_launch(kHead, linear_cross_entropy_tile_grads(call, OnDevice(a.logits).stream()));
}

void rescale(const RescaleArguments& a) {
  constexpr const char* kHere = "linear_cross_entropy_rescale_";
  check_numel(kHere, "scale", a.scale, 1);
  if (!a.grad.is_contiguous()) raise(kHere, ": grad must be contiguous");
  const RescaleCall call{float_dtype(kHere, "grad", a.grad), a.grad.mutable_data_ptr(), a.grad.numel(),
                         float_dtype(kHere, "scale", a.scale), a.scale.const_data_ptr()};
  check_launch(kHere, linear_cross_entropy_rescale(call, OnDevice(a.grad).stream()));
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  fused_ops::implement_struct<&fused_ops::cuda::chunk>(m, "linear_cross_entropy_chunk_");
  fused_ops::implement_struct<&fused_ops::cuda::tile_sums>(m, "linear_cross_entropy_tile_sums_");
  fused_ops::implement_struct<&fused_ops::cuda::tile_grads>(m, "linear_cross_entropy_tile_grads_");
  fused_ops::implement_struct<&fused_ops::cuda::rescale>(m, "linear_cross_entropy_rescale_");
}

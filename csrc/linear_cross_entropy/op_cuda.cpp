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
  fused_ops::implement_struct<&fused_ops::cuda::rescale>(m, "linear_cross_entropy_rescale_");
}

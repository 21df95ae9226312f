// Checks, allocation and launch of the op between linear cross-entropy's matrix products on a GPU; the schema is in
// op.cpp. Nothing here waits for the device; a target out of range is an error of the device.
#include "core/border.h"
#include "cross_entropy/rows_arguments_cuda.h"
#include "linear_cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {
namespace {

RowResults chunk(Tensor logits, const MaybeTensor& indices, const MaybeTensor& probabilities, const MaybeTensor& weight,
                 const MaybeTensor& class_mask, const MaybeTensor& row_scale, double z_loss, int64_t ignore_index,
                 double label_smoothing, double logit_scale, double softcap, bool statistics) {
  const RowsOnGpu p(logits, indices, probabilities, weight, class_mask, ignore_index, label_smoothing, logit_scale,
                    softcap, statistics);
  if (row_scale) check_in_place(logits);
  const OnDevice device(logits);
  RowOutputs outputs(p);
  MaybeTensor scale;
  LinearChunkCall call{};
  call.args.forward = outputs.forward(p);
  call.args.row_scale = row_values("row_scale", row_scale, p, scale);
  call.args.z_loss = z_loss;
  if (call.args.row_scale) {
    CrossEntropyRowsBackward& b = call.args.backward;
    b.rows = p.rows, b.grad_nll = call.args.row_scale;
    b.lse = call.args.forward.lse, b.mass = call.args.forward.mass;
    b.grad_logits = logits.mutable_data_ptr(), b.grad_layout = p.rows.layout;
  }
  const Tensor memory = scratch(logits, linear_chunk_scratch(call.args));
  call.scratch = doubles_of(memory);
  check_launch(kOp, linear_cross_entropy_chunk(call, device.stream()));
  return outputs.all();
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  fused_ops::implement<&fused_ops::cuda::chunk>(m, "linear_cross_entropy_chunk_");
}

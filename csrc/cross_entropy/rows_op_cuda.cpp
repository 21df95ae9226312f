// Checks, allocation and launch of the raw ops behind cross-entropy's options on a GPU; the schemas are in
// rows_op.cpp. Nothing here waits for the device; a target out of range is an error of the device.
#include "core/border.h"
#include "cross_entropy/rows_arguments_cuda.h"

namespace fused_ops {
namespace cuda {
namespace {

RowResults rows_forward(const Tensor& input, const MaybeTensor& indices, const MaybeTensor& probabilities,
                        const MaybeTensor& weight, const MaybeTensor& class_mask, int64_t ignore_index,
                        double label_smoothing, double logit_scale, double softcap, bool statistics) {
  const RowsOnGpu p(input, indices, probabilities, weight, class_mask, ignore_index, label_smoothing, logit_scale,
                    softcap, statistics);
  const OnDevice device(input);
  RowOutputs outputs(p);
  const Tensor memory = scratch(input, rows_forward_scratch(p.rows));
  check_launch(kOp, cross_entropy_rows_forward({outputs.forward(p), doubles_of(memory)}, device.stream()));
  return outputs.all();
}

Tensor rows_backward(bool in_place, const MaybeTensor& grad_nll, const MaybeTensor& grad_lse,
                     const MaybeTensor& grad_entropy, const MaybeTensor& grad_log_probability, const Tensor& input,
                     const MaybeTensor& indices, const MaybeTensor& probabilities, const MaybeTensor& weight,
                     const MaybeTensor& class_mask, const Tensor& lse, const Tensor& mass, const MaybeTensor& entropy,
                     int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                     bool statistics) {
  const RowsOnGpu p(input, indices, probabilities, weight, class_mask, ignore_index, label_smoothing, logit_scale,
                    softcap, statistics);
  if (in_place) check_in_place(input);
  if (grad_entropy && !entropy) raise(kOp, ": expected entropy beside grad_entropy, got none");
  const OnDevice device(input);
  MaybeTensor owners[7];
  auto values = [&, next = 0](const char* name, const MaybeTensor& t, int64_t* step = nullptr) mutable {
    return row_values(name, t, p, owners[next++], step);
  };
  RowsBackwardCall call{};
  int64_t* steps = call.steps;
  call.args.rows = p.rows;
  call.args.grad_nll = values("grad_nll", grad_nll, steps);
  call.args.grad_lse = values("grad_lse", grad_lse, steps + 1);
  call.args.grad_entropy = values("grad_entropy", grad_entropy, steps + 2);
  call.args.grad_target_log_probability = values("grad_target_log_probability", grad_log_probability, steps + 3);
  call.args.lse = values("lse", lse);
  call.args.mass = values("mass", mass);
  if (grad_entropy) call.args.entropy = values("entropy", entropy);
  Tensor grad = in_place ? p.input : empty_output(p.input);
  call.args.grad_logits = grad.mutable_data_ptr();
  call.args.grad_layout = layout_beside(grad, p.input);
  const Tensor memory = scratch(input, rows_backward_scratch(p.rows));
  call.scratch = doubles_of(memory);
  check_launch(kOp, cross_entropy_rows_backward(call, device.stream()));
  return grad;
}

Tensor rows_backward_fresh(const MaybeTensor& grad_nll, const MaybeTensor& grad_lse, const MaybeTensor& grad_entropy,
                           const MaybeTensor& grad_log_probability, const Tensor& input, const MaybeTensor& indices,
                           const MaybeTensor& probabilities, const MaybeTensor& weight, const MaybeTensor& class_mask,
                           const Tensor& lse, const Tensor& mass, const MaybeTensor& entropy, int64_t ignore_index,
                           double label_smoothing, double logit_scale, double softcap, bool statistics) {
  return rows_backward(false, grad_nll, grad_lse, grad_entropy, grad_log_probability, input, indices, probabilities,
                       weight, class_mask, lse, mass, entropy, ignore_index, label_smoothing, logit_scale, softcap,
                       statistics);
}

void rows_backward_in_place(const MaybeTensor& grad_nll, const MaybeTensor& grad_lse, const MaybeTensor& grad_entropy,
                            const MaybeTensor& grad_log_probability, Tensor input, const MaybeTensor& indices,
                            const MaybeTensor& probabilities, const MaybeTensor& weight, const MaybeTensor& class_mask,
                            const Tensor& lse, const Tensor& mass, const MaybeTensor& entropy, int64_t ignore_index,
                            double label_smoothing, double logit_scale, double softcap, bool statistics) {
  rows_backward(true, grad_nll, grad_lse, grad_entropy, grad_log_probability, input, indices, probabilities, weight,
                class_mask, lse, mass, entropy, ignore_index, label_smoothing, logit_scale, softcap, statistics);
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  fused_ops::implement<&fused_ops::cuda::rows_forward>(m, "cross_entropy_rows_forward");
  fused_ops::implement<&fused_ops::cuda::rows_backward_fresh>(m, "cross_entropy_rows_backward");
  fused_ops::implement<&fused_ops::cuda::rows_backward_in_place>(m, "cross_entropy_rows_backward_");
}

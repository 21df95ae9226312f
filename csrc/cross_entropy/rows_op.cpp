// Schema, checks, allocation and dispatch of the raw ops behind cross-entropy's options.
#include <tuple>

#include "core/border.h"
#include "cross_entropy/rows_arguments.h"
#include "cross_entropy/rows_kernels.h"

namespace fused_ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_rows_forward(
    const Tensor& input, const MaybeTensor& indices, const MaybeTensor& probabilities, const MaybeTensor& weight,
    const MaybeTensor& class_mask, int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
    bool statistics) {
  const Prepared p(input, indices, probabilities, weight, class_mask, ignore_index, label_smoothing, logit_scale,
                   softcap, statistics);
  RowOutputs outputs(p);
  const CrossEntropyRowsForward args = outputs.forward(p);
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_rows_forward);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
  return outputs.all();
}

Tensor rows_backward(bool in_place, const MaybeTensor& grad_nll, const MaybeTensor& grad_lse,
                     const MaybeTensor& grad_entropy, const MaybeTensor& grad_log_probability, const Tensor& input,
                     const MaybeTensor& indices, const MaybeTensor& probabilities, const MaybeTensor& weight,
                     const MaybeTensor& class_mask, const Tensor& lse, const Tensor& mass, const MaybeTensor& entropy,
                     int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                     bool statistics) {
  if (in_place) check_in_place(input);
  const Prepared p(input, indices, probabilities, weight, class_mask, ignore_index, label_smoothing, logit_scale,
                   softcap, statistics);
  if (grad_entropy && !entropy) raise(kOp, ": expected entropy beside grad_entropy, got none");
  MaybeTensor owners[7];
  CrossEntropyRowsBackward args{};
  args.rows = p.rows;
  args.grad_nll = row_values("grad_nll", grad_nll, p, owners[0]);
  args.grad_lse = row_values("grad_lse", grad_lse, p, owners[1]);
  args.grad_entropy = row_values("grad_entropy", grad_entropy, p, owners[2]);
  args.grad_target_log_probability = row_values("grad_target_log_probability", grad_log_probability, p, owners[3]);
  args.lse = row_values("lse", lse, p, owners[4]);
  args.mass = row_values("mass", mass, p, owners[5]);
  if (grad_entropy) args.entropy = row_values("entropy", entropy, p, owners[6]);
  Tensor grad = in_place ? p.input : grad_like(p.input);
  args.grad_logits = grad.mutable_data_ptr();
  args.grad_layout = layout_beside(grad, p.input);
  if (in_place && p.indices) {  // nothing may be written if any target is bad
    const int64_t bad = FUSED_OPS_SELECT(cross_entropy_bad_target)(p.rows.indices, 0, p.indices->numel(), p.classes());
    if (bad >= 0) raise_bad_target(*p.indices, bad);
  }
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_rows_backward);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
  return grad;
}

Tensor cross_entropy_rows_backward(const MaybeTensor& grad_nll, const MaybeTensor& grad_lse,
                                   const MaybeTensor& grad_entropy, const MaybeTensor& grad_log_probability,
                                   const Tensor& input, const MaybeTensor& indices, const MaybeTensor& probabilities,
                                   const MaybeTensor& weight, const MaybeTensor& class_mask, const Tensor& lse,
                                   const Tensor& mass, const MaybeTensor& entropy, int64_t ignore_index,
                                   double label_smoothing, double logit_scale, double softcap, bool statistics) {
  return rows_backward(false, grad_nll, grad_lse, grad_entropy, grad_log_probability, input, indices, probabilities,
                       weight, class_mask, lse, mass, entropy, ignore_index, label_smoothing, logit_scale, softcap,
                       statistics);
}

void cross_entropy_rows_backward_(const MaybeTensor& grad_nll, const MaybeTensor& grad_lse,
                                  const MaybeTensor& grad_entropy, const MaybeTensor& grad_log_probability,
                                  Tensor input, const MaybeTensor& indices, const MaybeTensor& probabilities,
                                  const MaybeTensor& weight, const MaybeTensor& class_mask, const Tensor& lse,
                                  const Tensor& mass, const MaybeTensor& entropy, int64_t ignore_index,
                                  double label_smoothing, double logit_scale, double softcap, bool statistics) {
  rows_backward(true, grad_nll, grad_lse, grad_entropy, grad_log_probability, input, indices, probabilities, weight,
                class_mask, lse, mass, entropy, ignore_index, label_smoothing, logit_scale, softcap, statistics);
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  fused_ops::define(
      m,
      "cross_entropy_rows_forward(Tensor input, Tensor? indices, Tensor? probabilities, Tensor? weight, "
      "Tensor? class_mask, int ignore_index, float label_smoothing, float logit_scale, float softcap, bool statistics) "
      "-> (Tensor nll, Tensor lse, Tensor mass, Tensor target_weight, Tensor entropy, Tensor prediction, "
      "Tensor target_log_probability)");
  fused_ops::define(
      m,
      "cross_entropy_rows_backward(Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor? grad_target_log_probability, Tensor input, Tensor? indices, Tensor? probabilities, Tensor? weight, "
      "Tensor? class_mask, Tensor lse, Tensor mass, Tensor? entropy, int ignore_index, float label_smoothing, "
      "float logit_scale, float softcap, bool statistics) -> Tensor");
  fused_ops::define(
      m,
      "cross_entropy_rows_backward_(Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor? grad_target_log_probability, Tensor(a!) input, Tensor? indices, Tensor? probabilities, Tensor? weight, "
      "Tensor? class_mask, Tensor lse, Tensor mass, Tensor? entropy, int ignore_index, float label_smoothing, "
      "float logit_scale, float softcap, bool statistics) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  fused_ops::implement<&fused_ops::cross_entropy_rows_forward>(m, "cross_entropy_rows_forward");
  fused_ops::implement<&fused_ops::cross_entropy_rows_backward>(m, "cross_entropy_rows_backward");
  fused_ops::implement<&fused_ops::cross_entropy_rows_backward_>(m, "cross_entropy_rows_backward_");
}

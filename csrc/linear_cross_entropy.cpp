// Schema, checks and dispatch of the raw op between linear cross-entropy's matrix products.
#include "linear_cross_entropy.h"

#include <tuple>

#include "cross_entropy_rows_tensors.h"

namespace fused_ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_chunk_(
    Tensor logits, const MaybeTensor& indices, const MaybeTensor& probabilities, const MaybeTensor& weight,
    const MaybeTensor& class_mask, const MaybeTensor& row_scale, double z_loss, int64_t ignore_index,
    double label_smoothing, double logit_scale, double softcap, bool statistics) {
  if (row_scale) check_in_place(logits);
  const Prepared p(logits, indices, probabilities, weight, class_mask, ignore_index, label_smoothing, logit_scale,
                   softcap, statistics);
  RowOutputs outputs(p);
  MaybeTensor scale;
  LinearCrossEntropyChunk args{};
  args.forward = outputs.forward(p);
  args.row_scale = row_values("row_scale", row_scale, p, scale);
  args.z_loss = z_loss;
  MaybeTensor grad_lse;
  if (args.row_scale) {
    if (p.indices) {  // nothing may be written if any target is bad
      const int64_t bad =
          FUSED_OPS_SELECT(cross_entropy_bad_target)(p.rows.indices, 0, p.indices->numel(), p.classes());
      if (bad >= 0) raise_bad_target(*p.indices, bad);
    }
    if (z_loss != 0) {
      grad_lse = empty(logits, outputs.lse.sizes(), ScalarType::Double);
      args.grad_lse = static_cast<double*>(grad_lse->mutable_data_ptr());
    }
    args.backward.rows = p.rows;
    args.backward.grad_nll = args.row_scale, args.backward.grad_lse = args.grad_lse;
    args.backward.lse = args.forward.lse, args.backward.mass = args.forward.mass;
    args.backward.grad_logits = logits.mutable_data_ptr();
    args.backward.grad_layout = p.rows.layout;
  }
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_chunk);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
  return outputs.all();
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  m.def(
      "linear_cross_entropy_chunk_(Tensor(a!) logits, Tensor? indices, Tensor? probabilities, Tensor? weight, "
      "Tensor? class_mask, Tensor? row_scale, float z_loss, int ignore_index, float label_smoothing, "
      "float logit_scale, float softcap, bool statistics) -> (Tensor nll, Tensor lse, Tensor mass, "
      "Tensor target_weight, Tensor entropy, Tensor prediction, Tensor target_log_probability)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("linear_cross_entropy_chunk_", TORCH_BOX(&fused_ops::linear_cross_entropy_chunk_));
}

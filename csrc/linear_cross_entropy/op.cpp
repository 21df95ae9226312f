// Schemas, checks and dispatch of the raw ops between linear cross-entropy's matrix products.
#include <tuple>

#include "core/border.h"
#include "cross_entropy/rows_arguments.h"
#include "linear_cross_entropy/kernels.h"

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

constexpr const char* kHere = "linear_cross_entropy";

// Uninitialised memory for logits or a gradient, in huge pages where it is large.
Tensor linear_cross_entropy_buffer(const Tensor& like, int64_t rows, int64_t columns) {
  if (rows < 0 || columns < 0) raise(kHere, ": rows and columns must not be negative, got ", rows, " and ", columns);
  const int64_t shape[2] = {rows, columns};
  const Tensor t = empty(like, {shape, 2}, like.scalar_type());
  advise_huge(t.mutable_data_ptr(), t.numel() * element_size(float_dtype(kHere, "like", like)));
  return t;
}

const float* floats(const char* name, const Tensor& t, int64_t rows) {
  check_dtype(kHere, name, t, ScalarType::Float, "float32");
  check_numel(kHere, name, t, rows);
  if (!t.is_contiguous()) raise(kHere, ": ", name, " must be contiguous");
  return static_cast<const float*>(t.const_data_ptr());
}

// `classes` is how many there are in all: a target that is none of them raises.
LinearCrossEntropyTile tile_of(const Tensor& logits, const Tensor& target, int64_t first_class, int64_t classes) {
  LinearCrossEntropyTile tile{};
  tile.dtype = float_dtype(kHere, "logits", logits);
  if (tile.dtype == DType::float64) raise(kHere, ": logits must have a dtype that is computed in float32, got float64");
  if (logits.dim() != 2 || (logits.size(1) > 1 && logits.stride(1) != 1) ||
      (logits.size(0) > 1 && logits.stride(0) < logits.size(1)))
    raise(kHere, ": logits must be (classes, rows) with the rows adjacent, got shape ", shape_of(logits));
  tile.classes = logits.size(0), tile.rows = logits.size(1), tile.stride = logits.stride(0);
  check_dtype(kHere, "target", target, ScalarType::Long, "int64");
  check_numel(kHere, "target", target, tile.rows);
  if (!target.is_contiguous()) raise(kHere, ": target must be contiguous");
  if (first_class < 0 || classes < tile.classes || classes > INT32_MAX || first_class > classes - tile.classes)
    raise(kHere, ": first_class ", first_class, " and ", tile.classes, " more must be among ", classes, " classes");
  tile.first_class = first_class;
  tile.target = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t r = 0; r < tile.rows; ++r)
    if (tile.target[r] < 0 || tile.target[r] >= classes) raise_bad_target(target, r);
  tile.logits = const_cast<void*>(logits.const_data_ptr());
  return tile;
}

void linear_cross_entropy_tile_sums_(const Tensor& logits, const Tensor& target, int64_t first_class, int64_t classes,
                                     Tensor max, Tensor others, Tensor target_logit) {
  const LinearCrossEntropyTile tile = tile_of(logits, target, first_class, classes);
  check_dtype(kHere, "others", others, ScalarType::Double, "float64");
  check_numel(kHere, "others", others, tile.rows);
  if (!others.is_contiguous()) raise(kHere, ": others must be contiguous");
  const LinearCrossEntropySums sums{const_cast<float*>(floats("max", max, tile.rows)),
                                    static_cast<double*>(others.mutable_data_ptr()),
                                    const_cast<float*>(floats("target_logit", target_logit, tile.rows))};
  constexpr int64_t kRows = 32;  // a cache line of 16-bit logits: as little as a thread may take
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_tile_sums);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(tile.classes, 1) / kRows);
  torch::stable::parallel_for(0, (tile.rows + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
    kernel(tile, sums, begin * kRows, std::min(end * kRows, tile.rows));
  });
}

void linear_cross_entropy_tile_grads_(Tensor logits, const Tensor& target, int64_t first_class, int64_t classes,
                                      const Tensor& max, const Tensor& factor, const Tensor& target_grad) {
  LinearCrossEntropyTile tile = tile_of(logits, target, first_class, classes);
  tile.logits = logits.mutable_data_ptr();
  const LinearCrossEntropyGrads grads{floats("max", max, tile.rows), floats("factor", factor, tile.rows),
                                      floats("target_grad", target_grad, tile.rows)};
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_tile_grads);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(tile.rows, 1));
  torch::stable::parallel_for(0, tile.classes, grain,
                              [&](int64_t begin, int64_t end) { kernel(tile, grads, begin, end); });
}

void linear_cross_entropy_add_(Tensor sum, const Tensor& part) {
  check_dtype(kHere, "sum", sum, ScalarType::Float, "float32");
  check_numel(kHere, "part", part, sum.numel());
  const DType dtype = float_dtype(kHere, "part", part);
  if (element_size(dtype) != 2) raise(kHere, ": part must be bfloat16 or float16");
  if (!sum.is_contiguous() || !part.is_contiguous()) raise(kHere, ": sum and part must be contiguous");
  float* to = static_cast<float*>(sum.mutable_data_ptr());
  const void* from = part.const_data_ptr();
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_add);
  torch::stable::parallel_for(0, sum.numel(), kGrainElements,
                              [&](int64_t begin, int64_t end) { kernel(to, from, dtype, begin, end); });
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  fused_ops::define(
      m,
      "linear_cross_entropy_chunk_(Tensor(a!) logits, Tensor? indices, Tensor? probabilities, Tensor? weight, "
      "Tensor? class_mask, Tensor? row_scale, float z_loss, int ignore_index, float label_smoothing, "
      "float logit_scale, float softcap, bool statistics) -> (Tensor nll, Tensor lse, Tensor mass, "
      "Tensor target_weight, Tensor entropy, Tensor prediction, Tensor target_log_probability)");
  fused_ops::define(m, "linear_cross_entropy_buffer(Tensor like, SymInt rows, SymInt columns) -> Tensor");
  fused_ops::define(
      m,
      "linear_cross_entropy_tile_sums_(Tensor logits, Tensor target, int first_class, int classes, Tensor(a!) max, "
      "Tensor(b!) others, Tensor(c!) target_logit) -> ()");
  fused_ops::define(
      m,
      "linear_cross_entropy_tile_grads_(Tensor(a!) logits, Tensor target, int first_class, int classes, Tensor max, "
      "Tensor factor, Tensor target_grad) -> ()");
  fused_ops::define(m, "linear_cross_entropy_add_(Tensor(a!) sum, Tensor part) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  fused_ops::implement<&fused_ops::linear_cross_entropy_chunk_>(m, "linear_cross_entropy_chunk_");
  fused_ops::implement<&fused_ops::linear_cross_entropy_buffer>(m, "linear_cross_entropy_buffer");
  fused_ops::implement<&fused_ops::linear_cross_entropy_tile_sums_>(m, "linear_cross_entropy_tile_sums_");
  fused_ops::implement<&fused_ops::linear_cross_entropy_tile_grads_>(m, "linear_cross_entropy_tile_grads_");
  fused_ops::implement<&fused_ops::linear_cross_entropy_add_>(m, "linear_cross_entropy_add_");
}

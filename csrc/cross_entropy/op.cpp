// Checks, allocation and dispatch of the cross-entropy ops on the CPU. Tensors stop here.
#include "cross_entropy/on_cpu.h"

namespace fused_ops {
namespace {

// ---- class indices alone, reduced

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const IndexForward& a) {
  check_input_and_target(a.input, a.target, a.reduction);
  const auto mode = static_cast<Reduction>(a.reduction);
  const Tensor input = spatial_is_one_dim(a.input) ? a.input : dense(a.input);
  const Tensor target = dense(a.target);
  const CrossEntropyRows rows = index_rows(input, target, a.ignore_index);
  const IntHeaderOnlyArrayRef scalar_shape{};
  Tensor loss = empty(input, mode == Reduction::none ? target.sizes() : scalar_shape, input.scalar_type());
  Tensor lse = empty(input, target.sizes(), ScalarType::Double);
  Tensor total = empty(input, scalar_shape, ScalarType::Double);

  CrossEntropyForward args{};
  args.rows = rows, args.lse = static_cast<double*>(lse.mutable_data_ptr());
  if (mode == Reduction::none) args.loss = loss.mutable_data_ptr();
  const BlockResult found = forward_in_blocks(args, rows_per_block(rows.layout), target);
  if (mode != Reduction::none) write_scalar(loss, found.loss_sum / denominator(found, mode));
  write_scalar(total, static_cast<double>(found.count));
  return {loss, lse, total};
}

// The reduced loss, its gradient for an upstream gradient of 1, and how many rows are ignored, on one thread: for
// inputs so small that a second call of an op costs more than the arithmetic.
std::tuple<Tensor, Tensor, int64_t> cross_entropy_with_gradient(const IndexForward& a) {
  check_input_and_target(a.input, a.target, a.reduction);
  const auto mode = static_cast<Reduction>(a.reduction);
  if (mode == Reduction::none) raise(kOp, ": reduction must be 1 (mean) or 2 (sum) to have one gradient, got 0");
  const Tensor input = spatial_is_one_dim(a.input) ? a.input : dense(a.input);
  const Tensor target = dense(a.target);
  const CrossEntropyRows rows = index_rows(input, target, a.ignore_index);
  const RowLayout& layout = rows.layout;
  Tensor loss = empty(input, {}, input.scalar_type());
  Tensor gradient = grad_like(input);

  const RowLayout gradient_layout = layout_beside(gradient, input);
  const bool in_one = rows.dtype == DType::float32 && layout.adjacent_classes() && gradient_layout.adjacent_classes() &&
                      layout.classes > 0;
  const BlockResult found =
      in_one ? FUSED_OPS_SELECT(cross_entropy_with_gradient)(
                   {static_cast<const float*>(rows.logits), layout, rows.indices, mode == Reduction::mean,
                    static_cast<float*>(gradient.mutable_data_ptr()), gradient_layout})
             : forward_then_backward(rows, gradient.mutable_data_ptr(), gradient_layout,
                                     std::max<int64_t>(layout.rows(), 1), target, mode);
  if (found.bad_row >= 0) raise_bad_target(target, found.bad_row);
  write_scalar(loss, found.loss_sum / denominator(found, mode));
  return {loss, gradient, layout.rows() - found.count};
}

Tensor index_backward(const IndexBackward& a, bool in_place) {
  check_backward(a);
  const auto mode = static_cast<Reduction>(a.reduction);
  if (in_place) check_in_place(a.input);
  const Tensor input = spatial_is_one_dim(a.input) ? a.input : dense(a.input);
  const Tensor target = dense(a.target), lse = dense(a.lse), grad_loss = dense(a.grad_loss);
  CrossEntropyBackward args{};
  args.rows = index_rows(input, target, a.ignore_index);
  Tensor grad = in_place ? input : grad_like(input);
  args.grad_logits = grad.mutable_data_ptr(), args.grad_layout = layout_beside(grad, input);
  args.lse = static_cast<const double*>(lse.const_data_ptr());
  if (mode == Reduction::none)
    args.grad_loss = grad_loss.const_data_ptr();
  else
    args.scale = scalar_value(grad_loss) / (mode == Reduction::mean ? scalar_value(a.total) : 1);
  const RowLayout& layout = args.rows.layout;
  if (in_place) check_targets(args.rows, layout.rows(), target);
  backward_in_blocks(args, rows_per_block(layout), target);
  return grad;
}

Tensor cross_entropy_backward(const IndexBackward& a) { return index_backward(a, false); }
void cross_entropy_backward_(const IndexBackward& a) { index_backward(a, true); }

// ---- every option, row by row, nothing reduced

RowResults cross_entropy_rows_forward(const RowsForward& a) {
  const Prepared p(a.tensors, a.options);
  RowOutputs outputs(p);
  const CrossEntropyForward args = outputs.forward(p);
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_forward);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(args, begin, end).bad_row; });
  return outputs.all();
}

Tensor rows_backward(const RowsBackward& a, bool in_place) {
  if (in_place) check_in_place(a.tensors.input);
  const Prepared p(a.tensors, a.options);
  BackwardValues values(a, p, nullptr);
  Tensor grad = in_place ? p.input : grad_like(p.input);
  values.write_to(grad, p.input);
  if (in_place && p.indices) check_targets(p.rows, p.indices->numel(), *p.indices);
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_backward);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(values.args, begin, end); });
  return grad;
}

Tensor cross_entropy_rows_backward(const RowsBackward& a) { return rows_backward(a, false); }
void cross_entropy_rows_backward_(const RowsBackward& a) { rows_backward(a, true); }

// ---- the same of some of the classes

Tensor cross_entropy_shard_forward(const ShardForward& a) {
  const Prepared p(a.tensors, a.options, a.allowed, a.first_class);
  const int64_t always = 7, parts = a.options.statistics ? always + 2 : always, rows = p.rows.layout.rows();
  std::vector<int64_t> shape = p.rows_shape;
  shape.insert(shape.begin(), parts);
  Tensor found = empty(p.input, {shape.data(), shape.size()}, ScalarType::Double);
  double* next = static_cast<double*>(found.mutable_data_ptr());
  CrossEntropyForward args{};
  args.rows = p.rows, args.part.all_classes = a.all_classes;
  CrossEntropyPart& part = args.part;
  for (double** values : {&part.high, &part.low, &part.nll, &part.mass, &part.target_weight,
                          &part.target_log_probability, &part.bad_target, &part.entropy, &part.prediction})
    *values = next, next += rows;
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_forward);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(args, begin, end).bad_row; });
  return found;
}

Tensor shard_backward(const ShardBackward& a, bool in_place) {
  if (in_place) check_in_place(a.tensors.input);
  const Prepared p(a.tensors, a.options, a.allowed, a.first_class);
  BackwardValues values(a, p);
  Tensor grad = in_place ? p.input : grad_like(p.input);
  values.write_to(grad, p.input);
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_backward);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(values.args, begin, end); });
  return grad;
}

Tensor cross_entropy_shard_backward(const ShardBackward& a) { return shard_backward(a, false); }
void cross_entropy_shard_backward_(const ShardBackward& a) { shard_backward(a, true); }

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  fused_ops::implement_struct<&fused_ops::cross_entropy_forward>(m, "cross_entropy_forward");
  fused_ops::implement_struct<&fused_ops::cross_entropy_with_gradient>(m, "cross_entropy_with_gradient");
  fused_ops::implement_struct<&fused_ops::cross_entropy_backward>(m, "cross_entropy_backward");
  fused_ops::implement_struct<&fused_ops::cross_entropy_backward_>(m, "cross_entropy_backward_");
  fused_ops::implement_struct<&fused_ops::cross_entropy_rows_forward>(m, "cross_entropy_rows_forward");
  fused_ops::implement_struct<&fused_ops::cross_entropy_rows_backward>(m, "cross_entropy_rows_backward");
  fused_ops::implement_struct<&fused_ops::cross_entropy_rows_backward_>(m, "cross_entropy_rows_backward_");
  fused_ops::implement_struct<&fused_ops::cross_entropy_shard_forward>(m, "cross_entropy_shard_forward");
  fused_ops::implement_struct<&fused_ops::cross_entropy_shard_backward>(m, "cross_entropy_shard_backward");
  fused_ops::implement_struct<&fused_ops::cross_entropy_shard_backward_>(m, "cross_entropy_shard_backward_");
}

// Schema, checks, allocation and dispatch of the cross-entropy ops. Tensors stop here.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "core/border.h"
#include "cross_entropy/kernels.h"
#include "cross_entropy/passes.h"

namespace fused_ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input_, const Tensor& target_,
                                                         int64_t ignore_index, int64_t reduction) {
  check_input_and_target(input_, target_, reduction);
  const Tensor input = spatial_is_one_dim(input_) ? input_ : dense(input_);
  const Tensor target = dense(target_);
  const DType dtype = float_dtype(kOp, "input", input);
  const RowLayout layout = layout_of(input);

  const IntHeaderOnlyArrayRef scalar_shape{};
  Tensor loss = empty(input, reduction == 0 ? target.sizes() : scalar_shape, input.scalar_type());
  Tensor lse = empty(input, target.sizes(), ScalarType::Double);
  Tensor total = empty(input, scalar_shape, ScalarType::Double);

  const auto [sum, count, bad_row] = forward_in_blocks({dtype,
                                                        input.const_data_ptr(),
                                                        layout,
                                                        {target.const_data_ptr(), target_type(target), ignore_index},
                                                        rows_per_block(layout),
                                                        static_cast<double*>(lse.mutable_data_ptr()),
                                                        reduction == 0 ? loss.mutable_data_ptr() : nullptr,
                                                        nullptr,
                                                        nullptr},
                                                       target);
  const auto mode = static_cast<Reduction>(reduction);
  if (mode == Reduction::mean) write_scalar(loss, sum / static_cast<double>(count));
  if (mode == Reduction::sum) write_scalar(loss, sum);
  write_scalar(total, static_cast<double>(count));
  return {loss, lse, total};
}

// The reduced loss, its gradient for an upstream gradient of 1, and how many rows are ignored, on one thread: for
// inputs so small that a second call of an op costs more than the arithmetic.
std::tuple<Tensor, Tensor, int64_t> cross_entropy_with_gradient(const Tensor& input_, const Tensor& target_,
                                                                int64_t ignore_index, int64_t reduction) {
  check_input_and_target(input_, target_, reduction);
  const auto mode = static_cast<Reduction>(reduction);
  if (mode == Reduction::none) raise(kOp, ": reduction must be 1 (mean) or 2 (sum) to have one gradient, got 0");
  const Tensor input = spatial_is_one_dim(input_) ? input_ : dense(input_);
  const Tensor target = dense(target_);
  const DType dtype = float_dtype(kOp, "input", input);
  const RowLayout layout = layout_of(input);
  const Targets targets{target.const_data_ptr(), target_type(target), ignore_index};
  Tensor loss = empty(input, {}, input.scalar_type());
  Tensor gradient = grad_like(input);

  const RowLayout gradient_layout = layout_of(gradient);
  const bool in_one =
      dtype == DType::float32 && layout.adjacent_classes() && gradient_layout.adjacent_classes() && layout.classes > 0;
  const BlockResult found =
      in_one ? FUSED_OPS_SELECT(cross_entropy_with_gradient)(
                   {static_cast<const float*>(input.const_data_ptr()), layout, targets, mode == Reduction::mean,
                    static_cast<float*>(gradient.mutable_data_ptr()), gradient_layout})
             : forward_then_backward({dtype, input.const_data_ptr(), layout, targets, nullptr, nullptr, nullptr, 0, 1,
                                      gradient.mutable_data_ptr(), gradient_layout},
                                     std::max<int64_t>(layout.rows(), 1), target, mode);
  if (found.bad_row >= 0) raise_bad_target(target, found.bad_row);
  write_scalar(loss, found.loss_sum / denominator(found, mode));
  return {loss, gradient, layout.rows() - found.count};
}

Tensor backward(const Tensor& grad_loss_, const Tensor& input_, const Tensor& target_, const Tensor& lse_,
                const Tensor& total, int64_t ignore_index, int64_t reduction, bool in_place) {
  check_input_and_target(input_, target_, reduction);
  check_backward(grad_loss_, input_, target_, lse_, total, reduction);
  const auto mode = static_cast<Reduction>(reduction);
  if (in_place) check_in_place(input_);
  const Tensor input = spatial_is_one_dim(input_) ? input_ : dense(input_);
  const Tensor target = dense(target_), lse = dense(lse_), grad_loss = dense(grad_loss_);
  const DType dtype = float_dtype(kOp, "input", input);
  Tensor grad = in_place ? input : grad_like(input);
  double scale = 1;
  if (mode != Reduction::none) scale = scalar_value(grad_loss);
  if (mode == Reduction::mean) scale /= scalar_value(total);

  const RowLayout layout = layout_of(input);
  const CrossEntropyBackward args{dtype,
                                  input.const_data_ptr(),
                                  layout,
                                  {target.const_data_ptr(), target_type(target), ignore_index},
                                  static_cast<const double*>(lse.const_data_ptr()),
                                  mode == Reduction::none ? grad_loss.const_data_ptr() : nullptr,
                                  nullptr,
                                  0,
                                  scale,
                                  grad.mutable_data_ptr(),
                                  layout_of(grad)};
  if (in_place) {  // nothing may be written if any target is bad
    const int64_t bad = FUSED_OPS_SELECT(cross_entropy_bad_target)(args.targets, 0, layout.rows(), layout.classes);
    if (bad >= 0) raise_bad_target(target, bad);
  }
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_backward);
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(0, layout.rows(), rows_per_block(layout), [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(args, begin, end);
    if (bad >= 0) bad_row = bad;
  });
  if (bad_row >= 0) raise_bad_target(target, bad_row);
  return grad;
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& lse,
                              const Tensor& total, int64_t ignore_index, int64_t reduction) {
  return backward(grad_loss, input, target, lse, total, ignore_index, reduction, false);
}

void cross_entropy_backward_(const Tensor& grad_loss, Tensor input, const Tensor& target, const Tensor& lse,
                             const Tensor& total, int64_t ignore_index, int64_t reduction) {
  backward(grad_loss, input, target, lse, total, ignore_index, reduction, true);
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  fused_ops::define(m,
                    "cross_entropy_forward(Tensor input, Tensor target, int ignore_index, int reduction) "
                    "-> (Tensor loss, Tensor lse, Tensor total)");
  fused_ops::define(m,
                    "cross_entropy_with_gradient(Tensor input, Tensor target, int ignore_index, int reduction) "
                    "-> (Tensor loss, Tensor gradient, int ignored)");
  fused_ops::define(m,
                    "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor lse, Tensor total, "
                    "int ignore_index, int reduction) -> Tensor");
  fused_ops::define(
      m,
      "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor lse, Tensor total, "
      "int ignore_index, int reduction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  fused_ops::implement<&fused_ops::cross_entropy_forward>(m, "cross_entropy_forward");
  fused_ops::implement<&fused_ops::cross_entropy_with_gradient>(m, "cross_entropy_with_gradient");
  fused_ops::implement<&fused_ops::cross_entropy_backward>(m, "cross_entropy_backward");
  fused_ops::implement<&fused_ops::cross_entropy_backward_>(m, "cross_entropy_backward_");
}

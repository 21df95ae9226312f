// Checks, allocation and launch of the cross-entropy ops on a GPU; the schemas are in op.cpp.
//
// Nothing here waits for the device: the count of rows and the upstream gradient stay there, and a target out of range
// is an error of the device, as in PyTorch.
#include <tuple>

#include "core/border.h"
#include "core/cuda_device.h"
#include "cross_entropy/arguments.h"
#include "cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input_, const Tensor& target_, int64_t ignore_index,
                                           int64_t reduction) {
  check_input_and_target(input_, target_, reduction);
  const OnDevice device(input_);
  const Tensor input = spatial_is_one_dim(input_) ? input_ : dense(input_), target = dense(target_);
  ForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input);
  call.layout = layout_of(input);
  call.reduction = static_cast<Reduction>(reduction);
  call.targets = {target.const_data_ptr(), target_type(target), ignore_index};

  const IntHeaderOnlyArrayRef scalar_shape{};
  Tensor loss = empty(input, reduction == 0 ? target.sizes() : scalar_shape, input.scalar_type());
  Tensor lse = empty(input, target.sizes(), ScalarType::Double);
  Tensor total = empty(input, scalar_shape, ScalarType::Double);
  const Tensor memory = scratch(input, forward_scratch(call.dtype, call.layout));
  call.logits = input.const_data_ptr(), call.loss = loss.mutable_data_ptr();
  call.lse = doubles_of(lse), call.total = doubles_of(total), call.scratch = doubles_of(memory);
  check_launch(kOp, cross_entropy_forward(call, device.stream()));
  return {loss, lse, total};
}

Tensor backward(const Tensor& grad_loss_, const Tensor& input_, const Tensor& target_, const Tensor& lse_,
                const Tensor& total, int64_t ignore_index, int64_t reduction, bool in_place) {
  check_input_and_target(input_, target_, reduction);
  check_backward(grad_loss_, input_, target_, lse_, total, reduction);
  if (in_place) check_in_place(input_);
  const auto mode = static_cast<Reduction>(reduction);
  const OnDevice device(input_);
  const Tensor input = spatial_is_one_dim(input_) ? input_ : dense(input_);
  const Tensor target = dense(target_), lse = dense(lse_), grad_loss = dense(grad_loss_);
  Tensor grad = in_place ? input : empty_output(input_);
  BackwardCall call{};
  call.dtype = float_dtype(kOp, "input", input);
  call.layout = layout_of(input), call.grad_layout = layout_of(grad);
  call.reduction = mode;
  call.targets = {target.const_data_ptr(), target_type(target), ignore_index};
  const Tensor memory = scratch(input, backward_scratch(call.dtype, call.layout));
  call.logits = input.const_data_ptr(), call.grad_logits = grad.mutable_data_ptr();
  call.lse = static_cast<const double*>(lse.const_data_ptr());
  call.total = static_cast<const double*>(total.const_data_ptr());
  call.grad_loss = grad_loss.const_data_ptr(), call.scratch = doubles_of(memory);
  check_launch(kOp, cross_entropy_backward(call, device.stream()));
  return grad;
}

Tensor backward_fresh(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& lse,
                      const Tensor& total, int64_t ignore_index, int64_t reduction) {
  return backward(grad_loss, input, target, lse, total, ignore_index, reduction, false);
}

void backward_in_place(const Tensor& grad_loss, Tensor input, const Tensor& target, const Tensor& lse,
                       const Tensor& total, int64_t ignore_index, int64_t reduction) {
  backward(grad_loss, input, target, lse, total, ignore_index, reduction, true);
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  fused_ops::implement<&fused_ops::cuda::forward>(m, "cross_entropy_forward");
  fused_ops::implement<&fused_ops::cuda::backward_fresh>(m, "cross_entropy_backward");
  fused_ops::implement<&fused_ops::cuda::backward_in_place>(m, "cross_entropy_backward_");
}

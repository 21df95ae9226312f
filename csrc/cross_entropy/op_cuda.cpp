// Checks, allocation and launch of the cross-entropy ops on a GPU.
//
// Nothing here waits for the device: the count of rows and the upstream gradient stay there, and a target out of range
// is an error of the device, as in PyTorch.
#include "cross_entropy/arguments_cuda.h"
#include "cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {
namespace {

// ---- class indices alone, reduced

// What there is of a call before its results; `target` is dense.
ForwardCall forward_call(const IndexForward& a, const Tensor& input, const Tensor& target) {
  ForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.logits = input.const_data_ptr(), call.layout = layout_of(input);
  call.reduction = static_cast<Reduction>(a.reduction);
  call.targets = {target.const_data_ptr(), target_type(target), a.ignore_index};
  return call;
}

std::tuple<Tensor, Tensor, Tensor> forward(const IndexForward& a) {
  check_input_and_target(a.input, a.target, a.reduction);
  const OnDevice device(a.input);
  const Tensor input = spatial_is_one_dim(a.input) ? a.input : dense(a.input), target = dense(a.target);
  ForwardCall call = forward_call(a, input, target);
  const IntHeaderOnlyArrayRef scalar_shape{};
  Tensor loss = empty(input, a.reduction == 0 ? target.sizes() : scalar_shape, input.scalar_type());
  Tensor lse = empty(input, target.sizes(), ScalarType::Double);
  Tensor total = empty(input, scalar_shape, ScalarType::Double);
  const Tensor memory = scratch(input, forward_scratch(call.dtype, call.layout));
  call.loss = loss.mutable_data_ptr();
  call.lse = doubles_of(lse), call.total = doubles_of(total), call.scratch = doubles_of(memory);
  check_launch(kOp, cross_entropy_forward(call, device.stream()));
  return {loss, lse, total};
}

// As on the CPU, but that the number of ignored rows stays unknown, -1: it is on the device.
std::tuple<Tensor, Tensor, int64_t> with_gradient(const IndexForward& a) {
  check_input_and_target(a.input, a.target, a.reduction);
  if (a.reduction == 0) raise(kOp, ": reduction must be 1 (mean) or 2 (sum) to have one gradient, got 0");
  const OnDevice device(a.input);
  const Tensor input = spatial_is_one_dim(a.input) ? a.input : dense(a.input), target = dense(a.target);
  Tensor loss = empty(input, {}, input.scalar_type()), gradient = empty_result(a.input);
  WithGradientCall call{forward_call(a, input, target), gradient.mutable_data_ptr(), layout_beside(gradient, input)};
  call.forward.loss = loss.mutable_data_ptr();
  MaybeTensor memory;
  if (const int64_t count = with_gradient_scratch(call)) {
    memory = scratch(input, count);
    call.forward.scratch = doubles_of(*memory);
  }
  check_launch(kOp, cross_entropy_with_gradient(call, device.stream()));
  return {loss, gradient, -1};
}

Tensor scale_gradient(const ScaleGradient& a) {
  constexpr const char* kHere = "cross_entropy_scale_gradient";
  check_input_and_target(a.gradient, a.target, 1);
  check_same_dtype(kHere, "grad_loss", a.grad_loss, "gradient", a.gradient);
  check_numel(kHere, "grad_loss", a.grad_loss, 1);
  const OnDevice device(a.gradient);
  const Tensor gradient = dense(a.gradient), target = dense(a.target);
  Tensor result = empty(gradient, gradient.sizes(), gradient.scalar_type());
  const RowLayout l = plain_layout_of(gradient);
  const Targets targets{target.const_data_ptr(), target_type(target), a.ignore_index};
  const ScaleGradientCall call{float_dtype(kHere, "gradient", gradient),
                               gradient.const_data_ptr(),
                               l.batch,
                               l.classes,
                               l.spatial,
                               targets,
                               a.grad_loss.const_data_ptr(),
                               result.mutable_data_ptr()};
  check_launch(kHere, cross_entropy_scale_gradient(call, device.stream()));
  return result;
}

Tensor index_backward(const IndexBackward& a, bool in_place) {
  check_backward(a);
  if (in_place) check_in_place(a.input);
  const OnDevice device(a.input);
  const Tensor input = spatial_is_one_dim(a.input) ? a.input : dense(a.input);
  const Tensor target = dense(a.target), lse = dense(a.lse), grad_loss = dense(a.grad_loss);
  Tensor grad = in_place ? input : empty_result(a.input);
  BackwardCall call{};
  call.dtype = float_dtype(kOp, "input", input);
  call.layout = layout_of(input), call.grad_layout = layout_of(grad);
  call.reduction = static_cast<Reduction>(a.reduction);
  call.targets = {target.const_data_ptr(), target_type(target), a.ignore_index};
  const Tensor memory = scratch(input, backward_scratch(call.dtype, call.layout));
  call.logits = input.const_data_ptr(), call.grad_logits = grad.mutable_data_ptr();
  call.lse = static_cast<const double*>(lse.const_data_ptr());
  call.total = static_cast<const double*>(a.total.const_data_ptr());
  call.grad_loss = grad_loss.const_data_ptr(), call.scratch = doubles_of(memory);
  check_launch(kOp, cross_entropy_backward(call, device.stream()));
  return grad;
}

Tensor backward(const IndexBackward& a) { return index_backward(a, false); }
void backward_in_place(const IndexBackward& a) { index_backward(a, true); }

// ---- every option, row by row, nothing reduced

RowResults rows_forward(const RowsForward& a) {
  const RowsOnGpu p(a.tensors, a.options);
  const OnDevice device(a.tensors.input);
  RowOutputs outputs(p);
  const Tensor memory = scratch(p.input, rows_forward_scratch(p.rows));
  check_launch(kOp, cross_entropy_rows_forward({outputs.forward(p), doubles_of(memory)}, device.stream()));
  return outputs.all();
}

Tensor rows_gradient(const RowsBackward& a, bool in_place) {
  const RowsOnGpu p(a.tensors, a.options);
  if (in_place) check_in_place(a.tensors.input);
  const OnDevice device(a.tensors.input);
  RowsBackwardCall call{};
  BackwardValues values(a, p, call.steps);
  Tensor grad = in_place ? p.input : empty_result(p.input);
  values.write_to(grad, p.input);
  const Tensor memory = scratch(p.input, rows_backward_scratch(p.rows));
  call.args = values.args, call.scratch = doubles_of(memory);
  check_launch(kOp, cross_entropy_rows_backward(call, device.stream()));
  return grad;
}

Tensor rows_backward(const RowsBackward& a) { return rows_gradient(a, false); }
void rows_backward_in_place(const RowsBackward& a) { rows_gradient(a, true); }

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  using namespace fused_ops;
  implement_struct<&cuda::forward>(m, "cross_entropy_forward");
  implement_struct<&cuda::with_gradient>(m, "cross_entropy_with_gradient");
  implement_struct<&cuda::scale_gradient>(m, "cross_entropy_scale_gradient");
  implement_struct<&cuda::backward>(m, "cross_entropy_backward");
  implement_struct<&cuda::backward_in_place>(m, "cross_entropy_backward_");
  implement_struct<&cuda::rows_forward>(m, "cross_entropy_rows_forward");
  implement_struct<&cuda::rows_backward>(m, "cross_entropy_rows_backward");
  implement_struct<&cuda::rows_backward_in_place>(m, "cross_entropy_rows_backward_");
}

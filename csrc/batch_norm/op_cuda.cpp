// Checks, allocation and launch of the batch-norm ops on a GPU.
//
// The kernels serve everything but `valid`, ghost batches and a kept output: those calls go to the plain-PyTorch
// reference. They change what a channel's values are (a mask inside the reductions, statistics of parts of the batch),
// are rare in training, and would double the kernels; the reference runs them on the same GPU.
#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "batch_norm/arguments.h"
#include "batch_norm/cuda/kernels.h"
#include "core/cuda_device.h"

namespace fused_ops {
namespace cuda {
namespace {

constexpr int64_t kSmallSpatial =
    32;  // as kSmallMaskedSpatial of passes.h: a row of mask bits runs through the channels

template <class... Results, size_t... kIndex>
std::tuple<Results...> taken(StableIValue* stack, std::index_sequence<kIndex...>) {
  return {torch::stable::detail::to<Stable<Results>>(stack[kIndex])...};
}

// Calls an op of this library by name, with the arguments as they came.
template <class... Results, class... Args>
std::tuple<Results...> call_op(const char* name, const Args&... args) {
  constexpr size_t kSlots = sizeof...(Args) > sizeof...(Results) ? sizeof...(Args) : sizeof...(Results);
  std::array<StableIValue, kSlots> stack{torch::stable::detail::from(static_cast<const Stable<Args>&>(args))...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return taken<Results...>(stack.data(), std::index_sequence_for<Results...>{});
}

MaybeTensor dense_or_none(const MaybeTensor& t) { return t ? MaybeTensor(dense(*t)) : t; }
const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

BatchNormShape shape_of_input(const Tensor& input) {
  BatchNormShape s{input.size(0), input.size(1), 1, is_channels_last(input)};
  for (int64_t d = 2; d < input.dim(); ++d) s.spatial *= input.size(d);
  return s;
}

int64_t mask_size(const BatchNormShape& s) {
  int64_t rows = s.batch * s.channels, length = s.spatial;
  if (s.channels_last)
    rows = s.batch * s.spatial, length = s.channels;
  else if (s.spatial <= kSmallSpatial)
    rows = s.batch, length = s.channels * s.spatial;
  return rows * ((length + 7) / 8);
}

DType parameter_dtype(const std::optional<ScalarType>& kind, const Tensor& input) {
  if (!kind) return float_dtype(kOp, "input", input);
  return *kind == ScalarType::Float    ? DType::float32
         : *kind == ScalarType::Double ? DType::float64
         : *kind == ScalarType::Half   ? DType::float16
                                       : DType::bfloat16;
}

std::tuple<Tensor, Tensor> forward(const ForwardArguments& a) {
  check_forward(a);
  if (a.valid || (a.training && a.groups != 1))
    return call_op<Tensor, Tensor>(FUSED_OPS_REFERENCE_OP("batch_norm_forward"), a.input, a.running_mean, a.running_var,
                                   a.weight, a.bias, a.training, a.momentum, a.eps, a.correction, a.code, a.slope,
                                   a.residual, a.mask, a.valid, a.groups);
  const auto kind = check_parameters(
      a.input,
      {{"running_mean", &a.running_mean}, {"running_var", &a.running_var}, {"weight", &a.weight}, {"bias", &a.bias}});
  const OnDevice device(a.input);
  const Tensor input = is_channels_last(a.input) ? a.input : dense(a.input);
  const MaybeTensor residual = matching("residual", a.residual, input);
  const MaybeTensor running_mean = dense_or_none(a.running_mean), running_var = dense_or_none(a.running_var);
  const MaybeTensor weight = dense_or_none(a.weight), bias = dense_or_none(a.bias);

  BatchNormForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input);
  if (a.mask) check_mask(*a.mask, mask_size(call.shape));
  call.activation = a.activation, call.slope = a.slope;
  call.training = a.training, call.momentum = a.momentum, call.eps = a.eps, call.correction = a.correction;
  const int64_t both[] = {2, input.size(1)};
  Tensor output = empty_result(input, is_channels_last(input) || keeps_channels_last_strides(a)),
         statistics = empty(input, {both, 2}, ScalarType::Double);
  const Tensor memory = scratch(input, batch_norm_scratch(call.shape));
  call.parameters = {parameter_dtype(kind, input), data_of(weight), data_of(bias), data_of(running_mean),
                     data_of(running_var)};
  call.input = input.const_data_ptr(), call.residual = data_of(residual), call.output = output.mutable_data_ptr();
  call.mask = a.mask ? static_cast<uint8_t*>(a.mask->mutable_data_ptr()) : nullptr;
  call.mean = doubles_of(statistics), call.invstd = call.mean + input.size(1), call.scratch = doubles_of(memory);
  call.new_mean = a.updates() ? running_mean->mutable_data_ptr() : nullptr;  // a channel is read before it is written
  call.new_var = a.updates() ? running_var->mutable_data_ptr() : nullptr;
  check_launch(kOp, batch_norm_forward(call, device.stream()));
  if (a.updates()) write_back(a.running_mean, running_mean), write_back(a.running_var, running_var);
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& a) {
  check_input(a.input);
  if (a.valid || a.stored || (a.training && a.groups != 1)) {
    if (a.groups < 1) raise(kOp, ": groups must be at least 1, got ", a.groups);
    return call_op<Tensor, Tensor, Tensor>(FUSED_OPS_REFERENCE_OP("batch_norm_backward"), a.grad_output, a.input,
                                           a.weight, a.bias, a.statistics, a.training, a.need_input, a.need_params,
                                           a.correction, a.code, a.slope, a.residual, a.mask, a.valid, a.groups,
                                           a.grad_residual, a.stored, a.offsets);
  }
  const auto kind = check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const int64_t channels = a.input.size(1), none = 0, count = a.need_params ? channels : none;
  check_statistics(a.statistics, channels);
  const OnDevice device(a.input);
  const Tensor input = is_channels_last(a.input) ? a.input : dense(a.input);
  const Tensor grad_output = *matching("grad_output", a.grad_output, input);
  const MaybeTensor residual = matching("residual", a.residual, input);
  const MaybeTensor weight = dense_or_none(a.weight), bias = dense_or_none(a.bias);
  const Tensor statistics = dense(a.statistics);
  if (a.grad_residual) check_written("grad_residual", *a.grad_residual, input);

  BatchNormBackwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input);
  call.activation = a.activation, call.slope = a.slope;
  call.training = a.training, call.correction = a.correction;
  if (a.mask && a.mask->numel()) {
    check_mask(*a.mask, mask_size(call.shape));
    if (sign_is_enough(a.activation)) call.mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
  }
  const ScalarType grad_type = kind ? *kind : input.scalar_type();
  Tensor grad_input = a.need_input ? empty_result(input) : empty(input, {&none, 1}, input.scalar_type());
  Tensor grad_weight = empty(input, {&count, 1}, grad_type), grad_bias = empty(input, {&count, 1}, grad_type);
  const Tensor memory = scratch(input, batch_norm_scratch(call.shape));
  call.grad_dtype = parameter_dtype(kind, input);
  call.parameters = {call.grad_dtype, data_of(weight), data_of(bias), nullptr, nullptr};
  call.grad_output = grad_output.const_data_ptr(), call.input = input.const_data_ptr();
  call.residual = data_of(residual);
  call.mean = static_cast<const double*>(statistics.const_data_ptr()), call.invstd = call.mean + channels;
  call.grad_input = a.need_input ? grad_input.mutable_data_ptr() : nullptr;
  call.grad_residual = a.grad_residual ? a.grad_residual->mutable_data_ptr() : nullptr;
  call.grad_weight = a.need_params ? grad_weight.mutable_data_ptr() : nullptr;
  call.grad_bias = a.need_params ? grad_bias.mutable_data_ptr() : nullptr;
  call.scratch = doubles_of(memory);
  check_launch(kOp, batch_norm_backward(call, device.stream()));
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::cuda::forward>(m, "batch_norm_forward");
  implement_struct<&fused_ops::cuda::backward>(m, "batch_norm_backward");
  implement_struct<&fused_ops::cuda::forward, PlainForwardArguments>(m, "batch_norm_plain_forward");
  implement_struct<&fused_ops::cuda::backward, PlainBackwardArguments>(m, "batch_norm_plain_backward");
}

// Checks, allocation and launch of the batch-norm ops on a GPU; the schemas are in op.cpp.
//
// The kernels serve everything but `valid` and ghost batches: those ops go to the plain-PyTorch reference. Both change
// what a channel's values are (a mask inside the reductions, statistics of parts of the batch), are rare in training,
// and would double the kernels; the reference runs them on the same GPU.
#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "batch_norm/cuda/kernels.h"
#include "core/border.h"
#include "core/cuda_device.h"

namespace fused_ops {
namespace cuda {
namespace {

constexpr const char* kOp = "batch_norm";
constexpr int64_t kSmallPlane =
    32;  // as kSmallMaskedPlane of arguments.h: the mask of smaller planes runs through the channels

using MaybeTensor = std::optional<Tensor>;

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

void check_input(const Tensor& input) {
  if (input.dim() < 2) raise(kOp, ": input must be (batch, channels, ...), got shape ", shape_of(input));
  float_dtype(kOp, "input", input);
}

// Each parameter has one value a channel; all are of one dtype, the input's or float32 with a 16-bit input.
std::optional<ScalarType> check_parameters(const Tensor& input,
                                           std::initializer_list<std::pair<const char*, const MaybeTensor*>> all) {
  const bool narrow = input.scalar_type() == ScalarType::BFloat16 || input.scalar_type() == ScalarType::Half;
  std::optional<ScalarType> kind;
  for (const auto& [name, t] : all) {
    if (!*t) continue;
    if ((*t)->numel() != input.size(1)) raise(name, " should contain ", input.size(1), " elements not ", (*t)->numel());
    const ScalarType type = (*t)->scalar_type();
    if ((type != input.scalar_type() && !(narrow && type == ScalarType::Float)) || (kind && *kind != type))
      raise(kOp, ": mixed dtype: expected parameters and statistics of one dtype, that of input (code ",
            static_cast<int>(input.scalar_type()), ")", narrow ? " or float32" : "", ", got ", name, " of code ",
            static_cast<int>(type));
    kind = type;
  }
  return kind;
}

// A tensor of the input's shape and dtype in the input's memory layout: itself, or a copy.
MaybeTensor matching(const char* name, const MaybeTensor& t, const Tensor& input) {
  if (!t) return t;
  check_same_dtype(kOp, name, *t, "input", input);
  check_same_shape(kOp, name, *t, "input", input);
  bool same = true;
  for (int64_t d = 0; d < t->dim(); ++d) same &= t->size(d) <= 1 || t->stride(d) == input.stride(d);
  if (same || t->numel() == 0) return t;
  Tensor copy = empty_strided(input, input.sizes(), input.strides(), input.scalar_type());
  torch::stable::copy_(copy, *t);
  return copy;
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
  else if (s.spatial <= kSmallPlane)
    rows = s.batch, length = s.channels * s.spatial;
  return rows * ((length + 7) / 8);
}

bool sign_is_enough(Activation a) { return a == Activation::relu || a == Activation::leaky_relu; }

Activation activation_of(int64_t code) {
  if (code < 0 || code >= kActivations)
    raise(kOp, ": activation must be a code in [0, ", kActivations, "), got ", code);
  return static_cast<Activation>(code);
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Six act_forward(const Tensor& input_, const MaybeTensor& residual_, const MaybeTensor& running_mean_,
                const MaybeTensor& running_var_, const MaybeTensor& weight_, const MaybeTensor& bias_,
                const MaybeTensor& valid, bool training, double momentum, double eps, int64_t correction,
                int64_t activation, double slope, int64_t groups) {
  check_input(input_);
  if (valid || (training && groups != 1)) {
    if (groups < 1) raise(kOp, ": groups must be at least 1, got ", groups);
    return call_op<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        FUSED_OPS_REFERENCE_OP("batch_norm_act_forward"), input_, residual_, running_mean_, running_var_, weight_,
        bias_, valid, training, momentum, eps, correction, activation, slope, groups);
  }
  const auto kind = check_parameters(
      input_,
      {{"running_mean", &running_mean_}, {"running_var", &running_var_}, {"weight", &weight_}, {"bias", &bias_}});
  if (running_mean_.has_value() != running_var_.has_value())
    raise(kOp, ": running_mean and running_var must either both be given or both be None");
  if (!training && !running_mean_) raise("running_mean must be defined in evaluation mode");
  const OnDevice device(input_);
  const Tensor input = is_channels_last(input_) ? input_ : dense(input_);
  const MaybeTensor residual = matching("residual", residual_, input);
  const MaybeTensor running_mean = dense_or_none(running_mean_), running_var = dense_or_none(running_var_);
  const MaybeTensor weight = dense_or_none(weight_), bias = dense_or_none(bias_);

  BatchNormForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input);
  call.activation = activation_of(activation), call.slope = slope;
  call.training = training, call.momentum = momentum, call.eps = eps, call.correction = correction;
  const int64_t channels = input.size(1), none = 0;
  const bool update = training && running_mean, masked = residual && sign_is_enough(call.activation);
  const int64_t bytes = masked ? mask_size(call.shape) : 0, fresh = update ? channels : none;
  const ScalarType running_type = update ? *kind : ScalarType::Double;
  Tensor output = empty_output(input);
  Tensor mean = empty(input, {&channels, 1}, ScalarType::Double);
  Tensor invstd = empty(input, {&channels, 1}, ScalarType::Double);
  Tensor new_mean = empty(input, {&fresh, 1}, running_type), new_var = empty(input, {&fresh, 1}, running_type);
  Tensor mask = empty(input, {&bytes, 1}, ScalarType::Byte);
  const Tensor memory = scratch(input, batch_norm_scratch(call.shape));
  call.parameters = {kind ? float_dtype(kOp, "parameters",
                                        weight_ ? *weight
                                        : bias_ ? *bias
                                                : *running_mean)
                          : call.dtype,
                     data_of(weight), data_of(bias), data_of(running_mean), data_of(running_var)};
  call.input = input.const_data_ptr(), call.residual = data_of(residual), call.output = output.mutable_data_ptr();
  call.mask = masked ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  call.mean = doubles_of(mean), call.invstd = doubles_of(invstd), call.scratch = doubles_of(memory);
  call.new_mean = update ? new_mean.mutable_data_ptr() : nullptr;
  call.new_var = update ? new_var.mutable_data_ptr() : nullptr;
  check_launch(kOp, batch_norm_forward(call, device.stream()));
  return {output, mean, invstd, new_mean, new_var, mask};
}

const uint8_t* mask_bytes(const MaybeTensor& mask, const BatchNormShape& shape) {
  if (!mask || mask->numel() == 0) return nullptr;
  check_dtype(kOp, "mask", *mask, ScalarType::Byte, "uint8");
  check_numel(kOp, "mask", *mask, mask_size(shape));
  if (!mask->is_contiguous()) raise(kOp, ": mask must be contiguous, as the forward returned it");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

Four act_backward(const Tensor& grad_output_, const Tensor& input_, const MaybeTensor& residual_,
                  const MaybeTensor& weight_, const MaybeTensor& bias_, const Tensor& mean_, const Tensor& invstd_,
                  const MaybeTensor& mask, const MaybeTensor& valid, bool training, int64_t correction,
                  int64_t activation, double slope, int64_t groups, bool need_input, bool need_params,
                  bool need_residual) {
  check_input(input_);
  if (valid || (training && groups != 1)) {
    if (groups < 1) raise(kOp, ": groups must be at least 1, got ", groups);
    return call_op<Tensor, Tensor, Tensor, Tensor>(
        FUSED_OPS_REFERENCE_OP("batch_norm_act_backward"), grad_output_, input_, residual_, weight_, bias_, mean_,
        invstd_, mask, valid, training, correction, activation, slope, groups, need_input, need_params, need_residual);
  }
  const auto kind = check_parameters(input_, {{"weight", &weight_}, {"bias", &bias_}});
  const int64_t channels = input_.size(1), none = 0, count = need_params ? channels : none;
  for (const auto& [name, t] : {std::pair("mean", &mean_), std::pair("invstd", &invstd_)}) {
    check_dtype(kOp, name, *t, ScalarType::Double, "float64");
    check_numel(kOp, name, *t, channels);
  }
  const OnDevice device(input_);
  const Tensor input = is_channels_last(input_) ? input_ : dense(input_);
  const Tensor grad_output = *matching("grad_output", grad_output_, input);
  const MaybeTensor residual = matching("residual", residual_, input);
  const MaybeTensor weight = dense_or_none(weight_), bias = dense_or_none(bias_);
  const Tensor mean = dense(mean_), invstd = dense(invstd_);

  BatchNormBackwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input);
  call.activation = activation_of(activation), call.slope = slope;
  call.training = training, call.correction = correction;
  call.mask = sign_is_enough(call.activation) ? mask_bytes(mask, call.shape) : nullptr;
  const ScalarType grad_type = kind ? *kind : input.scalar_type();
  const auto like_input = [&](bool need) {
    return need ? empty_output(input) : empty(input, {&none, 1}, input.scalar_type());
  };
  Tensor grad_input = like_input(need_input), grad_residual = like_input(need_residual);
  Tensor grad_weight = empty(input, {&count, 1}, grad_type), grad_bias = empty(input, {&count, 1}, grad_type);
  const Tensor memory = scratch(input, batch_norm_scratch(call.shape));
  call.grad_dtype = float_dtype(kOp, "parameters", grad_weight);
  call.parameters = {call.grad_dtype, data_of(weight), data_of(bias), nullptr, nullptr};
  call.grad_output = grad_output.const_data_ptr(), call.input = input.const_data_ptr();
  call.residual = data_of(residual);
  call.mean = static_cast<const double*>(mean.const_data_ptr());
  call.invstd = static_cast<const double*>(invstd.const_data_ptr());
  call.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
  call.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
  call.grad_weight = need_params ? grad_weight.mutable_data_ptr() : nullptr;
  call.grad_bias = need_params ? grad_bias.mutable_data_ptr() : nullptr;
  call.scratch = doubles_of(memory);
  check_launch(kOp, batch_norm_backward(call, device.stream()));
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const MaybeTensor& running_mean,
                                                           const MaybeTensor& running_var, const MaybeTensor& weight,
                                                           const MaybeTensor& bias, bool training, double momentum,
                                                           double eps, int64_t correction) {
  auto [output, mean, invstd, new_mean, new_var, mask] = act_forward(
      input, {}, running_mean, running_var, weight, bias, {}, training, momentum, eps, correction, 0, 0.0, 1);
  return {output, mean, invstd, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                            const Tensor& mean, const Tensor& invstd, bool training, int64_t correction,
                                            bool need_input, bool need_params) {
  auto [grad_input, grad_residual, grad_weight, grad_bias] =
      act_backward(grad_output, input, {}, weight, {}, mean, invstd, {}, {}, training, correction, 0, 0.0, 1,
                   need_input, need_params, false);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  fused_ops::implement<&fused_ops::cuda::forward>(m, "batch_norm_forward");
  fused_ops::implement<&fused_ops::cuda::backward>(m, "batch_norm_backward");
  fused_ops::implement<&fused_ops::cuda::act_forward>(m, "batch_norm_act_forward");
  fused_ops::implement<&fused_ops::cuda::act_backward>(m, "batch_norm_act_backward");
}

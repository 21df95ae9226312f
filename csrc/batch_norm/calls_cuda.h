// Calls of the batch-norm ops on a GPU, both directions: their arguments once they are checked and dense, their large
// results, and what the kernels are given of them.
#pragma once
#include <optional>
#include <tuple>

#include "batch_norm/arguments.h"
#include "batch_norm/cuda/kernels.h"
#include "core/cuda_device.h"

namespace fused_ops {
namespace cuda {
namespace {

// As kSmallMaskedSpatial of passes.h: a row of mask bits runs through the channels.
constexpr int64_t kSmallSpatial = 32;

MaybeTensor dense_or_none(const MaybeTensor& t) { return t ? MaybeTensor(dense(*t)) : t; }
const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

BatchNormShape shape_of_input(const Tensor& input, const MaybeTensor& valid) {
  BatchNormShape s{input.size(0), input.size(1), 1, is_channels_last(input), nullptr};
  for (int64_t d = 2; d < input.dim(); ++d) s.spatial *= input.size(d);
  if (valid) s.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
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

// Made on the call's device: OnDevice comes first.
struct ForwardOnGpu {
  const Tensor input;
  const MaybeTensor residual, weight, bias, valid;
  const Tensor output;
  BatchNormForwardCall call{};

  ForwardOnGpu(const ForwardArguments& a, const std::optional<ScalarType>& kind)
      : input(is_channels_last(a.input) ? a.input : dense(a.input)),
        residual(matching("residual", a.residual, input)),
        weight(dense_or_none(a.weight)),
        bias(dense_or_none(a.bias)),
        valid(valid_positions(a.valid, input)),
        output(empty_result(input, is_channels_last(input) || keeps_channels_last_strides(a))) {
    call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input, valid);
    if (a.mask) check_mask(*a.mask, mask_size(call.shape));
    call.parameters = {parameter_dtype(kind, input), data_of(weight), data_of(bias), nullptr, nullptr};
    call.activation = a.activation, call.slope = a.slope;
    call.training = a.training, call.momentum = a.momentum, call.eps = a.eps, call.correction = a.correction;
    call.input = input.const_data_ptr(), call.residual = data_of(residual), call.output = output.mutable_data_ptr();
    call.mask = a.mask ? static_cast<uint8_t*>(a.mask->mutable_data_ptr()) : nullptr;
  }
};

struct BackwardOnGpu {
  static constexpr int64_t kNone = 0;
  const Tensor input, grad_output;
  const MaybeTensor residual, weight, bias, valid;
  const Tensor statistics;
  const Tensor grad_input;  // of no values where it is not wanted
  BatchNormBackwardCall call{};

  BackwardOnGpu(const BackwardArguments& a, const std::optional<ScalarType>& kind)
      : input(is_channels_last(a.input) ? a.input : dense(a.input)),
        grad_output(*matching("grad_output", a.grad_output, input)),
        residual(matching("residual", a.residual, input)),
        weight(dense_or_none(a.weight)),
        bias(dense_or_none(a.bias)),
        valid(valid_positions(a.valid, input)),
        statistics(dense(a.statistics)),
        grad_input(a.need_input ? empty_result(input, gradient_is_channels_last(input))
                                : empty(input, {&kNone, 1}, input.scalar_type())) {
    if (a.grad_residual) check_written("grad_residual", *a.grad_residual, input);
    call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input, valid);
    call.activation = a.activation, call.slope = a.slope;
    call.training = a.training, call.correction = a.correction;
    if (a.mask && a.mask->numel()) {
      check_mask(*a.mask, mask_size(call.shape));
      if (sign_is_enough(a.activation) && !valid) call.mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
    }
    call.grad_dtype = parameter_dtype(kind, input);
    call.parameters = {call.grad_dtype, data_of(weight), data_of(bias), nullptr, nullptr};
    call.grad_output = grad_output.const_data_ptr(), call.input = input.const_data_ptr();
    call.residual = data_of(residual);
    call.mean = static_cast<const double*>(statistics.const_data_ptr());
    call.grad_input = a.need_input ? grad_input.mutable_data_ptr() : nullptr;
    call.grad_residual = a.grad_residual ? a.grad_residual->mutable_data_ptr() : nullptr;
  }
};

}  // namespace

// The backward of a call, from its input or, as `kept` says, from its output.
std::tuple<Tensor, Tensor, Tensor> backward_of_call(const BackwardArguments& a, const KeptOutput& kept);

}  // namespace cuda
}  // namespace fused_ops

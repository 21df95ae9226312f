// Checks, allocation and launch of the batch-norm ops on a GPU.
//
// A ghost batch is a slice of the batch as it lies in memory, in one layout as in the other: a call of the kernels
// each.
#include <algorithm>
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

// The shape of a ghost batch, and how many bytes of a tensor like the input lie before it.
struct Slice {
  BatchNormShape shape;
  int64_t bytes, mask_bytes;

  Slice(const BatchNormShape& whole, const GhostBatches& ghosts, int64_t i, DType dtype) : shape(whole) {
    const int64_t before = i * ghosts.size;
    shape.batch = ghosts.entries(i);
    if (shape.valid) shape.valid += before * whole.spatial;
    bytes = before * whole.channels * whole.spatial * element_size(dtype);
    BatchNormShape ahead = whole;
    ahead.batch = before, mask_bytes = mask_size(ahead);
  }
};

// Memory for the kernels, whichever ghost batch they run on, and behind it for what is carried between those.
class Memory {
 public:
  Memory(const Tensor& like, const BatchNormShape& s, const GhostBatches& ghosts, DType dtype)
      : kernels_(std::max(batch_norm_scratch(Slice(s, ghosts, 0, dtype).shape),
                          batch_norm_scratch(Slice(s, ghosts, ghosts.count - 1, dtype).shape))),
        count_(ghosts.count),
        memory_(scratch(like, kernels_ + (count_ > 1 ? 2 * s.channels : 0))) {}
  double* scratch_of_kernels() const { return doubles_of(memory_); }
  GhostBatch ghost(int64_t i) const {
    return {i == 0, i == count_ - 1, count_ > 1 ? doubles_of(memory_) + kernels_ : nullptr};
  }

 private:
  int64_t kernels_, count_;
  Tensor memory_;
};

DType parameter_dtype(const std::optional<ScalarType>& kind, const Tensor& input) {
  if (!kind) return float_dtype(kOp, "input", input);
  return *kind == ScalarType::Float    ? DType::float32
         : *kind == ScalarType::Double ? DType::float64
         : *kind == ScalarType::Half   ? DType::float16
                                       : DType::bfloat16;
}

std::tuple<Tensor, Tensor> forward(const ForwardArguments& a) {
  check_forward(a);
  const auto kind = check_parameters(
      a.input,
      {{"running_mean", &a.running_mean}, {"running_var", &a.running_var}, {"weight", &a.weight}, {"bias", &a.bias}});
  const OnDevice device(a.input);
  const Tensor input = is_channels_last(a.input) ? a.input : dense(a.input);
  const MaybeTensor residual = matching("residual", a.residual, input);
  const MaybeTensor running_mean = dense_or_none(a.running_mean), running_var = dense_or_none(a.running_var);
  const MaybeTensor weight = dense_or_none(a.weight), bias = dense_or_none(a.bias);
  const MaybeTensor valid = valid_positions(a.valid, input);

  BatchNormForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input, valid);
  if (a.mask) check_mask(*a.mask, mask_size(call.shape));
  call.activation = a.activation, call.slope = a.slope;
  call.training = a.training, call.momentum = a.momentum, call.eps = a.eps, call.correction = a.correction;
  const GhostBatches ghosts(input.size(0), a.training ? a.groups : 1);
  const int64_t channels = input.size(1), both[] = {2, ghosts.count * channels};
  Tensor output = empty_result(input, is_channels_last(input) || keeps_channels_last_strides(a)),
         statistics = empty(input, {both, 2}, ScalarType::Double);
  const Memory memory(input, call.shape, ghosts, call.dtype);
  call.parameters = {parameter_dtype(kind, input), data_of(weight), data_of(bias), data_of(running_mean),
                     data_of(running_var)};
  call.input = input.const_data_ptr(), call.residual = data_of(residual), call.output = output.mutable_data_ptr();
  call.mask = a.mask ? static_cast<uint8_t*>(a.mask->mutable_data_ptr()) : nullptr;
  call.scratch = memory.scratch_of_kernels();
  call.new_mean = a.updates() ? running_mean->mutable_data_ptr() : nullptr;  // a channel is read before it is written
  call.new_var = a.updates() ? running_var->mutable_data_ptr() : nullptr;
  for (int64_t i = 0; i < ghosts.count; ++i) {
    const Slice slice(call.shape, ghosts, i, call.dtype);
    BatchNormForwardCall part = call;
    part.shape = slice.shape, part.ghost = memory.ghost(i);
    part.input = at(call.input, slice.bytes), part.residual = at(call.residual, slice.bytes);
    part.output = at(call.output, slice.bytes);
    part.mask = call.mask ? call.mask + slice.mask_bytes : nullptr;
    part.mean = doubles_of(statistics) + i * channels, part.invstd = part.mean + ghosts.count * channels;
    check_launch(kOp, batch_norm_forward(part, device.stream()));
  }
  if (a.updates()) write_back(a.running_mean, running_mean), write_back(a.running_var, running_var);
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& a) {
  check_input(a.input);
  const auto kind = check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const int64_t channels = a.input.size(1), none = 0, count = a.need_params ? channels : none;
  const GhostBatches ghosts(a.input.size(0), a.training ? a.groups : 1);
  check_statistics(a.statistics, ghosts.count * channels);
  const OnDevice device(a.input);
  const Tensor input = is_channels_last(a.input) ? a.input : dense(a.input);
  const Tensor grad_output = *matching("grad_output", a.grad_output, input);
  const MaybeTensor residual = matching("residual", a.residual, input);
  const MaybeTensor weight = dense_or_none(a.weight), bias = dense_or_none(a.bias);
  const MaybeTensor valid = valid_positions(a.valid, input);
  const Tensor statistics = dense(a.statistics);
  if (a.grad_residual) check_written("grad_residual", *a.grad_residual, input);

  BatchNormBackwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input, valid);
  call.activation = a.activation, call.slope = a.slope;
  call.training = a.training, call.correction = a.correction;
  if (a.mask && a.mask->numel()) {
    check_mask(*a.mask, mask_size(call.shape));
    if (sign_is_enough(a.activation) && !valid) call.mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
  }
  const ScalarType grad_type = kind ? *kind : input.scalar_type();
  Tensor grad_input = a.need_input ? empty_result(input) : empty(input, {&none, 1}, input.scalar_type());
  Tensor grad_weight = empty(input, {&count, 1}, grad_type), grad_bias = empty(input, {&count, 1}, grad_type);
  const Memory memory(input, call.shape, ghosts, call.dtype);
  call.grad_dtype = parameter_dtype(kind, input);
  call.parameters = {call.grad_dtype, data_of(weight), data_of(bias), nullptr, nullptr};
  call.grad_output = grad_output.const_data_ptr(), call.input = input.const_data_ptr();
  call.residual = data_of(residual);
  call.grad_input = a.need_input ? grad_input.mutable_data_ptr() : nullptr;
  call.grad_residual = a.grad_residual ? a.grad_residual->mutable_data_ptr() : nullptr;
  call.grad_weight = a.need_params ? grad_weight.mutable_data_ptr() : nullptr;
  call.grad_bias = a.need_params ? grad_bias.mutable_data_ptr() : nullptr;
  call.scratch = memory.scratch_of_kernels();
  for (int64_t i = 0; i < ghosts.count; ++i) {
    const Slice slice(call.shape, ghosts, i, call.dtype);
    BatchNormBackwardCall part = call;
    part.shape = slice.shape, part.ghost = memory.ghost(i);
    part.grad_output = at(call.grad_output, slice.bytes), part.input = at(call.input, slice.bytes);
    part.residual = at(call.residual, slice.bytes);
    part.mask = call.mask ? call.mask + slice.mask_bytes : nullptr;
    part.mean = static_cast<const double*>(statistics.const_data_ptr()) + i * channels;
    part.invstd = part.mean + ghosts.count * channels;
    part.grad_input = at(call.grad_input, slice.bytes), part.grad_residual = at(call.grad_residual, slice.bytes);
    check_launch(kOp, batch_norm_backward(part, device.stream()));
  }
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

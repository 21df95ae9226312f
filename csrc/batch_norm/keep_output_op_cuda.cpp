// Batch norm that keeps its output instead of its input, on a GPU: as keep_output_op.cpp.
//
// How many x are stored depends on weight, bias and, with elu, on the output. Only who knows the number can ask for no
// more memory than they take, which is what the output is kept for: so this op, alone of all, reads a number from the
// device, but where a graph is captured. There it makes room for all x, and waits for nothing.
#include <algorithm>
#include <tuple>

#include "batch_norm/calls_cuda.h"

namespace fused_ops {
namespace cuda {
namespace {

// Nothing is stored whatever the values are, if there is no parameter and nothing but a slope that is no subnormal.
bool stores_nothing(const KeepArguments& a, const KeptOptions& o, DType dtype) {
  const double flat = o.activation == Activation::leaky_relu ? std::min(1.0, o.slope) : 1.0;
  return !a.weight && !a.bias && o.activation != Activation::elu && smallest_normal(dtype) / flat <= kMaxAmplification;
}

std::tuple<Tensor, Tensor> keep(const KeepArguments& a) {
  check_input(a.output);
  const KeptOptions o = kept_options(a.activation, a.slope);
  const auto kind = check_parameters(a.output, {{"weight", &a.weight}, {"bias", &a.bias}});
  (void)GhostBatches(a.output.size(0), a.groups);
  const OnDevice device(a.output);
  const Tensor output = is_channels_last(a.output) ? a.output : dense(a.output);
  const Tensor input = *matching("input", a.input, output);
  (void)valid_positions(a.valid, output);
  const MaybeTensor weight = dense_or_none(a.weight), bias = dense_or_none(a.bias);
  const int64_t none = 0, one = 1, values = output.numel();
  KeepCall call{};
  call.dtype = float_dtype(kOp, "output", output), call.shape = shape_of_input(output, MaybeTensor());
  const Tensor nothing = empty(output, {&none, 1}, output.scalar_type());
  if (values == 0 || stores_nothing(a, o, call.dtype)) return {nothing, empty(output, {&none, 1}, ScalarType::Long)};
  call.parameters = {parameter_dtype(kind, output), data_of(weight), data_of(bias), nullptr, nullptr};
  call.activation = o.activation, call.slope = o.slope, call.smallest = smallest_normal(call.dtype);
  call.output = output.const_data_ptr(), call.input = input.const_data_ptr();
  const int64_t size = batch_norm_keep_offsets(call.shape);
  const Tensor offsets = empty(output, {&size, 1}, ScalarType::Long),
               count = empty(output, {&one, 1}, ScalarType::Long);
  const Tensor memory = scratch(output, batch_norm_keep_scratch(call.shape));
  call.offsets = static_cast<int64_t*>(offsets.mutable_data_ptr()), call.scratch = doubles_of(memory);
  call.count = static_cast<int64_t*>(count.mutable_data_ptr());
  check_launch(kOp, batch_norm_keep_mark(call, device.stream()));
  int64_t found = values;
  if (!is_capturing(device.stream())) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(count.get(), &found));
  if (found == 0) return {nothing, empty(output, {&none, 1}, ScalarType::Long)};
  const Tensor stored = empty(output, {&found, 1}, output.scalar_type());
  call.stored = stored.mutable_data_ptr();
  check_launch(kOp, batch_norm_keep_copy(call, device.stream()));
  return {stored, offsets};
}

std::tuple<Tensor, Tensor, Tensor> keep_backward(const KeepBackwardArguments& a) {
  check_input(a.input);
  (void)kept_options(a.code, a.slope);
  check_same_dtype(kOp, "stored", *a.stored, "output", a.input);
  check_dtype(kOp, "offsets", *a.offsets, ScalarType::Long, "int64");
  const BatchNormShape shape = shape_of_input(a.input, MaybeTensor());
  if (a.offsets->numel() || a.stored->numel()) check_numel(kOp, "offsets", *a.offsets, batch_norm_keep_offsets(shape));
  const OnDevice device(a.input);
  const Tensor stored = dense(*a.stored), offsets = dense(*a.offsets);
  KeptOutput kept{};
  kept.from_output = true, kept.smallest = smallest_normal(float_dtype(kOp, "output", a.input));
  kept.offsets = offsets.numel() ? static_cast<const int64_t*>(offsets.const_data_ptr()) : nullptr;
  kept.stored = stored.const_data_ptr(), kept.count = stored.numel(), kept.values = a.input.numel();
  return backward_of_call(a, kept);
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::cuda::keep>(m, "batch_norm_keep");
  implement_struct<&fused_ops::cuda::keep_backward>(m, "batch_norm_keep_backward");
}

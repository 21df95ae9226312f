// The ops of a batch that is spread over processes, on a GPU: as ranks_op.cpp. The kernels are those of a whole batch,
// which stop where the other processes' parts come in.
#include "batch_norm/calls_cuda.h"

namespace fused_ops {
namespace cuda {
namespace {

// (2 + 2 * channels,) float64: how many values of a channel count, how many there are, the means, and M2.
Tensor moments(const MomentsArguments& a) {
  check_input(a.input);
  const OnDevice device(a.input);
  const Tensor input = is_channels_last(a.input) ? a.input : dense(a.input);
  const MaybeTensor valid = valid_positions(a.valid, input);
  BatchNormForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input), call.shape = shape_of_input(input, valid);
  const int64_t size = 2 + 2 * call.shape.channels;
  const Tensor result = empty(input, {&size, 1}, ScalarType::Double);
  const Tensor memory = scratch(input, batch_norm_scratch(call.shape));
  call.training = true, call.input = input.const_data_ptr();
  call.moments = doubles_of(result), call.scratch = doubles_of(memory);
  check_launch(kOp, batch_norm_forward(call, device.stream()));
  return result;
}

Tensor normalise(const NormaliseArguments& a) {
  check_input(a.input);
  const auto kind = check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  if (a.mask && !a.has_mask())
    raise(kOp, ": expected no mask without a residual and relu or leaky_relu, or with valid");
  check_statistics(a.statistics, a.input.size(1));
  const OnDevice device(a.input);
  ForwardOnGpu given(a, kind);
  const Tensor statistics = dense(a.statistics), memory = scratch(given.input, batch_norm_scratch(given.call.shape));
  BatchNormForwardCall& call = given.call;
  call.given = true, call.mean = doubles_of(statistics), call.invstd = call.mean + call.shape.channels;
  call.scratch = doubles_of(memory);
  check_launch(kOp, batch_norm_forward(call, device.stream()));
  return given.output;
}

// The kernels' memory, and what a backward of a part shares.
struct BackwardOfPart : BackwardOnGpu {
  const Tensor memory;

  BackwardOfPart(const BackwardArguments& a, const std::optional<ScalarType>& kind)
      : BackwardOnGpu(a, kind), memory(scratch(input, batch_norm_scratch(call.shape))) {
    call.invstd = call.mean + call.shape.channels, call.scratch = doubles_of(memory);
  }
};

// (2, channels) float64: the sums of h and of h * (x - mean) over this part.
Tensor sums(const SumsArguments& a) {
  check_input(a.input);
  const auto kind = check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  check_statistics(a.statistics, a.input.size(1));
  const OnDevice device(a.input);
  BackwardOfPart given(a, kind);
  const int64_t both[] = {2, a.input.size(1)};
  const Tensor result = empty(given.input, {both, 2}, ScalarType::Double);
  given.call.sums = doubles_of(result);
  check_launch(kOp, batch_norm_backward(given.call, device.stream()));
  return result;
}

// grad_input, of no values if it is not wanted; writes grad_residual.
Tensor gradient(const GradientArguments& a) {
  check_input(a.input);
  const auto kind = check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  check_statistics(a.statistics, a.input.size(1));
  if (a.means) {
    check_dtype(kOp, "means", *a.means, ScalarType::Double, "float64");
    check_numel(kOp, "means", *a.means, 2 * a.input.size(1));
  }
  const OnDevice device(a.input);
  BackwardOfPart given(a, kind);
  const MaybeTensor means = dense_or_none(a.means);
  given.call.means = means ? doubles_of(*means) : nullptr;
  if (a.means || a.grad_residual) check_launch(kOp, batch_norm_backward(given.call, device.stream()));
  return given.grad_input;
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::cuda::moments>(m, "batch_norm_moments");
  implement_struct<&fused_ops::cuda::normalise>(m, "batch_norm_normalise");
  implement_struct<&fused_ops::cuda::sums>(m, "batch_norm_grad_sums");
  implement_struct<&fused_ops::cuda::gradient>(m, "batch_norm_gradient");
}

// Checks, allocation and launch of the batch-norm ops on a GPU.
//
// A ghost batch is a slice of the batch as it lies in memory, in one layout as in the other: a call of the kernels
// each.
#include <algorithm>
#include <tuple>

#include "batch_norm/calls_cuda.h"

namespace fused_ops {
namespace cuda {
namespace {

// The shape of a ghost batch, and how many values, and bytes, of a tensor like the input lie before it.
struct Slice {
  BatchNormShape shape;
  int64_t values, bytes, mask_bytes;

  Slice(const BatchNormShape& whole, const GhostBatches& ghosts, int64_t i, DType dtype) : shape(whole) {
    const int64_t before = i * ghosts.size;
    shape.batch = ghosts.entries(i);
    if (shape.valid) shape.valid += before * whole.spatial;
    values = before * whole.channels * whole.spatial, bytes = values * element_size(dtype);
    BatchNormShape ahead = whole;
    ahead.batch = before, mask_bytes = mask_size(ahead);
  }
};

// Memory for the kernels, whichever ghost batch they run on, none if they are packed; and behind it for what is carried
// between those.
class Memory {
 public:
  Memory(const Tensor& like, const BatchNormShape& s, const GhostBatches& ghosts, DType dtype, bool packed)
      : kernels_(packed ? 0
                        : std::max(batch_norm_scratch(Slice(s, ghosts, 0, dtype).shape),
                                   batch_norm_scratch(Slice(s, ghosts, ghosts.count - 1, dtype).shape))),
        count_(ghosts.count) {
    const int64_t size = kernels_ + (count_ > 1 ? 2 * s.channels : 0);
    if (size > 0) memory_ = fused_ops::cuda::scratch(like, size);
  }
  double* scratch() const { return memory_ ? doubles_of(*memory_) : nullptr; }
  GhostBatch ghost(int64_t i) const { return {i == 0, i == count_ - 1, count_ > 1 ? scratch() + kernels_ : nullptr}; }

 private:
  int64_t kernels_, count_;
  MaybeTensor memory_;
};

std::tuple<Tensor, Tensor> forward(const ForwardArguments& a) {
  check_forward(a);
  const auto kind = check_parameters(
      a.input,
      {{"running_mean", &a.running_mean}, {"running_var", &a.running_var}, {"weight", &a.weight}, {"bias", &a.bias}});
  const OnDevice device(a.input);
  ForwardOnGpu given(a, kind);
  const MaybeTensor running_mean = dense_or_none(a.running_mean), running_var = dense_or_none(a.running_var);
  const GhostBatches ghosts(a.input.size(0), a.training ? a.groups : 1);
  const int64_t channels = a.input.size(1), both[] = {2, ghosts.count * channels};
  const Tensor statistics = empty(given.input, {both, 2}, ScalarType::Double);
  BatchNormForwardCall& call = given.call;
  call.parameters.running_mean = data_of(running_mean), call.parameters.running_var = data_of(running_var);
  call.new_mean = a.updates() ? running_mean->mutable_data_ptr() : nullptr;  // a channel is read before it is written
  call.new_var = a.updates() ? running_var->mutable_data_ptr() : nullptr;
  const Slice largest(call.shape, ghosts, 0, call.dtype);
  call.packed = batch_norm_is_packed(largest.shape, call.dtype, call.mask != nullptr);
  const Memory memory(given.input, call.shape, ghosts, call.dtype, call.packed);
  call.scratch = memory.scratch();
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
  return {given.output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& a) { return backward_of_call(a, {}); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> backward_of_call(const BackwardArguments& a, const KeptOutput& kept) {
  check_input(a.input);
  const auto kind = check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const int64_t channels = a.input.size(1), count = a.need_params ? channels : 0;
  const GhostBatches ghosts(a.input.size(0), a.training ? a.groups : 1);
  check_statistics(a.statistics, ghosts.count * channels);
  const OnDevice device(a.input);
  BackwardOnGpu given(a, kind);
  BatchNormBackwardCall& call = given.call;
  const ScalarType type = kind ? *kind : a.input.scalar_type();
  const Tensor grad_weight = empty(given.input, {&count, 1}, type), grad_bias = empty(given.input, {&count, 1}, type);
  call.grad_weight = a.need_params ? grad_weight.mutable_data_ptr() : nullptr;
  call.grad_bias = a.need_params ? grad_bias.mutable_data_ptr() : nullptr;
  const Slice largest(call.shape, ghosts, 0, call.dtype);
  call.packed = !kept.from_output && batch_norm_is_packed(largest.shape, call.dtype, false);
  const Memory memory(given.input, call.shape, ghosts, call.dtype, call.packed);
  call.scratch = memory.scratch(), call.kept = kept;
  for (int64_t i = 0; i < ghosts.count; ++i) {
    const Slice slice(call.shape, ghosts, i, call.dtype);
    BatchNormBackwardCall part = call;
    part.shape = slice.shape, part.ghost = memory.ghost(i);
    part.grad_output = at(call.grad_output, slice.bytes), part.input = at(call.input, slice.bytes);
    part.residual = at(call.residual, slice.bytes);
    part.mask = call.mask ? call.mask + slice.mask_bytes : nullptr;
    part.mean = call.mean + i * channels, part.invstd = part.mean + ghosts.count * channels;
    part.kept.origin = slice.values;
    part.grad_input = at(call.grad_input, slice.bytes), part.grad_residual = at(call.grad_residual, slice.bytes);
    check_launch(kOp, batch_norm_backward(part, device.stream()));
  }
  return {given.grad_input, grad_weight, grad_bias};
}

}  // namespace cuda
}  // namespace fused_ops

FUSED_OPS_LIBRARY_IMPL(FUSED_OPS_CUDA_LIBRARY, FUSED_OPS_CUDA_KEY, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::cuda::forward>(m, "batch_norm_forward");
  implement_struct<&fused_ops::cuda::backward>(m, "batch_norm_backward");
  implement_struct<&fused_ops::cuda::forward, PlainForwardArguments>(m, "batch_norm_plain_forward");
  implement_struct<&fused_ops::cuda::backward, PlainBackwardArguments>(m, "batch_norm_plain_backward");
}

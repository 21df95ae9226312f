// Checks, allocation and launch of the cross-entropy ops on a GPU; the schemas are in cross_entropy.cpp.
//
// Nothing here waits for the device: the count of rows and the upstream gradient stay there, and a target out of range
// is an error of the device, as in PyTorch.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/cross_entropy.h"
#include "cuda_device.h"

namespace fused_ops {
namespace cuda {
namespace {

constexpr const char* kOp = "cross_entropy";

TargetType target_type(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Long: return TargetType::int64;
    case ScalarType::Int: return TargetType::int32;
    case ScalarType::Short: return TargetType::int16;
    case ScalarType::Char: return TargetType::int8;
    case ScalarType::Byte: return TargetType::uint8;
    default:
      raise(kOp, ": target must hold class indices of dtype int64, int32, int16, int8 or uint8, got dtype code ",
            static_cast<int>(target.scalar_type()));
  }
}

// True if the dimensions from 2 on can be walked as one with a single stride.
bool spatial_is_one_dim(const Tensor& t) {
  for (int64_t d = t.dim() - 2; d >= 2; --d)
    if (t.size(d) != 1 && t.stride(d) != t.stride(d + 1) * t.size(d + 1)) return false;
  return true;
}

RowLayout layout_of(const Tensor& t) {
  if (t.dim() == 1) return {1, 1, t.size(0), 0, 0, t.stride(0)};
  RowLayout l{t.size(0), 1, t.size(1), t.stride(0), 0, t.stride(1)};
  for (int64_t d = 2; d < t.dim(); ++d) l.spatial *= t.size(d);
  if (t.dim() > 2) l.spatial_stride = t.stride(t.dim() - 1);
  if (l.spatial == 1 && l.batch_stride == 1 && l.class_stride != 1)  // a transposed matrix: its rows are adjacent
    std::swap(l.batch, l.spatial), std::swap(l.batch_stride, l.spatial_stride);
  return l;
}

void check(const Tensor& input, const Tensor& target, int64_t reduction) {
  if (input.dim() == 0) raise(kOp, ": input must have at least one dimension (classes), got a scalar");
  if (reduction < 0 || reduction > 2) raise(kOp, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  check_on_gpu(kOp, "input", input);
  check_beside(kOp, "target", target, input);
  bool fits = target.dim() == std::max<int64_t>(input.dim() - 1, 0);
  for (int64_t d = 0; fits && d < target.dim(); ++d) fits = target.size(d) == input.size(d == 0 ? 0 : d + 1);
  if (!fits)
    raise(kOp, ": target must have the shape of input without its class dimension; input ", shape_of(input),
          ", target ", shape_of(target));
}

// Whether no two elements share memory, for the layouts that can be walked in place.
bool each_element_alone(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < reach) return false;
    reach = stride * size;
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input_, const Tensor& target_, int64_t ignore_index,
                                           int64_t reduction) {
  check(input_, target_, reduction);
  const OnDevice device(input_);
  const Tensor input = spatial_is_one_dim(input_) ? input_ : dense(input_), target = dense(target_);
  ForwardCall call{};
  call.dtype = float_dtype(kOp, "input", input);
  call.layout = layout_of(input);
  call.reduction = static_cast<Reduction>(reduction);
  call.targets = {target.const_data_ptr(), target_type(target), ignore_index};

  const torch::headeronly::IntHeaderOnlyArrayRef scalar_shape{};
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
  check(input_, target_, reduction);
  check_beside(kOp, "grad_loss", grad_loss_, input_);
  check_beside(kOp, "lse", lse_, input_);
  check_beside(kOp, "total", total, input_);
  check_same_dtype(kOp, "grad_loss", grad_loss_, "input", input_);
  check_dtype(kOp, "lse", lse_, ScalarType::Double, "float64");
  check_dtype(kOp, "total", total, ScalarType::Double, "float64");
  check_same_shape(kOp, "lse", lse_, "target", target_);
  check_numel(kOp, "total", total, 1);
  const auto mode = static_cast<Reduction>(reduction);
  if (mode == Reduction::none)
    check_same_shape(kOp, "grad_loss", grad_loss_, "target", target_);
  else
    check_numel(kOp, "grad_loss", grad_loss_, 1);
  if (in_place && !(spatial_is_one_dim(input_) && (input_.numel() == 0 || each_element_alone(input_))))
    raise(kOp,
          ": inplace_backward needs logits whose elements do not share memory, and whose dimensions behind the "
          "classes are dense, got shape ",
          shape_of(input_));

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
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cuda::forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cuda::backward_fresh));
  m.impl("cross_entropy_backward_", TORCH_BOX(&fused_ops::cuda::backward_in_place));
}

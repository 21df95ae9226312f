// A small head: its product, loss and gradients in one call, as calls are what it costs.
//
// logits = input linear_weight^T + linear_bias; the loss of class indices, reduced; the logits become their gradient
// for an upstream gradient of 1, of which the head's gradients are products. The products are PyTorch's.
// Memory: one copy of the logits. See docs/linear_cross_entropy.md.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <tuple>

#include "core/border.h"
#include "cross_entropy/passes.h"

namespace fused_ops {
namespace {

constexpr const char* kHere = "linear_cross_entropy";
enum Needs : int64_t { kInput = 1, kWeight = 2, kBias = 4 };

// A matrix seen the other way round. torch::stable::transpose takes the boxed dispatcher.
Tensor transposed(const Tensor& t) {
  const int64_t sizes[2] = {t.size(1), t.size(0)}, strides[2] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle = nullptr;  // the offset is counted from the tensor's own
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

Tensor matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns};
  return empty(like, {sizes, 2}, like.scalar_type());
}

Tensor product(const Tensor& left, const Tensor& right) {
  Tensor out = matrix(left, left.size(0), right.size(1));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  return out;
}

void check_head(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
                int64_t reduction) {
  float_dtype(kHere, "input", input);
  check_same_dtype(kHere, "linear_weight", weight, "input", input);
  if (input.dim() != 2 || weight.dim() != 2 || input.size(1) != weight.size(1))
    raise(kHere, ": expected input (rows, in_features) and linear_weight (classes, in_features), got ", shape_of(input),
          " and ", shape_of(weight));
  if (target.dim() != 1 || target.size(0) != input.size(0))
    raise(kHere, ": expected a target of each of ", input.size(0), " rows, got shape ", shape_of(target));
  if (reduction != 1 && reduction != 2) raise(kHere, ": reduction must be 1 (mean) or 2 (sum), got ", reduction);
  if (!bias) return;
  check_same_dtype(kHere, "linear_bias", *bias, "input", input);
  if (bias->dim() != 1 || bias->size(0) != weight.size(0))
    raise(kHere, ": linear_bias must have the shape [", weight.size(0), "], got ", shape_of(*bias));
}

// Writes the loss; with `gradient` the logits become theirs.
void reduce(Tensor logits, const Tensor& target, int64_t ignore_index, Reduction mode, Tensor loss, bool gradient) {
  const RowLayout layout = layout_of(logits);
  const Targets targets{target.const_data_ptr(), target_type(target), ignore_index};
  const BlockResult found =
      forward_then_backward({float_dtype(kHere, "input", logits), logits.const_data_ptr(), layout, targets, nullptr,
                             nullptr, nullptr, 0, 1, gradient ? logits.mutable_data_ptr() : nullptr, layout},
                            rows_per_block(layout), target, mode);
  write_scalar(loss, found.loss_sum / denominator(found, mode));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_small(const Tensor& input, const Tensor& weight,
                                                                      const std::optional<Tensor>& bias,
                                                                      const Tensor& target_, int64_t ignore_index,
                                                                      int64_t reduction, int64_t needs) {
  check_head(input, weight, bias, target_, reduction);
  const Tensor target = dense(target_);
  Tensor loss = empty(input, {}, input.scalar_type());
  Tensor z = matrix(input, input.size(0), weight.size(0));
  const Tensor columns = transposed(weight);
  if (bias) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(z.get(), bias->get(), input.get(), columns.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(z.get(), input.get(), columns.get()));
  }
  reduce(z, target, ignore_index, static_cast<Reduction>(reduction), loss, needs != 0);
  const int64_t none[1] = {0};
  const auto nothing = [&] { return empty(input, {none, 1}, input.scalar_type()); };
  Tensor grad_input = needs & kInput ? product(z, weight) : nothing();
  Tensor grad_weight = needs & kWeight ? product(transposed(z), input) : nothing();
  const int64_t rows[1] = {0};
  Tensor grad_bias =
      bias && needs & kBias ? torch::stable::sum(z, torch::headeronly::IntHeaderOnlyArrayRef{rows, 1}) : nothing();
  return {loss, grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  fused_ops::define(
      m,
      "linear_cross_entropy_small(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
      "int ignore_index, int reduction, int needs) -> (Tensor loss, Tensor grad_input, Tensor grad_weight, "
      "Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  fused_ops::implement<&fused_ops::linear_cross_entropy_small>(m, "linear_cross_entropy_small");
}

// Checks and dispatch of the raw ops between linear cross-entropy's matrix products, and of the one that is a small
// head.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cross_entropy/on_cpu.h"
#include "linear_cross_entropy/arguments.h"

namespace fused_ops {
namespace {

RowResults linear_cross_entropy_chunk_(const ChunkArguments& a) {
  const Tensor& logits = a.tensors.input;
  if (a.row_scale) check_in_place(logits);
  const Prepared p(a.tensors, a.options);
  RowOutputs outputs(p);
  MaybeTensor scale;
  LinearCrossEntropyChunk args{};
  args.forward = outputs.forward(p);
  args.row_scale = row_values("row_scale", a.row_scale, p, scale);
  args.z_loss = a.z_loss;
  MaybeTensor grad_lse;
  if (args.row_scale) {
    if (p.indices) check_targets(p.rows, p.indices->numel(), *p.indices);
    if (a.z_loss != 0) {
      grad_lse = empty(logits, outputs.lse.sizes(), ScalarType::Double);
      args.grad_lse = static_cast<double*>(grad_lse->mutable_data_ptr());
    }
    args.backward.rows = p.rows;
    args.backward.grad_nll = args.row_scale, args.backward.grad_lse = args.grad_lse;
    args.backward.lse = args.forward.lse, args.backward.mass = args.forward.mass;
    args.backward.grad_logits = logits.mutable_data_ptr();
    args.backward.grad_layout = p.rows.layout;
  }
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_chunk);
  over_rows(p, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
  return outputs.all();
}

// Uninitialised memory for logits or a gradient, in huge pages where it is large.
Tensor linear_cross_entropy_buffer(const BufferArguments& a) {
  if (a.rows < 0 || a.columns < 0)
    raise(kHead, ": rows and columns must not be negative, got ", a.rows, " and ", a.columns);
  const int64_t shape[2] = {a.rows, a.columns};
  const Tensor t = empty(a.like, {shape, 2}, a.like.scalar_type());
  advise_huge(t.mutable_data_ptr(), t.numel() * element_size(float_dtype(kHead, "like", t)));
  return t;
}

// The tile; a target that is none of all classes raises.
LinearCrossEntropyTile readable_tile(const TileArguments& a) {
  const LinearCrossEntropyTile tile = a.tile();
  for (int64_t r = 0; r < tile.rows; ++r)
    if (tile.target[r] < 0 || tile.target[r] >= a.classes) raise_bad_target(a.target, r);
  return tile;
}

void linear_cross_entropy_tile_sums_(const TileSums& a) {
  const LinearCrossEntropyTile tile = readable_tile(a);
  const LinearCrossEntropySums sums = a.sums();
  constexpr int64_t kRows = 32;  // a cache line of 16-bit logits: as little as a thread may take
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_tile_sums);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(tile.classes, 1) / kRows);
  torch::stable::parallel_for(0, (tile.rows + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
    kernel(tile, sums, begin * kRows, std::min(end * kRows, tile.rows));
  });
}

void linear_cross_entropy_tile_grads_(const TileGrads& a) {
  LinearCrossEntropyTile tile = readable_tile(a);
  tile.logits = a.logits.mutable_data_ptr();
  const LinearCrossEntropyGrads grads = a.grads();
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_tile_grads);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(tile.rows, 1));
  torch::stable::parallel_for(0, tile.classes, grain,
                              [&](int64_t begin, int64_t end) { kernel(tile, grads, begin, end); });
}

void linear_cross_entropy_add_(const AddArguments& a) {
  const auto& [sum, part] = a;
  check_dtype(kHead, "sum", sum, ScalarType::Float, "float32");
  check_numel(kHead, "part", part, sum.numel());
  const DType dtype = float_dtype(kHead, "part", part);
  if (element_size(dtype) != 2) raise(kHead, ": part must be bfloat16 or float16");
  if (!sum.is_contiguous() || !part.is_contiguous()) raise(kHead, ": sum and part must be contiguous");
  float* to = static_cast<float*>(sum.mutable_data_ptr());
  const void* from = part.const_data_ptr();
  const auto kernel = FUSED_OPS_SELECT(linear_cross_entropy_add);
  torch::stable::parallel_for(0, sum.numel(), kGrainElements,
                              [&](int64_t begin, int64_t end) { kernel(to, from, dtype, begin, end); });
}

// ---- a small head: its product, loss and gradients in one call, as calls are what it costs
//
// logits = input linear_weight^T + linear_bias; the loss of class indices, reduced; the logits become their gradient
// for an upstream gradient of 1, of which the head's gradients are products. The products are PyTorch's.
// Memory: one copy of the logits. See docs/linear_cross_entropy.md.

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

void check_head(const HeadArguments& a) {
  const auto& [input, weight, bias, target, ignore_index, reduction, needs] = a;
  float_dtype(kHead, "input", input);
  check_same_dtype(kHead, "linear_weight", weight, "input", input);
  if (input.dim() != 2 || weight.dim() != 2 || input.size(1) != weight.size(1))
    raise(kHead, ": expected input (rows, in_features) and linear_weight (classes, in_features), got ", shape_of(input),
          " and ", shape_of(weight));
  if (target.dim() != 1 || target.size(0) != input.size(0))
    raise(kHead, ": expected a target of each of ", input.size(0), " rows, got shape ", shape_of(target));
  if (reduction != 1 && reduction != 2) raise(kHead, ": reduction must be 1 (mean) or 2 (sum), got ", reduction);
  if (!bias) return;
  check_same_dtype(kHead, "linear_bias", *bias, "input", input);
  if (bias->dim() != 1 || bias->size(0) != weight.size(0))
    raise(kHead, ": linear_bias must have the shape [", weight.size(0), "], got ", shape_of(*bias));
}

// Writes the loss; where a gradient is needed, the logits become theirs.
void reduce(const HeadArguments& a, Tensor logits, const Tensor& target, Tensor loss) {
  const CrossEntropyRows rows = index_rows(logits, target, a.ignore_index);
  const auto mode = static_cast<Reduction>(a.reduction);
  void* gradient = a.needs != 0 ? logits.mutable_data_ptr() : nullptr;
  const BlockResult found =
      forward_then_backward(rows, gradient, rows.layout, rows_per_block(rows.layout), target, mode);
  write_scalar(loss, found.loss_sum / denominator(found, mode));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_small(const HeadArguments& a) {
  check_head(a);
  const Tensor target = dense(a.target);
  Tensor loss = empty(a.input, {}, a.input.scalar_type());
  Tensor z = matrix(a.input, a.input.size(0), a.linear_weight.size(0));
  const Tensor columns = transposed(a.linear_weight);
  if (a.linear_bias) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(z.get(), a.linear_bias->get(), a.input.get(), columns.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(z.get(), a.input.get(), columns.get()));
  }
  reduce(a, z, target, loss);
  const int64_t none[1] = {0};
  const auto nothing = [&] { return empty(a.input, {none, 1}, a.input.scalar_type()); };
  Tensor grad_input = a.needs & kInput ? product(z, a.linear_weight) : nothing();
  Tensor grad_weight = a.needs & kWeight ? product(transposed(z), a.input) : nothing();
  const int64_t rows[1] = {0};
  Tensor grad_bias =
      a.linear_bias && a.needs & kBias ? torch::stable::sum(z, IntHeaderOnlyArrayRef{rows, 1}) : nothing();
  return {loss, grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  using namespace fused_ops;
  implement_struct<&linear_cross_entropy_chunk_>(m, "linear_cross_entropy_chunk_");
  implement_struct<&linear_cross_entropy_buffer>(m, "linear_cross_entropy_buffer");
  implement_struct<&linear_cross_entropy_tile_sums_>(m, "linear_cross_entropy_tile_sums_");
  implement_struct<&linear_cross_entropy_tile_grads_>(m, "linear_cross_entropy_tile_grads_");
  implement_struct<&linear_cross_entropy_add_>(m, "linear_cross_entropy_add_");
  implement_struct<&linear_cross_entropy_small>(m, "linear_cross_entropy_small");
}

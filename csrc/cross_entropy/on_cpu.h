// The CPU's cross-entropy over all rows of a tensor: the memory beside the arguments, and the parallel loops.
#pragma once
#include <atomic>
#include <vector>

#include "cross_entropy/arguments.h"

namespace fused_ops {

inline int64_t rows_per_block(const RowLayout& l) {
  return std::clamp<int64_t>(kGrainElements / std::max<int64_t>(l.classes, 1), 1, 1024);
}

inline int64_t target_value(const Tensor& target, int64_t row) {
  const void* p = target.const_data_ptr();
  switch (target_type(target)) {
    case TargetType::int64: return static_cast<const int64_t*>(p)[row];
    case TargetType::int32: return static_cast<const int32_t*>(p)[row];
    case TargetType::int16: return static_cast<const int16_t*>(p)[row];
    case TargetType::int8: return static_cast<const int8_t*>(p)[row];
    case TargetType::uint8: return static_cast<const uint8_t*>(p)[row];
  }
  return -1;
}

[[noreturn]] inline void raise_bad_target(const Tensor& target, int64_t row) {
  raise_index_error("Target ", target_value(target, row), " is out of bounds.");
}

// Before a gradient is written over its logits: nothing may be if any target is bad.
inline void check_targets(const CrossEntropyRows& rows, int64_t count, const Tensor& indices) {
  const int64_t bad = FUSED_OPS_SELECT(cross_entropy_bad_target)(rows.indices, 0, count, rows.layout.classes);
  if (bad >= 0) raise_bad_target(indices, bad);
}

// A channels_last gradient for channels_last logits, else a contiguous one.
inline Tensor grad_like(const Tensor& input) {
  if (is_channels_last(input)) return empty_huge(kOp, input, input.strides());
  int64_t strides[kMaxDims], next = 1;
  for (int64_t d = input.dim(); d-- > 0;) {
    strides[d] = next;
    next *= std::max<int64_t>(input.size(d), 1);
  }
  return empty_huge(kOp, input, {strides, static_cast<size_t>(input.dim())});
}

// ---- class indices alone

inline CrossEntropyRows index_rows(const Tensor& input, const Tensor& target, int64_t ignore_index) {
  CrossEntropyRows rows;
  rows.dtype = float_dtype(kOp, "input", input);
  rows.logits = input.const_data_ptr(), rows.layout = layout_of(input);
  rows.indices = {target.const_data_ptr(), target_type(target), ignore_index};
  return rows;
}

// The forward in parallel blocks of rows; raises for a bad target.
inline BlockResult forward_in_blocks(const CrossEntropyForward& args, int64_t block_rows, const Tensor& target) {
  const int64_t rows = args.rows.layout.rows(), blocks = (rows + block_rows - 1) / block_rows;
  std::vector<BlockResult> results(static_cast<size_t>(blocks));
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_forward);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      results[static_cast<size_t>(b)] = kernel(args, b * block_rows, std::min((b + 1) * block_rows, rows));
  });
  BlockResult sum{0, 0, -1};
  for (const BlockResult& r : results) {  // in block order: the same sum for any number of threads
    if (r.bad_row >= 0) raise_bad_target(target, r.bad_row);
    sum.loss_sum += r.loss_sum;
    sum.count += r.count;
  }
  return sum;
}

// The backward in parallel; raises for a bad target.
inline void backward_in_blocks(const CrossEntropyBackward& args, int64_t block_rows, const Tensor& target) {
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_backward);
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(0, args.rows.layout.rows(), block_rows, [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(args, begin, end);
    if (bad >= 0) bad_row = bad;
  });
  if (bad_row >= 0) raise_bad_target(target, bad_row);
}

// What the sum of the losses is divided by.
inline double denominator(const BlockResult& found, Reduction mode) {
  return mode == Reduction::mean ? static_cast<double>(found.count) : 1;
}

// The forward and, if there is memory for it, the gradient of the mean or sum for an upstream gradient of 1: in
// `grad_logits`, which may be the logits.
inline BlockResult forward_then_backward(const CrossEntropyRows& rows, void* grad_logits, const RowLayout& grad_layout,
                                         int64_t block_rows, const Tensor& target, Reduction mode) {
  std::vector<double> lse(static_cast<size_t>(rows.layout.rows()));
  CrossEntropyForward forward{};
  forward.rows = rows, forward.lse = lse.data();
  const BlockResult found = forward_in_blocks(forward, block_rows, target);
  if (grad_logits == nullptr) return found;
  CrossEntropyBackward backward{};
  backward.rows = rows, backward.lse = lse.data(), backward.scale = 1 / denominator(found, mode);
  backward.grad_logits = grad_logits, backward.grad_layout = grad_layout;
  backward_in_blocks(backward, block_rows, target);
  return found;
}

// ---- the rows' ops

inline std::vector<double> doubles(const Tensor& t_) {
  const Tensor t = dense(t_);
  std::vector<double> values(static_cast<size_t>(t.numel()));
  const auto copy = [&](const auto* from) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(static_cast<float>(from[i]));
  };
  switch (float_dtype(kOp, "values", t)) {
    case DType::float32: copy(static_cast<const float*>(t.const_data_ptr())); break;
    case DType::bfloat16: copy(static_cast<const c10::BFloat16*>(t.const_data_ptr())); break;
    case DType::float16: copy(static_cast<const c10::Half*>(t.const_data_ptr())); break;
    case DType::float64: {
      const double* from = static_cast<const double*>(t.const_data_ptr());
      std::copy(from, from + values.size(), values.begin());
    }
  }
  return values;
}

// Values in the accumulator of the logits' dtype.
struct Accumulators {
  std::vector<float> floats;
  std::vector<double> doubles;

  const void* set(const std::vector<double>& values, DType dtype) {
    if (dtype == DType::float64) return (doubles = values).data();
    floats.assign(values.begin(), values.end());
    return floats.data();
  }
};

// The rows' arguments, with the memory that they need beside them.
struct Prepared : RowArguments {
  std::vector<double> sparse;
  Accumulators weight, smoothing;
  MaybeTensor allowed;  // of a shard

  Prepared(const RowTensors& t, const RowOptions& o) : RowArguments(t, o) { prepare(t); }
  Prepared(const RowTensors& t, const RowOptions& o, const Tensor& allowed_of_all, int64_t first_class)
      : RowArguments(t, o) {
    rows.shard = true, rows.first_class = first_class;
    check_dtype(kOp, "allowed", allowed_of_all, ScalarType::Double, "float64");
    const bool each = rows.row_masks && rows.label_smoothing != 0;
    if (each)
      rows.allowed = row_values("allowed", allowed_of_all, *this, allowed);
    else if (rows.label_smoothing != 0)
      check_numel(kOp, "allowed", allowed_of_all, 1), allowed = allowed_of_all;
    prepare(t);
  }

 private:
  void prepare(const RowTensors& t) {
    if (indices && probabilities) {
      sparse = doubles(*probabilities);
      sparse.resize(std::max<size_t>(sparse.size(), 1));  // a pointer even to none
      rows.sparse = sparse.data();
    }
    take_weight(t.weight);
  }

  void take_weight(const MaybeTensor& t) {
    std::vector<double> values;
    if (t) {
      values = doubles(*t);
      rows.class_weight = weight.set(values, rows.dtype);
    }
    if (rows.label_smoothing == 0 || rows.row_masks) return;
    const size_t n = static_cast<size_t>(classes());
    const uint8_t* m = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    const int64_t stride = mask ? mask->stride(0) : 0;
    int64_t count = allowed ? static_cast<int64_t>(scalar_value(*allowed)) : 0;
    for (size_t c = 0; !allowed && c < n; ++c) count += !m || m[static_cast<int64_t>(c) * stride];
    const double share = rows.label_smoothing / static_cast<double>(std::max<int64_t>(count, 1));
    std::vector<double> spread(std::max<size_t>(n, 1));
    for (size_t c = 0; c < n; ++c)
      spread[c] = !m || m[static_cast<int64_t>(c) * stride] ? share * (t ? values[c] : 1.0) : 0.0;
    rows.smoothing_weight = smoothing.set(spread, rows.dtype);
  }
};

[[noreturn]] inline void raise_bad_row(const RowArguments& p, int64_t row) {
  const int64_t step = p.rows.index_spatial, first = row / step * step * p.rows.per_row + row % step;
  for (int64_t k = 0; k < p.rows.per_row; ++k) {
    const int64_t t = target_value(*p.indices, first + k * step);
    if (t != p.rows.indices.ignore_index && (t < 0 || t >= p.classes())) raise_bad_target(*p.indices, first + k * step);
  }
  raise(kOp, ": a target changed while it was read");
}

// Runs kernel(begin, end) over all rows; raises for the first row with a bad target.
template <class Kernel>
void over_rows(const Prepared& p, const Kernel& kernel) {
  constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> bad_row{kNone};
  torch::stable::parallel_for(0, p.rows.layout.rows(), rows_per_block(p.rows.layout), [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(begin, end);
    if (bad < 0) return;
    int64_t seen = bad_row;
    while (bad < seen && !bad_row.compare_exchange_weak(seen, bad)) {
    }
  });
  if (bad_row != kNone) raise_bad_row(p, bad_row);
}

}  // namespace fused_ops

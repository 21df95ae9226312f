// Logits, targets and gradients as the cross-entropy ops' checking files see them.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "core/checks.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {

constexpr const char* kOp = "cross_entropy";
constexpr int64_t kGrainElements = 32768;  // logits per task: below this a second thread costs more than it saves

inline TargetType target_type(const Tensor& target) {
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
inline bool spatial_is_one_dim(const Tensor& t) {
  for (int64_t d = t.dim() - 2; d >= 2; --d)
    if (t.size(d) != 1 && t.stride(d) != t.stride(d + 1) * t.size(d + 1)) return false;
  return true;
}

inline RowLayout plain_layout_of(const Tensor& t) {
  if (t.dim() == 1) return {1, 1, t.size(0), 0, 0, t.stride(0)};
  RowLayout l{t.size(0), 1, t.size(1), t.stride(0), 0, t.stride(1)};
  for (int64_t d = 2; d < t.dim(); ++d) l.spatial *= t.size(d);
  if (t.dim() > 2) l.spatial_stride = t.stride(t.dim() - 1);
  return l;
}

inline RowLayout layout_of(const Tensor& t) {
  RowLayout l = plain_layout_of(t);
  if (t.dim() > 1 && l.spatial == 1 && l.batch_stride == 1 &&
      l.class_stride != 1)  // a transposed matrix: its rows are adjacent
    std::swap(l.batch, l.spatial), std::swap(l.batch_stride, l.spatial_stride);
  return l;
}

inline void check_input_and_target(const Tensor& input, const Tensor& target, int64_t reduction) {
  if (input.dim() == 0) raise(kOp, ": input must have at least one dimension (classes), got a scalar");
  if (reduction < 0 || reduction > 2) raise(kOp, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  bool fits = target.dim() == std::max<int64_t>(input.dim() - 1, 0);
  for (int64_t d = 0; fits && d < target.dim(); ++d) fits = target.size(d) == input.size(d == 0 ? 0 : d + 1);
  if (!fits)
    raise(kOp, ": target must have the shape of input without its class dimension; input ", shape_of(input),
          ", target ", shape_of(target));
}

// What the backward takes besides.
inline void check_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& lse,
                           const Tensor& total, int64_t reduction) {
  check_same_dtype(kOp, "grad_loss", grad_loss, "input", input);
  check_dtype(kOp, "lse", lse, ScalarType::Double, "float64");
  check_dtype(kOp, "total", total, ScalarType::Double, "float64");
  check_same_shape(kOp, "lse", lse, "target", target);
  check_numel(kOp, "total", total, 1);
  if (static_cast<Reduction>(reduction) == Reduction::none)
    check_same_shape(kOp, "grad_loss", grad_loss, "target", target);
  else
    check_numel(kOp, "grad_loss", grad_loss, 1);
}

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

// Whether no two elements share memory, for the layouts that can be walked in place.
inline bool each_element_alone(const Tensor& t) {
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

inline void check_in_place(const Tensor& input) {
  if (spatial_is_one_dim(input) && (input.numel() == 0 || each_element_alone(input))) return;
  raise(kOp,
        ": inplace_backward needs logits whose elements do not share memory, and whose dimensions behind the "
        "classes are dense, got shape ",
        shape_of(input));
}

}  // namespace fused_ops

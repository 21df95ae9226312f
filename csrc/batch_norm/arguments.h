// What the batch-norm ops need of tensors: their layout as the kernels see it, parameters as doubles, scratch memory.
#pragma once
#include <initializer_list>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "batch_norm/kernels.h"
#include "core/checks.h"

namespace fused_ops {

constexpr const char* kOp = "batch_norm";
constexpr int64_t kGrainValues = 16384;    // per task: below this a second thread costs more than it saves
constexpr int64_t kSmallPlane = 64;        // planes up to this many values are walked as columns,
constexpr int64_t kSmallMaskedPlane = 32;  // and up to this many where there is a mask: its layout is the ops' contract

using MaybeTensor = std::optional<Tensor>;

// n values on the stack if they are at most kInline, else on the heap; uninitialised.
template <class T, int64_t kInline>
class Scratch {
 public:
  explicit Scratch(int64_t n) : heap_(n > kInline ? new T[static_cast<size_t>(n)] : nullptr) {}
  T* data() { return heap_ ? heap_.get() : inline_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  std::unique_ptr<T[]> heap_;
  T inline_[kInline];
};

// The values of an optional parameter as doubles.
class Values {
 public:
  Values(const MaybeTensor& t, double missing) : missing_(missing) {
    if (!t) return;
    owner_ = dense(*t);
    data_ = owner_->const_data_ptr();
    type_ = owner_->scalar_type();
  }
  double operator[](int64_t i) const {
    if (!data_) return missing_;
    switch (type_) {
      case ScalarType::Float: return static_cast<const float*>(data_)[i];
      case ScalarType::Double: return static_cast<const double*>(data_)[i];
      case ScalarType::BFloat16: return static_cast<float>(static_cast<const c10::BFloat16*>(data_)[i]);
      default: return static_cast<float>(static_cast<const c10::Half*>(data_)[i]);
    }
  }

 private:
  MaybeTensor owner_;
  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  double missing_;
};

// Every second of the 2 n values at `from` into the n elements of t, rounded once.
inline void set_every_second(const Tensor& t, const double* from, int64_t n) {
  const auto write = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(T) == 2)
        to[i] = static_cast<float>(from[2 * i]);
      else
        to[i] = static_cast<T>(from[2 * i]);
    }
  };
  void* p = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float: return write(static_cast<float*>(p));
    case ScalarType::Double: return write(static_cast<double*>(p));
    case ScalarType::BFloat16: return write(static_cast<c10::BFloat16*>(p));
    default: return write(static_cast<c10::Half*>(p));
  }
}

inline double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
inline const void* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
inline void* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

// A tensor of the input's shape and dtype in the input's memory layout: itself, or a copy.
inline MaybeTensor matching(const char* name, const MaybeTensor& t, const Tensor& input) {
  if (!t) return t;
  check_same_dtype(kOp, name, *t, "input", input);
  check_same_shape(kOp, name, *t, "input", input);
  bool same = true;
  for (int64_t d = 0; d < t->dim(); ++d) same &= t->size(d) <= 1 || t->stride(d) == input.stride(d);
  if (same || t->numel() == 0) return t;
  Tensor copy = empty_strided(input, input.sizes(), input.strides(), input.scalar_type());
  torch::stable::copy_(copy, *t);
  return copy;
}

inline void check_input(const Tensor& input) {
  if (input.dim() < 2) raise(kOp, ": input must be (batch, channels, ...), got shape ", shape_of(input));
  float_dtype(kOp, "input", input);
}

// Each parameter has one value a channel; all are of one dtype, the input's or float32 with a 16-bit input.
inline void check_parameters(const Tensor& input,
                             std::initializer_list<std::pair<const char*, const MaybeTensor*>> parameters) {
  const bool narrow = input.scalar_type() == ScalarType::BFloat16 || input.scalar_type() == ScalarType::Half;
  const Tensor* first = nullptr;
  for (const auto& [name, t] : parameters) {
    if (!*t) continue;
    if ((*t)->numel() != input.size(1)) raise(name, " should contain ", input.size(1), " elements not ", (*t)->numel());
    const ScalarType type = (*t)->scalar_type();
    if (type != input.scalar_type() && !(narrow && type == ScalarType::Float))
      raise(kOp, ": mixed dtype: expected ", name, " of the dtype of input (code ",
            static_cast<int>(input.scalar_type()), ")", narrow ? " or float32" : "", ", got code ",
            static_cast<int>(type));
    if (first && first->scalar_type() != type)
      raise(kOp, ": mixed dtype: expected parameters and statistics of one dtype, got ", name, " of code ",
            static_cast<int>(type), " beside code ", static_cast<int>(first->scalar_type()));
    first = &**t;
  }
}

// (batch, spatial) bytes or bools, one a position, dense.
inline MaybeTensor valid_positions(const MaybeTensor& valid, const Tensor& input) {
  if (!valid) return valid;
  if (valid->scalar_type() != ScalarType::Bool && valid->scalar_type() != ScalarType::Byte)
    raise(kOp, ": valid must be bool, got dtype code ", static_cast<int>(valid->scalar_type()));
  int64_t positions = input.size(0);
  for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
  check_numel(kOp, "valid", *valid, positions);
  return dense(*valid);
}

inline Activation activation_of(int64_t code) {
  if (code < 0 || code >= kActivations)
    raise(kOp, ": activation must be a code in [0, ", kActivations, "), got ", code);
  return static_cast<Activation>(code);
}

// A tensor as the kernels walk it, cut along the batch into ghost batches.
struct View {
  ChannelLayout layout;
  int64_t channels;        // of the tensor; layout.channels == channels * repeat
  int64_t repeat;          // columns that belong to one channel: the values of a small plane, else 1
  int64_t rows_per_batch;  // rows of `layout` that one batch entry has: spatial of channels_last, else 1
  int64_t groups, group_batch;

  int64_t group_rows(int64_t group) const {
    const int64_t size = group_batch * rows_per_batch;
    return std::min(size, layout.batch - group * size);
  }
  int64_t rows_before(int64_t group) const { return group * group_batch * rows_per_batch; }
  int64_t group_offset(int64_t group) const { return rows_before(group) * layout.channels * layout.spatial; }
  View group(int64_t group) const {
    View v = *this;
    v.layout.batch = group_rows(group);
    if (v.layout.valid) v.layout.valid += rows_before(group) * layout.spatial;
    return v;
  }
  // The sign mask: a row of bits per row of columns, or per plane.
  int64_t mask_rows() const { return layout.columns() ? layout.batch : layout.batch * layout.channels; }
  int64_t mask_rows_before(int64_t group) const {
    return rows_before(group) * (layout.columns() ? 1 : layout.channels);
  }
  int64_t mask_row_bytes() const { return ((layout.columns() ? layout.channels : layout.spatial) + 7) / 8; }
};

inline View view_of(const Tensor& t, bool channels_last, const MaybeTensor& valid, int64_t groups,
                    int64_t small_plane = kSmallMaskedPlane) {
  const int64_t batch = t.size(0), channels = t.size(1);
  if (groups < 1) raise(kOp, ": groups must be at least 1, got ", groups);
  int64_t spatial = 1;
  for (int64_t d = 2; d < t.dim(); ++d) spatial *= t.size(d);
  View v{};
  v.channels = channels, v.repeat = 1, v.rows_per_batch = 1;
  v.group_batch = std::max<int64_t>(1, batch / groups + (batch % groups != 0));
  v.groups = std::max<int64_t>(1, batch / v.group_batch + (batch % v.group_batch != 0));
  v.layout = {batch, channels, spatial, nullptr};
  if (channels_last) {
    v.layout = {batch * spatial, channels, 1, nullptr}, v.rows_per_batch = spatial;
  } else if (spatial > 0 && spatial <= small_plane && !valid) {
    v.layout = {batch, channels * spatial, 1, nullptr}, v.repeat = spatial;
  }
  if (valid) v.layout.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
  return v;
}

inline const uint8_t* mask_bytes(const MaybeTensor& mask, const View& view) {
  if (!mask || mask->numel() == 0) return nullptr;
  check_dtype(kOp, "mask", *mask, ScalarType::Byte, "uint8");
  check_numel(kOp, "mask", *mask, view.mask_rows() * view.mask_row_bytes());
  if (!mask->is_contiguous()) raise(kOp, ": mask must be contiguous, as the forward returned it");
  return view.layout.valid ? nullptr : static_cast<const uint8_t*>(mask->const_data_ptr());
}

// `rows` arrays of one accumulator a column: what the kernels multiply with and subtract.
class Coefficients {
 public:
  Coefficients(DType dtype, int64_t columns, int64_t rows)
      : wide_(dtype == DType::float64), columns_(columns), memory_(wide_ ? rows * columns : (rows * columns + 1) / 2) {}

  void* row(int64_t i) {
    return wide_ ? static_cast<void*>(memory_.data() + i * columns_)
                 : static_cast<void*>(reinterpret_cast<float*>(memory_.data()) + i * columns_);
  }
  void set(const View& view, int64_t which, int64_t channel, double value) {
    for (int64_t i = channel * view.repeat; i < (channel + 1) * view.repeat; ++i) {
      if (wide_)
        static_cast<double*>(row(which))[i] = value;
      else
        static_cast<float*>(row(which))[i] = static_cast<float>(value);
    }
  }
  // What rounding the mean to the accumulator loses.
  double lost_of(double mean) const {
    if (wide_) return 0;
    const double low = mean - static_cast<double>(static_cast<float>(mean));
    return low == low ? low : 0;  // inf - inf
  }
  // mean, scale and shift: y = (x - mean) * scale + shift.
  void set_affine(const View& view, int64_t channel, double mean, double scale, double bias) {
    set(view, 0, channel, mean);
    set(view, 1, channel, scale);
    set(view, 2, channel, bias - lost_of(mean) * scale);
  }

 private:
  bool wide_;
  int64_t columns_;
  Scratch<double, 512> memory_;
};

// Calls kernel(begin, end) over `items` equal shares of the layout, in parallel where there is enough to do.
template <class Kernel>
void for_items(const ChannelLayout& l, int64_t items, const Kernel& kernel) {
  const int64_t numel = l.numel();
  if (items == 0) return;
  if (numel <= kGrainValues) return kernel(0, items);
  const int64_t grain = std::max<int64_t>(1, kGrainValues * items / numel);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(begin, end); });
}

}  // namespace fused_ops

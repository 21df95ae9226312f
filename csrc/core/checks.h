// What every op's checking file shares: dtype mapping, messages that show the value seen, and tensor plumbing.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/tensor.h"

namespace fused_ops {

template <class... Args>
[[noreturn]] void raise(const Args&... args) {
  std::ostringstream message;
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

// PyTorch's binding layer turns std::out_of_range into IndexError.
template <class... Args>
[[noreturn]] void raise_index_error(const Args&... args) {
  std::ostringstream message;
  ((message << args), ...);
  throw std::out_of_range(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << ']';
  return out.str();
}

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: break;
  }
  raise(op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  if (t.scalar_type() != like.scalar_type())
    raise(op, ": ", name, " must have the dtype of ", like_name, " (", like.scalar_type(), "), got ", t.scalar_type());
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want, const char* want_name) {
  if (t.scalar_type() != want) raise(op, ": ", name, " must be ", want_name, ", got ", t.scalar_type());
}

inline void check_numel(const char* op, const char* name, const Tensor& t, int64_t want) {
  if (t.numel() != want) raise(op, ": ", name, " must have ", want, " elements, got shape ", shape_of(t));
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  if (!same) raise(op, ": ", name, " must have the shape of ", like_name, " ", shape_of(like), ", got ", shape_of(t));
}

// Uninitialised tensors on the device of `like`. torch::stable::new_empty and empty_like go through the boxed
// dispatcher, about a microsecond each; this is the allocation alone.
inline Tensor empty_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                            ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), static_cast<int32_t>(dtype), device_type,
                                                         device_index, &handle));
  return Tensor(handle);
}

constexpr size_t kMaxDims = 64;  // of any tensor, as in PyTorch

inline Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[kMaxDims];
  if (sizes.size() > kMaxDims) raise("fused_ops: expected at most ", kMaxDims, " dimensions, got ", sizes.size());
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = next;
    next *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return empty_strided(like, sizes, {strides, sizes.size()}, dtype);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : Tensor(torch::stable::contiguous(t)); }

// Whether the strides are those of dense memory with the channel dimension last; of size 1 they are of no matter.
inline bool has_channels_last_strides(const Tensor& t) {
  int64_t expected = t.size(1);
  if (t.size(1) != 1 && t.stride(1) != 1) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return t.size(0) == 1 || t.stride(0) == expected;
}

// Dense with the channel dimension last in memory (and not also contiguous).
inline bool is_channels_last(const Tensor& t) {
  return t.dim() >= 3 && !t.is_contiguous() && has_channels_last_strides(t);
}

inline int64_t element_size(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }

constexpr int64_t kHugeBytes = int64_t{8} << 20;

// FUSED_OPS_HUGE_PAGES=0 turns the advice off, to measure what it is worth.
inline bool huge_pages_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("FUSED_OPS_HUGE_PAGES");
    return value == nullptr || value[0] != '0';
  }();
  return wanted;
}

// Asks for huge pages, if there are many bytes, before their first touch: page faults, not arithmetic, are what they
// would cost.
inline void advise_huge([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kHugeBytes || !huge_pages_wanted()) return;
  constexpr uintptr_t page = 4096;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + page - 1) / page * page;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / page * page;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is no error
#endif
}

// A result of the input's shape and dtype: channels_last, or contiguous.
inline Tensor empty_result(const Tensor& input, bool channels_last) {
  const int64_t dims = input.dim();
  int64_t strides[kMaxDims], next = 1;
  const auto lay = [&](int64_t d) {  // without elements too as PyTorch lays them
    strides[d] = next, next *= channels_last ? input.size(d) : std::max<int64_t>(input.size(d), 1);
  };
  if (channels_last) lay(1);
  for (int64_t d = dims; d-- > 0;)
    if (!channels_last || d != 1) lay(d);
  return empty_strided(input, input.sizes(), {strides, static_cast<size_t>(dims)}, input.scalar_type());
}
inline Tensor empty_result(const Tensor& input) { return empty_result(input, is_channels_last(input)); }

// The same of the CPU, in huge pages.
inline Tensor empty_huge(const char* op, const Tensor& input, bool channels_last) {
  Tensor t = empty_result(input, channels_last);
  advise_huge(t.mutable_data_ptr(), t.numel() * element_size(float_dtype(op, "input", t)));
  return t;
}

inline double scalar_value(const Tensor& t) {
  const void* p = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float: return *static_cast<const float*>(p);
    case ScalarType::Double: return *static_cast<const double*>(p);
    case ScalarType::BFloat16: return static_cast<float>(*static_cast<const c10::BFloat16*>(p));
    case ScalarType::Half: return static_cast<float>(*static_cast<const c10::Half*>(p));
    default: raise("fused_ops: expected a floating-point scalar, got ", t.scalar_type());
  }
}

inline void write_scalar(const Tensor& t, double value) {
  void* p = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float: *static_cast<float*>(p) = static_cast<float>(value); return;
    case ScalarType::Double: *static_cast<double*>(p) = value; return;
    case ScalarType::BFloat16: *static_cast<c10::BFloat16*>(p) = static_cast<float>(value); return;
    case ScalarType::Half: *static_cast<c10::Half*>(p) = static_cast<float>(value); return;
    default: raise("fused_ops: expected a floating-point scalar, got ", t.scalar_type());
  }
}

}  // namespace fused_ops

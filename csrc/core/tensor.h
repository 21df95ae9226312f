// The stable ABI of libtorch, and the tensors of the checking files on it.
//
// A failed call says why in PyTorch's own words (where it tells them: torch 2.13), and never names a path of the build.
//
// Every question to a torch::stable::Tensor is a call into libtorch, its dtype alone up to a dozen; asked again and
// again, and each from a place of its own in that large library, they cost a small call more than its arithmetic does
// (mostly misses of the instruction cache). This Tensor asks once for the sizes, the strides and the dtype.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

extern "C" {
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
// glibc's from 2.32 on, which libstdc++ asks before it counts references: each library's own serves older systems too.
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace fused_ops {

[[noreturn]] inline __attribute__((noinline, cold)) void raise_failed_call(const char* call) {
  const char* why = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  if (why && *why) throw std::runtime_error(why);
  const std::string text = call;
  throw std::runtime_error("fused_ops: PyTorch's " + text.substr(0, text.find('(')) +
                           " failed, and said why on stderr");
}

}  // namespace fused_ops

// Both macros, before what is made with them is included: since torch 2.13 there is the second.
#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>
#endif
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) ::fused_ops::raise_failed_call(#call);
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fused_ops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

// Not for a tensor that is resized while this one is alive.
class Tensor : public torch::stable::Tensor {
 public:
  using torch::stable::Tensor::Tensor;
  Tensor(const torch::stable::Tensor& t) : torch::stable::Tensor(t) {}
  Tensor(torch::stable::Tensor&& t) : torch::stable::Tensor(std::move(t)) {}

  int64_t dim() const { return geometry().dim; }
  IntHeaderOnlyArrayRef sizes() const { return {geometry().sizes, static_cast<size_t>(geometry().dim)}; }
  IntHeaderOnlyArrayRef strides() const { return {geometry().strides, static_cast<size_t>(geometry().dim)}; }
  int64_t size(int64_t d) const { return geometry().sizes[d]; }  // d in [0, dim)
  int64_t stride(int64_t d) const { return geometry().strides[d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes()) n *= size;
    return n;
  }
  // From the first element to behind the last one, in elements.
  int64_t extent() const {
    const Geometry& g = geometry();
    int64_t last = 0;
    for (int64_t d = 0; d < g.dim; ++d) {
      if (g.sizes[d] == 0) return 0;
      last += (g.sizes[d] - 1) * g.strides[d];
    }
    return last + 1;
  }
  bool is_contiguous() const {
    const Geometry& g = geometry();
    int64_t expected = 1;
    bool dense = true, empty = false;
    for (int64_t d = g.dim; d-- > 0; expected *= g.sizes[d]) {
      dense &= g.sizes[d] == 1 || g.strides[d] == expected;
      empty |= g.sizes[d] == 0;
    }
    return dense || empty;
  }
  ScalarType scalar_type() const {
    if (!dtype_) dtype_ = read_dtype();
    return *dtype_;
  }

 private:
  struct Geometry {
    int64_t dim = -1;
    int64_t *sizes = nullptr, *strides = nullptr;
  };

  const Geometry& geometry() const {
    if (geometry_.dim < 0) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(get(), &geometry_.sizes));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(get(), &geometry_.strides));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(get(), &geometry_.dim));
    }
    return geometry_;
  }
  ScalarType read_dtype() const {
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
                         int64 = aoti_torch_dtype_int64();
    int32_t code = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(get(), &code));
    if (code == float32) return ScalarType::Float;
    if (code == float64) return ScalarType::Double;
    return code == int64 ? ScalarType::Long : torch::stable::Tensor::scalar_type();
  }

  mutable Geometry geometry_;
  mutable std::optional<ScalarType> dtype_;
};

}  // namespace fused_ops

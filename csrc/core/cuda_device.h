// What the bindings of the CUDA kernels share: the device and stream of a call, and its errors.
//
// FUSED_OPS_CUDA_HOST builds the same bindings around the kernels' emulation on the CPU (tests/cuda_host).
#pragma once
#include "core/checks.h"

#if defined(FUSED_OPS_CUDA_HOST)
extern "C" void cuda_host_guard(void* memory, int64_t bytes, int64_t behind);  // poisons it, watches what lies behind
#define FUSED_OPS_CUDA_LIBRARY fused_ops_host
#define FUSED_OPS_CUDA_KEY CPU
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define FUSED_OPS_CUDA_LIBRARY fused_ops
#define FUSED_OPS_CUDA_KEY CUDA
#endif
// Registers a file's ops, once a file: none of them where no kernel could be launched.
#define FUSED_OPS_LIBRARY_IMPL(library, key, m)                                                  \
  static void fused_ops_of_this_file(torch::stable::detail::StableLibrary&);                     \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                                   \
    if (fused_ops::cuda::refusal() == fused_ops::cuda::Refusal::none) fused_ops_of_this_file(m); \
  }                                                                                              \
  static void fused_ops_of_this_file(torch::stable::detail::StableLibrary& m)

namespace fused_ops {
namespace cuda {

// Why this machine could run no kernel of this library (fused_ops/core/library.py has a sentence for each). Asked
// without initialising CUDA: a process may still fork.
enum class Refusal : int64_t { none, driver, gpu };
#if defined(FUSED_OPS_CUDA_HOST)
inline Refusal refusal() { return Refusal::none; }
#else
Refusal refusal();
#endif

inline int32_t device_index(const Tensor& t) {
  int32_t index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  return index;
}

// Makes the tensor's device the current one, and knows its current stream.
class OnDevice {
 public:
#if defined(FUSED_OPS_CUDA_HOST)
  explicit OnDevice(const Tensor&) {}
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cuda_host_guard(nullptr, 0, 0); }
#else
  explicit OnDevice(const Tensor& t) : guard_(device_index(t)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index(t), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(FUSED_OPS_CUDA_HOST)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// Raises for what a launch returned.
inline void check_launch(const char* op, int32_t error) {
  if (error == 0) return;
#if defined(FUSED_OPS_CUDA_HOST)
  raise(op, ": CUDA error ", error);
#else
  char* message = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, __func__, __LINE__, true, &message);
  const std::string text = message ? message : "unknown";
  if (message) torch_c10_cuda_free_error_msg(message);
  raise(op, ": CUDA error ", error, ": ", text);
#endif
}

inline double* doubles_of(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

inline Tensor scratch(const Tensor& like, int64_t count) {
#if defined(FUSED_OPS_CUDA_HOST)
  constexpr int64_t kBehind = 64, kBytes = sizeof(double);
  const int64_t guarded = count + kBehind;
  const Tensor memory = empty(like, {&guarded, 1}, ScalarType::Double);
  cuda_host_guard(memory.mutable_data_ptr(), count * kBytes, kBehind * kBytes);
  return memory;
#else
  return empty(like, {&count, 1}, ScalarType::Double);
#endif
}

}  // namespace cuda
}  // namespace fused_ops

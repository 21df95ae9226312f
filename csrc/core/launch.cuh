// Launching a kernel, with the error code kept.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "core/dtype.h"

namespace fused_ops {
namespace cuda {

// Launches on one stream, none after the first that failed.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Kernel, class... Args>
  void operator()(Kernel* kernel, int64_t blocks, int threads, const Args&... args) {
    if (error_ != cudaSuccess || blocks <= 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, args...);
  }
  int32_t error() const { return static_cast<int32_t>(error_); }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

// Runs the code with T, the type of `dtype`.
#define FUSED_OPS_WITH_DTYPE(dtype, T, ...) \
  switch (dtype) {                          \
    case DType::float32: {                  \
      using T = float;                      \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case DType::float64: {                  \
      using T = double;                     \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case DType::bfloat16: {                 \
      using T = bfloat16_t;                 \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case DType::float16: {                  \
      using T = float16_t;                  \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
  }

}  // namespace cuda
}  // namespace fused_ops

// Launching a kernel, with the error code kept.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

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

}  // namespace cuda
}  // namespace fused_ops

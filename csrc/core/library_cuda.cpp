// Whether this library's kernels can run on this machine.
#include "core/cuda_device.h"

#if !defined(FUSED_OPS_CUDA_HOST)
namespace fused_ops {
namespace cuda {

namespace {

// What a function of another library returns, or -1 where there is none.
template <class... Args>
int call(void* library, const char* name, Args... args) {
  void* found = library ? dlsym(library, name) : nullptr;
  return found ? reinterpret_cast<int (*)(Args...)>(found)(args...) : -1;
}

// Whether the driver knows the CUDA of this library's runtime, which is its own and not torch's. Where there is no
// driver there is no GPU either.
bool driver_is_new_enough() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  int version = 0;  // 1000 * major + 10 * minor
  return call(driver, "cuDriverGetVersion", &version) != 0 || version >= 1000 * FUSED_OPS_CUDA_MAJOR;
}

// Whether a GPU has the compute capability of this library's oldest code, or where that cannot be told. NVML comes with
// the driver and, unlike CUDA, may be initialised before a fork.
bool a_gpu_is_new_enough() {
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (call(nvml, "nvmlInit_v2") != 0) return true;
  unsigned gpus = 0;
  bool found = call(nvml, "nvmlDeviceGetCount_v2", &gpus) != 0 || gpus == 0;
  for (unsigned i = 0; i < gpus && !found; ++i) {
    void* gpu = nullptr;
    int major = 0, minor = 0;
    found = call(nvml, "nvmlDeviceGetHandleByIndex_v2", i, &gpu) != 0 ||
            call(nvml, "nvmlDeviceGetCudaComputeCapability", gpu, &major, &minor) != 0 ||
            10 * major + minor >= FUSED_OPS_CUDA_OLDEST;
  }
  call(nvml, "nvmlShutdown");
  return found;
}

int64_t cuda_refusal() { return static_cast<int64_t>(refusal()); }

}  // namespace

Refusal refusal() {
  static const Refusal found = !driver_is_new_enough()  ? Refusal::driver
                               : !a_gpu_is_new_enough() ? Refusal::gpu
                                                        : Refusal::none;
  return found;
}

}  // namespace cuda
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) { m.def("cuda_refusal() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&fused_ops::cuda::cuda_refusal));
}
#endif

// A gradient of linear cross-entropy times the upstream gradient of the loss, on a GPU, in place.
//
//   grad_i = grad_i * scale
//
// Memory: 8 bytes where scale is 1, as it mostly is: every block returns at once. Else the gradient is read and written
// once. `scale` stays on the device, so nothing waits for it. One rounding. See docs/linear_cross_entropy.md.
#include <algorithm>

#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "linear_cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {
namespace {

constexpr int64_t kRescaleBlocks = 1056;  // of the launch, eight a multiprocessor of an H100
constexpr int kAhead = 4;                 // vectors that a thread loads before it uses any

// grad: (count,), of which the first `head` elements lie before a multiple of 16 bytes.
template <class T>
__global__ void __launch_bounds__(kBlock) rescale(T* grad, int64_t count, int64_t head, const void* scale, DType kind) {
  using A = acc_t<T>;
  constexpr int kV = kVector<T>;
  const A factor = static_cast<A>(number_at(scale, kind, 0));
  if (factor == A(1)) return;
  const int64_t thread = int64_t{blockIdx.x} * kBlock + threadIdx.x, threads = int64_t{gridDim.x} * kBlock;
  const int64_t vectors = (count - head) / kV, behind = head + vectors * kV;
  if (thread < head) set(grad[thread], to_acc(grad[thread]) * factor);
  if (behind + thread < count) set(grad[behind + thread], to_acc(grad[behind + thread]) * factor);
  for (int64_t first = thread; first < vectors; first += kAhead * threads) {
    Words words[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = first + k * threads;
      words[k] = load_aligned(grad + head + (at < vectors ? at : first) * kV);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = first + k * threads;
      A v[kV];
      unpack<T>(words[k], v);
#pragma unroll
      for (int i = 0; i < kV; ++i) v[i] *= factor;
      if (at < vectors) store_aligned(grad + head + at * kV, pack<T>(v));
    }
  }
}

template <class T>
int32_t run(const RescaleCall& c, void* stream) {
  Launcher launch(stream);
  const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(c.grad) % 16);
  const int64_t head = std::min(c.count, (16 - off) % 16 / static_cast<int64_t>(sizeof(T)));
  const int64_t each = int64_t{kBlock} * kAhead * kVector<T>,
                blocks = std::min(kRescaleBlocks, (c.count + each - 1) / each);
  launch(rescale<T>, blocks, kBlock, static_cast<T*>(c.grad), c.count, head, c.scale, c.scale_dtype);
  return launch.error();
}

}  // namespace

int32_t linear_cross_entropy_rescale(const RescaleCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return run<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

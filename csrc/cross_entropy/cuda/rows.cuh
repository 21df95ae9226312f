// What both directions of cross-entropy share: targets, where a row lies, which threads walk it.
#pragma once
#undef NDEBUG
#include <cassert>

#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {

constexpr int64_t kMaxBlocks = 4096;      // of one launch: fixed, so that sums are the same on every GPU
constexpr int64_t kWarpVectors = 32 * 8;  // a row of up to so many 16-byte vectors is one warp's
constexpr int64_t kManyClasses = 64;      // from here on a row of strided classes is shared by kShares threads
constexpr int kShares = 8;
constexpr double kFar = 268435456.0;  // a log-sum-exp beyond is too coarse in float64 for low

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t element_bytes(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }

// Whether every row of the layout begins at a multiple of 16 bytes.
inline bool rows_are_aligned(const void* p, const RowLayout& l, int64_t bytes) {
  const auto fits = [&](int64_t n, int64_t stride) { return n <= 1 || stride * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && fits(l.batch, l.batch_stride) && fits(l.spatial, l.spatial_stride);
}
inline int64_t vectors_of(DType dtype, const RowLayout& l) { return ceil_div(l.classes * element_bytes(dtype), 16); }

__device__ inline int64_t target_at(const Targets& t, int64_t row) {
  switch (t.type) {
    case TargetType::int64: return static_cast<const int64_t*>(t.data)[row];
    case TargetType::int32: return static_cast<const int32_t*>(t.data)[row];
    case TargetType::int16: return static_cast<const int16_t*>(t.data)[row];
    case TargetType::int8: return static_cast<const int8_t*>(t.data)[row];
    case TargetType::uint8: return static_cast<const uint8_t*>(t.data)[row];
  }
  return -1;
}

// A row's target: a class, or why it does not count.
struct RowTarget {
  int64_t target;
  bool counts, bad;
};
__device__ inline RowTarget row_target(const Targets& t, int64_t row, int64_t classes) {
  const int64_t target = target_at(t, row);
  const bool ignored = target == t.ignore_index, bad = !ignored && (target < 0 || target >= classes);
  return {target, !ignored && !bad, bad};
}

// The error of a device-side assertion, as PyTorch's. Behind the row's NaN, which only an emulation gets to see.
__device__ inline void refuse_target() {
#if defined(__CUDACC__)
  assert(!"cross_entropy: a target is outside [0, classes) and not ignore_index");
#else
  __trap();
#endif
}

__device__ inline int64_t row_offset(const RowLayout& l, int64_t row) {
  if (l.spatial == 1) return row * l.batch_stride;
  const int64_t b = row / l.spatial;
  return b * l.batch_stride + (row - b * l.spatial) * l.spatial_stride;
}

// sum of exp(x - shift) of a thread's share of n adjacent classes.
template <class T, int kGroup>
__device__ inline sum_t<T> share_sum_exp(const T* x, int64_t n, acc_t<T> shift, int lane) {
  using A = acc_t<T>;
  const unsigned offset = misalignment(x);
  sum_t<T> sum = 0;
  for (int64_t first = int64_t{lane} * kVector<T>; first < n; first += int64_t{kGroup} * kVector<T>) {
    A v[kVector<T>];
    load_vector(x + first, n - first, offset, -kInfinity<A>, v);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) sum += exact_exp(v[k] - shift);
  }
  return sum;
}

// The target's gradient over the upstream one: p - 1, or minus the others' p where that would cancel.
__device__ inline double target_residual(double p, double others) { return p < 0.5 ? p - 1.0 : -others; }

}  // namespace cuda
}  // namespace fused_ops

// How the kernels for every option walk a row, in both directions: the classes of a step, their logits and coefficients
// q. What the common options have instead is in options_fast.cuh.
#pragma once
#include "cross_entropy/cuda/options.cuh"

namespace fused_ops {
namespace cuda {

constexpr int kShort = 4;  // threads of a row of up to 8 vectors

// Runs the code with kGroup, the threads that take a row of so many 16-byte vectors.
#define FUSED_OPS_WITH_OPTION_GROUP(vectors, kGroup, ...) \
  if ((vectors) <= 8) {                                   \
    constexpr int kGroup = kShort;                        \
    __VA_ARGS__;                                          \
  } else if ((vectors) <= kWarpVectors) {                 \
    constexpr int kGroup = 32;                            \
    __VA_ARGS__;                                          \
  } else {                                                \
    constexpr int kGroup = kBlock;                        \
    __VA_ARGS__;                                          \
  }

// The classes that one thread takes in a step: kU vectors of adjacent ones, each kGroup vectors behind the last.
template <class T, int kGroup>
struct AdjacentWalk {
  static constexpr bool kVectors = true;
  static constexpr int kV = kVector<T>, kU = kGroup < 32 || sizeof(T) == 8 ? 1 : 2, kCount = kU * kV;
  static constexpr int64_t kStep = int64_t{kGroup} * kCount;
  int64_t first, end;  // classes from `end` on are not there
  __device__ int64_t vector(int u) const { return first + int64_t{u} * kGroup * kV; }
  __device__ int64_t at(int i) const { return vector(i / kV) + i % kV; }
};
// Every kParts-th class.
template <int kParts>
struct StridedWalk {
  static constexpr bool kVectors = false;
  static constexpr int kCount = 8;
  static constexpr int64_t kStep = int64_t{kParts} * kCount;
  int64_t first, end;
  __device__ int64_t at(int i) const { return first + int64_t{i} * kParts; }
};

// The walk's values of a row that begins at p, `filler` where there are none.
template <class S, class Walk>
__device__ inline void load_step(const S* p, int64_t stride, const Walk& w, acc_t<S> filler, acc_t<S>* out) {
  if constexpr (Walk::kVectors) {
    if (stride == 1) {
      const unsigned offset = misalignment(p);
      constexpr int kParts = Walk::kV / kVector<S>;
#pragma unroll
      for (int u = 0; u < Walk::kU * kParts; ++u) {
        const int64_t first = w.vector(u / kParts) + u % kParts * kVector<S>;
        load_vector(p + first, w.end - first, offset, filler, out + u * kVector<S>);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < Walk::kCount; ++i) {
    const int64_t j = w.at(i);
    out[i] = j < w.end ? to_acc(p[j * stride]) : filler;
  }
}

// The logits of a step, bent, -inf where a class is masked or not there; returns a bit for each class that is allowed.
template <class T, class Walk>
__device__ inline unsigned load_logits(const CrossEntropyRows& a, int64_t row, const Walk& w, acc_t<T>* t) {
  using A = acc_t<T>;
  constexpr int kCount = Walk::kCount;
  load_step(static_cast<const T*>(a.logits) + row_offset(a.layout, row), a.layout.class_stride, w, -kInfinity<A>, t);
  const bool moved = a.logit_scale != 1.0 || a.softcap != 0.0;
  if (moved) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = bent(a, t[i]);
  }
  unsigned allowed = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) allowed |= w.at(i) < w.end ? 1u << i : 0u;
  if (a.has_mask) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask.data) + row_offset(a.mask.layout, row);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (w.at(i) < w.end && mask[w.at(i) * a.mask.layout.class_stride] == 0) allowed &= ~(1u << i);
  }
  if (moved || a.has_mask) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = allowed >> i & 1u ? t[i] : -kInfinity<A>;
  }
  return allowed;
}

// q of a step, without what the row's indices add.
template <class T, class Walk>
__device__ inline void load_coefficients(const CrossEntropyRows& a, int64_t row, const Walk& w, unsigned allowed,
                                         acc_t<T> share, acc_t<T>* q) {
  using A = acc_t<T>;
  constexpr int kCount = Walk::kCount;
  A weight[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) weight[i] = A(1), q[i] = A(0);
  if (a.class_weight) load_step(static_cast<const A*>(a.class_weight), 1, w, A(0), weight);
  if (a.has_dense) {
    const int64_t at = row_offset(a.dense.layout, row), stride = a.dense.layout.class_stride;
    if (a.dense.dtype == a.dtype)
      load_step(static_cast<const T*>(a.dense.data) + at, stride, w, A(0), q);
    else
      load_step(static_cast<const A*>(a.dense.data) + at, stride, w, A(0), q);
    const A soft = static_cast<A>(1.0 - a.label_smoothing);
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] *= soft * weight[i];
  }
  if (a.label_smoothing == 0.0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) q[i] += allowed >> i & 1u ? weight[i] * share : A(0);
}

// A group a row: the share of label smoothing by the row's mask, or by the one mask.
template <int kGroup>
__global__ void __launch_bounds__(kBlock) smoothing_shares(CrossEntropyRows a, double* shares, int64_t masks) {
  constexpr int kRows = kBlock / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const RowLayout& l = a.mask.layout;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < masks; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask.data);
    if (row < masks) mask += row_offset(l, row);
    int64_t count = 0;
    for (int64_t c = lane; row < masks && c < l.classes; c += kGroup) count += mask[c * l.class_stride] != 0;
    count = sum_group<kGroup>(count);
    if (lane == 0 && row < masks) shares[row] = a.label_smoothing / static_cast<double>(count > 0 ? count : 1);
  }
}

// Fills the shares at the beginning of scratch.
inline void launch_shares(Launcher& launch, const CrossEntropyRows& a, double* scratch) {
  const int64_t masks = shares_of(a);
  if (masks == 0) return;
  if (a.layout.classes > 4096)
    launch(smoothing_shares<kBlock>, blocks_for(masks), kBlock, a, scratch, masks);
  else
    launch(smoothing_shares<32>, blocks_for(ceil_div(masks, kBlock / 32)), kBlock, a, scratch, masks);
}

}  // namespace cuda
}  // namespace fused_ops

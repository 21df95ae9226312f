// The running maximum and sum of a row's other classes than its target, the loss that they make, and the sum of losses.
#pragma once
#include <algorithm>

#include "cross_entropy/cuda/loops.cuh"

namespace fused_ops {
namespace cuda {
namespace {

template <class T>
using State = Online<acc_t<T>, sum_t<T>>;

template <class T>
__device__ inline State<T> nothing() {
  return {-kInfinity<acc_t<T>>, 0};
}
// As add_values, of kCount vectors; the maximum of 16-bit values is taken two at a time.
template <class T, int kCount>
__device__ inline void add_vectors(State<T>& to, const Words* words) {
  using A = acc_t<T>;
  constexpr int kV = kVector<T>;
  if constexpr (sizeof(T) == 2) {
    uint32_t max = words[0].w[0];
#pragma unroll
    for (int i = 1; i < 4 * kCount; ++i) max = larger_pair(T{}, max, words[i / 4].w[i % 4]);
    const A low = to_acc(T{static_cast<uint16_t>(max)}), high = to_acc(T{static_cast<uint16_t>(max >> 16)});
    const A shift = raise_to(to, larger(low, high));
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      A v[kV], sum = 0;
      unpack<T>(words[u], v);
#pragma unroll
      for (int k = 0; k < kV; ++k) sum += exp_of<T>(v[k] - shift);
      to.sum += sum;
    }
  } else {
    A v[kCount * kV];
#pragma unroll
    for (int u = 0; u < kCount; ++u) unpack<T>(words[u], v + u * kV);
    add_values<T, kCount * kV>(to, v);
  }
}

// Element `at` of a vector becomes -inf.
template <class T>
__device__ inline void leave_out(Words& words, int at) {
  acc_t<T> v[kVector<T>];
  unpack<T>(words, v);
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) v[k] = k == at ? -kInfinity<acc_t<T>> : v[k];
  words = pack<T>(v);
}

// All of a row in shared memory, whose target's logit is -inf there.
template <class T>
__device__ inline State<T> tile_online(const T* x, int classes) {
  using A = acc_t<T>;
  constexpr int kStep = sizeof(T) == 8 ? 4 : 8;
  State<T> state = nothing<T>();
  A v[kStep];
  int first = 0;
  for (; first + kStep <= classes; first += kStep) {
#pragma unroll
    for (int k = 0; k < kStep; ++k) v[k] = to_acc(x[first + k]);
    add_values<T, kStep>(state, v);
  }
  if (first < classes) {
#pragma unroll
    for (int k = 0; k < kStep; ++k) v[k] = first + k < classes ? to_acc(x[first + k]) : -kInfinity<A>;
    add_values<T, kStep>(state, v);
  }
  return state;
}

// lse and the loss of a row from its other classes and the target's logit.
struct RowResult {
  double lse, loss;
};
__device__ inline RowResult finish(double others_max, double others_sum, double x_target) {
  const double max = larger(others_max, x_target), below = x_target - max;
  const double others = others_sum * rescale(others_max, max);
  const double rest = below == 0 ? others : (others - 1.0) + exp(below);  // the sum without its largest term
  const double log_sum = log1p(rest);
  return {max + log_sum, log_sum - below};
}

template <class T>
__device__ inline void finish_row(const ForwardCall& c, int64_t row, const RowTarget& t, acc_t<T> x_target,
                                  double others_max, double others_sum, LossSum& sum) {
  using A = acc_t<T>;
  RowResult r{0, 0};  // of an ignored row: lse is never read
  if (t.counts) r = finish(others_max, others_sum, static_cast<double>(x_target));
  if (t.bad) r.lse = r.loss = kNaN<double>;
  if (c.lse) c.lse[row] = r.lse;
  if (c.reduction == Reduction::none) set(static_cast<T*>(c.loss)[row], static_cast<A>(r.loss));
  sum.sum += r.loss, sum.count += t.counts ? 1.0 : 0.0;
  if (t.bad) refuse_target();
}

// What a group has found of a row. Groups hold up to kGroup rows until thread i takes the logarithm of the i-th, so
// that those of many rows are taken side by side.
template <class T>
struct HeldRow {
  double max, sum;  // of the other classes
  acc_t<T> logit;   // of the target
};

// `rows` of the threads' held rows, of which the first is row `begin` and the next `stride` further.
template <class T>
__device__ inline LossSum finish_held(const ForwardCall& c, const HeldRow<T>* held, int rows, int lane, int64_t begin,
                                      int64_t stride) {
  LossSum sum{0, 0};
  if (lane >= rows) return sum;
  const int64_t row = begin + lane * stride;
  const HeldRow<T>& h = held[threadIdx.x];
  finish_row<T>(c, row, row_target(c.targets, row, c.layout.classes), h.logit, h.max, h.sum, sum);
  return sum;
}

__device__ inline void keep_sum(const ForwardCall& c, const LossSum& mine) {
  const LossSum sum = sum_group<kBlock>(mine);
  if (threadIdx.x == 0) c.scratch[2 * blockIdx.x] = sum.sum, c.scratch[2 * blockIdx.x + 1] = sum.count;
}

// The results of all rows, from their sum. One block calls this.
template <class T>
__device__ inline void write_total(const ForwardCall& c, const LossSum& sum) {
  if (threadIdx.x != 0) return;
  if (c.total) *c.total = sum.count;
  if (c.reduction == Reduction::none) return;
  const double loss = c.reduction == Reduction::mean ? sum.sum / sum.count : sum.sum;
  set(*static_cast<T*>(c.loss), static_cast<acc_t<T>>(loss));
}

// A block's sum: the total if there is no other block, else kept for launch_total.
template <class T>
__device__ inline void finish_block(const ForwardCall& c, const LossSum& mine) {
  if (gridDim.x == 1)
    write_total<T>(c, sum_group<kBlock>(mine));
  else
    keep_sum(c, mine);
}

// Where there are more blocks than kRowBlocks: a block adds up kBlock of their sums, so that forward_total has few.
__global__ void __launch_bounds__(kBlock) fold_sums(const double* sums, int64_t blocks, double* folded) {
  const int64_t b = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  const LossSum sum = sum_group<kBlock>(b < blocks ? LossSum{sums[2 * b], sums[2 * b + 1]} : LossSum{0, 0});
  if (threadIdx.x == 0) folded[2 * blockIdx.x] = sum.sum, folded[2 * blockIdx.x + 1] = sum.count;
}

// One block: the sums of `blocks` blocks, in a fixed order.
template <class T>
__global__ void __launch_bounds__(kBlock) forward_total(ForwardCall c, const double* sums, int64_t blocks) {
  LossSum mine{0, 0};
  for (int64_t b = threadIdx.x; b < blocks; b += kBlock) mine = mine + LossSum{sums[2 * b], sums[2 * b + 1]};
  write_total<T>(c, sum_group<kBlock>(mine));
}

// The total of what keep_sum left of so many blocks.
template <class T>
void launch_total(Launcher& launch, const ForwardCall& c, int64_t blocks) {
  const double* sums = c.scratch;
  if (blocks > kRowBlocks) {
    double* folded = c.scratch + 2 * blocks;
    launch(fold_sums, ceil_div(blocks, kBlock), kBlock, sums, blocks, folded);
    sums = folded, blocks = ceil_div(blocks, kBlock);
  }
  launch(forward_total<T>, 1, kBlock, c, sums, blocks);
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

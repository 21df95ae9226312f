// Cross-entropy over class indices on a GPU, backward.
//
//   grad_x_j = (exp(x_j - lse) - [j == target]) * grad_loss
//
// Memory: reads every logit once and writes every gradient once, in place if that is asked for. Rows are walked as in
// the forward. A long row of several blocks is followed by a thread a row that writes the target's gradient.
//
// Stability: lse is split into high + low, so that x - high is exact where it matters; where float64 is too coarse for
// that (float64 logits, an lse beyond kFar) low is summed again. The target's gradient is minus the sum of the others'
// p where p - 1 would cancel. See docs/cross_entropy.md.
#include "cross_entropy_rows.cuh"

namespace fused_ops {
namespace cuda {
namespace {

template <class A>
struct Split {
  A high, low;
};

template <class T>
__device__ inline Split<acc_t<T>> split_lse(double lse) {
  using A = acc_t<T>;
  const A high = static_cast<A>(lse);
  return {high, static_cast<A>(lse - static_cast<double>(high))};
}
template <class T>
__device__ inline bool needs_sum(double lse) {
  return std::is_same_v<T, double> || fabs(lse) >= kFar;
}

template <class A>
__device__ inline double probability(A x, const Split<A>& lse) {
  return static_cast<double>(exact_exp((x - lse.high) - lse.low));
}

// What a row's upstream gradient is multiplied with; 0 if it is ignored, NaN if its target is no class.
template <class T>
__device__ inline double row_scale(const BackwardCall& c, int64_t row, const RowTarget& t) {
  if (!t.counts) return t.bad ? kNaN<double> : 0.0;
  const T* grad_loss = static_cast<const T*>(c.grad_loss);
  if (c.reduction == Reduction::none) return static_cast<double>(to_acc(grad_loss[row]));
  const double scale = static_cast<double>(to_acc(grad_loss[0]));
  return c.reduction == Reduction::mean ? scale / *c.total : scale;
}

// One thread's share of the gradients of n adjacent classes; returns its sum of p without the target's. All threads of
// the warp call this together. A row that does not count is filled with `factor`.
template <class T, int kGroup, bool kAligned>
__device__ inline sum_t<T> write_share(const T* x, T* grad, int64_t n, bool exists, const RowTarget& t,
                                       const Split<acc_t<T>>& lse, acc_t<T> factor, int lane) {
  using A = acc_t<T>;
  constexpr int kU = kUnroll<T, kGroup>, kV = kVector<T>;
  constexpr int64_t kStep = int64_t{kGroup} * kU * kV;
  const unsigned offset = misalignment(x), grad_offset = misalignment(grad);
  sum_t<T> others = 0;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    A v[kU * kV];
#pragma unroll
    for (int u = 0; u < kU; ++u) {
      const int64_t first = begin + (int64_t{u} * kGroup + lane) * kV;
      if (t.counts) load_vector(x + first, n - first, offset, -kInfinity<A>, v + u * kV);
    }
#pragma unroll
    for (int u = 0; u < kU; ++u) {
      const int64_t first = begin + (int64_t{u} * kGroup + lane) * kV, at = t.target - first;
      A* p = v + u * kV;
      A sum = 0;
#pragma unroll
      for (int k = 0; k < kV; ++k) {
        p[k] = t.counts ? exp_of<T>((p[k] - lse.high) - lse.low) : A(1);
        sum += k == at ? A(0) : p[k];
        p[k] = t.counts ? p[k] * factor : factor;
      }
      others += sum;
      store_vector<T, (kGroup < 32 ? kGroup : 32), kAligned>(grad + first, exists ? n - first : 0, grad_offset, lane,
                                                             p);
    }
  }
  return others;
}

template <class T, int kGroup, bool kAligned>
__global__ void __launch_bounds__(kBlock) backward_rows(BackwardCall c) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = c.layout.batch * c.layout.spatial, classes = c.layout.classes;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    RowTarget t{0, false, false};
    const T* x = static_cast<const T*>(c.logits);
    T* grad = static_cast<T*>(c.grad_logits);
    Split<A> lse{0, 0};
    bool far = false;
    double scale = 0, p_target = 0;
    if (row < rows) {
      t = row_target(c.targets, row, classes);
      x += row_offset(c.layout, row), grad += row_offset(c.grad_layout, row);
      lse = split_lse<T>(c.lse[row]), far = t.counts && needs_sum<T>(c.lse[row]);
      scale = row_scale<T>(c, row, t);
    }
    const bool any_far = kGroup < 32 ? __ballot_sync(kAll, far) != 0 : far;
    if (any_far) {
      const sum_t<T> sum = sum_group<kGroup>(far ? share_sum_exp<T, kGroup>(x, classes, lse.high, lane) : sum_t<T>(1));
      if (far) lse.low = static_cast<A>(log(sum));
    }
    if (t.counts) p_target = probability(to_acc(x[t.target]), lse);
    sync_group<kGroup>();  // all have read the target's logit before anything is written over it
    // Lanes of missing rows take part, with as many steps (the shuffles need all) and nothing to write.
    sum_t<T> others =
        write_share<T, kGroup, kAligned>(x, grad, classes, row < rows, t, lse, static_cast<A>(scale), lane);
    others = sum_group<kGroup>(others);
    sync_group<kGroup>();
    if (lane == 0 && t.counts)
      set(grad[t.target], static_cast<A>(target_residual(p_target, static_cast<double>(others)) * scale));
    if (lane == 0 && t.bad) refuse_target();
  }
}

// Before a long row is written over: what the blocks of its segments need of the whole row. Two doubles a row.
template <class T>
__global__ void __launch_bounds__(kBlock) backward_prepare(BackwardCall c) {
  using A = acc_t<T>;
  const int64_t rows = c.layout.batch * c.layout.spatial;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const RowTarget t = row_target(c.targets, row, c.layout.classes);
    const T* x = static_cast<const T*>(c.logits) + row_offset(c.layout, row);
    Split<A> lse = split_lse<T>(c.lse[row]);
    if (t.counts && needs_sum<T>(c.lse[row]))
      lse.low = static_cast<A>(log(
          sum_group<kBlock>(share_sum_exp<T, kBlock>(x, c.layout.classes, lse.high, static_cast<int>(threadIdx.x)))));
    if (threadIdx.x == 0) {
      c.scratch[2 * row] = static_cast<double>(lse.low);
      c.scratch[2 * row + 1] = t.counts ? probability(to_acc(x[t.target]), lse) : 0;
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlock) backward_segments(BackwardCall c, int64_t segments) {
  using A = acc_t<T>;
  constexpr int64_t kSegment = kSegmentBytes / static_cast<int64_t>(sizeof(T));
  const int64_t rows = c.layout.batch * c.layout.spatial;
  for (int64_t item = blockIdx.x; item < rows * segments; item += gridDim.x) {
    const int64_t row = item / segments, begin = (item - row * segments) * kSegment;
    const int64_t left = c.layout.classes - begin;
    const RowTarget t = row_target(c.targets, row, c.layout.classes);
    Split<A> lse = split_lse<T>(c.lse[row]);
    lse.low = static_cast<A>(c.scratch[2 * row]);
    const sum_t<T> others = write_share<T, kBlock, kAligned>(
        static_cast<const T*>(c.logits) + row_offset(c.layout, row) + begin,
        static_cast<T*>(c.grad_logits) + row_offset(c.grad_layout, row) + begin, left < kSegment ? left : kSegment,
        true, RowTarget{t.target - begin, t.counts, t.bad}, lse, static_cast<A>(row_scale<T>(c, row, t)),
        static_cast<int>(threadIdx.x));
    const sum_t<T> sum = sum_group<kBlock>(others);
    if (threadIdx.x == 0) c.scratch[2 * rows + item] = static_cast<double>(sum);
  }
}

// A thread a row: the target's gradient, from the segments' sums in order.
template <class T>
__global__ void __launch_bounds__(kBlock) backward_target(BackwardCall c, int64_t segments) {
  const int64_t rows = c.layout.batch * c.layout.spatial;
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kBlock) {
    const RowTarget t = row_target(c.targets, row, c.layout.classes);
    if (t.bad) refuse_target();
    if (!t.counts) continue;
    double others = 0;
    for (int64_t s = 0; s < segments; ++s) others += c.scratch[2 * rows + row * segments + s];
    T* grad = static_cast<T*>(c.grad_logits) + row_offset(c.grad_layout, row);
    const double residual = target_residual(c.scratch[2 * row + 1], others);
    set(grad[t.target], static_cast<acc_t<T>>(residual * row_scale<T>(c, row, t)));
  }
}

// Any strides, as forward_lanes.
template <class T, int kParts>
__global__ void __launch_bounds__(kBlock) backward_lanes(BackwardCall c) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kParts;
  const int lane = static_cast<int>(threadIdx.x) % kRows, part = static_cast<int>(threadIdx.x) / kRows;
  const int64_t rows = c.layout.batch * c.layout.spatial, classes = c.layout.classes;
  const int64_t stride = c.layout.class_stride, grad_stride = c.grad_layout.class_stride;
  __shared__ sum_t<T> shares[kBlock];
  const auto sum_parts = [&](sum_t<T> mine) {  // in order; every thread gets the sum
    if constexpr (kParts > 1) {
      __syncthreads();
      shares[threadIdx.x] = mine;
      __syncthreads();
      mine = 0;
      for (int k = 0; k < kParts; ++k) mine += shares[k * kRows + lane];
    }
    return mine;
  };
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + lane;
    RowTarget t{0, false, false};
    const T* x = static_cast<const T*>(c.logits);
    T* grad = static_cast<T*>(c.grad_logits);
    Split<A> lse{0, 0};
    bool far = false;
    double scale = 0, p_target = 0;
    if (row < rows) {
      t = row_target(c.targets, row, classes);
      x += row_offset(c.layout, row), grad += row_offset(c.grad_layout, row);
      lse = split_lse<T>(c.lse[row]), far = t.counts && needs_sum<T>(c.lse[row]);
      scale = row_scale<T>(c, row, t);
    }
    sum_t<T> again = 0;
    for (int64_t j = part; far && j < classes; j += kParts) again += exact_exp(to_acc(x[j * stride]) - lse.high);
    again = sum_parts(again);
    if (far) lse.low = static_cast<A>(log(again));
    if (t.counts) p_target = probability(to_acc(x[t.target * stride]), lse);
    if constexpr (kParts > 1) __syncthreads();  // all have read the target's logit before it is written over
    const A factor = static_cast<A>(scale);
    sum_t<T> others = 0;
#pragma unroll 4
    for (int64_t j = part; row < rows && j < classes; j += kParts) {
      const A p = t.counts ? exp_of<T>((to_acc(x[j * stride]) - lse.high) - lse.low) : A(1);
      if (j != t.target) others += p;
      set(grad[j * grad_stride], t.counts ? p * factor : factor);
    }
    others = sum_parts(others);
    if (part == 0 && t.counts)
      set(grad[t.target * grad_stride], static_cast<A>(target_residual(p_target, static_cast<double>(others)) * scale));
    if (part == 0 && t.bad) refuse_target();
  }
}

template <class T>
int32_t backward(const BackwardCall& c, void* stream) {
  Launcher launch(stream);
  const int64_t rows = c.layout.rows();
  const bool wide = c.layout.adjacent_classes() && c.grad_layout.adjacent_classes();
  const bool even = rows_are_aligned(c.grad_logits, c.grad_layout, sizeof(T));
  const int64_t segments = wide ? segments_of(c.dtype, c.layout) : 1;
  const auto blocks_of = [](int64_t items) { return std::min(items, kMaxBlocks); };
  if (!wide) {
    const bool share = c.layout.classes >= kManyClasses;
    launch(share ? backward_lanes<T, kShares> : backward_lanes<T, 1>,
           blocks_of(ceil_div(rows, share ? kBlock / kShares : kBlock)), kBlock, c);
  } else if (segments > 1) {
    launch(backward_prepare<T>, blocks_of(rows), kBlock, c);
    launch(even ? backward_segments<T, true> : backward_segments<T, false>, blocks_of(rows * segments), kBlock, c,
           segments);
    launch(backward_target<T>, blocks_of(ceil_div(rows, kBlock)), kBlock, c, segments);
  } else {
    FUSED_OPS_WITH_GROUP(vectors_of(c.dtype, c.layout), kGroup, {
      launch(even ? backward_rows<T, kGroup, true> : backward_rows<T, kGroup, false>,
             blocks_of(ceil_div(rows, kBlock / kGroup)), kBlock, c);
    })
  }
  return launch.error();
}

}  // namespace

int64_t backward_scratch(DType dtype, const RowLayout& layout) {
  const int64_t segments = segments_of(dtype, layout);
  return segments > 1 ? layout.rows() * (2 + segments) : 0;
}

int32_t cross_entropy_backward(const BackwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

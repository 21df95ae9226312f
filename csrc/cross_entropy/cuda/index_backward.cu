// Cross-entropy over class indices on a GPU, backward.
//
//   grad_x_j = (exp(x_j - lse) - [j == target]) * grad_loss
//
// Memory: reads every logit once and writes every gradient once, in place if that is asked for. Rows are walked as in
// the forward. A long row of several pieces is followed by a thread a row that writes the target's gradient.
//
// Stability: lse is split into high + low, so that x - high is exact where it matters; where float64 is too coarse for
// that (float64 logits, an lse beyond kFar) low is summed again. The target's gradient is minus the sum of the others'
// p where p - 1 would cancel. See docs/cross_entropy.md.
#include "cross_entropy/cuda/loops.cuh"

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

// What the rows' upstream gradient is multiplied with where they have one in common.
template <class T>
__device__ inline double common_scale(const BackwardCall& c) {
  if (c.reduction == Reduction::none) return 1;
  const double scale = c.grad_loss ? static_cast<double>(to_acc(static_cast<const T*>(c.grad_loss)[0])) : 1;
  return c.reduction == Reduction::mean ? scale / *c.total : scale;
}
// 0 if the row is ignored, NaN if its target is no class.
template <class T>
__device__ inline double row_scale(const BackwardCall& c, int64_t row, const RowTarget& t, double common) {
  if (!t.counts) return t.bad ? kNaN<double> : 0.0;
  if (c.reduction != Reduction::none) return common;
  return static_cast<double>(to_acc(static_cast<const T*>(c.grad_loss)[row]));
}

// One thread's share of the gradients of n adjacent classes; returns its sum of p without the target's. All threads of
// the warp call this together.
template <class T, int kGroup, bool kAligned>
__device__ inline sum_t<T> write_share(const T* x, T* grad, int n, int target, const Split<acc_t<T>>& lse,
                                       acc_t<T> factor, int lane) {
  using A = acc_t<T>;
  constexpr int kV = kVector<T>;
  const unsigned grad_offset = misalignment(grad);
  sum_t<T> others = 0;
  walk_any<T, kGroup>(x, n, lane, -kInfinity<A>, [&](const Words* words, int first, auto count) {
    constexpr int kCount = decltype(count)::value;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int begin = first + u * kGroup * kV, at = target - begin;
      A p[kV], sum = 0;
      unpack<T>(words[u], p);
#pragma unroll
      for (int k = 0; k < kV; ++k) p[k] = exp_of<T>((p[k] - lse.high) - lse.low);
      if (at >= 0 && at < kV) {
#pragma unroll
        for (int k = 0; k < kV; ++k) sum += k == at ? A(0) : p[k];
      } else {
#pragma unroll
        for (int k = 0; k < kV; ++k) sum += p[k];
      }
#pragma unroll
      for (int k = 0; k < kV; ++k) p[k] *= factor;
      others += sum;
      store_vector<T, 32, kAligned>(grad + begin, n - begin, grad_offset, lane, p);
    }
  });
  return others;
}

template <class T, int kGroup, bool kAligned>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 || !kAligned ? 2 : 3 - kFewerBlocks)
    backward_rows(BackwardCall c) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = c.layout.batch * c.layout.spatial;
  const int classes = static_cast<int>(c.layout.classes);
  const double common = common_scale<T>(c);
  for (int64_t row = int64_t{blockIdx.x} * kRows + group; row < rows; row += int64_t{gridDim.x} * kRows) {
    const RowTarget t = row_target(c.targets, row, classes);
    const T* x = static_cast<const T*>(c.logits) + row_offset(c.layout, row);
    T* grad = static_cast<T*>(c.grad_logits) + row_offset(c.grad_layout, row);
    const double scale = row_scale<T>(c, row, t, common);
    if (!t.counts) {
      fill_share<T, kGroup, kAligned>(grad, classes, static_cast<A>(scale), lane);
      if (lane == 0 && t.bad) refuse_target();
      continue;
    }
    const double whole = c.lse[row];
    Split<A> lse = split_lse<T>(whole);
    if (needs_sum<T>(whole))
      lse.low = static_cast<A>(log(sum_group<kGroup>(share_sum_exp<T, kGroup>(x, classes, lse.high, lane))));
    const double p_target = probability(to_acc(x[t.target]), lse);
    sync_group<kGroup>();  // all have read the target's logit before anything is written over it
    sum_t<T> others = write_share<T, kGroup, kAligned>(x, grad, classes, static_cast<int>(t.target), lse,
                                                       static_cast<A>(scale), lane);
    others = sum_group<kGroup>(others);
    sync_group<kGroup>();
    if (lane == 0) set(grad[t.target], static_cast<A>(target_residual(p_target, static_cast<double>(others)) * scale));
  }
}

// A thread a short row, in shared memory: logits become gradients there.
template <class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : 3) backward_tiles(BackwardCall c) {
  using A = acc_t<T>;
  constexpr int kStep = 8;
  __shared__ Words memory[kTileMemory];
  const int classes = static_cast<int>(c.layout.classes), lane = static_cast<int>(threadIdx.x);
  const Tile<T> tile(memory, classes);
  const int64_t rows = c.layout.batch * c.layout.spatial;
  const double common = common_scale<T>(c);
  for (int64_t base = int64_t{blockIdx.x} * kBlock; base < rows; base += int64_t{gridDim.x} * kBlock) {
    const int count = rows - base < kBlock ? static_cast<int>(rows - base) : kBlock;
    __syncthreads();
    tile.load(static_cast<const T*>(c.logits), c.layout, base, count);
    __syncthreads();
    if (lane < count) {
      const int64_t row = base + lane;
      const RowTarget t = row_target(c.targets, row, classes);
      T* x = tile.row();
      const double scale = row_scale<T>(c, row, t, common);
      const A factor = static_cast<A>(scale);
      if (!t.counts) {
        for (int j = 0; j < classes; ++j) set(x[j], factor);
        if (t.bad) refuse_target();
      } else {
        Split<A> lse = split_lse<T>(c.lse[row]);
        if (needs_sum<T>(c.lse[row])) {
          sum_t<T> sum = 0;
          for (int j = 0; j < classes; ++j) sum += exact_exp(to_acc(x[j]) - lse.high);
          lse.low = static_cast<A>(log(sum));
        }
        const double p_target = probability(to_acc(x[t.target]), lse);
        set(x[t.target], -kInfinity<A>);  // which adds nothing to the others
        sum_t<T> others = 0;
        int first = 0;
        const auto step = [&](int n) {
          A sum = 0;
#pragma unroll
          for (int k = 0; k < kStep; ++k) {
            if (k >= n) continue;
            const A p = exp_of<T>((to_acc(x[first + k]) - lse.high) - lse.low);
            sum += p;
            set(x[first + k], p * factor);
          }
          others += sum;
        };
        for (; first + kStep <= classes; first += kStep) step(kStep);
        if (first < classes) step(classes - first);
        set(x[t.target], static_cast<A>(target_residual(p_target, static_cast<double>(others)) * scale));
      }
    }
    __syncthreads();
    tile.store(static_cast<T*>(c.grad_logits), c.grad_layout, base, count);
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
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : 3 - kFewerBlocks)
    backward_pieces(BackwardCall c, Pieces pieces) {
  using A = acc_t<T>;
  const int64_t rows = c.layout.batch * c.layout.spatial;
  const int lane = static_cast<int>(threadIdx.x);
  const double common = common_scale<T>(c);
  for (int64_t item = blockIdx.x; item < rows * pieces.count; item += gridDim.x) {
    const int64_t row = item / pieces.count, begin = (item - row * pieces.count) * pieces.length;
    const int64_t left = c.layout.classes - begin;
    const int length = static_cast<int>(left < pieces.length ? left : pieces.length);
    const RowTarget t = row_target(c.targets, row, c.layout.classes);
    const int64_t at = t.target - begin;
    const T* x = static_cast<const T*>(c.logits) + row_offset(c.layout, row) + begin;
    T* grad = static_cast<T*>(c.grad_logits) + row_offset(c.grad_layout, row) + begin;
    const A factor = static_cast<A>(row_scale<T>(c, row, t, common));
    if (!t.counts) {
      fill_share<T, kBlock, kAligned>(grad, length, factor, lane);
      continue;
    }
    Split<A> lse = split_lse<T>(c.lse[row]);
    lse.low = static_cast<A>(c.scratch[2 * row]);
    const sum_t<T> others = write_share<T, kBlock, kAligned>(
        x, grad, length, at >= 0 && at < length ? static_cast<int>(at) : -kVector<T>, lse, factor, lane);
    const sum_t<T> sum = sum_group<kBlock>(others);
    if (lane == 0) c.scratch[2 * rows + item] = static_cast<double>(sum);
  }
}

// A thread a row: the target's gradient, from the pieces' sums in order.
template <class T>
__global__ void __launch_bounds__(kBlock) backward_target(BackwardCall c, int64_t pieces) {
  const int64_t rows = c.layout.batch * c.layout.spatial;
  const double common = common_scale<T>(c);
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kBlock) {
    const RowTarget t = row_target(c.targets, row, c.layout.classes);
    if (t.bad) refuse_target();
    if (!t.counts) continue;
    double others = 0;
    for (int64_t s = 0; s < pieces; ++s) others += c.scratch[2 * rows + row * pieces + s];
    T* grad = static_cast<T*>(c.grad_logits) + row_offset(c.grad_layout, row);
    const double residual = target_residual(c.scratch[2 * row + 1], others);
    set(grad[t.target], static_cast<acc_t<T>>(residual * row_scale<T>(c, row, t, common)));
  }
}

// Any strides, as forward_lanes.
template <class T, int kParts>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : 4 - kFewerBlocks) backward_lanes(BackwardCall c) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kParts, kAhead = sizeof(T) == 8 ? 4 : 8;
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
  const double common = common_scale<T>(c);
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
      scale = row_scale<T>(c, row, t, common);
    }
    sum_t<T> again = 0;
    for (int64_t j = part; far && j < classes; j += kParts) again += exact_exp(to_acc(x[j * stride]) - lse.high);
    again = sum_parts(again);
    if (far) lse.low = static_cast<A>(log(again));
    if (t.counts) p_target = probability(to_acc(x[t.target * stride]), lse);
    if constexpr (kParts > 1) __syncthreads();  // all have read the target's logit before it is written over
    const A factor = static_cast<A>(scale);
    sum_t<T> others = 0;
    const T* from = x + part * stride;
    T* to = grad + part * grad_stride;
    for (int64_t first = part; row < rows && first < classes; first += kAhead * kParts) {
      A p[kAhead], sum = 0;
      const int64_t left = ceil_div(classes - first, int64_t{kParts}), at = t.target - first;
      load_strided<T, kAhead>(from, kParts * stride, left, -kInfinity<A>, p);
      if (t.counts) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) p[k] = exp_of<T>((p[k] - lse.high) - lse.low);
        if (at >= 0 && at < kAhead * kParts) {
#pragma unroll
          for (int k = 0; k < kAhead; ++k) sum += k * kParts == static_cast<int>(at) ? A(0) : p[k];
        } else {
#pragma unroll
          for (int k = 0; k < kAhead; ++k) sum += p[k];
        }
      }
      T* here = to;
#pragma unroll
      for (int k = 0; k < kAhead; ++k, here += kParts * grad_stride)
        if (k < left) set(*here, t.counts ? p[k] * factor : factor);
      others += sum;
      from += kAhead * kParts * stride, to += kAhead * kParts * grad_stride;
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
  const Pieces pieces = wide ? pieces_of(c.dtype, c.layout) : Pieces{1, c.layout.classes};
  const auto run = [&](auto kernel, int64_t rows_a_block) {
    launch(kernel, blocks_of(ceil_div(rows, rows_a_block)), kBlock, c);
  };
  if (!wide) {
    if (c.layout.classes >= kManyClasses)
      run(backward_lanes<T, kShares>, kBlock / kShares);
    else
      run(backward_lanes<T, 1>, kBlock);
  } else if (pieces.count > 1) {
    run(backward_prepare<T>, 1);
    launch(even ? backward_pieces<T, true> : backward_pieces<T, false>, blocks_of(rows * pieces.count), kBlock, c,
           pieces);
    launch(backward_target<T>, blocks_of(ceil_div(rows, kBlock)), kBlock, c, pieces.count);
  } else if (vectors_of(c.dtype, c.layout) <= kTileVectors) {
    run(backward_tiles<T>, kBlock);
  } else if (vectors_of(c.dtype, c.layout) <= kWarpRow) {
    run(even ? backward_rows<T, 32, true> : backward_rows<T, 32, false>, kBlock / 32);
  } else {
    run(even ? backward_rows<T, kBlock, true> : backward_rows<T, kBlock, false>, 1);
  }
  return launch.error();
}

}  // namespace

int64_t backward_scratch(DType dtype, const RowLayout& layout) {
  const int64_t pieces = pieces_of(dtype, layout).count;
  return pieces > 1 ? layout.rows() * (2 + pieces) : 0;
}

int32_t cross_entropy_backward(const BackwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

// A mean or sum of cross-entropy over class indices and its gradient for an upstream gradient of 1, on a GPU.
//
// With m the maximum of a row and s = sum_j exp(x_j - m):  loss = log s - (x_target - m),
//                                                          grad_x_j = (exp(x_j - m) / s - [j == target]) * scale.
// Memory: every logit is read once and every gradient written once where a row of adjacent classes has up to
// kKeptBytes: between the two it is in shared memory (a thread a row), or in the registers of a warp or a block. Longer
// rows, and other strides, take the forward's and the backward's kernels: two reads. A call of up to kSteps rows for
// each thread, warp or block of one block is one launch without scratch; others add up the sums of several blocks, as
// the forward. A mean's scale is 1 / the rows that count: every block counts few targets itself, and a launch before
// counts many. Nothing is read on the host. scale_gradient below is what the backward of such a loss has left to do.
//
// Stability: the loss as in the forward. x_j - m does not depend on how large m is, and the gradient of a target is
// minus the sum of the other classes where p - 1 would cancel. See docs/cross_entropy.md.
#include "cross_entropy/cuda/online.cuh"

namespace fused_ops {
namespace cuda {
namespace {

constexpr int kKept = 8;                                      // 16-byte vectors of a row that a thread keeps
constexpr int64_t kWarpVectorsKept = 32 * kKept;              // of a row that a warp keeps
constexpr int64_t kKeptBytes = int64_t{kBlock} * kKept * 16;  // of a row that a block keeps
constexpr int64_t kSteps = 4;                                 // rows one after the other that one block may take
constexpr int64_t kFewTargets = 1024;                         // that every block counts itself

// How the rows of a call are spread.
enum class Way { tiles, warps, blocks, two_reads };
inline Way way_of(const WithGradientCall& c) {
  const RowLayout& l = c.forward.layout;
  const int64_t vectors = vectors_of(c.forward.dtype, l);
  if (!l.adjacent_classes() || !c.grad_layout.adjacent_classes() || vectors * 16 > kKeptBytes) return Way::two_reads;
  return vectors <= kTileVectors ? Way::tiles : vectors <= kWarpVectorsKept ? Way::warps : Way::blocks;
}
inline int64_t rows_a_block(Way way) { return way == Way::tiles ? kBlock : way == Way::warps ? kBlock / 32 : 1; }
// Beyond kRowBlocks only where a block would otherwise hold more rows than it has threads.
inline int64_t blocks_for(Way way, int64_t rows) {
  const int64_t steps = ceil_div(rows, rows_a_block(way));
  return steps <= kSteps ? 1 : std::max(blocks_of(steps), ceil_div(rows, kBlock));
}
inline bool counted_before(const ForwardCall& c) {
  return c.reduction == Reduction::mean && c.layout.rows() > kFewTargets;
}

// The rows that count of a block's share of the targets; every thread gets it.
__device__ inline double count_share(const ForwardCall& c, int64_t first, int64_t step) {
  const int64_t rows = c.layout.batch * c.layout.spatial;
  double count = 0;
  for (int64_t row = first; row < rows; row += step) count += row_target(c.targets, row, c.layout.classes).counts;
  return sum_group<kBlock>(count);
}
__global__ void __launch_bounds__(kBlock) count_rows(ForwardCall c, double* counts) {
  const double count = count_share(c, int64_t{blockIdx.x} * kBlock + threadIdx.x, int64_t{gridDim.x} * kBlock);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// What every row's gradient is multiplied with. counts: what `parts` blocks of count_rows found, or null.
__device__ inline double common_scale(const ForwardCall& c, const double* counts, int64_t parts) {
  if (c.reduction != Reduction::mean) return 1;
  if (!counts) return 1 / count_share(c, threadIdx.x, kBlock);
  double count = 0;
  for (int64_t b = threadIdx.x; b < parts; b += kBlock) count += counts[b];
  return 1 / sum_group<kBlock>(count);
}

// A row's gradient: exp(x_j - shift) * factor, and the target's.
template <class T>
struct RowGradient {
  acc_t<T> shift, factor, at_target;
};
template <class T>
__device__ inline RowGradient<T> row_gradient(const State<T>& state, acc_t<T> logit, double scale) {
  using A = acc_t<T>;
  const A max = larger(state.max, logit);
  const double others = static_cast<double>(state.sum) * static_cast<double>(rescale(state.max, max));
  const double at_target = static_cast<double>(exact_exp(logit - max)), sum = others + at_target;
  return {max, static_cast<A>(scale / sum), static_cast<A>(target_residual(at_target / sum, others / sum) * scale)};
}

// One thread's vectors of n adjacent classes, kGroup vectors apart; -inf behind the end and for the target.
template <class T, int kGroup, bool kMisaligned>
__device__ inline void load_kept(const T* x, int n, int target, int lane, Words* words) {
  constexpr int kV = kVector<T>;
  const unsigned offset = misalignment(x);
#pragma unroll
  for (int u = 0; u < kKept; ++u) {
    const int first = (lane + u * kGroup) * kV, at = target - first;
    if (first + kV <= n) {
      words[u] = load_at<T, kMisaligned>(x + first, offset);
    } else {
      acc_t<T> v[kV];
#pragma unroll
      for (int k = 0; k < kV; ++k) v[k] = first + k < n ? to_acc(x[first + k]) : -kInfinity<acc_t<T>>;
      words[u] = pack<T>(v);
    }
    if (at >= 0 && at < kV) leave_out<T>(words[u], at);
  }
}

// The gradients of these vectors. All threads of the warp call this together.
template <class T, int kGroup>
__device__ inline void store_kept(const Words* words, T* grad, int n, int target, int lane, const RowGradient<T>& row) {
  constexpr int kV = kVector<T>;
  const unsigned offset = misalignment(grad);
#pragma unroll
  for (int u = 0; u < kKept; ++u) {
    if (u * kGroup * kV >= n) break;
    const int first = (lane + u * kGroup) * kV, at = target - first;
    acc_t<T> v[kV];
    unpack<T>(words[u], v);
#pragma unroll
    for (int k = 0; k < kV; ++k) v[k] = k == at ? row.at_target : exp_of<T>(v[k] - row.shift) * row.factor;
    store_vector<T, 32, false>(grad + first, n - first, offset, lane, v);
  }
}

// A warp or a block a row, which stays in registers. Of at most kGroup rows.
template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock, 2)
    with_gradient_rows(WithGradientCall call, const double* counts, int64_t parts) {
  using A = acc_t<T>;
  const ForwardCall& c = call.forward;
  __shared__ HeldRow<T> held[kBlock];
  constexpr int kRows = kBlock / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = c.layout.batch * c.layout.spatial, begin = int64_t{blockIdx.x} * kRows + group;
  const int64_t stride = int64_t{gridDim.x} * kRows;
  const int classes = static_cast<int>(c.layout.classes);
  const double scale = common_scale(c, counts, parts);
  int taken = 0;
  for (int64_t row = begin; row < rows; row += stride, ++taken) {
    const RowTarget t = row_target(c.targets, row, classes);
    T* grad = static_cast<T*>(call.grad_logits) + row_offset(call.grad_layout, row);
    State<T> state = nothing<T>();
    A logit = 0;
    if (t.counts) {
      const T* x = static_cast<const T*>(c.logits) + row_offset(c.layout, row);
      const int target = static_cast<int>(t.target);
      Words words[kKept];
      logit = to_acc(x[t.target]);
      if (misalignment(x) == 0)
        load_kept<T, kGroup, false>(x, classes, target, lane, words);
      else
        load_kept<T, kGroup, true>(x, classes, target, lane, words);
#pragma unroll
      for (int u = 0; u < kKept; ++u)
        if (u * kGroup * kVector<T> < classes) add_vectors<T, 1>(state, words + u);
      state = reduce_online<kGroup>(state);
      store_kept<T, kGroup>(words, grad, classes, target, lane, row_gradient<T>(state, logit, scale));
    } else {
      fill_share<T, kGroup, false>(grad, classes, t.bad ? kNaN<A> : A(0), lane);
    }
    if (lane == taken) held[threadIdx.x] = {static_cast<double>(state.max), static_cast<double>(state.sum), logit};
  }
  finish_block<T>(c, finish_held<T>(c, held, taken, lane, begin, stride));
}

// A thread a short row, in shared memory: logits become gradients there.
template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    with_gradient_tiles(WithGradientCall call, const double* counts, int64_t parts) {
  using A = acc_t<T>;
  const ForwardCall& c = call.forward;
  __shared__ Words memory[kTileMemory];
  const int classes = static_cast<int>(c.layout.classes), lane = static_cast<int>(threadIdx.x);
  const Tile<T> tile(memory, classes);
  const int64_t rows = c.layout.batch * c.layout.spatial;
  const double scale = common_scale(c, counts, parts);
  LossSum sum{0, 0};
  for (int64_t base = int64_t{blockIdx.x} * kBlock; base < rows; base += int64_t{gridDim.x} * kBlock) {
    const int count = rows - base < kBlock ? static_cast<int>(rows - base) : kBlock;
    __syncthreads();
    tile.load(static_cast<const T*>(c.logits), c.layout, base, count);
    __syncthreads();
    if (lane < count) {
      const RowTarget t = row_target(c.targets, base + lane, classes);
      T* x = tile.row();
      State<T> state = nothing<T>();
      A logit = 0;
      if (t.counts) {
        logit = to_acc(x[t.target]);
        set(x[t.target], -kInfinity<A>);
        state = tile_online<T>(x, classes);
        const RowGradient<T> row = row_gradient<T>(state, logit, scale);
        for (int j = 0; j < classes; ++j) set(x[j], exp_of<T>(to_acc(x[j]) - row.shift) * row.factor);
        set(x[t.target], row.at_target);
      } else {
        for (int j = 0; j < classes; ++j) set(x[j], t.bad ? kNaN<A> : A(0));
      }
      finish_row<T>(c, base + lane, t, logit, static_cast<double>(state.max), static_cast<double>(state.sum), sum);
    }
    __syncthreads();
    tile.store(static_cast<T*>(call.grad_logits), call.grad_layout, base, count);
  }
  finish_block<T>(c, sum);
}

// Longer rows and other strides: the forward, then the backward, with lse and the count in scratch.
int32_t in_two_reads(const WithGradientCall& call, void* stream) {
  ForwardCall f = call.forward;
  const int64_t rows = f.layout.rows();
  f.total = f.scratch, f.lse = f.scratch + 1, f.scratch += rows + 1;
  const int32_t error = cross_entropy_forward(f, stream);
  if (error != 0) return error;
  BackwardCall b{};
  b.dtype = f.dtype, b.logits = f.logits, b.layout = f.layout, b.targets = f.targets, b.reduction = f.reduction;
  b.lse = f.lse, b.total = f.total, b.scratch = f.scratch;
  b.grad_logits = call.grad_logits, b.grad_layout = call.grad_layout;
  return cross_entropy_backward(b, stream);
}

template <class T>
int32_t with_gradient(const WithGradientCall& call, void* stream) {
  const Way way = way_of(call);
  if (way == Way::two_reads) return in_two_reads(call, stream);
  Launcher launch(stream);
  const ForwardCall& c = call.forward;
  const int64_t rows = c.layout.rows(), blocks = blocks_for(way, rows);
  const double* counts = nullptr;
  int64_t parts = 0;
  if (blocks > 1 && counted_before(c)) {
    double* found = c.scratch + forward_scratch(c.dtype, c.layout);
    parts = blocks_of(ceil_div(rows, kBlock)), counts = found;
    launch(count_rows, parts, kBlock, c, found);
  }
  const auto kernel = way == Way::tiles   ? with_gradient_tiles<T>
                      : way == Way::warps ? with_gradient_rows<T, 32>
                                          : with_gradient_rows<T, kBlock>;
  launch(kernel, blocks, kBlock, call, counts, parts);
  if (blocks > 1) launch_total<T>(launch, c, blocks);
  return launch.error();
}

// A thread a value of a dense (batch, classes, spatial) gradient.
template <class T>
__global__ void __launch_bounds__(kBlock) scale_gradient(ScaleGradientCall c) {
  using A = acc_t<T>;
  const A factor = to_acc(static_cast<const T*>(c.grad_loss)[0]);
  const int64_t count = c.batch * c.classes * c.spatial;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < count; i += int64_t{gridDim.x} * kBlock) {
    const int64_t row = i / (c.classes * c.spatial) * c.spatial + i % c.spatial;
    const A value = to_acc(static_cast<const T*>(c.gradient)[i]);
    const bool counts = target_at(c.targets, row) != c.targets.ignore_index;
    set(static_cast<T*>(c.result)[i], counts ? value * factor : value);
  }
}

}  // namespace

int64_t with_gradient_scratch(const WithGradientCall& call) {
  const ForwardCall& c = call.forward;
  const Way way = way_of(call);
  const int64_t rows = c.layout.rows(), forward = forward_scratch(c.dtype, c.layout);
  if (way == Way::two_reads) return rows + 1 + std::max(forward, backward_scratch(c.dtype, c.layout));
  if (blocks_for(way, rows) == 1) return 0;
  return forward + (counted_before(c) ? kRowBlocks : 0);
}

int32_t cross_entropy_with_gradient(const WithGradientCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.forward.dtype, T, return with_gradient<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

int32_t cross_entropy_scale_gradient(const ScaleGradientCall& call, void* stream) {
  Launcher launch(stream);
  const int64_t blocks = blocks_of(ceil_div(call.batch * call.classes * call.spatial, kBlock));
  FUSED_OPS_WITH_DTYPE(call.dtype, T, launch(scale_gradient<T>, blocks, kBlock, call); return launch.error())
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

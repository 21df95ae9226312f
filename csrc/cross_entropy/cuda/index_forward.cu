// Cross-entropy over class indices on a GPU, forward.
//
//   lse = log sum_j exp(x_j),   loss = lse - x_target
//
// Memory: reads every logit once, writes 8 bytes a row (lse), and the losses of the rows unless they are reduced. The
// maximum and the sum are found together (online softmax). Rows of adjacent classes: a thread takes a short row, which
// the block has read into shared memory, a warp or a block a longer one, 16 bytes a thread at a time, of any alignment;
// a row beyond kPieceBytes is cut into pieces for as many blocks. Rows adjacent themselves, as in (batch, classes,
// height, width): a thread a row, or kShares threads.
//
// Stability: the sum is taken over the classes other than the target, relative to their maximum, so that a confident
// right row keeps its loss; the logarithm and lse are double. How a row is cut depends on its length alone, and all
// merges are in a fixed order: no bit depends on the rest of the batch. See docs/cross_entropy.md.
#include "cross_entropy/cuda/online.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// One thread's share of n adjacent classes without the target (which may lie outside [0, n)).
template <class T, int kGroup>
__device__ inline State<T> share_online(const T* x, int n, int target, int lane) {
  using A = acc_t<T>;
  constexpr int kV = kVector<T>;
  State<T> state = nothing<T>();
  walk_any<T, kGroup>(x, n, lane, -kInfinity<A>, [&](Words* words, int first, auto count) {
    constexpr int kCount = decltype(count)::value;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int at = target - (first + u * kGroup * kV);
      if (at >= 0 && at < kV) leave_out<T>(words[u], at);
    }
    add_vectors<T, kCount>(state, words);
  });
  return state;
}

// A warp or a block a row, of at most kGroup rows.
template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : kForwardBlocks) forward_rows(ForwardCall c) {
  using A = acc_t<T>;
  __shared__ HeldRow<T> held[kBlock];
  constexpr int kRows = kBlock / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = c.layout.batch * c.layout.spatial, begin = int64_t{blockIdx.x} * kRows + group;
  const int64_t stride = int64_t{gridDim.x} * kRows;
  const int classes = static_cast<int>(c.layout.classes);
  int taken = 0;
  for (int64_t row = begin; row < rows; row += stride, ++taken) {
    const RowTarget t = row_target(c.targets, row, classes);
    State<T> state = nothing<T>();
    A logit = 0;
    if (t.counts) {
      const T* x = static_cast<const T*>(c.logits) + row_offset(c.layout, row);
      logit = to_acc(x[t.target]);
      state = share_online<T, kGroup>(x, classes, static_cast<int>(t.target), lane);
    }
    state = reduce_online<kGroup>(state);
    if (lane == taken) held[threadIdx.x] = {static_cast<double>(state.max), static_cast<double>(state.sum), logit};
  }
  keep_sum(c, finish_held<T>(c, held, taken, lane, begin, stride));
}

// A thread a short row, in shared memory.
template <class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : 3) forward_tiles(ForwardCall c) {
  using A = acc_t<T>;
  __shared__ Words memory[kTileMemory];
  const int classes = static_cast<int>(c.layout.classes), lane = static_cast<int>(threadIdx.x);
  const Tile<T> tile(memory, classes);
  const int64_t rows = c.layout.batch * c.layout.spatial;
  LossSum sum{0, 0};
  for (int64_t base = int64_t{blockIdx.x} * kBlock; base < rows; base += int64_t{gridDim.x} * kBlock) {
    const int count = rows - base < kBlock ? static_cast<int>(rows - base) : kBlock;
    __syncthreads();
    tile.load(static_cast<const T*>(c.logits), c.layout, base, count);
    __syncthreads();
    if (lane >= count) continue;
    const RowTarget t = row_target(c.targets, base + lane, classes);
    T* x = tile.row();
    State<T> state = nothing<T>();
    A logit = 0;
    if (t.counts) {
      logit = to_acc(x[t.target]);
      set(x[t.target], -kInfinity<A>);
      state = tile_online<T>(x, classes);
    }
    finish_row<T>(c, base + lane, t, logit, static_cast<double>(state.max), static_cast<double>(state.sum), sum);
  }
  keep_sum(c, sum);
}

// A block a piece of a long row: its maximum and sum, to scratch behind the blocks' sums.
template <class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : kForwardBlocks)
    forward_pieces(ForwardCall c, Pieces pieces) {
  const int64_t items = c.layout.batch * c.layout.spatial * pieces.count;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / pieces.count, begin = (item - row * pieces.count) * pieces.length;
    const int64_t left = c.layout.classes - begin, at = row_target(c.targets, row, c.layout.classes).target - begin;
    const int length = static_cast<int>(left < pieces.length ? left : pieces.length);
    State<T> state = nothing<T>();
    if (row_target(c.targets, row, c.layout.classes).counts)
      state = share_online<T, kBlock>(static_cast<const T*>(c.logits) + row_offset(c.layout, row) + begin, length,
                                      at >= 0 && at < length ? static_cast<int>(at) : -kVector<T>,
                                      static_cast<int>(threadIdx.x));
    state = reduce_online<kBlock>(state);
    double* out = c.scratch + 2 * (kRowBlocks + item);
    if (threadIdx.x == 0) out[0] = static_cast<double>(state.max), out[1] = static_cast<double>(state.sum);
  }
}

// A thread a row: merges its pieces in order.
template <class T>
__global__ void __launch_bounds__(kBlock) forward_finish(ForwardCall c, int64_t pieces) {
  const int64_t rows = c.layout.batch * c.layout.spatial;
  LossSum sum{0, 0};
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kBlock) {
    const RowTarget t = row_target(c.targets, row, c.layout.classes);
    const double* sums = c.scratch + 2 * (kRowBlocks + row * pieces);
    State<double> state = nothing<double>();
    for (int64_t s = 0; s < pieces; ++s) state = merged(state, {sums[2 * s], sums[2 * s + 1]});
    const T* x = static_cast<const T*>(c.logits) + row_offset(c.layout, row);
    finish_row<T>(c, row, t, t.counts ? to_acc(x[t.target]) : acc_t<T>(0), state.max, state.sum, sum);
  }
  keep_sum(c, sum);
}

// Any strides: kBlock / kParts rows side by side, each of kParts threads that take every kParts-th class.
template <class T, int kParts>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2 : kForwardBlocks) forward_lanes(ForwardCall c) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kParts, kAhead = sizeof(T) == 8 ? 4 : 8;
  const int lane = static_cast<int>(threadIdx.x) % kRows, part = static_cast<int>(threadIdx.x) / kRows;
  const int64_t rows = c.layout.batch * c.layout.spatial, classes = c.layout.classes, stride = c.layout.class_stride;
  __shared__ State<T> shares[kBlock];
  LossSum sum{0, 0};
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + lane;
    RowTarget t{0, false, false};
    const T* x = static_cast<const T*>(c.logits);
    State<T> state = nothing<T>();
    if (row < rows) t = row_target(c.targets, row, classes), x += row_offset(c.layout, row);
    const T* from = x + part * stride;
    for (int64_t first = part; t.counts && first < classes; first += kAhead * kParts) {
      A v[kAhead];
      load_strided<T, kAhead>(from, kParts * stride, ceil_div(classes - first, int64_t{kParts}), -kInfinity<A>, v);
      const int64_t at = t.target - first;
      if (at >= 0 && at < kAhead * kParts) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) v[k] = k * kParts == static_cast<int>(at) ? -kInfinity<A> : v[k];
      }
      add_values<T, kAhead>(state, v);
      from += kAhead * kParts * stride;
    }
    if constexpr (kParts > 1) {
      __syncthreads();
      shares[threadIdx.x] = state;
      __syncthreads();
#pragma unroll
      for (int k = 1; k < kParts; ++k)
        if (part == 0) state = merged(state, shares[k * kRows + lane]);
    }
    if (part == 0 && row < rows)
      finish_row<T>(c, row, t, t.counts ? to_acc(x[t.target * stride]) : A(0), static_cast<double>(state.max),
                    static_cast<double>(state.sum), sum);
  }
  keep_sum(c, sum);
}

template <class T>
int32_t forward(const ForwardCall& c, void* stream) {
  Launcher launch(stream);
  const int64_t rows = c.layout.rows();
  const Pieces pieces = pieces_of(c.dtype, c.layout);
  int64_t blocks = 0;
  const auto run = [&](auto kernel, int64_t rows_a_block) {
    blocks = std::max(blocks_of(ceil_div(rows, rows_a_block)), ceil_div(rows, kBlock));
    launch(kernel, blocks, kBlock, c);
  };
  if (!c.layout.adjacent_classes()) {
    if (c.layout.classes >= kManyClasses)
      run(forward_lanes<T, kShares>, kBlock / kShares);
    else
      run(forward_lanes<T, 1>, kBlock);
  } else if (pieces.count > 1) {
    launch(forward_pieces<T>, blocks_of(rows * pieces.count), kBlock, c, pieces);
    blocks = blocks_of(ceil_div(rows, kBlock));
    launch(forward_finish<T>, blocks, kBlock, c, pieces.count);
  } else if (vectors_of(c.dtype, c.layout) <= kTileVectors) {
    run(forward_tiles<T>, kBlock);
  } else if (vectors_of(c.dtype, c.layout) <= kWarpRow) {
    run(forward_rows<T, 32>, kBlock / 32);
  } else {
    run(forward_rows<T, kBlock>, 1);
  }
  launch_total<T>(launch, c, blocks);
  return launch.error();
}

}  // namespace

int64_t forward_scratch(DType dtype, const RowLayout& layout) {
  const int64_t pieces = pieces_of(dtype, layout).count, blocks = ceil_div(layout.rows(), kBlock);
  if (blocks > kRowBlocks && pieces == 1) return 2 * (blocks + ceil_div(blocks, kBlock));
  return 2 * (kRowBlocks + (pieces > 1 ? layout.rows() * pieces : 0));
}

int32_t cross_entropy_forward(const ForwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return forward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

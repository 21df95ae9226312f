// Cross-entropy with every option on a GPU, row by row, forward. With u, q and the mass S = sum_j q_j of
// cross_entropy/kernels.h:
//
//   lse = log sum_j exp(u_j),   nll = sum_j q_j (lse - u_j),   entropy = lse - sum_j p_j u_j
//
// Memory: 2 to 8 bytes a logit, as many a class probability, 1 a mask (twice with label smoothing and a mask of each
// row): each is read once. Writes 8 bytes a row and result. All sums are found together, relative to a running maximum.
// Rows are walked by a warp, a block or several blocks, or by a thread where they are short or adjacent. The kernels
// here take every option; the common ones have their own in options_fast_forward.cu.
//
// Stability: with one index a row, the sum leaves that class out; sums of steps are double. How a row is cut
// depends on its length alone, and all merges are in a fixed order. See docs/cross_entropy.md.
#include "cross_entropy/cuda/options_loops.cuh"
#include "cross_entropy/cuda/options_state.cuh"

namespace fused_ops {
namespace cuda {
namespace {

template <class T, class Walk>
__device__ inline void add_coefficients(const CrossEntropyRows& a, int64_t row, const Walk& w, unsigned allowed,
                                        acc_t<T> share, const acc_t<T>* u, State<acc_t<T>>& s) {
  using A = acc_t<T>;
  A q[Walk::kCount], mass = 0, dot = 0;
  const A base = base_of(s.max);
  load_coefficients<T>(a, row, w, allowed, share, q);
#pragma unroll
  for (int i = 0; i < Walk::kCount; ++i) {
    mass += q[i];
    dot += (allowed >> i & 1u) || q[i] != A(0) ? q[i] * (base - u[i]) : A(0);
  }
  s.mass += mass, s.dot += dot;
}

template <class T, class Walk>
__device__ inline void add_step(const CrossEntropyRows& a, int64_t row, const Walk& w, int64_t except, acc_t<T> share,
                                State<acc_t<T>>& s) {
  using A = acc_t<T>;
  constexpr int kCount = Walk::kCount;
  A u[kCount], max = s.max;
  const unsigned allowed = load_logits<T>(a, row, w, u);
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = u_of(a, u[i]), max = larger(max, u[i]);
  s = raised(s, max);
  const A base = base_of(s.max);
  const bool precise = a.statistics;  // entropy's terms have both signs: their sum does not forgive a fast exp
  A sum = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A below = u[i] - base, e = w.at(i) == except ? A(0) : precise ? exact_exp(below) : exp_of<T>(below);
    sum += e;
    if (a.statistics) weighted += e == A(0) ? A(0) : e * below;
  }
  s.sum += sum, s.weighted += weighted;
  if (a.statistics) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if ((allowed >> i & 1u) && preferred(u[i], w.at(i), s.best, s.index)) s.best = u[i], s.index = w.at(i);
  }
  if (has_coefficients(a)) add_coefficients<T>(a, row, w, allowed, share, u, s);
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock, 2) options_forward_rows(RowsForwardCall c) {
  using A = acc_t<T>;
  using Walk = AdjacentWalk<T, kGroup>;
  constexpr int kRows = kBlock / kGroup;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    OptionTarget t{0, 1, -1, false, true, true};
    State<A> s = nothing<A>();
    if (row < rows) t = option_target(a, row);
    if (row < rows && is_walked(a, t)) {
      const A share = smoothing_share<A>(a, c.scratch, row);
      for (int64_t first = lane * Walk::kV; first < a.layout.classes; first += Walk::kStep)
        add_step<T>(a, row, Walk{first, a.layout.classes}, t.target, share, s);
      if (a.sparse && !t.ignored) add_indices<T>(a, row, t, lane, kGroup, s);
    }
    s = reduce_group<kGroup>(s, both<A>);
    if (lane == 0 && row < rows) finish_row<T>(c.args, row, t, s);
  }
}

// A block a segment of a long row: its state, to scratch behind the shares.
template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    options_forward_segments(RowsForwardCall c, int64_t segments, double* parts) {
  using A = acc_t<T>;
  using Walk = AdjacentWalk<T, kBlock>;
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const auto [row, begin, end] = segment_of(a.layout, item, segments);
    const int64_t segment = item - row * segments;
    const OptionTarget t = option_target(a, row);
    State<A> s = nothing<A>();
    if (is_walked(a, t)) {
      const A share = smoothing_share<A>(a, c.scratch, row);
      for (int64_t first = begin + int64_t{threadIdx.x} * Walk::kV; first < end; first += Walk::kStep)
        add_step<T>(a, row, Walk{first, end}, t.target, share, s);
      if (a.sparse && !t.ignored) add_indices<T>(a, row, t, segment * kBlock + threadIdx.x, segments * kBlock, s);
    }
    s = reduce_group<kBlock>(s, both<A>);
    if (threadIdx.x != 0) continue;
    keep_part(parts + kParts * item, s);
  }
}

// A thread a row: merges its segments in order.
template <class T>
__global__ void __launch_bounds__(kBlock)
    options_forward_finish(RowsForwardCall c, int64_t segments, const double* parts) {
  using A = acc_t<T>;
  const CrossEntropyRows& a = c.args.rows;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kBlock) {
    State<A> s = nothing<A>();
    for (int64_t k = 0; k < segments; ++k) {
      const double* in = parts + kParts * (row * segments + k);
      s = both(s, State<A>{static_cast<A>(in[0]), static_cast<A>(in[1]), in[2], in[3], in[4], in[5], in[6],
                           static_cast<int64_t>(in[7])});
    }
    finish_row<T>(c.args, row, option_target(a, row), s);
  }
}

// Any strides: kBlock / kShare rows side by side, each of kShare threads that take every kShare-th class.
template <class T, int kShare>
__global__ void __launch_bounds__(kBlock, 2) options_forward_lanes(RowsForwardCall c) {
  using A = acc_t<T>;
  using Walk = StridedWalk<kShare>;
  constexpr int kRows = kBlock / kShare;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kRows, part = static_cast<int>(threadIdx.x) / kRows;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  __shared__ State<A> states[kBlock];
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + lane;
    OptionTarget t{0, 1, -1, false, true, true};
    State<A> s = nothing<A>();
    if (row < rows) t = option_target(a, row);
    if (row < rows && is_walked(a, t)) {
      const A share = smoothing_share<A>(a, c.scratch, row);
      for (int64_t first = part; first < a.layout.classes; first += Walk::kStep)
        add_step<T>(a, row, Walk{first, a.layout.classes}, t.target, share, s);
      if (a.sparse && !t.ignored) add_indices<T>(a, row, t, part, kShare, s);
    }
    if constexpr (kShare > 1) {
      __syncthreads();
      states[threadIdx.x] = s;
      __syncthreads();
#pragma unroll 1
      for (int k = 1; k < kShare; ++k)
        if (part == 0) s = both(s, states[k * kRows + lane]);
    }
    if (part == 0 && row < rows) finish_row<T>(c.args, row, t, s);
  }
}

template <class T>
int32_t forward(const RowsForwardCall& c, void* stream) {
  Launcher launch(stream);
  const CrossEntropyRows& a = c.args.rows;
  const int64_t rows = a.layout.rows(), segments = option_segments(a.layout);
  double* parts = c.scratch + shares_of(a);
  launch_shares(launch, a, c.scratch);
  const Kind kind = kind_of(a);
  if (kind != Kind::general) {
    launch_fast_forward(launch, c, kind, segments, parts);
  } else if (!a.layout.adjacent_classes()) {
    const bool share = a.layout.classes >= kManyClasses;
    launch(share ? options_forward_lanes<T, kShares> : options_forward_lanes<T, 1>,
           blocks_for(ceil_div(rows, share ? kBlock / kShares : kBlock)), kBlock, c);
  } else if (segments > 1) {
    launch(options_forward_segments<T>, blocks_for(rows * segments), kBlock, c, segments, parts);
  } else {
    FUSED_OPS_WITH_OPTION_GROUP(vectors_of(a.dtype, a.layout), kGroup, {
      launch(options_forward_rows<T, kGroup>, blocks_for(ceil_div(rows, kBlock / kGroup)), kBlock, c);
    })
  }
  if (segments > 1)
    launch(options_forward_finish<T>, blocks_for(ceil_div(rows, kBlock)), kBlock, c, segments,
           static_cast<const double*>(parts));
  return launch.error();
}

}  // namespace

int64_t rows_forward_scratch(const CrossEntropyRows& a) {
  const int64_t segments = option_segments(a.layout);
  return shares_of(a) + (segments > 1 ? kParts * a.layout.rows() * segments : 0);
}

int32_t cross_entropy_rows_forward(const RowsForwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.args.rows.dtype, T, return forward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

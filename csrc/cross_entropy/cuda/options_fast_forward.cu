// Cross-entropy's common options on a GPU, forward: what options_forward.cu computes, for float accumulators and
// without mask and statistics.
//
// Memory: 2 to 4 bytes a logit, as many a class probability, each read once. Writes 8 bytes a row and result. A kernel
// each for the kinds of options, without a branch per element: a thread loads 64 bytes before it uses the first.
//
// Stability: as there. A step's sums are float, sums of steps double. See docs/cross_entropy.md.
#include "cross_entropy/cuda/options_fast.cuh"
#include "cross_entropy/cuda/options_state.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// The sums of a kind that is not general.
struct FastState {
  float max;
  double sum, mass, dot, t_weight;  // as in State
};
__device__ inline FastState raised(FastState s, float max) {
  if (!(max > s.max)) return s;
  s.sum *= static_cast<double>(expf(s.max - max));  // 0 where s.max is -inf
  if (s.mass != 0) s.dot += s.mass * (static_cast<double>(max) - static_cast<double>(base_of(s.max)));
  s.max = max;
  return s;
}
__device__ inline FastState sum_of(const FastState& a, const FastState& b) {
  const float max = larger(a.max, b.max);
  const FastState x = raised(a, max), y = raised(b, max);
  return {max, x.sum + y.sum, x.mass + y.mass, x.dot + y.dot, x.t_weight + y.t_weight};
}
// Over kLanes lanes of a warp.
template <int kLanes, bool kDot, bool kWeight>
__device__ inline FastState warp_total(FastState s) {
  float max = s.max;
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) max = larger(max, shuffled(max, d));
  s = raised(s, max);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    s.sum += shuffled(s.sum, d);
    if constexpr (kDot) s.mass += shuffled(s.mass, d), s.dot += shuffled(s.dot, d);
    if constexpr (kWeight) s.t_weight += shuffled(s.t_weight, d);
  }
  return s;
}
// Over a group; its first lane gets the result.
template <int kGroup, bool kDot, bool kWeight>
__device__ inline FastState group_total(FastState s) {
  s = warp_total < kGroup<32 ? kGroup : 32, kDot, kWeight>(s);
  if constexpr (kGroup > 32) {
    constexpr int kWarps = kGroup / 32;
    __shared__ FastState warps[kWarps];
    __syncthreads();  // the totals before these have been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x < 32) s = warp_total<kWarps, kDot, kWeight>(warps[threadIdx.x % kWarps]);
  }
  return s;
}

// Adds q and q d of `left` first classes (or all). Without probabilities q is the share, and the classes are counted in
// place of its sum.
template <int kV, bool kDense>
__device__ inline void add_products(const float* d, const float* p, int left, float soft, float share, float& mass,
                                    float& dot) {
  float q[kV];
#pragma unroll
  for (int k = 0; k < kV; ++k) q[k] = kDense ? soft * p[k] + share : share;
  if (left >= kV) {
    if constexpr (!kDense) mass += kV;
#pragma unroll
    for (int k = 0; k < kV; ++k) mass += kDense ? q[k] : 0.0f, dot += q[k] * d[k];
  } else {
    if constexpr (!kDense) mass += static_cast<float>(left);
#pragma unroll
    for (int k = 0; k < kV; ++k)
      if (k < left) mass += kDense ? q[k] : 0.0f, dot += q[k] * d[k];
  }
}

// Adds a step's logits v and probabilities p. Of its u-th kV classes the first `have - u kApart` are there.
template <class T, class Step, Kind kKind, bool kFull>
__device__ inline void add_fast(const Bend& bend, float* v, const float* p, int have, int place, float soft,
                                float share, FastState& s) {
  constexpr int kCount = Step::kCount, kV = Step::kV;
  constexpr bool kDense = kFactors<kKind>;
  float max = s.max;
  if constexpr (kKind == Kind::bent) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = bend.u_of(bend.bent(v[i]));
      if (!kFull && i % kV >= have - i / kV * Step::kApart) v[i] = -kInfinity<float>;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = larger(max, v[i]);
  s = raised(s, max);
  const float base = base_of(s.max);
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] -= base;
  if constexpr (kDense || kKind == Kind::smooth) {
    float mass = 0, dot = 0;
#pragma unroll
    for (int u = 0; u < Step::kU; ++u) {
      const int left = kFull ? kV : have - u * Step::kApart;
      if (left > 0) add_products<kV, kDense>(v + u * kV, kDense ? p + u * kV : p, left, soft, share, mass, dot);
    }
    s.mass += static_cast<double>(mass) * (kDense ? 1.0 : static_cast<double>(share));
    s.dot -= static_cast<double>(dot);
  }
  if (place >= 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = i == place ? -kInfinity<float> : v[i];
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += exp_of<T>(v[i]);
  s.sum += static_cast<double>(sum);
}

// Loads a step of vectors and adds it.
template <class T, class Step, Kind kKind, bool kFull>
__device__ inline void add_vectors(const Bend& bend, const T* x, const factor_t<T, kKind>* q, unsigned x_offset,
                                   unsigned q_offset, int left, int target, float soft, float share, FastState& s) {
  using P = factor_t<T, kKind>;
  Words xs[Step::kU], qs[Step::kU * kPieces<Step, P>];
  float v[Step::kCount], p[Step::kCount];
  load_fast<kFull, Step>(x, x_offset, left, -kInfinity<float>, xs);
  if constexpr (kFactors<kKind>) load_fast<kFull, Step>(q, q_offset, left, 0.0f, qs);
#pragma unroll
  for (int u = 0; u < Step::kU; ++u) {
    unpack_step<Step, T>(xs, u, v + u * Step::kV);
    if constexpr (kFactors<kKind>) unpack_step<Step, P>(qs, u, p + u * Step::kV);
  }
  add_fast<T, Step, kKind, kFull>(bend, v, p, left, Step::place(target), soft, share, s);
}

// A thread's share of a row's classes [begin, end).
template <class T, int kGroup, Kind kKind>
__device__ inline FastState fast_share(const CrossEntropyRows& a, int64_t row, int64_t begin, int64_t end,
                                       int64_t except, float share, int lane) {
  using Step = FastStep<T, kGroup, kKind>;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.layout, row) + begin + lane * Step::kV;
  const factor_t<T, kKind>* q = nullptr;
  float soft = 0;
  if constexpr (kFactors<kKind>) {
    const auto factors = factors_of<factor_t<T, kKind>>(a, row);
    q = factors.data + begin + lane * Step::kV;
    soft = static_cast<float>(factors.soft), share = static_cast<float>(factors.share);
  }
  const unsigned x_offset = misalignment(x), q_offset = misalignment(q);
  int left = static_cast<int>(end - begin) - lane * Step::kV;  // from the thread's first class on
  int target = except >= begin && except < end ? static_cast<int>(except - begin) - lane * Step::kV : -1;
  const Bend bend(a);
  FastState s{-kInfinity<float>, 0, 0, 0, 0};
  for (; left + lane * Step::kV >= Step::kClasses; left -= Step::kClasses) {
    add_vectors<T, Step, kKind, true>(bend, x, q, x_offset, q_offset, left, target, soft, share, s);
    x += Step::kClasses, q += Step::kClasses, target -= Step::kClasses;
  }
  if (left > 0) add_vectors<T, Step, kKind, false>(bend, x, q, x_offset, q_offset, left, target, soft, share, s);
  return s;
}

// The group's first lane gets the row's state in classes [begin, end). All threads of the warp call this together.
template <class T, int kGroup, Kind kKind>
__device__ inline State<float> fast_row(const CrossEntropyRows& a, int64_t row, bool walked, int64_t begin, int64_t end,
                                        const OptionTarget& t, int lane) {
  FastState s{-kInfinity<float>, 0, 0, 0, 0};
  if (walked) {
    s = fast_share<T, kGroup, kKind>(a, row, begin, end, t.target, smoothing_share<float>(a, nullptr, row), lane);
    if (a.sparse && begin == 0) add_indices<T>(a, row, t, lane, kGroup, s);
  }
  constexpr bool kDot = kKind == Kind::smooth || kFactors<kKind>;
  s = a.sparse ? group_total<kGroup, true, true>(s) : group_total<kGroup, kDot, false>(s);
  return {s.max, s.max, s.sum, 0, s.mass, s.dot, s.t_weight, 0};
}

template <class T, int kGroup, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>)) options_forward_fast_rows(RowsForwardCall c) {
  constexpr int kRows = kBlock / kGroup;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    OptionTarget t{0, 1, -1, false, true, true};
    if (row < rows) t = option_target(a, row);
    const State<float> s =
        fast_row<T, kGroup, kKind>(a, row, row < rows && is_walked(a, t), 0, a.layout.classes, t, lane);
    if (lane == 0 && row < rows) finish_row<T>(c.args, row, t, s);
  }
}

// Rows side by side, as options_forward_lanes: every kShare-th class, kCount of them in a step.
template <class T, int kShare, Kind kKind, bool kFull>
__device__ inline void add_strided(const Bend& bend, const T* x, int64_t x_apart, const factor_t<T, kKind>* q,
                                   int64_t q_apart, int left, int place, float soft, float share, FastState& s) {
  using Step = LaneStep;
  float v[Step::kCount], p[Step::kCount];
#pragma unroll
  for (int i = 0; i < Step::kCount; ++i) {
    v[i] = kFull || i < left ? to_acc(x[i * x_apart]) : -kInfinity<float>;
    if constexpr (kFactors<kKind>) p[i] = kFull || i < left ? to_acc(q[i * q_apart]) : 0.0f;
  }
  add_fast<T, Step, kKind, kFull>(bend, v, p, left, place < Step::kCount ? place : -1, soft, share, s);
}
template <class T, int kShare, Kind kKind>
__device__ inline FastState strided_share(const CrossEntropyRows& a, int64_t row, int64_t except, int part) {
  float soft = 0, share = smoothing_share<float>(a, nullptr, row);
  const int64_t x_apart = a.layout.class_stride * kShare;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.layout, row) + part * a.layout.class_stride;
  const factor_t<T, kKind>* q = nullptr;
  int64_t q_apart = 0;
  if constexpr (kFactors<kKind>) {
    const auto factors = factors_of<factor_t<T, kKind>>(a, row);
    q = factors.data + part * factors.stride, q_apart = factors.stride * kShare;
    soft = static_cast<float>(factors.soft), share = static_cast<float>(factors.share);
  }
  const Bend bend(a);
  FastState s{-kInfinity<float>, 0, 0, 0, 0};
  int64_t left = (a.layout.classes - part + kShare - 1) / kShare;
  int64_t place = except >= 0 && except % kShare == part ? except / kShare : -1;
  for (; left >= LaneStep::kCount; left -= LaneStep::kCount, place -= LaneStep::kCount) {
    const int at = place < LaneStep::kCount ? static_cast<int>(place) : -1;
    add_strided<T, kShare, kKind, true>(bend, x, x_apart, q, q_apart, LaneStep::kCount, at, soft, share, s);
    x += LaneStep::kCount * x_apart, q += LaneStep::kCount * q_apart;
  }
  if (left > 0)
    add_strided<T, kShare, kKind, false>(bend, x, x_apart, q, q_apart, static_cast<int>(left), static_cast<int>(place),
                                         soft, share, s);
  return s;
}
template <class T, int kShare, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>)) options_forward_fast_lanes(RowsForwardCall c) {
  constexpr int kRows = kBlock / kShare;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kRows, part = static_cast<int>(threadIdx.x) / kRows;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  __shared__ FastState states[kBlock];
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + lane;
    OptionTarget t{0, 1, -1, false, true, true};
    FastState s{-kInfinity<float>, 0, 0, 0, 0};
    if (row < rows) t = option_target(a, row);
    if (row < rows && is_walked(a, t)) {
      s = strided_share<T, kShare, kKind>(a, row, t.target, part);
      if (a.sparse) add_indices<T>(a, row, t, part, kShare, s);
    }
    if constexpr (kShare > 1) {
      __syncthreads();
      states[threadIdx.x] = s;
      __syncthreads();
#pragma unroll 1
      for (int k = 1; k < kShare && part == 0; ++k) s = sum_of(s, states[k * kRows + lane]);
    }
    if (part == 0 && row < rows)
      finish_row<T>(c.args, row, t, State<float>{s.max, s.max, s.sum, 0, s.mass, s.dot, s.t_weight, 0});
  }
}

// A block a segment of a long row: its state, to scratch.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>))
    options_forward_fast_segments(RowsForwardCall c, int64_t segments, double* parts) {
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const auto [row, begin, end] = segment_of(a.layout, item, segments);
    const OptionTarget t = option_target(a, row);
    const State<float> s =
        fast_row<T, kBlock, kKind>(a, row, is_walked(a, t), begin, end, t, static_cast<int>(threadIdx.x));
    if (threadIdx.x == 0) keep_part(parts + kParts * item, s);
  }
}

template <class T, int kGroup, Kind kKind>
void launch_rows(Launcher& launch, const RowsForwardCall& c) {
  const int64_t rows = c.args.rows.layout.rows();
  launch(options_forward_fast_rows<T, kGroup, kKind>, blocks_for(ceil_div(rows, kBlock / kGroup)), kBlock, c);
}

template <class T>
void launch_fast(Launcher& launch, const RowsForwardCall& c, Kind kind, int64_t segments, double* parts) {
  if constexpr (sizeof(T) <= 4) {
    const CrossEntropyRows& a = c.args.rows;
    const int64_t rows = a.layout.rows(), vectors = vectors_of(a.dtype, a.layout);
    const bool wide = a.layout.adjacent_classes();
    FUSED_OPS_WITH_KIND(kind, kKind, {
      if (!wide && a.layout.classes >= kManyClasses) {
        launch(options_forward_fast_lanes<T, kShares, kKind>, blocks_for(ceil_div(rows, kBlock / kShares)), kBlock, c);
      } else if (!wide || vectors <= 8) {
        launch(options_forward_fast_lanes<T, 1, kKind>, blocks_for(ceil_div(rows, kBlock)), kBlock, c);
      } else if (segments > 1) {
        launch(options_forward_fast_segments<T, kKind>, blocks_for(rows * segments), kBlock, c, segments, parts);
      } else if (vectors <= kWarpVectors) {
        launch_rows<T, 32, kKind>(launch, c);
      } else {
        launch_rows<T, kBlock, kKind>(launch, c);
      }
    })
  }
}

}  // namespace

void launch_fast_forward(Launcher& launch, const RowsForwardCall& c, Kind kind, int64_t segments, double* parts) {
  FUSED_OPS_WITH_DTYPE(c.args.rows.dtype, T, launch_fast<T>(launch, c, kind, segments, parts))
}

}  // namespace cuda
}  // namespace fused_ops

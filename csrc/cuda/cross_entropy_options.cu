// Cross-entropy with every option on a GPU, row by row, forward. With u, q and the mass S = sum_j q_j of
// ../cross_entropy_rows.h:
//
//   lse = log sum_j exp(u_j),   nll = sum_j q_j (lse - u_j),   entropy = lse - sum_j p_j u_j
//
// Memory: 2 to 8 bytes a logit, as many a class probability, 1 a mask (twice with label smoothing and a mask of each
// row): each is read once. Writes 8 bytes a row and result. All sums are found together, relative to a running maximum.
// Rows are walked by a warp, a block or several blocks, or by a thread where they are short or adjacent. The common
// options have kernels without a branch per element and load 64 bytes a thread before they use the first.
//
// Stability: with one index a row, the sum leaves that class out; sums of steps are double. How a row is cut
// depends on its length alone, and all merges are in a fixed order. See docs/cross_entropy.md.
#include "cross_entropy_options.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// Sums over some classes, relative to their maximum (to 0 where that is -inf).
template <class A>
struct State {
  A max, best;                                // best: the maximum as argmax sees it, where a NaN is the largest
  double sum, weighted, mass, dot, t_weight;  // exp(u - max), that times u - max; q, q (max - u); weight of indices
  int64_t index;                              // of best
};
template <class A>
__device__ inline State<A> nothing() {
  return {-kInfinity<A>, -kInfinity<A>, 0, 0, 0, 0, 0, 0};
}
template <class A>
__device__ inline State<A> shuffled(const State<A>& s, int lanes) {
  using cuda::shuffled;
  return {shuffled(s.max, lanes),  shuffled(s.best, lanes), shuffled(s.sum, lanes),      shuffled(s.weighted, lanes),
          shuffled(s.mass, lanes), shuffled(s.dot, lanes),  shuffled(s.t_weight, lanes), shuffled(s.index, lanes)};
}

// Whether argmax prefers the first value: a NaN, the larger, the one of the lower index.
template <class A>
__device__ inline bool preferred(A a, int64_t a_index, A b, int64_t b_index) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a != b) return a > b;
  return a_index < b_index;
}

template <class A>
__device__ inline A base_of(A max) {
  return max == -kInfinity<A> ? A(0) : max;
}

// The same sums relative to a maximum that is not smaller.
template <class A>
__device__ inline State<A> raised(State<A> s, A max) {
  if (!(max > s.max)) return s;
  const double factor = s.max == -kInfinity<A> ? 0.0 : static_cast<double>(exact_exp(s.max - max));
  const double fall = static_cast<double>(s.max) - static_cast<double>(max);
  s.weighted = factor == 0 ? 0.0 : factor * (s.weighted + fall * s.sum);
  s.sum *= factor;
  if (s.mass != 0) s.dot += s.mass * (static_cast<double>(max) - static_cast<double>(base_of(s.max)));
  s.max = max;
  return s;
}

template <class A>
__device__ inline State<A> both(const State<A>& a, const State<A>& b) {
  const A max = larger(a.max, b.max);
  const State<A> x = raised(a, max), y = raised(b, max);
  const bool first = preferred(x.best, x.index, y.best, y.index);
  return {max,
          first ? x.best : y.best,
          x.sum + y.sum,
          x.weighted + y.weighted,
          x.mass + y.mass,
          x.dot + y.dot,
          x.t_weight + y.t_weight,
          first ? x.index : y.index};
}

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

// What every `step`-th of a row's indices adds, with probabilities of their own.
template <class T, class S>
__device__ inline void add_indices(const CrossEntropyRows& a, int64_t row, const OptionTarget& t, int64_t begin,
                                   int64_t step, S& s) {
  const double base = static_cast<double>(base_of(s.max)), soft = 1.0 - a.label_smoothing;
  for (int64_t k = begin; k < a.per_row; k += step) {
    const int64_t c = index_of(a, t, k);
    if (c == a.indices.ignore_index) continue;
    const double share = a.sparse[t.first + k * t.step] * weight_of<T>(a, c);
    s.t_weight += share, s.mass += soft * share;
    if (share != 0) s.dot += soft * share * (base - static_cast<double>(u_of(a, bent_at<T>(a, row, c))));
  }
}

template <class T>
__device__ inline void finish_row(const CrossEntropyRowsForward& f, int64_t row, const OptionTarget& t,
                                  const State<acc_t<T>>& s) {
  using A = acc_t<T>;
  const CrossEntropyRows& a = f.rows;
  const A u_target = t.one ? u_of(a, bent_at<T>(a, row, t.target)) : A(0);
  const double max = static_cast<double>(s.max), below = t.one ? static_cast<double>(u_target) - max : 0;
  const double rest = !t.one ? s.sum - 1.0 : below == 0 ? s.sum : (s.sum - 1.0) + exp(below);
  const double log_sum = s.max == -kInfinity<A> ? kNaN<double> : log1p(rest);
  const double soft = 1.0 - a.label_smoothing, share = t.one ? weight_of<T>(a, t.target) : 0;
  double nll = has_coefficients(a) || a.sparse ? s.dot + s.mass * log_sum : 0;
  if (t.one) nll += soft * share * (log_sum - below);
  const bool counts = !t.ignored;
  const double poison = t.bad ? kNaN<double> : 0.0;
  f.nll[row] = (counts ? nll : 0) + poison, f.lse[row] = (counts || a.statistics ? max + log_sum : 0) + poison;
  f.mass[row] = (counts ? s.mass : 0) + poison;
  f.target_weight[row] = counts ? (a.has_dense ? 1.0 : a.sparse ? s.t_weight : share) : 0;
  if (a.statistics) {
    const double e = t.one ? exp(below) : 0, weighted = s.weighted + (e == 0 ? 0 : e * below);
    f.entropy[row] = log_sum - weighted / exp(log_sum) + poison;
    f.prediction[row] = s.index;
    f.target_log_probability[row] = (t.one ? below - log_sum : 0) + poison;
  }
  if (t.bad) refuse_target();
}

__device__ inline bool is_walked(const CrossEntropyRows& a, const OptionTarget& t) {
  return !t.bad && (!t.ignored || a.statistics);
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock) options_forward_rows(RowsForwardCall c) {
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
  using cuda::shuffled;
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
  for (int i = 0; i < kCount; ++i) sum += fast_exp<T>(v[i]);
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

constexpr int64_t kParts = 8;  // numbers of a segment's state
template <class A>
__device__ inline void keep_part(double* out, const State<A>& s) {
  out[0] = static_cast<double>(s.max), out[1] = static_cast<double>(s.best), out[2] = s.sum, out[3] = s.weighted;
  out[4] = s.mass, out[5] = s.dot, out[6] = s.t_weight, out[7] = static_cast<double>(s.index);  // exact up to 2^53
}

// A block a segment of a long row: its state, to scratch.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>))
    options_forward_fast_segments(RowsForwardCall c, int64_t segments, double* parts) {
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / segments, begin = (item - row * segments) * kSegmentClasses;
    const int64_t end = begin + kSegmentClasses < a.layout.classes ? begin + kSegmentClasses : a.layout.classes;
    const OptionTarget t = option_target(a, row);
    const State<float> s =
        fast_row<T, kBlock, kKind>(a, row, is_walked(a, t), begin, end, t, static_cast<int>(threadIdx.x));
    if (threadIdx.x == 0) keep_part(parts + kParts * item, s);
  }
}

// A block a segment of a long row: its state, to scratch behind the shares.
template <class T>
__global__ void __launch_bounds__(kBlock) options_forward_segments(RowsForwardCall c, int64_t segments, double* parts) {
  using A = acc_t<T>;
  using Walk = AdjacentWalk<T, kBlock>;
  constexpr int64_t kSegment = kSegmentClasses;
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / segments, segment = item - row * segments, begin = segment * kSegment;
    const int64_t end = begin + kSegment < a.layout.classes ? begin + kSegment : a.layout.classes;
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
__global__ void __launch_bounds__(kBlock) options_forward_lanes(RowsForwardCall c) {
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

template <class T, int kGroup, Kind kKind>
void launch_rows(Launcher& launch, const RowsForwardCall& c) {
  const int64_t rows = c.args.rows.layout.rows();
  launch(options_forward_fast_rows<T, kGroup, kKind>, blocks_for(ceil_div(rows, kBlock / kGroup)), kBlock, c);
}

// Launches what is not general; of a call that is, nothing.
template <class T>
bool fast_forward(Launcher& launch, const RowsForwardCall& c, int64_t segments, double* parts) {
  if constexpr (sizeof(T) <= 4) {
    const CrossEntropyRows& a = c.args.rows;
    const Kind kind = kind_of(a);
    const int64_t rows = a.layout.rows(), vectors = vectors_of(a.dtype, a.layout);
    const bool wide = a.layout.adjacent_classes();
    if (kind == Kind::general) return false;
    FUSED_OPS_WITH_KIND(kind, kKind, {
      if (!wide && a.layout.classes >= kManyClasses) {
        launch(options_forward_fast_lanes<T, kShares, kKind>, blocks_for(ceil_div(rows, kBlock / kShares)), kBlock, c);
      } else if (!wide || vectors <= 8) {
        launch(options_forward_fast_lanes<T, 1, kKind>, blocks_for(ceil_div(rows, kBlock)), kBlock, c);
      } else if (segments > 1) {
        launch(options_forward_fast_segments<T, kKind>, blocks_for(rows * segments), kBlock, c, segments, parts);
        launch(options_forward_finish<T>, blocks_for(ceil_div(rows, kBlock)), kBlock, c, segments,
               static_cast<const double*>(parts));
      } else if (vectors <= kWarpVectors) {
        launch_rows<T, 32, kKind>(launch, c);
      } else {
        launch_rows<T, kBlock, kKind>(launch, c);
      }
    })
    return true;
  } else {
    return false;
  }
}

template <class T>
int32_t forward(const RowsForwardCall& c, void* stream) {
  Launcher launch(stream);
  const CrossEntropyRows& a = c.args.rows;
  const int64_t rows = a.layout.rows(), segments = option_segments(a.layout);
  double* parts = c.scratch + shares_of(a);
  launch_shares(launch, a, c.scratch);
  if (fast_forward<T>(launch, c, segments, parts)) return launch.error();
  if (!a.layout.adjacent_classes()) {
    const bool share = a.layout.classes >= kManyClasses;
    launch(share ? options_forward_lanes<T, kShares> : options_forward_lanes<T, 1>,
           blocks_for(ceil_div(rows, share ? kBlock / kShares : kBlock)), kBlock, c);
  } else if (segments > 1) {
    launch(options_forward_segments<T>, blocks_for(rows * segments), kBlock, c, segments, parts);
    launch(options_forward_finish<T>, blocks_for(ceil_div(rows, kBlock)), kBlock, c, segments,
           static_cast<const double*>(parts));
  } else {
    FUSED_OPS_WITH_OPTION_GROUP(vectors_of(a.dtype, a.layout), kGroup, {
      launch(options_forward_rows<T, kGroup>, blocks_for(ceil_div(rows, kBlock / kGroup)), kBlock, c);
    })
  }
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

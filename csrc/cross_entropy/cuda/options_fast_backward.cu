// Cross-entropy's common options on a GPU, backward: what options_backward.cu computes, for float
// accumulators and without mask and statistics.
//
// Memory: reads 2 to 4 bytes a logit and as many a class probability once and writes as many as it reads logits, in
// place if that is asked for. The gradient of a row's index is written with the rest, once the sum of the other
// classes' p is known; rows of several segments have that from a small launch before, where the target is nearly
// certain. With sparse targets, the small launches there, before and after, do it instead.
//
// Stability: as there. Gradients are float, the index's is double until it is rounded. See docs/cross_entropy.md.
#include "cross_entropy/cuda/options_fast.cuh"
#include "cross_entropy/cuda/options_gradient.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// What the classes of a row of a kind that is not general share: grad_u = p rise - (soft probability + share), with
// log p = (u - high) - low.
struct FastGradient {
  float high, low, rise, soft, share;
};
template <class T, Kind kKind>
__device__ inline FastGradient fast_gradient(const CrossEntropyRows& a, int64_t row, const RowGradient& r, double lse,
                                             double low) {
  double soft = 0, share = a.label_smoothing == 0 ? 0 : a.label_smoothing / static_cast<double>(a.layout.classes);
  if constexpr (kFactors<kKind>) {
    const auto factors = factors_of<factor_t<T, kKind>>(a, row);
    soft = factors.soft, share = factors.share;
  }
  return {static_cast<float>(lse), static_cast<float>(low), static_cast<float>(r.g * r.mass + r.rest + r.target),
          static_cast<float>(r.g * soft), static_cast<float>(r.g * share)};
}
template <class T>
__device__ inline float fast_probability(const FastGradient& f, float u) {
  if constexpr (std::is_same_v<T, float>)
    return expf((u - f.high) - f.low);
  else
    return fast_exp2((u - f.high) * kLog2E - f.low * kLog2E);
}

// Gradients of kV classes, of which `left` are in the row, from logits to v, but for the index's class at `place`,
// whose logit, bent, goes to `met`; returns the sum of p without it.
template <class T, int kV, Kind kKind, bool kFull>
__device__ inline float fast_gradients(const Bend& bend, const float* p, int left, int place, const FastGradient& f,
                                       float& met, float* v) {
  float sum = 0;
  if constexpr (kKind == Kind::bent) {
#pragma unroll
    for (int k = 0; k < kV; ++k) v[k] = kFull || k < left ? bend.bent(v[k]) : -kInfinity<float>;
  }
  if (place >= 0) {
#pragma unroll
    for (int k = 0; k < kV; ++k)
      if (k == place) met = v[k], v[k] = -kInfinity<float>;
  }
#pragma unroll
  for (int k = 0; k < kV; ++k) {
    const float t = v[k], e = fast_probability<T>(f, kKind == Kind::bent ? bend.u_of(t) : t);
    sum += e;
    if constexpr (kFactors<kKind>)
      v[k] = e * f.rise - (f.soft * p[k] + f.share);
    else if constexpr (kKind == Kind::smooth)
      v[k] = e * f.rise - f.share;
    else if constexpr (kKind == Kind::bent)
      v[k] = e * f.rise * bend.slope(t);
    else
      v[k] = e * f.rise;
  }
  return sum;
}

// Writes a vector, of which `left` elements are in the row. All threads of the warp call this together.
template <class T, bool kFull>
__device__ inline void store_fast(T* grad, int left, bool even, unsigned offset, int lane, const float* v) {
  if (!even)
    store_vector<T, 32, false>(grad, left, offset, lane, v);
  else if (kFull || left >= kVector<T>)
    store_aligned(grad, pack<T>(v));
  else
    store_elements(grad, 0, left > 0 ? left : 0, v);
}

// A step's gradients: the vectors are loaded, then each is used and written.
template <class T, class Step, Kind kKind, bool kFull>
__device__ inline float fast_step(const Bend& bend, const T* x, const factor_t<T, kKind>* q, T* grad, int left,
                                  int target, const FastGradient& f, bool even, int lane, float& met) {
  constexpr int kV = Step::kV;
  const int place = Step::place(target);
  const unsigned offset = misalignment(grad);
  using P = factor_t<T, kKind>;
  Words xs[Step::kU], qs[Step::kU * kPieces<Step, P>];
  load_fast<kFull, Step>(x, misalignment(x), left, -kInfinity<float>, xs);
  if constexpr (kFactors<kKind>) load_fast<kFull, Step>(q, misalignment(q), left, 0.0f, qs);
  float sum = 0;
#pragma unroll
  for (int u = 0; u < Step::kU; ++u) {
    const int have = left - u * Step::kApart, at = place / kV == u ? place - u * kV : -1;
    float v[kV], p[kV];
    unpack_step<Step, T>(xs, u, v);
    if constexpr (kFactors<kKind>) unpack_step<Step, P>(qs, u, p);
    sum += fast_gradients<T, kV, kKind, kFull>(bend, p, have, at, f, met, v);
    store_fast<T, kFull>(grad + u * Step::kApart, have, even, offset, lane, v);
  }
  return sum;
}

// The gradients of a row's classes [begin, end) but for the index's; returns the thread's sum of p without that.
template <class T, int kGroup, Kind kKind>
__device__ inline double fast_write(const RowsBackwardCall& c, int64_t row, int64_t begin, int64_t end,
                                    const OptionTarget& t, const RowGradient& r, double low, bool even, int lane,
                                    float& met) {
  using Step = FastStep<T, kGroup, kKind>;
  const CrossEntropyRows& a = c.args.rows;
  T* grad = static_cast<T*>(c.args.grad_logits) + row_offset(c.args.grad_layout, row) + begin + lane * Step::kV;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.layout, row) + begin + lane * Step::kV;
  const factor_t<T, kKind>* q = nullptr;
  if constexpr (kFactors<kKind>) q = factors_of<factor_t<T, kKind>>(a, row).data + begin + lane * Step::kV;
  int left = static_cast<int>(end - begin) - lane * Step::kV;  // from the thread's first class on
  int target = t.one && t.target >= begin && t.target < end ? static_cast<int>(t.target - begin) - lane * Step::kV : -1;
  if (t.bad || r.none) {
    float v[Step::kV];
#pragma unroll
    for (int k = 0; k < Step::kV; ++k) v[k] = t.bad ? kNaN<float> : 0.0f;
    for (; left + lane * Step::kV > 0; left -= Step::kApart, grad += Step::kApart)
      store_fast<T, false>(grad, left, even, misalignment(grad), lane, v);
    return 0;
  }
  const Bend bend(a);
  const FastGradient f = fast_gradient<T, kKind>(a, row, r, c.args.lse[row], low);
  double others = 0;
  for (; left + lane * Step::kV >= Step::kClasses; left -= Step::kClasses) {
    others += static_cast<double>(fast_step<T, Step, kKind, true>(bend, x, q, grad, left, target, f, even, lane, met));
    x += Step::kClasses, q += Step::kClasses, grad += Step::kClasses, target -= Step::kClasses;
  }
  if (left + lane * Step::kV > 0)
    others += static_cast<double>(fast_step<T, Step, kKind, false>(bend, x, q, grad, left, target, f, even, lane, met));
  return others;
}

// The gradient of the index's class, of which met is the logit, bent. `others` is the sum of the other classes' p, or
// negative: not known.
template <class T, Kind kKind>
__device__ inline void write_target(const RowsBackwardCall& c, int64_t row, const OptionTarget& t, double low,
                                    double others, float met) {
  const CrossEntropyRows& a = c.args.rows;
  const RowGradient r = row_gradient<T>(c, row, t);
  if (r.none) return;
  const double u = static_cast<double>(kKind == Kind::bent ? u_of(a, met) : met);
  const double log_p = (u - static_cast<double>(static_cast<float>(c.args.lse[row]))) - low, p = exp(log_p);
  const bool known = others >= 0 && log_p > kConfident;
  const double residual = known ? target_residual(p, others) : p < 0.5 ? p - 1.0 : expm1(log_p);
  const double share = a.label_smoothing == 0 ? 0 : a.label_smoothing / static_cast<double>(a.layout.classes);
  const double q = share == 0 ? 0 : share * weight_of<T>(a, t.target);
  const double value = r.target * residual + r.g * (p * r.mass - q) + p * r.rest;
  T* grad = static_cast<T*>(c.args.grad_logits) + row_offset(c.args.grad_layout, row);
  set(grad[t.target * c.args.grad_layout.class_stride],
      static_cast<float>(value) * (kKind == Kind::bent ? slope_of(a, met) : 1.0f));
}
// The same by the thread that met it in classes [begin, end).
template <class T, int kGroup, Kind kKind>
__device__ inline void fast_target(const RowsBackwardCall& c, int64_t row, int64_t begin, int64_t end,
                                   const OptionTarget& t, double low, double others, int lane, float met) {
  sync_group<kGroup>();  // what another lane has written of the same memory comes first
  if (!t.one || t.target < begin || t.target >= end || (t.target - begin) / kVector<T> % kGroup != lane) return;
  write_target<T, kKind>(c, row, t, low, others, met);
}

// sum_j exp(u_j - high) of every `step`-th class of a row.
template <class T>
__device__ inline double sum_again(const CrossEntropyRows& a, int64_t row, acc_t<T> high, int first, int step) {
  double sum = 0;
  for (int64_t j = first; j < a.layout.classes; j += step)
    sum += static_cast<double>(exact_exp(u_of(a, bent_at<T>(a, row, j)) - high));
  return sum;
}

// A group a row of one segment.
template <class T, int kGroup, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>))
    options_backward_fast_rows(RowsBackwardCall c, bool even) {
  constexpr int kRows = kBlock / kGroup;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    if (row >= rows) continue;  // a whole group, which is a warp or all
    const OptionTarget t = option_target(a, row);
    RowGradient r{0, 0, 0, 0, 0, 0, true};
    if (!t.bad) r = row_gradient<T>(c, row, t);
    const double lse = c.args.lse[row];
    const float high = static_cast<float>(lse);
    double low = lse - static_cast<double>(high);
    if (fabs(lse) >= kFar && !t.bad && !r.none) low = log(sum_group<kGroup>(sum_again<T>(a, row, high, lane, kGroup)));
    float met = 0;
    double others = fast_write<T, kGroup, kKind>(c, row, 0, a.layout.classes, t, r, low, even, lane, met);
    if (t.bad && lane == 0) refuse_target();
    if (a.has_dense || !t.one) continue;
    others = sum_group<kGroup>(others);
    fast_target<T, kGroup, kKind>(c, row, 0, a.layout.classes, t, low, others, lane, met);
  }
}

template <class T, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>))
    options_backward_fast_segments(RowsBackwardCall c, Scratch scratch, bool even, int64_t segments) {
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const auto [row, begin, end] = segment_of(a.layout, item, segments);
    const OptionTarget t = option_target(a, row);
    RowGradient r{0, 0, 0, 0, 0, 0, true};
    if (!t.bad) r = row_gradient<T>(c, row, t);
    const int lane = static_cast<int>(threadIdx.x);
    const double low = scratch.low[row];
    float met = 0;
    fast_write<T, kBlock, kKind>(c, row, begin, end, t, r, low, even, lane, met);
    if (t.bad && lane == 0) refuse_target();
    if (t.one) fast_target<T, kBlock, kKind>(c, row, begin, end, t, low, scratch.others[row], lane, met);
  }
}

// Rows side by side, as options_backward_lanes: every kShare-th class, kCount of them in a step.
template <class T, Kind kKind, bool kFull>
__device__ inline float write_strided(const Bend& bend, const T* x, int64_t x_apart, const factor_t<T, kKind>* q,
                                      int64_t q_apart, T* grad, int64_t apart, int left, int64_t place,
                                      const FastGradient& f, float& met) {
  constexpr int kCount = LaneStep::kCount;
  float v[kCount], p[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = kFull || i < left ? to_acc(x[i * x_apart]) : -kInfinity<float>;
    if constexpr (kFactors<kKind>) p[i] = kFull || i < left ? to_acc(q[i * q_apart]) : 0.0f;
  }
  const float sum =
      fast_gradients<T, kCount, kKind, kFull>(bend, p, left, place < kCount ? static_cast<int>(place) : -1, f, met, v);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (kFull || i < left) set(grad[i * apart], v[i]);
  return sum;
}
template <class T, int kShare, Kind kKind>
__device__ inline double strided_write(const RowsBackwardCall& c, int64_t row, const OptionTarget& t,
                                       const RowGradient& r, double low, int part, float& met) {
  constexpr int kCount = LaneStep::kCount;
  const CrossEntropyRows& a = c.args.rows;
  const int64_t x_apart = a.layout.class_stride * kShare, apart = c.args.grad_layout.class_stride * kShare;
  T* grad = static_cast<T*>(c.args.grad_logits) + row_offset(c.args.grad_layout, row) +
            part * c.args.grad_layout.class_stride;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.layout, row) + part * a.layout.class_stride;
  const factor_t<T, kKind>* q = nullptr;
  int64_t q_apart = 0, left = (a.layout.classes - part + kShare - 1) / kShare;
  if constexpr (kFactors<kKind>) {
    const auto factors = factors_of<factor_t<T, kKind>>(a, row);
    q = factors.data + part * factors.stride, q_apart = factors.stride * kShare;
  }
  if (t.bad || r.none) {
    for (; left > 0; --left, grad += apart) set(*grad, t.bad ? kNaN<float> : 0.0f);
    return 0;
  }
  const Bend bend(a);
  const FastGradient f = fast_gradient<T, kKind>(a, row, r, c.args.lse[row], low);
  int64_t place = t.one && t.target % kShare == part ? t.target / kShare : -1;
  double others = 0;
  for (; left >= kCount; left -= kCount, place -= kCount) {
    others += static_cast<double>(
        write_strided<T, kKind, true>(bend, x, x_apart, q, q_apart, grad, apart, kCount, place, f, met));
    x += kCount * x_apart, q += kCount * q_apart, grad += kCount * apart;
  }
  if (left > 0)
    others += static_cast<double>(write_strided<T, kKind, false>(bend, x, x_apart, q, q_apart, grad, apart,
                                                                 static_cast<int>(left), place, f, met));
  return others;
}
template <class T, int kShare, Kind kKind>
__global__ void __launch_bounds__(kBlock, (kFastBlocks<T, kKind>)) options_backward_fast_lanes(RowsBackwardCall c) {
  constexpr int kRows = kBlock / kShare;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kRows, part = static_cast<int>(threadIdx.x) / kRows;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  __shared__ double shares[kBlock];
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + lane;
    OptionTarget t{0, 1, -1, false, true, false};
    RowGradient r{0, 0, 0, 0, 0, 0, true};
    double low = 0, others = 0;
    bool far = false;
    float met = 0;
    if (row < rows) {
      t = option_target(a, row);
      if (!t.bad) r = row_gradient<T>(c, row, t);
      const double lse = c.args.lse[row];
      const float high = static_cast<float>(lse);
      low = lse - static_cast<double>(high), far = fabs(lse) >= kFar && !t.bad && !r.none;
      if (far)  // each of the row's threads for itself
        low = log(sum_again<T>(a, row, high, 0, 1));
    }
    if constexpr (kShare > 1) __syncthreads();  // in place, a far row has been read
    if (row < rows) others = strided_write<T, kShare, kKind>(c, row, t, r, low, part, met);
    if constexpr (kShare > 1) {
      shares[threadIdx.x] = others;
      __syncthreads();
      others = 0;
      for (int k = 0; k < kShare; ++k) others += shares[k * kRows + lane];
    }
    if (row < rows && t.one && t.target % kShare == part) write_target<T, kKind>(c, row, t, low, others, met);
    if (row < rows && t.bad && part == 0) refuse_target();
  }
}

template <class T>
void launch_fast(Launcher& launch, const RowsBackwardCall& c, const Scratch& scratch, Kind kind, bool wide, bool even,
                 int64_t segments) {
  if constexpr (sizeof(T) <= 4) {
    const CrossEntropyRows& a = c.args.rows;
    const int64_t rows = a.layout.rows();
    FUSED_OPS_WITH_KIND(kind, kKind, {
      if (!wide && a.layout.classes >= kManyClasses)
        launch(options_backward_fast_lanes<T, kShares, kKind>, blocks_for(ceil_div(rows, kBlock / kShares)), kBlock, c);
      else if (!wide)
        launch(options_backward_fast_lanes<T, 1, kKind>, blocks_for(ceil_div(rows, kBlock)), kBlock, c);
      else if (segments > 1)
        launch(options_backward_fast_segments<T, kKind>, blocks_for(rows * segments), kBlock, c, scratch, even,
               segments);
      else if (vectors_of(a.dtype, a.layout) > kWarpVectors)
        launch(options_backward_fast_rows<T, kBlock, kKind>, blocks_for(rows), kBlock, c, even);
      else
        launch(options_backward_fast_rows<T, 32, kKind>, blocks_for(ceil_div(rows, kBlock / 32)), kBlock, c, even);
    })
  }
}

}  // namespace

void launch_fast_backward(Launcher& launch, const RowsBackwardCall& c, const Scratch& scratch, Kind kind, bool wide,
                          bool even, int64_t segments) {
  FUSED_OPS_WITH_DTYPE(c.args.rows.dtype, T, launch_fast<T>(launch, c, scratch, kind, wide, even, segments))
}

}  // namespace cuda
}  // namespace fused_ops

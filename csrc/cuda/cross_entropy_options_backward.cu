// Cross-entropy with every option on a GPU, row by row, backward. For upstream gradients g of nll, l of lse, h of
// entropy and t of the target's log-probability, with S = sum_j q_j:
//
//   grad_u_j = p_j (g S + l - t + h (lse - entropy - u_j)) - g q_j + t [j == target],   grad_x_j = grad_u_j du_j/dx_j
//
// Memory: reads 2 to 8 bytes a logit, as many a class probability and 1 a mask once and writes as many as it reads
// logits, in place if that is asked for. The common options (Kind) write the gradient of a row's index themselves, once
// the sum of the other classes' p is known; only rows of several segments need a small launch before, for rows whose
// target is nearly certain. With sparse targets, and for all other options, a small launch before reads the logits of
// the rows' indices, and a small one after writes their gradients.
//
// Stability: as in cross_entropy_backward.cu. See docs/cross_entropy.md.
#include "cross_entropy_options.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// Where in scratch: shares, then per row the low part of lse, per row and segment the sum of the others' p, per index
// u.
struct Scratch {
  double *shares, *low, *others, *bent;
};
Scratch scratch_of(const RowsBackwardCall& c, int64_t segments) {
  const CrossEntropyRows& a = c.args.rows;
  double* low = c.scratch + shares_of(a);
  double* others = low + a.layout.rows();
  return {c.scratch, low, others, others + a.layout.rows() * segments};
}

// What a row's classes have in common:
// grad_u_j = g (p_j mass - q_j) + p_j (rest + slope (log p_j + entropy)), and with one index target (p_j - [j ==
// target]) besides.
struct RowGradient {
  double g, mass, rest, slope, entropy, target;
  bool none;  // zeros whatever the logits are
};
template <class T>
__device__ inline RowGradient row_gradient(const RowsBackwardCall& c, int64_t row, const OptionTarget& t) {
  const CrossEntropyRowsBackward& b = c.args;
  const CrossEntropyRows& a = b.rows;
  const auto read = [&](const double* from, int which) { return from ? from[row * c.steps[which]] : 0.0; };
  if (t.ignored && !a.statistics) return {0, 0, 0, 0, 0, 0, true};
  const double scale = read(b.grad_nll, 0), g = t.ignored ? 0 : scale, h = read(b.grad_entropy, 2);
  const double along = t.one ? read(b.grad_target_log_probability, 3) : 0;
  const double on = t.one ? (1.0 - a.label_smoothing) * weight_of<T>(a, t.target) : 0;
  double rest = read(b.grad_lse, 1);
  if (c.z_loss != 0 && scale != 0) rest += 2 * c.z_loss * b.lse[row] * scale;
  return {g,
          b.mass[row],
          rest,
          -h,
          h != 0 ? b.entropy[row] : 0.0,
          g * on - along,
          t.ignored && g == 0 && rest == 0 && h == 0};
}

template <class A>
struct Split {
  A high, low;
};

// The gradient with respect to one u, computed in A.
template <class A>
__device__ inline A gradient_of(const RowGradient& r, A rest, A p, A log_p, A q, bool has_q) {
  const A g = static_cast<A>(r.g), mass = static_cast<A>(r.mass), slope = static_cast<A>(r.slope);
  const A value = has_q ? g * (p * mass - q) : p * (g * mass);
  if (slope == A(0)) return value + p * rest;
  return value + (p == A(0) ? A(0) : p * (rest + slope * (log_p + static_cast<A>(r.entropy))));
}

// Gradients of a step, to v; returns the sum of p without the class `except`.
template <class T, class Walk>
__device__ inline acc_t<T> gradient_step(const CrossEntropyRows& a, int64_t row, const Walk& w, int64_t except,
                                         const RowGradient& r, const Split<acc_t<T>>& lse, acc_t<T> share,
                                         acc_t<T>* v) {
  using A = acc_t<T>;
  constexpr int kCount = Walk::kCount;
  A t[kCount], q[kCount], others = 0;
  const unsigned allowed = load_logits<T>(a, row, w, t);
  const bool has_q = has_coefficients(a);
  if (has_q) load_coefficients<T>(a, row, w, allowed, share, q);
  const A rest = static_cast<A>(r.rest + r.target);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A log_p = (u_of(a, t[i]) - lse.high) - lse.low, p = exp_of<T>(log_p);
    others += w.at(i) == except ? A(0) : p;
    v[i] = gradient_of(r, rest, p, log_p, has_q ? q[i] : A(0), has_q);
  }
  if (a.softcap != 0.0 || a.logit_scale != 1.0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] *= slope_of(a, t[i]);
  }
  if (a.has_mask) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = allowed >> i & 1u ? v[i] : A(0);
  }
  return others;
}

// Of a row of adjacent classes [begin, end), a thread's share. All threads of the warp call this together.
template <class T, int kGroup>
__device__ inline double write_share(const RowsBackwardCall& c, int64_t row, bool exists, int64_t begin, int64_t end,
                                     const OptionTarget& t, const RowGradient& r, const Split<acc_t<T>>& lse,
                                     acc_t<T> share, bool even, int lane) {
  using A = acc_t<T>;
  using Walk = AdjacentWalk<T, kGroup>;
  constexpr int kLanes = kGroup < 32 ? kGroup : 32;
  T* grad = static_cast<T*>(c.args.grad_logits) + (exists ? row_offset(c.args.grad_layout, row) : 0);
  const unsigned offset = misalignment(grad);
  const A fill = t.bad ? kNaN<A> : A(0);
  const bool filled = t.bad || r.none;
  double others = 0;
  for (; begin < end; begin += Walk::kStep) {
    const Walk w{begin + lane * Walk::kV, end};
    A v[Walk::kCount];
    if (filled) {
#pragma unroll
      for (int i = 0; i < Walk::kCount; ++i) v[i] = fill;
    } else {
      others += gradient_step<T>(c.args.rows, row, w, t.target, r, lse, share, v);
    }
#pragma unroll
    for (int u = 0; u < Walk::kU; ++u) {
      const int64_t first = w.vector(u), have = exists ? end - first : 0;
      if (even)
        store_vector<T, kLanes, true>(grad + first, have, 0, lane, v + u * Walk::kV);
      else
        store_vector<T, kLanes, false>(grad + first, have, offset, lane, v + u * Walk::kV);
    }
  }
  return others;
}

// From here on expm1 of a log-probability lacks digits that the others' sum has.
constexpr double kConfident = -1e-8;

// Before anything is written: the low part of each row's lse, summed again where float64 is too coarse for it, and the
// logits of its indices. A group a row; a thread a row with kGroup 1, for adjacent rows.
template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock) options_prepare(RowsBackwardCall c, Scratch to) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kGroup;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = a.layout.batch * a.layout.spatial, classes = a.layout.classes;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    const bool exists = row < rows;
    OptionTarget t{0, 1, -1, false, true, true};
    if (exists) t = option_target(a, row);
    const double lse = exists ? c.args.lse[row] : 0;
    const A high = static_cast<A>(lse);
    const bool far = !t.bad && (!t.ignored || a.statistics) && (std::is_same_v<T, double> || fabs(lse) >= kFar);
    const A u_target = t.one ? u_of(a, bent_at<T>(a, row, t.target)) : A(0);
    const bool confident = t.one && static_cast<double>(u_target) - lse > kConfident;
    double others = 0;
    for (int64_t j = lane; (far || confident) && j < classes; j += kGroup)
      others += j == t.target ? 0.0 : static_cast<double>(exact_exp(u_of(a, bent_at<T>(a, row, j)) - high));
    others = sum_group<kGroup>(others);
    if (lane == 0 && exists) {
      const double low = far ? log(others + (t.one ? static_cast<double>(exact_exp(u_target - high)) : 0.0))
                             : lse - static_cast<double>(high);
      to.low[row] = low, to.others[row] = confident ? others * exp(-low) : -1.0;
    }
    if (t.ignored || t.bad || a.has_dense) continue;
    for (int64_t k = lane; k < a.per_row; k += kGroup) {
      const int64_t target = index_of(a, t, k);
      if (target != a.indices.ignore_index)
        to.bent[row * a.per_row + k] = static_cast<double>(bent_at<T>(a, row, target));
    }
  }
}

template <class T>
__device__ inline Split<acc_t<T>> split_lse(const RowsBackwardCall& c, const Scratch& from, int64_t row) {
  using A = acc_t<T>;
  return {static_cast<A>(c.args.lse[row]), static_cast<A>(from.low[row])};
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock) options_backward_rows(RowsBackwardCall c, Scratch scratch, bool even) {
  using A = acc_t<T>;
  constexpr int kRows = kBlock / kGroup;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const int64_t rows = a.layout.batch * a.layout.spatial;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    const bool exists = row < rows;
    // Lanes of missing rows take part, with as many steps (the shuffles need all) and nothing to write.
    OptionTarget t{0, 1, -1, false, true, true};
    RowGradient r{0, 0, 0, 0, 0, 0, true};
    Split<A> lse{0, 0};
    A share = 0;
    if (exists) {
      t = option_target(a, row), lse = split_lse<T>(c, scratch, row);
      share = smoothing_share<A>(a, scratch.shares, row);
      if (!t.bad) r = row_gradient<T>(c, row, t);
    }
    const double others =
        sum_group<kGroup>(write_share<T, kGroup>(c, row, exists, 0, a.layout.classes, t, r, lse, share, even, lane));
    if (lane == 0 && exists) scratch.others[row] = others;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    options_backward_segments(RowsBackwardCall c, Scratch scratch, bool even, int64_t segments) {
  using A = acc_t<T>;
  constexpr int64_t kSegment = kSegmentClasses;
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / segments, begin = (item - row * segments) * kSegment;
    const int64_t end = begin + kSegment < a.layout.classes ? begin + kSegment : a.layout.classes;
    const OptionTarget t = option_target(a, row);
    RowGradient r{0, 0, 0, 0, 0, 0, true};
    if (!t.bad) r = row_gradient<T>(c, row, t);
    const A share = smoothing_share<A>(a, scratch.shares, row);
    const double others = sum_group<kBlock>(write_share<T, kBlock>(
        c, row, true, begin, end, t, r, split_lse<T>(c, scratch, row), share, even, static_cast<int>(threadIdx.x)));
    if (threadIdx.x == 0) scratch.others[item] = others;
  }
}

// Any strides, as options_forward_lanes.
template <class T, int kShare>
__global__ void __launch_bounds__(kBlock) options_backward_lanes(RowsBackwardCall c, Scratch scratch) {
  using A = acc_t<T>;
  using Walk = StridedWalk<kShare>;
  constexpr int kRows = kBlock / kShare;
  const CrossEntropyRows& a = c.args.rows;
  const int lane = static_cast<int>(threadIdx.x) % kRows, part = static_cast<int>(threadIdx.x) / kRows;
  const int64_t rows = a.layout.batch * a.layout.spatial, classes = a.layout.classes;
  __shared__ double shares[kBlock];
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + lane;
    double others = 0;
    if (row < rows) {
      const OptionTarget t = option_target(a, row);
      RowGradient r{0, 0, 0, 0, 0, 0, true};
      if (!t.bad) r = row_gradient<T>(c, row, t);
      const Split<A> lse = split_lse<T>(c, scratch, row);
      const A share = smoothing_share<A>(a, scratch.shares, row), fill = t.bad ? kNaN<A> : A(0);
      T* grad = static_cast<T*>(c.args.grad_logits) + row_offset(c.args.grad_layout, row);
      for (int64_t first = part; first < classes; first += Walk::kStep) {
        const Walk w{first, classes};
        A v[Walk::kCount];
        if (!t.bad && !r.none) others += gradient_step<T>(a, row, w, t.target, r, lse, share, v);
#pragma unroll
        for (int i = 0; i < Walk::kCount; ++i)
          if (w.at(i) < classes) set(grad[w.at(i) * c.args.grad_layout.class_stride], t.bad || r.none ? fill : v[i]);
      }
    }
    if constexpr (kShare > 1) {
      __syncthreads();
      shares[threadIdx.x] = others;
      __syncthreads();
      for (int k = 1; k < kShare; ++k)
        if (part == 0) others += shares[k * kRows + lane];
    }
    if (part == 0 && row < rows) scratch.others[row] = others;
  }
}

// What a row's indices take off the gradient of the class of index k; 0 behind an index of the same class.
template <class T>
__device__ inline bool owns_class(const CrossEntropyRows& a, const OptionTarget& t, int64_t k, double* sum) {
  const int64_t target = index_of(a, t, k);
  if (target == a.indices.ignore_index) return false;
  for (int64_t j = 0; j < k; ++j)
    if (index_of(a, t, j) == target) return false;
  *sum = 0;
  for (int64_t j = k; a.sparse && j < a.per_row; ++j)
    if (index_of(a, t, j) == target) *sum += a.sparse[t.first + j * t.step];
  return true;
}

template <class T>
__device__ inline acc_t<T> smoothing_at(const CrossEntropyRows& a, const double* shares, int64_t row, int64_t c) {
  using A = acc_t<T>;
  if (a.label_smoothing == 0.0 || !is_allowed(a, row, c)) return A(0);
  return static_cast<A>(weight_of<T>(a, c)) * smoothing_share<A>(a, shares, row);
}

// A thread an index: the gradient of its class.
template <class T>
__global__ void __launch_bounds__(kBlock) options_targets(RowsBackwardCall c, Scratch scratch, int64_t segments) {
  using A = acc_t<T>;
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * a.per_row;
  for (int64_t item = int64_t{blockIdx.x} * kBlock + threadIdx.x; item < items; item += int64_t{gridDim.x} * kBlock) {
    const int64_t row = item / a.per_row, k = item - row * a.per_row;
    const OptionTarget t = option_target(a, row);
    if (t.bad && k == 0) refuse_target();
    double probability = 0;
    if (t.bad || t.ignored || !owns_class<T>(a, t, k, &probability)) continue;
    const int64_t target = index_of(a, t, k);
    if (!is_allowed(a, row, target)) continue;  // the gradient is 0
    const RowGradient r = row_gradient<T>(c, row, t);
    const Split<A> lse = split_lse<T>(c, scratch, row);
    const A bent = static_cast<A>(scratch.bent[item]), q = smoothing_at<T>(a, scratch.shares, row, target);
    const double log_p = static_cast<double>((u_of(a, bent) - lse.high) - lse.low);
    const double p = static_cast<double>(exact_exp(static_cast<A>(log_p)));
    double value;
    if (t.one) {
      double others = 0;
      for (int64_t s = 0; s < segments; ++s) others += scratch.others[row * segments + s];
      value = r.target * target_residual(p, others);
    } else {
      value = -r.g * (1.0 - a.label_smoothing) * probability * weight_of<T>(a, target);
    }
    value += gradient_of(r, r.rest, p, log_p, static_cast<double>(q), true);
    T* grad = static_cast<T*>(c.args.grad_logits) + row_offset(c.args.grad_layout, row);
    set(grad[target * c.args.grad_layout.class_stride], static_cast<A>(value) * slope_of(a, bent));
  }
}

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
    const int64_t row = item / segments, begin = (item - row * segments) * kSegmentClasses;
    const int64_t end = begin + kSegmentClasses < a.layout.classes ? begin + kSegmentClasses : a.layout.classes;
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

template <class T>
int32_t backward(const RowsBackwardCall& c, void* stream) {
  Launcher launch(stream);
  const CrossEntropyRows& a = c.args.rows;
  const bool wide = a.layout.adjacent_classes() && c.args.grad_layout.adjacent_classes();
  const int64_t rows = a.layout.rows(), segments = wide ? option_segments(a.layout) : 1;
  const Scratch scratch = scratch_of(c, segments);
  const bool even = rows_are_aligned(c.args.grad_logits, c.args.grad_layout, sizeof(T));
  const bool vectors = wide && vectors_of(a.dtype, a.layout) > 8;
  const Kind kind = vectors || !a.layout.adjacent_classes() ? kind_of(a) : Kind::general;
  launch_shares(launch, a, c.scratch);
  const bool prepared = kind == Kind::general || segments > 1 || a.sparse;
  if (!prepared) {
  } else if (!a.layout.adjacent_classes() || (sizeof(T) <= 4 && vectors_of(a.dtype, a.layout) <= 8))
    launch(options_prepare<T, 1>, blocks_for(ceil_div(rows, kBlock)), kBlock, c, scratch);
  else if (kind != Kind::general || vectors_of(a.dtype, a.layout) <= kWarpVectors)
    launch(options_prepare<T, 32>, blocks_for(ceil_div(rows, kBlock / 32)), kBlock, c, scratch);
  else
    launch(options_prepare<T, kBlock>, blocks_for(rows), kBlock, c, scratch);
  if (kind != Kind::general) {
    launch_fast<T>(launch, c, scratch, kind, wide, even, segments);
  } else if (!wide) {
    const bool share = a.layout.classes >= kManyClasses;
    launch(share ? options_backward_lanes<T, kShares> : options_backward_lanes<T, 1>,
           blocks_for(ceil_div(rows, share ? kBlock / kShares : kBlock)), kBlock, c, scratch);
  } else if (segments > 1) {
    launch(options_backward_segments<T>, blocks_for(rows * segments), kBlock, c, scratch, even, segments);
  } else {
    FUSED_OPS_WITH_OPTION_GROUP(vectors_of(a.dtype, a.layout), kGroup, {
      launch(options_backward_rows<T, kGroup>, blocks_for(ceil_div(rows, kBlock / kGroup)), kBlock, c, scratch, even);
    })
  }
  if (!a.has_dense && (kind == Kind::general || a.sparse))
    launch(options_targets<T>, blocks_for(ceil_div(rows * a.per_row, kBlock)), kBlock, c, scratch, segments);
  return launch.error();
}

}  // namespace

int64_t rows_backward_scratch(const CrossEntropyRows& a) {
  const int64_t per_row = a.has_dense ? 0 : a.per_row;
  return shares_of(a) + a.layout.rows() * (1 + option_segments(a.layout) + per_row);
}

int32_t cross_entropy_rows_backward(const RowsBackwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.args.rows.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

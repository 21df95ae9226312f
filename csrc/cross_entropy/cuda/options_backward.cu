// Cross-entropy with every option on a GPU, row by row, backward. For upstream gradients g of nll, l of lse, h of
// entropy and t of the target's log-probability, with S = sum_j q_j:
//
//   grad_u_j = p_j (g S + l - t + h (lse - entropy - u_j)) - g q_j + t [j == target],   grad_x_j = grad_u_j du_j/dx_j
//
// Memory: reads 2 to 8 bytes a logit, as many a class probability and 1 a mask once and writes as many as it reads
// logits, in place if that is asked for. A small launch before reads the logits of the rows' indices, and a small one
// after writes their gradients. The kernels of the common options, in options_fast_backward.cu, need the
// first for rows of several segments alone, and both with sparse targets.
//
// Stability: as in index_backward.cu. See docs/cross_entropy.md.
#include "cross_entropy/cuda/options_gradient.cuh"
#include "cross_entropy/cuda/options_loops.cuh"

namespace fused_ops {
namespace cuda {
namespace {

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
  const CrossEntropyRows& a = c.args.rows;
  const int64_t items = a.layout.batch * a.layout.spatial * segments;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const auto [row, begin, end] = segment_of(a.layout, item, segments);
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
    launch_fast_backward(launch, c, scratch, kind, wide, even, segments);
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

// Forward with cross-entropy's options: the state that a row's classes are summed in, its parts in scratch memory, and
// the results from it. The kernels are in options_forward.cu and, for the common options,
// options_fast_forward.cu.
#pragma once
#include "cross_entropy/cuda/options.cuh"

namespace fused_ops {
namespace cuda {

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
__device__ inline void finish_row(const CrossEntropyForward& f, int64_t row, const OptionTarget& t,
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

constexpr int64_t kParts = 8;  // numbers of a segment's state
template <class A>
__device__ inline void keep_part(double* out, const State<A>& s) {
  out[0] = static_cast<double>(s.max), out[1] = static_cast<double>(s.best), out[2] = s.sum, out[3] = s.weighted;
  out[4] = s.mass, out[5] = s.dot, out[6] = s.t_weight, out[7] = static_cast<double>(s.index);  // exact up to 2^53
}

// Launches a kind that is not general, on which float64 never is. With more than one segment a row, what it leaves in
// `parts` is still to be merged.
void launch_fast_forward(Launcher& launch, const RowsForwardCall& c, Kind kind, int64_t segments, double* parts);

}  // namespace cuda
}  // namespace fused_ops

// Cross-entropy with every option, row by row, on the CPU: the backward (the forward: rows_forward.cpp).
//
// Per row, for upstream gradients g of nll, l of lse, h of entropy and t of the target's log-probability:
//   grad_u_j = p_j (g S + l - t - h (log p_j + entropy)) - g q_j + t [j == target],  grad_x_j = grad_u_j du_j/dx_j.
//
// Memory: every logit (and class probability, and mask) is read once, every gradient written once; a chunk of kChunk
// classes of the gradient is made in a buffer only where it cannot be made in its place.
//
// Stability: the target's gradient is minus the sum of the others' p where p - 1 would cancel, and log p_j is taken
// before it meets the entropy, which is of its size: lse and u_j are not. See docs/cross_entropy.md.
#include <algorithm>

#include "cross_entropy/cpu/index_alone.h"
#include "cross_entropy/cpu/option_lanes.h"
#include "cross_entropy/rows_kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// grad_u_j = nll (p_j mass - q_j) + p_j (rest - slope (log p_j + entropy)), with one index target
// (p_j - [j == target]) target besides.
struct Coefficients {
  double nll, mass, rest, slope, entropy, target;
  bool zero() const { return nll == 0 && rest == 0 && slope == 0 && target == 0; }
};

// The same for a chunk, in the accumulator.
template <class A>
struct Factors {
  A nll, mass, rest, slope, entropy;
  explicit Factors(const Coefficients& k)
      : nll(static_cast<A>(k.nll)),
        mass(static_cast<A>(k.mass)),
        rest(static_cast<A>(k.rest + k.target)),
        slope(static_cast<A>(k.slope)),
        entropy(static_cast<A>(k.entropy)) {}
};

inline float_vec own_gradient(float_vec p, const Factors<float>& k, NoShares, int64_t, int64_t) {
  return p * (k.nll * k.mass + k.rest);
}
template <class Q>
float_vec own_gradient(float_vec p, const Factors<float>& k, Q q, int64_t i, int64_t n) {
  return k.nll * (p * k.mass - q.at(i, n)) + p * k.rest;
}

// out[0, n) = the gradients of a chunk; returns the sum of p but for the class `except`, if kSum. In place where out
// is u.
template <bool kSlope, bool kSum, class Q>
double grads_of(const float* u, float* out, int64_t n, float high, float low, Factors<float> k, Q q, int64_t except) {
  float_vec s[2] = {};
  const int_vec wanted = int_vec{} + static_cast<int32_t>(except);
  int_vec at = iota();
  const auto step = [&](int64_t i, int64_t count, float_vec& sum) {
    const float_vec x = load_up_to(u + i, count, -std::numeric_limits<float>::infinity());
    const float_vec log_p = (x - high) - low, p = exp_vec(log_p);
    if constexpr (kSum) sum += at == wanted ? float_vec{} : p, at += static_cast<int32_t>(kWidth);
    float_vec grad = own_gradient(p, k, q, i, count);
    if constexpr (kSlope) grad -= p == 0.0f ? float_vec{} : p * (k.slope * (log_p + k.entropy));
    store_up_to(out + i, count, grad);
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    for (int64_t j = 0; j < 2; ++j) step(i + j * kWidth, kWidth, s[j]);
  for (; i < n; i += kWidth) step(i, std::min(kWidth, n - i), s[0]);
  return kSum ? static_cast<double>(reduce_add(s[0] + s[1])) : 0.0;
}

double grads_of(const float* u, float* out, int64_t n, float high, float low, const Factors<float>& k,
                const Shares<float>& q, bool sum, int64_t except) {
  except = except >= 0 && except < n ? except : -1;
  return with_shares(q, [&](auto shares) {
    if (k.slope != 0) return grads_of<true, true>(u, out, n, high, low, k, shares, except);
    if (sum) return grads_of<false, true>(u, out, n, high, low, k, shares, except);
    return grads_of<false, false>(u, out, n, high, low, k, shares, except);
  });
}

// Of float64, which only the DEFAULT kernels call.
[[maybe_unused]] double grads_of(const double* u, double* out, int64_t n, double high, double low,
                                 const Factors<double>& k, const Shares<double>& q, bool, int64_t except) {
  double s[kLanes] = {}, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double log_p = (u[i] - high) - low, p = exp_(log_p);
    s[i % kLanes] += i == except ? 0 : p;
    out[i] = q.any() ? k.nll * (p * k.mass - q.at(i)) + p * k.rest : p * (k.nll * k.mass + k.rest);
    if (k.slope != 0 && p != 0) out[i] -= p * (k.slope * (log_p + k.entropy));
  }
  for (double lane : s) sum += lane;
  return sum;
}

// What the backward needs of each of the rows that are walked together.
template <class A>
struct Rows {
  const CrossEntropyRowsBackward& args;
  const CrossEntropyRows& a = args.rows;
  const RowValues<A> values{args.rows};
  A high[kGroup] = {}, low[kGroup] = {}, u[kGroup], q[kGroup];  // lse, and the target's u and q
  double others[kGroup], p_target[kGroup];
  Coefficients coefficient[kGroup];

  explicit Rows(const CrossEntropyRowsBackward& backward) : args(backward) {}

  // sum(row, high): of exp(u - high) over the classes.
  template <class Sum>
  void set_up(int64_t row, int64_t rows, const RowTarget* targets, const Sum& sum) {
    for (int64_t r = 0; r < rows; ++r) {
      const double lse = args.lse[row + r];
      high[r] = static_cast<A>(lse), low[r] = static_cast<A>(lse - static_cast<double>(high[r]));
      if (std::is_same_v<A, double> || std::fabs(lse) >= kFar)  // a double cannot hold low beside high
        low[r] = static_cast<A>(std::log(sum(row + r, high[r])));
      coefficient[r] = coefficients(row + r, targets[r]);
      others[r] = p_target[r] = 0, u[r] = q[r] = 0;
    }
  }

  // Of the class indices, before the logits may be written over.
  void find_targets(int64_t row, int64_t rows, const RowTarget* targets) {
    for (int64_t r = 0; r < rows; ++r) {
      if (!targets[r].one()) continue;
      u[r] = values.at(row + r, targets[r].index(0));
      p_target[r] = static_cast<double>(exp_((u[r] - high[r]) - low[r]));
    }
  }

  bool quiet(int64_t r, const RowTarget& target) const { return coefficient[r].zero() && target.all_ignored(); }

  // What index j of several takes off its class' gradient.
  A share(int64_t r, const RowTarget& target, int64_t j) const {
    const double weight = target.probability(j) * weight_of(a, target.index(j));
    return static_cast<A>(coefficient[r].nll * (1.0 - a.label_smoothing) * weight);
  }

  // The target's gradient, with p - 1 as minus the others' p where that would cancel.
  void set_target(int64_t row, int64_t r, const RowTarget& target) const {
    if (!target.one()) return;
    const Coefficients& k = coefficient[r];
    const double p = p_target[r], residual = p >= 0.5 ? -others[r] : p - 1.0;
    const double log_p = static_cast<double>((u[r] - high[r]) - low[r]);
    const double own = k.nll * (p * k.mass - static_cast<double>(q[r]));
    const double rest = k.slope == 0 || p == 0 ? k.rest : k.rest - k.slope * (log_p + k.entropy);
    const double value = k.target * residual + own + p * rest;
    const A slope = values.slope(row, target.index(0), u[r]), out = slope == 0 ? A(0) : static_cast<A>(value) * slope;
    store_tile(args.grad_logits, a.dtype, args.grad_layout, row, 1, target.index(0), 1, &out);
  }

 private:
  Coefficients coefficients(int64_t row, const RowTarget& target) const {
    const auto read = [&](const double* from) { return from ? from[row] : 0.0; };
    const bool counts = !target.all_ignored();
    if (!counts && !a.statistics) return {};
    const double g = counts ? read(args.grad_nll) : 0, h = read(args.grad_entropy);
    const double t = counts && target.one() ? read(args.grad_target_log_probability) : 0;
    const double on = target.one() ? (1.0 - a.label_smoothing) * weight_of(a, target.index(0)) : 0;
    return {g, args.mass[row], read(args.grad_lse), h, h != 0 ? args.entropy[row] : 0, g * on - t};
  }
};

// A tile of rows, classes in registers.
template <class A>
class RowWalk {
 public:
  explicit RowWalk(const CrossEntropyRowsBackward& backward) : args_(backward) {}

  int64_t rows_from(int64_t row, int64_t end) const { return tile_.rows_from(row, end); }

  double sum(int64_t row, A high) {
    double sum = 0, none = 0;
    for (int64_t c = 0; c < args_.rows.layout.classes; c += tile_.n) {
      tile_.load(row, 1, c);
      exp_sums<false>(tile_.u(0), tile_.n, high, -1, &sum, &none);
    }
    return sum;
  }

  void grads(int64_t row, int64_t rows, const RowTarget* targets, Rows<A>& state) {
    state.find_targets(row, rows, targets);
    tile_.count_allowed(row, rows);
    for (int64_t c = 0; c < args_.rows.layout.classes; c += tile_.n) {
      tile_.load(row, rows, c);
      tile_.load_coefficients();
      A* out = place(row, rows, c);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = targets[r].one() ? targets[r].index(0) - c : -1;
        if (t >= 0 && t < tile_.n) state.q[r] = tile_.coefficients(r).at(t);
        chunk(r, c, targets[r], state, out + r * tile_.n);
      }
      if (out == grad_)
        store_tile(args_.grad_logits, args_.rows.dtype, args_.grad_layout, row, rows, c, tile_.n, grad_);
    }
  }

 private:
  // Where the gradient of a row's chunk is made: in its place, if nothing is to be done to it behind.
  A* place(int64_t row, int64_t rows, int64_t c) {
    const RowLayout& l = args_.grad_layout;
    const bool direct = rows == 1 && l.class_stride == 1 && !tile_.chains() &&
                        args_.rows.dtype == (std::is_same_v<A, double> ? DType::float64 : DType::float32);
    return direct ? static_cast<A*>(args_.grad_logits) + l.offset(row) + c : grad_;
  }

  void chunk(int64_t r, int64_t c, const RowTarget& target, Rows<A>& state, A* out) {
    const int64_t n = tile_.n;
    if (state.quiet(r, target)) return std::fill(out, out + n, A(0));
    const double sum =
        grads_of(tile_.u(r), out, n, state.high[r], state.low[r], Factors<A>(state.coefficient[r]),
                 tile_.coefficients(r), state.p_target[r] >= 0.5, target.one() ? target.index(0) - c : -1);
    state.others[r] += sum;
    for (int64_t j = 0; !target.one() && j < target.per_row(); ++j) {
      const int64_t t = target.ignored(j) ? -1 : target.index(j) - c;
      if (t >= 0 && t < n) out[t] -= state.share(r, target, j);
    }
    if (tile_.chains()) tile_.chain(r, out);
  }

  const CrossEntropyRowsBackward& args_;
  Tile<A> tile_{args_.rows};
  alignas(64) A grad_[kTile];
};

// Rows in registers.
class LaneWalk {
 public:
  explicit LaneWalk(const CrossEntropyRowsBackward& backward) : args_(backward) {}

  int64_t rows_from(int64_t row, int64_t end) const { return tile_.rows_from(row, end); }

  double sum(int64_t row, float high) const {
    double sum = 0;
    const RowValues<float> values{args_.rows};
    for (int64_t c = 0; c < args_.rows.layout.classes; ++c) sum += static_cast<double>(exp_(values.at(row, c) - high));
    return sum;
  }

  void grads(int64_t row, int64_t rows, const RowTarget* targets, Rows<float>& state) {
    const LaneFactors factors(rows, targets, state);
    DoublePair others{};
    tile_.count_allowed(row, rows);
    for (int64_t c = 0; c < args_.rows.layout.classes; c += tile_.n) {
      tile_.load(row, rows, c);
      tile_.load_coefficients();
      tile_.with_shares([&](auto q) {
        if (factors.slopes)
          grads_of<true>(factors, q, c, others);
        else
          grads_of<false>(factors, q, c, others);
        tile_.each_target(targets, c, [&](int64_t r, float u) {
          state.u[r] = u, state.q[r] = share_at(q, targets[r].index(0) - c, r);
        });
      });
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; !targets[r].one() && j < targets[r].per_row(); ++j) {
          const int64_t t = targets[r].ignored(j) ? -1 : targets[r].index(j) - c;
          if (t >= 0 && t < tile_.n) grad_[t * kWidth + r] -= state.share(r, targets[r], j);
        }
      tile_.write(grad_, args_.grad_logits, args_.grad_layout);
    }
    alignas(64) double sums[kWidth];
    store_vec(sums, others.low), store_vec(sums + kWidth / 2, others.high);
    std::copy_n(sums, rows, state.others);
    alignas(64) float p[kWidth];
    store_vec(p, exp_vec((load_vec(state.u) - factors.high) - factors.low));
    for (int64_t r = 0; r < rows; ++r) state.p_target[r] = static_cast<double>(p[r]);
  }

 private:
  // Coefficients of a register of rows.
  struct LaneFactors {
    float_vec high, low, nll, mass, rest, slope, entropy;
    int_vec wanted, quiet;
    bool slopes = false;

    LaneFactors(int64_t rows, const RowTarget* targets, const Rows<float>& state)
        : high(load_vec(state.high)), low(load_vec(state.low)), wanted(lane_targets(targets, rows)) {
      float f[5][kWidth] = {};
      int32_t q[kWidth] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Factors<float> k(state.coefficient[r]);
        f[0][r] = k.nll, f[1][r] = k.mass, f[2][r] = k.rest, f[3][r] = k.slope, f[4][r] = k.entropy;
        q[r] = state.quiet(r, targets[r]), slopes |= k.slope != 0;
      }
      nll = load_vec(f[0]), mass = load_vec(f[1]), rest = load_vec(f[2]), slope = load_vec(f[3]);
      entropy = load_vec(f[4]), quiet = load_bits<int_vec>(q) != 0;
    }
  };

  template <class Q>
  static float share_at(Q q, int64_t i, int64_t r) {
    if constexpr (std::is_same_v<Q, NoShares>)
      return 0;
    else
      return q.at(i)[r];
  }

  template <bool kSlope, class Q>
  void grads_of(const LaneFactors& k, Q q, int64_t c, DoublePair& others) {
    const int_vec wanted = k.wanted - static_cast<int32_t>(c);
    for (int64_t begin = 0; begin < tile_.n; begin += kClassesPerFold) {
      float_vec sum{};
      for (int64_t i = begin; i < std::min(begin + kClassesPerFold, tile_.n); ++i) {
        const float_vec log_p = (load_vec(tile_.u + i * kWidth) - k.high) - k.low, p = exp_vec(log_p);
        sum += wanted == static_cast<int32_t>(i) ? float_vec{} : p;
        float_vec grad;
        if constexpr (std::is_same_v<Q, NoShares>)
          grad = p * (k.nll * k.mass + k.rest);
        else
          grad = k.nll * (p * k.mass - q.at(i)) + p * k.rest;
        if constexpr (kSlope) grad -= p == 0.0f ? float_vec{} : p * (k.slope * (log_p + k.entropy));
        store_vec(grad_ + i * kWidth, k.quiet ? float_vec{} : grad);
      }
      add_to(others, sum);
    }
  }

  const CrossEntropyRowsBackward& args_;
  LaneTile tile_{args_.rows};
  alignas(64) float grad_[kLaneClasses * kWidth];
};

template <class A, class Walk = RowWalk<A>>
int64_t backward(const CrossEntropyRowsBackward& args, int64_t begin, int64_t end) {
  Walk walk(args);
  Rows<A> state(args);
  RowTarget targets[kGroup];
  for (int64_t row = begin, rows = 0; row < end; row += rows) {
    rows = walk.rows_from(row, end);
    for (int64_t r = 0; r < rows; ++r) {
      targets[r] = RowTarget(args.rows, row + r);
      if (targets[r].bad()) return row + r;
    }
    state.set_up(row, rows, targets, [&](int64_t at, A high) { return walk.sum(at, high); });
    walk.grads(row, rows, targets, state);
    for (int64_t r = 0; r < rows; ++r) state.set_target(row + r, r, targets[r]);
  }
  return -1;
}

int64_t index_alone_backward(const CrossEntropyRowsBackward& args, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 512;
  const CrossEntropyRows& a = args.rows;
  const int64_t bad = cross_entropy_bad_target(a.indices, begin, end, a.layout.classes);
  if (bad >= 0) return bad;
  double scale[kRows];
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = std::min(kRows, end - row);
    for (int64_t r = 0; r < n; ++r) scale[r] = args.grad_nll[row + r] * weight_of_row(a, row + r);
    const CrossEntropyBackward plain{a.dtype, a.logits, a.layout, a.indices,        args.lse,        nullptr,
                                     scale,   row,      1.0,      args.grad_logits, args.grad_layout};
    cross_entropy_backward(plain, row, row + n);
  }
  return -1;
}

}  // namespace

int64_t cross_entropy_rows_backward(const CrossEntropyRowsBackward& args, int64_t begin, int64_t end) {
  if (is_index_alone(args.rows) && args.grad_nll && !args.grad_lse) return index_alone_backward(args, begin, end);
  if (fits_lanes(args.rows)) return backward<float, LaneWalk>(args, begin, end);
  if (args.rows.dtype != DType::float64) return backward<float>(args, begin, end);
  return FUSED_OPS_FLOAT64(backward, cross_entropy_rows_backward, args, begin, end);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

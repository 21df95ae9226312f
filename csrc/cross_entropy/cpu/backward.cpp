// Cross-entropy on the CPU: the backward (the forward: forward.cpp).
//
// Per row, for upstream gradients g of nll, l of lse, h of entropy and t of the target's log-probability:
//   grad_u_j = p_j (g S + l - t - h (log p_j + entropy)) - g q_j + t [j == target],  grad_x_j = grad_u_j du_j/dx_j.
// The plain loss: grad_x_j = (p_j - [j == target]) g.
//
// Memory: every logit (and class probability, and mask) is read once, every gradient written once; a chunk of kChunk
// classes of the gradient is made in a buffer only where it cannot be made in its place, or where non-temporal stores
// take it from there. Loops as in forward.cpp.
//
// Stability: the target's gradient is minus the sum of the others' p where p - 1 would cancel, and log p_j is taken
// before it meets the entropy, which is of its size: lse and u_j are not. See docs/cross_entropy.md.
#include <algorithm>

#include "cross_entropy/cpu/across_rows.h"
#include "cross_entropy/cpu/few_classes.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// ---- the plain loss

// The upstream gradient of n rows, times the class weight.
template <class T>
void read_scales(const CrossEntropyBackward& a, int64_t row, int64_t n, const int64_t* target, double* scale) {
  if (a.grad_nll)
    std::copy_n(a.grad_nll + row, n, scale);
  else if (!a.grad_loss)
    std::fill_n(scale, n, a.scale);
  else
    for (int64_t r = 0; r < n; ++r) scale[r] = static_cast<double>(to_acc(static_cast<const T*>(a.grad_loss)[row + r]));
  for (int64_t r = 0; a.rows.class_weight && r < n; ++r)
    scale[r] *= target[r] == kIgnored ? 0 : weight_of(a.rows, target[r]);
}

// Whether the gradient of adjacent rows is written by non-temporal stores: it is too large for the cache, and its lines
// are not there as the logits'. With more classes a tile's part of one would be less than a line.
template <class T>
bool streams(const CrossEntropyBackward& a) {
  const RowLayout& l = a.rows.layout;
  return kStreams && l.adjacent_rows() && l.classes <= kStreamedClasses && a.grad_logits != a.rows.logits &&
         l.rows() * l.classes * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
}

template <class T>
void plain_step(const CrossEntropyBackward& a, int64_t row, int64_t n, const int64_t* target, PackedRows<T>& packed) {
  const RowLayout &l = a.rows.layout, &g = a.grad_layout;
  const T* logits = static_cast<const T*>(a.rows.logits);
  T* grads = static_cast<T*>(a.grad_logits);
  double scale[kRowTile];
  read_scales<T>(a, row, n, target, scale);
  if (l.adjacent_rows()) {
    const auto gradients = streams<T>(a) ? stream_plain_gradients<T> : plain_gradients<T>;
    return gradients(logits + l.offset(row), l.class_stride, grads + g.offset(row), g.class_stride, l.classes, n,
                     target, a.lse + row, scale);
  }
  if (has_few_classes(l))
    return few_classes_gradient(packed, RowsAt<const T>(logits, l, row), RowsAt<T>(grads, g, row), n, target,
                                a.lse + row, scale);
  for (int64_t r = 0; r < n; ++r) {
    T* grad = grads + g.offset(row + r);
    if (target[r] == kIgnored)
      std::fill(grad, grad + l.classes, T{});
    else
      plain_gradient(logits + l.offset(row + r), grad, l.classes, target[r], a.lse[row + r], scale[r]);
  }
}

template <class T>
int64_t plain_backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  PackedRows<T> packed(a.rows.layout.classes);
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = std::min(rows_of_step(a.rows.layout, row, end), rows_of_step(a.grad_layout, row, end));
    const TargetTile targets(a.rows.indices, row, n, a.rows.layout.classes);
    if (targets.bad_row >= 0) return targets.bad_row;
    plain_step<T>(a, row, n, targets.target, packed);
  }
  if (streams<T>(a)) finish_streaming();
  return -1;
}

// ---- the options, and float64

// Factors, and with one index target (p_j - [j == target]) target besides.
struct Coefficients {
  double nll, mass, rest, slope, entropy, target;
  bool zero() const { return nll == 0 && rest == 0 && slope == 0 && target == 0; }
  template <class A>
  Factors<A> factors() const {
    return {static_cast<A>(nll), static_cast<A>(mass), static_cast<A>(rest + target), static_cast<A>(slope),
            static_cast<A>(entropy)};
  }
};

// What the backward needs of each of the rows of a step.
template <class A>
struct Rows {
  const CrossEntropyBackward& args;
  const CrossEntropyRows& a = args.rows;
  const RowValues<A> values{args.rows};
  A high[kGroup] = {}, low[kGroup] = {}, u[kGroup], q[kGroup];  // lse, and the target's u and q
  double others[kGroup], p_target[kGroup];
  Coefficients coefficient[kGroup];

  explicit Rows(const CrossEntropyBackward& backward) : args(backward) {}

  // sum(row, high): of exp(u - high) over the classes.
  template <class Sum>
  void set_up(int64_t row, int64_t rows, const RowTarget* targets, const Sum& sum) {
    for (int64_t r = 0; r < rows; ++r) {
      split_lse(row + r, r, sum);
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
    const double p = p_target[r];
    const double residual = a.shard ? std::expm1(args.target_log_probability[row]) : target_residual(p, others[r]);
    const double log_p = static_cast<double>((u[r] - high[r]) - low[r]);
    const double own = k.nll * (p * k.mass - static_cast<double>(q[r]));
    const double rest = k.slope == 0 || p == 0 ? k.rest : k.rest - k.slope * (log_p + k.entropy);
    const double value = k.target * residual + own + p * rest;
    const A slope = values.slope(row, target.index(0), u[r]), out = slope == 0 ? A(0) : static_cast<A>(value) * slope;
    store_tile(args.grad_logits, a.dtype, args.grad_layout, row, 1, target.index(0), 1, &out);
  }

 private:
  double upstream(int64_t row) const {  // of nll
    if (args.grad_nll) return args.grad_nll[row];
    if (!args.grad_loss) return args.scale;
    A value;
    load_tile(args.grad_loss, a.dtype, {1, 1, 1, 0, 0, 1}, 0, 1, row, 1, &value);
    return static_cast<double>(value);
  }
  template <class Sum>
  void split_lse(int64_t row, int64_t r, const Sum& sum) {
    const double lse = a.shard ? args.high[row] + args.low[row] : args.lse[row];
    const bool apart = std::is_same_v<A, double> || std::fabs(lse) >= kFar;  // a double cannot hold low beside high
    if (a.shard && apart) {
      high[r] = static_cast<A>(args.high[row]), low[r] = static_cast<A>(args.low[row]);
      return;
    }
    high[r] = static_cast<A>(lse);
    low[r] = static_cast<A>(apart ? std::log(sum(row, high[r])) : lse - static_cast<double>(high[r]));
  }
  Coefficients coefficients(int64_t row, const RowTarget& target) const {
    const auto read = [&](const double* from) { return from ? from[row] : 0.0; };
    const bool counts = !target.all_ignored();
    if (!counts && !a.statistics) return {};
    const double g = counts ? upstream(row) : 0, h = read(args.grad_entropy);
    const double t = counts && target.single() ? read(args.grad_target_log_probability) : 0;
    const auto weight = [&] { return a.shard ? args.target_weight[row] : weight_of(a, target.index(0)); };
    const double on = target.single() ? (1.0 - a.label_smoothing) * weight() : 0;
    return {g, read(args.mass), read(args.grad_lse), h, h != 0 ? args.entropy[row] : 0, g * on - t};
  }
};

// A row, or of float64 a group of adjacent ones, with classes in registers.
template <class A>
class AlongClasses {
 public:
  using Value = A;
  explicit AlongClasses(const CrossEntropyBackward& backward) : args_(backward) {}

  int64_t rows_from(int64_t row, int64_t end) const { return tile_.rows_from(row, end); }

  double sum(int64_t row, A high) {
    double sum = 0;
    for (int64_t c = 0; c < args_.rows.layout.classes; c += tile_.n) {
      tile_.load(row, 1, c);
      add_exp(tile_.u(0), tile_.n, high, -1, tile_.u(0), &sum);
    }
    return sum;
  }

  void gradients_at(int64_t row, int64_t rows, const RowTarget* targets, Rows<A>& state) {
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
        gradients(tile_.u(r), out, n, state.high[r], state.low[r], state.coefficient[r].template factors<A>(),
                  tile_.coefficients(r), state.p_target[r] >= 0.5, target.one() ? target.index(0) - c : -1);
    state.others[r] += sum;
    for (int64_t j = 0; !target.one() && j < target.per_row(); ++j) {
      const int64_t t = target.ignored(j) ? -1 : target.index(j) - c;
      if (t >= 0 && t < n) out[t] -= state.share(r, target, j);
    }
    if (tile_.chains()) tile_.chain(r, out);
  }

  const CrossEntropyBackward& args_;
  Tile<A> tile_{args_.rows};
  alignas(64) A grad_[kTile];
};

// A register of rows.
class AcrossRows {
 public:
  using Value = float;
  explicit AcrossRows(const CrossEntropyBackward& backward) : args_(backward) {}

  int64_t rows_from(int64_t row, int64_t end) const { return tile_.rows_from(row, end); }

  double sum(int64_t row, float high) const {
    double sum = 0;
    const RowValues<float> values{args_.rows};
    for (int64_t c = 0; c < args_.rows.layout.classes; ++c) sum += static_cast<double>(exp_(values.at(row, c) - high));
    return sum;
  }

  void gradients_at(int64_t row, int64_t rows, const RowTarget* targets, Rows<float>& state) {
    const RegisterFactors factors(rows, targets, state);
    DoublePair others{};
    tile_.count_allowed(row, rows);
    for (int64_t c = 0; c < args_.rows.layout.classes; c += tile_.n) {
      tile_.load(row, rows, c);
      tile_.load_coefficients();
      tile_.with_shares([&](auto q) {
        if (factors.slopes)
          gradients_of<true>(factors, q, c, others);
        else
          gradients_of<false>(factors, q, c, others);
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
  struct RegisterFactors {
    float_vec high, low, nll, mass, rest, slope, entropy;
    int_vec wanted, quiet;
    bool slopes = false;

    RegisterFactors(int64_t rows, const RowTarget* targets, const Rows<float>& state)
        : high(load_vec(state.high)), low(load_vec(state.low)), wanted(index_register(targets, rows)) {
      float f[5][kWidth] = {};
      int32_t q[kWidth] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Factors<float> k = state.coefficient[r].factors<float>();
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
  void gradients_of(const RegisterFactors& k, Q q, int64_t c, DoublePair& others) {
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

  const CrossEntropyBackward& args_;
  AcrossTile tile_{args_.rows};
  alignas(64) float grad_[kTileClasses * kWidth];
};

template <class Loop>
int64_t backward(const CrossEntropyBackward& args, int64_t begin, int64_t end) {
  using A = typename Loop::Value;
  Loop loop(args);
  Rows<A> state(args);
  RowTarget targets[kGroup];
  for (int64_t row = begin, rows = 0; row < end; row += rows) {
    rows = loop.rows_from(row, end);
    for (int64_t r = 0; r < rows; ++r) {
      targets[r] = RowTarget(args.rows, row + r);
      if (targets[r].bad()) return row + r;
    }
    state.set_up(row, rows, targets, [&](int64_t at, A high) { return loop.sum(at, high); });
    loop.gradients_at(row, rows, targets, state);
    for (int64_t r = 0; r < rows; ++r) state.set_target(row + r, r, targets[r]);
  }
  return -1;
}

template <class A>
int64_t along_classes(const CrossEntropyBackward& args, int64_t begin, int64_t end) {
  return backward<AlongClasses<A>>(args, begin, end);
}

}  // namespace

int64_t cross_entropy_backward(const CrossEntropyBackward& args, int64_t begin, int64_t end) {
  const CrossEntropyRows& a = args.rows;
  const bool nll_alone = !args.grad_lse && !args.grad_entropy && !args.grad_target_log_probability;
  if (nll_alone && has_plain_loop(a, args.grad_layout))
    return with_float_dtype(a.dtype,
                            [&](auto type) { return plain_backward<typename decltype(type)::type>(args, begin, end); });
  if (goes_across(a)) return backward<AcrossRows>(args, begin, end);
  if (a.dtype != DType::float64) return along_classes<float>(args, begin, end);
  return FUSED_OPS_FLOAT64(along_classes, cross_entropy_backward, args, begin, end);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

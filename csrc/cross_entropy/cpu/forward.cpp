// Cross-entropy on the CPU: the forward (the backward: backward.cpp).
//
// Per row, with u, q and the mass S = sum_j q_j of cross_entropy/kernels.h:
//   lse = log sum_j exp(u_j),  nll = sum_j q_j (lse - u_j),  entropy = lse - sum_j p_j u_j,  p_j = exp(u_j - lse).
// The plain loss: nll = lse - x_target.
//
// Memory: every logit (and class probability, and mask) is read once, and 8 bytes per row and output are written.
// Chunks of kChunk classes stay in L1 between the maximum and the sums (online softmax); they are converted into a
// buffer only where they do not lie in memory as they are wanted. Loops: a row with its classes in registers
// (along_classes.h), a register of rows (across_rows.h), and of the plain loss rows of few classes (few_classes.h).
// float64, and the plain loss of other strides, take the options' loops.
//
// Stability: the sum is taken over classes other than the target, relative to the running maximum, so that a confident
// right row keeps its loss (log1p of the rest). lse is kept in double: a float cannot hold log-sum-exp next to logits
// of 1e4. The terms q_j (lse - u_j) are summed relative to the first chunk's maximum. See docs/cross_entropy.md.
#include <algorithm>

#include "cross_entropy/cpu/across_rows.h"
#include "cross_entropy/cpu/few_classes.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// ---- the plain loss

// In an order of its own, which the rows before the first do not change.
double sum_of(const double* x, int64_t n) {
  double parts[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t l = 0; l < std::min(kLanes, n - i); ++l) parts[l] += x[i + l];
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

template <class T>
void plain_sums(const CrossEntropyRows& a, int64_t row, int64_t n, const int64_t* target, PackedRows<T>& packed,
                RowSums& sums) {
  const RowLayout& l = a.layout;
  const T* logits = static_cast<const T*>(a.logits);
  if (l.adjacent_rows()) return plain_rows(logits + l.offset(row), l.class_stride, l.classes, n, target, sums);
  if (has_few_classes(l)) return few_classes_sums(packed, RowsAt<const T>(logits, l, row), n, target, sums);
  for (int64_t r = 0; r < n; ++r) {
    if (target[r] == kIgnored) continue;
    const T* x = logits + l.offset(row + r);
    sums.set(r, plain_row(x, l.classes, target[r], logits + l.offset(row + std::min(r + 1, n - 1))),
             to_acc(x[target[r]]));
  }
}

// What the options want of n rows, and the loss rounded.
template <class T>
void write_rows(const CrossEntropyForward& a, int64_t row, int64_t n, const int64_t* target, const double* loss) {
  for (int64_t r = 0; a.nll && r < n; ++r) {
    const double weight = target[r] == kIgnored ? 0 : weight_of(a.rows, target[r]);
    a.nll[row + r] = target[r] == kIgnored ? 0 : loss[r] * weight;
    a.mass[row + r] = 0, a.target_weight[row + r] = weight;
  }
  for (int64_t r = 0; a.loss && r < n; ++r) store(static_cast<T*>(a.loss) + row + r, static_cast<float>(loss[r]));
}

template <class T>
BlockResult plain_forward(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  const RowLayout& l = a.rows.layout;
  BlockResult result{0.0, 0, -1};
  RowSums sums;
  PackedRows<T> packed(l.classes);
  double loss[kRowTile];
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = rows_of_step(l, row, end);
    const TargetTile targets(a.rows.indices, row, n, l.classes);
    result.bad_row = targets.bad_row;
    if (targets.bad_row >= 0) break;
    if (targets.count < n)
      for (int64_t r = 0; r < n; ++r) sums.max[r] = sums.others[r] = sums.below[r] = 0;
    plain_sums<T>(a.rows, row, n, targets.target, packed, sums);
    sums.finish(n, a.lse + row, loss);
    for (int64_t r = 0; targets.count < n && r < n; ++r)
      if (targets.target[r] == kIgnored) a.lse[row + r] = loss[r] = 0;  // lse never read: its gradient is zero
    result.loss_sum += sum_of(loss, n);
    result.count += targets.count;
    write_rows<T>(a, row, n, targets.target, loss);
  }
  return result;
}

// ---- the options, and float64

// What is left to do of a row when its sums are known.
template <class A>
struct Finish {
  const CrossEntropyForward& args;
  const CrossEntropyRows& a = args.rows;
  const RowValues<A> values{args.rows};

  // What the indices add to nll, and with several of them to the mass.
  void add_indices(int64_t row, const RowTarget& target, double max, double below, double log_sum, double* nll,
                   double* mass, double* target_weight) const {
    const double soft = 1.0 - a.label_smoothing;
    for (int64_t k = 0; k < target.per_row(); ++k) {
      if (target.ignored(k)) continue;
      const int64_t c = target.index(k);
      const double weight = target.probability(k) * weight_of(a, c), share = soft * weight;
      *target_weight += weight;
      if (!target.one()) *mass += share;
      if (target.one() && a.shard) continue;  // its own is added when all shards are known
      const double away = target.one() ? -below : max - static_cast<double>(values.at(row, c));
      // 0 even where the logit is -inf; but PyTorch has the one index, and 0 * inf there
      if (share != 0 || target.one()) *nll += share * (log_sum + away);
    }
  }

  // Returns nll.
  double operator()(int64_t row, const RowTarget& target, const RowState<A>& s) const {
    const bool one = target.one(), spread = a.has_dense || a.label_smoothing != 0, counts = !target.all_ignored();
    const double u_target = one ? static_cast<double>(s.excluded) : 0;
    const bool gone = a.shard && s.is_gone(one);  // then lse stands for 0
    const double max = gone ? 0 : static_cast<double>(s.sum.max), below = one ? u_target - max : 0;
    const double log_sum = gone ? 0 : s.log_sum(one, below);
    double mass = s.q.mass, target_weight = target.has_indices() ? 0 : 1;
    double nll = spread ? s.q.dot + mass * ((max - static_cast<double>(s.base)) + log_sum) : 0;
    add_indices(row, target, max, below, log_sum, &nll, &mass, &target_weight);
    if (a.shard) return write_part(row, target, s, {gone, below, log_sum, nll, mass, target_weight});
    args.lse[row] = counts || a.statistics ? max + log_sum : 0;
    if (a.statistics) write_statistics(row, target, s, below, log_sum);
    return write(row, counts ? nll : 0, counts ? mass : 0, counts ? target_weight : 0);
  }

  void ignored(int64_t row) const {
    if (a.shard) return write_part({0, 0, 0, 0, 0, 1, std::numeric_limits<double>::quiet_NaN()}, row);
    args.lse[row] = 0;
    write(row, 0, 0, 0);
  }

 private:
  double write(int64_t row, double nll, double mass, double target_weight) const {
    if (args.nll) args.nll[row] = nll, args.mass[row] = mass, args.target_weight[row] = target_weight;
    const A loss = static_cast<A>(nll);
    if (args.loss) store_tile(args.loss, a.dtype, {1, 1, 1, 0, 0, 1}, 0, 1, row, 1, &loss);
    return nll;
  }

  static double entropy(const RowState<A>& s, bool one, double below, double log_sum) {
    const double e = one ? std::exp(below) : 0;
    const double weighted = s.weighted + (e == 0 ? 0 : e * below), sum = std::exp(log_sum);
    return log_sum - weighted / sum;
  }

  static int64_t prediction(const RowState<A>& s, const RowTarget& target) {
    if (!target.one() || s.excluded == s.excluded) return s.prediction;
    return s.found_nan ? std::min(s.prediction, target.index(0)) : target.index(0);  // the sums leave it out
  }

  void write_statistics(int64_t row, const RowTarget& target, const RowState<A>& s, double below,
                        double log_sum) const {
    const bool one = target.one();
    args.entropy[row] = entropy(s, one, below, log_sum);
    args.prediction[row] = prediction(s, target);
    args.target_log_probability[row] = one && !target.all_ignored() ? below - log_sum : 0;
  }

  struct Part {
    double high, low, nll, mass, target_weight, log_probability, bad_target;
  };
  struct Found {
    bool gone;
    double below, log_sum, nll, mass, target_weight;
  };

  void write_part(const Part& found, int64_t row) const {
    const CrossEntropyPart& p = args.part;
    p.high[row] = found.high, p.low[row] = found.low, p.nll[row] = found.nll, p.mass[row] = found.mass;
    p.target_weight[row] = found.target_weight, p.target_log_probability[row] = found.log_probability;
    p.bad_target[row] = found.bad_target;
  }

  double write_part(int64_t row, const RowTarget& target, const RowState<A>& s, const Found& f) const {
    constexpr double kInf = std::numeric_limits<double>::infinity();
    const bool one = target.one(), counts = !target.all_ignored();
    const bool nan = s.found_nan || (one && s.excluded != s.excluded);
    // with +inf lse is NaN too, but the maximum is not
    const double high = nan || (!f.gone && s.sum.max == ExpSum<A>::kNone) ? std::numeric_limits<double>::quiet_NaN()
                                                                          : static_cast<double>(s.sum.max);
    write_part({high, f.log_sum, counts ? f.nll : 0, counts ? f.mass : 0, counts ? f.target_weight : 0,
                one ? f.below - f.log_sum : 1, target.no_class(args.part.all_classes)},
               row);
    if (!a.statistics) return f.nll;
    args.part.entropy[row] = f.gone ? 0 : entropy(s, one, f.below, f.log_sum);
    args.part.prediction[row] =
        a.layout.classes == 0 ? kInf : static_cast<double>(prediction(s, target) + a.first_class);
    return f.nll;
  }
};

// A row, or of float64 a group of adjacent ones, with classes in registers.
template <class A>
struct AlongClasses {
  using Value = A;
  const CrossEntropyRows& a;
  Tile<A> tile{a};

  void sums(int64_t row, int64_t rows, const RowTarget* targets, RowState<A>* state) {
    for (int64_t r = 0; r < rows; ++r) state[r] = RowState<A>();
    tile.count_allowed(row, rows);
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, rows, c);
      tile.load_coefficients();
      for (int64_t r = 0; r < rows; ++r)
        state[r].add(tile.u(r), tile.coefficients(r), tile.allowed(r), c, tile.n,
                     targets[r].one() ? targets[r].index(0) : -1, a.statistics);
    }
  }
};

// A register of rows.
struct AcrossRows {
  using Value = float;
  const CrossEntropyRows& a;
  AcrossTile tile{a};

  void sums(int64_t row, int64_t rows, const RowTarget* targets, RowState<float>* state) {
    if (a.statistics) return sums_of<true>(row, rows, targets, state);
    sums_of<false>(row, rows, targets, state);
  }

 private:
  template <bool kEntropy>
  void sums_of(int64_t row, int64_t rows, const RowTarget* targets, RowState<float>* state) {
    const int_vec except = index_register(targets, rows);
    AcrossState<kEntropy> found;
    tile.count_allowed(row, rows);
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, rows, c);
      tile.load_coefficients();
      tile.each_target(targets, c, [&](int64_t r, float u) { state[r].excluded = u; });
      found.add(tile, c, except);
    }
    found.store(state, rows);
  }
};

template <class Loop>
BlockResult forward(const CrossEntropyForward& args, int64_t begin, int64_t end) {
  using A = typename Loop::Value;
  Loop loop{args.rows};
  const Finish<A> finish{args};
  RowTarget targets[kGroup];
  RowState<A> state[kGroup];
  BlockResult result{0.0, 0, -1};
  for (int64_t row = begin, rows = 0; row < end; row += rows) {
    rows = loop.tile.rows_from(row, end);
    bool any = args.rows.statistics;
    for (int64_t r = 0; r < rows; ++r) {
      targets[r] = RowTarget(args.rows, row + r);
      if (targets[r].bad()) return {0.0, 0, row + r};
      any |= !targets[r].all_ignored(), result.count += !targets[r].all_ignored();
    }
    if (any) loop.sums(row, rows, targets, state);
    for (int64_t r = 0; r < rows; ++r)
      if (any)
        result.loss_sum += finish(row + r, targets[r], state[r]);
      else
        finish.ignored(row + r);
  }
  return result;
}

template <class A>
BlockResult along_classes(const CrossEntropyForward& args, int64_t begin, int64_t end) {
  return forward<AlongClasses<A>>(args, begin, end);
}

}  // namespace

BlockResult cross_entropy_forward(const CrossEntropyForward& args, int64_t begin, int64_t end) {
  const CrossEntropyRows& a = args.rows;
  if (has_plain_loop(a, a.layout))
    return with_float_dtype(a.dtype,
                            [&](auto type) { return plain_forward<typename decltype(type)::type>(args, begin, end); });
  if (goes_across(a)) return forward<AcrossRows>(args, begin, end);
  if (a.dtype != DType::float64) return along_classes<float>(args, begin, end);
  return FUSED_OPS_FLOAT64(along_classes, cross_entropy_forward, args, begin, end);
}

int64_t cross_entropy_bad_target(const Targets& targets, int64_t begin, int64_t end, int64_t classes) {
  return first_bad_target(targets, begin, end, classes);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

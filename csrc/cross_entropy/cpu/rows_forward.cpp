// Cross-entropy with every option, row by row, on the CPU: the forward (the backward: rows_backward.cpp).
//
// Per row, with u, q and the mass S = sum_j q_j of cross_entropy/rows_kernels.h:
//   lse = log sum_j exp(u_j),  nll = sum_j q_j (lse - u_j),  entropy = lse - sum_j p_j u_j,  p_j = exp(u_j - lse).
//
// Memory: every logit (and class probability, and mask) is read once, and 8 bytes per row and output are written.
// Chunks of kChunk classes stay in L1 between the maximum and the sums; they are converted into a buffer only where
// they do not lie in memory as they are wanted. Rows that are adjacent in memory, or have few classes, go through
// registers of rows (option_lanes.h); of float64, kGroup of them are transposed together.
//
// Stability: as in index.cpp. With one index a row the sum leaves out the target; the terms q_j (lse - u_j) are
// summed relative to the first chunk's maximum. See docs/cross_entropy.md.
#include <algorithm>

#include "cross_entropy/cpu/index_alone.h"
#include "cross_entropy/cpu/option_lanes.h"
#include "cross_entropy/rows_kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// What is left to do of a row when its sums are known.
template <class A>
struct Finish {
  const CrossEntropyRowsForward& args;
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
      const double away = target.one() ? -below : max - static_cast<double>(values.at(row, c));
      // 0 even where the logit is -inf; but PyTorch has the one index, and 0 * inf there
      if (share != 0 || target.one()) *nll += share * (log_sum + away);
    }
  }

  void operator()(int64_t row, const RowTarget& target, const RowState<A>& s) const {
    const bool one = target.one(), spread = a.has_dense || a.label_smoothing != 0;
    const double u_target = one ? static_cast<double>(s.excluded) : 0;
    const double max = static_cast<double>(s.max), below = one ? u_target - max : 0;
    const double log_sum = s.log_sum(one, below);
    double mass = s.q.mass, target_weight = target.has_indices() ? 0 : 1;
    double nll = spread ? s.q.dot + mass * ((max - static_cast<double>(s.base)) + log_sum) : 0;
    add_indices(row, target, max, below, log_sum, &nll, &mass, &target_weight);
    const bool counts = !target.all_ignored();
    args.lse[row] = counts || a.statistics ? max + log_sum : 0;
    args.nll[row] = counts ? nll : 0, args.mass[row] = counts ? mass : 0;
    args.target_weight[row] = counts ? target_weight : 0;
    if (!a.statistics) return;
    const double e = one ? std::exp(below) : 0;
    const double weighted = s.weighted + (e == 0 ? 0 : e * below), sum = std::exp(log_sum);
    args.entropy[row] = log_sum - weighted / sum;
    args.prediction[row] = s.prediction;
    if (u_target != u_target)  // the sums leave it out
      args.prediction[row] = s.found_nan ? std::min(s.prediction, target.index(0)) : target.index(0);
    args.target_log_probability[row] = one && counts ? below - log_sum : 0;
  }
};

// A tile of rows, classes in registers.
template <class A>
struct RowWalk {
  const CrossEntropyRows& a;
  Tile<A> tile{a};

  int64_t rows_from(int64_t row, int64_t end) const { return tile.rows_from(row, end); }

  void sums(int64_t row, int64_t rows, const RowTarget* targets, RowState<A>* state) {
    for (int64_t r = 0; r < rows; ++r) state[r] = RowState<A>();
    tile.count_allowed(row, rows);
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, rows, c);
      tile.load_coefficients();
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t except = targets[r].one() ? targets[r].index(0) : -1;
        const Shares<A> q = tile.coefficients(r);
        if (a.statistics)
          state[r].template add<true>(tile.u(r), q, tile.allowed(r), c, tile.n, except);
        else
          state[r].template add<false>(tile.u(r), q, tile.allowed(r), c, tile.n, except);
      }
    }
  }
};

// Rows in registers.
struct LaneWalk {
  const CrossEntropyRows& a;
  LaneTile tile{a};

  int64_t rows_from(int64_t row, int64_t end) const { return tile.rows_from(row, end); }

  void sums(int64_t row, int64_t rows, const RowTarget* targets, RowState<float>* state) {
    if (a.statistics) return lane_sums<true>(row, rows, targets, state);
    lane_sums<false>(row, rows, targets, state);
  }

 private:
  template <bool kEntropy>
  void lane_sums(int64_t row, int64_t rows, const RowTarget* targets, RowState<float>* state) {
    const int_vec except = lane_targets(targets, rows);
    LaneState<kEntropy> lanes;
    tile.count_allowed(row, rows);
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, rows, c);
      tile.load_coefficients();
      tile.each_target(targets, c, [&](int64_t r, float u) { state[r].excluded = u; });
      lanes.add(tile, c, except);
    }
    lanes.store(state, rows);
  }
};

template <class A, class Walk = RowWalk<A>>
int64_t forward(const CrossEntropyRowsForward& args, int64_t begin, int64_t end) {
  Walk walk{args.rows};
  const Finish<A> finish{args};
  RowTarget targets[kGroup];
  RowState<A> state[kGroup];
  for (int64_t row = begin, rows = 0; row < end; row += rows) {
    rows = walk.rows_from(row, end);
    bool any = args.rows.statistics;
    for (int64_t r = 0; r < rows; ++r) {
      targets[r] = RowTarget(args.rows, row + r);
      if (targets[r].bad()) return row + r;
      any |= !targets[r].all_ignored();
    }
    if (any) {
      walk.sums(row, rows, targets, state);
      for (int64_t r = 0; r < rows; ++r) finish(row + r, targets[r], state[r]);
    } else {
      for (int64_t r = row; r < row + rows; ++r) args.nll[r] = args.lse[r] = args.mass[r] = args.target_weight[r] = 0;
    }
  }
  return -1;
}

int64_t index_alone_forward(const CrossEntropyRowsForward& args, int64_t begin, int64_t end) {
  const CrossEntropyRows& a = args.rows;
  const CrossEntropyForward plain{a.dtype, a.logits, a.layout, a.indices, 0, args.lse, nullptr, args.nll, nullptr};
  const BlockResult result = cross_entropy_forward_rows(plain, begin, end);
  if (result.bad_row >= 0) return result.bad_row;
  for (int64_t row = begin; row < end; ++row) {
    const double weight = weight_of_row(a, row);
    args.mass[row] = 0, args.target_weight[row] = weight;
    if (target_at(a.indices, row) != a.indices.ignore_index) args.nll[row] *= weight;
  }
  return -1;
}

}  // namespace

int64_t cross_entropy_rows_forward(const CrossEntropyRowsForward& args, int64_t begin, int64_t end) {
  if (is_index_alone(args.rows)) return index_alone_forward(args, begin, end);
  if (fits_lanes(args.rows)) return forward<float, LaneWalk>(args, begin, end);
  if (args.rows.dtype != DType::float64) return forward<float>(args, begin, end);
  return FUSED_OPS_FLOAT64(forward, cross_entropy_rows_forward, args, begin, end);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Backward with cross-entropy's options: scratch memory, and what the gradients of a row have in common. The kernels
// are in options_backward.cu and, for the common options, options_fast_backward.cu.
#pragma once
#include "cross_entropy/cuda/options.cuh"

namespace fused_ops {
namespace cuda {

// Where in scratch: shares, then per row the low part of lse, per row and segment the sum of the others' p, per index
// u.
struct Scratch {
  double *shares, *low, *others, *bent;
};
inline Scratch scratch_of(const RowsBackwardCall& c, int64_t segments) {
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
  const CrossEntropyBackward& b = c.args;
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

// From here on expm1 of a log-probability lacks digits that the others' sum has.
constexpr double kConfident = -1e-8;

// Launches a kind that is not general, on which float64 never is.
void launch_fast_backward(Launcher& launch, const RowsBackwardCall& c, const Scratch& scratch, Kind kind, bool wide,
                          bool even, int64_t segments);

}  // namespace cuda
}  // namespace fused_ops

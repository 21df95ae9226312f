// The ops of a batch that is spread over processes: each computes its part of the statistics and of the gradient's two
// sums, and goes on with those of all parts, which are merged in between (fused_ops/ops/batch_norm/ranks.py).
#include <tuple>

#include "batch_norm/calls.h"

namespace fused_ops {
namespace {

// (2 + 2 * channels,) float64: how many values of a channel count, how many there are, the means, and M2.
Tensor moments(const MomentsArguments& a) {
  check_input(a.input);
  const bool channels_last = is_channels_last(a.input);
  const Tensor input = channels_last ? a.input : dense(a.input);
  const MaybeTensor valid = valid_positions(a.valid, input);
  const View view = view_of(input, channels_last, valid, 1, kSmallSpatial);
  const ChannelLayout& l = view.layout;
  const int64_t size = 2 + 2 * view.channels;
  const Tensor result = empty(input, {&size, 1}, ScalarType::Double);
  double *counts = doubles(result), *mean = counts + 2, *m2 = mean + view.channels;
  counts[0] = 0, counts[1] = static_cast<double>(l.batch * l.spatial * view.repeat);
  Scratch<Partial, 256> partials(l.partials());
  BatchNormForward args{};
  args.dtype = float_dtype(kOp, "input", input), args.layout = l;
  args.input = input.const_data_ptr(), args.partials = partials.data();
  const auto finish = [&](int64_t c, const Partial& p) {
    if (c == 0) counts[0] = static_cast<double>(p.n);
    mean[c] = p.a, m2[c] = p.b;
  };
  two_passes<BatchNormForward>(view, FUSED_OPS_SELECT(batch_norm_moments), nullptr, args, merge_moments, finish);
  return result;
}

Tensor normalise(const NormaliseArguments& a) {
  check_input(a.input);
  check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  if (a.mask && !a.has_mask())
    raise(kOp, ": expected no mask without a residual and relu or leaky_relu, or with valid");
  const ForwardCall call(a);
  const View& view = call.view;
  check_statistics(a.statistics, view.channels);
  const Tensor statistics = dense(a.statistics);
  const double *mean = doubles(statistics), *invstd = mean + view.channels;
  const Values w(a.weight, 1), b(a.bias, 0);
  Coefficients coefficients(call.dtype, view.layout.channels, 3);
  for (int64_t c = 0; c < view.channels; ++c) coefficients.set_affine(view, c, mean[c], invstd[c] * w[c], b[c]);
  BatchNormForward args = call.kernel_arguments(view, 0);
  args.mean = coefficients.row(0), args.scale = coefficients.row(1), args.shift = coefficients.row(2);
  const ChannelLayout& l = view.layout;
  for_items(l, args.by_slice ? l.slices() : l.items(),
            [&](int64_t begin, int64_t end) { FUSED_OPS_SELECT(batch_norm_apply)(args, begin, end); });
  return call.output;
}

// A backward's kernel arguments, and what they point to.
struct BackwardPass {
  Coefficients coefficients;
  BatchNormBackward args;

  explicit BackwardPass(const BackwardCall& call)
      : coefficients(call.dtype, call.view.layout.channels, 5), args(call.kernel_arguments(call.view, 0)) {
    const Values w(call.given.weight, 1), b(call.given.bias, 0);
    const double *mean = call.means(), *invstd = call.invstds();
    for (int64_t c = 0; c < call.view.channels; ++c)
      coefficients.set_affine(call.view, c, mean[c], invstd[c] * w[c], b[c]);
    args.mean = coefficients.row(0), args.scale = coefficients.row(1), args.shift = coefficients.row(2);
    args.grad_mean = coefficients.row(3), args.grad_slope = coefficients.row(4);
  }
};

// (2, channels) float64: the sums of h and of h * (x - mean) over this part.
Tensor sums(const SumsArguments& a) {
  check_input(a.input);
  check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const BackwardCall call(a);
  const View& view = call.view;
  const int64_t both[] = {2, view.channels};
  const Tensor result = empty(call.input, {both, 2}, ScalarType::Double);
  double *sum = doubles(result), *dot = sum + view.channels;
  BackwardPass pass(call);
  Scratch<Partial, 256> partials(view.layout.partials());
  pass.args.partials = partials.data();
  const auto finish = [&](int64_t c, const Partial& p) { sum[c] = p.a, dot[c] = p.b; };
  two_passes<BatchNormBackward>(view, FUSED_OPS_SELECT(batch_norm_grad_sums), nullptr, pass.args, merge_sums, finish);
  return result;
}

// grad_input, of no values if it is not wanted; writes grad_residual.
Tensor gradient(const GradientArguments& a) {
  check_input(a.input);
  check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const BackwardCall call(a);
  const View& view = call.view;
  const ChannelLayout& l = view.layout;
  BackwardPass pass(call);
  if (a.means) {
    check_dtype(kOp, "means", *a.means, ScalarType::Double, "float64");
    check_numel(kOp, "means", *a.means, 2 * view.channels);
    const Tensor means = dense(*a.means);
    const double *grad_mean = doubles(means), *grad_slope = grad_mean + view.channels;
    for (int64_t c = 0; c < view.channels; ++c) {
      pass.coefficients.set(view, 3, c, grad_mean[c] - pass.coefficients.lost_of(call.means()[c]) * grad_slope[c]);
      pass.coefficients.set(view, 4, c, grad_slope[c]);
    }
  }
  pass.args.by_slice = !l.nhwc(), pass.args.stream = streams(l, call.dtype, false);
  if (a.means || a.grad_residual)
    for_items(l, pass.args.by_slice ? l.slices() : l.items(),
              [&](int64_t begin, int64_t end) { FUSED_OPS_SELECT(batch_norm_grad_input)(pass.args, begin, end); });
  return call.out.input;
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::moments>(m, "batch_norm_moments");
  implement_struct<&fused_ops::normalise>(m, "batch_norm_normalise");
  implement_struct<&fused_ops::sums>(m, "batch_norm_grad_sums");
  implement_struct<&fused_ops::gradient>(m, "batch_norm_gradient");
}

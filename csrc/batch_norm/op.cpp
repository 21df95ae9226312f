// Checks, allocation and dispatch of the batch-norm ops on the CPU. Tensors stop here.
#include <cmath>
#include <limits>
#include <tuple>

#include "batch_norm/calls.h"

namespace fused_ops {
namespace {

// Where the values of an optional parameter lie, dense: in it, or in `copy`.
const void* values_of(const MaybeTensor& t, MaybeTensor* copy) {
  if (!t) return nullptr;
  if (t->is_contiguous()) return t->const_data_ptr();
  *copy = dense(*t);
  return (*copy)->const_data_ptr();
}
DType dtype_of_any(const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c, const Tensor& otherwise) {
  return float_dtype(kOp, "parameter", a ? *a : b ? *b : c ? *c : otherwise);
}

void small_forward(const ForwardCall& call) {
  const ForwardArguments& a = call.given;
  MaybeTensor copies[4];
  SmallForward s{};
  s.training = a.training, s.momentum = a.momentum, s.eps = a.eps, s.correction = a.correction;
  s.params = dtype_of_any(a.weight, a.bias, a.running_mean, call.input);
  s.weight = values_of(a.weight, copies), s.bias = values_of(a.bias, copies + 1);
  s.running_mean = values_of(a.running_mean, copies + 2), s.running_var = values_of(a.running_var, copies + 3);
  if (a.updates()) s.new_mean = call.new_mean->mutable_data_ptr(), s.new_var = call.new_var->mutable_data_ptr();
  s.mean = call.means(), s.invstd = call.invstds();
  FUSED_OPS_SELECT(batch_norm_small_forward)(call.kernel_arguments(call.view, 0), s);
}

void forward_passes(const ForwardCall& call) {
  const ForwardArguments& a = call.given;
  const View& view = call.view;
  const ChannelLayout& l = view.layout;
  const int64_t channels = view.channels;
  const bool update = a.updates();
  const Values w(a.weight, 1), b(a.bias, 0), rm(a.running_mean, 0), rv(a.running_var, 1);
  Scratch<double, 512> running(update ? 2 * channels : 0);
  for (int64_t c = 0; update && c < channels; ++c) running[2 * c] = rm[c], running[2 * c + 1] = rv[c];
  Coefficients coefficients(call.dtype, l.channels, 3);
  Scratch<Partial, 256> partials(a.training ? l.partials() : 0);
  for (int64_t group = 0; group < view.groups; ++group) {
    const View part = view.group(group);
    double* mean = call.means() + group * channels;
    double* invstd = call.invstds() + group * channels;
    BatchNormForward args = call.kernel_arguments(part, group);
    args.mean = coefficients.row(0), args.scale = coefficients.row(1), args.shift = coefficients.row(2);
    args.partials = partials.data();
    const auto finish = [&](int64_t c, const Partial& p) {
      if (a.training) {
        const double n = static_cast<double>(p.n), nan = std::numeric_limits<double>::quiet_NaN();
        mean[c] = p.n ? p.a : nan;
        invstd[c] = p.n ? 1.0 / std::sqrt(p.b / (n - static_cast<double>(a.correction)) + a.eps) : nan;
        if (update && p.n) {
          running[2 * c] = a.momentum * p.a + (1 - a.momentum) * running[2 * c];
          running[2 * c + 1] = a.momentum * (p.b / (n - 1)) + (1 - a.momentum) * running[2 * c + 1];
        }
      } else {
        mean[c] = rm[c], invstd[c] = 1.0 / std::sqrt(rv[c] + a.eps);
      }
      coefficients.set_affine(part, c, mean[c], invstd[c] * w[c], b[c]);
    };
    two_passes(part, a.training ? FUSED_OPS_SELECT(batch_norm_moments) : nullptr, FUSED_OPS_SELECT(batch_norm_apply),
               args, merge_moments, finish);
  }
  if (update) {
    set_every_second(*call.new_mean, running.data(), channels);
    set_every_second(*call.new_var, running.data() + 1, channels);
  }
}

std::tuple<Tensor, Tensor> forward(const ForwardArguments& a) {
  check_forward(a);
  check_parameters(
      a.input,
      {{"running_mean", &a.running_mean}, {"running_var", &a.running_var}, {"weight", &a.weight}, {"bias", &a.bias}});
  const ForwardCall call(a);
  if (call.view.channels) {
    if (call.view.is_small())
      small_forward(call);
    else
      forward_passes(call);
    if (a.updates()) write_back(a.running_mean, call.new_mean), write_back(a.running_var, call.new_var);
  }
  return {call.output, call.statistics};
}

void small_backward(const BackwardCall& call) {
  const BackwardArguments& a = call.given;
  MaybeTensor copies[2];
  SmallBackward s{};
  s.correction = a.correction, s.reduces = call.reduces();
  s.params = dtype_of_any(a.weight, a.bias, {}, call.input);
  s.weight = values_of(a.weight, copies), s.bias = values_of(a.bias, copies + 1);
  s.mean = call.means(), s.invstd = call.invstds();
  if (a.need_params) s.grad_weight = call.out.weight.mutable_data_ptr(), s.grad_bias = call.out.bias.mutable_data_ptr();
  FUSED_OPS_SELECT(batch_norm_small_backward)(call.kernel_arguments(call.view, 0), s);
}

void backward_passes(const BackwardCall& call) {
  const BackwardArguments& a = call.given;
  const View& view = call.view;
  const int64_t channels = view.channels;
  const bool reduces = call.reduces();
  const Values w(a.weight, 1), b(a.bias, 0);
  Scratch<double, 512> params(2 * channels);
  for (int64_t i = 0; i < 2 * channels; ++i) params[i] = 0;
  Coefficients coefficients(call.dtype, view.layout.channels, 5);
  Scratch<Partial, 256> partials(reduces ? view.layout.partials() : 0);
  for (int64_t group = 0; group < view.groups; ++group) {
    const View part = view.group(group);
    const double* m = call.means() + group * channels;
    const double* inv = call.invstds() + group * channels;
    BatchNormBackward args = call.kernel_arguments(part, group);
    args.mean = coefficients.row(0), args.scale = coefficients.row(1), args.shift = coefficients.row(2);
    args.grad_mean = coefficients.row(3), args.grad_slope = coefficients.row(4);
    args.partials = partials.data();
    for (int64_t c = 0; c < channels; ++c) coefficients.set_affine(part, c, m[c], inv[c] * w[c], b[c]);
    const auto finish = [&](int64_t c, const Partial& p) {
      if (!reduces) return;
      const double low = coefficients.lost_of(m[c]);
      const double n = static_cast<double>(p.n);
      if (p.n) params[2 * c] += p.b * inv[c], params[2 * c + 1] += p.a;  // nothing: 0, not 0 * NaN
      const double slope = p.b * inv[c] * inv[c] / (n - static_cast<double>(a.correction));
      coefficients.set(part, 3, c, p.a / n - low * slope);
      coefficients.set(part, 4, c, slope);
    };
    two_passes(part, reduces ? FUSED_OPS_SELECT(batch_norm_grad_sums) : nullptr,
               a.need_input || a.grad_residual ? FUSED_OPS_SELECT(batch_norm_grad_input) : nullptr, args, merge_sums,
               finish);
  }
  if (a.need_params) {
    set_every_second(call.out.weight, params.data(), channels);
    set_every_second(call.out.bias, params.data() + 1, channels);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& a) {
  check_input(a.input);
  check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const BackwardCall call(a);
  if (call.view.channels) {
    if (call.view.is_small())
      small_backward(call);
    else
      backward_passes(call);
  }
  return call.out.as_tuple();
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::forward>(m, "batch_norm_forward");
  implement_struct<&fused_ops::backward>(m, "batch_norm_backward");
  implement_struct<&fused_ops::forward, PlainForwardArguments>(m, "batch_norm_plain_forward");
  implement_struct<&fused_ops::backward, PlainBackwardArguments>(m, "batch_norm_plain_backward");
}

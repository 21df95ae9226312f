// Schema, checks, allocation and dispatch of the batch-norm ops. Tensors stop here.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/moments.h"

namespace fused_ops {
namespace {

constexpr const char* kOp = "batch_norm";
constexpr int64_t kGrainElements = 16384;  // values per task: below this a second thread costs more than it saves

using MaybeTensor = std::optional<Tensor>;

// Dense with the channel dimension last in memory (and not also contiguous).
bool is_channels_last(const Tensor& t) {
  if (t.dim() < 3 || t.is_contiguous()) return false;
  int64_t expected = t.size(1);
  if (t.size(1) != 1 && t.stride(1) != 1) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return t.size(0) == 1 || t.stride(0) == expected;
}

ChannelLayout layout_of(const Tensor& t, bool channels_last) {
  ChannelLayout l{t.size(0), t.size(1), 1};
  for (int64_t d = 2; d < t.dim(); ++d) (channels_last ? l.batch : l.spatial) *= t.size(d);
  return l;
}

std::vector<double> to_doubles(const MaybeTensor& t_, int64_t n, double missing) {
  std::vector<double> out(static_cast<size_t>(n), missing);
  if (!t_ || n == 0) return out;
  const Tensor t = dense(*t_);
  const void* p = t.const_data_ptr();
  for (int64_t i = 0; i < n; ++i) {
    switch (t.scalar_type()) {
      case ScalarType::Float: out[i] = static_cast<const float*>(p)[i]; break;
      case ScalarType::Double: out[i] = static_cast<const double*>(p)[i]; break;
      case ScalarType::BFloat16: out[i] = static_cast<float>(static_cast<const c10::BFloat16*>(p)[i]); break;
      case ScalarType::Half: out[i] = static_cast<float>(static_cast<const c10::Half*>(p)[i]); break;
      default: raise(kOp, ": parameters must be floating point, got dtype code ", static_cast<int>(t.scalar_type()));
    }
  }
  return out;
}

void from_doubles(const Tensor& t, const std::vector<double>& values) {
  void* p = t.mutable_data_ptr();
  for (size_t i = 0; i < values.size(); ++i) {
    switch (t.scalar_type()) {
      case ScalarType::Float: static_cast<float*>(p)[i] = static_cast<float>(values[i]); break;
      case ScalarType::Double: static_cast<double*>(p)[i] = values[i]; break;
      case ScalarType::BFloat16: static_cast<c10::BFloat16*>(p)[i] = static_cast<float>(values[i]); break;
      case ScalarType::Half: static_cast<c10::Half*>(p)[i] = static_cast<float>(values[i]); break;
      default: raise(kOp, ": parameters must be floating point, got dtype code ", static_cast<int>(t.scalar_type()));
    }
  }
}

void check_channels(const char* name, const MaybeTensor& t, int64_t channels) {
  if (!t) return;
  check_cpu(kOp, name, *t);
  float_dtype(kOp, name, *t);
  if (t->numel() != channels) raise(name, " should contain ", channels, " elements not ", t->numel());
}

void check_input(const Tensor& input) {
  if (input.dim() < 2) raise(kOp, ": input must be (batch, channels, ...), got shape ", shape_of(input));
  check_cpu(kOp, "input", input);
  float_dtype(kOp, "input", input);
}

template <class Kernel, class Args>
void run(const Kernel& kernel, const Args& args) {
  const ChannelLayout& l = args.layout;
  const int64_t items = item_count(l), numel = l.count() * l.channels;
  if (numel == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrainElements * items / numel);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

int64_t partial_count(const ChannelLayout& l) { return l.channels_last() ? item_count(l) * l.channels : l.channels; }

Tensor new_doubles(const Tensor& like, int64_t n) { return empty(like, {&n, 1}, ScalarType::Double); }

double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// Writes the batch mean and M2 per channel.
void batch_moments(DType dtype, const void* input, const ChannelLayout& l, double* mean, double* m2) {
  std::vector<Partial> partials(static_cast<size_t>(partial_count(l)));
  run(FUSED_OPS_SELECT(batch_norm_moments), BatchNormMoments{dtype, input, l, partials.data()});
  for (int64_t c = 0; c < l.channels; ++c) {
    if (!l.channels_last() || l.count() == 0) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      mean[c] = l.count() ? partials[c].a : nan, m2[c] = l.count() ? partials[c].b : nan;
      continue;
    }
    DEFAULT::Moments total;
    for (int64_t item = 0; item < item_count(l); ++item) {
      const Partial& p = partials[item * l.channels + c];
      total.merge(p.a, p.b, std::min(kRowsPerItem, l.batch - item * kRowsPerItem));
    }
    mean[c] = total.mean, m2[c] = total.m2;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& input_, const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& weight,
    const MaybeTensor& bias, bool training, double momentum, double eps, int64_t correction) {
  check_input(input_);
  const int64_t channels = input_.size(1);
  check_channels("running_mean", running_mean, channels);
  check_channels("running_var", running_var, channels);
  check_channels("weight", weight, channels);
  check_channels("bias", bias, channels);
  if (running_mean.has_value() != running_var.has_value())
    raise(kOp, ": running_mean and running_var must either both be given or both be None");
  if (!training && !running_mean) raise("running_mean must be defined in evaluation mode");

  const bool channels_last = is_channels_last(input_);
  const Tensor input = channels_last ? input_ : dense(input_);
  const DType dtype = float_dtype(kOp, "input", input);
  const ChannelLayout l = layout_of(input, channels_last);
  Tensor output = empty_strided(input, input.sizes(), input.strides(), input.scalar_type());
  Tensor mean = new_doubles(input, channels), invstd = new_doubles(input, channels);
  const bool update = training && running_mean.has_value();
  Tensor new_mean = update ? empty(input, {&channels, 1}, running_mean->scalar_type()) : new_doubles(input, 0);
  Tensor new_var = update ? empty(input, {&channels, 1}, running_var->scalar_type()) : new_doubles(input, 0);
  double* mean_p = doubles(mean);
  double* invstd_p = doubles(invstd);

  if (training) {
    std::vector<double> m2(static_cast<size_t>(channels));
    batch_moments(dtype, input.const_data_ptr(), l, mean_p, m2.data());
    const double n = static_cast<double>(l.count());
    for (int64_t c = 0; c < channels; ++c)
      invstd_p[c] = 1.0 / std::sqrt(m2[c] / (n - static_cast<double>(correction)) + eps);
    if (update) {
      auto rm = to_doubles(running_mean, channels, 0), rv = to_doubles(running_var, channels, 1);
      for (int64_t c = 0; l.count() > 0 && c < channels; ++c) {
        rm[c] = momentum * mean_p[c] + (1 - momentum) * rm[c];
        rv[c] = momentum * (m2[c] / (n - 1)) + (1 - momentum) * rv[c];
      }
      from_doubles(new_mean, rm);
      from_doubles(new_var, rv);
    }
  } else {
    const auto rm = to_doubles(running_mean, channels, 0), rv = to_doubles(running_var, channels, 1);
    for (int64_t c = 0; c < channels; ++c) mean_p[c] = rm[c], invstd_p[c] = 1.0 / std::sqrt(rv[c] + eps);
  }
  auto scale = to_doubles(weight, channels, 1);
  const auto shift = to_doubles(bias, channels, 0);
  for (int64_t c = 0; c < channels; ++c) scale[c] *= invstd_p[c];
  run(FUSED_OPS_SELECT(batch_norm_apply),
      BatchNormApply{dtype, input.const_data_ptr(), l, mean_p, scale.data(), shift.data(), output.mutable_data_ptr()});
  return {output, mean, invstd, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output_, const Tensor& input_,
                                                       const MaybeTensor& weight, const Tensor& mean_,
                                                       const Tensor& invstd_, bool training, int64_t correction,
                                                       bool need_input, bool need_params) {
  check_input(input_);
  const int64_t channels = input_.size(1);
  check_cpu(kOp, "grad_output", grad_output_);
  check_same_dtype(kOp, "grad_output", grad_output_, "input", input_);
  check_same_shape(kOp, "grad_output", grad_output_, "input", input_);
  check_channels("weight", weight, channels);
  check_channels("mean", mean_, channels);
  check_channels("invstd", invstd_, channels);
  check_dtype(kOp, "mean", mean_, ScalarType::Double, "float64");
  check_dtype(kOp, "invstd", invstd_, ScalarType::Double, "float64");

  const bool channels_last = is_channels_last(input_) && is_channels_last(grad_output_);
  const Tensor input = channels_last ? input_ : dense(input_);
  const Tensor grad_output = channels_last ? grad_output_ : dense(grad_output_);
  const Tensor mean = dense(mean_), invstd = dense(invstd_);
  const DType dtype = float_dtype(kOp, "input", input);
  const ChannelLayout l = layout_of(input, channels_last);
  const double* mean_p = doubles(mean);
  const double* invstd_p = doubles(invstd);

  std::vector<double> sum(static_cast<size_t>(channels)), dot(static_cast<size_t>(channels));
  if (training || need_params) {
    std::vector<Partial> partials(static_cast<size_t>(partial_count(l)));
    run(FUSED_OPS_SELECT(batch_norm_grad_sums),
        BatchNormGradSums{dtype, input.const_data_ptr(), grad_output.const_data_ptr(), l, mean_p, partials.data()});
    for (size_t i = 0; i < partials.size(); ++i) {  // in item order: the same sums for any number of threads
      sum[i % static_cast<size_t>(channels)] += partials[i].a;
      dot[i % static_cast<size_t>(channels)] += partials[i].b;
    }
  }
  const int64_t none = 0, per_channel = need_params ? channels : 0;
  const Tensor& like = weight ? *weight : input;
  Tensor grad_weight = empty(input, {&per_channel, 1}, like.scalar_type());
  Tensor grad_bias = empty(input, {&per_channel, 1}, like.scalar_type());
  if (need_params) {
    std::vector<double> scaled(dot);
    for (int64_t c = 0; c < channels; ++c) scaled[c] *= invstd_p[c];
    from_doubles(grad_weight, scaled);
    from_doubles(grad_bias, sum);
  }
  if (!need_input) return {empty(input, {&none, 1}, input.scalar_type()), grad_weight, grad_bias};

  Tensor grad_input = empty_strided(input, input.sizes(), input.strides(), input.scalar_type());
  const double n = static_cast<double>(l.count());
  auto scale = to_doubles(weight, channels, 1);
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] *= invstd_p[c];
    sum[c] = training ? sum[c] / n : 0;
    dot[c] = training ? dot[c] * invstd_p[c] * invstd_p[c] / (n - static_cast<double>(correction)) : 0;
  }
  run(FUSED_OPS_SELECT(batch_norm_grad_input),
      BatchNormGradInput{dtype, input.const_data_ptr(), grad_output.const_data_ptr(), l, mean_p, scale.data(),
                         sum.data(), dot.data(), grad_input.mutable_data_ptr()});
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  m.def(
      "batch_norm_forward(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
      "bool training, float momentum, float eps, int correction) "
      "-> (Tensor output, Tensor mean, Tensor invstd, Tensor new_running_mean, Tensor new_running_var)");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, bool "
      "training, "
      "int correction, bool need_input, bool need_params) -> (Tensor grad_input, Tensor grad_weight, Tensor "
      "grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&fused_ops::batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&fused_ops::batch_norm_backward));
}

// Schema, checks, allocation and dispatch of the batch-norm ops. Tensors stop here.
//
// batch_norm_forward/backward are the plain ops; batch_norm_act_forward/backward add a residual, an activation, a mask
// of valid positions and ghost batches. batch_norm_packed_forward/backward are for plain eager calls, where every
// tensor that crosses the border counts: mean and invstd are one, and the running statistics are written in place. All
// run the same code.
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "batch_norm/arguments.h"
#include "batch_norm/kernels.h"
#include "batch_norm/passes.h"
#include "batch_norm/small_kernels.h"
#include "core/border.h"

namespace fused_ops {
namespace {

struct ForwardOptions {
  bool training;
  double momentum, eps;
  int64_t correction;
  Activation activation = Activation::none;
  double slope = 0;
  int64_t groups = 1;
  bool packed = false;
};

// Optional, as even an undefined Tensor takes an allocation or two. Of a packed forward, `mean` is (2, channels), with
// invstd in its second row, and the new statistics are the given ones, or dense copies.
struct ForwardTensors {
  MaybeTensor output, mean, invstd, new_mean, new_var, mask;
};

// What the public function raises too, before anything is written. A dimension of stride 0 is what copy_ refuses.
void check_packed(const Tensor& input, const MaybeTensor& running_mean, const MaybeTensor& running_var,
                  const ForwardOptions& o) {
  for (const MaybeTensor* t : {&running_mean, &running_var})
    if (*t && (*t)->dim() != 1) raise(kOp, ": expected running statistics to have one dimension");
  for (const MaybeTensor* t : {&running_mean, &running_var})
    if (o.training && *t && (*t)->size(0) > 1 && (*t)->stride(0) == 0)
      raise(kOp,
            ": running statistics: unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation.");
  if (o.training ? o.eps <= 0 : o.eps < 0) raise(kOp, ": eps must be positive, got ", o.eps);
  if (o.training && input.size(1) && input.numel() == input.size(1))
    raise("Expected more than 1 value per channel when training, got input size ", shape_of(input));
}

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

ForwardTensors forward(const Tensor& input_, const MaybeTensor& residual_, const MaybeTensor& running_mean,
                       const MaybeTensor& running_var, const MaybeTensor& weight, const MaybeTensor& bias,
                       const MaybeTensor& valid_, const ForwardOptions& o) {
  check_input(input_);
  const int64_t channels = input_.size(1);
  check_parameters(
      input_, {{"running_mean", &running_mean}, {"running_var", &running_var}, {"weight", &weight}, {"bias", &bias}});
  if (running_mean.has_value() != running_var.has_value())
    raise(kOp, ": running_mean and running_var must either both be given or both be None");
  if (!o.training && !running_mean) raise("running_mean must be defined in evaluation mode");
  if (o.packed) check_packed(input_, running_mean, running_var, o);
  const bool last = is_channels_last(input_);
  const Tensor input = last ? input_ : dense(input_);
  const MaybeTensor residual = matching("residual", residual_, input), valid = valid_positions(valid_, input);
  const bool with_mask =
      (o.activation == Activation::relu || o.activation == Activation::leaky_relu) && residual && !valid;
  const View view = view_of(input, last, valid, o.training ? o.groups : 1, with_mask ? kSmallMaskedPlane : kSmallPlane);
  const ChannelLayout& l = view.layout;
  const DType dtype = float_dtype(kOp, "input", input);

  ForwardTensors out;
  const int64_t statistics = view.groups * channels, none = 0;
  const bool update = o.training && running_mean.has_value();
  out.output = empty_huge(kOp, input, input.strides());
  if (o.packed) {
    const int64_t both[] = {2, statistics};
    out.mean = empty(input, {both, 2}, ScalarType::Double);
    // Written at the end, and copied back where this is another tensor.
    if (update) out.new_mean = dense(*running_mean), out.new_var = dense(*running_var);
  } else {
    const int64_t* size = update ? &channels : &none;
    out.mean = empty(input, {&statistics, 1}, ScalarType::Double);
    out.invstd = empty(input, {&statistics, 1}, ScalarType::Double);
    out.new_mean = empty(input, {size, 1}, update ? running_mean->scalar_type() : ScalarType::Double);
    out.new_var = empty(input, {size, 1}, update ? running_var->scalar_type() : ScalarType::Double);
    if (residual || o.activation != Activation::none) {
      const int64_t bytes = with_mask ? view.mask_rows() * view.mask_row_bytes() : 0;
      out.mask = empty(input, {&bytes, 1}, ScalarType::Byte);
    }
  }
  if (channels == 0) return out;
  double* const all_means = doubles(*out.mean);
  double* const all_invstds = o.packed ? all_means + statistics : doubles(*out.invstd);

  const auto arguments = [&](const View& part, int64_t group) {
    const int64_t offset = view.group_offset(group), bytes = element_size(dtype);
    BatchNormForward args{};
    args.dtype = dtype, args.layout = part.layout, args.activation = o.activation;
    args.slope = o.activation == Activation::relu ? 0 : o.slope;
    args.input = at(input.const_data_ptr(), offset * bytes);
    args.residual = residual ? at(residual->const_data_ptr(), offset * bytes) : nullptr;
    args.output = at(out.output->mutable_data_ptr(), offset * bytes);
    args.mask = with_mask ? static_cast<uint8_t*>(out.mask->mutable_data_ptr()) +
                                view.mask_rows_before(group) * view.mask_row_bytes()
                          : nullptr;
    args.by_plane = !o.training && !l.columns();
    args.stream = streams(l, dtype, o.training);
    return args;
  };
  if (view.groups == 1 && view.repeat == 1 && is_small(l)) {
    MaybeTensor copies[4];
    SmallForward s{};
    s.training = o.training, s.momentum = o.momentum, s.eps = o.eps, s.correction = o.correction;
    s.params = dtype_of_any(weight, bias, running_mean, input);
    s.weight = values_of(weight, copies), s.bias = values_of(bias, copies + 1);
    s.running_mean = values_of(running_mean, copies + 2), s.running_var = values_of(running_var, copies + 3);
    if (update) s.new_mean = out.new_mean->mutable_data_ptr(), s.new_var = out.new_var->mutable_data_ptr();
    s.mean = all_means, s.invstd = all_invstds;
    FUSED_OPS_SELECT(batch_norm_small_forward)(arguments(view, 0), s);
    return out;
  }

  const Values w(weight, 1), b(bias, 0), rm(running_mean, 0), rv(running_var, 1);
  Scratch<double, 512> running(update ? 2 * channels : 0);
  for (int64_t c = 0; update && c < channels; ++c) running[2 * c] = rm[c], running[2 * c + 1] = rv[c];
  Coefficients coefficients(dtype, l.channels, 3);
  Scratch<Partial, 256> partials(o.training ? l.partials() : 0);
  for (int64_t group = 0; group < view.groups; ++group) {
    const View part = view.group(group);
    double* mean = all_means + group * channels;
    double* invstd = all_invstds + group * channels;
    BatchNormForward args = arguments(part, group);
    args.mean = coefficients.row(0), args.scale = coefficients.row(1), args.shift = coefficients.row(2);
    args.partials = partials.data();
    const auto finish = [&](int64_t c, const Partial& p) {
      if (o.training) {
        const double n = static_cast<double>(p.n), nan = std::numeric_limits<double>::quiet_NaN();
        mean[c] = p.n ? p.a : nan;
        invstd[c] = p.n ? 1.0 / std::sqrt(p.b / (n - static_cast<double>(o.correction)) + o.eps) : nan;
        if (update && p.n) {
          running[2 * c] = o.momentum * p.a + (1 - o.momentum) * running[2 * c];
          running[2 * c + 1] = o.momentum * (p.b / (n - 1)) + (1 - o.momentum) * running[2 * c + 1];
        }
      } else {
        mean[c] = rm[c], invstd[c] = 1.0 / std::sqrt(rv[c] + o.eps);
      }
      coefficients.set_affine(part, c, mean[c], invstd[c] * w[c], b[c]);
    };
    two_passes(part, o.training ? FUSED_OPS_SELECT(batch_norm_moments) : nullptr, FUSED_OPS_SELECT(batch_norm_apply),
               args, merge_moments, finish);
  }
  if (update) {
    set_every_second(*out.new_mean, running.data(), channels);
    set_every_second(*out.new_var, running.data() + 1, channels);
  }
  return out;
}

struct BackwardOptions {
  bool training;
  int64_t correction;
  bool need_input, need_params, need_residual = false;
  Activation activation = Activation::none;
  double slope = 0;
  int64_t groups = 1;
  bool packed = false;
};

struct BackwardTensors {
  MaybeTensor grad_input, grad_residual, grad_weight, grad_bias;
};

BackwardTensors backward(const Tensor& grad_output_, const Tensor& input_, const MaybeTensor& residual_,
                         const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean_,
                         const MaybeTensor& invstd_, const MaybeTensor& mask_, const MaybeTensor& valid_,
                         const BackwardOptions& o) {
  check_input(input_);
  const int64_t channels = input_.size(1), none = 0;
  check_parameters(input_, {{"weight", &weight}, {"bias", &bias}});
  const bool last = is_channels_last(input_);
  const Tensor input = last ? input_ : dense(input_);
  const Tensor grad_output = *matching("grad_output", grad_output_, input);
  const MaybeTensor residual = matching("residual", residual_, input), valid = valid_positions(valid_, input);
  const bool with_mask = mask_ && mask_->numel() > 0;
  const View view = view_of(input, last, valid, o.training ? o.groups : 1, with_mask ? kSmallMaskedPlane : kSmallPlane);
  const ChannelLayout& l = view.layout;
  const DType dtype = float_dtype(kOp, "input", input);
  const int64_t statistics = view.groups * channels;
  const auto check_statistics = [&](const char* name, const Tensor& t, int64_t numel) {
    check_dtype(kOp, name, t, ScalarType::Double, "float64");
    check_numel(kOp, name, t, numel);
  };
  check_statistics(o.packed ? "statistics" : "mean", mean_, o.packed ? 2 * statistics : statistics);
  if (invstd_) check_statistics("invstd", *invstd_, statistics);
  const Tensor mean = dense(mean_), invstd = invstd_ ? dense(*invstd_) : mean;
  const double* const all_means = doubles(mean);
  const double* const all_invstds = o.packed ? all_means + statistics : doubles(invstd);
  const uint8_t* mask = mask_bytes(mask_, view);

  BackwardTensors out;
  const ScalarType like = weight ? weight->scalar_type() : bias ? bias->scalar_type() : input.scalar_type();
  out.grad_input =
      o.need_input ? empty_huge(kOp, input, input.strides()) : empty(input, {&none, 1}, input.scalar_type());
  if (residual_ || o.need_residual)
    out.grad_residual =
        o.need_residual ? empty_huge(kOp, input, input.strides()) : empty(input, {&none, 1}, input.scalar_type());
  out.grad_weight = empty(input, {o.need_params ? &channels : &none, 1}, like);
  out.grad_bias = empty(input, {o.need_params ? &channels : &none, 1}, like);
  if (channels == 0) return out;

  const bool reduces = (o.training && o.need_input) || o.need_params;
  const auto arguments = [&](const View& part, int64_t group) {
    const int64_t offset = view.group_offset(group), bytes = element_size(dtype);
    BatchNormBackward args{};
    args.dtype = dtype, args.layout = part.layout, args.activation = o.activation;
    args.slope = o.activation == Activation::relu ? 0 : o.slope;
    args.frozen = !o.training;
    args.exact_mean = all_means + group * channels, args.repeat = view.repeat;
    args.input = at(input.const_data_ptr(), offset * bytes);
    args.grad_output = at(grad_output.const_data_ptr(), offset * bytes);
    args.residual = residual ? at(residual->const_data_ptr(), offset * bytes) : nullptr;
    args.mask = mask ? mask + view.mask_rows_before(group) * view.mask_row_bytes() : nullptr;
    args.grad_input = o.need_input ? at(out.grad_input->mutable_data_ptr(), offset * bytes) : nullptr;
    args.grad_residual = o.need_residual ? at(out.grad_residual->mutable_data_ptr(), offset * bytes) : nullptr;
    args.by_plane = !reduces && !l.columns();
    args.stream = streams(l, dtype, reduces);
    return args;
  };
  if (view.groups == 1 && view.repeat == 1 && is_small(l)) {
    MaybeTensor copies[2];
    SmallBackward s{};
    s.correction = o.correction, s.reduces = reduces;
    s.params = dtype_of_any(weight, bias, {}, input);
    s.weight = values_of(weight, copies), s.bias = values_of(bias, copies + 1);
    s.mean = all_means, s.invstd = all_invstds;
    if (o.need_params)
      s.grad_weight = out.grad_weight->mutable_data_ptr(), s.grad_bias = out.grad_bias->mutable_data_ptr();
    FUSED_OPS_SELECT(batch_norm_small_backward)(arguments(view, 0), s);
    return out;
  }

  const Values w(weight, 1), b(bias, 0);
  Scratch<double, 512> params(2 * channels);
  for (int64_t i = 0; i < 2 * channels; ++i) params[i] = 0;
  Coefficients coefficients(dtype, l.channels, 5);
  Scratch<Partial, 256> partials(reduces ? l.partials() : 0);
  for (int64_t group = 0; group < view.groups; ++group) {
    const View part = view.group(group);
    const double* m = all_means + group * channels;
    const double* inv = all_invstds + group * channels;
    BatchNormBackward args = arguments(part, group);
    args.mean = coefficients.row(0), args.scale = coefficients.row(1), args.shift = coefficients.row(2);
    args.grad_mean = coefficients.row(3), args.grad_slope = coefficients.row(4);
    args.partials = partials.data();
    for (int64_t c = 0; c < channels; ++c) coefficients.set_affine(part, c, m[c], inv[c] * w[c], b[c]);
    const auto finish = [&](int64_t c, const Partial& p) {
      if (!reduces) return;
      const double low = coefficients.lost_of(m[c]);
      const double n = static_cast<double>(p.n);
      if (p.n) params[2 * c] += p.b * inv[c], params[2 * c + 1] += p.a;  // nothing: 0, not 0 * NaN
      const double slope = p.b * inv[c] * inv[c] / (n - static_cast<double>(o.correction));
      coefficients.set(part, 3, c, p.a / n - low * slope);
      coefficients.set(part, 4, c, slope);
    };
    two_passes(part, reduces ? FUSED_OPS_SELECT(batch_norm_grad_sums) : nullptr,
               o.need_input || o.need_residual ? FUSED_OPS_SELECT(batch_norm_grad_input) : nullptr, args, merge_sums,
               finish);
  }
  if (o.need_params) {
    set_every_second(*out.grad_weight, params.data(), channels);
    set_every_second(*out.grad_bias, params.data() + 1, channels);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& input, const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& weight,
    const MaybeTensor& bias, bool training, double momentum, double eps, int64_t correction) {
  auto r = forward(input, {}, running_mean, running_var, weight, bias, {}, {training, momentum, eps, correction});
  return {*r.output, *r.mean, *r.invstd, *r.new_mean, *r.new_var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       const MaybeTensor& weight, const Tensor& mean,
                                                       const Tensor& invstd, bool training, int64_t correction,
                                                       bool need_input, bool need_params) {
  auto r = backward(grad_output, input, {}, weight, {}, mean, invstd, {}, {},
                    {training, correction, need_input, need_params});
  return {*r.grad_input, *r.grad_weight, *r.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_forward(
    const Tensor& input, const MaybeTensor& residual, const MaybeTensor& running_mean, const MaybeTensor& running_var,
    const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& valid, bool training, double momentum,
    double eps, int64_t correction, int64_t activation, double slope, int64_t groups) {
  auto r = forward(input, residual, running_mean, running_var, weight, bias, valid,
                   {training, momentum, eps, correction, activation_of(activation), slope, groups});
  const int64_t none = 0;
  if (!r.mask) r.mask = empty(input, {&none, 1}, ScalarType::Byte);
  return {*r.output, *r.mean, *r.invstd, *r.new_mean, *r.new_var, *r.mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_output, const Tensor& input, const MaybeTensor& residual, const MaybeTensor& weight,
    const MaybeTensor& bias, const Tensor& mean, const Tensor& invstd, const MaybeTensor& mask,
    const MaybeTensor& valid, bool training, int64_t correction, int64_t activation, double slope, int64_t groups,
    bool need_input, bool need_params, bool need_residual) {
  auto r = backward(
      grad_output, input, residual, weight, bias, mean, invstd, mask, valid,
      {training, correction, need_input, need_params, need_residual, activation_of(activation), slope, groups});
  const int64_t none = 0;
  if (!r.grad_residual) r.grad_residual = empty(input, {&none, 1}, input.scalar_type());
  return {*r.grad_input, *r.grad_residual, *r.grad_weight, *r.grad_bias};
}

std::tuple<Tensor, Tensor> batch_norm_packed_forward(const Tensor& input, const MaybeTensor& running_mean,
                                                     const MaybeTensor& running_var, const MaybeTensor& weight,
                                                     const MaybeTensor& bias, bool training, double momentum,
                                                     double eps, int64_t correction, int64_t activation, double slope) {
  auto r = forward(input, {}, running_mean, running_var, weight, bias, {},
                   {training, momentum, eps, correction, activation_of(activation), slope, 1, true});
  for (const auto& [to, from] : {std::pair(&running_mean, &r.new_mean), std::pair(&running_var, &r.new_var)}) {
    if (!training || !*to || (*to)->is_contiguous()) continue;
    Tensor t = **to;
    torch::stable::copy_(t, **from);
  }
  return {*r.output, *r.mean};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_packed_backward(const Tensor& grad_output, const Tensor& input,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              const Tensor& statistics, bool training, bool need_input,
                                                              bool need_params, int64_t correction, int64_t activation,
                                                              double slope) {
  auto r = backward(grad_output, input, {}, weight, bias, statistics, {}, {}, {},
                    {training, correction, need_input, need_params, false, activation_of(activation), slope, 1, true});
  return {*r.grad_input, *r.grad_weight, *r.grad_bias};
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) {
  fused_ops::define(
      m,
      "batch_norm_forward(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
      "bool training, float momentum, float eps, int correction) "
      "-> (Tensor output, Tensor mean, Tensor invstd, Tensor new_running_mean, Tensor new_running_var)");
  fused_ops::define(m,
                    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
                    "bool training, int correction, bool need_input, bool need_params) "
                    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  fused_ops::define(
      m,
      "batch_norm_act_forward(Tensor input, Tensor? residual, Tensor? running_mean, Tensor? running_var, "
      "Tensor? weight, Tensor? bias, Tensor? valid, bool training, float momentum, float eps, int correction, "
      "int activation, float slope, int groups) -> (Tensor output, Tensor mean, Tensor invstd, "
      "Tensor new_running_mean, Tensor new_running_var, Tensor mask)");
  fused_ops::define(
      m,
      "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor invstd, Tensor? mask, Tensor? valid, bool training, int correction, int activation, "
      "float slope, int groups, bool need_input, bool need_params, bool need_residual) "
      "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  fused_ops::define(
      m,
      "batch_norm_packed_forward(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
      "Tensor? bias, bool training=True, float momentum=0.1, float eps=1e-5, int correction=0, int activation=0, "
      "float slope=0.0) -> (Tensor output, Tensor statistics)");
  fused_ops::define(
      m,
      "batch_norm_packed_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, "
      "bool training=True, bool need_input=True, bool need_params=True, int correction=0, int activation=0, "
      "float slope=0.0) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  fused_ops::implement<&fused_ops::batch_norm_forward>(m, "batch_norm_forward");
  fused_ops::implement<&fused_ops::batch_norm_backward>(m, "batch_norm_backward");
  fused_ops::implement<&fused_ops::batch_norm_act_forward>(m, "batch_norm_act_forward");
  fused_ops::implement<&fused_ops::batch_norm_act_backward>(m, "batch_norm_act_backward");
  fused_ops::implement<&fused_ops::batch_norm_packed_forward>(m, "batch_norm_packed_forward");
  fused_ops::implement<&fused_ops::batch_norm_packed_backward>(m, "batch_norm_packed_backward");
}

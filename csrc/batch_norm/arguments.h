// Arguments of the batch-norm ops, as their Python schemas list them, and what is checked of them on every device.
#pragma once
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "batch_norm/kernels.h"
#include "core/border.h"

namespace fused_ops {

constexpr const char* kOp = "batch_norm";

using MaybeTensor = std::optional<Tensor>;

inline Activation activation_of(int64_t code) {
  if (code < 0 || code >= kActivations)
    raise(kOp, ": activation must be a code in [0, ", kActivations, "), got ", code);
  return static_cast<Activation>(code);
}

// A batch cut into ghost batches: `count` of them with `size` entries each, the last with what is left.
struct GhostBatches {
  int64_t batch, size, count;

  GhostBatches(int64_t batch, int64_t groups) : batch(batch) {
    if (groups < 1) raise(kOp, ": groups must be at least 1, got ", groups);
    size = std::max<int64_t>(1, batch / groups + (batch % groups != 0));
    count = std::max<int64_t>(1, batch / size + (batch % size != 0));
  }
  int64_t entries(int64_t i) const { return std::min(size, batch - i * size); }
};

inline bool sign_is_enough(Activation a) { return a == Activation::relu || a == Activation::leaky_relu; }

// Which arguments an op has: those of plain calls, all, those of an op that is given its statistics, or those of the
// backward of a forward that kept its output.
enum class Form { plain, all, given, kept };
template <Form form>
using FormOf = std::integral_constant<Form, form>;

struct ForwardArguments {
  Tensor input;
  MaybeTensor running_mean, running_var;  // (channels,); written in training
  MaybeTensor weight, bias;               // (channels,)
  bool training;
  double momentum, eps;
  int64_t correction, code;
  double slope;
  MaybeTensor residual;  // as input
  MaybeTensor mask;      // bytes, written: a bit a value, set where z > 0
  MaybeTensor valid;     // (batch, ...)
  int64_t groups;
  Activation activation;

  explicit ForwardArguments(Arguments& in) : ForwardArguments(in, FormOf<Form::all>()) {}
  template <Form form>
  ForwardArguments(Arguments& in, FormOf<form>)
      : input(in.tensor()),
        running_mean(form != Form::given ? in.maybe_tensor() : MaybeTensor()),
        running_var(form != Form::given ? in.maybe_tensor() : MaybeTensor()),
        weight(in.maybe_tensor()),
        bias(in.maybe_tensor()),
        training(form != Form::given && in.flag()),
        momentum(form != Form::given ? in.number() : 0),
        eps(form != Form::given ? in.number() : 0),
        correction(form != Form::given ? in.integer() : 0),
        code(in.integer()),
        slope(in.number()),
        residual(form != Form::plain ? in.maybe_tensor() : MaybeTensor()),
        mask(form != Form::plain ? in.maybe_tensor() : MaybeTensor()),
        valid(form != Form::plain ? in.maybe_tensor() : MaybeTensor()),
        groups(form == Form::all ? in.integer() : 1) {
    in.check.next("input", input);
    in.check.next("running_mean", running_mean), in.check.next("running_var", running_var);
    in.check.next("weight", weight), in.check.next("bias", bias);
    in.check.next("residual", residual), in.check.next("mask", mask), in.check.next("valid", valid);
    activation = activation_of(code);
  }
  bool has_mask() const { return residual && !valid && sign_is_enough(activation); }  // or may have one
  bool updates() const { return training && running_mean; }
};

struct BackwardArguments {
  Tensor grad_output, input;    // input: the forward's, or its output where that was kept
  MaybeTensor weight, bias;     // (channels,)
  Tensor statistics;            // float64 mean and invstd, (2, groups * channels)
  MaybeTensor stored, offsets;  // of a forward that kept its output: batch_norm_keep's results
  bool training, need_input, need_params;
  int64_t correction, code;
  double slope;
  MaybeTensor residual, mask, valid;  // the forward's; the mask stands in for the residual
  int64_t groups;
  MaybeTensor grad_residual;  // as input, written
  Activation activation;

  explicit BackwardArguments(Arguments& in) : BackwardArguments(in, FormOf<Form::all>()) {}
  template <Form form>
  BackwardArguments(Arguments& in, FormOf<form>)
      : grad_output(in.tensor()),
        input(in.tensor()),
        weight(in.maybe_tensor()),
        bias(in.maybe_tensor()),
        statistics(in.tensor()),
        stored(form == Form::kept ? MaybeTensor(in.tensor()) : MaybeTensor()),
        offsets(form == Form::kept ? MaybeTensor(in.tensor()) : MaybeTensor()),
        training(form != Form::given && in.flag()),
        need_input(form != Form::given && in.flag()),
        need_params(form == Form::given || in.flag()),
        correction(form != Form::given ? in.integer() : 0),
        code(in.integer()),
        slope(in.number()),
        residual(form == Form::all || form == Form::given ? in.maybe_tensor() : MaybeTensor()),
        mask(form == Form::all || form == Form::given ? in.maybe_tensor() : MaybeTensor()),
        valid(form != Form::plain ? in.maybe_tensor() : MaybeTensor()),
        groups(form == Form::all || form == Form::kept ? in.integer() : 1),
        grad_residual(form == Form::all ? in.maybe_tensor() : MaybeTensor()) {
    in.check.next("grad_output", grad_output), in.check.next(form == Form::kept ? "output" : "input", input);
    in.check.next("weight", weight), in.check.next("bias", bias), in.check.next("statistics", statistics);
    in.check.next("stored", stored), in.check.next("offsets", offsets);
    in.check.next("residual", residual), in.check.next("mask", mask), in.check.next("valid", valid);
    in.check.next("grad_residual", grad_residual);
    activation = activation_of(code);
  }
};

// Those of the ops for plain calls, which end with the slope.
struct PlainForwardArguments : ForwardArguments {
  explicit PlainForwardArguments(Arguments& in) : ForwardArguments(in, FormOf<Form::plain>()) {}
};
struct PlainBackwardArguments : BackwardArguments {
  explicit PlainBackwardArguments(Arguments& in) : BackwardArguments(in, FormOf<Form::plain>()) {}
};
struct KeepBackwardArguments : BackwardArguments {
  explicit KeepBackwardArguments(Arguments& in) : BackwardArguments(in, FormOf<Form::kept>()) {}
};

// Those of the ops of a batch that is spread over processes, whose statistics are of all of it.
struct MomentsArguments {
  Tensor input;
  MaybeTensor valid;

  explicit MomentsArguments(Arguments& in) : input(in.tensor()), valid(in.maybe_tensor()) {
    in.check.next("input", input), in.check.next("valid", valid);
  }
};
// What is given comes first, so that everything is taken before the others are checked.
struct GivenStatistics {
  Tensor statistics;  // float64 mean and invstd, (2, channels)
};
struct NormaliseArguments : GivenStatistics, ForwardArguments {
  explicit NormaliseArguments(Arguments& in)
      : GivenStatistics{in.tensor()}, ForwardArguments(in, FormOf<Form::given>()) {
    in.check.next("statistics", statistics);
  }
};
struct SumsArguments : BackwardArguments {
  explicit SumsArguments(Arguments& in) : BackwardArguments(in, FormOf<Form::given>()) {}
};
struct GivenMeans {
  MaybeTensor means;    // float64 grad_mean and grad_slope, (2, channels); none: grad_input is not wanted
  MaybeTensor written;  // grad_residual
};
struct GradientArguments : GivenMeans, BackwardArguments {
  explicit GradientArguments(Arguments& in)
      : GivenMeans{in.maybe_tensor(), in.maybe_tensor()}, BackwardArguments(in, FormOf<Form::given>()) {
    grad_residual = written;
    in.check.next("means", means), in.check.next("grad_residual", grad_residual);
    need_input = training = means.has_value(), need_params = false;
  }
};

struct KeepArguments {
  Tensor output, input;      // input: as output
  MaybeTensor weight, bias;  // (channels,)
  MaybeTensor valid;         // (batch, ...)
  int64_t activation;
  double slope;
  int64_t groups;

  explicit KeepArguments(Arguments& in)
      : output(in.tensor()),
        input(in.tensor()),
        weight(in.maybe_tensor()),
        bias(in.maybe_tensor()),
        valid(in.maybe_tensor()),
        activation(in.integer()),
        slope(in.number()),
        groups(in.integer()) {
    in.check.next("output", output), in.check.next("input", input);
    in.check.next("weight", weight), in.check.next("bias", bias), in.check.next("valid", valid);
  }
};

// What a call that keeps its output is asked for: an activation that its output can be turned back by.
struct KeptOptions {
  Activation activation;
  double slope;
};

inline KeptOptions kept_options(int64_t activation, double slope) {
  const Activation kind = activation_of(activation);
  const bool sloped = kind == Activation::leaky_relu || kind == Activation::elu;
  if (!sloped && kind != Activation::none)
    raise(kOp, ": the activation of a kept output must be none, leaky_relu or elu, got code ", activation);
  if (sloped && !(slope > 0 && slope <= std::numeric_limits<float>::max()))
    raise(kOp, ": the slope of a kept output must be positive, got ", slope);
  return {kind, slope};
}

// The smallest normal number of the dtype: below it the output's rounding is no longer relative.
inline double smallest_normal(DType dtype) {
  switch (dtype) {
    case DType::float64: return std::numeric_limits<double>::min();
    case DType::float16: return 6.103515625e-5;
    default: return static_cast<double>(std::numeric_limits<float>::min());
  }
}

inline void check_input(const Tensor& input) {
  if (input.dim() < 2) raise(kOp, ": input must be (batch, channels, ...), got shape ", shape_of(input));
  float_dtype(kOp, "input", input);
}

// Each parameter has one value a channel; all are of one dtype, the input's or float32 with a 16-bit input. Returns it,
// if there is a parameter.
inline std::optional<ScalarType> check_parameters(
    const Tensor& input, std::initializer_list<std::pair<const char*, const MaybeTensor*>> parameters) {
  const bool narrow = input.scalar_type() == ScalarType::BFloat16 || input.scalar_type() == ScalarType::Half;
  std::optional<ScalarType> found;
  for (const auto& [name, t] : parameters) {
    if (!*t) continue;
    if ((*t)->numel() != input.size(1)) raise(name, " should contain ", input.size(1), " elements not ", (*t)->numel());
    const ScalarType type = (*t)->scalar_type();
    if (type != input.scalar_type() && !(narrow && type == ScalarType::Float))
      raise(kOp, ": mixed dtype: expected ", name, " of the dtype of input (", input.scalar_type(), ")",
            narrow ? " or Float" : "", ", got ", type);
    if (found && *found != type)
      raise(kOp, ": mixed dtype: expected parameters and statistics of one dtype, got ", name, " of ", type, " beside ",
            *found);
    found = type;
  }
  return found;
}

inline const void* at(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : p; }
inline void* at(void* p, int64_t bytes) { return p ? static_cast<char*>(p) + bytes : p; }

// A tensor of the input's shape and dtype in the input's memory layout: itself, or a copy.
inline MaybeTensor matching(const char* name, const MaybeTensor& t, const Tensor& input) {
  if (!t) return t;
  check_same_dtype(kOp, name, *t, "input", input);
  check_same_shape(kOp, name, *t, "input", input);
  bool same = true;
  for (int64_t d = 0; d < t->dim(); ++d) same &= t->size(d) <= 1 || t->stride(d) == input.stride(d);
  if (same || t->numel() == 0) return t;
  Tensor copy = empty_strided(input, input.sizes(), input.strides(), input.scalar_type());
  torch::stable::copy_(copy, *t);
  return copy;
}

// (batch, spatial) bytes or bools, one a position, dense.
inline MaybeTensor valid_positions(const MaybeTensor& valid, const Tensor& input) {
  if (!valid) return valid;
  if (valid->scalar_type() != ScalarType::Bool && valid->scalar_type() != ScalarType::Byte)
    raise(kOp, ": valid must be bool, got ", valid->scalar_type());
  int64_t positions = input.size(0);
  for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
  check_numel(kOp, "valid", *valid, positions);
  return dense(*valid);
}

// What has no elements is contiguous, and may be channels_last at once: its result is channels_last then.
inline bool is_empty_channels_last(const Tensor& t) {
  if (t.numel() != 0 || t.dim() < 4 || t.dim() > 5 || t.size(1) == 1 || !has_channels_last_strides(t)) return false;
  return t.size(2) != 1 || t.size(3) != 1 || (t.dim() == 5 && t.size(4) != 1);
}

// Whether a gradient of the input's shape is channels_last.
inline bool gradient_is_channels_last(const Tensor& input) {
  return is_channels_last(input) || is_empty_channels_last(input);
}

// Whether a result that lies the same either way, having one channel or one position, has the strides of channels_last:
// as PyTorch's for an input with gaps in that order. An addition or an activation behind its batch norm drops them.
// Source: is_channels_last_strides_2d_s4 of c10/core/MemoryFormat.h.
inline bool keeps_channels_last_strides(const ForwardArguments& a) {
  const Tensor& t = a.input;
  if (is_empty_channels_last(t)) return true;
  if (t.is_contiguous() || t.dim() < 4 || t.dim() > 5 || a.residual || a.activation != Activation::none) return false;
  if (t.size(1) > 1 && t.numel() > t.size(0) * t.size(1)) return false;
  int64_t least = t.size(1);
  if (t.stride(1) == 0) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    least = t.stride(d) * t.size(d);
  }
  return t.stride(0) >= least && least != t.stride(1);
}

// Writes running statistics that were updated in a dense copy; as every write to them, without autograd's notice.
inline void write_back(const MaybeTensor& to, const MaybeTensor& from) {
  if (to->is_contiguous()) return;
  Tensor alias =
      torch::stable::from_blob(to->mutable_data_ptr(), to->sizes(), to->strides(), to->device(), to->scalar_type());
  torch::stable::copy_(alias, *from);
}

// What the public function raises too, before anything is written. A dimension of stride 0 is what copy_ refuses.
inline void check_forward(const ForwardArguments& a) {
  const Tensor& input = a.input;
  check_input(input);
  if (a.running_mean.has_value() != a.running_var.has_value())
    raise(kOp, ": running_mean and running_var must either both be given or both be None");
  if (!a.training && !a.running_mean) raise("running_mean must be defined in evaluation mode");
  for (const MaybeTensor* t : {&a.running_mean, &a.running_var})
    if (*t && (*t)->dim() != 1) raise(kOp, ": expected running statistics to have one dimension");
  for (const MaybeTensor* t : {&a.running_mean, &a.running_var})
    if (a.training && *t && (*t)->size(0) > 1 && (*t)->stride(0) == 0)
      raise(kOp,
            ": running statistics: unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation.");
  if (a.training ? a.eps <= 0 : a.eps < 0) raise(kOp, ": eps must be positive, got ", a.eps);
  if (a.training && input.size(1) && input.numel() == input.size(1))
    raise("Expected more than 1 value per channel when training, got input size ", shape_of(input));
  if (a.groups < 1) raise(kOp, ": groups must be at least 1, got ", a.groups);
  if (a.mask && !a.has_mask())
    raise(kOp, ": expected no mask without a residual and relu or leaky_relu, or with valid");
}

inline void check_mask(const Tensor& mask, int64_t bytes) {
  check_dtype(kOp, "mask", mask, ScalarType::Byte, "uint8");
  check_numel(kOp, "mask", mask, bytes);
  if (!mask.is_contiguous()) raise(kOp, ": mask must be contiguous, as the forward wrote it");
}

inline void check_statistics(const Tensor& statistics, int64_t count) {
  check_dtype(kOp, "statistics", statistics, ScalarType::Double, "float64");
  check_numel(kOp, "statistics", statistics, 2 * count);
}

// A tensor that is written as if it were the op's result: of the input's shape, dtype and strides.
inline void check_written(const char* name, const Tensor& t, const Tensor& input) {
  check_same_dtype(kOp, name, t, "input", input);
  check_same_shape(kOp, name, t, "input", input);
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && t.numel() && t.stride(d) != input.stride(d))
      raise(kOp, ": expected ", name, " with the strides of a dense input");
}

}  // namespace fused_ops

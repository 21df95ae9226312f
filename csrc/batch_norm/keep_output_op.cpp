// Checks, allocation and dispatch of batch norm that keeps its output instead of its input, on the CPU. Tensors stop
// here.
#include <cmath>
#include <tuple>
#include <vector>

#include "batch_norm/passes.h"

namespace fused_ops {
namespace {

enum Row { kBias, kMean, kFactor, kShift, kLimit, kScale, kGradMean, kGradSlope, kRows };

// What the kernels read of each column of one group. Short rows of NHWC are taken several at a time.
class Columns {
 public:
  Columns(const View& part, DType dtype)
      : layout(part.layout),
        fused_(fused_rows(part.layout)),
        channels_(part.channels),
        repeat_(part.repeat),
        keep_(static_cast<size_t>(part.layout.channels * fused_)),
        values_(dtype, part.layout.channels * fused_, kRows) {
    layout.batch /= fused_, layout.channels *= fused_;
  }

  void set(int64_t which, int64_t channel, double value) {
    each(channel, [&](int64_t column) { values_.set(which, column, value); });
  }
  // Returns which of the channel's x are stored.
  Keep set_keep(int64_t channel, double weight, double bias, const KeptOptions& o, DType dtype) {
    const double flat = o.activation == Activation::leaky_relu ? std::min(1.0, o.slope) : 1.0;
    const double size = std::fabs(weight), reach = kMaxAmplification * size;
    Keep keep = Keep::none;
    double limit = 0;
    if (!(std::fabs(bias) + smallest_normal(dtype) / flat <= reach)) {  // NaN too
      keep = Keep::all;
    } else if (o.activation == Activation::elu) {
      keep = Keep::below, limit = -o.slope * reach / (1 + reach);
    }
    each(channel, [&](int64_t column) { keep_[static_cast<size_t>(column)] = keep; });
    set(kLimit, channel, limit);
    any_ |= keep != Keep::none;
    return keep;
  }
  bool any() const { return any_; }

  BatchNormFromOutput args(DType dtype, const KeptOptions& o) {
    BatchNormFromOutput a{};
    a.dtype = dtype, a.layout = layout, a.activation = o.activation, a.slope = o.slope;
    a.keep = keep_.data();
    a.bias = values_.row(kBias), a.mean = values_.row(kMean), a.factor = values_.row(kFactor);
    a.shift = values_.row(kShift), a.limit = values_.row(kLimit), a.scale = values_.row(kScale);
    a.grad_mean = values_.row(kGradMean), a.grad_slope = values_.row(kGradSlope);
    return a;
  }
  // What the kernels wrote for a channel, added in a fixed order.
  Partial merged(const Partial* partials, int64_t items, int64_t channel) const {
    Partial sum{};
    const auto add = [&](const Partial& p) { sum.a += p.a, sum.b += p.b, sum.n += p.n; };
    if (!layout.nhwc()) {
      for (int64_t item = channel; item < items; item += channels_) add(partials[item]);
    } else {
      for (int64_t item = 0; item < items; ++item)
        each(channel, [&](int64_t column) { add(partials[item * layout.channels + column]); });
    }
    return sum;
  }

  ChannelLayout layout;

 private:
  static int64_t fused_rows(const ChannelLayout& l) {
    int64_t rows = 1;
    while (l.nhwc() && !l.valid && l.batch % (2 * rows) == 0 && l.batch > 0 && 2 * rows * l.channels <= 256) rows *= 2;
    return rows;
  }
  template <class Body>
  void each(int64_t channel, const Body& body) const {
    for (int64_t row = 0; row < fused_; ++row)
      for (int64_t i = 0; i < repeat_; ++i) body((row * channels_ + channel) * repeat_ + i);
  }

  // Accumulators of the dtype's width.
  class Table {
   public:
    Table(DType dtype, int64_t columns, int64_t rows)
        : wide_(dtype == DType::float64), columns_(columns), memory_(static_cast<size_t>(rows * columns)) {}
    void set(int64_t which, int64_t column, double value) {
      if (wide_)
        static_cast<double*>(row(which))[column] = value;
      else
        static_cast<float*>(row(which))[column] = static_cast<float>(value);
    }
    void* row(int64_t which) { return memory_.data() + which * columns_; }

   private:
    bool wide_;
    int64_t columns_;
    std::vector<double> memory_;
  };

  int64_t fused_, channels_, repeat_;
  std::vector<Keep> keep_;
  Table values_;
  bool any_ = false;
};

std::tuple<Tensor, Tensor> keep(const KeepArguments& a) {
  check_input(a.output);
  const KeptOptions o = kept_options(a.activation, a.slope);
  check_parameters(a.output, {{"weight", &a.weight}, {"bias", &a.bias}});
  const bool last = is_channels_last(a.output);
  const Tensor output = last ? a.output : dense(a.output);
  const Tensor input = *matching("input", a.input, output);
  const MaybeTensor valid = valid_positions(a.valid, output);
  const View view = view_of(output, last, valid, a.groups);
  const DType dtype = float_dtype(kOp, "output", output);
  const Values w(a.weight, 1), b(a.bias, 0);
  std::vector<Columns> columns;
  int64_t items = 0;
  for (int64_t group = 0; group < view.groups; ++group) {
    columns.emplace_back(view.group(group), dtype);
    for (int64_t c = 0; c < view.channels; ++c) columns.back().set_keep(c, w[c], b[c], o, dtype);
    items += columns.back().args(dtype, o).items();
  }
  const int64_t size = items + 1;
  const Tensor offsets = empty(output, {&size, 1}, ScalarType::Long);
  int64_t* begin = static_cast<int64_t*>(offsets.mutable_data_ptr());
  std::fill_n(begin, size, 0);
  const auto each_group = [&](void (*kernel)(const BatchNormFromOutput&, int64_t, int64_t), void* stored) {
    int64_t done = 0;
    for (int64_t group = 0; group < view.groups; ++group) {
      Columns& part = columns[static_cast<size_t>(group)];
      const int64_t offset = view.group_offset(group) * element_size(dtype);
      BatchNormFromOutput args = part.args(dtype, o);
      args.output = at(output.const_data_ptr(), offset), args.input = at(input.const_data_ptr(), offset);
      args.offsets = begin + done, args.stored = stored;
      if (part.any())
        for_items(part.layout, args.items(), [&](int64_t first, int64_t end) { kernel(args, first, end); });
      done += args.items();
    }
  };
  each_group(FUSED_OPS_SELECT(batch_norm_count_stored), nullptr);
  for (int64_t item = 0; item < items; ++item) begin[item + 1] += begin[item];
  const Tensor stored = empty(output, {begin + items, 1}, output.scalar_type());
  if (begin[items]) each_group(FUSED_OPS_SELECT(batch_norm_copy_stored), stored.mutable_data_ptr());
  return {stored, offsets};
}

double rounded(double value, DType dtype) {
  return dtype == DType::float64 ? value : static_cast<double>(static_cast<float>(value));
}

// What rounding a mean to the accumulator loses.
double lost(double mean, DType dtype) {
  const double low = mean - rounded(mean, dtype);
  return low == low ? low : 0;  // inf - inf
}

// What the backward relies on when it reads `stored`; the kernels stop at an item's end by themselves.
void check_offsets(const Tensor& offsets, int64_t items, int64_t stored) {
  check_dtype(kOp, "offsets", offsets, ScalarType::Long, "int64");
  check_numel(kOp, "offsets", offsets, items + 1);
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  bool ordered = at[0] == 0 && at[items] == stored;
  for (int64_t i = 0; i < items; ++i) ordered &= at[i] <= at[i + 1];
  if (!ordered) raise(kOp, ": offsets must rise from 0 to the ", stored, " values of stored");
}

// What a group's two ways share. Channels none of whose x are stored take the ordinary backward's: with leaky_relu^-1
// of the output for x, and the bias for its mean.
struct Group {
  const BatchNormFromOutput& args;
  const BatchNormBackward ordinary;
  const View &part, &plain;  // as each of the two sees it
  const Columns& table;
  const BackwardArguments& o;

  bool reduces() const { return o.need_params || (o.training && o.need_input); }
  bool by_channel() const { return !args.layout.nhwc() && part.channels >= kMinItems; }
  bool shares_channels() const { return by_channel() && !ordinary.layout.nhwc(); }
};

BatchNormBackward ordinary(const BatchNormFromOutput& args, const View& part, Coefficients& coefficients,
                           const double* biases) {
  BatchNormBackward a{};
  a.dtype = args.dtype, a.layout = part.layout, a.activation = args.activation, a.slope = args.slope;
  a.frozen = args.frozen, a.from_output = args.activation == Activation::leaky_relu;
  a.stream = streams(part.layout, args.dtype, true);
  a.input = args.output, a.grad_output = args.grad_output, a.grad_input = args.grad_input;
  a.mean = coefficients.row(0), a.scale = coefficients.row(1), a.shift = coefficients.row(2);
  a.grad_mean = coefficients.row(3), a.grad_slope = coefficients.row(4);
  a.exact_mean = biases, a.repeat = part.repeat;
  a.partials = args.partials;
  return a;
}

// Both passes over channel c, with finish(channel, sums) between them.
template <class Finish>
void run_channel(const Group& g, int64_t c, const Finish& finish) {
  const int64_t channels = g.part.channels, items = g.args.items();
  if (g.args.keep[c] == Keep::none && g.shares_channels()) {
    if (g.reduces()) FUSED_OPS_SELECT(batch_norm_grad_sums)(g.ordinary, c, c + 1);
    finish(c, g.reduces() ? g.ordinary.partials[c] : Partial{});
    if (g.o.need_input) FUSED_OPS_SELECT(batch_norm_grad_input)(g.ordinary, c, c + 1);
    return;
  }
  const auto sums = FUSED_OPS_SELECT(batch_norm_output_sums), grads = FUSED_OPS_SELECT(batch_norm_output_grads);
  for (int64_t item = c; g.reduces() && item < items; item += channels) sums(g.args, item, item + 1);
  finish(c, g.table.merged(g.args.partials, g.reduces() ? items : 0, c));
  for (int64_t item = items - channels + c; g.o.need_input && item >= 0; item -= channels)
    grads(g.args, item, item + 1);
}

// Sums, coefficients, and the gradient of the input, channel by channel where NCHW has many.
template <class Finish>
void run_group(const Group& g, const Finish& finish) {
  const BatchNormFromOutput& args = g.args;
  const bool writes = g.o.need_input;
  if (!g.table.any())
    return two_passes(g.plain, g.reduces() ? FUSED_OPS_SELECT(batch_norm_grad_sums) : nullptr,
                      writes ? FUSED_OPS_SELECT(batch_norm_grad_input) : nullptr, g.ordinary, merge_sums, finish);
  const int64_t channels = g.part.channels, items = args.items();
  if (g.by_channel())
    return for_items(args.layout, channels, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) run_channel(g, c, finish);
    });
  const auto sums = FUSED_OPS_SELECT(batch_norm_output_sums), grads = FUSED_OPS_SELECT(batch_norm_output_grads);
  if (g.reduces()) for_items(args.layout, items, [&](int64_t begin, int64_t end) { sums(args, begin, end); });
  for (int64_t c = 0; c < channels; ++c) finish(c, g.table.merged(args.partials, g.reduces() ? items : 0, c));
  if (writes) for_items(args.layout, items, [&](int64_t begin, int64_t end) { grads(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> keep_backward(const KeepBackwardArguments& a) {
  check_input(a.input);
  check_parameters(a.input, {{"weight", &a.weight}, {"bias", &a.bias}});
  const KeptOptions options = kept_options(a.code, a.slope);
  const bool last = is_channels_last(a.input);
  const Tensor output = last ? a.input : dense(a.input);
  const Tensor grad_output = *matching("grad_output", a.grad_output, output);
  const MaybeTensor valid = valid_positions(a.valid, output);
  const View view = view_of(output, last, valid, a.groups),
             plain = view_of(output, last, valid, a.groups, kSmallSpatial);
  const int64_t channels = view.channels;
  const DType dtype = float_dtype(kOp, "output", output);
  check_statistics(a.statistics, view.groups * channels);
  check_same_dtype(kOp, "stored", *a.stored, "output", output);
  const Tensor statistics = dense(a.statistics), stored = dense(*a.stored), offsets = dense(*a.offsets);
  const Values w(a.weight, 1), b(a.bias, 0);
  std::vector<Columns> columns;
  int64_t items = 0, most = plain.layout.partials();
  for (int64_t group = 0; group < view.groups; ++group) {
    columns.emplace_back(view.group(group), dtype);
    const BatchNormFromOutput args = columns.back().args(dtype, options);
    items += args.items();
    most = std::max(most, args.items() * (args.layout.nhwc() ? args.layout.channels : 1));
  }
  check_offsets(offsets, items, stored.numel());

  const Gradients out = empty_gradients(a, output);
  std::vector<double> params(static_cast<size_t>(2 * channels));
  std::vector<double> inverse(static_cast<size_t>(channels)), biases(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) biases[static_cast<size_t>(c)] = b[c];
  Coefficients coefficients(dtype, plain.layout.channels, 5);
  std::vector<Partial> partials(static_cast<size_t>(most));
  int64_t done = 0;
  for (int64_t group = 0; group < view.groups; ++group) {
    const View part = view.group(group), plain_part = plain.group(group);
    Columns& table = columns[static_cast<size_t>(group)];
    const double* m = doubles(statistics) + group * channels;
    const double* inv = doubles(statistics) + (view.groups + group) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      // As the forward multiplied: with the scale rounded to the accumulator.
      const double scale = rounded(w[c] * inv[c], dtype);
      const bool all = table.set_keep(c, w[c], b[c], options, dtype) == Keep::all;
      const double factor = all ? 1 : scale;
      inverse[static_cast<size_t>(c)] = inv[c] / factor;
      table.set(kBias, c, b[c]), table.set(kMean, c, m[c]), table.set(kFactor, c, factor);
      table.set(kShift, c, -factor * lost(m[c], dtype)), table.set(kScale, c, w[c] * inv[c]);
      coefficients.set_affine(plain_part, c, b[c], w[c] * inv[c], 0);
    }
    BatchNormFromOutput args = table.args(dtype, options);
    const int64_t offset = view.group_offset(group) * element_size(dtype);
    args.frozen = !a.training;
    args.output = at(output.const_data_ptr(), offset), args.grad_output = at(grad_output.const_data_ptr(), offset);
    args.offsets = static_cast<int64_t*>(offsets.mutable_data_ptr()) + done, args.stored = stored.mutable_data_ptr();
    args.grad_input = a.need_input ? at(out.input.mutable_data_ptr(), offset) : nullptr;
    args.partials = partials.data();
    const Group all{args, ordinary(args, plain_part, coefficients, biases.data()), part, plain_part, table, a};
    run_group(all, [&](int64_t c, const Partial& p) {
      const double n = static_cast<double>(p.n), slope = inverse[static_cast<size_t>(c)], dot = p.b * slope;
      if (p.n) params[static_cast<size_t>(2 * c)] += dot, params[static_cast<size_t>(2 * c + 1)] += p.a;
      const double grad_mean = p.a / n, grad_slope = dot * slope / (n - static_cast<double>(a.correction));
      table.set(kGradMean, c, grad_mean), table.set(kGradSlope, c, grad_slope);
      coefficients.set(plain_part, 3, c, grad_mean - coefficients.lost_of(b[c]) * grad_slope);
      coefficients.set(plain_part, 4, c, grad_slope);
    });
    done += args.items();
  }
  if (a.need_params) {
    set_every_second(out.weight, params.data(), channels);
    set_every_second(out.bias, params.data() + 1, channels);
  }
  return out.as_tuple();
}

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  using namespace fused_ops;
  implement_struct<&fused_ops::keep>(m, "batch_norm_keep");
  implement_struct<&fused_ops::keep_backward>(m, "batch_norm_keep_backward");
}

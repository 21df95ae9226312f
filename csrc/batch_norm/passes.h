// A call's values as the kernels see them, how its two passes over them are ordered, so that the second finds in the
// cache what the first has read, and the merging of what the first has summed. No bit depends on the number of threads.
#pragma once
#include <cmath>
#include <memory>
#include <tuple>
#include <type_traits>

#include "batch_norm/arguments.h"

namespace fused_ops {

// A task has at least this many values: below it a second thread costs more than it saves.
constexpr int64_t kGrainValues = 16384;
// NCHW of at most this many values a slice is taken for NHWC, as whole lines then hold values of several channels.
constexpr int64_t kSmallSpatial = 64;
// Where there may be a mask it is of at most this many: the mask's layout is a part of the ops' contract.
constexpr int64_t kSmallMaskedSpatial = 32;

// n values on the stack if they are at most kInline, else on the heap; uninitialised.
template <class T, int64_t kInline>
class Scratch {
 public:
  explicit Scratch(int64_t n) : heap_(n > kInline ? new T[static_cast<size_t>(n)] : nullptr) {}
  T* data() { return heap_ ? heap_.get() : inline_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  std::unique_ptr<T[]> heap_;
  T inline_[kInline];
};

// The values of an optional parameter as doubles.
class Values {
 public:
  Values(const MaybeTensor& t, double missing) : missing_(missing) {
    if (!t) return;
    owner_ = dense(*t);
    data_ = owner_->const_data_ptr();
    type_ = owner_->scalar_type();
  }
  double operator[](int64_t i) const {
    if (!data_) return missing_;
    switch (type_) {
      case ScalarType::Float: return static_cast<const float*>(data_)[i];
      case ScalarType::Double: return static_cast<const double*>(data_)[i];
      case ScalarType::BFloat16: return static_cast<float>(static_cast<const c10::BFloat16*>(data_)[i]);
      default: return static_cast<float>(static_cast<const c10::Half*>(data_)[i]);
    }
  }

 private:
  MaybeTensor owner_;
  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  double missing_;
};

// Every second of the 2 n values at `from` into the n elements of t, rounded once.
inline void set_every_second(const Tensor& t, const double* from, int64_t n) {
  const auto write = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(T) == 2)
        to[i] = static_cast<float>(from[2 * i]);
      else
        to[i] = static_cast<T>(from[2 * i]);
    }
  };
  void* p = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float: return write(static_cast<float*>(p));
    case ScalarType::Double: return write(static_cast<double*>(p));
    case ScalarType::BFloat16: return write(static_cast<c10::BFloat16*>(p));
    default: return write(static_cast<c10::Half*>(p));
  }
}

inline double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// A tensor as the kernels see it, cut along the batch into ghost batches.
struct View {
  ChannelLayout layout;
  int64_t channels;        // of the tensor; layout.channels == channels * repeat
  int64_t repeat;          // columns that belong to one channel: the values of a small slice, else 1
  int64_t rows_per_batch;  // rows of `layout` that one batch entry has: spatial of channels_last, else 1
  int64_t groups, group_batch;

  int64_t group_rows(int64_t group) const {
    const int64_t size = group_batch * rows_per_batch;
    return std::min(size, layout.batch - group * size);
  }
  int64_t rows_before(int64_t group) const { return group * group_batch * rows_per_batch; }
  int64_t group_offset(int64_t group) const { return rows_before(group) * layout.channels * layout.spatial; }
  View group(int64_t group) const {
    View v = *this;
    v.layout.batch = group_rows(group);
    if (v.layout.valid) v.layout.valid += rows_before(group) * layout.spatial;
    return v;
  }
  bool is_small() const { return groups == 1 && repeat == 1 && fused_ops::is_small(layout); }
  // The sign mask: a row of bits for each row of NHWC, or slice of NCHW.
  int64_t mask_rows() const { return layout.nhwc() ? layout.batch : layout.batch * layout.channels; }
  int64_t mask_rows_before(int64_t group) const { return rows_before(group) * (layout.nhwc() ? 1 : layout.channels); }
  int64_t mask_row_bytes() const { return ((layout.nhwc() ? layout.channels : layout.spatial) + 7) / 8; }
};

inline View view_of(const Tensor& t, bool channels_last, const MaybeTensor& valid, int64_t groups,
                    int64_t small_spatial = kSmallMaskedSpatial) {
  const int64_t batch = t.size(0), channels = t.size(1);
  int64_t spatial = 1;
  for (int64_t d = 2; d < t.dim(); ++d) spatial *= t.size(d);
  View v{};
  v.channels = channels, v.repeat = 1, v.rows_per_batch = 1;
  const GhostBatches ghosts(batch, groups);
  v.group_batch = ghosts.size, v.groups = ghosts.count;
  v.layout = {batch, channels, spatial, nullptr};
  if (channels_last) {
    v.layout = {batch * spatial, channels, 1, nullptr}, v.rows_per_batch = spatial;
  } else if (spatial > 0 && spatial <= small_spatial && !valid) {
    v.layout = {batch, channels * spatial, 1, nullptr}, v.repeat = spatial;
  }
  if (valid) v.layout.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
  return v;
}

// The backward's results; of no values where not wanted.
struct Gradients {
  Tensor input, weight, bias;
  std::tuple<Tensor, Tensor, Tensor> as_tuple() const { return {input, weight, bias}; }
};

inline Gradients empty_gradients(const BackwardArguments& a, const Tensor& input) {
  const int64_t channels = input.size(1), none = 0, *count = a.need_params ? &channels : &none;
  const ScalarType type = a.weight ? a.weight->scalar_type() : a.bias ? a.bias->scalar_type() : input.scalar_type();
  return {a.need_input ? empty_huge(kOp, input, gradient_is_channels_last(input))
                       : empty(input, {&none, 1}, input.scalar_type()),
          empty(input, {count, 1}, type), empty(input, {count, 1}, type)};
}

// `rows` arrays of one accumulator a column: what the kernels multiply with and subtract.
class Coefficients {
 public:
  Coefficients(DType dtype, int64_t columns, int64_t rows)
      : wide_(dtype == DType::float64), columns_(columns), memory_(wide_ ? rows * columns : (rows * columns + 1) / 2) {}

  void* row(int64_t i) {
    return wide_ ? static_cast<void*>(memory_.data() + i * columns_)
                 : static_cast<void*>(reinterpret_cast<float*>(memory_.data()) + i * columns_);
  }
  void set(const View& view, int64_t which, int64_t channel, double value) {
    for (int64_t i = channel * view.repeat; i < (channel + 1) * view.repeat; ++i) {
      if (wide_)
        static_cast<double*>(row(which))[i] = value;
      else
        static_cast<float*>(row(which))[i] = static_cast<float>(value);
    }
  }
  // What rounding the mean to the accumulator loses.
  double lost_of(double mean) const {
    if (wide_) return 0;
    const double low = mean - static_cast<double>(static_cast<float>(mean));
    return low == low ? low : 0;  // inf - inf
  }
  // mean, scale and shift: y = (x - mean) * scale + shift.
  void set_affine(const View& view, int64_t channel, double mean, double scale, double bias) {
    set(view, 0, channel, mean);
    set(view, 1, channel, scale);
    set(view, 2, channel, bias - lost_of(mean) * scale);
  }

 private:
  bool wide_;
  int64_t columns_;
  Scratch<double, 512> memory_;
};

// Calls kernel(begin, end) over `items` equal shares of the layout, in parallel where there is enough to do.
template <class Kernel>
void for_items(const ChannelLayout& l, int64_t items, const Kernel& kernel) {
  const int64_t numel = l.numel();
  if (items == 0) return;
  if (numel <= kGrainValues) return kernel(0, items);
  const int64_t grain = std::max<int64_t>(1, kGrainValues * items / numel);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(begin, end); });
}

// The partials of this many channels are merged together, as they are neighbours in memory.
constexpr int64_t kMergedTogether = 256;

// Calls add(channel - begin, a, b, n) for the partials of channels [begin, end) in a fixed order: parts, or the blocks
// of rows of the channels' columns.
template <class Add>
void for_partials(const View& view, Partial* partials, int64_t begin, int64_t end, const Add& add) {
  const ChannelLayout& l = view.layout;
  if (!l.nhwc()) {
    const Partial* p = partials + begin * l.parts();
    for (int64_t c = 0; c < end - begin; ++c)
      for (int64_t i = 0; i < l.parts(); ++i, ++p) add(c, p->a, p->b, p->n);
    return;
  }
  const int64_t first = begin * view.repeat, tile = first / l.tile_columns() * l.tile_columns();
  for (int64_t block = 0; block < l.row_blocks(); ++block) {
    const ColumnPartials p(partials, block, l.channels);
    const double *a = p.a + first, *b = p.b + first;
    const int64_t n = p.n[tile];
    if (view.repeat == 1)
      for (int64_t c = 0; c < end - begin; ++c) add(c, a[c], b[c], n);
    else
      for (int64_t c = 0; c < end - begin; ++c)
        for (int64_t i = 0; i < view.repeat; ++i) add(c, *a++, *b++, n);
  }
}

// Mean and M2 of at most kMergedTogether channels. The mean of all parts first, then their M2 around it: this needs no
// division for each part, as merging one after the other does. Inf and NaN are merged so.
inline void merge_moments(const View& view, Partial* partials, int64_t begin, int64_t end, Partial* out) {
  const ChannelLayout& l = view.layout;
  const bool single = (l.nhwc() ? l.row_blocks() * view.repeat : l.parts()) == 1;
  double mean[kMergedTogether], m2[kMergedTogether], count[kMergedTogether];
  for (int64_t i = 0; i < end - begin; ++i) mean[i] = 0, m2[i] = 0, count[i] = 0;
  for_partials(view, partials, begin, end, [&](int64_t i, double a, double, int64_t n) {
    mean[i] += single ? a : static_cast<double>(n) * a, count[i] += static_cast<double>(n);
  });
  for (int64_t i = 0; !single && i < end - begin; ++i) mean[i] = count[i] != 0 ? mean[i] / count[i] : 0;
  for_partials(view, partials, begin, end, [&](int64_t i, double a, double b, int64_t n) {
    const double delta = a - mean[i];
    m2[i] += b + static_cast<double>(n) * (delta * delta);
  });
  for (int64_t i = 0; i < end - begin; ++i) {
    out[i] = {mean[i], m2[i], static_cast<int64_t>(count[i])};
    if (std::isfinite(mean[i]) && std::isfinite(m2[i])) continue;
    DEFAULT::Moments total;
    const int64_t channel = begin + i;
    for_partials(view, partials, channel, channel + 1,
                 [&](int64_t, double a, double b, int64_t n) { total.merge(a, b, n); });
    out[i] = {total.mean, total.m2, total.n};
  }
}

inline void merge_sums(const View& view, Partial* partials, int64_t begin, int64_t end, Partial* out) {
  double sum[kMergedTogether], dot[kMergedTogether];
  int64_t count[kMergedTogether];
  for (int64_t i = 0; i < end - begin; ++i) sum[i] = 0, dot[i] = 0, count[i] = 0;
  for_partials(view, partials, begin, end,
               [&](int64_t i, double a, double b, int64_t n) { sum[i] += a, dot[i] += b, count[i] += n; });
  for (int64_t i = 0; i < end - begin; ++i) out[i] = {sum[i], dot[i], count[i]};
}

// Whether outputs are written by non-temporal stores: large ones, but not in pieces of a few lines, mostly parts of
// lines.
inline bool streams(const ChannelLayout& l, DType dtype, bool read_twice) {
  const int64_t bytes = element_size(dtype);
  return !l.valid && l.numel() * bytes >= (read_twice ? kStreamBytes : kStreamOnceBytes) &&
         (l.nhwc() || l.spatial * bytes >= kStreamRunBytes);
}

// Runs reduce -> merge -> finish(channel, merged) -> write: channel by channel, or tile by tile, where that keeps what
// is read twice in the cache; else one after the other over the whole input.
template <class Args, class Merge, class Finish>
void two_passes(const View& view, void (*reduce)(const Args&, int64_t, int64_t),
                void (*write)(const Args&, int64_t, int64_t), const Args& args, const Merge& merge,
                const Finish& finish) {
  const ChannelLayout& l = view.layout;
  const auto finish_channels = [&](int64_t begin, int64_t end) {
    Partial merged[kMergedTogether];
    for (int64_t first = begin; first < end; first += kMergedTogether) {
      const int64_t last = std::min(end, first + kMergedTogether);
      if (reduce) merge(view, args.partials, first, last, merged);
      for (int64_t c = first; c < last; ++c) finish(c, merged[c - first]);
    }
  };
  if (args.by_slice) {
    finish_channels(0, view.channels);
    if (write) for_items(l, l.slices(), [&](int64_t begin, int64_t end) { write(args, begin, end); });
    return;
  }
  // Units that are finished on their own: channels of NCHW, tiles of NHWC.
  const int64_t units = l.nhwc() ? (view.repeat == 1 ? l.tiles() : 1) : (l.parts() == 1 ? l.channels : 1);
  const int64_t items = units == 0 ? 0 : l.items() / units;
  const auto finish_unit = [&](int64_t unit) {
    const int64_t width = units == 1 ? view.channels : l.nhwc() ? l.tile_columns() : 1;
    finish_channels(unit * width, std::min(view.channels, (unit + 1) * width));
  };
  if (units > 1 && (!l.nhwc() || units >= static_cast<int64_t>(torch::stable::get_num_threads()))) {
    for_items(l, units, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        if (reduce) reduce(args, unit * items, (unit + 1) * items);
        finish_unit(unit);
        if (write) write(args, unit * items, (unit + 1) * items);
      }
    });
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    const auto in_parallel = [&](auto kernel) {
      if (kernel)
        for_items(l, items,
                  [&](int64_t begin, int64_t end) { kernel(args, unit * items + begin, unit * items + end); });
    };
    in_parallel(reduce);
    finish_unit(unit);
    in_parallel(write);
  }
}

}  // namespace fused_ops

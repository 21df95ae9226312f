// Batch normalisation on the CPU, backward, in one step from x and the saved statistics: first the sums of h and of
// h * (x - mean) over each channel, then the gradients.
//
//   z = (x - mean) * scale + shift + residual        h = g * activation'(z), the gradient of residual
//   grad_x = scale * (h - mean(h) - (x - mean) * grad_slope)
//   grad_slope = invstd^2 * sum(h * (x - mean)) / (n - correction)
//
// Memory: reads x and g twice and writes grad_x once, 20 bytes a value in float32; a channel of NCHW that fits the
// cache is read from memory once (12 bytes). z is rebuilt, except that relu and leaky_relu after a residual read the
// forward's bit of its sign. Large gradients are written by non-temporal stores: an ordinary store of a line that is
// not in the cache reads it first.
//
// Stability: float32 and float64 are summed in double; 16-bit values in float from a center near the mean, for at most
// kFoldAt values (kRowsPerFold rows), then in double. h - mean(h) and x - mean are formed before any scaling. See
// docs/batch_norm.md.
#include "batch_norm/cpu/activation.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// ---- the sums

// Sums of g and of g * (x - mean) over lines of one channel: in double, as PyTorch's are, so that what is left of them
// after cancellation is no worse. Of 16-bit values in float for at most kFoldAt values and a run, from a center near
// the mean; but where kOnePath says that speed is not asked for, in double as well.
template <class T>
class ProductSums {
  using L = Line<T>;
  using A = acc_t<T>;
  using V = typename L::V;
  static constexpr bool kNarrow = sizeof(T) == 2 && !kOnePath<T>;
  using S = std::conditional_t<kNarrow, float_vec, double_vec>;

 public:
  explicit ProductSums(double mean) : mean_(mean), center_(kNarrow ? static_cast<double>(center_of<T>(mean)) : mean) {}

  struct Registers {
    S sum[4] = {}, dot[4] = {};
    S center{};

    inline FUSED_OPS_INLINE void step(const L& g, const L& x) {
      for (int k = 0; k < L::kVectors; ++k) {
        if constexpr (sizeof(A) == 4 && !kNarrow) {
          const DoublePair a = widen(g.v[k]), b = widen(x.v[k]);
          const int at = k % 2 * 2;
          sum[at] += a.low, dot[at] += a.low * (b.low - center);
          sum[at + 1] += a.high, dot[at + 1] += a.high * (b.high - center);
        } else {
          sum[k % 4] += g.v[k], dot[k % 4] += g.v[k] * (x.v[k] - center);
        }
      }
    }
  };
  Registers registers() const {
    Registers t = registers_;
    t.center = S{} + static_cast<std::conditional_t<kNarrow, float, double>>(center_);
    return t;
  }
  // Takes back what registers() gave, after n more values.
  void set(const Registers& t, int64_t n) {
    registers_ = t;
    pending_ += n;
    if (kNarrow && pending_ >= kFoldAt) fold();
  }
  void take(double* sum, double* dot) {
    fold();
    *sum = sum_.sum(), *dot = dot_.sum();
    if (kNarrow) *dot -= (mean_ - center_) * *sum;
  }

 private:
  void fold() {
    sum_.take(registers_.sum), dot_.take(registers_.dot);
    pending_ = 0;
  }

  double mean_, center_;
  Registers registers_;
  WideSums sum_, dot_;
  int64_t pending_ = 0;
};

template <class T, Before kBefore>
Partial nchw_sums(const BatchNormBackward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const int64_t channel = item / l.parts();
  const auto of = [&](const void* from) { return Spread<T>(static_cast<const A*>(from)[channel]); };
  const BackwardCoefficients<Spread<T>> c{of(a.mean), of(a.scale), of(a.shift), Spread<T>(0), Spread<T>(0)};
  alignas(kLineBytes) A h[kBefore == Before::buffered ? kPadded : 1];
  ProductSums<T> sums(a.exact_mean[channel]);
  int64_t count = 0;
  for_each_run(l, item, true, [&](const SliceRun& at) {
    const bool masked = kBefore == Before::buffered ? a.mask != nullptr : reads_bits(kBefore);
    const uint8_t* mask = masked ? a.mask + at.mask_byte(l, channel) : nullptr;
    const GradRun<T> run(a, at.offset, mask, h, at.ahead, at.soon);
    if constexpr (kBefore == Before::buffered) buffer_before<T>(a, run, at.offset, at.n, c, h);
    auto registers = sums.registers();
    for_each_line<T, kBefore>(run, 0, at.n, c,
                              [&](const Line<T>& v, const Line<T>& h, int64_t, int64_t)
                                  FUSED_OPS_INLINE { registers.step(h, v); });
    sums.set(registers, at.n);
    count += at.n;
  });
  Partial result{0, 0, count};
  sums.take(&result.a, &result.b);
  return result;
}

// Sums of h and of h * (x - center) of a tile's columns.
template <class T>
struct ColumnProducts {
  using L = Line<T>;
  using Sums = TileSums<T>;
  template <int kRows>
  using Next = typename TilePrefetch<T>::template Lines<kRows>;
  alignas(kLineBytes) typename Sums::S center[kPadded];
  Sums sums;
  TilePrefetch<T> ahead;

  ColumnProducts(const ChannelLayout& l, const Tile& t) : ahead(l, t) { sums.clear(t); }

  // Adds the line of columns `at` on of each of the rows, or its first `count` values.
  template <int kRows, Before kBefore, bool kWhole>
  inline FUSED_OPS_INLINE void add_line(const GradRun<T>* runs, int64_t at, int64_t count,
                                        const BackwardCoefficients<Ordered<T>>& c, const Next<kRows>& next_x,
                                        const Next<kRows>& next_g) {
    using V = typename Sums::V;
    typename Sums::OfLine s = sums.load(at);
    const auto add = [&](int k, const V& h, const V& x) FUSED_OPS_INLINE {
      s.a[k] += h, s.b[k] += h * (x - load_bits<V>(center + at + k * Sums::kLane));
    };
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kWhole) {
        next_x.prefetch_line(r, at), next_g.prefetch_line(r, at);
      }
      const LinePair<T> line =
          kWhole ? whole_line<T, kBefore>(runs[r], at, c) : part_of_line<T, kBefore>(runs[r], at, count, c);
      for (int k = 0; k < L::kVectors; ++k) {
        if constexpr (Sums::kWiden) {
          constexpr bool kPlain = kWhole && kBefore == Before::plain;
          const DoublePair h = kPlain ? widen_at(runs[r].g + at + k * L::kLane) : widen(line.h.v[k]);
          const DoublePair x =
              kWhole && kBefore != Before::buffered ? widen_at(runs[r].x + at + k * L::kLane) : widen(line.x.v[k]);
          add(2 * k, h.low, x.low), add(2 * k + 1, h.high, x.high);
        } else {
          add(k, line.h.v[k], line.x.v[k]);
        }
      }
    }
    sums.store(at, s);
  }
  // Adds n values of each of the rows. What is behind them in the last line has h = 0.
  template <int kRows, Before kBefore>
  __attribute__((noinline)) void add_rows(const GradRun<T>* runs, int64_t n,
                                          const BackwardCoefficients<Ordered<T>>& c) {
    const Next<kRows> x = ahead.template lines<kRows>(runs[0].x), g = ahead.template lines<kRows>(runs[0].g);
    int64_t i = 0;
    for (; i + L::kSize <= n; i += L::kSize) add_line<kRows, kBefore, true>(runs, i, L::kSize, c, x, g);
    if (i < n) add_line<kRows, kBefore, false>(runs, i, n - i, c, x, g);
  }
};

template <class T, Before kBefore>
int64_t add_tile_rows(const BatchNormBackward& a, const Tile& t, int64_t begin, int64_t end,
                      const BackwardCoefficients<Ordered<T>>& c, ColumnProducts<T>& columns) {
  using A = acc_t<T>;
  constexpr int kMost = kBefore == Before::buffered ? 1 : kRowsTogether<T>;
  const ChannelLayout& l = a.layout;
  alignas(kLineBytes) A h[kBefore == Before::buffered ? kPadded : 1];
  const auto run_of = [&](int64_t r, int64_t n, int64_t) {
    const int64_t offset = r * l.channels + t.column;
    const uint8_t* mask = a.mask ? a.mask + r * ((l.channels + 7) / 8) + t.column / 8 : nullptr;
    const GradRun<T> run(a, offset, mask, h, 0, 0);
    if constexpr (kBefore == Before::buffered) buffer_before<T>(a, run, offset, n, c, h);
    return run;
  };
  return for_rows_together<T, GradRun<T>, kMost>(l, t, begin, end, run_of,
                                                 [&](auto k, const GradRun<T>* runs, int64_t n) {
                                                   columns.template add_rows<decltype(k)::value, kBefore>(runs, n, c);
                                                 });
}

template <class T>
void nhwc_sums(const BatchNormBackward& a, Before before, int64_t item) {
  using A = acc_t<T>;
  using S = typename TileSums<T>::S;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item, !a.mask || l.channels % 8 == 0);
  const auto values = [&](const void* from) {
    return TileValues<T>(t, static_cast<const A*>(from) + t.column, rebuilds(before));
  };
  const TileValues<T> mean = values(a.mean), scale = values(a.scale), shift = values(a.shift);
  const BackwardCoefficients<Ordered<T>> c{Ordered<T>(mean.values), Ordered<T>(scale.values), Ordered<T>(shift.values),
                                           Ordered<T>(nullptr), Ordered<T>(nullptr)};
  ColumnProducts<T> columns(l, t);
  S center[kTile];
  const auto exact_mean = [&](int64_t i) {
    return a.repeat == 1 ? a.exact_mean[t.column + i] : a.exact_mean[(t.column + i) / a.repeat];
  };
  for (int64_t i = 0; i < t.n; ++i)
    center[i] = sizeof(T) == 2 ? center_of<T>(exact_mean(i)) : static_cast<S>(exact_mean(i));
  t.repeat_ordered<T>(center, columns.center);
  int64_t counted = 0;
  double sum[kTile], dot[kTile];
  const int64_t fold = sizeof(T) == 2 ? kRowsPerFold * t.fused : t.rows();  // rows that are summed in float
  for (int64_t begin = t.row_begin; begin < t.row_end; begin += fold) {
    const int64_t end = std::min(begin + fold, t.row_end);
    with_before<T>(
        before, [&](auto kind) { counted += add_tile_rows<T, decltype(kind)::value>(a, t, begin, end, c, columns); });
    columns.sums.fold(t);
  }
  columns.sums.take(t, sum, dot);
  const ColumnPartials out(a.partials, t.block, l.channels);
  out.n[t.column] = counted;
  for (int64_t i = 0; i < t.n; ++i) {
    out.a[t.column + i] = sum[i];
    out.b[t.column + i] = dot[i] - (exact_mean(i) - static_cast<double>(center[i])) * sum[i];
  }
}

template <class T>
void grad_sums(const BatchNormBackward& a, int64_t begin, int64_t end) {
  const Before before = before_of<T>(a);
  for (int64_t item = begin; item < end; ++item) {
    if (a.layout.nhwc())
      nhwc_sums<T>(a, before, item);
    else
      with_before<T>(before, [&](auto kind) { a.partials[item] = nchw_sums<T, decltype(kind)::value>(a, item); });
  }
}

// ---- the gradients

template <class T>
inline FUSED_OPS_INLINE void store_line(const Line<T>& line, T* to, int64_t count, bool stream) {
  if (count < Line<T>::kSize) {
    line.store_part(to, count);
  } else if (stream) {
    line.template store<true>(to);
  } else {
    line.template store<false>(to);
  }
}

template <class T, Before kBefore, class Coefficient>
void grad_run(const BatchNormBackward& a, const GradRun<T>& values, int64_t offset, int64_t n,
              const BackwardCoefficients<Coefficient>& coefficients) {
  using L = Line<T>;
  const GradRun<T> run = values;  // no store can change a copy
  const BackwardCoefficients<Coefficient> c = coefficients;
  T* to = a.grad_input ? static_cast<T*>(a.grad_input) + offset : nullptr;
  T* residual = a.grad_residual ? static_cast<T*>(a.grad_residual) + offset : nullptr;
  const bool frozen = a.frozen;
  int64_t before = a.stream ? values_before_line(to ? to : residual, n) : 0;
  bool stream = a.stream && (!to || !residual || values_before_line(residual, n) == before);
  if (before && (!std::is_same_v<Coefficient, Spread<T>> || kBefore == Before::buffered || reads_bits(kBefore)))
    stream = false;
  if (!stream) before = 0;
  if (a.stream && (before || (n - before) % L::kSize)) {  // to write a part of a line is to read it
    if (to) prefetch(to + run.soon), prefetch(to + n - 1 + run.soon);
    if (residual) prefetch(residual + run.soon), prefetch(residual + n - 1 + run.soon);
  }
  const auto body = [&](const L& x, const L& h, int64_t i, int64_t count) FUSED_OPS_INLINE {
    if (residual) store_line(h, residual + i, count, stream);
    if (!to) return;
    L out;
    for (int k = 0; k < L::kVectors; ++k) {
      const int64_t at = i + k * L::kLane;
      if (frozen)
        out.v[k] = c.scale.at(at) * h.v[k];
      else
        out.v[k] = c.scale.at(at) * ((h.v[k] - c.grad_mean.at(at)) - (x.v[k] - c.mean.at(at)) * c.grad_slope.at(at));
    }
    store_line(out, to + i, count, stream);
  };
  if (before) {
    const LinePair<T> first = part_of_line<T, kBefore>(run, 0, before, c);
    body(first.x, first.h, 0, before);
  }
  for_each_line<T, kBefore>(run, before, n, c, body);
}

// A run whose h goes through a buffer. Where its outputs do not begin a line of memory, its first values are one by
// themselves, so that the others can be streamed.
template <class T, class Coefficient>
void grad_buffered(const BatchNormBackward& a, int64_t offset, int64_t n, const uint8_t* mask,
                   const BackwardCoefficients<Coefficient>& c, int64_t ahead, int64_t soon) {
  alignas(kLineBytes) acc_t<T> h[kPadded];
  const void* out = a.grad_input ? a.grad_input : a.grad_residual;
  int64_t first = a.stream ? values_before_line(static_cast<const T*>(out) + offset, n) : 0;
  if (!std::is_same_v<Coefficient, Spread<T>> || (mask && first % 8)) first = 0;
  for (int64_t i = 0, count = first ? first : n; i < n; i += count, count = n - i) {
    const GradRun<T> run(a, offset + i, mask ? mask + i / 8 : nullptr, h, ahead, soon);
    buffer_before<T>(a, run, offset + i, count, c, h);
    grad_run<T, Before::buffered>(a, run, offset + i, count, c);
  }
}

template <class T, class Coefficient>
inline void grad_at(const BatchNormBackward& a, Before before, int64_t offset, int64_t n, const uint8_t* mask,
                    const BackwardCoefficients<Coefficient>& c, int64_t ahead, int64_t soon) {
  if (before == Before::buffered) return grad_buffered<T>(a, offset, n, mask, c, ahead, soon);
  const GradRun<T> run(a, offset, mask, nullptr, ahead, soon);
  with_before<T>(before, [&](auto kind) { grad_run<T, decltype(kind)::value>(a, run, offset, n, c); });
}

template <class T>
void zero(const BatchNormBackward& a, int64_t offset, int64_t n) {
  if (a.grad_input) std::fill_n(static_cast<T*>(a.grad_input) + offset, n, T{});
  if (a.grad_residual) std::fill_n(static_cast<T*>(a.grad_residual) + offset, n, T{});
}

template <class T>
void grad_nhwc(const BatchNormBackward& a, Before before, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item, !a.mask || l.channels % 8 == 0);
  const int64_t column = t.column, row_bytes = (l.channels + 7) / 8;
  const auto values = [&](const void* from, bool wanted) {
    return TileValues<T>(t, static_cast<const A*>(from) + column, wanted);
  };
  const bool shifts = rebuilds(before), reduced = a.grad_input && !a.frozen;
  const TileValues<T> mean = values(a.mean, true), scale = values(a.scale, true), shift = values(a.shift, shifts),
                      grad_mean = values(a.grad_mean, reduced), grad_slope = values(a.grad_slope, reduced);
  const BackwardCoefficients<Ordered<T>> c{Ordered<T>(mean.values), Ordered<T>(scale.values), Ordered<T>(shift.values),
                                           Ordered<T>(grad_mean.values), Ordered<T>(grad_slope.values)};
  const int64_t ahead = t.ahead(l, kAhead<T>, kMostRows);
  t.for_each_step(t.row_begin, t.row_end, [&](int64_t r, int64_t, int64_t n) {
    const int64_t offset = r * l.channels + column;
    if (l.valid && !l.valid[r])
      zero<T>(a, offset, n);
    else
      grad_at<T>(a, before, offset, n, a.mask ? a.mask + r * row_bytes + column / 8 : nullptr, c, ahead, ahead);
  });
}

template <class T>
void grad_nchw(const BatchNormBackward& a, Before before, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const auto write = [&](const SliceRun& run, int64_t channel) {
    const auto of = [&](const void* from) { return Spread<T>(static_cast<const A*>(from)[channel]); };
    const BackwardCoefficients<Spread<T>> c{of(a.mean), of(a.scale), of(a.shift), of(a.grad_mean), of(a.grad_slope)};
    grad_at<T>(a, before, run.offset, run.n, a.mask ? a.mask + run.mask_byte(l, channel) : nullptr, c, run.ahead,
               run.soon);
    for (int64_t i = 0; l.valid && i < run.n; ++i)
      if (!l.valid[run.position(l) + i]) zero<T>(a, run.offset + i, 1);
  };
  if (a.by_slice) return for_each_slice_run(l, item, item + 1, kAhead<T>, write);
  const int64_t channel = item / l.parts(), bytes = (a.residual ? 3 : 2) * static_cast<int64_t>(sizeof(T));
  for_each_run_again(l, item, bytes, [&](const SliceRun& run) { write(run, channel); });
}

template <class T>
void grad_input(const BatchNormBackward& a, int64_t begin, int64_t end) {
  const Before before = before_of<T>(a);
  const bool columns = a.layout.nhwc();
  for (int64_t k = begin; k < end; ++k) {  // columns from the end, which the first pass has left in the cache
    const int64_t item = columns ? begin + (end - 1 - k) : k;
    if (columns)
      grad_nhwc<T>(a, before, item);
    else
      grad_nchw<T>(a, before, item);
  }
  if (a.stream) finish_streaming();
}

}  // namespace

void batch_norm_grad_sums(const BatchNormBackward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_sums, batch_norm_grad_sums)
}
void batch_norm_grad_input(const BatchNormBackward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_input, batch_norm_grad_input)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Batch normalisation on the CPU, backward: the first pass, sums of h = g * activation'(z) and of h * (x - mean) over
// each channel; reads x and g once.
//
// Stability: float32 and float64 are summed in double; 16-bit values in float from a center near the mean, for at most
// kFoldAt values (kRowsPerFold rows), then in double. See docs/batch_norm.md.
#include "batch_norm/cpu/gradient.h"
#include "batch_norm/cpu/moments.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

template <class T, Before kBefore>
Partial plane_sums(const BatchNormBackward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const int64_t channel = item / l.parts();
  const auto of = [&](const void* from) { return Spread<T>(static_cast<const A*>(from)[channel]); };
  const BackwardCoefficients<Spread<T>> c{of(a.mean), of(a.scale), of(a.shift), Spread<T>(0), Spread<T>(0)};
  alignas(kLineBytes) A h[kBefore == Before::buffered ? kPadded : 1];
  ProductSums<T> sums(a.exact_mean[channel]);
  int64_t count = 0;
  for_each_run(l, item, true, [&](const PlaneRun& at) {
    const bool masked = kBefore == Before::buffered ? a.mask != nullptr : reads_bits(kBefore);
    const uint8_t* mask = masked ? a.mask + at.mask_byte(l, channel) : nullptr;
    const GradRun<T> run(a, at.offset, mask, h, at.ahead, at.soon);
    if constexpr (kBefore == Before::buffered) buffer_before<T>(a, run, at.offset, at.n, c, h);
    auto lanes = sums.lanes();
    for_each_line<T, kBefore>(run, 0, at.n, c,
                              [&](const Line<T>& v, const Line<T>& h, int64_t, int64_t)
                                  FUSED_OPS_INLINE { lanes.step(h, v); });
    sums.set(lanes, at.n);
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
void tile_sums(const BatchNormBackward& a, Before before, int64_t item) {
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
    if (a.layout.columns())
      tile_sums<T>(a, before, item);
    else
      with_before<T>(before, [&](auto kind) { a.partials[item] = plane_sums<T, decltype(kind)::value>(a, item); });
  }
}

}  // namespace

void batch_norm_grad_sums(const BatchNormBackward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_sums, batch_norm_grad_sums)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

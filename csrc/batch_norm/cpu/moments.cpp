// Batch normalisation on the CPU, forward: mean and M2 of each channel, read once.
//
// Stability: deviations are taken from a pilot mean (of the channel so far), squared in the accumulator over at most
// kFoldAt values (kRowsPerFold steps of rows) and summed in double beyond, corrected and merged in double: the sum of
// their squares is at most a small multiple of M2, whatever the data, so no digits of M2 cancel. float32 values are
// summed in double, where their mean is as exact as PyTorch's, and so are the squares of those of columns: there a
// block's first row may serve as pilot, whose sum of squares is at most n M2. 16-bit deviations are exact.
// docs/batch_norm.md.
#include <cmath>

#include "batch_norm/cpu/loops.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// Sums of x - center and of its square over values of one channel. Squares are of the accumulator's type for at most
// kFoldAt values and a run, then double; so are the deviations of 16-bit values, which are exact. float32 values
// themselves are summed in double.
template <class T>
class DeviationSums {
  using L = Line<T>;
  using A = acc_t<T>;
  using V = typename L::V;
  static constexpr bool kExact = std::is_same_v<T, float>;
  static constexpr int kGroup =
      std::max(1, 4 / L::kVectors);  // lines that are added together: no sum waits for the last

 public:
  // What is prefetched lies `ahead` values behind x.
  void add(const T* x, int64_t n, A center, int64_t ahead) {
    Registers t = registers_;
    const V c = V{} + center;
    int64_t i = 0;
    for (; i + kGroup * L::kSize <= n; i += kGroup * L::kSize)
      for (int g = 0; g < kGroup; ++g) {
        prefetch(x + i + g * L::kSize + ahead);
        t.step(x + i + g * L::kSize, c, g * L::kVectors);
      }
    for (; i + L::kSize <= n; i += L::kSize) t.step(x + i, c, 0);
    if (i < n) {  // padded with the center, which every T has
      T fill;
      store(&fill, center);
      prefetch_part(x + i + ahead);
      t.step_part(L::load_part(x + i, n - i, fill), c);
      padded_ += L::kSize - (n - i);
    }
    registers_ = t;
    pending_ += n;
    if (pending_ >= kFoldAt) fold();
  }

  // Returns both sums over n values and starts again from zero.
  void take(double center, double n, double* sum, double* squares) {
    fold();
    *squares = squares_.sum();
    if constexpr (kExact)
      *sum = sum_of((registers_.exact[0] + registers_.exact[1]) + (registers_.exact[2] + registers_.exact[3])) -
             (n + static_cast<double>(padded_)) * center;
    else
      *sum = sum_.sum();
    *this = DeviationSums();
  }

 private:
  struct Registers {
    V square[4] = {}, sum[kExact ? 1 : 4] = {};
    double_vec exact[kExact ? 4 : 1] = {};

    inline FUSED_OPS_INLINE void step(const T* from, V center, int first) {
      const L x = L::load(from);
      for (int k = 0; k < L::kVectors; ++k) {
        const int at = (first + k) % 4;
        const V d = x.v[k] - center;
        square[at] += d * d;
        if constexpr (kExact) {
          const DoublePair wide = widen_at(from + k * L::kLane);
          exact[at % 2 * 2] += wide.low, exact[at % 2 * 2 + 1] += wide.high;
        } else {
          sum[at] += d;
        }
      }
    }
    inline FUSED_OPS_INLINE void step_part(const L& x, V center) {
      for (int k = 0; k < L::kVectors; ++k) {
        const V d = x.v[k] - center;
        square[k % 4] += d * d;
        if constexpr (kExact) {
          const DoublePair wide = widen(x.v[k]);
          exact[k % 2 * 2] += wide.low, exact[k % 2 * 2 + 1] += wide.high;
        } else {
          sum[k % 4] += d;
        }
      }
    }
  };
  void fold() {
    squares_.take(registers_.square);
    if constexpr (!kExact) sum_.take(registers_.sum);
    pending_ = 0;
  }

  Registers registers_;
  WideSums squares_, sum_;
  int64_t pending_ = 0, padded_ = 0;
};

// The mean of n values in one pass, rounded: what deviations are taken from, not the result.
template <class T>
inline double pilot_mean(const T* x, int64_t n) {
  DeviationSums<T> sums;
  double sum, squares;
  const acc_t<T> first = to_acc(x[0]);
  sums.add(x, n, first, 0);
  sums.take(static_cast<double>(first), static_cast<double>(n), &sum, &squares);
  return static_cast<double>(first) + sum / static_cast<double>(n);
}

template <class T>
constexpr int64_t kPilotRows = std::is_same_v<T, float> ? 1 : 8;

// Mean and M2 in double, value by value: where the fast sums met inf, NaN or an overflow. `visit(f)` calls f(x) for
// each value.
template <class Visit>
Partial slow_moments(const Visit& visit) {
  double sum = 0, m2 = 0;
  int64_t n = 0;
  visit([&](double v) { sum += v, ++n; });
  const double mean = sum / static_cast<double>(n);
  visit([&](double v) { m2 += (v - mean) * (v - mean); });
  return {mean, m2, n};
}

// Values of one channel: segments, each with a center of its own that stays at most 8 times as long as what it is the
// mean of.
template <class T>
Partial nchw_moments(const BatchNormForward& a, int64_t item) {
  const T* x = static_cast<const T*>(a.input);
  acc_t<T> center = 0;
  Moments total;
  DeviationSums<T> sums;
  int64_t pending = 0, merge_at = 0;
  const auto merge = [&] {
    if (pending == 0) return;
    double sum, squares;
    const double n = static_cast<double>(pending), c = static_cast<double>(center);
    sums.take(c, n, &sum, &squares);
    total.merge(c + sum / n, squares - sum * sum / n, pending);
    pending = 0;
  };
  for_each_run(a.layout, item, true, [&](const SliceRun& run) {
    if (pending == 0) {
      center = center_of<T>(total.n ? total.mean : pilot_mean(x + run.offset, run.n));
      merge_at = 8 * std::max(total.n, run.n);
    }
    sums.add(x + run.offset, run.n, center, run.ahead);
    pending += run.n;
    if (pending >= merge_at) merge();
  });
  merge();
  if (total.n && !(std::isfinite(total.mean) && std::isfinite(total.m2)))
    return slow_moments([&](auto f) {
      for_each_run(a.layout, item, true, [&](const SliceRun& run) {
        for (int64_t i = 0; i < run.n; ++i) f(static_cast<double>(to_acc(x[run.offset + i])));
      });
    });
  return {total.mean, total.m2, total.n};
}

// Calls body(row) for the rows of [begin, end) that count.
template <class Body>
void for_each_row(const ChannelLayout& l, int64_t begin, int64_t end, const Body& body) {
  for (int64_t r = begin; r < end; ++r)
    if (!l.valid || l.valid[r]) body(r);
}

// center[0, t.n): the mean of the item's first rows that count, rounded. Returns whether there are any.
template <class T>
bool pilot_center(const BatchNormForward& a, const Tile& t, acc_t<T>* center) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input) + t.column;
  A pilot[kTile], buffer[kTile];
  std::fill_n(pilot, t.n, A(0));
  int64_t count = 0;
  for (int64_t r = t.row_begin; r < t.row_end && count < kPilotRows<T>; ++r) {
    if (a.layout.valid && !a.layout.valid[r]) continue;
    const A* row = load_chunk(x + r * a.layout.channels, 1, t.n, buffer);
    for (int64_t i = 0; i < t.n; ++i) pilot[i] += row[i];
    ++count;
  }
  const double share = 1 / static_cast<double>(std::max<int64_t>(count, 1));
  for (int64_t i = 0; i < t.n; ++i) center[i] = center_of<T>(static_cast<double>(pilot[i]) * share);
  return count > 0;
}

// Sums of the deviations of a tile's columns from their centers, and of the squares.
template <class T>
struct ColumnSums {
  using A = acc_t<T>;
  using L = Line<T>;
  using Sums = TileSums<T>;
  template <int kRows>
  using Next = typename TilePrefetch<T>::template Lines<kRows>;
  alignas(kLineBytes) A center[kPadded];
  Sums sums;
  TilePrefetch<T> ahead;

  ColumnSums(const ChannelLayout& l, const Tile& t) : ahead(l, t) {}

  void start(const Tile& t, const A* from) { t.repeat_ordered<T>(from, center), sums.clear(t); }

  // Adds the line of columns `at` on of each of the rows, or its first `count` values.
  template <int kRows, bool kWhole>
  inline FUSED_OPS_INLINE void add_line(const T* const* rows, int64_t at, int64_t count, const Next<kRows>& next) {
    typename Sums::OfLine s = sums.load(at);
    const auto add = [&](int k, const typename Sums::V& d) FUSED_OPS_INLINE { s.a[k] += d, s.b[k] += d * d; };
    for (int r = 0; r < kRows; ++r) {
      PaddedLine<T> padded;
      const T* from = rows[r] + at;
      if constexpr (kWhole)
        next.prefetch_line(r, at);
      else
        padded = PaddedLine<T>(from, count), from = padded.values;
      if constexpr (Sums::kWiden) {
        for (int k = 0; k < L::kVectors; ++k) {
          const DoublePair x = widen_at(from + k * L::kLane), c = widen_at(center + at + k * L::kLane);
          add(2 * k, x.low - c.low), add(2 * k + 1, x.high - c.high);
        }
      } else {
        const L x = L::load(from), c = L::load_ordered(center + at);
        for (int k = 0; k < L::kVectors; ++k) add(k, x.v[k] - c.v[k]);
      }
    }
    sums.store(at, s);
  }

  // Adds n values of each of the rows; what is behind them in the last line is left as it was.
  template <int kRows>
  __attribute__((noinline)) void add(const T* const* rows, int64_t n) {
    const Next<kRows> next = ahead.template lines<kRows>(rows[0]);
    int64_t i = 0;
    for (; i + L::kSize <= n; i += L::kSize) add_line<kRows, true>(rows, i, L::kSize, next);
    if (i == n) return;
    typename Sums::S a[L::kSize], b[L::kSize];
    std::copy_n(sums.a + i, L::kSize, a), std::copy_n(sums.b + i, L::kSize, b);
    add_line<kRows, false>(rows, i, n - i, next);
    for (int64_t j = 0; j < L::kSize; ++j)
      if (L::element(j) >= n - i) sums.a[i + j] = a[j], sums.b[i + j] = b[j];
  }
};

// Adds rows [begin, end) to the sums; returns how many count.
template <class T>
int64_t add_tile_rows(const BatchNormForward& a, const Tile& t, int64_t begin, int64_t end, ColumnSums<T>& columns) {
  const ChannelLayout& l = a.layout;
  const T* x = static_cast<const T*>(a.input) + t.column;
  const int64_t counted = for_rows_together<T, const T*>(
      l, t, begin, end, [&](int64_t r, int64_t, int64_t) { return x + r * l.channels; },
      [&](auto k, const T* const* rows, int64_t n) { columns.template add<decltype(k)::value>(rows, n); });
  columns.sums.fold(t);
  return counted;
}

// Segments of rows, each with centers of its own: the pilot's, then the mean so far, for at most 8 times the rows it
// is the mean of. In float32, whose sums are in double, the pilot's serve all rows.
template <class T>
void nhwc_moments(const BatchNormForward& a, int64_t item) {
  const ChannelLayout& l = a.layout;
  const Tile t(l, item);
  const T* x = static_cast<const T*>(a.input) + t.column;
  acc_t<T> center[kTile];
  double mean[kTile], m2[kTile], sums[kTile], squares[kTile];
  std::fill_n(m2, t.n, 0.0);
  ColumnSums<T> columns(l, t);
  int64_t done = 0, begin = pilot_center<T>(a, t, center) ? t.row_begin : t.row_end;
  const int64_t fold = TileSums<T>::kWiden ? t.rows() : kRowsPerFold * t.fused;
  while (begin < t.row_end) {
    for (int64_t i = 0; done && i < t.n; ++i) center[i] = center_of<T>(mean[i]);
    columns.start(t, center);
    int64_t count = 0;
    for (const int64_t enough = done ? 8 * done : fold; begin < t.row_end && count < enough; begin += fold)
      count += add_tile_rows<T>(a, t, begin, std::min(begin + fold, t.row_end), columns);
    if (count == 0) break;
    columns.sums.take(t, sums, squares);
    const double n = static_cast<double>(count), total = static_cast<double>(done + count);
    const double share = n / total, cross = static_cast<double>(done) * n / total, inverse = 1 / n;
    const bool first = done == 0;
#pragma omp simd
    for (int64_t i = 0; i < t.n; ++i) {
      const double c = static_cast<double>(center[i]), m = c + sums[i] * inverse;
      const double fresh = squares[i] - sums[i] * sums[i] * inverse, delta = first ? 0 : m - mean[i];
      mean[i] = first ? m : mean[i] + delta * share;
      m2[i] += fresh + delta * delta * cross;
    }
    done += count;
  }
  const ColumnPartials out(a.partials, t.block, l.channels);
  out.n[t.column] = done;
  for (int64_t i = 0; i < t.n; ++i) {
    double *to_mean = out.a + t.column + i, *to_m2 = out.b + t.column + i;
    *to_mean = done ? mean[i] : 0, *to_m2 = done ? m2[i] : 0;
    if (!done || (std::isfinite(mean[i]) && std::isfinite(m2[i]))) continue;
    const Partial slow = slow_moments([&](auto f) {
      for_each_row(l, t.row_begin, t.row_end,
                   [&](int64_t r) { f(static_cast<double>(to_acc(x[r * l.channels + i]))); });
    });
    *to_mean = slow.a, *to_m2 = slow.b;
  }
}

template <class T>
void moments(const BatchNormForward& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (a.layout.nhwc())
      nhwc_moments<T>(a, item);
    else
      a.partials[item] = nchw_moments<T>(a, item);
  }
}

}  // namespace

void batch_norm_moments(const BatchNormForward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(moments, batch_norm_moments)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

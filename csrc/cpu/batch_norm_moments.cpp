// Batch normalisation on the CPU, forward: mean and M2 of each channel, read once.
//
// Stability: deviations are taken from a pilot mean (of the channel so far), squared in the accumulator over at most
// kFoldAt values and summed in double beyond, corrected and merged in double: the sum of their squares is at most a
// small multiple of M2, whatever the data, so no digits of M2 cancel. float32 values are summed in double, where their
// mean is as exact as PyTorch's; 16-bit deviations are exact. docs/batch_norm.md.
#include <cmath>

#include "batch_norm_walk.h"
#include "moments.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

constexpr int64_t kPilotRows = 8;

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
Partial plane_moments(const BatchNormForward& a, int64_t item) {
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
  for_each_run(a.layout, item, true, [&](const PlaneRun& run) {
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
      for_each_run(a.layout, item, true, [&](const PlaneRun& run) {
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

// center[0, t.n): the mean of the first rows that count, in [begin, end), rounded.
template <class T>
void pilot_center(const BatchNormForward& a, const Tile& t, int64_t begin, int64_t end, acc_t<T>* center) {
  const T* x = static_cast<const T*>(a.input) + t.column;
  acc_t<T> pilot[kTile];
  std::fill_n(pilot, t.n, acc_t<T>(0));
  int64_t count = 0;
  for_each_row(a.layout, begin, end, [&](int64_t r) {
    if (count >= kPilotRows) return;
    const T* row = x + r * a.layout.channels;
    for (int64_t i = 0; i < t.n; ++i) pilot[i] += to_acc(row[i]);
    ++count;
  });
  for (int64_t i = 0; count && i < t.n; ++i)
    center[i] = center_of<T>(static_cast<double>(pilot[i]) / static_cast<double>(count));
}

// The sums of a tile's columns, in the order of lines.
template <class T>
struct ColumnSums {
  using A = acc_t<T>;
  static constexpr bool kExact = std::is_same_v<T, float>;  // values in double instead of deviations
  using S = std::conditional_t<kExact, double, A>;
  alignas(kLineBytes) A center[kTile], square[kTile];
  alignas(kLineBytes) S sum[kTile];
  int64_t ahead;

  ColumnSums(const ChannelLayout& l, const Tile& t, const A* from) : ahead(t.ahead<T>(l)) {
    t.repeat_ordered<T>(from, center);
    std::fill_n(square, t.padded(), A(0)), std::fill_n(sum, t.padded(), S(0));
  }

  // Adds one line at columns `at` on of each of the rows.
  template <int kRows>
  inline void add_line(const T* const* rows, int64_t at, int64_t offset) {
    using L = Line<T>;
    L x[kRows];
    for (int r = 0; r < kRows; ++r) prefetch(rows[r] + offset + ahead);
    for (int r = 0; r < kRows; ++r) x[r] = L::load(rows[r] + offset);
    for (int k = 0; k < L::kVectors; ++k) {
      const int64_t i = at + k * L::kLane;
      const typename L::V c = load_bits<typename L::V>(center + i);
      typename L::V q = load_bits<typename L::V>(square + i), s{};
      if constexpr (kExact) {
        double_vec low = load_bits<double_vec>(sum + i), high = load_bits<double_vec>(sum + i + L::kLane / 2);
        for (int r = 0; r < kRows; ++r) {
          const DoublePair d = widen_at(rows[r] + offset + k * L::kLane);
          low += d.low, high += d.high;
        }
        store_vec(sum + i, low), store_vec(sum + i + L::kLane / 2, high);
      }
      for (int r = 0; r < kRows; ++r) {
        const typename L::V d = x[r].v[k] - c;
        s += d, q += d * d;
      }
      store_vec(square + i, q);
      if constexpr (!kExact) store_vec(sum + i, load_bits<typename L::V>(sum + i) + s);
    }
  }

  // Adds n values of each of the rows; what is behind them in the last line is left as it was.
  template <int kRows>
  void add(const T* const* rows, int64_t n) {
    using L = Line<T>;
    int64_t i = 0;
    for (; i + L::kSize <= n; i += L::kSize) add_line<kRows>(rows, i, i);
    if (i == n) return;
    PaddedLine<T> last[kRows];
    const T* at[kRows];
    for (int r = 0; r < kRows; ++r) last[r] = PaddedLine<T>(rows[r] + i, n - i), at[r] = last[r].values;
    A squares[L::kSize];
    S sums[L::kSize];
    std::copy_n(square + i, L::kSize, squares), std::copy_n(sum + i, L::kSize, sums);
    add_line<kRows>(at, i, 0);
    for (int64_t j = 0; j < L::kSize; ++j)
      if (L::element(j) >= n - i) square[i + j] = squares[j], sum[i + j] = sums[j];
  }

  // Of t.n columns, over the rows that were walked as one: the sums of `count` deviations, and of their squares.
  void take(const Tile& t, int64_t count, double* sums, double* squares) const {
    alignas(kLineBytes) A q[kTile], c[kTile];
    alignas(kLineBytes) S s[kTile];
    const int64_t padded = t.padded();
    from_line_order<T>(square, q, padded), from_line_order<T>(sum, s, padded), from_line_order<T>(center, c, padded);
    for (int64_t i = 0; i < t.n; ++i) sums[i] = static_cast<double>(s[i]), squares[i] = static_cast<double>(q[i]);
    for (int64_t i = t.n; i < t.width; i += t.n)
      for (int64_t j = 0; j < t.n; ++j)
        sums[j] += static_cast<double>(s[i + j]), squares[j] += static_cast<double>(q[i + j]);
    if constexpr (kExact)
      for (int64_t i = 0; i < t.n; ++i) sums[i] -= static_cast<double>(count) * static_cast<double>(c[i]);
  }
};

// Sums of the deviations from `center`, and of their squares, over rows [begin, end); returns how many count.
template <class T>
int64_t tile_deviations(const BatchNormForward& a, const Tile& t, int64_t begin, int64_t end, const acc_t<T>* center,
                        double* sums, double* squares) {
  const ChannelLayout& l = a.layout;
  const T* x = static_cast<const T*>(a.input) + t.column;
  ColumnSums<T> columns(l, t, center);
  const T* rows[kRowsTogether];
  int64_t waiting = 0, counted = 0;
  t.for_each_step(begin, end, [&](int64_t r, int64_t count, int64_t n) {
    if (l.valid && !l.valid[r]) return;
    counted += count;
    const T* row = x + r * l.channels;
    if (n < t.width) return columns.template add<1>(&row, n);  // the last step, of fewer rows
    rows[waiting] = row;
    if (++waiting == kRowsTogether) columns.template add<kRowsTogether>(rows, n), waiting = 0;
  });
  for (int64_t k = 0; k < waiting; ++k) columns.template add<1>(rows + k, t.width);
  columns.take(t, counted, sums, squares);
  return counted;
}

template <class T>
void tile_moments(const BatchNormForward& a, int64_t item) {
  const ChannelLayout& l = a.layout;
  const Tile t(l, item);
  const T* x = static_cast<const T*>(a.input) + t.column;
  acc_t<T> center[kTile];
  double mean[kTile], m2[kTile], sums[kTile], squares[kTile];
  std::fill_n(center, t.n, acc_t<T>(0)), std::fill_n(m2, t.n, 0.0);
  int64_t done = 0;
  const int64_t fold = kRowsPerFold * t.fused;
  for (int64_t begin = t.row_begin; begin < t.row_end; begin += fold) {
    const int64_t end = std::min(begin + fold, t.row_end);
    if (done == 0) {
      pilot_center<T>(a, t, begin, end, center);
    } else {
      for (int64_t i = 0; i < t.n; ++i) center[i] = center_of<T>(mean[i]);
    }
    const int64_t count = tile_deviations<T>(a, t, begin, end, center, sums, squares);
    if (count == 0) continue;
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
  Partial* out = a.partials + t.block * l.channels + t.column;
  for (int64_t i = 0; i < t.n; ++i) {
    out[i] = done ? Partial{mean[i], m2[i], done} : Partial{0, 0, 0};
    if (done && !(std::isfinite(mean[i]) && std::isfinite(m2[i])))
      out[i] = slow_moments([&](auto f) {
        for_each_row(l, t.row_begin, t.row_end,
                     [&](int64_t r) { f(static_cast<double>(to_acc(x[r * l.channels + i]))); });
      });
  }
}

template <class T>
void moments(const BatchNormForward& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (a.layout.columns())
      tile_moments<T>(a, item);
    else
      a.partials[item] = plane_moments<T>(a, item);
  }
}

}  // namespace

void batch_norm_moments(const BatchNormForward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(moments)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Batch normalisation on the CPU, forward.
//
//   y = activation((x - mean) * invstd * weight + bias + residual),  invstd = 1 / sqrt(M2 / (n - correction) + eps)
//
// Memory: training reads x twice and writes y once, evaluation reads x once; a residual is read once and a mask is one
// bit a value. Planes are done channel by channel (see csrc/batch_norm.cpp), so that a channel which fits the cache is
// read from memory once: 8 bytes a value in float32, 4 in 16 bits.
//
// Stability: deviations are taken from a pilot mean (of the channel so far), summed in the accumulator over at most
// kFoldAt values, corrected and merged in double: the sum of their squares is at most a small multiple of M2, whatever
// the data, so no digits of M2 cancel. x - mean is formed before the scaling, never alpha * x + beta.
// docs/batch_norm.md.
#include <cmath>

#include "activation.h"
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

// A center of deviations, representable in T: then deviations of 16-bit values are exact, and the rounding of their
// sums has no bias.
template <class T>
inline acc_t<T> center_of(double mean) {
  T rounded;
  store(&rounded, static_cast<acc_t<T>>(mean));
  return to_acc(rounded);
}

template <class T>
Partial plane_moments(const BatchNormForward& a, int64_t item) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input);
  alignas(64) A buffer[kPadded], center = 0;
  Moments total;
  Lanes<A> lanes;
  int64_t pending = 0, fold_at = 0;
  const auto fold = [&] {
    if (pending == 0) return;
    double mean, m2;
    lanes.take(center, pending, &mean, &m2);
    total.merge(mean, m2, pending);
    pending = 0;
  };
  for_each_run(a.layout, item, true, [&](int64_t offset, int64_t n, int64_t) {
    prefetch_run(x + next_offset(a.layout, offset, n), n);
    const A* v = load_run(x + offset, n, buffer);
    if (pending == 0) {  // a fold is at most 8 times what its center is the mean of
      center = center_of<T>(total.n ? total.mean : static_cast<double>(pilot_mean(v, n)));
      fold_at = std::min(kFoldAt, 8 * std::max(total.n, n));
    }
    lanes.add(v, n, center);
    pending += n;
    if (pending >= fold_at) fold();
  });
  fold();
  if (total.n && !(std::isfinite(total.mean) && std::isfinite(total.m2)))
    return slow_moments([&](auto f) {
      for_each_run(a.layout, item, true, [&](int64_t offset, int64_t n, int64_t) {
        for (int64_t i = 0; i < n; ++i) f(static_cast<double>(to_acc(x[offset + i])));
      });
    });
  return {total.mean, total.m2, total.n};
}

// sum += row (row - center for double), square += (row - center)^2, over up to four rows at a time. The sums are
// double: see Lanes.
template <class A, int kRows>
void add_rows(const A* const* rows, int64_t n, const A* __restrict center, double* __restrict sum,
              A* __restrict square) {
  constexpr bool kWide = sizeof(A) == sizeof(double);
  const A *r0 = rows[0], *r1 = rows[kRows > 1 ? 1 : 0], *r2 = rows[kRows > 1 ? 2 : 0], *r3 = rows[kRows > 1 ? 3 : 0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A d0 = r0[i] - center[i];
    if constexpr (kRows == 1) {
      sum[i] += static_cast<double>(kWide ? d0 : r0[i]), square[i] += d0 * d0;
    } else {
      const A d1 = r1[i] - center[i], d2 = r2[i] - center[i], d3 = r3[i] - center[i];
      const double v0 = static_cast<double>(kWide ? d0 : r0[i]), v1 = static_cast<double>(kWide ? d1 : r1[i]);
      const double v2 = static_cast<double>(kWide ? d2 : r2[i]), v3 = static_cast<double>(kWide ? d3 : r3[i]);
      sum[i] += (v0 + v1) + (v2 + v3), square[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
}

// Calls body(row) for the rows of [begin, end) that count.
template <class Body>
void for_each_row(const ChannelLayout& l, int64_t begin, int64_t end, const Body& body) {
  for (int64_t r = begin; r < end; ++r)
    if (!l.valid || l.valid[r]) body(r);
}

// center[0, width): the mean of the first rows that count, in [begin, end), rounded.
template <class T>
void pilot_center(const BatchNormForward& a, const Tile& t, int64_t begin, int64_t end, acc_t<T>* center) {
  const T* x = static_cast<const T*>(a.input) + t.column;
  alignas(64) acc_t<T> buffer[kTile];
  double pilot[kTile] = {};
  int64_t count = 0;
  for_each_row(a.layout, begin, end, [&](int64_t r) {
    if (count >= kPilotRows) return;
    const acc_t<T>* v = load_run(x + r * a.layout.channels, t.n, buffer);
    for (int64_t i = 0; i < t.n; ++i) pilot[i] += static_cast<double>(v[i]);
    ++count;
  });
  for (int64_t i = 0; count && i < t.n; ++i) center[i] = center_of<T>(pilot[i] / static_cast<double>(count));
  t.repeat_in_place(center);
}

// The mean, and the sum of squared deviations from `center`, over rows [begin, end); returns how many count.
template <class T>
int64_t tile_deviations(const BatchNormForward& a, const Tile& t, int64_t begin, int64_t end, const acc_t<T>* center,
                        double* means, double* squares) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const T* x = static_cast<const T*>(a.input) + t.column;
  alignas(64) A buffers[4][sizeof(T) == sizeof(A) ? 1 : kTile], square[kTile] = {};
  alignas(64) double sum[kTile] = {};
  const A* rows[4];
  int64_t waiting = 0, counted = 0;
  t.for_each_step(begin, end, [&](int64_t r, int64_t count, int64_t n) {
    if (l.valid && !l.valid[r]) return;
    counted += count;
    prefetch_run(x + (r + kRowsAhead * t.fused) * l.channels, n);
    if (n < t.width) {  // the last step, of fewer rows
      const A* last = load_run(x + r * l.channels, n, buffers[3]);
      add_rows<A, 1>(&last, n, center, sum, square);
      return;
    }
    rows[waiting] = load_run(x + r * l.channels, n, buffers[waiting]);
    if (++waiting == 4) add_rows<A, 4>(rows, n, center, sum, square), waiting = 0;
  });
  for (int64_t k = 0; k < waiting; ++k) add_rows<A, 1>(rows + k, t.width, center, sum, square);
  t.fold(sum), t.fold(square);
  const double inverse = 1 / static_cast<double>(counted);
  for (int64_t i = 0; counted && i < t.n; ++i) {
    means[i] = sum[i] * inverse + (sizeof(A) == sizeof(double) ? static_cast<double>(center[i]) : 0.0);
    squares[i] = static_cast<double>(square[i]);
  }
  return counted;
}

template <class T>
void tile_moments(const BatchNormForward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item);
  const T* x = static_cast<const T*>(a.input) + t.column;
  alignas(64) A center[kTile];
  double mean[kTile], m2[kTile] = {}, means[kTile], squares[kTile];
  int64_t done = 0;
  for (int64_t begin = t.row_begin; begin < t.row_end; begin += kRowsPerFold) {
    const int64_t end = std::min(begin + kRowsPerFold, t.row_end);
    if (done == 0) {
      pilot_center<T>(a, t, begin, end, center);
    } else {
      for (int64_t i = 0; i < t.n; ++i) center[i] = center_of<T>(mean[i]);
      t.repeat_in_place(center);
    }
    const int64_t count = tile_deviations<T>(a, t, begin, end, center, means, squares);
    if (count == 0) continue;
    const double n = static_cast<double>(count), total = static_cast<double>(done + count);
    const double share = n / total, cross = static_cast<double>(done) * n / total;
    const bool first = done == 0;
#pragma omp simd
    for (int64_t i = 0; i < t.n; ++i) {
      const double m = means[i], off = m - static_cast<double>(center[i]);
      const double fresh = squares[i] - off * off * n, delta = first ? 0 : m - mean[i];
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

// One run of the output. `Coefficient` is an array, or the Same value for all.
template <class T, class Coefficient>
inline void apply_run(const BatchNormForward& a, int64_t offset, int64_t n, Coefficient mean, Coefficient scale,
                      Coefficient shift, uint8_t* mask) {
  using A = acc_t<T>;
  alignas(64) A in[sizeof(T) == sizeof(A) ? 1 : kPadded], out[sizeof(T) == sizeof(A) ? 1 : kPadded];
  T* y = static_cast<T*>(a.output) + offset;
  const A* v = load_run(static_cast<const T*>(a.input) + offset, n, in);
  A* __restrict z = output_run(y, out);
  if (a.activation == Activation::relu && !a.residual) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = activated<Activation::relu>((v[i] - mean[i]) * scale[i] + shift[i], A(0));
    store_run(y, n, z);
    return;
  }
  if (a.residual) {
    alignas(64) A extra[sizeof(T) == sizeof(A) ? 1 : kPadded];
    const A* r = load_run(static_cast<const T*>(a.residual) + offset, n, extra);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = (v[i] - mean[i]) * scale[i] + (shift[i] + r[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = (v[i] - mean[i]) * scale[i] + shift[i];
  }
  if (mask) positive_bits(z, n, mask);
  activate(a.activation, z, n, static_cast<A>(a.slope));
  store_run(y, n, z);
}

template <class T>
void zero_invalid(const ChannelLayout& l, T* y, int64_t n, int64_t position) {
  for (int64_t i = 0; l.valid && i < n; ++i)
    if (!l.valid[position + i]) y[i] = T{};
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

template <class T>
void apply(const BatchNormForward& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const A *mean = static_cast<const A*>(a.mean), *scale = static_cast<const A*>(a.scale),
          *shift = static_cast<const A*>(a.shift);
  T* y = static_cast<T*>(a.output);
  for (int64_t item = begin; item < end; ++item) {
    if (l.columns()) {
      const Tile t(l, item, !a.mask || l.channels % 8 == 0);
      const int64_t c = t.column, row_bytes = (l.channels + 7) / 8;
      alignas(64) A m[kTile], k[kTile], b[kTile];
      t.repeat(mean + c, m), t.repeat(scale + c, k), t.repeat(shift + c, b);
      t.for_each_step(t.row_begin, t.row_end, [&](int64_t r, int64_t, int64_t n) {
        uint8_t* mask = a.mask ? a.mask + r * row_bytes + c / 8 : nullptr;
        const int64_t ahead = (r + kRowsAhead * t.fused) * l.channels + c;
        prefetch_run(static_cast<const T*>(a.input) + ahead, n);
        prefetch_run<true>(y + ahead, n);
        if (l.valid && !l.valid[r])
          std::fill_n(y + r * l.channels + c, n, T{});
        else
          apply_run<T, const A*>(a, r * l.channels + c, n, m, k, b, mask);
      });
      continue;
    }
    const int64_t row_bytes = (l.spatial + 7) / 8;
    const auto run = [&](int64_t offset, int64_t n, int64_t position, int64_t c) {
      const int64_t row = position / l.spatial * l.channels + c;
      uint8_t* mask = a.mask ? a.mask + row * row_bytes + position % l.spatial / 8 : nullptr;
      apply_run<T>(a, offset, n, Same<A>{mean[c]}, Same<A>{scale[c]}, Same<A>{shift[c]}, mask);
      zero_invalid(l, y + offset, n, position);
    };
    if (a.by_plane) {
      for_each_plane_run(l, item, item + 1, run);
      continue;
    }
    for_each_run<true>(l, item, false, [&](int64_t offset, int64_t n, int64_t position) {
      prefetch_run<true>(y + previous_offset(l, offset, n, position), n);
      run(offset, n, position, item / l.parts());
    });
  }
}

}  // namespace

#define FUSED_OPS_DISPATCH(kernel)                                               \
  switch (args.dtype) {                                                          \
    case DType::float32: kernel<float>(args, begin_item, end_item); break;       \
    case DType::float64: kernel<double>(args, begin_item, end_item); break;      \
    case DType::bfloat16: kernel<bfloat16_t>(args, begin_item, end_item); break; \
    case DType::float16: kernel<float16_t>(args, begin_item, end_item); break;   \
  }

void batch_norm_moments(const BatchNormForward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(moments)
}
void batch_norm_apply(const BatchNormForward& args, int64_t begin_item, int64_t end_item) { FUSED_OPS_DISPATCH(apply) }

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

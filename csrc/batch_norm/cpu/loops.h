// The loops of the batch-norm kernels over the items of a layout, what they prefetch, and the sums they fill.
#pragma once
#include <algorithm>
#include <type_traits>

#include "batch_norm/kernels.h"
#include "simd/line.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// Types with one path, where z and h go through a buffer and rows are summed one by one: float64, which is for checks
// of gradients, and all in the x86 baseline, which no processor that trains needs. No bit depends on it.
#if defined(__x86_64__) && !defined(__AVX2__)
template <class T>
constexpr bool kOnePath = true;
#else
template <class T>
constexpr bool kOnePath = std::is_same_v<T, double>;
#endif

// Size of a run's buffer: room for a last line, and no multiple of 4 KiB, because buffers that far apart stall loads
// behind each other's stores.
constexpr int64_t kPadded = kRun + 48;

// What the hardware does not foresee, the start of the next slice, page or piece of a row, is prefetched, a line with
// every line that is read: many at once wait for each other. A prefetch may point anywhere.
constexpr int kRunsAhead = 2;
// A core's second-level cache is taken to be of this size.
constexpr int64_t kCacheBytes = int64_t{1} << 20;
// What is prefetched in rows that are written lies this many values behind.
template <class T>
constexpr int64_t kAhead = 8192 / static_cast<int64_t>(sizeof(T));
// The same for rows that are summed.
template <class T>
constexpr int64_t kAheadOfRows = 4096 / static_cast<int64_t>(sizeof(T));

// Rows of a tile that are summed together: the more, the fewer loads and stores of their sums; the fewer, the more they
// are read in the order of memory, which reads faster what is not in the cache. No bit depends on it.
constexpr int kMostRows = 4;
// With registers of a line, what is not in the cache is read half as many rows together. With shorter ones the loads
// and stores of the sums cost more than that: of (65536, 256) float32 four rows take 0.62 of the time of two in the
// moments, and 0.77 in the gradient's sums (AVX2, one core of Zen 4).
constexpr bool kHalvesRows = kVectorBytes == kLineBytes;
template <class T>
constexpr int kRowsTogether = kOnePath<T> ? 1 : kMostRows;

// Calls body(begin, n) for every stretch of positions in [begin, end) of `valid` that count.
template <class Body>
inline void for_each_valid(const uint8_t* valid, int64_t begin, int64_t end, const Body& body) {
  while (begin < end) {
    while (begin < end && !valid[begin]) ++begin;
    int64_t stop = begin;
    while (stop < end && valid[stop]) ++stop;
    if (stop > begin) body(begin, stop - begin);
    begin = stop;
  }
}

// NCHW: a run of values of one channel, a part of a slice. The runs of a slice are of one length, but for the last.
struct SliceRun {
  int64_t offset, n;   // of its values
  int64_t row, start;  // its first place in (batch, spatial)
  int64_t ahead;       // what is to be prefetched lies so many values behind,
  int64_t soon;        // and of what is read once, or written, so many
  int64_t position(const ChannelLayout& l) const { return row * l.spatial + start; }
  // Its place in a mask of bits, where each slice starts a byte.
  int64_t mask_byte(const ChannelLayout& l, int64_t channel) const {
    return (row * l.channels + channel) * ((l.spatial + 7) / 8) + start / 8;
  }
};

class RunCursor {
 public:
  RunCursor(const ChannelLayout& l, int64_t channel, int64_t run)
      : layout_(l), per_row_(runs_per_row(l)), length_(((l.spatial + per_row_ - 1) / per_row_ + 31) / 32 * 32) {
    channel_ = channel, row_ = run / per_row_, start_ = run % per_row_ * length_;
  }
  static int64_t runs_per_row(const ChannelLayout& l) { return (l.spatial + kRun - 1) / kRun; }
  int64_t offset() const { return (row_ * layout_.channels + channel_) * layout_.spatial + start_; }
  SliceRun at(int64_t later, int64_t soon) const {
    const int64_t here = offset();
    return {here, std::min(length_, layout_.spatial - start_), row_, start_, later - here, soon - here};
  }
  void next() {
    start_ += length_;
    if (start_ < layout_.spatial) return;
    start_ = 0;
    if (++row_ == layout_.batch) row_ = 0, ++channel_;
  }
  void previous() {
    start_ -= length_;
    if (start_ >= 0) return;
    start_ = (per_row_ - 1) * length_;
    if (--row_ < 0) row_ = layout_.batch - 1, --channel_;
  }

 private:
  const ChannelLayout& layout_;
  int64_t per_row_, length_, channel_, row_, start_;
};

// NCHW: calls body(run) for the runs of at most kRun values of item (channel, part). With `split`, a run is cut into
// the stretches that count.
template <class Body>
inline void for_each_run(const ChannelLayout& l, int64_t item, bool split, const Body& body) {
  const int64_t parts = l.parts(), part = item % parts, runs = l.batch * RunCursor::runs_per_row(l);
  const int64_t begin = runs * part / parts, end = runs * (part + 1) / parts;
  if (begin == end) return;
  RunCursor cursor(l, item / parts, begin), later = cursor;
  for (int k = 0; k < kRunsAhead; ++k) later.next();
  for (int64_t left = end - begin; left > 0; --left, cursor.next(), later.next()) {
    const SliceRun run = cursor.at(later.offset(), later.offset());
    if (!split || !l.valid) {
      body(run);
      continue;
    }
    const int64_t position = run.position(l);
    for_each_valid(l.valid, position, position + run.n, [&](int64_t at, int64_t count) {
      const int64_t over = at - position;
      body(SliceRun{run.offset + over, count, run.row, run.start + over, run.ahead, run.soon});
    });
  }
}

// The same for a second pass: from the end, which the first pass has left in the cache. What it reads, `bytes` a value,
// is there, if the channel fits; so it prefetches the next channel, as far as that fits beside this one: main memory is
// read while outputs are written to it.
template <class Body>
inline void for_each_run_again(const ChannelLayout& l, int64_t item, int64_t bytes, const Body& body) {
  const int64_t parts = l.parts(), channel = item / parts, part = item % parts;
  const int64_t per_row = RunCursor::runs_per_row(l), runs = l.batch * per_row;
  const int64_t begin = runs * part / parts, end = runs * (part + 1) / parts;
  if (begin == end) return;
  const int64_t fit = kCacheBytes / (bytes * ((l.spatial + per_row - 1) / per_row)) - runs;
  const bool foresees = parts == 1 && fit > 0;
  RunCursor cursor(l, channel, end - 1), soon = cursor, next(l, channel + 1, 0);
  for (int k = 0; k < kRunsAhead; ++k) soon.previous();
  for (int64_t k = 0; k < end - begin; ++k, cursor.previous(), soon.previous(), next.next())
    body(cursor.at(foresees && k < fit ? next.offset() : soon.offset(), soon.offset()));
}

// NCHW in the order of memory: calls body(run, channel) for the runs of slices [begin, end).
// For what needs no sums over a channel.
template <class Body>
inline void for_each_slice_run(const ChannelLayout& l, int64_t begin, int64_t end, int64_t ahead, const Body& body) {
  for (int64_t slice = begin; slice < end; ++slice)
    for (int64_t s = 0; s < l.spatial; s += kRun)
      body(SliceRun{slice * l.spatial + s, std::min(kRun, l.spatial - s), slice / l.channels, s, ahead, ahead},
           slice % l.channels);
}

// NHWC: the rows and columns of one item. Where rows are short and all of them count, `fused` consecutive ones are
// taken as one of `width` values, with the coefficients repeated: a row is then many vectors long.
struct Tile {
  int64_t block, row_begin, row_end, column, n, fused, width;
  explicit Tile(const ChannelLayout& l, int64_t item, bool may_fuse = true) {
    block = item % l.row_blocks();
    row_begin = block * l.rows_per_item();
    row_end = std::min(row_begin + l.rows_per_item(), l.batch);
    column = item / l.row_blocks() * l.tile_columns();
    n = std::min(l.tile_columns(), l.channels - column);
    fused = may_fuse && !l.valid ? std::max<int64_t>(1, kFusedColumns / l.channels) : 1;
    width = fused * n;
  }
  int64_t rows() const { return row_end - row_begin; }
  // `width` and what a last line needs behind it.
  int64_t padded() const { return (width + 63) / 64 * 64; }
  // How far behind a value of a row the one lies that is prefetched with it, about `distance` values.
  int64_t ahead(const ChannelLayout& l, int64_t distance, int64_t rows) const {
    const int64_t step = fused * l.channels;
    return std::max(rows, distance / step) * step;
  }

  // Calls body(row, count, n) for the steps of rows [begin, end): `count` rows from `row` on, n values.
  template <class Body>
  void for_each_step(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t r = begin; r < end; r += fused) {
      const int64_t count = std::min(fused, end - r);
      body(r, count, count * n);
    }
  }
  // to[0, width) = from[0, n), repeated.
  template <class A>
  void repeat(const A* from, A* to) const {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    repeat_in_place(to);
  }
  template <class A>
  void repeat_in_place(A* values) const {
    for (int64_t k = 1; k < fused; ++k) std::copy_n(values, n, values + k * n);
  }
  // to[0, padded()) = from[0, n), repeated, in the order of lines; 0 behind it.
  template <class T, class A>
  void repeat_ordered(const A* from, A* to) const {
    alignas(kLineBytes) A natural[kTile];
    A* values = Line<T>::kPairs ? natural : to;
    repeat(from, values);
    std::fill(values + width, values + padded(), A(0));
    if (Line<T>::kPairs) to_line_order<T>(natural, to, padded());
  }
};

// Calls add(k, items, n) for the rows of [begin, end) that count: k of them together (an integral_constant, as the
// kernels are made for each), kMost at most, n values of each, and of each the item that make(r, n, i) gives, the i-th
// of those waiting. Returns how many rows count.
template <class T, class Item, int kMost = kRowsTogether<T>, class Make, class Add>
inline int64_t for_rows_together(const ChannelLayout& l, const Tile& t, int64_t begin, int64_t end, const Make& make,
                                 const Add& add) {
  using One = std::integral_constant<int, 1>;
  constexpr bool kMayHalve = kHalvesRows && kMost > 1 && sizeof(T) > 2;
  Item items[kMost];
  const bool halve = kMayHalve && l.numel() * static_cast<int64_t>(sizeof(T)) >= kCacheBytes;
  int64_t waiting = 0, counted = 0;
  t.for_each_step(begin, end, [&](int64_t r, int64_t count, int64_t n) {
    if (l.valid && !l.valid[r]) return;
    counted += count;
    items[waiting] = make(r, n, waiting);
    if (kMost == 1 || n < t.width) return add(One(), items + waiting, n);  // of fewer rows: the last step
    if (++waiting < (halve ? kMost / 2 : kMost)) return;
    waiting = 0;
    if constexpr (kMayHalve) {
      if (halve) return add(std::integral_constant<int, kMost / 2>(), items, n);
    }
    if constexpr (kMost > 1) add(std::integral_constant<int, kMost>(), items, n);
  });
  for (int64_t k = 0; k < waiting; ++k) add(One(), items + k, t.width);
  return counted;
}

// What is prefetched with the lines of rows that are read together. Where the tile is all columns, so that the rows
// are one piece of memory, its lines in their order: in the order in which they are read, one of each row in turn, the
// same bytes took a sixth longer.
template <class T>
struct TilePrefetch {
  int64_t ahead, step;
  bool adjacent;
  TilePrefetch(const ChannelLayout& l, const Tile& t)
      : ahead(t.ahead(l, kAheadOfRows<T>, kMostRows)), step(t.fused * l.channels), adjacent(t.n == l.channels) {}

  // For kRows rows, the first of which lies at `from`.
  template <int kRows>
  struct Lines {
    const T* from;
    int64_t line, row;
    // Into the first-level cache: it is read soon.
    inline FUSED_OPS_INLINE void prefetch_line(int r, int64_t i) const {
      __builtin_prefetch(from + i * line + r * row, 0, 3);
    }
  };
  template <int kRows>
  Lines<kRows> lines(const T* from) const {
    return adjacent ? Lines<kRows>{from + ahead, kRows, Line<T>::kSize} : Lines<kRows>{from + ahead, 1, step};
  }
};

// Two sums a column of a tile, in the order of lines: in double for float32; of 16-bit values in float for at most
// kRowsPerFold steps, then in double.
template <class T>
struct TileSums {
  using A = acc_t<T>;
  static constexpr bool kWiden = std::is_same_v<T, float>, kFolds = sizeof(T) == 2;
  using S = std::conditional_t<kWiden, double, A>;
  using V = vec_t<S>;
  static constexpr int64_t kLane = kVectorBytes / static_cast<int64_t>(sizeof(S));
  static constexpr int kVectors = static_cast<int>(Line<T>::kSize / kLane);
  struct OfLine {
    V a[kVectors], b[kVectors];
  };

  alignas(kLineBytes) S a[kPadded], b[kPadded];
  alignas(kLineBytes) double folded_a[kFolds ? kPadded : 1], folded_b[kFolds ? kPadded : 1];

  void clear(const Tile& t) {
    std::fill_n(a, t.padded(), S(0)), std::fill_n(b, t.padded(), S(0));
    if (kFolds) std::fill_n(folded_a, t.padded(), 0.0), std::fill_n(folded_b, t.padded(), 0.0);
  }
  inline FUSED_OPS_INLINE OfLine load(int64_t at) const {
    OfLine line;
    for (int k = 0; k < kVectors; ++k)
      line.a[k] = load_bits<V>(a + at + k * kLane), line.b[k] = load_bits<V>(b + at + k * kLane);
    return line;
  }
  inline FUSED_OPS_INLINE void store(int64_t at, const OfLine& line) {
    for (int k = 0; k < kVectors; ++k) {
      std::memcpy(a + at + k * kLane, &line.a[k], sizeof(V));
      std::memcpy(b + at + k * kLane, &line.b[k], sizeof(V));
    }
  }
  void fold(const Tile& t) {
    if constexpr (kFolds) {
      for (int64_t i = 0; i < t.padded(); ++i) {
        folded_a[i] += static_cast<double>(a[i]), folded_b[i] += static_cast<double>(b[i]);
        a[i] = 0, b[i] = 0;
      }
    }
  }
  // What was folded of the t.n columns, over the rows that were taken as one.
  void take(const Tile& t, double* to_a, double* to_b) const {
    const auto one = [&](const auto* from, double* to) {
      alignas(kLineBytes) double natural[Line<T>::kPairs ? kTile : 1];
      if constexpr (Line<T>::kPairs) from_line_order<T>(from, natural, t.padded()), from = natural;
      for (int64_t i = 0; i < t.n; ++i) to[i] = from[i];
      for (int64_t i = t.n; i < t.width; i += t.n)
        for (int64_t j = 0; j < t.n; ++j) to[j] += from[i + j];
    };
    if constexpr (kFolds)
      one(folded_a, to_a), one(folded_b, to_b);
    else
      one(a, to_a), one(b, to_b);
  }
};

// A value near `mean`, representable in T: then deviations of 16-bit values from it are exact, and the rounding of
// their sums has no bias.
template <class T>
inline acc_t<T> center_of(double mean) {
  T rounded;
  store(&rounded, static_cast<acc_t<T>>(mean));
  return to_acc(rounded);
}

template <class V>
inline double sum_of(V v) {
  double total = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(v[0]); ++l) total += static_cast<double>(v[l]);
  return total;
}

// Adds four registers to two of doubles, and clears them.
struct WideSums {
  double_vec low{}, high{};
  void take(float_vec* v) {
    const DoublePair d = widen((v[0] + v[1]) + (v[2] + v[3]));
    low += d.low, high += d.high;
    for (int i = 0; i < 4; ++i) v[i] = float_vec{};
  }
  void take(double_vec* v) {
    low += (v[0] + v[1]) + (v[2] + v[3]);
    for (int i = 0; i < 4; ++i) v[i] = double_vec{};
  }
  double sum() const { return sum_of(low + high); }
};

// kernel<double> in these passes is compiled with vectors, but once: AVX-512 calls AVX2's.
#if defined(__AVX512F__)
#define FUSED_OPS_FLOAT64_VECTORS(kernel, entry, ...) ::fused_ops::AVX2::entry(__VA_ARGS__)
#else
#define FUSED_OPS_FLOAT64_VECTORS(kernel, entry, ...) kernel<double>(__VA_ARGS__)
#endif

// kernel<T>(args, begin_item, end_item), in the function `entry` of the contract.
#define FUSED_OPS_DISPATCH(kernel, entry)                                                             \
  switch (args.dtype) {                                                                               \
    case DType::float32: kernel<float>(args, begin_item, end_item); break;                            \
    case DType::float64: FUSED_OPS_FLOAT64_VECTORS(kernel, entry, args, begin_item, end_item); break; \
    case DType::bfloat16: kernel<bfloat16_t>(args, begin_item, end_item); break;                      \
    case DType::float16: kernel<float16_t>(args, begin_item, end_item); break;                        \
  }

// The coefficients of a tile's columns, repeated over the rows that are taken as one, in the order of lines; unset
// where they are not wanted.
template <class T>
struct TileValues {
  alignas(kLineBytes) acc_t<T> values[kPadded];
  TileValues(const Tile& t, const acc_t<T>* from, bool wanted = true) {
    if (wanted) t.repeat_ordered<T>(from, values);
  }
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

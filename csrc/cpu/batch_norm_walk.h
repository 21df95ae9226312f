// How the batch-norm kernels walk over a layout's items, and what they load on the way.
#pragma once
#include <algorithm>

#include "../batch_norm.h"
#include "lines.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// Size of a run's buffer: room for a last line, and no multiple of 4 KiB, because buffers that far apart stall loads
// behind each other's stores.
constexpr int64_t kPadded = kRun + 48;

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

// Planes: calls body(offset, n, position) for the runs of at most kRun values of item (channel, part); `position` is
// the run's first place in (batch, spatial). With `split`, a run is cut into the stretches that count. kBackwards: last
// run first, so that a second pass begins with what the first has left in the cache.
template <bool kBackwards = false, class Body>
inline void for_each_run(const ChannelLayout& l, int64_t item, bool split, const Body& body) {
  const int64_t parts = l.parts(), channel = item / parts, part = item % parts;
  const int64_t per_row = (l.spatial + kRun - 1) / kRun, runs = l.batch * per_row;
  const int64_t begin = runs * part / parts, end = runs * (part + 1) / parts;
  if (begin == end) return;
  int64_t run = kBackwards ? end - 1 : begin, b = run / per_row, s = run % per_row * kRun;
  for (int64_t left = end - begin; left > 0; --left) {
    const int64_t n = std::min(kRun, l.spatial - s), position = b * l.spatial + s;
    const int64_t offset = (b * l.channels + channel) * l.spatial + s;
    if (split && l.valid) {
      for_each_valid(l.valid, position, position + n,
                     [&](int64_t at, int64_t count) { body(offset + at - position, count, at); });
    } else {
      body(offset, n, position);
    }
    if constexpr (kBackwards) {
      s -= kRun;
      if (s < 0) s = (per_row - 1) * kRun, --b;
    } else {
      s += kRun;
      if (s >= l.spatial) s = 0, ++b;
    }
  }
}

// About where the next run of the same channel lies: the next piece of the plane, or the next batch entry's plane. A
// prefetch may point anywhere.
inline int64_t next_offset(const ChannelLayout& l, int64_t offset, int64_t n) {
  return offset + n + (n == kRun && l.spatial % kRun ? 0 : (l.channels - 1) * l.spatial);
}

// About where the run before this one lies.
inline int64_t previous_offset(const ChannelLayout& l, int64_t offset, int64_t n, int64_t position) {
  return offset - n - (position % l.spatial ? 0 : (l.channels - 1) * l.spatial);
}

// kWrite: the lines are about to be written.
template <bool kWrite = false, class T>
inline void prefetch_run(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i, kWrite, 2);
}

// Planes in the order of memory, as (batch, channel): calls body(offset, n, position, channel) for the runs of planes
// [begin, end). For what needs no sums over a channel.
template <class Body>
inline void for_each_plane_run(const ChannelLayout& l, int64_t begin, int64_t end, const Body& body) {
  for (int64_t plane = begin; plane < end; ++plane)
    for (int64_t s = 0; s < l.spatial; s += kRun)
      body(plane * l.spatial + s, std::min(kRun, l.spatial - s), plane / l.channels * l.spatial + s,
           plane % l.channels);
}

// Columns: the rows and columns of one item. Where rows are short and all of them count, `fused` consecutive ones are
// walked as one of `width` values, with the coefficients repeated: a row is then many vectors long.
struct Tile {
  int64_t block, row_begin, row_end, column, n, fused, width;
  explicit Tile(const ChannelLayout& l, int64_t item, bool may_fuse = true) {
    block = item % l.row_blocks();
    row_begin = block * l.rows_per_item();
    row_end = std::min(row_begin + l.rows_per_item(), l.batch);
    column = item / l.row_blocks() * kTile;
    n = std::min(kTile, l.channels - column);
    fused = may_fuse && !l.valid ? std::max<int64_t>(1, kTile / l.channels) : 1;
    width = fused * n;
  }
  int64_t rows() const { return row_end - row_begin; }

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
  // to[0, kTile) = from[0, n), repeated, in the order of lines; 0 behind it.
  template <class T, class A>
  void repeat_ordered(const A* from, A* to) const {
    alignas(kLineBytes) A natural[kTile];
    A* values = Line<T>::kPairs ? natural : to;
    repeat(from, values);
    std::fill(values + width, values + kTile, A(0));
    if (Line<T>::kPairs) to_line_order<T>(natural, to, kTile);
  }
  // values[0, n) += the repetitions, in order.
  template <class A>
  void fold(A* values) const {
    for (int64_t k = 1; k < fused; ++k)
      for (int64_t i = 0; i < n; ++i) values[i] += values[k * n + i];
  }
};

#define FUSED_OPS_DISPATCH(kernel)                                               \
  switch (args.dtype) {                                                          \
    case DType::float32: kernel<float>(args, begin_item, end_item); break;       \
    case DType::float64: kernel<double>(args, begin_item, end_item); break;      \
    case DType::bfloat16: kernel<bfloat16_t>(args, begin_item, end_item); break; \
    case DType::float16: kernel<float16_t>(args, begin_item, end_item); break;   \
  }

constexpr int64_t kRowsAhead = 32;  // rows that are prefetched: a tile is a piece of each row, which no stream predicts

// The coefficients of a tile's columns, repeated over the rows that are walked as one, in the order of lines; unset
// where they are not wanted.
template <class T>
struct TileValues {
  alignas(kLineBytes) acc_t<T> values[kTile];
  TileValues(const Tile& t, const acc_t<T>* from, bool wanted = true) {
    if (wanted) t.repeat_ordered<T>(from, values);
  }
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

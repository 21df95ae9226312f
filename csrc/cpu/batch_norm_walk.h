// How the batch-norm kernels walk over a layout's items, and what they load on the way.
#pragma once
#include <algorithm>

#include "../batch_norm.h"
#include "simd.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// Size of a run's buffer: padded, because buffers a multiple of 4 KiB apart stall loads behind each other's stores.
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
    block = item / l.tiles();
    row_begin = block * l.rows_per_item();
    row_end = std::min(row_begin + l.rows_per_item(), l.batch);
    column = item % l.tiles() * kTile;
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
    for (int64_t i = n; i < width; ++i) values[i] = values[i - n];
  }
  // values[0, n) += the repetitions, in order.
  template <class A>
  void fold(A* values) const {
    for (int64_t k = 1; k < fused; ++k)
      for (int64_t i = 0; i < n; ++i) values[i] += values[k * n + i];
  }
};

constexpr int64_t kRowsAhead = 8;  // rows that are prefetched: a tile is a piece of each row, which no stream predicts

// One coefficient for a whole run, where columns have an array of them.
template <class A>
struct Same {
  A value;
  A operator[](int64_t) const { return value; }
};

template <class T>
inline const acc_t<T>* load_run(const T* from, int64_t n, acc_t<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return from;
  } else {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      if constexpr (std::is_same_v<T, float16_t>)
        _mm512_storeu_ps(buffer + i, _mm512_cvtph_ps(bits));
      else
        _mm512_storeu_si512(buffer + i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      if constexpr (std::is_same_v<T, float16_t>)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(bits));
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer + i), _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
#endif
    for (; i < n; ++i) buffer[i] = to_acc(from[i]);
    return buffer;
  }
}

// Rounds a run to T, where it is not computed in place already.
template <class T>
inline void store_run(T* to, int64_t n, const acc_t<T>* from) {
  if constexpr (sizeof(T) != sizeof(acc_t<T>)) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
      const __m512 v = _mm512_loadu_ps(from + i);
      __m256i bits;
      if constexpr (std::is_same_v<T, float16_t>) {
        bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {  // round to nearest even, NaN to the quiet NaN
        const __m512i u = _mm512_castps_si512(v),
                      odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        bits = _mm512_cvtepi32_epi16(r);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bits);
    }
#endif
    store_chunk(to + i, 1, n - i, from + i);
  }
}

// Where a run of T is computed: in the output itself where it is of the accumulator's type, else in a buffer.
template <class T>
inline acc_t<T>* output_run(T* to, acc_t<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>))
    return to;
  else
    return buffer;
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

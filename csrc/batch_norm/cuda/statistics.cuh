// The mean, the sum of squared distances and the number of each channel's values, by parts that the shape alone
// decides.
//
// Memory, with N values of e bytes: N e, and 24 bytes a part of a channel; N / channels where positions may not count.
// Stability: some values at a time around the first of them, in float, from there in pairs of floats around a shift,
// and in double between threads and parts, which are merged around the mean of all (Chan et al., all at once).
#pragma once
#include "batch_norm/cuda/channel.cuh"
#include "batch_norm/cuda/loops.cuh"

namespace fused_ops {
namespace cuda {
namespace {

__device__ inline void keep_moments(double* to, const Moments& m) { to[0] = m.mean, to[1] = m.m2, to[2] = m.n; }

// A block a (part, channel): planes. In the order of memory, parts first.
template <class T, bool kFast>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 || !kFast ? 2 : 4)
    plane_moments(BatchNormForwardCall c, int64_t parts) {
  using A = acc_t<T>;
  constexpr int kAhead = kUnitsOf<T, 1>, kTogether = kAhead < 2 ? 1 : 2;
  const BatchNormShape& s = c.shape;
  const int64_t part = quotient(blockIdx.x, s.channels), channel = blockIdx.x - part * s.channels;
  const T* x = static_cast<const T*>(c.input);
  PlaneWalk walk(s, channel, part, parts);
  Shifted<A> sums;
  int64_t n = 0;
  const auto turn = [&](auto full) {  // all units there, and whole
    constexpr bool kFull = decltype(full)::value;
    Raw<T> raw[kAhead];
    int have[kAhead];
    unsigned counted[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      have[k] = kFull ? kUnit : walk.have<kFast>();
      raw[k] = load_raw<T, kFast>(x + (kFull ? walk.offset : walk.at()), have[k]);
      if constexpr (!kFast) counted[k] = counted_bits(s.valid, walk.position, have[k]);
      walk.advance();
    }
#pragma unroll
    for (int k = 0; k < kAhead; k += kTogether) {
      A v[kTogether * kUnit];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) unpack_raw<T>(raw[k + i], v + i * kUnit), count += have[k + i];
      if constexpr (!kFast) {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) bits |= counted[k + i] << (i * kUnit);
        count = replace_uncounted<kTogether * kUnit>(bits, v);
        if (count > 0) sums.template add<kTogether * kUnit>(v, count, n == 0, All{});
      } else if constexpr (kFull) {
        sums.template add<kTogether * kUnit>(v, kTogether * kUnit, n == 0, All{});
      } else if (count > 0) {
        const auto there = [&](int i) { return i % kUnit < have[k + i / kUnit]; };
        sums.template add<kTogether * kUnit>(v, count, n == 0, there);
      }
      n += count;
    }
  };
  const int64_t units = walk.left + threadIdx.x;  // of the block
  const int64_t full = kFast && units > 0 ? quotient(units, kAhead * kBlock) : 0;
  for (int64_t i = 0; i < full; ++i) turn(std::true_type{});
  for (int64_t i = full * kAhead * kBlock; i < units; i += kAhead * kBlock) turn(std::false_type{});
  const double count = static_cast<double>(n);
  const Moments all = group_moments<kBlock>(sums.total(count), count, [&](double m) { return sums.around(m, count); });
  if (threadIdx.x == 0) keep_moments(partials_of(c.scratch, s.channels) + 3 * (channel * parts + part), all);
}

// Over the threads of a block: the i-th thread gets the moments of the tile's i-th column. Each has n rows of its eight
// columns; where not all count (`masked`), `rows` is of no matter.
template <class A>
__device__ inline Moments column_moments_of_block(int lanes, int lane, const Shifted<A>* sums, int64_t n, int64_t rows,
                                                  bool masked) {
  __shared__ double means[kBlock];
  const double count = static_cast<double>(n);
  double v[kUnit], all = static_cast<double>(rows);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = count;
  if (masked) all = sum_columns(lanes, v);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = sums[k].total(count);
  const double sum_of_all = sum_columns(lanes, v), mean = all > 0 ? sum_of_all / all : 0.0;
  means[threadIdx.x] = mean;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = sums[k].around(means[lane * kUnit + k], count).a;
  const double sum = sum_columns(lanes, v);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = sums[k].around(means[lane * kUnit + k], count).b;
  const double squares = sum_columns(lanes, v);
  return moments_around(mean, {sum, squares}, all);
}

// Blocks of column_moments on one multiprocessor, where it is not the fast one: registers for two make it spill 84
// bytes on sm_75.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMomentBlocks = 1;
#else
constexpr int kMomentBlocks = 2;
#endif

// A block a (part of the rows, tile of columns): a thread eight columns.
template <class T, bool kFast>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 1
                                          : kFast        ? 2
                                                         : kMomentBlocks)
    column_moments(BatchNormForwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  constexpr int kRows = 2 * kUnitsOf<T, 1>;
  const Spot s(r, t, blockIdx.x);
  const T* x = static_cast<const T*>(c.input) + s.first;
  const uint8_t* valid = kFast ? nullptr : c.shape.valid;
  const bool masked = valid != nullptr;
  Shifted<A> sums[kUnit];
  int64_t n = 0;
  for (int64_t base = s.begin; base < s.end; base += kRows * s.step) {
    Raw<T> raw[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) raw[k] = load_raw<T, kFast>(x + s.row_at(base, k) * r.length, s.have);
    A v[kRows][kUnit], column[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) unpack_raw<T>(raw[k], v[k]);
    int rows = s.rows_at(base, kRows);
    if (masked) {
      unsigned bits = 0;
#pragma unroll
      for (int k = 0; k < kRows; ++k) bits |= k < rows && row_counts(valid, s.row_at(base, k)) ? 1u << k : 0u;
      rows = __popc(bits);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) column[k] = v[k][i];
        replace_uncounted<kRows>(bits, column);
        if (rows > 0) sums[i].template add<kRows>(column, rows, n == 0, All{});
      }
    } else if (rows == kRows) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) column[k] = v[k][i];
        sums[i].template add<kRows>(column, kRows, n == 0, All{});
      }
    } else if (rows > 0) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) column[k] = v[k][i];
        sums[i].template add<kRows>(column, rows, n == 0, [&](int k) { return k < rows; });
      }
    }
    n += rows;
  }
  const Moments all = column_moments_of_block(t.lanes, s.lane, sums, n, s.end - s.begin, masked);
  const int64_t column = s.tile * t.lanes * kUnit + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < t.lanes * kUnit && column < r.length)
    keep_moments(partials_of(c.scratch, r.channels) + 3 * (column * t.parts + s.part), all);
}

template <class T>
void launch_moments(Launcher& launch, const BatchNormForwardCall& c, const Rows& r, bool fast) {
  const bool columns = sums_columns(r);
  const int64_t each = partials_each(c.shape);
  const Tiles t = tiles_of(r, kColumnBlocks);
  FUSED_OPS_WITH_FAST(T, fast && (columns || c.shape.spatial % kUnit == 0), kFast, {
    if (columns)
      launch(column_moments<T, kFast>, t.across * t.parts, kBlock, c, r, t);
    else
      launch(plane_moments<T, kFast>, c.shape.channels * each, kBlock, c, each);
  })
}

// The moments of a channel from those of its parts, by a group of threads; of none where there are no parts.
template <int kGroup>
__device__ inline Moments merged_moments(const double* from, int64_t parts) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  double total = 0, n = 0;
  for (int64_t i = lane; i < parts; i += kGroup) total += from[3 * i] * from[3 * i + 2], n += from[3 * i + 2];
  return group_moments<kGroup>(total, n, [&](double near) {
    Pair sums{0, 0};
    for (int64_t i = lane; i < parts; i += kGroup) {
      const double d = from[3 * i] - near, count = from[3 * i + 2];
      sums = sums + Pair{count * d, from[3 * i + 1] + count * d * d};
    }
    return sums;
  });
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

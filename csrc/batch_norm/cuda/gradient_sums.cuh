// The sums of h and of h * (x - mean) of each channel, by parts that the shape alone decides.
//
// Memory, with N values of e bytes: 2 N e (x, g), and as much more of the residual or of the mask as h needs; 16 bytes
// a part of a channel, 24 where positions may not count. Stability: a thread's sums are pairs of floats, to which
// 16-bit values come eight (planes) or some rows (columns) at a time; threads' sums are double.
#pragma once
#include "batch_norm/cuda/gradient.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// A part's sums, and how many positions count where not all do.
__device__ inline int64_t sums_each(const BatchNormShape& s) { return s.valid == nullptr ? 2 : 3; }
__device__ inline void keep_sums(double* to, const Pair& s, const BatchNormShape& shape, double n) {
  to[0] = s.a, to[1] = s.b;
  if (shape.valid != nullptr) to[2] = n;
}

// Adds the h of a unit and their products with x - mean; those of 16 bits among themselves first.
template <class T>
__device__ inline void add_unit(const acc_t<T>* h, const acc_t<T>* centered, LongSum<acc_t<T>>& sums,
                                LongSum<acc_t<T>>& dots) {
  acc_t<T> sum = 0, dot = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if constexpr (sizeof(T) == 2)
      sum += h[i], dot += h[i] * centered[i];
    else
      sums.add(h[i]), dots.add_product(h[i], centered[i]);
  }
  if constexpr (sizeof(T) == 2) sums.add(sum), dots.add(dot);
}

// Whether anything needs the sums.
__host__ __device__ inline bool reduces(const BatchNormBackwardCall& c) {
  return (c.training && c.grad_input != nullptr) || c.grad_weight != nullptr;
}

// A block a (part, channel), as plane_moments.
template <class T, bool kFast, From kFrom>
__global__ void __launch_bounds__(kBlock, (kFrom == From::any ? 2 : 4) / (sizeof(T) == 8 ? 2 : 1))
    plane_sums(BatchNormBackwardCall c, int64_t parts) {
  using A = acc_t<T>;
  constexpr int kAhead = kUnitsOf<T, 2>;
  const BatchNormShape& s = c.shape;
  const int64_t part = quotient(blockIdx.x, s.channels), channel = blockIdx.x - part * s.channels;
  const T *x = static_cast<const T*>(c.input), *g = static_cast<const T*>(c.grad_output);
  const T* residual = static_cast<const T*>(c.residual);
  const bool masked = kFrom != From::light && c.mask != nullptr;
  const bool added = kFrom == From::any && c.residual != nullptr && !masked && c.activation != Activation::none;
  const Coefficients<A> coefficients(c.scratch, s.channels);
  A mean = static_cast<A>(c.mean[channel]), scale = 0, shift = 0;
  if (kFrom == From::any) mean = coefficients.mean[channel];
  if (kFrom != From::gradient) scale = coefficients.scale[channel], shift = coefficients.shift[channel];
  PlaneWalk walk(s, channel, part, parts);
  LongSum<A> sums, dots;
  int64_t n = 0;
  for (int64_t turns = quotient(walk.left + threadIdx.x + kAhead * kBlock - 1, kAhead * kBlock); turns > 0; --turns) {
    Raw<T> raw[kAhead], grad[kAhead], extra[kAhead];
    int have[kAhead];
    int64_t at[kAhead];
    unsigned bits[kAhead], counted[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      have[k] = walk.have<kFast>(), at[k] = walk.at(), bits[k] = 0;
      counted[k] = kFast ? 0u : counted_bits(s.valid, walk.position, have[k]);
      raw[k] = load_raw<T, kFast>(x + walk.at(), have[k]), grad[k] = load_raw<T, kFast>(g + walk.at(), have[k]);
      if (added) extra[k] = load_raw<T, kFast>(residual + walk.at(), have[k]);
      if (masked) bits[k] = kFast ? c.mask[walk.at() / kUnit] : plane_bits(c, walk, channel, have[k]);
      walk.advance();
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      A v[kUnit], h[kUnit], z[kUnit];
      unpack_raw<T>(raw[k], v), unpack_raw<T>(grad[k], h);
      if (kFrom == From::any && c.kept.from_output) {
        unit_from_output<T>(c, at[k], have[k], [&](int) { return channel; }, v, h);
      } else {
        if constexpr (kFrom != From::gradient) {
          if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
          for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean) * scale + (added ? shift + z[i] : shift);
        }
        unit_before<kFrom, A>(c, z, bits[k], h);
      }
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const bool there = kFast ? have[k] > 0 : (counted[k] >> i & 1u) != 0;
        h[i] = there ? h[i] : A(0), v[i] = there ? v[i] - mean : A(0);
      }
      add_unit<T>(h, v, sums, dots);
      if constexpr (!kFast) n += __popc(counted[k]);
    }
  }
  const Pair all = sum_group<kBlock>(Pair{sums.value(), dots.value()});
  const double count = kFast ? 0.0 : sum_group<kBlock>(static_cast<double>(n));
  double* to = partials_of(c.scratch, s.channels) + sums_each(s) * (channel * parts + part);
  if (threadIdx.x == 0) keep_sums(to, all, s, count);
}

// A block a (part of the rows, tile of columns), as column_moments.
template <class T, bool kFast, From kFrom>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 || kFrom == From::any ? 1 : 2)
    column_sums(BatchNormBackwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  constexpr int kRows = sizeof(T) < 8 && kFrom == From::gradient ? 2 * kUnitsOf<T, 2> : kUnitsOf<T, 2>;
  constexpr int kFold = 2 * kUnitsOf<T, 2>;  // whatever kRows is: the same bits
  const Spot s(r, t, blockIdx.x);
  const MaskPlace place(r, s);
  const bool masked = kFrom != From::light && c.mask != nullptr;
  const bool added = kFrom == From::any && c.residual != nullptr && !masked && c.activation != Activation::none;
  const T *x = static_cast<const T*>(c.input) + s.first, *g = static_cast<const T*>(c.grad_output) + s.first;
  const T* residual = static_cast<const T*>(c.residual) + s.first;
  const Coefficients<A> coefficients(c.scratch, r.channels);
  int64_t channel[kUnit];
  A mean[kUnit], scale[kUnit], shift[kUnit];
  channels_of(r, s, channel);
#pragma unroll
  for (int i = 0; i < kUnit; ++i)
    mean[i] = kFrom == From::any ? coefficients.mean[channel[i]] : static_cast<A>(c.mean[channel[i]]);
  if constexpr (kFrom != From::gradient) {
    load_columns<kFast>(coefficients.scale, r, s, channel, scale);
    load_columns<kFast>(coefficients.shift, r, s, channel, shift);
  }
  LongSum<A> sums[kUnit], dots[kUnit];
  A sum[kUnit], dot[kUnit];  // of kFold rows of 16-bit values
#pragma unroll
  for (int i = 0; i < kUnit; ++i) sum[i] = 0, dot[i] = 0;
  int pending = 0;
  int64_t n = 0;
  for (int64_t base = s.begin; base < s.end; base += kRows * s.step) {
    Raw<T> raw[kRows], grad[kRows], extra[kRows];
    unsigned bits[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t row = s.row_at(base, k);
      raw[k] = load_raw<T, kFast>(x + row * r.length, s.have), grad[k] = load_raw<T, kFast>(g + row * r.length, s.have);
      if (added) extra[k] = load_raw<T, kFast>(residual + row * r.length, s.have);
    }
    place.load<kRows>(r, s, masked ? c.mask : nullptr, base, bits);
    const int rows = s.rows_at(base, kRows);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      A v[kUnit], h[kUnit], z[kUnit];
      unpack_raw<T>(raw[k], v), unpack_raw<T>(grad[k], h);
      if (kFrom == From::any && c.kept.from_output) {
        unit_from_output<T>(c, s.row_at(base, k) * r.length + s.first, s.have, [&](int i) { return channel[i]; }, v, h);
      } else {
        if constexpr (kFrom != From::gradient) {
          if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
          for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean[i]) * scale[i] + (added ? shift[i] + z[i] : shift[i]);
        }
        unit_before<kFrom, A>(c, z, bits[k], h);
      }
      if (k >= rows || (!kFast && !row_counts(c.shape.valid, s.row_at(base, k)))) continue;
      ++n;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const A centered = v[i] - mean[i];
        if constexpr (sizeof(T) == 2)
          sum[i] += h[i], dot[i] += h[i] * centered;
        else
          sums[i].add(h[i]), dots[i].add_product(h[i], centered);
      }
    }
    pending += kRows;
    if (sizeof(T) == 2 && (pending == kFold || base + kRows * s.step >= s.end)) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        sums[i].add(sum[i]), dots[i].add(dot[i]);
        sum[i] = 0, dot[i] = 0;
      }
      pending = 0;
    }
  }
  double share[kUnit];
  const auto over_threads = [&](const auto& of) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) share[i] = of(i);
    return sum_columns(t.lanes, share);
  };
  const double total = over_threads([&](int i) { return sums[i].value(); });
  const double product = over_threads([&](int i) { return dots[i].value(); });
  const double count = kFast ? 0.0 : over_threads([&](int) { return static_cast<double>(n); });
  const int64_t column = s.tile * t.lanes * kUnit + threadIdx.x;
  double* to = partials_of(c.scratch, r.channels) + sums_each(c.shape) * (column * t.parts + s.part);
  if (static_cast<int>(threadIdx.x) < t.lanes * kUnit && column < r.length)
    keep_sums(to, {total, product}, c.shape, count);
}

template <class T>
void launch_sums(Launcher& launch, const BatchNormBackwardCall& c, const Rows& r, bool fast, From from) {
  if (sums_columns(r)) {
    const Tiles t = tiles_of(r, kColumnBlocks);
    FUSED_OPS_WITH_FROM(fast, from, kFast, kFrom,
                        launch(column_sums<T, kFast, kFrom>, t.across * t.parts, kBlock, c, r, t))
  } else {
    const int64_t each = plane_parts(c.shape);
    FUSED_OPS_WITH_FROM(fast, from, kFast, kFrom,
                        launch(plane_sums<T, kFast, kFrom>, c.shape.channels * each, kBlock, c, each))
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fused_ops

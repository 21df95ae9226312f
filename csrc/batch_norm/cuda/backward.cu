// Batch normalisation on a GPU, backward, in one step from x and the saved statistics.
//
//   z = (x - mean) * scale + shift + residual        h = grad_residual = g * activation'(z)
//   grad_x = scale * (h - mean(h) - (x - mean) * grad_slope)
//   grad_slope = invstd^2 * sum(h * (x - mean)) / (n - correction)
//
// Memory, with N values of e bytes: sums 2 N e (x, g), gradient 3 N e (x and g again, of which the second-level cache
// still has what was read last: grad_x is written from the end), N e more for grad_residual. z is rebuilt, except that
// relu and leaky_relu after a residual read the forward's bit of its sign, N / 8 twice; other activations after a
// residual read that, 2 N e. Sums as the forward's: parts by the shape, merged in order; 16 bytes twice for a part of a
// channel, 24 where positions may not count, which are N / channels more, twice. Three launches, a fourth where the
// sums need the coefficients, and as many for each ghost batch.
//
// Stability: g - mean(g) and x - mean are formed before any scaling. A thread's sums are pairs of floats, to which
// 16-bit values come eight (planes) or some rows (columns) at a time; threads' sums are double. See docs/batch_norm.md.
#include "batch_norm/cuda/channel.cuh"
#include "batch_norm/cuda/gradient.cuh"

namespace fused_ops {
namespace cuda {
namespace {

template <class T>
__device__ inline void set_affine(const BatchNormBackwardCall& c, const Coefficients<acc_t<T>>& k, int64_t channel) {
  const Parameters& p = c.parameters;
  k.set_affine(channel, c.mean[channel], c.invstd[channel] * value_at(p.weight, p.dtype, channel, 1),
               value_at(p.bias, p.dtype, channel, 0));
}

// Where the sums rebuild z, or nothing is summed; else finish_sums does this.
template <class T>
__global__ void __launch_bounds__(kBlock) set_coefficients(BatchNormBackwardCall c) {
  const int64_t channel = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (channel < c.shape.channels) set_affine<T>(c, Coefficients<acc_t<T>>(c.scratch, c.shape.channels), channel);
}

// A part's sums, and how many positions count where not all do.
__device__ inline int64_t sums_each(const BatchNormShape& s) { return s.valid == nullptr ? 2 : 3; }
__device__ inline void keep_sums(double* to, const Pair& s, const BatchNormShape& shape, double n) {
  to[0] = s.a, to[1] = s.b;
  if (shape.valid != nullptr) to[2] = n;
}

// A block a (part, channel), as plane_moments.
template <class T, bool kFast, From kFrom>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 || kFrom == From::any ? 2 : 4)
    plane_sums(BatchNormBackwardCall c, Rows r, int64_t parts) {
  using A = acc_t<T>;
  constexpr int kAhead = kUnitsOf<T, 2>;
  const BatchNormShape& s = c.shape;
  const int64_t part = quotient(blockIdx.x, s.channels), channel = blockIdx.x - part * s.channels;
  const T *x = static_cast<const T*>(c.input), *g = static_cast<const T*>(c.grad_output);
  const T* residual = static_cast<const T*>(c.residual);
  const bool masked = kFrom != From::light && c.mask != nullptr;
  const bool added = kFrom == From::any && c.residual != nullptr && !masked && c.activation != Activation::none;
  const Coefficients<A> coefficients(c.scratch, s.channels);
  const A mean = static_cast<A>(c.mean[channel]);
  A scale = 0, shift = 0;
  if (kFrom != From::gradient) scale = coefficients.scale[channel], shift = coefficients.shift[channel];
  PlaneWalk walk(s, channel, part, parts);
  LongSum<A> sums, dots;
  int64_t n = 0;
  for (int64_t turns = quotient(walk.left + threadIdx.x + kAhead * kBlock - 1, kAhead * kBlock); turns > 0; --turns) {
    Raw<T> raw[kAhead], grad[kAhead], extra[kAhead];
    int have[kAhead];
    unsigned bits[kAhead], counted[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      have[k] = walk.have<kFast>(), bits[k] = 0;
      counted[k] = kFast ? 0u : counted_bits(s.valid, walk.position, have[k]);
      raw[k] = load_raw<T, kFast>(x + walk.at(), have[k]), grad[k] = load_raw<T, kFast>(g + walk.at(), have[k]);
      if (added) extra[k] = load_raw<T, kFast>(residual + walk.at(), have[k]);
      if (masked && kFast) {
        bits[k] = c.mask[walk.at() / kUnit];
      } else if (masked && r.walk == Walk::plane) {
        bits[k] = c.mask[have[k] > 0 ? walk.byte : 0];
      } else if (masked) {  // the bits of a small plane may begin within a byte
        const uint8_t* row = c.mask + quotient(walk.byte, s.channels * walk.units) * r.units;
        for (int j = 0; j < have[k]; ++j) {
          const int64_t bit = channel * s.spatial + walk.unit * kUnit + j;
          bits[k] |= ((row[bit / 8] >> (bit % 8)) & 1u) << j;
        }
      }
      walk.advance();
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      A v[kUnit], h[kUnit], z[kUnit];
      unpack_raw<T>(raw[k], v), unpack_raw<T>(grad[k], h);
      if constexpr (kFrom != From::gradient) {
        if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean) * scale + (added ? shift + z[i] : shift);
      }
      unit_before<kFrom, A>(c, z, bits[k], h);
      A sum = 0, dot = 0;  // of 16-bit values
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const bool there = kFast ? have[k] > 0 : (counted[k] >> i & 1u) != 0;
        const A value = there ? h[i] : A(0), centered = there ? v[i] - mean : A(0);
        if constexpr (sizeof(T) == 2)
          sum += value, dot += value * centered;
        else
          sums.add(value), dots.add_product(value, centered);
      }
      if constexpr (sizeof(T) == 2) sums.add(sum), dots.add(dot);
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
  for (int i = 0; i < kUnit; ++i) {
    mean[i] = static_cast<A>(c.mean[channel[i]]);
  }
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
      if constexpr (kFrom != From::gradient) {
        if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean[i]) * scale[i] + (added ? shift[i] + z[i] : shift[i]);
      }
      unit_before<kFrom, A>(c, z, bits[k], h);
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

// A group of threads a channel: the parameters' gradients and what every value of grad_x needs.
template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock) finish_sums(BatchNormBackwardCall c, int64_t parts) {
  using A = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t channels = c.shape.channels, channel = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kGroup;
  Pair all{0, 0};
  double n = 0;
  const int64_t each = sums_each(c.shape), end = channel < channels ? parts : 0;
  const double* from = partials_of(c.scratch, channels) + each * channel * parts;
  for (int64_t i = lane; i < end; i += kGroup) {
    all = all + Pair{from[each * i], from[each * i + 1]};
    if (each == 3) n += from[each * i + 2];
  }
  all = sum_group<kGroup>(all);
  n = each == 3 ? sum_group<kGroup>(n) : static_cast<double>(c.shape.batch * c.shape.spatial);
  if (lane != 0 || channel >= channels) return;
  const double invstd = c.invstd[channel], low = lost_of<A>(c.mean[channel]);
  const double dot = all.b - low * all.a;  // around the exact mean
  const GhostBatch& g = c.ghost;
  const double grad_weight = (n > 0 ? dot * invstd : 0.0) + (g.first ? 0.0 : g.carried[channel]);
  const double grad_bias = (n > 0 ? all.a : 0.0) + (g.first ? 0.0 : g.carried[channels + channel]);
  if (g.last) {
    set_value(c.grad_weight, c.grad_dtype, channel, grad_weight);
    set_value(c.grad_bias, c.grad_dtype, channel, grad_bias);
  } else {
    g.carried[channel] = grad_weight, g.carried[channels + channel] = grad_bias;
  }
  const Coefficients<A> k(c.scratch, channels);
  set_affine<T>(c, k, channel);
  const double slope = dot * invstd * invstd / (n - static_cast<double>(c.correction));
  k.grad_mean[channel] = static_cast<A>(all.a / n - low * slope);
  k.grad_slope[channel] = static_cast<A>(slope);
}

// A block some units of planes, from the end of the tensor on: the sums' kernel has read that last.
template <class T, bool kFast, From kFrom>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 || kFrom == From::any ? 2 : 4)
    write_planes(BatchNormBackwardCall c, Rows r) {
  using A = acc_t<T>;
  constexpr int kAhead = kUnitsOf<T, 2>;
  const Coefficients<A> coefficients(c.scratch, r.channels);
  const PlaneUnits<kAhead> u(r, int64_t{gridDim.x} - 1 - blockIdx.x);
  const T *x = static_cast<const T*>(c.input), *g = static_cast<const T*>(c.grad_output);
  const T* residual = static_cast<const T*>(c.residual);
  const bool masked = kFrom != From::light && c.mask != nullptr;
  const bool added = kFrom == From::any && c.residual != nullptr && !masked && c.activation != Activation::none;
  const bool centered = c.training && c.grad_input != nullptr;
  Raw<T> raw[kAhead], grad[kAhead], extra[kAhead];
  unsigned bits[kAhead];
  A mean[kAhead], scale[kAhead], shift[kAhead], grad_mean[kAhead], grad_slope[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const int64_t j = u.channel[k];
    mean[k] = coefficients.mean[j], scale[k] = coefficients.scale[j], shift[k] = coefficients.shift[j];
    grad_mean[k] = centered ? coefficients.grad_mean[j] : A(0);
    grad_slope[k] = centered ? coefficients.grad_slope[j] : A(0);
    raw[k] = load_raw<T, kFast>(x + u.at[k], u.have[k]), grad[k] = load_raw<T, kFast>(g + u.at[k], u.have[k]);
    if (added) extra[k] = load_raw<T, kFast>(residual + u.at[k], u.have[k]);
    bits[k] = masked ? c.mask[u.index[k]] : 0u;
  }
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    A v[kUnit], h[kUnit], z[kUnit];
    unpack_raw<T>(raw[k], v), unpack_raw<T>(grad[k], h);
    if constexpr (kFrom != From::gradient) {
      if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean[k]) * scale[k] + (added ? shift[k] + z[i] : shift[k]);
    }
    unit_before<kFrom, A>(c, z, bits[k], h);
    if (!u.exists[k]) continue;
    const unsigned counted = kFast ? 0u : counted_bits(c.shape.valid, u.position[k], u.have[k]);
    if constexpr (!kFast) clear_uncounted(counted, h);
    if (c.grad_residual != nullptr) store_unit<T, kFast>(static_cast<T*>(c.grad_residual) + u.at[k], u.have[k], h);
    if (c.grad_input == nullptr) continue;
    if (centered) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) h[i] = (h[i] - grad_mean[k]) - (v[i] - mean[k]) * grad_slope[k];
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) h[i] *= scale[k];
    if constexpr (!kFast) clear_uncounted(counted, h);
    store_unit<T, kFast>(static_cast<T*>(c.grad_input) + u.at[k], u.have[k], h);
  }
}

// A block a (part of the rows, tile of columns), also from the end. A thread keeps the coefficients of its columns.
template <class T, bool kFast, From kFrom>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 || kFrom == From::any ? 1
                                          : sizeof(T) == 4                     ? 3
                                                                               : 2)
    write_columns(BatchNormBackwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  constexpr int kRows = kUnitsOf<T, 2>;
  const Spot s(r, t, int64_t{gridDim.x} - 1 - blockIdx.x);
  const MaskPlace place(r, s);
  const bool masked = kFrom != From::light && c.mask != nullptr;
  const bool added = kFrom == From::any && c.residual != nullptr && !masked && c.activation != Activation::none;
  const T *x = static_cast<const T*>(c.input) + s.first, *g = static_cast<const T*>(c.grad_output) + s.first;
  const T* residual = static_cast<const T*>(c.residual) + s.first;
  const Coefficients<A> coefficients(c.scratch, r.channels);
  int64_t channel[kUnit];
  A mean[kUnit], scale[kUnit], shift[kUnit], grad_mean[kUnit] = {}, grad_slope[kUnit] = {};
  channels_of(r, s, channel);
  load_columns<kFast>(coefficients.mean, r, s, channel, mean);
  load_columns<kFast>(coefficients.scale, r, s, channel, scale);
  if constexpr (kFrom != From::gradient) load_columns<kFast>(coefficients.shift, r, s, channel, shift);
  const bool centered = c.training && c.grad_input != nullptr;
  if (centered) {
    load_columns<kFast>(coefficients.grad_mean, r, s, channel, grad_mean);
    load_columns<kFast>(coefficients.grad_slope, r, s, channel, grad_slope);
  }
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
    const int rows = s.owner ? s.rows_at(base, kRows) : 0;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = s.first + s.row_at(base, k) * r.length;
      A v[kUnit], h[kUnit], z[kUnit];
      unpack_raw<T>(raw[k], v), unpack_raw<T>(grad[k], h);
      if constexpr (kFrom != From::gradient) {
        if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean[i]) * scale[i] + (added ? shift[i] + z[i] : shift[i]);
      }
      unit_before<kFrom, A>(c, z, bits[k], h);
      if (k >= rows) continue;
      const unsigned counted = kFast || row_counts(c.shape.valid, s.row_at(base, k)) ? (1u << kUnit) - 1u : 0u;
      if constexpr (!kFast) clear_uncounted(counted, h);
      if (c.grad_residual != nullptr) store_unit<T, kFast>(static_cast<T*>(c.grad_residual) + at, s.have, h);
      if (c.grad_input == nullptr) continue;
      if (centered) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) h[i] = (h[i] - grad_mean[i]) - (v[i] - mean[i]) * grad_slope[i];
      }
#pragma unroll
      for (int i = 0; i < kUnit; ++i) h[i] *= scale[i];
      if constexpr (!kFast) clear_uncounted(counted, h);
      store_unit<T, kFast>(static_cast<T*>(c.grad_input) + at, s.have, h);
    }
  }
}

template <class T>
int32_t backward(const BatchNormBackwardCall& call, void* stream) {
  Launcher launch(stream);
  BatchNormBackwardCall c = call;
  if (c.activation == Activation::relu) c.slope = 0;
  const Rows r = rows_of(c.shape);
  const int64_t channels = c.shape.channels, each = partials_each(c.shape);
  const bool some = r.rows * r.units > 0, sums = (c.training && c.grad_input != nullptr) || c.grad_weight != nullptr;
  const bool fast = fast_walk(c.shape, r, {c.input, c.grad_output, c.residual, c.grad_input, c.grad_residual});
  const From from = c.activation == Activation::none || c.mask != nullptr     ? From::gradient
                    : light_activation(c.activation) && c.residual == nullptr ? From::light
                                                                              : From::any;
  const bool columns = sums_columns(r), fast_sums = fast && (columns || c.shape.spatial % kUnit == 0);
  if (!sums || from != From::gradient || !fast_sums) launch(set_coefficients<T>, ceil_div(channels, kBlock), kBlock, c);
  if (sums) {
    if (some && columns) {
      const Tiles t = tiles_of(r, kColumnBlocks);
      FUSED_OPS_WITH_FROM(fast_sums, from, kFast, kFrom,
                          launch(column_sums<T, kFast, kFrom>, t.across * t.parts, kBlock, c, r, t))
    } else if (some) {
      FUSED_OPS_WITH_FROM(fast_sums, from, kFast, kFrom,
                          launch(plane_sums<T, kFast, kFrom>, channels * each, kBlock, c, r, each))
    }
    const int64_t parts = some ? each : 0;
    if (parts > kFewParts)
      launch(finish_sums<T, kBlock>, channels, kBlock, c, parts);
    else
      launch(finish_sums<T, 32>, ceil_div(channels * 32, kBlock), kBlock, c, parts);
  }
  if (!some || (c.grad_input == nullptr && c.grad_residual == nullptr)) return launch.error();
  if (r.walk == Walk::column) {
    const Tiles t = tiles_of(r, kWriteBlocks);
    FUSED_OPS_WITH_FROM(fast, from, kFast, kFrom,
                        launch(write_columns<T, kFast, kFrom>, t.across * t.parts, kBlock, c, r, t))
  } else {
    const int64_t blocks = ceil_div(r.rows * r.units, kBlock * kUnitsOf<T, 2>);
    FUSED_OPS_WITH_FROM(fast, from, kFast, kFrom, launch(write_planes<T, kFast, kFrom>, blocks, kBlock, c, r))
  }
  return launch.error();
}

}  // namespace

int32_t batch_norm_backward(const BatchNormBackwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

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
#include "batch_norm/cuda/gradient_sums.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// Where the sums rebuild z, or nothing is summed; else finish_sums does this.
template <class T>
__global__ void __launch_bounds__(kBlock) set_coefficients(BatchNormBackwardCall c) {
  const int64_t channels = c.shape.channels, channel = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (channel >= channels) return;
  const Coefficients<acc_t<T>> k(c.scratch, channels);
  set_backward(c, channel, deviation_of<acc_t<T>>(c, channel), k, channel);
  if (c.means != nullptr) k.set_means(channel, c.mean[channel], c.means[channel], c.means[channels + channel]);
}

// A group of threads a channel: merges its sums, and sets the parameters' gradients and what grad_x needs; or, for a
// batch spread over processes, only says what it has found.
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
  if (c.sums != nullptr)
    c.sums[channel] = all.a, c.sums[channels + channel] = all.b - lost_of<A>(c.mean[channel]) * all.a;
  else
    finish_gradient(c, channel, all, n, Coefficients<A>(c.scratch, channels), channel);
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
    if (kFrom == From::any && c.kept.from_output) {
      const int have = u.exists[k] ? u.have[k] : 0;
      unit_from_output<T>(c, u.at[k], have, [&](int) { return u.channel[k]; }, v, h);
    } else {
      if constexpr (kFrom != From::gradient) {
        if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean[k]) * scale[k] + (added ? shift[k] + z[i] : shift[k]);
      }
      unit_before<kFrom, A>(c, z, bits[k], h);
    }
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
      if (kFrom == From::any && c.kept.from_output) {
        unit_from_output<T>(c, at, s.have, [&](int i) { return channel[i]; }, v, h);
      } else {
        if constexpr (kFrom != From::gradient) {
          if (added) unpack_raw<T>(extra[k], z);
#pragma unroll
          for (int i = 0; i < kUnit; ++i) z[i] = (v[i] - mean[i]) * scale[i] + (added ? shift[i] + z[i] : shift[i]);
        }
        unit_before<kFrom, A>(c, z, bits[k], h);
      }
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
  const bool some = r.rows * r.units > 0;
  const bool sums = c.sums != nullptr || (c.means == nullptr && reduces(c));
  const bool fast = fast_walk<T>(c.shape, r, {c.input, c.grad_output, c.residual, c.grad_input, c.grad_residual});
  const From from = c.kept.from_output                                        ? From::any
                    : c.activation == Activation::none || c.mask != nullptr   ? From::gradient
                    : light_activation(c.activation) && c.residual == nullptr ? From::light
                                                                              : From::any;
  const bool columns = sums_columns(r), fast_sums = fast && (columns || c.shape.spatial % kUnit == 0);
  if (!sums || from != From::gradient || !fast_sums) launch(set_coefficients<T>, ceil_div(channels, kBlock), kBlock, c);
  if (sums) {
    if (some) launch_sums<T>(launch, c, r, fast_sums, from);
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
  if (call.packed) return batch_norm_packed_backward(call, stream);
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

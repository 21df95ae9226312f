// Batch normalisation on a GPU, forward.
//
//   mean, M2 of each channel;  y = activation((x - mean) * scale + shift + residual)
//
// Memory, with N values of e bytes: statistics N e, output 2 N e (x, of which the second-level cache still has what was
// read last: the output is written from the end), N e more with a residual, N / 8 where the backward wants the sign of
// z, N / channels twice where positions may not count. Three launches, and as many for each further ghost batch, which
// is a slice of the batch as it lies in memory. A channel's values are cut into parts by the shape alone, a block each,
// so that few channels or a small batch still fill the chip; a warp or a block a channel merges the parts in order: no
// float atomics, the same bits always. A part of a channel costs 24 bytes twice.
//
// Stability: statistics.cuh. x - mean comes before any scaling. See docs/batch_norm.md. A small tensor: packed.cu.
#include "batch_norm/cuda/activation.cuh"
#include "batch_norm/cuda/mask.cuh"
#include "batch_norm/cuda/statistics.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// A group of threads a channel: merges its parts (none in evaluation), sets the coefficients and running statistics;
// or, for a batch spread over processes, only says what it has found: how many values count, how many there are, the
// means and M2.
template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock) finish_statistics(BatchNormForwardCall c, int64_t parts) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t channels = c.shape.channels, channel = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kGroup;
  Moments all{0, 0, 0};
  if (c.training)
    all =
        merged_moments<kGroup>(partials_of(c.scratch, channels) + 3 * channel * parts, channel < channels ? parts : 0);
  if (lane != 0) return;
  if (c.moments != nullptr) {
    if (channel == 0) c.moments[0] = all.n, c.moments[1] = static_cast<double>(c.shape.batch * c.shape.spatial);
    if (channel < channels) c.moments[2 + channel] = all.mean, c.moments[2 + channels + channel] = all.m2;
  } else if (channel < channels) {
    finish_moments(c, channel, all, Coefficients<acc_t<T>>(c.scratch, channels), channel);
  }
}

// z of a unit, its activation, and the bits of z's sign.
template <class T, bool kLight, bool kResidual>
__device__ inline unsigned activate_unit(const BatchNormForwardCall& c, int have, acc_t<T>* z) {
  using A = acc_t<T>;
  const unsigned bits = kResidual && c.mask != nullptr ? sign_bits(have, z) : 0u;
  if constexpr (kLight)
    activate_light<kUnit>(c.activation, z, static_cast<A>(c.slope));
  else
    activate<kUnit>(c.activation, z, static_cast<A>(c.slope));
  return bits;
}

// A block some units of planes, from the end of the tensor on: the statistics' kernel has read that last.
template <class T, bool kFast, bool kLight, bool kResidual>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 2
                                          : kLight       ? 4
                                                         : 3) apply_planes(BatchNormForwardCall c, Rows r) {
  using A = acc_t<T>;
  constexpr int kAhead = kUnitsOf<T, 1 + kResidual>;
  const Coefficients<A> coefficients(c.scratch, r.channels);
  const PlaneUnits<kAhead> u(r, int64_t{gridDim.x} - 1 - blockIdx.x);
  const T *x = static_cast<const T*>(c.input), *residual = static_cast<const T*>(c.residual);
  Raw<T> raw[kAhead], extra[kAhead];
  A mean[kAhead], scale[kAhead], shift[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    raw[k] = load_raw<T, kFast>(x + u.at[k], u.have[k]);
    mean[k] = coefficients.mean[u.channel[k]], scale[k] = coefficients.scale[u.channel[k]];
    shift[k] = coefficients.shift[u.channel[k]];
  }
  if constexpr (kResidual) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) extra[k] = load_raw<T, kFast>(residual + u.at[k], u.have[k]);
  }
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    A z[kUnit], more[kUnit];
    unpack_raw<T>(raw[k], z);
    if constexpr (kResidual) unpack_raw<T>(extra[k], more);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) z[i] = (z[i] - mean[k]) * scale[k] + (kResidual ? shift[k] + more[i] : shift[k]);
    const unsigned bits = activate_unit<T, kLight, kResidual>(c, u.have[k], z);
    if (!u.exists[k]) continue;
    if (kResidual && c.mask != nullptr) c.mask[u.index[k]] = static_cast<uint8_t>(bits);
    if constexpr (!kFast) clear_uncounted(counted_bits(c.shape.valid, u.position[k], u.have[k]), z);
    store_unit<T, kFast>(static_cast<T*>(c.output) + u.at[k], u.have[k], z);
  }
}

// A block a (part of the rows, tile of columns), also from the end. A thread keeps the coefficients of its columns.
template <class T, bool kFast, bool kLight, bool kResidual>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 1
                                          : kLight       ? 3
                                                         : 2) apply_columns(BatchNormForwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  constexpr int kRows = kUnitsOf<T, 1 + kResidual>;
  const Spot s(r, t, int64_t{gridDim.x} - 1 - blockIdx.x);
  const MaskWriter writer(r, s);  // a mask comes with a residual only
  const Coefficients<A> coefficients(c.scratch, r.channels);
  int64_t channel[kUnit];
  A mean[kUnit], scale[kUnit], shift[kUnit];
  channels_of(r, s, channel);
  load_columns<kFast>(coefficients.mean, r, s, channel, mean);
  load_columns<kFast>(coefficients.scale, r, s, channel, scale);
  load_columns<kFast>(coefficients.shift, r, s, channel, shift);
  const T *x = static_cast<const T*>(c.input) + s.first, *residual = static_cast<const T*>(c.residual) + s.first;
  T* y = static_cast<T*>(c.output) + s.first;
  for (int64_t base = s.begin; base < s.end; base += kRows * s.step) {
    Raw<T> raw[kRows], extra[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) raw[k] = load_raw<T, kFast>(x + s.row_at(base, k) * r.length, s.have);
    if constexpr (kResidual) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) extra[k] = load_raw<T, kFast>(residual + s.row_at(base, k) * r.length, s.have);
    }
    const int rows = s.owner ? s.rows_at(base, kRows) : 0;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      A z[kUnit], more[kUnit];
      unpack_raw<T>(raw[k], z);
      if constexpr (kResidual) unpack_raw<T>(extra[k], more);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) z[i] = (z[i] - mean[i]) * scale[i] + (kResidual ? shift[i] + more[i] : shift[i]);
      const unsigned bits = activate_unit<T, kLight, kResidual>(c, s.have, z);
      if (kResidual && c.mask != nullptr) writer.store(r, c.mask, s.row_at(base, k), k < rows, bits);
      if (!kFast && !row_counts(c.shape.valid, s.row_at(base, k))) clear_uncounted(0u, z);
      if (k < rows) store_unit<T, kFast>(y + s.row_at(base, k) * r.length, s.have, z);
    }
  }
}

template <class T, bool kFast, bool kLight, bool kResidual>
void write(Launcher& launch, const BatchNormForwardCall& c, const Rows& r) {
  if (r.walk == Walk::column) {
    const Tiles tiles = tiles_of(r, kWriteBlocks, c.mask != nullptr && r.plane_mask);
    launch(apply_columns<T, kFast, kLight, kResidual>, tiles.across * tiles.parts, kBlock, c, r, tiles);
  } else {
    launch(apply_planes<T, kFast, kLight, kResidual>, ceil_div(r.rows * r.units, kBlock * kUnitsOf<T, 1 + kResidual>),
           kBlock, c, r);
  }
}

template <class T, bool kFast, bool kLight>
void write_with(Launcher& launch, const BatchNormForwardCall& c, const Rows& r) {
  FUSED_OPS_WITH_BOOL(c.residual != nullptr, kResidual, write<T, kFast, kLight, kResidual>(launch, c, r);)
}

template <class T>
void write_all(Launcher& launch, const BatchNormForwardCall& c, const Rows& r, bool fast) {
  if (r.rows * r.units == 0) return;
  if constexpr (sizeof(T) < 8) {
    if (fast && light_activation(c.activation)) return write_with<T, true, true>(launch, c, r);
    if (fast) return write_with<T, true, false>(launch, c, r);
  }
  write_with<T, false, false>(launch, c, r);
}

template <class T>
int32_t forward(const BatchNormForwardCall& c, void* stream) {
  Launcher launch(stream);
  const Rows r = rows_of(c.shape);
  const bool some = r.rows * r.units > 0;
  const bool fast = fast_walk<T>(c.shape, r, {c.input, c.residual, c.output});
  if (c.training && some) launch_moments<T>(launch, c, r, fast);
  const int64_t parts = some ? partials_each(c.shape) : 0;  // nothing was summed of an empty tensor
  const int64_t channels = std::max<int64_t>(c.shape.channels, c.moments != nullptr);  // which tells the number too
  if (parts > kFewParts)
    launch(finish_statistics<T, kBlock>, channels, kBlock, c, parts);
  else
    launch(finish_statistics<T, 32>, ceil_div(channels * 32, kBlock), kBlock, c, parts);
  if (c.moments == nullptr) write_all<T>(launch, c, r, fast);
  return launch.error();
}

}  // namespace

int64_t batch_norm_scratch(const BatchNormShape& shape) {
  return shape.channels * (kCoefficients + 3 * partials_each(shape));
}

int32_t batch_norm_forward(const BatchNormForwardCall& call, void* stream) {
  if (call.packed) return batch_norm_packed_forward(call, stream);
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return forward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

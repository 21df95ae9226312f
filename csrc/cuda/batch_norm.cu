// Batch normalisation on a GPU, forward.
//
//   mean, M2 of each channel;  y = activation((x - mean) * scale + shift + residual)
//
// Memory: reads x twice (once in evaluation) and the residual once, writes y once, and a bit a value where the backward
// wants the sign of z. A channel's values are cut into parts by the shape alone, a block each, so that few channels or
// a small batch still fill the chip; a warp a channel merges the parts in order: no float atomics, the same bits
// always.
//
// Stability: eight (sixteen) values at a time around their own mean, from there in double around a shift; parts merge
// as Chan et al. x - mean comes before any scaling. See docs/batch_norm.md.
#include "batch_norm_walk.cuh"

namespace fused_ops {
namespace cuda {
namespace {

__device__ inline void keep_moments(double* to, const Moments& m) { to[0] = m.mean, to[1] = m.m2, to[2] = m.n; }

// A block a (channel, part): planes.
template <class T>
__global__ void __launch_bounds__(kBlock) plane_moments(BatchNormForwardCall c, int64_t parts) {
  using A = acc_t<T>;
  const BatchNormShape& s = c.shape;
  const int64_t channel = blockIdx.x / parts, part = blockIdx.x - channel * parts;
  const int64_t units = (s.spatial + kUnit - 1) / kUnit, total = s.batch * units;
  const int64_t each = (total + parts - 1) / parts, end = (part + 1) * each < total ? (part + 1) * each : total;
  Shifted sums;
#pragma unroll 2
  for (int64_t i = part * each + threadIdx.x; i < end; i += kBlock) {
    const int64_t b = quotient(i, units), first = (i - b * units) * kUnit, left = s.spatial - first;
    const int have = left < kUnit ? static_cast<int>(left) : kUnit;
    A v[kUnit];
    load_unit(static_cast<const T*>(c.input) + (b * s.channels + channel) * s.spatial + first, have, v);
    sums.add<kUnit>(v, have);
  }
  const Moments all =
      reduce_group<kBlock>(sums.moments(), [](const Moments& a, const Moments& b) { return merged(a, b); });
  if (threadIdx.x == 0) keep_moments(partials_of(c.scratch, s.channels) + 3 * int64_t{blockIdx.x}, all);
}

// A block a (tile of columns, part of the rows): a thread a column, kColumnRows rows at a time.
template <class T>
__global__ void __launch_bounds__(kBlock) column_moments(BatchNormForwardCall c, int64_t parts) {
  using A = acc_t<T>;
  constexpr int kWarps = kBlock / kTileColumns;
  const int lane = static_cast<int>(threadIdx.x) % kTileColumns, warp = static_cast<int>(threadIdx.x) / kTileColumns;
  const int64_t channels = c.shape.channels, rows = c.shape.batch * c.shape.spatial;
  const int64_t tile = blockIdx.x / parts, part = blockIdx.x - tile * parts, channel = tile * kTileColumns + lane;
  const int64_t each = (rows + parts - 1) / parts, end = (part + 1) * each < rows ? (part + 1) * each : rows;
  Shifted sums;
  for (int64_t row = part * each + warp * kColumnRows; channel < channels && row < end; row += kWarps * kColumnRows) {
    const T* x = static_cast<const T*>(c.input) + row * channels + channel;
    const int have = end - row < kColumnRows ? static_cast<int>(end - row) : kColumnRows;
    A v[kColumnRows];
#pragma unroll
    for (int k = 0; k < kColumnRows; ++k) v[k] = k < have ? to_acc(x[k * channels]) : A(0);
    sums.add<kColumnRows>(v, have);
  }
  __shared__ Moments shares[kBlock];
  Moments all = sums.moments();
  shares[threadIdx.x] = all;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  for (int w = 1; w < kWarps; ++w) all = merged(all, shares[w * kTileColumns + lane]);
  keep_moments(partials_of(c.scratch, channels) + 3 * (channel * parts + part), all);
}

// A warp a channel: merges its parts (none in evaluation), sets the coefficients and the running statistics.
template <class T>
__global__ void __launch_bounds__(kBlock) finish_statistics(BatchNormForwardCall c, int64_t parts) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t channels = c.shape.channels, channel = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / 32;
  const Parameters& p = c.parameters;
  Moments all{0, 0, 0};
  const double* from = partials_of(c.scratch, channels) + 3 * channel * parts;
  for (int64_t i = lane; c.training && channel < channels && i < parts; i += 32)
    all = merged(all, {from[3 * i], from[3 * i + 1], from[3 * i + 2]});
  all = reduce_group<32>(all, [](const Moments& a, const Moments& b) { return merged(a, b); });
  if (lane != 0 || channel >= channels) return;
  double mean = value_at(p.running_mean, p.dtype, channel, 0), variance = value_at(p.running_var, p.dtype, channel, 1);
  if (c.training) {
    const double old_mean = mean, old_variance = variance;
    mean = all.n > 0 ? all.mean : kNaN<double>;
    variance = all.n > 0 ? all.m2 / (all.n - static_cast<double>(c.correction)) : kNaN<double>;
    const double fresh = all.n > 0 ? c.momentum : 0, kept = all.n > 0 ? 1 - c.momentum : 1;
    set_value(c.new_mean, p.dtype, channel, all.n > 0 ? fresh * mean + kept * old_mean : old_mean);
    set_value(c.new_var, p.dtype, channel,
              all.n > 0 ? fresh * (all.m2 / (all.n - 1)) + kept * old_variance : old_variance);
  }
  const double invstd = 1.0 / sqrt(variance + c.eps);
  c.mean[channel] = mean, c.invstd[channel] = invstd;
  const Coefficients<acc_t<T>> k(c.scratch, channels);
  k.set_affine(channel, mean, invstd * value_at(p.weight, p.dtype, channel, 1), value_at(p.bias, p.dtype, channel, 0));
}

template <class T, Walk kWalk>
__global__ void __launch_bounds__(kBlock) apply(BatchNormForwardCall c, Rows r) {
  using A = acc_t<T>;
  const Coefficients<A> k(c.scratch, r.channels);
  const int64_t total = r.rows * r.units;
  for (int64_t index = int64_t{blockIdx.x} * kBlock + threadIdx.x; index < total;
       index += int64_t{gridDim.x} * kBlock) {
    const Unit u = unit_at(r, index);
    int64_t channel[kUnit];
    A z[kUnit], extra[kUnit];
    load_unit(static_cast<const T*>(c.input) + u.at, u.have, z);
    if (c.residual != nullptr) load_unit(static_cast<const T*>(c.residual) + u.at, u.have, extra);
    channels_of<kWalk>(r, u, channel);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const A shift = k.shift[channel[i]];
      z[i] = (z[i] - k.mean[channel[i]]) * k.scale[channel[i]] + (c.residual != nullptr ? shift + extra[i] : shift);
    }
    if (c.mask != nullptr) {
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) bits |= i < u.have && !(z[i] <= A(0)) ? 1u << i : 0u;
      c.mask[index] = static_cast<uint8_t>(bits);
    }
    activate<kUnit>(c.activation, z, static_cast<A>(c.slope));
    store_unit(static_cast<T*>(c.output) + u.at, u.have, z);
  }
}

template <class T>
int32_t forward(const BatchNormForwardCall& c, void* stream) {
  Launcher launch(stream);
  const Rows r = rows_of(c.shape);
  const int64_t parts = parts_of(c.shape), channels = c.shape.channels;
  if (c.training && r.walk == Walk::column)
    launch(column_moments<T>, ceil_div(channels, kTileColumns) * parts, kBlock, c, parts);
  else if (c.training)
    launch(plane_moments<T>, channels * parts, kBlock, c, parts);
  launch(finish_statistics<T>, ceil_div(channels * 32, kBlock), kBlock, c, parts);
  const int64_t blocks = std::min(ceil_div(r.rows * r.units, kBlock), kWriteBlocks);
  FUSED_OPS_WITH_WALK(r.walk, kWalk, launch(apply<T, kWalk>, blocks, kBlock, c, r))
  return launch.error();
}

}  // namespace

int64_t batch_norm_scratch(const BatchNormShape& shape) {
  return shape.channels * (kCoefficients + 3 * parts_of(shape));
}

int32_t batch_norm_forward(const BatchNormForwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return forward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

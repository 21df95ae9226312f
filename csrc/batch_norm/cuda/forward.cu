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
// Stability: some values at a time around the first of them, from there in double around a shift; shifts are merged
// around the mean of all (Chan et al., all at once). x - mean comes before any scaling. See docs/batch_norm.md.
#include "batch_norm/cuda/activation.cuh"
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
  Shifted<A, double> sums;
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

// A block a (part of the rows, tile of columns): a thread eight columns.
template <class T, bool kFast>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 1 : 2)
    column_moments(BatchNormForwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  constexpr int kRows = 2 * kUnitsOf<T, 1>;
  const Spot s(r, t, blockIdx.x);
  const T* x = static_cast<const T*>(c.input) + s.first;
  const uint8_t* valid = kFast ? nullptr : c.shape.valid;
  const bool masked = valid != nullptr;
  Shifted<A, A> sums[kUnit];
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
  __shared__ double means[kBlock];
  const double count = static_cast<double>(n);
  double v[kUnit], all = static_cast<double>(s.end - s.begin);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = count;
  if (masked) all = sum_columns(t.lanes, v);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = sums[k].total(count);
  const double sum_of_all = sum_columns(t.lanes, v), mean = all > 0 ? sum_of_all / all : 0.0;
  means[threadIdx.x] = mean;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = sums[k].around(means[s.lane * kUnit + k], count).a;
  const double sum = sum_columns(t.lanes, v);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = sums[k].around(means[s.lane * kUnit + k], count).b;
  const double squares = sum_columns(t.lanes, v);
  const int64_t column = s.tile * t.lanes * kUnit + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < t.lanes * kUnit && column < r.length)
    keep_moments(partials_of(c.scratch, r.channels) + 3 * (column * t.parts + s.part),
                 moments_around(mean, {sum, squares}, all));
}

// A group of threads a channel: merges its parts (none in evaluation), sets the coefficients and running statistics.
template <class T, int kGroup>
__global__ void __launch_bounds__(kBlock) finish_statistics(BatchNormForwardCall c, int64_t parts) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t channels = c.shape.channels, channel = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kGroup;
  const Parameters& p = c.parameters;
  Moments all{0, 0, 0};
  if (c.training) {
    const double* from = partials_of(c.scratch, channels) + 3 * channel * parts;
    const int64_t end = channel < channels ? parts : 0;
    double total = 0, n = 0;
    for (int64_t i = lane; i < end; i += kGroup) total += from[3 * i] * from[3 * i + 2], n += from[3 * i + 2];
    all = group_moments<kGroup>(total, n, [&](double near) {
      Pair sums{0, 0};
      for (int64_t i = lane; i < end; i += kGroup) {
        const double d = from[3 * i] - near, count = from[3 * i + 2];
        sums = sums + Pair{count * d, from[3 * i + 1] + count * d * d};
      }
      return sums;
    });
  }
  if (lane != 0 || channel >= channels) return;
  const GhostBatch& g = c.ghost;
  double mean = g.first ? value_at(p.running_mean, p.dtype, channel, 0) : g.carried[channel];
  double variance = g.first ? value_at(p.running_var, p.dtype, channel, 1) : g.carried[channels + channel];
  if (c.training) {
    const double old_mean = mean, old_variance = variance;
    mean = all.n > 0 ? all.mean : kNaN<double>;
    variance = all.n > 0 ? all.m2 / (all.n - static_cast<double>(c.correction)) : kNaN<double>;
    const double fresh = all.n > 0 ? c.momentum : 0, kept = all.n > 0 ? 1 - c.momentum : 1;
    const double new_mean = all.n > 0 ? fresh * mean + kept * old_mean : old_mean;
    const double new_variance = all.n > 0 ? fresh * (all.m2 / (all.n - 1)) + kept * old_variance : old_variance;
    if (g.last) {
      set_value(c.new_mean, p.dtype, channel, new_mean), set_value(c.new_var, p.dtype, channel, new_variance);
    } else {
      g.carried[channel] = new_mean, g.carried[channels + channel] = new_variance;
    }
  }
  const double invstd = 1.0 / sqrt(variance + c.eps);
  c.mean[channel] = mean, c.invstd[channel] = invstd;
  const Coefficients<acc_t<T>> k(c.scratch, channels);
  k.set_affine(channel, mean, invstd * value_at(p.weight, p.dtype, channel, 1), value_at(p.bias, p.dtype, channel, 0));
}

// z of a unit, its activation, and the bits of z's sign.
template <class T, bool kLight, bool kResidual>
__device__ inline unsigned activate_unit(const BatchNormForwardCall& c, int have, acc_t<T>* z) {
  using A = acc_t<T>;
  unsigned bits = 0;
  if (kResidual && c.mask != nullptr) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) bits |= i < have && !(z[i] <= A(0)) ? 1u << i : 0u;
  }
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
int32_t forward(const BatchNormForwardCall& c, void* stream) {
  Launcher launch(stream);
  const Rows r = rows_of(c.shape);
  const int64_t channels = c.shape.channels, each = partials_each(c.shape);
  const bool columns = sums_columns(r), fast = fast_walk(c.shape, r, {c.input, c.residual, c.output});
  const Tiles sums = tiles_of(r, kColumnBlocks);
  if (c.training && r.rows * r.units > 0) {
    FUSED_OPS_WITH_BOOL(fast && (columns || c.shape.spatial % kUnit == 0), kFast, {
      if (columns)
        launch(column_moments<T, kFast>, sums.across * sums.parts, kBlock, c, r, sums);
      else
        launch(plane_moments<T, kFast>, channels * each, kBlock, c, each);
    })
  }
  // Nothing was summed of an empty tensor.
  const int64_t parts = r.rows * r.units > 0 ? each : 0;
  if (parts > kFewParts)
    launch(finish_statistics<T, kBlock>, channels, kBlock, c, parts);
  else
    launch(finish_statistics<T, 32>, ceil_div(channels * 32, kBlock), kBlock, c, parts);
  if (r.rows * r.units == 0) return launch.error();
  if (fast && light_activation(c.activation))
    write_with<T, true, true>(launch, c, r);
  else if (fast)
    write_with<T, true, false>(launch, c, r);
  else
    write_with<T, false, false>(launch, c, r);
  return launch.error();
}

}  // namespace

int64_t batch_norm_scratch(const BatchNormShape& shape) {
  return shape.channels * (kCoefficients + 3 * partials_each(shape));
}

int32_t batch_norm_forward(const BatchNormForwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return forward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

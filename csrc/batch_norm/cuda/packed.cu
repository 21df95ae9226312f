// Batch normalisation of a small tensor on a GPU: one launch a direction, where a channel's values fit a block.
//
//   The equations, and the order of steps for stability, are those of forward.cu and backward.cu.
//
// Memory, with N values of e bytes: forward 2 N e (x once, y), backward 3 N e (x and g once, grad_x), and as much more
// as those for a residual, its mask or its gradient: what a thread has read stays in its registers. No scratch memory:
// the coefficients are in shared memory. A block has one channel (planes), or eight channels for each of its lanes
// (columns). float64, which checks of gradients are in, takes the three launches, and so needs no kernels here.
#include "batch_norm/cuda/gradient_sums.cuh"
#include "batch_norm/cuda/statistics.cuh"

namespace fused_ops {
namespace cuda {
namespace {

constexpr int kPackedUnits = 2;             // of planes that a thread has
constexpr int kPackedRows = 4;              // of columns that a thread has
constexpr int64_t kPackedValues = 1 << 20;  // of all channels: beyond, kernels that load faster pay
constexpr int kCoefficientsOfBlock = kCoefficients * 32 * kUnit;  // of as many columns as a block may have

// A block's tile: every row, of as many columns as leave the threads no more rows than they have registers for.
inline Tiles packed_tiles(const Rows& r) {
  Tiles t{lanes_of(r.units), 0, 0, 1, r.rows};
  while (t.lanes > 4 && kBlock / t.lanes * kPackedRows < r.rows) t.lanes /= 2;
  t.step = t.lanes, t.across = ceil_div(r.units, t.step);
  return t;
}

// ---- planes: a block a channel

struct PackedPlanes {
  int64_t at[kPackedUnits], byte[kPackedUnits];
  int have[kPackedUnits];
  unsigned counted[kPackedUnits], bits[kPackedUnits];

  // The units of a thread, of which each(this, k, walk) is called for the k-th.
  template <class Each>
  __device__ PackedPlanes(const BatchNormShape& s, int64_t channel, const Each& each) {
    PlaneWalk walk(s, channel, 0, 1);
#pragma unroll
    for (int k = 0; k < kPackedUnits; ++k) {
      have[k] = walk.have<false>(), at[k] = walk.at(), byte[k] = walk.byte, bits[k] = 0;
      counted[k] = counted_bits(s.valid, walk.position, have[k]);
      each(*this, k, walk);
      walk.advance();
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, 2) packed_plane_forward(BatchNormForwardCall c) {
  using A = acc_t<T>;
  const int64_t channel = blockIdx.x;
  A v[kPackedUnits][kUnit];
  Shifted<A> sums;
  int64_t n = 0;
  const PackedPlanes u(c.shape, channel, [&](const PackedPlanes& u, int k, const PlaneWalk&) {
    load_unit(static_cast<const T*>(c.input) + u.at[k], u.have[k], v[k]);
    A counting[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) counting[i] = v[k][i];
    const int count = replace_uncounted<kUnit>(u.counted[k], counting);
    if (count > 0) sums.template add<kUnit>(counting, count, n == 0, All{});
    n += count;
  });
  Moments all{0, 0, 0};
  if (c.training) {
    const double count = static_cast<double>(n);
    all = group_moments<kBlock>(sums.total(count), count, [&](double near) { return sums.around(near, count); });
  }
  __shared__ double memory[kCoefficients];
  const Coefficients<A> coefficients(memory, 1);
  if (threadIdx.x == 0) finish_moments(c, channel, all, coefficients, 0);
  __syncthreads();
  const A mean = coefficients.mean[0], scale = coefficients.scale[0], shift = coefficients.shift[0];
#pragma unroll
  for (int k = 0; k < kPackedUnits; ++k) {
    A more[kUnit] = {};
    if (c.residual != nullptr) load_unit(static_cast<const T*>(c.residual) + u.at[k], u.have[k], more);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[k][i] = (v[k][i] - mean) * scale + (shift + more[i]);
    if (c.mask != nullptr && u.have[k] > 0) c.mask[u.byte[k]] = static_cast<uint8_t>(sign_bits(u.have[k], v[k]));
    activate<kUnit>(c.activation, v[k], static_cast<A>(c.slope));
    clear_uncounted(u.counted[k], v[k]);
    store_unit<T, false>(static_cast<T*>(c.output) + u.at[k], u.have[k], v[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock, 2) packed_plane_backward(BatchNormBackwardCall c) {
  using A = acc_t<T>;
  const int64_t channel = blockIdx.x;
  __shared__ double memory[kCoefficients];
  const Coefficients<A> coefficients(memory, 1);
  if (threadIdx.x == 0) coefficients.set_affine(0, channel, c.parameters, c.mean[channel], c.invstd[channel]);
  __syncthreads();
  const A mean = coefficients.mean[0], scale = coefficients.scale[0], shift = coefficients.shift[0];
  const bool rebuilt = c.mask == nullptr && c.activation != Activation::none;
  A v[kPackedUnits][kUnit], h[kPackedUnits][kUnit];
  LongSum<A> sums, dots;
  int64_t n = 0;
  const PackedPlanes u(c.shape, channel, [&](PackedPlanes& u, int k, const PlaneWalk& walk) {
    load_unit(static_cast<const T*>(c.input) + u.at[k], u.have[k], v[k]);
    load_unit(static_cast<const T*>(c.grad_output) + u.at[k], u.have[k], h[k]);
    if (c.mask != nullptr) u.bits[k] = plane_bits(c, walk, channel, u.have[k]);
    A z[kUnit] = {};
    if (rebuilt && c.residual != nullptr) load_unit(static_cast<const T*>(c.residual) + u.at[k], u.have[k], z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[k][i] -= mean, z[i] = v[k][i] * scale + (shift + z[i]);
    before_activation<kUnit>(c, z, u.bits[k], h[k]);
    clear_uncounted(u.counted[k], h[k]), clear_uncounted(u.counted[k], v[k]);
    add_unit<T>(h[k], v[k], sums, dots);
    n += __popc(u.counted[k]);
  });
  if (reduces(c)) {
    const Pair all = sum_group<kBlock>(Pair{sums.value(), dots.value()});
    const double count = sum_group<kBlock>(static_cast<double>(n));
    if (threadIdx.x == 0) finish_gradient(c, channel, all, count, coefficients, 0);
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kPackedUnits; ++k) {
    if (c.grad_residual != nullptr) store_unit<T, false>(static_cast<T*>(c.grad_residual) + u.at[k], u.have[k], h[k]);
    if (c.grad_input == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (c.training) h[k][i] = (h[k][i] - coefficients.grad_mean[0]) - v[k][i] * coefficients.grad_slope[0];
      h[k][i] *= scale;
    }
    clear_uncounted(u.counted[k], h[k]);
    store_unit<T, false>(static_cast<T*>(c.grad_input) + u.at[k], u.have[k], h[k]);
  }
}

// ---- columns: a block a tile of them

// A thread's rows: where they are, and the bits of those that count.
struct PackedRows {
  int64_t at[kPackedRows];
  int rows;
  unsigned counted = 0;

  __device__ PackedRows(const BatchNormShape& shape, const Rows& r, const Spot& s) : rows(s.rows_at(0, kPackedRows)) {
#pragma unroll
    for (int k = 0; k < kPackedRows; ++k) {
      at[k] = s.row_at(0, k) * r.length + s.first;
      counted |= k < rows && row_counts(shape.valid, s.row_at(0, k)) ? 1u << k : 0u;
    }
  }
  __device__ bool counts(int k) const { return (counted >> k & 1u) != 0; }
};

// The thread's column of the tile if it has one whose results it sets, or -1.
__device__ inline int64_t column_of(const Rows& r, const Tiles& t, const Spot& s) {
  const int64_t column = s.tile * t.lanes * kUnit + threadIdx.x;
  return static_cast<int>(threadIdx.x) < t.lanes * kUnit && column < r.length ? column : -1;
}

template <class T>
__global__ void __launch_bounds__(kBlock, 1) packed_column_forward(BatchNormForwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  const Spot s(r, t, blockIdx.x);
  const PackedRows u(c.shape, r, s);
  A v[kPackedRows][kUnit];
#pragma unroll
  for (int k = 0; k < kPackedRows; ++k) load_unit(static_cast<const T*>(c.input) + u.at[k], s.have, v[k]);
  Moments all{0, 0, 0};
  if (c.training) {
    Shifted<A> sums[kUnit];
    const int n = __popc(u.counted);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      A column[kPackedRows];
#pragma unroll
      for (int k = 0; k < kPackedRows; ++k) column[k] = v[k][i];
      replace_uncounted<kPackedRows>(u.counted, column);
      if (n > 0) sums[i].template add<kPackedRows>(column, n, true, All{});
    }
    all = column_moments_of_block(t.lanes, s.lane, sums, n, r.rows, c.shape.valid != nullptr);
  }
  __shared__ double memory[kCoefficientsOfBlock];
  const Coefficients<A> coefficients(memory, t.lanes * kUnit);
  const int64_t column = column_of(r, t, s);
  if (column >= 0) finish_moments(c, column, all, coefficients, threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPackedRows; ++k) {
    if (!s.exists || k >= u.rows) continue;
    A more[kUnit] = {};
    if (c.residual != nullptr) load_unit(static_cast<const T*>(c.residual) + u.at[k], s.have, more);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int j = s.lane * kUnit + i;
      v[k][i] = (v[k][i] - coefficients.mean[j]) * coefficients.scale[j] + (coefficients.shift[j] + more[i]);
    }
    if (c.mask != nullptr) c.mask[s.row_at(0, k) * r.units + s.unit] = static_cast<uint8_t>(sign_bits(s.have, v[k]));
    activate<kUnit>(c.activation, v[k], static_cast<A>(c.slope));
    if (!u.counts(k)) clear_uncounted(0u, v[k]);
    store_unit<T, false>(static_cast<T*>(c.output) + u.at[k], s.have, v[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) packed_column_backward(BatchNormBackwardCall c, Rows r, Tiles t) {
  using A = acc_t<T>;
  const Spot s(r, t, blockIdx.x);
  const PackedRows u(c.shape, r, s);
  __shared__ double memory[kCoefficientsOfBlock];
  const Coefficients<A> coefficients(memory, t.lanes * kUnit);
  const int64_t column = column_of(r, t, s);
  const int first = s.lane * kUnit;
  if (column >= 0) coefficients.set_affine(threadIdx.x, column, c.parameters, c.mean[column], c.invstd[column]);
  __syncthreads();
  const bool rebuilt = c.mask == nullptr && c.activation != Activation::none;
  A v[kPackedRows][kUnit], h[kPackedRows][kUnit];
#pragma unroll
  for (int k = 0; k < kPackedRows; ++k) {
    load_unit(static_cast<const T*>(c.input) + u.at[k], s.have, v[k]);
    load_unit(static_cast<const T*>(c.grad_output) + u.at[k], s.have, h[k]);
    A z[kUnit] = {};
    if (rebuilt && c.residual != nullptr) load_unit(static_cast<const T*>(c.residual) + u.at[k], s.have, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      v[k][i] -= coefficients.mean[first + i];
      z[i] = v[k][i] * coefficients.scale[first + i] + (coefficients.shift[first + i] + z[i]);
    }
    before_activation<kUnit>(c, z, c.mask != nullptr ? c.mask[s.row_at(0, k) * r.units + s.unit] : 0u, h[k]);
    if (!u.counts(k)) clear_uncounted(0u, h[k]), clear_uncounted(0u, v[k]);
  }
  if (reduces(c)) {
    double share[kUnit];
    const auto over_threads = [&](const auto& of) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) share[i] = of(i);
      return sum_columns(t.lanes, share);
    };
    const double sum = over_threads([&](int i) {
      LongSum<A> sums;
#pragma unroll
      for (int k = 0; k < kPackedRows; ++k) sums.add(h[k][i]);
      return sums.value();
    });
    const double dot = over_threads([&](int i) {
      LongSum<A> dots;
#pragma unroll
      for (int k = 0; k < kPackedRows; ++k) dots.add_product(h[k][i], v[k][i]);
      return dots.value();
    });
    const double count = over_threads([&](int) { return static_cast<double>(__popc(u.counted)); });
    if (column >= 0) finish_gradient(c, column, {sum, dot}, count, coefficients, threadIdx.x);
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kPackedRows; ++k) {
    if (!s.exists || k >= u.rows) continue;
    if (c.grad_residual != nullptr) store_unit<T, false>(static_cast<T*>(c.grad_residual) + u.at[k], s.have, h[k]);
    if (c.grad_input == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (c.training)
        h[k][i] = (h[k][i] - coefficients.grad_mean[first + i]) - v[k][i] * coefficients.grad_slope[first + i];
      h[k][i] *= coefficients.scale[first + i];
    }
    if (!u.counts(k)) clear_uncounted(0u, h[k]);
    store_unit<T, false>(static_cast<T*>(c.grad_input) + u.at[k], s.have, h[k]);
  }
}

// Whether a tensor's rows are columns here; else its planes are taken one by one, however small they are.
inline bool in_columns(const BatchNormShape& s) { return s.channels_last || s.spatial == 1; }

template <class T>
int32_t forward(const BatchNormForwardCall& c, void* stream) {
  Launcher launch(stream);
  if constexpr (sizeof(T) < 8) {
    const Rows r = rows_of(c.shape);
    const Tiles t = packed_tiles(r);
    if (in_columns(c.shape))
      launch(packed_column_forward<T>, t.across, kBlock, c, r, t);
    else
      launch(packed_plane_forward<T>, c.shape.channels, kBlock, c);
  }
  return launch.error();
}

template <class T>
int32_t backward(const BatchNormBackwardCall& call, void* stream) {
  Launcher launch(stream);
  BatchNormBackwardCall c = call;
  if (c.activation == Activation::relu) c.slope = 0;
  if constexpr (sizeof(T) < 8) {
    const Rows r = rows_of(c.shape);
    const Tiles t = packed_tiles(r);
    if (in_columns(c.shape))
      launch(packed_column_backward<T>, t.across, kBlock, c, r, t);
    else
      launch(packed_plane_backward<T>, c.shape.channels, kBlock, c);
  }
  return launch.error();
}

}  // namespace

bool batch_norm_is_packed(const BatchNormShape& s, DType dtype, bool writes_mask) {
  const int64_t values = s.channels * s.values();
  if (dtype == DType::float64 || values == 0 || values > kPackedValues) return false;
  if (in_columns(s)) {
    const Rows r = rows_of(s);
    return kBlock / packed_tiles(r).lanes * kPackedRows >= r.rows;
  }
  // A byte of a small plane's mask may be of two channels.
  return s.batch * ceil_div(s.spatial, kUnit) <= kPackedUnits * kBlock &&
         !(writes_mask && s.spatial <= kSmallPlaneValues);
}

int32_t batch_norm_packed_forward(const BatchNormForwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return forward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

int32_t batch_norm_packed_backward(const BatchNormBackwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

// Batch normalisation on a GPU, backward, in one step from x and the saved statistics.
//
//   z = (x - mean) * scale + shift + residual        h = grad_residual = g * activation'(z)
//   grad_x = scale * (h - mean(h) - (x - mean) * grad_slope)
//   grad_slope = invstd^2 * sum(h * (x - mean)) / (n - correction)
//
// Memory: reads x and g twice and writes grad_x (and grad_residual) once. z is rebuilt, except that relu and leaky_relu
// after a residual read the forward's bit of its sign. Sums as the forward's: parts by the shape, merged in order.
//
// Stability: g - mean(g) and x - mean are formed before any scaling; sums are double. See docs/batch_norm.md.
#include "batch_norm_walk.cuh"

namespace fused_ops {
namespace cuda {
namespace {

// Products of eight values are added in this: a float32 gradient has digits that float would lose.
template <class T>
using product_t = std::conditional_t<std::is_same_v<T, float>, double, acc_t<T>>;

struct GradSums {
  double sum, dot;  // of h, and of h * (x - mean)
};
__device__ inline GradSums shuffled(const GradSums& v, int lanes) {
  return {cuda::shuffled(v.sum, lanes), cuda::shuffled(v.dot, lanes)};
}
__device__ inline GradSums operator+(const GradSums& a, const GradSums& b) { return {a.sum + b.sum, a.dot + b.dot}; }

// g = g * activation'(z) for kCount values; `bits` are the forward's where there is a mask.
template <int kCount, class A>
__device__ inline void before_activation(const BatchNormBackwardCall& c, const A* z, unsigned bits, A* g) {
  const A slope = static_cast<A>(c.slope);
  if (c.mask != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = (bits >> i) & 1u ? g[i] : (slope == A(0) ? A(0) : g[i] * slope);
  } else if (c.activation == Activation::relu) {  // 0, also times infinity
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = z[i] <= A(0) ? A(0) : g[i];
  } else {
    times_derivative<kCount>(c.activation, z, g, slope);
  }
}

// h of one unit: x into v, h into h. `byte` is where the mask has its bits.
template <class T>
__device__ inline void unit_before(const BatchNormBackwardCall& c, const Coefficients<acc_t<T>>& k, int64_t at,
                                   int have, const int64_t* channel, int64_t byte, acc_t<T>* v, acc_t<T>* h) {
  using A = acc_t<T>;
  A z[kUnit];
  load_unit(static_cast<const T*>(c.input) + at, have, v);
  load_unit(static_cast<const T*>(c.grad_output) + at, have, h);
  if (c.activation == Activation::none) return;
  const bool rebuild = c.mask == nullptr;
  if (rebuild && c.residual != nullptr) load_unit(static_cast<const T*>(c.residual) + at, have, z);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const A shift = k.shift[channel[i]];
    if (rebuild)
      z[i] = (v[i] - k.mean[channel[i]]) * k.scale[channel[i]] + (c.residual != nullptr ? shift + z[i] : shift);
  }
  before_activation<kUnit>(c, z, rebuild ? 0u : c.mask[byte], h);
}

template <class T>
__global__ void __launch_bounds__(kBlock) set_coefficients(BatchNormBackwardCall c) {
  const int64_t channel = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (channel >= c.shape.channels) return;
  const Parameters& p = c.parameters;
  const Coefficients<acc_t<T>> k(c.scratch, c.shape.channels);
  k.set_affine(channel, c.mean[channel], c.invstd[channel] * value_at(p.weight, p.dtype, channel, 1),
               value_at(p.bias, p.dtype, channel, 0));
}

__device__ inline void keep_sums(double* to, const GradSums& s) { to[0] = s.sum, to[1] = s.dot; }

// A block a (channel, part), as plane_moments.
template <class T>
__global__ void __launch_bounds__(kBlock) plane_sums(BatchNormBackwardCall c, Rows r, int64_t parts) {
  using A = acc_t<T>;
  const BatchNormShape& s = c.shape;
  const int64_t channel = blockIdx.x / parts, part = blockIdx.x - channel * parts;
  const int64_t units = (s.spatial + kUnit - 1) / kUnit, total = s.batch * units;
  const int64_t each = (total + parts - 1) / parts, end = (part + 1) * each < total ? (part + 1) * each : total;
  const Coefficients<A> k(c.scratch, s.channels);
  const A mean = k.mean[channel];
  GradSums sums{0, 0};
  int64_t same[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) same[i] = channel;
  for (int64_t i = part * each + threadIdx.x; i < end; i += kBlock) {
    const int64_t b = quotient(i, units), first = (i - b * units) * kUnit, left = s.spatial - first;
    const int have = left < kUnit ? static_cast<int>(left) : kUnit;
    const int64_t plane = b * s.channels + channel, at = plane * s.spatial + first;
    A v[kUnit], h[kUnit];
    if (r.walk == Walk::repeat && c.mask != nullptr) {  // the bits of a small plane may begin within a byte
      load_unit(static_cast<const T*>(c.input) + at, have, v);
      load_unit(static_cast<const T*>(c.grad_output) + at, have, h);
      unsigned bits = 0;
      for (int j = 0; j < have; ++j) {
        const int64_t bit = channel * s.spatial + first + j;
        bits |= ((c.mask[b * r.units + bit / 8] >> (bit % 8)) & 1u) << j;
      }
      before_activation<kUnit, A>(c, v, bits, h);
    } else {
      unit_before<T>(c, k, at, have, same, plane * units + first / kUnit, v, h);
    }
    product_t<T> sum = 0, dot = 0;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const product_t<T> value = j < have ? h[j] : A(0), centered = v[j] - mean;
      sum += value, dot += j < have ? value * centered : product_t<T>(0);
    }
    sums.sum += static_cast<double>(sum), sums.dot += static_cast<double>(dot);
  }
  sums = sum_group<kBlock>(sums);
  if (threadIdx.x == 0) keep_sums(partials_of(c.scratch, s.channels) + 2 * int64_t{blockIdx.x}, sums);
}

// A block a (tile of columns, part of the rows), as column_moments; four rows at a time.
template <class T>
__global__ void __launch_bounds__(kBlock) column_sums(BatchNormBackwardCall c, Rows r, int64_t parts) {
  using A = acc_t<T>;
  constexpr int kWarps = kBlock / kTileColumns, kCount = 4;
  const int lane = static_cast<int>(threadIdx.x) % kTileColumns, warp = static_cast<int>(threadIdx.x) / kTileColumns;
  const int64_t channels = r.channels, tile = blockIdx.x / parts, part = blockIdx.x - tile * parts;
  const int64_t channel = tile * kTileColumns + lane;
  const int64_t each = (r.rows + parts - 1) / parts, end = (part + 1) * each < r.rows ? (part + 1) * each : r.rows;
  const Coefficients<A> k(c.scratch, channels);
  const bool exists = channel < channels;
  const A mean = exists ? k.mean[channel] : A(0), scale = exists ? k.scale[channel] : A(0);
  const A shift = exists ? k.shift[channel] : A(0);
  GradSums sums{0, 0};
  for (int64_t row = part * each + warp * kCount; exists && row < end; row += kWarps * kCount) {
    const int64_t at = row * channels + channel;
    const int have = end - row < kCount ? static_cast<int>(end - row) : kCount;
    A v[kCount], h[kCount], z[kCount];
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t from = at + (i < have ? i : 0) * channels;
      v[i] = to_acc(static_cast<const T*>(c.input)[from]), h[i] = to_acc(static_cast<const T*>(c.grad_output)[from]);
      z[i] = (v[i] - mean) * scale;
      if (c.mask != nullptr)
        bits |= ((c.mask[(row + (i < have ? i : 0)) * r.units + channel / 8] >> (channel % 8)) & 1u) << i;
      else
        z[i] += c.residual != nullptr ? shift + to_acc(static_cast<const T*>(c.residual)[from]) : shift;
    }
    if (c.activation != Activation::none) before_activation<kCount>(c, z, bits, h);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= have) continue;
      const product_t<T> value = h[i], centered = v[i] - mean;
      sums.sum += static_cast<double>(value), sums.dot += static_cast<double>(value * centered);
    }
  }
  __shared__ GradSums shares[kBlock];
  shares[threadIdx.x] = sums;
  __syncthreads();
  if (warp != 0 || !exists) return;
  for (int w = 1; w < kWarps; ++w) sums = sums + shares[w * kTileColumns + lane];
  keep_sums(partials_of(c.scratch, channels) + 2 * (channel * parts + part), sums);
}

// A warp a channel: the parameters' gradients and what every value of grad_x needs.
template <class T>
__global__ void __launch_bounds__(kBlock) finish_sums(BatchNormBackwardCall c, int64_t parts) {
  using A = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t channels = c.shape.channels, channel = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / 32;
  GradSums all{0, 0};
  const double* from = partials_of(c.scratch, channels) + 2 * channel * parts;
  for (int64_t i = lane; channel < channels && i < parts; i += 32) all = all + GradSums{from[2 * i], from[2 * i + 1]};
  all = sum_group<32>(all);
  if (lane != 0 || channel >= channels) return;
  const double n = static_cast<double>(c.shape.batch * c.shape.spatial), invstd = c.invstd[channel];
  const double low = lost_of<A>(c.mean[channel]);
  const double dot = all.dot - low * all.sum;  // around the exact mean
  set_value(c.grad_weight, c.grad_dtype, channel, n > 0 ? dot * invstd : 0.0);
  set_value(c.grad_bias, c.grad_dtype, channel, n > 0 ? all.sum : 0.0);
  const Coefficients<A> k(c.scratch, channels);
  const double slope = dot * invstd * invstd / (n - static_cast<double>(c.correction));
  k.grad_mean[channel] = static_cast<A>(all.sum / n - low * slope);
  k.grad_slope[channel] = static_cast<A>(slope);
}

template <class T, Walk kWalk>
__global__ void __launch_bounds__(kBlock) write_grads(BatchNormBackwardCall c, Rows r) {
  using A = acc_t<T>;
  const Coefficients<A> k(c.scratch, r.channels);
  const int64_t total = r.rows * r.units;
  for (int64_t index = int64_t{blockIdx.x} * kBlock + threadIdx.x; index < total;
       index += int64_t{gridDim.x} * kBlock) {
    const Unit u = unit_at(r, index);
    int64_t channel[kUnit];
    A v[kUnit], h[kUnit];
    channels_of<kWalk>(r, u, channel);
    unit_before<T>(c, k, u.at, u.have, channel, index, v, h);
    if (c.grad_residual != nullptr) store_unit(static_cast<T*>(c.grad_residual) + u.at, u.have, h);
    if (c.grad_input == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int64_t j = channel[i];
      if (c.training) h[i] = (h[i] - k.grad_mean[j]) - (v[i] - k.mean[j]) * k.grad_slope[j];
      h[i] *= k.scale[j];
    }
    store_unit(static_cast<T*>(c.grad_input) + u.at, u.have, h);
  }
}

template <class T>
int32_t backward(const BatchNormBackwardCall& call, void* stream) {
  Launcher launch(stream);
  BatchNormBackwardCall c = call;
  if (c.activation == Activation::relu) c.slope = 0;
  const Rows r = rows_of(c.shape);
  const int64_t parts = parts_of(c.shape), channels = c.shape.channels;
  launch(set_coefficients<T>, ceil_div(channels, kBlock), kBlock, c);
  if ((c.training && c.grad_input != nullptr) || c.grad_weight != nullptr) {
    if (r.walk == Walk::column)
      launch(column_sums<T>, ceil_div(channels, kTileColumns) * parts, kBlock, c, r, parts);
    else
      launch(plane_sums<T>, channels * parts, kBlock, c, r, parts);
    launch(finish_sums<T>, ceil_div(channels * 32, kBlock), kBlock, c, parts);
  }
  if (c.grad_input == nullptr && c.grad_residual == nullptr) return launch.error();
  const int64_t blocks = std::min(ceil_div(r.rows * r.units, kBlock), kWriteBlocks);
  FUSED_OPS_WITH_WALK(r.walk, kWalk, launch(write_grads<T, kWalk>, blocks, kBlock, c, r))
  return launch.error();
}

}  // namespace

int32_t batch_norm_backward(const BatchNormBackwardCall& call, void* stream) {
  FUSED_OPS_WITH_DTYPE(call.dtype, T, return backward<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

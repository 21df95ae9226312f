// How the batch-norm kernels walk a tensor: eight values of a row at a time, and a channel's values in parts.
#pragma once
#include <algorithm>

#include "activation.cuh"
#include "batch_norm.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace fused_ops {
namespace cuda {

constexpr int kUnit = 8;                 // values of one step of a thread, and bits of one byte of the mask
constexpr int64_t kReduceBlocks = 2048;  // of a reduction, if every block still has kPartValues: the same on all GPUs
constexpr int64_t kPartValues = 4096;
constexpr int64_t kWriteBlocks = 8192;
constexpr int kColumnRows = 16;  // rows of a column that a thread loads together
constexpr int kTileColumns = 32;
constexpr int64_t kSmallPlaneValues = 32;  // planes up to this many values are masked as rows of columns
constexpr int kCoefficients = 5;

inline int64_t ceil_div(int64_t a, int64_t b) { return b ? (a + b - 1) / b : 0; }

// Rows of values that are walked in units, each beginning a byte of the mask.
enum class Walk {
  plane,   // (batch * channels, spatial): one channel a row
  column,  // (batch * spatial, channels): value k is of channel k
  repeat,  // (batch, channels * spatial) of small planes: value k is of channel k / spatial
};

struct Rows {
  Walk walk;
  int64_t rows, length, units;  // units of a row
  int64_t channels, spatial;
};

inline Rows rows_of(const BatchNormShape& s) {
  Rows r{Walk::plane, s.batch * s.channels, s.spatial, 0, s.channels, s.spatial};
  if (s.channels_last || s.spatial == 1)
    r.walk = Walk::column, r.rows = s.batch * s.spatial, r.length = s.channels;
  else if (s.spatial <= kSmallPlaneValues)
    r.walk = Walk::repeat, r.rows = s.batch, r.length = s.channels * s.spatial;
  r.units = ceil_div(r.length, kUnit);
  return r;
}

// The parts that a channel's values are cut into for a reduction, by the shape alone.
inline int64_t parts_of(const BatchNormShape& s) {
  const bool columns = s.channels_last || s.spatial == 1;
  const int64_t across = columns ? ceil_div(s.channels, kTileColumns) : s.channels;
  const int64_t least = columns ? kPartValues / kTileColumns : kPartValues;
  return std::max<int64_t>(1, std::min(kReduceBlocks / std::max<int64_t>(across, 1), ceil_div(s.values(), least)));
}

// 64-bit division takes some forty instructions; most tensors do not need it.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Eight values of a row, `have` of them there.
struct Unit {
  int64_t row, first, at;  // its row, the first value's index in the row and in memory
  int have;
};
__device__ inline Unit unit_at(const Rows& r, int64_t index) {
  Unit u;
  u.row = quotient(index, r.units), u.first = (index - u.row * r.units) * kUnit, u.at = u.row * r.length + u.first;
  const int64_t left = r.length - u.first;
  u.have = left < kUnit ? static_cast<int>(left) : kUnit;
  return u;
}

// The channel of each value of a unit.
template <Walk kWalk>
__device__ inline void channels_of(const Rows& r, const Unit& u, int64_t* channel) {
  if constexpr (kWalk == Walk::plane) {
    const int64_t c = u.row - quotient(u.row, r.channels) * r.channels;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) channel[k] = c;
  } else {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const int64_t at = k < u.have ? u.first + k : u.first;
      channel[k] = kWalk == Walk::column ? at : quotient(at, r.spatial);
    }
  }
}

template <class T>
__device__ inline void load_unit(const T* p, int have, acc_t<T>* out) {
  const unsigned offset = misalignment(p);
#pragma unroll
  for (int k = 0; k < kUnit; k += kVector<T>) load_vector<T>(p + k, have - k, offset, acc_t<T>(0), out + k);
}

template <class T>
__device__ inline void store_unit(T* p, int have, const acc_t<T>* v) {
  if (have == kUnit && misalignment(p) == 0) {
#pragma unroll
    for (int k = 0; k < kUnit; k += kVector<T>) store_aligned(p + k, pack<T>(v + k));
    return;
  }
#pragma unroll
  for (int k = 0; k < kUnit; ++k)
    if (k < have) set(p[k], v[k]);
}

// ---- moments

// Mean, sum of squared distances and number of some values.
struct Moments {
  double mean, m2, n;
};
__device__ inline Moments shuffled(const Moments& v, int lanes) {
  return {shuffled(v.mean, lanes), shuffled(v.m2, lanes), shuffled(v.n, lanes)};
}
// Chan's merge, the same bits for (a, b) and (b, a).
__device__ inline Moments merged(const Moments& a, const Moments& b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  const double n = a.n + b.n, delta = b.mean - a.mean;
  return {(a.n * a.mean + b.n * b.mean) / n, (a.m2 + b.m2) + delta * delta * (a.n * b.n / n), n};
}

// Sums of x - shift and of its square, in double. The shift is the mean of the first values, so that little cancels.
struct Shifted {
  double shift = 0, sum = 0, squares = 0;
  int64_t n = 0;

  // Adds the first `count` of kCount values; around their own mean in A, from there in double.
  template <int kCount, class A>
  __device__ void add(const A* v, int count) {
    if (count <= 0) return;
    A total = 0, rest = 0, squared = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) total += k < count ? v[k] : A(0);
    const A near = total / A(count);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const A d = k < count ? v[k] - near : A(0);
      rest += d, squared += d * d;
    }
    if (n == 0) shift = static_cast<double>(near);
    const double delta = static_cast<double>(near) - shift, r = static_cast<double>(rest);
    sum += count * delta + r;
    squares += static_cast<double>(squared) + delta * (2 * r + count * delta);
    n += count;
  }
  __device__ Moments moments() const {
    if (n == 0) return {0, 0, 0};
    const double count = static_cast<double>(n), m2 = squares - sum * sum / count;
    return {shift + sum / count, m2 < 0 ? 0.0 : m2, count};
  }
};

// ---- parameters and coefficients

__device__ inline double value_at(const void* p, DType dtype, int64_t i, double missing) {
  if (p == nullptr) return missing;
  switch (dtype) {
    case DType::float32: return static_cast<double>(static_cast<const float*>(p)[i]);
    case DType::float64: return static_cast<const double*>(p)[i];
    case DType::bfloat16: return static_cast<double>(to_acc(static_cast<const bfloat16_t*>(p)[i]));
    case DType::float16: return static_cast<double>(to_acc(static_cast<const float16_t*>(p)[i]));
  }
  return missing;
}
__device__ inline void set_value(void* p, DType dtype, int64_t i, double value) {
  if (p == nullptr) return;
  switch (dtype) {
    case DType::float32: return set(static_cast<float*>(p)[i], static_cast<float>(value));
    case DType::float64: return set(static_cast<double*>(p)[i], value);
    case DType::bfloat16: return set(static_cast<bfloat16_t*>(p)[i], static_cast<float>(value));
    case DType::float16: return set(static_cast<float16_t*>(p)[i], static_cast<float>(value));
  }
}

// What the mean loses as it is rounded to A.
template <class A>
__device__ inline double lost_of(double mean) {
  const double low = mean - static_cast<double>(static_cast<A>(mean));
  return low == low ? low : 0;  // inf - inf
}

// Five arrays of one accumulator a channel, at the beginning of the scratch memory: z = (x - mean) * scale + shift.
template <class A>
struct Coefficients {
  A *mean, *scale, *shift, *grad_mean, *grad_slope;
  __device__ Coefficients(double* scratch, int64_t channels)
      : mean(reinterpret_cast<A*>(scratch)),
        scale(mean + channels),
        shift(scale + channels),
        grad_mean(shift + channels),
        grad_slope(grad_mean + channels) {}
  __device__ void set_affine(int64_t c, double exact_mean, double factor, double bias) const {
    mean[c] = static_cast<A>(exact_mean);
    scale[c] = static_cast<A>(factor);
    shift[c] = static_cast<A>(bias - lost_of<A>(exact_mean) * factor);
  }
};
// Behind them: three doubles a channel and part.
__host__ __device__ inline double* partials_of(double* scratch, int64_t channels) {
  return scratch + kCoefficients * channels;
}

#define FUSED_OPS_WITH_WALK(walk, kWalk, ...) \
  switch (walk) {                             \
    case Walk::plane: {                       \
      constexpr Walk kWalk = Walk::plane;     \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Walk::column: {                      \
      constexpr Walk kWalk = Walk::column;    \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Walk::repeat: {                      \
      constexpr Walk kWalk = Walk::repeat;    \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
  }

}  // namespace cuda
}  // namespace fused_ops

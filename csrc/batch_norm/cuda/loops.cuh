// How the batch-norm kernels walk a tensor: eight values of a row at a time, and a channel's values in parts.
//
// A thread loads kBytesAhead bytes (several units) of a tensor before it uses any, without a branch: what is behind the
// end is loaded from a place that exists and left out. Whether units are whole and aligned is decided on the host.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "batch_norm/cuda/kernels.h"
#include "core/launch.cuh"
#include "core/reduce.cuh"

namespace fused_ops {
namespace cuda {

constexpr int kUnit = 8;                // values of one step of a thread, and bits of one byte of the mask
constexpr int64_t kPlaneBlocks = 1056;  // of a reduction over planes, if every block still has kPartValues,
constexpr int64_t kColumnBlocks = 264;  // and over columns: the same on all GPUs
constexpr int64_t kWriteBlocks = 1056;  // that write columns
constexpr int64_t kPartValues = 4096;
constexpr int64_t kStepRows = 8;              // rows of a thread that parts of columns are multiples of
constexpr int64_t kSmallPlaneValues = 32;     // planes up to this many values are masked as rows of columns
constexpr int64_t kMiddlePlaneValues = 2048;  // planes that are no whole units are walked as columns up to here,
constexpr int64_t kColumnPlanes = 32;         // if there are as many of a channel
constexpr int kBytesAhead = 64;               // that a thread loads before it uses any

// Units of each of kTensors that a thread loads together.
template <class T, int kTensors>
constexpr int kUnitsOf = std::max(1, kBytesAhead / (kTensors * kUnit * static_cast<int>(sizeof(T))));

inline int64_t ceil_div(int64_t a, int64_t b) { return b ? (a + b - 1) / b : 0; }

// Rows of values that are walked in units, each beginning a byte of the mask.
//
// plane: (batch * channels, spatial), one channel a row. column: value k of a row is of channel k / side. Channels last
// are (batch * spatial, channels), side 1; planes of some sizes are (batch, channels * spatial), side = spatial, since
// then all rows are aligned as the tensor is, whatever the size of a plane. Where positions may not count (`valid`),
// they are planes all the same: of columns, a whole row counts or does not.
enum class Walk { plane, column };

struct Rows {
  Walk walk;
  bool plane_mask;              // of columns: the mask's rows are the planes
  int64_t rows, length, units;  // units of a row
  int64_t channels, side;
  int64_t turn_rows, turn_units;        // how far kBlock units are: so many rows and units,
  int64_t turn_entries, turn_channels;  // and those rows by, and modulo, the channels
};

inline Rows rows_of(const BatchNormShape& s) {
  Rows r{Walk::plane, false, s.batch * s.channels, s.spatial, 0, s.channels, s.spatial, 0, 0, 0, 0};
  const bool small = s.spatial <= kSmallPlaneValues;
  if (s.channels_last || s.spatial == 1)
    r.walk = Walk::column, r.rows = s.batch * s.spatial, r.length = s.channels, r.side = 1;
  else if (s.valid == nullptr &&
           (small || (s.spatial % kUnit != 0 && s.spatial <= kMiddlePlaneValues && s.batch >= kColumnPlanes)))
    r.walk = Walk::column, r.rows = s.batch, r.length = s.channels * s.spatial, r.plane_mask = !small;
  r.units = ceil_div(r.length, kUnit);
  if (r.units > 0) r.turn_rows = kBlock / r.units, r.turn_units = kBlock % r.units;
  if (r.channels > 0) r.turn_entries = r.turn_rows / r.channels, r.turn_channels = r.turn_rows % r.channels;
  return r;
}

// A block's share of columns: `lanes` threads side by side with a unit each, 256 / lanes rows below each other.
struct Tiles {
  int lanes;             // a power of two
  int64_t across, step;  // tiles of a row, and the units from one to the next
  int64_t parts, rows;   // parts of the rows, and the rows of a part
};

inline int lanes_of(int64_t units) {
  for (const int lanes : {32, 16, 8})
    if (units % lanes == 0) return lanes;
  for (int lanes = 32; lanes >= 4; lanes /= 2)
    if (ceil_div(units, lanes) * lanes * 4 <= units * 5) return lanes;
  int lanes = 1;
  while (lanes < units && lanes < 32) lanes *= 2;
  return lanes;
}

// With `overlap`, the last lane of a tile has the unit of the next tile's first.
inline Tiles tiles_of(const Rows& r, int64_t blocks, bool overlap = false) {
  Tiles t{overlap ? 32 : lanes_of(r.units), 0, 0, 1, 0};
  t.step = t.lanes - overlap, t.across = std::max<int64_t>(1, ceil_div(r.units, t.step));
  const int64_t least = kBlock / t.lanes * kStepRows, steps = ceil_div(r.rows, least);
  t.rows = std::max<int64_t>(1, ceil_div(steps, std::max<int64_t>(1, blocks / t.across))) * least;
  t.parts = std::max<int64_t>(1, ceil_div(r.rows, t.rows));
  return t;
}

// Whether a channel's values are summed by columns, which then are added, or plane by plane.
inline bool sums_columns(const Rows& r) { return r.walk == Walk::column && (r.side == 1 || r.rows >= kColumnPlanes); }

// The parts that a channel's planes are cut into for a reduction, by the shape alone.
inline int64_t plane_parts(const BatchNormShape& s) {
  const int64_t most = kPlaneBlocks / std::max<int64_t>(s.channels, 1);
  return std::max<int64_t>(1, std::min(most, ceil_div(s.values(), kPartValues)));
}

// Partial sums of a channel, side by side in memory.
inline int64_t partials_each(const BatchNormShape& s) {
  const Rows r = rows_of(s);
  return sums_columns(r) ? r.side * tiles_of(r, kColumnBlocks).parts : plane_parts(s);
}

// 64-bit division takes some forty instructions; most tensors do not need it.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

template <class T>
__device__ inline void load_unit(const T* p, int have, acc_t<T>* out) {
  const unsigned offset = misalignment(p);
#pragma unroll
  for (int k = 0; k < kUnit; k += kVector<T>) load_vector<T>(p + k, have - k, offset, acc_t<T>(0), out + k);
}

// A unit as it lies in memory. Fast: it is whole and aligned, so that its loads depend on nothing.
template <class T>
struct Raw {
  Words w[kUnit / kVector<T>];
};
template <class T, bool kFast>
__device__ inline Raw<T> load_raw(const T* p, int have) {
  Raw<T> raw;
  if constexpr (kFast) {
#pragma unroll
    for (int i = 0; i < kUnit / kVector<T>; ++i) raw.w[i] = load_aligned(p + i * kVector<T>);
  } else {
    acc_t<T> v[kUnit];
    load_unit(p, have, v);
#pragma unroll
    for (int i = 0; i < kUnit / kVector<T>; ++i) raw.w[i] = pack<T>(v + i * kVector<T>);
  }
  return raw;
}
template <class T>
__device__ inline void unpack_raw(const Raw<T>& raw, acc_t<T>* out) {
#pragma unroll
  for (int i = 0; i < kUnit / kVector<T>; ++i) unpack<T>(raw.w[i], out + i * kVector<T>);
}

template <class T, bool kFast>
__device__ inline void store_unit(T* p, int have, const acc_t<T>* v) {
  if (kFast || (have == kUnit && misalignment(p) == 0)) {
#pragma unroll
    for (int k = 0; k < kUnit; k += kVector<T>) store_aligned(p + k, pack<T>(v + k));
    return;
  }
#pragma unroll
  for (int k = 0; k < kUnit; ++k)
    if (k < have) set(p[k], v[k]);
}

// Whether every unit is whole, counts, and is aligned in these tensors of T, of which some may be null.
template <class T>
bool fast_walk(const BatchNormShape& s, const Rows& r, std::initializer_list<const void*> tensors) {
  bool fast = sizeof(T) < 8 && r.length % kUnit == 0 && s.valid == nullptr;
  for (const void* p : tensors) fast = fast && (reinterpret_cast<uintptr_t>(p) & 15u) == 0;
  return fast;
}

// ---- positions that count, a bit each: in kernels that are not kFast alone

__device__ inline unsigned counted_bits(const uint8_t* valid, int64_t position, int have) {
  if (valid == nullptr) return (1u << have) - 1u;
  unsigned bits = 0;
#pragma unroll
  for (int k = 0; k < kUnit; ++k) bits |= k < have && valid[position + k] != 0 ? 1u << k : 0u;
  return bits;
}
__device__ inline bool row_counts(const uint8_t* valid, int64_t row) { return valid == nullptr || valid[row] != 0; }

// 0 where a position does not count.
template <class A>
__device__ inline void clear_uncounted(unsigned bits, A* v) {
#pragma unroll
  for (int k = 0; k < kUnit; ++k) v[k] = (bits >> k) & 1u ? v[k] : A(0);
}
// The first value that counts in the place of those that do not, around which those add nothing. Returns how many do.
template <int kCount, class A>
__device__ inline int replace_uncounted(unsigned bits, A* v) {
  A first = v[0];
#pragma unroll
  for (int k = kCount - 1; k >= 0; --k) first = (bits >> k) & 1u ? v[k] : first;
#pragma unroll
  for (int k = 0; k < kCount; ++k) v[k] = (bits >> k) & 1u ? v[k] : first;
  return __popc(bits);
}

// ---- planes

// The units of one channel in a part, kBlock apart: `offset` is of the tensor, `position` of (batch, spatial).
struct PlaneWalk {
  int64_t offset, left;  // left: units of the part from this one on
  int64_t unit, units;
  int64_t step, step_unit, jump, origin;
  int64_t byte, step_byte, jump_byte;  // of a mask whose rows are the planes
  int64_t position, step_position, jump_position;
  int64_t spatial;

  __device__ PlaneWalk(const BatchNormShape& s, int64_t channel, int64_t part, int64_t parts) : spatial(s.spatial) {
    units = (s.spatial + kUnit - 1) / kUnit;
    const int64_t total = s.batch * units, each = quotient(total + parts - 1, parts), first = part * each;
    const int64_t index = first + threadIdx.x, end = first + each < total ? first + each : total;
    const int64_t b = quotient(index, units), rows = quotient(kBlock, units);
    left = end - index, unit = index - b * units;
    const int64_t stride = s.channels * s.spatial;
    origin = channel * s.spatial, offset = b * stride + origin + unit * kUnit;
    step_unit = kBlock - rows * units, step = rows * stride + step_unit * kUnit;
    jump = stride - units * kUnit;
    byte = (b * s.channels + channel) * units + unit;
    step_byte = rows * s.channels * units + step_unit, jump_byte = (s.channels - 1) * units;
    position = b * s.spatial + unit * kUnit, step_position = rows * s.spatial + step_unit * kUnit;
    jump_position = s.spatial - units * kUnit;
  }
  __device__ void advance() {
    left -= kBlock, unit += step_unit, offset += step, byte += step_byte, position += step_position;
    if (unit >= units) unit -= units, offset += jump, byte += jump_byte, position += jump_position;
  }
  // The unit's values, 0 behind the end; and where to load it, something else behind the end.
  template <bool kFast>
  __device__ int have() const {
    if (left <= 0) return 0;
    const int64_t rest = spatial - unit * kUnit;
    return kFast || rest >= kUnit ? kUnit : static_cast<int>(rest);
  }
  __device__ int64_t at() const { return left > 0 ? offset : origin; }
};

// The units of a block that writes: kAhead of a thread, kBlock apart.
template <int kAhead>
struct PlaneUnits {
  int64_t index[kAhead], at[kAhead], channel[kAhead], position[kAhead];
  int have[kAhead];
  bool exists[kAhead];  // else it is the first of all

  __device__ PlaneUnits(const Rows& r, int64_t block) {
    const int64_t total = r.rows * r.units;
    int64_t i = block * kAhead * kBlock + threadIdx.x, row = quotient(i, r.units), unit = i - row * r.units;
    int64_t b = quotient(row, r.channels), c = row - b * r.channels;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      exists[k] = i < total;
      const int64_t first = exists[k] ? unit * kUnit : 0, left = r.length - first;
      index[k] = exists[k] ? i : 0, channel[k] = exists[k] ? c : 0;
      at[k] = exists[k] ? row * r.length + first : 0, position[k] = exists[k] ? b * r.length + first : 0;
      have[k] = left < kUnit ? static_cast<int>(left) : kUnit;
      i += kBlock, row += r.turn_rows, unit += r.turn_units, b += r.turn_entries, c += r.turn_channels;
      if (unit >= r.units) unit -= r.units, ++row, ++c;
      if (c >= r.channels) c -= r.channels, ++b;
    }
  }
};

// ---- columns

// A thread's place in its tile.
struct Spot {
  int64_t unit, first;  // its unit in the row, and that unit's first column
  int64_t begin, end;   // rows of the part
  int64_t tile, part;
  int lane, row, step;  // step: rows that the block walks at once
  int have;             // columns of the unit
  bool exists, owner;

  __device__ Spot(const Rows& r, const Tiles& t, int64_t block) {
    part = quotient(block, t.across), tile = block - part * t.across;
    const int thread = static_cast<int>(threadIdx.x);
    lane = thread & (t.lanes - 1), row = thread / t.lanes, step = kBlock / t.lanes;
    unit = tile * t.step + lane, exists = unit < r.units, owner = exists && lane < t.step;
    if (!exists) unit = r.units - 1;
    first = unit * kUnit;
    have = r.length - first < kUnit ? static_cast<int>(r.length - first) : kUnit;
    begin = part * t.rows, end = begin + t.rows < r.rows ? begin + t.rows : r.rows;
  }
  // The k-th of this thread's rows from `base` on, or the last row of the part.
  __device__ int64_t row_at(int64_t base, int k) const {
    const int64_t at = base + row + k * step;
    return at < end ? at : end - 1;
  }
  __device__ int rows_at(int64_t base, int most) const {
    const int64_t left = end - base - row;
    if (left <= 0) return 0;
    return left > int64_t{most - 1} * step ? most : (static_cast<int>(left) + step - 1) / step;
  }
};

// One value of each column of a unit from an array of the scratch memory with one a channel.
template <bool kFast, class A>
__device__ inline void load_columns(const A* from, const Rows& r, const Spot& s, const int64_t* channel, A* out) {
  if (kFast && r.side == 1) {
#pragma unroll
    for (int k = 0; k < kUnit; k += kVector<A>) unpack<A>(load_aligned(from + s.first + k), out + k);
  } else {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) out[k] = from[channel[k]];
  }
}

// The channel of each column of a unit.
__device__ inline void channels_of(const Rows& r, const Spot& s, int64_t* channel) {
  int64_t c = r.side == 1 ? s.first : quotient(s.first, r.side), within = s.first - c * r.side;
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    channel[k] = k < s.have ? c : channel[0];
    if (++within == r.side) within = 0, ++c;
  }
}

// Sums over the threads of a block that have the same columns: the i-th thread gets those of the tile's i-th column.
__device__ inline double sum_columns(int lanes, double* v) {
  __shared__ double shares[kBlock / 32][32 * kUnit];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int d = lanes; d < 32; d *= 2) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) v[k] += shuffled(v[k], d);
  }
  __syncthreads();  // the sums before these have been read
  if (lane < lanes) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) shares[warp][lane * kUnit + k] = v[k];
  }
  __syncthreads();
  double sum = 0;
  if (static_cast<int>(threadIdx.x) < lanes * kUnit) {
    sum = shares[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kBlock / 32; ++w) sum += shares[w][threadIdx.x];
  }
  return sum;
}

// Runs the code with kName, whether `value` is true.
#define FUSED_OPS_WITH_BOOL(value, kName, ...) \
  if (value) {                                 \
    constexpr bool kName = true;               \
    __VA_ARGS__;                               \
  } else {                                     \
    constexpr bool kName = false;              \
    __VA_ARGS__;                               \
  }

// Runs the code with kFast, whether every unit is whole, counts, and is aligned. float64, which serves checks of
// gradients, has kernels for units of any kind alone: a fast_walk of it is none.
#define FUSED_OPS_WITH_FAST(T, fast, kFast, ...)  \
  if constexpr (sizeof(T) < 8) {                  \
    FUSED_OPS_WITH_BOOL(fast, kFast, __VA_ARGS__) \
  } else {                                        \
    constexpr bool kFast = false;                 \
    __VA_ARGS__;                                  \
  }

}  // namespace cuda
}  // namespace fused_ops

// The mask, a bit a value that says where z > 0, as the loops over planes and columns write and read it. Its rows are
// the planes, or, where those are small or the channels last, those of all channels; each begins a byte.
#pragma once
#include "batch_norm/cuda/loops.cuh"

namespace fused_ops {
namespace cuda {

// Where z > 0, or NaN, of the first `have` values.
template <class A>
__device__ inline unsigned sign_bits(int have, const A* z) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) bits |= i < have && !(z[i] <= A(0)) ? 1u << i : 0u;
  return bits;
}

// The forward's bits of a unit of a plane.
__device__ inline unsigned plane_bits(const BatchNormBackwardCall& c, const PlaneWalk& walk, int64_t channel,
                                      int have) {
  const BatchNormShape& s = c.shape;
  if (s.spatial > kSmallPlaneValues) return c.mask[have > 0 ? walk.byte : 0];
  // Of a small plane they may begin within a byte, as a row of the mask runs through the channels.
  const int64_t row_bytes = (s.channels * s.spatial + kUnit - 1) / kUnit;
  const uint8_t* row = c.mask + quotient(walk.byte, s.channels * walk.units) * row_bytes;
  unsigned bits = 0;
  for (int j = 0; j < have; ++j) {
    const int64_t bit = channel * s.spatial + walk.unit * kUnit + j;
    bits |= ((row[bit / 8] >> (bit % 8)) & 1u) << j;
  }
  return bits;
}

// Where the mask's bits of a unit's columns are: up to three bytes if its rows are planes, else one.
struct MaskPlace {
  int64_t at[3], row_bytes;
  int shift, behind[2];
  __device__ MaskPlace(const Rows& r, const Spot& s)
      : at{s.unit, s.unit, s.unit}, row_bytes(r.units), shift(0), behind{kUnit, kUnit} {
    if (!r.plane_mask) return;
    const int64_t bytes = (r.side + kUnit - 1) / kUnit, channel = quotient(s.first, r.side);
    const int64_t within = s.first - channel * r.side;
    row_bytes = r.channels * bytes, shift = static_cast<int>(within % kUnit);
    at[0] = channel * bytes + within / kUnit;
    const int64_t rest = r.side - within;  // of the plane
    behind[0] = static_cast<int>(rest < kUnit - shift ? rest : kUnit - shift);
    const int64_t more = rest > behind[0] && rest - behind[0] < kUnit ? rest - behind[0] : kUnit;
    behind[1] = behind[0] + static_cast<int>(more);
    at[1] = at[0] + (behind[0] < s.have), at[2] = at[1] + (behind[1] < s.have);
  }
  // The bits of some rows of the part.
  template <int kRows>
  __device__ void load(const Rows& r, const Spot& s, const uint8_t* mask, int64_t base, unsigned* bits) const {
    if (mask == nullptr) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) bits[k] = 0;
    } else if (!r.plane_mask) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) bits[k] = mask[s.row_at(base, k) * row_bytes + at[0]];
    } else {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const uint8_t* from = mask + s.row_at(base, k) * row_bytes;
        const unsigned a = from[at[0]], b = from[at[1]], c = from[at[2]];
        bits[k] = (a >> shift) | (behind[0] < kUnit ? b << behind[0] : 0u) | (behind[1] < kUnit ? c << behind[1] : 0u);
      }
    }
  }
};

// Writes the mask's bytes that begin in a unit's columns: one, or up to two if its rows are planes.
struct MaskWriter {
  int64_t row_bytes;
  uint32_t at[2];          // from the row's first byte
  int start[2], count[2];  // the byte's first column in the unit, and its bits; none where count is 0
  __device__ MaskWriter(const Rows& r, const Spot& s)
      : row_bytes(r.units), at{static_cast<uint32_t>(s.unit), 0}, start{0, 0}, count{s.owner ? kUnit : 0, 0} {
    if (!r.plane_mask) return;
    const int64_t bytes = (r.side + kUnit - 1) / kUnit, channel = quotient(s.first, r.side);
    const int64_t within = s.first - channel * r.side, next = (within + kUnit - 1) / kUnit, rest = r.side - within;
    row_bytes = r.channels * bytes;
    start[0] = static_cast<int>(next * kUnit - within), at[0] = static_cast<uint32_t>(channel * bytes + next);
    const int64_t bits = r.side - next * kUnit;  // of the plane from there on
    count[0] = !s.owner || bits <= 0 ? 0 : bits < kUnit ? static_cast<int>(bits) : kUnit;
    start[1] = static_cast<int>(rest < kUnit ? rest : 0), at[1] = static_cast<uint32_t>((channel + 1) * bytes);
    count[1] = s.owner && start[1] > 0 && start[1] < s.have ? kUnit : 0;
  }
  // By all threads of a warp together. A byte's other columns are in the next lane's unit.
  __device__ void store(const Rows& r, uint8_t* mask, int64_t row, bool exists, unsigned bits) const {
    uint8_t* to = mask + row * row_bytes;
    if (!r.plane_mask) {
      if (exists) to[at[0]] = static_cast<uint8_t>(bits);
      return;
    }
    bits |= __shfl_down_sync(kAll, bits, 1) << kUnit;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (exists && count[i] > 0) to[at[i]] = static_cast<uint8_t>((bits >> start[i]) & ((1u << count[i]) - 1));
  }
};

}  // namespace cuda
}  // namespace fused_ops

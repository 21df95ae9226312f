// Linear cross-entropy's tiles of transposed logits, (classes, rows), on a GPU: what each row's classes add to
//
//   max_r = max_j z_jr,   others_r = sum_{j != target_r} exp(z_jr - max_r),
//
// and, when these are known of all classes, the tile's gradient: z_jr becomes exp(z_jr - max_r) factor_r.
//
// Memory: the sums read every logit once, and write and read 8 bytes a row (of float32 16) of every kSegment classes;
// the gradients read and write every logit once. A lane of a warp has 16 bytes of adjacent rows, the warps of a block
// take every kParts-th class, the blocks kSegment classes each. A lane loads kAhead vectors before it uses the first.
//
// Stability: as cross_entropy/cuda/index_forward.cu. Merges are in a fixed order that depends on the number of classes
// alone. See docs/linear_cross_entropy.md.
#include "cross_entropy/cuda/loops.cuh"
#include "linear_cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {
namespace {

constexpr int kParts = kBlock / 32;     // warps of a block
constexpr int kSegment = 512;           // classes that a block takes of its rows
constexpr int kAhead = 4;               // classes whose vectors a lane loads at once
constexpr int kStep = kAhead * kParts;  // classes that a block takes at once

template <class T>
using Sums = Online<float, sum_t<T>>;
template <class T>
constexpr int kTileRows = 32 * kVector<T>;  // of a block

// What a lane takes of a tile: kVector<T> rows, of which `have` are there, and a segment's classes.
struct Share {
  int64_t row, begin;
  int have, classes;
};
template <class T>
__device__ inline Share share_of(const LinearCrossEntropyTile& tile, int64_t item) {
  const int64_t groups = ceil_div(tile.rows, int64_t{kTileRows<T>}), segment = item / groups;
  const int64_t row = (item - segment * groups) * kTileRows<T> + static_cast<int>(threadIdx.x) % 32 * kVector<T>;
  const int64_t begin = segment * kSegment, left = tile.classes - begin, have = tile.rows - row;
  return {row, begin,
          static_cast<int>(have < 0            ? 0
                           : have < kVector<T> ? have
                                               : kVector<T>),
          static_cast<int>(left < kSegment ? left : kSegment)};
}
template <class T>
__host__ __device__ inline int64_t items_of(const LinearCrossEntropyTile& tile) {
  return ceil_div(tile.rows, int64_t{kTileRows<T>}) * ceil_div(tile.classes, int64_t{kSegment});
}

// Where the target of a share's k-th row is among its classes, or -1.
__device__ inline int place_of(const LinearCrossEntropyTile& tile, const Share& share, int k) {
  if (k >= share.have) return -1;
  const int64_t at = tile.target[share.row + k] - tile.first_class - share.begin;
  return at >= 0 && at < share.classes ? static_cast<int>(at) : -1;
}

// The vectors of classes c, c + kParts, ... of a share, -inf where there are none.
template <class T>
__device__ inline void load_share(const T* x, int64_t stride, const Share& share, int c, Words* words) {
  constexpr int kV = kVector<T>;
  float none[kV];
#pragma unroll
  for (int k = 0; k < kV; ++k) none[k] = -kInfinity<float>;
  const Words filler = pack<T>(none);
#pragma unroll
  for (int a = 0; a < kAhead; ++a) {
    words[a] = filler;
    if (c + a * kParts < share.classes && share.have == kV) words[a] = load_aligned(x + a * kParts * stride);
  }
  if (share.have == kV || share.have == 0) return;
#pragma unroll
  for (int a = 0; a < kAhead; ++a) {
    if (c + a * kParts >= share.classes) continue;
    float v[kV];
#pragma unroll
    for (int k = 0; k < kV; ++k) v[k] = k < share.have ? to_acc(x[a * kParts * stride + k]) : -kInfinity<float>;
    words[a] = pack<T>(v);
  }
}

// A lane's running maxima and sums of its rows' classes but the target's, whose logits it writes.
template <class T>
__device__ inline void share_sums(const TileSumsCall& c, const Share& share, Sums<T>* s) {
  constexpr int kV = kVector<T>;
  const int part = static_cast<int>(threadIdx.x) / 32;
  const T* x = static_cast<const T*>(c.tile.logits) + (share.begin + part) * c.tile.stride + share.row;
  int at[kV];
#pragma unroll
  for (int k = 0; k < kV; ++k) s[k] = {-kInfinity<float>, 0}, at[k] = place_of(c.tile, share, k);
  for (int first = part; first < share.classes; first += kStep, x += kStep * c.tile.stride) {
    Words words[kAhead];
    float v[kAhead][kV], column[kAhead];
    load_share(x, c.tile.stride, share, first, words);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) unpack<T>(words[a], v[a]);
#pragma unroll
    for (int k = 0; k < kV; ++k) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const bool is_target = at[k] == first + a * kParts;
        if (is_target) c.sums.target_logit[share.row + k] = v[a][k];
        column[a] = is_target ? -kInfinity<float> : v[a][k];
      }
      add_values<T, kAhead>(s[k], column);
    }
  }
}

// A block's sums of kTileRows rows over a segment: to parts, (segments, rows).
template <class T>
__global__ void __launch_bounds__(kBlock, 2) tile_sums(TileSumsCall c, Sums<T>* parts) {
  constexpr int kV = kVector<T>, kRows = kTileRows<T>;
  __shared__ Sums<T> shares[kParts * kRows];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < items_of<T>(c.tile); item += gridDim.x) {
    const Share share = share_of<T>(c.tile, item);
    Sums<T> s[kV];
    share_sums<T>(c, share, s);
    __syncthreads();  // the sums of the item before have been read
#pragma unroll
    for (int k = 0; k < kV; ++k) shares[thread / 32 * kRows + thread % 32 * kV + k] = s[k];
    __syncthreads();
    const int64_t row = share.row - thread % 32 * kV + thread;
    if (thread >= kRows || row >= c.tile.rows) continue;
    Sums<T> sum = shares[thread];
    for (int part = 1; part < kParts; ++part) sum = merged(sum, shares[part * kRows + thread]);
    parts[share.begin / kSegment * c.tile.rows + row] = sum;
  }
}

// A thread a row: adds its segments in order to what is known of it.
template <class T>
__global__ void __launch_bounds__(kBlock) tile_sums_finish(TileSumsCall c, const Sums<T>* parts, int64_t segments) {
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < c.tile.rows;
       row += int64_t{gridDim.x} * kBlock) {
    Online<float, double> sum{c.sums.max[row], c.sums.others[row]};
    for (int64_t s = 0; s < segments; ++s) {
      const Sums<T> part = parts[s * c.tile.rows + row];
      sum = merged(sum, Online<float, double>{part.max, static_cast<double>(part.sum)});
    }
    const int64_t target = c.tile.target[row], here = target - c.tile.first_class;
    const float at_target = here >= 0 && here < c.tile.classes ? c.sums.target_logit[row] : -kInfinity<float>;
    if (at_target > sum.max) sum.sum *= static_cast<double>(rescale(sum.max, at_target)), sum.max = at_target;
    const bool bad = target != kNoTarget && (target < 0 || target >= c.classes);
    c.sums.max[row] = sum.max, c.sums.others[row] = bad ? kNaN<double> : sum.sum;
    if (bad) refuse_target();
  }
}

// A lane's gradients of its rows' classes, as if none were the target's.
template <class T>
__device__ inline void share_grads(const TileGradsCall& c, const Share& share) {
  constexpr int kV = kVector<T>;
  const int part = static_cast<int>(threadIdx.x) / 32;
  float max[kV], factor[kV];
  unsigned counts = 0;  // a bit a row: another has no gradient, whatever its logits are
#pragma unroll
  for (int k = 0; k < kV; ++k) {
    const bool there = k < share.have;
    const int64_t row = share.row + k;
    max[k] = there ? c.grads.max[row] : 0.0f, factor[k] = there ? c.grads.factor[row] : 0.0f;
    counts |= there && c.tile.target[row] != kNoTarget ? 1u << k : 0u;
  }
  T* x = static_cast<T*>(c.tile.logits) + (share.begin + part) * c.tile.stride + share.row;
  for (int first = part; first < share.classes; first += kStep, x += kStep * c.tile.stride) {
    Words words[kAhead];
    load_share<T>(x, c.tile.stride, share, first, words);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (first + a * kParts >= share.classes) continue;
      float v[kV];
      unpack<T>(words[a], v);
#pragma unroll
      for (int k = 0; k < kV; ++k) v[k] = counts >> k & 1u ? exp_of<T>(v[k] - max[k]) * factor[k] : 0.0f;
      T* to = x + a * kParts * c.tile.stride;
      if (share.have == kV)
        store_aligned(to, pack<T>(v));
      else
        store_elements(to, 0, share.have, v);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock, 3) tile_grads(TileGradsCall c) {
  for (int64_t item = blockIdx.x; item < items_of<T>(c.tile); item += gridDim.x) {
    Share share = share_of<T>(c.tile, item);
    share_grads<T>(c, share);
    __syncthreads();  // the targets' gradients come last
    share.row += static_cast<int>(threadIdx.x) - static_cast<int>(threadIdx.x) % 32 * kVector<T>;
    if (threadIdx.x >= kTileRows<T> || share.row >= c.tile.rows) continue;
    share.have = 1;
    const int at = place_of(c.tile, share, 0);
    T* x = static_cast<T*>(c.tile.logits) + (share.begin + at) * c.tile.stride + share.row;
    if (at >= 0) set(*x, c.grads.target_grad[share.row]);
  }
}

template <class T>
int32_t sums(const TileSumsCall& c, void* stream) {
  Launcher launch(stream);
  Sums<T>* parts = reinterpret_cast<Sums<T>*>(c.scratch);
  launch(tile_sums<T>, blocks_of(items_of<T>(c.tile)), kBlock, c, parts);
  launch(tile_sums_finish<T>, blocks_of(ceil_div(c.tile.rows, kBlock)), kBlock, c, static_cast<const Sums<T>*>(parts),
         ceil_div(c.tile.classes, int64_t{kSegment}));
  return launch.error();
}

template <class T>
int32_t grads(const TileGradsCall& c, void* stream) {
  Launcher launch(stream);
  launch(tile_grads<T>, blocks_of(items_of<T>(c.tile)), kBlock, c);
  return launch.error();
}

}  // namespace

#define FUSED_OPS_WITH_TILE_DTYPE(dtype, T, ...) \
  FUSED_OPS_WITH_DTYPE(dtype, T, if constexpr (sizeof(T) < 8) { __VA_ARGS__; })

int64_t tile_sums_scratch(const LinearCrossEntropyTile& tile) {
  const int64_t sums = tile.rows * ceil_div(tile.classes, int64_t{kSegment});
  return tile.dtype == DType::float32 ? 2 * sums : sums;
}

int32_t linear_cross_entropy_tile_sums(const TileSumsCall& call, void* stream) {
  FUSED_OPS_WITH_TILE_DTYPE(call.tile.dtype, T, return sums<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

int32_t linear_cross_entropy_tile_grads(const TileGradsCall& call, void* stream) {
  FUSED_OPS_WITH_TILE_DTYPE(call.tile.dtype, T, return grads<T>(call, stream))
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace fused_ops

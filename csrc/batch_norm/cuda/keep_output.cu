// What a batch norm that keeps its output stores of its input besides, on a GPU: docs/batch_norm.md, "Saving the
// output".
//
// Memory, with N values of e bytes: N / 8 for the bits, N e more of the output where activation is elu; and the stored
// values twice. Four launches. How many there are is known on the device after the third; a caller that wants no more
// memory for them than they need must read it there.
#include "batch_norm/cuda/kept_output.cuh"

namespace fused_ops {
namespace cuda {
namespace {

constexpr int64_t kWarps = kBlock / 32;

// The scratch memory: each channel's limit, and how many values each block of threads stores, and all before it.
struct KeepScratch {
  double* limits;   // (channels,)
  int64_t* totals;  // (blocks + 1,)
  __host__ __device__ explicit KeepScratch(const KeepCall& c)
      : limits(c.scratch), totals(reinterpret_cast<int64_t*>(c.scratch + c.shape.channels)) {}
};

inline int64_t values_of(const BatchNormShape& s) { return s.batch * s.channels * s.spatial; }

// The blocks of threads that mark all values, and the block of values behind the last.
inline int64_t blocks_with_end(const BatchNormShape& s) {
  return ceil_div((ceil_div(values_of(s), kStoredBlock) + 1) * kStoredBlock, kBlock * kUnit);
}

__global__ void __launch_bounds__(kBlock) set_limits(KeepCall c) {
  const int64_t channel = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (channel < c.shape.channels)
    KeepScratch(c).limits[channel] = stored_limit(c.parameters, channel, c.activation, c.slope, c.smallest);
}

// A thread a unit of values in the order of memory.
template <class T>
__global__ void __launch_bounds__(kBlock) mark_stored(KeepCall c, int64_t values) {
  using A = acc_t<T>;
  const BatchNormShape& s = c.shape;
  const KeepScratch scratch(c);
  const StoredBits stored(c.offsets, values);
  const int64_t unit = int64_t{blockIdx.x} * kBlock + threadIdx.x, at = unit * kUnit;
  const int64_t left = values - at, side = s.channels_last ? 1 : s.spatial;
  const int have = left >= kUnit ? kUnit : left > 0 ? static_cast<int>(left) : 0;
  A y[kUnit] = {};
  if (c.activation == Activation::elu && have > 0) load_unit(static_cast<const T*>(c.output) + at, have, y);
  const int64_t row = quotient(at, side);
  int64_t channel = row % s.channels, within = at - row * side;
  unsigned bits = 0;
  double limit = have > 0 ? scratch.limits[channel] : 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const bool below = c.activation == Activation::elu ? !(y[i] >= static_cast<A>(limit)) : limit != limit;
    bits |= i < have && below ? 1u << i : 0u;
    if (++within < side) continue;
    within = 0, channel = channel + 1 < s.channels ? channel + 1 : 0;
    if (i + 1 < have) limit = scratch.limits[channel];
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (unit / 32 <= stored.blocks) reinterpret_cast<uint8_t*>(stored.bits)[unit] = static_cast<uint8_t>(bits);
  const int mine = sum_group<32>(__popc(bits));
  __shared__ int counts[kWarps];
  if (lane == 0) counts[threadIdx.x / 32] = mine;
  __syncthreads();
  int before = 0;
  for (int64_t w = 0; w < static_cast<int64_t>(threadIdx.x / 32); ++w) before += counts[w];
  if (lane == 0 && unit / 32 <= stored.blocks) stored.before[unit / 32] = before;
  if (threadIdx.x == kBlock - 1) scratch.totals[blockIdx.x] = before + mine;
}

// One block: how many are stored before each block of threads, and in all.
__global__ void __launch_bounds__(kBlock) add_totals(KeepCall c, int64_t blocks) {
  int64_t* totals = KeepScratch(c).totals;
  __shared__ int64_t counts[kBlock];
  int64_t all = 0;
  for (int64_t base = 0; base < blocks; base += kBlock) {
    const int64_t i = base + threadIdx.x;
    __syncthreads();  // the counts before these have been read
    counts[threadIdx.x] = i < blocks ? totals[i] : 0;
    for (int step = 1; step < kBlock; step *= 2) {
      __syncthreads();
      const int64_t other = static_cast<int>(threadIdx.x) >= step ? counts[threadIdx.x - step] : 0;
      __syncthreads();
      counts[threadIdx.x] += other;
    }
    __syncthreads();
    if (i < blocks) totals[i] = all + (threadIdx.x > 0 ? counts[threadIdx.x - 1] : 0);
    all += counts[kBlock - 1];
  }
  if (threadIdx.x == 0) *c.count = all;
}

template <class T>
__global__ void __launch_bounds__(kBlock) copy_stored(KeepCall c, int64_t values) {
  const StoredBits stored(c.offsets, values);
  const int64_t unit = int64_t{blockIdx.x} * kBlock + threadIdx.x, at = unit * kUnit;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t before = KeepScratch(c).totals[blockIdx.x];
  int64_t next = 0;
  if (unit / 32 <= stored.blocks) next = stored.before[unit / 32] + before;
  __syncwarp();
  if (lane == 0 && unit / 32 <= stored.blocks) stored.before[unit / 32] = next;
  const unsigned bits = at < values ? reinterpret_cast<const uint8_t*>(stored.bits)[unit] : 0u;
  int mine = __popc(bits), ahead = mine;  // up to this lane
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(kAll, ahead, d);
    ahead += lane >= d ? other : 0;
  }
  next += ahead - mine;
  const T* x = static_cast<const T*>(c.input) + at;
#pragma unroll
  for (int i = 0; i < kUnit; ++i)
    if (bits >> i & 1u) static_cast<T*>(c.stored)[next++] = x[i];
}

}  // namespace

int64_t batch_norm_keep_offsets(const BatchNormShape& s) { return StoredBits(nullptr, values_of(s)).size(); }
int64_t batch_norm_keep_scratch(const BatchNormShape& s) { return s.channels + blocks_with_end(s) + 1; }

int32_t batch_norm_keep_mark(const KeepCall& c, void* stream) {
  Launcher launch(stream);
  const int64_t values = values_of(c.shape), blocks = blocks_with_end(c.shape);
  launch(set_limits, ceil_div(c.shape.channels, kBlock), kBlock, c);
  FUSED_OPS_WITH_DTYPE(c.dtype, T, launch(mark_stored<T>, blocks, kBlock, c, values))
  launch(add_totals, 1, kBlock, c, blocks);
  return launch.error();
}

int32_t batch_norm_keep_copy(const KeepCall& c, void* stream) {
  Launcher launch(stream);
  const int64_t values = values_of(c.shape);
  FUSED_OPS_WITH_DTYPE(c.dtype, T, launch(copy_stored<T>, blocks_with_end(c.shape), kBlock, c, values))
  return launch.error();
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

}  // namespace cuda
}  // namespace fused_ops

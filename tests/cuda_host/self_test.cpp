// Kernels with a known fault each: the emulation has to notice them.
#include "cuda_runtime.h"

namespace {

// Right with a barrier between the writes and the reads, dependent on the order of the threads without.
template <bool kBarrier>
__global__ void shift(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

template <class T>
__global__ void warp_functions(T* out) {
  const T mine = static_cast<T>(threadIdx.x);
  out[4 * threadIdx.x] = __shfl_xor_sync(0xffffffffu, mine, 8);
  out[4 * threadIdx.x + 1] = __shfl_down_sync(0xffffffffu, mine, 1, 16);
  out[4 * threadIdx.x + 2] = __shfl_sync(0xffffffffu, mine, 3, 8);
  out[4 * threadIdx.x + 3] = static_cast<T>(__ballot_sync(0xffffffffu, threadIdx.x % 32 == 5) >> 5);
}

// A lane shows the next one a value in shared memory: a shuffle in between orders nothing.
template <bool kBarrier>
__global__ void show_lane(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int own = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0);
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 32] + 0 * own;
}

// Each lane writes where the next one has read; a shuffle of what it read is order enough.
template <bool kShuffle>
__global__ void shift_in_place(int* values) {
  const int next = values[(threadIdx.x + 1) % 32];
  const int shifted = kShuffle ? __shfl_xor_sync(0xffffffffu, next, 0) : next;
  values[threadIdx.x] = shifted;
}

// Two reductions in the same shared memory.
template <bool kBarrier>
__global__ void twice(int* out) {
  __shared__ int value;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value = i;
    __syncthreads();
    out[threadIdx.x] = value;
    if (kBarrier) __syncthreads();
  }
}

// The second block reads what the first has written, or, right, what it has written itself.
template <bool kRight>
__global__ void other_block(int* out) {
  out[64 * blockIdx.x + threadIdx.x] = 1;
  if (threadIdx.x == 0) out[128 + blockIdx.x] = out[64 * (kRight ? blockIdx.x : 0)];
}

// A thread's 16 bytes of any alignment, from two aligned vectors; the others write their own in place.
__global__ void straddle(float* values) {
  const uint4* at = reinterpret_cast<const uint4*>(values) + threadIdx.x;
  const uint4 low = at[0], high = at[1];
  float* own = values + 4 * threadIdx.x + 1;
  own[0] = __uint_as_float(low.y), own[1] = __uint_as_float(low.z), own[2] = __uint_as_float(low.w);
  own[3] = __uint_as_float(high.x);
}

// Half of the threads never reach the barrier.
template <class T>
__global__ void stuck(T*) {
  if (threadIdx.x < 32) __syncthreads();
}

cudaLaunchConfig_t one_block(unsigned threads) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads);
  return config;
}
int run(void (*kernel)(int*), unsigned blocks, unsigned threads, int* out) {
  cudaLaunchConfig_t config = one_block(threads);
  config.gridDim = dim3(blocks);
  return cudaLaunchKernelEx(&config, kernel, out);
}

}  // namespace

extern "C" {
int self_shift(int barrier, int* out) { return run(barrier ? shift<true> : shift<false>, 1, 64, out); }
int self_show_lane(int right, int* out) { return run(right ? show_lane<true> : show_lane<false>, 1, 32, out); }
int self_shift_in_place(int right, int* out) {
  return run(right ? shift_in_place<true> : shift_in_place<false>, 1, 32, out);
}
int self_twice(int right, int* out) { return run(right ? twice<true> : twice<false>, 1, 64, out); }
int self_other_block(int right, int* out) { return run(right ? other_block<true> : other_block<false>, 2, 64, out); }
int self_straddle(float* values) {
  const cudaLaunchConfig_t config = one_block(64);
  return cudaLaunchKernelEx(&config, straddle, values);
}
int self_warp_functions(double* out) {
  const cudaLaunchConfig_t config = one_block(64);
  return cudaLaunchKernelEx(&config, warp_functions<double>, out);
}
int self_stuck() {
  const cudaLaunchConfig_t config = one_block(64);
  return cudaLaunchKernelEx(&config, stuck<int>, static_cast<int*>(nullptr));
}
int self_bad_launch() {
  const cudaLaunchConfig_t config = one_block(48);
  return cudaLaunchKernelEx(&config, stuck<int>, static_cast<int*>(nullptr));
}
}

#include "batch_norm/cuda/channel.cuh"
#include "core/reduce.cuh"

using namespace fused_ops;

extern "C" {
void self_widen(int64_t dtype, const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    to[i] = dtype == 2 ? cuda::to_acc(bfloat16_t{from[i]}) : cuda::to_acc(float16_t{from[i]});
}
void self_narrow(int64_t dtype, const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == 2)
      cuda::set(reinterpret_cast<bfloat16_t*>(to)[i], from[i]);
    else
      cuda::set(reinterpret_cast<float16_t*>(to)[i], from[i]);
  }
}
void self_exp(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = cuda::exact_exp(from[i]);
}
// The sum around the first value and that of the squares of a thread that takes all of them, eight at a time.
void self_moments(const float* from, int64_t n, double* out) {
  cuda::Shifted<float> sums;
  for (int64_t i = 0; i + 8 <= n; i += 8) sums.add<8>(from + i, 8, i == 0, cuda::All{});
  out[0] = sums.sum.value(), out[1] = sums.squares.value();
}
}

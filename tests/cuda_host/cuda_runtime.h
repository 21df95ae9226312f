// The CUDA execution model on the CPU, as far as csrc/*/cuda needs it: test code that lets g++ compile the kernel
// sources unchanged and run them where there is no GPU.
//
// Blocks run one after the other. The threads of a block are fibers of one OS thread that switch at barriers, shuffles
// and votes only, in an order that set_order chooses, each warp as far ahead of the others as barriers let it: a kernel
// whose result depends on that order has a race. races.cpp finds races in any order: the launch fails. A barrier that
// not all threads reach ends the process. Shared memory is filled with ones before every block.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
namespace cuda_host {
void copy_vector(void* to, const void* from);  // in races.cpp
}
struct alignas(16) uint4 {  // copied 16 bytes at a time, as the GPU does
  unsigned x, y, z, w;
  uint4(unsigned x_, unsigned y_, unsigned z_, unsigned w_) : x(x_), y(y_), z(z_), w(w_) {}
  uint4(const uint4& from) { cuda_host::copy_vector(this, &from); }
  uint4& operator=(const uint4& from) { return cuda_host::copy_vector(this, &from), *this; }
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719, cudaErrorAssert = 710 };
using cudaStream_t = void*;
struct cudaLaunchAttribute {};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr int64_t kWatchedBlocks = 32;  // of a launch, the first that run: races show in few
constexpr size_t kStackBytes = 256 * 1024;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

// Where a thread is: its block among all, and how often it has met others there.
struct Stamp {
  int64_t block = 0;
  uint32_t thread = 0, block_barriers = 0, warp_barriers = 0, exchanges = 0;
};

struct Fiber {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  int index = 0, parity = 0;
  dim3 thread;
  Stamp now;
  uint32_t stamp = 0;    // of races.cpp: what `now` is known by there, 0 if it is not yet,
  uintptr_t vector = 0;  // and a load of 16 bytes that it has still to look at
};

struct Machine {
  jmp_buf scheduler;
  std::vector<Fiber> fibers{kMaxThreads};
  Fiber *current = nullptr, *running = nullptr;  // running: current while the kernel's code runs
  std::function<void()> body;
  int threads = 0;
  uint64_t slots[kMaxThreads / kWarp][2][kWarp];
  bool trapped = false, capturing = false, watching = false;
  int64_t launch = 0, launches = 0, blocks = 0, races = 0;  // launch: the number of this one
  unsigned order_seed = 0;
  std::vector<std::pair<void*, size_t>> shared;  // every __shared__ variable of the library
  const unsigned char* canary = nullptr;         // what no launch may change
  int64_t canary_bytes = 0;
};

inline Machine machine;

void finish_loads(Fiber& f);  // in races.cpp

inline void leave() {  // from a fiber to the scheduler
  if (machine.running) machine.running = nullptr, finish_loads(*machine.current);
  if (_setjmp(machine.current->context) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    leave();
    machine.body();
    machine.current->state = State::done;
  }
}

__attribute__((noinline)) inline void enter(Fiber& f) {
  machine.current = &f;
  threadIdx = f.thread;
  if (machine.watching) machine.running = &f;
  if (_setjmp(machine.scheduler) == 0) _longjmp(f.context, 1);
}

__attribute__((noinline)) inline void create(Fiber& f) {
  f.stack.reset(new char[kStackBytes]);
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = f.stack.get();
  fresh.uc_stack.ss_size = kStackBytes;
  fresh.uc_link = nullptr;
  makecontext(&fresh, fiber_main, 0);
  machine.current = &f;
  if (_setjmp(machine.scheduler) == 0) setcontext(&fresh);
}

// Frees those that wait in [begin, end) once all of them do.
inline bool release(int begin, int end, State waiting) {
  for (int i = begin; i < end; ++i)
    if (machine.fibers[i].state != waiting) return false;
  for (int i = begin; i < end; ++i) machine.fibers[i].state = State::ready;
  return true;
}

inline void wait(State kind, bool exchanges = false) {
  Fiber& f = *machine.current;
  f.state = kind;
  leave();
  ++(exchanges ? f.now.exchanges : kind == State::at_block_barrier ? f.now.block_barriers : f.now.warp_barriers);
  f.stamp = 0;
}

inline void order_of(std::vector<int>& order) {
  for (int i = 0; i < machine.threads; ++i) order[i] = i;
  if (machine.order_seed == 1) std::reverse(order.begin(), order.end());
  if (machine.order_seed > 1) {
    std::mt19937 generator(machine.order_seed);
    std::shuffle(order.begin(), order.end(), generator);
  }
}

inline bool run_block(const std::vector<int>& order) {
  for (const auto& [variable, bytes] : machine.shared) std::memset(variable, 0xff, bytes);
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& f = machine.fibers[i];
    f.state = State::ready, f.index = i, f.parity = 0;
    const unsigned u = static_cast<unsigned>(i), x = blockDim.x, y = blockDim.y;
    f.thread = dim3(u % x, u / x % y, u / x / y);
    f.now = {machine.blocks, u, 0, 0, 0}, f.stamp = 0;
  }
  for (;;) {
    bool ran = false;
    for (const int first : order) {  // one warp after the other, each as far as it gets
      if (first % kWarp != 0) continue;
      for (bool moved = true; moved; ran |= moved) {
        moved = false;
        for (const int i : order)
          if (i / kWarp == first / kWarp && machine.fibers[i].state == State::ready)
            enter(machine.fibers[i]), moved = true;
        moved |= release(first, first + kWarp, State::at_warp_barrier);
      }
    }
    ran |= release(0, machine.threads, State::at_block_barrier);
    if (ran) continue;
    for (int i = 0; i < machine.threads; ++i)
      if (machine.fibers[i].state != State::done) {
        std::fprintf(stderr, "cuda_host: thread %d of block %u waits for threads that never come\n", i, blockIdx.x);
        return false;
      }
    return true;
  }
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> body) {
  const int64_t threads = int64_t{config.blockDim.x} * config.blockDim.y * config.blockDim.z;
  if (threads < 1 || threads > kMaxThreads || threads % kWarp || !config.gridDim.x || !config.gridDim.y ||
      config.gridDim.y > 65535 || config.gridDim.x > 0x7fffffffu || config.dynamicSmemBytes)
    return cudaErrorInvalidValue;
  machine.threads = static_cast<int>(threads);
  gridDim = config.gridDim, blockDim = config.blockDim, machine.body = std::move(body);
  ++machine.launch, ++machine.launches;
  for (int i = 0; i < machine.threads; ++i)
    if (!machine.fibers[i].stack) create(machine.fibers[i]);
  std::vector<int> order(static_cast<size_t>(threads));
  order_of(order);
  int64_t ran = 0;
  for (unsigned y = 0; y < config.gridDim.y; ++y)
    for (unsigned i = 0; i < config.gridDim.x; ++i) {
      const unsigned x = machine.order_seed ? config.gridDim.x - 1 - i : i;  // nor may the order of blocks matter
      blockIdx = dim3(x, y, 0);
      ++machine.blocks, machine.watching = ran++ < kWatchedBlocks;
      if (!run_block(order)) std::abort();
    }
  for (int64_t i = 0; i < machine.canary_bytes; ++i)
    if (machine.canary[i] != 0xc5) std::fprintf(stderr, "cuda_host: a kernel wrote behind its scratch\n"), std::abort();
  if (std::exchange(machine.races, 0)) return cudaErrorLaunchFailure;
  return machine.trapped ? cudaErrorAssert : cudaSuccess;
}

template <class T>
const uint64_t* exchange(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& f = *machine.current;
  auto& slots = machine.slots[f.index / kWarp][f.parity ^= 1];
  std::memcpy(&slots[f.index % kWarp], &value, sizeof(T));
  wait(State::at_warp_barrier, true);
  return slots;
}

template <class T>
T from_lane(const uint64_t* slots, int lane) {
  T value;
  std::memcpy(&value, &slots[lane], sizeof(T));
  return value;
}

inline int lane() { return machine.current->index % kWarp; }

inline void need_full(unsigned mask) {
  if (mask != 0xffffffffu) std::fprintf(stderr, "cuda_host: only full masks are known, got %#x\n", mask), std::abort();
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait(cuda_host::State::at_block_barrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::need_full(mask);
  cuda_host::wait(cuda_host::State::at_warp_barrier);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  cuda_host::need_full(mask);
  const int self = cuda_host::lane(), from = self ^ lane_mask;
  const uint64_t* slots = cuda_host::exchange(value);
  return cuda_host::from_lane<T>(slots, from / width == self / width ? from : self);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_host::need_full(mask);
  const int self = cuda_host::lane(), from = self + static_cast<int>(delta);
  const uint64_t* slots = cuda_host::exchange(value);
  return cuda_host::from_lane<T>(slots, from / width == self / width ? from : self);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_host::need_full(mask);
  const int self = cuda_host::lane(), from = self - static_cast<int>(delta);
  const uint64_t* slots = cuda_host::exchange(value);
  return cuda_host::from_lane<T>(slots, from >= self / width * width ? from : self);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  cuda_host::need_full(mask);
  const int from = cuda_host::lane() / width * width + source % width;
  return cuda_host::from_lane<T>(cuda_host::exchange(value), from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  cuda_host::need_full(mask);
  const uint64_t* slots = cuda_host::exchange(predicate != 0 ? 1 : 0);
  unsigned bits = 0;
  for (int i = 0; i < cuda_host::kWarp; ++i) bits |= cuda_host::from_lane<unsigned>(slots, i) << i;
  return bits;
}
inline int atomicAdd(int* to, int value) { return std::exchange(*to, *to + value); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32) | low) >> (shift & 31));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = (static_cast<uint64_t>(static_cast<unsigned>(high)) << 32) | static_cast<unsigned>(low);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline int __double2loint(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return static_cast<int>(bits);
}
inline int __double2hiint(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return static_cast<int>(bits >> 32);
}
inline float __fmul_rn(float a, float b) { return a * b; }  // the tests' compilers join no product to a sum
inline float __expf(float x) { return std::exp(x); }
inline void __trap() { cuda_host::machine.trapped = true; }  // a GPU stops here; the tests go on and look at the row

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  return cuda_host::launch(*config, [=] { kernel(static_cast<Expected>(actual)...); });
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_host::machine.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

extern "C" {
inline __attribute__((used, visibility("default"))) void cuda_host_set_capturing(int capturing) {
  cuda_host::machine.capturing = capturing != 0;
}
inline __attribute__((used, visibility("default"))) void cuda_host_set_order(unsigned seed) {
  cuda_host::machine.order_seed = seed;
}
inline __attribute__((used, visibility("default"))) void cuda_host_shared(void* variable, int64_t bytes) {
  cuda_host::machine.shared.emplace_back(variable, static_cast<size_t>(bytes));
}
inline __attribute__((used, visibility("default"))) void cuda_host_guard(void* memory, int64_t bytes, int64_t behind) {
  unsigned char* canary = static_cast<unsigned char*>(memory) + bytes;
  cuda_host::machine.canary = canary, cuda_host::machine.canary_bytes = behind;
  if (!memory) return;
  std::memset(memory, 0xff, static_cast<size_t>(bytes));
  std::memset(canary, 0xc5, static_cast<size_t>(behind));
}
inline __attribute__((used, visibility("default"))) int64_t cuda_host_launches() {
  return std::exchange(cuda_host::machine.launches, 0);
}
inline __attribute__((used, visibility("default"))) int cuda_host_trapped() {
  return std::exchange(cuda_host::machine.trapped, false) ? 1 : 0;
}
}

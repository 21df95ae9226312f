// What a forward stores of its input where it keeps its output instead, and how a backward reads it.
//
// The values of x that are stored lie packed in the order of memory. Beside them lie, for kStoredBlock values of the
// input each, how many are stored before those, and then a bit for each value: 8 + kStoredBlock / 8 bytes. So the place
// of a stored value is found from any other side than the order of memory, with a few bits to count.
#pragma once
#include "batch_norm/cuda/activation.cuh"
#include "batch_norm/cuda/channel.cuh"
#include "batch_norm/cuda/loops.cuh"

namespace fused_ops {
namespace cuda {

constexpr int64_t kStoredBlock = 256;  // values of a warp, eight a lane
constexpr int64_t kStoredWords = kStoredBlock / 32;

// The two parts of `offsets`. One block more than there are, so that a unit's bits may be read beyond the last.
struct StoredBits {
  int64_t blocks;
  int64_t* before;  // (blocks + 1,)
  uint32_t* bits;   // (blocks + 1, kStoredWords)
  __host__ __device__ StoredBits(int64_t* offsets, int64_t values)
      : blocks((values + kStoredBlock - 1) / kStoredBlock),
        before(offsets),
        bits(reinterpret_cast<uint32_t*>(offsets + blocks + 1)) {}
  __host__ __device__ int64_t size() const { return (blocks + 1) * (1 + kStoredWords / 2); }

  // Those of the values [at, at + have), have at most kUnit.
  __device__ unsigned of(int64_t at, int have) const {
    const unsigned window = __funnelshift_r(bits[at / 32], bits[at / 32 + 1], static_cast<unsigned>(at % 32));
    return window & ((1u << have) - 1u);
  }
  // How many are stored before the value `at`.
  __device__ int64_t rank(int64_t at) const {
    const int64_t block = at / kStoredBlock, word = at / 32;
    int64_t count = before[block];
    for (int64_t w = block * kStoredWords; w < word; ++w) count += __popc(bits[w]);
    return count + __popc(bits[word] & ((1u << (at % 32)) - 1u));
  }
};

// A unit of outputs, v, and of upstream gradients, h, and the channel of each.
template <class A>
struct UnitOfOutput {
  A v[kUnit], h[kUnit];
  int64_t channel[kUnit];
};
// Makes of v x or z, as the channel's deviation is, and of h the gradient before the activation. `at` is the unit's
// first value among all in memory. Called, and without the call's struct: inlined, it is a third of the kernels' code,
// and leaves them too few registers.
template <class T>
__attribute__((noinline)) __device__ void take_output(const int64_t* offsets, int64_t values, const T* stored,
                                                      int64_t count, int64_t at, int have, const double* means,
                                                      double* scratch, int64_t channels, Activation activation,
                                                      acc_t<T> slope, UnitOfOutput<acc_t<T>>* u) {
  using A = acc_t<T>;
  const Coefficients<A> k(scratch, channels);
  const StoredBits all(const_cast<int64_t*>(offsets), values);
  const unsigned bits = offsets == nullptr ? 0u : all.of(at, have);
  int64_t place = bits == 0 ? 0 : all.rank(at);
#pragma unroll 1
  for (int i = 0; i < kUnit; ++i) {
    const A y = u->v[i], g = u->h[i];
    const bool above = y > A(0);
    A v = y, h = g;
    if (activation == Activation::leaky_relu && !above) v = y / slope, h = g * slope;
    if (activation == Activation::elu && !above) v = log1p_(y / slope), h = g * (y + slope);
    if (bits >> i & 1u) {
      const int64_t j = u->channel[i];
      const A mean = static_cast<A>(means[j]), x = place >= 0 && place < count ? to_acc(stored[place]) : mean;
      const A z = (x - mean) * k.scale[j] + k.shift[j];
      v = k.whole[j] != A(0) ? x : z, ++place;
      if (activation == Activation::elu) h = g * derivative<Activation::elu>(z, slope);
    }
    u->v[i] = v, u->h[i] = h;
  }
}

// The same for v and h in registers, the unit `at` of a call; channel(i): of value i.
template <class T, class Channel>
__device__ inline void unit_from_output(const BatchNormBackwardCall& c, int64_t at, int have, const Channel& channel,
                                        acc_t<T>* v, acc_t<T>* h) {
  UnitOfOutput<acc_t<T>> u;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) u.v[i] = v[i], u.h[i] = h[i], u.channel[i] = channel(i);
  take_output(c.kept.offsets, c.kept.values, static_cast<const T*>(c.kept.stored), c.kept.count, c.kept.origin + at,
              have, c.mean, c.scratch, c.shape.channels, c.activation, static_cast<acc_t<T>>(c.slope), &u);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) v[i] = u.v[i], h[i] = u.h[i];
}

}  // namespace cuda
}  // namespace fused_ops

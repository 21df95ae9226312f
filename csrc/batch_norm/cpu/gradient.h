// The gradient before the activation, h = grad_output * activation'(z), a line at a time: what both passes of batch
// norm's backward begin with.
#pragma once
#include "batch_norm/cpu/activation.h"
#include "batch_norm/cpu/loops.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// Where h comes from: g itself; g where z, a bit of the forward's or the output, which is read instead of x, says so;
// or a buffer that holds it.
enum class Before { plain, relu, leaky_relu, relu_bits, leaky_relu_bits, given, kept_leaky_relu };

inline Before before_of(const BatchNormBackward& a) {
  if (a.activation == Activation::none) return Before::plain;
  if (a.kept) return Before::kept_leaky_relu;
  const bool relu = a.activation == Activation::relu, leaky = a.activation == Activation::leaky_relu;
  if (a.mask && relu) return Before::relu_bits;
  if (a.mask && leaky) return Before::leaky_relu_bits;
  if (!a.residual && relu) return Before::relu;
  if (!a.residual && leaky) return Before::leaky_relu;
  return Before::given;
}

#define FUSED_OPS_BEFORE(before, call)                                 \
  switch (before) {                                                    \
    case Before::plain: call(Before::plain) break;                     \
    case Before::relu: call(Before::relu) break;                       \
    case Before::leaky_relu: call(Before::leaky_relu) break;           \
    case Before::relu_bits: call(Before::relu_bits) break;             \
    case Before::leaky_relu_bits: call(Before::leaky_relu_bits) break; \
    case Before::given: call(Before::given) break;                     \
    case Before::kept_leaky_relu: call(Before::kept_leaky_relu) break; \
  }

template <class Coefficient>
struct BackwardCoefficients {
  Coefficient mean, scale, shift, grad_mean, grad_slope;
};

template <class T>
acc_t<T> inverse_slope(const BatchNormBackward& a) {
  return static_cast<acc_t<T>>(a.kept ? 1 / a.slope : 0);
}

template <class T>
struct GradRun {
  const T *x, *g;
  const uint8_t* mask;
  const acc_t<T>* given;  // in the order of lines
  acc_t<T> slope;         // of leaky_relu
  int64_t ahead, soon;    // what is prefetched with each line lies so many values behind it; parts of lines to write
  acc_t<T> inverse_slope;

  inline FUSED_OPS_INLINE void prefetch_line(int64_t i) const { prefetch(x + i + ahead), prefetch(g + i + ahead); }
};

// h of the line `at` on of the run, from that line of its upstream gradient; `bits` are that of its mask.
template <class T, Before kBefore, class Coefficient>
inline FUSED_OPS_INLINE Line<T> grad_before(const Line<T>& x, Line<T> h, const GradRun<T>& run,
                                            typename LineBits<T>::Word bits, const BackwardCoefficients<Coefficient>& c,
                                            int64_t at) {
  using L = Line<T>;
  using V = typename L::V;
  if constexpr (kBefore == Before::given) return L::load_ordered(run.given + at);
  if constexpr (kBefore == Before::kept_leaky_relu)
    for (int k = 0; k < L::kVectors; ++k) h.v[k] = x.v[k] > 0 ? h.v[k] : h.v[k] * run.slope;
  for (int k = 0; k < L::kVectors; ++k) {
    if constexpr (kBefore == Before::relu_bits) h.v[k] = LineBits<T>::select(bits, k, V{}, h.v[k]);
    if constexpr (kBefore == Before::leaky_relu_bits) h.v[k] = LineBits<T>::select(bits, k, h.v[k] * run.slope, h.v[k]);
    if constexpr (kBefore == Before::relu || kBefore == Before::leaky_relu) {
      const int64_t i = at + k * L::kLane;
      const V z = (x.v[k] - c.mean.at(i)) * c.scale.at(i) + c.shift.at(i);
      if constexpr (kBefore == Before::relu)
        h.v[k] = z <= 0 ? V{} : h.v[k];
      else
        h.v[k] = z > 0 ? h.v[k] : h.v[k] * run.slope;
    }
  }
  return h;
}

constexpr bool rebuilds(Before before) {  // z, from the forward's coefficients
  return before == Before::relu || before == Before::leaky_relu || before == Before::given;
}
constexpr bool reads_bits(Before before) { return before == Before::relu_bits || before == Before::leaky_relu_bits; }

// x of a line that was read: of a kept output, what the activation was given.
template <class T, Before kBefore>
inline FUSED_OPS_INLINE Line<T> input_of(Line<T> x, const GradRun<T>& run) {
  if constexpr (kBefore == Before::kept_leaky_relu)
    for (auto& v : x.v) v = v > 0 ? v : v * run.inverse_slope;
  return x;
}

template <class T>
struct LinePair {
  Line<T> x, h;
};

// x and h of the line at i, which is prefetched elsewhere.
template <class T, Before kBefore, class Coefficient>
inline FUSED_OPS_INLINE LinePair<T> whole_line(const GradRun<T>& run, int64_t i,
                                               const BackwardCoefficients<Coefficient>& c) {
  const Line<T> x = input_of<T, kBefore>(Line<T>::load(run.x + i), run);
  typename LineBits<T>::Word bits = 0;
  if (reads_bits(kBefore)) bits = LineBits<T>::load(run.mask + i / 8, Line<T>::kSize);
  return {x, grad_before<T, kBefore>(x, Line<T>::load(run.g + i), run, bits, c, i)};
}

// x and h of the `count` < kSize values at i, both 0 behind them.
template <class T, Before kBefore, class Coefficient>
FUSED_OPS_OF_PARTS LinePair<T> part_of_line(const GradRun<T>& run, int64_t i, int64_t count,
                                            const BackwardCoefficients<Coefficient>& c) {
  const Line<T> x = input_of<T, kBefore>(Line<T>::load_part(run.x + i, count), run);
  const Line<T> g = Line<T>::load_part(run.g + i, count);
  typename LineBits<T>::Word bits = 0;
  if (reads_bits(kBefore)) bits = LineBits<T>::load(run.mask + i / 8, count);
  return {x, grad_before<T, kBefore>(x, g, run, bits, c, i)};
}

// Calls body(x, h, i, count) for the lines of a run's values [i, n); `count` < kSize in the last.
template <class T, Before kBefore, class Coefficient, class Body>
inline FUSED_OPS_INLINE void for_each_line(const GradRun<T>& run, int64_t i, int64_t n,
                                           const BackwardCoefficients<Coefficient>& c, const Body& body) {
  using L = Line<T>;
  for (; i + L::kSize <= n; i += L::kSize) {
    run.prefetch_line(i);
    const L x = input_of<T, kBefore>(L::load(run.x + i), run);
    typename LineBits<T>::Word bits = 0;
    if (reads_bits(kBefore)) bits = LineBits<T>::load(run.mask + i / 8, L::kSize);
    body(x, grad_before<T, kBefore>(x, L::load(run.g + i), run, bits, c, i), i, L::kSize);
  }
  if (i == n) return;
  prefetch_part(run.x + i + run.ahead), prefetch_part(run.g + i + run.ahead);
  const LinePair<T> last = part_of_line<T, kBefore>(run, i, n - i, c);
  body(last.x, last.h, i, n - i);
}

// h of a run of n values, in the order of lines, for any activation; 0 behind them.
template <class T, class Coefficient>
void buffer_before(const BatchNormBackward& a, int64_t offset, int64_t n, const BackwardCoefficients<Coefficient>& c,
                   acc_t<T>* h) {
  using L = Line<T>;
  using A = acc_t<T>;
  alignas(kLineBytes) A g[kPadded];
  const T* x = static_cast<const T*>(a.input) + offset;
  const T* r = a.residual ? static_cast<const T*>(a.residual) + offset : x;
  const T* from = static_cast<const T*>(a.grad_output) + offset;
  const auto line = [&](L z, const L& g_line, const L& extra, int64_t i) FUSED_OPS_INLINE {
    for (int k = 0; k < L::kVectors; ++k) {
      const int64_t at = i + k * L::kLane;
      const auto shift = a.residual ? c.shift.at(at) + extra.v[k] : c.shift.at(at);
      z.v[k] = (z.v[k] - c.mean.at(at)) * c.scale.at(at) + shift;
    }
    z.store_ordered(h + i), g_line.store_ordered(g + i);
  };
  int64_t i = 0;
  for (; i + L::kSize <= n; i += L::kSize) line(L::load(x + i), L::load(from + i), L::load(r + i), i);
  if (i < n) {
    line(L::load_part(x + i, n - i), L::load_part(from + i, n - i), L::load_part(r + i, n - i), i);
    i += L::kSize;
  }
  times_derivative(a.activation, h, g, i, static_cast<A>(a.slope));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

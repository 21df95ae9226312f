// The gradient before the activation, h = grad_output * activation'(z), a line at a time: what both passes of batch
// norm's backward begin with.
#pragma once
#include "batch_norm/cpu/activation.h"
#include "batch_norm/cpu/loops.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// Where h comes from. What trains most models is made in registers: g itself, or g where z, or a bit of the forward's,
// is positive. Everything else, and float64, which is for checks of gradients, goes through a buffer that holds h.
enum class Before { plain, relu, relu_bits, buffered };

template <class T>
inline Before before_of(const BatchNormBackward& a) {
  if (std::is_same_v<T, double>) return Before::buffered;
  if (a.activation == Activation::none) return Before::plain;
  if (a.activation != Activation::relu) return Before::buffered;
  return a.mask ? Before::relu_bits : a.residual ? Before::buffered : Before::relu;
}

// f(before, as an integral_constant), for what before_of<T>() may give.
template <class T, class F>
inline void with_before(Before before, const F& f) {
  if constexpr (!std::is_same_v<T, double>) {
    if (before == Before::plain) return f(std::integral_constant<Before, Before::plain>());
    if (before == Before::relu) return f(std::integral_constant<Before, Before::relu>());
    if (before == Before::relu_bits) return f(std::integral_constant<Before, Before::relu_bits>());
  }
  f(std::integral_constant<Before, Before::buffered>());
}

template <class Coefficient>
struct BackwardCoefficients {
  Coefficient mean, scale, shift, grad_mean, grad_slope;
};

template <class T>
struct GradRun {
  const T *x, *g;
  const uint8_t* mask;
  const acc_t<T>* h;    // the buffer, in the order of lines
  acc_t<T> below;       // factor of a negative x: 1, or where x is a kept output of leaky_relu, its slope's inverse
  int64_t ahead, soon;  // what is prefetched with each line lies so many values behind it; parts of lines to write

  GradRun(const BatchNormBackward& a, int64_t offset, const uint8_t* mask, const acc_t<T>* h, int64_t ahead,
          int64_t soon)
      : x(static_cast<const T*>(a.input) + offset),
        g(static_cast<const T*>(a.grad_output) + offset),
        mask(mask),
        h(h),
        below(static_cast<acc_t<T>>(a.kept ? 1 / a.slope : 1)),
        ahead(ahead),
        soon(soon) {}
  GradRun() = default;

  inline FUSED_OPS_INLINE void prefetch_line(int64_t i) const { prefetch(x + i + ahead), prefetch(g + i + ahead); }
};

// h of the line `at` on of the run, from that line of its upstream gradient; `bits` are that of its mask.
template <class T, Before kBefore, class Coefficient>
inline FUSED_OPS_INLINE Line<T> grad_before(const Line<T>& x, Line<T> h, const GradRun<T>& run,
                                            typename LineBits<T>::Word bits, const BackwardCoefficients<Coefficient>& c,
                                            int64_t at) {
  using L = Line<T>;
  using V = typename L::V;
  if constexpr (kBefore == Before::buffered) return L::load_ordered(run.h + at);
  for (int k = 0; k < L::kVectors; ++k) {
    if constexpr (kBefore == Before::relu_bits) h.v[k] = LineBits<T>::select(bits, k, V{}, h.v[k]);
    if constexpr (kBefore == Before::relu) {
      const int64_t i = at + k * L::kLane;
      const V z = (x.v[k] - c.mean.at(i)) * c.scale.at(i) + c.shift.at(i);
      h.v[k] = z <= 0 ? V{} : h.v[k];
    }
  }
  return h;
}

constexpr bool rebuilds(Before before) {  // z, from the forward's coefficients
  return before == Before::relu || before == Before::buffered;
}
constexpr bool reads_bits(Before before) { return before == Before::relu_bits; }

// x of a line that was read: of a kept output, what the activation was given.
template <class T, Before kBefore>
inline FUSED_OPS_INLINE Line<T> input_of(Line<T> x, const GradRun<T>& run) {
  if constexpr (kBefore == Before::buffered)
    for (auto& v : x.v) v = v > 0 ? v : v * run.below;
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
void buffer_before(const BatchNormBackward& a, const GradRun<T>& run, int64_t offset, int64_t n,
                   const BackwardCoefficients<Coefficient>& c, acc_t<T>* h) {
  using L = Line<T>;
  using A = acc_t<T>;
  using V = typename L::V;
  alignas(kLineBytes) A g[kPadded];
  const T *x = run.x, *r = a.residual ? static_cast<const T*>(a.residual) + offset : x;
  const A slope = static_cast<A>(a.slope);
  const bool relu = a.activation == Activation::relu;
  const bool known = a.kept || run.mask;  // z's sign is, which is all that the derivative depends on
  const auto line = [&](L z, L from, const L& extra, int64_t i, int64_t count) FUSED_OPS_INLINE {
    if (known) {
      const auto bits = run.mask ? LineBits<T>::load(run.mask + i / 8, count) : 0;
      for (int k = 0; k < L::kVectors; ++k) {
        const V low = relu ? V{} : from.v[k] * slope;
        from.v[k] = a.kept ? (z.v[k] > 0 ? from.v[k] : low) : LineBits<T>::select(bits, k, low, from.v[k]);
      }
      return from.store_ordered(h + i);
    }
    for (int k = 0; k < L::kVectors; ++k) {
      const int64_t at = i + k * L::kLane;
      const auto shift = a.residual ? c.shift.at(at) + extra.v[k] : c.shift.at(at);
      z.v[k] = (z.v[k] - c.mean.at(at)) * c.scale.at(at) + shift;
      if (relu) z.v[k] = z.v[k] <= 0 ? V{} : from.v[k];
    }
    z.store_ordered(h + i), from.store_ordered(g + i);
  };
  int64_t i = 0;
  for (; i + L::kSize <= n; i += L::kSize) line(L::load(x + i), L::load(run.g + i), L::load(r + i), i, L::kSize);
  if (i < n) {
    line(L::load_part(x + i, n - i), L::load_part(run.g + i, n - i), L::load_part(r + i, n - i), i, n - i);
    i += L::kSize;
  }
  if (!known && !relu) times_derivative(a.activation, h, g, i, slope);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

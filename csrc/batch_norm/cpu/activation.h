// Activations and their derivatives over a run of values, and the gradient before the activation, h = grad_output *
// activation'(z), a line at a time: what both passes of batch norm's backward begin with.
#pragma once
#include "batch_norm/cpu/loops.h"
#include "simd/special_functions.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

template <class A>
constexpr A kInvSqrt2Pi = static_cast<A>(0.39894228040143267794L);

template <Activation kind, class A>
inline A activated(A z, A slope) {
  if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : z;  // NaN stays
  if constexpr (kind == Activation::leaky_relu) return z > A(0) ? z : z * slope;
  if constexpr (kind == Activation::elu) return z > A(0) ? z : slope * expm1_(z > A(0) ? A(0) : z);
  if constexpr (kind == Activation::silu) return z / (A(1) + exp_close(-z));
  if constexpr (kind == Activation::gelu) return z * normal_below(z, gauss(z));
  if constexpr (kind == Activation::tanh) return tanh_(z);
  if constexpr (kind == Activation::sigmoid) return sigmoid_(z);
  if constexpr (kind == Activation::hardswish) {
    A inner = z + A(3);
    inner = inner < A(0) ? A(0) : inner;
    inner = inner > A(6) ? A(6) : inner;
    return z * inner / A(6);
  }
  return z;
}

template <Activation kind, class A>
inline A derivative(A z, A slope) {
  if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : A(1);
  if constexpr (kind == Activation::leaky_relu) return z > A(0) ? A(1) : slope;
  if constexpr (kind == Activation::elu) return z > A(0) ? A(1) : slope * exp_close(z > A(0) ? A(0) : z);
  if constexpr (kind == Activation::silu) {
    const A s = sigmoid_(z);
    return s * (A(1) + z * (A(1) - s));
  }
  if constexpr (kind == Activation::gelu) {
    const A density = gauss(z);
    return normal_below(z, density) + z * kInvSqrt2Pi<A> * density;
  }
  if constexpr (kind == Activation::tanh) {
    const A gap = tanh_gap(z);
    return A(2) * gap - gap * gap;  // 1 - t^2 = (1 - t) (1 + t), without its cancellation
  }
  if constexpr (kind == Activation::sigmoid) {
    const A e = exp_close(-magnitude(z)), r = A(1) / (A(1) + e);
    return e * r * r;
  }
  if constexpr (kind == Activation::hardswish) return z <= A(-3) ? A(0) : z < A(3) ? z / A(3) + A(0.5) : A(1);
  return A(1);
}

#define FUSED_OPS_ACTIVATIONS(use) \
  use(relu) use(leaky_relu) use(elu) use(silu) use(gelu) use(tanh) use(sigmoid) use(hardswish)

// z[i] = activation(z[i])
template <class A>
inline void activate(Activation kind, A* __restrict z, int64_t n, A slope) {
  switch (kind) {
#define FUSED_OPS_CASE(name)                                                                             \
  case Activation::name: {                                                                               \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) z[i] = activated<Activation::name>(z[i], slope); \
    break;                                                                                               \
  }
    FUSED_OPS_ACTIVATIONS(FUSED_OPS_CASE)
#undef FUSED_OPS_CASE
    case Activation::none: break;
  }
}

// z[i] = g[i] * activation'(z[i])
template <class A>
inline void times_derivative(Activation kind, A* __restrict z, const A* __restrict g, int64_t n, A slope) {
  switch (kind) {
#define FUSED_OPS_CASE(name)                                                                                     \
  case Activation::name: {                                                                                       \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) z[i] = g[i] * derivative<Activation::name>(z[i], slope); \
    break;                                                                                                       \
  }
    FUSED_OPS_ACTIVATIONS(FUSED_OPS_CASE)
#undef FUSED_OPS_CASE
    case Activation::none: {
      for (int64_t i = 0; i < n; ++i) z[i] = g[i];
      break;
    }
  }
}

// ---- the gradient before the activation

// Where h comes from. What trains most models is made in registers: g itself, or g where z, or a bit of the forward's,
// is positive. Everything else goes through a buffer that holds h.
enum class Before { plain, relu, relu_bits, buffered };

template <class T>
inline Before before_of(const BatchNormBackward& a) {
  if (kOnePath<T>) return Before::buffered;
  if (a.activation == Activation::none) return Before::plain;
  if (a.activation != Activation::relu) return Before::buffered;
  return a.mask ? Before::relu_bits : a.residual ? Before::buffered : Before::relu;
}

// f(before, as an integral_constant), for what before_of<T>() may give.
template <class T, class F>
inline void with_before(Before before, const F& f) {
  if constexpr (!kOnePath<T>) {
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
  acc_t<T> below;       // factor of a negative x: 1, or where x is leaky_relu's output, its slope's inverse
  int64_t ahead, soon;  // what is prefetched with each line lies so many values behind it; parts of lines to write

  GradRun(const BatchNormBackward& a, int64_t offset, const uint8_t* mask, const acc_t<T>* h, int64_t ahead,
          int64_t soon)
      : x(static_cast<const T*>(a.input) + offset),
        g(static_cast<const T*>(a.grad_output) + offset),
        mask(mask),
        h(h),
        below(static_cast<acc_t<T>>(a.from_output ? 1 / a.slope : 1)),
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

// x of a line that was read: where that is leaky_relu's output, what the activation was given.
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
  const bool known = a.from_output || run.mask;  // z's sign is, which is all that the derivative depends on
  const auto line = [&](L z, L from, const L& extra, int64_t i, int64_t count) FUSED_OPS_INLINE {
    if (known) {
      const auto bits = run.mask ? LineBits<T>::load(run.mask + i / 8, count) : 0;
      for (int k = 0; k < L::kVectors; ++k) {
        const V low = relu ? V{} : from.v[k] * slope;
        from.v[k] = a.from_output ? (z.v[k] > 0 ? from.v[k] : low) : LineBits<T>::select(bits, k, low, from.v[k]);
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

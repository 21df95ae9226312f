// Batch normalisation on the CPU, forward: the second step, after the moments.
//
//   y = activation((x - mean) * invstd * weight + bias + residual),  invstd = 1 / sqrt(M2 / (n - correction) + eps)
//
// Memory: training reads x twice and writes y once, evaluation reads x once; a residual is read once and a mask is one
// bit a value. NCHW is done channel by channel (see csrc/batch_norm/passes.h), so that a channel which fits the cache
// is read from memory once: 8 bytes a value in float32, 4 in 16 bits. A large y is written by non-temporal
// stores: an ordinary store of a line that is not in the cache reads it first, half as much again.
//
// x - mean is formed before the scaling, never alpha * x + beta. docs/batch_norm.md.
#include "batch_norm/cpu/activation.h"
#include "batch_norm/cpu/loops.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// One run of values and what belongs to it.
template <class T>
struct Run {
  const T *x, *residual;
  T* y;
  uint8_t* mask;
  int64_t n;
  bool stream;
  int64_t ahead, soon;  // what is prefetched with each line lies so many values behind it, of the residual `soon`
};

template <class Coefficient>
struct Affine {
  Coefficient mean, scale, shift;
};

// activation((x - mean) * scale + shift + residual) of the line whose coefficients are `at` on, and the bits of its
// sign.
template <class T, Activation kind, bool kResidual, class Coefficient>
inline FUSED_OPS_INLINE Line<T> applied(Line<T> z, const Line<T>& r, const Affine<Coefficient>& c, int64_t at,
                                        typename LineBits<T>::Word* bits) {
  using V = typename Line<T>::V;
  for (int k = 0; k < Line<T>::kVectors; ++k) {
    const int64_t i = at + k * Line<T>::kLane;
    V shift = c.shift.at(i);
    if constexpr (kResidual) shift += r.v[k];
    z.v[k] = (z.v[k] - c.mean.at(i)) * c.scale.at(i) + shift;
  }
  if (bits) *bits = LineBits<T>::positive(z);
  for (int k = 0; k < Line<T>::kVectors; ++k) {
    if constexpr (kind == Activation::relu) z.v[k] = z.v[k] <= 0 ? V{} : z.v[k];  // NaN stays
  }
  return z;
}

// `count` < kSize values at i.
template <class T, Activation kind, bool kResidual, class Coefficient>
FUSED_OPS_OF_PARTS void apply_part(const Run<T>& run, const Affine<Coefficient>& c, int64_t i, int64_t count) {
  const Line<T> x = Line<T>::load_part(run.x + i, count);
  const Line<T> r = kResidual ? Line<T>::load_part(run.residual + i, count) : x;
  typename LineBits<T>::Word bits = 0;
  constexpr bool kMayMask = kResidual && kind != Activation::none;
  applied<T, kind, kResidual>(x, r, c, i, kMayMask ? &bits : nullptr).store_part(run.y + i, count);
  if (kMayMask && run.mask) LineBits<T>::store(bits, count, run.mask + i / 8);
}

// No activation, or relu: a line never leaves the registers.
template <class T, Activation kind, bool kResidual, class Coefficient>
void apply_lines(const Run<T>& run, const Affine<Coefficient>& coefficients) {
  using L = Line<T>;
  constexpr bool kMayMask = kResidual && kind != Activation::none;  // else the backward rebuilds the sign from x
  const Affine<Coefficient> c = coefficients;                       // no store to y can change a copy
  const T *x = run.x, *r = run.residual;
  const int64_t n = run.n, before = run.stream ? values_before_line(run.y, n) : 0;
  const int64_t ahead = run.ahead, soon = run.soon;
  uint8_t* mask = kMayMask ? run.mask : nullptr;
  T* y = run.y;
  bool stream = run.stream;
  int64_t i = 0;
  if (before) {
    stream = std::is_same_v<Coefficient, Spread<T>> && (!mask || before % 8 == 0);
    if (stream) apply_part<T, kind, kResidual>(run, c, 0, before), i = before;
  }
  if (run.stream && (before || (n - i) % L::kSize)) prefetch(y + soon), prefetch(y + n - 1 + soon);
  for (; i + L::kSize <= n; i += L::kSize) {
    typename LineBits<T>::Word bits = 0;
    prefetch(x + i + ahead);
    if (kResidual) prefetch(r + i + soon);
    const L in = L::load(x + i), extra = kResidual ? L::load(r + i) : in;
    const L z = applied<T, kind, kResidual>(in, extra, c, i, mask ? &bits : nullptr);
    if (mask) LineBits<T>::store(bits, L::kSize, mask + i / 8);
    if (stream)
      z.template store<true>(y + i);
    else
      z.template store<false>(y + i);
  }
  if (i == n) return;
  prefetch_part(x + i + ahead);
  if (kResidual) prefetch_part(r + i + soon);
  apply_part<T, kind, kResidual>(run, c, i, n - i);
}

// The others, and types with one path: a run of z in a buffer, then the activation over it.
template <class T, class Coefficient>
void apply_buffered(const Run<T>& run, const Affine<Coefficient>& c, Activation activation, acc_t<T> slope) {
  using L = Line<T>;
  alignas(kLineBytes) acc_t<T> z[kPadded];
  const T *x = run.x, *r = run.residual ? run.residual : x;
  int64_t i = 0;
  const auto rebuild = [&](const L& in, const L& extra, int64_t count) FUSED_OPS_INLINE {
    typename LineBits<T>::Word bits = 0, *wanted = run.mask ? &bits : nullptr;
    const L line = run.residual ? applied<T, Activation::none, true>(in, extra, c, i, wanted)
                                : applied<T, Activation::none, false>(in, extra, c, i, wanted);
    line.store_ordered(z + i);
    if (wanted) LineBits<T>::store(bits, count, run.mask + i / 8);
  };
  for (; i + L::kSize <= run.n; i += L::kSize) {
    prefetch(x + i + run.ahead), prefetch(r + i + run.soon);
    rebuild(L::load(x + i), L::load(r + i), L::kSize);
  }
  const int64_t whole = i, left = run.n - i;
  if (left) rebuild(L::load_part(x + i, left), L::load_part(r + i, left), left);
  activate(activation, z, left ? whole + L::kSize : whole, slope);
  const bool stream = run.stream && values_before_line(run.y, run.n) == 0;
  for (i = 0; i < whole; i += L::kSize) {
    const L line = L::load_ordered(z + i);
    if (stream)
      line.template store<true>(run.y + i);
    else
      line.template store<false>(run.y + i);
  }
  if (left) L::load_ordered(z + whole).store_part(run.y + whole, left);
}

template <class T, Activation kind, class Coefficient>
inline void apply_lines(const Run<T>& run, const Affine<Coefficient>& c) {
  if (run.residual) return apply_lines<T, kind, true>(run, c);
  apply_lines<T, kind, false>(run, c);
}

template <class T, class Coefficient>
inline void apply_at(const BatchNormForward& a, int64_t offset, int64_t n, uint8_t* mask, const Affine<Coefficient>& c,
                     int64_t ahead, int64_t soon) {
  const auto run_of = [&](int64_t i, int64_t count) {
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + offset + i : nullptr;
    return Run<T>{static_cast<const T*>(a.input) + offset + i,
                  residual,
                  static_cast<T*>(a.output) + offset + i,
                  mask ? mask + i / 8 : nullptr,
                  count,
                  a.stream,
                  ahead,
                  soon};
  };
  if constexpr (!kOnePath<T>) {
    if (a.activation == Activation::none) return apply_lines<T, Activation::none>(run_of(0, n), c);
    if (a.activation == Activation::relu) return apply_lines<T, Activation::relu>(run_of(0, n), c);
  }
  // What lies before the first whole line of y is a run of its own, so that the others can be streamed.
  int64_t first = a.stream ? values_before_line(static_cast<T*>(a.output) + offset, n) : 0;
  if (!std::is_same_v<Coefficient, Spread<T>> || (mask && first % 8)) first = 0;
  const acc_t<T> slope = static_cast<acc_t<T>>(a.slope);
  if (first) apply_buffered<T>(run_of(0, first), c, a.activation, slope);
  if (first < n) apply_buffered<T>(run_of(first, n - first), c, a.activation, slope);
}

template <class T>
void zero_invalid(const ChannelLayout& l, T* y, int64_t n, int64_t position) {
  for (int64_t i = 0; l.valid && i < n; ++i)
    if (!l.valid[position + i]) y[i] = T{};
}

template <class T>
void apply_nhwc(const BatchNormForward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item, !a.mask || l.channels % 8 == 0);
  const int64_t column = t.column, row_bytes = (l.channels + 7) / 8;
  const TileValues<T> mean(t, static_cast<const A*>(a.mean) + column),
      scale(t, static_cast<const A*>(a.scale) + column), shift(t, static_cast<const A*>(a.shift) + column);
  const Affine<Ordered<T>> c{Ordered<T>(mean.values), Ordered<T>(scale.values), Ordered<T>(shift.values)};
  T* y = static_cast<T*>(a.output) + column;
  const int64_t ahead = t.ahead(l, kAhead<T>, kMostRows);
  t.for_each_step(t.row_begin, t.row_end, [&](int64_t r, int64_t, int64_t n) {
    if (l.valid && !l.valid[r])
      std::fill_n(y + r * l.channels, n, T{});
    else
      apply_at<T>(a, r * l.channels + column, n, a.mask ? a.mask + r * row_bytes + column / 8 : nullptr, c, ahead,
                  ahead);
  });
}

template <class T>
void apply_nchw(const BatchNormForward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const auto write = [&](const SliceRun& run, int64_t channel) {
    const auto coefficient = [&](const void* from) { return Spread<T>(static_cast<const A*>(from)[channel]); };
    const Affine<Spread<T>> c{coefficient(a.mean), coefficient(a.scale), coefficient(a.shift)};
    apply_at<T>(a, run.offset, run.n, a.mask ? a.mask + run.mask_byte(l, channel) : nullptr, c, run.ahead, run.soon);
    zero_invalid(l, static_cast<T*>(a.output) + run.offset, run.n, run.position(l));
  };
  if (a.by_slice) return for_each_slice_run(l, item, item + 1, kAhead<T>, write);
  const int64_t channel = item / l.parts(), bytes = static_cast<int64_t>(sizeof(T));
  for_each_run_again(l, item, bytes, [&](const SliceRun& run) { write(run, channel); });
}

template <class T>
void apply(const BatchNormForward& a, int64_t begin, int64_t end) {
  const bool columns = a.layout.nhwc();
  for (int64_t k = begin; k < end; ++k) {  // columns from the end, which the first pass has left in the cache
    const int64_t item = columns ? begin + (end - 1 - k) : k;
    if (columns)
      apply_nhwc<T>(a, item);
    else
      apply_nchw<T>(a, item);
  }
  if (a.stream) finish_streaming();
}

}  // namespace

void batch_norm_apply(const BatchNormForward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(apply, batch_norm_apply)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

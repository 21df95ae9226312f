// Batch normalisation on the CPU, backward, in one step from x and the saved statistics: the second pass, after the
// sums.
//
//   z = (x - mean) * scale + shift + residual        h = g * activation'(z), the gradient of residual
//   grad_x = scale * (h - mean(h) - (x - mean) * grad_slope)
//   grad_slope = invstd^2 * sum(h * (x - mean)) / (n - correction)
//
// Memory: reads x and g twice and writes grad_x once, 20 bytes a value in float32; a channel of planes that fits the
// cache is read from memory once (12 bytes). z is rebuilt, except that relu and leaky_relu after a residual read the
// forward's bit of its sign. Large gradients go past the cache: to write a line that is not in it would be to read it
// first.
//
// Stability: h - mean(h) and x - mean are formed before any scaling. See docs/batch_norm.md.
#include "batch_norm/cpu/gradient.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

template <class T>
inline FUSED_OPS_INLINE void store_line(const Line<T>& line, T* to, int64_t count, bool stream) {
  if (count < Line<T>::kSize) {
    line.store_part(to, count);
  } else if (stream) {
    line.template store<true>(to);
  } else {
    line.template store<false>(to);
  }
}

template <class T, Before kBefore, class Coefficient>
void grad_run(const BatchNormBackward& a, const GradRun<T>& values, int64_t offset, int64_t n,
              const BackwardCoefficients<Coefficient>& coefficients) {
  using L = Line<T>;
  const GradRun<T> run = values;  // no store can change a copy
  const BackwardCoefficients<Coefficient> c = coefficients;
  T* to = a.grad_input ? static_cast<T*>(a.grad_input) + offset : nullptr;
  T* residual = a.grad_residual ? static_cast<T*>(a.grad_residual) + offset : nullptr;
  const bool frozen = a.frozen;
  int64_t before = a.stream ? values_before_line(to ? to : residual, n) : 0;
  bool stream = a.stream && (!to || !residual || values_before_line(residual, n) == before);
  if (before && (!std::is_same_v<Coefficient, Spread<T>> || kBefore == Before::buffered || reads_bits(kBefore)))
    stream = false;
  if (!stream) before = 0;
  if (a.stream && (before || (n - before) % L::kSize)) {  // to write a part of a line is to read it
    if (to) prefetch(to + run.soon), prefetch(to + n - 1 + run.soon);
    if (residual) prefetch(residual + run.soon), prefetch(residual + n - 1 + run.soon);
  }
  const auto body = [&](const L& x, const L& h, int64_t i, int64_t count) FUSED_OPS_INLINE {
    if (residual) store_line(h, residual + i, count, stream);
    if (!to) return;
    L out;
    for (int k = 0; k < L::kVectors; ++k) {
      const int64_t at = i + k * L::kLane;
      if (frozen)
        out.v[k] = c.scale.at(at) * h.v[k];
      else
        out.v[k] = c.scale.at(at) * ((h.v[k] - c.grad_mean.at(at)) - (x.v[k] - c.mean.at(at)) * c.grad_slope.at(at));
    }
    store_line(out, to + i, count, stream);
  };
  if (before) {
    const LinePair<T> first = part_of_line<T, kBefore>(run, 0, before, c);
    body(first.x, first.h, 0, before);
  }
  for_each_line<T, kBefore>(run, before, n, c, body);
}

// A run whose h goes through a buffer. Where its outputs do not begin a line of memory, its first values are one by
// themselves, so that the others can be streamed.
template <class T, class Coefficient>
void grad_buffered(const BatchNormBackward& a, int64_t offset, int64_t n, const uint8_t* mask,
                   const BackwardCoefficients<Coefficient>& c, int64_t ahead, int64_t soon) {
  alignas(kLineBytes) acc_t<T> h[kPadded];
  const void* out = a.grad_input ? a.grad_input : a.grad_residual;
  int64_t first = a.stream ? values_before_line(static_cast<const T*>(out) + offset, n) : 0;
  if (!std::is_same_v<Coefficient, Spread<T>> || (mask && first % 8)) first = 0;
  for (int64_t i = 0, count = first ? first : n; i < n; i += count, count = n - i) {
    const GradRun<T> run(a, offset + i, mask ? mask + i / 8 : nullptr, h, ahead, soon);
    buffer_before<T>(a, run, offset + i, count, c, h);
    grad_run<T, Before::buffered>(a, run, offset + i, count, c);
  }
}

template <class T, class Coefficient>
inline void grad_at(const BatchNormBackward& a, Before before, int64_t offset, int64_t n, const uint8_t* mask,
                    const BackwardCoefficients<Coefficient>& c, int64_t ahead, int64_t soon) {
  if (before == Before::buffered) return grad_buffered<T>(a, offset, n, mask, c, ahead, soon);
  const GradRun<T> run(a, offset, mask, nullptr, ahead, soon);
  with_before<T>(before, [&](auto kind) { grad_run<T, decltype(kind)::value>(a, run, offset, n, c); });
}

template <class T>
void zero(const BatchNormBackward& a, int64_t offset, int64_t n) {
  if (a.grad_input) std::fill_n(static_cast<T*>(a.grad_input) + offset, n, T{});
  if (a.grad_residual) std::fill_n(static_cast<T*>(a.grad_residual) + offset, n, T{});
}

template <class T>
void grad_tile(const BatchNormBackward& a, Before before, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item, !a.mask || l.channels % 8 == 0);
  const int64_t column = t.column, row_bytes = (l.channels + 7) / 8;
  const auto values = [&](const void* from, bool wanted) {
    return TileValues<T>(t, static_cast<const A*>(from) + column, wanted);
  };
  const bool shifts = rebuilds(before), reduced = a.grad_input && !a.frozen;
  const TileValues<T> mean = values(a.mean, true), scale = values(a.scale, true), shift = values(a.shift, shifts),
                      grad_mean = values(a.grad_mean, reduced), grad_slope = values(a.grad_slope, reduced);
  const BackwardCoefficients<Ordered<T>> c{Ordered<T>(mean.values), Ordered<T>(scale.values), Ordered<T>(shift.values),
                                           Ordered<T>(grad_mean.values), Ordered<T>(grad_slope.values)};
  const int64_t ahead = t.ahead(l, kAhead<T>, kMostRows);
  t.for_each_step(t.row_begin, t.row_end, [&](int64_t r, int64_t, int64_t n) {
    const int64_t offset = r * l.channels + column;
    if (l.valid && !l.valid[r])
      zero<T>(a, offset, n);
    else
      grad_at<T>(a, before, offset, n, a.mask ? a.mask + r * row_bytes + column / 8 : nullptr, c, ahead, ahead);
  });
}

template <class T>
void grad_planes(const BatchNormBackward& a, Before before, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const auto write = [&](const PlaneRun& run, int64_t channel) {
    const auto of = [&](const void* from) { return Spread<T>(static_cast<const A*>(from)[channel]); };
    const BackwardCoefficients<Spread<T>> c{of(a.mean), of(a.scale), of(a.shift), of(a.grad_mean), of(a.grad_slope)};
    grad_at<T>(a, before, run.offset, run.n, a.mask ? a.mask + run.mask_byte(l, channel) : nullptr, c, run.ahead,
               run.soon);
    for (int64_t i = 0; l.valid && i < run.n; ++i)
      if (!l.valid[run.position(l) + i]) zero<T>(a, run.offset + i, 1);
  };
  if (a.by_plane) return for_each_plane_run(l, item, item + 1, kAhead<T>, write);
  const int64_t channel = item / l.parts(), bytes = (a.residual ? 3 : 2) * static_cast<int64_t>(sizeof(T));
  for_each_run_again(l, item, bytes, [&](const PlaneRun& run) { write(run, channel); });
}

template <class T>
void grad_input(const BatchNormBackward& a, int64_t begin, int64_t end) {
  const Before before = before_of<T>(a);
  const bool columns = a.layout.columns();
  for (int64_t k = begin; k < end; ++k) {  // columns from the end, which the first pass has left in the cache
    const int64_t item = columns ? begin + (end - 1 - k) : k;
    if (columns)
      grad_tile<T>(a, before, item);
    else
      grad_planes<T>(a, before, item);
  }
  if (a.stream) finish_streaming();
}

}  // namespace

void batch_norm_grad_input(const BatchNormBackward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_input, batch_norm_grad_input)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

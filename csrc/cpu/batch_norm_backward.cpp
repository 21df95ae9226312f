// Batch normalisation on the CPU, backward, in one step from x and the saved statistics.
//
//   z = (x - mean) * scale + shift + residual        grad_residual = g * activation'(z)
//   grad_x = scale * (grad_residual - mean(grad_residual) - (x - mean) * grad_slope)
//   grad_slope = invstd^2 * sum(grad_residual * (x - mean)) / (n - correction)
//
// Memory: reads x and g twice and writes grad_x once, 20 bytes a value in float32; a channel of planes that fits the
// cache is read from memory once (12 bytes). z is rebuilt, except that relu and leaky_relu after a residual read the
// forward's bit of its sign. With grad_residual, which is written by the sums, the second pass reads it instead of g.
//
// Stability: g - mean(g) and x - mean are formed before any scaling; sums are of doubles. See docs/batch_norm.md.
#include "activation.h"
#include "batch_norm_walk.h"
#include "moments.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

template <class A>
struct Coefficients {
  const A *mean, *scale, *shift, *grad_mean, *grad_slope;
  explicit Coefficients(const BatchNormBackward& a)
      : mean(static_cast<const A*>(a.mean)),
        scale(static_cast<const A*>(a.scale)),
        shift(static_cast<const A*>(a.shift)),
        grad_mean(static_cast<const A*>(a.grad_mean)),
        grad_slope(static_cast<const A*>(a.grad_slope)) {}
};

template <class T>
constexpr int64_t kBuffer = sizeof(T) == sizeof(acc_t<T>) ? 1 : kPadded;

// g * activation'(z) over one run: g itself where there is no activation, else computed in `out`.
template <class T, class Coefficient>
inline const acc_t<T>* grad_before(const BatchNormBackward& a, const acc_t<T>* v, int64_t offset, int64_t n,
                                   Coefficient mean, Coefficient scale, Coefficient shift, const uint8_t* mask,
                                   acc_t<T>* __restrict out) {
  using A = acc_t<T>;
  alignas(64) A buffer[kBuffer<T>];
  const A* g = load_run(static_cast<const T*>(a.grad_output) + offset, n, sizeof(T) == sizeof(A) ? buffer : out);
  if (a.activation == Activation::none) return g;
  if (mask) {
    where_bits(mask, g, sizeof(T) == sizeof(A) ? out : buffer, n, static_cast<A>(a.slope));
    if constexpr (sizeof(T) != sizeof(A)) std::copy_n(buffer, n, out);
    return out;
  }
  if constexpr (sizeof(T) != sizeof(A)) std::copy_n(g, n, buffer), g = buffer;
  if (a.activation == Activation::relu && !a.residual) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (v[i] - mean[i]) * scale[i] + shift[i] <= A(0) ? A(0) : g[i];
    return out;
  }
  if (a.residual) {
    alignas(64) A extra[kBuffer<T>];
    const A* r = load_run(static_cast<const T*>(a.residual) + offset, n, extra);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (v[i] - mean[i]) * scale[i] + (shift[i] + r[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (v[i] - mean[i]) * scale[i] + shift[i];
  }
  times_derivative(a.activation, out, g, n, static_cast<A>(a.slope));
  return out;
}

template <class T>
inline const uint8_t* mask_of(const BatchNormBackward& a, int64_t row, int64_t length, int64_t at) {
  return a.mask ? a.mask + row * ((length + 7) / 8) + at / 8 : nullptr;
}

template <class T>
inline void store_residual(const BatchNormBackward& a, int64_t offset, int64_t n, const acc_t<T>* grad) {
  if (!a.grad_residual) return;
  T* to = static_cast<T*>(a.grad_residual) + offset;
  if constexpr (sizeof(T) == sizeof(acc_t<T>))
    std::copy_n(grad, n, to);
  else
    store_run(to, n, grad);
}

template <class T>
Partial plane_sums(const BatchNormBackward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Coefficients<A> k(a);
  const T* x = static_cast<const T*>(a.input);
  const int64_t c = item / l.parts();
  const Same<A> mean{k.mean[c]}, scale{k.scale[c]}, shift{k.shift[c]};
  alignas(64) A in[kBuffer<T>], out[kPadded];
  ProductLanes lanes(a.exact_mean[c]);
  int64_t count = 0;
  if (l.valid && a.grad_residual)
    for_each_run(l, item, false, [&](int64_t offset, int64_t n, int64_t) {
      std::fill_n(static_cast<T*>(a.grad_residual) + offset, n, T{});
    });
  for_each_run(l, item, true, [&](int64_t offset, int64_t n, int64_t position) {
    const int64_t row = position / l.spatial * l.channels + c, next = next_offset(l, offset, n);
    prefetch_run(x + next, n);
    prefetch_run(static_cast<const T*>(a.grad_output) + next, n);
    const A* v = load_run(x + offset, n, in);
    const A* g =
        grad_before<T>(a, v, offset, n, mean, scale, shift, mask_of<T>(a, row, l.spatial, position % l.spatial), out);
    store_residual<T>(a, offset, n, g);
    lanes.add(g, v, n);
    count += n;
  });
  return {lanes.sum(), lanes.dot(), count};
}

// sum += g, dot += g * (x - mean) in double, over kRows rows.
template <int kRows, class A>
void add_rows(const A* const* grads, const A* const* values, int64_t n, const double* __restrict mean,
              double* __restrict sum, double* __restrict dot) {
  const A* g[kRows];
  const A* x[kRows];
  for (int k = 0; k < kRows; ++k) g[k] = grads[k], x[k] = values[k];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    double s = 0, d = 0;
    for (int k = 0; k < kRows; ++k) {
      const double v = static_cast<double>(g[k][i]);
      s += v, d += v * (static_cast<double>(x[k][i]) - mean[i]);
    }
    sum[i] += s, dot[i] += d;
  }
}

template <class T>
void tile_sums(const BatchNormBackward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item, !a.mask || l.channels % 8 == 0);
  const Coefficients<A> k(a);
  const T* x = static_cast<const T*>(a.input) + t.column;
  const T* grad_output = static_cast<const T*>(a.grad_output) + t.column;
  alignas(64) A buffers[4][kBuffer<T> == 1 ? 1 : kTile], grads[4][kTile], mean[kTile], scale[kTile], shift[kTile];
  alignas(64) double sum[kTile] = {}, dot[kTile] = {}, exact[kTile];
  for (int64_t i = 0; i < t.n; ++i) exact[i] = a.exact_mean[(t.column + i) / a.repeat];
  t.repeat_in_place(exact);
  t.repeat(k.mean + t.column, mean), t.repeat(k.scale + t.column, scale), t.repeat(k.shift + t.column, shift);
  const A *values[4], *before[4];
  int64_t counted = 0, waiting = 0;
  t.for_each_step(t.row_begin, t.row_end, [&](int64_t r, int64_t count, int64_t n) {
    const int64_t offset = r * l.channels + t.column, ahead = (r + kRowsAhead * t.fused) * l.channels;
    prefetch_run(x + ahead, n);
    prefetch_run(grad_output + ahead, n);
    if (l.valid && !l.valid[r]) {
      if (a.grad_residual) std::fill_n(static_cast<T*>(a.grad_residual) + offset, n, T{});
      return;
    }
    if (n < t.width) {  // the last step, of fewer rows
      for (int64_t w = 0; w < waiting; ++w) add_rows<1>(before + w, values + w, t.width, exact, sum, dot);
      waiting = 0;
    }
    values[waiting] = load_run(x + r * l.channels, n, buffers[waiting]);
    before[waiting] = grad_before<T, const A*>(a, values[waiting], offset, n, mean, scale, shift,
                                               mask_of<T>(a, r, l.channels, t.column), grads[waiting]);
    store_residual<T>(a, offset, n, before[waiting]);
    counted += count;
    if (n < t.width)
      add_rows<1>(before, values, n, exact, sum, dot);
    else if (++waiting == 4)
      add_rows<4>(before, values, n, exact, sum, dot), waiting = 0;
  });
  for (int64_t w = 0; w < waiting; ++w) add_rows<1>(before + w, values + w, t.width, exact, sum, dot);
  t.fold(sum), t.fold(dot);
  Partial* partials = a.partials + t.block * l.channels + t.column;
  for (int64_t i = 0; i < t.n; ++i) partials[i] = {sum[i], dot[i], counted};
}

template <class T, class Coefficient>
inline void grad_run(const BatchNormBackward& a, int64_t offset, int64_t n, Coefficient mean, Coefficient scale,
                     Coefficient shift, Coefficient grad_mean, Coefficient slope, const uint8_t* mask) {
  using A = acc_t<T>;
  alignas(64) A in[kBuffer<T>], before[kPadded], result[kBuffer<T>];
  const A* v = load_run(static_cast<const T*>(a.input) + offset, n, in);
  const A* g;
  if (sizeof(T) == sizeof(A) && a.grad_residual)  // the sums have just written it
    g = static_cast<const A*>(a.grad_residual) + offset;
  else
    g = grad_before<T>(a, v, offset, n, mean, scale, shift, mask, before);
  T* to = static_cast<T*>(a.grad_input) + offset;
  A* __restrict out = output_run(to, result);
  if (a.frozen) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = scale[i] * g[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = scale[i] * ((g[i] - grad_mean[i]) - (v[i] - mean[i]) * slope[i]);
  }
  store_run(to, n, out);
}

template <class T>
void tile_grad_input(const BatchNormBackward& a, int64_t item) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Tile t(l, item, !a.mask || l.channels % 8 == 0);
  const int64_t c = t.column;
  const Coefficients<A> k(a);
  alignas(64) A mean[kTile], scale[kTile], shift[kTile], grad_mean[kTile], slope[kTile];
  t.repeat(k.mean + c, mean), t.repeat(k.scale + c, scale), t.repeat(k.shift + c, shift);
  t.repeat(k.grad_mean + c, grad_mean), t.repeat(k.grad_slope + c, slope);
  T* out = static_cast<T*>(a.grad_input);
  t.for_each_step(t.row_begin, t.row_end, [&](int64_t r, int64_t, int64_t n) {
    const int64_t offset = r * l.channels + c, ahead = offset + kRowsAhead * t.fused * l.channels;
    prefetch_run(static_cast<const T*>(a.input) + ahead, n);
    prefetch_run(static_cast<const T*>(a.grad_output) + ahead, n);
    prefetch_run<true>(out + ahead, n);
    if (l.valid && !l.valid[r])
      std::fill_n(out + offset, n, T{});
    else
      grad_run<T, const A*>(a, offset, n, mean, scale, shift, grad_mean, slope, mask_of<T>(a, r, l.channels, c));
  });
}

template <class T>
void grad_sums(const BatchNormBackward& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (a.layout.columns())
      tile_sums<T>(a, item);
    else
      a.partials[item] = plane_sums<T>(a, item);
  }
}

template <class T>
void grad_input(const BatchNormBackward& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const Coefficients<A> k(a);
  T* out = static_cast<T*>(a.grad_input);
  for (int64_t item = begin; item < end; ++item) {
    if (l.columns()) {
      tile_grad_input<T>(a, item);
      continue;
    }
    const auto run = [&](int64_t offset, int64_t n, int64_t position, int64_t c) {
      const int64_t row = position / l.spatial * l.channels + c;
      const Same<A> mean{k.mean[c]}, scale{k.scale[c]}, shift{k.shift[c]}, grad_mean{k.grad_mean[c]},
          slope{k.grad_slope[c]};
      grad_run<T>(a, offset, n, mean, scale, shift, grad_mean, slope,
                  mask_of<T>(a, row, l.spatial, position % l.spatial));
      for (int64_t i = 0; l.valid && i < n; ++i)
        if (!l.valid[position + i]) out[offset + i] = T{};
    };
    if (a.by_plane) {
      for_each_plane_run(l, item, item + 1, run);
      continue;
    }
    for_each_run<true>(l, item, false, [&](int64_t offset, int64_t n, int64_t position) {
      prefetch_run<true>(out + previous_offset(l, offset, n, position), n);
      run(offset, n, position, item / l.parts());
    });
  }
}

}  // namespace

#define FUSED_OPS_DISPATCH(kernel)                                               \
  switch (args.dtype) {                                                          \
    case DType::float32: kernel<float>(args, begin_item, end_item); break;       \
    case DType::float64: kernel<double>(args, begin_item, end_item); break;      \
    case DType::bfloat16: kernel<bfloat16_t>(args, begin_item, end_item); break; \
    case DType::float16: kernel<float16_t>(args, begin_item, end_item); break;   \
  }

void batch_norm_grad_sums(const BatchNormBackward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_sums)
}
void batch_norm_grad_input(const BatchNormBackward& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_input)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Batch normalisation that keeps its output instead of its input: what is stored besides, and the backward.
//
//   z = activation^-1(y)      v = z - bias, or (x - mean) * factor where x was stored: either way xhat is v * inverse
//   h = g * activation'(z)    grad_x = scale * (h - mean(h) - v * inverse^2 * sum(h * v) / (n - correction))
//
// Memory: the backward reads y and g twice and writes grad_x once, 20 bytes a value in float32, and reads what x were
// stored; the forward reads y once more where activation is elu. Channels none of whose x are stored (all, most often,
// but for elu) take the faster way of the ordinary backward instead: see csrc/batch_norm/keep_output_op.cpp. Stability:
// docs/batch_norm.md, "Keeping the output".
#include <algorithm>
#include <memory>

#include "batch_norm/cpu/activation.h"
#include "batch_norm/kernels.h"
#include "simd/special_functions.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// This many values are handled together.
constexpr int64_t kStep = 256;

// One coefficient for a whole run, where columns have an array of them.
template <class A>
struct Single {
  A value;
  A operator[](int64_t) const { return value; }
  Single operator+(int64_t) const { return *this; }
};

template <class A, class C>
struct Rebuild {
  C bias, mean, factor, shift, limit, scale;
  Rebuild operator+(int64_t i) const { return {bias + i, mean + i, factor + i, shift + i, limit + i, scale + i}; }
};

template <class T>
struct Stored {
  const T *next, *end;
  acc_t<T> take(acc_t<T> otherwise) { return next < end ? to_acc(*next++) : otherwise; }
};

// Whether the x of an output is stored.
template <class A>
inline bool is_stored(Keep keep, A y, A limit) {
  return keep == Keep::all || (keep == Keep::below && !(y >= limit));
}

// How many x of [0, n) are.
template <class A, class K, class L>
inline int64_t count_stored(const K& keep, const A* y, const L& limit, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += is_stored<A>(keep[i], y[i], limit[i]);
  return count;
}

// v and h, [0, n) each, from the outputs and upstream gradients at `offset`. `keep` is a channel's (NCHW), or that
// of each of n columns (NHWC).
template <class T, class C, class K>
void rebuild_run(const BatchNormFromOutput& a, int64_t offset, int64_t n, const Rebuild<acc_t<T>, C>& k, K keep,
                 bool any, Stored<T>& stored, acc_t<T>* __restrict v, acc_t<T>* __restrict h) {
  using A = acc_t<T>;
  alignas(64) A y_buffer[kStep], g_buffer[kStep];
  const A* y = load_chunk(static_cast<const T*>(a.output) + offset, 1, n, y_buffer);
  const A* g = load_chunk(static_cast<const T*>(a.grad_output) + offset, 1, n, g_buffer);
  const A slope = static_cast<A>(a.slope), inverse_slope = static_cast<A>(1 / a.slope);
  if (a.activation == Activation::leaky_relu) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      v[i] = (y[i] > A(0) ? y[i] : y[i] * inverse_slope) - k.bias[i];
      h[i] = y[i] > A(0) ? g[i] : g[i] * slope;
    }
  } else if (a.activation == Activation::elu) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A below = y[i] > A(0) ? A(0) : y[i];
      v[i] = (y[i] > A(0) ? y[i] : log1p_below(below * inverse_slope)) - k.bias[i];
      h[i] = y[i] > A(0) ? g[i] : g[i] * (below + slope);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] = y[i] - k.bias[i], h[i] = g[i];
  }
  if (!any) return;
  for (int64_t i = 0; i < n; ++i) {
    if (!is_stored<A>(keep[i], y[i], k.limit[i])) continue;
    v[i] = (stored.take(k.mean[i]) - k.mean[i]) * k.factor[i] + k.shift[i];
    if (a.activation == Activation::elu)
      h[i] = g[i] * derivative<Activation::elu>((keep[i] == Keep::all ? v[i] * k.scale[i] : v[i]) + k.bias[i], slope);
  }
}

template <class A>
const A* row(const void* p) {
  return static_cast<const A*>(p);
}

template <class T>
Stored<T> stored_of(const BatchNormFromOutput& a, int64_t item) {
  const T* all = static_cast<const T*>(a.stored);
  return {all + a.offsets[item], all + a.offsets[item + 1]};
}

// Calls body(offset, n, column, position, k, keep, any) for the runs of an item in the order of memory; `position` is
// the run's first place in (batch, spatial).
template <class T, class Body>
void for_each_step(const BatchNormFromOutput& a, int64_t item, const Body& body) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const A *bias = row<A>(a.bias), *mean = row<A>(a.mean), *factor = row<A>(a.factor), *shift = row<A>(a.shift),
          *limit = row<A>(a.limit), *scale = row<A>(a.scale);
  if (!l.nhwc()) {
    const int64_t c = item % l.channels, b = item / l.channels;
    const Rebuild<A, Single<A>> k{{bias[c]}, {mean[c]}, {factor[c]}, {shift[c]}, {limit[c]}, {scale[c]}};
    const Single<Keep> keep{a.keep[c]};
    for (int64_t s = 0; s < l.spatial; s += kStep)
      body(item * l.spatial + s, std::min(kStep, l.spatial - s), c, b * l.spatial + s, k, keep,
           a.keep[c] != Keep::none);
    return;
  }
  const Rebuild<A, const A*> k{bias, mean, factor, shift, limit, scale};
  const bool any = std::any_of(a.keep, a.keep + l.channels, [](Keep keep) { return keep != Keep::none; });
  const int64_t end = std::min((item + 1) * kFromOutputRows, l.batch);
  for (int64_t r = item * kFromOutputRows; r < end; ++r)
    for (int64_t c = 0; c < l.channels; c += kStep)
      body(r * l.channels + c, std::min(kStep, l.channels - c), c, r, k + c, a.keep + c, any);
}

// Calls body(offset, n, y, keep, limit) for the runs of an item that may have stored x, in the order of memory.
template <class T, class Body>
void for_each_stored(const BatchNormFromOutput& a, int64_t item, const Body& body) {
  using A = acc_t<T>;
  for_each_step<T>(a, item,
                   [&](int64_t offset, int64_t n, int64_t, int64_t, const auto& k, const auto& keep, bool any) {
                     if (!any) return;
                     alignas(64) A buffer[kStep];
                     const A* y = load_chunk(static_cast<const T*>(a.output) + offset, 1, n, buffer);
                     body(offset, n, y, keep, k.limit);
                   });
}

template <class T>
void count_all(const BatchNormFromOutput& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    int64_t count = 0;
    for_each_stored<T>(a, item, [&](int64_t, int64_t n, const acc_t<T>* y, const auto& keep, const auto& limit) {
      count += count_stored(keep, y, limit, n);
    });
    a.offsets[item + 1] = count;
  }
}

template <class T>
void copy_all(const BatchNormFromOutput& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    T* to = static_cast<T*>(a.stored) + a.offsets[item];
    for_each_stored<T>(a, item, [&](int64_t offset, int64_t n, const acc_t<T>* y, const auto& keep, const auto& limit) {
      const T* x = static_cast<const T*>(a.input) + offset;
      T chosen[kStep];
      int64_t count = 0;  // without a branch a value, which none could foresee
      for (int64_t i = 0; i < n; ++i) chosen[count] = x[i], count += is_stored<acc_t<T>>(keep[i], y[i], limit[i]);
      to = std::copy_n(chosen, count, to);
    });
  }
}

// h = 0 where a position does not count; returns how many do. NHWC has one position a run.
template <class A>
int64_t drop_invalid(const ChannelLayout& l, int64_t position, int64_t n, A* h) {
  if (!l.valid) return n;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = l.valid[l.nhwc() ? position : position + i];
    count += counts;
    if (!counts) h[i] = 0;
  }
  return count;
}

template <class T>
void sums(const BatchNormFromOutput& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  alignas(64) A v[kStep], h[kStep];
  const int64_t columns = l.nhwc() ? l.channels : 0;
  const std::unique_ptr<double[]> memory(new double[static_cast<size_t>(2 * columns)]);
  for (int64_t item = begin; item < end; ++item) {
    Stored<T> stored = stored_of<T>(a, item);
    double *sum = memory.get(), *dot = memory.get() + columns, total = 0, product = 0;
    int64_t counted = 0;
    std::fill_n(sum, 2 * columns, 0.0);
    for_each_step<T>(
        a, item,
        [&](int64_t offset, int64_t n, int64_t column, int64_t position, const auto& k, const auto& keep, bool any) {
          rebuild_run<T>(a, offset, n, k, keep, any, stored, v, h);
          const int64_t count = drop_invalid(l, position, n, h);
          if (!columns) {
            counted += count;
            double sums[8] = {}, dots[8] = {};
            int64_t i = 0;
            for (; i + 8 <= n; i += 8) {
#pragma omp simd
              for (int64_t j = 0; j < 8; ++j) {
                sums[j] += static_cast<double>(h[i + j]);
                dots[j] += static_cast<double>(h[i + j]) * static_cast<double>(v[i + j]);
              }
            }
            for (; i < n; ++i) total += h[i], product += static_cast<double>(h[i]) * static_cast<double>(v[i]);
            for (int64_t j = 0; j < 8; ++j) total += sums[j], product += dots[j];
            return;
          }
          if (column == 0) counted += count > 0;
          if (count == 0) return;
          double* __restrict s = sum + column, * __restrict d = dot + column;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i)
            s[i] += static_cast<double>(h[i]), d[i] += static_cast<double>(h[i]) * static_cast<double>(v[i]);
        });
    if (!columns) a.partials[item] = {total, product, counted};
    for (int64_t c = 0; c < columns; ++c) a.partials[item * columns + c] = {sum[c], dot[c], counted};
  }
}

template <class T>
void grads(const BatchNormFromOutput& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const ChannelLayout& l = a.layout;
  const A *scale = row<A>(a.scale), *grad_mean = row<A>(a.grad_mean), *slope = row<A>(a.grad_slope);
  alignas(64) A v[kStep], h[kStep];
  const auto write = [&](int64_t offset, int64_t n, auto k, auto m, auto s) {
    if (a.frozen) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] *= k[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] = k[i] * ((h[i] - m[i]) - v[i] * s[i]);
    }
    store_chunk(static_cast<T*>(a.grad_input) + offset, 1, n, h);
  };
  for (int64_t item = begin; item < end; ++item) {
    Stored<T> stored = stored_of<T>(a, item);
    for_each_step<T>(
        a, item,
        [&](int64_t offset, int64_t n, int64_t c, int64_t position, const auto& k, const auto& keep, bool any) {
          rebuild_run<T>(a, offset, n, k, keep, any, stored, v, h);
          if (l.nhwc())
            write(offset, n, scale + c, grad_mean + c, slope + c);
          else
            write(offset, n, Single<A>{scale[c]}, Single<A>{grad_mean[c]}, Single<A>{slope[c]});
          T* to = static_cast<T*>(a.grad_input) + offset;
          for (int64_t i = 0; l.valid && i < n; ++i)
            if (!l.valid[l.nhwc() ? position : position + i]) to[i] = T{};
        });
  }
}

}  // namespace

// kernel<T>(args, begin_item, end_item), in the function `entry` of the contract.
#define FUSED_OPS_DISPATCH_FROM_OUTPUT(kernel, entry)                                         \
  switch (args.dtype) {                                                                       \
    case DType::float32: kernel<float>(args, begin_item, end_item); break;                    \
    case DType::float64: FUSED_OPS_FLOAT64(kernel, entry, args, begin_item, end_item); break; \
    case DType::bfloat16: kernel<bfloat16_t>(args, begin_item, end_item); break;              \
    case DType::float16: kernel<float16_t>(args, begin_item, end_item); break;                \
  }

void batch_norm_count_stored(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH_FROM_OUTPUT(count_all, batch_norm_count_stored)
}
void batch_norm_copy_stored(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH_FROM_OUTPUT(copy_all, batch_norm_copy_stored)
}
void batch_norm_output_sums(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH_FROM_OUTPUT(sums, batch_norm_output_sums)
}
void batch_norm_output_grads(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH_FROM_OUTPUT(grads, batch_norm_output_grads)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

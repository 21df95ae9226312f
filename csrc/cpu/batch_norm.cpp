// Batch normalisation on the CPU.
//
// Forward:  y = (x - mean) * invstd * weight + bias,  invstd = 1 / sqrt(M2 / (n - correction) + eps).
// Backward: grad_x = weight * invstd * (g - mean(g) - (x - mean) * invstd^2 * sum(g (x - mean)) / (n - correction)).
//
// Memory: training forward reads x twice and writes y once; backward reads x and g twice and writes grad_x once (a
// channel, or a block of rows, that fits the cache is read once from memory).
//
// Stability: mean and M2 per chunk of values in two passes, merged in double; x - mean is formed with the mean split
// into two accumulators, never as alpha * x + beta. See docs/batch_norm.md.
#include "../batch_norm.h"

#include <algorithm>

#include "moments.h"
#include "simd.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

constexpr int64_t kTile = 256;  // channels handled together in a channels-last item

// Calls body(offset, n) for the runs of at most kChunk contiguous values of one channel.
template <class Body>
void for_each_chunk(const ChannelLayout& l, int64_t channel, const Body& body) {
  for (int64_t b = 0; b < l.batch; ++b)
    for (int64_t s = 0; s < l.spatial; s += kChunk)
      body((b * l.channels + channel) * l.spatial + s, std::min(kChunk, l.spatial - s));
}

// Calls body(item, row_begin, row_end, channel, n) for the tiles of rows x channels of the items of a channels-last
// input.
template <class Body>
void for_each_tile(const ChannelLayout& l, int64_t begin_item, int64_t end_item, const Body& body) {
  for (int64_t item = begin_item; item < end_item; ++item)
    for (int64_t c = 0; c < l.channels; c += kTile)
      body(item, item * kRowsPerItem, std::min((item + 1) * kRowsPerItem, l.batch), c, std::min(kTile, l.channels - c));
}

template <class T>
void moments(const BatchNormMoments& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input);
  const ChannelLayout& l = a.layout;
  A buffer[kChunk];
  if (!l.channels_last()) {
    for (int64_t c = begin; c < end; ++c) {
      Moments total;
      for_each_chunk(l, c, [&](int64_t offset, int64_t n) {
        double mean, m2;
        chunk_moments(load_chunk(x + offset, 1, n, buffer), n, &mean, &m2);
        total.merge(mean, m2, n);
      });
      a.partials[c] = {total.mean, total.m2};
    }
    return;
  }
  for_each_tile(l, begin, end, [&](int64_t item, int64_t r0, int64_t r1, int64_t c0, int64_t n) {
    A center[kTile], sum[kTile] = {}, square[kTile] = {};
    const double rows = static_cast<double>(r1 - r0);
    const A* first = load_chunk(x + r0 * l.channels + c0, 1, n, buffer);
    for (int64_t i = 0; i < n; ++i) center[i] = first[i];
    for (int64_t r = r0 + 1; r < r1; ++r) {
      const A* row = load_chunk(x + r * l.channels + c0, 1, n, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sum[i] += row[i] - center[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      center[i] = static_cast<A>(center[i] + sum[i] / rows);
      sum[i] = 0;
    }
    for (int64_t r = r0; r < r1; ++r) {
      const A* row = load_chunk(x + r * l.channels + c0, 1, n, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A d = row[i] - center[i];
        sum[i] += d;
        square[i] += d * d;
      }
    }
    Partial* out = a.partials + item * l.channels + c0;
    for (int64_t i = 0; i < n; ++i) {
      const double s = sum[i];
      out[i] = {center[i] + s / rows, square[i] - s * s / rows};
    }
  });
}

// The per-channel coefficients of a tile or a channel, as accumulators.
template <class A>
struct Centered {
  A high[kTile], low[kTile];
  Centered(const double* mean, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const Split<A> split(mean[i]);
      high[i] = split.high, low[i] = split.low;
    }
  }
};

template <class T>
void apply(const BatchNormApply& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input);
  T* y = static_cast<T*>(a.output);
  const ChannelLayout& l = a.layout;
  A in[kChunk], out[kChunk];
  if (!l.channels_last()) {
    for (int64_t c = begin; c < end; ++c) {
      const Split<A> mean(a.mean[c]);
      const A scale = static_cast<A>(a.scale[c]), bias = static_cast<A>(a.bias[c]);
      for_each_chunk(l, c, [&](int64_t offset, int64_t n) {
        const A* v = load_chunk(x + offset, 1, n, in);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = ((v[i] - mean.high) - mean.low) * scale + bias;
        store_chunk(y + offset, 1, n, out);
      });
    }
    return;
  }
  for_each_tile(l, begin, end, [&](int64_t, int64_t r0, int64_t r1, int64_t c0, int64_t n) {
    const Centered<A> mean(a.mean + c0, n);
    A scale[kTile], bias[kTile];
    for (int64_t i = 0; i < n; ++i)
      scale[i] = static_cast<A>(a.scale[c0 + i]), bias[i] = static_cast<A>(a.bias[c0 + i]);
    for (int64_t r = r0; r < r1; ++r) {
      const A* v = load_chunk(x + r * l.channels + c0, 1, n, in);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = ((v[i] - mean.high[i]) - mean.low[i]) * scale[i] + bias[i];
      store_chunk(y + r * l.channels + c0, 1, n, out);
    }
  });
}

template <class T>
void grad_sums(const BatchNormGradSums& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input);
  const T* g = static_cast<const T*>(a.grad_output);
  const ChannelLayout& l = a.layout;
  A in[kChunk], grad[kChunk];
  if (!l.channels_last()) {
    for (int64_t c = begin; c < end; ++c) {
      const Split<A> mean(a.mean[c]);
      Partial total{0, 0};
      for_each_chunk(l, c, [&](int64_t offset, int64_t n) {
        const A* v = load_chunk(x + offset, 1, n, in);
        const A* u = load_chunk(g + offset, 1, n, grad);
        A sum[kLanes] = {}, dot[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
          for (int64_t k = 0; k < kLanes; ++k) {
            sum[k] += u[i + k];
            dot[k] += u[i + k] * ((v[i + k] - mean.high) - mean.low);
          }
        }
        for (int64_t k = 0; i + k < n; ++k) {
          sum[k] += u[i + k];
          dot[k] += u[i + k] * ((v[i + k] - mean.high) - mean.low);
        }
        total.a += fold(sum);
        total.b += fold(dot);
      });
      a.partials[c] = total;
    }
    return;
  }
  for_each_tile(l, begin, end, [&](int64_t item, int64_t r0, int64_t r1, int64_t c0, int64_t n) {
    const Centered<A> mean(a.mean + c0, n);
    A sum[kTile] = {}, dot[kTile] = {};
    for (int64_t r = r0; r < r1; ++r) {
      const A* v = load_chunk(x + r * l.channels + c0, 1, n, in);
      const A* u = load_chunk(g + r * l.channels + c0, 1, n, grad);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        sum[i] += u[i];
        dot[i] += u[i] * ((v[i] - mean.high[i]) - mean.low[i]);
      }
    }
    Partial* out = a.partials + item * l.channels + c0;
    for (int64_t i = 0; i < n; ++i) out[i] = {sum[i], dot[i]};
  });
}

template <class T>
void grad_input(const BatchNormGradInput& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input);
  const T* g = static_cast<const T*>(a.grad_output);
  T* grad_x = static_cast<T*>(a.grad_input);
  const ChannelLayout& l = a.layout;
  A in[kChunk], grad[kChunk], out[kChunk];
  if (!l.channels_last()) {
    for (int64_t c = begin; c < end; ++c) {
      const Split<A> mean(a.mean[c]), grad_mean(a.grad_mean[c]);
      const A scale = static_cast<A>(a.scale[c]), slope = static_cast<A>(a.slope[c]);
      for_each_chunk(l, c, [&](int64_t offset, int64_t n) {
        const A* v = load_chunk(x + offset, 1, n, in);
        const A* u = load_chunk(g + offset, 1, n, grad);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
          out[i] = scale * ((u[i] - grad_mean.high) - ((v[i] - mean.high) - mean.low) * slope);
        store_chunk(grad_x + offset, 1, n, out);
      });
    }
    return;
  }
  for_each_tile(l, begin, end, [&](int64_t, int64_t r0, int64_t r1, int64_t c0, int64_t n) {
    const Centered<A> mean(a.mean + c0, n);
    A scale[kTile], slope[kTile], grad_mean[kTile];
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = static_cast<A>(a.scale[c0 + i]);
      slope[i] = static_cast<A>(a.slope[c0 + i]);
      grad_mean[i] = static_cast<A>(a.grad_mean[c0 + i]);
    }
    for (int64_t r = r0; r < r1; ++r) {
      const A* v = load_chunk(x + r * l.channels + c0, 1, n, in);
      const A* u = load_chunk(g + r * l.channels + c0, 1, n, grad);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        out[i] = scale[i] * ((u[i] - grad_mean[i]) - ((v[i] - mean.high[i]) - mean.low[i]) * slope[i]);
      store_chunk(grad_x + r * l.channels + c0, 1, n, out);
    }
  });
}

}  // namespace

#define FUSED_OPS_DISPATCH(kernel)                                               \
  switch (args.dtype) {                                                          \
    case DType::float32: kernel<float>(args, begin_item, end_item); break;       \
    case DType::float64: kernel<double>(args, begin_item, end_item); break;      \
    case DType::bfloat16: kernel<bfloat16_t>(args, begin_item, end_item); break; \
    case DType::float16: kernel<float16_t>(args, begin_item, end_item); break;   \
  }

void batch_norm_moments(const BatchNormMoments& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(moments)
}
void batch_norm_apply(const BatchNormApply& args, int64_t begin_item, int64_t end_item) { FUSED_OPS_DISPATCH(apply) }
void batch_norm_grad_sums(const BatchNormGradSums& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_sums)
}
void batch_norm_grad_input(const BatchNormGradInput& args, int64_t begin_item, int64_t end_item) {
  FUSED_OPS_DISPATCH(grad_input)
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

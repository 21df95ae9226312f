// What lies between linear cross-entropy's matrix products, on the CPU.
//
// A chunk of rows of logits becomes its rows' results and, in the same memory, its gradient. Per row: lse, nll and the
// rest as in cross_entropy/cpu/forward.cpp; then grad_u = s (q-terms of nll) + 2 s z_loss lse p for the row's
// scale s. Memory: each logit is read from memory and written to it once. A row is 128 KiB at 32000 float32 classes, so
// the second pass over it finds it in the second-level cache.
//
// A tile of classes of the transposed logits: what it adds to each row's max and sum of exp(logit - max), the target's
// own term left out, in one pass (kFold classes of a register of rows at a time: their maximum, then their sum in
// float, then one addition in double); or its gradient, in place, in another. The classes a row's sums are folded over
// are counted from the tile's first, so that the result depends on neither the threads nor the other rows.
// See docs/linear_cross_entropy.md.
#include <algorithm>

#include "linear_cross_entropy/kernels.h"
#include "simd/vector.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int64_t kFold = 32;  // classes

// others *= exp(before - shift), others += sum
inline void fold(double* others, float_vec rescale, float_vec sum, int64_t n) {
  for (int64_t l = 0; l < n; ++l) others[l] = others[l] * static_cast<double>(rescale[l]) + static_cast<double>(sum[l]);
}

// kFold classes or fewer, of n <= kWidth rows; `target` counts from the first of these classes.
template <class T>
void fold_classes(const T* x, int64_t stride, int64_t classes, int64_t n, int_vec target, float* max, double* others) {
  const float_vec before = load_up_to(max, n, kNone);
  float_vec highest[2] = {before, splat(kNone)};
  for (int64_t c = 0; c < classes; ++c) highest[c & 1] = max_vec(load_up_to(x + c * stride, n, kNone), highest[c & 1]);
  const float_vec now = max_vec(highest[0], highest[1]);
  const float_vec shift = now == kNone ? float_vec{} : now;
  float_vec sum[2] = {};
  for (int64_t c = 0; c < classes; ++c) {
    const float_vec e = exp_vec(load_up_to(x + c * stride, n, kNone) - shift);
    sum[c & 1] += target == static_cast<int32_t>(c) ? float_vec{} : e;
  }
  fold(others, exp_vec(before - shift), sum[0] + sum[1], n);
  store_up_to(max, n, now);
}

template <class T>
void tile_sums(const LinearCrossEntropyTile& tile, const LinearCrossEntropySums& sums, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(tile.logits);
  for (int64_t c = 0; c < tile.classes; c += kFold) {
    const int64_t classes = std::min(kFold, tile.classes - c);
    for (int64_t r = begin; r < end; r += kWidth) {
      const int64_t n = std::min(kWidth, end - r);
      alignas(64) int32_t wanted[kWidth];
      for (int64_t l = 0; l < kWidth; ++l) {
        const int64_t t = l < n ? tile.target[r + l] - tile.first_class - c : -1;
        wanted[l] = t >= 0 && t < classes ? static_cast<int32_t>(t) : -1;
      }
      fold_classes(x + c * tile.stride + r, tile.stride, classes, n, load_bits<int_vec>(wanted), sums.max + r,
                   sums.others + r);
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = tile.target[r] - tile.first_class;
    if (t >= 0 && t < tile.classes) sums.target_logit[r] = to_acc(x[t * tile.stride + r]);
  }
}

template <class T>
void tile_grads(const LinearCrossEntropyTile& tile, const LinearCrossEntropyGrads& grads, int64_t begin, int64_t end) {
  T* x = static_cast<T*>(tile.logits);
  for (int64_t c = begin; c < end; ++c) {
    T* row = x + c * tile.stride;
    int64_t r = 0;
    for (; r + kWidth <= tile.rows; r += kWidth)
      store_vec(row + r, exp_vec(load_vec(row + r) - load_vec(grads.max + r)) * load_vec(grads.factor + r));
    if (r < tile.rows) {
      const int64_t n = tile.rows - r;
      const float_vec e = exp_vec(load_tail(row + r, n, 0.0f) - load_tail(grads.max + r, n, 0.0f));
      store_tail(row + r, n, e * load_tail(grads.factor + r, n, 0.0f));
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t t = tile.target[r] - tile.first_class;
    if (t >= begin && t < end) store(x + t * tile.stride + r, grads.target_grad[r]);
  }
}

template <class T>
void add(float* sum, const T* part, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_vec(sum + i, load_vec(sum + i) + load_vec(part + i));
  if (i < n) store_tail(sum + i, n - i, load_tail(sum + i, n - i, 0.0f) + load_tail(part + i, n - i, 0.0f));
}

}  // namespace

int64_t linear_cross_entropy_chunk(const LinearCrossEntropyChunk& args, int64_t begin, int64_t end) {
  if (!args.row_scale) return cross_entropy_forward(args.forward, begin, end).bad_row;
  const int64_t step = args.forward.rows.layout.adjacent_classes() ? 1 : 64;
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = std::min(step, end - row);
    const int64_t bad = cross_entropy_forward(args.forward, row, row + n).bad_row;
    if (bad >= 0) return bad;
    for (int64_t r = row; args.grad_lse && r < row + n; ++r)
      args.grad_lse[r] = args.row_scale[r] == 0 ? 0 : 2 * args.z_loss * args.forward.lse[r] * args.row_scale[r];
    cross_entropy_backward(args.backward, row, row + n);
  }
  return -1;
}

void linear_cross_entropy_tile_sums(const LinearCrossEntropyTile& tile, const LinearCrossEntropySums& sums,
                                    int64_t begin, int64_t end) {
  with_float_dtype(tile.dtype, [&](auto type) { tile_sums<typename decltype(type)::type>(tile, sums, begin, end); });
}

void linear_cross_entropy_tile_grads(const LinearCrossEntropyTile& tile, const LinearCrossEntropyGrads& grads,
                                     int64_t begin, int64_t end) {
  with_float_dtype(tile.dtype, [&](auto type) { tile_grads<typename decltype(type)::type>(tile, grads, begin, end); });
}

void linear_cross_entropy_add(float* sum, const void* part, DType dtype, int64_t begin, int64_t end) {
  if (dtype == DType::bfloat16)
    add(sum + begin, static_cast<const bfloat16_t*>(part) + begin, end - begin);
  else
    add(sum + begin, static_cast<const float16_t*>(part) + begin, end - begin);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

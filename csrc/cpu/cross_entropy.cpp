// Cross-entropy over class indices on the CPU.
//
// Forward, per row:  lse = log sum_j exp(x_j),  loss = lse - x_target.
// Backward, per row: grad_x_j = (exp(x_j - lse) - [j == target]) * grad_loss.
//
// Memory: forward reads every logit once and writes 8 bytes per row (lse); backward reads every logit once and writes
// every gradient once. Chunks of kChunk logits stay in L1 between the maximum and the sum (online softmax).
//
// Stability: the sum is taken over classes other than the target, relative to the running maximum, so that a confident
// right row keeps its loss (log1p of the rest) and the target's gradient is minus the sum of the others instead of
// p - 1. lse is kept in double: a float cannot hold log-sum-exp next to logits of 1e4. See docs/cross_entropy.md.
#include "../cross_entropy.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

int64_t target_at(const Targets& t, int64_t row) {
  switch (t.type) {
    case TargetType::int64: return static_cast<const int64_t*>(t.data)[row];
    case TargetType::int32: return static_cast<const int32_t*>(t.data)[row];
    case TargetType::int16: return static_cast<const int16_t*>(t.data)[row];
    case TargetType::int8: return static_cast<const int8_t*>(t.data)[row];
    case TargetType::uint8: return static_cast<const uint8_t*>(t.data)[row];
  }
  return -1;
}

// Online log-sum-exp with the sum of the classes other than the target kept apart.
template <class A>
struct OnlineSum {
  A max = -std::numeric_limits<A>::infinity();
  double others = 0;  // sum over j != target of exp(x_j - max)

  void add(const A* x, int64_t n, int64_t target, A chunk_max) {
    if (!(chunk_max <= max)) {  // larger, or NaN
      others *= max == -std::numeric_limits<A>::infinity() ? 0.0 : static_cast<double>(exp_(max - chunk_max));
      max = chunk_max;
    }
    if (max == -std::numeric_limits<A>::infinity()) return;  // nothing but -inf so far
    if (target >= 0 && target < n) {
      others += static_cast<double>(sum_exp(x, target, max)) + sum_exp(x + target + 1, n - target - 1, max);
    } else {
      others += sum_exp(x, n, max);
    }
  }
};

template <class T>
double row_forward(const T* logits, int64_t stride, int64_t classes, int64_t target, double* lse) {
  using A = acc_t<T>;
  A buffer[kChunk];
  OnlineSum<A> sum;
  for (int64_t c = 0; c < classes; c += kChunk) {
    const int64_t n = std::min(kChunk, classes - c);
    const A* x = load_chunk(logits + c * stride, stride, n, buffer);
    sum.add(x, n, target - c, max_of(x, n));
  }
  const double max = sum.max;
  const double x_target = to_acc(logits[target * stride]);
  const double below = x_target - max;  // NaN for a row of only -inf and for +inf, as in PyTorch
  *lse = max == -std::numeric_limits<double>::infinity() ? std::numeric_limits<double>::quiet_NaN()
                                                         : max + std::log(sum.others + std::exp(below));
  return std::log1p(below == 0 ? sum.others : sum.others + std::expm1(below)) - below;
}

template <class T>
void forward_block(const CrossEntropyForward& a, int64_t block) {
  const int64_t begin = block * a.block_rows, end = std::min(begin + a.block_rows, a.layout.rows());
  BlockResult result{0.0, 0, -1};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = target_at(a.targets, row);
    double loss = 0;
    if (target == a.targets.ignore_index) {
      a.lse[row] = 0;  // never read: an ignored row's gradient is zero whatever its logits
    } else if (target < 0 || target >= a.layout.classes) {
      result.bad_row = row;
      break;
    } else {
      loss = row_forward(static_cast<const T*>(a.logits) + a.layout.offset(row), a.layout.class_stride,
                         a.layout.classes, target, a.lse + row);
      result.loss_sum += loss;
      ++result.count;
    }
    if (a.loss) store(static_cast<T*>(a.loss) + row, static_cast<acc_t<T>>(loss));
  }
  a.blocks[block] = result;
}

template <class T>
void row_backward(const CrossEntropyBackward& a, int64_t row, int64_t target) {
  using A = acc_t<T>;
  const int64_t stride = a.layout.class_stride, grad_stride = a.grad_layout.class_stride;
  const T* logits = static_cast<const T*>(a.logits) + a.layout.offset(row);
  T* grad = static_cast<T*>(a.grad_logits) + a.grad_layout.offset(row);
  const double scale_d = a.grad_loss ? static_cast<double>(to_acc(static_cast<const T*>(a.grad_loss)[row])) : a.scale;
  const A scale = static_cast<A>(scale_d);
  const A high = static_cast<A>(a.lse[row]);  // lse = high + low: x - high is exact where it matters
  const A low = static_cast<A>(a.lse[row] - static_cast<double>(high));
  A in[kChunk], out[kChunk];
  double sum = 0, p_target = 0;
  for (int64_t c = 0; c < a.layout.classes; c += kChunk) {
    const int64_t n = std::min(kChunk, a.layout.classes - c);
    const A* x = load_chunk(logits + c * stride, stride, n, in);
    A lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        const A p = exp_((x[i + l] - high) - low);
        lanes[l] += p;
        out[i + l] = p * scale;
      }
    }
    for (int64_t l = 0; i + l < n; ++l) {
      const A p = exp_((x[i + l] - high) - low);
      lanes[l] += p;
      out[i + l] = p * scale;
    }
    if (target >= c && target < c + n) {
      p_target = exp_((x[target - c] - high) - low);
      lanes[(target - c) % kLanes] -= static_cast<A>(p_target);
    }
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
    store_chunk(grad + c * grad_stride, grad_stride, n, out);
  }
  const double residual = p_target < 0.5 ? p_target - 1.0 : -sum;
  store(grad + target * grad_stride, static_cast<A>(residual * scale_d));
}

template <class T>
int64_t backward_rows(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = target_at(a.targets, row);
    if (target == a.targets.ignore_index) {
      T* grad = static_cast<T*>(a.grad_logits) + a.grad_layout.offset(row);
      for (int64_t c = 0; c < a.layout.classes; ++c) store(grad + c * a.grad_layout.class_stride, acc_t<T>(0));
    } else if (target < 0 || target >= a.layout.classes) {
      return row;
    } else {
      row_backward<T>(a, row, target);
    }
  }
  return -1;
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& args, int64_t begin_block, int64_t end_block) {
  for (int64_t block = begin_block; block < end_block; ++block) {
    switch (args.dtype) {
      case DType::float32: forward_block<float>(args, block); break;
      case DType::float64: forward_block<double>(args, block); break;
      case DType::bfloat16: forward_block<bfloat16_t>(args, block); break;
      case DType::float16: forward_block<float16_t>(args, block); break;
    }
  }
}

int64_t cross_entropy_backward(const CrossEntropyBackward& args, int64_t begin_row, int64_t end_row) {
  switch (args.dtype) {
    case DType::float32: return backward_rows<float>(args, begin_row, end_row);
    case DType::float64: return backward_rows<double>(args, begin_row, end_row);
    case DType::bfloat16: return backward_rows<bfloat16_t>(args, begin_row, end_row);
    case DType::float16: return backward_rows<float16_t>(args, begin_row, end_row);
  }
  return -1;
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Cross-entropy over class indices on the CPU.
//
// Forward, per row:  lse = log sum_j exp(x_j),  loss = lse - x_target.
// Backward, per row: grad_x_j = (exp(x_j - lse) - [j == target]) * grad_loss.
//
// Memory: forward reads every logit once and writes 8 bytes per row (lse); backward reads every logit once and writes
// every gradient once. Chunks of kChunk logits stay in L1 between the maximum and the sum (online softmax). Four
// walks: rows whose classes are adjacent (one register of classes at a time; few classes: few_classes.h), rows
// that are adjacent themselves, as in (batch, classes, height, width) (one register of rows at a time:
// lanes.h), and any strides, gathered.
//
// Stability: the sum is taken over classes other than the target, relative to the running maximum, so that a confident
// right row keeps its loss (log1p of the rest) and the target's gradient is minus the sum of the others instead of
// p - 1. lse is kept in double: a float cannot hold log-sum-exp next to logits of 1e4. See docs/cross_entropy.md.
#include <algorithm>
#include <type_traits>

#include "cross_entropy/cpu/few_classes.h"
#include "cross_entropy/cpu/lanes.h"
#include "cross_entropy/cpu/row.h"
#include "cross_entropy/cpu/targets.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

// The targets of up to kRowTile rows: a class, or kIgnored.
struct TargetTile {
  int64_t target[kRowTile];
  int64_t count = 0;     // rows of them that are not ignored
  int64_t bad_row = -1;  // the first whose target is neither a class nor ignore_index

  TargetTile(const Targets& t, int64_t begin, int64_t n, int64_t classes) {
    read_targets(t, begin, n, target);
    bool bad = false;
    for (int64_t r = 0; r < n; ++r) {
      const bool ignored = target[r] == t.ignore_index;
      target[r] = ignored ? kIgnored : target[r];
      bad |= !ignored && (target[r] < 0 || target[r] >= classes);
      count += !ignored;
    }
    if (bad) bad_row = cross_entropy_bad_target(t, begin, begin + n, classes);
  }
};

// Rows from `row` on that one step takes: not beyond `end`, nor beyond a batch entry where rows are walked in
// registers.
int64_t rows_of_step(const RowLayout& l, int64_t row, int64_t end) {
  const int64_t n = std::min(kRowTile, end - row);
  return l.adjacent_classes() ? n : std::min(n, l.spatial - row % l.spatial);
}

// In an order of its own, which the rows before the first do not change.
double sum_of(const double* x, int64_t n) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t l = 0; l < std::min(kLanes, n - i); ++l) lanes[l] += x[i + l];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class T>
constexpr bool kFloats = !std::is_same_v<T, double>;

template <class T>
void step_forward(const CrossEntropyForward& a, int64_t row, int64_t n, const int64_t* target, PackedRows<T>& packed,
                  RowSums& sums) {
  const RowLayout& l = a.layout;
  const T* logits = static_cast<const T*>(a.logits);
  if constexpr (kFloats<T>) {
    if (l.adjacent_rows()) return lanes_sums(logits + l.offset(row), l.class_stride, l.classes, n, target, sums);
    if (is_small(l)) return small_sums(packed, RowsAt<const T>(logits, l, row), n, target, sums);
  }
  for (int64_t r = 0; r < n; ++r) {
    if (target[r] == kIgnored) continue;
    const T* x = logits + l.offset(row + r);
    if constexpr (kFloats<T>) {
      if (l.adjacent_classes()) {
        const T* next = logits + l.offset(row + std::min(r + 1, n - 1));
        row_sums(x, l.classes, target[r], next, &sums.max[r], &sums.others[r], &sums.below[r]);
        continue;
      }
    }
    strided_row_sums(x, l.class_stride, l.classes, target[r], &sums.max[r], &sums.others[r], &sums.below[r]);
  }
}

template <class T>
BlockResult forward_rows(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  BlockResult result{0.0, 0, -1};
  RowSums sums;
  PackedRows<T> packed(a.layout.classes);
  double loss[kRowTile];
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = rows_of_step(a.layout, row, end);
    const TargetTile targets(a.targets, row, n, a.layout.classes);
    if (targets.bad_row >= 0) {
      result.bad_row = targets.bad_row;
      break;
    }
    if (targets.count < n)
      for (int64_t r = 0; r < n; ++r) sums.max[r] = sums.others[r] = sums.below[r] = 0;
    step_forward<T>(a, row, n, targets.target, packed, sums);
    sums.finish<!kFloats<T>>(n, a.lse + row, loss);
    for (int64_t r = 0; targets.count < n && r < n; ++r)
      if (targets.target[r] == kIgnored) a.lse[row + r] = loss[r] = 0;  // lse never read: its gradient is zero
    result.loss_sum += sum_of(loss, n);
    for (int64_t r = 0; a.row_loss && r < n; ++r) a.row_loss[row + r] = loss[r];
    result.count += targets.count;
    for (int64_t r = 0; a.loss && r < n; ++r) store(static_cast<T*>(a.loss) + row + r, static_cast<acc_t<T>>(loss[r]));
  }
  return result;
}

template <class T>
void read_scales(const CrossEntropyBackward& a, int64_t row, int64_t n, double* scale) {
  if (a.row_scale)
    std::copy_n(a.row_scale + (row - a.row_scale_begin), n, scale);
  else if (!a.grad_loss)
    std::fill_n(scale, n, a.scale);
  else
    for (int64_t r = 0; r < n; ++r) scale[r] = static_cast<double>(to_acc(static_cast<const T*>(a.grad_loss)[row + r]));
}

template <class T>
void step_backward(const CrossEntropyBackward& a, int64_t row, int64_t n, const int64_t* target,
                   PackedRows<T>& packed) {
  const T* logits = static_cast<const T*>(a.logits);
  T* grads = static_cast<T*>(a.grad_logits);
  const RowLayout &l = a.layout, &g = a.grad_layout;
  double scale[kRowTile];
  read_scales<T>(a, row, n, scale);
  if constexpr (kFloats<T>) {
    if (l.adjacent_rows() && g.adjacent_rows())
      return lanes_backward(logits + l.offset(row), l.class_stride, grads + g.offset(row), g.class_stride, l.classes, n,
                            target, a.lse + row, scale);
    if (is_small(l) && is_small(g))
      return small_backward(packed, RowsAt<const T>(logits, l, row), RowsAt<T>(grads, g, row), n, target, a.lse + row,
                            scale);
  }
  for (int64_t r = 0; r < n; ++r) {
    const T* x = logits + l.offset(row + r);
    T* grad = grads + g.offset(row + r);
    if (target[r] == kIgnored) {
      for (int64_t c = 0; c < l.classes; ++c) store(grad + c * g.class_stride, acc_t<T>(0));
      continue;
    }
    if constexpr (kFloats<T>) {
      if (l.adjacent_classes() && g.adjacent_classes()) {
        row_backward(x, grad, l.classes, target[r], a.lse[row + r], scale[r]);
        continue;
      }
    }
    strided_row_backward(x, l.class_stride, grad, g.class_stride, l.classes, target[r], a.lse[row + r], scale[r]);
  }
}

template <class T>
int64_t backward_rows(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  PackedRows<T> packed(a.layout.classes);
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = std::min(rows_of_step(a.layout, row, end), rows_of_step(a.grad_layout, row, end));
    const TargetTile targets(a.targets, row, n, a.layout.classes);
    if (targets.bad_row >= 0) return targets.bad_row;
    step_backward<T>(a, row, n, targets.target, packed);
  }
  return -1;
}

}  // namespace

BlockResult cross_entropy_forward_rows(const CrossEntropyForward& args, int64_t begin_row, int64_t end_row) {
  switch (args.dtype) {
    case DType::float32: return forward_rows<float>(args, begin_row, end_row);
    case DType::float64: return FUSED_OPS_FLOAT64(forward_rows, cross_entropy_forward_rows, args, begin_row, end_row);
    case DType::bfloat16: return forward_rows<bfloat16_t>(args, begin_row, end_row);
    case DType::float16: return forward_rows<float16_t>(args, begin_row, end_row);
  }
  return {0.0, 0, -1};
}

void cross_entropy_forward(const CrossEntropyForward& args, int64_t begin_block, int64_t end_block) {
  for (int64_t block = begin_block; block < end_block; ++block) {
    const int64_t begin = block * args.block_rows, end = std::min(begin + args.block_rows, args.layout.rows());
    args.blocks[block] = cross_entropy_forward_rows(args, begin, end);
  }
}

int64_t cross_entropy_bad_target(const Targets& targets, int64_t begin, int64_t end, int64_t classes) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = target_at(targets, row);
    if (target != targets.ignore_index && (target < 0 || target >= classes)) return row;
  }
  return -1;
}

int64_t cross_entropy_backward(const CrossEntropyBackward& args, int64_t begin_row, int64_t end_row) {
  switch (args.dtype) {
    case DType::float32: return backward_rows<float>(args, begin_row, end_row);
    case DType::float64: return FUSED_OPS_FLOAT64(backward_rows, cross_entropy_backward, args, begin_row, end_row);
    case DType::bfloat16: return backward_rows<bfloat16_t>(args, begin_row, end_row);
    case DType::float16: return backward_rows<float16_t>(args, begin_row, end_row);
  }
  return -1;
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

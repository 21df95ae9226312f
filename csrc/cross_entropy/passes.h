// The CPU's cross-entropy over all rows of a tensor, in blocks.
#pragma once
#include <vector>

#include "cross_entropy/arguments.h"

namespace fused_ops {

// The forward in parallel blocks of args.block_rows; raises for a bad target.
inline BlockResult forward_in_blocks(CrossEntropyForward args, const Tensor& target) {
  const int64_t blocks = (args.layout.rows() + args.block_rows - 1) / args.block_rows;
  std::vector<BlockResult> results(static_cast<size_t>(blocks));
  args.blocks = results.data();
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_forward);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  BlockResult sum{0, 0, -1};
  for (const BlockResult& r : results) {  // in block order: the same sum for any number of threads
    if (r.bad_row >= 0) raise_bad_target(target, r.bad_row);
    sum.loss_sum += r.loss_sum;
    sum.count += r.count;
  }
  return sum;
}

// What the sum of the losses is divided by.
inline double denominator(const BlockResult& found, Reduction mode) {
  return mode == Reduction::mean ? static_cast<double>(found.count) : 1;
}

// The forward and, if there is memory for it, the gradient of the mean or sum for an upstream gradient of 1: in
// args.grad_logits, which may be the logits.
inline BlockResult forward_then_backward(CrossEntropyBackward args, int64_t block_rows, const Tensor& target,
                                         Reduction mode) {
  const int64_t rows = args.layout.rows();
  std::vector<double> lse(static_cast<size_t>(rows));
  const BlockResult found = forward_in_blocks(
      {args.dtype, args.logits, args.layout, args.targets, block_rows, lse.data(), nullptr, nullptr, nullptr}, target);
  if (args.grad_logits == nullptr) return found;
  args.lse = lse.data(), args.scale = 1 / denominator(found, mode);
  const auto kernel = FUSED_OPS_SELECT(cross_entropy_backward);
  torch::stable::parallel_for(0, rows, block_rows, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return found;
}

}  // namespace fused_ops

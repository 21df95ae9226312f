// What lies between linear cross-entropy's matrix products, on the CPU: a chunk of logits becomes its rows' results
// and, in the same memory, its gradient.
//
// Per row: lse, nll and the rest as in cross_entropy_rows.cpp; then grad_u = s (q-terms of nll) + 2 s z_loss lse p for
// the row's scale s, over the logits.
//
// Memory: each logit is read from memory and written to it once. A row is 128 KiB at 32000 float32 classes, so the
// second pass over it finds it in the second-level cache. See docs/linear_cross_entropy.md.
#include "../linear_cross_entropy.h"

#include <algorithm>

namespace fused_ops {
namespace FUSED_OPS_ISA {

int64_t linear_cross_entropy_chunk(const LinearCrossEntropyChunk& args, int64_t begin, int64_t end) {
  if (!args.row_scale) return cross_entropy_rows_forward(args.forward, begin, end);
  const int64_t step = args.forward.rows.layout.adjacent_classes() ? 1 : 64;
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = std::min(step, end - row);
    const int64_t bad = cross_entropy_rows_forward(args.forward, row, row + n);
    if (bad >= 0) return bad;
    for (int64_t r = row; args.grad_lse && r < row + n; ++r)
      args.grad_lse[r] = args.row_scale[r] == 0 ? 0 : 2 * args.z_loss * args.forward.lse[r] * args.row_scale[r];
    cross_entropy_rows_backward(args.backward, row, row + n);
  }
  return -1;
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

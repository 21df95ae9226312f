// What lies between linear cross-entropy's matrix products, on a GPU: a chunk of logits becomes its rows' results and,
// in the same memory, the gradient of sum_r s_r (nll_r + z_loss lse_r^2) for the rows' scales s.
//
// The kernels are those of cross-entropy's options, one after the other on the call's stream: grad_nll is s, and
// grad_lse is 2 s z_loss lse, which the backward takes as it needs it.
//
// Memory: the forward reads every logit once, the backward reads and writes it once, from the second-level cache as far
// as the chunk fits there. See docs/linear_cross_entropy.md.
#include <algorithm>

#include "linear_cross_entropy/cuda/kernels.h"

namespace fused_ops {
namespace cuda {

int64_t linear_chunk_scratch(const LinearCrossEntropyChunk& args) {
  const int64_t forward = rows_forward_scratch(args.forward.rows);
  return args.row_scale ? std::max(forward, rows_backward_scratch(args.forward.rows)) : forward;
}

int32_t linear_cross_entropy_chunk(const LinearChunkCall& call, void* stream) {
  const int32_t error = cross_entropy_rows_forward({call.args.forward, call.scratch}, stream);
  if (error != 0 || !call.args.row_scale) return error;
  return cross_entropy_rows_backward({call.args.backward, call.args.z_loss, call.scratch}, stream);
}

}  // namespace cuda
}  // namespace fused_ops

// The contract of the kernels behind cross-entropy's options on a GPU: csrc/cross_entropy/kernels.h with device
// pointers and a stream. Nothing here waits for the device or allocates. The result is a cudaError_t as a number.
#pragma once
#include "cross_entropy/kernels.h"

namespace fused_ops {
namespace cuda {

// In both: smoothing_weight is not read, and class probabilities are of the logits' dtype or of their accumulator's.
struct RowsForwardCall {
  CrossEntropyForward args;
  double* scratch;  // rows_forward_scratch(...) doubles
};

struct RowsBackwardCall {
  CrossEntropyBackward args;
  double z_loss;    // adds 2 z_loss lse grad_nll to grad_lse
  double* scratch;  // rows_backward_scratch(...) doubles
  // From a row's upstream gradient to the next one's, in the order of the arguments: 0 where one value is for all rows.
  int64_t steps[4] = {1, 1, 1, 1};
};

int64_t rows_forward_scratch(const CrossEntropyRows& rows);
int64_t rows_backward_scratch(const CrossEntropyRows& rows);
int32_t cross_entropy_rows_forward(const RowsForwardCall& call, void* stream);
int32_t cross_entropy_rows_backward(const RowsBackwardCall& call, void* stream);

}  // namespace cuda
}  // namespace fused_ops

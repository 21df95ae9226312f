// The contract of the cross-entropy kernels on a GPU: device pointers, a stream, nothing of torch. Nothing here waits
// for the device or allocates; the caller brings the scratch memory. The result is a cudaError_t as a number, 0 if all
// launches went well.
#pragma once
#include "cross_entropy/kernels.h"

namespace fused_ops {
namespace cuda {

struct ForwardCall {
  DType dtype;
  const void* logits;
  RowLayout layout;
  Targets targets;
  Reduction reduction;
  double* lse;      // (rows,)
  void* loss;       // of dtype: (rows,), or one value if the loss is reduced
  double* total;    // one value: rows that are not ignored
  double* scratch;  // forward_scratch(...) doubles
};

struct BackwardCall {
  DType dtype;
  const void* logits;
  RowLayout layout;
  Targets targets;
  Reduction reduction;
  const double* lse;      // (rows,)
  const void* grad_loss;  // of dtype: (rows,), or one value if the loss was reduced, or null for 1
  const double* total;    // one value
  void* grad_logits;      // the logits themselves, in place, or memory that does not overlap them
  RowLayout grad_layout;
  double* scratch;  // backward_scratch(...) doubles
};

// The reduced loss and its gradient for an upstream gradient of 1.
struct WithGradientCall {
  ForwardCall forward;  // without lse and total; scratch: with_gradient_scratch(...) doubles
  void* grad_logits;    // does not overlap the logits
  RowLayout grad_layout;
};

// gradient * grad_loss, of rows that count; the others' is 0, whatever grad_loss is.
struct ScaleGradientCall {
  DType dtype;
  const void* gradient;  // (batch, classes, spatial) dense
  int64_t batch, classes, spatial;
  Targets targets;
  const void* grad_loss;  // one value of dtype
  void* result;           // as gradient
};

int64_t forward_scratch(DType dtype, const RowLayout& layout);
int64_t backward_scratch(DType dtype, const RowLayout& layout);
int32_t cross_entropy_forward(const ForwardCall& call, void* stream);
int32_t cross_entropy_backward(const BackwardCall& call, void* stream);
// 0 where one block takes all rows.
int64_t with_gradient_scratch(const WithGradientCall& call);
int32_t cross_entropy_with_gradient(const WithGradientCall& call, void* stream);
int32_t cross_entropy_scale_gradient(const ScaleGradientCall& call, void* stream);

}  // namespace cuda
}  // namespace fused_ops

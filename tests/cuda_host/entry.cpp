// The kernels of csrc/*/cuda as C functions of plain numbers and pointers, for ctypes.
#include "cross_entropy/cuda/kernels.h"
#include "cuda_runtime.h"

using namespace fused_ops;

namespace {

RowLayout row_layout(const int64_t* v) { return {v[0], v[1], v[2], v[3], v[4], v[5]}; }

template <class Call>
void set_common(Call& call, const int64_t* numbers) {  // dtype, target type, ignore_index, reduction
  call.dtype = static_cast<DType>(numbers[0]);
  call.targets.type = static_cast<TargetType>(numbers[1]);
  call.targets.ignore_index = numbers[2];
  call.reduction = static_cast<Reduction>(numbers[3]);
}

}  // namespace

extern "C" {

int64_t ce_forward_scratch(int64_t dtype, const int64_t* layout) {
  return cuda::forward_scratch(static_cast<DType>(dtype), row_layout(layout));
}
int64_t ce_backward_scratch(int64_t dtype, const int64_t* layout) {
  return cuda::backward_scratch(static_cast<DType>(dtype), row_layout(layout));
}

int32_t ce_forward(const int64_t* numbers, const void* logits, const int64_t* layout, const void* targets, double* lse,
                   void* loss, double* total, double* scratch) {
  cuda::ForwardCall call{};
  set_common(call, numbers);
  call.logits = logits, call.layout = row_layout(layout), call.targets.data = targets;
  call.lse = lse, call.loss = loss, call.total = total, call.scratch = scratch;
  return cuda::cross_entropy_forward(call, nullptr);
}

int32_t ce_backward(const int64_t* numbers, const void* logits, const int64_t* layout, const void* targets,
                    const double* lse, const void* grad_loss, const double* total, void* grad,
                    const int64_t* grad_layout, double* scratch) {
  cuda::BackwardCall call{};
  set_common(call, numbers);
  call.logits = logits, call.layout = row_layout(layout), call.targets.data = targets, call.lse = lse;
  call.grad_loss = grad_loss, call.total = total, call.grad_logits = grad;
  call.grad_layout = row_layout(grad_layout), call.scratch = scratch;
  return cuda::cross_entropy_backward(call, nullptr);
}

// As ce_forward; returns how many doubles of scratch are wanted where there is none.
int64_t ce_with_gradient(const int64_t* numbers, const void* logits, const int64_t* layout, const void* targets,
                         void* loss, void* grad, const int64_t* grad_layout, double* scratch, int32_t measure) {
  cuda::WithGradientCall call{};
  set_common(call.forward, numbers);
  call.forward.logits = logits, call.forward.layout = row_layout(layout), call.forward.targets.data = targets;
  call.forward.loss = loss, call.forward.scratch = scratch;
  call.grad_logits = grad, call.grad_layout = row_layout(grad_layout);
  return measure ? cuda::with_gradient_scratch(call) : cuda::cross_entropy_with_gradient(call, nullptr);
}

}  // extern "C"

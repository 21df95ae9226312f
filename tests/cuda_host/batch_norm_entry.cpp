// The batch-norm kernels of csrc/*/cuda as C functions of plain numbers and pointers, for ctypes.
#include "batch_norm/cuda/kernels.h"
#include "cuda_runtime.h"

using namespace fused_ops;
using cuda::BatchNormShape;

namespace {

BatchNormShape shape_of(const int64_t* n) { return {n[0], n[1], n[2], n[3] != 0, nullptr}; }

// Batch, channels, spatial, channels_last; dtypes of input and parameters; activation, training, correction, packed.
template <class Call>
void set_common(Call& c, const int64_t* n, const double* reals, void* const* parameters) {
  c.shape = shape_of(n), c.packed = n[9] != 0;
  c.dtype = static_cast<DType>(n[4]);
  c.parameters = {static_cast<DType>(n[5]), parameters[0], parameters[1], parameters[2], parameters[3]};
  c.activation = static_cast<Activation>(n[6]), c.training = n[7] != 0, c.correction = n[8];
  c.slope = reals[0];
}

}  // namespace

extern "C" {

int64_t bn_scratch(const int64_t* n) { return cuda::batch_norm_scratch(shape_of(n)); }
int32_t bn_is_packed(const int64_t* n, int32_t writes_mask) {
  return cuda::batch_norm_is_packed(shape_of(n), static_cast<DType>(n[4]), writes_mask != 0);
}

int32_t bn_forward(const int64_t* n, const double* reals, void* const* parameters, const void* input,
                   const void* residual, void* output, uint8_t* mask, double* mean, double* invstd, void* new_mean,
                   void* new_var, double* scratch) {
  cuda::BatchNormForwardCall c{};
  set_common(c, n, reals, parameters);
  c.momentum = reals[1], c.eps = reals[2];
  c.input = input, c.residual = residual, c.output = output, c.mask = mask, c.mean = mean, c.invstd = invstd;
  c.new_mean = new_mean, c.new_var = new_var, c.scratch = scratch;
  return cuda::batch_norm_forward(c, nullptr);
}

int32_t bn_backward(const int64_t* n, const double* reals, void* const* parameters, const void* grad_output,
                    const void* input, const void* residual, const uint8_t* mask, const double* mean,
                    const double* invstd, void* grad_input, void* grad_residual, void* grad_weight, void* grad_bias,
                    double* scratch) {
  cuda::BatchNormBackwardCall c{};
  set_common(c, n, reals, parameters);
  c.grad_output = grad_output, c.input = input, c.residual = residual, c.mask = mask, c.mean = mean, c.invstd = invstd;
  c.grad_input = grad_input, c.grad_residual = grad_residual;
  c.grad_dtype = c.parameters.dtype, c.grad_weight = grad_weight, c.grad_bias = grad_bias, c.scratch = scratch;
  return cuda::batch_norm_backward(c, nullptr);
}

}  // extern "C"

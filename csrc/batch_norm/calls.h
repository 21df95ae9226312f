// Calls of the batch-norm ops on the CPU, both directions: their arguments once they are checked, dense and cut into
// groups, and what the kernels are given of them.
#pragma once
#include "batch_norm/passes.h"

namespace fused_ops {
namespace {  // of each file's own, so that what it calls once is inlined

// The arguments of a forward once they are checked, dense, and cut into groups.
struct ForwardCall {
  const ForwardArguments& given;
  const bool channels_last;
  const Tensor input;
  const MaybeTensor residual, valid;
  const DType dtype;
  const View view;
  Tensor output, statistics;
  MaybeTensor new_mean, new_var;  // where the new running statistics go: the given tensors, or dense copies of them

  explicit ForwardCall(const ForwardArguments& a)
      : given(a),
        channels_last(is_channels_last(a.input)),
        input(channels_last ? a.input : dense(a.input)),
        residual(matching("residual", a.residual, input)),
        valid(valid_positions(a.valid, input)),
        dtype(float_dtype(kOp, "input", input)),
        view(view_of(input, channels_last, valid, a.training ? a.groups : 1,
                     a.has_mask() ? kSmallMaskedSpatial : kSmallSpatial)),
        output(empty_huge(kOp, input, input.strides())),
        statistics(empty_statistics()) {
    if (a.mask) check_mask(*a.mask, view.mask_rows() * view.mask_row_bytes());
    if (a.updates()) new_mean = dense(*a.running_mean), new_var = dense(*a.running_var);
  }

  double* means() const { return doubles(statistics); }
  double* invstds() const { return doubles(statistics) + view.groups * view.channels; }

  BatchNormForward kernel_arguments(const View& part, int64_t group) const {
    const int64_t offset = view.group_offset(group) * element_size(dtype);
    BatchNormForward args{};
    args.dtype = dtype, args.layout = part.layout, args.activation = given.activation;
    args.slope = given.activation == Activation::relu ? 0 : given.slope;
    args.input = at(input.const_data_ptr(), offset);
    args.residual = residual ? at(residual->const_data_ptr(), offset) : nullptr;
    args.output = at(output.mutable_data_ptr(), offset);
    if (given.mask)
      args.mask =
          static_cast<uint8_t*>(given.mask->mutable_data_ptr()) + view.mask_rows_before(group) * view.mask_row_bytes();
    args.by_slice = !given.training && !view.layout.nhwc();
    args.stream = streams(view.layout, dtype, given.training);
    return args;
  }

 private:
  Tensor empty_statistics() const {
    const int64_t both[] = {2, view.groups * view.channels};
    return empty(input, {both, 2}, ScalarType::Double);
  }
};

// The arguments of a backward once they are checked, dense, and cut into groups.
struct BackwardCall {
  const BackwardArguments& given;
  const bool channels_last;
  const Tensor input, grad_output;
  const MaybeTensor residual, valid;
  const DType dtype;
  const View view;
  const Tensor statistics;
  const uint8_t* mask = nullptr;
  Gradients out;

  explicit BackwardCall(const BackwardArguments& a)
      : given(a),
        channels_last(is_channels_last(a.input)),
        input(channels_last ? a.input : dense(a.input)),
        grad_output(*matching("grad_output", a.grad_output, input)),
        residual(matching("residual", a.residual, input)),
        valid(valid_positions(a.valid, input)),
        dtype(float_dtype(kOp, "input", input)),
        view(view_of(input, channels_last, valid, a.training ? a.groups : 1,
                     a.mask && a.mask->numel() > 0 ? kSmallMaskedSpatial : kSmallSpatial)),
        statistics(dense(a.statistics)),
        out(empty_gradients(a, input)) {
    check_statistics(statistics, view.groups * view.channels);
    if (a.grad_residual) {
      check_written("grad_residual", *a.grad_residual, input);
      advise_huge(a.grad_residual->mutable_data_ptr(), input.numel() * element_size(dtype));
    }
    if (!a.mask || a.mask->numel() == 0) return;
    check_mask(*a.mask, view.mask_rows() * view.mask_row_bytes());
    if (!valid) mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
  }

  const double* means() const { return doubles(statistics); }
  const double* invstds() const { return doubles(statistics) + view.groups * view.channels; }
  bool reduces() const { return (given.training && given.need_input) || given.need_params; }

  BatchNormBackward kernel_arguments(const View& part, int64_t group) const {
    const int64_t offset = view.group_offset(group) * element_size(dtype);
    BatchNormBackward args{};
    args.dtype = dtype, args.layout = part.layout, args.activation = given.activation;
    args.slope = given.activation == Activation::relu ? 0 : given.slope;
    args.frozen = !given.training;
    args.exact_mean = means() + group * view.channels, args.repeat = view.repeat;
    args.input = at(input.const_data_ptr(), offset);
    args.grad_output = at(grad_output.const_data_ptr(), offset);
    args.residual = residual ? at(residual->const_data_ptr(), offset) : nullptr;
    args.mask = mask ? mask + view.mask_rows_before(group) * view.mask_row_bytes() : nullptr;
    args.grad_input = given.need_input ? at(out.input.mutable_data_ptr(), offset) : nullptr;
    args.grad_residual = given.grad_residual ? at(given.grad_residual->mutable_data_ptr(), offset) : nullptr;
    args.by_slice = !reduces() && !view.layout.nhwc();
    args.stream = streams(view.layout, dtype, reduces());
    return args;
  }
};

}  // namespace
}  // namespace fused_ops

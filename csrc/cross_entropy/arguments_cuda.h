// The arguments of the rows' raw ops on a GPU, checked, as their kernels see them.
#pragma once
#include <array>

#include "core/cuda_device.h"
#include "cross_entropy/arguments.h"
#include "cross_entropy/cuda/options_kernels.h"

namespace fused_ops {
namespace cuda {

// Nothing is read on the host: what the CPU's kernels want converted there, the device converts.
struct RowsOnGpu : RowArguments {
  MaybeTensor weight, sparse;

  RowsOnGpu(const RowTensors& t, const RowOptions& o) : RowArguments(t, o) {
    const DType acc = rows.dtype == DType::float64 ? DType::float64 : DType::float32;
    if (t.weight) {
      weight = dense(converted(*t.weight, acc));
      rows.class_weight = weight->const_data_ptr();
    }
    if (indices && probabilities) {
      sparse = dense(converted(*probabilities, DType::float64));
      if (sparse->numel() == 0) sparse = empty(input, std::array<int64_t, 1>{1}, ScalarType::Double);
      rows.sparse = static_cast<const double*>(sparse->const_data_ptr());
    }
    if (rows.has_dense && rows.dense.dtype != rows.dtype && rows.dense.dtype != acc) {
      probabilities = converted(*probabilities, acc);
      if (!spatial_is_one_dim(*probabilities)) probabilities = dense(*probabilities);
      rows.dense = {probabilities->const_data_ptr(), acc, layout_beside(*probabilities, input)};
    }
  }

 private:
  static Tensor converted(const Tensor& t, DType to) {
    if (float_dtype(kOp, "weight", t) == to) return t;
    return torch::stable::to(t, to == DType::float64 ? ScalarType::Double : ScalarType::Float);
  }
};

}  // namespace cuda
}  // namespace fused_ops

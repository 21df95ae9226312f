// The arguments of the rows' raw ops on a GPU, checked, as their kernels see them.
#pragma once
#include <array>

#include "core/cuda_device.h"
#include "cross_entropy/cuda/options_kernels.h"
#include "cross_entropy/rows_arguments.h"

namespace fused_ops {
namespace cuda {

// Nothing is read on the host: what the CPU's kernels want converted there, the device converts.
struct RowsOnGpu : RowArguments {
  MaybeTensor weight, sparse;

  RowsOnGpu(const Tensor& input_, const MaybeTensor& indices_, const MaybeTensor& probabilities_,
            const MaybeTensor& weight_, const MaybeTensor& class_mask, int64_t ignore_index, double label_smoothing,
            double logit_scale, double softcap, bool statistics)
      : RowArguments(input_, indices_, probabilities_, weight_, class_mask, ignore_index, label_smoothing, logit_scale,
                     softcap, statistics) {
    const DType acc = rows.dtype == DType::float64 ? DType::float64 : DType::float32;
    if (weight_) {
      weight = dense(converted(*weight_, acc));
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

using RowResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace cuda
}  // namespace fused_ops

// The arguments of the rows' raw ops, checked, as their kernels see them.
#pragma once
#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "cross_entropy/arguments.h"
#include "cross_entropy/rows_kernels.h"

namespace fused_ops {

using MaybeTensor = std::optional<Tensor>;

// How the (batch, classes, spatial) tensor t is walked beside the logits: with their split of rows into two dimensions.
inline RowLayout layout_beside(const Tensor& t, const Tensor& input) {
  if (t.dim() == 1 && input.dim() != 1) {  // one value per class for all rows
    RowLayout l = layout_of(input);
    l.batch_stride = l.spatial_stride = 0, l.class_stride = t.stride(0);
    return l;
  }
  const RowLayout logits = layout_of(input);
  RowLayout l = plain_layout_of(t);
  if (l.batch != logits.batch || l.spatial != logits.spatial)
    std::swap(l.batch, l.spatial), std::swap(l.batch_stride, l.spatial_stride);
  return l;
}

inline std::vector<double> doubles(const Tensor& t_) {
  const Tensor t = dense(t_);
  std::vector<double> values(static_cast<size_t>(t.numel()));
  const auto copy = [&](const auto* from) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(static_cast<float>(from[i]));
  };
  switch (float_dtype(kOp, "values", t)) {
    case DType::float32: copy(static_cast<const float*>(t.const_data_ptr())); break;
    case DType::bfloat16: copy(static_cast<const c10::BFloat16*>(t.const_data_ptr())); break;
    case DType::float16: copy(static_cast<const c10::Half*>(t.const_data_ptr())); break;
    case DType::float64: {
      const double* from = static_cast<const double*>(t.const_data_ptr());
      std::copy(from, from + values.size(), values.begin());
    }
  }
  return values;
}

// Values in the accumulator of the logits' dtype.
struct Accumulators {
  std::vector<float> floats;
  std::vector<double> doubles;

  const void* set(const std::vector<double>& values, DType dtype) {
    if (dtype == DType::float64) return (doubles = values).data();
    floats.assign(values.begin(), values.end());
    return floats.data();
  }
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// What the two directions take alike, checked: on any device, no value is read.
struct RowArguments {
  Tensor input;
  MaybeTensor indices, probabilities, mask;  // probabilities of all classes, or of the indices
  std::vector<int64_t> rows_shape;
  CrossEntropyRows rows{};  // without sparse, class_weight and smoothing_weight

  RowArguments(const Tensor& input_, const MaybeTensor& indices_, const MaybeTensor& probabilities_,
               const MaybeTensor& weight, const MaybeTensor& class_mask, int64_t ignore_index, double label_smoothing,
               double logit_scale, double softcap, bool statistics)
      : input(input_) {
    if (input_.dim() == 0) raise(kOp, ": input must have at least one dimension (classes), got a scalar");
    rows.dtype = float_dtype(kOp, "input", input_);
    if (!(label_smoothing >= 0 && label_smoothing <= 1))
      raise(kOp, ": label_smoothing must be between 0 and 1, got ", label_smoothing);
    if (!(softcap >= 0)) raise(kOp, ": softcap must be positive, or 0 for none, got ", softcap);
    if (!spatial_is_one_dim(input_)) input = dense(input_);
    rows.logits = input.const_data_ptr();
    rows.layout = layout_of(input);
    rows.label_smoothing = label_smoothing, rows.logit_scale = logit_scale, rows.softcap = softcap;
    rows.statistics = statistics;
    for (int64_t d = 0; d < input.dim(); ++d)
      if (d != (input.dim() == 1 ? 0 : 1)) rows_shape.push_back(input.size(d));
    if (!indices_ && !probabilities_) raise(kOp, ": expected indices or probabilities, got neither");
    if (indices_) take_indices(*indices_, probabilities_, ignore_index);
    if (probabilities_) take_probabilities(*probabilities_, indices_.has_value());
    if (class_mask) take_mask(*class_mask);
    if (!weight) return;
    if (weight->dim() != 1 || weight->size(0) != classes())
      raise(kOp, ": weight must have shape [", classes(), "], got ", shape_of(*weight));
  }

  int64_t classes() const { return rows.layout.classes; }

 private:
  void take_indices(const Tensor& t, const MaybeTensor& probabilities_, int64_t ignore_index) {
    indices = dense(t);
    rows.indices = {indices->const_data_ptr(), target_type(*indices), ignore_index};
    rows.per_row = 1, rows.index_spatial = 1;
    for (size_t d = 1; d < rows_shape.size(); ++d) rows.index_spatial *= rows_shape[d];
    rows.index_spatial = std::max<int64_t>(rows.index_spatial, 1);
    if (probabilities_) {
      const bool single = input.dim() == 1;
      bool fits = t.dim() == input.dim();
      for (int64_t d = 0; fits && d < t.dim(); ++d) fits = d == (single ? 0 : 1) || t.size(d) == input.size(d);
      if (!fits)
        raise(kOp, ": indices must have the shape of input but for the class dimension, input ", shape_of(input),
              ", got ", shape_of(t));
      rows.per_row = t.size(single ? 0 : 1);
      if (single) rows.index_spatial = 1;
      return;
    }
    bool fits = t.dim() == static_cast<int64_t>(rows_shape.size());
    for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == rows_shape[static_cast<size_t>(d)];
    if (!fits)
      raise(kOp, ": indices must have the shape of input without its class dimension; input ", shape_of(input),
            ", got ", shape_of(t));
  }

  void take_probabilities(const Tensor& t, bool are_sparse) {
    const DType dtype = float_dtype(kOp, "probabilities", t);
    const Tensor& like = are_sparse ? *indices : input;
    if (!same_shape(t, like))
      raise(kOp, ": probabilities must have the shape of ", are_sparse ? "indices " : "input ", shape_of(like),
            ", got ", shape_of(t));
    probabilities = are_sparse || spatial_is_one_dim(t) ? t : dense(t);
    if (are_sparse) return;
    rows.dense = {probabilities->const_data_ptr(), dtype, layout_beside(*probabilities, input)};
    rows.has_dense = true;
  }

  void take_mask(const Tensor& t) {
    if (t.scalar_type() != ScalarType::Bool)
      raise(kOp, ": class_mask must be bool, got dtype code ", static_cast<int>(t.scalar_type()));
    rows.row_masks = input.dim() != 1 && same_shape(t, input);
    if (!rows.row_masks && !(t.dim() == 1 && t.size(0) == classes()))
      raise(kOp, ": class_mask must have shape [", classes(), "] or that of input ", shape_of(input), ", got ",
            shape_of(t));
    mask = spatial_is_one_dim(t) ? t : dense(t);
    rows.mask = {mask->const_data_ptr(), DType::float32, layout_beside(*mask, input)};
    rows.has_mask = true;
  }
};

// The same on the CPU, with the memory it needs beside the arguments.
struct Prepared : RowArguments {
  std::vector<double> sparse;
  Accumulators weight, smoothing;

  Prepared(const Tensor& input_, const MaybeTensor& indices_, const MaybeTensor& probabilities_,
           const MaybeTensor& weight_, const MaybeTensor& class_mask, int64_t ignore_index, double label_smoothing,
           double logit_scale, double softcap, bool statistics)
      : RowArguments(input_, indices_, probabilities_, weight_, class_mask, ignore_index, label_smoothing, logit_scale,
                     softcap, statistics) {
    if (indices && probabilities) {
      sparse = doubles(*probabilities);
      sparse.resize(std::max<size_t>(sparse.size(), 1));  // a pointer even to none
      rows.sparse = sparse.data();
    }
    take_weight(weight_);
  }

 private:
  void take_weight(const MaybeTensor& t) {
    std::vector<double> values;
    if (t) {
      values = doubles(*t);
      rows.class_weight = weight.set(values, rows.dtype);
    }
    if (rows.label_smoothing == 0 || rows.row_masks) return;
    const size_t n = static_cast<size_t>(classes());
    const uint8_t* m = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    const int64_t stride = mask ? mask->stride(0) : 0;
    int64_t allowed = 0;
    for (size_t c = 0; c < n; ++c) allowed += !m || m[static_cast<int64_t>(c) * stride];
    const double share = rows.label_smoothing / static_cast<double>(std::max<int64_t>(allowed, 1));
    std::vector<double> spread(std::max<size_t>(n, 1));
    for (size_t c = 0; c < n; ++c)
      spread[c] = !m || m[static_cast<int64_t>(c) * stride] ? share * (t ? values[c] : 1.0) : 0.0;
    rows.smoothing_weight = smoothing.set(spread, rows.dtype);
  }
};

[[noreturn]] inline void raise_bad_row(const RowArguments& p, int64_t row) {
  const int64_t step = p.rows.index_spatial, first = row / step * step * p.rows.per_row + row % step;
  for (int64_t k = 0; k < p.rows.per_row; ++k) {
    const int64_t t = target_value(*p.indices, first + k * step);
    if (t != p.rows.indices.ignore_index && (t < 0 || t >= p.classes())) raise_bad_target(*p.indices, first + k * step);
  }
  raise(kOp, ": a target changed while it was read");
}

// Runs kernel(begin, end) over all rows; raises for the first row with a bad target.
template <class Kernel>
void over_rows(const Prepared& p, const Kernel& kernel) {
  constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> bad_row{kNone};
  torch::stable::parallel_for(0, p.rows.layout.rows(), rows_per_block(p.rows.layout), [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(begin, end);
    if (bad < 0) return;
    int64_t seen = bad_row;
    while (bad < seen && !bad_row.compare_exchange_weak(seen, bad)) {
    }
  });
  if (bad_row != kNone) raise_bad_row(p, bad_row);
}

// The forward's results.
struct RowOutputs {
  Tensor nll, lse, mass, target_weight, entropy, prediction, target_log_probability;

  explicit RowOutputs(const RowArguments& p)
      : nll(make(p, true, ScalarType::Double)),
        lse(make(p, true, ScalarType::Double)),
        mass(make(p, true, ScalarType::Double)),
        target_weight(make(p, true, ScalarType::Double)),
        entropy(make(p, p.rows.statistics, ScalarType::Double)),
        prediction(make(p, p.rows.statistics, ScalarType::Long)),
        target_log_probability(make(p, p.rows.statistics, ScalarType::Double)) {}

  CrossEntropyRowsForward forward(const RowArguments& p) {
    const auto data = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
    return {p.rows,
            data(nll),
            data(lse),
            data(mass),
            data(target_weight),
            data(entropy),
            static_cast<int64_t*>(prediction.mutable_data_ptr()),
            data(target_log_probability)};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {nll, lse, mass, target_weight, entropy, prediction, target_log_probability};
  }

 private:
  static Tensor make(const RowArguments& p, bool wanted, ScalarType dtype) {
    const int64_t none[1] = {0};
    const torch::headeronly::IntHeaderOnlyArrayRef shape{p.rows_shape.data(), p.rows_shape.size()};
    return empty(p.input, wanted ? shape : torch::headeronly::IntHeaderOnlyArrayRef{none, 1}, dtype);
  }
};

// Whether all elements of an expanded tensor are one in memory.
inline bool is_one_value(const Tensor& t) {
  bool one = t.numel() > 1;
  for (int64_t d = 0; one && d < t.dim(); ++d) one = t.size(d) == 1 || t.stride(d) == 0;
  return one;
}

// A tensor of one double per row, or null. With `step`, from a row's to the next, one value may be for all: 0.
inline const double* row_values(const char* name, const MaybeTensor& t, const RowArguments& p, MaybeTensor& owner,
                                int64_t* step = nullptr) {
  if (!t) return nullptr;
  check_dtype(kOp, name, *t, ScalarType::Double, "float64");
  bool fits = t->dim() == static_cast<int64_t>(p.rows_shape.size());
  for (int64_t d = 0; fits && d < t->dim(); ++d) fits = t->size(d) == p.rows_shape[static_cast<size_t>(d)];
  if (!fits)
    raise(kOp, ": ", name, " must have one value per row of input ", shape_of(p.input), ", got shape ", shape_of(*t));
  const bool one = step && is_one_value(*t);
  if (step) *step = one ? 0 : 1;
  owner = one ? *t : dense(*t);
  return static_cast<const double*>(owner->const_data_ptr());
}

}  // namespace fused_ops

// The tensors of the cross-entropy ops, checked, and as the kernels see them: the same on the CPU and on a GPU, and no
// value is read.
#pragma once
#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/border.h"
#include "cross_entropy/kernels.h"

namespace fused_ops {

constexpr const char* kOp = "cross_entropy";
// Logits of a task: with fewer, a second thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

using MaybeTensor = std::optional<Tensor>;

// ---- the arguments of the ops, in the order of their schemas

struct IndexForward {
  Tensor input, target;
  int64_t ignore_index, reduction;  // 0 none, 1 mean, 2 sum

  explicit IndexForward(Arguments& in)
      : input(in.tensor()), target(in.tensor()), ignore_index(in.integer()), reduction(in.integer()) {
    in.check.next("input", input), in.check.next("target", target);
  }
};

struct IndexBackward {
  Tensor grad_loss, input, target;
  Tensor lse, total;  // the forward's
  int64_t ignore_index, reduction;

  explicit IndexBackward(Arguments& in)
      : grad_loss(in.tensor()),
        input(in.tensor()),
        target(in.tensor()),
        lse(in.tensor()),
        total(in.tensor()),
        ignore_index(in.integer()),
        reduction(in.integer()) {
    in.check.next("grad_loss", grad_loss), in.check.next("input", input), in.check.next("target", target);
    in.check.next("lse", lse), in.check.next("total", total);
  }
};

struct ScaleGradient {
  Tensor gradient, grad_loss, target;
  int64_t ignore_index;

  explicit ScaleGradient(Arguments& in)
      : gradient(in.tensor()), grad_loss(in.tensor()), target(in.tensor()), ignore_index(in.integer()) {
    in.check.next("gradient", gradient), in.check.next("grad_loss", grad_loss), in.check.next("target", target);
  }
};

// What the loss of each row is: the rows' ops have these tensors and, as their last arguments, these options.
struct RowTensors {
  Tensor input;
  MaybeTensor indices, probabilities, weight, class_mask;

  explicit RowTensors(Arguments& in)
      : input(in.tensor()),
        indices(in.maybe_tensor()),
        probabilities(in.maybe_tensor()),
        weight(in.maybe_tensor()),
        class_mask(in.maybe_tensor()) {}
  void check(ArgumentCheck& check, const char* name_of_input) const {
    check.next(name_of_input, input), check.next("indices", indices), check.next("probabilities", probabilities);
    check.next("weight", weight), check.next("class_mask", class_mask);
  }
};

struct RowOptions {
  int64_t ignore_index;
  double label_smoothing, logit_scale, softcap;
  bool statistics;

  explicit RowOptions(Arguments& in)
      : ignore_index(in.integer()),
        label_smoothing(in.number()),
        logit_scale(in.number()),
        softcap(in.number()),
        statistics(in.flag()) {}
};

struct RowsForward {
  RowTensors tensors;
  RowOptions options;

  explicit RowsForward(Arguments& in) : tensors(in), options(in) { tensors.check(in.check, "input"); }
};

struct RowsBackward {
  MaybeTensor grad_nll, grad_lse, grad_entropy, grad_target_log_probability;  // (rows,) float64 each, like the next
  RowTensors tensors;
  Tensor lse, mass;     // the forward's
  MaybeTensor entropy;  // likewise
  RowOptions options;

  explicit RowsBackward(Arguments& in)
      : grad_nll(in.maybe_tensor()),
        grad_lse(in.maybe_tensor()),
        grad_entropy(in.maybe_tensor()),
        grad_target_log_probability(in.maybe_tensor()),
        tensors(in),
        lse(in.tensor()),
        mass(in.tensor()),
        entropy(in.maybe_tensor()),
        options(in) {
    in.check.next("grad_nll", grad_nll), in.check.next("grad_lse", grad_lse);
    in.check.next("grad_entropy", grad_entropy);
    in.check.next("grad_target_log_probability", grad_target_log_probability);
    tensors.check(in.check, "input");
    in.check.next("lse", lse), in.check.next("mass", mass), in.check.next("entropy", entropy);
  }
};

// The rows' ops of a shard, which has some of the classes.
struct ShardForward {
  RowTensors tensors;
  Tensor allowed;  // float64, how many classes smoothing is spread over: a scalar or one value per row
  int64_t first_class, all_classes;
  RowOptions options;

  explicit ShardForward(Arguments& in)
      : tensors(in), allowed(in.tensor()), first_class(in.integer()), all_classes(in.integer()), options(in) {
    tensors.check(in.check, "input"), in.check.next("allowed", allowed);
  }
};

struct ShardBackward {
  MaybeTensor grad_nll, grad_lse, grad_entropy, grad_target_log_probability;  // (rows,) float64 each, like the next
  RowTensors tensors;
  Tensor allowed;
  Tensor high, low, mass, target_weight;  // of all shards
  MaybeTensor entropy;                    // likewise
  Tensor target_log_probability;
  int64_t first_class, all_classes;
  RowOptions options;

  explicit ShardBackward(Arguments& in)
      : grad_nll(in.maybe_tensor()),
        grad_lse(in.maybe_tensor()),
        grad_entropy(in.maybe_tensor()),
        grad_target_log_probability(in.maybe_tensor()),
        tensors(in),
        allowed(in.tensor()),
        high(in.tensor()),
        low(in.tensor()),
        mass(in.tensor()),
        target_weight(in.tensor()),
        entropy(in.maybe_tensor()),
        target_log_probability(in.tensor()),
        first_class(in.integer()),
        all_classes(in.integer()),
        options(in) {
    in.check.next("grad_nll", grad_nll), in.check.next("grad_lse", grad_lse);
    in.check.next("grad_entropy", grad_entropy);
    in.check.next("grad_target_log_probability", grad_target_log_probability);
    tensors.check(in.check, "input");
    in.check.next("allowed", allowed), in.check.next("high", high), in.check.next("low", low);
    in.check.next("mass", mass), in.check.next("target_weight", target_weight), in.check.next("entropy", entropy);
    in.check.next("target_log_probability", target_log_probability);
  }
};

using RowResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// ---- layouts

inline TargetType target_type(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Long: return TargetType::int64;
    case ScalarType::Int: return TargetType::int32;
    case ScalarType::Short: return TargetType::int16;
    case ScalarType::Char: return TargetType::int8;
    case ScalarType::Byte: return TargetType::uint8;
    default:
      raise(kOp, ": target must hold class indices of dtype int64, int32, int16, int8 or uint8, got ",
            target.scalar_type());
  }
}

// The last dimension behind the classes that has more than one element: the stride of one of size 1 says nothing.
inline int64_t innermost_spatial_dim(const Tensor& t) {
  int64_t d = t.dim() - 1;
  while (d > 2 && t.size(d) == 1) --d;
  return d;
}

// Whether the dimensions from 2 on are one with a single stride.
inline bool spatial_is_one_dim(const Tensor& t) {
  int64_t inner = innermost_spatial_dim(t);
  for (int64_t d = inner - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != t.stride(inner) * t.size(inner)) return false;
    inner = d;
  }
  return true;
}

inline RowLayout plain_layout_of(const Tensor& t) {
  if (t.dim() == 1) return {1, 1, t.size(0), 0, 0, t.stride(0)};
  RowLayout l{t.size(0), 1, t.size(1), t.stride(0), 0, t.stride(1)};
  for (int64_t d = 2; d < t.dim(); ++d) l.spatial *= t.size(d);
  if (t.dim() > 2) l.spatial_stride = t.stride(innermost_spatial_dim(t));
  return l;
}

inline RowLayout layout_of(const Tensor& t) {
  RowLayout l = plain_layout_of(t);
  if (t.dim() > 1 && l.spatial == 1 && l.batch_stride == 1 &&
      l.class_stride != 1)  // a transposed matrix: its rows are adjacent
    std::swap(l.batch, l.spatial), std::swap(l.batch_stride, l.spatial_stride);
  return l;
}

// ---- checks

inline void check_input_and_target(const Tensor& input, const Tensor& target, int64_t reduction) {
  if (input.dim() == 0) raise(kOp, ": input must have at least one dimension (classes), got a scalar");
  if (reduction < 0 || reduction > 2) raise(kOp, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  bool fits = target.dim() == std::max<int64_t>(input.dim() - 1, 0);
  for (int64_t d = 0; fits && d < target.dim(); ++d) fits = target.size(d) == input.size(d == 0 ? 0 : d + 1);
  if (!fits)
    raise(kOp, ": target must have the shape of input without its class dimension; input ", shape_of(input),
          ", target ", shape_of(target));
}

inline void check_backward(const IndexBackward& a) {
  check_input_and_target(a.input, a.target, a.reduction);
  check_same_dtype(kOp, "grad_loss", a.grad_loss, "input", a.input);
  check_dtype(kOp, "lse", a.lse, ScalarType::Double, "float64");
  check_dtype(kOp, "total", a.total, ScalarType::Double, "float64");
  check_same_shape(kOp, "lse", a.lse, "target", a.target);
  check_numel(kOp, "total", a.total, 1);
  if (static_cast<Reduction>(a.reduction) == Reduction::none)
    check_same_shape(kOp, "grad_loss", a.grad_loss, "target", a.target);
  else
    check_numel(kOp, "grad_loss", a.grad_loss, 1);
}

// Whether no two elements share memory, for the layouts that a gradient may be written over.
inline bool each_element_alone(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < reach) return false;
    reach = stride * size;
  }
  return true;
}

inline void check_in_place(const Tensor& input) {
  if (input.numel() == 0 || (spatial_is_one_dim(input) && each_element_alone(input))) return;
  raise(kOp,
        ": inplace_backward needs logits whose elements do not share memory, and whose dimensions behind the "
        "classes are dense, got shape ",
        shape_of(input));
}

// The layout of the (batch, classes, spatial) tensor t beside the logits: with their split of rows into two dimensions.
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

// ---- the rows' ops

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// What the two directions of the rows' ops take alike.
struct RowArguments {
  Tensor input;
  MaybeTensor indices, probabilities, mask;  // probabilities of all classes, or of the indices
  std::vector<int64_t> rows_shape;
  CrossEntropyRows rows{};  // without sparse, class_weight and smoothing_weight

  RowArguments(const RowTensors& t, const RowOptions& o) : input(t.input) {
    if (input.dim() == 0) raise(kOp, ": input must have at least one dimension (classes), got a scalar");
    rows.dtype = float_dtype(kOp, "input", input);
    if (!(o.label_smoothing >= 0 && o.label_smoothing <= 1))
      raise(kOp, ": label_smoothing must be between 0 and 1, got ", o.label_smoothing);
    if (!(o.softcap >= 0)) raise(kOp, ": softcap must be positive, or 0 for none, got ", o.softcap);
    if (!spatial_is_one_dim(input)) input = dense(input);
    rows.logits = input.const_data_ptr();
    rows.layout = layout_of(input);
    rows.label_smoothing = o.label_smoothing, rows.logit_scale = o.logit_scale, rows.softcap = o.softcap;
    rows.statistics = o.statistics;
    for (int64_t d = 0; d < input.dim(); ++d)
      if (d != (input.dim() == 1 ? 0 : 1)) rows_shape.push_back(input.size(d));
    if (!t.indices && !t.probabilities) raise(kOp, ": expected indices or probabilities, got neither");
    if (t.indices) take_indices(*t.indices, t.probabilities.has_value(), o.ignore_index);
    if (t.probabilities) take_probabilities(*t.probabilities, t.indices.has_value());
    if (t.class_mask) take_mask(*t.class_mask);
    if (t.weight && (t.weight->dim() != 1 || t.weight->size(0) != classes()))
      raise(kOp, ": weight must have shape [", classes(), "], got ", shape_of(*t.weight));
  }

  int64_t classes() const { return rows.layout.classes; }

 private:
  void take_indices(const Tensor& t, bool several, int64_t ignore_index) {
    indices = dense(t);
    rows.indices = {indices->const_data_ptr(), target_type(*indices), ignore_index};
    rows.per_row = 1, rows.index_spatial = 1;
    for (size_t d = 1; d < rows_shape.size(); ++d) rows.index_spatial *= rows_shape[d];
    rows.index_spatial = std::max<int64_t>(rows.index_spatial, 1);
    if (several) {
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
    if (t.scalar_type() != ScalarType::Bool) raise(kOp, ": class_mask must be bool, got ", t.scalar_type());
    rows.row_masks = input.dim() != 1 && same_shape(t, input);
    if (!rows.row_masks && !(t.dim() == 1 && t.size(0) == classes()))
      raise(kOp, ": class_mask must have shape [", classes(), "] or that of input ", shape_of(input), ", got ",
            shape_of(t));
    mask = spatial_is_one_dim(t) ? t : dense(t);
    rows.mask = {mask->const_data_ptr(), DType::float32, layout_beside(*mask, input)};
    rows.has_mask = true;
  }
};

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

  CrossEntropyForward forward(const RowArguments& p) {
    const auto data = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
    return {p.rows,
            data(nll),
            data(lse),
            data(mass),
            data(target_weight),
            data(entropy),
            static_cast<int64_t*>(prediction.mutable_data_ptr()),
            data(target_log_probability),
            nullptr};
  }

  RowResults all() const { return {nll, lse, mass, target_weight, entropy, prediction, target_log_probability}; }

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

// A backward's arguments but for the gradient's memory, with what keeps them alive. `steps`: see row_values, of the
// upstream gradients; or null.
struct BackwardValues {
  CrossEntropyBackward args{};

  BackwardValues(const RowsBackward& a, const RowArguments& p, int64_t* steps) {
    upstream(a, p, steps);
    args.lse = values("lse", a.lse, p);
    args.mass = values("mass", a.mass, p);
    if (a.grad_entropy) args.entropy = values("entropy", a.entropy, p);
  }
  BackwardValues(const ShardBackward& a, const RowArguments& p) {
    upstream(a, p, nullptr);
    args.high = values("high", a.high, p), args.low = values("low", a.low, p);
    args.mass = values("mass", a.mass, p);
    args.target_weight = values("target_weight", a.target_weight, p);
    args.target_log_probability = values("target_log_probability", a.target_log_probability, p);
    if (a.grad_entropy) args.entropy = values("entropy", a.entropy, p);
  }
  void write_to(Tensor& grad, const Tensor& input) {
    args.grad_logits = grad.mutable_data_ptr(), args.grad_layout = layout_beside(grad, input);
  }

 private:
  template <class Arguments>
  void upstream(const Arguments& a, const RowArguments& p, int64_t* steps) {
    if (a.grad_entropy && !a.entropy) raise(kOp, ": expected entropy beside grad_entropy, got none");
    args.rows = p.rows;
    const auto step = [&](int i) { return steps ? steps + i : nullptr; };
    args.grad_nll = values("grad_nll", a.grad_nll, p, step(0));
    args.grad_lse = values("grad_lse", a.grad_lse, p, step(1));
    args.grad_entropy = values("grad_entropy", a.grad_entropy, p, step(2));
    args.grad_target_log_probability = values("grad_target_log_probability", a.grad_target_log_probability, p, step(3));
  }
  const double* values(const char* name, const MaybeTensor& t, const RowArguments& p, int64_t* step = nullptr) {
    return row_values(name, t, p, owners_[next_++], step);
  }

  MaybeTensor owners_[10];
  int next_ = 0;
};

}  // namespace fused_ops

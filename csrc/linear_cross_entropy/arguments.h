// The arguments of the raw ops between linear cross-entropy's matrix products, in the order of their schemas.
#pragma once
#include "cross_entropy/arguments.h"
#include "linear_cross_entropy/kernels.h"

namespace fused_ops {

inline constexpr const char* kHead = "linear_cross_entropy";

struct ChunkArguments {
  RowTensors tensors;     // the input is the logits
  MaybeTensor row_scale;  // (rows,) float64: the logits become the gradient of the sum that it weights
  double z_loss;
  RowOptions options;

  explicit ChunkArguments(Arguments& in) : tensors(in), row_scale(in.maybe_tensor()), z_loss(in.number()), options(in) {
    tensors.check(in.check, "logits"), in.check.next("row_scale", row_scale);
  }
};

// A tile of some of all classes, and three tensors of one float a row.
struct TileArguments {
  Tensor logits;  // (classes of the tile, rows)
  Tensor target;  // (rows,) int64, among all classes
  int64_t first_class, classes;
  Tensor rows[3];

  TileArguments(Arguments& in, const char* const (&names)[3])
      : logits(in.tensor()),
        target(in.tensor()),
        first_class(in.integer()),
        classes(in.integer()),
        rows{in.tensor(), in.tensor(), in.tensor()} {
    in.check.next("logits", logits), in.check.next("target", target);
    for (int i = 0; i < 3; ++i) in.check.next(names[i], rows[i]);
  }

  LinearCrossEntropyTile tile() const {
    LinearCrossEntropyTile t{};
    t.dtype = float_dtype(kHead, "logits", logits);
    if (t.dtype == DType::float64) raise(kHead, ": logits must have a dtype that is computed in float32, got float64");
    if (logits.dim() != 2 || (logits.size(1) > 1 && logits.stride(1) != 1) ||
        (logits.size(0) > 1 && logits.stride(0) < logits.size(1)))
      raise(kHead, ": logits must be (classes, rows) with the rows adjacent, got shape ", shape_of(logits));
    t.classes = logits.size(0), t.rows = logits.size(1), t.stride = logits.stride(0);
    t.target = static_cast<const int64_t*>(data("target", target, ScalarType::Long, "int64"));
    if (first_class < 0 || classes < t.classes || classes > INT32_MAX || first_class > classes - t.classes)
      raise(kHead, ": first_class ", first_class, " and ", t.classes, " more must be among ", classes, " classes");
    t.first_class = first_class;
    t.logits = const_cast<void*>(logits.const_data_ptr());
    return t;
  }

 protected:
  // Of a dense tensor with a value of each row.
  const void* data(const char* name, const Tensor& t, ScalarType dtype, const char* called) const {
    check_dtype(kHead, name, t, dtype, called);
    check_numel(kHead, name, t, logits.size(1));
    if (!t.is_contiguous()) raise(kHead, ": ", name, " must be contiguous");
    return t.const_data_ptr();
  }
  const float* floats(const char* name, const Tensor& t) const {
    return static_cast<const float*>(data(name, t, ScalarType::Float, "float32"));
  }
};
struct TileSums : TileArguments {
  explicit TileSums(Arguments& in) : TileArguments(in, {"max", "others", "target_logit"}) {}

  LinearCrossEntropySums sums() const {
    return {const_cast<float*>(floats("max", rows[0])),
            static_cast<double*>(const_cast<void*>(data("others", rows[1], ScalarType::Double, "float64"))),
            const_cast<float*>(floats("target_logit", rows[2]))};
  }
};
struct TileGrads : TileArguments {
  explicit TileGrads(Arguments& in) : TileArguments(in, {"max", "factor", "target_grad"}) {}

  LinearCrossEntropyGrads grads() const {
    return {floats("max", rows[0]), floats("factor", rows[1]), floats("target_grad", rows[2])};
  }
};

struct AddArguments {
  Tensor sum, part;

  explicit AddArguments(Arguments& in) : sum(in.tensor()), part(in.tensor()) {
    in.check.next("sum", sum), in.check.next("part", part);
  }
};

struct RescaleArguments {
  Tensor grad, scale;

  explicit RescaleArguments(Arguments& in) : grad(in.tensor()), scale(in.tensor()) {
    in.check.next("grad", grad), in.check.next("scale", scale);
  }
};

struct BufferArguments {
  Tensor like;
  int64_t rows, columns;

  explicit BufferArguments(Arguments& in) : like(in.tensor()), rows(in.integer()), columns(in.integer()) {
    in.check.next("like", like);
  }
};

// A small head, whose product, loss and gradients are one call.
struct HeadArguments {
  Tensor input, linear_weight;
  MaybeTensor linear_bias;
  Tensor target;
  int64_t ignore_index, reduction, needs;

  explicit HeadArguments(Arguments& in)
      : input(in.tensor()),
        linear_weight(in.tensor()),
        linear_bias(in.maybe_tensor()),
        target(in.tensor()),
        ignore_index(in.integer()),
        reduction(in.integer()),
        needs(in.integer()) {
    in.check.next("input", input), in.check.next("linear_weight", linear_weight);
    in.check.next("linear_bias", linear_bias), in.check.next("target", target);
  }
};

}  // namespace fused_ops

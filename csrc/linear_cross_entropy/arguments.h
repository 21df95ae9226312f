// The arguments of the raw ops between linear cross-entropy's matrix products, in the order of their schemas.
#pragma once
#include "cross_entropy/arguments.h"

namespace fused_ops {

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
};
struct TileSums : TileArguments {
  explicit TileSums(Arguments& in) : TileArguments(in, {"max", "others", "target_logit"}) {}
};
struct TileGrads : TileArguments {
  explicit TileGrads(Arguments& in) : TileArguments(in, {"max", "factor", "target_grad"}) {}
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

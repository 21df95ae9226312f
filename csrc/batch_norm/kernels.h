// The contract of the batch-norm kernels: raw pointers and plain structs, nothing of torch.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace fused_ops {

enum class Activation : int32_t { none, relu, leaky_relu, elu, silu, gelu, tanh, sigmoid, hardswish };
constexpr int32_t kActivations = 9;

constexpr int64_t kRun = 1024;        // values of one channel that are loaded together
constexpr int64_t kFoldAt = 1024;     // values of one channel that are accumulated before they are folded into double
constexpr int64_t kTile = 1024;       // columns handled together: a page of each row in float32;
constexpr int64_t kNarrowTile = 256;  // where there are fewer rows than
constexpr int64_t kWideTileRows = 1024;
constexpr int64_t kFusedColumns = 256;  // rows shorter than this are walked several at a time
constexpr int64_t kMostRowBlocks = 32;
constexpr int64_t kMinRows = 256;     // of a block: the sums of fewer cost more to merge than a thread saves
constexpr int64_t kRowsPerFold = 64;  // rows of a tile that are accumulated before they are folded into double
constexpr int64_t kMinItems = 32;     // parts a few large channels are cut into
constexpr int64_t kMinItemValues = 16384;
constexpr int64_t kStreamBytes = int64_t{4} << 20;  // outputs from this size on go past the cache,
constexpr int64_t kStreamOnceBytes = int64_t{8}
                                     << 20;  // or this one where the input is read once and leaves them room,
constexpr int64_t kStreamRunBytes = 512;     // in runs of at least this size

// Dense values, in one of two walks. Planes: (batch, channels, spatial), the values of a channel in runs of `spatial`.
// Columns: spatial == 1, a matrix of `batch` rows whose columns are channels (or the values of a small plane).
struct ChannelLayout {
  int64_t batch, channels, spatial;
  const uint8_t* valid;  // (batch, spatial), nonzero where a position counts; null if all do

  bool columns() const { return spatial == 1; }
  int64_t numel() const { return batch * channels * spatial; }

  // The input is cut into items by its shape alone, so that results do not depend on the thread count.
  // Columns: item = a block of rows of one tile, tile after tile. Planes: item = one part of one channel's runs.
  int64_t fused() const { return channels > 0 && !valid ? std::max<int64_t>(1, kFusedColumns / channels) : 1; }
  int64_t rows_per_item() const {
    const int64_t fold = kRowsPerFold * fused(), step = (kMinRows + fold - 1) / fold * fold;
    const int64_t steps = (batch + step - 1) / step;
    return std::max<int64_t>(1, (steps + kMostRowBlocks - 1) / kMostRowBlocks) * step;
  }
  int64_t row_blocks() const { return (batch + rows_per_item() - 1) / rows_per_item(); }
  int64_t tiles() const {
    const int64_t most = batch < kWideTileRows ? kNarrowTile : kTile;
    return (channels + most - 1) / most;
  }
  int64_t tile_columns() const {  // of every tile but the last; a multiple of any line and of a byte of mask bits
    const int64_t share = (channels + tiles() - 1) / tiles();
    return (share + 63) / 64 * 64;
  }
  int64_t parts() const {
    if (channels >= kMinItems || channels == 0) return 1;
    const int64_t largest = std::max<int64_t>(1, batch * spatial / kMinItemValues);
    return std::min((kMinItems + channels - 1) / channels, largest);
  }
  int64_t planes() const { return batch * channels; }
  int64_t items() const { return columns() ? row_blocks() * tiles() : channels * parts(); }
  int64_t partials() const { return columns() ? row_blocks() * channels : channels * parts(); }
};

// Two sums (and how many values they are of) per channel and part; merged in order by the caller.
// Planes: (channels, parts). Columns: ColumnPartials.
struct Partial {
  double a, b;  // moments: mean, M2.  gradients: sum of grad, sum of grad * (x - mean)
  int64_t n;
};

// Columns: the `channels` partials of a block of rows hold all its `a`, then all its `b`, which are merged many at a
// time, then the n of each tile where its first column's would be.
struct ColumnPartials {
  double *a, *b;
  int64_t* n;
  ColumnPartials(Partial* partials, int64_t block, int64_t channels)
      : a(reinterpret_cast<double*>(partials + block * channels)),
        b(a + channels),
        n(reinterpret_cast<int64_t*>(b + channels)) {}
};

// output = activation((x - mean) * scale + shift + residual). The coefficients are accumulators (float, or double for
// double), one a channel; `mean` is rounded, and what it lost is in `shift`.
struct BatchNormForward {
  DType dtype;
  ChannelLayout layout;
  Activation activation;
  double slope;          // of leaky_relu below zero, or elu's alpha
  const void* input;     // as layout
  const void* residual;  // as layout, or null
  const void *mean, *scale, *shift;
  bool by_plane;      // items are the planes in the order of memory instead
  bool stream;        // the output is too large for the cache: it goes past it
  void* output;       // as layout
  uint8_t* mask;      // a bit per value, 1 where the activation's input is > 0; each run or row starts a byte. Or null
  Partial* partials;  // written by batch_norm_moments
};

// grad_residual = grad_output * activation'; grad_input = scale * (grad_residual - grad_mean - (x - mean) *
// grad_slope).
struct BatchNormBackward {
  DType dtype;
  ChannelLayout layout;
  Activation activation;
  double slope;
  bool frozen;    // evaluation mode: grad_input = scale * grad_residual
  bool kept;      // `input` is leaky_relu's output: x is leaky_relu^-1 of it, `mean` the bias
  bool by_plane;  // items of batch_norm_grad_input are the planes in the order of memory instead
  bool stream;    // the gradients are too large for the cache: they go past it
  const void *input, *grad_output, *residual;
  const void *mean, *scale, *shift;    // the forward's
  const void *grad_mean, *grad_slope;  // accumulators, (channels,); what `mean` lost is in grad_mean
  const double* exact_mean;            // (channels / repeat,), and the columns that belong to each
  int64_t repeat;
  const uint8_t* mask;
  void *grad_input, *grad_residual;  // either may be null
  Partial* partials;                 // written by batch_norm_grad_sums
};

FUSED_OPS_PER_ISA(void batch_norm_moments(const BatchNormForward& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_apply(const BatchNormForward& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_grad_sums(const BatchNormBackward& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_grad_input(const BatchNormBackward& args, int64_t begin_item, int64_t end_item))

}  // namespace fused_ops

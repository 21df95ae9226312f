// The contract of the batch-norm kernels: raw pointers and plain structs, nothing of torch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

#ifndef FUSED_OPS_ISA
#define FUSED_OPS_ISA DEFAULT
#endif

namespace fused_ops {

enum class Activation : int32_t { none, relu, leaky_relu, elu, silu, gelu, tanh, sigmoid, hardswish };
constexpr int32_t kActivations = 9;

// NCHW loads at most this many values of a channel together.
constexpr int64_t kRun = 1024;
// This many values of one channel are accumulated in the accumulator's type before they are folded into double.
constexpr int64_t kFoldAt = 1024;
// NHWC handles at most this many columns together, a page of each row in float32.
constexpr int64_t kTile = 1024;
// It handles at most this many where there are fewer than kWideTileRows rows, as such a tile stays in the cache.
constexpr int64_t kNarrowTile = 256;
constexpr int64_t kWideTileRows = 1024;
// NHWC rows that are shorter than this are taken several at a time.
constexpr int64_t kFusedColumns = 256;
// The rows of NHWC are cut into at most this many blocks.
constexpr int64_t kMostRowBlocks = 32;
// A block has at least this many rows: the sums of fewer cost more to merge than a thread saves.
constexpr int64_t kMinRows = 256;
// This many rows of 16-bit values are accumulated in float before they are folded into double.
constexpr int64_t kRowsPerFold = 64;
// A few large channels of NCHW are cut into parts, so that there are at least this many.
constexpr int64_t kMinItems = 32;
// A part has at least this many values.
constexpr int64_t kMinItemValues = 16384;
// Outputs of at least this size are written by non-temporal stores where the input is read twice.
constexpr int64_t kStreamBytes = int64_t{4} << 20;
// Outputs of at least this size are where the input is read once and leaves them room in the cache.
constexpr int64_t kStreamOnceBytes = int64_t{8} << 20;
// Non-temporal stores need runs of at least this size; shorter ones are mostly parts of lines.
constexpr int64_t kStreamRunBytes = 512;

// Dense values in one of two layouts. NCHW: (batch, channels, spatial), a slice of `spatial` values for each channel of
// each image. NHWC: spatial == 1, a matrix of `batch` rows whose columns are channels; NCHW of few values a slice is
// taken for such a matrix too, with a column for each value.
struct ChannelLayout {
  int64_t batch, channels, spatial;
  const uint8_t* valid;  // (batch, spatial), nonzero where a position counts; null if all do

  bool nhwc() const { return spatial == 1; }
  int64_t numel() const { return batch * channels * spatial; }

  // The input is cut into items by its shape alone, so that results do not depend on the thread count.
  // NHWC: item = a block of rows of one tile, tile after tile. NCHW: item = one part of one channel's runs.
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
  int64_t slices() const { return batch * channels; }
  int64_t items() const { return nhwc() ? row_blocks() * tiles() : channels * parts(); }
  int64_t partials() const { return nhwc() ? row_blocks() * channels : channels * parts(); }
};

// Two sums (and how many values they are of) per channel and part; merged in order by the caller.
// NCHW: (channels, parts). NHWC: ColumnPartials.
struct Partial {
  double a, b;  // moments: mean, M2.  gradients: sum of grad, sum of grad * (x - mean)
  int64_t n;
};

// NHWC: the `channels` partials of a block of rows hold all its `a`, then all its `b`, which are merged many at a
// time, then the n of each tile where its first column's would be.
struct ColumnPartials {
  double *a, *b;
  int64_t* n;
  ColumnPartials(Partial* partials, int64_t block, int64_t channels)
      : a(reinterpret_cast<double*>(partials + block * channels)),
        b(a + channels),
        n(reinterpret_cast<int64_t*>(b + channels)) {}
};

namespace FUSED_OPS_ISA {

// Mean and M2 (the sum of squared deviations) of values, merged with others' (Chan, Golub and LeVeque, 1979).
struct Moments {
  double mean = 0, m2 = 0;
  int64_t n = 0;

  void merge(double other_mean, double other_m2, int64_t other_n) {
    if (other_n == 0) return;
    if (n == 0) {  // exact, and keeps inf and NaN as they came
      mean = other_mean, m2 = other_m2, n = other_n;
      return;
    }
    const double total = static_cast<double>(n + other_n), delta = other_mean - mean;
    if (std::isfinite(delta))
      mean += delta * (static_cast<double>(other_n) / total);
    else
      mean += other_mean;  // inf stays inf, which inf - inf would not
    m2 += other_m2 + delta * delta * (static_cast<double>(n) * static_cast<double>(other_n) / total);
    n += other_n;
  }
};

}  // namespace FUSED_OPS_ISA

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
  bool by_slice;      // NCHW: items are the slices in the order of memory instead
  bool stream;        // the output is too large for the cache: non-temporal stores
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
  bool frozen;       // evaluation mode: grad_input = scale * grad_residual
  bool from_output;  // `input` is leaky_relu's output: x is leaky_relu^-1 of it, `mean` the bias
  bool by_slice;     // NCHW: items of batch_norm_grad_input are the slices in the order of memory instead
  bool stream;       // the gradients are too large for the cache: non-temporal stores
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

// ---- small inputs
//
// Everything of one op in one call. Of a matrix that is one item (at most 256 channels, and few rows) the two passes
// take less than a microsecond, and so would the arithmetic between them, a division and a square root for each
// channel, if it were not vectorised.

// A small input has at most this many channels.
constexpr int64_t kSmallChannels = 256;

inline bool is_small(const ChannelLayout& l) {
  return l.nhwc() && !l.valid && l.channels > 0 && l.channels <= kSmallChannels && l.items() == 1;
}

// What batch_norm_small_forward needs beside the kernels' own arguments, which it completes: of those, the layout, the
// activation and the pointers to what is as large as the input are the caller's.
struct SmallForward {
  bool training;
  double momentum, eps;
  int64_t correction;
  DType params;                                            // dtype of the next six
  const void *weight, *bias, *running_mean, *running_var;  // (channels,), each may be null
  void *new_mean, *new_var;                                // (channels,), null without an update
  double *mean, *invstd;                                   // (channels,), written
};

struct SmallBackward {
  int64_t correction;
  bool reduces;                   // sums are wanted
  DType params;                   // dtype of the next four
  const void *weight, *bias;      // (channels,), each may be null
  void *grad_weight, *grad_bias;  // (channels,), null if not wanted
  const double *mean, *invstd;    // (channels,)
};

FUSED_OPS_PER_ISA(void batch_norm_small_forward(const BatchNormForward& args, const SmallForward& small))
FUSED_OPS_PER_ISA(void batch_norm_small_backward(const BatchNormBackward& args, const SmallBackward& small))

// ---- a backward from the output, where the forward kept that instead of its input: see docs/batch_norm.md

// How far the rounding of the output may be amplified in the rebuilt (x - mean) * invstd, in units of itself.
constexpr double kMaxAmplification = 4;
// An item of NHWC is this many rows.
constexpr int64_t kFromOutputRows = 64;

// Which of a channel's x are stored beside the output.
enum class Keep : int8_t { none, all, below };

// The output is read in the order of memory; item = a slice, or kFromOutputRows rows. The stored x of an item are at
// [offsets[item], offsets[item + 1]) of `stored`, in that order. Accumulators (float, or double for double) have one
// value a channel.
struct BatchNormFromOutput {
  DType dtype;
  ChannelLayout layout;
  Activation activation;  // none, leaky_relu or elu
  double slope;
  bool frozen;
  const void *input, *output, *grad_output;  // as layout; input is read by batch_norm_copy_stored alone
  const Keep* keep;                          // none: no x; all: every x; below: the x of outputs not >= limit
  const void* limit;
  const void* bias;                   // activation^-1(output) - bias is a multiple of x - mean: "deviation" below
  const void *mean, *factor, *shift;  // it is (x - mean) * factor + shift where x was stored
  const void *scale, *grad_mean, *grad_slope;  // grad_input = scale * (h - grad_mean - deviation * grad_slope)
  int64_t* offsets;
  void* stored;
  void* grad_input;
  Partial* partials;  // sums of h and h * deviation; NCHW: one an item; NHWC: (items, channels)

  int64_t items() const {
    return layout.nhwc() ? (layout.batch + kFromOutputRows - 1) / kFromOutputRows : layout.slices();
  }
};

FUSED_OPS_PER_ISA(void batch_norm_count_stored(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_copy_stored(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_output_sums(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item))
FUSED_OPS_PER_ISA(void batch_norm_output_grads(const BatchNormFromOutput& args, int64_t begin_item, int64_t end_item))

}  // namespace fused_ops

// How batch norm's two passes over its input are ordered, so that the second finds in the cache what the first has
// read; and the merging of what the first has summed. Neither changes a bit with the number of threads.
#pragma once
#include "batch_norm_tensors.h"
#include "cpu/moments.h"

namespace fused_ops {

// Merges the partials of a channel in a fixed order: parts, or the columns of a small plane and their row blocks.
template <class Add>
void for_partials(const View& view, const Partial* partials, int64_t channel, const Add& add) {
  const ChannelLayout& l = view.layout;
  if (!l.columns()) {
    for (int64_t i = channel * l.parts(); i < (channel + 1) * l.parts(); ++i) add(partials[i]);
    return;
  }
  const int64_t blocks = l.row_blocks();
  for (int64_t column = channel * view.repeat; column < (channel + 1) * view.repeat; ++column)
    for (int64_t b = 0; b < blocks; ++b) add(partials[b * l.channels + column]);
}

inline Partial merged_moments(const View& view, const Partial* partials, int64_t channel) {
  DEFAULT::Moments total;
  for_partials(view, partials, channel, [&](const Partial& p) { total.merge(p.a, p.b, p.n); });
  return {total.mean, total.m2, total.n};
}

inline Partial summed(const View& view, const Partial* partials, int64_t channel) {
  Partial total{0, 0, 0};
  for_partials(view, partials, channel, [&](const Partial& p) { total.a += p.a, total.b += p.b, total.n += p.n; });
  return total;
}

// Whether the outputs go past the cache: large ones, but not in pieces of a few lines, most of them parts of lines.
inline bool streams(const ChannelLayout& l, DType dtype) {
  const int64_t bytes = element_size(dtype);
  return !l.valid && l.numel() * bytes >= kStreamBytes && (l.columns() || l.spatial * bytes >= kStreamRunBytes);
}

// Runs reduce -> finish(channel) -> write: channel by channel, or tile by tile, where that keeps what is read twice in
// the cache; else one after the other over the whole input.
template <class Args, class Finish>
void two_passes(const View& view, void (*reduce)(const Args&, int64_t, int64_t),
                void (*write)(const Args&, int64_t, int64_t), const Args& args, const Finish& finish) {
  const ChannelLayout& l = view.layout;
  if (args.by_plane) {
    for (int64_t c = 0; c < view.channels; ++c) finish(c);
    if (write) for_items(l, l.planes(), [&](int64_t begin, int64_t end) { write(args, begin, end); });
    return;
  }
  // Units that are finished on their own: channels of planes, tiles of columns.
  const int64_t units = l.columns() ? (view.repeat == 1 ? l.tiles() : 1) : (l.parts() == 1 ? l.channels : 1);
  const int64_t items = units == 0 ? 0 : l.items() / units;
  const auto finish_unit = [&](int64_t unit) {
    const int64_t width = units == 1 ? view.channels : l.columns() ? l.tile_columns() : 1;
    for (int64_t c = unit * width; c < std::min(view.channels, (unit + 1) * width); ++c) finish(c);
  };
  if (units > 1 && (!l.columns() || units >= static_cast<int64_t>(torch::stable::get_num_threads()))) {
    for_items(l, units, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        if (reduce) reduce(args, unit * items, (unit + 1) * items);
        finish_unit(unit);
        if (write) write(args, unit * items, (unit + 1) * items);
      }
    });
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    const auto in_parallel = [&](auto kernel) {
      if (kernel)
        for_items(l, items,
                  [&](int64_t begin, int64_t end) { kernel(args, unit * items + begin, unit * items + end); });
    };
    in_parallel(reduce);
    finish_unit(unit);
    in_parallel(write);
  }
}

}  // namespace fused_ops

// How batch norm's two passes over its input are ordered, so that the second finds in the cache what the first has
// read; and the merging of what the first has summed. Neither changes a bit with the number of threads.
#pragma once
#include "batch_norm/arguments.h"
#include "batch_norm/cpu/moments.h"

namespace fused_ops {

constexpr int64_t kMergedTogether = 256;  // channels whose partials are merged together: they are neighbours in memory

// Calls add(channel - begin, a, b, n) for the partials of channels [begin, end) in a fixed order: parts, or the blocks
// of rows of the channels' columns.
template <class Add>
void for_partials(const View& view, Partial* partials, int64_t begin, int64_t end, const Add& add) {
  const ChannelLayout& l = view.layout;
  if (!l.columns()) {
    const Partial* p = partials + begin * l.parts();
    for (int64_t c = 0; c < end - begin; ++c)
      for (int64_t i = 0; i < l.parts(); ++i, ++p) add(c, p->a, p->b, p->n);
    return;
  }
  const int64_t first = begin * view.repeat, tile = first / l.tile_columns() * l.tile_columns();
  for (int64_t block = 0; block < l.row_blocks(); ++block) {
    const ColumnPartials p(partials, block, l.channels);
    const double *a = p.a + first, *b = p.b + first;
    const int64_t n = p.n[tile];
    if (view.repeat == 1)
      for (int64_t c = 0; c < end - begin; ++c) add(c, a[c], b[c], n);
    else
      for (int64_t c = 0; c < end - begin; ++c)
        for (int64_t i = 0; i < view.repeat; ++i) add(c, *a++, *b++, n);
  }
}

// Mean and M2 of at most kMergedTogether channels. The mean of all parts first, then their M2 around it: this needs no
// division for each part, as merging one after the other does. Inf and NaN are merged so.
inline void merge_moments(const View& view, Partial* partials, int64_t begin, int64_t end, Partial* out) {
  const ChannelLayout& l = view.layout;
  const bool single = (l.columns() ? l.row_blocks() * view.repeat : l.parts()) == 1;
  double mean[kMergedTogether], m2[kMergedTogether], count[kMergedTogether];
  for (int64_t i = 0; i < end - begin; ++i) mean[i] = 0, m2[i] = 0, count[i] = 0;
  for_partials(view, partials, begin, end, [&](int64_t i, double a, double, int64_t n) {
    mean[i] += single ? a : static_cast<double>(n) * a, count[i] += static_cast<double>(n);
  });
  for (int64_t i = 0; !single && i < end - begin; ++i) mean[i] = count[i] != 0 ? mean[i] / count[i] : 0;
  for_partials(view, partials, begin, end, [&](int64_t i, double a, double b, int64_t n) {
    const double delta = a - mean[i];
    m2[i] += b + static_cast<double>(n) * (delta * delta);
  });
  for (int64_t i = 0; i < end - begin; ++i) {
    out[i] = {mean[i], m2[i], static_cast<int64_t>(count[i])};
    if (std::isfinite(mean[i]) && std::isfinite(m2[i])) continue;
    DEFAULT::Moments total;
    const int64_t channel = begin + i;
    for_partials(view, partials, channel, channel + 1,
                 [&](int64_t, double a, double b, int64_t n) { total.merge(a, b, n); });
    out[i] = {total.mean, total.m2, total.n};
  }
}

inline void merge_sums(const View& view, Partial* partials, int64_t begin, int64_t end, Partial* out) {
  double sum[kMergedTogether], dot[kMergedTogether];
  int64_t count[kMergedTogether];
  for (int64_t i = 0; i < end - begin; ++i) sum[i] = 0, dot[i] = 0, count[i] = 0;
  for_partials(view, partials, begin, end,
               [&](int64_t i, double a, double b, int64_t n) { sum[i] += a, dot[i] += b, count[i] += n; });
  for (int64_t i = 0; i < end - begin; ++i) out[i] = {sum[i], dot[i], count[i]};
}

// Whether the outputs go past the cache: large ones, but not in pieces of a few lines, most of them parts of lines.
inline bool streams(const ChannelLayout& l, DType dtype, bool read_twice) {
  const int64_t bytes = element_size(dtype);
  return !l.valid && l.numel() * bytes >= (read_twice ? kStreamBytes : kStreamOnceBytes) &&
         (l.columns() || l.spatial * bytes >= kStreamRunBytes);
}

// Runs reduce -> merge -> finish(channel, merged) -> write: channel by channel, or tile by tile, where that keeps what
// is read twice in the cache; else one after the other over the whole input.
template <class Args, class Merge, class Finish>
void two_passes(const View& view, void (*reduce)(const Args&, int64_t, int64_t),
                void (*write)(const Args&, int64_t, int64_t), const Args& args, const Merge& merge,
                const Finish& finish) {
  const ChannelLayout& l = view.layout;
  const auto finish_channels = [&](int64_t begin, int64_t end) {
    Partial merged[kMergedTogether];
    for (int64_t first = begin; first < end; first += kMergedTogether) {
      const int64_t last = std::min(end, first + kMergedTogether);
      if (reduce) merge(view, args.partials, first, last, merged);
      for (int64_t c = first; c < last; ++c) finish(c, merged[c - first]);
    }
  };
  if (args.by_plane) {
    finish_channels(0, view.channels);
    if (write) for_items(l, l.planes(), [&](int64_t begin, int64_t end) { write(args, begin, end); });
    return;
  }
  // Units that are finished on their own: channels of planes, tiles of columns.
  const int64_t units = l.columns() ? (view.repeat == 1 ? l.tiles() : 1) : (l.parts() == 1 ? l.channels : 1);
  const int64_t items = units == 0 ? 0 : l.items() / units;
  const auto finish_unit = [&](int64_t unit) {
    const int64_t width = units == 1 ? view.channels : l.columns() ? l.tile_columns() : 1;
    finish_channels(unit * width, std::min(view.channels, (unit + 1) * width));
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

// Rows of cross-entropy a register of rows at a time, class after class: where rows are adjacent in memory, as in
// (batch, classes, height, width), and the options' where rows have few classes.
//
// A row's sums come from the number of classes alone. In (batch, classes, height, width) a class is a power of two away
// from the next as a rule, so that all classes of a row fall into the same few sets of the caches: what is read twice
// is kept in a buffer, (classes, kWidth), in tiles of kTileClasses.
//
// The plain loss has loops of its own: they convert as they load, take kUnroll registers together and add few terms in
// float, where the options need lse to the last bit. Of (4, 21, 256, 256) bfloat16 on one AVX-512 core that buys a
// forward of 3.4 ms instead of 41 and a backward of 17 instead of 34; of float32, 15 instead of 45 and 13 instead
// of 31.
#pragma once
#include <algorithm>

#include "cross_entropy/cpu/along_classes.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kTileClasses = 128;  // Classes of a tile, whose 8 KiB at most stay in L1.
constexpr int64_t kAhead = 4;          // Registers of rows between a prefetch and its use.
constexpr int kUnroll = 2;             // Registers of rows, neighbours in memory, that a step of the plain loss takes.

// f(registers, width, row) over `rows` rows: kUnroll registers at a time while there are as many, then one by one; the
// last one holds `width` rows.
template <class F>
void each_step(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kUnroll * kWidth <= rows; r += kUnroll * kWidth) f(std::integral_constant<int, kUnroll>(), kWidth, r);
  for (; r < rows; r += kWidth) f(std::integral_constant<int, 1>(), std::min(kWidth, rows - r), r);
}

// The maxima of a register of rows, and their sums of exp(x - max) but for one class each.
struct RegisterSums {
  static constexpr float kNone = -std::numeric_limits<float>::infinity();
  float_vec max = splat(kNone), excepted{};
  DoublePair others{};

  // Raises the maxima to `next`, which is no less; the sums' factor.
  DoublePair raise(float_vec next) {
    const float_vec shrink = max == kNone ? float_vec{} : exp_vec(max - next);
    const DoublePair factor = widen(shrink);
    others.low *= factor.low, others.high *= factor.high;
    max = next;
    return factor;
  }

  // `except` is the class to leave out, counted from the first of these, or none of them; kFind: finds its logit.
  template <bool kFind = false>
  void add(const float* u, int64_t classes, int_vec except) {
    const float_vec shift = max == kNone ? float_vec{} : max;
    int_vec at{};
    for (int64_t begin = 0; begin < classes; begin += kClassesPerFold) {
      float_vec sum{};
      const int64_t end = std::min(begin + kClassesPerFold, classes);
      for (int64_t c = begin; c < end; ++c, at += 1) {
        const float_vec v = load_vec(u + c * kWidth), e = exp_scaled(v - shift);
        sum += except == at ? float_vec{} : e;
        if constexpr (kFind) excepted = except == at ? v : excepted;
      }
      const DoublePair wide = widen(sum * kExpUnit);
      others.low += wide.low, others.high += wide.high;
    }
  }
};

// A register of rows; with kCount > 1 it is whole.
template <int kCount, class T>
float_vec load_width(const T* p, int64_t width, float fill) {
  return kCount > 1 ? load_vec(p) : load_up_to(p, width, fill);
}

// Targets of n rows as a register; kIgnored behind them.
inline int_vec load_targets(const int64_t* target, int64_t n) {
  if (n == kWidth) {  // not by way of memory, for which the register would wait
    typedef int64_t Wide __attribute__((vector_size(8 * kWidth)));
    Wide wide;
    std::memcpy(&wide, target, sizeof(wide));
    return __builtin_convertvector(wide, int_vec);
  }
  int32_t wanted[kWidth];
  for (int64_t l = 0; l < kWidth; ++l)
    wanted[l] = l < n ? static_cast<int32_t>(target[l]) : static_cast<int32_t>(kIgnored);
  return load_bits<int_vec>(wanted);
}

// Of kCount registers of rows, each of which holds `width`.
template <int kCount, class T>
void step_sums(const T* x, int64_t stride, int64_t classes, int64_t width, const int64_t* target, RegisterSums* sums) {
  alignas(64) float u[kCount][kTileClasses * kWidth];
  for (int64_t c = 0; c < classes; c += kTileClasses) {
    const int64_t n = std::min(kTileClasses, classes - c);
    const T* from = x + c * stride;
    float_vec best[kCount];
    for (int k = 0; k < kCount; ++k) best[k] = sums[k].max;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < kCount; ++k) {
        const T* at = from + i * stride + k * kWidth;
        prefetch(at + kAhead * kWidth);
        const float_vec v = load_width<kCount>(at, width, RegisterSums::kNone);
        store_vec(u[k] + i * kWidth, v);
        best[k] = max_vec(v, best[k]);
      }
    for (int64_t k = 0; k < kCount; ++k) {
      if (c == 0)
        sums[k].max = best[k];
      else
        sums[k].raise(best[k]);
      sums[k].add(u[k], n, load_targets(target + k * kWidth, width) - static_cast<int32_t>(c));
    }
  }
}

// Fills `out` of `rows` rows; what it says of ignored rows is of no use. Not inlined: what the compiler may inline into
// the caller is the loop of few classes.
template <class T>
__attribute__((noinline)) void plain_rows(const T* x, int64_t stride, int64_t classes, int64_t rows,
                                          const int64_t* target, RowSums& out) {
  alignas(64) float max[kRowTile];
  each_step(rows, [&](auto count, int64_t width, int64_t r) {
    RegisterSums sums[count];
    step_sums<count>(x + r, stride, classes, width, target + r, sums);
    for (int64_t k = 0; k < count; ++k, r += kWidth) {
      store_vec(max + r, sums[k].max);
      store_vec(out.others + r, sums[k].others.low), store_vec(out.others + r + kWidth / 2, sums[k].others.high);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    out.max[r] = max[r];
    out.below[r] = static_cast<double>(to_acc(x[std::max<int64_t>(target[r], 0) * stride + r])) - out.max[r];
  }
}

// What the backward needs of a register of rows: p = exp((x - high) - low).
struct RegisterLse {
  float_vec high, low, p_target, factor;
  int_vec wanted;

  // `x` is the first row's first class.
  template <class T>
  RegisterLse(const T* x, int64_t stride, int64_t classes, int64_t rows, const int64_t* target, const double* lse,
              const double* scale)
      : wanted(load_targets(target, rows)) {
    float h[kWidth] = {}, l[kWidth] = {}, at[kWidth] = {}, f[kWidth] = {};
    for (int64_t r = 0; r < rows; ++r) {
      f[r] = static_cast<float>(scale[r]);
      if (target[r] == kIgnored) continue;
      const SplitLse split(x + r, stride, classes, lse[r]);
      h[r] = split.high, l[r] = split.low, at[r] = to_acc(x[target[r] * stride + r]);
    }
    high = load_vec(h), low = load_vec(l), factor = load_vec(f);
    p_target = exp_vec((load_vec(at) - high) - low);
  }
};

// Of kCount registers of rows, each of which holds `width`.
template <int kCount, class T>
void step_gradient(const T* x, int64_t stride, T* grad, int64_t grad_stride, int64_t classes, int64_t width,
                   const RegisterLse* row, double* others) {
  for (int64_t begin = 0; begin < classes; begin += kClassesPerFold) {
    float_vec sum[kCount] = {};
    for (int64_t c = begin; c < std::min(begin + kClassesPerFold, classes); ++c)
      for (int64_t k = 0; k < kCount; ++k) {
        const T* from = x + c * stride + k * kWidth;
        prefetch(from + kAhead * kWidth);
        const float_vec v = load_width<kCount>(from, width, 0.0f);
        const float_vec p = exp_vec((v - row[k].high) - row[k].low), g = p * row[k].factor;
        sum[k] += row[k].wanted == static_cast<int32_t>(c) ? float_vec{} : p;
        // not 0 * p, which is NaN where an ignored row's logits are not finite
        store_up_to(grad + c * grad_stride + k * kWidth, kCount > 1 ? kWidth : width,
                    row[k].wanted == static_cast<int32_t>(kIgnored) ? float_vec{} : g);
      }
    for (int64_t k = 0; k < kCount; ++k) {
      const DoublePair wide = widen(sum[k]);
      alignas(64) double terms[kWidth];
      store_vec(terms, wide.low), store_vec(terms + kWidth / 2, wide.high);
      for (int64_t l = 0; l < kWidth; ++l) others[k * kWidth + l] += terms[l];
    }
  }
}

// In place where grad is x.
template <class T>
__attribute__((noinline)) void plain_gradients(const T* x, int64_t stride, T* grad, int64_t grad_stride,
                                               int64_t classes, int64_t rows, const int64_t* target, const double* lse,
                                               const double* scale) {
  each_step(rows, [&](auto count, int64_t width, int64_t begin) {
    const auto row_of = [&](int64_t k) {
      const int64_t r = begin + k * kWidth;
      return RegisterLse(x + r, stride, classes, width, target + r, lse + r, scale + r);
    };
    const RegisterLse row[kUnroll] = {row_of(0), row_of(count - 1)};
    double others[kUnroll * kWidth] = {};
    step_gradient<count>(x + begin, stride, grad + begin, grad_stride, classes, width, row, others);
    float p_target[kUnroll * kWidth];
    for (int64_t k = 0; k < count; ++k) store_vec(p_target + k * kWidth, row[k].p_target);
    for (int64_t l = 0; l < (count - 1) * kWidth + width; ++l) {
      const int64_t r = begin + l;
      if (target[r] != kIgnored)
        store(grad + target[r] * grad_stride + r,
              static_cast<float>(target_residual(static_cast<double>(p_target[l]), others[l]) * scale[r]));
    }
  });
}

// plain_gradients by non-temporal stores: some rows' gradients are made in a buffer, from which each class' lines are
// copied. Of (4, 21, 256, 256) float32 that takes 0.81 of the time on one core of Zen 4, with AVX2 as with AVX-512, and
// of bfloat16 0.91 and 0.97. Of adjacent classes it took 0.95 to 1.2 of the time, so that those have ordinary stores.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;        // A gradient of at least this size is streamed.
constexpr int64_t kStreamedValues = 1 << 12;                // Values of the buffer, whose 16 KiB stay in L1.
constexpr int64_t kStreamedClasses = kStreamedValues / 32;  // With more there is no line of bfloat16 of each class.
template <class T>
__attribute__((noinline)) void stream_plain_gradients(const T* x, int64_t stride, T* grad, int64_t grad_stride,
                                                      int64_t classes, int64_t rows, const int64_t* target,
                                                      const double* lse, const double* scale) {
  alignas(kLineBytes) T made[kStreamedValues];
  const int64_t step = std::min<int64_t>(64, kStreamedValues / classes / 32 * 32);
  for (int64_t r = 0, n = 0; r < rows; r += n) {
    n = std::min(step, rows - r);
    plain_gradients(x + r, stride, made, step, classes, n, target + r, lse + r, scale + r);
    for (int64_t c = 0; c < classes; ++c) stream_values(made + c * step, grad + c * grad_stride + r, n);
  }
}

// ---- the options

static_assert(kWidth <= kGroup);

inline bool goes_across(const CrossEntropyRows& a) {
  return a.dtype != DType::float64 && (a.layout.adjacent_rows() || has_few_classes(a.layout));
}

// q of a register of rows, class by class.
struct ClassShares {  // of all rows: each class' own, or with a step of 0 one for all
  const float* values;
  int64_t step;
  float_vec at(int64_t i) const { return splat(values[i * step]); }
};
struct TileShares {
  const float* values;
  float_vec at(int64_t i) const { return load_vec(values + i * kWidth); }
};

// n classes of `rows` rows, beneath one another.
template <class T>
void load_across(const T* from, int64_t row_stride, int64_t class_stride, int64_t rows, int64_t n, float* to) {
  if constexpr (!std::is_same_v<T, double>) {
    if (row_stride == 1) {
      for (int64_t i = 0; i < n; ++i) store_vec(to + i * kWidth, load_up_to(from + i * class_stride, rows, 0.0f));
      return;
    }
  }
  if (rows < kWidth) std::fill(to, to + n * kWidth, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      to[i * kWidth + r] = static_cast<float>(to_acc(from[r * row_stride + i * class_stride]));
}

template <class T>
void store_across(const float* from, int64_t row_stride, int64_t class_stride, int64_t rows, int64_t n, T* to) {
  if (row_stride == 1) {
    for (int64_t i = 0; i < n; ++i) store_up_to(to + i * class_stride, rows, load_vec(from + i * kWidth));
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) store(to + r * row_stride + i * class_stride, from[i * kWidth + r]);
}

inline int64_t row_stride(const RowLayout& l) { return l.spatial == 1 ? l.batch_stride : l.spatial_stride; }

class AcrossTile {
 public:
  explicit AcrossTile(const CrossEntropyRows& a) : a_(a), transform_(a), share_of_all_(share_of_all<float>(a)) {}

  int64_t n = 0;  // classes of the tile
  alignas(64) float u[kTileClasses * kWidth];
  alignas(64) int32_t allowed[kTileClasses * kWidth];  // with a mask

  // Rows from `row` on that one step takes.
  int64_t rows_from(int64_t row, int64_t end) const {
    const int64_t left = std::min(kWidth, end - row);
    return a_.layout.spatial == 1 ? left : std::min(left, a_.layout.spatial - row % a_.layout.spatial);
  }

  void load(int64_t row, int64_t rows, int64_t c) {
    n = std::min(kTileClasses, a_.layout.classes - c);
    row_ = row, rows_ = rows, class_ = c;
    read(a_.logits, a_.dtype, a_.layout, u);
    transform_.apply(u, n * kWidth);
    if (!a_.has_mask) return;
    for (int64_t i = 0; i < n * kWidth; ++i) allowed[i] = 0;
    const RowLayout& l = a_.mask.layout;
    const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row) + c * l.class_stride;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) allowed[i * kWidth + r] = m[r * row_stride(l) + i * l.class_stride];
    for (int64_t i = 0; i < n * kWidth; ++i) u[i] = allowed[i] ? u[i] : -std::numeric_limits<float>::infinity();
  }

  // How many classes each of the rows may have, if smoothing is spread over them.
  void count_allowed(int64_t row, int64_t rows) {
    if (!smooths_rows()) return;
    const RowLayout& l = a_.mask.layout;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row + r);
      int64_t count = a_.allowed ? static_cast<int64_t>(a_.allowed[row + r]) : 0;
      for (int64_t c = 0; !a_.allowed && c < l.classes; ++c) count += m[c * l.class_stride] != 0;
      spread_[r] = static_cast<float>(a_.label_smoothing / static_cast<double>(count));
    }
  }

  void load_coefficients() {
    if (!a_.has_dense && !smooths_rows()) return;
    const float* weight = static_cast<const float*>(a_.class_weight);
    const float* constant = static_cast<const float*>(a_.smoothing_weight);
    if (a_.has_dense) read(a_.dense.data, a_.dense.dtype, a_.dense.layout, q_);
    const float soft = static_cast<float>(1.0 - a_.label_smoothing);
    for (int64_t i = 0; i < n; ++i) {
      float* q = q_ + i * kWidth;
      const float factor = weight ? weight[class_ + i] : 1.0f;
      for (int64_t r = 0; a_.has_dense && r < kWidth; ++r) q[r] = (soft != 1 ? q[r] * soft : q[r]) * factor;
      if (a_.label_smoothing == 0) continue;
      for (int64_t r = 0; r < kWidth; ++r) {
        const float mine = constant ? constant[class_ + i] : allowed[i * kWidth + r] ? factor * spread_[r] : 0.0f;
        q[r] = a_.has_dense ? q[r] + mine : mine;
      }
    }
  }

  // f(q of the tile).
  template <class F>
  void with_shares(const F& f) const {
    if (a_.has_dense || smooths_rows()) return f(TileShares{q_});
    if (share_of_all_ != 0) return f(ClassShares{&share_of_all_, 0});
    if (a_.smoothing_weight) return f(ClassShares{static_cast<const float*>(a_.smoothing_weight) + class_, 1});
    f(NoShares{});
  }

  bool has_mask() const { return a_.has_mask; }

  // f(r, u) of each row's class index, where it is in the tile that begins at class c.
  template <class F>
  void each_target(const RowTarget* targets, int64_t c, const F& f) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t t = targets[r].one() ? targets[r].index(0) - c : -1;
      if (t >= 0 && t < n) f(r, u[t * kWidth + r]);
    }
  }

  // grad_u -> grad_x of the tile, into memory.
  void write(float* grad, void* to, const RowLayout& l) const {
    transform_.chain(u, grad, n * kWidth);
    for (int64_t i = 0; a_.has_mask && i < n * kWidth; ++i) grad[i] = allowed[i] ? grad[i] : 0.0f;
    const int64_t at = l.offset(row_) + class_ * l.class_stride;
    with_float_dtype(a_.dtype, [&](auto type) {
      store_across(grad, row_stride(l), l.class_stride, rows_, n, static_cast<typename decltype(type)::type*>(to) + at);
    });
  }

 private:
  bool smooths_rows() const { return a_.row_masks && a_.label_smoothing != 0; }

  void read(const void* data, DType dtype, const RowLayout& l, float* to) const {
    with_dtype(dtype, [&](auto type) {
      const auto* from = static_cast<const typename decltype(type)::type*>(data);
      load_across(from + l.offset(row_) + class_ * l.class_stride, row_stride(l), l.class_stride, rows_, n, to);
    });
  }

  const CrossEntropyRows& a_;
  const Transform<float> transform_;
  const float share_of_all_;
  int64_t row_ = 0, rows_ = 0, class_ = 0;
  float spread_[kWidth] = {};
  alignas(64) float q_[kTileClasses * kWidth];
};

// The class index of each row, or none of the classes.
inline int_vec index_register(const RowTarget* targets, int64_t rows) {
  int64_t index[kWidth];
  for (int64_t r = 0; r < rows; ++r) index[r] = targets[r].one() ? targets[r].index(0) : kIgnored;
  return load_targets(index, rows);
}

// RowState of a register of rows.
template <bool kEntropy>
class AcrossState {
 public:
  // One tile, whose first class is c; `except` are the classes to leave out, counted from the first of all.
  void add(const AcrossTile& tile, int64_t c, int_vec except) {
    float_vec best = sums_.max;
    for (int64_t i = 0; i < tile.n; ++i) {
      const float_vec v = load_vec(tile.u + i * kWidth);
      if constexpr (kEntropy) {
        const int_vec nan = v != v;
        prediction_ = ((v > best) | nan) & ~found_nan_ ? int_vec{} + static_cast<int32_t>(c + i) : prediction_;
        found_nan_ |= nan;
      }
      best = max_vec(v, best);
    }
    if (c == 0)
      sums_.max = best, base_ = best - best == 0.0f ? best : float_vec{};
    else
      raise(best);
    tile.with_shares([&](auto q) { add(tile, q, except - static_cast<int32_t>(c)); });
  }

  void store(RowState<float>* to, int64_t rows) const {
    float max[kWidth], base[kWidth];
    double others[kWidth], weighted[kWidth], mass[kWidth], dot[kWidth];
    store_vec(max, sums_.max), store_vec(base, base_);
    const auto put = [](double* p, const DoublePair& v) { store_vec(p, v.low), store_vec(p + kWidth / 2, v.high); };
    put(others, sums_.others), put(weighted, weighted_), put(mass, mass_), put(dot, dot_);
    for (int64_t r = 0; r < rows; ++r) {
      to[r].sum = {max[r], others[r]}, to[r].base = base[r], to[r].weighted = weighted[r];
      to[r].q = {mass[r], dot[r]};
      to[r].prediction = prediction_[r], to[r].found_nan = found_nan_[r] != 0;
    }
  }

 private:
  void raise(float_vec next) {
    const DoublePair before = widen(sums_.max), after = widen(next), others = sums_.others;
    const DoublePair factor = sums_.raise(next);
    if constexpr (kEntropy) {
      const auto moved = [](double_vec f, double_vec w, double_vec fall, double_vec sum) {
        return f == 0.0 ? double_vec{} : f * (w + fall * sum);
      };
      weighted_.low = moved(factor.low, weighted_.low, before.low - after.low, others.low);
      weighted_.high = moved(factor.high, weighted_.high, before.high - after.high, others.high);
    }
  }

  template <class Q>
  void add(const AcrossTile& tile, Q q, int_vec except) {
    const float_vec shift = sums_.max == RegisterSums::kNone ? float_vec{} : sums_.max;
    for (int64_t begin = 0; begin < tile.n; begin += kClassesPerFold) {
      float_vec weighted{}, dot{};
      for (int64_t i = begin; i < std::min(begin + kClassesPerFold, tile.n); ++i) {
        const float_vec u = load_vec(tile.u + i * kWidth), v = u - shift;
        float_vec e = exp_vec(v);
        e = except == static_cast<int32_t>(i) ? float_vec{} : e;
        add_to(sums_.others, e);  // in float, each term beside the maximum's 1 would cost lse half a digit
        if constexpr (kEntropy) weighted += e == 0.0f ? float_vec{} : e * v;
        if constexpr (!std::is_same_v<Q, NoShares>) {
          const float_vec share = q.at(i), product = share * (base_ - u);
          add_to(mass_, share);
          if (tile.has_mask())
            dot += ((load_bits<int_vec>(tile.allowed + i * kWidth) != 0) | (share != 0.0f)) ? product : float_vec{};
          else
            dot += product;
        }
      }
      if constexpr (kEntropy) add_to(weighted_, weighted);
      if constexpr (!std::is_same_v<Q, NoShares>) add_to(dot_, dot);
    }
  }

  RegisterSums sums_;
  float_vec base_{};
  DoublePair weighted_{}, mass_{}, dot_{};
  int_vec prediction_{}, found_nan_{};
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

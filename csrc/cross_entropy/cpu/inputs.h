// What cross-entropy's kernels read: targets, and tiles of logits as the options see them (scaled, capped, masked)
// beside their target coefficients.
#pragma once
#include <algorithm>

#include "cross_entropy/kernels.h"
#include "simd/special_functions.h"
#include "simd/vec.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

constexpr int64_t kRowTile = 256;  // Rows of the plain loss whose targets are read and logarithms taken together.
constexpr int64_t kIgnored = -1;   // Stands for the target of a row that does not count.
// Rows of adjacent float64 that are transposed together, and how many of their classes at a time.
constexpr int64_t kGroup = 16;
constexpr int64_t kGroupClasses = 256;
constexpr int64_t kTile = kGroup * kGroupClasses;
static_assert(kTile >= kChunk);

constexpr int64_t kFewClasses = 64;  // Rows of at most so many classes are taken several together.
inline bool has_few_classes(const RowLayout& l) {
  return l.adjacent_classes() && l.classes > 0 && l.classes <= kFewClasses;
}

// Class indices with at most a factor for each: the loss has no coefficients beside the target's own.
inline bool is_plain(const CrossEntropyRows& a) {
  return !a.shard && !a.has_dense && !a.sparse && !a.has_mask && a.label_smoothing == 0 && a.logit_scale == 1 &&
         a.softcap == 0 && !a.statistics;
}

// Whether the plain loss has a loop for these strides, beside those of another tensor of the rows.
inline bool has_plain_loop(const CrossEntropyRows& a, const RowLayout& other) {
  const bool classes = a.layout.adjacent_classes() && other.adjacent_classes();
  const bool rows = a.layout.adjacent_rows() && other.adjacent_rows();
  return is_plain(a) && a.dtype != DType::float64 && (classes || rows);
}

// Rows from `row` on that one step of it takes: not beyond `end`, nor beyond a batch entry where registers hold rows.
inline int64_t rows_of_step(const RowLayout& l, int64_t row, int64_t end) {
  const int64_t n = std::min(kRowTile, end - row);
  return l.adjacent_classes() ? n : std::min(n, l.spatial - row % l.spatial);
}

// ---- targets

inline int64_t target_at(const Targets& t, int64_t row) {
  switch (t.type) {
    case TargetType::int64: return static_cast<const int64_t*>(t.data)[row];
    case TargetType::int32: return static_cast<const int32_t*>(t.data)[row];
    case TargetType::int16: return static_cast<const int16_t*>(t.data)[row];
    case TargetType::int8: return static_cast<const int8_t*>(t.data)[row];
    case TargetType::uint8: return static_cast<const uint8_t*>(t.data)[row];
  }
  return -1;
}

// The first row whose target is neither a class nor ignore_index, or -1.
inline int64_t first_bad_target(const Targets& t, int64_t begin, int64_t end, int64_t classes) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = target_at(t, row);
    if (target != t.ignore_index && (target < 0 || target >= classes)) return row;
  }
  return -1;
}

// The targets of rows [begin, begin + n).
inline void read_targets(const Targets& t, int64_t begin, int64_t n, int64_t* to) {
  const auto read = [&](const auto* from) {
    for (int64_t r = 0; r < n; ++r) to[r] = from[begin + r];
  };
  switch (t.type) {
    case TargetType::int64: return read(static_cast<const int64_t*>(t.data));
    case TargetType::int32: return read(static_cast<const int32_t*>(t.data));
    case TargetType::int16: return read(static_cast<const int16_t*>(t.data));
    case TargetType::int8: return read(static_cast<const int8_t*>(t.data));
    case TargetType::uint8: return read(static_cast<const uint8_t*>(t.data));
  }
}

// One row's target: its indices, or none where it is a distribution over all classes. Of a shard, an index that is
// elsewhere is no one to take off a gradient, but its row counts.
class RowTarget {
 public:
  RowTarget() = default;
  RowTarget(const CrossEntropyRows& a, int64_t row) : a_(&a), all_ignored_(!a.has_dense) {
    if (a.has_dense) return;
    step_ = a.index_spatial;
    first_ = row / step_ * step_ * a.per_row + row % step_;
    for (int64_t k = 0; k < a.per_row; ++k) {
      const int64_t t = any_index(k);
      if (k == 0) index_ = t - a.first_class;
      if (t == a.indices.ignore_index) continue;
      all_ignored_ = false;
      bad_ |= is_outside(t);
    }
    single_ = !a.sparse && !all_ignored_;
    one_ = single_ && !(a.shard && bad_);
    if (a.shard) elsewhere_ = bad_, bad_ = false;
  }

  bool has_indices() const { return !a_->has_dense; }
  int64_t per_row() const { return has_indices() ? a_->per_row : 0; }
  bool single() const { return single_; }  // a class index that counts
  bool one() const { return one_; }        // and is here
  bool all_ignored() const { return all_ignored_; }
  bool bad() const { return bad_; }
  int64_t index(int64_t k) const { return k == 0 ? index_ : any_index(k) - a_->first_class; }  // in the layout
  bool ignored(int64_t k) const {                                                              // or elsewhere
    const int64_t t = any_index(k);
    return t == a_->indices.ignore_index || (elsewhere_ && is_outside(t));
  }
  double probability(int64_t k) const { return a_->sparse ? a_->sparse[first_ + k * step_] : 1.0; }
  // The first that is no class of all shards', else NaN.
  double no_class(int64_t all_classes) const {
    for (int64_t k = 0; k < per_row(); ++k) {
      const int64_t t = any_index(k);
      if (t != a_->indices.ignore_index && (t < 0 || t >= all_classes)) return static_cast<double>(t);
    }
    return std::numeric_limits<double>::quiet_NaN();
  }

 private:
  int64_t any_index(int64_t k) const { return target_at(a_->indices, first_ + k * step_); }
  bool is_outside(int64_t t) const { return t < a_->first_class || t >= a_->first_class + a_->layout.classes; }

  const CrossEntropyRows* a_ = nullptr;
  int64_t first_ = 0, step_ = 1, index_ = 0;
  bool all_ignored_ = false, bad_ = false, elsewhere_ = false, single_ = false, one_ = false;
};

// The targets of up to kRowTile rows: a class, or kIgnored.
struct TargetTile {
  int64_t target[kRowTile];
  int64_t count = 0;     // rows of them that are not ignored
  int64_t bad_row = -1;  // the first whose target is neither a class nor ignore_index

  TargetTile(const Targets& t, int64_t begin, int64_t n, int64_t classes) {
    read_targets(t, begin, n, target);
    bool bad = false;
    for (int64_t r = 0; r < n; ++r) {
      const bool ignored = target[r] == t.ignore_index;
      target[r] = ignored ? kIgnored : target[r];
      bad |= !ignored && (target[r] < 0 || target[r] >= classes);
      count += !ignored;
    }
    if (bad) bad_row = first_bad_target(t, begin, begin + n, classes);
  }
};

// ---- logits and what goes with them

inline double weight_of(const CrossEntropyRows& a, int64_t c) {
  if (!a.class_weight) return 1;
  return a.dtype == DType::float64 ? static_cast<const double*>(a.class_weight)[c]
                                   : static_cast<double>(static_cast<const float*>(a.class_weight)[c]);
}

// Whether T is read into A in whole registers.
template <class T, class A>
constexpr bool kInRegisters = std::is_same_v<A, float> && !std::is_same_v<T, double>;

// n values next to one another, converted.
template <class T, class A>
void convert(const T* from, int64_t n, A* to) {
  int64_t i = 0;
  if constexpr (kInRegisters<T, A>)
    for (; i + kWidth <= n; i += kWidth) store_vec(to + i, load_vec(from + i));
  for (; i < n; ++i) to[i] = static_cast<A>(to_acc(from[i]));
}
template <class T, class A>
void convert_back(const A* from, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (kInRegisters<T, A>)
    for (; i + kWidth <= n; i += kWidth) store_vec(to + i, load_vec(from + i));
  for (; i < n; ++i) store(to + i, static_cast<acc_t<T>>(from[i]));
}

// n classes of `rows` rows from (row, c) on, (rows, n) in the buffer.
template <class A>
void load_tile(const void* data, DType dtype, const RowLayout& l, int64_t row, int64_t rows, int64_t c, int64_t n,
               A* to) {
  const int64_t at = l.offset(row) + c * l.class_stride;
  with_dtype(dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(data) + at;
    if (rows == 1 && l.class_stride == 1) return convert(from, n, to);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < rows; ++r)
        to[r * n + i] = static_cast<A>(to_acc(from[r * l.spatial_stride + i * l.class_stride]));
  });
}

template <class A>
void store_tile(void* data, DType dtype, const RowLayout& l, int64_t row, int64_t rows, int64_t c, int64_t n,
                const A* from) {
  const int64_t at = l.offset(row) + c * l.class_stride;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(data) + at;
    if (rows == 1 && l.class_stride == 1) return convert_back(from, n, to);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < rows; ++r)
        store(to + r * l.spatial_stride + i * l.class_stride, static_cast<acc_t<T>>(from[r * n + i]));
  });
}

// Logits -> u, and grad_u -> grad_x, of a run of values.
template <class A>
struct Transform {
  const A scale, cap;

  explicit Transform(const CrossEntropyRows& a)
      : scale(static_cast<A>(a.logit_scale)), cap(static_cast<A>(a.softcap)) {}

  bool none() const { return scale == 1 && cap == 0; }
  void apply(A* x, int64_t n) const {
    if (scale != 1)
      for (int64_t i = 0; i < n; ++i) x[i] *= scale;
    if (cap != 0)
      for (int64_t i = 0; i < n; ++i) x[i] = cap * tanh_(x[i] / cap);
  }
  A slope(A u) const { return cap != 0 ? scale * (1 - u / cap * (u / cap)) : scale; }
  void chain(const A* u, A* grad, int64_t n) const {
    if (cap != 0)
      for (int64_t i = 0; i < n; ++i) {
        const A t = u[i] / cap;
        grad[i] *= scale * (1 - t * t);
      }
    else if (scale != 1)
      for (int64_t i = 0; i < n; ++i) grad[i] *= scale;
  }
};

// Single classes of rows.
template <class A>
struct RowValues {
  const CrossEntropyRows& a;
  const Transform<A> transform{a};

  A at(int64_t row, int64_t c) const {  // u
    A value;
    load_tile(a.logits, a.dtype, a.layout, row, 1, c, 1, &value);
    transform.apply(&value, 1);
    return is_allowed(row, c) ? value : -std::numeric_limits<A>::infinity();
  }
  A slope(int64_t row, int64_t c, A u) const {  // du/dx
    return is_allowed(row, c) ? transform.slope(u) : A(0);
  }
  bool is_allowed(int64_t row, int64_t c) const {
    const RowLayout& l = a.mask.layout;
    return !a.has_mask || static_cast<const uint8_t*>(a.mask.data)[l.offset(row) + c * l.class_stride];
  }
};

// q of a run of classes but for the indices' own: zeros, one value for all (floats only), or a value for each.
template <class A>
struct Shares {
  const A* values = nullptr;
  A all = 0;
  bool any() const { return values || all != 0; }
  A at(int64_t i) const { return values ? values[i] : all; }
};

// The same in registers: f(at) where at(i, n) are the shares of n <= kWidth classes from i on.
struct NoShares {};
struct OneShare {
  float value;
  float_vec at(int64_t, int64_t) const { return splat(value); }
};
struct EachShare {
  const float* values;
  float_vec at(int64_t i, int64_t n) const { return load_up_to(values + i, n, 0.0f); }
};
template <class F>
auto with_shares(const Shares<float>& q, const F& f) {
  if (q.values) return f(EachShare{q.values});
  if (q.all != 0) return f(OneShare{q.all});
  return f(NoShares{});
}

// The smoothing's share of every class where it is the same for all.
template <class A>
A share_of_all(const CrossEntropyRows& a) {
  return std::is_same_v<A, float> && a.smoothing_weight && !a.class_weight && !a.has_mask
             ? *static_cast<const A*>(a.smoothing_weight)
             : A(0);
}

// The logits of a tile as u, their target coefficients q, and which classes are allowed.
template <class A>
class Tile {
 public:
  explicit Tile(const CrossEntropyRows& a)
      : transform(a), a_(a), soft_(static_cast<A>(1.0 - a.label_smoothing)), share_of_all_(share_of_all<A>(a)) {}

  const Transform<A> transform;
  int64_t n = 0;  // classes of the tile

  // Rows from `row` on that one step takes.
  int64_t rows_from(int64_t row, int64_t end) const {
    if (!grouped()) return 1;
    return std::min({kGroup, end - row, a_.layout.spatial - row % a_.layout.spatial});
  }

  void load(int64_t row, int64_t rows, int64_t c) {
    n = std::min(grouped() ? kGroupClasses : kChunk, a_.layout.classes - c);
    row_ = row, rows_ = rows, class_ = c;
    if (const A* direct = in_memory(a_.logits, a_.dtype, a_.layout); direct && transform.none() && !a_.has_mask) {
      u_ = direct;
      return;
    }
    u_ = buffer_;
    load_tile(a_.logits, a_.dtype, a_.layout, row, rows, c, n, buffer_);
    transform.apply(buffer_, rows * n);
    if (a_.has_mask) apply_mask();
  }

  void load_coefficients() {
    if (!a_.has_dense && !smooths_rows()) return;
    const bool plain = !a_.class_weight && a_.label_smoothing == 0;
    const A* direct = plain ? in_memory(a_.dense.data, a_.dense.dtype, a_.dense.layout) : nullptr;
    q_ = direct ? direct : share_;
    if (direct) return;
    if (a_.has_dense) load_tile(a_.dense.data, a_.dense.dtype, a_.dense.layout, row_, rows_, class_, n, share_);
    for (int64_t r = 0; r < rows_; ++r) coefficients_of(r, share_ + r * n);
  }

  const A* u(int64_t r) const { return u_ + r * n; }
  // Of the tile's row r.
  Shares<A> coefficients(int64_t r) const {
    if (a_.has_dense || smooths_rows()) return {q_ + r * n, 0};
    if (share_of_all_ != 0) return {nullptr, share_of_all_};
    return {a_.smoothing_weight ? static_cast<const A*>(a_.smoothing_weight) + class_ : nullptr, 0};
  }
  // Null without a mask.
  const uint8_t* allowed(int64_t r) const { return a_.has_mask ? mask_ + r * n : nullptr; }

  // How many classes each of the rows may have: what smoothing is spread over.
  void count_allowed(int64_t row, int64_t rows) {
    if (!smooths_rows()) return;
    for (int64_t r = 0; r < rows; ++r) {
      const RowLayout& l = a_.mask.layout;
      const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row + r);
      allowed_[r] = a_.allowed ? static_cast<int64_t>(a_.allowed[row + r]) : 0;
      if (a_.allowed) continue;
      for (int64_t c = 0; c < l.classes; ++c) allowed_[r] += m[c * l.class_stride] != 0;
    }
  }

  bool chains() const { return !transform.none() || a_.has_mask; }
  // grad_u -> grad_x of the tile's row r, in place.
  void chain(int64_t r, A* grad) const {
    transform.chain(u(r), grad, n);
    if (const uint8_t* m = allowed(r))
      for (int64_t i = 0; i < n; ++i) grad[i] = m[i] ? grad[i] : A(0);
  }

 private:
  bool grouped() const { return a_.layout.adjacent_rows(); }
  bool smooths_rows() const { return a_.row_masks && a_.label_smoothing != 0; }

  // The tile's values where they lie, if they lie there as they are wanted.
  const A* in_memory(const void* data, DType dtype, const RowLayout& l) const {
    const bool same = dtype == (std::is_same_v<A, double> ? DType::float64 : DType::float32);
    if (!same || rows_ != 1 || l.class_stride != 1) return nullptr;
    return static_cast<const A*>(data) + l.offset(row_) + class_;
  }

  void coefficients_of(int64_t r, A* q) const {
    const A* weight = static_cast<const A*>(a_.class_weight);
    const A* constant = static_cast<const A*>(a_.smoothing_weight);
    if (a_.has_dense && a_.label_smoothing != 0)
      for (int64_t i = 0; i < n; ++i) q[i] *= soft_;
    if (weight && a_.has_dense)
      for (int64_t i = 0; i < n; ++i) q[i] *= weight[class_ + i];
    if (a_.label_smoothing == 0) return;
    if (constant) {
      for (int64_t i = 0; i < n; ++i) q[i] += constant[class_ + i];
      return;
    }
    const A share = static_cast<A>(a_.label_smoothing / static_cast<double>(allowed_[r]));
    for (int64_t i = 0; i < n; ++i) {
      const A mine = allowed(r)[i] ? (weight ? weight[class_ + i] * share : share) : A(0);
      q[i] = a_.has_dense ? q[i] + mine : mine;
    }
  }

  void apply_mask() {
    const RowLayout& l = a_.mask.layout;
    const uint8_t* from = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row_) + class_ * l.class_stride;
    for (int64_t r = 0; r < rows_; ++r) {
      const uint8_t* m = from + r * l.spatial_stride;
      uint8_t* to = mask_ + r * n;
      A* u = buffer_ + r * n;
      if (l.class_stride == 1)
        std::copy_n(m, n, to);
      else
        for (int64_t i = 0; i < n; ++i) to[i] = m[i * l.class_stride];
      for (int64_t i = 0; i < n; ++i) u[i] = to[i] ? u[i] : -std::numeric_limits<A>::infinity();
    }
  }

  const CrossEntropyRows& a_;
  const A soft_, share_of_all_;
  int64_t row_ = 0, rows_ = 0, class_ = 0;
  int64_t allowed_[kGroup] = {};
  const A *u_ = nullptr, *q_ = nullptr;
  alignas(64) A buffer_[kTile];
  alignas(64) A share_[kTile];
  uint8_t mask_[kTile];
};

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// What both directions of cross-entropy's options share: a row's target, its logits as u, its coefficients q.
#pragma once
#include "cross_entropy_options.h"
#include "cross_entropy_rows.cuh"

namespace fused_ops {
namespace cuda {

constexpr int kShort = 4;  // threads of a row of up to 8 vectors

// Runs the code with kGroup, the threads that take a row of so many 16-byte vectors.
#define FUSED_OPS_WITH_OPTION_GROUP(vectors, kGroup, ...) \
  if ((vectors) <= 8) {                                   \
    constexpr int kGroup = kShort;                        \
    __VA_ARGS__;                                          \
  } else if ((vectors) <= kWarpVectors) {                 \
    constexpr int kGroup = 32;                            \
    __VA_ARGS__;                                          \
  } else {                                                \
    constexpr int kGroup = kBlock;                        \
    __VA_ARGS__;                                          \
  }

// What the classes of a call need. All but `general` are for float accumulators, without mask and statistics, and have
// kernels of their own; one kernel for every option does the rest.
enum class Kind {
  plain,   // neither: class weights of the indices alone, z_loss
  bent,    // a scale or a softcap
  smooth,  // the same q for each class
  dense,   // q of a factor per class, of the logits' dtype: a probability, or a class weight and smoothing
  wide,    // the same in float beside 16-bit logits
  general
};
inline Kind kind_of(const CrossEntropyRows& a) {
  const bool moved = a.logit_scale != 1.0 || a.softcap != 0.0, smooth = a.label_smoothing != 0.0;
  if (a.dtype == DType::float64 || a.has_mask || a.statistics) return Kind::general;
  if (!a.has_dense && !smooth) return moved ? Kind::bent : Kind::plain;
  if (moved || (a.class_weight && a.has_dense)) return Kind::general;
  if (!a.has_dense && !a.class_weight) return Kind::smooth;
  if (a.has_dense && !a.dense.layout.adjacent_classes() && a.layout.adjacent_classes()) return Kind::general;
  const DType factors = a.has_dense ? a.dense.dtype : DType::float32;
  return factors == a.dtype ? Kind::dense : factors == DType::float32 ? Kind::wide : Kind::general;
}
template <Kind kKind>
constexpr bool kFactors = kKind == Kind::dense || kKind == Kind::wide;
template <class T, Kind kKind>
using factor_t = std::conditional_t<kKind == Kind::wide, float, T>;

// Runs the code with kKind, which is not general, for elements of T.
#define FUSED_OPS_WITH_KIND(kind, kKind, ...) \
  switch (kind) {                             \
    case Kind::plain: {                       \
      constexpr Kind kKind = Kind::plain;     \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Kind::bent: {                        \
      constexpr Kind kKind = Kind::bent;      \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Kind::smooth: {                      \
      constexpr Kind kKind = Kind::smooth;    \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Kind::dense: {                       \
      constexpr Kind kKind = Kind::dense;     \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Kind::wide: {                        \
      if constexpr (sizeof(T) == 2) {         \
        constexpr Kind kKind = Kind::wide;    \
        __VA_ARGS__;                          \
      }                                       \
      break;                                  \
    }                                         \
    case Kind::general: break;                \
  }

// Classes of a long row that one block takes, by the row's length alone.
constexpr int64_t kSegmentClasses = 32768;
inline int64_t option_segments(const RowLayout& l) {
  return l.adjacent_classes() && l.classes > kSegmentClasses ? ceil_div(l.classes, kSegmentClasses) : 1;
}

inline int64_t blocks_for(int64_t items) { return items < kMaxBlocks ? items : kMaxBlocks; }
// Shares of the smoothing, one for all rows or one a row, that scratch begins with.
inline int64_t shares_of(const CrossEntropyRows& a) {
  if (!a.has_mask || a.label_smoothing == 0) return 0;
  return a.row_masks ? a.layout.rows() : 1;
}

// A row's target: indices that count or not, or a distribution over all classes.
struct OptionTarget {
  int64_t first, step;  // of its indices
  int64_t target;       // of the one index
  bool one, ignored, bad;
};
__device__ inline int64_t index_of(const CrossEntropyRows& a, const OptionTarget& t, int64_t k) {
  return target_at(a.indices, t.first + k * t.step);
}
__device__ inline OptionTarget option_target(const CrossEntropyRows& a, int64_t row) {
  OptionTarget t{0, 1, -1, false, !a.has_dense, false};
  if (a.has_dense) return t;
  if (!a.sparse) {  // one index
    const RowTarget one = row_target(a.indices, row, a.layout.classes);
    return {row, 1, one.counts ? one.target : -1, one.counts, !one.counts && !one.bad, one.bad};
  }
  t.step = a.index_spatial;
  t.first = row / t.step * t.step * a.per_row + row % t.step;
  for (int64_t k = 0; k < a.per_row; ++k) {
    const int64_t target = index_of(a, t, k);
    if (target == a.indices.ignore_index) continue;
    t.ignored = false;
    t.bad |= target < 0 || target >= a.layout.classes;
  }
  t.target = -1;
  return t;
}

template <class T>
__device__ inline double weight_of(const CrossEntropyRows& a, int64_t c) {
  return a.class_weight ? static_cast<double>(static_cast<const acc_t<T>*>(a.class_weight)[c]) : 1.0;
}
__device__ inline bool is_allowed(const CrossEntropyRows& a, int64_t row, int64_t c) {
  if (!a.has_mask) return true;
  return static_cast<const uint8_t*>(a.mask.data)[row_offset(a.mask.layout, row) + c * a.mask.layout.class_stride] != 0;
}

// A logit's place on the way to u: scaled, and without the factor softcap where there is one. Kept, since the slope
// needs it as it is. In float the scale and the division are one factor.
struct Bend {
  float scale, factor, cap;
  bool capped;
  __device__ explicit Bend(const CrossEntropyRows& a)
      : scale(static_cast<float>(a.logit_scale)),
        factor(static_cast<float>(a.softcap == 0.0 ? a.logit_scale : a.logit_scale / a.softcap)),
        cap(a.softcap == 0.0 ? 1.0f : static_cast<float>(a.softcap)),
        capped(a.softcap != 0.0) {}
  __device__ float bent(float x) const { return capped ? tanhf(x * factor) : x * factor; }
  __device__ float u_of(float t) const { return t * cap; }
  __device__ float slope(float t) const { return capped ? scale * (1.0f - t * t) : scale; }  // du/dx
};
__device__ inline float bent(const CrossEntropyRows& a, float x) { return Bend(a).bent(x); }
__device__ inline double bent(const CrossEntropyRows& a, double x) {
  x *= a.logit_scale;
  return a.softcap == 0.0 ? x : tanh(x / a.softcap);
}
template <class A>
__device__ inline A u_of(const CrossEntropyRows& a, A t) {
  return a.softcap == 0.0 ? t : static_cast<A>(a.softcap) * t;
}
template <class A>
__device__ inline A slope_of(const CrossEntropyRows& a, A t) {
  const A scale = static_cast<A>(a.logit_scale);
  return a.softcap == 0.0 ? scale : scale * (A(1) - t * t);
}
template <class T>
__device__ inline acc_t<T> bent_at(const CrossEntropyRows& a, int64_t row, int64_t c) {
  if (!is_allowed(a, row, c)) return -kInfinity<acc_t<T>>;
  return bent(a, to_acc(static_cast<const T*>(a.logits)[row_offset(a.layout, row) + c * a.layout.class_stride]));
}

// The classes that one thread takes in a step: kU vectors of adjacent ones, each kGroup vectors behind the last.
template <class T, int kGroup>
struct AdjacentWalk {
  static constexpr bool kVectors = true;
  static constexpr int kV = kVector<T>, kU = kGroup < 32 || sizeof(T) == 8 ? 1 : 2, kCount = kU * kV;
  static constexpr int64_t kStep = int64_t{kGroup} * kCount;
  int64_t first, end;  // classes from `end` on are not there
  __device__ int64_t vector(int u) const { return first + int64_t{u} * kGroup * kV; }
  __device__ int64_t at(int i) const { return vector(i / kV) + i % kV; }
};
// Every kParts-th class.
template <int kParts>
struct StridedWalk {
  static constexpr bool kVectors = false;
  static constexpr int kCount = 8;
  static constexpr int64_t kStep = int64_t{kParts} * kCount;
  int64_t first, end;
  __device__ int64_t at(int i) const { return first + int64_t{i} * kParts; }
};

// The walk's values of a row that begins at p, `filler` where there are none.
template <class S, class Walk>
__device__ inline void load_step(const S* p, int64_t stride, const Walk& w, acc_t<S> filler, acc_t<S>* out) {
  if constexpr (Walk::kVectors) {
    if (stride == 1) {
      const unsigned offset = misalignment(p);
      constexpr int kParts = Walk::kV / kVector<S>;
#pragma unroll
      for (int u = 0; u < Walk::kU * kParts; ++u) {
        const int64_t first = w.vector(u / kParts) + u % kParts * kVector<S>;
        load_vector(p + first, w.end - first, offset, filler, out + u * kVector<S>);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < Walk::kCount; ++i) {
    const int64_t j = w.at(i);
    out[i] = j < w.end ? to_acc(p[j * stride]) : filler;
  }
}

// The logits of a step, bent, -inf where a class is masked or not there; returns a bit for each class that is allowed.
template <class T, class Walk>
__device__ inline unsigned load_logits(const CrossEntropyRows& a, int64_t row, const Walk& w, acc_t<T>* t) {
  using A = acc_t<T>;
  constexpr int kCount = Walk::kCount;
  load_step(static_cast<const T*>(a.logits) + row_offset(a.layout, row), a.layout.class_stride, w, -kInfinity<A>, t);
  const bool moved = a.logit_scale != 1.0 || a.softcap != 0.0;
  if (moved) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = bent(a, t[i]);
  }
  unsigned allowed = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) allowed |= w.at(i) < w.end ? 1u << i : 0u;
  if (a.has_mask) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask.data) + row_offset(a.mask.layout, row);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (w.at(i) < w.end && mask[w.at(i) * a.mask.layout.class_stride] == 0) allowed &= ~(1u << i);
  }
  if (moved || a.has_mask) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = allowed >> i & 1u ? t[i] : -kInfinity<A>;
  }
  return allowed;
}

// What label smoothing gives each allowed class of a row, before its weight.
template <class A>
__device__ inline A smoothing_share(const CrossEntropyRows& a, const double* shares, int64_t row) {
  if (a.label_smoothing == 0.0) return A(0);
  if (!a.has_mask) return static_cast<A>(a.label_smoothing / static_cast<double>(a.layout.classes));
  return static_cast<A>(shares[a.row_masks ? row : 0]);
}
__device__ inline bool has_coefficients(const CrossEntropyRows& a) { return a.has_dense || a.label_smoothing != 0.0; }

// q of a step, without what the row's indices add.
template <class T, class Walk>
__device__ inline void load_coefficients(const CrossEntropyRows& a, int64_t row, const Walk& w, unsigned allowed,
                                         acc_t<T> share, acc_t<T>* q) {
  using A = acc_t<T>;
  constexpr int kCount = Walk::kCount;
  A weight[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) weight[i] = A(1), q[i] = A(0);
  if (a.class_weight) load_step(static_cast<const A*>(a.class_weight), 1, w, A(0), weight);
  if (a.has_dense) {
    const int64_t at = row_offset(a.dense.layout, row), stride = a.dense.layout.class_stride;
    if (a.dense.dtype == a.dtype)
      load_step(static_cast<const T*>(a.dense.data) + at, stride, w, A(0), q);
    else
      load_step(static_cast<const A*>(a.dense.data) + at, stride, w, A(0), q);
    const A soft = static_cast<A>(1.0 - a.label_smoothing);
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] *= soft * weight[i];
  }
  if (a.label_smoothing == 0.0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) q[i] += allowed >> i & 1u ? weight[i] * share : A(0);
}

// q of a row's class in a kind with factors: soft * factor + share.
template <class P>
struct Factors {
  const P* data;
  int64_t stride;
  double soft, share;
};
template <class P>
__device__ inline Factors<P> factors_of(const CrossEntropyRows& a, int64_t row) {
  const double share = a.label_smoothing == 0.0 ? 0.0 : a.label_smoothing / static_cast<double>(a.layout.classes);
  if (!a.has_dense) return {static_cast<const P*>(a.class_weight), 1, share, 0.0};
  const RowLayout& l = a.dense.layout;
  return {static_cast<const P*>(a.dense.data) + row_offset(l, row), l.class_stride, 1.0 - a.label_smoothing, share};
}

// A group a row: the share of label smoothing by the row's mask, or by the one mask.
template <int kGroup>
__global__ void __launch_bounds__(kBlock) smoothing_shares(CrossEntropyRows a, double* shares, int64_t masks) {
  constexpr int kRows = kBlock / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  const RowLayout& l = a.mask.layout;
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < masks; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + group;
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask.data);
    if (row < masks) mask += row_offset(l, row);
    int64_t count = 0;
    for (int64_t c = lane; row < masks && c < l.classes; c += kGroup) count += mask[c * l.class_stride] != 0;
    count = sum_group<kGroup>(count);
    if (lane == 0 && row < masks) shares[row] = a.label_smoothing / static_cast<double>(count > 0 ? count : 1);
  }
}

// The vectors that one thread takes in a step of a kind that is not general: all of them are loaded before the first is
// used. In a full step all are there; in the last one some may not be, or one in part.
template <class T, int kGroup, Kind kKind>
struct FastStep {
  static constexpr int kV = kVector<T>, kU = kFactors<kKind> && sizeof(T) == 2 ? 2 : 4, kCount = kU * kV;
  static constexpr int kApart = kGroup * kV, kClasses = kU * kApart;  // between a thread's vectors; of a step
  // Of class `at`, counted from the thread's first one: where the thread has it, or -1.
  static __device__ int place(int at) {
    const unsigned i = static_cast<unsigned>(at), u = i / kApart, k = i % kApart;
    return i < kClasses && k < kV ? static_cast<int>(u * kV + k) : -1;
  }
};

// The same where classes are strided: kCount values, one by one.
struct LaneStep {
  static constexpr int kV = 8, kU = 1, kCount = kU * kV, kApart = kV;
};

// Blocks of a multiprocessor at once: 64 or 80 registers a thread.
template <class T, Kind kKind>
constexpr int kFastBlocks = kFactors<kKind> && (sizeof(T) == 4 || kKind == Kind::wide) ? 3 : 4;

// Elements [0, have) of a vector at p, `filler` behind them.
template <class T>
__device__ inline Words partial_words(const T* p, int have, acc_t<T> filler) {
  acc_t<T> v[kVector<T>];
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) v[k] = k < have ? to_acc(p[k]) : filler;
  return pack<T>(v);
}

// A step's elements of a row from the thread's first one on, of which `have` are left. In P, a vector of T is kW ones.
template <class Step, class P>
constexpr int kPieces = Step::kV / kVector<P>;
template <bool kFull, class Step, class P>
__device__ inline void load_fast(const P* p, unsigned offset, int have, acc_t<P> filler, Words* words) {
  constexpr int kW = kPieces<Step, P>, kWords = Step::kU * kW;
  const auto at = [](int i) { return i / kW * Step::kApart + i % kW * kVector<P>; };
  if (kFull && offset == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_aligned(p + at(i));
  } else if (kFull) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_words(p + at(i), offset);
  } else {
    const Words none = partial_words(p, 0, filler);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = none;
    if (offset == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (have - at(i) >= kVector<P>) words[i] = load_aligned(p + at(i));
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (have - at(i) >= kVector<P>) words[i] = load_words(p + at(i), offset);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int left = have - at(i);
      if (left > 0 && left < kVector<P>) words[i] = partial_words(p + at(i), left, filler);
    }
  }
}
// The u-th of a step's vectors.
template <class Step, class P>
__device__ inline void unpack_step(const Words* words, int u, acc_t<P>* out) {
  constexpr int kW = kPieces<Step, P>;
#pragma unroll
  for (int w = 0; w < kW; ++w) unpack<P>(words[u * kW + w], out + w * kVector<P>);
}

constexpr float kLog2E = 1.4426950408889634f;
// exp for an element of T, where its accumulator is float: float32 keeps its digits.
template <class T>
__device__ inline float fast_exp(float x) {
  if constexpr (std::is_same_v<T, float>)
    return expf(x);
  else
    return fast_exp2(x * kLog2E);
}

// Fills the shares at the beginning of scratch.
inline void launch_shares(Launcher& launch, const CrossEntropyRows& a, double* scratch) {
  const int64_t masks = shares_of(a);
  if (masks == 0) return;
  if (a.layout.classes > 4096)
    launch(smoothing_shares<kBlock>, blocks_for(masks), kBlock, a, scratch, masks);
  else
    launch(smoothing_shares<32>, blocks_for(ceil_div(masks, kBlock / 32)), kBlock, a, scratch, masks);
}

}  // namespace cuda
}  // namespace fused_ops

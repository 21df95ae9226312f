// How the kernels of the common options (a Kind that is not general) walk a row, in both directions.
#pragma once
#include "cross_entropy/cuda/options.cuh"

namespace fused_ops {
namespace cuda {

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

// Blocks of a multiprocessor at once: 64 or 80 registers a thread, or 80 and 128.
template <class T, Kind kKind>
constexpr int kFastBlocks = (kFactors<kKind> && (sizeof(T) == 4 || kKind == Kind::wide) ? 3 : 4) - kFewerBlocks;

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

}  // namespace cuda
}  // namespace fused_ops

// Sums over runs of values of one channel: of deviations from a center and their squares, and of gradients.
#pragma once
#include <algorithm>
#include <cmath>

#include "batch_norm/kernels.h"
#include "simd/line.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

// A value near `mean`, representable in T: then deviations of 16-bit values from it are exact, and the rounding of
// their sums has no bias.
template <class T>
inline acc_t<T> center_of(double mean) {
  T rounded;
  store(&rounded, static_cast<acc_t<T>>(mean));
  return to_acc(rounded);
}

template <class V>
inline double sum_of(V v) {
  double total = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(v[0]); ++l) total += static_cast<double>(v[l]);
  return total;
}

// Adds the lanes of four registers to doubles, and clears them.
struct WideLanes {
  double_vec low{}, high{};
  void take(float_vec* v) {
    const DoublePair d = widen((v[0] + v[1]) + (v[2] + v[3]));
    low += d.low, high += d.high;
    for (int i = 0; i < 4; ++i) v[i] = float_vec{};
  }
  void take(double_vec* v) {
    low += (v[0] + v[1]) + (v[2] + v[3]);
    for (int i = 0; i < 4; ++i) v[i] = double_vec{};
  }
  double sum() const { return sum_of(low + high); }
};

// Sums of x - center and of its square over values of one channel. Squares are of the accumulator's type for at most
// kFoldAt values and a run, then double; so are the deviations of 16-bit values, which are exact. float32 values
// themselves are summed in double.
template <class T>
class DeviationSums {
  using L = Line<T>;
  using A = acc_t<T>;
  using V = typename L::V;
  static constexpr bool kExact = std::is_same_v<T, float>;
  static constexpr int kGroup =
      std::max(1, 4 / L::kVectors);  // lines that are added together: no sum waits for the last

 public:
  // What is prefetched lies `ahead` values behind x.
  void add(const T* x, int64_t n, A center, int64_t ahead) {
    Lanes t = lanes_;
    const V c = V{} + center;
    int64_t i = 0;
    for (; i + kGroup * L::kSize <= n; i += kGroup * L::kSize)
      for (int g = 0; g < kGroup; ++g) {
        prefetch(x + i + g * L::kSize + ahead);
        t.step(x + i + g * L::kSize, c, g * L::kVectors);
      }
    for (; i + L::kSize <= n; i += L::kSize) t.step(x + i, c, 0);
    if (i < n) {  // padded with the center, which every T has
      T fill;
      store(&fill, center);
      prefetch_part(x + i + ahead);
      t.step_part(L::load_part(x + i, n - i, fill), c);
      padded_ += L::kSize - (n - i);
    }
    lanes_ = t;
    pending_ += n;
    if (pending_ >= kFoldAt) fold();
  }

  // Returns both sums over n values and starts again from zero.
  void take(double center, double n, double* sum, double* squares) {
    fold();
    *squares = squares_.sum();
    if constexpr (kExact)
      *sum = sum_of((lanes_.exact[0] + lanes_.exact[1]) + (lanes_.exact[2] + lanes_.exact[3])) -
             (n + static_cast<double>(padded_)) * center;
    else
      *sum = sum_.sum();
    *this = DeviationSums();
  }

 private:
  struct Lanes {
    V square[4] = {}, sum[kExact ? 1 : 4] = {};
    double_vec exact[kExact ? 4 : 1] = {};

    inline FUSED_OPS_INLINE void step(const T* from, V center, int first) {
      const L x = L::load(from);
      for (int k = 0; k < L::kVectors; ++k) {
        const int at = (first + k) % 4;
        const V d = x.v[k] - center;
        square[at] += d * d;
        if constexpr (kExact) {
          const DoublePair wide = widen_at(from + k * L::kLane);
          exact[at % 2 * 2] += wide.low, exact[at % 2 * 2 + 1] += wide.high;
        } else {
          sum[at] += d;
        }
      }
    }
    inline FUSED_OPS_INLINE void step_part(const L& x, V center) {
      for (int k = 0; k < L::kVectors; ++k) {
        const V d = x.v[k] - center;
        square[k % 4] += d * d;
        if constexpr (kExact) {
          const DoublePair wide = widen(x.v[k]);
          exact[k % 2 * 2] += wide.low, exact[k % 2 * 2 + 1] += wide.high;
        } else {
          sum[k % 4] += d;
        }
      }
    }
  };
  void fold() {
    squares_.take(lanes_.square);
    if constexpr (!kExact) sum_.take(lanes_.sum);
    pending_ = 0;
  }

  Lanes lanes_;
  WideLanes squares_, sum_;
  int64_t pending_ = 0, padded_ = 0;
};

// Sums of g and of g * (x - mean) over lines of one channel: in double, as PyTorch's are, so that what is left of them
// after cancellation is no worse. Of 16-bit values in float for at most kFoldAt values and a run, from a center near
// the mean.
template <class T>
class ProductSums {
  using L = Line<T>;
  using A = acc_t<T>;
  using V = typename L::V;
  static constexpr bool kNarrow = sizeof(T) == 2;
  using S = std::conditional_t<kNarrow, float_vec, double_vec>;

 public:
  explicit ProductSums(double mean) : mean_(mean), center_(kNarrow ? static_cast<double>(center_of<T>(mean)) : mean) {}

  struct Lanes {
    S sum[4] = {}, dot[4] = {};
    S center{};

    inline FUSED_OPS_INLINE void step(const L& g, const L& x) {
      for (int k = 0; k < L::kVectors; ++k) {
        if constexpr (std::is_same_v<T, float>) {
          const DoublePair a = widen(g.v[k]), b = widen(x.v[k]);
          const int at = k % 2 * 2;
          sum[at] += a.low, dot[at] += a.low * (b.low - center);
          sum[at + 1] += a.high, dot[at + 1] += a.high * (b.high - center);
        } else {
          sum[k % 4] += g.v[k], dot[k % 4] += g.v[k] * (x.v[k] - center);
        }
      }
    }
  };
  Lanes lanes() const {
    Lanes t = lanes_;
    t.center = S{} + static_cast<std::conditional_t<kNarrow, float, double>>(center_);
    return t;
  }
  // Takes back what lanes() gave, after n more values.
  void set(const Lanes& t, int64_t n) {
    lanes_ = t;
    pending_ += n;
    if (kNarrow && pending_ >= kFoldAt) fold();
  }
  void take(double* sum, double* dot) {
    fold();
    *sum = sum_.sum(), *dot = dot_.sum();
    if (kNarrow) *dot -= (mean_ - center_) * *sum;
  }

 private:
  void fold() {
    sum_.take(lanes_.sum), dot_.take(lanes_.dot);
    pending_ = 0;
  }

  double mean_, center_;
  Lanes lanes_;
  WideLanes sum_, dot_;
  int64_t pending_ = 0;
};

// The mean of n values in one pass, rounded: what deviations are taken from, not the result.
template <class T>
inline double pilot_mean(const T* x, int64_t n) {
  DeviationSums<T> sums;
  double sum, squares;
  const acc_t<T> first = to_acc(x[0]);
  sums.add(x, n, first, 0);
  sums.take(static_cast<double>(first), static_cast<double>(n), &sum, &squares);
  return static_cast<double>(first) + sum / static_cast<double>(n);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

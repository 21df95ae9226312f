// Cross-entropy with every option, row by row, on the CPU.
//
// Forward, per row, with u, q and the mass S = sum_j q_j of ../cross_entropy_rows.h:
//   lse = log sum_j exp(u_j),  nll = sum_j q_j (lse - u_j),  entropy = lse - sum_j p_j u_j,  p_j = exp(u_j - lse).
// Backward, per row, for upstream gradients g of nll, l of lse, h of entropy and t of the target's log-probability:
//   grad_u_j = p_j (g S + l - t + h (lse - entropy - u_j)) - g q_j + t [j == target],  grad_x_j = grad_u_j du_j/dx_j.
//
// Memory: the forward reads every logit (and class probability, and mask) once and writes 8 bytes per row and output;
// the backward reads the same and writes every gradient once. Chunks of kChunk classes are converted into a buffer that
// stays in L1; where rows are adjacent in memory, kGroup of them are transposed into it together.
//
// Stability: as in cross_entropy.cpp. With one index a row the sum leaves out the target; the terms q_j (lse - u_j) are
// summed relative to the first chunk's maximum. See docs/cross_entropy.md.
#include "../cross_entropy_rows.h"

#include <algorithm>

#include "activation.h"
#include "cross_entropy_targets.h"
#include "vector.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {
namespace {

constexpr int64_t kGroup = 16;          // rows that are walked together where they are adjacent
constexpr int64_t kGroupClasses = 256;  // and how many of their classes at a time
constexpr int64_t kTile = kGroup * kGroupClasses;
static_assert(kTile >= kChunk);
constexpr double kFar = 268435456.0;  // |lse| beyond which a float's p needs more than lse in double

double weight_of(const CrossEntropyRows& a, int64_t c) {
  if (!a.class_weight) return 1;
  return a.dtype == DType::float64 ? static_cast<const double*>(a.class_weight)[c]
                                   : static_cast<double>(static_cast<const float*>(a.class_weight)[c]);
}

// ---- tiles: n classes of `rows` rows, (rows, n) in the buffer

template <class T, class A>
void load_tile(const T* from, int64_t row_stride, int64_t class_stride, int64_t rows, int64_t n, A* to) {
  if (rows == 1 && class_stride == 1) {
    if constexpr (!std::is_same_v<A, double> && !std::is_same_v<T, double>) {
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store_vec(to + i, load_vec(from + i));
      for (; i < n; ++i) to[i] = to_acc(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(to_acc(from[i]));
    }
    return;
  }
  for (int64_t c = 0; c < n; ++c)
    for (int64_t r = 0; r < rows; ++r) to[r * n + c] = static_cast<A>(to_acc(from[r * row_stride + c * class_stride]));
}

template <class A>
void load_tile(const void* data, DType dtype, const RowLayout& l, int64_t row, int64_t rows, int64_t c, int64_t n,
               A* to) {
  const int64_t at = l.offset(row) + c * l.class_stride;
  const auto load = [&](auto* p) { load_tile(p + at, l.spatial_stride, l.class_stride, rows, n, to); };
  switch (dtype) {
    case DType::float32: return load(static_cast<const float*>(data));
    case DType::float64: return load(static_cast<const double*>(data));
    case DType::bfloat16: return load(static_cast<const bfloat16_t*>(data));
    case DType::float16: return load(static_cast<const float16_t*>(data));
  }
}

template <class T, class A>
void store_tile(T* to, int64_t row_stride, int64_t class_stride, int64_t rows, int64_t n, const A* from) {
  if (rows == 1 && class_stride == 1) {
    if constexpr (!std::is_same_v<A, double> && !std::is_same_v<T, double>) {
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store_vec(to + i, load_vec(from + i));
      for (; i < n; ++i) store(to + i, from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) store(to + i, static_cast<acc_t<T>>(from[i]));
    }
    return;
  }
  for (int64_t c = 0; c < n; ++c)
    for (int64_t r = 0; r < rows; ++r)
      store(to + r * row_stride + c * class_stride, static_cast<acc_t<T>>(from[r * n + c]));
}

template <class A>
void store_tile(void* data, DType dtype, const RowLayout& l, int64_t row, int64_t rows, int64_t c, int64_t n,
                const A* from) {
  const int64_t at = l.offset(row) + c * l.class_stride;
  const auto write = [&](auto* p) { store_tile(p + at, l.spatial_stride, l.class_stride, rows, n, from); };
  switch (dtype) {
    case DType::float32: return write(static_cast<float*>(data));
    case DType::float64: return write(static_cast<double*>(data));
    case DType::bfloat16: return write(static_cast<bfloat16_t*>(data));
    case DType::float16: return write(static_cast<float16_t*>(data));
  }
}

// The logits of a tile as u, their target coefficients q, and which classes are allowed.
template <class A>
class Tile {
 public:
  explicit Tile(const CrossEntropyRows& a)
      : a_(a),
        scale_(static_cast<A>(a.logit_scale)),
        cap_(static_cast<A>(a.softcap)),
        soft_(static_cast<A>(1.0 - a.label_smoothing)) {}

  // Rows from `row` on that are walked together.
  int64_t rows_from(int64_t row, int64_t end) const {
    if (!a_.layout.adjacent_rows()) return 1;
    return std::min({kGroup, end - row, a_.layout.spatial - row % a_.layout.spatial});
  }

  void load(int64_t row, int64_t rows, int64_t c) {
    n = std::min(a_.layout.adjacent_rows() ? kGroupClasses : kChunk, a_.layout.classes - c);
    row_ = row, rows_ = rows, class_ = c;
    load_tile(a_.logits, a_.dtype, a_.layout, row, rows, c, n, u);
    transform(u, rows * n);
    if (a_.has_mask) apply_mask();
  }

  // q of the tile's row r: null if all of them are zero but at the indices.
  void load_coefficients() {
    if (!a_.has_dense && !(a_.row_masks && a_.label_smoothing != 0)) return;
    if (a_.has_dense) load_tile(a_.dense.data, a_.dense.dtype, a_.dense.layout, row_, rows_, class_, n, q_);
    const A* weight = static_cast<const A*>(a_.class_weight);
    const A* constant = static_cast<const A*>(a_.smoothing_weight);
    for (int64_t r = 0; r < rows_; ++r) {
      A* q = q_ + r * n;
      if (a_.has_dense && a_.label_smoothing != 0)
        for (int64_t i = 0; i < n; ++i) q[i] *= soft_;
      if (weight && a_.has_dense)
        for (int64_t i = 0; i < n; ++i) q[i] *= weight[class_ + i];
      if (a_.label_smoothing == 0) continue;
      if (constant) {
        for (int64_t i = 0; i < n; ++i) q[i] += constant[class_ + i];
        continue;
      }
      const A share = static_cast<A>(a_.label_smoothing / static_cast<double>(allowed_[r]));
      for (int64_t i = 0; i < n; ++i) {
        const A mine = allowed(r)[i] ? (weight ? weight[class_ + i] * share : share) : A(0);
        q[i] = a_.has_dense ? q[i] + mine : mine;
      }
    }
  }

  const A* coefficients(int64_t r) const {
    if (a_.has_dense || (a_.row_masks && a_.label_smoothing != 0)) return q_ + r * n;
    return a_.smoothing_weight ? static_cast<const A*>(a_.smoothing_weight) + class_ : nullptr;
  }
  // Null without a mask.
  const uint8_t* allowed(int64_t r) const { return a_.has_mask ? mask_ + r * n : nullptr; }

  // How many classes each of the rows may have: what smoothing is spread over.
  void count_allowed(int64_t row, int64_t rows) {
    if (!a_.row_masks || a_.label_smoothing == 0) return;
    for (int64_t r = 0; r < rows; ++r) {
      const RowLayout& l = a_.mask.layout;
      const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row + r);
      allowed_[r] = 0;
      for (int64_t c = 0; c < l.classes; ++c) allowed_[r] += m[c * l.class_stride] != 0;
    }
  }

  A at(int64_t row, int64_t c) const {  // u of one class
    A value;
    load_tile(a_.logits, a_.dtype, a_.layout, row, 1, c, 1, &value);
    transform(&value, 1);
    return is_allowed(row, c) ? value : -std::numeric_limits<A>::infinity();
  }
  A slope(int64_t row, int64_t c, A value) const {  // du/dx
    if (!is_allowed(row, c)) return 0;
    return cap_ != 0 ? scale_ * (1 - value / cap_ * (value / cap_)) : scale_;
  }
  bool is_allowed(int64_t row, int64_t c) const {
    const RowLayout& l = a_.mask.layout;
    return !a_.has_mask || static_cast<const uint8_t*>(a_.mask.data)[l.offset(row) + c * l.class_stride];
  }

  // grad_u -> grad_x, in place.
  void chain(const A* value, A* grad, const uint8_t* allowed) const {
    if (cap_ != 0)
      for (int64_t i = 0; i < n; ++i) {
        const A t = value[i] / cap_;
        grad[i] *= scale_ * (1 - t * t);
      }
    else if (scale_ != 1)
      for (int64_t i = 0; i < n; ++i) grad[i] *= scale_;
    if (allowed)
      for (int64_t i = 0; i < n; ++i) grad[i] = allowed[i] ? grad[i] : A(0);
  }

  int64_t n = 0;
  alignas(64) A u[kTile];

 private:
  void transform(A* x, int64_t count) const {
    if (scale_ != 1)
      for (int64_t i = 0; i < count; ++i) x[i] *= scale_;
    if (cap_ != 0)
      for (int64_t i = 0; i < count; ++i) x[i] = cap_ * tanh_(x[i] / cap_);
  }

  void apply_mask() {
    const RowLayout& l = a_.mask.layout;
    const uint8_t* m = static_cast<const uint8_t*>(a_.mask.data) + l.offset(row_) + class_ * l.class_stride;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = 0; i < n; ++i) {
        mask_[r * n + i] = m[r * l.spatial_stride + i * l.class_stride] != 0;
        if (!mask_[r * n + i]) u[r * n + i] = -std::numeric_limits<A>::infinity();
      }
  }

  const CrossEntropyRows& a_;
  const A scale_, cap_, soft_;
  int64_t row_ = 0, rows_ = 0, class_ = 0;
  int64_t allowed_[kGroup] = {};
  alignas(64) A q_[kTile];
  uint8_t mask_[kTile];
};

// ---- the sums of one chunk

// (sum of exp(u - shift), sum of exp(u - shift) (u - shift)); the second only if kEntropy.
template <bool kEntropy, class A>
void exp_sums(const A* u, int64_t n, A shift, double* sum, double* weighted) {
  A s[kLanes] = {}, w[kLanes] = {};
  const auto term = [&](int64_t i, int64_t l) {
    const A v = u[i + l] - shift, e = exp_(v);
    s[l] += e;
    if constexpr (kEntropy) w[l] += e == 0 ? A(0) : e * v;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) term(i, l);
  }
  for (int64_t l = 0; i + l < n; ++l) term(i, l);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) s[l] += s[l + half], w[l] += w[l + half];
  *sum += static_cast<double>(s[0]);
  if constexpr (kEntropy) *weighted += static_cast<double>(w[0]);
}

// (sum of q, sum of q (base - u)); a class that is not allowed counts only where its q is not 0.
template <class A>
void dense_sums(const A* u, const A* q, const uint8_t* allowed, int64_t n, A base, double* mass, double* dot) {
  A m[kLanes] = {}, d[kLanes] = {};
  const auto add = [&](int64_t i, int64_t l) {
    m[l] += q[i + l];
    d[l] += q[i + l] * (base - u[i + l]);
  };
  int64_t i = 0;
  if (allowed) {
    for (; i < n; ++i) {
      m[i % kLanes] += q[i];
      if (allowed[i] || q[i] != 0) d[i % kLanes] += q[i] * (base - u[i]);
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) add(i, l);
    }
    for (int64_t l = 0; i + l < n; ++l) add(i, l);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) m[l] += m[l + half], d[l] += d[l + half];
  *mass += static_cast<double>(m[0]), *dot += static_cast<double>(d[0]);
}

template <class A>
A sum_of(const A* x, int64_t n) {
  A s[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) s[l] += x[i + l];
  }
  for (int64_t l = 0; i + l < n; ++l) s[l] += x[i + l];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) s[l] += s[l + half];
  return s[0];
}

// ---- forward

template <class A>
struct RowState {
  static constexpr A kNone = -std::numeric_limits<A>::infinity();
  A max = kNone, base = 0;
  double others = 0, weighted = 0;  // sums over exp(u - max), without the excluded class
  double mass = 0, dot = 0;
  int64_t prediction = 0;

  // One chunk, whose first class is c; `except` is the class to leave out of the sums of exponentials, or -1.
  template <bool kEntropy>
  void add(const A* u, const A* q, const uint8_t* allowed, int64_t c, int64_t n, int64_t except) {
    const A chunk_max = max_of(u, n);
    if (c == 0 && std::isfinite(chunk_max)) base = chunk_max;
    if (q) dense_sums(u, q, allowed, n, base, &mass, &dot);
    if (!(chunk_max <= max)) {  // larger, or NaN
      if (kEntropy && max == max) prediction = c + first_of(u, n, chunk_max);
      const double shrink = max == kNone ? 0.0 : static_cast<double>(exp_(max - chunk_max));
      const double fall = max == kNone ? 0.0 : static_cast<double>(max) - static_cast<double>(chunk_max);
      if (kEntropy) weighted = shrink == 0 ? 0 : shrink * (weighted + fall * others);
      others *= shrink;
      max = chunk_max;
    }
    if (max == kNone) return;  // nothing but -inf so far
    const int64_t t = except - c;
    if (t >= 0 && t < n) {
      exp_sums<kEntropy>(u, t, max, &others, &weighted);
      exp_sums<kEntropy>(u + t + 1, n - t - 1, max, &others, &weighted);
    } else {
      exp_sums<kEntropy>(u, n, max, &others, &weighted);
    }
  }

  static double exp_of(double x) {
    return std::is_same_v<A, double> ? std::exp(x) : static_cast<double>(exp_(static_cast<float>(x)));
  }

  static int64_t first_of(const A* u, int64_t n, A value) {
    int64_t i = 0;
    while (i + 1 < n && u[i] != value && !(value != value && u[i] != u[i])) ++i;
    return i;
  }

  // log sum exp(u - max). `below` is the excluded class' u - max; not used if none is.
  double log_sum(bool excluded, double below) const {
    if (max == kNone) return std::numeric_limits<double>::quiet_NaN();  // no class left: as PyTorch
    const double rest = !excluded || below == 0 ? others - (excluded ? 0.0 : 1.0) : (others - 1.0) + exp_of(below);
    return std::is_same_v<A, double> ? std::log1p(rest) : log1p_(rest);
  }
};

template <class A>
struct Forward {
  const CrossEntropyRowsForward& args;
  const CrossEntropyRows& a = args.rows;
  Tile<A> tile{args.rows};
  RowState<A> state[kGroup];

  explicit Forward(const CrossEntropyRowsForward& forward) : args(forward) {}

  void finish(int64_t row, const RowTarget& target, const RowState<A>& s) const {
    const bool one = target.one();
    const double u_target = one ? static_cast<double>(tile.at(row, target.index(0))) : 0;
    const double below = one ? u_target - static_cast<double>(s.max) : 0;
    const double log_sum = s.log_sum(one, below);
    const double lse = static_cast<double>(s.max) + log_sum, soft = 1.0 - a.label_smoothing;
    double nll = 0, mass = s.mass, target_weight = target.has_indices() ? 0 : 1;
    if (tile.coefficients(0))
      nll = s.dot + s.mass * ((static_cast<double>(s.max) - static_cast<double>(s.base)) + log_sum);
    for (int64_t k = 0; k < target.per_row(); ++k) {
      if (target.ignored(k)) continue;
      const int64_t c = target.index(k);
      const double share = target.probability(k) * weight_of(a, c);
      const double away = one ? -below : static_cast<double>(s.max) - static_cast<double>(tile.at(row, c));
      nll += soft * share * (log_sum + away);
      mass += one ? 0 : soft * share, target_weight += share;
    }
    const bool counts = !target.all_ignored();
    args.lse[row] = counts || a.statistics ? lse : 0;
    args.nll[row] = counts ? nll : 0, args.mass[row] = counts ? mass : 0;
    args.target_weight[row] = counts ? target_weight : 0;
    if (!a.statistics) return;
    const double e = one ? std::exp(below) : 0;
    const double weighted = s.weighted + (e == 0 ? 0 : e * below), sum = std::exp(log_sum);
    args.entropy[row] = log_sum - weighted / sum;
    args.prediction[row] = s.prediction;
    args.target_log_probability[row] = one && counts ? below - log_sum : 0;
  }

  void group(int64_t row, int64_t rows, const RowTarget* targets) {
    for (int64_t r = 0; r < rows; ++r) state[r] = RowState<A>();
    tile.count_allowed(row, rows);
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, rows, c);
      tile.load_coefficients();
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t except = targets[r].one() ? targets[r].index(0) : -1;
        const A *u = tile.u + r * tile.n, *q = tile.coefficients(r);
        if (a.statistics)
          state[r].template add<true>(u, q, tile.allowed(r), c, tile.n, except);
        else
          state[r].template add<false>(u, q, tile.allowed(r), c, tile.n, except);
      }
    }
    for (int64_t r = 0; r < rows; ++r) finish(row + r, targets[r], state[r]);
  }

  int64_t run(int64_t begin, int64_t end) {
    RowTarget targets[kGroup];
    for (int64_t row = begin, rows = 0; row < end; row += rows) {
      rows = tile.rows_from(row, end);
      bool any = a.statistics;
      for (int64_t r = 0; r < rows; ++r) {
        targets[r] = RowTarget(a, row + r);
        if (targets[r].bad()) return row + r;
        any |= !targets[r].all_ignored();
      }
      if (any)
        group(row, rows, targets);
      else
        for (int64_t r = row; r < row + rows; ++r) args.nll[r] = args.lse[r] = args.mass[r] = args.target_weight[r] = 0;
    }
    return -1;
  }
};

// ---- backward

// grad_u_j = nll (p_j mass - q_j) + p_j (rest + slope u_j), and with one index target (p_j - [j == target]) besides.
struct Coefficients {
  double nll, mass, rest, slope, target;
  bool zero() const { return nll == 0 && rest == 0 && slope == 0 && target == 0; }
};

template <class A>
struct Backward {
  const CrossEntropyRowsBackward& args;
  const CrossEntropyRows& a = args.rows;
  Tile<A> tile{args.rows};
  alignas(64) A grad[kTile];
  A high[kGroup], low[kGroup];
  double others[kGroup], p_target[kGroup];
  Coefficients coefficient[kGroup];

  explicit Backward(const CrossEntropyRowsBackward& backward) : args(backward) {}

  // lse as high + low; low is found again where a double cannot hold it beside high.
  void split(int64_t row, int64_t r) {
    const double lse = args.lse[row];
    high[r] = static_cast<A>(lse), low[r] = static_cast<A>(lse - static_cast<double>(high[r]));
    if (!std::is_same_v<A, double> && !(std::fabs(lse) >= kFar)) return;
    double sum = 0, none = 0;
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, 1, c);
      exp_sums<false>(tile.u, tile.n, high[r], &sum, &none);
    }
    low[r] = static_cast<A>(std::log(sum));
  }

  Coefficients coefficients(int64_t row, const RowTarget& target) const {
    const auto read = [&](const double* from) { return from ? from[row] : 0.0; };
    const bool counts = !target.all_ignored();
    if (!counts && !a.statistics) return {};
    const double g = counts ? read(args.grad_nll) : 0, h = read(args.grad_entropy);
    const double t = counts && target.one() ? read(args.grad_target_log_probability) : 0;
    const double on = target.one() ? (1.0 - a.label_smoothing) * weight_of(a, target.index(0)) : 0;
    double rest = read(args.grad_lse);
    if (h != 0) rest += h * (args.lse[row] - args.entropy[row]);
    return {g, args.mass[row], rest, -h, g * on - t};
  }

  // p -> g (p mass - q) + p (rest + slope u), in place.
  static void combine(A* p, const A* u, const A* q, int64_t n, A g, A mass, A rest, A slope) {
    if (slope != 0) {
      for (int64_t i = 0; i < n; ++i) {
        const A own = q ? p[i] * mass - q[i] : p[i] * mass;
        p[i] = g * own + (p[i] == 0 ? A(0) : p[i] * (rest + slope * u[i]));
      }
    } else if (!q) {
      const A factor = g * mass + rest;
      for (int64_t i = 0; i < n; ++i) p[i] *= factor;
    } else if (rest == 0) {
      for (int64_t i = 0; i < n; ++i) p[i] = g * (p[i] * mass - q[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) p[i] = g * (p[i] * mass - q[i]) + p[i] * rest;
    }
  }

  void chunk(int64_t row, int64_t r, int64_t c, const RowTarget& target) {
    const int64_t n = tile.n;
    const A *u = tile.u + r * n, *q = tile.coefficients(r), hi = high[r], lo = low[r];
    A* out = grad + r * n;
    const Coefficients& k = coefficient[r];
    if (k.zero() && target.all_ignored()) return std::fill(out, out + n, A(0));
    const A g = static_cast<A>(k.nll), mass = static_cast<A>(k.mass), slope = static_cast<A>(k.slope);
    const A rest = static_cast<A>(k.rest + k.target);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = exp_((u[i] - hi) - lo);
    if (p_target[r] >= 0.5) {
      const int64_t t = std::clamp<int64_t>(target.index(0) - c, -1, n);
      if (t < 0 || t == n)
        others[r] += static_cast<double>(sum_of(out, n));
      else
        others[r] += static_cast<double>(sum_of(out, t)) + static_cast<double>(sum_of(out + t + 1, n - t - 1));
    }
    combine(out, u, q, n, g, mass, rest, slope);
    for (int64_t j = 0; !target.one() && j < target.per_row(); ++j) {
      const int64_t t = target.ignored(j) ? -1 : target.index(j) - c;
      if (t >= 0 && t < n)
        out[t] -=
            static_cast<A>(k.nll * (1.0 - a.label_smoothing) * target.probability(j) * weight_of(a, target.index(j)));
    }
    tile.chain(u, out, tile.allowed(r));
  }

  // The target's gradient, with p - 1 as minus the others' p where that would cancel.
  void set_target(int64_t row, int64_t r, const RowTarget& target, A u, A q) {
    const Coefficients& k = coefficient[r];
    const double p = p_target[r], residual = p >= 0.5 ? -others[r] : p - 1.0;
    const double own = k.nll * (p * k.mass - static_cast<double>(q));
    const double rest = k.slope == 0 || p == 0 ? k.rest : k.rest + k.slope * static_cast<double>(u);
    const double value = k.target * residual + own + p * rest;
    const A out = static_cast<A>(value) * tile.slope(row, target.index(0), u);
    store_tile(args.grad_logits, a.dtype, args.grad_layout, row, 1, target.index(0), 1, &out);
  }

  void group(int64_t row, int64_t rows, const RowTarget* targets) {
    A u[kGroup], q[kGroup] = {};
    for (int64_t r = 0; r < rows; ++r) {
      split(row + r, r);
      coefficient[r] = coefficients(row + r, targets[r]);
      others[r] = p_target[r] = 0;
      if (!targets[r].one()) continue;
      u[r] = tile.at(row + r, targets[r].index(0));
      p_target[r] = static_cast<double>(exp_((u[r] - high[r]) - low[r]));
    }
    tile.count_allowed(row, rows);
    for (int64_t c = 0; c < a.layout.classes; c += tile.n) {
      tile.load(row, rows, c);
      tile.load_coefficients();
      for (int64_t r = 0; r < rows; ++r) {
        chunk(row + r, r, c, targets[r]);
        const int64_t t = targets[r].one() ? targets[r].index(0) - c : -1;
        if (tile.coefficients(r) && t >= 0 && t < tile.n) q[r] = tile.coefficients(r)[t];
      }
      store_tile(args.grad_logits, a.dtype, args.grad_layout, row, rows, c, tile.n, grad);
    }
    for (int64_t r = 0; r < rows; ++r)
      if (targets[r].one()) set_target(row + r, r, targets[r], u[r], q[r]);
  }

  int64_t run(int64_t begin, int64_t end) {
    RowTarget targets[kGroup];
    for (int64_t row = begin, rows = 0; row < end; row += rows) {
      rows = tile.rows_from(row, end);
      for (int64_t r = 0; r < rows; ++r) {
        targets[r] = RowTarget(a, row + r);
        if (targets[r].bad()) return row + r;
      }
      group(row, rows, targets);
    }
    return -1;
  }
};

// ---- class indices with nothing but class weights: the walks of cross_entropy.cpp, with a factor per row

bool is_index_alone(const CrossEntropyRows& a) {
  return !a.has_dense && !a.sparse && !a.has_mask && a.label_smoothing == 0 && a.logit_scale == 1 && a.softcap == 0 &&
         !a.statistics;
}

double weight_of_row(const CrossEntropyRows& a, int64_t row) {
  const int64_t t = target_at(a.indices, row);
  if (t == a.indices.ignore_index) return 0;
  return weight_of(a, t);
}

int64_t index_alone_forward(const CrossEntropyRowsForward& args, int64_t begin, int64_t end) {
  const CrossEntropyRows& a = args.rows;
  const CrossEntropyForward plain{a.dtype, a.logits, a.layout, a.indices, 0, args.lse, nullptr, args.nll, nullptr};
  const BlockResult result = cross_entropy_forward_rows(plain, begin, end);
  if (result.bad_row >= 0) return result.bad_row;
  for (int64_t row = begin; row < end; ++row) {
    const double weight = weight_of_row(a, row);
    args.mass[row] = 0, args.target_weight[row] = weight;
    if (target_at(a.indices, row) != a.indices.ignore_index) args.nll[row] *= weight;
  }
  return -1;
}

int64_t index_alone_backward(const CrossEntropyRowsBackward& args, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 512;
  const CrossEntropyRows& a = args.rows;
  const int64_t bad = cross_entropy_bad_target(a.indices, begin, end, a.layout.classes);
  if (bad >= 0) return bad;
  double scale[kRows];
  for (int64_t row = begin, n = 0; row < end; row += n) {
    n = std::min(kRows, end - row);
    for (int64_t r = 0; r < n; ++r) scale[r] = args.grad_nll[row + r] * weight_of_row(a, row + r);
    const CrossEntropyBackward plain{a.dtype, a.logits, a.layout, a.indices,        args.lse,        nullptr,
                                     scale,   row,      1.0,      args.grad_logits, args.grad_layout};
    cross_entropy_backward(plain, row, row + n);
  }
  return -1;
}

}  // namespace

int64_t cross_entropy_rows_forward(const CrossEntropyRowsForward& args, int64_t begin, int64_t end) {
  if (is_index_alone(args.rows)) return index_alone_forward(args, begin, end);
  if (args.rows.dtype == DType::float64) return Forward<double>(args).run(begin, end);
  return Forward<float>(args).run(begin, end);
}

int64_t cross_entropy_rows_backward(const CrossEntropyRowsBackward& args, int64_t begin, int64_t end) {
  if (is_index_alone(args.rows) && args.grad_nll && !args.grad_lse) return index_alone_backward(args, begin, end);
  if (args.rows.dtype == DType::float64) return Backward<double>(args).run(begin, end);
  return Backward<float>(args).run(begin, end);
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

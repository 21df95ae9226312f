// How cross-entropy's kernels walk rows: adjacent classes by vectors, short rows through shared memory.
#pragma once
#include "cross_entropy/cuda/rows.cuh"

namespace fused_ops {
namespace cuda {

constexpr int64_t kRowBlocks = 1056;      // of one launch that walks rows: eight a multiprocessor of an H100
constexpr int64_t kTileVectors = 8;       // a row of up to so many 16-byte vectors is one thread's, in shared memory
constexpr int64_t kWarpRow = 1024;        // of up to so many a warp's, of more a block's
constexpr int64_t kPieceBytes = 1 << 18;  // and a row beyond this length is cut into pieces for several blocks
constexpr int kTileMemory = kBlock * (static_cast<int>(kTileVectors) * 4 + 1) / 4;  // 16-byte vectors of shared memory

// Blocks of a forward that walks rows on one multiprocessor.
constexpr int kForwardBlocks = 4 - kFewerBlocks;

inline int64_t blocks_of(int64_t items) { return items < kRowBlocks ? items : kRowBlocks; }

// Pieces of a row and their length in elements, a multiple of a block's vectors, both by the row's length alone.
struct Pieces {
  int64_t count, length;
};
inline Pieces pieces_of(DType dtype, const RowLayout& l) {
  const int64_t bytes = element_bytes(dtype), step = kBlock * 16 / bytes;
  if (!l.adjacent_classes() || l.classes * bytes <= kPieceBytes) return {1, l.classes};
  const int64_t wanted = ceil_div(l.classes * bytes, kPieceBytes);
  const int64_t length = ceil_div(ceil_div(l.classes, wanted), step) * step;
  return {ceil_div(l.classes, length), length};
}

// kCount elements `stride` apart, the first `left` of which exist; the others are `filler`. No load waits for another.
template <class T, int kCount>
__device__ inline void load_strided(const T* from, int64_t stride, int64_t left, acc_t<T> filler, acc_t<T>* v) {
  if (left >= kCount) {
#pragma unroll
    for (int k = 0; k < kCount; ++k, from += stride) v[k] = to_acc(*from);
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    v[k] = k < left ? to_acc(*from) : filler;
    from += stride;
  }
}

template <class T, bool kMisaligned>
__device__ inline Words load_at(const T* p, unsigned offset) {
  if constexpr (!kMisaligned) return load_aligned(p);
  const char* aligned = reinterpret_cast<const char*>(p) - offset;
  return window(load_aligned(aligned), load_aligned(aligned + 16), offset);
}

template <int kCount>
using Count = std::integral_constant<int, kCount>;

// One thread's share of n adjacent elements at x. Calls visit(words, first, Count) for several vectors at a time,
// `first` being the index of the first one's first element and the others kGroup vectors apart; elements behind the end
// are `filler`. All loads of a call are independent: no bound is checked between them. A vector that is not whole is
// read element by element: the piece of a long row may be shorter than one, and behind it there may be no memory.
template <class T, int kGroup, bool kMisaligned, class Visit>
__device__ inline void walk_share(const T* x, int n, int lane, acc_t<T> filler, const Visit& visit) {
  constexpr int kV = kVector<T>, kU = sizeof(T) == 8 ? 2 : 4, kSpan = kGroup * kV, kStep = kSpan * kU;
  const unsigned offset = misalignment(x);
  int first = lane * kV;
  for (int begin = 0; begin + kStep <= n; begin += kStep, first += kStep) {
    Words words[kU];
#pragma unroll
    for (int u = 0; u < kU; ++u) words[u] = load_at<T, kMisaligned>(x + first + u * kSpan, offset);
    visit(words, first, Count<kU>());
  }
  const int left = n - (first - lane * kV);
  Words words[kU];
#pragma unroll
  for (int u = 0; u < kU; ++u) {
    const int at = first + u * kSpan;
    if (at + kV <= n) words[u] = load_at<T, kMisaligned>(x + at, offset);
  }
#pragma unroll
  for (int u = 0; u < kU; ++u) {
    const int at = first + u * kSpan;
    if (u * kSpan >= left) continue;
    if (at + kV > n) {
      acc_t<T> v[kV];
#pragma unroll
      for (int k = 0; k < kV; ++k) v[k] = at + k < n ? to_acc(x[at + k]) : filler;
      words[u] = pack<T>(v);
    }
    visit(words + u, at, Count<1>());
  }
}

// walk_share, by whether x is aligned.
template <class T, int kGroup, class Visit>
__device__ inline void walk_any(const T* x, int n, int lane, acc_t<T> filler, const Visit& visit) {
  if (misalignment(x) == 0)
    walk_share<T, kGroup, false>(x, n, lane, filler, visit);
  else
    walk_share<T, kGroup, true>(x, n, lane, filler, visit);
}

// The gradients of n adjacent classes of a row that does not count.
template <class T, int kGroup, bool kAligned>
__device__ inline void fill_share(T* grad, int n, acc_t<T> value, int lane) {
  constexpr int kV = kVector<T>;
  const unsigned offset = misalignment(grad);
  acc_t<T> v[kV];
#pragma unroll
  for (int k = 0; k < kV; ++k) v[k] = value;
  for (int begin = 0; begin < n; begin += kGroup * kV) {
    const int first = begin + lane * kV;
    store_vector<T, 32, kAligned>(grad + first, n - first, offset, lane, v);
  }
}

// A block's rows of up to kTileVectors vectors in shared memory, a thread a row. `pitch` spreads the rows over the
// banks: where their length is a multiple of four words, each is followed by an unused one.
template <class T>
struct Tile {
  T* memory;
  int classes, pitch;

  __device__ Tile(Words* memory, int classes)
      : memory(reinterpret_cast<T*>(memory)), classes(classes), pitch(classes + (padded() ? 4 : 0) / int(sizeof(T))) {}
  __device__ bool padded() const { return sizeof(T) < 8 && classes * static_cast<int>(sizeof(T)) % 16 == 0; }
  __device__ T* row() const { return memory + static_cast<int>(threadIdx.x) * pitch; }

  // Whether `rows` rows at p follow one another and begin at a multiple of 16 bytes.
  __device__ static bool dense(const void* p, const RowLayout& l) {
    const bool follow = l.spatial == 1 ? l.batch_stride == l.classes
                                       : l.spatial_stride == l.classes && l.batch_stride == l.spatial * l.classes;
    return follow && misalignment(p) == 0;
  }

  // Copies rows [begin, begin + count) here or from here. All threads call this, with barriers around it.
  __device__ void load(const T* from, const RowLayout& l, int64_t begin, int count) const {
    if (!dense(from, l))
      return each_element(count, [&](int r, int j, T& t) { t = from[row_offset(l, begin + r) + j]; });
    from += begin * classes;
    each_vector(count, [&](int i, bool whole) {
      if (whole) return put(i, load_aligned(from + i * kVector<T>));
      for (int e = i * kVector<T>; e < count * classes; ++e) memory[place(e)] = from[e];
    });
  }
  __device__ void store(T* to, const RowLayout& l, int64_t begin, int count) const {
    if (!dense(to, l)) return each_element(count, [&](int r, int j, T& t) { to[row_offset(l, begin + r) + j] = t; });
    to += begin * classes;
    each_vector(count, [&](int i, bool whole) {
      if (whole) return store_aligned(to + i * kVector<T>, get(i));
      for (int e = i * kVector<T>; e < count * classes; ++e) to[e] = memory[place(e)];
    });
  }

 private:
  __device__ int place(int element) const { return padded() ? element / classes * pitch + element % classes : element; }
  __device__ uint32_t* words_at(int vector) const {
    return reinterpret_cast<uint32_t*>(memory + place(vector * kVector<T>));  // a vector lies within a padded row
  }
  __device__ void put(int vector, const Words& v) const {
    if (!padded()) return store_aligned(memory + vector * kVector<T>, v);
    uint32_t* to = words_at(vector);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = v.w[k];
  }
  __device__ Words get(int vector) const {
    if (!padded()) return load_aligned(memory + vector * kVector<T>);
    const uint32_t* from = words_at(vector);
    return {{from[0], from[1], from[2], from[3]}};
  }
  template <class Visit>
  __device__ void each_element(int count, const Visit& visit) const {
    for (int e = static_cast<int>(threadIdx.x); e < count * classes; e += kBlock) {
      const int r = e / classes, j = e - r * classes;
      visit(r, j, memory[r * pitch + j]);
    }
  }
  template <class Visit>
  __device__ void each_vector(int count, const Visit& visit) const {
    const int whole = count * classes / kVector<T>;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < whole; i += kBlock) visit(i, true);
    if (threadIdx.x == 0 && whole * kVector<T> < count * classes) visit(whole, false);
  }
};

}  // namespace cuda
}  // namespace fused_ops

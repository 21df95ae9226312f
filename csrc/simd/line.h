// A cache line of values in registers of accumulators: loads convert, stores round once or go past the cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "simd/vec.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

inline FUSED_OPS_INLINE void prefetch(const void* p) {  // inlined, or GCC finds that it has no effect
  __builtin_prefetch(p, 0, 2);
}

// For a part of a line at p: a masked load waits for both lines that a whole one would touch.
template <class T>
inline FUSED_OPS_INLINE void prefetch_part(const T* p) {
  prefetch(p), prefetch(reinterpret_cast<const char*>(p) + kLineBytes - 1);
}

// A part of a line, with 0 or `fill` behind it: read or written without touching a byte beyond it.
template <class T>
struct PaddedLine {
  static constexpr int64_t kSize = kLineBytes / static_cast<int64_t>(sizeof(T));
  alignas(kLineBytes) T values[kSize] = {};
  PaddedLine() = default;
  PaddedLine(const T* from, int64_t n) { read_part(values, from, n); }
  PaddedLine(const T* from, int64_t n, T fill) {
    for (T& value : values) value = fill;
    replace_part(values, from, n);
  }
  void write(T* to, int64_t n) const { write_part(values, to, n); }
};

// kSize values of T. Registers hold them in an order of their own, lane j the value element(j): of bfloat16 a register
// takes every second value, which costs one instruction where consecutive ones cost two.
template <class T>
struct Line {
  using A = acc_t<T>;
  using V = vec_t<A>;
  static constexpr int64_t kLane = kVectorBytes / static_cast<int64_t>(sizeof(A));
  static constexpr int64_t kSize = kLineBytes / static_cast<int64_t>(sizeof(T));
  static constexpr int kVectors = static_cast<int>(kSize / kLane);
  static constexpr bool kPairs = std::is_same_v<T, bfloat16_t>;

  V v[kVectors];

  static constexpr int64_t element(int64_t j) {
    if (!kPairs) return j;
    const int64_t k = j / kLane, l = j % kLane;
    return k / 2 * 2 * kLane + 2 * l + k % 2;
  }

  static inline FUSED_OPS_INLINE Line load(const T* p) {
    Line line;
    if constexpr (kPairs) {
      for (int k = 0; k < kVectors; k += 2) {
        const bits_vec b = load_bits<bits_vec>(p + k * kLane);
        line.v[k] = bit_copy<V>(b << 16), line.v[k + 1] = bit_copy<V>(b & 0xffff0000u);
      }
    } else if constexpr (sizeof(T) == 2) {
      for (int k = 0; k < kVectors; ++k) line.v[k] = load_vec(p + k * kLane);
    } else {
      for (int k = 0; k < kVectors; ++k) line.v[k] = load_bits<V>(p + k * kLane);
    }
    return line;
  }

  template <bool kStream>
  inline FUSED_OPS_INLINE void store(T* p) const {
    if constexpr (kPairs) {
      for (int k = 0; k < kVectors; k += 2) put<kStream>(p + k * kLane, pack_bfloat16(v[k], v[k + 1]));
    } else if constexpr (sizeof(T) == 2) {
      put_float16<kStream>(p, v);
    } else {
      for (int k = 0; k < kVectors; ++k) put<kStream>(p + k * kLane, v[k]);
    }
  }

  // n < kSize values, and 0 or `fill` behind them: no byte beyond them is read, or written.
  static inline FUSED_OPS_INLINE Line load_part(const T* p, int64_t n) {
    if constexpr (kMasks)
      return of_bits(load_lanes(p, n, line_bits{}));
    else
      return load(PaddedLine<T>(p, n).values);
  }
  static inline FUSED_OPS_INLINE Line load_part(const T* p, int64_t n, T fill) {
    if constexpr (kMasks && sizeof(T) == 2)
      return of_bits(load_lanes(p, n, bit_copy<line_bits>(vec_t<uint16_t>{} + bit_copy<uint16_t>(fill))));
    else if constexpr (kMasks)
      return of_bits(load_lanes(p, n, bit_copy<line_bits>(V{} + fill)));
    else
      return load(PaddedLine<T>(p, n, fill).values);
  }
  inline FUSED_OPS_INLINE void store_part(T* p, int64_t n) const {
    if constexpr (kMasks) {
      store_lanes(p, n, bits());
    } else {
      PaddedLine<T> out;
      store<false>(out.values);
      out.write(p, n);
    }
  }

  // Both with the values in the registers' order, kSize of them at p.
  static inline FUSED_OPS_INLINE Line load_ordered(const A* p) {
    Line line;
    for (int k = 0; k < kVectors; ++k) line.v[k] = load_bits<V>(p + k * kLane);
    return line;
  }
  inline FUSED_OPS_INLINE void store_ordered(A* p) const {
    for (int k = 0; k < kVectors; ++k) std::memcpy(p + k * kLane, &v[k], sizeof(V));
  }

 private:
  // A whole line, in one register, as it lies in memory.
  static inline FUSED_OPS_INLINE Line of_bits(line_bits b) {
    Line line;
    if constexpr (kPairs) {
      const bits_vec pairs = bit_copy<bits_vec>(b);
      line.v[0] = bit_copy<V>(pairs << 16), line.v[1] = bit_copy<V>(pairs & 0xffff0000u);
    } else if constexpr (sizeof(T) == 2) {
      unpack_float16(b, line.v);
    } else {
      line.v[0] = bit_copy<V>(b);
    }
    return line;
  }
  inline FUSED_OPS_INLINE line_bits bits() const {
    if constexpr (kPairs)
      return bit_copy<line_bits>(pack_bfloat16(v[0], v[1]));
    else if constexpr (sizeof(T) == 2)
      return pack_float16(v);
    else
      return bit_copy<line_bits>(v[0]);
  }
};

// Natural order -> the registers' order, and back; n values, a multiple of a line's.
template <class T, class A>
inline void to_line_order(const A* from, A* to, int64_t n) {
  if constexpr (!Line<T>::kPairs) {
    std::copy_n(from, n, to);
  } else {
    constexpr int64_t kLane = Line<T>::kLane;
    for (int64_t i = 0; i < n; i += 2 * kLane)
      for (int64_t l = 0; l < kLane; ++l) to[i + l] = from[i + 2 * l], to[i + kLane + l] = from[i + 2 * l + 1];
  }
}
template <class T, class A>
inline void from_line_order(const A* from, A* to, int64_t n) {
  if constexpr (!Line<T>::kPairs) {
    std::copy_n(from, n, to);
  } else {
    constexpr int64_t kLane = Line<T>::kLane;
    for (int64_t i = 0; i < n; i += 2 * kLane)
      for (int64_t l = 0; l < kLane; ++l) to[i + 2 * l] = from[i + l], to[i + 2 * l + 1] = from[i + kLane + l];
  }
}

// A bit per value of a line, in natural order: the masks of its lanes in register k, all ones where the bit is set.
template <class T>
struct LineBits {
  using Mask = std::conditional_t<sizeof(T) == 8, wide_bits_vec, bits_vec>;
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static constexpr int64_t kBytes = Line<T>::kSize / 8;

  // n <= kSize of them.
  static inline FUSED_OPS_INLINE Word load(const uint8_t* p, int64_t n) {
    Word word = 0;
    if (n == Line<T>::kSize)
      std::memcpy(&word, p, kBytes);
    else
      std::memcpy(&word, p, static_cast<size_t>((n + 7) / 8));
    return word;
  }
  // b where the bit is set, else a.
  template <class V>
  static inline FUSED_OPS_INLINE V select(Word word, int k, V a, V b) {
    Mask place;
    for (int64_t l = 0; l < Line<T>::kLane; ++l) place[l] = Word{1} << Line<T>::element(k * Line<T>::kLane + l);
    return ((Mask{} + word) & place) != 0 ? b : a;
  }
  // The bits of `not z <= 0`.
  static inline FUSED_OPS_INLINE Word positive(const Line<T>& z) {
    constexpr int64_t kLane = Line<T>::kLane;
    Word word = 0;
    if constexpr (sizeof(T) == 8) {
      for (int k = 0; k < Line<T>::kVectors; ++k)
        for (int64_t l = 0; l < kLane; ++l) word |= static_cast<Word>(!(z.v[k][l] <= 0)) << (k * kLane + l);
    } else if constexpr (Line<T>::kPairs) {
      for (int k = 0; k < Line<T>::kVectors; k += 2) word |= positive_lanes(z.v[k], z.v[k + 1]) << (k * kLane);
    } else {
      for (int k = 0; k < Line<T>::kVectors; ++k) word |= positive_lanes(z.v[k]) << (k * kLane);
    }
    return word;
  }
  // The first n <= kSize bits.
  static inline FUSED_OPS_INLINE void store(Word word, int64_t n, uint8_t* p) {
    if (n == Line<T>::kSize) {
      std::memcpy(p, &word, kBytes);
    } else {
      word &= (Word{1} << n) - 1;
      std::memcpy(p, &word, static_cast<size_t>((n + 7) / 8));
    }
  }
};

// A coefficient of a run: the same for all its values, or one for each, in the registers' order.
template <class T>
struct Spread {
  typename Line<T>::V value;
  explicit Spread(acc_t<T> v) : value(typename Line<T>::V{} + v) {}
  typename Line<T>::V at(int64_t) const { return value; }
};
template <class T>
struct Ordered {
  const acc_t<T>* values;
  explicit Ordered(const acc_t<T>* v) : values(v) {}
  typename Line<T>::V at(int64_t i) const { return load_bits<typename Line<T>::V>(values + i); }
};

// How many of the n values at `to` lie before the first whole line of memory.
template <class T>
inline int64_t values_before_line(const T* to, int64_t n) {
  const int64_t over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLineBytes);
  return over == 0 ? 0 : std::min(n, (kLineBytes - over) / static_cast<int64_t>(sizeof(T)));
}

// Whether there are non-temporal stores: NEON's are a hint, for pairs of registers.
#if defined(__SSE2__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif
// n values from a buffer to memory, whole lines by non-temporal stores.
template <class T>
void stream_values(const T* from, T* to, int64_t n) {
  constexpr int64_t kLane = kVectorBytes / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kSize = kLineBytes / static_cast<int64_t>(sizeof(T));
  int64_t i = values_before_line(to, n);
  std::memcpy(to, from, static_cast<size_t>(i) * sizeof(T));
  for (; i + kSize <= n; i += kSize)
    for (int64_t k = 0; k < kSize; k += kLane) put<true>(to + i + k, load_bits<bits_vec>(from + i + k));
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

// Element types as the kernels see them: a tag for the POD argument structs, and the accumulator each type computes in.
#pragma once
#include <cstdint>

namespace fused_ops {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

enum class TargetType : int32_t { int64, int32, int16, int8, uint8 };

// Storage-only 16-bit floats: kernels convert them to float as they load and round once as they store.
struct bfloat16_t {
  uint16_t bits;
};
struct float16_t {
  uint16_t bits;
};

template <class T>
struct acc {
  using type = float;
};
template <>
struct acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename acc<T>::type;

}  // namespace fused_ops

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

// The one choice of a template's instance by dtype: f(TypeOf<T>()) for the T of `dtype`. Inlined, so that nothing of it
// is shared between the instruction sets.
template <class T>
struct TypeOf {
  using type = T;
};
template <class F>
__attribute__((always_inline)) inline auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(TypeOf<double>());
    case DType::bfloat16: return f(TypeOf<bfloat16_t>());
    case DType::float16: return f(TypeOf<float16_t>());
    default: return f(TypeOf<float>());
  }
}
// The same of a dtype that is computed in float: not float64, of which no instance is made.
template <class F>
__attribute__((always_inline)) inline auto with_float_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bfloat16: return f(TypeOf<bfloat16_t>());
    case DType::float16: return f(TypeOf<float16_t>());
    default: return f(TypeOf<float>());
  }
}

}  // namespace fused_ops

// A register of 16 bytes with AArch64's instructions; what each function does is said in simd/vec_generic.h. There is
// no store past the cache (STNP is a hint, for pairs), and the plain exponential, maximum and masks compile to what
// intrinsics would say.
#pragma once
#include <arm_neon.h>

#include "simd/vec_generic.h"

namespace fused_ops {
namespace FUSED_OPS_ISA {

using generic::exp_scaled;
using generic::exp_vec;
using generic::finish_streaming;
using generic::kAlternates;
using generic::kExpUnit;
using generic::kMasks;
using generic::line_bits;
using generic::load_tail;
using generic::load_transposed;
using generic::max_vec;
using generic::pack_bfloat16;
using generic::put;
using generic::read_part;
using generic::replace_part;
using generic::round_to_bfloat16;
using generic::write_part;

inline FUSED_OPS_INLINE float_vec multiply_add(float_vec a, float_vec b, float_vec c) {
  return bit_copy<float_vec>(vfmaq_f32(bit_copy<float32x4_t>(c), bit_copy<float32x4_t>(a), bit_copy<float32x4_t>(b)));
}
inline FUSED_OPS_INLINE double_vec multiply_add(double_vec a, double_vec b, double_vec c) {
  return bit_copy<double_vec>(vfmaq_f64(bit_copy<float64x2_t>(c), bit_copy<float64x2_t>(a), bit_copy<float64x2_t>(b)));
}

inline float_vec load_vec(const bfloat16_t* p) {
  return bit_copy<float_vec>(vshll_n_u16(load_bits<uint16x4_t>(p), 16));
}
inline float_vec load_vec(const float16_t* p) { return bit_copy<float_vec>(vcvt_f32_f16(load_bits<float16x4_t>(p))); }
// The sum's upper halves, of which NaN's are put right behind.
inline void store_vec(bfloat16_t* p, float_vec v) {
  const uint32x4_t u = bit_copy<uint32x4_t>(v);
  const uint32x4_t half = vaddq_u32(vdupq_n_u32(0x7fff), vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1)));
  const uint16x4_t number = vmovn_u32(vceqq_f32(bit_copy<float32x4_t>(v), bit_copy<float32x4_t>(v)));
  const uint16x4_t out = vbsl_u16(number, vaddhn_u32(u, half), vdup_n_u16(0x7fc0));
  std::memcpy(p, &out, sizeof(out));
}
inline void store_vec(float16_t* p, float_vec v) {
  const float16x4_t out = vcvt_f16_f32(bit_copy<float32x4_t>(v));
  std::memcpy(p, &out, sizeof(out));
}

inline float reduce_add(float_vec v) {
  const float32x4_t f = bit_copy<float32x4_t>(v);
  return vaddv_f32(vadd_f32(vget_low_f32(f), vget_high_f32(f)));
}
inline float reduce_max(float_vec v) { return vmaxvq_f32(bit_copy<float32x4_t>(v)); }

inline float_vec permute(float_vec v, int_vec index) {  // by bytes: 4 index + 0, 1, 2, 3
  const bits_vec bytes = bit_copy<bits_vec>(index) * 0x04040404u + 0x03020100u;
  return bit_copy<float_vec>(vqtbl1q_u8(bit_copy<uint8x16_t>(v), bit_copy<uint8x16_t>(bytes)));
}

inline DoublePair widen(float_vec v) {
  const float32x4_t f = bit_copy<float32x4_t>(v);
  return {bit_copy<double_vec>(vcvt_f64_f32(vget_low_f32(f))), bit_copy<double_vec>(vcvt_high_f64_f32(f))};
}
inline DoublePair widen_at(const float* p) { return widen(load_bits<float_vec>(p)); }

template <bool kStream>
inline FUSED_OPS_INLINE void put_float16(float16_t* p, const float_vec* v) {
  for (int64_t k = 0; k < kLineBytes / 2 / kWidth; ++k) store_vec(p + k * kWidth, v[k]);
}

inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec v) {
  const uint32_t bit_of_lane[] = {1, 2, 4, 8};
  const uint32x4_t not_positive = vcleq_f32(bit_copy<float32x4_t>(v), vdupq_n_f32(0));
  return vaddvq_u32(vbicq_u32(vld1q_u32(bit_of_lane), not_positive));
}
inline FUSED_OPS_INLINE uint32_t positive_lanes(float_vec first, float_vec second) {
  const uint32_t bit_of_lane[] = {1, 4, 16, 64};
  const uint32x4_t place = vld1q_u32(bit_of_lane), zero = bit_copy<uint32x4_t>(vdupq_n_f32(0));
  const auto bits = [&](float_vec v) FUSED_OPS_INLINE {
    return vbicq_u32(place, vcleq_f32(bit_copy<float32x4_t>(v), bit_copy<float32x4_t>(zero)));
  };
  return vaddvq_u32(vorrq_u32(bits(first), vshlq_n_u32(bits(second), 1)));
}

}  // namespace FUSED_OPS_ISA
}  // namespace fused_ops

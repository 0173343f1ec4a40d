// Sums of a product, written in the dtype of its inputs; knows nothing of how they came about.
#pragma once

#include <cstring>

#include "kernels.hpp"
#include "lanes.hpp"

namespace AQ_ISA {

typedef uint16_t QuadHalves __attribute__((vector_size(8)));

AQ_INLINE QuadHalves to_bfloat16(Quad x) {
  typedef uint32_t QuadWords __attribute__((vector_size(16)));
  const QuadWords bits = (QuadWords)x;
  return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, QuadHalves);
}

AQ_INLINE QuadHalves to_float16(Quad x) {
  QuadHalves halves;
#if defined(__F16C__)
  _mm_storel_epi64((__m128i*)&halves, _mm_cvtps_ph((__m128)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int k = 0; k < 4; k++) halves[k] = to_float16(x[k]);
#endif
  return halves;
}

// A copy of a size that is known is one instruction.
template <class Value, class Four>
AQ_INLINE void copy_some(Value* to, Four from, int64_t some) {
  if (some == 4) return (void)std::memcpy(to, &from, sizeof from);
  for (int k = 0; k < some; k++) to[k] = from[k];
}

// The first `some` of four sums, to the places from `at` on.
AQ_INLINE void write_sums(const Product& ask, int64_t at, Quad sums, int64_t some) {
  if (ask.dtype == FLOAT32) return copy_some((float*)ask.y + at, sums, some);
  copy_some((uint16_t*)ask.y + at, ask.dtype == BFLOAT16 ? to_bfloat16(sums) : to_float16(sums), some);
}

}  // namespace AQ_ISA

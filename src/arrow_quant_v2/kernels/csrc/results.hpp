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

// The first `some` of four sums, to the places from `at` on.
AQ_INLINE void write_sums(const Product& ask, int64_t at, Quad sums, int64_t some = 4) {
  if (ask.dtype == FLOAT32) return (void)std::memcpy((float*)ask.y + at, &sums, some * sizeof(float));
  const QuadHalves halves = ask.dtype == BFLOAT16 ? to_bfloat16(sums) : to_float16(sums);
  std::memcpy((uint16_t*)ask.y + at, &halves, some * sizeof(uint16_t));
}

}  // namespace AQ_ISA

// Products of bytes, added in words of 32 bits, on any instruction set; knows nothing of groups.
#pragma once

#include "words.hpp"

namespace AQ_ISA {

constexpr int64_t VECTOR_BYTES = 4 * WIDTH;

typedef int32_t AnyWords __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));

AQ_INLINE WordPart load_bytes(const void* p) { return *(const AnyWords*)p; }
AQ_INLINE FloatPart load_part(const float* p) { return *(const AnyFloats*)p; }

#if defined(__AVX512F__)
AQ_INLINE WordPart products_of_pairs(WordPart codes, WordPart x) {
  return (WordPart)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
}
AQ_INLINE WordPart add_pairs(WordPart a, WordPart b) { return (WordPart)_mm512_add_epi16((__m512i)a, (__m512i)b); }
AQ_INLINE WordPart multiply_pairs(WordPart a, WordPart b) {
  return (WordPart)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
AQ_INLINE WordPart high_bytes(WordPart x) { return (WordPart)_mm512_srai_epi16((__m512i)x, 8); }
AQ_INLINE WordPart low_bytes(WordPart x) {
  return (WordPart)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
}
AQ_INLINE WordPart high_codes(WordPart x) { return (WordPart)_mm512_srli_epi16((__m512i)x, 8); }
#elif defined(__AVX2__)
AQ_INLINE WordPart products_of_pairs(WordPart codes, WordPart x) {
  return (WordPart)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
}
AQ_INLINE WordPart add_pairs(WordPart a, WordPart b) { return (WordPart)_mm256_add_epi16((__m256i)a, (__m256i)b); }
AQ_INLINE WordPart multiply_pairs(WordPart a, WordPart b) {
  return (WordPart)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
AQ_INLINE WordPart high_bytes(WordPart x) { return (WordPart)_mm256_srai_epi16((__m256i)x, 8); }
AQ_INLINE WordPart low_bytes(WordPart x) {
  return (WordPart)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
}
AQ_INLINE WordPart high_codes(WordPart x) { return (WordPart)_mm256_srli_epi16((__m256i)x, 8); }
#endif

// Codes and inputs by plane; a word of the result is the sum over four bytes of every plane. `mask` is what of a code
// counts. Two products of codes of up to 4 bits fit in 16 bits, and so do the sums of all planes: 4 * 2 * 3 * 128 and
// 2 * 2 * 15 * 128. Those of 8 bits do not, and saturate; they are multiplied in 16 bits.
template <int BITS>
AQ_INLINE WordPart dots(WordPart codes, int mask, const int8_t* x) {
  constexpr int PLANES = 8 / BITS;
  const auto plane = [&](int k) { return (codes >> BITS * k) & (int)(mask * 0x01010101u); };
  WordPart sum{};
#if defined(__AVX512VNNI__)
  for (int k = 0; k < PLANES; k++)
    sum = (WordPart)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)plane(k), (__m512i)load_bytes(x + k * VECTOR_BYTES));
#elif defined(__AVX2__)
  if (BITS == 8) {
    const WordPart all = plane(0), inputs = load_bytes(x);
    sum = multiply_pairs(all & 0x00FF00FF, low_bytes(inputs)) + multiply_pairs(high_codes(all), high_bytes(inputs));
  } else {
    sum = products_of_pairs(plane(0), load_bytes(x));
    for (int k = 1; k < PLANES; k++)
      sum = add_pairs(sum, products_of_pairs(plane(k), load_bytes(x + k * VECTOR_BYTES)));
    sum = multiply_pairs(sum, WordPart{} + 0x00010001);
  }
#else
  for (int k = 0; k < PLANES; k++) {
    const WordPart inputs = load_bytes(x + k * VECTOR_BYTES), some = plane(k);
    for (int j = 0; j < 4; j++) sum += ((some >> 8 * j) & 255) * ((inputs << (24 - 8 * j)) >> 24);
  }
#endif
  return sum;
}

AQ_INLINE FloatPart to_float_part(WordPart a) { return __builtin_convertvector(a, FloatPart); }

// Four lanes of each of the floats from p on.
AQ_INLINE FloatPart quads(const float* p) {
#if defined(__AVX512F__)
  const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (FloatPart)_mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_loadu_ps(p)));
#elif defined(__AVX2__)
  return (FloatPart)_mm256_blend_ps(_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1), 0xF0);
#else
  return *p - FloatPart{};
#endif
}

// All lanes, added in halves.
AQ_INLINE float fold_part(FloatPart a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a);
#else
  float lanes[WIDTH];
  std::memcpy(lanes, &a, sizeof a);
  for (int half = WIDTH / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

}  // namespace AQ_ISA

// Sixteen whole numbers as one value, as codes come out of their bytes; knows nothing of grids.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.hpp"

namespace AQ_ISA {

typedef int32_t WordPart __attribute__((vector_size(WIDTH * 4)));

struct Words {
  WordPart part[PARTS];
};

AQ_INLINE Words operator>>(Words a, int count) {
  for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] >> count;
  return a;
}
AQ_INLINE Words operator&(Words a, int mask) {
  for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] & mask;
  return a;
}
AQ_INLINE Lanes to_floats(Words a) { AQ_EACH(__builtin_convertvector(a.part[i], FloatPart)) }

// Sixteen bytes, each in the low bits of its lane.
AQ_INLINE Words widen(const uint8_t* p) {
  Words out;
#if defined(__AVX512F__)
  out.part[0] = (WordPart)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  for (int i = 0; i < PARTS; i++) out.part[i] = (WordPart)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
#else
  typedef uint8_t FourBytes __attribute__((vector_size(4)));
  for (int i = 0; i < PARTS; i++) {
    FourBytes four;
    std::memcpy(&four, p + 4 * i, 4);
    out.part[i] = __builtin_convertvector(four, WordPart);
  }
#endif
  return out;
}

// Four floats, from which every lane takes the one that its two lowest bits name.
struct Table {
#if defined(__AVX2__)
  FloatPart four;  // again and again
#else
  Quad four;
#endif
};

AQ_INLINE Table table_of(Quad four) {
#if defined(__AVX512F__)
  return {(FloatPart)_mm512_broadcast_f32x4((__m128)four)};
#elif defined(__AVX2__)
  return {(FloatPart)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)four), (__m128)four, 1)};
#else
  return {four};
#endif
}

AQ_INLINE FloatPart pick_part(Table table, WordPart which) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_permutevar_ps((__m512)table.four, (__m512i)which);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_permutevar_ps((__m256)table.four, (__m256i)which);
#elif defined(__aarch64__)
  const WordPart bytes = (which & 3) * 0x04040404 + 0x03020100;  // of the float that is named
  return (FloatPart)vqtbl1q_u8((uint8x16_t)table.four, (uint8x16_t)bytes);
#else
  FloatPart out;
  for (int i = 0; i < WIDTH; i++) out[i] = table.four[which[i] & 3];
  return out;
#endif
}
AQ_INLINE Lanes pick(Table table, Words which) { AQ_EACH(pick_part(table, which.part[i])) }

// a * b + c; rounded once where the processor does that in one instruction.
AQ_INLINE FloatPart product_part(FloatPart a, FloatPart b, FloatPart c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fused(a, b, c);
#else
  return a * b + c;
#endif
}
AQ_INLINE Lanes add_product(Lanes a, Lanes b, Lanes c) { AQ_EACH(product_part(a.part[i], b.part[i], c.part[i])) }

}  // namespace AQ_ISA

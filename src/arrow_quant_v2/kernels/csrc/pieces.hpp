// Floats as sums of two bfloat16, and codes as bfloat16, thirty-two at a time; knows nothing of products.
//
// A float is hi + lo to within 2^-18 of itself; a bfloat16 is its own hi, and a code of 2 or 4 bits too.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define AQ_PIECES 1

#include <immintrin.h>

#include <vector>

#include "kernels.hpp"
#include "levels.hpp"

namespace AQ_ISA {

constexpr int64_t CHUNK = 32;  // bfloat16 of a vector

static inline int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

// Whether every chunk of a row lies in one group.
static inline bool in_whole_chunks(const Product& ask) { return ask.of.group % CHUNK == 0 || ask.of.groups == 1; }

// bfloat16 inputs have no lo.
static inline int pieces_of(Dtype dtype) { return dtype == BFLOAT16 ? 1 : 2; }

struct Pieces {
  __m256i hi, lo;
};

AQ_INLINE Pieces pieces(__m512 x) {
  const __m256i hi = (__m256i)_mm512_cvtneps_pbh(x);
  const __m512 left = x - _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
  constexpr int NAN_OR_INFINITE = 0x01 | 0x08 | 0x10 | 0x80;  // of which nothing is left, as hi says it all
  const __mmask16 some = _knot_mask16(_mm512_fpclass_ps_mask(left, NAN_OR_INFINITE));
  return {hi, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(some, left))};
}

// Whole chunks of floats to their pieces; lo may be null.
static inline void to_pieces(const float* from, int64_t chunks, uint16_t* hi, uint16_t* lo) {
  for (int64_t i = 0; i < chunks * CHUNK; i += 16) {
    const Pieces both = pieces(_mm512_loadu_ps(from + i));
    _mm256_storeu_si256((__m256i*)(hi + i), both.hi);
    if (lo) _mm256_storeu_si256((__m256i*)(lo + i), both.lo);
  }
}

static inline void from_pieces(const uint16_t* hi, const uint16_t* lo, int64_t chunks, float* to) {
  for (int64_t i = 0; i < chunks * CHUNK; i += LANES) store(to + i, load_bfloat16(hi + i) + load_bfloat16(lo + i));
}

// The codes of a chunk, each in the low bits of 16; what is above 5 bits of 2, or of 4, is not theirs.
template <int BITS>
struct Spread {
  __m512i order;

  Spread() {
    alignas(64) uint8_t bits[64];
    for (int i = 0; i < 64; i++) bits[i] = (uint8_t)(i / 2 * BITS % 64);
    order = _mm512_load_si512(bits);
  }
  AQ_INLINE_MEMBER __m512i operator()(const uint8_t* codes) const {
    int64_t words[2];
    std::memcpy(words, codes, BITS * 4);
    const __m512i first = _mm512_set1_epi64(words[0]);
    if (BITS == 2) return _mm512_multishift_epi64_epi8(order, first);
    return _mm512_multishift_epi64_epi8(order, _mm512_mask_set1_epi64(first, 0xF0, words[1]));
  }
};

template <>
struct Spread<8> {
  AQ_INLINE_MEMBER __m512i operator()(const uint8_t* codes) const {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
  }
};

// bfloat16 of f(0) to f(31), to be picked by the low 5 bits.
template <class Function>
static inline __m512i bfloat16_table(Function f) {
  alignas(64) float values[CHUNK];
  alignas(64) uint16_t table[CHUNK];
  for (int i = 0; i < CHUNK; i++) values[i] = (float)f(i);
  to_pieces(values, 1, table, nullptr);
  return _mm512_load_si512(table);
}

// Inputs for codes that are read 64 bytes at a time, code k of every 16 bits for chunk k of n: (32, n) to (n, 32), for as
// many whole times n chunks as there are columns.
static inline void weave(uint16_t* row, int64_t columns, int64_t n, std::vector<uint16_t>& copy) {
  if (n == 1) return;
  copy.assign(row, row + columns / (n * CHUNK) * n * CHUNK);
  for (int64_t start = 0; start + n * CHUNK <= columns; start += n * CHUNK)
    for (int64_t k = 0; k < n; k++)
      for (int64_t i = 0; i < CHUNK; i++) row[start + k * CHUNK + i] = copy[start + i * n + k];
}

}  // namespace AQ_ISA

#endif

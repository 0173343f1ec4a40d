// Floats as sums of two bfloat16, and codes of 2 and 4 bits, thirty-two at a time; knows nothing of products.
//
// A float is hi + lo to within 2^-18 of itself; a bfloat16 is its own hi.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include <immintrin.h>

#include <cstring>

#include "kernels.hpp"
#include "lanes.hpp"

namespace AQ_ISA {

constexpr int64_t CHUNK = 32;  // bfloat16 of a vector

// Whether every chunk of a row lies in one group.
static inline bool in_whole_chunks(const Product& ask) { return ask.of.group % CHUNK == 0 || ask.of.groups == 1; }

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

// Inputs for codes that are read 64 bytes at a time, code k of every 16 bits for chunk k of N: (32, N) to (N, 32), for as
// many whole times N chunks as there are columns.
template <int N>
static inline void weave(uint16_t* row, int64_t columns) {
  alignas(64) uint16_t places[CHUNK];
  for (int i = 0; i < CHUNK; i++) places[i] = (uint16_t)(i * N % 64);
  const __m512i first = _mm512_load_si512(places);
  for (int64_t start = 0; start + N * CHUNK <= columns; start += N * CHUNK) {
    __m512i in[N];
    for (int i = 0; i < N; i++) in[i] = _mm512_loadu_si512(row + start + i * CHUNK);
    for (int k = 0; k < N; k++) {
      const __m512i from = _mm512_add_epi16(first, _mm512_set1_epi16((int16_t)k));
      __m512i out = {};
      for (int j = 0; j < N / 2; j++) {  // of two vectors, 64 / N are for this chunk
        const __mmask32 lanes = (__mmask32)(((1ull << 64 / N) - 1) << j * (64 / N));
        out = _mm512_mask_mov_epi16(out, lanes, _mm512_permutex2var_epi16(in[2 * j], from, in[2 * j + 1]));
      }
      _mm512_storeu_si512(row + start + k * CHUNK, out);
    }
  }
}

}  // namespace AQ_ISA

#endif

// CRC-32 as in zlib (reflected polynomial 0xEDB88320), by carry-less multiplication where the processor has it.
//
// Four 128-bit remainders are folded over 64 bytes a step, then into one, then reduced (Barrett): V. Gopal et al.,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009; the constants are that
// paper's for this polynomial. Elsewhere, and for the last bytes, a table of 256 steps byte by byte, or the ARMv8
// instruction. Measured: python bench/kernels.py.
#include <array>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t x = byte;
    for (int bit = 0; bit < 8; bit++) x = x & 1 ? (x >> 1) ^ 0xEDB88320u : x >> 1;
    table[byte] = x;
  }
  return table;
}
constexpr std::array<uint32_t, 256> TABLE = make_table();

uint32_t by_bytes(uint32_t crc, const uint8_t* p, int64_t n) {
  for (int64_t i = 0; i < n; i++) crc = TABLE[(crc ^ p[i]) & 255] ^ (crc >> 8);
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i x, __m128i constants, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(x, constants, 0x00), high = _mm_clmulepi64_si128(x, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// n is a multiple of 16, at least 64.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t crc, const uint8_t* p, int64_t n) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i last = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i evens = _mm_setr_epi32(~0, 0, ~0, 0);
  const __m128i* at = (const __m128i*)p;
  __m128i a = _mm_xor_si128(_mm_loadu_si128(at), _mm_cvtsi32_si128((int)crc)), b = _mm_loadu_si128(at + 1);
  __m128i c = _mm_loadu_si128(at + 2), d = _mm_loadu_si128(at + 3);
  for (at += 4, n -= 64; n >= 64; at += 4, n -= 64) {
    a = fold(a, by_64, _mm_loadu_si128(at));
    b = fold(b, by_64, _mm_loadu_si128(at + 1));
    c = fold(c, by_64, _mm_loadu_si128(at + 2));
    d = fold(d, by_64, _mm_loadu_si128(at + 3));
  }
  a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
  for (; n >= 16; at++, n -= 16) a = fold(a, by_16, _mm_loadu_si128(at));
  a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_16, 0x10));
  a = _mm_xor_si128(_mm_srli_si128(a, 4), _mm_clmulepi64_si128(_mm_and_si128(a, evens), last, 0x00));
  __m128i q = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(a, evens), barrett, 0x10), evens);
  q = _mm_clmulepi64_si128(q, barrett, 0x00);
  return (uint32_t)_mm_extract_epi32(_mm_xor_si128(a, q), 1);
}
#endif

}  // namespace

// Whether this processor does better than the tables of zlib, which the caller has too.
AQ_EXPORT int aq_has_fast_crc32() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#elif defined(__ARM_FEATURE_CRC32)
  return 1;
#else
  return 0;
#endif
}

// The checksum of what came before, or 0, and n more bytes.
AQ_EXPORT uint32_t aq_crc32(uint32_t before, const uint8_t* p, int64_t n) {
  uint32_t crc = ~before;
#if defined(__x86_64__)
  if (n >= 64 && aq_has_fast_crc32()) {
    const int64_t folded = n / 16 * 16;
    crc = by_folding(crc, p, folded);
    p += folded;
    n -= folded;
  }
#elif defined(__ARM_FEATURE_CRC32)
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    crc = __crc32d(crc, word);
  }
#endif
  return ~by_bytes(crc, p, n);
}

// Sixteen floats as one value, on any instruction set; knows nothing of quantization.
//
// Every kernel adds in eight lanes, or in sixteen that become eight, and folds them in one fixed order, so that AVX-512,
// AVX2, NEON and the portable build give the same bits. Needs -ffp-contract=off: a multiply-add is fused where
// multiply_add says so and nowhere else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Else GCC, once there are many callers, calls what is one instruction.
#define AQ_INLINE __attribute__((always_inline)) static inline
#define AQ_INLINE_MEMBER __attribute__((always_inline)) inline

namespace AQ_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;

typedef float FloatPart __attribute__((vector_size(WIDTH * 4)));
// A memcpy of all sixteen would go through the stack in pieces that cannot be forwarded to wider loads.
typedef float AnyFloats __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

struct Lanes {
  FloatPart part[PARTS];
};

#define AQ_EACH(expression)                       \
  Lanes out;                                      \
  for (int i = 0; i < PARTS; i++) out.part[i] = expression; \
  return out;

AQ_INLINE Lanes fill(float x) { AQ_EACH(x - FloatPart{}) }  // a sum would turn -0 into 0
AQ_INLINE Lanes operator+(Lanes a, Lanes b) { AQ_EACH(a.part[i] + b.part[i]) }
AQ_INLINE Lanes operator-(Lanes a, Lanes b) { AQ_EACH(a.part[i] - b.part[i]) }
AQ_INLINE Lanes operator*(Lanes a, Lanes b) { AQ_EACH(a.part[i] * b.part[i]) }
AQ_INLINE Lanes operator/(Lanes a, Lanes b) { AQ_EACH(a.part[i] / b.part[i]) }

// The x86 instruction returns its second operand for NaN; so does this expression everywhere else.
AQ_INLINE FloatPart min_part(FloatPart a, FloatPart b) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (FloatPart)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
AQ_INLINE FloatPart max_part(FloatPart a, FloatPart b) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (FloatPart)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
AQ_INLINE Lanes min(Lanes a, Lanes b) { AQ_EACH(min_part(a.part[i], b.part[i])) }
AQ_INLINE Lanes max(Lanes a, Lanes b) { AQ_EACH(max_part(a.part[i], b.part[i])) }

// a * b + c, rounded once.
AQ_INLINE FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (FloatPart)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < WIDTH; i++) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}
AQ_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { AQ_EACH(fused(a.part[i], b.part[i], c.part[i])) }

AQ_INLINE Lanes load(const float* p) { AQ_EACH(*(const AnyFloats*)(p + i * WIDTH)) }
AQ_INLINE void store(float* p, Lanes a) {
  for (int i = 0; i < PARTS; i++) *(AnyFloats*)(p + i * WIDTH) = a.part[i];
}

// Half to even for |x| < 2^22: around 1.5 * 2^23 the numbers of float are the whole ones.
constexpr float ROUNDER = 12582912.0f;
AQ_INLINE Lanes shift_to_code(Lanes x) { return x + fill(ROUNDER); }
AQ_INLINE Lanes code_of(Lanes shifted) { return shifted - fill(ROUNDER); }

// A running sum: sixteen columns are added in pairs, lane i and lane i + 8, and then to eight lanes.
constexpr int SUM_WIDTH = WIDTH < 8 ? WIDTH : 8;
constexpr int SUM_PARTS = 8 / SUM_WIDTH;
typedef float SumPart __attribute__((vector_size(SUM_WIDTH * 4)));
typedef float Quad __attribute__((vector_size(16)));
struct Total {
  SumPart part[SUM_PARTS];
};

AQ_INLINE Total nothing() { return Total{}; }
AQ_INLINE Total pairs(Lanes a) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a.part[0];
  return Total{{(SumPart)(_mm512_castps512_ps256(x) + _mm512_extractf32x8_ps(x, 1))}};
#elif defined(__AVX2__)
  return Total{{a.part[0] + a.part[1]}};
#else
  return Total{{a.part[0] + a.part[2], a.part[1] + a.part[3]}};
#endif
}
AQ_INLINE Total operator+(Total a, Total b) {
  for (int i = 0; i < SUM_PARTS; i++) a.part[i] = a.part[i] + b.part[i];
  return a;
}
// a * factor + c, rounded once.
AQ_INLINE Total multiply_add(Total a, float factor, Total c) {
#if defined(__AVX2__)
  c.part[0] = (SumPart)_mm256_fmadd_ps((__m256)a.part[0], _mm256_set1_ps(factor), (__m256)c.part[0]);
#else
  for (int i = 0; i < SUM_PARTS; i++) c.part[i] = fused(a.part[i], factor - FloatPart{}, c.part[i]);
#endif
  return c;
}

template <class Join>
AQ_INLINE Quad halve(Total a, Join join) {
#if defined(__AVX2__)
  return (Quad)join(_mm256_castps256_ps128((__m256)a.part[0]), _mm256_extractf128_ps((__m256)a.part[0], 1));
#else
  return join(a.part[0], a.part[1]);
#endif
}

// Eight lanes to one in halves: lane i meets lane i + 4, i + 2, i + 1.
AQ_INLINE float fold(Total a) {
  const Quad x = halve(a, [](auto l, auto r) { return l + r; });
#if defined(__SSE3__)
  const __m128 pair = _mm_add_ps((__m128)x, _mm_movehl_ps((__m128)x, (__m128)x));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// Three sums at once, {fold(a), fold(b), fold(c), 0}, in double: one addition of columns is cheaper than three folds.
typedef double Sums __attribute__((vector_size(32)));

AQ_INLINE Sums fold_three(Total a, Total b, Total c) {
#if defined(__SSE2__)
  const auto add = [](auto l, auto r) { return l + r; };
  __m128 x = (__m128)halve(a, add), y = (__m128)halve(b, add), z = (__m128)halve(c, add), none = _mm_setzero_ps();
  _MM_TRANSPOSE4_PS(x, y, z, none);
  return __builtin_convertvector((Quad)((x + z) + (y + none)), Sums);
#else
  return Sums{fold(a), fold(b), fold(c), 0.0};
#endif
}

// Sixteen lanes to four, for what does not depend on the order.
template <class Join>
AQ_INLINE Quad to_quad(Lanes a, Join join) {
#if defined(__AVX512F__)
  const __m256 x = join(_mm512_castps512_ps256((__m512)a.part[0]), _mm512_extractf32x8_ps((__m512)a.part[0], 1));
  return (Quad)join(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#elif defined(__AVX2__)
  const __m256 x = join((__m256)a.part[0], (__m256)a.part[1]);
  return (Quad)join(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#else
  return join(join(a.part[0], a.part[2]), join(a.part[1], a.part[3]));
#endif
}

AQ_INLINE Quad least_four(Lanes a) {
  return to_quad(a, [](auto l, auto r) { return l < r ? l : r; });
}
AQ_INLINE Quad greatest_four(Lanes a) {
  return to_quad(a, [](auto l, auto r) { return l > r ? l : r; });
}
AQ_INLINE void store_quad(float* p, Quad x) { std::memcpy(p, &x, sizeof x); }

// Sixteen codes as bytes. After adding ROUNDER a whole number stands in the low bits, above those of ROUNDER itself.
typedef uint8_t Codes __attribute__((vector_size(16)));
constexpr int32_t ROUNDER_BITS = 0x4B400000;

// What lies below 0 or above 255 becomes 0 or 255.
AQ_INLINE Codes codes_of(Lanes shifted) {
#if defined(__AVX512F__)
  const __m512i whole = _mm512_sub_epi32(_mm512_castps_si512((__m512)shifted.part[0]), _mm512_set1_epi32(ROUNDER_BITS));
  return (Codes)_mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
#elif defined(__AVX2__)
  const __m256i bits = _mm256_set1_epi32(ROUNDER_BITS);
  const __m256i low = _mm256_sub_epi32(_mm256_castps_si256((__m256)shifted.part[0]), bits);
  const __m256i high = _mm256_sub_epi32(_mm256_castps_si256((__m256)shifted.part[1]), bits);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
  return (Codes)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#elif defined(__aarch64__)
  const int32x4_t bits = vdupq_n_s32(ROUNDER_BITS);
  uint16x4_t words[4];
  for (int i = 0; i < 4; i++) words[i] = vqmovun_s32(vsubq_s32((int32x4_t)shifted.part[i], bits));
  const uint16x8_t low = vcombine_u16(words[0], words[1]), high = vcombine_u16(words[2], words[3]);
  return (Codes)vcombine_u8(vqmovn_u16(low), vqmovn_u16(high));
#else
  int32_t whole[LANES];
  std::memcpy(whole, &shifted, sizeof whole);
  Codes codes;
  for (int i = 0; i < LANES; i++) {
    const int32_t code = whole[i] - ROUNDER_BITS;
    codes[i] = (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
  }
  return codes;
#endif
}

// Sixteen codes packed into 2 * BITS bytes, lowest bits first.
template <int BITS>
AQ_INLINE void store_packed(uint8_t* p, Codes codes) {
#if defined(__SSSE3__)
  const __m128i x = (__m128i)codes;
  if (BITS == 8) {
    _mm_storeu_si128((__m128i*)p, x);
  } else if (BITS == 4) {
    const __m128i pairs = _mm_maddubs_epi16(x, _mm_set1_epi16(0x1001));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(pairs, pairs));
  } else {
    const __m128i pairs = _mm_maddubs_epi16(x, _mm_set1_epi16(0x0401));
    const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));
    const int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(_mm_packs_epi32(fours, fours), fours));
    std::memcpy(p, &packed, 4);
  }
#else
  constexpr int PER_BYTE = 8 / BITS;
  for (int i = 0; i < LANES / PER_BYTE; i++) {
    p[i] = 0;
    for (int j = 0; j < PER_BYTE; j++) p[i] |= (uint8_t)(codes[i * PER_BYTE + j] << BITS * j);
  }
#endif
}

// The same for two times sixteen codes as `codes_of` takes them, of which none goes past `last`.
template <int BITS>
AQ_INLINE void store_packed(uint8_t* p, Lanes a, Lanes b, uint8_t last) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i bits = _mm256_set1_epi32(ROUNDER_BITS);
  const auto whole = [&](FloatPart x) { return _mm256_sub_epi32(_mm256_castps_si256((__m256)x), bits); };
  const __m256i low = _mm256_packus_epi32(whole(a.part[0]), whole(a.part[1]));
  const __m256i high = _mm256_packus_epi32(whole(b.part[0]), whole(b.part[1]));
  // Packing goes by halves: columns 0-3 8-11 16-19 24-27, then 4-7 12-15 20-23 28-31.
  const __m256i x = _mm256_min_epu8(_mm256_packus_epi16(low, high), _mm256_set1_epi8((char)last));
  if (BITS == 8) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(x, order));
  } else if (BITS == 4) {
    const __m256i pairs = _mm256_maddubs_epi16(x, _mm256_set1_epi16(0x1001)), packed = _mm256_packus_epi16(pairs, pairs);
    const __m128i even = _mm256_castsi256_si128(packed), odd = _mm256_extracti128_si256(packed, 1);
    _mm_storeu_si128((__m128i*)p, _mm_unpacklo_epi16(even, odd));
  } else {
    const __m256i pairs = _mm256_maddubs_epi16(x, _mm256_set1_epi16(0x0401));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
    const __m128i even = _mm256_castsi256_si128(fours), odd = _mm256_extracti128_si256(fours, 1);
    const __m128i both = _mm_or_si128(even, _mm_slli_epi32(odd, 8));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi32(both, both));
  }
#else
  const Codes ends = Codes{} + last, x = codes_of(a), y = codes_of(b);
  store_packed<BITS>(p, x < ends ? x : ends);
  store_packed<BITS>(p + 2 * BITS, y < ends ? y : ends);
#endif
}

AQ_INLINE Lanes load_codes(const uint8_t* p) {
  float x[LANES];
#if defined(__AVX512F__)
  Lanes out;
  out.part[0] = (FloatPart)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  return out;
#elif defined(__AVX2__)
  Lanes out;
  for (int i = 0; i < PARTS; i++)
    out.part[i] = (FloatPart)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i))));
  return out;
#endif
  for (int i = 0; i < LANES; i++) x[i] = p[i];
  return load(x);
}

// Sixteen codes that follow each other in packed bytes; no others are read.
template <int BITS>
AQ_INLINE Lanes load_packed(const uint8_t* p) {
  if (BITS == 8) return load_codes(p);
#if defined(__AVX2__)
  typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));
  typedef int32_t Whole __attribute__((vector_size(WIDTH * 4)));  // of which conversion is one instruction
  uint32_t words[2];
  std::memcpy(words, p, 2 * BITS);
  Bits places{};
  for (uint32_t i = 0; i < (uint32_t)WIDTH; i++) places[i] = i * BITS % 32;
  Lanes out;
  for (int i = 0; i < PARTS; i++) {
    Bits all = Bits{} + words[i * WIDTH * BITS / 32];
#if defined(__AVX512F__)
    if (BITS == 4) all = (Bits)_mm512_inserti64x4((__m512i)all, _mm256_set1_epi32((int)words[1]), 1);
#endif
    const Bits codes = all >> (places + i * WIDTH * BITS % 32) & ((1u << BITS) - 1);
    out.part[i] = __builtin_convertvector((Whole)codes, FloatPart);
  }
  return out;
#else
  uint8_t bytes[LANES];
  for (int i = 0; i < LANES; i++) bytes[i] = (uint8_t)(p[i * BITS / 8] >> i * BITS % 8) & ((1 << BITS) - 1);
  return load_codes(bytes);
#endif
}

AQ_INLINE Lanes load_bfloat16(const uint16_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  Lanes out;
  for (int i = 0; i < PARTS; i++) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8 * i)));
    out.part[i] = (FloatPart)_mm256_slli_epi32(wide, 16);
  }
  return out;
#elif defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  Lanes out;
  out.part[0] = (FloatPart)_mm512_slli_epi32(wide, 16);
  return out;
#else
  float x[LANES];
  for (int i = 0; i < LANES; i++) {
    const uint32_t bits = (uint32_t)p[i] << 16;
    std::memcpy(&x[i], &bits, 4);
  }
  return load(x);
#endif
}

AQ_INLINE void store_bfloat16(uint16_t* p, Lanes a) {
  typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
  for (int i = 0; i < PARTS; i++) {
    const Words bits = (Words)a.part[i], half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)half));
#elif defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)half), high = _mm256_extracti128_si256((__m256i)half, 1);
    _mm_storeu_si128((__m128i*)(p + i * WIDTH), _mm_packus_epi32(low, high));
#else
    typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
    *(Halves*)(p + i * WIDTH) = __builtin_convertvector(half, Halves);
#endif
  }
}

// IEEE half to float: the exponent is re-biased by a multiplication, which also normalises subnormals.
AQ_INLINE Lanes load_float16(const uint16_t* p) {
#if defined(__F16C__)
  float x[LANES];
  _mm256_storeu_ps(x, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
  _mm256_storeu_ps(x + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
  return load(x);
#else
  float x[LANES];
  for (int i = 0; i < LANES; i++) {
    const uint32_t magnitude = (uint32_t)(p[i] & 0x7FFF) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((p[i] & 0x7C00) == 0x7C00) bits |= 0x7F800000;
    bits |= (uint32_t)(p[i] & 0x8000) << 16;
    std::memcpy(&x[i], &bits, 4);
  }
  return load(x);
#endif
}

// Float to IEEE half, half to even; too large becomes infinity, NaN stays NaN.
AQ_INLINE uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits >= 0x47800000) return (uint16_t)(sign | (bits > 0x7F800000 ? 0x7E00 : 0x7C00));
  if (bits < 0x38800000) {  // subnormal: adding 2^-1 leaves the rounded half in the low bits
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return (uint16_t)(sign | (bits - 0x3F000000));
  }
  return (uint16_t)(sign | ((bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13));
}

AQ_INLINE void store_float16(uint16_t* p, Lanes a) {
  float x[LANES];
  store(x, a);
#if defined(__F16C__)
  for (int i = 0; i < LANES; i += 8)
    _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; i++) p[i] = to_float16(x[i]);
#endif
}

// Rows (count, columns) to a tile (columns, 16), in which rows that are missing at the end are zeros.
template <class Item>
void to_tile(const Item* rows, int64_t count, int64_t columns, Item* tile) {
  for (int64_t i = 0; i < LANES; i++)
    for (int64_t t = 0; t < columns; t++) tile[t * LANES + i] = i < count ? rows[i * columns + t] : (Item)0;
}

// And back, without those that are missing.
template <class Item>
void from_tile(const Item* tile, int64_t count, int64_t columns, Item* rows) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t t = 0; t < columns; t++) rows[i * columns + t] = tile[t * LANES + i];
}

}  // namespace AQ_ISA

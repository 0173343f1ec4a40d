// Rows of W as tiles of bfloat16 for a matrix unit, decoded some columns at a time; knows nothing of inputs.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <vector>

#include "kernels.hpp"
#include "levels.hpp"
#include "matrix_unit.hpp"
#include "pieces.hpp"

namespace AQ_ISA {

void dequantize(const Dequantize& ask, int64_t first, int64_t last);  // rows.cpp
void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last);

// Values of the chunks of a tile that are decoded at once.
static inline int64_t of_tile(const BlockProduct& ask) { return ask.chunks_at_once * TILE; }

// How many values the tiles of a block of rows have.
static inline int64_t tiles_size(const BlockProduct& ask, int64_t pieces) { return pieces * ask.rows_of_block / SIDE * of_tile(ask); }

// How many chunks the columns of 64 bytes of codes are woven into: where the levels of their groups fit in one vector, code
// k of every 16 bits goes to chunk k. Else 1: chunks are columns in their order.
static inline int64_t chunks_woven(const BlockProduct& ask) {
  const int64_t columns = 512 / ask.of.bits, groups = std::max<int64_t>(1, columns / ask.of.group);
  if (ask.of.bits == 8 || !in_whole_chunks(ask) || groups << ask.of.bits > CHUNK) return 1;
  const bool fits = ask.of.groups == 1 || columns % ask.of.group == 0 || ask.of.group % columns == 0;
  return fits ? columns / CHUNK : 1;
}

// Where the levels of each word's group begin among those of a vector of codes.
static inline __m512i places_of_words(const BlockProduct& ask) {
  alignas(64) uint16_t places[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) places[i] = (uint16_t)(i * chunks_woven(ask) / ask.of.group << ask.of.bits);
  return _mm512_load_si512(places);
}

// Levels of the codes of a group, and of the groups behind it as far as they fit, in bfloat16 pieces.
struct LevelPieces {
  __m512i hi, lo;
};

// Of codes of 2 bits: kept for every group of a row, (groups, 4).
template <int PIECES>
struct Fours {
  uint16_t *hi, *lo;

  static int64_t size(int64_t groups) { return (groups + SIDE) * 4; }

  // Sixteen groups at a time; RowLevels has as many beyond the last.
  void read(const RowLevels& of, int64_t groups) const {
    for (int64_t g = 0; g < groups; g += SIDE) {
      const __m512 base = _mm512_loadu_ps(&of.base[g]), step = _mm512_loadu_ps(&of.step[g]);
      const __m512 upper = _mm512_add_ps(base, _mm512_loadu_ps(&of.jump[g])), two = _mm512_add_ps(step, step);
      const __m512 third = _mm512_add_ps(upper, two);
      write(4 * g, pieces(base), pieces(_mm512_add_ps(base, step)), pieces(third), pieces(_mm512_add_ps(third, step)));
    }
  }

  AQ_INLINE_MEMBER LevelPieces from(int64_t g) const {
    const __m512i first = _mm512_loadu_si512(hi + 4 * g);
    return {first, PIECES == 2 ? _mm512_loadu_si512(lo + 4 * g) : first};
  }
  AQ_INLINE_MEMBER LevelPieces of(int64_t g) const {
    const __m512i first = repeated(hi + 4 * g);
    return {first, PIECES == 2 ? repeated(lo + 4 * g) : first};
  }

 private:
  void write(int64_t at, Pieces a, Pieces b, Pieces c, Pieces d) const {
    write(&hi[at], a.hi, b.hi, c.hi, d.hi);
    if (PIECES == 2) write(&lo[at], a.lo, b.lo, c.lo, d.lo);
  }

  static void write(uint16_t* to, __m256i a, __m256i b, __m256i c, __m256i d) {
    const auto twice = [](__m256i first, __m256i second) {  // 16 pairs of first and second
      return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
    };
    const __m512i low = twice(a, b), high = twice(c, d);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, first, high));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi32(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high));
  }

  static __m512i repeated(const uint16_t* levels) {
    int64_t four;
    std::memcpy(&four, levels, 8);
    return _mm512_set1_epi64(four);
  }
};

// Of codes of 4 bits: there are more of them than a cache has room for, so they are made when they are needed.
template <int PIECES>
struct Sixteens {
  const float *base, *step, *jump;  // jump is null on the affine grid
  int64_t last;                     // group

  AQ_INLINE_MEMBER LevelPieces from(int64_t g) const {
    const Pieces one = levels(g), next = levels(std::min(g + 1, last));
    return {joined(one.hi, next.hi), PIECES == 2 ? joined(one.lo, next.lo) : __m512i{}};
  }
  AQ_INLINE_MEMBER LevelPieces of(int64_t g) const {
    const Pieces one = levels(g);
    return {joined(one.hi, one.hi), PIECES == 2 ? joined(one.lo, one.lo) : __m512i{}};
  }

 private:
  AQ_INLINE_MEMBER Pieces levels(int64_t g) const {
    const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 level = _mm512_fmadd_ps(code, _mm512_set1_ps(step[g]), _mm512_set1_ps(base[g]));
    const __m512 all = jump ? _mm512_mask_add_ps(level, 0xFF00, level, _mm512_set1_ps(jump[g])) : level;
    return PIECES == 2 ? pieces(all) : Pieces{(__m256i)_mm512_cvtneps_pbh(all), __m256i{}};
  }
  static __m512i joined(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
};

template <int PIECES>
AQ_INLINE void put(uint16_t* to, int64_t apart, __m512 low, __m512 high) {
  if (PIECES == 1) return _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  const Pieces first = pieces(low), second = pieces(high);
  _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(first.hi), second.hi, 1));
  _mm512_store_si512(to + apart, _mm512_inserti64x4(_mm512_castsi256_si512(first.lo), second.lo, 1));
}

// Some chunks of a group of a row, of 2 or 4 bits, to their places in tiles; lo pieces lie `apart` behind the others.
template <int BITS, int PIECES, class Levels>
struct Pick {
  Levels levels;
  int64_t apart;
  __m512i place;  // where in a table the levels of a word's group begin
  Spread<BITS> spread;

  // 64 bytes of codes, the first of them in group g: each code of a word goes to a chunk of its own.
  AQ_INLINE_MEMBER void weave(int64_t g, const uint8_t* codes, uint16_t* to) const {
    const LevelPieces of = levels.from(g);
    const __m512i words = _mm512_loadu_si512(codes), ones = _mm512_set1_epi16((1 << BITS) - 1);
    constexpr int MASK_OR = 0xEA;  // a & b | c
    for (int k = 0; k < 16 / BITS; k++, to += TILE)
      put(_mm512_ternarylogic_epi64(_mm512_srli_epi16(words, BITS * k), ones, place, MASK_OR), of, to);
  }

  AQ_INLINE_MEMBER void operator()(int64_t g, const uint8_t* codes, uint16_t* to, int64_t chunks) const {
    const LevelPieces of = levels.of(g);
    for (int64_t c = 0; c < chunks; c++, codes += 4 * BITS, to += TILE) put(spread(codes), of, to);
  }

 private:
  AQ_INLINE_MEMBER void put(__m512i which, LevelPieces of, uint16_t* to) const {
    _mm512_store_si512(to, _mm512_permutexvar_epi16(which, of.hi));
    if (PIECES == 2) _mm512_store_si512(to + apart, _mm512_permutexvar_epi16(which, of.lo));
  }
};

// The same of 8 bits, which have too many levels for a table.
template <int PIECES>
struct Compute {
  const float *base, *step, *jump;  // jump is null on the affine grid
  int64_t apart;

  AQ_INLINE_MEMBER void operator()(int64_t g, const uint8_t* codes, uint16_t* to, int64_t chunks) const {
    const __m512 from = _mm512_set1_ps(base[g]), by = _mm512_set1_ps(step[g]), more = _mm512_set1_ps(jump ? jump[g] : 0);
    for (int64_t c = 0; c < chunks; c++, codes += CHUNK, to += TILE)
      put<PIECES>(to, apart, level(codes, from, by, more), level(codes + 16, from, by, more));
  }

 private:
  AQ_INLINE_MEMBER __m512 level(const uint8_t* codes, __m512 from, __m512 by, __m512 more) const {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    const __m512 all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), by, from);
    return jump ? _mm512_mask_add_ps(all, _mm512_test_epi32_mask(code, _mm512_set1_epi32(128)), all, more) : all;
  }
};

// Rows of W as bfloat16 tiles, of some chunks at a time: (pieces, tiles, chunks_at_once, 16, 32).
template <int PIECES>
struct Decoded {
  const BlockProduct& ask;
  int64_t of_group, woven, woven_end, first_row = 0, count = 0;  // chunks before woven_end are woven
  bool in_chunks;
  __m512i places;
  uint16_t* tiles = nullptr;          // where they are written to
  std::vector<int64_t> groups;        // in which each chunk begins, as columns in their order
  RowLevels row;                      // of the one that is read
  Aligned<float> factors;             // of each row where codes have 4 or 8 bits: (rows, 3, groups): base, step, jump
  Aligned<uint16_t> fours;            // of each row where they have 2: (rows, pieces, groups and some more, 4)
  Aligned<float> values;             // of all columns, where groups are not made of whole chunks

  explicit Decoded(const BlockProduct& ask)
      : ask(ask),
        of_group(ask.of.groups == 1 ? ask.chunks() : ask.of.group / CHUNK),
        woven(chunks_woven(ask)),
        woven_end(woven > 1 ? ask.of.columns / (woven * CHUNK) * woven : 0),  // as weave() has it
        in_chunks(in_whole_chunks(ask)),
        places(places_of_words(ask)),
        groups(ask.chunks()),
        row(ask),
        factors(in_chunks && ask.of.bits > 2 ? ask.rows_of_block * 3 * ask.of.groups : 0),
        fours(in_chunks && ask.of.bits == 2 ? ask.rows_of_block * PIECES * Fours<PIECES>::size(ask.of.groups) + CHUNK : 0),
        values(in_chunks ? 0 : ask.rows_of_block * ask.chunks() * CHUNK + LANES) {
    for (int64_t c = 0; c < ask.chunks(); c++) groups[c] = c * CHUNK / ask.of.group;
  }

  // What is needed of some rows before any of their chunks.
  void begin(int64_t row) {
    first_row = row;
    count = std::min(ask.rows_of_block, ask.rows - row);
    for (int64_t r = 0; r < count; r++)
      if (in_chunks)
        read_levels(r);
      else
        read_values(r);
  }

  // At most chunks_at_once.
  void decode(int64_t first, int64_t chunks, uint16_t* to) {
    tiles = to;
    if (!in_chunks)
      for (int64_t r = 0; r < count; r++) copy(r, first, chunks);
    else if (ask.of.bits == 2)
      decode_rows<2>(first, chunks);
    else if (ask.of.bits == 4)
      decode_rows<4>(first, chunks);
    else
      decode_rows<8>(first, chunks);
    for (int64_t r = count; r % SIDE; r++) clear(r, chunks);
  }

 private:
  uint16_t* place(int64_t r) { return tiles + r / SIDE * of_tile(ask) + r % SIDE * CHUNK; }
  int64_t piece_size() const { return tiles_size(ask, 1); }

  void read_levels(int64_t r) {
    row.read(ask, first_row + r);
    if (ask.of.bits == 2) return fours_of_row(r).read(row, ask.of.groups);
    float* to = factors_of_row(r);
    for (const std::vector<float>* some : {&row.base, &row.step, &row.jump})
      to = std::copy_n(some->begin(), ask.of.groups, to);
  }

  float* factors_of_row(int64_t r) { return factors.data() + r * 3 * ask.of.groups; }

  Fours<PIECES> fours_of_row(int64_t r) {
    const int64_t size = Fours<PIECES>::size(ask.of.groups);
    uint16_t* first = fours.data() + r * PIECES * size;
    return {first, first + (PIECES - 1) * size};
  }

  void read_values(int64_t r) {
    Dequantize of = from_row(ask, first_row + r);
    float* to = values.data() + r * ask.chunks() * CHUNK;
    of.weight = to;
    (ask.residual ? dequantize_r2q : dequantize)(of, 0, 1);
    std::fill(to + ask.of.columns, to + ask.chunks() * CHUNK, 0.0f);
  }

  void clear(int64_t r, int64_t chunks) {
    for (int64_t c = 0; c < chunks; c++) put<PIECES>(place(r) + c * TILE, piece_size(), __m512{}, __m512{});
  }

  void copy(int64_t r, int64_t first, int64_t chunks) {
    const float* from = values.data() + (r * ask.chunks() + first) * CHUNK;
    for (int64_t c = 0; c < chunks; c++, from += CHUNK)
      put<PIECES>(place(r) + c * TILE, piece_size(), _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
  }

  template <int BITS>
  void decode_rows(int64_t first, int64_t chunks) {
    const Spread<BITS> spread;
    for (int64_t r = 0; r < count; r++) decode_row<BITS>(r, first, chunks, spread);
  }

  template <int BITS>
  void decode_row(int64_t r, int64_t first, int64_t chunks, const Spread<BITS>& spread) {
    constexpr int64_t BYTES = 4 * BITS;  // of a chunk
    const uint8_t* codes = ask.of.codes + (first_row + r) * ask.of.row_bytes + first * BYTES;
    const int64_t left = ask.of.row_bytes - first * BYTES, whole = std::min(chunks, left / BYTES);
    uint16_t* to = place(r);
    ask_for_next(ask, first_row + r, first * BYTES, chunks * BYTES);
    const auto decode = decoder<BITS>(r, spread);
    int64_t c = 0;
    if constexpr (BITS < 8)
      for (; first + c < woven_end && c < chunks; c += woven) decode.weave(groups[first + c], codes + c * BYTES, to + c * TILE);
    for (int64_t g = (first + c) / of_group; c < whole; g++) {
      const int64_t stop = std::min((g + 1) * of_group - first, whole);
      decode(g, codes + c * BYTES, to + c * TILE, stop - c);
      c = stop;
    }
    if (whole == chunks) return;
    uint8_t rest[BYTES] = {};  // the last chunk of a row
    std::memcpy(rest, codes + whole * BYTES, left - whole * BYTES);
    decode((first + whole) / of_group, rest, to + whole * TILE, 1);
  }

  template <int BITS>
  auto decoder(int64_t r, const Spread<BITS>& spread) {
    const float *base = factors_of_row(r), *step = base + ask.of.groups, *jump = ask.residual ? step + ask.of.groups : nullptr;
    if constexpr (BITS == 8)
      return Compute<PIECES>{base, step, jump, piece_size()};
    else if constexpr (BITS == 4)
      return Pick<4, PIECES, Sixteens<PIECES>>{{base, step, jump, ask.of.groups - 1}, piece_size(), places, spread};
    else
      return Pick<2, PIECES, Fours<PIECES>>{fours_of_row(r), piece_size(), places, spread};
  }
};

}  // namespace AQ_ISA

#endif

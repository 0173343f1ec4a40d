// Many rows of inputs times packed weights on Intel's matrix unit (AMX), which adds products of bfloat16 in float32.
//
//   y (m, r) = sum_j w (r, j) x (m, j):   16 rows of W by 32 columns meet a chunk of a panel of 16 rows of x
//
// Weights and inputs are sums of two bfloat16 pieces, of which the product of the two lo ones is left out: at most 2^-16
// of a product for it, and as much for what the pieces leave of each. Inputs in bfloat16 have one piece, and then W is
// rounded to one too, as torch's own product of bfloat16 has it.
// A block of rows of W is decoded for some chunks at a time, and meets all panels, whose sums wait in `sums`.
// Assumes what kernels/linear.py has checked, and groups that start on a byte.
// Measured on an Intel Xeon with AMX (2 cores): python bench/linear.py.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "levels.hpp"
#include "pieces.hpp"
#include "rounding.hpp"
#include "stored.hpp"

#if defined(__AMX_BF16__)

namespace AQ_ISA {

void dequantize(const Dequantize& ask, int64_t first, int64_t last);  // rows.cpp
void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last);

constexpr int64_t SIDE = 16, TILE = SIDE * CHUNK;  // rows of a tile of bfloat16, and its values
constexpr int64_t SUMS = SIDE * SIDE;              // values of a tile of sums
constexpr int64_t CHUNKS_AT_ONCE = 16, PANELS_AT_ONCE = 64;

// Every register is 16 rows of 64 bytes.
struct alignas(64) Registers {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  Registers() { _tile_loadconfig(this); }
  ~Registers() { _tile_release(); }
};

// Memory that begins on a line of the cache, with no values in it yet: those of a vector would be written for nothing.
template <class Value>
struct Aligned {
  std::unique_ptr<Value[]> all;
  explicit Aligned(int64_t size) : all(new Value[size + 64 / sizeof(Value)]) {}
  Value* data() { return (Value*)(((uintptr_t)all.get() + 63) / 64 * 64); }
};

// The values that x is taken for, of one group that was read to `group`.
static void round_in_place(const BlockProduct& ask, float* group, int64_t n, int64_t padded, int8_t* whole) {
  const float step = round_group(ask, group, n, padded, whole);
  for (int64_t i = 0; i < n; i++) group[i] = step * ((float)whole[i] + ask.correction());
}

static void read_row(const BlockProduct& ask, int64_t m, float* row, std::vector<float>& group,
                     std::vector<int8_t>& whole) {
  if (!ask.rounded) return read_floats(ask.x, ask.dtype, m * ask.of.columns, ask.of.columns, row);
  for (int64_t g = 0; g < ask.of.groups; g++) {
    const int64_t start = g * ask.of.group, n = std::min(ask.of.group, ask.of.columns - start);
    std::fill(group.begin(), group.end(), 0.0f);
    read_floats(ask.x, ask.dtype, m * ask.of.columns + start, n, group.data());
    round_in_place(ask, group.data(), n, (int64_t)group.size(), whole.data());
    std::copy_n(group.begin(), n, row + start);
  }
}

// Sixteen rows of sixteen words, turned.
AQ_INLINE void turn(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      v[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      v[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

// Sixteen rows of pairs, one behind the other, to a panel.
static void to_panel(const uint16_t* rows, int64_t chunks, uint16_t* panel) {
  for (int64_t c = 0; c < chunks; c++, panel += TILE) {
    __m512i words[16];
    for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(rows + (i * chunks + c) * CHUNK);
    turn(words);
    for (int i = 0; i < 16; i++) _mm512_store_si512(panel + i * CHUNK, words[i]);
  }
}

// How many chunks the columns of 64 bytes of codes are woven into: where the levels of their groups fit in one vector, code
// k of every 16 bits goes to chunk k. Else 1: chunks are columns in their order.
static int64_t chunks_woven(const BlockProduct& ask) {
  const int64_t columns = 512 / ask.of.bits, groups = std::max<int64_t>(1, columns / ask.of.group);
  if (ask.of.bits == 8 || !in_whole_chunks(ask) || groups << ask.of.bits > CHUNK) return 1;
  const bool fits = ask.of.groups == 1 || columns % ask.of.group == 0 || ask.of.group % columns == 0;
  return fits ? columns / CHUNK : 1;
}

// Where the levels of each word's group begin among those of a vector of codes.
static __m512i places_of_words(const BlockProduct& ask) {
  alignas(64) uint16_t places[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) places[i] = (uint16_t)(i * chunks_woven(ask) / ask.of.group << ask.of.bits);
  return _mm512_load_si512(places);
}

void fill_blocks(const BlockProduct& ask, int64_t first, int64_t last) {
  const int64_t chunks = ask.chunks(), width = chunks * CHUNK, woven = chunks_woven(ask);
  std::vector<float> row(width + LANES), group((ask.of.group + LANES - 1) / LANES * LANES);
  std::vector<int8_t> whole(group.size());
  Aligned<uint16_t> rows(2 * SIDE * width);
  for (int64_t p = first; p < last; p++) {
    for (int64_t i = 0; i < SIDE; i++) {
      std::fill(row.begin(), row.end(), 0.0f);
      if (p * SIDE + i < ask.count) read_row(ask, p * SIDE + i, row.data(), group, whole);
      std::fill(row.begin() + ask.of.columns, row.end(), 0.0f);
      uint16_t* hi = rows.data() + i * width;
      to_pieces(row.data(), chunks, hi, ask.pieces() == 2 ? hi + SIDE * width : nullptr);
      for (int64_t piece = 0; piece < ask.pieces(); piece++) {
        if (woven == 8) weave<8>(hi + piece * SIDE * width, ask.of.columns);
        if (woven == 4) weave<4>(hi + piece * SIDE * width, ask.of.columns);
      }
    }
    for (int64_t piece = 0; piece < ask.pieces(); piece++)
      to_panel(rows.data() + piece * SIDE * width, chunks, ask.inputs + piece * ask.piece_size() + p * ask.panel_size());
  }
}

// The levels of every group of a row in bfloat16 pieces, in the order of codes: (groups, 4 or 16).
template <int PIECES>
struct Levels {
  uint16_t *hi, *lo;

  static int64_t size(int64_t groups, int bits) { return (groups + SIDE) << bits; }

  void read(const RowLevels& of, int64_t groups, int bits) const {
    if (bits == 2)
      read_fours(of, groups);
    else
      read_sixteens(of, groups);
  }

 private:
  // Sixteen groups at a time; RowLevels has as many beyond the last.
  void read_fours(const RowLevels& of, int64_t groups) const {
    for (int64_t g = 0; g < groups; g += SIDE) {
      const __m512 base = _mm512_loadu_ps(&of.base[g]), step = _mm512_loadu_ps(&of.step[g]);
      const __m512 upper = _mm512_add_ps(base, _mm512_loadu_ps(&of.jump[g])), two = _mm512_add_ps(step, step);
      const __m512 third = _mm512_add_ps(upper, two);
      write_fours(4 * g, pieces(base), pieces(_mm512_add_ps(base, step)), pieces(third),
                  pieces(_mm512_add_ps(third, step)));
    }
  }

  void write_fours(int64_t at, Pieces a, Pieces b, Pieces c, Pieces d) const {
    write_fours(&hi[at], a.hi, b.hi, c.hi, d.hi);
    if (PIECES == 2) write_fours(&lo[at], a.lo, b.lo, c.lo, d.lo);
  }

  static void write_fours(uint16_t* to, __m256i a, __m256i b, __m256i c, __m256i d) {
    const auto twice = [](__m256i first, __m256i second) {  // 16 pairs of first and second
      return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
    };
    const __m512i low = twice(a, b), high = twice(c, d);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, first, high));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi32(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high));
  }

  void read_sixteens(const RowLevels& of, int64_t groups) const {
    const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t g = 0; g < groups; g++) {
      const __m512 level = _mm512_fmadd_ps(code, _mm512_set1_ps(of.step[g]), _mm512_set1_ps(of.base[g]));
      const __m512 all = _mm512_mask_add_ps(level, 0xFF00, level, _mm512_set1_ps(of.jump[g]));
      const Pieces both = PIECES == 2 ? pieces(all) : Pieces{(__m256i)_mm512_cvtneps_pbh(all), __m256i{}};
      _mm256_storeu_si256((__m256i*)&hi[16 * g], both.hi);
      if (PIECES == 2) _mm256_storeu_si256((__m256i*)&lo[16 * g], both.lo);
    }
  }
};

template <int BITS>
AQ_INLINE __m512i repeated(const uint16_t* levels) {
  int64_t four;
  std::memcpy(&four, levels, 8);
  return BITS == 2 ? _mm512_set1_epi64(four) : _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)levels));
}

template <int PIECES>
AQ_INLINE void put(uint16_t* to, int64_t apart, __m512 low, __m512 high) {
  if (PIECES == 1) return _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  const Pieces first = pieces(low), second = pieces(high);
  _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(first.hi), second.hi, 1));
  _mm512_store_si512(to + apart, _mm512_inserti64x4(_mm512_castsi256_si512(first.lo), second.lo, 1));
}

// Some chunks of a group of a row, of 2 or 4 bits, to their places in tiles; lo pieces lie `apart` behind the others.
template <int BITS, int PIECES>
struct Pick {
  Levels<PIECES> levels;
  int64_t apart;
  __m512i place;  // where in a table the levels of a word's group begin
  Spread<BITS> spread;

  // 64 bytes of codes, the first of them in group g: each code of a word goes to a chunk of its own.
  AQ_INLINE_MEMBER void weave(int64_t g, const uint8_t* codes, uint16_t* to) const {
    const int64_t at = g << BITS;
    const __m512i hi = _mm512_loadu_si512(levels.hi + at), words = _mm512_loadu_si512(codes);
    const __m512i lo = PIECES == 2 ? _mm512_loadu_si512(levels.lo + at) : hi;
    const __m512i ones = _mm512_set1_epi16((1 << BITS) - 1);
    constexpr int MASK_OR = 0xEA;  // a & b | c
    for (int k = 0; k < 16 / BITS; k++, to += TILE) {
      const __m512i which = _mm512_ternarylogic_epi64(_mm512_srli_epi16(words, BITS * k), ones, place, MASK_OR);
      _mm512_store_si512(to, _mm512_permutexvar_epi16(which, hi));
      if (PIECES == 2) _mm512_store_si512(to + apart, _mm512_permutexvar_epi16(which, lo));
    }
  }

  AQ_INLINE_MEMBER void operator()(int64_t g, const uint8_t* codes, uint16_t* to, int64_t chunks) const {
    const __m512i hi = repeated<BITS>(levels.hi + (g << BITS));
    const __m512i lo = PIECES == 2 ? repeated<BITS>(levels.lo + (g << BITS)) : hi;
    for (int64_t c = 0; c < chunks; c++, codes += 4 * BITS, to += TILE) {
      const __m512i which = spread(codes);
      _mm512_store_si512(to, _mm512_permutexvar_epi16(which, hi));
      if (PIECES == 2) _mm512_store_si512(to + apart, _mm512_permutexvar_epi16(which, lo));
    }
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

// Rows of W as bfloat16 tiles: (pieces, tiles, chunks at once, 16, 32).
template <int PIECES>
struct Decoded {
  const BlockProduct& ask;
  int64_t piece_size, of_group, woven, woven_end, first_row = 0, count = 0;  // chunks before woven_end are woven
  bool in_chunks;
  __m512i places;
  Aligned<uint16_t> tiles;
  std::vector<int64_t> groups;        // in which each chunk begins, as columns in their order
  RowLevels row;                      // of the one that is read
  Aligned<float> factors;             // of each row where codes have 8 bits: (rows, 3, groups): base, step, jump
  Aligned<uint16_t> levels;           // (rows, pieces, groups and some more, 4 or 16)
  Aligned<float> values;             // of all columns, where groups are not made of whole chunks

  explicit Decoded(const BlockProduct& ask)
      : ask(ask),
        piece_size(ask.rows_of_block * CHUNKS_AT_ONCE * CHUNK),
        of_group(ask.of.groups == 1 ? ask.chunks() : ask.of.group / CHUNK),
        woven(chunks_woven(ask)),
        woven_end(woven > 1 ? ask.of.columns / (woven * CHUNK) * woven : 0),  // as weave() has it
        in_chunks(in_whole_chunks(ask)),
        places(places_of_words(ask)),
        tiles(PIECES * piece_size),
        groups(ask.chunks()),
        row(ask),
        factors(in_chunks && ask.of.bits == 8 ? ask.rows_of_block * 3 * ask.of.groups : 0),
        levels(in_chunks && ask.of.bits < 8
                   ? ask.rows_of_block * PIECES * Levels<PIECES>::size(ask.of.groups, ask.of.bits) + CHUNK
                   : 0),
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

  void decode(int64_t first, int64_t chunks) {
    for (int64_t r = 0; r < (count + SIDE - 1) / SIDE * SIDE; r++)
      if (r >= count)
        clear(r, chunks);
      else if (!in_chunks)
        copy(r, first, chunks);
      else
        decode_codes(r, first, chunks);
  }

  uint16_t* tile(int64_t number) { return tiles.data() + number * CHUNKS_AT_ONCE * TILE; }

 private:
  uint16_t* place(int64_t r) { return tile(r / SIDE) + r % SIDE * CHUNK; }

  void read_levels(int64_t r) {
    row.read(ask, first_row + r);
    if (ask.of.bits < 8) return levels_of_row(r).read(row, ask.of.groups, ask.of.bits);
    float* to = factors_of_row(r);
    for (const std::vector<float>* some : {&row.base, &row.step, &row.jump})
      to = std::copy_n(some->begin(), ask.of.groups, to);
  }

  float* factors_of_row(int64_t r) { return factors.data() + r * 3 * ask.of.groups; }

  Levels<PIECES> levels_of_row(int64_t r) {
    const int64_t size = Levels<PIECES>::size(ask.of.groups, ask.of.bits);
    uint16_t* first = levels.data() + r * PIECES * size;
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
    for (int64_t c = 0; c < chunks; c++) put<PIECES>(place(r) + c * TILE, piece_size, __m512{}, __m512{});
  }

  void copy(int64_t r, int64_t first, int64_t chunks) {
    const float* from = values.data() + (r * ask.chunks() + first) * CHUNK;
    for (int64_t c = 0; c < chunks; c++, from += CHUNK)
      put<PIECES>(place(r) + c * TILE, piece_size, _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
  }

  void decode_codes(int64_t r, int64_t first, int64_t chunks) {
    if (ask.of.bits == 2) decode_row<2>(r, first, chunks);
    if (ask.of.bits == 4) decode_row<4>(r, first, chunks);
    if (ask.of.bits == 8) decode_row<8>(r, first, chunks);
  }

  template <int BITS>
  void decode_row(int64_t r, int64_t first, int64_t chunks) {
    constexpr int64_t BYTES = 4 * BITS;  // of a chunk
    const uint8_t* codes = ask.of.codes + (first_row + r) * ask.of.row_bytes + first * BYTES;
    const int64_t left = ask.of.row_bytes - first * BYTES, whole = std::min(chunks, left / BYTES);
    uint16_t* to = place(r);
    ask_for_next(r, first, chunks, codes, BYTES);
    const auto decode = decoder<BITS>(r);
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

  // A row is read piece by piece, which no processor foresees.
  AQ_INLINE_MEMBER void ask_for_next(int64_t r, int64_t first, int64_t chunks, const uint8_t* codes, int64_t chunk) const {
    const bool same_row = first + chunks < ask.chunks();
    if (!same_row && first_row + r + ask.rows_of_block >= ask.rows) return;
    const uint8_t* next = same_row ? codes + chunks * chunk : codes - first * chunk + ask.rows_of_block * ask.of.row_bytes;
    for (int64_t i = 0; i < chunks * chunk; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
  }

  template <int BITS>
  auto decoder(int64_t r) {
    if constexpr (BITS == 8) {
      const float* base = factors_of_row(r);
      return Compute<PIECES>{base, base + ask.of.groups, ask.residual ? base + 2 * ask.of.groups : nullptr, piece_size};
    } else {
      return Pick<BITS, PIECES>{levels_of_row(r), piece_size, places, Spread<BITS>()};
    }
  }
};

// Tiles of W and panels, from some chunk on; `to` holds their sums so far, or nothing yet. Four sums are added at a time,
// as each waits for the one before: two tiles meet two panels, or four tiles one.
struct Meeting {
  const uint16_t *weight, *inputs;
  int64_t weight_tile, weight_piece, input_piece, panel_size, chunks;
  float* to;  // (panels, tiles, 16, 16)
  int64_t to_panel;
  bool begin;
};

constexpr int64_t LINE = 64;

template <int PANELS>
AQ_INLINE void load_sums(const Meeting& of) {
  float* last = of.to + (PANELS == 2 ? of.to_panel : 2 * SUMS);
  if (of.begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, of.to, LINE);
    _tile_loadd(1, of.to + SUMS, LINE);
    _tile_loadd(2, last, LINE);
    _tile_loadd(3, last + SUMS, LINE);
  }
}

template <int PANELS>
AQ_INLINE void store_sums(const Meeting& of) {
  float* last = of.to + (PANELS == 2 ? of.to_panel : 2 * SUMS);
  _tile_stored(0, of.to, LINE);
  _tile_stored(1, of.to + SUMS, LINE);
  _tile_stored(2, last, LINE);
  _tile_stored(3, last + SUMS, LINE);
}

template <int PANELS>
AQ_INLINE void meet(const Meeting& of, const uint16_t* weight, const uint16_t* inputs) {
  _tile_loadd(6, inputs, LINE);
  _tile_loadd(4, weight, LINE);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, weight + of.weight_tile, LINE);
  _tile_dpbf16ps(1, 5, 6);
  if (PANELS == 2) {
    _tile_loadd(7, inputs + of.panel_size, LINE);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  } else {
    _tile_loadd(7, weight + 2 * of.weight_tile, LINE);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(4, weight + 3 * of.weight_tile, LINE);
    _tile_dpbf16ps(3, 4, 6);
  }
}

// W's pieces and those of x that are multiplied, the smallest first.
template <int PANELS, int PIECES>
static void multiply(const Meeting& of) {
  load_sums<PANELS>(of);
  for (int64_t c = 0; c < of.chunks; c++) {
    const uint16_t *w = of.weight + c * TILE, *x = of.inputs + c * TILE;
    if (PIECES == 2) {
      meet<PANELS>(of, w + of.weight_piece, x);
      meet<PANELS>(of, w, x + of.input_piece);
    }
    meet<PANELS>(of, w, x);
  }
  store_sums<PANELS>(of);
}

// All panels from one on, with the chunks of W that are decoded.
template <int PIECES>
static void meet_panels(const BlockProduct& ask, Decoded<PIECES>& weight, int64_t first_panel, int64_t panels,
                        int64_t first_chunk, int64_t chunks, float* sums) {
  const int64_t tiles = (weight.count + SIDE - 1) / SIDE, of_panel = ask.rows_of_block / SIDE * SUMS;
  for (int64_t p = 0; p < panels; p += 2) {
    const bool two = p + 1 < panels;
    for (int64_t t = 0; t < tiles; t += two ? 2 : 4) {
      const uint16_t* x = ask.inputs + (first_panel + p) * ask.panel_size() + first_chunk * TILE;
      const Meeting of{weight.tile(t),  x,      CHUNKS_AT_ONCE * TILE,     weight.piece_size, ask.piece_size(),
                       ask.panel_size(), chunks, sums + p * of_panel + t * SUMS, of_panel,          first_chunk == 0};
      (two ? multiply<2, PIECES> : multiply<1, PIECES>)(of);
    }
  }
}

static void store_as(const BlockProduct& ask, int64_t at, __m512 x, __mmask16 some) {
  if (ask.dtype == FLOAT32) return _mm512_mask_storeu_ps((float*)ask.result + at, some, x);
  uint16_t halves[16];
  Lanes all;
  all.part[0] = (FloatPart)x;
  if (ask.dtype == BFLOAT16)
    store_bfloat16(halves, all);
  else
    store_float16(halves, all);
  _mm256_mask_storeu_epi16((uint16_t*)ask.result + at, some, _mm256_loadu_si256((const __m256i*)halves));
}

// Sixteen rows of W and a panel: sums that lie by rows of W, written by rows of x.
static void write_tile(const BlockProduct& ask, const float* sums, int64_t row, int64_t panel) {
  __m512i v[16];
  for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(sums + i * SIDE);
  turn(v);
  const int64_t rows = std::min(SIDE, ask.rows - row), count = std::min(SIDE, ask.count - panel * SIDE);
  const __mmask16 some = (__mmask16)((1u << rows) - 1);
  const __m512 bias = ask.bias ? _mm512_maskz_loadu_ps(some, ask.bias + row) : _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i++)
    store_as(ask, (panel * SIDE + i) * ask.rows + row, _mm512_add_ps((__m512)v[i], bias), some);
}

template <int PIECES>
static void multiply_blocks(const BlockProduct& ask, int64_t first, int64_t last) {
  const Registers registers;
  Decoded<PIECES> weight(ask);
  Aligned<float> sums(std::min(ask.panels(), PANELS_AT_ONCE) * ask.rows_of_block / SIDE * SUMS);
  for (int64_t b = first; b < last; b++) {
    weight.begin(b * ask.rows_of_block);
    for (int64_t p = 0; p < ask.panels(); p += PANELS_AT_ONCE) {
      const int64_t panels = std::min(PANELS_AT_ONCE, ask.panels() - p);
      for (int64_t c = 0; c < ask.chunks(); c += CHUNKS_AT_ONCE) {
        const int64_t chunks = std::min(CHUNKS_AT_ONCE, ask.chunks() - c);
        weight.decode(c, chunks);
        meet_panels<PIECES>(ask, weight, p, panels, c, chunks, sums.data());
      }
      for (int64_t i = 0; i < panels; i++)
        for (int64_t r = 0; r < weight.count; r += SIDE)
          write_tile(ask, sums.data() + (i * (ask.rows_of_block / SIDE) + r / SIDE) * SUMS, b * ask.rows_of_block + r, p + i);
    }
  }
}

void block_product(const BlockProduct& ask, int64_t first, int64_t last) {
  (ask.pieces() == 1 ? multiply_blocks<1> : multiply_blocks<2>)(ask, first, last);
}

}  // namespace AQ_ISA

#endif

// Intel's matrix unit (AMX): its registers, what goes into them and comes out, and sums of products of bfloat16 tiles; knows nothing of codes.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <memory>

#include "kernels.hpp"
#include "pieces.hpp"
#include "stored.hpp"

namespace AQ_ISA {

constexpr int64_t SIDE = 16, TILE = SIDE * CHUNK;  // rows of a tile of bfloat16, and its values
constexpr int64_t SUMS = SIDE * SIDE;              // values of a tile of sums

constexpr int64_t LINE = 64;                       // bytes of a tile's row

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

// Sixteen rows of words, one behind the other, to a panel: (tiles, 16 words, 16 rows).
AQ_INLINE void to_panel(const void* rows, int64_t tiles, void* panel) {
  const uint8_t* from = (const uint8_t*)rows;
  for (int64_t t = 0; t < tiles; t++) {
    __m512i words[16];
    for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(from + (i * tiles + t) * LINE);
    turn(words);
    for (int i = 0; i < 16; i++) _mm512_store_si512((uint8_t*)panel + (t * SIDE + i) * LINE, words[i]);
  }
}

// Tiles of W and panels, from some chunk on; `to` holds their sums so far, or nothing yet. Four sums are added at a time,
// as each waits for the one before: two tiles meet two panels, or four tiles one.
struct Meeting {
  const uint16_t *weight, *inputs;
  int64_t weight_tile, weight_piece, input_piece, panel_size, chunks;
  float* to;  // (panels, tiles, 16, 16)
  int64_t to_panel;
  bool begin;
};

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
static inline void multiply(const Meeting& of) {
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

static inline void store_as(const BlockProduct& ask, int64_t at, __m512 x, __mmask16 some) {
  if (ask.dtype == FLOAT32) return _mm512_mask_storeu_ps((float*)ask.y + at, some, x);
  const __m256i halves = ask.dtype == BFLOAT16 ? (__m256i)_mm512_cvtneps_pbh(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16((uint16_t*)ask.y + at, some, halves);
}

// Sixteen rows of W and a panel: sums that lie by rows of W, written by rows of x; `more` is what each row of W gets besides.
static inline void write_tile(const BlockProduct& ask, const float* sums, int64_t row, int64_t panel, const float* more) {
  __m512i v[16];
  for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(sums + i * SIDE);
  turn(v);
  const int64_t rows = std::min(SIDE, ask.rows - row), count = std::min(SIDE, ask.count - panel * SIDE);
  const __mmask16 some = (__mmask16)((1u << rows) - 1);
  const __m512 added = more ? _mm512_maskz_loadu_ps(some, more) : _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i++)
    store_as(ask, (panel * SIDE + i) * ask.rows + row, _mm512_add_ps((__m512)v[i], added), some);
}

// A block of rows of W, `count` of them from `row` on, and some panels: their sums lie as (panels, tiles of a block, 16, 16).
static inline void write_panels(const BlockProduct& ask, const float* sums, int64_t row, int64_t count, int64_t first_panel,
                                int64_t panels, const float* more) {
  const int64_t of_panel = ask.rows_of_block / SIDE * SUMS;
  for (int64_t p = 0; p < panels; p++)
    for (int64_t r = 0; r < count; r += SIDE)
      write_tile(ask, sums + p * of_panel + r / SIDE * SUMS, row + r, first_panel + p, more ? more + r : nullptr);
}

// Some bytes of a row's codes are read: asks for those that come next, of it or, at its end, of its row in the next block.
// A row is read piece by piece, which no processor foresees.
AQ_INLINE void ask_for_next(const BlockProduct& ask, int64_t row, int64_t first, int64_t bytes) {
  const bool same_row = first + bytes < ask.of.row_bytes;
  if (!same_row && row + ask.rows_of_block >= ask.rows) return;
  const uint8_t* codes = ask.of.codes + row * ask.of.row_bytes;
  const uint8_t* next = codes + (same_row ? first + bytes : ask.rows_of_block * ask.of.row_bytes);
  for (int64_t i = 0; i < bytes; i += LINE) _mm_prefetch(next + i, _MM_HINT_T0);
}

}  // namespace AQ_ISA

#endif

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

#include "decoded.hpp"
#include "kernels.hpp"
#include "matrix_unit.hpp"
#include "pieces.hpp"
#include "rounding.hpp"
#include "stored.hpp"

#if defined(__AMX_BF16__)

namespace AQ_ISA {

constexpr int64_t PANELS_AT_ONCE = 32;

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

// Sixteen rows of pairs, one behind the other, to a panel.
static void to_panel(const uint16_t* rows, int64_t chunks, uint16_t* panel) {
  for (int64_t c = 0; c < chunks; c++, panel += TILE) {
    __m512i words[16];
    for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(rows + (i * chunks + c) * CHUNK);
    turn(words);
    for (int i = 0; i < 16; i++) _mm512_store_si512(panel + i * CHUNK, words[i]);
  }
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

// All panels from one on, with the chunks of W that are decoded.
template <int PIECES>
static void meet_panels(const BlockProduct& ask, const uint16_t* weight, int64_t rows, int64_t first_panel,
                        int64_t panels, int64_t first_chunk, int64_t chunks, float* sums) {
  const int64_t tiles = (rows + SIDE - 1) / SIDE, of_panel = ask.rows_of_block / SIDE * SUMS, tile = of_tile(ask);
  for (int64_t p = 0; p < panels; p += 2) {
    const bool two = p + 1 < panels;
    for (int64_t t = 0; t < tiles; t += two ? 2 : 4) {
      const uint16_t* x = ask.inputs + (first_panel + p) * ask.panel_size() + first_chunk * TILE;
      const Meeting of{weight + t * tile, x, tile, tiles_size(ask, 1), ask.piece_size(), ask.panel_size(), chunks,
                       sums + p * of_panel + t * SUMS, of_panel, first_chunk == 0};
      (two ? multiply<2, PIECES> : multiply<1, PIECES>)(of);
    }
  }
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
  Aligned<uint16_t> tiles(tiles_size(ask, PIECES));
  Aligned<float> sums(std::min(ask.panels(), PANELS_AT_ONCE) * ask.rows_of_block / SIDE * SUMS);
  for (int64_t b = first; b < last; b++) {
    weight.begin(b * ask.rows_of_block);
    for (int64_t p = 0; p < ask.panels(); p += PANELS_AT_ONCE) {
      const int64_t panels = std::min(PANELS_AT_ONCE, ask.panels() - p);
      for (int64_t c = 0; c < ask.chunks(); c += ask.chunks_at_once) {
        const int64_t chunks = std::min(ask.chunks_at_once, ask.chunks() - c);
        weight.decode(c, chunks, tiles.data());
        meet_panels<PIECES>(ask, tiles.data(), weight.count, p, panels, c, chunks, sums.data());
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

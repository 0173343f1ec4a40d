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

// The values that a row of x is taken for.
static void read_row(const BlockProduct& ask, int64_t m, RoundedRow& rounded, float* row) {
  if (!ask.rounded) return read_floats(ask.x, ask.dtype, m * ask.of.columns, ask.of.columns, row);
  rounded.read(m);
  for (int64_t start = 0; start < ask.of.columns; start += ask.run) {
    const float step = rounded.step_at(start);
    for (int64_t j = start; j < std::min(start + ask.run, ask.of.columns); j++)
      row[j] = step * ((float)rounded.whole[j] + ask.correction());
  }
}

void fill_blocks(const BlockProduct& ask, int64_t first, int64_t last) {
  const int64_t chunks = ask.chunks(), width = chunks * CHUNK, woven = chunks_woven(ask);
  std::vector<float> row(width + LANES);
  RoundedRow rounded(ask);
  Aligned<uint16_t> rows(2 * SIDE * width);
  for (int64_t p = first; p < last; p++) {
    for (int64_t i = 0; i < SIDE; i++) {
      std::fill(row.begin(), row.end(), 0.0f);
      if (p * SIDE + i < ask.count) read_row(ask, p * SIDE + i, rounded, row.data());
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
      write_panels(ask, sums.data(), weight.first_row, weight.count, p, panels, ask.bias ? ask.bias + weight.first_row : nullptr);
    }
  }
}

void block_product(const BlockProduct& ask, int64_t first, int64_t last) {
  (ask.pieces() == 1 ? multiply_blocks<1> : multiply_blocks<2>)(ask, first, last);
}

}  // namespace AQ_ISA

#endif

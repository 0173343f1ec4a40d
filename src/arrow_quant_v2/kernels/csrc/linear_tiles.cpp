// Many inputs times packed weights: a few rows of W are dequantized into the cache, and each weight meets a panel of
// inputs that lie side by side; compiled once per instruction set.
//
//   y (m, r) = sum_j w (r, j) x (m, j):   for a tile of rows r and a panel of lanes m, one column j after the other
//
// Every sum is added from the first column to the last, so that results depend neither on threads nor on tiles. The
// registers hold 6 rows and two vectors, or 12 rows and one. Assumes what kernels/linear.py has checked.
// Measured on an EPYC 7003 (AVX2, 2 cores): python bench/linear.py.
#include <algorithm>
#include <vector>

#include "bytes.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "panels.hpp"
#include "stored.hpp"

namespace AQ_ISA {

void dequantize(const Dequantize& ask, int64_t first, int64_t last);  // rows.cpp
void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last);

void fill_panels(const TiledProduct& ask, int64_t first, int64_t last) {
  const int64_t columns = ask.of.columns;
  std::vector<float> row(columns + LANES);
  for (int64_t p = first; p < last; p++) {
    float* to = (float*)ask.inputs_of_panels + p * columns * ask.lanes;
    for (int64_t i = 0; i < ask.lanes; i++) {
      const int64_t m = p * ask.lanes + i;
      std::fill(row.begin(), row.end(), 0.0f);
      if (m < ask.count) read_floats(ask.x, ask.dtype, m * columns, columns, row.data());
      for (int64_t j = 0; j < columns; j++) to[j * ask.lanes + i] = row[j];
    }
  }
}

// Floats from one row of a tile to the next: not a multiple of 4 KiB, of which a cache keeps eight lines only.
static int64_t stride_of(const TiledProduct& ask) { return (ask.of.columns + LANES - 1) / LANES * LANES + LANES; }

// ROWS rows of W times a panel of VECTORS vectors.
template <int ROWS, int VECTORS>
static void multiply_panel(const TiledProduct& ask, const float* weight, int64_t first, int64_t panel) {
  constexpr int64_t STEP = VECTORS * WIDTH;
  const int64_t columns = ask.of.columns, stride = stride_of(ask);
  const float* x = (const float*)ask.inputs_of_panels + panel * columns * STEP;
  FloatPart sums[ROWS][VECTORS] = {};
  for (int64_t j = 0; j < columns; j++, x += STEP)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++)
        sums[r][v] = product_part(weight[r * stride + j] - FloatPart{}, load_part(x + v * WIDTH), sums[r][v]);
  for (int r = 0; r < ROWS; r++) write_lanes<VECTORS>(ask, sums[r], first + r, panel, 0.0f);
}

template <int VECTORS>
static void multiply_tile(const TiledProduct& ask, const float* weight, int64_t first, int64_t count, int64_t panel) {
  constexpr int MOST = VECTORS == 1 ? 12 : 6;
  const int64_t stride = stride_of(ask);
  int64_t r = 0;
  for (; r + MOST <= count; r += MOST) multiply_panel<MOST, VECTORS>(ask, weight + r * stride, first + r, panel);
  for (; r < count; r++) multiply_panel<1, VECTORS>(ask, weight + r * stride, first + r, panel);
}

void tiled_product(const TiledProduct& ask, int64_t first, int64_t last) {
  const int64_t stride = stride_of(ask);
  std::vector<float> weight(TiledProduct::TILE_ROWS * stride);
  for (int64_t t = first; t < last; t++) {
    const int64_t row = t * TiledProduct::TILE_ROWS, count = std::min(TiledProduct::TILE_ROWS, ask.rows - row);
    for (int64_t r = 0; r < count; r++) {
      Dequantize of = from_row(ask, row + r);
      of.weight = &weight[r * stride];
      (ask.residual ? dequantize_r2q : dequantize)(of, 0, 1);
    }
    for (int64_t p = 0; p < ask.panels(); p++)
      (ask.lanes == WIDTH ? multiply_tile<1> : multiply_tile<2>)(ask, weight.data(), row, count, p);
  }
}

}  // namespace AQ_ISA

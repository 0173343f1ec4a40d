// Many inputs times packed weights: a few rows of W are dequantized into the cache, and each weight meets a panel of
// inputs that lie side by side; compiled once per instruction set.
//
//   y (m, r) = sum_j w (r, j) x (m, j):   for a tile of rows r and a panel of lanes m, one column j after the other
//
// A piece of so many columns as stay in the first-level cache meets all panels before the next one does. Every sum is added
// from the first column to the last, so that results depend neither on threads nor on tiles. The registers hold 6 rows and
// two vectors, or 12 rows and one. Assumes what kernels/linear.py has checked.
// Measured on an EPYC 7003 (AVX2, 2 cores): python bench/linear.py.
#include <algorithm>
#include <vector>

#include "bytes.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "panels.hpp"
#include "rounding.hpp"
#include "stored.hpp"

namespace AQ_ISA {

void dequantize(const Dequantize& ask, int64_t first, int64_t last);  // rows.cpp
void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last);

// Rows of x, as they are or rounded.
struct RowOfFloats {
  const TiledProduct& ask;
  RoundedRow rounded;

  explicit RowOfFloats(const TiledProduct& ask) : ask(ask), rounded(ask) {}

  void operator()(int64_t m, float* to) {
    if (!ask.rounded) return read_floats(ask.x, ask.dtype, m * ask.of.columns, ask.of.columns, to);
    rounded.read(m);
    rounded.to_floats(to);
  }
};

void fill_panels(const TiledProduct& ask, int64_t first, int64_t last) {
  const int64_t columns = ask.of.columns, stride = (columns + LANES - 1) / LANES * LANES;
  std::vector<float> rows(4 * stride);
  RowOfFloats read(ask);
  for (int64_t p = first; p < last; p++)
    for (int64_t i = 0; i < ask.lanes; i += 4) {
      for (int64_t k = 0; k < 4; k++) {
        const int64_t m = p * ask.lanes + i + k;
        m < ask.count ? read(m, &rows[k * stride]) : (void)std::fill_n(&rows[k * stride], columns, 0.0f);
      }
      to_lanes(rows.data(), stride, columns, (float*)ask.inputs_of_panels + p * columns * ask.lanes + i, ask.lanes);
    }
}

// Columns whose inputs, and whose weights of a tile, stay in the first-level cache, and panels whose sums stay in the next.
constexpr int64_t COLUMNS_TOGETHER = 256, PANELS_TOGETHER = 32;

// Floats from one row of a tile to the next, in a piece of so many columns: a constant, so that all rows have one address.
constexpr int64_t STRIDE = COLUMNS_TOGETHER + LANES;

// Adds so many columns of ROWS rows of W times a panel of VECTORS vectors.
template <int ROWS, int VECTORS>
static void add_columns(const float* weight, const float* x, int64_t columns, float* to) {
  FloatPart sums[ROWS * VECTORS];
  for (int i = 0; i < ROWS * VECTORS; i++) sums[i] = load_part(to + i * WIDTH);
  for (int64_t j = 0; j < columns; j++, x += VECTORS * WIDTH)
    for (int i = 0; i < ROWS * VECTORS; i++) {
      const FloatPart w = weight[i / VECTORS * STRIDE + j] - FloatPart{};
      sums[i] = product_part(w, load_part(x + i % VECTORS * WIDTH), sums[i]);
    }
  for (int i = 0; i < ROWS * VECTORS; i++) *(AnyFloats*)(to + i * WIDTH) = sums[i];
}

// Some dequantized rows of W, and their sums with some panels.
struct FloatTile {
  const TiledProduct& ask;
  const int64_t sums_of_panel;
  std::vector<float> weight, sums, row_of_weight;  // weight: (pieces of columns, rows, STRIDE)
  int64_t row, count;

  explicit FloatTile(const TiledProduct& ask)
      : ask(ask),
        sums_of_panel(ask.tile_rows * ask.lanes),
        weight((ask.of.columns + COLUMNS_TOGETHER - 1) / COLUMNS_TOGETHER * ask.tile_rows * STRIDE),
        sums(std::min(PANELS_TOGETHER, ask.panels()) * sums_of_panel),
        row_of_weight(ask.of.columns + LANES) {}

  void read(int64_t tile) {
    row = tile * ask.tile_rows, count = std::min(ask.tile_rows, ask.rows - row);
    for (int64_t r = 0; r < count; r++) {
      Dequantize of = from_row(ask, row + r);
      of.weight = row_of_weight.data();
      (ask.residual ? dequantize_r2q : dequantize)(of, 0, 1);
      for (int64_t j = 0; j < ask.of.columns; j += LANES) store(at(r, j), load(&row_of_weight[j]));
    }
  }

  // Rows beyond the last one have sums, too, which are not written.
  template <int VECTORS>
  void meet(int64_t first, int64_t panels) {
    constexpr int MOST = VECTORS == 1 ? 12 : 6, STEP = VECTORS * WIDTH;
    std::fill_n(sums.data(), panels * sums_of_panel, 0.0f);
    for (int64_t start = 0; start < ask.of.columns; start += COLUMNS_TOGETHER) {
      const int64_t columns = std::min(COLUMNS_TOGETHER, ask.of.columns - start);
      for (int64_t p = 0; p < panels; p++) {
        const float* x = (const float*)ask.inputs_of_panels + ((first + p) * ask.of.columns + start) * STEP;
        for (int64_t r = 0; r < count; r += MOST)
          add_columns<MOST, VECTORS>(at(r, start), x, columns, &sums[p * sums_of_panel + r * STEP]);
      }
    }
    for (int64_t p = 0; p < panels; p++) write_panel(ask, &sums[p * sums_of_panel], row, count, first + p, nullptr);
  }

 private:
  float* at(int64_t r, int64_t column) {
    return &weight[(column / COLUMNS_TOGETHER * ask.tile_rows + r) * STRIDE + column % COLUMNS_TOGETHER];
  }
};

void tiled_product(const TiledProduct& ask, int64_t first, int64_t last) {
  FloatTile tile(ask);
  for (int64_t t = first; t < last; t++) {
    tile.read(t);
    for (int64_t p = 0; p < ask.panels(); p += PANELS_TOGETHER) {
      const int64_t panels = std::min(PANELS_TOGETHER, ask.panels() - p);
      ask.lanes == WIDTH ? tile.meet<1>(p, panels) : tile.meet<2>(p, panels);
    }
  }
}

}  // namespace AQ_ISA

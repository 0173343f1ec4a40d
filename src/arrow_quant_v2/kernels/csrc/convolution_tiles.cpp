// Convolutions with packed weights where there is no matrix unit: a few rows of W, dequantized before, meet what lies at
// some positions of padded planes of x; compiled once per instruction set.
//
//   y (r, q) = sum_j w (r, j) plane_j (q + shift_j):   for a tile of rows r and a group of positions q, one column j after
//   the other
//
// Positions lie beside each other, so what they meet of a column is a few vectors, wherever they begin. A piece of so many
// columns as stay in the first-level cache meets all rows of a part before the next one does. Every sum is added from the
// first column to the last, so that results depend neither on threads nor on groups.
// Assumes what kernels/convolution.py has checked.
// Measured on an AMD EPYC (AVX2, 2 cores): python bench/convolution.py.
#include <algorithm>
#include <vector>

#include "bytes.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "panels.hpp"
#include "planes.hpp"
#include "results.hpp"
#include "stored.hpp"

#if !defined(__AMX_BF16__)

namespace AQ_ISA {

void dequantize(const Dequantize& ask, int64_t first, int64_t last);  // rows.cpp
void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last);

// Rows of a tile, whose sums at all positions of a group stay in registers.
constexpr int VECTORS = POSITIONS / WIDTH, ROWS = VECTORS == 2 ? 8 : 4;
constexpr int64_t COLUMNS_TOGETHER = 256, GROUPS_TOGETHER = 4;

// A row of values along the last axis.
static const float* read_row(const Convolution& ask, int64_t start, int64_t channel, std::vector<float>& row) {
  if (ask.dtype == FLOAT32 && !ask.equalization) return (const float*)ask.x + start;
  read_floats(ask.x, ask.dtype, start, ask.in[2], row.data());
  if (ask.equalization)
    for (float& value : row) value /= ask.equalization[channel];
  return row.data();
}

void fill_planes(const Convolution& ask, int64_t first, int64_t last) {
  const int64_t of_channel = ask.phases * ask.plane_size;
  std::vector<float> row((ask.in[2] + LANES - 1) / LANES * LANES);
  for (int64_t c = first; c < std::min(last, ask.channels); c++) {
    float* planes = (float*)ask.planes + c * of_channel;
    std::fill_n(planes, of_channel, 0.0f);
    each_row(ask, c, [&](int64_t start, int64_t at) { scatter(ask, read_row(ask, start, c, row), planes + at); });
  }
}

static void dequantize_row(const Convolution& ask, int64_t row, float* to) {
  Dequantize of = from_row(ask, row);
  of.weight = to;
  (ask.residual ? dequantize_r2q : dequantize)(of, 0, 1);
}

// Blocks of rows of W; rows of a tile that are beyond the last one are zeros.
void decode_blocks(const Convolution& ask, int64_t first, int64_t last) {
  const int64_t columns = ask.of.columns, stride = (columns + LANES - 1) / LANES * LANES;
  std::vector<float> rows(4 * stride);
  for (int64_t r = first * ask.rows_of_block; r < last * ask.rows_of_block; r += 4) {
    float* to = (float*)ask.weight + r / ROWS * ROWS * columns + r % ROWS;
    for (int64_t k = 0; k < 4; k++) {
      const int64_t row = ask.first_block * ask.rows_of_block + r + k;
      if (row >= ask.rows)
        std::fill_n(&rows[k * stride], columns, 0.0f);
      else
        dequantize_row(ask, row, &rows[k * stride]);
    }
    to_lanes(rows.data(), stride, columns, to, ROWS);
  }
}

// Adds so many columns of a tile of W (columns, ROWS), with what they meet from where their shifts begin, to sums
// (ROWS, POSITIONS) that begin with the first ones.
static void add_columns(const float* weight, const float* planes, const int64_t* shifts, int64_t columns, bool first,
                        float* to) {
  FloatPart sums[ROWS][VECTORS] = {};
  if (!first)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) sums[r][v] = load_part(to + r * POSITIONS + v * WIDTH);
  for (int64_t j = 0; j < columns; j++, weight += ROWS) {
    FloatPart x[VECTORS];
    for (int v = 0; v < VECTORS; v++) x[v] = load_part(planes + shifts[j] + v * WIDTH);
    for (int r = 0; r < ROWS; r++) {
      const FloatPart w = weight[r] - FloatPart{};
      for (int v = 0; v < VECTORS; v++) sums[r][v] = product_part(w, x[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) *(AnyFloats*)(to + r * POSITIONS + v * WIDTH) = sums[r][v];
}

static void add_bias(const float* from, float bias, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i] + bias;
}

// A part of the decoded rows of W, and their sums at some groups of positions that follow each other.
struct PositionTiles {
  const Convolution& ask;
  const std::vector<int64_t> shifts;
  std::vector<int64_t> in_panel;
  const int64_t first_row, rows, of_group;
  std::vector<float> panel, sums;  // (columns together, POSITIONS); (groups together, rows, POSITIONS)

  PositionTiles(const Convolution& ask, int64_t part)
      : ask(ask),
        shifts(shifts_in_order(ask)),
        first_row(row_of_part(part)),
        rows(row_of_part(part + 1) - first_row),
        of_group((rows + ROWS) * POSITIONS),
        panel(COLUMNS_TOGETHER * POSITIONS),
        sums(GROUPS_TOGETHER * of_group) {
    for (int64_t j = 0; j < COLUMNS_TOGETHER; j++) in_panel.push_back(j * POSITIONS);
  }

  void meet(int64_t group, int64_t groups) {
    for (int64_t g = 0; g < groups; g++) add_group(start_of(group + g), &sums[g * of_group]);
    std::vector<Run> runs;
    for (int64_t g = 0; g < groups; g++)
      for (Run run : runs_of(group + g)) {
        run.first += g * of_group;
        runs.push_back(run);
      }
    for (int64_t r = 0; r < rows; r++) write_row(r, runs);
  }

 private:
  int64_t row_of_part(int64_t part) const {
    const int64_t block = part * ask.blocks_at_once / ask.parts_of_rows;
    return std::min(block * ask.rows_of_block, ask.rows - ask.first_block * ask.rows_of_block);
  }

  // The last group begins earlier where there is nothing behind the planes, and leaves what another one writes.
  int64_t start_of(int64_t group) const {
    return std::max<int64_t>(0, std::min(group * POSITIONS, ask.count - POSITIONS));
  }

  void add_group(int64_t start, float* to) {
    const float* planes = (const float*)ask.planes + start;
    for (int64_t j = 0; j < ask.of.columns; j += COLUMNS_TOGETHER) {
      const int64_t columns = std::min(COLUMNS_TOGETHER, ask.of.columns - j);
      if (ask.in_place) gather(planes, &shifts[j], columns);
      for (int64_t r = 0; r < rows; r += ROWS)
        add_columns((const float*)ask.weight + (first_row + r) * ask.of.columns + j * ROWS,
                    ask.in_place ? panel.data() : planes, ask.in_place ? in_panel.data() : &shifts[j], columns, j == 0,
                    to + r * POSITIONS);
    }
  }

  // What lies in x itself can lie at distances that meet in the cache, so it is read once.
  void gather(const float* planes, const int64_t* from, int64_t columns) {
    for (int64_t j = 0; j < columns; j++)
      for (int v = 0; v < VECTORS; v++)
        *(AnyFloats*)&panel[j * POSITIONS + v * WIDTH] = load_part(planes + from[j] + v * WIDTH);
  }

  // What is written of the sums of a group, of any row.
  std::vector<Run> runs_of(int64_t group) const {
    const int64_t start = start_of(group);
    const int64_t left_out = group * POSITIONS - start;
    Cursor cursor(ask, start);
    cursor.next(POSITIONS);
    for (Run& run : cursor.runs) run.leave_out(std::clamp<int64_t>(left_out - run.first, 0, run.count));
    return cursor.runs;
  }

  // Behind each other, so that lines of the result are full before others push them out of the cache.
  void write_row(int64_t r, const std::vector<Run>& runs) const {
    const int64_t row = ask.first_block * ask.rows_of_block + first_row + r;
    const float bias = ask.bias ? ask.bias[row] : 0.0f, *from = &sums[r * POSITIONS];
    for (const Run& run : runs) {
      const int64_t at = (run.item * ask.rows + row) * ask.out_size + run.at;
      if (ask.dtype == FLOAT32)
        add_bias(from + run.first, bias, run.count, (float*)ask.y + at);
      else
        for (int64_t i = 0; i < run.count; i += 4)
          write_sums(ask, at + i, load_quad(from + run.first + i) + bias, std::min<int64_t>(4, run.count - i));
    }
  }
};

// Groups of positions of a part of the rows, then those of the next.
void convolve(const Convolution& ask, int64_t first, int64_t last) {
  const int64_t groups = ask.groups_of_positions();
  while (first < last) {
    const int64_t until = std::min(last, (first / groups + 1) * groups), offset = first / groups * groups;
    PositionTiles tiles(ask, first / groups);
    for (; first < until; first += GROUPS_TOGETHER)
      tiles.meet(first - offset, std::min(GROUPS_TOGETHER, until - first));
    first = until;
  }
}

}  // namespace AQ_ISA

#endif

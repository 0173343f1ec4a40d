// Many inputs rounded to 8 bits times packed weights, in whole numbers; compiled once per instruction set, for x86 only:
// elsewhere floats are as fast.
//
//   y = sum over groups of  step_x (step * sum code_j q_j + base * sum q_j)
//
// as in linear_rounded.cpp, on the affine grid: on the other one two sums for each code are no faster than one of floats,
// nor are codes of 8 bits where the processor has no VNNI. The codes of a few rows are unpacked to bytes; a word of them,
// that is four columns, meets the same columns of a panel of inputs, one word for each.
//
// Two products of bytes are added in 16 bits: |2 * 3 * 128| and |2 * 15 * 128| leave room for 42 and 8 of them.
// Measured on an EPYC 7003 (AVX2, 2 cores): python bench/linear.py.
#include <algorithm>
#include <numeric>
#include <vector>

#include "bytes.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "panels.hpp"
#include "rounding.hpp"
#include "stored.hpp"

namespace AQ_ISA {

#if defined(__AVX2__)

#if defined(__AVX512VNNI__)
bool tiles_bytes(int) { return true; }
#else
bool tiles_bytes(int bits) { return bits < 8; }
#endif

// The whole numbers of one row of x to one lane of a panel.
static void to_lane(const std::vector<int8_t>& row, const TiledProduct& ask, int32_t* to) {
  for (int64_t w = 0; w < ask.words(); w++) {
    int8_t word[4];
    std::memcpy(word, &row[w * 4], 4);
    std::memcpy(to + w * ask.lanes, word, 4);
  }
}

// One row of x, and nothing where there is none, to one lane of a panel.
static void fill_lane(const TiledProduct& ask, int64_t panel, int64_t lane, RoundedRow& row) {
  const int64_t m = panel * ask.lanes + lane;
  if (m < ask.count)
    row.read(m);
  else
    std::fill(row.whole.begin(), row.whole.end(), (int8_t)0);
  for (int64_t g = 0; g < ask.of.groups; g++) {
    const int64_t start = g * ask.of.group, n = std::min(ask.of.group, ask.of.columns - start);
    const int64_t at = (panel * ask.of.groups + g) * ask.lanes + lane;
    ask.steps[at] = m < ask.count ? row.step_at(start) : 0.0f;
    ask.sums[at] = ask.steps[at] * (float)std::accumulate(&row.whole[start], &row.whole[start] + n, 0);
  }
}

void fill_rounded_panels(const TiledProduct& ask, int64_t first, int64_t last) {
  RoundedRow row(ask);
  for (int64_t p = first; p < last; p++)
    for (int64_t lane = 0; lane < ask.lanes; lane++) {
      fill_lane(ask, p, lane, row);
      to_lane(row.whole, ask, (int32_t*)ask.inputs_of_panels + p * ask.words() * ask.lanes + lane);
    }
}

// The codes of some rows as bytes, and what they mean.
struct CodeTile {
  int64_t stride;  // bytes of a row
  std::vector<uint8_t> all;
  std::vector<RowLevels> levels;
  std::vector<float> correction;  // of all inputs

  explicit CodeTile(const TiledProduct& ask)
      : stride((ask.words() * 4 + 63) / 64 * 64 + 64),  // not a multiple of 4 KiB, of which a cache keeps few lines
        all(TiledProduct::TILE_ROWS * stride),
        levels(TiledProduct::TILE_ROWS, RowLevels(ask)),
        correction(TiledProduct::TILE_ROWS) {}

  void read(const TiledProduct& ask, int64_t row, int64_t count) {
    for (int64_t r = 0; r < count; r++) {
      levels[r].read(ask, row + r);
      uint8_t* bytes = &all[r * stride];
      unpack_row(ask.of.codes + (row + r) * ask.of.row_bytes, bytes, ask.of.columns, ask.of.bits);
      if (ask.correction() != 0.0f) correction[r] = ask.step * ask.correction() * sum_of_row(ask, levels[r], bytes);
    }
  }

 private:
  static float sum_of_row(const TiledProduct& ask, const RowLevels& of, const uint8_t* bytes) {
    float sum = 0.0f;
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const int64_t start = g * ask.of.group, n = std::min(ask.of.group, ask.of.columns - start);
      int32_t codes = 0;
      for (int64_t j = 0; j < n; j++) codes += bytes[start + j];
      sum += of.base[g] * (float)n + of.step[g] * (float)codes;
    }
    return sum;
  }
};

AQ_INLINE WordPart everywhere(const uint8_t* word) {
  int32_t x;
  std::memcpy(&x, word, 4);
  return WordPart{} + x;
}

template <int ROWS, int VECTORS>
struct Whole {
  WordPart sum[ROWS][VECTORS] = {};

  // `words` words of codes, of rows that are `stride` bytes long, times those of a panel.
#if defined(__AVX512VNNI__)
  template <int BITS>
  AQ_INLINE_MEMBER void add(const uint8_t* codes, int64_t stride, const int32_t* x, int64_t words) {
    for (int64_t w = 0; w < words; w++, x += VECTORS * WIDTH)
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
          const WordPart some = everywhere(codes + r * stride + 4 * w), inputs = load_bytes(x + v * WIDTH);
          sum[r][v] = (WordPart)_mm512_dpbusd_epi32((__m512i)sum[r][v], (__m512i)some, (__m512i)inputs);
        }
  }
#else
  template <int BITS>
  AQ_INLINE_MEMBER void add(const uint8_t* codes, int64_t stride, const int32_t* x, int64_t words) {
    constexpr int64_t ROOM = BITS == 2 ? 32 : 8;
    for (int64_t first = 0; first < words; first += ROOM) {
      WordPart pairs[ROWS][VECTORS] = {};
      const int64_t last = first + ROOM < words ? first + ROOM : words;
      for (int64_t w = first; w < last; w++, x += VECTORS * WIDTH)
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < VECTORS; v++) {
            const WordPart some = everywhere(codes + r * stride + 4 * w), inputs = load_bytes(x + v * WIDTH);
            pairs[r][v] = add_pairs(pairs[r][v], products_of_pairs(some, inputs));
          }
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] += multiply_pairs(pairs[r][v], WordPart{} + 0x00010001);
    }
  }
#endif
};

template <int BITS, int ROWS, int VECTORS>
static void multiply_rows(const TiledProduct& ask, const CodeTile& tile, int64_t at, int64_t panel, float* to) {
  constexpr int64_t STEP = VECTORS * WIDTH;
  const int32_t* x = (const int32_t*)ask.inputs_of_panels + panel * ask.words() * STEP;
  const int64_t group_words = ask.of.groups == 1 ? ask.words() : ask.of.group / TiledProduct::WORD_COLUMNS;
  FloatPart total[ROWS][VECTORS] = {};
  for (int64_t g = 0; g < ask.of.groups; g++) {
    const int64_t start = g * group_words, words = std::min(group_words, ask.words() - start);
    const float *steps = ask.steps + (panel * ask.of.groups + g) * STEP, *sums = ask.sums + (steps - ask.steps);
    const int64_t byte = at * tile.stride + 4 * start;
    Whole<ROWS, VECTORS> all;
    all.template add<BITS>(&tile.all[byte], tile.stride, x + start * STEP, words);
    for (int r = 0; r < ROWS; r++) {
      const RowLevels& levels = tile.levels[at + r];
      const FloatPart step = levels.step[g] - FloatPart{}, base = levels.base[g] - FloatPart{};
      for (int v = 0; v < VECTORS; v++) {
        const FloatPart level = to_float_part(all.sum[r][v]) * step;
        total[r][v] = product_part(level, load_part(steps + v * WIDTH), total[r][v]);
        total[r][v] = product_part(load_part(sums + v * WIDTH), base, total[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) *(AnyFloats*)(to + r * STEP + v * WIDTH) = total[r][v];
}

template <int BITS, int VECTORS>
static void multiply_tile(const TiledProduct& ask, const CodeTile& tile, int64_t first, int64_t count, int64_t panel) {
  constexpr int MOST = 4, STEP = VECTORS * WIDTH;
  float sums[TiledProduct::TILE_ROWS * STEP];
  int64_t r = 0;
  for (; r + MOST <= count; r += MOST) multiply_rows<BITS, MOST, VECTORS>(ask, tile, r, panel, sums + r * STEP);
  for (; r < count; r++) multiply_rows<BITS, 1, VECTORS>(ask, tile, r, panel, sums + r * STEP);
  write_panel(ask, sums, first, count, panel, tile.correction.data());
}

template <int BITS>
static void multiply_tiles(const TiledProduct& ask, int64_t first, int64_t last) {
  CodeTile tile(ask);
  for (int64_t t = first; t < last; t++) {
    const int64_t row = t * TiledProduct::TILE_ROWS, count = std::min(TiledProduct::TILE_ROWS, ask.rows - row);
    tile.read(ask, row, count);
    for (int64_t p = 0; p < ask.panels(); p++)
      if (ask.lanes == WIDTH)
        multiply_tile<BITS, 1>(ask, tile, row, count, p);
      else
        multiply_tile<BITS, 2>(ask, tile, row, count, p);
  }
}

void rounded_tiled_product(const TiledProduct& ask, int64_t first, int64_t last) {
  if (ask.of.bits == 2) multiply_tiles<2>(ask, first, last);
  if (ask.of.bits == 4) multiply_tiles<4>(ask, first, last);
#if defined(__AVX512VNNI__)
  if (ask.of.bits == 8) multiply_tiles<8>(ask, first, last);
#endif
}

#else

bool tiles_bytes(int) { return false; }
void fill_rounded_panels(const TiledProduct&, int64_t, int64_t) {}
void rounded_tiled_product(const TiledProduct&, int64_t, int64_t) {}

#endif

}  // namespace AQ_ISA

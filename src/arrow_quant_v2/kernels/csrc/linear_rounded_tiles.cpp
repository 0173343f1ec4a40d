// Many inputs rounded to 8 bits times packed weights, in whole numbers; compiled once per instruction set, for x86 only:
// elsewhere floats are as fast. Inputs as they are go the same way, as two or three whole numbers each (RoundedProduct),
// where that is faster than floats.
//
//   y = sum over groups of  step_x (step * sum code_j q_j + jump * sum top_j q_j + base * sum q_j)
//
// as in linear_rounded.cpp. A word of codes, that is four columns, meets the same columns of a panel of inputs, one word
// for each lane; on the r2q grid the codes of a row are two rows of bytes:
//
//   tile    (rows of codes, columns together): bytes
//   panel   (words, lanes): all rows of x, or the first piece of some rows, then their second one
//
// Where both x and W may be rounded to 8 bits, codes of 2 and 4 bits on the r2q grid are: each group has 255 equal steps
// from its lowest level to its highest, and is an affine one.
//
// The codes of so many columns as stay in the first-level cache meet all panels, while the next ones are asked for. Every
// sum is added from the first group to the last, so that results depend neither on threads nor on tiles.
//
// Where there is no VNNI, two products of bytes are added in 16 bits: |2 * 3 * 128| and |2 * 15 * 128| leave room for 42 and
// 8 of them; there two sums for each code are no faster than one of floats with many rows, nor are codes of 8 bits.
// Measured on an EPYC 7003 (AVX2) and a Xeon with AVX-512 VNNI, 2 cores each: python bench/linear.py.
#include <algorithm>
#include <numeric>
#include <vector>

#include "bytes.hpp"
#include "code_tile.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "panels.hpp"
#include "rounding.hpp"
#include "stored.hpp"

namespace AQ_ISA {

#if defined(__AVX2__)

#if defined(__AVX512VNNI__)
// Up to two sums of bytes are faster than one of floats; more are, as long as decoding takes most of the time.
bool tiles_bytes(const Product& ask, int pieces) {
  const int sums = (ask.residual ? 2 : 1) * pieces;
  return sums <= 2 || ask.count <= (sums == 3 ? 32 : sums == 4 ? 64 : 16);
}
constexpr int CODE_ROWS = 12;  // that meet a panel together
#else
bool tiles_bytes(const Product& ask, int pieces) {
  return !ask.residual && ask.of.bits < 8 && (pieces == 1 || ask.count <= 16);
}
constexpr int CODE_ROWS = 4;
#endif

constexpr int64_t PANELS_TOGETHER = 64;  // whose sums stay in the second-level cache

// Rows of x to the lanes of panels, which hold zeros before.
struct LaneRows {
  const TiledProduct& ask;
  const int64_t width;
  RoundedRow rounded;
  GroupPieces group;
  std::vector<int8_t> whole;  // (pieces, width): of the row that was read

  explicit LaneRows(const TiledProduct& ask)
      : ask(ask), width(ask.words() * TiledProduct::WORD_COLUMNS), rounded(ask), group(ask), whole(ask.pieces * width) {}

  void fill(int64_t panel, int64_t i) {
    const int64_t m = panel * ask.rows_of_panel() + i, at = panel * ask.of.groups * ask.lanes + i;
    ask.rounded ? read_rounded(m, at) : read_pieces(m, at);
    for (int p = 0; p < ask.pieces; p++)
      to_lane(&whole[p * width], (int32_t*)ask.inputs_of_panels + panel * ask.words() * ask.lanes + p * ask.rows_of_panel() + i);
  }

 private:
  void read_rounded(int64_t m, int64_t at) {
    rounded.read(m);
    std::copy_n(rounded.whole.begin(), ask.of.columns, whole.begin());
    for (int64_t g = 0; g < ask.of.groups; g++, at += ask.lanes) {
      const auto first = whole.begin() + g * ask.of.group;
      ask.steps[at] = rounded.step_at(g * ask.of.group);
      ask.sums[at] = ask.steps[at] * (float)std::accumulate(first, first + ask.columns_of(g), 0);
    }
  }

  void read_pieces(int64_t m, int64_t at) {
    for (int64_t g = 0; g < ask.of.groups; g++, at += ask.lanes) {
      group.read(m, g);
      ask.sums[at] = group.sum;
      float step = group.step;
      for (int p = 0; p < ask.pieces; p++, step /= ask.FINER) {
        ask.steps[at + p * ask.rows_of_panel()] = step;
        std::copy_n(group.piece(p), ask.columns_of(g), &whole[p * width + g * ask.of.group]);
      }
    }
  }

  void to_lane(const int8_t* from, int32_t* to) const {
    const int64_t words = ask.words(), lanes = ask.lanes;
    for (int64_t w = 0; w < words; w++) std::memcpy(to + w * lanes, from + w * 4, 4);
  }
};

void fill_rounded_panels(const TiledProduct& ask, int64_t first, int64_t last) {
  LaneRows rows(ask);
  for (int64_t p = first; p < last; p++)
    for (int64_t i = 0; i < std::min(ask.rows_of_panel(), ask.count - p * ask.rows_of_panel()); i++) rows.fill(p, i);
}

AQ_INLINE WordPart everywhere(const uint8_t* word) {
  int32_t x;
  std::memcpy(&x, word, 4);
  return WordPart{} + x;
}

// What so many words of all rows of codes, `stride` bytes long, and of a panel are together: (CODE_ROWS, VECTORS).
#if defined(__AVX512VNNI__)
template <int, int VECTORS>
AQ_INLINE void add_words(const uint8_t* codes, int64_t stride, const int32_t* x, int64_t words, WordPart* to) {
  WordPart sums[CODE_ROWS][VECTORS];
  for (int r = 0; r < CODE_ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = WordPart{};
  for (int64_t w = 0; w < words; w++, x += VECTORS * WIDTH)
    for (int r = 0; r < CODE_ROWS; r++) {
      const __m512i some = (__m512i)everywhere(codes + r * stride + 4 * w);
      for (int v = 0; v < VECTORS; v++)
        sums[r][v] = (WordPart)_mm512_dpbusd_epi32((__m512i)sums[r][v], some, (__m512i)load_bytes(x + v * WIDTH));
    }
  for (int r = 0; r < CODE_ROWS; r++)
    for (int v = 0; v < VECTORS; v++) to[r * VECTORS + v] = sums[r][v];
}
#else
template <int BITS, int VECTORS>
AQ_INLINE void add_words(const uint8_t* codes, int64_t stride, const int32_t* x, int64_t words, WordPart* to) {
  constexpr int64_t ROOM = BITS == 2 ? 32 : 8;
  for (int i = 0; i < CODE_ROWS * VECTORS; i++) to[i] = WordPart{};
  for (int64_t first = 0; first < words; first += ROOM) {
    WordPart pairs[CODE_ROWS * VECTORS] = {};
    const int64_t last = first + ROOM < words ? first + ROOM : words;
    for (int64_t w = first; w < last; w++, x += VECTORS * WIDTH)
      for (int i = 0; i < CODE_ROWS * VECTORS; i++) {
        const WordPart some = everywhere(codes + i / VECTORS * stride + 4 * w), inputs = load_bytes(x + i % VECTORS * WIDTH);
        pairs[i] = add_pairs(pairs[i], products_of_pairs(some, inputs));
      }
    for (int i = 0; i < CODE_ROWS * VECTORS; i++) to[i] += multiply_pairs(pairs[i], WordPart{} + 0x00010001);
  }
}
#endif

// The decoded codes of some rows of W, from one on, and a panel, from the columns on that were decoded first. Codes that
// are decoded next may be asked for on the way.
struct Meeting {
  int64_t row, panel, start;
  const uint8_t* next;
  float* sums;  // (rows, lanes)
};

// What the whole numbers of a group give: of ROWS rows of W, each with sums of codes and, on the r2q grid, of highest bits.
template <bool RESIDUAL, int ROWS, int VECTORS>
AQ_INLINE void add_levels(const WordPart* all, const RowLevels* levels, int64_t g, const float* steps, const float* inputs,
                          FloatPart (&total)[ROWS][VECTORS]) {
  constexpr int OF_ROW = RESIDUAL ? 2 : 1;
  for (int r = 0; r < ROWS; r++) {
    const FloatPart step = levels[r].step[g] - FloatPart{}, base = levels[r].base[g] - FloatPart{};
    for (int v = 0; v < VECTORS; v++) {
      FloatPart level = to_float_part(all[r * OF_ROW * VECTORS + v]) * step;
      if (RESIDUAL)
        level = product_part(to_float_part(all[(r * OF_ROW + 1) * VECTORS + v]), levels[r].jump[g] - FloatPart{}, level);
      total[r][v] = product_part(level, load_part(steps + v * WIDTH), total[r][v]);
      total[r][v] = product_part(load_part(inputs + v * WIDTH), base, total[r][v]);
    }
  }
}

template <int BITS, bool RESIDUAL, int VECTORS>
static void multiply_rows(const TiledProduct& ask, CodeTile& tile, const Meeting& of) {
  constexpr int64_t STEP = VECTORS * WIDTH, WORD = TiledProduct::WORD_COLUMNS;
  constexpr int ROWS = CODE_ROWS / (RESIDUAL ? 2 : 1);
  const int32_t* x = (const int32_t*)ask.inputs_of_panels + (of.panel * ask.words() + of.start / WORD) * STEP;
  const int64_t first = of.start / ask.of.group, last = std::min(ask.of.groups, first + tile.columns / ask.of.group);
  const int64_t at = of.panel * ask.of.groups * STEP, stride = tile.stride, row_bytes = ask.of.row_bytes;
  const float *steps = ask.steps + at, *inputs = ask.sums + at;
  const RowLevels* levels = &tile.levels[of.row];
  const uint8_t *codes = tile.row(of.row), *next = of.next ? of.next + of.row * row_bytes : nullptr;
  float* to = of.sums + of.row * STEP;
  FloatPart total[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) total[r][v] = load_part(to + r * STEP + v * WIDTH);
  for (int64_t g = first; g < last; g++) {
    if (next)
      for (int r = 0; r < ROWS; r++) ask_for(next + r * row_bytes + (g - first) * ask.group_bytes(), ask.group_bytes());
    const int64_t words = (ask.columns_of(g) + WORD - 1) / WORD;
    WordPart all[CODE_ROWS * VECTORS];
    add_words<BITS, VECTORS>(codes, stride, x, words, all);
    add_levels<RESIDUAL, ROWS, VECTORS>(all, levels, g, steps + g * STEP, inputs + g * STEP, total);
    codes += words * WORD, x += words * STEP;
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) *(AnyFloats*)(to + r * STEP + v * WIDTH) = total[r][v];
}

// Rows beyond the last one have sums, too, which are not written.
template <int BITS, bool RESIDUAL>
static void multiply_tiles(const TiledProduct& ask, int64_t first, int64_t last) {
  constexpr int ROWS = CODE_ROWS / (RESIDUAL ? 2 : 1);
  CodeTile tile(ask);
  const int64_t of_panel = TiledProduct::TILE_ROWS * ask.lanes;
  std::vector<float> sums(std::min(PANELS_TOGETHER, ask.panels()) * of_panel + 4);
  const auto multiply = ask.lanes == WIDTH ? multiply_rows<BITS, RESIDUAL, 1> : multiply_rows<BITS, RESIDUAL, 2>;
  for (int64_t t = first; t < last; t++) {
    tile.begin(t);
    for (int64_t begin = 0; begin < ask.panels(); begin += PANELS_TOGETHER) {
      const int64_t panels = std::min(PANELS_TOGETHER, ask.panels() - begin);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t start = 0; start < ask.of.columns; start += tile.columns) {
        tile.decode(start);
        for (int64_t p = 0; p < panels; p++)
          for (int64_t r = 0; r < tile.count; r += ROWS)
            multiply(ask, tile, {r, begin + p, start, p ? nullptr : tile.next(start), &sums[p * of_panel]});
      }
      for (int64_t p = 0; p < panels; p++)
        write_panel(ask, &sums[p * of_panel], tile.first_row, tile.count, begin + p, tile.more.data());
    }
  }
}

void rounded_tiled_product(const TiledProduct& ask, int64_t first, int64_t last) {
#if defined(__AVX512VNNI__)
  (ask.residual && !rounds_weight(ask) ? multiply_tiles<8, true> : multiply_tiles<8, false>)(ask, first, last);
#else
  if (ask.of.bits == 2) multiply_tiles<2, false>(ask, first, last);
  if (ask.of.bits == 4) multiply_tiles<4, false>(ask, first, last);
#endif
}

#else

bool tiles_bytes(const Product&, int) { return false; }
void fill_rounded_panels(const TiledProduct&, int64_t, int64_t) {}
void rounded_tiled_product(const TiledProduct&, int64_t, int64_t) {}

#endif

}  // namespace AQ_ISA

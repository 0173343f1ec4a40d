// Codes of some rows and columns of W as bytes, for products of whole numbers; knows nothing of how they are multiplied.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.hpp"
#include "levels.hpp"
#include "stored.hpp"

namespace AQ_ISA {

constexpr int64_t COLUMNS_TOGETHER = 512;  // whose codes, and whose inputs of a panel, stay in the first-level cache

static inline void highest_bits(const uint8_t* __restrict codes, int64_t count, int half, uint8_t* __restrict to) {
  for (int64_t j = 0; j < count; j++) to[j] = codes[j] >= half;
}

// Whether W is rounded as x is.
static inline bool rounds_weight(const TiledProduct& ask) {
  return ask.residual && ask.rounded && ask.dtype != FLOAT32 && ask.of.bits < 8;
}

#if defined(__AVX512VNNI__)
// What each code of a group of the r2q grid becomes, 0 to 255, so that the grid is an affine one.
struct CodeLists {
  const Product& ask;
  std::vector<uint8_t> lists;          // (groups, 16)
  std::vector<float> lowest, inverse;  // (groups,): of levels beyond the base, and 255 / their range

  explicit CodeLists(const Product& ask)
      : ask(ask), lists(16 * ask.of.groups), lowest(ask.of.groups), inverse(ask.of.groups) {}

  void read(RowLevels& levels) {
    measure(levels);
    const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 upper = (__mmask16)(0xFFFFu << (1 << (ask.of.bits - 1)));
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const __m512 level = _mm512_fmsub_ps(code, _mm512_set1_ps(levels.step[g]), _mm512_set1_ps(lowest[g]));
      const __m512 all = _mm512_mask_add_ps(level, upper, level, _mm512_set1_ps(levels.jump[g]));
      const __m512i place = _mm512_cvtps_epi32(_mm512_mul_ps(all, _mm512_set1_ps(inverse[g])));
      _mm_storeu_si128((__m128i*)&lists[16 * g], _mm512_cvtepi32_epi8(place));
    }
    for (int64_t g = 0; g < ask.of.groups; g++) {
      levels.base[g] += lowest[g];
      levels.step[g] = 1.0f / inverse[g];
    }
  }

  // Codes of a row from one group on.
  void translate(int64_t g, uint8_t* codes, int64_t count) const {
    for (; count > 0; count -= ask.of.group, codes += ask.of.group, g++) {
      const __m512i list = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)&lists[16 * g]));
      for (int64_t j = 0; j < ask.columns_of(g); j += 64) {
        const __mmask64 some = ~0ull >> (64 - std::min<int64_t>(64, ask.columns_of(g) - j));
        _mm512_mask_storeu_epi8(codes + j, some, _mm512_shuffle_epi8(list, _mm512_loadu_si512(codes + j)));
      }
    }
  }

 private:
  // The lowest and the highest level are that of the first or last code without the highest bit, or with it.
  void measure(const RowLevels& levels) {
    const float half = (float)(1 << (ask.of.bits - 1)), least = std::numeric_limits<float>::min();
    const float *__restrict step = levels.step.data(), *__restrict jump = levels.jump.data();
    float *__restrict low = lowest.data(), *__restrict by = inverse.data();
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const float last = (half - 1.0f) * step[g], upper = half * step[g] + jump[g], last_upper = upper + last;
      const float under = last < 0.0f ? last : 0.0f, over = last > 0.0f ? last : 0.0f;
      const float least_upper = upper < last_upper ? upper : last_upper, most_upper = upper < last_upper ? last_upper : upper;
      low[g] = under < least_upper ? under : least_upper;
      const float range = (over > most_upper ? over : most_upper) - low[g], spoiled = last_upper - last_upper;
      by[g] = 255.0f / ((range > 255.0f * least ? range : 255.0f * least) + spoiled);
    }
  }
};
#else
struct CodeLists {
  explicit CodeLists(const Product&) {}
  void read(RowLevels&) {}
  void translate(int64_t, uint8_t*, int64_t) const {}
};
#endif

// The codes of some rows and columns as bytes, on the r2q grid with a row of their highest bits behind each.
struct CodeTile {
  const TiledProduct& ask;
  const bool listed, two_rows;
  const int64_t columns, stride;  // decoded together; bytes of a row, not a multiple of 4 KiB, of which a cache keeps few lines
  int64_t first_row = 0, count = 0;
  std::vector<uint8_t> all;
  std::vector<RowLevels> levels;
  std::vector<CodeLists> lists;
  std::vector<float> more;  // what each row gets besides

  explicit CodeTile(const TiledProduct& ask)
      : ask(ask),
        listed(rounds_weight(ask)),
        two_rows(ask.residual && !listed),
        columns(ask.of.groups == 1 ? ask.of.columns : std::max<int64_t>(1, COLUMNS_TOGETHER / ask.of.group) * ask.of.group),
        stride((columns + 63) / 64 * 64 + 64),
        all((two_rows ? 2 : 1) * TiledProduct::TILE_ROWS * stride),
        levels(TiledProduct::TILE_ROWS, RowLevels(ask)),
        lists(listed ? TiledProduct::TILE_ROWS : 0, CodeLists(ask)),
        more(TiledProduct::TILE_ROWS) {}

  void begin(int64_t tile) {
    first_row = tile * TiledProduct::TILE_ROWS;
    count = std::min(TiledProduct::TILE_ROWS, ask.rows - first_row);
    for (int64_t r = 0; r < count; r++) {
      levels[r].read(ask, first_row + r);
      if (listed) lists[r].read(levels[r]);
    }
  }

  // Columns from `start` on, the first ones first.
  void decode(int64_t start) {
    const int64_t some = std::min(columns, ask.of.columns - start);
    for (int64_t r = 0; r < count; r++) {
      uint8_t* bytes = row(r);
      unpack_row(codes_of(r, start), bytes, some, ask.of.bits);
      if (listed) lists[r].translate(start / ask.of.group, bytes, some);
      if (two_rows) highest_bits(bytes, stride, 1 << (ask.of.bits - 1), bytes + stride);
      if (start == 0) more[r] = 0.0f;
      if (ask.correction() != 0.0f) more[r] += ask.step * ask.correction() * sum_of_row(r, start, some);
    }
  }

  uint8_t* row(int64_t r) { return &all[(two_rows ? 2 : 1) * r * stride]; }

  // Where those lie that are decoded after these, of this tile or, at the end of its rows, of the next one.
  const uint8_t* next(int64_t start) const {
    return start + columns < ask.of.columns ? codes_of(0, start + columns) : codes_of(TiledProduct::TILE_ROWS, 0);
  }

 private:
  const uint8_t* codes_of(int64_t r, int64_t start) const {
    return ask.of.codes + (first_row + r) * ask.of.row_bytes + start * ask.of.bits / 8;
  }

  float sum_of_row(int64_t r, int64_t start, int64_t some) {
    float sum = 0.0f;
    const uint8_t* first = row(r);
    for (int64_t g = start / ask.of.group; g * ask.of.group < start + some; g++, first += ask.of.group) {
      const int64_t n = ask.columns_of(g);
      sum += levels[r].base[g] * (float)n + levels[r].step[g] * (float)std::accumulate(first, first + n, 0);
      if (two_rows) sum += levels[r].jump[g] * (float)std::accumulate(first + stride, first + stride + n, 0);
    }
    return sum;
  }
};

}  // namespace AQ_ISA

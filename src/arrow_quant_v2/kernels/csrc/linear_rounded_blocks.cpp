// Many inputs rounded to 8 bits times packed weights on Intel's matrix unit (AMX), which adds products of bytes in whole
// numbers.
//
//   y (m, r) = sum over parts of  x_step (m) w_step (r) sum_j p (r, j) q (m, j),   w ~ w_step p
//
// What leaves the unit costs more than what it adds, so a sum has to be that of many columns: W is rounded too, to whole
// numbers p with one step for each part of a row, a run of x or a piece of it. Its codes go there straight, by a table of
// what each code of a group is, or, of 8 bits, by a product in 16.
//
// 16 rows of W by 64 columns meet a panel of 16 rows of x. A block of rows is rounded for some parts at a time, and meets
// all panels, whose sums wait in `sums`.
// Measured on an Intel Xeon with AMX (2 cores): python bench/linear.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "levels.hpp"
#include "matrix_unit.hpp"
#include "rounding.hpp"
#include "stored.hpp"

#if defined(__AMX_INT8__)

namespace AQ_ISA {

constexpr int64_t STEP = WholeBlockProduct::STEP, STEP_TILE = SIDE * STEP;  // columns of a tile of bytes, and its values
constexpr int64_t STEPS_AT_ONCE = 8, PANELS_TOGETHER = 64;

// The columns of a step in the order in which `codes_of_step` gives them.
struct Order {
  alignas(64) uint8_t columns[STEP];

  explicit Order(int bits) {
    const int of_byte = 8 / bits, bytes = (int)STEP / of_byte;
    for (int i = 0; i < STEP; i++) columns[i] = (uint8_t)(i % bytes * of_byte + i / bytes);
  }
  __m512i vector() const { return _mm512_load_si512(columns); }
};

void fill_rounded_blocks(const WholeBlockProduct& ask, int64_t first, int64_t last) {
  const __m512i order = Order(ask.of.bits).vector();
  const int64_t width = ask.width();
  RoundedRow row(ask);
  std::vector<int8_t> rows(SIDE * width);
  for (int64_t p = first; p < last; p++) {
    std::fill(rows.begin(), rows.end(), (int8_t)0);
    for (int64_t i = 0; i < std::min(SIDE, ask.count - p * SIDE); i++) {
      row.read(p * SIDE + i);
      std::copy_n(row.whole.begin(), ask.of.columns, &rows[i * width]);
      for (int64_t u = 0; u < ask.parts(); u++) ask.steps[(p * ask.parts() + u) * SIDE + i] = row.step_at(u * ask.part);
    }
    for (int64_t i = 0; i < SIDE * width; i += STEP)
      _mm512_storeu_si512(&rows[i], _mm512_permutexvar_epi8(order, _mm512_loadu_si512(&rows[i])));
    to_panel(rows.data(), width / STEP, ask.places + p * ask.panel_bytes());
  }
}

// The codes of a step as bytes: those in the lowest bits of all its bytes, then the next ones.
template <int BITS>
AQ_INLINE __m512i codes_of_step(const uint8_t* codes) {
  if (BITS == 8) return _mm512_loadu_si512(codes);
  if (BITS == 4) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)codes));
    return _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
  }
  const __m512i often = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes));
  return _mm512_srlv_epi64(often, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
}

// What the codes of a row's groups are, in steps of their part: base + factor * code, and jump more on the r2q grid where
// the highest bit of the code is set; in 2^-7, with half of one in the base, so as to be rounded and not cut. The factor is
// such that mulhi_epu16 of a code in the highest bits of 16 gives that.
struct GroupFactors {
  const uint16_t *factor, *base, *jump;  // jump is null on the affine grid
};
constexpr int SHIFT = 7;

// Sixteen values to whole numbers of 16 bits.
AQ_INLINE void write_factors(__m512 values, float unit, float more, uint16_t* to) {
  const __m512 scaled = _mm512_fmadd_ps(values, _mm512_set1_ps(unit), _mm512_set1_ps(more));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled)));
}

// One number of each of four groups.
AQ_INLINE __m512i of_four(const uint16_t* groups, __m512i which) {
  return _mm512_permutexvar_epi16(which, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)groups)));
}

// Codes of 2 or 4 bits are looked up in a table of sixteen bytes for each of four groups of a part.
template <int BITS>
struct Listed {
  static constexpr int64_t GROUPS = 4;
  const GroupFactors of;
  const int64_t first;  // group
  const __m512i places;  // where in a table the numbers of a column's group begin, if the first one's begin at 0
  int64_t made = -1;
  __m512i table = {};

  // Within a step, the column at each place is in the n-th group, 0 to 3.
  static __m512i places_of(const uint8_t (&groups)[STEP]) { return _mm512_slli_epi16(_mm512_load_si512(groups), 4); }

  AQ_INLINE_MEMBER __m512i operator()(const uint8_t* codes, int64_t group) {
    constexpr int MASK_OR = 0xEA;  // a & b | c
    if ((group - first) / GROUPS != made) make((group - first) / GROUPS);
    const __m512i begin = _mm512_or_si512(places, _mm512_set1_epi8((char)((group - first) % GROUPS * 16)));
    const __m512i ones = _mm512_set1_epi8((1 << BITS) - 1);
    return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi64(codes_of_step<BITS>(codes), ones, begin, MASK_OR), table);
  }

 private:
  AQ_INLINE_MEMBER void make(int64_t fours) {
    made = fours;
    const int64_t g = first + fours * GROUPS;
    const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0x10001, 0x10001, 0x10001, 0x10001, 0x20002, 0x20002, 0x20002,
                                            0x20002, 0x30003, 0x30003, 0x30003, 0x30003);
    const __m512i codes = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i factor = of_four(of.factor + g, which), base = of_four(of.base + g, which);
    __m512i low = level(codes, factor, base), high = level(_mm512_add_epi16(codes, _mm512_set1_epi16(8)), factor, base);
    if (of.jump) {
      const __m512i jump = of_four(of.jump + g, which);
      low = BITS == 2 ? _mm512_mask_add_epi16(low, 0xCCCCCCCC, low, jump) : low;
      high = _mm512_add_epi16(high, jump);
    }
    table = _mm512_packs_epi16(_mm512_srai_epi16(low, SHIFT), _mm512_srai_epi16(high, SHIFT));
  }
  AQ_INLINE_MEMBER static __m512i level(__m512i codes, __m512i factor, __m512i base) {
    return _mm512_add_epi16(_mm512_mulhi_epu16(_mm512_slli_epi16(codes, 16 - BITS), factor), base);
  }
};

// Codes of 8 bits, on the affine grid.
struct Scaled {
  const GroupFactors of;
  const int64_t first;
  const __m512i places;  // which of a step's groups a word of codes is in, as they are spread within quarters of a vector

  static __m512i places_of(const uint8_t (&groups)[STEP]) {
    alignas(64) uint16_t all[32];
    for (int i = 0; i < 32; i++) all[i] = groups[i / 8 * 16];
    return _mm512_load_si512(all);
  }

  AQ_INLINE_MEMBER __m512i operator()(const uint8_t* codes, int64_t group) const {
    const __m512i factor = of_four(of.factor + group, places), base = of_four(of.base + group, places);
    const __m512i all = codes_of_step<8>(codes), none = {};
    return _mm512_packs_epi16(rounded(_mm512_unpacklo_epi8(none, all), factor, base),
                              rounded(_mm512_unpackhi_epi8(none, all), factor, base));
  }

 private:
  AQ_INLINE_MEMBER static __m512i rounded(__m512i codes, __m512i factor, __m512i base) {
    return _mm512_srai_epi16(_mm512_add_epi16(_mm512_mulhi_epu16(codes, factor), base), SHIFT);
  }
};

// Some rows and columns of W as tiles of whole numbers, (tiles, steps at once, 16, 64), and what they are multiplied with.
template <int BITS, class Code>
struct RoundedWeight {
  const WholeBlockProduct& ask;
  const Order order;
  const int64_t part_steps, steps_at_once, stride;
  int64_t first_row = 0, count = 0;
  Aligned<int8_t> tiles;
  Aligned<float> steps;                // (tiles, parts, 16)
  Aligned<float> more;                 // (rows,): what each row gives besides
  Aligned<uint16_t> factors;           // (rows, 3, groups and some more)
  std::vector<int64_t> group_of_step, last_groups;  // the first of each step, the last of each part
  __m512i places;
  RowLevels levels;  // of the row that is read
  std::vector<float> greatest, inverse;

  explicit RoundedWeight(const WholeBlockProduct& ask)
      : ask(ask),
        order(BITS),
        part_steps(ask.part / STEP),
        steps_at_once(std::max(STEPS_AT_ONCE / part_steps, (int64_t)1) * part_steps),
        stride(ask.of.groups + LANES),
        tiles(ask.rows_of_block * steps_at_once * STEP),
        steps(ask.rows_of_block * ask.parts()),
        more(ask.rows_of_block),
        factors(ask.rows_of_block * 3 * stride),
        group_of_step(ask.width() / STEP),
        last_groups(ask.parts()),
        levels(ask),
        greatest(stride),
        inverse(stride) {
    for (size_t s = 0; s < group_of_step.size(); s++) group_of_step[s] = ask.group_at(s * STEP);
    for (int64_t u = 0; u < ask.parts(); u++) last_groups[u] = ask.group_at(std::min((u + 1) * ask.part, ask.of.columns) - 1);
    alignas(64) uint8_t groups[STEP];
    for (int i = 0; i < STEP; i++) groups[i] = (uint8_t)ask.group_at(order.columns[i]);
    places = Code::places_of(groups);
  }

  int8_t* tile(int64_t t) { return tiles.data() + t * steps_at_once * STEP_TILE; }
  float* steps_of(int64_t t, int64_t part) { return steps.data() + (t * ask.parts() + part) * SIDE; }

  void begin(int64_t row) {
    first_row = row;
    count = std::min(ask.rows_of_block, ask.rows - row);
    for (int64_t r = 0; r < count; r++) {
      levels.read(ask, row + r);
      measure();
      for (int64_t u = 0; u < ask.parts(); u++) steps_of(r / SIDE, u)[r % SIDE] = step_of(u);
      write_factors_of(factors.data() + r * 3 * stride);
    }
  }

  void round(int64_t first, int64_t parts) {
    for (int64_t r = 0; r < count; r++) {
      if (first == 0) more.data()[r] = ask.bias ? ask.bias[first_row + r] : 0.0f;
      ask_for_next(ask, first_row + r, first * ask.part * BITS / 8, parts * ask.part * BITS / 8);
      for (int64_t u = first; u < first + parts; u++) round_part(r, u, (u - first) * part_steps);
    }
  }

 private:
  // The greatest that the codes of each group can mean; NaN where it is infinite.
  void measure() {
    const float top = (float)((1 << BITS) - 1);
    float *__restrict to = greatest.data(), *__restrict jump = levels.jump.data();
    const float *__restrict base = levels.base.data(), *__restrict step = levels.step.data();
    if (!ask.residual) std::fill_n(jump, ask.of.groups, 0.0f);
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const float low = std::fabs(base[g]), high = std::fabs(base[g] + top * step[g] + jump[g]);
      to[g] = (low > high ? low : high) + (low - low) + (high - high);
    }
  }

  // That of a part of the row that was measured.
  float step_of(int64_t part) {
    const int64_t first = group_of_step[part * part_steps], last = last_groups[part];
    float most = 0.0f, spoiled = 0.0f;
    for (int64_t g = first; g <= last; g++) {
      most = std::max(most, greatest[g]);
      spoiled += greatest[g] - greatest[g];
    }
    std::fill(&inverse[first], &inverse[last] + 1, most > 0.0f ? LARGEST / most : 0.0f);
    return most / LARGEST + spoiled;
  }

  void write_factors_of(uint16_t* to) {
    constexpr float UNIT = 1 << SHIFT;
    for (int64_t g = 0; g < ask.of.groups; g += SIDE) {
      const __m512 by = _mm512_loadu_ps(&inverse[g]);
      write_factors(_mm512_mul_ps(_mm512_loadu_ps(&levels.step[g]), by), UNIT * (1 << BITS), 0.0f, to + g);
      write_factors(_mm512_mul_ps(_mm512_loadu_ps(&levels.base[g]), by), UNIT, UNIT / 2, to + stride + g);
      write_factors(_mm512_mul_ps(_mm512_loadu_ps(&levels.jump[g]), by), UNIT, 0.0f, to + 2 * stride + g);
    }
  }

  void round_part(int64_t r, int64_t part, int64_t at) {
    constexpr int64_t BYTES = STEP * BITS / 8;
    const int64_t first = part * part_steps, columns = std::min(ask.part, ask.of.columns - part * ask.part);
    const uint8_t* codes = ask.of.codes + (first_row + r) * ask.of.row_bytes + first * BYTES;
    const uint16_t* of_row = factors.data() + r * 3 * stride;
    Code code{{of_row, of_row + stride, ask.residual ? of_row + 2 * stride : nullptr}, group_of_step[first], places};
    int8_t *const begin = tile(r / SIDE) + at * STEP_TILE + r % SIDE * STEP, *to = begin;
    int64_t s = 0;
    for (; s < columns / STEP; s++, codes += BYTES, to += STEP_TILE)
      _mm512_store_si512(to, code(codes, group_of_step[first + s]));
    if (columns % STEP) {
      uint8_t rest[STEP] = {};
      std::memcpy(rest, codes, ask.of.codes + (first_row + r + 1) * ask.of.row_bytes - codes);
      const __mmask64 there = _mm512_cmplt_epu8_mask(order.vector(), _mm512_set1_epi8((char)(columns % STEP)));
      _mm512_store_si512(to, _mm512_maskz_mov_epi8(there, code(rest, group_of_step[first + s])));
      to += STEP_TILE;
    }
    if (ask.correction() != 0.0f)
      more.data()[r] += ask.step * ask.correction() * steps_of(r / SIDE, part)[r % SIDE] * sum_of_steps(begin, to);
  }

  static float sum_of_steps(const int8_t* first, const int8_t* last) {
    __m512i sums = {};
    for (; first < last; first += STEP_TILE) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(first));
    return (float)_mm512_reduce_add_epi32(sums);
  }
};

// Two tiles of W and some panels of x: parts of so many steps.
struct WholeMeeting {
  const int8_t *weight, *inputs;
  const float *weight_steps, *steps;
  int64_t tile, panel, weight_parts, input_parts;  // how far the second ones are
  int64_t parts, part_steps;
  float* to;  // (panels, tiles, 16, 16): what was added so far, or nothing yet
  int64_t to_panel;
  bool begin;
};

constexpr int TILES_TOGETHER = 2;

template <int PANELS>
AQ_INLINE void add_part(const WholeMeeting& of, int64_t u, int32_t* whole) {
  _tile_zero(0);
  _tile_zero(1);
  if (PANELS == 2) _tile_zero(2);
  if (PANELS == 2) _tile_zero(3);
  for (int64_t s = u * of.part_steps; s < (u + 1) * of.part_steps; s++) {
    const int8_t *w = of.weight + s * STEP_TILE, *x = of.inputs + s * STEP_TILE;
    _tile_loadd(6, x, LINE);
    _tile_loadd(4, w, LINE);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, w + of.tile, LINE);
    _tile_dpbssd(1, 5, 6);
    if (PANELS == 1) continue;
    _tile_loadd(7, x + of.panel, LINE);
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, whole, LINE);
  _tile_stored(1, whole + SUMS, LINE);
  if (PANELS == 2) _tile_stored(2, whole + 2 * SUMS, LINE);
  if (PANELS == 2) _tile_stored(3, whole + 3 * SUMS, LINE);
}

// The sums of a tile, times their steps, to those of other parts.
AQ_INLINE void add_sums(const int32_t* whole, const float* weight_steps, __m512 step, float* to, bool begin) {
  for (int r = 0; r < SIDE; r++) {
    const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(whole + r * SIDE)), step);
    const __m512 before = begin ? __m512{} : _mm512_load_ps(to + r * SIDE);
    _mm512_store_ps(to + r * SIDE, _mm512_fmadd_ps(sum, _mm512_set1_ps(weight_steps[r]), before));
  }
}

template <int PANELS>
AQ_INLINE void add_all_sums(const WholeMeeting& of, int64_t u, const int32_t* whole) {
  for (int p = 0; p < PANELS; p++) {
    const __m512 step = _mm512_load_ps(of.steps + p * of.input_parts + u * SIDE);
    for (int t = 0; t < TILES_TOGETHER; t++)
      add_sums(whole + (p * TILES_TOGETHER + t) * SUMS, of.weight_steps + t * of.weight_parts + u * SIDE, step,
               of.to + p * of.to_panel + t * SUMS, of.begin && u == 0);
  }
}

// The sums of a part are added while the unit is at the next one.
template <int PANELS>
static void multiply(const WholeMeeting& of) {
  alignas(64) int32_t whole[2][PANELS * TILES_TOGETHER * SUMS];
  add_part<PANELS>(of, 0, whole[0]);
  for (int64_t u = 1; u < of.parts; u++) {
    add_part<PANELS>(of, u, whole[u % 2]);
    add_all_sums<PANELS>(of, u - 1, whole[(u - 1) % 2]);
  }
  add_all_sums<PANELS>(of, of.parts - 1, whole[(of.parts - 1) % 2]);
}

// A block of rows of W, and some panels.
template <class Weight>
static void meet_panels(const WholeBlockProduct& ask, Weight& weight, int64_t first, int64_t panels, float* sums) {
  const int64_t part_steps = weight.part_steps, at_once = weight.steps_at_once / part_steps;
  const int64_t of_panel = ask.rows_of_block / SIDE * SUMS, tile = weight.steps_at_once * STEP_TILE;
  for (int64_t u = 0; u < ask.parts(); u += at_once) {
    const int64_t some = std::min(at_once, ask.parts() - u);
    weight.round(u, some);
    for (int64_t p = 0; p < panels; p += 2)
      for (int64_t t = 0; t * SIDE < weight.count; t += TILES_TOGETHER) {
        const int8_t* x = ask.places + (first + p) * ask.panel_bytes() + u * part_steps * STEP_TILE;
        const WholeMeeting of{weight.tile(t), x, weight.steps_of(t, u), ask.steps + ((first + p) * ask.parts() + u) * SIDE,
                              tile, ask.panel_bytes(), ask.parts() * SIDE, ask.parts() * SIDE, some, part_steps,
                              sums + p * of_panel + t * SUMS, of_panel, u == 0};
        (p + 1 < panels ? multiply<2> : multiply<1>)(of);
      }
  }
}

template <int BITS, class Code>
static void multiply_blocks(const WholeBlockProduct& ask, int64_t first, int64_t last) {
  const Registers registers;
  RoundedWeight<BITS, Code> weight(ask);
  Aligned<float> sums(std::min(ask.panels(), PANELS_TOGETHER) * ask.rows_of_block / SIDE * SUMS);
  for (int64_t b = first; b < last; b++) {
    weight.begin(b * ask.rows_of_block);
    for (int64_t p = 0; p < ask.panels(); p += PANELS_TOGETHER) {
      const int64_t panels = std::min(PANELS_TOGETHER, ask.panels() - p);
      meet_panels(ask, weight, p, panels, sums.data());
      write_panels(ask, sums.data(), weight.first_row, weight.count, p, panels, weight.more.data());
    }
  }
}

void rounded_block_product(const WholeBlockProduct& ask, int64_t first, int64_t last) {
  if (ask.of.bits == 2) multiply_blocks<2, Listed<2>>(ask, first, last);
  if (ask.of.bits == 4) multiply_blocks<4, Listed<4>>(ask, first, last);
  if (ask.of.bits == 8) multiply_blocks<8, Scaled>(ask, first, last);
}

}  // namespace AQ_ISA

#endif

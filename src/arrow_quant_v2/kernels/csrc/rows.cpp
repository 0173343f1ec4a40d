// Rows of weights to packed codes and back; compiled once per instruction set, with the same bits from each.
//
//   full step  f = (high - low) / (2^bits - 1), low = min(w, 0), high = max(w, 0) of a group
//   scale      s = row_scale * (scale_code / 255)^2, row_scale a bfloat16 that covers every group of the row; where
//              a row is one group, scale_code is 255 and row_scale the bfloat16 nearest to what is wanted
//   zero       z = zero_code / (255 / (2^bits - 1)); symmetric: f = max|w| / (2^(bits-1) - 1), z = 2^(bits-1)
//   code       q = round(clip(w / s + z, 0, 2^bits - 1)), half to even
//
// Round to nearest takes s >= f. The clip search tries f / stretch, fits scale and zero to the codes of each by
// (weighted) least squares, and keeps the candidate that explains most of the squares. The meaning is written down
// in kernels/reference.py, bit for bit. Assumes what kernels/ops.py has checked: shapes, widths, contiguity.
// Measured on an EPYC 7003 (AVX2, 2 cores): python bench/kernels.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"
#include "planes.hpp"
#include "stored.hpp"

namespace AQ_ISA {

constexpr int64_t CACHE_LINE = 64;
constexpr int64_t BLOCKS = 64;  // blocks of errors added in float before they go on in double
constexpr int64_t BLOCK = 512;  // columns added in float before the sum goes on in double
constexpr double FLAT = 0x1p-16;  // codes of a smaller variance, relative to their squares, are all the same
constexpr float SMALLEST_ROW_SCALE = 0x1p-100f;
constexpr float SMALLEST_STEP = 0x1p-126f;
constexpr uint32_t LARGEST_BFLOAT16 = 0x7F7F0000;

static float up_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0xFFFF) & 0xFFFF0000;
  if (bits > LARGEST_BFLOAT16) bits = LARGEST_BFLOAT16;
  std::memcpy(&x, &bits, 4);
  return x;
}

static float nearest_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
  if (bits > LARGEST_BFLOAT16) bits = LARGEST_BFLOAT16;
  std::memcpy(&x, &bits, 4);
  return x;
}

static uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (uint16_t)(bits >> 16);
}

struct Grid {
  float max_code, middle, zero_unit;
  bool symmetric;

  explicit Grid(const Quantize& ask)
      : max_code((float)((1 << ask.bits) - 1)),
        middle((float)(1 << (ask.bits - 1))),
        zero_unit((float)(255 / ((1 << ask.bits) - 1))),
        symmetric(ask.symmetric) {}
};

static int64_t length_of(const Quantize& ask, int64_t g) {
  return g + 1 < ask.groups ? ask.group : ask.columns - g * ask.group;
}

static int64_t whole_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// What one row needs while it is worked on. Groups are padded with zeros to whole lanes, and `weights` is 0 there.
struct Row {
  int64_t stride;
  bool in_place;  // float32 groups of whole lanes are read where they lie
  const float* source = nullptr;
  std::vector<float> values, units, weights, present;
  std::vector<float> lows, highs;                 // (groups, 4): of every fourth lane
  std::vector<float> low, high;                   // (groups,)
  std::vector<float> full, step, mean_q, mean_w;  // zero point = mean_q - mean_w * full / scale
  std::vector<float> share, inverse, zero;        // share = scale / row scale
  std::vector<Sums> moments;  // of each candidate: q, q^2, q w, weighted
  std::vector<uint8_t> bytes;

  explicit Row(const Quantize& ask)
      : stride(whole_lanes(ask.group)),
        in_place(ask.dtype == FLOAT32 && ask.group == stride && ask.columns % LANES == 0),
        values(in_place ? 0 : ask.groups * stride),
        units(stride),
        weights(ask.stretch_count ? ask.groups * stride : 0),
        present(2 * stride),
        moments(ask.stretch_count),
        bytes(ask.groups * stride + LANES) {
    lows.resize(4 * ask.groups);
    highs.resize(4 * ask.groups);
    for (auto* array : {&low, &high, &full, &step, &mean_q, &mean_w, &share, &inverse, &zero})
      array->resize(ask.groups);
    std::fill_n(present.begin(), ask.group, 1.0f);
    std::fill_n(present.begin() + stride, length_of(ask, ask.groups - 1), 1.0f);
    for (int64_t g = 0; ask.stretch_count && g < ask.groups; g++)
      for (int64_t i = 0; i < length_of(ask, g); i++)
        weights[g * stride + i] = ask.importance ? ask.importance[g * ask.group + i] : 1.0f;
  }

  const float* group(int64_t g) const { return source + g * stride; }

  // 1 where the group has a column, 0 on its padding.
  const float* columns_of(const Quantize& ask, int64_t g) const {
    return present.data() + (g + 1 < ask.groups ? 0 : stride);
  }

  void read(const Quantize& ask, int64_t row) {
    const char* from = (const char*)ask.weight + row * ask.columns * item_bytes(ask.dtype);
    source = in_place ? (const float*)from : values.data();
    for (int64_t g = 0; !in_place && g < ask.groups; g++) {
      const int64_t n = length_of(ask, g), whole = n / LANES * LANES;
      float* to = &values[g * stride];
      for (int64_t i = 0; i < whole; i += LANES) store(to + i, load_as_float(from, ask.dtype, g * ask.group + i));
      if (whole < n) read_tail(from, ask, g * ask.group + whole, n - whole, to + whole);
    }
  }

  static void read_tail(const char* from, const Quantize& ask, int64_t start, int64_t count, float* to) {
    alignas(64) char tail[LANES * 4] = {};
    const int64_t size = item_bytes(ask.dtype);
    std::memcpy(tail, from + start * size, count * size);
    store(to, load_as_float(tail, ask.dtype, 0));
  }
};

// Loops over groups take plain pointers that do not overlap, so that the compiler makes vectors of them.
static void steps_of(const float* __restrict low, const float* __restrict high, const Grid& grid, int64_t groups,
                     float* __restrict full, float* __restrict mean_w) {
  const float one_code = 1.0f / grid.max_code, side = grid.middle - 1.0f;
  const bool symmetric = grid.symmetric;
  for (int64_t g = 0; g < groups; g++) {
    const float largest = high[g] > -low[g] ? high[g] : -low[g];
    const float wide = high[g] * one_code - low[g] * one_code;
    float step = symmetric ? largest / side : wide;
    step = step < SMALLEST_STEP ? SMALLEST_STEP : step;
    const float offset = low[g] / step;
    full[g] = high[g] > low[g] ? step : 0.0f;
    mean_w[g] = !symmetric && high[g] > low[g] ? offset : 0.0f;
  }
}

static void extremes_of(const float* __restrict lows, const float* __restrict highs, int64_t groups,
                        float* __restrict low, float* __restrict high) {
  for (int64_t g = 0; g < groups; g++) {
    const float *l = lows + 4 * g, *h = highs + 4 * g;
    const float l0 = l[0] < l[1] ? l[0] : l[1], l1 = l[2] < l[3] ? l[2] : l[3];
    const float h0 = h[0] > h[1] ? h[0] : h[1], h1 = h[2] > h[3] ? h[2] : h[3];
    low[g] = l0 < l1 ? l0 : l1;
    high[g] = h0 > h1 ? h0 : h1;
  }
}

// The least and the greatest of every fourth column of each group, and 0; all of `n` columns.
__attribute__((always_inline)) static inline void cover_groups(const float* __restrict w, int64_t stride, int64_t n,
                                                               int64_t groups, float* __restrict lows,
                                                               float* __restrict highs) {
  for (int64_t g = 0; g < groups; g++) {
    Lanes low = fill(0.0f), high = fill(0.0f);
    for (int64_t i = 0; i < n; i += LANES) {
      low = min(low, load(w + g * stride + i));
      high = max(high, load(w + g * stride + i));
    }
    store_quad(lows + 4 * g, least_four(low));
    store_quad(highs + 4 * g, greatest_four(high));
  }
}

// The step that covers each group, and the zero point that goes with it.
static void cover(const Quantize& ask, const Grid& grid, Row& row) {
  const int64_t whole = ask.groups - 1, last = whole_lanes(length_of(ask, whole));
  float *lows = row.lows.data(), *highs = row.highs.data();
  if (row.stride == 64)
    cover_groups(row.source, 64, 64, whole, lows, highs);
  else
    cover_groups(row.source, row.stride, row.stride, whole, lows, highs);
  cover_groups(row.group(whole), last, last, 1, lows + 4 * whole, highs + 4 * whole);
  extremes_of(row.lows.data(), row.highs.data(), ask.groups, row.low.data(), row.high.data());
  steps_of(row.low.data(), row.high.data(), grid, ask.groups, row.full.data(), row.mean_w.data());
  row.step = row.full;
  std::fill(row.mean_q.begin(), row.mean_q.end(), grid.symmetric ? grid.middle : 0.0f);
}

// Moments of the codes of one candidate; u is w in units of the full step.
template <bool WEIGHTED, bool SYMMETRIC>
static inline Sums moments(const float* u, const float* weights, int64_t n, float stretch, float zero,
                              float max_code) {
  Sums total{};
  for (int64_t b = 0; b < n; b += BLOCK) {
    Total q1 = nothing(), q2 = q1, qw = q1;
    const int64_t end = b + BLOCK < n ? b + BLOCK : n;
    for (int64_t i = b; i < end; i += LANES) {
      const Lanes w = load(u + i);
      const Lanes x = min(max(w * fill(stretch) + fill(zero), fill(0.0f)), fill(max_code));
      const Lanes code = code_of(shift_to_code(x));
      const Lanes q = SYMMETRIC ? code - fill(zero) : code;
      const Lanes mq = WEIGHTED ? q * load(weights + i) : q;
      q1 = q1 + pairs(mq);
      q2 = q2 + pairs(mq * q);
      qw = qw + pairs(mq * w);
    }
    total += fold_three(q1, q2, qw);
  }
  return total;
}

struct Mass {
  double one, w, mean_w, inverse;
};

// w = covariance / variance (q - mean_q) + mean_w, and the squares that it explains beyond the mean
struct Line {
  double covariance, variance, mean_q, mean_w, gain;
};

static Mass mass(const float* u, const float* weights, int64_t n) {
  double total_one = 0, total_w = 0;
  for (int64_t b = 0; b < n; b += BLOCK) {
    Total one = nothing(), w = one;
    const int64_t end = b + BLOCK < n ? b + BLOCK : n;
    for (int64_t i = b; i < end; i += LANES) {
      one = one + pairs(load(weights + i));
      w = w + pairs(load(weights + i) * load(u + i));
    }
    total_one += fold(one);
    total_w += fold(w);
  }
  return {total_one, total_w, total_w / total_one, 1.0 / total_one};
}

// Least squares of w on the codes, with a zero point within [0, last_zero]: where the free line's lies outside, or the
// codes do not vary, the line pivots on the end that the weights lean away from.
static Line least_squares(const Sums& moments, const Mass& all, double last_zero) {
  const double q = moments[0], qq = moments[1], qw = moments[2], mean_q = q * all.inverse;
  const double variance = qq - q * mean_q, covariance = qw - all.w * mean_q;
  const double zero = mean_q * covariance - all.mean_w * variance;  // times covariance, which is positive
  const bool varies = variance > FLAT * qq && covariance > 0.0;
  if (varies && zero >= 0.0 && zero <= last_zero * covariance)
    return {covariance, variance, mean_q, all.mean_w, covariance * covariance / variance};
  const double end = all.w < 0.0 ? last_zero : 0.0;
  const double about = qq - end * (2.0 * q - end * all.one), with = qw - end * all.w;
  const double gain = with * with / about - all.w * all.mean_w;
  return {with, about, end, 0.0, about > 0.0 && with > 0.0 ? gain : -INFINITY};
}

// The candidate whose line explains most wins.
template <bool WEIGHTED, bool SYMMETRIC>
static void search_group(const Quantize& ask, const Grid& grid, Row& row, int64_t g) {
  const int64_t n = whole_lanes(length_of(ask, g));
  const float *w = row.group(g), *weights = &row.weights[g * row.stride];
  float* u = row.units.data();
  const float unit = 1.0f / row.full[g], zero = SYMMETRIC ? grid.middle : 0.0f - row.mean_w[g];
  for (int64_t i = 0; i < n; i += LANES) store(u + i, load(w + i) * fill(unit));
  const Mass all = mass(u, weights, n);
  for (int k = 0; k < ask.stretch_count; k++)
    row.moments[k] = moments<WEIGHTED, SYMMETRIC>(u, weights, n, ask.stretches[k], zero, grid.max_code);
  Line best{0.0, 0.0, 0.0, 0.0, -INFINITY};
  for (const Sums& sums : row.moments) {
    const Line line = least_squares(sums, all, SYMMETRIC ? 0.0 : (double)grid.max_code);
    if (line.gain > best.gain) best = line;
  }
  if (!(best.gain > -INFINITY)) return;
  row.step[g] = std::max((float)(best.covariance / best.variance * (double)row.full[g]), SMALLEST_STEP);
  row.mean_q[g] = (float)best.mean_q;
  row.mean_w[g] = (float)best.mean_w;
}

static void clip_search(const Quantize& ask, const Grid& grid, Row& row) {
  for (int64_t g = 0; g < ask.groups; g++) {
    if (!(row.full[g] > 0.0f)) continue;
    const bool weighted = ask.importance || length_of(ask, g) % LANES;
    if (grid.symmetric)
      search_group<true, true>(ask, grid, row, g);
    else if (weighted)
      search_group<true, false>(ask, grid, row, g);
    else
      search_group<false, false>(ask, grid, row, g);
  }
}

// The scale that is stored for each step, as a code, a number and its inverse. Round to nearest takes scales that are
// not below the steps.
static void settle_scales(const float* __restrict step, float row_scale, bool nearest, int64_t groups,
                          uint8_t* __restrict stored, float* __restrict share, float* __restrict inverse) {
  for (int64_t g = 0; g < groups; g++) {
    const float root = std::sqrt(step[g] / row_scale) * 255.0f;
    const float near = (root + ROUNDER) - ROUNDER;
    float code = nearest && near < root ? near + 1.0f : near;
    code = code < 1.0f ? 1.0f : code;
    code = code > 255.0f ? 255.0f : code;
    code = step[g] > 0.0f ? code : 0.0f;
    const float part = code * code / 65025.0f;
    const float reciprocal = 1.0f / (row_scale * part);
    stored[g] = (uint8_t)(int32_t)code;
    share[g] = part;
    inverse[g] = code > 0.0f ? reciprocal : 0.0f;
  }
}

// The zero point that goes with each stored scale. Round to nearest takes whole ones, which put 0.0 on a code.
static void settle_zeros(const Row& row, const Grid& grid, bool nearest, int64_t groups, uint8_t* __restrict stored,
                         float* __restrict zero) {
  const float *mean_q = row.mean_q.data(), *mean_w = row.mean_w.data();
  const float *full = row.full.data(), *inverse = row.inverse.data();
  const float max_code = grid.max_code, unit = grid.zero_unit, rounder = nearest ? ROUNDER : 0.0f;
  for (int64_t g = 0; g < groups; g++) {
    float z = mean_q[g] - mean_w[g] * (full[g] * inverse[g]);
    z = z > 0.0f ? z : 0.0f;  // NaN becomes 0
    z = inverse[g] > 0.0f ? z : 0.0f;
    z = z > max_code ? max_code : z;
    z = (z + rounder) - rounder;
    const float code = (z * unit + ROUNDER) - ROUNDER;
    stored[g] = (uint8_t)(int32_t)code;
    zero[g] = nearest ? z : code / unit;  // a whole one is exact
  }
}

// The scale of a row that is one group: nothing stands between it and the row's.
static void settle_only_scale(const Quantize& ask, Row& row, bool nearest, int64_t r) {
  const float step = row.step[0] > SMALLEST_STEP ? row.step[0] : SMALLEST_STEP;
  const float row_scale = nearest ? up_to_bfloat16(step) : nearest_bfloat16(step);
  ask.row_scales[r] = bfloat16_bits(row_scale);
  ask.scales[r] = 255;
  row.share[0] = 1.0f;
  row.inverse[0] = 1.0f / row_scale;
}

// The scales of a row of several groups, under one that covers them all.
static void settle_all_scales(const Quantize& ask, Row& row, bool nearest, int64_t r) {
  float largest = SMALLEST_ROW_SCALE;
  for (int64_t g = 0; g < ask.groups; g++) largest = row.step[g] > largest ? row.step[g] : largest;
  const float row_scale = up_to_bfloat16(largest);
  ask.row_scales[r] = bfloat16_bits(row_scale);
  settle_scales(row.step.data(), row_scale, nearest, ask.groups, ask.scales + r * ask.groups, row.share.data(),
                row.inverse.data());
}

// Stores the parameters of a row, and keeps what the stored ones mean.
static void settle(const Quantize& ask, const Grid& grid, Row& row, int64_t r) {
  const bool nearest = ask.stretch_count == 0;
  (ask.groups == 1 ? settle_only_scale : settle_all_scales)(ask, row, nearest, r);
  std::fill(row.zero.begin(), row.zero.end(), grid.middle);
  if (grid.symmetric) return;
  settle_zeros(row, grid, nearest, ask.groups, ask.zero_points + r * ask.groups, row.zero.data());
}

// w^2, q^2 and (w - q)^2 of a block in sixteen lanes, in units of its scale^2.
struct Squares {
  Lanes w = fill(0.0f), q = w, e = w;

  __attribute__((always_inline)) void add(Lanes v, Lanes d) {
    const Lanes off = v - d;
    w = multiply_add(v, v, w);
    q = multiply_add(d, d, q);
    e = multiply_add(off, off, e);
  }
};

// The same of many blocks in eight lanes, in units of the row scale^2.
struct Errors {
  Total w = nothing(), q = nothing(), e = nothing();

  void add(const Squares& more, float factor) {
    w = multiply_add(pairs(more.w), factor, w);
    q = multiply_add(pairs(more.q), factor, q);
    e = multiply_add(pairs(more.e), factor, e);
  }

  Sums folded() const { return fold_three(w, q, e); }
};

// How codes come about. COVERED: the grid covers the group and its zero point is whole, which only rounding errors can
// leave. WHOLE: the zero point is whole. FRACTION: it is not. A whole zero point and ROUNDER make one exact number:
// adding it rounds, and subtracting it gives the level.
enum Zero { COVERED, WHOLE, FRACTION };

// One group's grid, as its columns need it.
template <Zero ZERO>
struct Encoder {
  Lanes inverse, zero, anchor, max_code;
  uint8_t last;

  Encoder(float inverse_, float zero_, float max_code_)
      : inverse(fill(inverse_)),
        zero(fill(zero_)),
        anchor(fill(zero_ + ROUNDER)),
        max_code(fill(max_code_)),
        last((uint8_t)max_code_) {}

  // The codes of sixteen columns as `codes_of` takes them; counts their squares, where `present` is 0 as zeros.
  template <bool MASKED>
  __attribute__((always_inline)) inline Lanes operator()(const float* w, const float* present, Squares& sums) const {
    const Lanes v = load(w) * inverse;
    Lanes shifted = v + anchor;
    if (ZERO == WHOLE) shifted = min(max(shifted, fill(ROUNDER)), fill(ROUNDER) + max_code);
    if (ZERO == FRACTION) shifted = shift_to_code(min(max(v + zero, fill(0.0f)), max_code));
    Lanes d = ZERO == FRACTION ? code_of(shifted) - zero : shifted - anchor;
    if (MASKED) d = d * load(present);
    sums.add(v, d);
    return shifted;
  }
};

// Codes of at most BLOCK columns, packed where BITS says so and else as bytes, and their squares.
template <Zero ZERO, int BITS, bool MASKED>
__attribute__((always_inline)) static inline Squares encode_block(const float* w, const float* present, int64_t n,
                                                                  const Encoder<ZERO>& encoder, uint8_t* out) {
  constexpr int WIDE = BITS ? BITS : 8;
  Squares sums;
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const Lanes a = encoder.template operator()<MASKED>(w + i, present + i, sums);
    const Lanes b = encoder.template operator()<MASKED>(w + i + LANES, present + i + LANES, sums);
    store_packed<WIDE>(out + i * WIDE / 8, a, b, encoder.last);
  }
  if (i == n) return sums;
  const Codes codes = codes_of(encoder.template operator()<MASKED>(w + i, present + i, sums));
  const Codes ends = Codes{} + encoder.last;
  store_packed<WIDE>(out + i * WIDE / 8, codes < ends ? codes : ends);
  return sums;
}

// Asks for the same group of the next row, so that memory works while this row is encoded from the cache.
// Always inline: GCC takes a function that only prefetches for one that does nothing, and drops the call.
__attribute__((always_inline)) static inline void fetch_below(const Quantize& ask, int64_t r, int64_t g) {
  const int64_t size = item_bytes(ask.dtype), count = length_of(ask, g) * size;
  const char* below = (const char*)ask.weight + ((r + 1) * ask.columns + g * ask.group) * size;
  for (int64_t at = 0; at < count; at += CACHE_LINE) __builtin_prefetch(below + at, 0, 2);
}

// Errors of a row are added in lanes, in units of its row scale^2, and go on in double every BLOCKS blocks. BITS is the
// width where every group is whole lanes, so that codes are packed at once; 0: they go through row.bytes.
template <Zero ZERO, int BITS>
static Sums encode(const Quantize& ask, const Grid& grid, Row& row, int64_t r, bool last_row) {
  Sums sums{};
  Errors errors;
  int64_t blocks = 0;
  uint8_t* const start = BITS ? ask.codes + r * ask.row_bytes : row.bytes.data();
  for (int64_t g = 0; g < ask.groups; g++) {
    const int64_t length = length_of(ask, g), n = whole_lanes(length);
    // Codes of a group's padding are overwritten by the next group.
    uint8_t* const out = start + g * ask.group * (BITS ? BITS : 8) / 8;
    const float *w = row.group(g), *present = row.columns_of(ask, g);
    const float square = row.share[g] * row.share[g];
    const Encoder<ZERO> encoder(row.inverse[g], row.zero[g], grid.max_code);
    if (!last_row) fetch_below(ask, r, g);
    for (int64_t b = 0; b < n; b += BLOCK) {
      const int64_t count = std::min(BLOCK, n - b);
      uint8_t* const to = out + b * (BITS ? BITS : 8) / 8;
      if (BITS || length == n)
        errors.add(encode_block<ZERO, BITS, false>(w + b, present + b, count, encoder, to), square);
      else
        errors.add(encode_block<ZERO, 0, true>(w + b, present + b, count, encoder, to), square);
      if (++blocks % BLOCKS) continue;
      sums += errors.folded();
      errors = Errors();
    }
  }
  return blocks % BLOCKS ? sums + errors.folded() : sums;
}

// The same for rows of whole groups of GROUP columns, one block each, BLOCKS groups at a time: nothing is decided within
// a group, and codes overlap with nothing, of which the compiler cannot be sure by itself. Not inline: within
// `quantize` GCC 12 runs out of registers, and INT2 takes nearly twice as long.
template <Zero ZERO, int BITS, int GROUP>
__attribute__((noinline)) static Sums encode_groups(const Quantize& ask, const Grid& grid, const Row& row, int64_t r, int64_t first, bool last_row) {
  const int64_t count = std::min(BLOCKS, ask.groups - first), size = item_bytes(ask.dtype);
  const float* __restrict w = row.group(first);
  const float *__restrict inverse = &row.inverse[first], *__restrict zero = &row.zero[first];
  const float* __restrict share = &row.share[first];
  const char* below = (const char*)ask.weight + ((r + !last_row) * ask.columns + first * GROUP) * size;
  uint8_t* __restrict out = ask.codes + r * ask.row_bytes + first * GROUP * BITS / 8;
  const float max_code = grid.max_code;
  Errors errors;
  for (int64_t g = 0; g < count; g++) {
    for (int64_t at = 0; at < GROUP * size; at += CACHE_LINE) __builtin_prefetch(below + g * GROUP * size + at, 0, 2);
    const Encoder<ZERO> encoder(inverse[g], zero[g], max_code);
    uint8_t* const to = out + g * GROUP * BITS / 8;
    const Squares squares = encode_block<ZERO, BITS, false>(w + g * GROUP, w, GROUP, encoder, to);
    errors.add(squares, share[g] * share[g]);
  }
  return errors.folded();
}

template <Zero ZERO, int BITS, int GROUP>
static Sums encode_even(const Quantize& ask, const Grid& grid, const Row& row, int64_t r, bool last_row) {
  Sums sums{};
  for (int64_t g = 0; g < ask.groups; g += BLOCKS) sums += encode_groups<ZERO, BITS, GROUP>(ask, grid, row, r, g, last_row);
  return sums;
}

static void pack_row(const uint8_t* bytes, uint8_t* out, int64_t columns, int bits) {
  const int per_byte = 8 / bits;
  const int64_t whole = columns / per_byte;
  if (bits == 8) {
    std::memcpy(out, bytes, columns);
  } else if (bits == 4) {
    for (int64_t i = 0; i < whole; i++) {
      uint16_t x;
      std::memcpy(&x, bytes + 2 * i, 2);
      out[i] = (uint8_t)(x | x >> 4);
    }
  } else {
    for (int64_t i = 0; i < whole; i++) {
      uint32_t x;
      std::memcpy(&x, bytes + 4 * i, 4);
      out[i] = (uint8_t)(x | x >> 6 | x >> 12 | x >> 18);
    }
  }
  if (whole * per_byte == columns) return;
  out[whole] = 0;
  for (int64_t i = whole * per_byte; i < columns; i++)
    out[whole] |= (uint8_t)(bytes[i] << bits * (i - whole * per_byte));
}

template <Zero ZERO, int BITS>
static Sums encode_whole(const Quantize& ask, const Grid& grid, Row& row, int64_t r, bool last_row) {
  if (ask.columns % ask.group) return encode<ZERO, BITS>(ask, grid, row, r, last_row);
  if (ask.group == 32) return encode_even<ZERO, BITS, 32>(ask, grid, row, r, last_row);
  if (ask.group == 64) return encode_even<ZERO, BITS, 64>(ask, grid, row, r, last_row);
  if (ask.group == 128) return encode_even<ZERO, BITS, 128>(ask, grid, row, r, last_row);
  return encode<ZERO, BITS>(ask, grid, row, r, last_row);
}

template <Zero ZERO>
static void encode_and_pack(const Quantize& ask, const Grid& grid, Row& row, int64_t r, bool last_row) {
  Sums sums;
  if (ask.group % LANES || ask.columns % LANES) {
    sums = encode<ZERO, 0>(ask, grid, row, r, last_row);
    pack_row(row.bytes.data(), ask.codes + r * ask.row_bytes, ask.columns, ask.bits);
  } else if (ask.bits == 2) {
    sums = encode_whole<ZERO, 2>(ask, grid, row, r, last_row);
  } else if (ask.bits == 4) {
    sums = encode_whole<ZERO, 4>(ask, grid, row, r, last_row);
  } else {
    sums = encode_whole<ZERO, 8>(ask, grid, row, r, last_row);
  }
  const double row_scale = from_bfloat16_bits(ask.row_scales[r]);
  for (int i = 0; i < 3; i++) ask.sums[3 * r + i] = row_scale * row_scale * sums[i];
}

static void quantize(const Quantize& ask, int64_t first, int64_t last) {
  const Grid grid(ask);
  Row row(ask);
  for (int64_t r = first; r < last; r++) {
    row.read(ask, r);
    cover(ask, grid, row);
    if (ask.stretch_count) clip_search(ask, grid, row);
    settle(ask, grid, row, r);
    if (!ask.stretch_count)
      encode_and_pack<COVERED>(ask, grid, row, r, r + 1 == last);
    else if (grid.symmetric)
      encode_and_pack<WHOLE>(ask, grid, row, r, r + 1 == last);
    else
      encode_and_pack<FRACTION>(ask, grid, row, r, r + 1 == last);
  }
}

// What `quantize` would store, before it is stored.
static void fit_grid(const FitGrid& fit, int64_t first, int64_t last) {
  const Quantize& ask = fit.of;
  const Grid grid(ask);
  Row row(ask);
  for (int64_t r = first; r < last; r++) {
    row.read(ask, r);
    cover(ask, grid, row);
    if (ask.stretch_count) clip_search(ask, grid, row);
    std::copy(row.step.begin(), row.step.end(), fit.step + r * ask.groups);
    std::copy(row.full.begin(), row.full.end(), fit.full + r * ask.groups);
    std::copy(row.mean_q.begin(), row.mean_q.end(), fit.mean_q + r * ask.groups);
    std::copy(row.mean_w.begin(), row.mean_w.end(), fit.mean_w + r * ask.groups);
  }
}

// Some codes of a row; the first one begins a byte.
template <int BITS, class Item>
static void dequantize_group(const uint8_t* codes, Item* to, int64_t n, Lanes scale, Lanes zero) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) put(to + i, (load_packed<BITS>(codes + i * BITS / 8) - zero) * scale);
  if (i == n) return;
  uint8_t rest[2 * BITS] = {};
  Item tail[LANES];
  std::memcpy(rest, codes + i * BITS / 8, ((n - i) * BITS + 7) / 8);
  put(tail, (load_packed<BITS>(rest) - zero) * scale);
  std::memcpy(to + i, tail, (n - i) * sizeof(Item));
}

// The parameters of the groups of a row.
struct Parameters {
  std::vector<float> scale, zero;

  explicit Parameters(const Dequantize& ask) : scale(ask.groups), zero(ask.groups, (float)(1 << (ask.bits - 1))) {}

  void read(const Dequantize& ask, int64_t row) {
    const float unit = (float)(255 / ((1 << ask.bits) - 1)), of_row = from_bfloat16_bits(ask.row_scales[row]);
    const uint8_t *scales = ask.scales + row * ask.groups, *zeros = ask.zero_points + row * ask.groups;
    float *__restrict s = scale.data(), *__restrict z = zero.data();
    for (int64_t g = 0; g < ask.groups; g++) s[g] = of_row * ((float)(scales[g] * scales[g]) / 65025.0f);
    if (ask.zero_points)
      for (int64_t g = 0; g < ask.groups; g++) z[g] = (float)zeros[g] / unit;
  }
};

template <int BITS, class Item>
static void dequantize_row(const Dequantize& ask, const Parameters& of, const uint8_t* codes, Item* to) {
  for (int64_t g = 0; g < ask.groups; g++) {
    const int64_t start = g * ask.group, n = std::min(ask.group, ask.columns - start);
    dequantize_group<BITS>(codes + start * BITS / 8, to + start, n, fill(of.scale[g]), fill(of.zero[g]));
  }
}

template <class Item>
static void dequantize_as(const Dequantize& ask, int64_t first, int64_t last) {
  Parameters of(ask);
  RowBytes bytes(ask);
  for (int64_t r = first; r < last; r++) {
    of.read(ask, r);
    const uint8_t* codes = ask.codes + r * ask.row_bytes;
    Item* to = (Item*)ask.weight + r * ask.columns;
    if (!bytes.direct)
      dequantize_row<8>(ask, of, bytes.read(ask, codes), to);
    else if (ask.bits == 2)
      dequantize_row<2>(ask, of, codes, to);
    else if (ask.bits == 4)
      dequantize_row<4>(ask, of, codes, to);
    else
      dequantize_row<8>(ask, of, codes, to);
  }
}

void dequantize(const Dequantize& ask, int64_t first, int64_t last) {
  if (ask.dtype == FLOAT32) dequantize_as<float>(ask, first, last);
  if (ask.dtype == BFLOAT16) dequantize_as<Bfloat16>(ask, first, last);
  if (ask.dtype == FLOAT16) dequantize_as<Float16>(ask, first, last);
}

static void pack(const Repack& ask, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    pack_row(ask.from + r * ask.columns, ask.to + r * ask.row_bytes, ask.columns, ask.bits);
}

static void unpack(const Repack& ask, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    unpack_row(ask.from + r * ask.row_bytes, ask.to + r * ask.columns, ask.columns, ask.bits);
}

#define AQ_NAME_2(isa) #isa
#define AQ_NAME(isa) AQ_NAME_2(isa)
extern const KernelTable table;
void quantize_columns(const Columns& ask, int64_t first, int64_t last);  // columns.cpp
void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last);  // residual.cpp
void quantize_columns_r2q(const ResidualColumns& ask, int64_t first, int64_t last);
void hadamard(const Hadamard& ask, int64_t first, int64_t last);
void descend_columns(const Descent& ask, int64_t first, int64_t last);  // descent.cpp
void fit_residual(const ResidualFit& ask, int64_t first, int64_t last);  // residual_fit.cpp
#if defined(__AVX512VNNI__)
constexpr void (*split)(const Product&, int64_t, int64_t) = nullptr;
constexpr void (*product)(const Product&, int64_t, int64_t) = nullptr;
#else
void split(const Product& ask, int64_t first, int64_t last);  // linear.cpp
void product(const Product& ask, int64_t first, int64_t last);
#endif
int pieces(const Product& ask);  // linear_rounded.cpp
void round_inputs(const RoundedProduct& ask, int64_t first, int64_t last);
void rounded_product(const RoundedProduct& ask, int64_t first, int64_t last);
void fill_panels(const TiledProduct& ask, int64_t first, int64_t last);  // linear_tiles.cpp
void tiled_product(const TiledProduct& ask, int64_t first, int64_t last);
bool tiles_bytes(const Product& ask, int pieces);  // linear_rounded_tiles.cpp
void fill_rounded_panels(const TiledProduct& ask, int64_t first, int64_t last);
void rounded_tiled_product(const TiledProduct& ask, int64_t first, int64_t last);
#if defined(__AMX_BF16__)
void fill_blocks(const BlockProduct& ask, int64_t first, int64_t last);  // linear_blocks.cpp
void block_product(const BlockProduct& ask, int64_t first, int64_t last);
void fill_rounded_blocks(const WholeBlockProduct& ask, int64_t first, int64_t last);  // linear_rounded_blocks.cpp
void rounded_block_product(const WholeBlockProduct& ask, int64_t first, int64_t last);
#else
constexpr void (*fill_blocks)(const BlockProduct&, int64_t, int64_t) = nullptr;
constexpr void (*block_product)(const BlockProduct&, int64_t, int64_t) = nullptr;
constexpr void (*fill_rounded_blocks)(const WholeBlockProduct&, int64_t, int64_t) = nullptr;
constexpr void (*rounded_block_product)(const WholeBlockProduct&, int64_t, int64_t) = nullptr;
#endif
void fill_planes(const Convolution& ask, int64_t first, int64_t last);  // convolution_blocks.cpp, convolution_tiles.cpp
void decode_blocks(const Convolution& ask, int64_t first, int64_t last);
void convolve(const Convolution& ask, int64_t first, int64_t last);
const KernelTable table = {AQ_NAME(AQ_ISA), quantize, dequantize, fit_grid, quantize_columns, pack, unpack,
                           dequantize_r2q, quantize_columns_r2q, descend_columns, fit_residual, hadamard, pieces,
                           split, product, round_inputs, rounded_product, WIDTH, fill_panels, tiled_product,
                           tiles_bytes, fill_rounded_panels, rounded_tiled_product, fill_blocks, block_product,
                           fill_rounded_blocks, rounded_block_product, POSITIONS, fill_planes, decode_blocks, convolve};

}  // namespace AQ_ISA

// What the codes of a row mean, group by group, in one form for both grids; knows nothing of inputs.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "stored.hpp"
#include "words.hpp"

namespace AQ_ISA {

// Codes are read once, and processors that read ahead by themselves stop at every page: so they are asked for early.
constexpr int64_t BYTES_AHEAD = 8192, ROWS_AHEAD = 16;

AQ_INLINE void ask_for(const void* start, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)start + i, 0, 2);
}
AQ_INLINE void ask_ahead(const uint8_t* codes, int64_t bytes) { ask_for(codes + BYTES_AHEAD, bytes); }

// weight = base + step * code, and jump more where the highest bit of the code is set.
//
//   affine  step = s, base = -s * zero, jump = 0
//   r2q     step = 2 a2, base = mu - a1 - m a2, jump = 2 a1 - 2^(bits-1) step, m = 2^(bits-1) - 1
struct RowLevels {
  std::vector<float> base, step, jump, zero;  // (groups and LANES,); zero on the affine grid, jump on the other

  explicit RowLevels(const Product& ask)
      : base(ask.of.groups + LANES), step(base.size()), jump(base.size()), zero(base.size()) {}

  void read(const Product& ask, int64_t row) {
    const uint8_t* zeros = ask.of.zero_points ? ask.of.zero_points + row * ask.of.groups : nullptr;
    const float row_scale = from_bfloat16_bits(ask.of.row_scales[row]);
    const int64_t count = ask.of.groups * (ask.residual ? 2 : 1);
    ask_for(ask.of.scales + (row + ROWS_AHEAD) * count, count);
    if (zeros) ask_for(zeros + ROWS_AHEAD * ask.of.groups, ask.of.groups);
    ask_for(ask.of.row_scales + row + 8 * ROWS_AHEAD, 1);
    if (ask.residual)
      read_residual(ask.of.scales + 2 * row * ask.of.groups, zeros, row_scale, ask.of.bits, ask.of.groups);
    else
      read_affine(ask.of.scales + row * ask.of.groups, zeros, row_scale, ask.of.bits, ask.of.groups);
  }

 private:
  void read_affine(const uint8_t* scales, const uint8_t* zeros, float row_scale, int bits, int64_t groups) {
    float *__restrict b = base.data(), *__restrict s = step.data(), *__restrict z = zero.data();
    const float share = 1.0f / 65025.0f, unit = 1.0f / (float)(255 / ((1 << bits) - 1));
    const float middle = (float)(1 << (bits - 1));
    for (int64_t g = 0; g < groups; g++) s[g] = row_scale * ((float)(scales[g] * scales[g]) * share);
    for (int64_t g = 0; g < groups; g++) z[g] = zeros ? (float)zeros[g] * unit : middle;
    for (int64_t g = 0; g < groups; g++) b[g] = -(s[g] * z[g]);
  }

  void read_residual(const uint8_t* scales, const uint8_t* zeros, float row_scale, int bits, int64_t groups) {
    float *__restrict b = base.data(), *__restrict s = step.data(), *__restrict j = jump.data();
    const float half = (float)(1 << (bits - 1)), most = half - 1.0f, share = 1.0f / 65025.0f;
    for (int64_t g = 0; g < groups; g++) {
      const float a1 = row_scale * ((float)(scales[2 * g] * scales[2 * g]) * share);
      const float a2 = row_scale * ((float)(scales[2 * g + 1] * scales[2 * g + 1]) * share);
      const float mu = zeros ? (a1 + most * a2) * ((float)(255 - 2 * zeros[g]) * (1.0f / 255.0f)) : 0.0f;
      b[g] = mu - a1 - most * a2;
      s[g] = a2 + a2;
      j[g] = a1 + a1 - half * s[g];
    }
  }
};

// The base of every group times the sum of its inputs, of one row of x.
static inline float based(const Product& ask, const RowLevels& levels, int m) {
  const float* inputs = ask.sums + m * ask.of.groups;
  const int64_t whole = ask.of.groups / LANES * LANES;
  Lanes all = fill(0.0f);
  for (int64_t g = 0; g < whole; g += LANES) all = add_product(load(&levels.base[g]), load(inputs + g), all);
  float rest = 0.0f;
  for (int64_t g = whole; g < ask.of.groups; g++) rest += levels.base[g] * inputs[g];
  return fold(pairs(all)) + rest;
}

// The weight from one row on, as if it began there.
static inline Dequantize from_row(const Product& ask, int64_t row) {
  Dequantize of = ask.of;
  of.codes += row * of.row_bytes;
  of.scales += row * of.groups * (ask.residual ? 2 : 1);
  of.zero_points = of.zero_points ? of.zero_points + row * of.groups : nullptr;
  of.row_scales += row;
  return of;
}

// The codes of one row, with as many bytes behind them as kernels read at a time.
struct RowCodes {
  static constexpr int64_t BEYOND = 64;
  std::vector<uint8_t> copy;

  explicit RowCodes(const Product& ask) : copy(ask.of.groups * ask.group_bytes() + 16 * ask.blocks() + BEYOND) {}

  // Where they lie, or, near the end of all codes, a copy.
  const uint8_t* at(const Product& ask, int64_t row) {
    const uint8_t* from = ask.of.codes + row * ask.of.row_bytes;
    if (row * ask.of.row_bytes + (int64_t)copy.size() <= ask.rows * ask.of.row_bytes) return from;
    std::memcpy(copy.data(), from, ask.of.row_bytes);
    return copy.data();
  }
};

}  // namespace AQ_ISA

// Inputs rounded to whole numbers of 8 bits, some columns by one step; knows nothing of weights.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"
#include "stored.hpp"

namespace AQ_ISA {

constexpr float LARGEST = 127.0f;
constexpr float FAR = 1024.0f;  // beyond any code, and small enough to be rounded by addition

// The sum of whole lanes.
static inline float sum_of(const float* x, int64_t padded) {
  Lanes sum = fill(0.0f);
  for (int64_t i = 0; i < padded; i += LANES) sum = sum + load(x + i);
  return fold(pairs(sum));
}

// Whether a group, filled up with zeros, has no meaning: NaN, or, where its greatest value counts, infinity.
static inline bool is_spoiled(const float* x, int64_t padded, bool infinity_too) {
  Lanes rest = fill(0.0f);  // x - x is 0 or NaN
  for (int64_t i = 0; i < padded; i += LANES) rest = rest + (load(x + i) - load(x + i));
  const bool finite = fold(pairs(rest)) == 0.0f;
  if (infinity_too || finite) return !finite;
  return std::any_of(x, x + padded, [](float value) { return value != value; });
}

static inline float absolute_maximum(const float* x, int64_t padded) {
  Lanes high = fill(0.0f), low = high;
  for (int64_t i = 0; i < padded; i += LANES) {
    high = max(high, load(x + i));
    low = min(low, load(x + i));
  }
  float lanes[LANES];
  store(lanes, max(high, fill(0.0f) - low));
  return *std::max_element(lanes, lanes + LANES);
}

// round(x / step) + zero within 0 to 255, less the middle, of whole lanes.
static inline void round_lanes(const float* x, int64_t padded, float step, float zero, int8_t* to) {
  for (int64_t i = 0; i < padded; i += LANES) {
    const Lanes near = min(max(load(x + i) / fill(step), fill(-FAR)), fill(FAR));
    const Lanes stored = code_of(shift_to_code(near)) + fill(zero);
    float lanes[LANES];
    store(lanes, min(max(stored, fill(0.0f)), fill(255.0f)) - fill(RoundedProduct::MIDDLE));
    for (int j = 0; j < LANES; j++) to[i + j] = (int8_t)(int32_t)lanes[j];
  }
}

// The step of a group of n values that were filled up with zeros, and its whole numbers.
static inline float round_group(const RoundedProduct& ask, const float* x, int64_t n, int64_t padded, int8_t* to) {
  std::fill_n(to, padded, (int8_t)0);
  if (is_spoiled(x, padded, !ask.fixed)) return std::numeric_limits<float>::quiet_NaN();
  const float step = ask.fixed ? ask.step : absolute_maximum(x, padded) / LARGEST;
  if (step > 0.0f) round_lanes(x, padded, step, ask.fixed ? ask.zero : ask.MIDDLE, to);
  std::fill(to + n, to + padded, (int8_t)0);
  return step;
}

// What is left of inputs in units of the next piece; step is that of the piece before.
static inline void leave_rest(float* x, int64_t padded, float step, const int8_t* taken) {
  for (int64_t i = 0; i < padded; i++) x[i] = step > 0.0f ? (x[i] / step - taken[i]) * RoundedProduct::FINER : 0.0f;
}

// A group of a row of x in pieces, each filled up with zeros: x = step * (q + q' / FINER + q'' / FINER^2).
struct GroupPieces {
  const RoundedProduct& ask;
  std::vector<float> group;
  std::vector<int8_t> whole;  // (pieces, group)
  float step = 0.0f, sum = 0.0f;

  explicit GroupPieces(const RoundedProduct& ask)
      : ask(ask), group((ask.of.group + LANES - 1) / LANES * LANES), whole(ask.pieces * group.size()) {}

  void read(int64_t m, int64_t g) {
    const int64_t n = ask.columns_of(g), padded = (int64_t)group.size();
    std::fill(group.begin(), group.end(), 0.0f);
    read_floats(ask.x, ask.dtype, m * ask.of.columns + g * ask.of.group, n, group.data());
    sum = sum_of(group.data(), padded);
    step = round_group(ask, group.data(), n, padded, whole.data());
    float unit = step;
    for (int p = 1; p < ask.pieces; p++, unit = 1.0f) {
      leave_rest(group.data(), padded, unit, &whole[(p - 1) * padded]);
      round_lanes(group.data(), padded, 1.0f, ask.MIDDLE, &whole[p * padded]);
    }
  }

  const int8_t* piece(int p) const { return &whole[p * group.size()]; }
};

// A row of x in whole numbers, with room for whole lanes behind them, and the step of each run.
struct RoundedRow {
  const RoundedProduct& ask;
  std::vector<float> run, steps;
  std::vector<int8_t> whole;

  explicit RoundedRow(const RoundedProduct& ask)
      : ask(ask),
        run((ask.run + LANES - 1) / LANES * LANES),
        steps((ask.of.columns + ask.run - 1) / ask.run),
        whole(steps.size() * ask.run + LANES) {}

  void read(int64_t m) {
    for (int64_t start = 0; start < ask.of.columns; start += ask.run) {
      const int64_t n = std::min(ask.run, ask.of.columns - start);
      std::fill(run.begin(), run.end(), 0.0f);
      read_floats(ask.x, ask.dtype, m * ask.of.columns + start, n, run.data());
      steps[start / ask.run] = round_group(ask, run.data(), n, (int64_t)run.size(), &whole[start]);
    }
  }

  float step_at(int64_t column) const { return steps[column / ask.run]; }

  // The values that stand for x now.
  void to_floats(float* to) const {
    for (int64_t start = 0; start < ask.of.columns; start += ask.run) {
      const float step = step_at(start), further = ask.correction();
      const int64_t last = std::min(start + ask.run, ask.of.columns);
      for (int64_t j = start; j < last; j++) to[j] = step * ((float)whole[j] + further);
    }
  }
};

}  // namespace AQ_ISA

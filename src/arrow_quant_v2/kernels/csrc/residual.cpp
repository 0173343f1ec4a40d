// The residual grid (r2q) and the block-Hadamard turn; compiled once per instruction set, with the same bits from each.
//
//   stored: a = row_scale * (s / 255)^2 for the two scales of a group,  mu = (a1 + m a2) ((255 - 2 z) / 255), or 0,
//           and the weights are those of residual.hpp
//
//   hadamard: for h = 1, 2, 4 ... block / 2:  x_i, x_{i+h} = x_i + x_{i+h}, x_i - x_{i+h}  wherever i has no bit h
//
// Every element sees the same operations in the same order as in kernels/reference.py. Assumes what kernels/ops.py has
// checked: shapes, widths, contiguity, U_tt > 0, blocks of at least 8.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"
#include "residual.hpp"
#include "stored.hpp"

namespace AQ_ISA {

// Some codes of a row; the first one begins a byte.
template <int BITS, class Item>
static void residual_group(const uint8_t* codes, Item* to, int64_t n, const Levels& levels, Halves halves) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) put(to + i, level(load_packed<BITS>(codes + i * BITS / 8), levels, halves));
  if (i == n) return;
  uint8_t rest[2 * BITS] = {};
  Item tail[LANES];
  std::memcpy(rest, codes + i * BITS / 8, ((n - i) * BITS + 7) / 8);
  put(tail, level(load_packed<BITS>(rest), levels, halves));
  std::memcpy(to + i, tail, (n - i) * sizeof(Item));
}

template <int BITS, class Item>
static void dequantize_row(const Dequantize& ask, int64_t row, Halves halves, const uint8_t* codes, Item* to) {
  const float row_scale = from_bfloat16_bits(ask.row_scales[row]);
  const auto scale = [&](uint8_t s) { return row_scale * ((float)(s * s) / 65025.0f); };
  for (int64_t g = 0; g < ask.groups; g++) {
    const int64_t at = row * ask.groups + g, start = g * ask.group;
    const int64_t n = std::min(ask.group, ask.columns - start);
    const float a1 = scale(ask.scales[2 * at]), a2 = scale(ask.scales[2 * at + 1]);
    const float share = ask.zero_points ? (float)(255 - 2 * ask.zero_points[at]) / 255.0f : 0.0f;
    const float mu = ask.zero_points ? (a1 + halves.most * a2) * share : 0.0f;
    const Levels levels{fill(mu + a1), fill(mu - a1), fill(a2)};
    residual_group<BITS>(codes + start * BITS / 8, to + start, n, levels, halves);
  }
}

template <class Item>
static void dequantize_r2q_as(const Dequantize& ask, int64_t first, int64_t last) {
  RowBytes bytes(ask);
  const Halves halves(ask.bits);
  for (int64_t r = first; r < last; r++) {
    const uint8_t* codes = ask.codes + r * ask.row_bytes;
    Item* to = (Item*)ask.weight + r * ask.columns;
    if (!bytes.direct)
      dequantize_row<8>(ask, r, halves, bytes.read(ask, codes), to);
    else if (ask.bits == 2)
      dequantize_row<2>(ask, r, halves, codes, to);
    else if (ask.bits == 4)
      dequantize_row<4>(ask, r, halves, codes, to);
    else
      dequantize_row<8>(ask, r, halves, codes, to);
  }
}

void dequantize_r2q(const Dequantize& ask, int64_t first, int64_t last) {
  if (ask.dtype == FLOAT32) dequantize_r2q_as<float>(ask, first, last);
  if (ask.dtype == BFLOAT16) dequantize_r2q_as<Bfloat16>(ask, first, last);
  if (ask.dtype == FLOAT16) dequantize_r2q_as<Float16>(ask, first, last);
}

// Sixteen rows and their parameters, as in columns.cpp.
struct ResidualTile {
  int64_t columns;
  std::vector<float> weights, errors;  // (columns, 16)
  std::vector<uint8_t> codes;          // (columns, 16)
  RowGrids grids;

  explicit ResidualTile(int64_t n) : columns(n), weights(n * LANES), errors(n * LANES), codes(n * LANES) {}

  void read(const ResidualColumns& ask, int64_t row, int64_t count) {
    grids.read(ask, row, count);
    to_tile(ask.block + row * columns, count, columns, weights.data());
  }

  void write(const ResidualColumns& ask, int64_t row, int64_t count) const {
    from_tile(codes.data(), count, columns, ask.codes + row * columns);
    from_tile(errors.data(), count, columns, ask.errors + row * columns);
  }
};

static void residual_loop(const float* upper, Halves halves, ResidualTile& tile) {
  const int64_t n = tile.columns;
  const Lanes mu = load(tile.grids.mu), inverse = load(tile.grids.inverse);
  const Levels levels = tile.grids.levels();
  float* w = tile.weights.data();
  for (int64_t t = 0; t < n; t++) {
    const float* u = upper + t * n;
    const Lanes now = load(w + t * LANES);
    const Nearest found = nearest(now, mu, inverse, levels, halves);
    const Lanes error = (now - found.value) / fill(u[t]);
    const Codes codes = codes_of(shift_to_code(found.code));
    std::memcpy(&tile.codes[t * LANES], &codes, LANES);
    store(&tile.errors[t * LANES], error);
    for (int64_t s = t + 1; s < n; s++) store(w + s * LANES, load(w + s * LANES) - error * fill(u[s]));
  }
}

void quantize_columns_r2q(const ResidualColumns& ask, int64_t first, int64_t last) {
  ResidualTile tile(ask.columns);
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t count = std::min<int64_t>(LANES, last - row);
    tile.read(ask, row, count);
    residual_loop(ask.upper, Halves(ask.bits), tile);
    tile.write(ask, row, count);
  }
}

// Lane i of the result is lane i ^ H.
template <int H, int... I>
static inline FloatPart swapped(FloatPart x, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (I ^ H)...);
#else
  typedef int32_t Places __attribute__((vector_size(WIDTH * 4)));
  return __builtin_shuffle(x, Places{(I ^ H)...});
#endif
}

template <int H, int... I>
static inline FloatPart signs(std::integer_sequence<int, I...>) {
  return FloatPart{(I & H ? -1.0f : 1.0f)...};
}

// One step within a part: where lane i has bit H, x_{i-H} - x_i, otherwise x_i + x_{i+H}; a factor of 1 or -1 is exact.
template <int H>
static inline FloatPart step(FloatPart x) {
  constexpr auto lanes = std::make_integer_sequence<int, WIDTH>();
  return swapped<H>(x, lanes) + x * signs<H>(lanes);
}

static inline FloatPart small_steps(FloatPart x) {
  x = step<2>(step<1>(x));
  if constexpr (WIDTH > 4) x = step<4>(x);
  if constexpr (WIDTH > 8) x = step<8>(x);
  return x;
}

static inline FloatPart load_part(const float* p) { return *(const AnyFloats*)p; }
static inline void store_part(float* p, FloatPart x) { *(AnyFloats*)p = x; }

// For blocks of 8 where a part has 16 lanes.
static void turn_narrow_block(float* x, int64_t block, float scale) {
  for (int64_t h = 1; h < block; h *= 2)
    for (int64_t i = 0; i < block; i += 2 * h)
      for (int64_t j = i; j < i + h; j++) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
  for (int64_t i = 0; i < block; i++) x[i] *= scale;
}

static void turn_block(const float* from, float* x, int64_t block, float scale) {
  for (int64_t i = 0; i < block; i += WIDTH) store_part(x + i, small_steps(load_part(from + i)));
  for (int64_t h = WIDTH; h < block; h *= 2)
    for (int64_t i = 0; i < block; i += 2 * h)
      for (int64_t j = i; j < i + h; j += WIDTH) {
        const FloatPart a = load_part(x + j), b = load_part(x + j + h);
        store_part(x + j, a + b);
        store_part(x + j + h, a - b);
      }
  for (int64_t i = 0; i < block; i += WIDTH) store_part(x + i, load_part(x + i) * scale);
}

void hadamard(const Hadamard& ask, int64_t first, int64_t last) {
  const float scale = (float)(1.0 / std::sqrt((double)ask.block));
  for (int64_t r = first; r < last; r++) {
    const float* from = ask.from + r * ask.block;
    float* to = ask.to + r * ask.block;
    if (ask.block >= WIDTH) {
      turn_block(from, to, ask.block, scale);
    } else {
      std::copy_n(from, ask.block, to);
      turn_narrow_block(to, ask.block, scale);
    }
  }
}

}  // namespace AQ_ISA

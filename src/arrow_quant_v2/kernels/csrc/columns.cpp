// The column loop of GPTQ within one group; compiled once per instruction set, with the same bits from each.
//
//   for t = 0 .. n - 1:  q_t = round(clip(w_t / s + z, 0, 2^bits - 1))
//                        e_t = (w_t - (q_t - z) s) / U_tt
//                        w_t' = w_t' - e_t U_tt'   for t' > t
//
// Rows do not know of each other, so sixteen of them lie in the lanes: a tile is (n, 16), one column after the other.
// Every element sees the same operations in the same order as in kernels/reference.py. Assumes what kernels/ops.py has
// checked: shapes, widths, contiguity, U_tt > 0. Measured: python bench/gptq.py.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"

namespace AQ_ISA {

// Sixteen rows and their parameters; rows that are missing at the end are zeros.
struct Tile {
  int64_t columns;
  std::vector<float> weights, errors;  // (columns, 16)
  std::vector<uint8_t> codes;          // (columns, 16)
  float scale[LANES], inverse[LANES], zero[LANES];

  explicit Tile(int64_t n) : columns(n), weights(n * LANES), errors(n * LANES), codes(n * LANES) {}

  void read(const Columns& ask, int64_t row, int64_t count) {
    to_tile(ask.scale + row, count, 1, scale);
    to_tile(ask.inverse + row, count, 1, inverse);
    to_tile(ask.zero + row, count, 1, zero);
    to_tile(ask.block + row * columns, count, columns, weights.data());
  }

  void write(const Columns& ask, int64_t row, int64_t count) const {
    from_tile(codes.data(), count, columns, ask.codes + row * columns);
    from_tile(errors.data(), count, columns, ask.errors + row * columns);
  }
};

static void loop(const float* upper, float max_code, Tile& tile) {
  const int64_t n = tile.columns;
  const Lanes scale = load(tile.scale), inverse = load(tile.inverse), zero = load(tile.zero);
  float* w = tile.weights.data();
  for (int64_t t = 0; t < n; t++) {
    const float* u = upper + t * n;
    const Lanes now = load(w + t * LANES);
    const Lanes shifted = shift_to_code(min(max(now * inverse + zero, fill(0.0f)), fill(max_code)));
    const Lanes error = (now - (code_of(shifted) - zero) * scale) / fill(u[t]);
    const Codes codes = codes_of(shifted);
    std::memcpy(&tile.codes[t * LANES], &codes, LANES);
    store(&tile.errors[t * LANES], error);
    for (int64_t s = t + 1; s < n; s++) store(w + s * LANES, load(w + s * LANES) - error * fill(u[s]));
  }
}

void quantize_columns(const Columns& ask, int64_t first, int64_t last) {
  Tile tile(ask.columns);
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t count = std::min<int64_t>(LANES, last - row);
    tile.read(ask, row, count);
    loop(ask.upper, (float)((1 << ask.bits) - 1), tile);
    tile.write(ask, row, count);
  }
}

}  // namespace AQ_ISA

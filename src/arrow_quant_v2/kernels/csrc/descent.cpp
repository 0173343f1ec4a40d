// Coordinate descent over the codes of one group; compiled once per instruction set, with the same bits from each.
//
//   for t = 0 .. n - 1:  v = level of c_t
//                        c_t = the code nearest to v + p_t / G_tt, v' its level
//                        p_t' = p_t' + (v - v') G_tt'   for t' > t
//
// Rows do not know of each other, so sixteen of them lie in the lanes. All grids are residual ones here: the affine one is
// that with a1 = 2^(bits-2) s and a2 = s / 2. Every element sees the same operations in the same order as in
// kernels/reference.py. Assumes what kernels/ops.py has checked: shapes, widths, contiguity, G_tt > 0.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"
#include "residual.hpp"

namespace AQ_ISA {

struct DescentTile {
  int64_t columns;
  std::vector<float> pull;     // (columns, 16)
  std::vector<uint8_t> codes;  // (columns, 16)
  RowGrids grids;

  explicit DescentTile(int64_t n) : columns(n), pull(n * LANES), codes(n * LANES) {}

  void read(const Descent& ask, int64_t row, int64_t count) {
    grids.read(ask, row, count);
    to_tile(ask.pull + row * columns, count, columns, pull.data());
    to_tile(ask.codes + row * columns, count, columns, codes.data());
  }

  void write(const Descent& ask, int64_t row, int64_t count) const {
    from_tile(codes.data(), count, columns, ask.found + row * columns);
  }
};

static bool any(Lanes x) {
  float each[LANES];
  store(each, x);
  bool found = false;
  for (int i = 0; i < LANES; i++) found |= each[i] != 0.0f;
  return found;
}

static void descend(const float* gram, Halves halves, DescentTile& tile) {
  const int64_t n = tile.columns;
  const Lanes mu = load(tile.grids.mu), inverse = load(tile.grids.inverse);
  const Levels levels = tile.grids.levels();
  float* p = tile.pull.data();
  for (int64_t t = 0; t < n; t++) {
    const float* g = gram + t * n;
    const Lanes value = level(load_codes(&tile.codes[t * LANES]), levels, halves);
    const Nearest found = nearest(value + load(p + t * LANES) / fill(g[t]), mu, inverse, levels, halves);
    const Codes codes = codes_of(shift_to_code(found.code));
    std::memcpy(&tile.codes[t * LANES], &codes, LANES);
    const Lanes change = value - found.value;
    if (!any(change)) continue;  // as most columns where little is left to gain
    for (int64_t s = t + 1; s < n; s++) store(p + s * LANES, load(p + s * LANES) + change * fill(g[s]));
  }
}

void descend_columns(const Descent& ask, int64_t first, int64_t last) {
  DescentTile tile(ask.columns);
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t count = std::min<int64_t>(LANES, last - row);
    tile.read(ask, row, count);
    descend(ask.gram, Halves(ask.bits), tile);
    tile.write(ask, row, count);
  }
}

}  // namespace AQ_ISA

// Results of a panel of inputs, written where they belong; knows nothing of how they were added.
#pragma once

#include <algorithm>

#include "kernels.hpp"
#include "words.hpp"

namespace AQ_ISA {

// One row of W, all lanes of a panel, and what every lane gets more.
template <int VECTORS>
static inline void write_lanes(const TiledProduct& ask, const FloatPart (&sums)[VECTORS], int64_t row, int64_t panel,
                               float more) {
  float lanes[VECTORS * WIDTH];
  std::memcpy(lanes, sums, sizeof lanes);
  const int64_t first = panel * ask.lanes, count = std::min(ask.lanes, ask.count - first);
  const float added = more + (ask.bias ? ask.bias[row] : 0.0f);
  for (int64_t i = 0; i < count; i++) ask.y[(first + i) * ask.rows + row] = lanes[i] + added;
}

}  // namespace AQ_ISA

// Inputs of a panel, and results, between rows of memory and lanes that lie side by side; knows nothing of products.
#pragma once

#include <algorithm>

#include "kernels.hpp"
#include "results.hpp"
#include "words.hpp"

namespace AQ_ISA {

AQ_INLINE Quad load_quad(const float* p) {
  Quad x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Four rows of four, turned.
AQ_INLINE void turn(Quad (&v)[4]) {
#if defined(__SSE2__)
  __m128 a = (__m128)v[0], b = (__m128)v[1], c = (__m128)v[2], d = (__m128)v[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  v[0] = (Quad)a, v[1] = (Quad)b, v[2] = (Quad)c, v[3] = (Quad)d;
#else
  const Quad from[4] = {v[0], v[1], v[2], v[3]};
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 4; k++) v[i][k] = from[k][i];
#endif
}

// Four rows of n values, `stride` apart, to four neighbouring lanes.
static inline void to_lanes(const float* from, int64_t stride, int64_t n, float* to, int64_t lanes) {
  for (int64_t j = 0; j < n; j += 4) {
    Quad v[4];
    for (int k = 0; k < 4; k++) v[k] = load_quad(from + k * stride + j);
    turn(v);
    for (int k = 0; k < std::min<int64_t>(4, n - j); k++) store_quad(to + (j + k) * lanes, v[k]);
  }
}

// Those of four rows of W, `lanes` long, and four rows of x, turned; each has a sum of every piece, so many lanes apart.
AQ_INLINE void read_sums(const float* sums, int64_t lanes, int pieces, int64_t apart, Quad (&v)[4]) {
  for (int k = 0; k < 4; k++) {
    v[k] = load_quad(sums + k * lanes);
    for (int p = 1; p < pieces; p++) v[k] += load_quad(sums + k * lanes + p * apart);
  }
  turn(v);
}

// `count` rows of W from `row` on, all lanes of a panel: sums (count filled up to fours, lanes) and four more floats, and what
// each row gets besides, to where they belong. A few lanes at a time, so that what is written stays in the cache until its lines are full.
static inline void write_panel(const TiledProduct& ask, const float* sums, int64_t row, int64_t count, int64_t panel,
                               const float* more) {
  const int64_t apart = ask.rows_of_panel(), first = panel * apart, lanes = std::min(apart, ask.count - first);
  for (int64_t i = 0; i < lanes; i += 4)
    for (int64_t r = 0; r < count; r += 4) {
      const int64_t some = std::min<int64_t>(4, count - r);
      Quad v[4], added{};
      for (int k = 0; k < some; k++) added[k] = (more ? more[r + k] : 0.0f) + (ask.bias ? ask.bias[row + r + k] : 0.0f);
      read_sums(sums + r * ask.lanes + i, ask.lanes, ask.pieces, apart, v);
      for (int k = 0; k < std::min<int64_t>(4, lanes - i); k++)
        write_sums(ask, (first + i + k) * ask.rows + row + r, v[k] + added, some);
    }
}

}  // namespace AQ_ISA

// What codes of the residual grid (r2q) mean, and which one is nearest, for sixteen rows; knows no loop over columns.
//
//   m = 2^(bits-1) - 1,  top = the highest bit of a code,  low = its other bits
//   centre = mu + a1 where top, else mu - a1
//   weight = centre + a2 (2 low - m)
//
//   nearest: top = w >= mu,  low = round(clip((w - centre) / (2 a2) + m / 2, 0, m)),  where a1 >= m a2
//
// Every element sees the same operations in the same order as in kernels/reference.py.
#pragma once

#include "lanes.hpp"

namespace AQ_ISA {

AQ_INLINE Lanes at_least(Lanes x, Lanes limit, Lanes yes, Lanes no) {
  AQ_EACH(x.part[i] >= limit.part[i] ? yes.part[i] : no.part[i])
}

// What a code adds to the centre of its half, and which half it is.
struct Halves {
  float most;   // m
  float first;  // 2^(bits-1), the first code on top

  explicit Halves(int bits) : most((float)((1 << (bits - 1)) - 1)), first((float)(1 << (bits - 1))) {}
};

struct Levels {
  Lanes above, below, a2;  // mu + a1, mu - a1
};

// Not left to the compiler: a call would pass sixteen floats through memory, at four times the cost.
AQ_INLINE Lanes level(Lanes code, const Levels& of, Halves halves) {
  const Lanes first = fill(halves.first), most = fill(halves.most);
  const Lanes centre = at_least(code, first, of.above, of.below);
  const Lanes low = code - at_least(code, first, first, fill(0.0f));
  return centre + of.a2 * (low + low - most);
}

struct Nearest {
  Lanes code, value;
};

// `inverse` is 1 / (2 a2), or 0.
AQ_INLINE Nearest nearest(Lanes now, Lanes mu, Lanes inverse, const Levels& of, Halves halves) {
  const Lanes none = fill(0.0f), most = fill(halves.most), middle = fill(halves.most * 0.5f);
  const Lanes centre = at_least(now, mu, of.above, of.below);
  const Lanes low = code_of(shift_to_code(min(max((now - centre) * inverse + middle, none), most)));
  return {low + at_least(now, mu, fill(halves.first), none), centre + of.a2 * (low + low - most)};
}

// The parameters of sixteen rows; rows that are missing at the end are zeros.
struct RowGrids {
  float mu[LANES], a1[LANES], a2[LANES], inverse[LANES];

  template <class Ask>
  void read(const Ask& ask, int64_t row, int64_t count) {
    to_tile(ask.mu + row, count, 1, mu);
    to_tile(ask.a1 + row, count, 1, a1);
    to_tile(ask.a2 + row, count, 1, a2);
    to_tile(ask.inverse + row, count, 1, inverse);
  }

  Levels levels() const { return {load(mu) + load(a1), load(mu) - load(a1), load(a2)}; }
};

}  // namespace AQ_ISA

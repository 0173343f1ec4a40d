// The residual grid fitted by alternation, sixteen groups in the lanes; the same bits from every instruction set.
//
//   d = w - mu,  t = sign d,  y = |d| - a1,  c = the number of -m, -m + 2 ... m that times a2 comes nearest to y,
//   e = y - a2 c:  weights are looked at from the half that they lie in, where w - q = t e
//
//   sums over the group of h times  e^2, e c, e, c;  if asymmetric  e t, t, t c;  above 2 bits  c^2
//   one step of least squares (mu, a1, a2) += d from them, in double; mu is eliminated first
//
//   w, h      group 0 1 2 ... 15 | 16 ...       a tile: sixteen groups, all n weights of each
//   weight 0        . . .      .
//   weight n-1      . . .      .               terms are halved along n: weight t meets weight t + n / 2
//
// Measured beside torch's operators: 4096 x 4096 in groups of 64, all of r2q, 1.4 s of one core of an AMD EPYC (AVX2)
// instead of 2.9 to 3.3.
//
// Every element sees the same operations in the same order as in kernels/residual_fit.py: sums add halves. Assumes what
// kernels/ops.py has checked: shapes, widths, contiguity.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"

namespace AQ_ISA {

static_assert(LANES == GROUPS_TOGETHER, "a tile of groups fills the lanes");

constexpr double RIDGE = 1e-6;
constexpr int MOST_SUMS = 8;
enum { SQUARES, EC, E, C, ET, T, TC };  // in the order of the sums; C C comes last

typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
constexpr uint32_t SIGN = 0x80000000u;

// 1 or -1, by the sign of x, that of a zero too.
AQ_INLINE Lanes sign_of(Lanes x) { AQ_EACH((FloatPart)(((Words)x.part[i] & SIGN) | (Words)fill(1.0f).part[i])) }
AQ_INLINE Lanes magnitude(Lanes x) { AQ_EACH((FloatPart)((Words)x.part[i] & ~SIGN)) }

// Those of sixteen groups.
struct Grids {
  float mu[LANES], a1[LANES], a2[LANES];

  void read(const ResidualFit& ask, int start, int64_t group, int64_t count) {
    const int64_t at = start * ask.groups + group;
    to_tile(ask.mu + at, count, 1, mu);
    to_tile(ask.a1 + at, count, 1, a1);
    to_tile(ask.a2 + at, count, 1, a2);
  }

  // 1 / (2 a2), or 0.
  Lanes inverse() const {
    float each[LANES];
    for (int i = 0; i < LANES; i++) each[i] = a2[i] > 0.0f ? 1.0f / a2[i] * 0.5f : 0.0f;  // as torch divides by a tensor
    return load(each);
  }
};

// The sums of sixteen groups.
struct GroupSums {
  double of[MOST_SUMS][LANES];
};

// Sixteen groups of n weights, and room for what is added up.
struct FitTile {
  int64_t n;
  bool weighed;
  std::vector<float> w, h;               // (n, 16)
  std::vector<float> terms[MOST_SUMS];   // (n / 2 or 1, 16)
  double mass[LANES];

  FitTile(int64_t count, bool weighs, int sums) : n(count), weighed(weighs), w(n * LANES), h(weighs ? n * LANES : 0) {
    for (int k = 0; k < sums; k++) terms[k].resize(std::max<int64_t>(1, n / 2) * LANES);
  }

  void read(const ResidualFit& ask, int64_t group, int64_t count) {
    gather(ask.weights + group, ask.groups, count, w.data());
    if (weighed) gather(ask.importance + group, ask.groups, count, h.data());
    weigh();
  }

  // Those that are missing are zeros.
  void gather(const float* from, int64_t stride, int64_t count, float* to) const {
    for (int64_t t = 0; t < n; t++) {
      if (count == LANES) {
        store(to + t * LANES, load(from + t * stride));
        continue;
      }
      for (int64_t i = 0; i < LANES; i++) to[t * LANES + i] = i < count ? from[t * stride + i] : 0.0f;
    }
  }

  void weigh() {
    if (!weighed) {
      for (double& one : mass) one = (double)n;
      return;
    }
    halve(1, [&](int64_t t, Lanes* term) { term[0] = load(&h[t * LANES]); });
    fold(0, mass);
  }

  // The first half of what is added up: terms of weight t, and of that half a group later; the last of an odd number
  // goes to the first one.
  template <class Term>
  void halve(int count, Term term) {
    const int64_t half = n / 2;
    Lanes here[MOST_SUMS], there[MOST_SUMS];
    for (int64_t t = 0; t < std::max<int64_t>(1, half); t++) {
      term(t, here);
      if (t == 0 && n % 2 && n > 1) {
        term(n - 1, there);
        for (int k = 0; k < count; k++) here[k] = here[k] + there[k];
      }
      if (half) {
        term(half + t, there);
        for (int k = 0; k < count; k++) here[k] = here[k] + there[k];
      }
      for (int k = 0; k < count; k++) store(&terms[k][t * LANES], here[k]);
    }
  }

  // What is left of it, added up.
  void fold(int which, double* sums) {
    float* term = terms[which].data();
    for (int64_t left = std::max<int64_t>(1, n / 2); left > 1; left /= 2) {
      const int64_t half = left / 2;
      if (left % 2) store(term, load(term) + load(term + (left - 1) * LANES));
      for (int64_t t = 0; t < half; t++)
        store(term + t * LANES, load(term + t * LANES) + load(term + (half + t) * LANES));
    }
    for (int i = 0; i < LANES; i++) sums[i] = (double)term[i];
  }
};

template <bool SYMMETRIC, bool WIDE, bool WEIGHED>
static void add_up(FitTile& tile, const Grids& grids, float m, GroupSums& sums) {
  constexpr int COUNT = 4 + (SYMMETRIC ? 0 : 3) + (WIDE ? 1 : 0);
  const Lanes mu = load(grids.mu), a1 = load(grids.a1), a2 = load(grids.a2), inverse = grids.inverse();
  const Lanes most = fill(m), middle = fill(0.5f * m), none = fill(0.0f);
  const auto nearest = [&](Lanes y) {
    if (!WIDE) return sign_of(y);
    const Lanes low = code_of(shift_to_code(min(most, max(none, y * inverse + middle))));  // NaN stays NaN
    return low * fill(2.0f) - most;
  };
  const auto term = [&](int64_t at, Lanes* to) {
    const Lanes d = load(&tile.w[at * LANES]) - mu, t = sign_of(d), y = magnitude(d) - a1, c = nearest(y);
    const Lanes e = y - c * a2, h = WEIGHED ? load(&tile.h[at * LANES]) : fill(1.0f);
    const Lanes he = WEIGHED ? e * h : e, hc = WEIGHED ? c * h : c;
    to[SQUARES] = he * e;
    to[EC] = he * c;
    to[E] = he;
    to[C] = hc;
    if (!SYMMETRIC) {
      const Lanes ht = WEIGHED ? t * h : t;
      to[ET] = he * t;
      to[T] = ht;
      to[TC] = ht * c;
    }
    if (WIDE) to[COUNT - 1] = hc * c;
  };
  tile.halve(COUNT, term);
  for (int k = 0; k < COUNT; k++) tile.fold(k, sums.of[k]);
}

struct Move {
  double a1, a2;
};

static Move solved(double a11, double a12, double a22, double g1, double g2) {
  const double determinant = a11 * a22 - a12 * a12;
  return {(a22 * g1 - a12 * g2) / determinant, (a11 * g2 - a12 * g1) / determinant};
}

// Brought back to a1 >= m a2 >= 0 and |mu| <= a1 + m a2; all NaN where one is, and then never better.
static void allow(Grids& to, int i, double mu, double a1, double a2, float m) {
  const float step = std::max((float)a2, 0.0f), half = std::max((float)a1, m * step), reach = half + m * step;
  const bool whole = !(std::isnan(mu) || std::isnan(a1) || std::isnan(a2));
  to.a2[i] = whole ? step : NAN;
  to.a1[i] = whole ? half : NAN;
  to.mu[i] = whole ? std::min(std::max((float)mu, -reach), reach) : NAN;
}

static Grids moved(const FitTile& tile, const Grids& grids, const GroupSums& sums, float m, bool symmetric) {
  Grids to;
  const int last = symmetric ? 4 : 7;
  for (int i = 0; i < LANES; i++) {
    const double mass = tile.mass[i], ridge = mass * RIDGE, a12 = sums.of[C][i];
    const double a11 = mass + ridge, a22 = (m > 1.0f ? sums.of[last][i] : mass) + ridge;
    const double g1 = sums.of[E][i], g2 = sums.of[EC][i];
    if (symmetric) {
      const Move d = solved(a11, a12, a22, g1, g2);
      allow(to, i, grids.mu[i], grids.a1[i] + d.a1, grids.a2[i] + d.a2, m);
      continue;
    }
    const double g0 = sums.of[ET][i], of_t = sums.of[T][i], of_k = sums.of[TC][i];
    const double by_t = of_t / a11, by_k = of_k / a11;
    const Move d = solved(a11 - of_t * by_t, a12 - of_k * by_t, a22 - of_k * by_k, g1 - g0 * by_t, g2 - g0 * by_k);
    const double mu = grids.mu[i] + (g0 - of_t * d.a1 - of_k * d.a2) / a11;
    allow(to, i, mu, grids.a1[i] + d.a1, grids.a2[i] + d.a2, m);
  }
  return to;
}

// Of each group the grid with the smaller error, and its sums; whether any changed.
static bool take_better(Grids& best, GroupSums& sums, const Grids& tried, const GroupSums& found) {
  bool any = false;
  for (int i = 0; i < LANES; i++) {
    if (!(found.of[SQUARES][i] < sums.of[SQUARES][i])) continue;
    any = true;
    best.mu[i] = tried.mu[i];
    best.a1[i] = tried.a1[i];
    best.a2[i] = tried.a2[i];
    for (int k = 0; k < MOST_SUMS; k++) sums.of[k][i] = found.of[k][i];
  }
  return any;
}

template <bool SYMMETRIC, bool WIDE, bool WEIGHED>
static void fit_tile(const ResidualFit& ask, FitTile& tile, int64_t group, int64_t count, float m) {
  Grids best, tried;
  GroupSums sums{}, found{};
  best.read(ask, 0, group, count);
  add_up<SYMMETRIC, WIDE, WEIGHED>(tile, best, m, sums);
  for (int start = 1; start < ask.starts; start++) {
    tried.read(ask, start, group, count);
    add_up<SYMMETRIC, WIDE, WEIGHED>(tile, tried, m, found);
    take_better(best, sums, tried, found);
  }
  for (int round = 0; round < ask.rounds; round++) {
    tried = moved(tile, best, sums, m, SYMMETRIC);
    add_up<SYMMETRIC, WIDE, WEIGHED>(tile, tried, m, found);
    if (!take_better(best, sums, tried, found)) break;  // a group that a round does not help would repeat
  }
  std::copy_n(best.mu, count, ask.found_mu + group);
  std::copy_n(best.a1, count, ask.found_a1 + group);
  std::copy_n(best.a2, count, ask.found_a2 + group);
}

void fit_residual(const ResidualFit& ask, int64_t first, int64_t last) {
  const float m = (float)((1 << (ask.bits - 1)) - 1);
  const bool wide = ask.bits > 2, weighed = ask.importance != nullptr;
  const auto fit = ask.symmetric ? (wide ? (weighed ? fit_tile<true, true, true> : fit_tile<true, true, false>)
                                         : (weighed ? fit_tile<true, false, true> : fit_tile<true, false, false>))
                                 : (wide ? (weighed ? fit_tile<false, true, true> : fit_tile<false, true, false>)
                                         : (weighed ? fit_tile<false, false, true> : fit_tile<false, false, false>));
  FitTile tile(ask.n, weighed, 4 + (ask.symmetric ? 0 : 3) + (wide ? 1 : 0));
  for (int64_t group = first * LANES; group < std::min(last * LANES, ask.groups); group += LANES) {
    const int64_t count = std::min<int64_t>(LANES, ask.groups - group);
    tile.read(ask, group, count);
    fit(ask, tile, group, count, m);
  }
}

}  // namespace AQ_ISA

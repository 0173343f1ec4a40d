// Inputs times packed weights, with inputs as they are, in floats; compiled once per instruction set that has no dot
// products of bytes, which are always faster: there, and in some cases elsewhere, inputs are pieces (linear_rounded.cpp).
//
//   y = sum over groups of  sum_j w_j x_j,   w_j = base + step * code_j + jump * (highest bit of code_j)
//
// Codes are read as they are stored, sixteen bytes at a time: the n = 8 / bits codes of a byte are n shifts of one
// vector, and each meets inputs that were split alike (see Product).
//
//   2 bits          a table of four levels, from which a lane takes the one that its code names
//   4 bits, affine  step * sum code_j x_j + base * sum x_j
//   8 bits, affine  step * sum (code_j - zero) x_j
//   else, r2q       the two highest bits name base or base + jump in a table, to which step * code_j is added
//
// Sums are float32 in sixteen lanes that are folded at the end, one row of W after the other, so that results do not
// depend on threads. Assumes what kernels/linear.py has checked, and groups that start on a byte.
// Measured on an EPYC 7003 (AVX2, 2 cores): python bench/linear.py.
#include <algorithm>
#include <vector>

#include "kernels.hpp"
#include "levels.hpp"
#include "results.hpp"
#include "stored.hpp"
#include "words.hpp"

#if !defined(__AVX512VNNI__)

namespace AQ_ISA {

// One group of inputs to planes; `from` is filled up with zeros.
static void split_group(const float* from, float* to, int64_t blocks, int64_t codes_of_byte) {
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t k = 0; k < codes_of_byte; k++)
      for (int64_t i = 0; i < LANES; i++) *to++ = from[(b * LANES + i) * codes_of_byte + k];
}

void split(const Product& ask, int64_t first, int64_t last) {
  const int64_t places = ask.group_places();
  std::vector<float> group(places + LANES);
  for (int64_t m = first; m < last; m++)
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const int64_t start = g * ask.of.group, n = std::min(ask.of.group, ask.of.columns - start);
      std::fill(group.begin(), group.end(), 0.0f);
      read_floats(ask.x, ask.dtype, m * ask.of.columns + start, n, group.data());
      Lanes sum = fill(0.0f);
      for (int64_t i = 0; i < places; i += LANES) sum = sum + load(&group[i]);
      const int64_t at = m * ask.of.groups + g;
      ask.sums[at] = fold(pairs(sum));
      split_group(group.data(), ask.planes + at * places, ask.blocks(), ask.codes_of_byte());
    }
}

// The planes of COUNT rows of x for one block, each `stride` after the other.
struct Inputs {
  const float* at;
  int64_t stride;

  Lanes operator()(int m, int k) const { return load(at + m * stride + k * LANES); }
};

// Sums that do not wait for each other: as many as make eight vectors of eight lanes.
template <int COUNT>
struct Partial {
  static constexpr int CHAINS = COUNT >= 4 ? 1 : 4 / COUNT;
  Lanes sum[COUNT][CHAINS];

  Partial() {
    for (auto& row : sum)
      for (Lanes& chain : row) chain = fill(0.0f);
  }
  AQ_INLINE_MEMBER void add(Lanes weight, const Inputs& x, int k) {
    for (int m = 0; m < COUNT; m++) {
      Lanes& chain = sum[m][k % CHAINS];
      chain = add_product(weight, x(m, k), chain);
    }
  }
  AQ_INLINE_MEMBER Lanes total(int m) const {
    Lanes all = sum[m][0];
    for (int i = 1; i < CHAINS; i++) all = all + sum[m][i];
    return all;
  }
};

// 4 or 8 bits on the residual grid.
template <int BITS, bool RESIDUAL, int COUNT>
struct GroupProduct {
  Partial<COUNT> sums;

  AQ_INLINE_MEMBER void add(const RowLevels& levels, int64_t g, const uint8_t* codes, int64_t blocks, Inputs x) {
    constexpr int PLANES = 8 / BITS;
    const float base = levels.base[g], upper = base + levels.jump[g];
    const Table ends = table_of(Quad{base, base, upper, upper});
    const Lanes step = fill(levels.step[g]);
    for (int64_t b = 0; b < blocks; b++, codes += LANES, x.at += PLANES * LANES) {
      const Words v = widen(codes);
      for (int k = 0; k < PLANES; k++) {
        const Words code = (v >> BITS * k) & ((1 << BITS) - 1);
        sums.add(add_product(to_floats(code), step, pick(ends, code >> (BITS - 2))), x, k);
      }
    }
  }
  AQ_INLINE_MEMBER float total(int m, const RowLevels&, const Product&) const { return fold(pairs(sums.total(m))); }
};

// All levels of a group in one table.
template <bool RESIDUAL, int COUNT>
struct GroupProduct<2, RESIDUAL, COUNT> {
  Partial<COUNT> sums;

  AQ_INLINE_MEMBER void add(const RowLevels& levels, int64_t g, const uint8_t* codes, int64_t blocks, Inputs x) {
    const float base = levels.base[g], step = levels.step[g], upper = base + (RESIDUAL ? levels.jump[g] : 0.0f);
    const Table table = table_of(Quad{base, base + step, upper + step + step, upper + step + step + step});
    for (int64_t b = 0; b < blocks; b++, codes += LANES, x.at += 4 * LANES) {
      const Words v = widen(codes);
      for (int k = 0; k < 4; k++) sums.add(pick(table, v >> 2 * k), x, k);
    }
  }
  AQ_INLINE_MEMBER float total(int m, const RowLevels&, const Product&) const { return fold(pairs(sums.total(m))); }
};

// Codes times inputs; the base of a group is added for all groups at once.
template <int COUNT>
struct GroupProduct<4, false, COUNT> {
  Lanes sums[COUNT];

  GroupProduct() { std::fill_n(sums, COUNT, fill(0.0f)); }
  AQ_INLINE_MEMBER void add(const RowLevels& levels, int64_t g, const uint8_t* codes, int64_t blocks, Inputs x) {
    Partial<COUNT> group;
    for (int64_t b = 0; b < blocks; b++, codes += LANES, x.at += 2 * LANES) {
      const Words v = widen(codes);
      group.add(to_floats(v & 15), x, 0);
      group.add(to_floats(v >> 4), x, 1);
    }
    const Lanes step = fill(levels.step[g]);
    for (int m = 0; m < COUNT; m++) sums[m] = add_product(group.total(m), step, sums[m]);
  }
  AQ_INLINE_MEMBER float total(int m, const RowLevels& levels, const Product& ask) const {
    return fold(pairs(sums[m])) + based(ask, levels, m);
  }
};

template <int COUNT>
struct GroupProduct<8, false, COUNT> {
  Lanes sums[COUNT];

  GroupProduct() { std::fill_n(sums, COUNT, fill(0.0f)); }
  AQ_INLINE_MEMBER void add(const RowLevels& levels, int64_t g, const uint8_t* codes, int64_t blocks, Inputs x) {
    Partial<COUNT> group;
    const Lanes zero = fill(levels.zero[g]), step = fill(levels.step[g]);
    for (int64_t b = 0; b < blocks; b++, codes += LANES, x.at += LANES)
      group.add(to_floats(widen(codes)) - zero, x, 0);
    for (int m = 0; m < COUNT; m++) sums[m] = add_product(group.total(m), step, sums[m]);
  }
  AQ_INLINE_MEMBER float total(int m, const RowLevels&, const Product&) const { return fold(pairs(sums[m])); }
};

template <int BITS, bool RESIDUAL, int COUNT>
static void product_of(const Product& ask, int64_t first, int64_t last) {
  RowLevels levels(ask);
  RowCodes codes(ask);
  const int64_t places = ask.group_places(), bytes = ask.group_bytes(), blocks = ask.blocks();
  for (int64_t r = first; r < last; r++) {
    levels.read(ask, r);
    const uint8_t* row = codes.at(ask, r);
    GroupProduct<BITS, RESIDUAL, COUNT> sums;
    for (int64_t g = 0; g < ask.of.groups; g++) {
      ask_ahead(row + g * bytes, bytes);
      sums.add(levels, g, row + g * bytes, blocks, Inputs{ask.planes + g * places, ask.of.groups * places});
    }
    for (int m = 0; m < COUNT; m++)
      write_sums(ask, m * ask.rows + r, Quad{sums.total(m, levels, ask) + (ask.bias ? ask.bias[r] : 0.0f)}, 1);
  }
}

template <int BITS, bool RESIDUAL>
static void product_on(const Product& ask, int64_t first, int64_t last) {
  if (ask.count == 1) product_of<BITS, RESIDUAL, 1>(ask, first, last);
  if (ask.count == 2) product_of<BITS, RESIDUAL, 2>(ask, first, last);
  if (ask.count == 3) product_of<BITS, RESIDUAL, 3>(ask, first, last);
  if (ask.count == 4) product_of<BITS, RESIDUAL, 4>(ask, first, last);
}

template <int BITS>
static void product_in(const Product& ask, int64_t first, int64_t last) {
  if (ask.residual)
    product_on<BITS, true>(ask, first, last);
  else
    product_on<BITS, false>(ask, first, last);
}

void product(const Product& ask, int64_t first, int64_t last) {
  if (ask.of.bits == 2) product_in<2>(ask, first, last);
  if (ask.of.bits == 4) product_in<4>(ask, first, last);
  if (ask.of.bits == 8) product_in<8>(ask, first, last);
}

}  // namespace AQ_ISA

#endif

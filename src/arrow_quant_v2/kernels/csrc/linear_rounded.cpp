// Inputs rounded to 8 bits times packed weights; compiled once per instruction set. Inputs as they are go the same way, as
// two or three whole numbers each (RoundedProduct), where that is faster than floats.
//
//   y = sum over groups of  step_x (step * sum code_j q_j + jump * sum top_j q_j + base * sum q_j),   x ~ step_x q
//
// with base, step and jump of levels.hpp, and top the highest bit of a code on the r2q grid. The sums of products are
// whole numbers, and exact; see bytes.hpp. Inputs of a fixed step are x ~ step_x (q + c): the sums of W's rows, times c,
// come from one more row of inputs that are 1.
//
// Codes are read as they are stored, a vector of bytes at a time. Where a group is some vectors long, its whole numbers
// are added before they meet its step; else each word, or each four words, meets the step of its group.
//
// Assumes what kernels/linear.py has checked, groups that start on a byte, and at most 2^16 columns in a group.
// Measured on an EPYC 7003 (AVX2, 2 cores): python bench/linear.py.
#include <algorithm>
#include <numeric>
#include <vector>

#include "bytes.hpp"
#include "kernels.hpp"
#include "levels.hpp"
#include "results.hpp"
#include "rounding.hpp"
#include "stored.hpp"

namespace AQ_ISA {

// Whether two pieces leave less than bfloat16 itself does: of a long group, one great value would take much from all others.
[[maybe_unused]] static bool two_are_enough(const Product& ask) { return ask.dtype == BFLOAT16 && ask.of.group <= 256; }

// Three products of bytes are faster than floats where one instruction adds them in words. Where it takes three, two are,
// unless each is needed twice, for the residual grid, or in 16 bits, for codes of 8 bits.
#if defined(__AVX512VNNI__)
int pieces(const Product& ask) { return two_are_enough(ask) ? 2 : 3; }
#elif defined(__AVX2__)
int pieces(const Product& ask) { return two_are_enough(ask) && !ask.residual && ask.of.bits < 8 ? 2 : 0; }
#else
int pieces(const Product&) { return 0; }
#endif

// The whole numbers that the codes of a byte meet are one Word; those of a vector's bytes are given plane after plane.
template <class Word>
static void to_planes(const int8_t* from, int64_t bytes, int8_t* to) {
  for (int64_t start = 0; start < bytes; start += VECTOR_BYTES, from += VECTOR_BYTES * sizeof(Word)) {
    Word words[VECTOR_BYTES];
    std::memcpy(words, from, sizeof words);
    for (size_t k = 0; k < sizeof(Word); k++, to += VECTOR_BYTES)
      for (int64_t i = 0; i < VECTOR_BYTES; i++) to[i] = (int8_t)(words[i] >> 8 * k);
  }
}

// Whole numbers in the order of columns to the order in which codes meet them.
static void to_stream(const RoundedProduct& ask, const int8_t* from, int8_t* to) {
  if (ask.of.bits == 2) to_planes<uint32_t>(from, ask.stream_bytes(), to);
  if (ask.of.bits == 4) to_planes<uint16_t>(from, ask.stream_bytes(), to);
  if (ask.of.bits == 8) std::copy_n(from, ask.stream_bytes(), to);
}

// Groups of one row of x: their whole numbers, in the order of columns, to (pieces, stream) `to`.
struct RowInputs {
  const RoundedProduct& ask;
  const int64_t group_places, stream;
  RoundedRow row;
  GroupPieces group;

  explicit RowInputs(const RoundedProduct& ask)
      : ask(ask),
        group_places(ask.group_words() * 4 * ask.codes_of_byte()),
        stream(ask.stream_places()),
        row(ask),
        group(ask) {}

  // Rounded by runs.
  void read_rounded(int64_t m, int8_t* to) {
    row.read(m);
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const int8_t* from = &row.whole[g * ask.of.group];
      std::copy_n(from, ask.columns_of(g), to + g * group_places);
      const float step = ask.steps[m * ask.of.groups + g] = row.step_at(g * ask.of.group);
      ask.sums[m * ask.of.groups + g] = step * (float)std::accumulate(from, from + ask.columns_of(g), 0);
    }
  }

  // As they are: a sum of pieces.
  void read_pieces(int64_t m, int8_t* to) {
    for (int64_t g = 0; g < ask.of.groups; g++) {
      group.read(m, g);
      ask.sums[m * ask.of.groups + g] = group.sum;
      ask.steps[m * ask.of.groups + g] = group.step;
      for (int p = 0; p < ask.pieces; p++)
        std::copy_n(group.piece(p), ask.columns_of(g), to + p * stream + g * group_places);
    }
  }

  // Of which the sums of W's rows come.
  void fill_with_ones(int64_t m, int8_t* to) {
    for (int64_t g = 0; g < ask.of.groups; g++) {
      std::fill_n(to + g * group_places, ask.columns_of(g), (int8_t)1);
      ask.steps[m * ask.of.groups + g] = 1.0f;
      ask.sums[m * ask.of.groups + g] = (float)ask.columns_of(g);
    }
  }
};

void round_inputs(const RoundedProduct& ask, int64_t first, int64_t last) {
  RowInputs inputs(ask);
  std::vector<int8_t> row(ask.pieces * inputs.stream);
  for (int64_t m = first; m < last; m++) {
    if (m >= ask.count)
      inputs.fill_with_ones(m, row.data());
    else if (ask.pieces > 1)
      inputs.read_pieces(m, row.data());
    else
      inputs.read_rounded(m, row.data());
    for (int p = 0; p < ask.pieces; p++)
      to_stream(ask, &row[p * inputs.stream], ask.places + (m * ask.pieces + p) * inputs.stream);
  }
}

// What the whole numbers of a vector's words are multiplied with.
enum Reach {
  VECTORS,  // one step: groups are some vectors long,
  VECTOR,   // or one
  QUADS,    // a step for every four words
  WORDS,    // a step for every word
};

// step_w * step_x, and jump_w * step_x, of a row of W and some rows of x.
struct Factors {
  Reach reach;
  int64_t repeat, stride;  // how often a group's factor is written; factors of one row of x
  std::vector<float> step, jump;

  Factors(const RoundedProduct& ask, int64_t count) {
    const int64_t bytes = ask.group_words() * 4;
    if (bytes == VECTOR_BYTES)
      reach = VECTOR;
    else
      reach = bytes % VECTOR_BYTES == 0 || ask.of.groups == 1 ? VECTORS : bytes % 16 == 0 ? QUADS : WORDS;
    repeat = reach == QUADS ? bytes / 16 : reach == WORDS ? bytes / 4 : 1;
    stride = ask.of.groups * repeat + WIDTH;
    step.resize(count * stride);
    jump.resize(ask.residual ? count * stride : 0);
  }

  void read(const RoundedProduct& ask, const RowLevels& levels, int m) {
    const float* steps = ask.steps + m * ask.of.groups;
    write(levels.step.data(), steps, 1.0f, ask.of.groups, &step[m * stride]);
    const float top = 1.0f / (float)(1 << (ask.of.bits - 1));
    if (ask.residual) write(levels.jump.data(), steps, top, ask.of.groups, &jump[m * stride]);
  }

 private:
  void write(const float* a, const float* b, float share, int64_t groups, float* to) {
    if (repeat == 1) return write_times<1>(a, b, share, groups, to);
    if (repeat == 2) return write_times<2>(a, b, share, groups, to);
    if (repeat == 4) return write_times<4>(a, b, share, groups, to);
    for (int64_t g = 0; g < groups; g++, to += repeat) std::fill_n(to, repeat, a[g] * b[g] * share);
  }

  template <int TIMES>
  static void write_times(const float* __restrict a, const float* __restrict b, float share, int64_t groups,
                          float* __restrict to) {
    for (int64_t g = 0; g < groups; g++)
      for (int i = 0; i < TIMES; i++) to[g * TIMES + i] = a[g] * b[g] * share;
  }
};

// The stream of one row of codes.
struct Stream {
  RowCodes codes;
  std::vector<uint8_t> spread;

  explicit Stream(const RoundedProduct& ask) : codes(ask), spread(ask.stream_bytes() + RowCodes::BEYOND) {}

  const uint8_t* at(const RoundedProduct& ask, int64_t row) {
    const uint8_t* from = codes.at(ask, row);
    const int64_t bytes = ask.group_bytes(), words = ask.group_words() * 4;
    if (bytes == words || ask.of.groups == 1) return from;
    for (int64_t g = 0; g < ask.of.groups; g++) std::memcpy(&spread[g * words], from + g * bytes, bytes);
    return spread.data();
  }
};

// Sums of whole numbers times their factors, of COUNT rows of x in so many pieces.
template <int BITS, bool RESIDUAL, int COUNT, int PIECES>
struct Sums8 {
  static constexpr int ALL = (1 << BITS) - 1, TOP = 1 << (BITS - 1), INPUTS = COUNT * PIECES;
  FloatPart sum[INPUTS] = {};

  // A group of whole vectors.
  AQ_INLINE_MEMBER void add(const Factors& by, int64_t g, const uint8_t* codes, const int8_t* x, int64_t stride,
                            int64_t vectors) {
    WordPart all[INPUTS] = {}, top[INPUTS] = {};
    for (int64_t i = 0; i < vectors; i++, codes += VECTOR_BYTES, x += VECTOR_BYTES * (8 / BITS)) {
      const WordPart v = load_bytes(codes);
      for (int m = 0; m < INPUTS; m++) {
        all[m] += dots<BITS>(v, ALL, x + m * stride);
        if (RESIDUAL) top[m] += dots<BITS>(v, TOP, x + m * stride);
      }
    }
    for (int m = 0; m < INPUTS; m++) {
      const int64_t at = m / PIECES * by.stride + g;
      sum[m] = product_part(to_float_part(all[m]), by.step[at] - FloatPart{}, sum[m]);
      if (RESIDUAL) sum[m] = product_part(to_float_part(top[m]), by.jump[at] - FloatPart{}, sum[m]);
    }
  }

  // One vector, whose words have factors of their own.
  template <class Read>
  AQ_INLINE_MEMBER void add(const Factors& by, int64_t at, const uint8_t* codes, const int8_t* x, int64_t stride,
                            Read read) {
    const WordPart v = load_bytes(codes);
    for (int m = 0; m < INPUTS; m++) {
      const int64_t factor = m / PIECES * by.stride + at;
      const FloatPart all = to_float_part(dots<BITS>(v, ALL, x + m * stride));
      sum[m] = product_part(all, read(&by.step[factor]), sum[m]);
      if (!RESIDUAL) continue;
      const FloatPart top = to_float_part(dots<BITS>(v, TOP, x + m * stride));
      sum[m] = product_part(top, read(&by.jump[factor]), sum[m]);
    }
  }

  float total(int m) const {
    FloatPart all = sum[m * PIECES];
    float unit = 1.0f;
    for (int p = 1; p < PIECES; p++) all = product_part(sum[m * PIECES + p], (unit /= RoundedProduct::FINER) - FloatPart{}, all);
    return fold_part(all);
  }
};

// A row of vectors whose words have factors of their own, `factors` to a vector.
template <int BITS, bool RESIDUAL, int COUNT, int PIECES, class Read>
AQ_INLINE Sums8<BITS, RESIDUAL, COUNT, PIECES> add_vectors(const RoundedProduct& ask, const Factors& by, const uint8_t* codes,
                                                           int64_t bytes, int64_t factors, Read read) {
  constexpr int64_t PLACES = VECTOR_BYTES * (8 / BITS);
  const int64_t stride = ask.stream_places();
  Sums8<BITS, RESIDUAL, COUNT, PIECES> sums, result;  // what is returned lies in memory, at three times the cost
  for (int64_t i = 0; i * VECTOR_BYTES < bytes; i++) {
    ask_ahead(codes + i * VECTOR_BYTES, VECTOR_BYTES);
    sums.add(by, i * factors, codes + i * VECTOR_BYTES, ask.places + i * PLACES, stride, read);
  }
  std::copy(std::begin(sums.sum), std::end(sums.sum), result.sum);
  return result;
}

template <int BITS, bool RESIDUAL, int COUNT, int PIECES>
AQ_INLINE Sums8<BITS, RESIDUAL, COUNT, PIECES> add_row(const RoundedProduct& ask, const Factors& by, const uint8_t* codes) {
  const int64_t stride = ask.stream_places(), bytes = ask.of.row_bytes;
  const int64_t group = ask.group_words() * 4, used = ask.of.groups == 1 ? bytes : (ask.of.groups - 1) * group +
                                                                (bytes - (ask.of.groups - 1) * ask.group_bytes());
  const auto all = [&](int64_t factors, auto read) {
    return add_vectors<BITS, RESIDUAL, COUNT, PIECES>(ask, by, codes, used, factors, read);
  };
  if (by.reach == VECTOR) return all(1, [](const float* p) { return *p - FloatPart{}; });
  if (by.reach == QUADS) return all(WIDTH / 4, [](const float* p) { return quads(p); });
  if (by.reach == WORDS) return all(WIDTH, [](const float* p) { return load_part(p); });
  Sums8<BITS, RESIDUAL, COUNT, PIECES> sums;
  for (int64_t g = 0; g < ask.of.groups; g++) {
    const int64_t start = g * group, vectors = (std::min(group, used - start) + VECTOR_BYTES - 1) / VECTOR_BYTES;
    ask_ahead(codes + start, vectors * VECTOR_BYTES);
    sums.add(by, g, codes + start, ask.places + start * (8 / BITS), stride, vectors);
  }
  return sums;
}

template <int BITS, bool RESIDUAL, int COUNT, int PIECES>
static void rounded_of(const RoundedProduct& ask, int64_t first, int64_t last) {
  RowLevels levels(ask);
  Stream stream(ask);
  Factors by(ask, COUNT);
  for (int64_t r = first; r < last; r++) {
    levels.read(ask, r);
    for (int m = 0; m < COUNT; m++) by.read(ask, levels, m);
    const auto sums = add_row<BITS, RESIDUAL, COUNT, PIECES>(ask, by, stream.at(ask, r));
    float total[COUNT];
    for (int m = 0; m < COUNT; m++) total[m] = sums.total(m) + based(ask, levels, m);
    const float further = ask.inputs() > ask.count ? ask.step * ask.correction() * total[COUNT - 1] : 0.0f;
    for (int m = 0; m < ask.count; m++)
      write_sums(ask, m * ask.rows + r, Quad{total[m] + further + (ask.bias ? ask.bias[r] : 0.0f)}, 1);
  }
}

template <int BITS, bool RESIDUAL, int PIECES>
static void rounded_on(const RoundedProduct& ask, int64_t first, int64_t last) {
  if (ask.inputs() == 1) rounded_of<BITS, RESIDUAL, 1, PIECES>(ask, first, last);
  if (ask.inputs() == 2) rounded_of<BITS, RESIDUAL, 2, PIECES>(ask, first, last);
  if (ask.inputs() == 3) rounded_of<BITS, RESIDUAL, 3, PIECES>(ask, first, last);
  if (ask.inputs() == 4) rounded_of<BITS, RESIDUAL, 4, PIECES>(ask, first, last);
}

template <int BITS, int PIECES>
static void rounded_in(const RoundedProduct& ask, int64_t first, int64_t last) {
  if (ask.residual)
    rounded_on<BITS, true, PIECES>(ask, first, last);
  else
    rounded_on<BITS, false, PIECES>(ask, first, last);
}

template <int PIECES>
static void rounded_as(const RoundedProduct& ask, int64_t first, int64_t last) {
  if (ask.of.bits == 2) rounded_in<2, PIECES>(ask, first, last);
  if (ask.of.bits == 4) rounded_in<4, PIECES>(ask, first, last);
  if (ask.of.bits == 8) rounded_in<8, PIECES>(ask, first, last);
}

void rounded_product(const RoundedProduct& ask, int64_t first, int64_t last) {
#if defined(__AVX512VNNI__)
  if (ask.pieces == 3) return rounded_as<3>(ask, first, last);
  if (ask.pieces == 2) return rounded_as<2>(ask, first, last);
#elif defined(__AVX2__)
  if (ask.pieces == 2) return ask.of.bits == 2 ? rounded_on<2, false, 2>(ask, first, last) : rounded_on<4, false, 2>(ask, first, last);
#endif
  rounded_as<1>(ask, first, last);
}

}  // namespace AQ_ISA

// A few rows of inputs times packed weights, in bfloat16 pairs; compiled for processors that multiply these, with AVX-512.
//
//   y = sum over groups of  step * sum code_j x_j + jump * sum top_j x_j + base * sum x_j
//
// with base, step and jump of levels.hpp, and top the highest bit of a code on the r2q grid. Codes of 2 and 4 bits are
// bfloat16 as they are; one of 8 bits is the sum of two, of its 5 low bits and of the rest. x is the sum of its two
// pieces, or is bfloat16 already: so every product is exact, and sums are float32.
// Measured on an Intel Xeon 6 (2 cores): python bench/linear.py.
#include <algorithm>
#include <vector>

#include "kernels.hpp"
#include "levels.hpp"
#include "pieces.hpp"
#include "stored.hpp"

namespace AQ_ISA {

#if defined(AQ_PIECES)

bool takes_pieces(const Product& ask) { return in_whole_chunks(ask); }

// Rows of x lie behind each other in `planes`: the hi pieces of all columns, then the lo pieces.
static int64_t stride_of(const Product& ask) { return 2 * CHUNK * chunks_of(ask.of.columns); }

void split_to_pieces(const Product& ask, int64_t first, int64_t last) {
  const int64_t chunks = chunks_of(ask.of.columns);
  std::vector<float> row(chunks * CHUNK + LANES);
  std::vector<uint16_t> copy;
  for (int64_t m = first; m < last; m++) {
    read_floats(ask.x, ask.dtype, m * ask.of.columns, ask.of.columns, row.data());
    std::fill(row.begin() + ask.of.columns, row.end(), 0.0f);
    uint16_t* hi = (uint16_t*)ask.planes + m * stride_of(ask);
    uint16_t* lo = pieces_of(ask.dtype) == 2 ? hi + chunks * CHUNK : nullptr;
    to_pieces(row.data(), chunks, hi, lo);
    if (lo) from_pieces(hi, lo, chunks, row.data());  // what codes meet, so that code and zero cancel
    for (int64_t piece = 0; piece < pieces_of(ask.dtype); piece++)
      weave(hi + piece * chunks * CHUNK, ask.of.columns, 2 * ask.codes_of_byte(), copy);
    for (int64_t g = 0; g < ask.of.groups; g++) {
      const int64_t start = g * ask.of.group, stop = std::min(start + ask.of.group, ask.of.columns);
      Lanes sum = fill(0.0f);
      for (int64_t i = start; i < stop; i += LANES) sum = sum + load(&row[i]);
      ask.sums[m * ask.of.groups + g] = fold(pairs(sum));
    }
  }
}

AQ_INLINE __m512 pair_product(__m512 sum, __m512i codes, const uint16_t* x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)codes, (__m512bh)_mm512_loadu_si512(x));
}

// Bfloat16 of the low bits of 16.
template <int BITS>
struct Factors {
  static constexpr int LOW = BITS == 8 ? 32 : 1 << BITS;
  __m512i low = bfloat16_table([](int i) { return i % LOW; });
  __m512i high = bfloat16_table([](int i) { return i % 8 * 32; });
  __m512i top = bfloat16_table([](int i) { return BITS == 8 ? i % 8 / 4 : i % LOW / (LOW / 2); });
};

// Which groups the columns of 64 bytes of codes belong to: lane i to the first one and `order` i further.
struct Reach {
  int64_t first;
  __m512i order;

  Reach(const Product& ask, int64_t vector) {
    const int64_t columns = 512 / ask.of.bits, start = vector * columns;
    alignas(64) int32_t groups[16];
    first = start / ask.of.group;
    for (int64_t i = 0; i < 16; i++) groups[i] = (int32_t)((start + i * columns / 16) / ask.of.group - first);
    order = _mm512_load_si512(groups);
  }
  AQ_INLINE_MEMBER __m512 of(const std::vector<float>& groups) const {
    return _mm512_permutexvar_ps(order, _mm512_loadu_ps(&groups[first]));
  }
};

template <int BITS, bool RESIDUAL, int COUNT, int PIECES>
struct RowSums {
  __m512 all[COUNT] = {}, sum[COUNT], top[COUNT];

  AQ_INLINE_MEMBER void begin() {
    for (int m = 0; m < COUNT; m++) sum[m] = top[m] = _mm512_setzero_ps();
  }

  // The codes in the low bits of 16, times a chunk of inputs.
  AQ_INLINE_MEMBER void add(const Factors<BITS>& by, __m512i codes, const uint16_t* x, int64_t stride) {
    const __m512i rest = _mm512_srli_epi16(codes, 5);
    const __m512i low = _mm512_permutexvar_epi16(codes, by.low), high = _mm512_permutexvar_epi16(rest, by.high);
    const __m512i tops = _mm512_permutexvar_epi16(BITS == 8 ? rest : codes, by.top);
    for (int m = 0; m < COUNT; m++)
      for (int p = 0; p < PIECES; p++) {
        const uint16_t* inputs = x + m * stride + p * (stride / 2);
        sum[m] = pair_product(sum[m], low, inputs);
        if (BITS == 8) sum[m] = pair_product(sum[m], high, inputs);
        if (RESIDUAL) top[m] = pair_product(top[m], tops, inputs);
      }
  }

  AQ_INLINE_MEMBER void end(__m512 step, __m512 jump) {
    for (int m = 0; m < COUNT; m++) {
      all[m] = _mm512_fmadd_ps(sum[m], step, all[m]);
      if (RESIDUAL) all[m] = _mm512_fmadd_ps(top[m], jump, all[m]);
    }
  }
};

template <int BITS, bool RESIDUAL, int COUNT, int PIECES>
struct RowProduct {
  static constexpr int64_t WOVEN = 16 / BITS;
  const Product& ask;
  const int64_t chunks = chunks_of(ask.of.columns), vectors = ask.of.columns / (WOVEN * CHUNK), stride = stride_of(ask);
  const uint16_t* x = (const uint16_t*)ask.planes;
  const Factors<BITS> by;
  const Spread<BITS> spread{};
  std::vector<Reach> reaches;

  explicit RowProduct(const Product& ask) : ask(ask) {
    for (int64_t v = 0; v < vectors; v++) reaches.emplace_back(ask, v);
  }

  AQ_INLINE_MEMBER RowSums<BITS, RESIDUAL, COUNT, PIECES> operator()(const RowLevels& levels, const uint8_t* codes) const {
    RowSums<BITS, RESIDUAL, COUNT, PIECES> sums;
    for (int64_t v = 0; v < vectors; v++) {
      const __m512i words = _mm512_loadu_si512(codes + v * 64);
      sums.begin();
#pragma GCC unroll 8
      for (int k = 0; k < WOVEN; k++)
        sums.add(by, _mm512_srli_epi16(words, BITS * k), x + (v * WOVEN + k) * CHUNK, stride);
      sums.end(reaches[v].of(levels.step), RESIDUAL ? reaches[v].of(levels.jump) : __m512{});
    }
    for (int64_t c = vectors * WOVEN; c < chunks; c++) {  // less than a vector
      const int64_t g = c * CHUNK / ask.of.group;
      sums.begin();
      sums.add(by, spread(codes + c * 4 * BITS), x + c * CHUNK, stride);
      sums.end(_mm512_set1_ps(levels.step[g]), _mm512_set1_ps(levels.jump[g]));
    }
    return sums;
  }
};

template <int BITS, bool RESIDUAL, int COUNT, int PIECES>
static void product_of(const Product& ask, int64_t first, int64_t last) {
  RowLevels levels(ask);
  RowCodes codes(ask);
  const RowProduct<BITS, RESIDUAL, COUNT, PIECES> product(ask);
  for (int64_t r = first; r < last; r++) {
    levels.read(ask, r);
    const auto sums = product(levels, codes.at(ask, r));
    for (int m = 0; m < COUNT; m++)
      ask.y[m * ask.rows + r] =
          _mm512_reduce_add_ps(sums.all[m]) + based(ask, levels, m) + (ask.bias ? ask.bias[r] : 0.0f);
  }
}

template <int BITS, bool RESIDUAL, int COUNT>
static void product_in(const Product& ask, int64_t first, int64_t last) {
  if (pieces_of(ask.dtype) == 1)
    product_of<BITS, RESIDUAL, COUNT, 1>(ask, first, last);
  else
    product_of<BITS, RESIDUAL, COUNT, 2>(ask, first, last);
}

template <int BITS, bool RESIDUAL>
static void product_on(const Product& ask, int64_t first, int64_t last) {
  if (ask.count == 1) product_in<BITS, RESIDUAL, 1>(ask, first, last);
  if (ask.count == 2) product_in<BITS, RESIDUAL, 2>(ask, first, last);
  if (ask.count == 3) product_in<BITS, RESIDUAL, 3>(ask, first, last);
  if (ask.count == 4) product_in<BITS, RESIDUAL, 4>(ask, first, last);
}

template <int BITS>
static void product_with(const Product& ask, int64_t first, int64_t last) {
  if (ask.residual)
    product_on<BITS, true>(ask, first, last);
  else
    product_on<BITS, false>(ask, first, last);
}

void product_of_pieces(const Product& ask, int64_t first, int64_t last) {
  if (ask.of.bits == 2) product_with<2>(ask, first, last);
  if (ask.of.bits == 4) product_with<4>(ask, first, last);
  if (ask.of.bits == 8) product_with<8>(ask, first, last);
}

#else

bool takes_pieces(const Product&) { return false; }
void split_to_pieces(const Product&, int64_t, int64_t) {}
void product_of_pieces(const Product&, int64_t, int64_t) {}

#endif

}  // namespace AQ_ISA

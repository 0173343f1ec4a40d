// Convolutions with packed weights on Intel's matrix unit (AMX): what the kernel sees from 16 positions is a panel, as in
// linear_blocks.cpp, but is put together from padded planes of x just before it meets all decoded rows of W.
//
//   y (r, q) = sum_j w (r, j) plane_j (q + shift_j)
//
// Where positions lie beside each other, so do the values that a column meets there, whatever kernel, stride and dilation
// are: a pair of columns of two panels is two reads. Results lie as y has them.
// Assumes what kernels/convolution.py has checked, and groups of columns that start on a byte.
// Measured on an Intel Xeon with AMX (2 cores): python bench/convolution.py.
#include <algorithm>
#include <cstring>
#include <vector>

#include "decoded.hpp"
#include "kernels.hpp"
#include "matrix_unit.hpp"
#include "pieces.hpp"
#include "planes.hpp"
#include "stored.hpp"

#if defined(__AMX_BF16__)

namespace AQ_ISA {

// A row of values along the last axis, in all pieces.
struct PaddedRow {
  const Convolution& ask;
  std::vector<float> floats;
  std::vector<uint16_t> hi, lo;

  explicit PaddedRow(const Convolution& ask)
      : ask(ask), floats((ask.in[2] + CHUNK - 1) / CHUNK * CHUNK), hi(floats.size()), lo(floats.size()) {}

  const uint16_t* piece(int64_t number) const { return number ? lo.data() : hi.data(); }

  void read(int64_t start, int64_t channel) {
    if (ask.dtype == BFLOAT16 && !ask.equalization) {
      std::memcpy(hi.data(), (const uint16_t*)ask.x + start, 2 * ask.in[2]);
      return;
    }
    read_floats(ask.x, ask.dtype, start, ask.in[2], floats.data());
    if (ask.equalization)
      for (float& value : floats) value /= ask.equalization[channel];
    to_pieces(floats.data(), (int64_t)floats.size() / CHUNK, hi.data(), lo.data());
  }
};

static void fill_channel(const Convolution& ask, int64_t channel, PaddedRow& row) {
  uint16_t* planes = ask.planes + channel * ask.phases * ask.plane_size;
  for (int64_t piece = 0; piece < ask.pieces(); piece++)
    std::fill_n(planes + piece * ask.planes_size(), (size_t)(ask.phases * ask.plane_size), (uint16_t)0);
  each_row(ask, channel, [&](int64_t start, int64_t at) {
    row.read(start, channel);
    for (int64_t piece = 0; piece < ask.pieces(); piece++)
      scatter(ask, row.piece(piece), planes + piece * ask.planes_size() + at);
  });
}

void fill_planes(const Convolution& ask, int64_t first, int64_t last) {
  PaddedRow row(ask);
  for (int64_t c = first; c < std::min(last, ask.channels); c++) fill_channel(ask, c, row);
  if (last <= ask.channels) return;
  for (int64_t piece = 1; piece <= ask.pieces(); piece++)
    std::fill_n(ask.planes + piece * ask.planes_size() - ask.plane_size, (size_t)ask.plane_size, (uint16_t)0);
}

static int64_t blocks_of_chunks(const Convolution& ask) { return (ask.chunks() + ask.chunks_at_once - 1) / ask.chunks_at_once; }

static uint16_t* decoded_tiles(const Convolution& ask, int64_t block, int64_t of_chunks) {
  return ask.weight + (block * blocks_of_chunks(ask) + of_chunks) * tiles_size(ask, ask.pieces());
}

template <int PIECES>
static void decode_some(const Convolution& ask, int64_t first, int64_t last) {
  Decoded<PIECES> weight(ask);
  for (int64_t b = first; b < last; b++) {
    weight.begin((ask.first_block + b) * ask.rows_of_block);
    for (int64_t i = 0; i < blocks_of_chunks(ask); i++) {
      const int64_t c = i * ask.chunks_at_once;
      weight.decode(c, std::min(ask.chunks_at_once, ask.chunks() - c), decoded_tiles(ask, b, i));
    }
  }
}

void decode_blocks(const Convolution& ask, int64_t first, int64_t last) {
  (ask.pieces() == 1 ? decode_some<1> : decode_some<2>)(ask, first, last);
}

// For each column, in the order of decoded chunks, where in the planes its value for position 0 lies.
static std::vector<int64_t> shifts_of_columns(const Convolution& ask) {
  std::vector<int64_t> in_order = shifts_in_order(ask);
  in_order.resize(ask.chunks() * CHUNK, ask.channels * ask.phases * ask.plane_size);  // that of zeros
  const int64_t woven = chunks_woven(ask), together = woven * CHUNK;
  if (woven == 1) return in_order;
  std::vector<int64_t> order = in_order;
  for (int64_t start = 0; start + together <= ask.of.columns; start += together)
    for (int64_t i = 0; i < CHUNK; i++)
      for (int64_t k = 0; k < woven; k++) order[start + k * CHUNK + i] = in_order[start + i * woven + k];
  return order;
}

// Two panels of what columns meet, put together from planes.
//
// Of 32 positions, the first panel has those of the low halves of each eight, 0 to 3, 8 to 11, ..., and the second the
// others: so one instruction makes the pairs of a panel of two columns.
struct Panels {
  const Convolution& ask;
  std::vector<int64_t> shifts;
  Aligned<uint16_t> inputs;  // (pieces, 2, chunks_at_once, 16, 16, 2)

  explicit Panels(const Convolution& ask) : ask(ask), shifts(shifts_of_columns(ask)), inputs(ask.pieces() * 2 * of_tile(ask)) {}

  void fill(int64_t position, int64_t first_chunk, int64_t chunks) {
    const int64_t* shift = &shifts[first_chunk * CHUNK];
    for (int64_t piece = 0; piece < ask.pieces(); piece++)
      fill_piece(ask.planes + piece * ask.planes_size() + position, shift, chunks, inputs.data() + 2 * piece * of_tile(ask));
  }

 private:
  void fill_piece(const uint16_t* planes, const int64_t* shift, int64_t chunks, uint16_t* to) {
    for (int64_t pair = 0; pair < chunks * SIDE; pair++, shift += 2, to += CHUNK) {
      const __m512i a = _mm512_loadu_si512(planes + shift[0]), b = _mm512_loadu_si512(planes + shift[1]);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + of_tile(ask), _mm512_unpackhi_epi16(a, b));
    }
  }
};

// Positions that lie in one item of the batch and are written, behind each other from `at` on.
struct Written {
  uint32_t positions;
  int64_t item, at;
};

static void join(const std::vector<Run>& runs, std::vector<Written>& written) {
  written.clear();
  for (const Run& run : runs) {
    if (written.empty() || written.back().item != run.item) written.push_back({0, run.item, run.at});
    written.back().positions |= (uint32_t)(((1ull << run.count) - 1) << run.first);
  }
}

// Some of 16 values, behind each other.
static void write_some(const Convolution& ask, int64_t at, __m512 values, uint32_t positions) {
  const __mmask16 some = (__mmask16)positions;
  const auto lanes = (__mmask16)((1u << __builtin_popcount(some)) - 1);
  store_as(ask, at, some == lanes ? values : _mm512_maskz_compress_ps(some, values), lanes);
}

// A row of y at 32 positions.
static void write_row(const Convolution& ask, int64_t row, __m512 first, __m512 second, const Written& some) {
  const int64_t at = (some.item * ask.rows + row) * ask.out_size + some.at;
  write_some(ask, at, first, some.positions);
  write_some(ask, at + __builtin_popcount(some.positions & 0xFFFF), second, some.positions >> 16);
}

// Sums of a tile of W and the two panels.
static void write_tiles(const Convolution& ask, const float* of_first, const float* of_second, int64_t row,
                       const std::vector<Written>& places) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t r = row; r < std::min(row + SIDE, ask.rows); r++, of_first += SIDE, of_second += SIDE) {
    const __m512 bias = _mm512_set1_ps(ask.bias ? ask.bias[r] : 0.0f);
    const __m512 a = _mm512_add_ps(_mm512_load_ps(of_first), bias), b = _mm512_add_ps(_mm512_load_ps(of_second), bias);
    const __m512 first = _mm512_permutex2var_ps(a, low, b), second = _mm512_permutex2var_ps(a, high, b);
    for (const Written& some : places) write_row(ask, r, first, second, some);
  }
}

// All decoded rows of W at 32 positions: their sums (2, tiles, 16, 16).
template <int PIECES>
static void meet_positions(const Convolution& ask, Panels& inputs, int64_t position, float* sums) {
  const int64_t of_block = ask.rows_of_block / SIDE, of_panel = ask.blocks_at_once * of_block * SUMS, tile = of_tile(ask);
  for (int64_t i = 0; i < blocks_of_chunks(ask); i++) {
    const int64_t c = i * ask.chunks_at_once, chunks = std::min(ask.chunks_at_once, ask.chunks() - c);
    inputs.fill(position, c, chunks);
    for (int64_t b = 0; b < ask.blocks_at_once; b++) {
      const int64_t rows = std::min(ask.rows_of_block, ask.rows - (ask.first_block + b) * ask.rows_of_block);
      for (int64_t t = 0; t * SIDE < rows; t += 2) {
        const Meeting of{decoded_tiles(ask, b, i) + t * tile, inputs.inputs.data(), tile, tiles_size(ask, 1),
                         2 * tile, tile, chunks, sums + (b * of_block + t) * SUMS, of_panel, i == 0};
        multiply<2, PIECES>(of);
      }
    }
  }
}

template <int PIECES>
static void convolve_groups(const Convolution& ask, int64_t first, int64_t last) {
  const Registers registers;
  Panels inputs(ask);
  const int64_t tiles = ask.blocks_at_once * ask.rows_of_block / SIDE;
  Aligned<float> sums(2 * tiles * SUMS);
  Cursor cursor(ask, first * POSITIONS);
  std::vector<Written> written;
  for (int64_t g = first; g < last; g++) {
    meet_positions<PIECES>(ask, inputs, g * POSITIONS, sums.data());
    cursor.next(POSITIONS);
    join(cursor.runs, written);
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = ask.first_block * ask.rows_of_block + t * SIDE;
      if (row < ask.rows) write_tiles(ask, sums.data() + t * SUMS, sums.data() + (tiles + t) * SUMS, row, written);
    }
  }
}

void convolve(const Convolution& ask, int64_t first, int64_t last) {
  (ask.pieces() == 1 ? convolve_groups<1> : convolve_groups<2>)(ask, first, last);
}

}  // namespace AQ_ISA

#endif

// What a kernel is asked, as plain records shared by all instruction sets; knows nothing of how it is done.
#pragma once

#include <cstdint>

#define AQ_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int64_t MOST_DIRECT = 4;  // rows of x that a product from codes takes at a time

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// weight (rows, columns) row-major; group columns share one scale; the last group of a row may be shorter.
struct Quantize {
  const void* weight;
  Dtype dtype;
  int64_t columns, group, groups, row_bytes;
  int bits;
  bool symmetric;
  const float* stretches;  // 1 / clipping ratio of each candidate; none: round to nearest
  int stretch_count;
  const float* importance;  // (columns,) or null: 1 each
  uint8_t* codes;           // (rows, row_bytes)
  uint8_t* scales;          // (rows, groups)
  uint8_t* zero_points;     // (rows, groups); unused when symmetric
  uint16_t* row_scales;     // (rows,) bfloat16
  double* sums;             // (rows, 3): sum w^2, sum q^2, sum (w - q)^2
};

// The fitting half of Quantize, whose results stay unused; each array is (rows, groups).
struct FitGrid {
  Quantize of;
  float *step, *full, *mean_q, *mean_w;
};

// The column loop of GPTQ within one group.
struct Columns {
  const float* block;                    // (rows, columns)
  const float* upper;                    // (columns, columns)
  const float *scale, *inverse, *zero;   // (rows,)
  uint8_t* codes;                        // (rows, columns)
  float* errors;                         // (rows, columns)
  int64_t columns;
  int bits;
};

// The same on the r2q grid, of which mu, a1 and a2 are given; inverse is 1 / (2 a2), or 0.
struct ResidualColumns {
  const float* block;                        // (rows, columns)
  const float* upper;                        // (columns, columns)
  const float *mu, *a1, *a2, *inverse;       // (rows,)
  uint8_t* codes;                            // (rows, columns)
  float* errors;                             // (rows, columns)
  int64_t columns;
  int bits;
};

// Codes of one group that may move, on the r2q grid; `found` are those that they become.
struct Descent {
  const uint8_t* codes;                 // (rows, columns)
  const float* pull;                    // (rows, columns)
  const float* gram;                    // (columns, columns)
  const float *mu, *a1, *a2, *inverse;  // (rows,)
  uint8_t* found;                       // (rows, columns)
  int64_t columns;
  int bits;
};

constexpr int64_t GROUPS_TOGETHER = 16;  // that a kernel fits beside each other

// The residual grid of each group by alternation, from the best of some grids on; groups lie beside each other.
struct ResidualFit {
  const float *weights, *importance;      // (n, groups); no importance: 1 each
  const float *mu, *a1, *a2;              // (starts, groups)
  float *found_mu, *found_a1, *found_a2;  // (groups,)
  int64_t n, groups;
  int starts, bits, rounds;
  bool symmetric;
};

// Rows of one block each, turned by Sylvester's matrix over the root of its size.
struct Hadamard {
  const float* from;  // (rows, block)
  float* to;
  int64_t block;
};

struct Dequantize {
  const uint8_t* codes;
  const uint8_t* scales;  // two of each group on the r2q grid
  const uint8_t* zero_points;
  const uint16_t* row_scales;
  void* weight;
  Dtype dtype;
  int64_t columns, group, groups, row_bytes;
  int bits;
};

// y = x W^T + bias, where `of` says what W is; its `weight` and `dtype` are unused.
//
// Inputs are split as the codes of sixteen bytes meet them. The bytes of a group are cut into blocks of sixteen, the last
// one filled up with zeros; with n = 8 / bits codes to a byte, code k of byte i of a block meets place k * 16 + i of a
// block of 16 n inputs: plane k of the block.
struct Product {
  Dequantize of;
  bool residual;       // the r2q grid
  int64_t rows;        // of W
  const void* x;       // (count, columns)
  Dtype dtype;         // of x
  int64_t count;
  float* planes;       // (count, groups, blocks, 16 n)
  float* sums;         // (count, groups): of the inputs of a group
  const float* bias;   // (rows,) or null
  void* y;             // (count, rows), of the dtype of x

  int64_t codes_of_byte() const { return 8 / of.bits; }
  int64_t group_bytes() const { return (of.group * of.bits + 7) / 8; }
  int64_t blocks() const { return (group_bytes() + 15) / 16; }
  int64_t group_places() const { return blocks() * 16 * codes_of_byte(); }
  int64_t columns_of(int64_t g) const { return g + 1 < of.groups ? of.group : of.columns - g * of.group; }
};

// The same with x rounded to whole numbers q of 8 bits: x ~ step * q, and for a fixed step x ~ step * (q + correction).
//
// All groups of a row, each filled up to whole words of four bytes, make one stream of bytes, which is read a vector of V
// bytes at a time: code k of byte i of a vector meets place k * V + i of V n inputs.
//
// Inputs as they are have some pieces, x = step * (q + q' / 254 + q'' / 254^2): what one leaves, at most half of its unit,
// the next one has in a unit that is 254 times finer. Two leave 2^-16 of a group's greatest value, which is enough for
// bfloat16 in groups of up to 256 columns; three leave 2^-24.
struct RoundedProduct : Product {
  bool fixed;         // one step for all, else absmax / 127 of each run of a row
  float step;         // the fixed one
  float zero;         // its zero point, 0 to 255
  int8_t* places;     // (inputs, pieces, stream_places)
  float* steps;       // (inputs, groups); `sums` are step * sum q
  int pieces;         // 1 where x is rounded
  int64_t run;        // columns of whole groups that have one step

  static constexpr float FINER = 254.0f;
  static constexpr float MIDDLE = 128.0f;  // q of a fixed step lies that much below what is stored for unsigned inputs
  float correction() const { return fixed ? MIDDLE - zero : 0.0f; }
  // Where there is a correction, a row of ones beyond those of x gives the sums of W's rows.
  int64_t inputs() const { return count + (correction() != 0.0f); }
  int64_t group_words() const { return (group_bytes() + 3) / 4; }
  int64_t stream_bytes() const { return (of.groups * group_words() * 4 + 63) / 64 * 64; }
  int64_t stream_places() const { return stream_bytes() * codes_of_byte(); }
};

// The same for many rows of x, which lie side by side in panels of `lanes`: weights are decoded by tiles of some
// rows, and each meets the inputs of a whole panel.
//
//   floats   (panels, columns, lanes): x as it is, or rounded
//   bytes    (panels, words of four columns, lanes): rounded x, or x as it is in pieces, one of all rows before the next
//
// `steps` and `sums` are (panels, groups, lanes), of bytes; a piece has the step of its unit, and the first has the sum.
struct TiledProduct : RoundedProduct {
  static constexpr int64_t TILE_ROWS = 12, WORD_COLUMNS = 4;
  bool rounded;
  int64_t lanes;
  void* inputs_of_panels;
  int64_t tile_rows = TILE_ROWS;

  int64_t rows_of_panel() const { return lanes / pieces; }
  int64_t panels() const { return (count + rows_of_panel() - 1) / rows_of_panel(); }
  int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows; }
  int64_t words() const { return (of.columns + WORD_COLUMNS - 1) / WORD_COLUMNS; }
};

// The same in blocks for a matrix unit: x in panels of 16 rows, as bfloat16 pieces whose sum it is (pieces.hpp):
//
//   (pieces, panels, chunks of 32 columns, 16 pairs of columns, 16 rows of x, 2)
//
// and W decoded by blocks of rows.
struct BlockProduct : RoundedProduct {
  static constexpr int64_t PANEL = 16, FEWEST_ROWS = 64, FEWEST_ROWS_OF_FLOATS = 16;
  bool rounded;
  uint16_t* inputs;
  int64_t rows_of_block;  // of W, that are decoded before they meet all panels,
  int64_t chunks_at_once = 16;  // and so many of their chunks

  int64_t pieces() const { return dtype == BFLOAT16 ? 1 : 2; }
  int64_t panels() const { return (count + PANEL - 1) / PANEL; }
  int64_t chunks() const { return (of.columns + 31) / 32; }
  int64_t panel_size() const { return chunks() * 32 * PANEL; }
  int64_t piece_size() const { return panels() * panel_size(); }
  int64_t blocks_of_rows() const { return (rows + rows_of_block - 1) / rows_of_block; }
};

// The same of x and W in whole numbers: x in panels of 16 rows, whose columns lie in the order that codes are read in:
//
//   (panels, steps of 64 columns, 16 words of 4 columns, 16 rows of x, 4)
//
// A part of a row of W is a run of x, or a piece of a long one; `steps` are (panels, parts, 16).
struct WholeBlockProduct : BlockProduct {
  static constexpr int64_t STEP = 64, LONGEST_PART = 512, FEWEST = 65;  // rows of x for which W is rounded
  int64_t part;

  int64_t parts() const { return (of.columns + part - 1) / part; }
  int64_t width() const { return parts() * part; }
  int64_t panel_bytes() const { return width() * PANEL; }
  int64_t group_at(int64_t column) const { return of.groups == 1 ? 0 : column / of.group; }
};

// Of x (batch, channels, in) and of what is done with it, along depth, height and width; there is 1 of what is missing.
struct ConvolutionSizes {
  static constexpr int AXES = 3;
  int64_t batch, channels;
  int64_t in[AXES], kernel[AXES], stride[AXES], padding[AXES], dilation[AXES];
};

// A convolution of x as the same product: a column of W is a channel at one place of the kernel, a row of "x" what the
// kernel sees from one position.
//
// x lies in `planes`, padded: where the kernel moves by s, a channel has a plane for each place within a step
// (a phase), and all planes have one grid of positions. From any position, what a column meets lies in its plane by the
// same distance ahead. Positions of a batch follow each other; those over an edge are computed too, and not written.
//
// With a matrix unit values are pieces of bfloat16, as above; else they are floats, and weights lie as
//
//   (blocks at once, rows of a block / rows of a tile, columns, rows of a tile)
struct Convolution : BlockProduct, ConvolutionSizes {
  bool in_floats;
  int64_t positions;  // that meet W together
  int64_t halves;     // units of 16 bits that a value takes
  int64_t out[AXES], grid[AXES], ahead[AXES];  // sizes of the result and of a plane; from one place to the next, of an axis
  int64_t phases, out_size, grid_size, plane_size;
  const float* equalization;  // (channels,), by which x is divided, or null
  bool in_place;              // x is its own planes
  uint16_t* planes;           // (pieces, channels * phases and one of zeros, plane_size), or floats
  uint16_t* weight;           // (blocks at once, blocks of chunks, pieces, tiles, chunks of a block, 16, 32), or floats
  int64_t first_block, blocks_at_once;
  int64_t parts_of_rows;  // of those blocks, that meet a group of positions one by one

  Convolution(const Product& product, const ConvolutionSizes& sizes, const float* equalization, int64_t positions,
              bool in_floats);
  int64_t planes_size() const { return (channels * phases + 1) * plane_size; }
  int64_t groups_of_positions() const { return (count + positions - 1) / positions; }
};

struct Repack {
  const uint8_t* from;
  uint8_t* to;
  int64_t columns, row_bytes;
  int bits;
};

struct KernelTable {
  const char* name;
  void (*quantize)(const Quantize&, int64_t first, int64_t last);
  void (*dequantize)(const Dequantize&, int64_t first, int64_t last);
  void (*fit_grid)(const FitGrid&, int64_t first, int64_t last);
  void (*quantize_columns)(const Columns&, int64_t first, int64_t last);
  void (*pack)(const Repack&, int64_t first, int64_t last);
  void (*unpack)(const Repack&, int64_t first, int64_t last);
  void (*dequantize_r2q)(const Dequantize&, int64_t first, int64_t last);
  void (*quantize_columns_r2q)(const ResidualColumns&, int64_t first, int64_t last);
  void (*descend_columns)(const Descent&, int64_t first, int64_t last);
  void (*fit_residual)(const ResidualFit&, int64_t first, int64_t last);  // GROUPS_TOGETHER
  void (*hadamard)(const Hadamard&, int64_t first, int64_t last);
  int (*pieces)(const Product&);  // as which x meets codes as bytes, where that is faster than floats; else 0
  void (*split)(const Product&, int64_t first, int64_t last);  // rows of x; null where it always is
  void (*product)(const Product&, int64_t first, int64_t last);  // rows of W, for at most MOST_DIRECT rows of x
  void (*round_inputs)(const RoundedProduct&, int64_t first, int64_t last);
  void (*rounded_product)(const RoundedProduct&, int64_t first, int64_t last);
  int lanes;  // of one vector
  void (*fill_panels)(const TiledProduct&, int64_t first, int64_t last);  // panels
  void (*tiled_product)(const TiledProduct&, int64_t first, int64_t last);  // tiles
  bool (*tiles_bytes)(const Product&, int pieces);  // whether so many bytes for an input are faster than floats
  void (*fill_rounded_panels)(const TiledProduct&, int64_t first, int64_t last);
  void (*rounded_tiled_product)(const TiledProduct&, int64_t first, int64_t last);
  void (*fill_blocks)(const BlockProduct&, int64_t first, int64_t last);  // panels; null where there is no matrix unit
  void (*block_product)(const BlockProduct&, int64_t first, int64_t last);  // blocks of rows of W
  void (*fill_rounded_blocks)(const WholeBlockProduct&, int64_t first, int64_t last);
  void (*rounded_block_product)(const WholeBlockProduct&, int64_t first, int64_t last);
  int64_t positions;                                                       // of a convolution, that meet W together
  void (*fill_planes)(const Convolution&, int64_t first, int64_t last);    // channels, and then the plane of zeros
  void (*decode_blocks)(const Convolution&, int64_t first, int64_t last);  // of those that are kept at once
  void (*convolve)(const Convolution&, int64_t first, int64_t last);       // groups of positions, part by part of rows
};

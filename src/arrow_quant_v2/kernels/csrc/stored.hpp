// How codes and their parameters lie in memory, read and written; knows nothing of what a grid makes of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"

namespace AQ_ISA {

static inline float from_bfloat16_bits(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static inline void unpack_row(const uint8_t* packed, uint8_t* bytes, int64_t columns, int bits) {
  const int per_byte = 8 / bits;
  const int64_t whole = columns / per_byte;
  const uint8_t ones = (uint8_t)((1 << bits) - 1);
  if (bits == 8) {
    std::memcpy(bytes, packed, columns);
  } else if (bits == 4) {
    for (int64_t i = 0; i < whole; i++) {
      const uint16_t x = (uint16_t)((packed[i] | packed[i] << 4) & 0x0F0F);
      std::memcpy(bytes + 2 * i, &x, 2);
    }
  } else {
    for (int64_t i = 0; i < whole; i++) {
      const uint32_t p = packed[i];
      const uint32_t x = (p | p << 6 | p << 12 | p << 18) & 0x03030303;
      std::memcpy(bytes + 4 * i, &x, 4);
    }
  }
  for (int64_t i = whole * per_byte; i < columns; i++)
    bytes[i] = (uint8_t)(packed[whole] >> bits * (i - whole * per_byte)) & ones;
}

// The codes of one row as bytes, where groups do not start on a byte.
struct RowBytes {
  bool direct;  // they do
  std::vector<uint8_t> bytes;

  explicit RowBytes(const Dequantize& ask)
      : direct(ask.group * ask.bits % 8 == 0 || ask.groups == 1), bytes(direct ? 0 : ask.columns + LANES) {}

  const uint8_t* read(const Dequantize& ask, const uint8_t* codes) {
    unpack_row(codes, bytes.data(), ask.columns, ask.bits);
    return bytes.data();
  }
};

static inline Lanes load_as_float(const void* p, Dtype dtype, int64_t i) {
  if (dtype == BFLOAT16) return load_bfloat16((const uint16_t*)p + i);
  if (dtype == FLOAT16) return load_float16((const uint16_t*)p + i);
  return load((const float*)p + i);
}

static inline int64_t item_bytes(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Any dtype to float32, also where the columns do not fill the lanes.
static inline void read_floats(const void* x, Dtype dtype, int64_t start, int64_t n, float* to) {
  const int64_t whole = n / LANES * LANES, size = item_bytes(dtype);
  for (int64_t i = 0; i < whole; i += LANES) store(to + i, load_as_float(x, dtype, start + i));
  if (whole == n) return;
  alignas(64) char tail[LANES * 4] = {};
  std::memcpy(tail, (const char*)x + (start + whole) * size, (n - whole) * size);
  store(to + whole, load_as_float(tail, dtype, 0));
}

static inline void put(float* p, Lanes x) { store(p, x); }
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
static inline void put(Bfloat16* p, Lanes x) { store_bfloat16(&p->bits, x); }
static inline void put(Float16* p, Lanes x) { store_float16(&p->bits, x); }

}  // namespace AQ_ISA

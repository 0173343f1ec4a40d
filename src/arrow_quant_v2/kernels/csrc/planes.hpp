// Where the values that a convolution meets lie in padded planes of x, and where its positions lie in the result; knows
// nothing of products.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.hpp"
#include "lanes.hpp"

namespace AQ_ISA {

// That meet W together: two panels of a matrix unit, or some vectors.
#if defined(__AVX512F__)
constexpr int64_t POSITIONS = 2 * WIDTH;
#else
constexpr int64_t POSITIONS = 3 * WIDTH;
#endif

// A row of values along the last axis to the phases of a row of the grid, whose planes lie `plane_size` apart.
template <class Value>
static void scatter(const Convolution& ask, const Value* from, Value* to) {
  const int64_t stride = ask.stride[2], padding = ask.padding[2];
  if (stride == 1) return (void)std::copy_n(from, ask.in[2], to + padding);
  int64_t at = padding / stride, phase = padding % stride;
  for (int64_t x = 0; x < ask.in[2]; x++) {
    to[phase * ask.plane_size + at] = from[x];
    if (++phase == stride) {
      phase = 0;
      at++;
    }
  }
}

// Calls `fill` with where each row of a channel begins in x, and in the planes of the channel.
template <class Fill>
static void each_row(const Convolution& ask, int64_t channel, Fill fill) {
  for (int64_t b = 0; b < ask.batch; b++)
    for (int64_t z = 0; z < ask.in[0]; z++) {
      const int64_t padded_z = z + ask.padding[0], slice = ((b * ask.channels + channel) * ask.in[0] + z) * ask.in[1];
      const int64_t of_z = b * ask.grid_size + padded_z / ask.stride[0] * ask.ahead[0];
      for (int64_t y = 0; y < ask.in[1]; y++) {
        const int64_t padded_y = y + ask.padding[1];
        const int64_t phase = (padded_z % ask.stride[0] * ask.stride[1] + padded_y % ask.stride[1]) * ask.stride[2];
        fill((slice + y) * ask.in[2], phase * ask.plane_size + of_z + padded_y / ask.stride[1] * ask.ahead[1]);
      }
    }
}

// Where each place of the kernel lies in the planes of a channel.
static inline std::vector<int64_t> shifts_of_kernel(const Convolution& ask) {
  std::vector<int64_t> shifts{0};
  int64_t phases = ask.phases;
  for (int axis = 0; axis < Convolution::AXES; axis++) {
    phases /= ask.stride[axis];
    std::vector<int64_t> further;
    for (const int64_t before : shifts)
      for (int64_t k = 0; k < ask.kernel[axis]; k++) {
        const int64_t distance = k * ask.dilation[axis], phase = distance % ask.stride[axis] * phases;
        further.push_back(before + phase * ask.plane_size + distance / ask.stride[axis] * ask.ahead[axis]);
      }
    shifts = further;
  }
  return shifts;
}

// For each column, in its order, where in the planes its value for position 0 lies.
static inline std::vector<int64_t> shifts_in_order(const Convolution& ask) {
  std::vector<int64_t> shifts;
  const std::vector<int64_t> of_kernel = shifts_of_kernel(ask);
  for (int64_t channel = 0; channel < ask.channels; channel++)
    for (const int64_t shift : of_kernel) shifts.push_back(channel * ask.phases * ask.plane_size + shift);
  return shifts;
}

// Positions, `count` from one of a group on, that are written behind each other.
struct Run {
  int64_t first, count, item, at;

  void leave_out(int64_t n) { first += n, at += n, count -= n; }
};

// Goes through groups of positions, from one position on.
struct Cursor {
  const Convolution& ask;
  int64_t item, z, y, x;
  std::vector<Run> runs;  // of the last group

  Cursor(const Convolution& ask, int64_t position)
      : ask(ask),
        item(position / ask.grid_size),
        z(position / ask.ahead[0] % ask.grid[0]),
        y(position / ask.ahead[1] % ask.grid[1]),
        x(position % ask.grid[2]) {}

  void next(int64_t positions) {
    runs.clear();
    for (int64_t i = 0, n; i < positions; i += n) {
      const bool inside = x < ask.out[2];
      n = std::min((inside ? ask.out[2] : ask.grid[2]) - x, positions - i);
      if (inside && y < ask.out[1] && z < ask.out[0] && item < ask.batch)
        runs.push_back({i, n, item, (z * ask.out[1] + y) * ask.out[2] + x});
      advance(n);
    }
  }

 private:
  void advance(int64_t n) {
    x += n;
    if (x < ask.grid[2]) return;
    x = 0;
    if (++y < ask.grid[1]) return;
    y = 0;
    if (++z < ask.grid[0]) return;
    z = 0;
    item++;
  }
};

}  // namespace AQ_ISA
